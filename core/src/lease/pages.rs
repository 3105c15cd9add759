//! Pages: what their watch shows, and what became of our writes (L2, L3).

use super::Moment;
use super::change::PageChange;
use super::command::{AgentLease, Policy};
use super::dispatch;
use super::event::{Departure, Event, TermEnd};
use super::mutant::Mutant;
use super::node;
use super::report;
use super::request::{self, Refusal};
use super::state::{Account, Batch, Lease, SlotUse, Stage, State};
use crate::ids::{AccountName, Epoch, LeaseId, NodeName, Steady};
use crate::page::{Ending, Hold, Page};
use crate::protocol::Denial;

/// An order leaves within so long of the decision of its hold, or not at all (L9). Somebody who is cut off from the API server
/// hears late that the hold is durable; meanwhile a later leader may have met it, and counts from then until it gives it up.
/// Twice the operator's default limit of a page write, so that one whose answer was lost is still in time.
pub const ORDER_AGE_MAX_MS: u64 = 10_000;

/// Wait after a first failed write; it doubles with each further one.
const RETRY_FIRST_MS: u64 = 1_000;
/// Longest wait between tries of a write that fails.
const RETRY_LONGEST_MS: u64 = 30_000;

pub(super) fn seen(at: Moment, state: &State, name: AccountName, page: Box<Page>, policy: Policy) -> Vec<Event> {
    if is_later(state, &page) {
        return deposed(page.epoch);
    }
    let Some(account) = state.accounts.get(&name) else {
        let mut events =
            vec![Event::AccountTaken { account: name.clone(), page: page.clone(), policy: policy.clone() }];
        // Before a hold is voided, and its window with it.
        events.extend(base(at, &name, &page, &policy));
        events.extend(page.holds.iter().flat_map(|hold| adopt(at, state, &name, &page, hold)));
        return events;
    };
    let mut events = Vec::new();
    if policy != *account.policy {
        events.push(Event::PolicyChanged { account: name.clone(), policy: policy.clone() });
        events.extend(base(at, &name, &account.working, &policy));
    }
    // With a write in flight its own answer tells whether this page is ours or contests it.
    if page.seq > account.durable.seq && account.in_flight.is_none() {
        // The base, if it is still another, follows with the next hold.
        events.retain(|event| !matches!(event, Event::Changed { .. }));
        events.extend(rebase(at, state, &name, account, page));
    }
    events
}

/// A write for what is shown beside the page, as soon as notes may be written (L5). Any other write carries it too.
pub(super) fn show(at: Moment, state: &State, name: AccountName) -> Vec<Event> {
    if !state.accounts.contains_key(&name) {
        return Vec::new();
    }
    vec![Event::Changed { account: name, change: PageChange::Shown, at: at.steady }]
}

/// The base of the open window follows the tier both ways; holds are not touched (L12).
fn base(at: Moment, name: &AccountName, page: &Page, policy: &Policy) -> Option<Event> {
    let window = page.open_window(page.time(at.wall))?;
    let (base_ms, generation) = (policy.allowance.base_ms, policy.allowance.generation);
    if (window.base_ms, window.generation) == (base_ms, generation) {
        return None;
    }
    let change = PageChange::Base { window: window.start, base_ms, generation };
    Some(Event::Changed { account: name.clone(), change, at: at.steady })
}

