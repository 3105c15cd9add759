//! How large the cluster is and what may go wrong in it: without bounds the check would never end.

use spaceport_core::lease::State;

/// Replicas of the operator. Two are the fewest where one can be late: any further one only adds more of the same lateness.
pub const BROKERS: usize = 2;
/// Nodes, with one slot each, so that two leases of one node always meet.
pub const NODES: usize = 2;
/// Accounts. The first has quota for two leases at once, the second for one.
pub const ACCOUNTS: usize = 2;

/// What each call declares.
pub const DECLARED_MS: u64 = 10_000;
/// What each call uses that returns in time: less than declared, so that a charge and a refund can be told apart.
pub const USED_MS: u64 = 4_000;
/// What a call uses that is killed at its deadline: declared plus grace.
pub const DEADLINE_MS: u64 = 12_000;

/// A call: on which node, and who pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Index of the node.
    pub node: usize,
    /// Index of the account.
    pub account: usize,
}

/// How often each thing may happen in one history. Zero leaves it out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Terms that begin after the first.
    pub terms: u8,
    /// A leader's process dies.
    pub crashes: u8,
    /// A leader loses a session; what it had sent may still arrive.
    pub cuts: u8,
    /// An order stalls until it is too old.
    pub stalls: u8,
    /// A page write's answer is lost; the write happens, happens later, or never.
    pub unknown: u8,
    /// The API server refuses a page write that would have been legal.
    pub rejected: u8,
    /// A node sends its reports again although nothing is lost.
    pub repeats: u8,
    /// An agent restarts with its checkpoint.
    pub restarts: u8,
    /// A node reboots, or its agent restarts without checkpoint: what ran is killed and reported as lost.
    pub reboots: u8,
    /// A node goes away for good.
    pub losses: u8,
    /// Everybody is idle for longer than the bound of L9.
    pub pauses: u8,
    /// A visitor leaves.
    pub leaves: u8,
    /// Half a minute passes for a leader, and nothing else happens; for each leader so often.
    pub ticks: u8,
}

impl Budget {
    /// Nothing goes wrong.
    pub const NONE: Self = Self {
        terms: 0,
        crashes: 0,
        cuts: 0,
        stalls: 0,
        unknown: 0,
        rejected: 0,
        repeats: 0,
        restarts: 0,
        reboots: 0,
        losses: 0,
        pauses: 0,
        leaves: 0,
        ticks: 0,
    };
}

/// A small cluster, and what may happen to it.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// For people.
    pub name: &'static str,
    /// How many of the nodes are there.
    pub nodes: usize,
    /// Calls, in the order in which they arrive.
    pub calls: Vec<Call>,
    /// So many of the calls, the first ones, have arrived and run before anything else happens.
    pub running: usize,
    /// Faults.
    pub budget: Budget,
    /// Workers may also never be allowed. Without it each call returns in time.
    pub never_allowed: bool,
    /// A slot clears for a while after its lease. Without it it is free at once.
    pub clearing: bool,
    /// Receipts are written, and rows leave the outbox.
    pub receipts: bool,
    /// A known gap of the code that is looked into; the others are left out, so that what lies behind them is seen.
    pub gap: Option<Gap>,
    /// A rule is left out.
    pub fault: Fault,
    /// Given each new term's ledger; sets a deliberate fault of the ledger itself.
    pub begin: fn(State) -> State,
}

/// A gap that this check has found in the code. Each has a test that demands its counterexample: whoever closes one makes that
/// test fail, and removes the gap here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// A page that the watch shows while a write is in flight is dropped; if the answer then comes from a read that is older
    /// than that page, the page is not known until something else is written to the account.
    DroppedPage,
    /// A leader that was deposed long ago and has not heard of it still sends the order of a hold that it decided before, to a
    /// node that has not joined the new term: the bound of L9 counts from the new term's start, and is over by then.
    LateOrder,
}

/// A rule around the ledger that is left out, to see that it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None.
    None,
    /// Against invariant 7: nodes listen to whoever speaks, and look at no epoch.
    NoFence,
    /// Against L8: nodes take orders of any age.
    NoAge,
    /// Against L6: a new leader begins with the pages it knew when it wrote its term, not with those before that write.
    EarlyStart,
    /// Against L2: a page write names no revision, and the last one wins.
    NoCompare,
    /// Against L10: nodes forget a lease when they have reported its end.
    ReportOnce,
    /// Against L7: a node that joins again tells of no lease.
    JoinsEmpty,
    /// Against L10: a node that is told to end a lease which still waits for its slot gives the call that waits no answer.
    SilentCancel,
}
