//! A replica of the operator: the real ledger, and around it what the actor of the operator does with pages and answers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use spaceport_core::ids::{Epoch, IdSeed, LedgerTime, Revision, Size, SpaceKey, Steady};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Command, Effect, EndReport, FreedAs, Moment, NOBODYS, NodeSettings, PickedSlot, Policy,
    Priority, Request, State, step,
};
use spaceport_core::page::{Ending, Page};
use spaceport_core::protocol::CallerClass;
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;

use crate::bounds::{ACCOUNTS, Call, DECLARED_MS};
use crate::names;
use crate::node::{NodeLease, Order, Phase, ToBroker};
use crate::shared::{Shared, fingerprint};

/// All wall clocks stand still: windows neither open nor end within a history.
const WALL: LedgerTime = LedgerTime(1_800_000_000_000);
/// A term's monotonic clock as its first command sees it: beyond the 500 ms in which a new leader waits for its nodes
/// (L17), so that a lease may be granted whether a node has rejoined or not.
const BEGUN_MS: u64 = 1_000;
/// A long pause: beyond every bound of L9.
pub const PAUSE_MS: u64 = 1_000_000;
/// A short one: beyond the wait after a failed write and the time between two Cancels, and below every bound of L9.
const TICK_MS: u64 = 6_000;

/// A replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Broker {
    /// Does not lead.
    Standby,
    /// Has raised the term page and waits for its own watch to show that write (L6).
    Beginning {
        /// Of the new term.
        epoch: u64,
        /// The account pages as its watch will have shown them by then.
        pages: [Shared<Page>; ACCOUNTS],
    },
    /// Believes that it leads.
    Leading(Leading),
}

/// A term.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leading {
    /// The ledger.
    pub core: Shared<State>,
    /// The revision that the next write of a page expects.
    pub targets: [u64; ACCOUNTS],
    /// The newest page that the account watch has shown.
    pub shown: [u64; ACCOUNTS],
    /// Reads on their way.
    pub reads: Vec<Read>,
    /// Receipts to be written.
    pub receipts: Vec<(usize, u32)>,
    /// Long pauses since the term began.
    pub pauses: u8,
    /// Short ones.
    pub ticks: u8,
    /// It has not looked at its clock since the last long pause.
    pub tick_due: bool,
}

/// A page that is read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Read {
    /// Whose.
    pub account: usize,
    /// For leases of this node that no known page holds (L7).
    pub node: Option<usize>,
    /// As the API server read it; none before it did.
    pub page: Option<Shared<Page>>,
}

/// An effect of the ledger, in this world's terms.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // As in `spaceport_core::lease::Effect`.
pub enum Out {
    Write { account: usize, page: Shared<Page> },
    Read { account: usize, node: Option<usize> },
    Receipt { account: usize, lease: u32 },
    Start { node: usize, order: Order },
    Cancel { node: usize, epoch: u64, lease: u32, nobodys: bool },
    Acknowledge { node: usize, lease: u32, ended: bool, freed: bool },
    Deny { node: usize, call: u8, start: u8 },
    EndTerm,
}

/// What one command brings about.
#[derive(Clone, Debug)]
pub struct Stepped {
    /// The ledger after it.
    pub core: Shared<State>,
    /// Its effects, in order.
    pub outs: Vec<Out>,
    /// The ledger refused an event of its own.
    pub misfit: bool,
    /// See [`is_sound`].
    pub sound: bool,
}

/// Remembers what commands bring about. A ledger meets the same command in the same state in thousands of states of the
/// world, and a step is pure.
#[derive(Debug)]
pub struct Steps {
    shards: Vec<Mutex<HashMap<u64, Arc<Stepped>>>>,
}

/// More than there are threads, so that they seldom wait for each other.
const SHARDS: usize = 64;
/// Steps that a shard remembers; then it begins anew. A ledger is some ten kilobytes, so all of them are some hundred
/// megabytes.
const SHARD_STEPS_MAX: usize = 256;

impl Steps {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Gives a ledger a command.
    pub fn take(&self, leading: &Leading, command: Command) -> Arc<Stepped> {
        let at = leading.moment();
        let key = fingerprint(&(leading.core.fingerprint(), at.steady, &command));
        let shard = &self.shards[usize::try_from(key).unwrap_or_default() % SHARDS];
        if let Some(known) = shard.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Arc::clone(known);
        }
        let mut state = State::clone(&leading.core);
        let seed = leading.seed(&command);
        let outcome = step(&mut state, at, seed, command);
        let stepped = Arc::new(Stepped {
            outs: outcome.effects.into_iter().filter_map(|effect| out(&state, effect)).collect(),
            sound: is_sound(&state),
            core: Shared::new(state),
            misfit: !outcome.violations.is_empty(),
        });
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if shard.len() >= SHARD_STEPS_MAX {
            shard.clear();
        }
        shard.insert(key, Arc::clone(&stepped));
        stepped
    }
}

