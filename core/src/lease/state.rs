//! What the ledger knows. Only [`State::apply`] changes it.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::change::{PageChange, Urgency};
use super::command::{AgentLease, IdleWorker, Limits, NodeSettings, Policy};
use super::event::TermEnd;
use super::mutant::Mutant;
use super::policies::Policies;
use super::schedule::{Schedule, Scheduled};
use super::spaces::SpaceUse;
use crate::ids::{AccountName, ByName, CookieId, Epoch, LeaseId, NodeName, Size, Steady, Ticket, WorkerKey};
use crate::page::{CLOSED_MAX, Hold, Page};
use crate::queue::{History, Lane, Queue, Waiting, place_of};
use crate::quota::Allowance;
use crate::slots::Card;

/// Page writes in flight at once, of different accounts. Enough to keep an etcd busy that answers in a few milliseconds;
/// beyond it, changes of one account gather in one write instead.
pub const WRITES_IN_FLIGHT_MAX: usize = 64;

/// After a fail-over nothing new starts until every node has rejoined or this much time passed (L17).
pub const REJOIN_WAIT_MS: u64 = 500;

/// Everything about one term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The term (L6).
    pub epoch: Epoch,
    /// The term is over: nothing is decided any more.
    pub ended: Option<TermEnd>,
    /// The clock is this far off: nothing is granted (L20).
    pub clock_off_ms: Option<u64>,
    /// Pages. Boxed: up to half of the map's places are empty, and they are small so.
    pub accounts: ByName<AccountName, Box<Account>>,
    /// Nodes that were ever heard of in this term.
    pub nodes: BTreeMap<NodeName, Node>,
    /// Every lease that has an open hold or a slot.
    pub leases: ByName<LeaseId, Lease>,
    /// Leases that nodes had when they joined and that no known page holds: a page may have been written by an earlier leader
    /// that our watch has not shown (L7). Until their pages are read they are neither ended nor acknowledged. Bounded by what
    /// nodes have.
    pub strangers: BTreeMap<LeaseId, Stranger>,
    /// Who waits.
    pub queue: Queue,
    /// How long calls really ran, for the order of the queue.
    pub history: History,
    /// Spaces with leases or with a choice of their owner, by uid.
    pub spaces: BTreeMap<String, SpaceUse>,
    /// Leases of a Space that ended uncharged as NoDevice, since the hour began.
    pub no_device: BTreeMap<String, (Steady, u32)>,
    /// Numbers the requests of this term ([`place_of`]).
    pub next_place: u64,
    /// Numbers the reservations of this term.
    pub next_reservation: u64,
    /// Nodes whose rejoining is waited for until [`REJOIN_WAIT_MS`].
    pub awaited: BTreeSet<NodeName>,
    /// Which lease was made for which request.
    pub(super) tickets: ByName<Ticket, LeaseId>,
    /// The policies that accounts share.
    pub(super) policies: Policies,
    /// The longest call that any account of the term could make: an upper bound of what may come before anybody.
    pub(super) longest_call_ms: u64,
    /// Accounts with changes that no write carries yet.
    pub(super) schedule: Schedule,
    pub(super) writes_in_flight: usize,
    /// Those of them that carry a hold: somebody waits for each.
    pub(super) holds_in_flight: usize,
    #[cfg(feature = "mutants")]
    pub(super) mutant: Option<Mutant>,
}

/// One account: its page three times, and its policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// What it may do; shared with the other accounts of its tier.
    pub policy: Arc<Policy>,
    /// As last acknowledged by the store.
    pub durable: Arc<Page>,
    /// Durable, and all that is in flight or waits for the next write: decisions see this one (L3).
    pub working: Arc<Page>,
    /// The write in flight.
    pub in_flight: Option<Box<Batch>>,
    /// Changes for the next write.
    pub pending: Vec<PageChange>,
    /// When a write last carried a note (L5).
    pub(super) noted_at: Option<Steady>,
    /// Since when lazy changes wait.
    pub(super) lazy_since: Option<Steady>,
    /// Since when a settlement waits for its write to begin; `None` also where a write of it has been tried.
    pub(super) settle_since: Option<Steady>,
    /// Nothing is written or granted before; after a failed write.
    pub(super) retry_at: Option<Steady>,
    /// Failed writes in a row.
    pub(super) failures: u32,
    /// When its next write begins.
    pub(super) scheduled: Option<Scheduled>,
}

