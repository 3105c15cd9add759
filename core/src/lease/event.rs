//! What the ledger has decided. A refusal is an event with numbers in it, not an error.

use std::sync::Arc;

use super::change::PageChange;
use super::command::{AgentLease, IdleWorker, Limits, NodeSettings, PickedSlot, Policy, SpaceSettings};
use super::state::{SlotUse, Stage};
use crate::ids::{AccountName, Epoch, LeaseId, NodeName, Size, SpaceKey, Steady, Ticket};
use crate::page::Page;
use crate::protocol::{CallerClass, Denial};
use crate::queue::{Lane, Promise, Waiting, WaitsFor};
use crate::slots::Card;

/// Why a term ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TermEnd {
    /// Another leader has written a page (L2).
    Deposed {
        /// Its epoch.
        by: Epoch,
    },
    /// A node has accepted a higher epoch than ours: a term above it has to begin (L6).
    NodeAhead {
        /// That epoch.
        epoch: Epoch,
    },
}

/// Why a request waits no longer and got no lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// It is refused; [`Event::Denied`] says why.
    Refused,
    /// Its caller left.
    CallerGone,
    /// The agent of its node restarted, and its connection ended with that.
    AgentRestarted,
    /// The agent of its node did not present it again: its caller left while the agent was away, or the agent was away for
    /// too long.
    NotPresented,
}

impl Departure {
    /// The reason of its outcome, CamelCase.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "Refused",
            Self::CallerGone => "CallerGone",
            Self::AgentRestarted => "AgentRestarted",
            Self::NotPresented => "NotPresented",
        }
    }

    /// What happened, for people.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Refused => "the request was refused",
            Self::CallerGone => "the caller left while the request waited",
            Self::AgentRestarted => "the node agent restarted while the request waited",
            Self::NotPresented => "the node agent was away and did not present the request again",
        }
    }
}

/// Something that is so from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Fields are named like the state's.
pub enum Event {
    // Pages.
    /// An account is known.
    AccountTaken { account: AccountName, page: Box<Page>, policy: Policy },
    /// Its tier or grants changed.
    PolicyChanged { account: AccountName, policy: Policy },
    /// It is gone.
    AccountDropped { account: AccountName },
    /// The working page changed; a write will carry it.
    Changed { account: AccountName, change: PageChange, at: Steady },
    /// A write carries what was pending.
    WriteBegun { account: AccountName, write_id: String, at: Steady },
    /// Nobody knows whether it happened; it keeps its place.
    WriteUnknown { account: AccountName },
    /// The page has changed under it: it is read again.
    WriteContested { account: AccountName },
    /// It is sent once more, as it was.
    WriteRepeated { account: AccountName },
    /// It happened.
    Committed { account: AccountName },
    /// It certainly did not: these holds are aborted, the rest is pending again.
    WriteFailed { account: AccountName, aborted: Vec<LeaseId>, retry_at: Steady },
    /// Somebody else wrote the page: these changes are made again on top of it, and no others.
    Rebased { account: AccountName, page: Box<Page>, kept: Vec<PageChange> },

    // Requests.
    /// A request waits, new or again.
    Queued(Arc<Waiting>),
    /// The agent presented it again.
    Confirmed { ticket: Ticket },
    /// It waits no longer.
    Left { ticket: Ticket, why: Departure },
    /// Its agent is told of its place, and its lease has a name.
    Announced { ticket: Ticket, lease: LeaseId, at: Steady, promise: Option<Promise> },
    /// It has its turn, but waits for its own account or Space.
    Parked { ticket: Ticket, waits_for: WaitsFor },
    /// The requests of an account need not wait for it any more.
    Unparked { account: AccountName },
    /// It has its turn, and the card that drains first is kept for it.
    CardKept { ticket: Ticket, lane: Lane },
    /// The card that was kept is given to somebody whose turn it is by age.
    CardReleased { node: NodeName },
    /// The node has fewer slots than when those who wait for it were told when they begin at the latest.
    PromisesWithdrawn { node: NodeName },
    /// What it was promised in an earlier term had run out before it was presented: it is told a later latest start.
    PromiseOver { ticket: Ticket, node: NodeName, waited_ms: u64, promised_ms: u64 },
    /// It is refused.
    Denied { ticket: Ticket, node: NodeName, caller: CallerClass, denial: Denial },

    // Leases.
    /// A slot is meant for a request; its hold is not durable yet.
    Reserved { lease: LeaseId, waiting: Arc<Waiting>, after: Option<LeaseId>, avoid: Vec<u32>, at: Steady },
    /// The hold is aborted.
    Unreserved { lease: LeaseId },
    /// The hold is durable: the order leaves. It may avoid more than its hold does.
    Ordered { lease: LeaseId, at: Steady, limits: Limits, waits_ms: u64, avoid: Vec<u32> },
    /// A lease of an earlier term, or one that only its node knows.
    Adopted {
        lease: LeaseId,
        account: Option<AccountName>,
        node: NodeName,
        size: Size,
        declared_ms: u64,
        card: Option<u32>,
        stage: Stage,
        slot: SlotUse,
        limits: Limits,
        waits_ms: u64,
        at: Steady,
    },
    /// The node took the order.
    Assigned { lease: LeaseId, slot: PickedSlot },
    /// The clock runs.
    Running { lease: LeaseId },
    /// It is over; its settlement is pending.
    Ended { lease: LeaseId, slot: SlotUse },
    /// The settlement is durable.
    Settled { account: AccountName, lease: LeaseId },
    /// The node gave the slot back.
    SlotFreed { lease: LeaseId },
    /// The visitor left before it began, or its request can not be served any more.
    Abandoned { lease: LeaseId },
    /// The node is told to end it (L9).
    Cancelled { lease: LeaseId, at: Steady, reason: &'static str },
    /// The node need not repeat its report.
    Acknowledged { node: NodeName, lease: LeaseId, ended: bool, freed: bool },
    /// A Space used one of its free NoDevice endings of this hour.
    NoDeviceCounted { space: SpaceKey, at: Steady },

    // Leases that no known page holds, until their pages are read.
    /// A node has it, or says more of it.
    StrangerMet { node: NodeName, lease: Box<AgentLease> },
    /// Its page is to be read.
    PageDoubted { node: NodeName, account: AccountName },
    /// Its page has said whose it is, or its node does not have it any more.
    StrangerJudged { lease: LeaseId },

    // Nodes.
    /// Its pool says so.
    NodeConfigured { node: NodeName, settings: NodeSettings },
    /// Its owner says so.
    SpaceConfigured { space: String, settings: SpaceSettings },
    /// An agent began a session.
    NodeHello { node: NodeName, agent_instance: String },
    /// It accepted the term.
    NodeJoined { node: NodeName, cards: Vec<Card>, idle: Vec<IdleWorker>, confirm_by: Steady },
    /// Its cards changed.
    InventoryTaken { node: NodeName, cards: Vec<Card> },
    /// It keeps these workers, and no others.
    IdleTaken { node: NodeName, idle: Vec<IdleWorker> },
    /// It keeps this one too.
    WorkerKept { node: NodeName, idle: IdleWorker },
    /// Its session is gone.
    NodeLost { node: NodeName, at: Steady },
    /// No orders until it is heard again.
    NodeRests { node: NodeName },
    /// It is heard again.
    NodeHeard { node: NodeName },

    // The term.
    /// The clock is off, or no longer.
    ClockJudged { off_ms: Option<u64> },
    /// Counters that time has made pointless are forgotten.
    Forgotten { at: Steady },
    /// Nothing is decided any more.
    TermEnded(TermEnd),
}
