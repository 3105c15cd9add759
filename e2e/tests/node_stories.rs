//! What only a real node can show, told on the product as it is installed.
#![cfg(feature = "cluster")]
#![allow(clippy::unwrap_used, clippy::panic)] // A test fails by panicking, its helpers too.

use spaceport_e2e::{World, stories};

/// Tells a story; when it fails, prints what a person would ask for.
fn tell(story: fn(&World) -> anyhow::Result<()>) {
    let world = World::connect().unwrap();
    world.apply_examples().unwrap();
    world.story_space().unwrap();
    if let Err(error) = story(&world) {
        eprintln!("{}", world.evidence());
        panic!("{error:#}");
    }
}

#[test]
fn first_light() {
    tell(stories::first_light);
}

#[test]
fn an_author_is_told_of_a_duration_that_a_tier_refuses() {
    tell(stories::an_author_is_told_of_a_duration_that_a_tier_refuses);
}

#[test]
fn what_an_admin_wrote_says_what_became_of_it() {
    tell(stories::what_an_admin_wrote_says_what_became_of_it);
}

#[test]
fn only_the_allowed_worker_opens_the_card() {
    tell(stories::only_the_allowed_worker_opens_the_card);
}

#[test]
fn an_idle_worker_does_not_compute() {
    tell(stories::an_idle_worker_does_not_compute);
}

#[test]
fn the_deadline_ends_the_worker_and_closes_the_gate() {
    tell(stories::the_deadline_ends_the_worker_and_closes_the_gate);
}

#[test]
fn malformed_requests_get_an_answer_their_client_understands_and_leave_the_ledger_alone() {
    tell(stories::malformed_requests_get_an_answer_their_client_understands_and_leave_the_ledger_alone);
}

#[test]
fn a_worker_is_a_process_of_its_own_pod_and_its_token_is_spent_once() {
    tell(stories::a_worker_is_a_process_of_its_own_pod_and_its_token_is_spent_once);
}

#[test]
fn a_grant_that_nobody_uses_is_refunded() {
    tell(stories::a_grant_that_nobody_uses_is_refunded);
}

#[test]
fn a_visitor_who_leaves_the_queue_is_forgotten() {
    tell(stories::a_visitor_who_leaves_the_queue_is_forgotten);
}

#[test]
fn a_visitor_who_leaves_a_copy_of_the_connection_is_forgotten() {
    tell(stories::a_visitor_who_leaves_a_copy_of_the_connection_is_forgotten);
}

#[test]
fn visitors_of_one_network_have_rows_of_their_own() {
    tell(stories::visitors_of_one_network_have_rows_of_their_own);
}

#[test]
fn the_client_words_each_refusal_as_what_it_is() {
    tell(stories::the_client_words_each_refusal_as_what_it_is);
}

#[test]
fn a_storm_of_a_thousand_mixed_leases_adds_up() {
    tell(stories::a_storm_of_a_thousand_mixed_leases_adds_up);
}

#[test]
fn an_app_ends_although_its_worker_is_frozen() {
    tell(stories::an_app_ends_although_its_worker_is_frozen);
}

#[test]
fn a_host_with_only_cgroup_v1_says_so() {
    tell(stories::a_host_with_only_cgroup_v1_says_so);
}

#[test]
fn kill_9_of_the_operator_in_mid_lease() {
    tell(stories::kill_9_of_the_operator_in_mid_lease);
}

#[test]
fn kill_9_of_the_node_agent_in_mid_lease() {
    tell(stories::kill_9_of_the_node_agent_in_mid_lease);
}

#[test]
fn a_receipt_tells_every_boundary_in_order() {
    tell(stories::a_receipt_tells_every_boundary_in_order);
}

#[test]
fn those_who_wait_keep_their_place_when_the_leader_dies() {
    tell(stories::those_who_wait_keep_their_place_when_the_leader_dies);
}

#[test]
fn without_an_api_server_leases_run_on_and_nothing_is_granted() {
    tell(stories::without_an_api_server_leases_run_on_and_nothing_is_granted);
}