/// A group commit: the changes that one write carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Proves that the write happened (L2). A repetition of the very same write keeps it: at most one of them can happen,
    /// since each expects the page of before.
    pub write_id: String,
    /// What it changes.
    pub changes: Vec<PageChange>,
    /// What it writes.
    pub page: Arc<Page>,
    /// An attempt had an unknown outcome: a later refusal does not prove that it failed.
    pub unknown: bool,
}

/// A node's cards and who uses them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Times, weights and bounds of its pool.
    pub settings: NodeSettings,
    /// It accepted this term's epoch and its session is open.
    pub joined: bool,
    /// The agent that said Hello last.
    pub agent_instance: String,
    /// Its cards, as it said last.
    pub cards: Vec<Card>,
    /// The workers that it keeps, as it said last in this session (L16).
    pub idle: Vec<IdleWorker>,
    /// Leases on it.
    pub leases: BTreeSet<LeaseId>,
    /// Those of them that use a slot, by their numbers.
    pub(super) holders: Vec<Holder>,
    /// It refused an order that should have fitted: our picture of it is old. No orders until it is heard again.
    pub rests: bool,
    /// Since when its session is gone.
    pub silent_since: Option<Steady>,
}

/// A lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Who is charged; None if only the node knows it: then it is cancelled, and only its slot counts (L7).
    pub account: Option<AccountName>,
    /// Where.
    pub node: NodeName,
    /// Size.
    pub size: Size,
    /// uid of its Space; None if only the node knows it.
    pub space: Option<Arc<str>>,
    /// Longest run.
    pub declared_ms: u64,
    /// The request it was made for; None after a fail-over.
    pub request: Option<Arc<Waiting>>,
    /// By which lane of its queue it had its turn; None after a fail-over.
    pub lane: Option<Lane>,
    /// How far it is.
    pub stage: Stage,
    /// Card, once the node has said it.
    pub card: Option<u32>,
    /// Card on which its slot still clears, once the node has said it (L14).
    pub awaits: Option<u32>,
    /// Counts the reservations of the term: the order in which their places are predicted.
    pub number: u64,
    /// It gets the slot of this lease (L14).
    pub after: Option<LeaseId>,
    /// It was to get a slot that still cleared. Which one it gets in the end only its node knows.
    pub follows: bool,
    /// Cards that it may not use: they are kept for others (L7).
    pub avoid: Vec<u32>,
    /// Limits that its order carried, or carries if it leaves now. Of a lease of an earlier term the longest that it can
    /// be expected to have carried.
    pub limits: Limits,
    /// Its order said to wait for another lease's slot: all its limits begin up to so much later (L9, L14).
    pub waits_ms: u64,
    /// Its slot.
    pub slot: SlotUse,
    /// When the order was sent, before that when its hold was decided; for leases of an earlier term when they were met (L9).
    pub sent: Steady,
    /// Its visitor left before it began.
    pub abandoned: bool,
    /// When it was cancelled last.
    pub cancelled: Option<Steady>,
}

/// A lease whose page is being read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// Which node has it.
    pub node: NodeName,
    /// What that node said of it last.
    pub lease: AgentLease,
}

/// What the packing of a node's cards has to know of a lease; a copy, kept side by side for all leases of a node, because
/// every decision looks at all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub lease: LeaseId,
    pub number: u64,
    pub size: Size,
    pub card: Option<u32>,
    pub awaits: Option<u32>,
    pub clearing: bool,
    pub after: Option<LeaseId>,
    pub follows: bool,
    pub avoid: Vec<u32>,
    /// Whose kept worker it would get.
    pub worker: Option<WorkerKey>,
    /// When its order left; None if it has not.
    pub sent: Option<Steady>,
    /// How long it can hold its slot from then on, milliseconds.
    pub longest_ms: u64,
    pub declared_ms: u64,
}

/// How far a lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Its hold is not durable; nobody outside knows of it.
    Reserving,
    /// Its hold is durable and the order left, or may have left in an earlier term.
    Ordered,
    /// The node took the order.
    Assigned,
    /// The clock runs.
    Running,
    /// Over; the settlement is not durable.
    Settling,
    /// Over and settled.
    Settled,
}

/// What a lease does to its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotUse {
    /// Uses it, or will.
    Taken,
    /// Over, but the node has not given the slot back (invariant 6).
    Clearing,
    /// Does not use it.
    Free,
}

// === impl State ===

