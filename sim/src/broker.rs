//! A broker's process around the ledger: what it was shown, who is connected, and its term. It does what the operator's
//! `ledger::actor` does, with the same order of events.

use std::collections::{BTreeMap, BTreeSet};

use spaceport_core::ids::{AccountName, Epoch, LedgerTime, NodeName, Steady, Ticket};
use spaceport_core::lease::{Event, Limits, Moment, NodeSettings, Policy, State};
use spaceport_core::queue::QueueBounds;

use crate::links::LinkId;
use crate::plan::START;
use crate::store::Object;

/// A term that is being served.
pub struct Term {
    /// The ledger.
    pub state: State,
    /// As it began.
    pub initial: State,
    /// All that happened in it.
    pub events: Vec<Event>,
    /// World time at which its steady clock began.
    began: u64,
    /// What the steady clock had lost by then.
    stood_ms: u64,
}

/// A node's session.
#[derive(Clone, Debug)]
pub struct Session {
    /// Its stream.
    pub link: LinkId,
    /// Of the agent that said Hello.
    pub instance: String,
    /// From its Hello (L6).
    pub highest_epoch: Epoch,
    /// Last stamp of its BOOTTIME, echoed by orders (L8).
    pub stamp: u64,
}

/// A process.
pub struct Broker {
    /// Its number; no two processes have the same.
    pub number: u64,
    /// While it serves.
    pub term: Option<Term>,
    /// Its own term write, while it waits for its watch to show it.
    pub begun: Option<(Epoch, String)>,
    /// A term has to be above this.
    pub above: Epoch,
    /// Wall clock minus true time, milliseconds.
    pub wall_offset: i64,
    /// How far off it is, if that is too much (L20).
    pub clock_off_ms: Option<u64>,
    /// Time that its steady clock did not count, milliseconds.
    pub stood_ms: u64,
    /// It stands still until then, world time.
    pub paused_until: u64,
    /// The API server is out of its reach until then.
    pub cut_off_until: u64,
    /// Its watches show nothing until then.
    pub stalled_until: u64,
    /// How much of the store's log its watch has shown.
    pub cursor: usize,
    /// It knows all that is there.
    pub listed: bool,
    /// Accounts as they were shown.
    pub accounts: BTreeMap<AccountName, Object>,
    /// What tiers and grants allow, as they were shown.
    pub policies: BTreeMap<AccountName, Policy>,
    /// Limits of pools, as they were shown.
    pub limits: BTreeMap<NodeName, Limits>,
    /// Bounds of the queues.
    pub queue: QueueBounds,
    /// Agents that are there.
    pub sessions: BTreeMap<NodeName, Session>,
    /// The object and revision that the next write of a page expects.
    pub targets: BTreeMap<AccountName, Target>,
    /// Pages that are being read for the leases of a node.
    pub confirming: BTreeSet<(AccountName, NodeName)>,
    /// Calls whose account is being looked for.
    pub first_calls: BTreeSet<Ticket>,
}

/// What a write expects (L2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Which object of the name.
    pub uid: u64,
    /// Which revision.
    pub revision: u64,
}

// === impl Target ===

impl Target {
    /// As seen.
    pub const fn of(object: &Object) -> Self {
        Self { uid: object.uid, revision: object.revision }
    }
}

// === impl Term ===

impl Term {
    /// Begins.
    pub fn new(state: State, world_ms: u64, stood_ms: u64) -> Self {
        Self { initial: state.clone(), state, events: Vec::new(), began: world_ms, stood_ms }
    }
}

// === impl Broker ===

impl Broker {
    /// A process that knows nothing yet.
    pub const fn new(number: u64, queue: QueueBounds) -> Self {
        Self {
            number,
            term: None,
            begun: None,
            above: Epoch(0),
            wall_offset: 0,
            clock_off_ms: None,
            stood_ms: 0,
            paused_until: 0,
            cut_off_until: 0,
            stalled_until: 0,
            cursor: 0,
            listed: false,
            accounts: BTreeMap::new(),
            policies: BTreeMap::new(),
            limits: BTreeMap::new(),
            queue,
            sessions: BTreeMap::new(),
            targets: BTreeMap::new(),
            confirming: BTreeSet::new(),
            first_calls: BTreeSet::new(),
        }
    }

    /// Its wall clock.
    pub const fn wall(&self, world_ms: u64) -> LedgerTime {
        LedgerTime(START.0.saturating_add_unsigned(world_ms).saturating_add(self.wall_offset))
    }

    /// Both clocks, in its term.
    pub fn moment(&self, world_ms: u64) -> Moment {
        let steady = self.term.as_ref().map_or(0, |term| {
            let stood_ms = self.stood_ms.saturating_sub(term.stood_ms);
            world_ms.saturating_sub(term.began).saturating_sub(stood_ms)
        });
        Moment { wall: self.wall(world_ms), steady: Steady(steady) }
    }

    /// It decides.
    pub fn serves(&self) -> bool {
        self.term.as_ref().is_some_and(|term| term.state.ended.is_none())
    }

    /// The highest epoch of any page and any agent's hello (L6).
    pub fn highest_epoch(&self) -> Epoch {
        let pages = self.accounts.values().map(|object| object.page.epoch);
        pages.chain(self.sessions.values().map(|session| session.highest_epoch)).max().unwrap_or_default()
    }

    /// Nodes that a new term waits for (L17): those with open holds and those whose agents are there.
    pub fn awaited(&self) -> BTreeSet<NodeName> {
        let holding = self.accounts.values().flat_map(|object| object.page.holds.iter().map(|hold| hold.node.clone()));
        holding.chain(self.sessions.keys().cloned()).collect()
    }

    /// What an account may do, as far as this process knows.
    pub fn policy(&self, account: &AccountName) -> Option<Policy> {
        let object = self.accounts.get(account)?;
        let policy = self.policies.get(account)?.clone();
        Some(Policy { deleting: object.deleting, ..policy })
    }

    /// What applies to a node.
    pub fn settings(&self, node: &NodeName) -> NodeSettings {
        let limits = self.limits.get(node).copied().unwrap_or_default();
        NodeSettings { limits, queue: self.queue, ..NodeSettings::default() }
    }
}
