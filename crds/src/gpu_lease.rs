//! `GPULease`: the receipt of one lease, for people (docs/rules.md, Writes per lease; invariant 12).
//!
//! It is a record and has no status subresource, so that a receipt is one write. Nothing is decided from it: it can be
//! built again from the account's page and the node's report. In the column strings a running lease has no `used`:
//! nothing that only time changes is written (L21).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::gpu_account::{MAX_PARTS, Part};
use crate::gpu_pool::Isolation;
use crate::schema::CAMEL_CASE;
use crate::size::GpuSize;

/// Most lines of a timeline: every boundary, and room for promises that were issued anew.
pub const MAX_TIMELINE: usize = 32;

string_enum! {
    /// Where a lease is. Settled, Refunded and Expired are final.
    LeasePhase default Queued {
        /// Waits for its place; nothing is reserved.
        Queued = "Queued",
        /// Its milliseconds are reserved; the worker has not been let in yet.
        Reserved = "Reserved",
        /// The worker was let in and the clock runs.
        Running = "Running",
        /// Ended and charged.
        Settled = "Settled",
        /// Ended at no charge.
        Refunded = "Refunded",
        /// Given up because its node was silent beyond the bound of L9; no charge.
        Expired = "Expired",
    }
}

string_enum! {
    /// What a lease waits for.
    WaitReason {
        /// A slot of its node.
        Node = "Node",
        /// Something of its own account: mostly the limit of leases at once.
        Account = "Account",
        /// The limit of leases at once of its Space.
        Space = "Space",
    }
}

impl LeasePhase {
    /// Whether nothing follows.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Settled | Self::Refunded | Self::Expired)
    }
}

