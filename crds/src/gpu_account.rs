//! `GPUAccount`: one user's ledger page (L1, L4, L5).
//!
//! The spec is written by an admin, the status by the broker alone, by compare-and-swap (L2). The transition rules
//! below are the API server's part of L5: they hold whatever the broker's code does. `seq` = old + 1 is a
//! ValidatingAdmissionPolicy on the status subresource, not a rule here, because writes of spec and finalizers do not
//! raise it. Every list has a maximum: the page is one object, and a CEL rule's cost is bounded by it.
//!
//! The page's lists are atomic, not maps: the API server keeps an entry in `managedFields` for every field of every
//! row of a map list. Rows are matched by name in the rules instead. Rules that compare every pair of rows (a lease is
//! held once; held or closed, never both) are the core's: on a full page they made the write five times as slow, and the
//! write is on the way of every grant.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::CAMEL_CASE;
use crate::size::GpuSize;

/// Most windows on a page: the open one and the one before it while leases from it still run.
pub const MAX_WINDOWS: usize = 2;
/// Most open holds on a page.
pub const MAX_HOLDS: usize = 64;
/// Most sources of one hold: the base and every grant row.
pub const MAX_PARTS: usize = MAX_GRANTS + 1;
/// Most grant rows on a page.
pub const MAX_GRANTS: usize = 32;
/// Most settled rows whose receipt is not written; a full outbox pauses the account (L10).
pub const MAX_CLOSED: usize = 32;
/// Most cookies on the page of an address prefix.
pub const MAX_COOKIES: usize = 64;
/// Most tokens whose use is remembered.
pub const MAX_BUDGETS: usize = 64;
/// Most endings without receipt that are remembered.
pub const MAX_RECENT_OUTCOMES: usize = 20;
/// Most cards one hold can avoid: no node has more.
pub const MAX_AVOIDED_CARDS: usize = 16;
/// Most identities of one account.
pub const MAX_IDENTITIES: usize = 16;

/// Who the account belongs to and which tier it is in.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "GPUAccount",
    plural = "gpuaccounts",
    shortname = "gacct",
    category = "spaceport",
    status = "GPUAccountStatus",
    derive = "PartialEq",
    doc = "One user's ledger page: who it is (spec, written by an admin) and every GPU second used, reserved and left (status, written by the broker alone).",
    annotation("helm.sh/resource-policy", "keep"),
    validation = Rule::new("!has(oldSelf.status) || has(self.status)")
        .message("the ledger page cannot be removed from its account"),
    printcolumn(name = "User", type_ = "string", json_path = ".spec.identities[0].subject"),
    printcolumn(name = "Tier", type_ = "string", json_path = ".status.tier"),
    printcolumn(name = "Used", type_ = "string", json_path = ".status.used"),
    printcolumn(name = "Reserved", type_ = "string", json_path = ".status.reserved"),
    printcolumn(name = "Left", type_ = "string", json_path = ".status.left"),
    printcolumn(name = "Resets", type_ = "string", json_path = ".status.resetsAt"),
    printcolumn(name = "Leases", type_ = "integer", json_path = ".status.leases"),
    printcolumn(name = "Guests", type_ = "integer", json_path = ".status.guests", priority = 1)
)]
pub struct GPUAccountSpec {
    /// Who is charged here. Matched exactly; unique over all accounts (a second account with one of them is not Ready).
    /// Empty for the accounts of guests and of Spaces themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_IDENTITIES))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["issuer".into(), "subject".into()]))]
    pub identities: Vec<Identity>,
    /// Name of the GPUTier. Beats the tiers' own rules.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub tier: Option<String>,
}

/// One identity, as its issuer spells it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// `iss` of the sign-in at the identity provider; the token of a call names the account itself.
    #[schemars(length(min = 1, max = 512))]
    pub issuer: String,
    /// `sub` of the same.
    #[schemars(length(min = 1, max = 512))]
    pub subject: String,
}

