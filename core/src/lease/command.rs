//! What reaches the ledger from outside.

use crate::ids::{AccountName, CookieId, Epoch, LeaseId, NodeName, Revision, Size, SpaceKey, Ticket, WorkerKey};
use crate::page::{Budget, Ending, Page};
use crate::protocol::{CallerClass, UnauthenticatedReason};
use crate::queue::{LaneSettings, Presented, Priority, QueueBounds};
use crate::quota::Allowance;
use crate::slots::Card;

/// Something that happened outside, as the shell saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// An account as its watch shows it: at the start of the term for each, later for each change. Of a page that is not
    /// newer than what is known only the policy counts (L2).
    AccountSeen {
        /// Its name.
        account: AccountName,
        /// `status`.
        page: Box<Page>,
        /// What its tier and grants allow.
        policy: Policy,
    },
    /// The object is gone.
    AccountGone {
        /// Its name.
        account: AccountName,
    },
    /// The pool of a node: its times, weights and bounds.
    NodeSettings {
        /// Its name.
        node: NodeName,
        /// What applies to it.
        settings: NodeSettings,
    },
    /// What the owner of a Space has chosen; the defaults when it is gone.
    SpaceSettings {
        /// uid of the Space.
        space: String,
        /// What applies to its calls.
        settings: SpaceSettings,
    },
    /// An agent opened a session.
    NodeHello {
        /// Its node.
        node: NodeName,
        /// Fresh at every start of the agent.
        agent_instance: String,
        /// Highest epoch the node has accepted (L6).
        highest_epoch: Epoch,
    },
    /// The node accepted the epoch: its slots exist in this term (L7).
    NodeJoined {
        /// Its name.
        node: NodeName,
        /// The epoch it accepted.
        epoch: Epoch,
        /// Its time-shared cards.
        cards: Vec<Card>,
        /// Every lease it still knows.
        leases: Vec<AgentLease>,
        /// Every worker that it keeps, in the order of their slots.
        idle: Vec<IdleWorker>,
    },
    /// The node lives; with cards or kept workers if they changed.
    Heartbeat {
        /// Its name.
        node: NodeName,
        /// All its cards.
        cards: Option<Vec<Card>>,
        /// Every worker that it keeps, in the order of their slots.
        idle: Option<Vec<IdleWorker>>,
    },
    /// The session ended.
    NodeDisconnected {
        /// Its node.
        node: NodeName,
    },
    /// A visitor's call wants a GPU.
    Request(Box<Request>),
    /// The visitor left while the request waited.
    Dequeue {
        /// Of the request.
        ticket: Ticket,
    },
    /// The node took the order.
    Started {
        /// Who says so.
        node: NodeName,
        /// Of the order.
        lease: LeaseId,
        /// The slot that it picked.
        slot: PickedSlot,
    },
    /// The node did not take the order.
    Refused {
        /// Who says so.
        node: NodeName,
        /// Of the order.
        lease: LeaseId,
    },
    /// The worker was allowed: the clock runs.
    Running {
        /// Who says so.
        node: NodeName,
        /// Of the worker.
        lease: LeaseId,
    },
    /// The clock stopped (L11).
    Ended {
        /// Who says so.
        node: NodeName,
        /// Which lease.
        lease: LeaseId,
        /// How, and how much.
        report: EndReport,
        /// Its worker is kept for reuse, so its slot can be had at once (L16). `Freed` follows all the same.
        kept: bool,
    },
    /// The slot came back, or did not (L11).
    Freed {
        /// Who says so.
        node: NodeName,
        /// Which lease.
        lease: LeaseId,
        /// What became of the slot.
        how: FreedAs,
    },
    /// The lease's final receipt exists.
    ReceiptWritten {
        /// Who was charged.
        account: AccountName,
        /// Which lease.
        lease: LeaseId,
    },
    /// What people are shown of the account is out of date, and no page write is under way that would show it.
    Show {
        /// Whose.
        account: AccountName,
    },
    /// The store acknowledged the write in flight.
    PageWritten {
        /// Whose page.
        account: AccountName,
        /// Of the write.
        write_id: String,
    },
    /// The store refused the write because the page has another revision.
    PageConflict {
        /// Whose page.
        account: AccountName,
        /// Of the write.
        write_id: String,
    },
    /// Nobody knows whether the write happened (L2).
    PageUnknown {
        /// Whose page.
        account: AccountName,
        /// Of the write.
        write_id: String,
    },
    /// The page as it stands now, as asked for by [`Effect::Read`](super::Effect::Read).
    PageRead {
        /// Whose page.
        account: AccountName,
        /// As read, by a read that sees every acknowledged write.
        page: Box<Page>,
    },
    /// The page as it stands now, as asked for by [`Effect::Confirm`](super::Effect::Confirm).
    PageConfirmed {
        /// Whose page.
        account: AccountName,
        /// For the leases of which node.
        node: NodeName,
        /// As read, by a read that sees every write acknowledged before the node joined; None if there is no such account.
        page: Option<Box<Page>>,
    },
    /// The write certainly did not happen and would not if it were repeated at once.
    PageFailed {
        /// Whose page.
        account: AccountName,
        /// Of the write.
        write_id: String,
    },
    /// Our clock against the API server's: how far off it is if that is too much (L20).
    ClockJudged {
        /// None: near enough.
        off_ms: Option<u64>,
    },
    /// Time passed. The shell sends it at least every second.
    Tick,
}