impl State {
    /// A term begins. `awaited` are the nodes known to exist.
    pub fn new(epoch: Epoch, awaited: BTreeSet<NodeName>) -> Self {
        Self {
            epoch,
            ended: None,
            clock_off_ms: None,
            accounts: ByName::default(),
            nodes: BTreeMap::new(),
            leases: ByName::default(),
            strangers: BTreeMap::new(),
            queue: Queue::default(),
            history: History::default(),
            tickets: ByName::default(),
            policies: Policies::default(),
            longest_call_ms: 0,
            spaces: BTreeMap::new(),
            no_device: BTreeMap::new(),
            next_place: place_of(epoch, 1),
            next_reservation: 1,
            awaited,
            schedule: Schedule::default(),
            writes_in_flight: 0,
            holds_in_flight: 0,
            #[cfg(feature = "mutants")]
            mutant: None,
        }
    }

    /// Sets a deliberate fault.
    #[cfg(feature = "mutants")]
    #[must_use]
    pub fn with_mutant(self, mutant: Mutant) -> Self {
        Self { mutant: Some(mutant), ..self }
    }

    /// The same for a ledger that is in use; none makes it right again.
    #[cfg(feature = "mutants")]
    pub const fn set_mutant(&mut self, mutant: Option<Mutant>) {
        self.mutant = mutant;
    }

    #[cfg(feature = "mutants")]
    pub(super) fn has(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    #[cfg(not(feature = "mutants"))]
    #[allow(clippy::unused_self)] // The same call as with the feature.
    pub(super) const fn has(&self, _mutant: Mutant) -> bool {
        false
    }

    /// The settings of a node, the defaults if none were given.
    pub fn settings(&self, node: &NodeName) -> NodeSettings {
        self.nodes.get(node).map(|node| node.settings).unwrap_or_default()
    }

    /// The limits of a lease whose order left in an earlier term: neither its page nor its node says what it carried.
    ///
    /// Too short ones would end a healthy lease, or return its quota while it runs. Too long ones keep quota reserved a
    /// little longer, and only where the node is silent: one that is there ends its leases itself. So of each limit the
    /// longest: of the defaults, which apply to a node whose pool is not known (it may be known now, or have been), and of
    /// what applies now to any node of the term (this one may have been in that one's pool). A pool that was above all
    /// these and was edited shortly before the fail-over is not covered.
    pub(super) fn inherited_limits(&self) -> Limits {
        self.nodes.values().fold(Limits::default(), |longest, node| longest.longest(node.settings.limits))
    }

    /// The limits of the lease of a hold.
    pub(super) fn limits_of(&self, lease: &LeaseId, node: &NodeName) -> Limits {
        self.leases.get(lease).map_or_else(|| self.settings(node).limits, |lease| lease.limits)
    }

    /// True if the node accepted this term and its session is open.
    pub fn joined(&self, node: &NodeName) -> bool {
        self.nodes.get(node).is_some_and(|node| node.joined)
    }

    /// What applies to an account, as decisions see it.
    pub(super) fn allowance_of<'a>(&self, account: &'a Account) -> Cow<'a, Allowance> {
        let allowance = &account.policy.allowance;
        if self.has(Mutant::PrefixCapIgnored) && allowance.per_cookie_ms.is_some() {
            return Cow::Owned(Allowance { base_ms: u64::MAX / 4, ..allowance.clone() });
        }
        Cow::Borrowed(allowance)
    }

    /// The page that decisions are made on.
    pub(super) fn page_of<'a>(&self, account: &'a Account) -> &'a Page {
        if self.has(Mutant::DecideOnDurable) { &account.durable } else { &account.working }
    }

    /// What a node said of a lease whose page is being read and whose hold is not known.
    pub(super) fn stranger(&self, node: &NodeName, lease: &LeaseId) -> Option<&AgentLease> {
        let is_held = self.leases.get(lease).is_some_and(|known| known.account.is_some());
        let found = self.strangers.get(lease).filter(|stranger| stranger.node == *node && !is_held);
        found.map(|stranger| &stranger.lease)
    }

    /// Leases of an account on a node, for which its page is being read.
    pub fn strangers_of(&self, account: &AccountName, node: &NodeName) -> impl Iterator<Item = &AgentLease> {
        let here = self.strangers.values().filter(move |stranger| stranger.node == *node);
        here.map(|stranger| &stranger.lease).filter(move |lease| lease.account.as_ref() == Some(account))
    }

    /// All leases, node by node, in the order of their names.
    pub fn leases(&self) -> impl Iterator<Item = (&LeaseId, &Lease)> {
        let names = self.nodes.values().flat_map(|node| &node.leases);
        names.filter_map(|id| Some((id, self.leases.get(id)?)))
    }

    /// Those of a node.
    pub fn leases_on(&self, node: &NodeName) -> impl Iterator<Item = (&LeaseId, &Lease)> {
        let names = self.nodes.get(node).into_iter().flat_map(|node| &node.leases);
        names.filter_map(|id| Some((id, self.leases.get(id)?)))
    }

    /// Leases that have a hold or a settlement that is not durable.
    pub fn unsettled(&self) -> impl Iterator<Item = (&LeaseId, &Lease)> {
        self.leases().filter(|(_, lease)| lease.account.is_some() && lease.stage < Stage::Settled)
    }
}

