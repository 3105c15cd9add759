//! `GPUPool`: which nodes and cards are shared in time or dedicated, how cards are cut, and the bounds of the queue
//! (docs/rules.md; N4, N17, N18; L8, L9, L19).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::quantity;
use crate::size::GpuSize;

string_enum! {
    /// How a card is cut (N18).
    SlicingMode default Whole {
        /// MIG instances: isolation in hardware.
        Mig = "Mig",
        /// Two clients of one MPS server: limits, one fault domain.
        Mps = "Mps",
        /// Two leases on one card, memory watched and the one over its half killed.
        Shared = "Shared",
        /// One lease a card.
        Whole = "Whole",
    }
}

string_enum! {
    /// What separates a lease from its neighbour on the card.
    Isolation default None {
        /// MIG: memory, caches and compute are apart.
        Hardware = "Hardware",
        /// MPS: limits, but a fault can take the neighbour along.
        Limited = "Limited",
        /// Nothing but the agent's watch over memory.
        None = "None",
        /// No neighbour: the lease has the card alone.
        Exclusive = "Exclusive",
    }
}

string_enum! {
    /// What `large` means here.
    LargeShare default Half {
        /// Half a card.
        Half = "Half",
        /// A whole card, for cards too small to share.
        Whole = "Whole",
    }
}

string_enum! {
    /// Which cards of a node are shared in time.
    SelectCards default All {
        /// Every card that is not dedicated.
        All = "All",
        /// The cards of `indexes`.
        Listed = "Listed",
        /// None.
        None = "None",
    }
}

string_enum! {
    /// When receipts are written.
    ReceiptTiming default Live {
        /// While the lease waits or runs longer than 2 s, and at its end.
        Live = "Live",
        /// At the end only: fewer writes.
        AtEnd = "AtEnd",
    }
}

/// How the nodes of this pool serve leases.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "GPUPool",
    plural = "gpupools",
    shortname = "gpool",
    category = "spaceport",
    status = "GPUPoolStatus",
    derive = "PartialEq",
    doc = "A set of nodes whose cards are shared in time or dedicated: slicing mode, sizes and weights, seats, queue bounds, time limits. Written by an admin.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.nodes"),
    printcolumn(name = "Cards", type_ = "integer", json_path = ".status.cards"),
    printcolumn(name = "Slots", type_ = "string", json_path = ".status.slots"),
    printcolumn(name = "Seats", type_ = "integer", json_path = ".status.seats"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        priority = 1
    ),
    printcolumn(name = "Receipts", type_ = "string", json_path = ".spec.receipts.timing", priority = 1)
)]
#[x_kube(
    validation = Rule::new("self.sizes.large != 'Whole' || self.weights.large == self.weights.xlarge")
        .message("if large is a whole card both sizes hold the same and must weigh the same"),
)]
pub struct GPUPoolSpec {
    /// Labels a node must have. Empty: every node that runs an agent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Which cards of those nodes are shared in time and which are dedicated.
    #[serde(default)]
    pub cards: CardSelection,
    /// How a card is cut.
    pub mode: SlicingMode,
    /// What the sizes mean here.
    #[serde(default)]
    pub sizes: SizeMapping,
    /// Charged seconds for each second of use.
    #[serde(default)]
    pub weights: Weights,
    /// Time-shared Space pods a node takes.
    #[serde(default = "seats_per_node")]
    #[schemars(range(min = 0, max = 1024))]
    pub seats_per_node: i32,
    /// Bounds and shares of the queue.
    #[serde(default)]
    pub queue: QueueBounds,
    /// From the grant to `/allow`; a lease that is not claimed by then is refunded.
    #[serde(default = "allow_limit_seconds")]
    #[schemars(range(min = 1, max = 600))]
    pub allow_limit_seconds: i32,
    /// From the declared end to the kill.
    #[serde(default = "grace_seconds")]
    #[schemars(range(min = 0, max = 60))]
    pub grace_seconds: i32,
    /// From the end to a closed gate and free memory; a slot that takes longer is quarantined.
    #[serde(default = "clear_limit_seconds")]
    #[schemars(range(min = 1, max = 600))]
    pub clear_limit_seconds: i32,
    /// Age at which a node refuses an order (L8).
    #[serde(rename = "orderTTLSeconds", default = "order_ttl_seconds")]
    #[schemars(range(min = 1, max = 60))]
    pub order_ttl_seconds: i32,
    /// What the client multiplies durations of `large` by on these cards, in percent: 150 on RTX PRO 6000, else 100 (L19).
    #[serde(default = "duration_factor_percent")]
    #[schemars(range(min = 100, max = 1000))]
    pub duration_factor_percent: i32,
    /// When receipts are written and how long they are kept.
    #[serde(default)]
    pub receipts: Receipts,
}