/// A hold of an earlier term. What its node says decides (L7).
fn adopt(at: Moment, state: &State, name: &AccountName, page: &Page, hold: &Hold) -> Vec<Event> {
    let known = state.leases.get(&hold.lease);
    let limits = state.inherited_limits();
    let adopted = Event::Adopted {
        lease: hold.lease.clone(),
        account: Some(name.clone()),
        node: hold.node.clone(),
        size: hold.size,
        declared_ms: hold.declared_ms,
        card: known.and_then(|known| known.card),
        stage: Stage::Ordered,
        slot: known.map_or(SlotUse::Taken, |known| known.slot),
        limits,
        // The order may leave as long after the decision of the hold, which was before now.
        waits_ms: ORDER_AGE_MAX_MS.saturating_add(hold.after.as_ref().map_or(0, |_| limits.clear_limit_ms)),
        at: at.steady,
    };
    if state.stranger(&hold.node, &hold.lease).is_some() {
        // It has it: what it said of it is taken next.
        return vec![adopted];
    }
    if !state.joined(&hold.node) {
        return vec![adopted];
    }
    let lease = || hold.lease.clone();
    if known.is_some() || hold.epoch >= state.epoch {
        // The node was told to end it, or is told now: its answer settles it (L9).
        let reason = "the reservation was found after its node had joined";
        return vec![adopted, Event::Cancelled { lease: lease(), at: at.steady, reason }];
    }
    // The node has joined without it, and takes no order of an earlier term any more: it can not come to have it (L7).
    let (ending, at_time) = (Ending::Refused, page.time(at.wall));
    let void = PageChange::Settle { lease: lease(), ending, used_ms: 0, charged_ms: 0, at: at_time };
    vec![
        adopted,
        Event::Changed { account: name.clone(), change: void, at: at.steady },
        Event::Ended { lease: lease(), slot: SlotUse::Free },
    ]
}

pub(super) fn gone(at: Moment, state: &State, name: AccountName) -> Vec<Event> {
    if !state.accounts.contains_key(&name) {
        return Vec::new();
    }
    let mut events = Vec::new();
    for waiting in state.queue.iter().filter(|waiting| waiting.account == name) {
        events.push(Event::Left { ticket: waiting.ticket.clone(), why: Departure::Refused });
        events.extend(Refusal::of(waiting).events(at, state, Denial::AccountDeleting));
    }
    for (id, lease) in state.leases().filter(|(_, lease)| lease.account.as_ref() == Some(&name)) {
        // Also of one whose order has left: its node may still refuse it, and then nobody else answers the call.
        if let Some(waiting) = lease.request.as_ref().filter(|_| lease.stage <= Stage::Ordered) {
            events.extend(Refusal::of(waiting).events(at, state, Denial::AccountDeleting));
        }
        if lease.is_open() {
            let reason = "the account is gone";
            events.push(Event::Cancelled { lease: id.clone(), at: at.steady, reason });
        }
    }
    events.push(Event::AccountDropped { account: name });
    events
}

/// The account with this write in flight. A late answer to an earlier write is none of our business any more.
fn in_flight<'a>(state: &'a State, name: &AccountName, write_id: &str) -> Option<(&'a Account, &'a Batch)> {
    let account = state.accounts.get(name)?;
    let batch = account.in_flight.as_ref().filter(|batch| batch.write_id == write_id)?;
    Some((account, batch))
}

pub(super) fn written(at: Moment, state: &State, name: AccountName, write_id: &str) -> Vec<Event> {
    match in_flight(state, &name, write_id) {
        Some((_, batch)) => committed(at, state, name, batch),
        None => Vec::new(),
    }
}

pub(super) fn conflict(state: &State, name: AccountName, write_id: &str) -> Vec<Event> {
    match in_flight(state, &name, write_id) {
        Some(_) => vec![Event::WriteContested { account: name }],
        None => Vec::new(),
    }
}

pub(super) fn unknown(state: &State, name: AccountName, write_id: &str) -> Vec<Event> {
    match in_flight(state, &name, write_id) {
        Some(_) => vec![Event::WriteUnknown { account: name }],
        None => Vec::new(),
    }
}

pub(super) fn failed(at: Moment, state: &State, name: AccountName, write_id: &str) -> Vec<Event> {
    match in_flight(state, &name, write_id) {
        // An earlier attempt of the same write may have happened: only reads can tell.
        Some((_, batch)) if batch.unknown => vec![Event::WriteUnknown { account: name }],
        Some((account, batch)) => aborted(at, state, name, account, batch),
        None => Vec::new(),
    }
}

pub(super) fn read(at: Moment, state: &State, name: AccountName, page: Box<Page>) -> Vec<Event> {
    if is_later(state, &page) {
        return deposed(page.epoch);
    }
    let Some(account) = state.accounts.get(&name) else { return Vec::new() };
    match &account.in_flight {
        // Nobody wrote the page since: our write may still be under way (L2). The same write again settles it, for only
        // one of the two can happen.
        Some(batch) if batch.write_id != page.write_id && page.seq <= account.durable.seq => {
            if state.has(Mutant::ReadProvesFailure) {
                return aborted(at, state, name, account, batch);
            }
            vec![Event::WriteRepeated { account: name }]
        }
        _ => newest(at, state, &name, account, page),
    }
}

