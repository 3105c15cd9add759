//! `GPUNode`: the inventory of one node (N3, N4, N17, N18, N20). The spec is an admin's cordon, the status the
//! agent's report, written at most once a second.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::gpu_pool::{Isolation, SlicingMode};
use crate::schema::CAMEL_CASE;
use crate::size::GpuSize;

/// Most cards of a node.
pub const MAX_CARDS: usize = 16;
/// Most slots of a card: two halves, and a whole one beside them in modes that cut a card lease by lease.
pub const MAX_SLOTS: usize = 8;
/// Most pools that a node names beside its own: more than a person tells apart.
pub const MAX_OTHER_POOLS: usize = 16;

string_enum! {
    /// How much of a node is cordoned.
    CordonScope default Cards {
        /// Every card: nothing new is granted on the node.
        Node = "Node",
        /// The cards of `cards`.
        Cards = "Cards",
    }
}

string_enum! {
    /// Health of a card (N20).
    CardHealth default Unmonitored {
        /// It can be granted.
        Healthy = "Healthy",
        /// Something was seen; no new grants until it is understood.
        Suspect = "Suspect",
        /// Not granted.
        Unhealthy = "Unhealthy",
        /// It was unhealthy, looks well, and must stay so for a while.
        Probation = "Probation",
        /// NVML does not answer for it.
        Unmonitored = "Unmonitored",
    }
}

string_enum! {
    /// State of a slot (L16).
    SlotState default Free {
        /// It can be granted.
        Free = "Free",
        /// A frozen worker of an ended lease still holds it; it goes when anyone else needs the slot.
        IdleHeld = "IdleHeld",
        /// A lease has it.
        Leased = "Leased",
        /// Its last lease could not be cleared away in time.
        Quarantined = "Quarantined",
    }
}

string_enum! {
    /// How a card is used.
    CardUse default TimeShared {
        /// Leases share it.
        TimeShared = "TimeShared",
        /// A pod has it for its whole life.
        Dedicated = "Dedicated",
        /// No pool wants it.
        Unused = "Unused",
    }
}

/// What an admin takes out of service. Written by an admin.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "spaceport.dev",
    version = "v1alpha1",
    kind = "GPUNode",
    plural = "gpunodes",
    shortname = "gnode",
    category = "spaceport",
    status = "GPUNodeStatus",
    derive = "PartialEq",
    doc = "The GPU inventory of the node of the same name: cards, health with reasons, slots and who holds them, driver, mode. The spec cordons; the status is written by the node agent.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "Cards", type_ = "integer", json_path = ".status.cardCount"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".status.mode"),
    printcolumn(name = "Slots", type_ = "string", json_path = ".status.slots"),
    printcolumn(name = "Health", type_ = "string", json_path = ".status.health"),
    printcolumn(name = "Driver", type_ = "string", json_path = ".status.driverVersion"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        priority = 1
    ),
    printcolumn(name = "Isolation", type_ = "string", json_path = ".status.isolation", priority = 1),
    printcolumn(name = "Holders", type_ = "string", json_path = ".status.holders", priority = 1)
)]
pub struct GPUNodeSpec {
    /// Nothing new is granted there; what runs ends within the longest lease (N3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cordon: Option<Cordon>,
}

/// A cordon.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(self.scope == 'Cards') == (has(self.cards) && size(self.cards) > 0)")
        .message("give cards with scope: Cards, and only then"),
)]
pub struct Cordon {
    /// How much.
    pub scope: CordonScope,
    /// Card indexes, for `Cards`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_CARDS), inner(range(min = 0, max = 15)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub cards: Vec<i32>,
    /// Why, in words that people who wait will read.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub reason: Option<String>,
}

/// What the agent found. Numbers of the present, never of time passing.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GPUNodeStatus {
    /// Generation of the spec that the agent follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Version of the NVIDIA driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub driver_version: Option<String>,
    /// Version of the NVML library.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub nvml_version: Option<String>,
    /// Newest CUDA version the driver supports: `12.8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub cuda_version: Option<String>,
    /// Pool the node belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pool: Option<String>,
    /// Pools that select the node as well, oldest first: they count for nothing here, `pool` was there before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_OTHER_POOLS), inner(length(max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub other_pools: Vec<String>,
    /// How its time-shared cards are cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<SlicingMode>,
    /// What separates two leases on one card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// Fresh at every start of the agent; with a ticket it identifies a request (L15).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub agent_instance: Option<String>,
    /// Version of the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub agent_version: Option<String>,
    /// The kernel's boot id; another one voids the checkpoint.
    #[serde(rename = "bootID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub boot_id: Option<String>,
    /// Highest epoch the node has seen (L6).
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// Number of cards, for the column.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub card_count: i32,
    /// Slots in use of all time-shared ones, for the column: `1/2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub slots: Option<String>,
    /// Worst health and how many cards have it, for the column: `Healthy`, `Suspect (1)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub health: Option<String>,
    /// Who holds slots, for the wide column: `0:alice/flux-demo 1:alice/tts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub holders: Option<String>,
    /// The cards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_CARDS))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["uuid".into()]))]
    pub cards: Vec<Card>,
    /// Seats of time-shared Space pods.
    #[serde(default)]
    pub seats: Seats,
    /// When this was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<Time>,
    /// Ready, ForeignManager, CgroupV2Missing, GateAttached, CardSmallerThanClientAssumes, ModeChangePending,
    /// Reconciled, Cordoned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Seats of time-shared Space pods (`spaceport.dev/seat`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Seats {
    /// Advertised to kubelet.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub total: i32,
    /// Taken by pods.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub used: i32,
}

/// One card.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Card {
    /// Index in NVML.
    #[schemars(range(min = 0))]
    pub index: i32,
    /// UUID: `GPU-…`.
    #[schemars(length(min = 1, max = 96))]
    pub uuid: String,
    /// Model as the driver names it.
    #[schemars(length(max = 128))]
    pub model: String,
    /// Memory of the card.
    #[schemars(range(min = 0))]
    pub memory_bytes: i64,
    /// Minor number of its device node.
    #[schemars(range(min = 0))]
    pub minor: i32,
    /// Compute capability: `9.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub compute_capability: Option<String>,
    /// How it is used.
    #[serde(rename = "use", default)]
    pub used_as: CardUse,
    /// How it is cut.
    pub mode: SlicingMode,
    /// Its health.
    pub health: CardHealth,
    /// Why its health is what it is: a reason and its evidence.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub reason: Option<String>,
    /// Its slots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_SLOTS))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["nvidiaIndex".into()]))]
    pub slots: Vec<Slot>,
}

/// One slot of a card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Slot {
    /// The number the client keeps a worker by: no two slots of a node share one (N17).
    #[schemars(range(min = 0))]
    pub nvidia_index: i32,
    /// UUID the worker is given: of the card or of the MIG device.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 96))]
    pub uuid: Option<String>,
    /// Size it serves.
    pub size: GpuSize,
    /// Its state.
    pub state: SlotState,
    /// Id of the lease that has it, or had it if a worker is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub lease: Option<String>,
    /// `<namespace>/<name>` of the Space that has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 320))]
    pub space: Option<String>,
    /// Why it is quarantined, a reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = CAMEL_CASE))]
    pub reason: Option<String>,
}
