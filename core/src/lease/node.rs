//! Nodes come, tell what they have, and go (L6, L7).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Moment;
use super::command::{AgentLease, AgentPhase, IdleWorker};
use super::event::{Departure, Event};
use super::mutant::Mutant;
use super::report;
use super::request;
use super::state::{Lease, SlotUse, Stage, State};
use crate::ids::{AccountName, LeaseId, NodeName, Size};
use crate::page::Ending;
use crate::slots::{self, Card};

/// Why a lease is ended that no account pays for (L7).
pub const NOBODYS: &str = "no account has a reservation for this lease";

/// An agent presents its waiting requests again right behind Joined; one that is not there by then is gone.
const CONFIRM_MS: u64 = 2_000;

pub(super) fn hello(at: Moment, state: &State, node: NodeName, agent_instance: String) -> Vec<Event> {
    // A second session without a goodbye of the first.
    let mut events = if state.joined(&node) { disconnected(at, state, node.clone()) } else { Vec::new() };
    let restarted = state.nodes.get(&node).is_some_and(|known| known.agent_instance != agent_instance);
    if restarted {
        // The connections of its earlier start are gone, and with them whoever waited on them.
        for waiting in state.queue.line(&node).filter(|waiting| *waiting.ticket.agent_instance != *agent_instance) {
            events.extend(request::left(at, state, waiting, Departure::AgentRestarted));
        }
        let stale = state.leases_on(&node).filter(|(_, lease)| {
            let request = lease.request.as_ref();
            request.is_some_and(|waiting| *waiting.ticket.agent_instance != *agent_instance)
        });
        events.extend(stale.map(|(id, _)| Event::Abandoned { lease: id.clone() }));
    }
    events.push(Event::NodeHello { node, agent_instance });
    events
}

/// L7: what the pages hold against what the node has.
pub(super) fn joined(
    at: Moment,
    state: &State,
    node: NodeName,
    cards: Vec<Card>,
    leases: Vec<AgentLease>,
    idle: Vec<IdleWorker>,
) -> Vec<Event> {
    let confirm_by = at.steady.plus(CONFIRM_MS);
    let withdrawn = withdrawn(state, &node, &cards);
    let idle = if state.has(Mutant::IdleUnheard) { Vec::new() } else { idle };
    let mut events = vec![Event::NodeJoined { node: node.clone(), cards, idle, confirm_by }];
    let on_node: BTreeMap<LeaseId, AgentLease> = leases.into_iter().map(|lease| (lease.lease.clone(), lease)).collect();
    for (id, lease) in state.leases_on(&node) {
        if !on_node.contains_key(id) {
            events.extend(missing(at, state, id, lease));
        }
    }
    let mut doubted: BTreeSet<&AccountName> = BTreeSet::new();
    for lease in on_node.values() {
        match state.leases.get(&lease.lease) {
            Some(known) if known.node == node => events.extend(both(at, state, &node, known, lease)),
            // It is another node's: this one has no say in it.
            Some(_) => {}
            None => {
                events.extend(slot_of(at, state, &node, lease));
                match doubtful(state, lease) {
                    Some(account) => {
                        events.push(Event::StrangerMet { node: node.clone(), lease: Box::new(lease.clone()) });
                        doubted.insert(account);
                    }
                    None => events.push(nobodys(at, &node, lease)),
                }
            }
        }
    }
    let doubted = doubted.into_iter();
    events.extend(doubted.map(|account| Event::PageDoubted { node: node.clone(), account: account.clone() }));
    for event in &mut events {
        if let Event::Queued(waiting) = event {
            Arc::make_mut(waiting).unconfirmed = Some(confirm_by);
        }
    }
    // Behind those that return to their places.
    events.extend(withdrawn);
    events
}

/// A node that comes to have fewer slots can not keep what was promised for more of them.
fn withdrawn(state: &State, node: &NodeName, cards: &[Card]) -> Option<Event> {
    let slots = |cards: &[Card]| slots::capacity(cards, Size::Large);
    let fewer = state.nodes.get(node).is_some_and(|known| slots(cards) < slots(&known.cards));
    fewer.then(|| Event::PromisesWithdrawn { node: node.clone() })
}

/// On the page, not on the node.
fn missing(at: Moment, state: &State, id: &LeaseId, lease: &Lease) -> Vec<Event> {
    match (&lease.account, lease.stage) {
        // Its order has not been sent: it will be, on this session.
        (Some(_), Stage::Reserving) => Vec::new(),
        // The order was lost with its session; the node takes orders of its open session only, so it can not come late.
        (Some(_), Stage::Ordered) => report::void(at, state, id, Ending::Refused, SlotUse::Free),
        // The node had it and lost it.
        (Some(_), Stage::Assigned | Stage::Running) => {
            report::void(at, state, id, Ending::PlatformFault, SlotUse::Free)
        }
        (None, _) | (Some(_), Stage::Settling | Stage::Settled) => vec![Event::SlotFreed { lease: id.clone() }],
    }
}

