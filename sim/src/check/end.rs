//! When everything has healed: each lease was settled exactly once, everybody was answered, and the accounts add up.

use spaceport_core::page::OUTCOMES_MAX;

use super::nodes;
use crate::agenda::Happening;
use crate::agent::Phase;
use crate::broker::Term;
use crate::violation::{Checked, Rule};
use crate::world::World;

/// Nothing is under way any more.
pub fn is_quiet(world: &World) -> bool {
    let agents = world.agents.values().all(|agent| agent.leases.is_empty() && agent.tickets.is_empty());
    let links = world.links.values().all(|link| link.down.is_empty());
    let (mut brokers, mut serving) = (true, 0);
    for broker in world.brokers.values() {
        let Some(term) = &broker.term else { continue };
        serving += 1;
        let state = &term.state;
        brokers &= state.leases.is_empty() && state.queue.is_empty();
        brokers &=
            state.accounts.values().all(|account| !account.is_written_soon() && account.working.holds.is_empty());
    }
    let under_way = |happening: &Happening| {
        matches!(
            happening,
            Happening::ReceiptArrives(..) | Happening::Elected | Happening::TermRead(_) | Happening::ReadArrives(..)
        )
    };
    agents
        && links
        && brokers
        && serving == 1
        && world.writes.is_empty()
        && !world.clients.retrying()
        && !world.agenda.iter().any(under_way)
}

/// The same events give the same state.
///
/// # Errors
/// If they do not.
pub fn replay(term: &Term) -> Checked {
    let mut state = term.initial.clone();
    for event in &term.events {
        state.apply(event).map_err(|misfit| Rule::Replay.broken(misfit.to_string()))?;
    }
    Rule::Replay.check(state == term.state, || "the same events gave another state".to_owned())
}

/// The end of every history.
///
/// # Errors
/// What is missing.
pub fn balance(world: &World) -> Checked {
    for (name, object) in &world.store.objects {
        if let Some(hold) = object.page.holds.first() {
            return Err(Rule::Invariant(3).broken(format!("{} of {name} was never settled", hold.lease)));
        }
    }
    for lease in world.store.held_ever.keys() {
        let over = world.store.settled.contains_key(lease) || world.store.orphaned.contains(lease);
        Rule::Invariant(3).check(over, || format!("{lease} was never settled"))?;
    }
    for agent in world.agents.values() {
        if let Some(ticket) = agent.tickets.keys().next() {
            let text = format!("{}/{} was never answered", ticket.agent_instance, ticket.number);
            return Err(Rule::Invariant(11).broken(text));
        }
        if let Some((lease, held)) = agent.leases.iter().next() {
            let ended = matches!(held.phase, Phase::Ended { .. });
            return Err(Rule::L(10).broken(format!("{lease} (ended: {ended}) was never acknowledged")));
        }
    }
    measured(world)?;
    receipts(world)?;
    outcomes(world)?;
    let mut serving = world.brokers.values().filter_map(|broker| broker.term.as_ref());
    let term = serving.next().ok_or_else(|| Rule::L(6).broken("nobody leads"))?;
    if let Some((space, found)) = term.state.spaces.iter().find(|(_, space)| space.leases > 0) {
        return Err(Rule::L(1).broken(format!("{space} still counts {} leases", found.leases)));
    }
    if let Some((lease, found)) = term.state.leases.iter().next() {
        return Err(Rule::Invariant(6).broken(format!("the leader still has {lease} as {:?}", found.stage)));
    }
    let waits = term.state.queue.len();
    Rule::Invariant(11).check(waits == 0, || format!("the leader still has {waits} requests that nobody waits for"))?;
    replay(term)
}

/// Invariant 5: nobody pays for more than the node has measured. L10: nor for less, where the end is told of behind the
/// settlement.
fn measured(world: &World) -> Checked {
    for (lease, closed) in &world.store.settled {
        let Some(report) = world.clients.ends.get(lease) else { continue };
        let bound_ms = closed.hold.weight * report.used_ms.min(closed.hold.declared_ms);
        let charged_ms = closed.charged_ms;
        Rule::Invariant(5).check(charged_ms <= bound_ms, || {
            format!("{lease} pays {charged_ms} ms, and its node has measured {bound_ms} ms")
        })?;
        nodes::noted(world, closed)?;
    }
    Ok(())
}

/// Invariant 12: every lease has its receipt, and together they say what was charged.
fn receipts(world: &World) -> Checked {
    let mut sum_ms = 0;
    for (lease, closed) in &world.store.settled {
        let receipt = world.store.receipts.get(lease);
        // The outbox of an account that was taken away by force went with it.
        let lost = world.lost_rows.contains(lease);
        Rule::Invariant(12).check(receipt.is_some() || lost, || format!("{lease} has no receipt"))?;
        sum_ms += receipt.map_or(if lost { closed.charged_ms } else { 0 }, |receipt| receipt.charged_ms);
    }
    let charged_ms = world.store.charged_ms;
    Rule::Invariant(12)
        .check(sum_ms == charged_ms, || format!("receipts add up to {sum_ms} ms of {charged_ms} ms charged"))
}

/// Invariant 12: what the leader of now has noted is on the pages.
fn outcomes(world: &World) -> Checked {
    for (name, object) in &world.store.objects {
        let noted: Vec<&String> = world
            .seen_calls
            .outcomes
            .iter()
            .filter(|(epoch, account, _)| account == name && world.noted_lately(*epoch, account))
            .map(|(_, _, id)| id)
            .collect();
        // Later ones push earlier ones out.
        for id in noted.iter().rev().take(OUTCOMES_MAX / 2) {
            let shown = object.page.recent_outcomes.iter().any(|row| row.id == **id);
            Rule::Invariant(12).check(shown, || format!("{id} is not among the outcomes of {name}"))?;
        }
    }
    Ok(())
}
