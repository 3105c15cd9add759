//! The ledger page of one account (L1): what `GPUAccount.status` holds and one compare-and-swap changes.

mod budgets;
mod sound;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::sound::Unsound;
use crate::ids::{CookieId, Epoch, LeaseId, LedgerTime, NodeName, Size, SpaceKey};
use crate::protocol::Denial;

/// Most windows on a page: the open one and the one before it, while leases from it still run.
pub const WINDOWS_MAX: usize = 2;
/// Most open holds on a page.
pub const HOLDS_MAX: usize = 64;
/// Most grant rows on a page.
pub const GRANTS_MAX: usize = 32;
/// Most settled rows whose receipt is not written; a full outbox pauses this account only (L10).
pub const CLOSED_MAX: usize = 32;
/// Most cookies on a guest page.
pub const COOKIES_MAX: usize = 64;
/// Most tokens whose use is remembered on a page until they expire.
pub const BUDGETS_MAX: usize = 64;
/// Most outcomes without receipt that are remembered.
pub const OUTCOMES_MAX: usize = 20;

/// One account's page. Every list has a maximum, above. Rows that do not change once they are written are shared: by the
/// page as it is stored, the one that is worked on, and the changes that lead from one to the other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Page {
    /// Oldest first.
    pub windows: Vec<Window>,
    /// Visitors of an address prefix, oldest row first; empty on every other page, and then it takes no memory of its own.
    pub cookies: Box<[CookieRow]>,
    /// Open reservations, in the order they were made.
    pub holds: Vec<Arc<Hold>>,
    /// Copies of the GPUQuotaGrants of this account.
    pub grants: Vec<GrantRow>,
    /// Outbox: settled, receipt not written yet (L10).
    pub closed: Vec<Closed>,
    /// What ended leases took of their tokens' budgets; without any it takes no memory of its own.
    pub budgets: Option<Box<Budgets>>,
    /// The last refusal with its numbers; coalesced (L5).
    pub last_denial: Option<Arc<DenialRow>>,
    /// Endings that have no receipt, newest last.
    pub recent_outcomes: Vec<Arc<Outcome>>,
    /// No decision on this page happens before it (L20).
    pub last_time: LedgerTime,
    /// Counts the writes of this page.
    pub seq: u64,
    /// Fresh with each write; proves that a write of unknown outcome happened (L2).
    pub write_id: String,
    /// Term of the last writer.
    pub epoch: Epoch,
}

/// 24 hours of base quota, opened by its first hold (L12).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// When it opened; its identity.
    pub start: LedgerTime,
    /// Quota of the tier when it opened or was last raised, weighted milliseconds.
    pub base_ms: u64,
    /// Charged to it so far, weighted milliseconds.
    pub charged_ms: u64,
    /// Leases that count as runs (voided ones do not, L18).
    pub runs: u64,
    /// Generation of the tier that gave the base.
    #[serde(default)]
    pub generation: i64,
}

/// 24 hours of one visitor of an address prefix: a window beside the page's own, which is that of the whole prefix. What
/// a guest holds and is charged counts in both, so that both limits are checked by one compare-and-swap (L1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CookieRow {
    /// Whose.
    pub cookie: CookieId,
    /// When it opened; with the cookie its identity.
    pub start: LedgerTime,
    /// Quota of one visitor, as of its last hold, weighted milliseconds.
    pub base_ms: u64,
    /// Charged to it so far, weighted milliseconds.
    pub charged_ms: u64,
    /// Leases that count as runs (voided ones do not, L18).
    pub runs: u64,
    /// Generation of the tier that gave the base.
    #[serde(default)]
    pub generation: i64,
}

/// The row of a guest page that a hold belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CookieWindow {
    /// Whose.
    pub cookie: CookieId,
    /// Start of the row.
    pub start: LedgerTime,
}

/// Where held milliseconds come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// The base quota of the window that opened at this time.
    Window(LedgerTime),
    /// A GPUQuotaGrant, by its uid.
    Grant(String),
}

/// A part of a hold; parts are filled in order when it is charged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// Where it is taken from.
    pub source: Source,
    /// Weighted milliseconds.
    pub ms: u64,
}