/// The ledger page. Times are milliseconds since the Unix epoch in ledger time (L20), amounts are milliseconds; charged
/// and reserved amounts are weighted.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.epoch >= oldSelf.epoch")
        .message("the epoch of a page never falls: another leader has written it (L5, L6)"),
    validation = Rule::new("self.lastTimeMilliseconds >= oldSelf.lastTimeMilliseconds")
        .message("ledger time never goes back (L20)"),
    validation = Rule::new(
        "!has(oldSelf.windows) || oldSelf.windows.all(o, o.chargedMilliseconds == 0 || \
         (has(self.windows) && self.windows.exists(w, w.startMilliseconds == o.startMilliseconds)) || \
         self.lastTimeMilliseconds >= o.startMilliseconds + 86400000)",
    )
    .message("a window with a charge stays on the page until its 24 hours are over (L5, L12)"),
    validation = Rule::new(
        "!has(oldSelf.cookies) || oldSelf.cookies.all(o, o.chargedMilliseconds == 0 || \
         self.lastTimeMilliseconds >= o.startMilliseconds + 86400000 || \
         (has(self.cookies) && self.cookies.exists(c, c.startMilliseconds == o.startMilliseconds && c.cookie == o.cookie)))",
    )
    .message("a cookie's row with a charge stays on the page until its 24 hours are over (L1, L5)")
)]
pub struct GPUAccountStatus {
    /// Counts the writes of this page.
    #[schemars(range(min = 0))]
    pub seq: i64,
    /// Fresh with each write: proves that a write of unknown outcome happened (L2).
    #[schemars(length(max = 64))]
    pub write_id: String,
    /// Term of the last writer (L6).
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// Ledger time of the last write, milliseconds since the Unix epoch; no decision on the page is before it.
    #[schemars(range(min = 0))]
    pub last_time_milliseconds: i64,
    /// Oldest first: the open window, and the one before it while leases from it still run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_WINDOWS))]
    #[x_kube(
        validation = Rule::new(
            "self.all(w, oldSelf.all(o, o.startMilliseconds != w.startMilliseconds || \
             w.chargedMilliseconds >= o.chargedMilliseconds))",
        )
        .message("what was charged to a window never falls (L5)")
    )]
    pub windows: Vec<Window>,
    /// On the page of an address prefix its visitors who are not signed in, oldest row first; what they use counts here and
    /// in the window of the prefix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_COOKIES))]
    #[x_kube(
        validation = Rule::new(
            "self.all(c, oldSelf.all(o, o.startMilliseconds != c.startMilliseconds || o.cookie != c.cookie || \
             c.chargedMilliseconds >= o.chargedMilliseconds))",
        )
        .message("what was charged to a cookie never falls (L5)")
    )]
    pub cookies: Vec<CookieRow>,
    /// How many rows `cookies` has, for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub guests: Option<i32>,
    /// Open reservations, in the order they were made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_HOLDS))]
    pub holds: Vec<Hold>,
    /// Copies of this account's GPUQuotaGrants.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_GRANTS))]
    #[x_kube(
        validation = Rule::new(
            "self.all(g, oldSelf.all(o, o.uid != g.uid || g.usedMilliseconds >= o.usedMilliseconds))",
        )
        .message("what was used of a grant never falls (L12)")
    )]
    pub grants: Vec<GrantRow>,
    /// Outbox: settled leases whose receipt is not written yet (L10).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_CLOSED))]
    #[x_kube(
        validation = Rule::new(
            "self.all(c, oldSelf.all(o, o.lease != c.lease || \
             (c.chargedMilliseconds == o.chargedMilliseconds && c.outcome == o.outcome)))",
        )
        .message("a lease is settled once (invariant 3)")
    )]
    pub closed: Vec<ClosedLease>,
    /// What ended leases took of their tokens' budgets, until those expire (invariant 10).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_BUDGETS))]
    pub budgets: Vec<BudgetRow>,
    /// There was no room for rows of tokens that expire by then, milliseconds since the Unix epoch: such a token without a
    /// row is worth nothing any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub budgets_forgotten_milliseconds: Option<i64>,
    /// The last refusal with its numbers; written at most every 5 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_denial: Option<LastDenial>,
    /// The last endings that have no receipt (refusals, early deaths), newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_RECENT_OUTCOMES))]
    pub recent_outcomes: Vec<RecentOutcome>,
    /// The tier that applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub tier: Option<String>,
    /// Charged in the open window, for the column: `18.4s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub used: Option<String>,
    /// Held by open leases, for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub reserved: Option<String>,
    /// What a new lease can still take (base and grants), for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub left: Option<String>,
    /// When the open window ends. Empty until a first lease opens one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resets_at: Option<Time>,
    /// How many leases are open.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub leases: i32,
    /// Generation of the spec that the conditions are about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, OutboxDrained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// 24 hours of base quota, opened by the first hold (L12).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// When it opened, milliseconds since the Unix epoch; its identity.
    #[schemars(range(min = 0))]
    pub start_milliseconds: i64,
    /// Base quota of the tier, weighted milliseconds.
    #[schemars(range(min = 0))]
    pub base_milliseconds: i64,
    /// Charged so far, weighted milliseconds.
    #[schemars(range(min = 0))]
    pub charged_milliseconds: i64,
    /// Leases that count as runs; voided ones do not (L18).
    #[schemars(range(min = 0))]
    pub runs: i64,
    /// Generation of the tier that gave the base.
    #[serde(default)]
    pub generation: i64,
}

