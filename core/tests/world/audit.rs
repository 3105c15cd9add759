//! What must hold at every moment, and what must hold when all is over.

use spaceport_core::page::{Ending, Page};

use super::World;
use super::agent::Phase;

/// Looks at everything after a step.
pub fn look(world: &World) -> Result<(), String> {
    if let Some(violation) = world.violations.first() {
        return Err(format!("apply refused an event: {violation}"));
    }
    let Some(leader) = &world.leader else { return Ok(()) };
    for (name, account) in &leader.state.accounts {
        let expected = account.in_flight.as_ref().map_or(&account.durable, |batch| &batch.page);
        let mut working: Page = Page::clone(expected);
        for change in &account.pending {
            change.make(&mut working).map_err(|misfit| format!("L3: {name}'s pending change: {misfit}"))?;
        }
        if working != *account.working {
            return Err(format!("L3: {name}'s working page is not what is durable and in flight"));
        }
        for hold in &account.working.holds {
            if !leader.state.leases.contains_key(&hold.lease) {
                return Err(format!("invariant 3: nobody will settle {}", hold.lease));
            }
        }
    }
    may_happen(world)?;
    slots(world)?;
    fences(world)
}

/// L2: what a write of unknown outcome has reserved stays taken as long as the write can still happen.
fn may_happen(world: &World) -> Result<(), String> {
    let Some(leader) = &world.leader else { return Ok(()) };
    let open = world.writes.iter().filter(|write| {
        write.page.epoch == leader.state.epoch && write.revision == world.store.pages[&write.account].revision
    });
    for write in open {
        let working = &leader.state.accounts[&write.account].working;
        for hold in &write.page.holds {
            let taken = working.holds.iter().any(|known| known.lease == hold.lease)
                || working.closed.iter().any(|closed| closed.hold.lease == hold.lease);
            if !taken {
                return Err(format!("L2: {} was given back, but its write can still happen", hold.lease));
            }
        }
    }
    Ok(())
}

/// Invariant 6 as the broker sees it: as long as nothing goes wrong it orders only what its nodes have room for.
fn slots(world: &World) -> Result<(), String> {
    match world.agents.values().find(|agent| agent.no_slot > 0) {
        Some(agent) if !world.faults.storms => {
            Err(format!("invariant 6: {} was ordered more than it has room for", agent.name))
        }
        _ => Ok(()),
    }
}

/// L9: what was given up does not run any more.
fn fences(world: &World) -> Result<(), String> {
    for (lease, closed) in &world.store.settled {
        let given_up = matches!(closed.ending, Ending::Expired | Ending::Refused);
        if given_up && world.agents[&closed.hold.node].is_live(lease) {
            return Err(format!("L9: {lease} was given up as {:?} and its node still has it", closed.ending));
        }
    }
    Ok(())
}

/// Nothing is under way any more.
pub fn is_quiet(world: &World) -> bool {
    let agents = world.agents.values().all(|agent| {
        agent.leases.is_empty() && agent.tickets.is_empty() && agent.outbox.is_empty() && agent.inbox.is_empty()
    });
    let leader = world.leader.as_ref().is_some_and(|leader| {
        let state = &leader.state;
        state.leases.is_empty()
            && state.queue.is_empty()
            && state.accounts.values().all(|account| account.in_flight.is_none() && account.working.holds.is_empty())
    });
    agents && leader && world.writes.iter().all(|write| write.leader == u64::MAX)
}

/// The end of every history: each lease was settled exactly once, for what its node says, and nobody waits.
pub fn balance(world: &World) -> Result<(), String> {
    world.replay()?;
    for (name, stored) in &world.store.pages {
        if let Some(hold) = stored.page.holds.first() {
            return Err(format!("invariant 3: {} of {name} was never settled", hold.lease));
        }
    }
    for lease in &world.store.held_ever {
        if !world.store.settled.contains_key(lease) {
            return Err(format!("invariant 3: {lease} was never settled"));
        }
    }
    for agent in world.agents.values() {
        if let Some(ticket) = agent.tickets.keys().next() {
            return Err(format!("invariant 11: {}/{} was never answered", ticket.agent_instance, ticket.number));
        }
        if let Some((lease, held)) = agent.leases.iter().next() {
            let ended = matches!(held.phase, Phase::Ended { .. });
            return Err(format!("L10: {lease} (ended: {ended}) was never acknowledged"));
        }
    }
    let leader = world.leader.as_ref().ok_or("no leader")?;
    if let Some((lease, found)) = leader.state.leases.iter().next() {
        return Err(format!("the leader still has {lease} as {:?}", found.stage));
    }
    if !leader.state.queue.is_empty() {
        return Err("the leader still has requests that nobody waits for".to_owned());
    }
    Ok(())
}