impl Default for Steps {
    fn default() -> Self {
        Self::new()
    }
}

impl Leading {
    /// A term with nothing in it.
    pub fn new(state: State) -> Self {
        Self {
            core: Shared::new(state),
            targets: [0; ACCOUNTS],
            shown: [0; ACCOUNTS],
            reads: Vec::new(),
            receipts: Vec::new(),
            pauses: 0,
            ticks: 0,
            tick_due: false,
        }
    }

    /// A read for leases that are not in doubt any more changes nothing, so it is not on its way. But for a node that is
    /// away: it may be back with them before the answer.
    pub fn forget_reads(&mut self) {
        let core = &self.core;
        self.reads.retain(|read| {
            read.node.map(names::node).is_none_or(|node| {
                !core.joined(&node) || core.strangers_of(&names::account(read.account), &node).next().is_some()
            })
        });
    }

    /// Its clocks now.
    pub fn moment(&self) -> Moment {
        let steady = BEGUN_MS + u64::from(self.pauses) * PAUSE_MS + u64::from(self.ticks) * TICK_MS;
        Moment { wall: WALL, steady: Steady(steady) }
    }

    /// Ids that no other command of any term draws, and that do not depend on the order of commands that have nothing to do
    /// with each other: or every order of them would lead to states of its own. They are told apart by the term, the
    /// clock, how many page writes the ledger knows of, and what the command is about.
    fn seed(&self, command: &Command) -> IdSeed {
        let writes: u64 = self.core.accounts.values().map(|account| account.durable.seq).sum();
        let about = match command {
            Command::Request(request) => request.ticket.number,
            Command::AccountSeen { account, .. }
            | Command::PageRead { account, .. }
            | Command::PageConfirmed { account, .. }
            | Command::PageWritten { account, .. }
            | Command::PageConflict { account, .. }
            | Command::PageFailed { account, .. } => 8 + names::account_index(account) as u64,
            Command::NodeJoined { node, .. }
            | Command::NodeHello { node, .. }
            | Command::Heartbeat { node, .. }
            | Command::Refused { node, .. }
            | Command::Ended { node, .. }
            | Command::Freed { node, .. } => 12 + names::node_index(node) as u64,
            _ => 15,
        };
        let clock = u64::from(self.pauses) * 2 + u64::from(self.ticks);
        // At most 8 ids are drawn by a command here, 64 pages are written, and the clock moves 8 times.
        IdSeed(u128::from((((self.core.epoch.0 * 8 + clock) * 64 + writes) * 16 + about) * 8))
    }
}

/// L3: each working page is what is durable, in flight and pending, and somebody will settle each of its holds.
fn is_sound(state: &State) -> bool {
    state.accounts.values().all(|account| {
        let begun = account.in_flight.as_ref().map_or(&account.durable, |batch| &batch.page);
        let mut page = Page::clone(begun);
        let fits = account.pending.iter().all(|change| change.make(&mut page).is_ok());
        fits && page == *account.working && page.holds.iter().all(|hold| state.leases.contains_key(&hold.lease))
    })
}

fn out(state: &State, effect: Effect) -> Option<Out> {
    Some(match effect {
        Effect::Write { account, page } => {
            Out::Write { account: names::account_index(&account), page: Shared::new(Page::clone(&page)) }
        }
        Effect::Read { account } => Out::Read { account: names::account_index(&account), node: None },
        Effect::Confirm { account, node } => {
            Out::Read { account: names::account_index(&account), node: Some(names::node_index(&node)) }
        }
        Effect::Receipt { account, closed } => {
            Out::Receipt { account: names::account_index(&account), lease: names::lease_number(&closed.hold.lease) }
        }
        Effect::Start(order) => Out::Start {
            node: names::node_index(&order.node),
            order: Order {
                epoch: order.epoch.0,
                lease: names::lease_number(&order.lease),
                call: call_of(order.ticket.number),
                start: names::start_of(&order.ticket),
                after: order.after.as_ref().map(names::lease_number),
                stale: false,
            },
        },
        Effect::Cancel { node, lease, reason } => Out::Cancel {
            node: names::node_index(&node),
            epoch: state.epoch.0,
            lease: names::lease_number(&lease),
            nobodys: reason == NOBODYS,
        },
        Effect::Acknowledge { node, lease, ended, freed } => {
            Out::Acknowledge { node: names::node_index(&node), lease: names::lease_number(&lease), ended, freed }
        }
        Effect::Deny { ticket, node, .. } => {
            Out::Deny { node: names::node_index(&node), call: call_of(ticket.number), start: names::start_of(&ticket) }
        }
        Effect::Queue(_) => return None,
        Effect::EndTerm(_) => Out::EndTerm,
    })
}