/// What an account may do, from its tier and grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Name of the tier, for people.
    pub tier: String,
    /// Quota.
    pub allowance: Allowance,
    /// Most leases at once; on a guest page of each visitor.
    pub concurrent: u32,
    /// Place in the queue.
    pub priority: Priority,
    /// What the client is told.
    pub caller: CallerClass,
    /// The object is being deleted: grants answer AccountDeleting (L4).
    pub deleting: bool,
    /// An older account has one of its identities; nothing is granted while it does (L4).
    pub conflict: Option<AccountName>,
}

/// What the owner of a Space has chosen for its calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceSettings {
    /// Most leases at once; more calls wait. A soft limit: one broker keeps it exactly, but leases that it has not met yet, in
    /// the first moments of a term, do not count (L1).
    pub concurrent: Option<u32>,
    /// A call gets what its caller has left, if that is less than it declares (requirement A3).
    pub clamp_to_remaining: bool,
    /// A call gets what its function has been seen to need, with a margin, if that is less (requirement A13).
    pub learned_reservation: bool,
}

/// Limits in time of a lease (L8, L9), milliseconds. Its order carries them, and its node obeys those of the order
/// as long as the lease is there, whatever becomes of the pool meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the grant to `/allow`.
    pub allow_limit_ms: u64,
    /// From the declared end to the kill.
    pub grace_ms: u64,
    /// From the end to a free slot.
    pub clear_limit_ms: u64,
    /// Age at which the node refuses an order.
    pub order_ttl_ms: u64,
}

/// Times, weights and bounds of a node's pool (L8, L9, L19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// For the next order.
    pub limits: Limits,
    /// What the client multiplies durations of `large` by, in percent.
    pub duration_factor_percent: u64,
    /// Charged milliseconds for each millisecond of a `large`.
    pub large_weight: u64,
    /// The same for `xlarge`.
    pub xlarge_weight: u64,
    /// Most waiting requests.
    pub queue: QueueBounds,
    /// Their order.
    pub lanes: LaneSettings,
}

impl Default for Limits {
    /// The chart's defaults.
    fn default() -> Self {
        Self { allow_limit_ms: 30_000, grace_ms: 2_000, clear_limit_ms: 10_000, order_ttl_ms: 5_000 }
    }
}

impl Limits {
    /// How long a lease can hold its slot: H of docs/rules.md.
    pub const fn held_ms(&self, declared_ms: u64) -> u64 {
        self.allow_limit_ms
            .saturating_add(declared_ms)
            .saturating_add(self.grace_ms)
            .saturating_add(self.clear_limit_ms)
    }

