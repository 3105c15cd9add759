//! What nodes say about leases. Every report may come twice, late, or about a lease that nobody knows any more (L10).

use super::Moment;
use super::change::PageChange;
use super::command::{AgentLease, AgentPhase, EndReport, FreedAs, IdleWorker, PickedSlot};
use super::event::Event;
use super::mutant::Mutant;
use super::request;
use super::state::{Lease, SlotUse, Stage, State};
use crate::ids::{LeaseId, NodeName, Steady};
use crate::page::{Ending, Hold};

/// Leases of one Space that may end as NoDevice without a charge, in an hour. Beyond it they are charged like any other
/// failure, or an app that fails on purpose would hold cards for free (N16).
pub const NO_DEVICE_FREE_PER_HOUR: u32 = 20;

/// The hour.
pub(super) const NO_DEVICE_PERIOD_MS: u64 = 60 * 60 * 1000;

/// The lease, if this node may speak of it.
fn find<'a>(state: &'a State, node: &NodeName, lease: &LeaseId) -> Option<&'a Lease> {
    state.leases.get(lease).filter(|found| found.node == *node)
}

fn acknowledged(node: &NodeName, lease: &LeaseId, ended: bool, freed: bool) -> Event {
    Event::Acknowledged { node: node.clone(), lease: lease.clone(), ended, freed }
}

/// A lease whose page is being read: what its node says of it is kept until that tells whose it is (L7).
fn met(node: &NodeName, known: &AgentLease, change: impl FnOnce(&mut AgentLease)) -> Event {
    let mut lease = Box::new(known.clone());
    change(&mut lease);
    Event::StrangerMet { node: node.clone(), lease }
}

pub(super) fn started(state: &State, node: &NodeName, lease: LeaseId, slot: PickedSlot) -> Vec<Event> {
    if let (Some(stranger), PickedSlot::Has(_)) = (state.stranger(node, &lease), slot) {
        let told = met(node, stranger, |lease| lease.slot = slot);
        return vec![told, Event::Assigned { lease, slot }];
    }
    match find(state, node, &lease) {
        // Of one whose account is gone its slot counts still.
        Some(found) if found.is_open() || (found.account.is_none() && found.slot == SlotUse::Taken) => {
            let taken = taken(state, node, found, slot);
            let events = [Event::Assigned { lease, slot }, Event::NodeHeard { node: node.clone() }];
            events.into_iter().chain(taken).collect()
        }
        _ => Vec::new(),
    }
}

/// A lease has found its own worker, which is kept no longer. The node's list says so a moment later; in between its card
/// would be thought to have room for one more, or, were that list sent first, this lease be expected elsewhere.
fn taken(state: &State, name: &NodeName, lease: &Lease, slot: PickedSlot) -> Option<Event> {
    let (node, card) = (state.nodes.get(name)?, slot.has()?);
    let worker = lease.request.as_ref()?.worker.as_ref()?;
    let is_own =
        |idle: &IdleWorker| idle.worker.as_ref() == Some(worker) && idle.card == card && idle.size == lease.size;
    let own = node.idle.iter().position(is_own)?;
    let mut idle = node.idle.clone();
    idle.remove(own);
    Some(Event::IdleTaken { node: name.clone(), idle })
}

pub(super) fn running(state: &State, node: &NodeName, lease: LeaseId) -> Vec<Event> {
    if let Some(stranger) = state.stranger(node, &lease) {
        return vec![met(node, stranger, |lease| lease.phase = AgentPhase::Running)];
    }
    match find(state, node, &lease) {
        Some(found) if found.is_open() && found.stage < Stage::Running => vec![Event::Running { lease }],
        _ => Vec::new(),
    }
}

/// The node did not take the order: the hold is voided and the request returns to its place.
pub(super) fn refused(at: Moment, state: &State, node: &NodeName, lease: &LeaseId) -> Vec<Event> {
    if state.stranger(node, lease).is_some() {
        // It waited there for a slot, and gets none. If it is held, its node will say once more that it is not there.
        return vec![Event::StrangerJudged { lease: lease.clone() }, Event::SlotFreed { lease: lease.clone() }];
    }
    let Some(found) = find(state, node, lease).filter(|found| found.is_open()) else { return Vec::new() };
    let mut events = void(at, state, lease, Ending::Refused, SlotUse::Free);
    if !events.is_empty() && found.request.is_some() && !found.abandoned {
        events.push(Event::NodeRests { node: node.clone() });
    }
    events
}

/// `kept`: its worker is kept for reuse, and its slot is free with that (L16).
pub(super) fn ended(
    at: Moment,
    state: &State,
    node: &NodeName,
    lease: &LeaseId,
    report: EndReport,
    kept: bool,
) -> Vec<Event> {
    if let Some(stranger) = state.stranger(node, lease) {
        return stranger_ended(state, node, stranger, report);
    }
    let Some(found) = find(state, node, lease) else {
        // Unknown or settled long ago: nothing changes, and the node may forget it (L10).
        return vec![acknowledged(node, lease, true, false)];
    };
    let kept = kept && !state.has(Mutant::IdleUnheard);
    let slot = if kept { SlotUse::Free } else { clearing(found) };
    match (&found.account, found.stage) {
        (None, _) => vec![Event::Ended { lease: lease.clone(), slot }, acknowledged(node, lease, true, false)],
        (Some(_), Stage::Settled) => vec![acknowledged(node, lease, true, false)],
        // It is acknowledged when it is durable (invariant 2). A hold that is not durable no node can know of.
        (Some(_), Stage::Settling | Stage::Reserving) => Vec::new(),
        (Some(_), Stage::Ordered | Stage::Assigned | Stage::Running) => {
            let mut events = settle(at, state, lease, report, slot);
            // Told with its end, for at that the next one is chosen.
            let idle = if kept && !events.is_empty() { worker_of(found) } else { None };
            events.extend(idle.map(|idle| Event::WorkerKept { node: node.clone(), idle }));
            if state.has(Mutant::AcknowledgeEarly) {
                events.push(acknowledged(node, lease, true, false));
            }
            events
        }
    }
}