fn call_of(number: u64) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

// === commands ===

/// Quota for two leases at once, or for one.
fn policy(account: usize) -> Policy {
    let leases: u32 = if account == 0 { 2 } else { 1 };
    Policy {
        tier: "model".into(),
        allowance: Allowance {
            per_cookie_ms: None,
            base_ms: u64::from(leases) * DECLARED_MS,
            longest_call_ms: DECLARED_MS,
            runs_per_window: None,
            generation: 1,
            grants: Vec::new(),
        },
        concurrent: 2,
        priority: Priority::Medium,
        caller: CallerClass::Regular,
        deleting: false,
        conflict: None,
    }
}

/// A page as the watch shows it.
pub fn seen(account: usize, page: &Page) -> Command {
    Command::AccountSeen { account: names::account(account), page: Box::new(page.clone()), policy: policy(account) }
}

/// A page as it was read.
pub fn read(account: usize, node: Option<usize>, page: &Page) -> Command {
    let (account, page) = (names::account(account), Box::new(page.clone()));
    match node {
        None => Command::PageRead { account, page },
        Some(node) => Command::PageConfirmed { account, node: names::node(node), page: Some(page) },
    }
}

/// The pool of a node.
pub fn settings(node: usize) -> Command {
    Command::NodeSettings { node: names::node(node), settings: NodeSettings::default() }
}

/// A session begins.
pub fn hello(node: usize, start: u8, highest: u64) -> Command {
    let agent_instance = names::instance(node, start);
    Command::NodeHello { node: names::node(node), agent_instance, highest_epoch: Epoch(highest) }
}

/// A session is over.
pub fn disconnected(node: usize) -> Command {
    Command::NodeDisconnected { node: names::node(node) }
}

/// The command that a node's message is.
pub fn command(node: usize, message: &ToBroker, calls: &[Call]) -> Command {
    let name = names::node(node);
    match message {
        ToBroker::Joined { epoch, leases } => Command::NodeJoined {
            node: name,
            epoch: Epoch(*epoch),
            cards: vec![Card { index: 0, large_slots: 1, grantable: true, quarantined_slots: 0 }],
            leases: leases.iter().map(|lease| agent_lease(lease, calls)).collect(),
            // Its workers end with their leases.
            idle: Vec::new(),
        },
        ToBroker::Request { call, start } => Command::Request(Box::new(Request {
            cookie: None,
            ticket: names::ticket(usize::from(*call), node, *start),
            node: name,
            space: SpaceKey::new("model", "space", "space"),
            revision: Revision::default(),
            worker: None,
            size: Size::Large,
            declared_ms: DECLARED_MS,
            caller: Ok(names::account(calls[usize::from(*call)].account)),
            budget: None,
            // What order calls are served in is not looked at here.
            presented: None,
        })),
        ToBroker::Dequeue { call, start } => {
            Command::Dequeue { ticket: names::ticket(usize::from(*call), node, *start) }
        }
        ToBroker::Started { lease, card } => {
            let slot = if *card { PickedSlot::Has(0) } else { PickedSlot::Awaits(0) };
            Command::Started { node: name, lease: names::lease(*lease), slot }
        }
        ToBroker::Refused { lease } => Command::Refused { node: name, lease: names::lease(*lease) },
        ToBroker::Running { lease } => Command::Running { node: name, lease: names::lease(*lease) },
        ToBroker::Ended { lease, ending, used_ms } => {
            let (lease, report) = (names::lease(*lease), report(*ending, *used_ms));
            Command::Ended { node: name, lease, report, kept: false }
        }
        ToBroker::Freed { lease } => Command::Freed { node: name, lease: names::lease(*lease), how: FreedAs::Free },
        ToBroker::Heartbeat => Command::Heartbeat { node: name, cards: None, idle: None },
    }
}

const fn report(ending: Ending, used_ms: u64) -> EndReport {
    EndReport { ending, used_ms }
}

fn agent_lease(lease: &NodeLease, calls: &[Call]) -> AgentLease {
    AgentLease {
        lease: names::lease(lease.lease),
        account: Some(names::account(calls[usize::from(lease.call)].account)),
        size: Size::Large,
        slot: if lease.phase == Phase::Waiting { PickedSlot::Awaits(0) } else { PickedSlot::Has(0) },
        phase: match lease.phase {
            Phase::Waiting | Phase::Assigned => AgentPhase::Assigned,
            Phase::Running => AgentPhase::Running,
            Phase::Ended { ending, used_ms, freed, .. } => AgentPhase::Ended { report: report(ending, used_ms), freed },
        },
    }
}