// === impl Account ===

impl Account {
    /// True while a new hold has to wait for something of the account's own: its concurrency limit, its outbox, or its
    /// failing writes. On the wire all three are the queueing reason `concurrency`.
    pub(super) fn is_blocked(&self, page: &Page, cookie: Option<&CookieId>, now: Steady) -> bool {
        self.is_full(page, cookie) || self.retry_at.is_some_and(|retry_at| now < retry_at)
    }

    /// True while the page takes no more holds, or none of this visitor of a guest page.
    pub(super) fn is_full(&self, page: &Page, cookie: Option<&CookieId>) -> bool {
        let is_own = |hold: &&Arc<Hold>| hold.cookie.as_ref().map(|window| &window.cookie) == cookie;
        let open = if cookie.is_some() { page.holds.iter().filter(is_own).count() } else { page.holds.len() };
        open >= usize::try_from(self.policy.concurrent).unwrap_or(usize::MAX)
            // L10: a full outbox pauses this account only. Every open hold will need a row in it.
            || page.holds.len() + page.closed.len() >= CLOSED_MAX
    }

    /// The most urgent of the changes that no write carries yet.
    pub(super) fn urgency(&self) -> Option<Urgency> {
        self.pending.iter().map(PageChange::urgency).max()
    }

    /// True if a write of it is under way, or due within [`NOTE_PERIOD_MS`](super::NOTE_PERIOD_MS). Changes that wait for
    /// company may wait for much longer ([`Urgency::Lazy`]).
    pub fn is_written_soon(&self) -> bool {
        self.in_flight.is_some() || self.urgency() >= Some(Urgency::Note)
    }
}

// === impl Holder ===

impl Holder {
    /// When it has surely given its slot back. An order that has not left leaves now at the earliest.
    pub fn drained_by(&self, now: Steady) -> Steady {
        self.sent.unwrap_or(now).plus(self.longest_ms)
    }
}

// === impl Batch ===

impl Batch {
    /// True if somebody waits for it.
    pub(super) fn has_hold(&self) -> bool {
        self.changes.iter().any(|change| matches!(change, PageChange::Hold { .. }))
    }
}

// === impl Lease ===

impl Lease {
    /// When it must have ended even if its order arrived at the last moment and its worker used every limit (L9). The limits
    /// are those that its order carried, for its node obeys no others.
    pub(super) const fn drained_by(&self) -> Steady {
        self.sent.plus(self.longest_ms())
    }

    const fn longest_ms(&self) -> u64 {
        let held_ms = self.limits.held_ms(self.declared_ms);
        self.limits.order_ttl_ms.saturating_add(held_ms).saturating_add(self.waits_ms)
    }

    /// None if it uses no slot.
    pub(super) fn holder(&self, id: &LeaseId) -> Option<Holder> {
        if self.slot == SlotUse::Free {
            return None;
        }
        Some(Holder {
            lease: id.clone(),
            number: self.number,
            size: self.size,
            card: self.card,
            awaits: self.awaits,
            clearing: self.slot == SlotUse::Clearing,
            after: self.after.clone(),
            follows: self.follows,
            avoid: self.avoid.clone(),
            worker: self.request.as_ref().and_then(|request| request.worker.clone()),
            sent: (self.stage != Stage::Reserving).then_some(self.sent),
            longest_ms: self.longest_ms(),
            declared_ms: self.declared_ms,
        })
    }

    /// Granted, and not over as far as we know.
    pub const fn is_open(&self) -> bool {
        self.account.is_some() && matches!(self.stage, Stage::Ordered | Stage::Assigned | Stage::Running)
    }
}
