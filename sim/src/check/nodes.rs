//! Nodes, after each of their steps: what the hardware would show.

use std::collections::{BTreeMap, BTreeSet};

use spaceport_core::ids::{Epoch, LeaseId, NodeName};
use spaceport_core::lease::{NOBODYS, SlotUse};
use spaceport_core::page::{Closed, Ending, Page};

use super::pages::is_free;
use crate::agent::{Agent, Held, Phase};
use crate::broker::{Session, Term};
use crate::coverage::Scenario;
use crate::links::Link;
use crate::violation::{Checked, Rule};
use crate::world::World;

/// Invariant 4.
const SETTLED_WITHIN_MS: u64 = 1_000;

/// What the checks remember of nodes.
#[derive(Default)]
pub struct NodesSeen {
    /// Highest epoch that a broker welcomed the node with and that it joined.
    pub epochs: BTreeMap<NodeName, Epoch>,
    /// Leases that were not settled when their nodes, which had noted their ends, began anew.
    pub ends_kept: BTreeSet<LeaseId>,
    /// The same where the checkpoint was lost, and the end with it.
    pub ends_lost: BTreeSet<LeaseId>,
}

/// Invariants 6 and 8 on one node.
///
/// # Errors
/// What must not be.
pub fn node(agent: &Agent, world_ms: u64) -> Checked {
    let now = agent.clock(world_ms);
    let occupancy = agent.occupancy();
    for card in &agent.cards {
        let used = occupancy.used(card.index);
        Rule::Invariant(6).check(used <= card.large_slots, || {
            format!("card {} of {} has {} slots and {used} are used", card.index, agent.name, card.large_slots)
        })?;
    }
    for (lease, held) in &agent.leases {
        if let Phase::Running { since, .. } = held.phase {
            let limit = held.order.declared_ms + held.order.limits.grace_ms;
            let runs = now.saturating_sub(since);
            Rule::Invariant(8).check(runs <= limit, || format!("{lease} runs for {runs} ms, {limit} ms at most"))?;
        }
    }
    Ok(())
}

/// An order was taken: invariants 2 and 7, L8.
///
/// # Errors
/// What must not be.
pub fn taken(world: &World, node: &NodeName, lease: &LeaseId) -> Checked {
    let Some(agent) = world.agents.get(node) else { return Ok(()) };
    let Some(held) = agent.leases.get(lease) else { return Ok(()) };
    let highest = world.seen_nodes.epochs.get(node).copied().unwrap_or_default();
    let epoch = held.order.epoch;
    Rule::Invariant(7)
        .check(epoch >= highest, || format!("{node} took an order of epoch {} below {}", epoch.0, highest.0))?;
    let durable = world.store.held_ever.contains_key(lease);
    Rule::Invariant(2).check(durable, || format!("{node} took {lease}, whose hold is not durable"))?;
    match world.store.settled.get(lease) {
        None => Ok(()),
        Some(closed) => {
            let how = closed.ending;
            Err(Rule::L(8).broken(format!("{node} took {lease}, which was settled as {how:?} before")))
        }
    }
}

/// A lease has its slot: L9, it did not wait for it for longer than its order allows, and was not given up while it waited.
///
/// # Errors
/// What must not be.
pub fn began(world: &World, lease: &LeaseId) -> Checked {
    for agent in world.agents.values() {
        let Some(held) = agent.leases.get(lease).filter(|held| held.waited) else { continue };
        let (now, begin_by) = (agent.clock(world.now), held.begin_by);
        Rule::L(9).check(now <= begin_by, || format!("{lease} began {} ms too late", now.saturating_sub(begin_by)))?;
    }
    let closed = world.store.settled.get(lease);
    let given_up = closed.filter(|closed| matches!(closed.ending, Ending::Expired | Ending::Refused));
    given_up.map_or(Ok(()), |closed| {
        let how = closed.ending;
        Err(Rule::L(9).broken(format!("{lease} was given up as {how:?} and began after that")))
    })
}

/// A lease was settled: L9, what was given up does not run any more.
///
/// # Errors
/// What must not be.
pub fn given_up(world: &World) -> Checked {
    for agent in world.agents.values() {
        let asleep = world.asleep.contains_key(&agent.name);
        // On a node that stands still nothing computes, and what has passed its limit ends when it goes on.
        let over = |held: &Held| match held.limit() {
            Some((limit, _)) => limit <= agent.clock(world.now),
            None => asleep,
        };
        for (lease, _) in agent.leases.iter().filter(|(lease, held)| agent.is_live(lease) && !over(held)) {
            let closed = world.store.settled.get(lease);
            let given_up = closed.filter(|closed| matches!(closed.ending, Ending::Expired | Ending::Refused));
            if let Some(closed) = given_up {
                let how = closed.ending;
                return Err(Rule::L(9).broken(format!("{lease} was given up as {how:?} and its node still has it")));
            }
        }
    }
    Ok(())
}