/// An open reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hold {
    /// The lease it is for.
    pub lease: LeaseId,
    /// The Space that asked.
    pub space: SpaceKey,
    /// Base first, then the grant that expires soonest. The first part is always of the window that was open at its
    /// admission, if only of 0 ms: so a hold belongs to a window also when grants pay for it.
    pub parts: Vec<Part>,
    /// The node it will run on.
    pub node: NodeName,
    /// Cards it may not use (L7).
    pub avoid: Vec<u32>,
    /// Size asked for.
    pub size: Size,
    /// `size.weight()` when it was made.
    pub weight: u64,
    /// Longest run, unweighted milliseconds.
    pub declared_ms: u64,
    /// Term in which it was made.
    pub epoch: Epoch,
    /// When it was made.
    pub since: LedgerTime,
    /// Starts when this lease is freed (L14).
    pub after: Option<LeaseId>,
    /// Generation of the tier it was admitted under.
    pub generation: i64,
    /// How the identity was obtained, for example `token`.
    pub via: String,
    /// On a guest page the visitor's row, which is reserved and charged as well; None on every other page.
    #[serde(default)]
    pub cookie: Option<CookieWindow>,
    /// Set if the call declares more than it was given.
    #[serde(default)]
    pub shortened: Option<Shortened>,
    /// The budget of its token (invariant 10); None without a token.
    #[serde(default)]
    pub budget: Option<Budget>,
}

/// What a token is worth (docs/rules.md): it is counted by the token that the visitor's call began with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// `root_jti`.
    pub root: String,
    /// Weighted milliseconds that may be reserved together.
    pub max_ms: u64,
    /// Calls that may be made.
    pub max_calls: u64,
    /// From here on the token is worth nothing, so nothing has to be remembered.
    pub expires: LedgerTime,
}

/// What leases took of their tokens' budgets, for as long as those are worth anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Budgets {
    /// One for each token.
    pub rows: Vec<BudgetRow>,
    /// There was no room for rows of tokens that expire by then: of such a token without a row it is not known what is left,
    /// so it is worth nothing.
    pub forgotten: LedgerTime,
}

/// What the ended leases of one token took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BudgetRow {
    /// `root_jti`.
    pub root: String,
    /// Calls that count.
    pub calls: u64,
    /// Charged, weighted milliseconds.
    pub ms: u64,
    /// When the token expires, and this row with it.
    pub expires: LedgerTime,
}

/// What was taken of one budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Calls.
    pub calls: u64,
    /// Weighted milliseconds.
    pub ms: u64,
}

/// A call that was given less than it declares: `declared_ms` of its hold is the hard limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shortened {
    /// What it declares, unweighted milliseconds.
    pub declared_ms: u64,
    /// Why it got less.
    pub by: ShortenedBy,
}

/// Why a call is given less than it declares; its Space has chosen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ShortenedBy {
    /// Its caller has no more left (requirement A3).
    RemainingQuota,
    /// Its function has never been seen to need so much (requirement A13).
    LearnedDuration,
}

/// A copy of one GPUQuotaGrant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrantRow {
    /// uid of the GPUQuotaGrant.
    pub uid: String,
    /// Granted, weighted milliseconds.
    pub ms: u64,
    /// Unusable from here on.
    pub expires: LedgerTime,
    /// Charged so far; kept across windows.
    pub used_ms: u64,
}

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Ending {
    /// The function returned.
    Released,
    /// The function raised or its worker could not start; used time is charged.
    Failed,
    /// The worker died by itself.
    WorkerDied,
    /// Killed at declared end plus grace.
    Deadline,
    /// `/allow` did not come in time: charge 0.
    NeverAllowed,
    /// The caller was gone before the grant reached it: charge 0.
    Undelivered,
    /// Cancelled by the broker: charged what it used, which is 0 if it never ran.
    Cancelled,
    /// The node refused the order: charge 0.
    Refused,
    /// Card, gate or node failed: charge 0.
    PlatformFault,
    /// Failed without ever seeing a GPU: charge 0, bounded per Space and hour.
    NoDevice,
    /// The node was silent beyond the bound of L9: charge 0.
    Expired,
}

/// A settled hold whose receipt is not written yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Closed {
    /// The hold as it was.
    pub hold: Arc<Hold>,
    /// How it ended.
    pub ending: Ending,
    /// Unweighted milliseconds from clock start to end.
    pub used_ms: u64,
    /// weight x min(used, declared), or 0 (invariant 5).
    pub charged_ms: u64,
    /// When it was settled.
    pub at: LedgerTime,
}

/// A refusal with its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DenialRow {
    /// What and why.
    pub denial: Denial,
    /// Which Space asked.
    pub space: SpaceKey,
    /// When.
    pub at: LedgerTime,
}

/// An ending without a receipt: a refusal or an early death (invariant 12).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Lease id or `<agent instance>/<ticket>`.
    pub id: String,
    /// Short reason, CamelCase.
    pub kind: String,
    /// The boundary where it ended, as in a lease's timeline.
    pub boundary: String,
    /// One sentence with the numbers.
    pub message: String,
    /// When.
    pub at: LedgerTime,
}
