//! `GPUTier`: quota, priority and limits, and the rules that put identities into it (docs/rules.md, Tiers).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::gpu_pool::SlicingMode;

/// Most seconds a tier can give; in milliseconds and with every weight it stays far inside an int64.
const MAX_SECONDS: i64 = 10_000_000;

string_enum! {
    /// Place of a tier in the queue (docs/rules.md, Queue).
    Priority default Medium {
        /// Last in the fast lane, with a floor share in the age lane.
        Low = "Low",
        /// Between the two.
        Medium = "Medium",
        /// First in the fast lane.
        Highest = "Highest",
    }
}

string_enum! {
    /// When a window opens and how long it lasts.
    WindowPolicy default FirstUse24h {
        /// Opens with the first hold, lasts exactly 24 hours, and is dropped if all its holds end at charge 0.
        FirstUse24h = "FirstUse24h",
    }
}

string_enum! {
    /// Whether GPUQuotaGrants add to the tier's seconds.
    Extendable default Never {
        /// Grants are refused with `TierNotExtendable`.
        Never = "Never",
        /// Base first, then the grant that expires soonest.
        Always = "Always",
    }
}

string_enum! {
    /// Which callers a tier is for.
    Callers default SignedIn {
        /// Callers with an identity, by the tier's rules.
        SignedIn = "SignedIn",
        /// Callers without an identity: a signed cookie within an address prefix.
        Guests = "Guests",
        /// Calls without any token: a Space's own start-up and scripts.
        Spaces = "Spaces",
    }
}

string_enum! {
    /// What the `spaces` client is told about the caller (`X-Authenticated`); it changes the wording of its messages only.
    AuthenticatedAs default Regular {
        /// No header.
        Anonymous = "Anonymous",
        /// `regular`.
        Regular = "Regular",
        /// `pro`.
        Pro = "Pro",
    }
}

/// What an account of this tier can use.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "GPUTier",
    plural = "gputiers",
    shortname = "gtier",
    category = "spaceport",
    status = "GPUTierStatus",
    derive = "PartialEq",
    doc = "A class of accounts: GPU seconds a window, limits, priority, and the rules that put identities into it. Written by an admin.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "GPU-Seconds", type_ = "integer", json_path = ".spec.gpuSecondsPerWindow"),
    printcolumn(name = "Longest", type_ = "integer", json_path = ".spec.longestCallSeconds"),
    printcolumn(name = "Concurrent", type_ = "integer", json_path = ".spec.concurrentLeases"),
    printcolumn(name = "Priority", type_ = "string", json_path = ".spec.priority"),
    printcolumn(name = "Accounts", type_ = "integer", json_path = ".status.accounts"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Callers", type_ = "string", json_path = ".spec.callers", priority = 1),
    printcolumn(name = "Runs", type_ = "integer", json_path = ".spec.runsPerWindow", priority = 1),
    printcolumn(name = "Grants", type_ = "string", json_path = ".spec.extendableByGrants", priority = 1)
)]
#[x_kube(
    validation = Rule::new("self.gpuSecondsPerWindow == 0 || self.longestCallSeconds <= self.gpuSecondsPerWindow")
        .message("longestCallSeconds is more than the whole window: no call that long could ever be admitted"),
    validation = Rule::new("!has(self.gpuSecondsPerAddressPrefix) || self.callers == 'Guests'")
        .message("gpuSecondsPerAddressPrefix is for tiers with callers: Guests"),
    validation = Rule::new("!has(self.identities) || size(self.identities) == 0 || self.callers == 'SignedIn'")
        .message("identities are for tiers with callers: SignedIn; guests and Spaces have none"),
)]
pub struct GPUTierSpec {
    /// GPU seconds of one account in one window, weighted.
    #[schemars(range(min = 0, max = MAX_SECONDS))]
    pub gpu_seconds_per_window: i64,
    /// Longest declared duration of one call, unweighted.
    #[schemars(range(min = 1, max = 86_400))]
    pub longest_call_seconds: i64,
    /// Most leases an account has at once; further calls wait with reason `concurrency`.
    #[schemars(range(min = 1, max = 64))]
    pub concurrent_leases: i32,
    /// Most leases in one window that are not voided. Absent: no such limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub runs_per_window: Option<i64>,
    /// Place in the queue.
    #[serde(default)]
    pub priority: Priority,
    /// ZeroGPU Spaces an account can host. Absent: as many as it likes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub zero_gpu_spaces: Option<i32>,
    /// Whether grants add to it.
    #[serde(default)]
    pub extendable_by_grants: Extendable,
    /// When a window opens and how long it lasts.
    #[serde(default)]
    pub window_policy: WindowPolicy,
    /// Which callers it is for.
    #[serde(default)]
    pub callers: Callers,
    /// What the client is told about the caller.
    #[serde(default)]
    pub authenticated_as: AuthenticatedAs,
    /// Limit of all guests behind one address prefix together.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MAX_SECONDS))]
    pub gpu_seconds_per_address_prefix: Option<i64>,
    /// Slicing modes its leases may run in; empty: any. `[Mig, Whole]` keeps untrusted callers apart in hardware.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub allowed_modes: Vec<SlicingMode>,
    /// Rules that put identities into the tier. The most specific rule of all tiers wins (subject, group, suffix, issuer,
    /// everyone); of equally specific ones the oldest tier wins and the other is `Conflicted`. `GPUAccount.spec.tier` beats all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub identities: Vec<IdentityRule>,
}

/// A rule over a verified identity. All fields that are set must match; a rule without fields matches everyone who is
/// signed in.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.subject) && has(self.subjectSuffix))")
        .message("give a subject or a subjectSuffix, not both"),
    validation = Rule::new("!(has(self.subject) || has(self.subjectSuffix) || has(self.group)) || has(self.issuer)")
        .message("a subject or group means nothing without its issuer: another issuer may call somebody else the same"),
)]
pub struct IdentityRule {
    /// `iss`, exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub issuer: Option<String>,
    /// `sub`, exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub subject: Option<String>,
    /// End of `sub`, for example `@example.com`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub subject_suffix: Option<String>,
    /// A group the identity is in. Groups are known to a gateway only: in this version a rule with one fits nobody.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub group: Option<String>,
}

/// What became of the tier.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GPUTierStatus {
    /// Generation of the spec that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Accounts in this tier.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub accounts: i32,
    /// Accepted, Conflicted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