/// A broker ends a lease as nobody's: L7, not one that a page holds. An old leader's Cancel its node does not take.
///
/// # Errors
/// What must not be.
pub fn killed(world: &World, epoch: Epoch, lease: &LeaseId, reason: &str) -> Checked {
    let held = reason == NOBODYS && epoch == world.store.term.0 && world.store.is_held(lease);
    Rule::L(7).check(!held, || format!("{lease} is ended as nobody's, and it is held"))
}

/// Invariant 4: where nothing goes wrong a reservation is gone within a second of the end (L13).
///
/// # Errors
/// What took longer.
pub fn in_time(world: &mut World, page: &Page) -> Checked {
    for closed in &page.closed {
        let lease = &closed.hold.lease;
        let Some(ended_at) = world.clients.ended_at.remove(lease) else { continue };
        let took_ms = world.now - ended_at;
        let in_time = took_ms <= SETTLED_WITHIN_MS || !world.plan.weather.is_calm();
        Rule::Invariant(4).check(in_time, || format!("{lease} was settled {took_ms} ms after its end"))?;
    }
    Ok(())
}

/// Leases were settled: L10, at what their nodes have noted, whatever has begun anew between the end and the settlement.
///
/// # Errors
/// What was charged instead.
pub fn as_noted(world: &mut World, page: &Page) -> Checked {
    for closed in &page.closed {
        noted(world, closed)?;
        let kept = world.seen_nodes.ends_kept.remove(&closed.hold.lease);
        if kept && closed.charged_ms > 0 {
            world.coverage.saw(Scenario::ChargedAfterRestart);
        }
    }
    Ok(())
}

/// L10, L11: a lease pays what its node has noted. A lease whose account is gone is not settled, so nothing is asked of it (L4).
///
/// # Errors
/// What it pays instead.
pub fn noted(world: &World, closed: &Closed) -> Checked {
    let (hold, lease) = (&closed.hold, &closed.hold.lease);
    let Some(report) = world.clients.ends.get(lease) else { return Ok(()) };
    // Given up, for its node was silent for as long as the lease could last (L9); or its node does not know it any more (N2),
    // and then its end may have been heard of before or not.
    if closed.ending == Ending::Expired || world.seen_nodes.ends_lost.contains(lease) {
        return Ok(());
    }
    // Of those without a device so many in an hour are free, and the others are failures like any (N16).
    let is_counted = report.ending == Ending::NoDevice && closed.ending == Ending::Failed;
    let used_ms = if is_free(report.ending) && !is_counted { 0 } else { report.used_ms };
    let due_ms = hold.weight * used_ms.min(hold.declared_ms);
    let (charged_ms, ending) = (closed.charged_ms, report.ending);
    Rule::L(10).check(charged_ms == due_ms, || {
        format!("{lease} pays {charged_ms} ms, and its node has noted that it ended {ending:?} and owes {due_ms} ms")
    })
}

/// Invariant 6 as a broker sees it: a slot is in use until its node has said that it is clear.
///
/// # Errors
/// What must not be.
pub fn pictures(world: &World, number: u64) -> Checked {
    let Some(broker) = world.brokers.get(&number).filter(|broker| broker.serves()) else { return Ok(()) };
    let Some(term) = &broker.term else { return Ok(()) };
    for (node, session) in &broker.sessions {
        let Some(agent) = world.agents.get(node) else { continue };
        let current = agent.leader == Some(session.link) && agent.epoch == term.state.epoch;
        if !current || !term.state.joined(node) {
            continue;
        }
        kept(world, term, node, agent, session)?;
        for (lease, held) in &agent.leases {
            let clear = matches!(held.phase, Phase::Ended { freed: true, .. });
            if clear || held.card.is_none() {
                continue;
            }
            let known = term.state.leases.get(lease);
            let in_use = known.is_some_and(|known| known.slot != SlotUse::Free);
            Rule::Invariant(6)
                .check(in_use, || format!("the broker takes the slot of {lease} for free, and {node} does not"))?;
        }
    }
    Ok(())
}

/// L16: a broker that has heard everything from a node knows which workers it keeps, no more and no fewer: so that calls are
/// ordered where their workers are.
fn kept(world: &World, term: &Term, node: &NodeName, agent: &Agent, session: &Session) -> Checked {
    let all_heard = |link: &Link| link.up.is_empty() && !link.broken && agent.sends.is_empty();
    if !world.links.get(&session.link).is_some_and(all_heard) {
        return Ok(());
    }
    let (kept, known) = (agent.idle_list(), term.state.nodes.get(node).map_or(&[][..], |known| known.idle.as_slice()));
    Rule::L(16).check(kept.as_slice() == known, || {
        format!("{node} keeps {} workers that the broker was told of, which knows of {}", kept.len(), known.len())
    })
}