/// The record of one lease.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "GPULease",
    plural = "gpuleases",
    namespaced,
    shortname = "gl",
    category = "spaceport",
    derive = "PartialEq",
    doc = "The receipt of one GPU lease: who asked for what, what it used and was charged, and when it crossed each boundary. A record written by the operator; nothing is decided from it.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "Space", type_ = "string", json_path = ".spec.space"),
    printcolumn(name = "Account", type_ = "string", json_path = ".spec.account"),
    printcolumn(name = "Size", type_ = "string", json_path = ".spec.size"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".spec.phase"),
    printcolumn(name = "Waits", type_ = "string", json_path = ".spec.waits"),
    printcolumn(name = "Declared", type_ = "string", json_path = ".spec.declared"),
    printcolumn(name = "Used", type_ = "string", json_path = ".spec.used"),
    printcolumn(name = "Charged", type_ = "string", json_path = ".spec.charged"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "GPU", type_ = "integer", json_path = ".spec.gpu"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Granted", type_ = "string", json_path = ".spec.granted", priority = 1),
    printcolumn(name = "Outcome", type_ = "string", json_path = ".spec.outcome", priority = 1),
    printcolumn(name = "Isolation", type_ = "string", json_path = ".spec.isolation", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".spec.message", priority = 1),
    selectable = ".spec.phase",
    selectable = ".spec.account",
    selectable = ".spec.space"
)]
#[x_kube(
    validation = Rule::new(
        "self.account == oldSelf.account && self.space == oldSelf.space && self.size == oldSelf.size && \
         self.weight == oldSelf.weight && self.declaredMilliseconds == oldSelf.declaredMilliseconds",
    )
    .message("account, space, size, weight and declared duration of a receipt never change"),
    validation = Rule::new(
        "!(oldSelf.phase in ['Settled', 'Refunded', 'Expired']) || (self.phase == oldSelf.phase && \
         (has(self.chargedMilliseconds) ? self.chargedMilliseconds : 0) == \
         (has(oldSelf.chargedMilliseconds) ? oldSelf.chargedMilliseconds : 0))",
    )
    .message("a lease ends once: its last phase and its charge never change (invariant 3)"),
    validation = Rule::new(
        "!has(self.chargedMilliseconds) || self.chargedMilliseconds <= self.weight * self.declaredMilliseconds",
    )
    .message("a charge is at most weight x declared (invariant 5)"),
    validation = Rule::new("!has(self.grantedMilliseconds) || self.grantedMilliseconds <= self.declaredMilliseconds")
        .message("a lease is never given more than it declares"),
    validation = Rule::new(
        "!(self.phase in ['Refunded', 'Expired']) || !has(self.chargedMilliseconds) || self.chargedMilliseconds == 0",
    )
    .message("a refunded or expired lease is charged nothing"),
    validation = Rule::new("self.phase == 'Queued' || !(has(self.place) || has(self.waits))")
        .message("only a lease that waits has a place in a queue"),
)]
pub struct GPULeaseSpec {
    /// Id of the lease in the ledger, a ULID in lower case: the same in gateway log, node log and client error.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub lease: String,
    /// GPUAccount that is charged.
    #[schemars(length(min = 1, max = 253))]
    pub account: String,
    /// Name of the Space, in the namespace of this object.
    #[schemars(length(min = 1, max = 253))]
    pub space: String,
    /// uid of that Space.
    #[serde(rename = "spaceUID", default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub space_uid: String,
    /// Size asked for.
    pub size: GpuSize,
    /// Charged milliseconds for each millisecond of use.
    #[schemars(range(min = 0, max = 64))]
    pub weight: i64,
    /// Where it is.
    pub phase: LeasePhase,
    /// For what it waits, and at which place: only in phase Queued. As of its `asOf`: it is written again when it says
    /// something else, but not more often than every 10 s, and not while page writes are hard for the API server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<LeasePlace>,
    /// `place` for the column: `node, 3rd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub waits: Option<String>,
    /// Longest run as the function declares it, unweighted.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub declared_milliseconds: i64,
    /// Longest run that it was given, unweighted, if that is less than it declares: a hard limit, and what was reserved.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub granted_milliseconds: Option<i64>,
    /// `grantedMilliseconds` for people: `12.5s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub granted: Option<String>,
    /// Why it was given less than it declares, a reason (`ShortenedReason`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = CAMEL_CASE))]
    pub shortened_by: Option<String>,
    /// From the start of the clock to the end, unweighted. Empty until it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub used_milliseconds: Option<i64>,
    /// weight x min(used, declared), or 0 for a platform fault (L11). Empty until it is settled.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub charged_milliseconds: Option<i64>,
    /// `declaredMilliseconds` for the column: `60s`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 32))]
    pub declared: String,
    /// `usedMilliseconds` for the column: `11.2s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub used: Option<String>,
    /// `chargedMilliseconds` for the column: `22.4s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub charged: Option<String>,
    /// Node it runs or ran on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub node: Option<String>,
    /// Index of the card on that node.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub gpu: Option<i32>,
    /// UUID the worker was given: of the card or of the slice.
    #[serde(rename = "gpuUUID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 96))]
    pub gpu_uuid: Option<String>,
    /// What separates it from its neighbour on the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// How it ended, a reason (`LeaseOutcome`). Empty while it is open.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = CAMEL_CASE))]
    pub outcome: Option<String>,
    /// One sentence with the numbers and, if something went wrong, what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
    /// How the caller's identity was obtained, for example `token`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub via: String,
    /// Id of the visitor's request as the gateway logged it.
    #[serde(rename = "requestID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub request_id: Option<String>,
    /// Term of the operator in which it was made (L6).
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// Generation of the tier it was admitted under.
    #[serde(default)]
    pub generation: i64,
    /// Which window and grants it was taken from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_PARTS))]
    pub parts: Vec<Part>,
    /// One line a boundary, in order of time; what `kubectl describe` shows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_TIMELINE), inner(length(max = 256)))]
    pub timeline: Vec<String>,
    /// The same boundaries as timestamps.
    #[serde(default, skip_serializing_if = "LeaseBoundaries::is_empty")]
    pub boundaries: LeaseBoundaries,
}

/// Where a lease that waits stood when this was written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeasePlace {
    /// What it waits for.
    pub reason: WaitReason,
    /// Its place among those who wait for its node, by what is expected of each; 1 is next. Who comes later and is expected
    /// to be shorter may pass. Absent while it waits for its account or Space: then it is passed, and keeps its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub position: Option<i32>,
    /// When it begins if calls run as long as they are expected to. No promise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_start: Option<MicroTime>,
    /// When it begins at the latest, whoever comes later (invariant 11). Absent while it waits for its account or Space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latest_start: Option<MicroTime>,
    /// When it stood there.
    pub as_of: MicroTime,
}

/// When a lease crossed each boundary. A boundary it never reached is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeaseBoundaries {
    /// `/schedule` reached the node agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requested: Option<MicroTime>,
    /// It got a place in the queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued: Option<MicroTime>,
    /// Its reservation is durable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserved: Option<MicroTime>,
    /// The node has given it a slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assigned: Option<MicroTime>,
    /// `/allow` was accepted: the clock starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed: Option<MicroTime>,
    /// The gate counted the worker's first open of the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_opened: Option<MicroTime>,
    /// NVML listed a process of the lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_seen: Option<MicroTime>,
    /// `/release`, the worker's death or the deadline: the clock stops.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub released: Option<MicroTime>,
    /// No process of the lease can open the card any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate_closed: Option<MicroTime>,
    /// The charge is durable on the account's page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settled: Option<MicroTime>,
    /// The slot can be given to the next lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freed: Option<MicroTime>,
}

impl LeaseBoundaries {
    /// Whether no boundary was crossed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
