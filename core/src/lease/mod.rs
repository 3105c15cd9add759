//! The ledger of leases: [`decide`] reads the state and says what happens, [`apply`](State::apply) is the only writer.
//!
//! ```text
//! command -> decide -> events -> apply (working state) -> effects (what the shell has to do)
//!                                   |
//!                  changes of a page wait until its write is acknowledged;
//!                  only then Ordered, Settled and what follows from them happen (invariant 2)
//! ```
//! One command is one [`step`]: decide and apply, then hand free slots to whoever waits ([`dispatch`]), then begin the
//! page writes that are due ([`begin`]). No clock, no randomness: [`Moment`] and [`IdSeed`] come with the command, so that
//! the same commands always give the same state.

mod apply;
mod batch;
mod begin;
pub mod change;
mod command;
mod decide;
mod dispatch;
mod effect;
mod event;
mod expiry;
mod learn;
mod mutant;
mod node;
mod pages;
mod parking;
mod policies;
mod promise;
mod report;
mod request;
mod schedule;
mod spaces;
mod state;

pub use crate::queue::Priority;
pub use begin::{LAZY_MAX, LAZY_PATIENCE_MS, NOTE_PERIOD_MS, SETTLE_PATIENCE_MS, begin};
pub use change::{Misfit, PageChange, Urgency};
pub use command::{
    AgentLease, AgentPhase, Command, EndReport, FreedAs, IdleWorker, Limits, NodeSettings, PickedSlot, Policy, Request,
    SpaceSettings,
};
pub use decide::decide;
pub use dispatch::dispatch;
pub use effect::{Effect, Order, Place, add_effects};
pub use event::{Departure, Event, TermEnd};
pub use expiry::DISCONNECTED_QUEUE_MS;
pub use mutant::Mutant;
pub use node::NOBODYS;
pub use pages::ORDER_AGE_MAX_MS;
pub use report::NO_DEVICE_FREE_PER_HOUR;
pub use request::{ANNOUNCED_MAX, ATTEMPTS_MAX};
pub use spaces::SpaceUse;
pub use state::{Account, Batch, Lease, Node, SlotUse, Stage, State, Stranger, WRITES_IN_FLIGHT_MAX};

use std::collections::BTreeSet;

use crate::ids::{IdSeed, LedgerTime, NodeName, Steady, Ticket};

/// When a command is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The wall clock; a page never sees it go back (L20).
    pub wall: LedgerTime,
    /// The monotonic clock, for intervals.
    pub steady: Steady,
}

/// What came of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What happened, in order. Applying them again to the same state gives the same state.
    pub events: Vec<Event>,
    /// What the shell has to do, in order.
    pub effects: Vec<Effect>,
    /// An event did not fit the state, and the events of its decision after it were dropped. A bug of ours: nothing
    /// was granted or charged by it, and whatever it was about is derived again later.
    pub violations: Vec<Misfit>,
    /// Nodes whose queue has to be looked at.
    stirred: BTreeSet<NodeName>,
}

/// Takes one command all the way.
pub fn step(state: &mut State, at: Moment, mut ids: IdSeed, command: Command) -> Outcome {
    let mut outcome = Outcome::default();
    if state.ended.is_some() {
        return outcome;
    }
    let tick = matches!(command, Command::Tick);
    let events = decide(at, state, command);
    if !tick && events.is_empty() {
        return outcome;
    }
    outcome.take(state, events);
    if state.ended.is_some() {
        return outcome;
    }
    if !state.strangers.is_empty() {
        let found = node::found(at, state);
        outcome.take(state, found);
    }
    // Where something has changed that somebody waits for; on a tick also where only time has.
    if tick {
        outcome.stirred.extend(state.queue.nodes().cloned());
    }
    // Each decision takes a request out of the lanes of its node or gives it the one reservation there, so it ends.
    while let Some(node) = outcome.stirred.pop_first() {
        loop {
            let events = dispatch(at, &mut ids, state, &node);
            if events.is_empty() || !outcome.take(state, events) {
                break;
            }
        }
    }
    let announcements = request::announce(at, &mut ids, state);
    outcome.take(state, announcements);
    let begun = begin(at, &mut ids, state, tick);
    outcome.take(state, begun);
    outcome
}

impl Outcome {
    /// False if an event did not fit.
    fn take(&mut self, state: &mut State, events: Vec<Event>) -> bool {
        for event in events {
            stir(state, &event, &mut self.stirred);
            if let Err(misfit) = state.apply(&event) {
                self.violations.push(misfit);
                return false;
            }
            add_effects(state, &event, &mut self.effects);
            self.events.push(event);
        }
        true
    }
}

/// Nodes where the event lets somebody begin who waits. `state` is the state before it.
fn stir(state: &State, event: &Event, stirred: &mut BTreeSet<NodeName>) {
    let waits_at = |ticket: &Ticket| state.queue.get(ticket).map(|waiting| waiting.node.clone());
    match event {
        Event::Queued(waiting) => {
            stirred.insert(waiting.node.clone());
        }
        // Who leaves may have had the reservation, or have stood before others who fit.
        Event::Confirmed { ticket } | Event::Left { ticket, .. } => stirred.extend(waits_at(ticket)),
        Event::Unreserved { lease }
        | Event::Assigned { lease, .. }
        | Event::Ended { lease, .. }
        | Event::Settled { lease, .. }
        | Event::SlotFreed { lease } => {
            let found = state.leases.get(lease);
            stirred.extend(found.map(|found| found.node.clone()));
            // Its Space may have reached its limit; who waits for that may wait on another node.
            let space = found.and_then(|found| found.busy_space());
            stirred.extend(space.into_iter().flat_map(|space| state.queue.parked_for_space(space)).cloned());
        }
        Event::SpaceConfigured { space, .. } => stirred.extend(state.queue.parked_for_space(space).cloned()),
        Event::NodeConfigured { node, .. }
        | Event::InventoryTaken { node, .. }
        | Event::IdleTaken { node, .. }
        | Event::NodeHeard { node }
        | Event::Adopted { node, .. } => {
            stirred.insert(node.clone());
        }
        // The last one that was waited for lets all the others begin (L17).
        Event::NodeJoined { .. } | Event::ClockJudged { .. } => stirred.extend(state.queue.nodes().cloned()),
        Event::AccountTaken { account, .. }
        | Event::PolicyChanged { account, .. }
        | Event::Changed { account, .. }
        | Event::WriteBegun { account, .. }
        | Event::WriteFailed { account, .. }
        | Event::Rebased { account, .. }
        | Event::Unparked { account } => stirred.extend(state.queue.parked_on(account).cloned()),
        _ => {}
    }
}
