//! The stories that only a real node can show. Each begins with an account of its own and says what was not as it must be.
//!
//! They live here and not in the tests, because they are told twice: once on the product (`tests/node_stories.rs`), once on
//! one that is broken on purpose (`tests/broken_on_purpose.rs`), where each must say so.

mod client;
mod crash;
mod durations;
mod failover;
mod gate;
mod guests;
mod host;
mod ledger;
mod requests;
mod statuses;
mod storm;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

pub use client::the_client_words_each_refusal_as_what_it_is;
pub use crash::{kill_9_of_the_node_agent_in_mid_lease, kill_9_of_the_operator_in_mid_lease};
pub use durations::an_author_is_told_of_a_duration_that_a_tier_refuses;
pub use failover::{
    those_who_wait_keep_their_place_when_the_leader_dies, without_an_api_server_leases_run_on_and_nothing_is_granted,
};
pub use gate::{
    an_app_ends_although_its_worker_is_frozen, an_idle_worker_does_not_compute, only_the_allowed_worker_opens_the_card,
    the_deadline_ends_the_worker_and_closes_the_gate,
};
pub use guests::visitors_of_one_network_have_rows_of_their_own;
pub use host::a_host_with_only_cgroup_v1_says_so;
pub use ledger::{a_grant_that_nobody_uses_is_refunded, a_receipt_tells_every_boundary_in_order, first_light};
pub use requests::{
    a_visitor_who_leaves_a_copy_of_the_connection_is_forgotten, a_visitor_who_leaves_the_queue_is_forgotten,
    a_worker_is_a_process_of_its_own_pod_and_its_token_is_spent_once,
    malformed_requests_get_an_answer_their_client_understands_and_leave_the_ledger_alone,
};
pub use statuses::what_an_admin_wrote_says_what_became_of_it;
pub use storm::{a_gust_of_a_hundred_mixed_leases_adds_up, a_storm_of_a_thousand_mixed_leases_adds_up};

/// From the end of a lease to the page that says so; the rest is for a loaded machine.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// Path and query of `POST /schedule` as the client sends it; empty: without that parameter.
pub(crate) fn schedule(token: &str, duration: &str, size: &str) -> String {
    schedule_of(140_654_172_626_816, token, duration, size)
}

/// The same for a function that was never called before: it has no worker, and no size is remembered of it (L15).
pub(crate) fn schedule_of_new(token: &str, duration: &str, size: &str) -> String {
    // As many bits as an address of CPython has.
    let task = ulid::Ulid::generate().random() & ((1 << 46) - 1);
    schedule_of(task, token, duration, size)
}

fn schedule_of(task: u128, token: &str, duration: &str, size: &str) -> String {
    let size = if size.is_empty() { String::new() } else { format!("&gpuSize={size}") };
    let token = if token.is_empty() { String::new() } else { format!("&token={token}") };
    format!(
        "/schedule?cgroupPath=%2F&taskId={task}&enableQueue=true&tokenVersion=2&durationSeconds={duration}{size}{token}"
    )
}

/// The allow token of an answer to `/schedule` that was a grant.
fn granted(answer: &Value) -> Result<String> {
    ensure!(answer["status"] == 200, "not granted: {answer}");
    let body: Value = serde_json::from_str(answer["body"].as_str().unwrap_or_default())
        .with_context(|| format!("not granted at once: {answer}"))?;
    Ok(body["allowToken"].as_str().with_context(|| format!("a grant without allowToken: {answer}"))?.to_owned())
}