/// On the page and on the node: adopted.
fn both(at: Moment, state: &State, node: &NodeName, known: &Lease, lease: &AgentLease) -> Vec<Event> {
    let id = || lease.lease.clone();
    let mut events = Vec::new();
    if known.is_open() {
        events.push(Event::Assigned { lease: id(), slot: lease.slot });
    }
    match &lease.phase {
        AgentPhase::Assigned => {}
        AgentPhase::Running => {
            if known.is_open() {
                events.push(Event::Running { lease: id() });
            }
        }
        AgentPhase::Ended { report, freed } => {
            let mut ended = report::ended(at, state, node, &lease.lease, *report, false);
            if !*freed {
                // It has got its slot, whatever it waited for when it was heard of last, and that is not clear.
                ended.iter_mut().for_each(|event| {
                    if let Event::Ended { slot, .. } = event {
                        *slot = SlotUse::Clearing;
                    }
                });
            }
            events.extend(ended);
            if *freed {
                events.push(Event::SlotFreed { lease: id() });
                events.push(Event::Acknowledged { node: node.clone(), lease: id(), ended: false, freed: true });
            } else if known.account.is_some() && known.stage >= Stage::Settling {
                // Its slot did not exist while the node was away; it does again, and is not clear (invariant 6).
                events.push(Event::Ended { lease: id(), slot: SlotUse::Clearing });
            }
        }
    }
    events
}

/// On the node and not on a known page: the account whose page may hold it all the same. An earlier leader may have written
/// a hold that our watch has not shown, and ordered its lease before the node joined.
fn doubtful<'a>(state: &State, lease: &'a AgentLease) -> Option<&'a AccountName> {
    let account = lease.account.as_ref().filter(|_| !state.has(Mutant::JudgeAtOnce))?;
    let known = state.accounts.get(account);
    let settled = known.is_some_and(|known| known.durable.closed.iter().any(|row| row.hold.lease == lease.lease));
    (!settled).then_some(account)
}

/// Whoever pays for it, its slot is in use until the node says otherwise.
fn slot_of(at: Moment, state: &State, node: &NodeName, lease: &AgentLease) -> Option<Event> {
    let slot = match lease.phase {
        AgentPhase::Assigned | AgentPhase::Running => SlotUse::Taken,
        AgentPhase::Ended { freed: false, .. } => SlotUse::Clearing,
        AgentPhase::Ended { freed: true, .. } => return None,
    };
    Some(Event::Adopted {
        lease: lease.lease.clone(),
        account: None,
        node: node.clone(),
        size: lease.size,
        declared_ms: 0,
        card: lease.slot.has().or(lease.slot.awaits()),
        stage: Stage::Assigned,
        slot,
        limits: state.inherited_limits(),
        waits_ms: 0,
        at: at.steady,
    })
}

/// On the node, not on the page: ended, if it is not over. What is over was settled long ago, or void: nothing changes, and
/// the node may forget it (L10).
fn nobodys(at: Moment, node: &NodeName, lease: &AgentLease) -> Event {
    let id = lease.lease.clone();
    match lease.phase {
        AgentPhase::Assigned | AgentPhase::Running => Event::Cancelled { lease: id, at: at.steady, reason: NOBODYS },
        AgentPhase::Ended { freed, .. } => Event::Acknowledged { node: node.clone(), lease: id, ended: true, freed },
    }
}

/// A stranger's page was read, and does not hold it.
pub(super) fn judge(at: Moment, node: &NodeName, lease: &AgentLease) -> [Event; 2] {
    [Event::StrangerJudged { lease: lease.lease.clone() }, nobodys(at, node, lease)]
}

/// Strangers whose hold or settlement has become known, by a read or by the watch: as if it had been known when they were
/// met.
pub(super) fn found(at: Moment, state: &State) -> Vec<Event> {
    let mut events = Vec::new();
    for (id, stranger) in &state.strangers {
        let known = state.leases.get(id).filter(|known| known.account.is_some() && known.node == stranger.node);
        if let Some(known) = known {
            events.push(Event::StrangerJudged { lease: id.clone() });
            events.extend(both(at, state, &stranger.node, known, &stranger.lease));
        } else if doubtful(state, &stranger.lease).is_none() {
            events.extend(judge(at, &stranger.node, &stranger.lease));
        }
    }
    events
}

pub(super) fn heartbeat(
    state: &State,
    node: NodeName,
    cards: Option<Vec<Card>>,
    idle: Option<Vec<IdleWorker>>,
) -> Vec<Event> {
    let Some(known) = state.nodes.get(&node).filter(|known| known.joined) else { return Vec::new() };
    let idle = idle.filter(|idle| *idle != known.idle && !state.has(Mutant::IdleUnheard));
    let mut events: Vec<Event> = idle.map(|idle| Event::IdleTaken { node: node.clone(), idle }).into_iter().collect();
    match cards {
        Some(cards) if cards != known.cards => {
            let withdrawn = withdrawn(state, &node, &cards);
            events.push(Event::InventoryTaken { node, cards });
            events.extend(withdrawn);
        }
        _ if known.rests => events.push(Event::NodeHeard { node }),
        _ => {}
    }
    events
}

pub(super) fn disconnected(at: Moment, state: &State, node: NodeName) -> Vec<Event> {
    let known = state.nodes.get(&node).is_some_and(|known| known.joined || known.silent_since.is_none());
    if known { vec![Event::NodeLost { node, at: at.steady }] } else { Vec::new() }
}