const fn seats_per_node() -> i32 {
    16
}

const fn allow_limit_seconds() -> i32 {
    30
}

const fn grace_seconds() -> i32 {
    2
}

const fn clear_limit_seconds() -> i32 {
    10
}

const fn order_ttl_seconds() -> i32 {
    5
}

const fn duration_factor_percent() -> i32 {
    100
}

impl Default for GPUPoolSpec {
    fn default() -> Self {
        Self {
            node_selector: BTreeMap::new(),
            cards: CardSelection::default(),
            mode: SlicingMode::default(),
            sizes: SizeMapping::default(),
            weights: Weights::default(),
            seats_per_node: seats_per_node(),
            queue: QueueBounds::default(),
            allow_limit_seconds: allow_limit_seconds(),
            grace_seconds: grace_seconds(),
            clear_limit_seconds: clear_limit_seconds(),
            order_ttl_seconds: order_ttl_seconds(),
            duration_factor_percent: duration_factor_percent(),
            receipts: Receipts::default(),
        }
    }
}

/// A card is shared in time or dedicated, never both (N4).
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.dedicated) || self.timeShared.select != 'Listed' || !has(self.timeShared.indexes) || \
         self.dedicated.all(d, d.indexes.all(i, !(i in self.timeShared.indexes)))",
    )
    .message("a card is shared in time or dedicated, not both (N4)"),
    validation = Rule::new(
        "!has(self.dedicated) || self.dedicated.all(d, self.dedicated.all(e, d.size == e.size || \
         d.indexes.all(i, !(i in e.indexes))))",
    )
    .message("a dedicated card is large or xlarge, not both (N4)"),
)]
pub struct CardSelection {
    /// Cards that leases share.
    #[serde(default)]
    pub time_shared: TimeSharedCards,
    /// Cards that a pod has for its whole life.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["size".into()]))]
    pub dedicated: Vec<DedicatedCards>,
}

/// Cards that leases share.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(self.select == 'Listed') == (has(self.indexes) && size(self.indexes) > 0)")
        .message("give indexes with select: Listed, and only then"),
)]
pub struct TimeSharedCards {
    /// Which.
    #[serde(default)]
    pub select: SelectCards,
    /// Card indexes, for `Listed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(range(min = 0, max = 15)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub indexes: Vec<i32>,
}

/// Cards that a pod asks kubelet for, as `spaceport.dev/large` or `spaceport.dev/xlarge`.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DedicatedCards {
    /// The one resource these cards are advertised as.
    pub size: GpuSize,
    /// Card indexes.
    #[schemars(length(min = 1, max = 16), inner(range(min = 0, max = 15)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub indexes: Vec<i32>,
}

/// What the sizes mean on these cards.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SizeMapping {
    /// `large` as a share of a card; `xlarge` is always a whole one.
    #[serde(default)]
    pub large: LargeShare,
    /// Memory a `large` must have; smaller slices are condition `CardSmallerThanClientAssumes` (the client believes in
    /// 74 GB on anything but RTX PRO 6000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "quantity")]
    pub min_memory: Option<Quantity>,
}

/// Charged seconds for each second of use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Weights {
    /// Of `large`.
    #[serde(default = "large_weight")]
    #[schemars(range(min = 1, max = 64))]
    pub large: i64,
    /// Of `xlarge`.
    #[serde(default = "xlarge_weight")]
    #[schemars(range(min = 1, max = 64))]
    pub xlarge: i64,
}