/// A page that was read: it may show our write in flight, or one of somebody else.
fn newest(at: Moment, state: &State, name: &AccountName, account: &Account, page: Box<Page>) -> Vec<Event> {
    match &account.in_flight {
        Some(batch) if batch.write_id == page.write_id => committed(at, state, name.clone(), batch),
        _ if page.seq > account.durable.seq => rebase(at, state, name, account, page),
        _ => Vec::new(),
    }
}

/// L7: the page of leases that a node had when it joined and that no known page held. A hold of theirs was durable before
/// their orders left, so it is on this page, or settled.
pub(super) fn confirmed(
    at: Moment,
    state: &State,
    name: AccountName,
    node: &NodeName,
    page: Option<Box<Page>>,
) -> Vec<Event> {
    if let Some(page) = page.as_ref().filter(|page| is_later(state, page)) {
        return deposed(page.epoch);
    }
    // Of a page that was written since, and was shown meanwhile, the holds are known.
    let known = state.accounts.get(&name).map_or(0, |account| account.durable.seq);
    let is_held = |lease: &LeaseId| {
        let mut holds = page.iter().filter(|page| page.seq >= known).flat_map(|page| &page.holds);
        holds.any(|hold| hold.lease == *lease)
    };
    let of_it: Vec<&AgentLease> = state.strangers_of(&name, node).collect();
    // The watch was faster.
    if of_it.is_empty() {
        return Vec::new();
    }
    let judged =
        of_it.into_iter().filter(|lease| !is_held(&lease.lease)).flat_map(|lease| node::judge(at, node, lease));
    let judged: Vec<Event> = judged.collect();
    let mut events = match (state.accounts.get(&name), page) {
        (Some(account), Some(page)) => newest(at, state, &name, account, page),
        _ => Vec::new(),
    };
    events.extend(judged);
    events
}

fn is_later(state: &State, page: &Page) -> bool {
    page.epoch > state.epoch && !state.has(Mutant::NeverDeposed)
}

fn deposed(by: Epoch) -> Vec<Event> {
    vec![Event::TermEnded(TermEnd::Deposed { by })]
}

/// The write happened: what it carried may be seen (invariant 2).
fn committed(at: Moment, state: &State, name: AccountName, batch: &Batch) -> Vec<Event> {
    let mut events = vec![Event::Committed { account: name.clone() }];
    for change in &batch.changes {
        match change {
            PageChange::Hold { hold, .. } => {
                if let Some(lease) = state.leases.get(&hold.lease).filter(|lease| lease.stage == Stage::Reserving) {
                    events.extend(order(at, state, hold, lease));
                }
            }
            PageChange::Settle { lease, .. } => events.extend(settled(state, &name, lease)),
            _ => {}
        }
    }
    events
}

/// How long ago a hold was decided. The wall clock counts too, for that of intervals may stand still with its machine.
fn age_ms(at: Moment, hold: &Hold, lease: &Lease) -> u64 {
    at.steady.since(lease.sent).max(at.wall.since(hold.since))
}

fn order(at: Moment, state: &State, hold: &Hold, lease: &Lease) -> Vec<Event> {
    let id = &hold.lease;
    let late = age_ms(at, hold, lease) > ORDER_AGE_MAX_MS && !state.has(Mutant::OrderLate);
    if lease.abandoned || late || !state.joined(&lease.node) {
        // Nobody was told of it, so nobody has to be asked.
        return report::void(at, state, id, Ending::Undelivered, SlotUse::Free);
    }
    let before = lease.after.as_ref().and_then(|before| state.leases.get(before));
    vec![Event::Ordered {
        lease: id.clone(),
        at: at.steady,
        limits: state.settings(&lease.node).limits,
        waits_ms: before.map_or(0, |before| before.limits.clear_limit_ms),
        avoid: dispatch::avoided(at.steady, state, id, lease),
    }]
}

