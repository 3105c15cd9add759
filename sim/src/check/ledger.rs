//! A broker's ledger after each of its commands, and what leaves it.

use std::collections::BTreeSet;

use spaceport_core::ids::AccountName;
use spaceport_core::lease::{Event, Misfit, Outcome, PageChange, Stage, State};
use spaceport_core::page::Page;

use crate::agenda::SharedPage;
use crate::violation::{Checked, Rule, Violation};
use crate::world::World;

/// Looks at what a command did.
///
/// # Errors
/// What must not be.
pub fn after(world: &World, number: u64, outcome: &Outcome) -> Checked {
    if let Some(misfit) = outcome.violations.first() {
        return Err(of_misfit(misfit));
    }
    let Some(state) = world.state(number) else { return Ok(()) };
    if state.clock_off_ms.is_some()
        && let Some(Event::Reserved { lease, .. }) =
            outcome.events.iter().find(|event| matches!(event, Event::Reserved { .. }))
    {
        return Err(Rule::L(20).broken(format!("{lease} was reserved by a clock that is off")));
    }
    for event in &outcome.events {
        dated(state, event)?;
    }
    let touched: BTreeSet<&AccountName> = outcome.events.iter().filter_map(account_of).collect();
    for name in touched {
        account(world, number, state, name)?;
    }
    Ok(())
}

/// L2, L6: what a leader is shown of a later term ends its own.
///
/// # Errors
/// If it does not.
pub fn deposed(world: &World, number: u64, page: &Page) -> Checked {
    let Some(state) = world.state(number) else { return Ok(()) };
    let goes_on = page.epoch > state.epoch && state.ended.is_none();
    Rule::L(2).check(!goes_on, || {
        format!("a leader of epoch {} was shown a page of epoch {} and goes on", state.epoch.0, page.epoch.0)
    })
}

fn of_misfit(misfit: &Misfit) -> Violation {
    let rule = match misfit {
        Misfit::AlreadyHeld(_) | Misfit::NotHeld(_) | Misfit::NotClosed(_) => Rule::Invariant(3),
        Misfit::OverLimit { .. } | Misfit::OverCookie { .. } => Rule::Invariant(1),
        Misfit::OverCharge { .. } => Rule::Invariant(5),
        Misfit::OverBudget { .. } => Rule::Invariant(10),
        Misfit::NoSource(_) | Misfit::NoWindow(_) => Rule::L(12),
        Misfit::Full(_) => Rule::L(1),
    };
    rule.broken(format!("apply refused an event: {misfit}"))
}

const fn account_of(event: &Event) -> Option<&AccountName> {
    match event {
        Event::AccountTaken { account, .. }
        | Event::Changed { account, .. }
        | Event::WriteBegun { account, .. }
        | Event::Committed { account }
        | Event::WriteFailed { account, .. }
        | Event::Rebased { account, .. }
        | Event::Settled { account, .. } => Some(account),
        _ => None,
    }
}

/// L20: nothing is dated before what the page has seen.
fn dated(state: &State, event: &Event) -> Checked {
    let Event::Changed { account, change, .. } = event else { return Ok(()) };
    let at = match change {
        PageChange::Hold { hold, .. } => hold.since,
        PageChange::Settle { at, .. } => *at,
        _ => return Ok(()),
    };
    let Some(found) = state.accounts.get(account) else { return Ok(()) };
    let last = found.durable.last_time;
    Rule::L(20).check(at >= last, || format!("a change of {account} is dated {}, before {}", at.0, last.0))
}

fn account(world: &World, number: u64, state: &State, name: &AccountName) -> Checked {
    let Some(found) = state.accounts.get(name) else { return Ok(()) };
    let mut working = Page::clone(found.in_flight.as_ref().map_or(&found.durable, |batch| &batch.page));
    for change in &found.pending {
        change.make(&mut working).map_err(|misfit| Rule::L(3).broken(format!("{name}'s pending change: {misfit}")))?;
    }
    Rule::L(3).check(working == *found.working, || {
        format!("{name}'s working page is not what is durable, in flight and pending")
    })?;
    for hold in &found.working.holds {
        let known = state.leases.get(&hold.lease);
        Rule::Invariant(3).check(known.is_some(), || format!("nobody will settle {}", hold.lease))?;
        let over = known.is_some_and(|known| known.stage >= Stage::Settling);
        Rule::Invariant(3).check(!over, || format!("the settlement of {} is lost", hold.lease))?;
    }
    for page in world.may_happen(number, name) {
        stays_taken(name, &found.working, page)?;
    }
    Ok(())
}

/// L2: what a write of unknown outcome has reserved stays taken as long as the write can still happen.
fn stays_taken(name: &AccountName, working: &Page, page: &SharedPage) -> Checked {
    for hold in &page.holds {
        let taken = working.holds.iter().any(|known| known.lease == hold.lease)
            || working.closed.iter().any(|closed| closed.hold.lease == hold.lease);
        Rule::L(2)
            .check(taken, || format!("{} of {name} was given back, but its write can still happen", hold.lease))?;
    }
    Ok(())
}