const fn large_weight() -> i64 {
    1
}

const fn xlarge_weight() -> i64 {
    2
}

impl Default for Weights {
    fn default() -> Self {
        Self { large: large_weight(), xlarge: xlarge_weight() }
    }
}

/// Bounds of the queue: beyond them a request is refused at once with `QueueFull`.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.perAccount <= self.perSpace && self.perSpace <= self.perPool")
        .message("queue bounds must not shrink: perAccount <= perSpace <= perPool"),
)]
pub struct QueueBounds {
    /// Waiting requests of each node of the pool.
    #[serde(default = "per_pool")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub per_pool: i32,
    /// Waiting requests of one Space.
    #[serde(default = "per_space")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub per_space: i32,
    /// Waiting requests of one account.
    #[serde(default = "per_account")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub per_account: i32,
    /// Share of the age lane in percent (docs/rules.md: phi = 0.25). 0 would let the longest jobs starve.
    #[serde(default = "age_lane_percent")]
    #[schemars(range(min = 1, max = 100))]
    pub age_lane_percent: i32,
    /// Weight and floor of each priority.
    #[serde(default)]
    pub priorities: PriorityClasses,
}

const fn per_pool() -> i32 {
    1000
}

const fn per_space() -> i32 {
    200
}

const fn per_account() -> i32 {
    16
}

const fn age_lane_percent() -> i32 {
    25
}

impl Default for QueueBounds {
    fn default() -> Self {
        Self {
            per_pool: per_pool(),
            per_space: per_space(),
            per_account: per_account(),
            age_lane_percent: age_lane_percent(),
            priorities: PriorityClasses::default(),
        }
    }
}

/// Weight in the fast lane and floor share in the age lane of each priority.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.low.floorPercent + self.medium.floorPercent + self.highest.floorPercent == 100")
        .message("the floor shares of the three priorities add up to 100 percent"),
)]
pub struct PriorityClasses {
    /// Of `Low`.
    pub low: PriorityClass,
    /// Of `Medium`.
    pub medium: PriorityClass,
    /// Of `Highest`.
    pub highest: PriorityClass,
}

impl Default for PriorityClasses {
    fn default() -> Self {
        Self {
            low: PriorityClass { weight: 1, floor_percent: 20 },
            medium: PriorityClass { weight: 2, floor_percent: 30 },
            highest: PriorityClass { weight: 4, floor_percent: 50 },
        }
    }
}

/// One priority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PriorityClass {
    /// Divisor of the key in the fast lane.
    #[schemars(range(min = 1, max = 64))]
    pub weight: i32,
    /// Share of the age lane that no other priority can take.
    #[schemars(range(min = 1, max = 100))]
    pub floor_percent: i32,
}

/// When receipts are written and how long they are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Receipts {
    /// When.
    #[serde(default)]
    pub timing: ReceiptTiming,
    /// Age at which a final receipt is removed.
    #[serde(default = "retention_seconds")]
    #[schemars(range(min = 60))]
    pub retention_seconds: i64,
    /// Final receipts kept for one Space, newest first; older ones go before their age.
    #[serde(default = "receipts_per_space")]
    #[schemars(range(min = 1, max = 100_000))]
    pub per_space: i32,
}

const fn retention_seconds() -> i64 {
    7 * 24 * 3600
}

const fn receipts_per_space() -> i32 {
    1000
}

impl Default for Receipts {
    fn default() -> Self {
        Self {
            timing: ReceiptTiming::default(),
            retention_seconds: retention_seconds(),
            per_space: receipts_per_space(),
        }
    }
}

/// What the pool consists of.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GPUPoolStatus {
    /// Generation of the spec that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Nodes that it selects.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub nodes: i32,
    /// Cards of those nodes.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub cards: i32,
    /// Slots in use of all, for the column: `3/8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub slots: Option<String>,
    /// Seats of those nodes.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seats: i32,
    /// Accepted, Conflicted, Ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