fn settled(state: &State, account: &AccountName, id: &LeaseId) -> Vec<Event> {
    let Some(lease) = state.leases.get(id) else { return Vec::new() };
    vec![
        Event::Settled { account: account.clone(), lease: id.clone() },
        Event::Acknowledged { node: lease.node.clone(), lease: id.clone(), ended: true, freed: false },
    ]
}

/// The write did not happen: its holds are aborted, all else is tried again (L3).
fn aborted(at: Moment, state: &State, name: AccountName, account: &Account, batch: &Batch) -> Vec<Event> {
    let holds: Vec<LeaseId> = batch.changes.iter().filter_map(hold_of).cloned().collect();
    let events = holds.iter().flat_map(|lease| unreserve(at, state, lease)).collect::<Vec<_>>();
    let mut wait_ms = RETRY_FIRST_MS;
    for _ in 0..account.failures.min(8) {
        wait_ms = wait_ms.saturating_mul(2).min(RETRY_LONGEST_MS);
    }
    let retry_at: Steady = at.steady.plus(wait_ms);
    let mut all = vec![Event::WriteFailed { account: name, aborted: holds, retry_at }];
    all.extend(events);
    all
}

fn hold_of(change: &PageChange) -> Option<&LeaseId> {
    match change {
        PageChange::Hold { hold, .. } => Some(&hold.lease),
        _ => None,
    }
}

/// A hold that never became durable: no trace of it is anywhere else.
fn unreserve(at: Moment, state: &State, id: &LeaseId) -> Vec<Event> {
    let Some(lease) = state.leases.get(id) else { return Vec::new() };
    let mut events = vec![Event::Unreserved { lease: id.clone() }];
    if let Some(waiting) = &lease.request {
        events.extend(request::again(at, state, waiting, !lease.abandoned));
    }
    events
}

/// Somebody else, an earlier leader, wrote the page. What we have in flight certainly failed, for it expected the page of
/// before; it is checked again on top of what stands there now. This page only (L2).
fn rebase(at: Moment, state: &State, name: &AccountName, account: &Account, page: Box<Page>) -> Vec<Event> {
    let in_flight = account.in_flight.iter().flat_map(|batch| &batch.changes);
    let mut working = (*page).clone();
    let (kept, misfits): (Vec<PageChange>, Vec<PageChange>) =
        in_flight.chain(&account.pending).cloned().partition(|change| {
            let forget = state.has(Mutant::RebaseForgets) && matches!(change, PageChange::Settle { .. });
            !forget && change.make(&mut working).is_ok()
        });
    let aborted: Vec<&LeaseId> = misfits.iter().filter_map(hold_of).collect();
    let reserved: Vec<&LeaseId> = kept.iter().filter_map(hold_of).collect();
    let mut follow = Vec::new();
    for (id, lease) in state.leases().filter(|(_, lease)| lease.account.as_ref() == Some(name)) {
        let on_page = page.holds.iter().any(|hold| hold.lease == *id);
        if aborted.contains(&id) {
            follow.extend(unreserve(at, state, id));
        } else if !on_page && !reserved.contains(&id) && lease.stage != Stage::Settled {
            // Settled by the other writer, once (invariant 3). If it still runs it is nobody's.
            if lease.is_open() {
                let reason = "the lease was settled by an earlier leader";
                follow.push(Event::Cancelled { lease: id.clone(), at: at.steady, reason });
            }
            follow.extend(settled(state, name, id));
        }
    }
    let unknown = page
        .holds
        .iter()
        .filter(|hold| state.leases.get(&hold.lease).is_none_or(|lease| lease.account.as_ref() != Some(name)));
    follow.extend(unknown.flat_map(|hold| adopt(at, state, name, &page, hold)));
    let mut events = vec![Event::Rebased { account: name.clone(), page, kept }];
    events.extend(follow);
    events
}

pub(super) fn receipt_written(at: Moment, state: &State, name: AccountName, lease: LeaseId) -> Vec<Event> {
    let known = state
        .accounts
        .get(&name)
        .is_some_and(|account| account.working.closed.iter().any(|closed| closed.hold.lease == lease));
    if !known {
        return Vec::new();
    }
    vec![Event::Changed { account: name, change: PageChange::ReceiptWritten { lease }, at: at.steady }]
}