    /// Of each limit the longer one.
    #[must_use]
    pub fn longest(self, other: Self) -> Self {
        Self {
            allow_limit_ms: self.allow_limit_ms.max(other.allow_limit_ms),
            grace_ms: self.grace_ms.max(other.grace_ms),
            clear_limit_ms: self.clear_limit_ms.max(other.clear_limit_ms),
            order_ttl_ms: self.order_ttl_ms.max(other.order_ttl_ms),
        }
    }
}

impl PickedSlot {
    /// The card on which it has a slot.
    pub const fn has(self) -> Option<u32> {
        match self {
            Self::Has(card) => Some(card),
            Self::Awaits(_) | Self::Open => None,
        }
    }

    /// The card on which it waits for one.
    pub const fn awaits(self) -> Option<u32> {
        match self {
            Self::Awaits(card) => Some(card),
            Self::Has(_) | Self::Open => None,
        }
    }
}

impl Default for NodeSettings {
    /// The chart's defaults.
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            duration_factor_percent: 100,
            large_weight: Size::Large.weight(),
            xlarge_weight: Size::Xlarge.weight(),
            queue: QueueBounds::default(),
            lanes: LaneSettings::default(),
        }
    }
}

impl NodeSettings {
    /// Charged milliseconds for each millisecond of use.
    pub const fn weight(&self, size: Size) -> u64 {
        match size {
            Size::Large => self.large_weight,
            Size::Xlarge => self.xlarge_weight,
        }
    }
}

/// A call, parsed, with its caller looked up by the shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Idempotency key (L15).
    pub ticket: Ticket,
    /// Node of the pod.
    pub node: NodeName,
    /// The Space that the pod belongs to.
    pub space: SpaceKey,
    /// The version of the Space's app that the pod runs.
    pub revision: Revision,
    /// Whose calls a worker must have served that can serve this one again; None if that is not known.
    pub worker: Option<WorkerKey>,
    /// Size asked for.
    pub size: Size,
    /// Longest run asked for, unweighted.
    pub declared_ms: u64,
    /// Who pays: the account of the token, or the Space's own where there was none; or what is wrong with the token.
    pub caller: Result<AccountName, UnauthenticatedReason>,
    /// The visitor, if the account is a guest page (L1); then always there.
    pub cookie: Option<CookieId>,
    /// The token's budget; None without a token.
    pub budget: Option<Budget>,
    /// Where it waited before a fail-over; None of a request that was told nothing yet (L17).
    pub presented: Option<Presented>,
}

/// A lease as an agent tells of it when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentLease {
    /// Its id.
    pub lease: LeaseId,
    /// Who pays, as its order said; None where the agent lost its record of the lease.
    pub account: Option<AccountName>,
    /// Size.
    pub size: Size,
    /// Its slot.
    pub slot: PickedSlot,
    /// Where it stands.
    pub phase: AgentPhase,
}

/// A worker that its node keeps frozen for the next call of its own function. It makes room for anybody else (L16).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdleWorker {
    /// Whose calls it serves; None: nobody's any more, it has to go and its slot clears.
    pub worker: Option<WorkerKey>,
    /// On which card.
    pub card: u32,
    /// Size of its slot: it serves calls of this size.
    pub size: Size,
}

/// The slot of a lease, as far as its node has picked one (L7, L14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PickedSlot {
    /// It has a slot of this card.
    Has(u32),
    /// It will have one of this card, which still clears.
    Awaits(u32),
    /// It waits for whichever of those that clear comes back.
    Open,
}

/// Where a lease stands on its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentPhase {
    /// Has or waits for a slot.
    Assigned,
    /// The clock runs.
    Running,
    /// Over, and not acknowledged yet.
    Ended {
        /// How.
        report: EndReport,
        /// The slot came back.
        freed: bool,
    },
}

/// How a lease ended on its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndReport {
    /// How.
    pub ending: Ending,
    /// Clock start to end, 0 if it never started.
    pub used_ms: u64,
}

/// What became of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreedAs {
    /// Gate closed, memory back.
    Free,
    /// A frozen worker is kept; it makes room at any time, so the slot counts as free (L16).
    Held,
    /// It did not clear. The inventory that says so was sent before.
    Quarantined,
}
