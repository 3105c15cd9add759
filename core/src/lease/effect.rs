//! What the shell has to do because of an event. Derived from the event and the state after it, so that nothing has to be
//! remembered: what was not done before a crash is derived again from the pages and the nodes' reports.

use std::sync::Arc;

use super::command::Limits;
use super::event::{Event, TermEnd};
use super::mutant::Mutant;
use super::promise;
use super::state::State;
use crate::ids::{AccountName, Epoch, LeaseId, NodeName, Size, Steady, Ticket};
use crate::page::{Closed, Page};
use crate::protocol::{CallerClass, Denial};
use crate::queue::{Waiting, WaitsFor, parts_of};

/// Something to do. Messages to nodes without a session are dropped: what they said is derived again when it rejoins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write this page, expecting the revision that was read or written last. The answer is a command.
    Write {
        /// Whose.
        account: AccountName,
        /// All of it; its write id names the write.
        page: Arc<Page>,
    },
    /// Read the page, seeing every acknowledged write, and try until it is read. The answer is `PageRead` or
    /// `AccountGone`.
    Read {
        /// Whose.
        account: AccountName,
    },
    /// Read the page, in a read that begins now and sees every acknowledged write, and try until it is read: a node that
    /// has just joined has a lease of the account that no page is known to hold (L7). The answer is `PageConfirmed`. While
    /// one for the same account and node is under way, no other is needed: whatever this node had when it joined this term
    /// for the first time, it can not come to have later.
    Confirm {
        /// Whose.
        account: AccountName,
        /// Which node has the lease.
        node: NodeName,
    },
    /// Write the final receipt until it is written, then say `ReceiptWritten`. It may come again for the same lease.
    Receipt {
        /// Who is charged.
        account: AccountName,
        /// The settled row.
        closed: Box<Closed>,
    },
    /// Tell the node to begin a lease.
    Start(Box<Order>),
    /// Tell the node to end a lease.
    Cancel {
        /// Which node.
        node: NodeName,
        /// Which lease.
        lease: LeaseId,
        /// For people.
        reason: &'static str,
    },
    /// Tell the node that its report need not be repeated.
    Acknowledge {
        /// Which node.
        node: NodeName,
        /// Which lease.
        lease: LeaseId,
        /// Ended is settled and durable, or the lease is not known.
        ended: bool,
        /// Freed is taken.
        freed: bool,
    },
    /// Tell the agent that its request is refused.
    Deny {
        /// Which request.
        ticket: Ticket,
        /// Where.
        node: NodeName,
        /// For the wording.
        caller: CallerClass,
        /// Why.
        denial: Denial,
    },
    /// Tell the agent that its request waits.
    Queue(Box<Place>),
    /// Stop: the term is over.
    EndTerm(TermEnd),
}

/// An order to begin a lease. Its hold is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// To which node.
    pub node: NodeName,
    /// Which lease.
    pub lease: LeaseId,
    /// The term.
    pub epoch: Epoch,
    /// For which request.
    pub ticket: Ticket,
    /// Who pays. The node repeats it when it tells of the lease to a later leader (L7).
    pub account: AccountName,
    /// Size.
    pub size: Size,
    /// Longest run.
    pub declared_ms: u64,
    /// Begin when this lease is freed (L14).
    pub after: Option<LeaseId>,
    /// On none of these cards (L7).
    pub avoid: Vec<u32>,
    /// For the wording.
    pub caller: CallerClass,
    /// Limits of the lease, also if its pool changes while it runs.
    pub limits: Limits,
    /// How much longer than `order_ttl` the lease may wait on its node until it begins (L9, L14), milliseconds.
    pub wait_ms: u64,
}

/// Where a request stands in its queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which request.
    pub ticket: Ticket,
    /// On which node.
    pub node: NodeName,
    /// What it waits for.
    pub waits_for: WaitsFor,
    /// 1 is next of those who wait for its node, by what is expected of each now; it says little while it waits for its
    /// account or Space.
    pub position: u32,
    /// Expected wait, if everybody ahead uses what they declared.
    pub eta_ms: u64,
    /// Longest wait for the node, whoever comes later (invariant 11); None while it waits for its account.
    pub latest_start_ms: Option<u64>,
    /// How long ago that was, if it has passed; else 0. Milliseconds.
    pub late_ms: u64,
    /// `(epoch, n)` of L17; of an earlier term if the request was presented again.
    pub place: (Epoch, u64),
    /// For the wording.
    pub caller: CallerClass,
}