/// 24 hours of one visitor of an address prefix, opened by the visitor's first hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CookieRow {
    /// Opaque id of the signed cookie.
    #[schemars(length(min = 1, max = 64))]
    pub cookie: String,
    /// When it opened, milliseconds since the Unix epoch; with the cookie its identity.
    #[schemars(range(min = 0))]
    pub start_milliseconds: i64,
    /// Quota of one visitor as of its last hold, weighted milliseconds.
    #[schemars(range(min = 0))]
    pub base_milliseconds: i64,
    /// Charged so far, weighted milliseconds.
    #[schemars(range(min = 0))]
    pub charged_milliseconds: i64,
    /// Leases that count as runs; voided ones do not (L18).
    #[schemars(range(min = 0))]
    pub runs: i64,
    /// Generation of the tier that gave the base.
    #[serde(default)]
    pub generation: i64,
    /// `chargedMilliseconds` for people: `18.4s`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 32))]
    pub used: String,
    /// Held by the visitor's open leases, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 32))]
    pub reserved: String,
}

/// The row of a guest page that a lease belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CookieWindow {
    /// Opaque id of the signed cookie.
    #[schemars(length(min = 1, max = 64))]
    pub cookie: String,
    /// Start of the row, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub start_milliseconds: i64,
}

/// A call that was given less than it declares, because its Space has chosen so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Shortened {
    /// What it declares, unweighted.
    #[schemars(range(min = 0))]
    pub declared_milliseconds: i64,
    /// Why it got less, a reason (`ShortenedReason`).
    #[schemars(length(min = 1, max = 64), regex(pattern = CAMEL_CASE))]
    pub by: String,
}

/// Milliseconds from one source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// `window:<startMilliseconds>` or `grant:<uid>`.
    #[schemars(length(max = 80), regex(pattern = "^(window:[0-9]+|grant:[A-Za-z0-9-]+)$"))]
    pub source: String,
    /// Weighted milliseconds.
    #[schemars(range(min = 0))]
    pub milliseconds: i64,
}

/// An open reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Hold {
    /// Id of the lease, a ULID in lower case.
    #[schemars(length(min = 1, max = 64))]
    pub lease: String,
    /// `<namespace>/<name>` of the Space that asked.
    #[schemars(length(max = 320))]
    pub space: String,
    /// uid of that Space.
    #[serde(rename = "spaceUID", default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub space_uid: String,
    /// Where it is taken from: base first, then the grant that expires soonest. A charge fills them in order.
    #[schemars(length(max = MAX_PARTS))]
    pub parts: Vec<Part>,
    /// Node it will run on.
    #[schemars(length(max = 253))]
    pub node: String,
    /// Card indexes it may not use (L7).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_AVOIDED_CARDS), inner(range(min = 0)))]
    pub avoid: Vec<i32>,
    /// Size asked for.
    pub size: GpuSize,
    /// Charged milliseconds for each millisecond of use.
    #[schemars(range(min = 0, max = 64))]
    pub weight: i64,
    /// Longest run, unweighted.
    #[schemars(range(min = 0))]
    pub declared_milliseconds: i64,
    /// Term in which it was made.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// When it was made, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub since_milliseconds: i64,
    /// Starts when this lease has freed its slot (L14).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub after: Option<String>,
    /// Generation of the tier it was admitted under.
    #[serde(default)]
    pub generation: i64,
    /// How the caller's identity was obtained, for example `token`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub via: String,
    /// On a guest page the visitor's row, which is reserved and charged as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cookie: Option<CookieWindow>,
    /// Set if the call declares more than it was given; then `declaredMilliseconds` is the hard limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shortened: Option<Shortened>,
    /// What its token is worth (invariant 10). Empty without a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
}

/// What a token is worth, by the token that the visitor's call began with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// `root_jti` of the token: its id, which nobody can call with.
    #[schemars(length(min = 1, max = 64))]
    pub root: String,
    /// Weighted milliseconds that may be reserved together.
    #[schemars(range(min = 0))]
    pub max_milliseconds: i64,
    /// Calls that may be made.
    #[schemars(range(min = 0))]
    pub max_calls: i64,
    /// When it expires, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub expires_milliseconds: i64,
}

/// What the ended leases of one token took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BudgetRow {
    /// `root_jti` of the token: its id, which nobody can call with.
    #[schemars(length(min = 1, max = 64))]
    pub root: String,
    /// Calls that count: all but those that the platform failed or gave up, and those whose caller was gone before the
    /// grant reached it.
    #[schemars(range(min = 0))]
    pub calls: i64,
    /// Charged, weighted milliseconds.
    #[schemars(range(min = 0))]
    pub milliseconds: i64,
    /// When the token expires and the row with it, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub expires_milliseconds: i64,
}