/// It is acknowledged when its page has told that nobody pays for it, or when its settlement is durable (invariant 2).
fn stranger_ended(state: &State, node: &NodeName, stranger: &AgentLease, report: EndReport) -> Vec<Event> {
    if matches!(stranger.phase, AgentPhase::Ended { .. }) {
        return Vec::new();
    }
    let mut events = vec![met(node, stranger, |lease| lease.phase = AgentPhase::Ended { report, freed: false })];
    let known = state.leases.get(&stranger.lease);
    events.extend(known.map(|known| Event::Ended { lease: stranger.lease.clone(), slot: clearing(known) }));
    events
}

/// The worker of a lease that ran. Of one of an earlier term its function is not known; the next list of its node has it.
fn worker_of(lease: &Lease) -> Option<IdleWorker> {
    let worker = lease.request.as_ref()?.worker.clone()?;
    Some(IdleWorker { worker: Some(worker), card: lease.card?, size: lease.size })
}

/// What an ended lease does to its slot until `Freed` comes: one that still waits for its slot (L14) has none. One that got
/// another slot than its predecessor's, which still clears, has a card.
fn clearing(lease: &Lease) -> SlotUse {
    let waits = lease.card.is_none() && (lease.after.is_some() || lease.awaits.is_some());
    if lease.slot == SlotUse::Free || waits { SlotUse::Free } else { SlotUse::Clearing }
}

pub(super) fn freed(state: &State, node: &NodeName, lease: LeaseId, how: FreedAs) -> Vec<Event> {
    // Where a slot is out of use the inventory says so, which the node sends first; here it is no longer this lease's.
    let (FreedAs::Free | FreedAs::Held | FreedAs::Quarantined) = how;
    let known = find(state, node, &lease).is_some_and(|found| found.slot != SlotUse::Free);
    let mut events = vec![acknowledged(node, &lease, false, true), Event::NodeHeard { node: node.clone() }];
    if let Some(stranger) = state.stranger(node, &lease)
        && let AgentPhase::Ended { report, .. } = stranger.phase
    {
        events.push(met(node, stranger, |lease| lease.phase = AgentPhase::Ended { report, freed: true }));
    }
    if known {
        events.insert(0, Event::SlotFreed { lease });
    }
    events
}

/// Posts what a lease used, or voids it: the hold is charged weight x min(used, declared) or nothing (L11, invariant 5).
pub(super) fn settle(at: Moment, state: &State, lease: &LeaseId, report: EndReport, slot: SlotUse) -> Vec<Event> {
    let Some(found) = state.leases.get(lease) else { return Vec::new() };
    let Some(name) = &found.account else { return Vec::new() };
    let Some(account) = state.accounts.get(name) else { return Vec::new() };
    let Some(hold) = account.working.holds.iter().find(|hold| hold.lease == *lease) else { return Vec::new() };
    let (ending, charged_ms) = charge(state, hold, report, at.steady);
    let time = if state.has(Mutant::TimeGoesBack) { at.wall } else { account.working.time(at.wall) };
    let change = PageChange::Settle { lease: lease.clone(), ending, used_ms: report.used_ms, charged_ms, at: time };
    let mut events = vec![
        Event::Changed { account: name.clone(), change, at: at.steady },
        Event::Ended { lease: lease.clone(), slot },
    ];
    if ending == Ending::NoDevice {
        events.push(Event::NoDeviceCounted { space: hold.space.clone(), at: at.steady });
    }
    events
}

/// Voids a hold at no charge. A request that still waits for its answer returns to its place.
pub(super) fn void(at: Moment, state: &State, lease: &LeaseId, ending: Ending, slot: SlotUse) -> Vec<Event> {
    let mut events = settle(at, state, lease, EndReport { ending, used_ms: 0 }, slot);
    let Some(found) = state.leases.get(lease).filter(|_| !events.is_empty()) else { return events };
    if let Some(waiting) = &found.request {
        events.extend(request::again(at, state, waiting, !found.abandoned));
    }
    events
}

fn charge(state: &State, hold: &Hold, report: EndReport, now: Steady) -> (Ending, u64) {
    let used_ms = match report.used_ms {
        used_ms if state.has(Mutant::ChargeUnbounded) => used_ms,
        _ if state.has(Mutant::ChargeDeclared) => hold.declared_ms,
        used_ms => used_ms.min(hold.declared_ms),
    };
    let charged_ms = hold.weight.saturating_mul(used_ms);
    match report.ending {
        Ending::Released | Ending::Failed | Ending::WorkerDied | Ending::Deadline | Ending::Cancelled => {
            (report.ending, charged_ms)
        }
        Ending::NeverAllowed if state.has(Mutant::ChargeUnallowed) => {
            (report.ending, hold.weight.saturating_mul(hold.declared_ms))
        }
        Ending::NeverAllowed | Ending::Undelivered | Ending::Refused | Ending::PlatformFault | Ending::Expired => {
            (report.ending, 0)
        }
        Ending::NoDevice => {
            let free = state.no_device.get(&hold.space.uid).is_none_or(|(since, count)| {
                now.since(*since) >= NO_DEVICE_PERIOD_MS || *count < NO_DEVICE_FREE_PER_HOUR
            });
            if free { (Ending::NoDevice, 0) } else { (Ending::Failed, charged_ms) }
        }
    }
}