/// Adds what an event asks for to `effects`, in order. `state` is the state after it.
pub fn add_effects(state: &State, event: &Event, effects: &mut Vec<Effect>) {
    let receipt = |account: &AccountName, closed: &Closed| Effect::Receipt {
        account: account.clone(),
        closed: Box::new(closed.clone()),
    };
    match event {
        Event::WriteBegun { account, .. } | Event::WriteRepeated { account } => {
            let batch = state.accounts.get(account).and_then(|found| found.in_flight.as_ref());
            effects
                .extend(batch.map(|batch| Effect::Write { account: account.clone(), page: Arc::clone(&batch.page) }));
        }
        Event::WriteUnknown { account } | Event::WriteContested { account } => {
            effects.push(Effect::Read { account: account.clone() });
        }
        Event::PageDoubted { node, account } => {
            effects.push(Effect::Confirm { account: account.clone(), node: node.clone() });
        }
        Event::AccountTaken { account, page, .. } | Event::Rebased { account, page, .. } => {
            effects.extend(page.closed.iter().map(|closed| receipt(account, closed)));
        }
        Event::Settled { account, lease } if !state.has(Mutant::NoReceipt) => {
            let page = state.accounts.get(account).map(|found| &found.durable);
            let row = page.and_then(|page| page.closed.iter().find(|closed| closed.hold.lease == *lease));
            effects.extend(row.map(|closed| receipt(account, closed)));
        }
        Event::Ordered { lease, .. } => effects.extend(start(state, lease)),
        Event::Cancelled { lease, reason, .. } => {
            let node = state.leases.get(lease).map(|found| found.node.clone());
            effects.extend(node.map(|node| Effect::Cancel { node, lease: lease.clone(), reason }));
        }
        Event::Acknowledged { node, lease, ended, freed } => {
            let (node, lease) = (node.clone(), lease.clone());
            effects.push(Effect::Acknowledge { node, lease, ended: *ended, freed: *freed });
        }
        Event::Denied { ticket, node, caller, denial } => {
            let (ticket, node) = (ticket.clone(), node.clone());
            effects.push(Effect::Deny { ticket, node, caller: *caller, denial: denial.clone() });
        }
        Event::Announced { ticket, at, .. } => {
            let waiting = state.queue.get(ticket);
            effects.extend(waiting.map(|waiting| Effect::Queue(Box::new(place(state, waiting, *at)))));
        }
        Event::TermEnded(end) => effects.push(Effect::EndTerm(*end)),
        _ => {}
    }
}

fn start(state: &State, id: &LeaseId) -> Option<Effect> {
    let lease = state.leases.get(id)?;
    let waiting = lease.request.as_ref()?;
    Some(Effect::Start(Box::new(Order {
        node: lease.node.clone(),
        lease: id.clone(),
        epoch: state.epoch,
        ticket: waiting.ticket.clone(),
        account: waiting.account.clone(),
        size: lease.size,
        declared_ms: lease.declared_ms,
        after: lease.after.clone(),
        caller: waiting.caller,
        avoid: lease.avoid.clone(),
        limits: lease.limits,
        wait_ms: lease.waits_ms,
    })))
}

impl State {
    /// Where a request stands now; None if it does not wait.
    pub fn standing(&self, ticket: &Ticket, now: Steady) -> Option<Place> {
        self.queue.get(ticket).map(|waiting| place(self, waiting, now))
    }
}

fn place(state: &State, waiting: &Waiting, now: Steady) -> Place {
    let (position, eta_ms) = promise::position(now, state, waiting);
    let latest_start = waiting.promise.map(|promise| promise.latest_start());
    Place {
        ticket: waiting.ticket.clone(),
        node: waiting.node.clone(),
        waits_for: waiting.waits_for,
        position,
        eta_ms,
        latest_start_ms: latest_start.map(|latest| latest.since(now)),
        late_ms: latest_start.map_or(0, |latest| now.since(latest)),
        place: parts_of(waiting.place),
        caller: waiting.caller,
    }
}
