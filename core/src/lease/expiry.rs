//! What time alone brings about.

use super::Moment;
use super::command::EndReport;
use super::event::{Departure, Event};
use super::mutant::Mutant;
use super::node::NOBODYS;
use super::report;
use super::request;
use super::state::{Lease, SlotUse, State};
use crate::ids::{AccountName, LeaseId, Steady};
use crate::page::Ending;

/// How long the requests of a node without a session keep their place. Its agent tells its visitors after 30 s that there
/// is no broker (docs/rules.md); this is beyond it.
pub const DISCONNECTED_QUEUE_MS: u64 = 60_000;

/// Time between two Cancels of the same lease: a session that is open delivers the first.
const CANCEL_PERIOD_MS: u64 = 5_000;

pub(super) fn tick(at: Moment, state: &State) -> Vec<Event> {
    let mut events = Vec::new();
    let is_late = |confirm_by: Option<Steady>| confirm_by.is_some_and(|confirm_by| confirm_by <= at.steady);
    for waiting in state.queue.unconfirmed().filter(|waiting| is_late(waiting.unconfirmed)) {
        events.extend(request::left(at, state, waiting, Departure::NotPresented));
    }
    for (id, lease) in state.leases() {
        events.extend(overdue(at, state, id, lease));
    }
    // What blocks an account may end by time alone: the pause after a failed write.
    let is_free = |name: &&AccountName| {
        let Some(account) = state.accounts.get(*name) else { return true };
        let page = state.page_of(account);
        state.queue.parked_of(name).any(|waiting| !account.is_blocked(page, waiting.cookie.as_ref(), at.steady))
    };
    events.extend(state.queue.parked_accounts().filter(is_free).map(|name| Event::Unparked { account: name.clone() }));
    if state.no_device.values().any(|(since, _)| at.steady.since(*since) >= report::NO_DEVICE_PERIOD_MS) {
        events.push(Event::Forgotten { at: at.steady });
    }
    events
}

/// When a silent node's lease is given up (L9).
fn end_by(state: &State, lease: &Lease) -> Steady {
    if state.has(Mutant::PresentLimits) {
        let limits = state.settings(&lease.node).limits;
        return Lease { limits, ..lease.clone() }.drained_by();
    }
    lease.drained_by()
}

/// L9: only the node ends a granted lease. A node that is there is told; one that is silent is given up at the bound.
fn overdue(at: Moment, state: &State, id: &LeaseId, lease: &Lease) -> Vec<Event> {
    let joined = state.joined(&lease.node);
    let nobodys = lease.account.is_none() && lease.slot == SlotUse::Taken && !state.strangers.contains_key(id);
    let late = lease.is_open() && (end_by(state, lease) < at.steady || state.has(Mutant::ExpireAtOnce));
    let again = lease.cancelled.is_none_or(|cancelled| at.steady.since(cancelled) >= CANCEL_PERIOD_MS);
    if joined && (late || nobodys) && again {
        let reason = if late { "the lease is over its limit" } else { NOBODYS };
        return vec![Event::Cancelled { lease: id.clone(), at: at.steady, reason }];
    }
    if !joined && late {
        let report = EndReport { ending: Ending::Expired, used_ms: 0 };
        return report::settle(at, state, id, report, SlotUse::Free);
    }
    Vec::new()
}
