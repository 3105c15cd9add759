//! Each check is seen to fail once: the stories are told on builds of operator and agent that break one thing on purpose,
//! and each must say exactly that.
#![cfg(feature = "cluster")]
#![allow(clippy::unwrap_used, clippy::panic)] // A test fails by panicking, its helpers too.

use spaceport_e2e::breakable::{Part, faults_only};
use spaceport_e2e::{World, stories};

/// A fault of the part, the story that is there to see it, and what the story says then.
type Broken = (&'static str, fn(&World) -> anyhow::Result<()>, &'static str);

const AGENT: &[Broken] = &[
    ("gate-open-to-all", stories::only_the_allowed_worker_opens_the_card, "without a lease"),
    ("gate-stays-shut", stories::only_the_allowed_worker_opens_the_card, "in the allowed worker"),
    ("idle-workers-run", stories::an_idle_worker_does_not_compute, "the thread of the idle worker computes on"),
    ("nothing-is-killed", stories::the_deadline_ends_the_worker_and_closes_the_gate, "it was not ended"),
    ("tokens-are-spent-again", stories::a_worker_is_a_process_of_its_own_pod_and_its_token_is_spent_once, "replayed"),
    ("places-are-forgotten", stories::those_who_wait_keep_their_place_when_the_leader_dies, "the places were lost"),
    // Last: only an agent that begins anew shuts the gate again, and sends the visitors away.
    ("gate-open-to-container", stories::only_the_allowed_worker_opens_the_card, "the parent during the lease"),
    ("gate-open-to-container", stories::the_deadline_ends_the_worker_and_closes_the_gate, "the gate is open"),
    ("visitors-stay", stories::a_visitor_who_leaves_the_queue_is_forgotten, "still waits"),
];

const OPERATOR: &[Broken] = &[
    ("whole-cards-count-once", stories::first_light, "not 2 x"),
    ("receipts-say-less", stories::kill_9_of_the_node_agent_in_mid_lease, "does not add up"),
    ("receipts-say-less", stories::a_gust_of_a_hundred_mixed_leases_adds_up, "the ledger does not add up"),
    ("refusals-leave-nothing", stories::first_light, "the page shows the refusal"),
    ("charge-declared", stories::first_light, "not 1 x"),
    (
        "any-audience",
        stories::malformed_requests_get_an_answer_their_client_understands_and_leave_the_ledger_alone,
        "token of another Space is answered",
    ),
    ("receipts-forget-allowed", stories::a_receipt_tells_every_boundary_in_order, "Allowed is missing"),
    ("grants-look-unused", stories::what_an_admin_wrote_says_what_became_of_it, "the grant shows what is used of it"),
    // Late: what it believes of the story's accounts is on no page, and is gone when the real operator is put back.
    ("grants-from-memory", stories::without_an_api_server_leases_run_on_and_nothing_is_granted, "granted from memory"),
    // Last: the schema refuses the receipts of such leases, so their accounts keep them unwritten for ever.
    ("charge-unallowed", stories::a_grant_that_nobody_uses_is_refunded, "no GPU, no charge"),
];

#[test]
fn each_fault_of_the_agent_is_seen() {
    each_is_seen(Part::DevicePlugin, AGENT);
}

#[test]
fn each_fault_of_the_operator_is_seen() {
    each_is_seen(Part::Operator, OPERATOR);
}

fn each_is_seen(part: Part, faults: &[Broken]) {
    let only = faults_only().unwrap();
    let faults: Vec<&Broken> = faults.iter().filter(|(fault, ..)| fault.contains(&only)).collect();
    if faults.is_empty() {
        return;
    }
    let world = World::connect().unwrap();
    world.apply_examples().unwrap();
    world.story_space().unwrap();
    let mut missed = Vec::new();
    // Put back also when something here fails: the next test needs what is installed.
    let broken = part.replace(&world).unwrap();
    broken.for_tests().unwrap();
    for (fault, story, complaint) in faults {
        broken.switch(fault).unwrap();
        let told = story(&world);
        broken.is_still(fault).unwrap();
        match told {
            Ok(()) => missed.push(format!("{fault}: its story saw nothing wrong")),
            Err(error) if format!("{error:#}").contains(complaint) => println!("{fault} is seen: {complaint}"),
            Err(error) => missed.push(format!("{fault}: expected {complaint:?}, but its story said: {error:#}")),
        }
    }
    broken.put_back().unwrap();
    assert!(missed.is_empty(), "{}\n{}", missed.join("\n"), world.evidence());
}