/// A copy of one GPUQuotaGrant, taken in by the same compare-and-swap that uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrantRow {
    /// uid of the GPUQuotaGrant.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
    /// Granted, weighted milliseconds.
    #[schemars(range(min = 0))]
    pub milliseconds: i64,
    /// When it ends, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub expires_milliseconds: i64,
    /// Charged so far, weighted milliseconds; kept across windows.
    #[schemars(range(min = 0))]
    pub used_milliseconds: i64,
}

/// A settled lease whose receipt is not written yet.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.chargedMilliseconds <= self.weight * self.declaredMilliseconds")
        .message("a charge is at most weight x declared (invariant 5)"),
)]
pub struct ClosedLease {
    /// Id of the lease.
    #[schemars(length(min = 1, max = 64))]
    pub lease: String,
    /// `<namespace>/<name>` of the Space.
    #[schemars(length(max = 320))]
    pub space: String,
    /// uid of that Space.
    #[serde(rename = "spaceUID", default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub space_uid: String,
    /// Node it ran on.
    #[schemars(length(max = 253))]
    pub node: String,
    /// Size of the lease.
    pub size: GpuSize,
    /// Charged milliseconds for each millisecond of use.
    #[schemars(range(min = 0, max = 64))]
    pub weight: i64,
    /// Longest run, unweighted.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub declared_milliseconds: i64,
    /// From the start of the clock to the end, unweighted.
    #[schemars(range(min = 0))]
    pub used_milliseconds: i64,
    /// weight x min(used, declared), or 0 for a platform fault (L11).
    #[schemars(range(min = 0))]
    pub charged_milliseconds: i64,
    /// How it ended, a reason (`LeaseOutcome`). A string and not an enum in the schema, so that an older operator can
    /// still read a page that a newer one wrote.
    #[schemars(length(min = 1, max = 64), regex(pattern = CAMEL_CASE))]
    pub outcome: String,
    /// When it was settled, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub at_milliseconds: i64,
    /// What each source paid at most: the parts of its hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_PARTS))]
    pub parts: Vec<Part>,
    /// Term in which its hold was made.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// When its hold was made, milliseconds since the Unix epoch.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub since_milliseconds: i64,
    /// Generation of the tier it was admitted under.
    #[serde(default)]
    pub generation: i64,
    /// How the caller's identity was obtained.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub via: String,
    /// On a guest page the visitor's row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cookie: Option<CookieWindow>,
    /// Set if the call declares more than it was given; then `declaredMilliseconds` is the hard limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shortened: Option<Shortened>,
}

/// A refusal with its numbers (requirement A3, A6).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastDenial {
    /// Which limit refused, a reason (`DenialKind`).
    #[schemars(length(min = 1, max = 64), regex(pattern = CAMEL_CASE))]
    pub kind: String,
    /// Whose limit refused, where it is an amount: `Account`, or on the page of an address prefix `Cookie` or
    /// `AddressPrefix`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub limiter: String,
    /// weight x declared.
    #[serde(default)]
    pub needed_milliseconds: i64,
    /// What was left.
    #[serde(default)]
    pub left_milliseconds: i64,
    /// What other open leases of the account had reserved.
    #[serde(default)]
    pub reserved_milliseconds: i64,
    /// The limit that refused, in its own unit of milliseconds; 0 where it is not an amount.
    #[serde(default)]
    pub limit_milliseconds: i64,
    /// When the next seconds come back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resets_at: Option<Time>,
    /// `<namespace>/<name>` of the Space that asked.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 320))]
    pub space: String,
    /// When, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub at_milliseconds: i64,
    /// One sentence with the numbers and what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub message: String,
}

/// An ending that has no receipt: the row that names the boundary where a request died (invariant 12).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RecentOutcome {
    /// Id of the lease, or `<agent instance>/<ticket>` of a request that never had one.
    #[schemars(length(min = 1, max = 128))]
    pub id: String,
    /// What it was, a reason.
    #[schemars(length(min = 1, max = 64), regex(pattern = CAMEL_CASE))]
    pub kind: String,
    /// The boundary where it ended, as a lease's timeline names them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub boundary: String,
    /// `<namespace>/<name>` of the Space.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 320))]
    pub space: String,
    /// When, milliseconds since the Unix epoch.
    #[schemars(range(min = 0))]
    pub at_milliseconds: i64,
    /// One sentence with the numbers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub message: String,
}
