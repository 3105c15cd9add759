//! This node's GPUNode: what the agent found and who uses it, for people and for the operator (docs/rules.md). [`status`] makes it
//! of facts, purely; [`run`] writes it, at most once a second and only when it differs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use spaceport_core::ids::Size;
use spaceport_crds::conditions::{ConditionStatus, GPUNodeCondition, GPUNodeReason, condition, set};
use spaceport_crds::gpu_node::MAX_OTHER_POOLS;
use spaceport_crds::names::API_VERSION;
use spaceport_crds::{Card, CardHealth, CardUse, GPUNode, GPUNodeSpec, GPUNodeStatus, GpuSize, Seats, Slot, SlotState};
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::converge::View;
use crate::inventory::{
    Health, LibraryState, NodeInventory, Use, bytes_of_quantity, card_smaller_than_client_assumes, isolation,
    large_slots,
};
use crate::kubelet::KubeletView;
use crate::policy::{Policy, PoolPolicy};
use crate::slots::{Slot as Place, of_card};

/// Owner of our fields in server-side apply.
const FIELD_MANAGER: &str = "spaceport-device-plugin";
/// Between two writes. Leases come and go many times a second; a person looks less often.
const PAUSE: Duration = Duration::from_secs(1);
/// A status that did not change is applied again this often, in case somebody changed or deleted the object. An apply that
/// changes nothing costs the API server no write.
const RESYNC: Duration = Duration::from_secs(60);
/// Between two tries while the API server does not take the status.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Lengths that the resource's schema allows.
const HOLDERS_CHARACTERS_MAX: usize = 1024;
const REASON_CHARACTERS_MAX: usize = 256;

/// A slot that is not free, as the status shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// Card and part of it.
    pub place: Place,
    /// What it is doing.
    pub state: SlotState,
    /// Lease that has it.
    pub lease: Option<String>,
    /// `<namespace>/<name>` of the Space that has it.
    pub space: Option<String>,
    /// Why it is quarantined.
    pub reason: Option<String>,
}

/// The slots that are not free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotView {
    /// By index.
    pub slots: Vec<SlotStatus>,
}

impl From<&View> for SlotView {
    fn from(view: &View) -> Self {
        let spaces: BTreeMap<&str, String> = view
            .running
            .iter()
            .map(|lease| (lease.lease.as_str(), format!("{}/{}", lease.caller.pod.namespace, lease.caller.pod.space)))
            .collect();
        let leased = view.owned.iter().map(|(place, lease)| SlotStatus {
            place: *place,
            state: SlotState::Leased,
            lease: Some(lease.clone()),
            space: spaces.get(lease.as_str()).cloned(),
            reason: None,
        });
        let idle = view.idle.iter().map(|(place, caller)| SlotStatus {
            place: *place,
            state: SlotState::IdleHeld,
            lease: None,
            space: Some(format!("{}/{}", caller.pod.namespace, caller.pod.space)),
            reason: None,
        });
        let quarantined = view.quarantined.keys().map(|place| SlotStatus {
            place: *place,
            state: SlotState::Quarantined,
            lease: None,
            space: None,
            reason: Some("ClearOverdue".to_owned()),
        });
        let mut slots: Vec<SlotStatus> = leased.chain(idle).chain(quarantined).collect();
        slots.sort_by_key(|slot| slot.place.index());
        Self { slots }
    }
}

/// A condition that another part of the agent found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which condition.
    pub condition: GPUNodeCondition,
    /// Whether it holds.
    pub holds: ConditionStatus,
    /// Why.
    pub reason: GPUNodeReason,
    /// What happened, to what, with the numbers, and the next action.
    pub message: String,
    /// While it is so, nothing can be granted, and the node is not Ready.
    pub blocks: bool,
}

/// Who this agent is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeIdentity {
    /// Name of the node.
    pub node: String,
    /// Fresh at every start.
    pub agent_instance: String,
    /// The kernel's boot id.
    pub boot_id: String,
}

/// Everything a status is made of.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Who writes.
    pub identity: &'a NodeIdentity,
    /// Highest epoch seen.
    pub epoch: u64,
    /// The cards.
    pub inventory: &'a NodeInventory,
    /// What they are for.
    pub policy: &'a Policy,
    /// What kubelet has of them.
    pub kubelet: &'a KubeletView,
    /// Who uses them.
    pub slots: &'a SlotView,
    /// What other parts found.
    pub findings: &'a [Finding],
}

/// The status of these facts at time `now`. Times of transition are those of `previous` where nothing changed.
pub fn status(facts: &Facts<'_>, previous: Option<&GPUNodeStatus>, now: Timestamp) -> GPUNodeStatus {
    let Facts { identity, epoch, inventory, policy, kubelet, slots, findings: _ } = facts;
    let pool = policy.pool.as_ref();
    let cards: Vec<Card> = inventory.cards.iter().map(|card| card_status(card, pool, kubelet, slots)).collect();
    let mut conditions = previous.map(|status| status.conditions.clone()).unwrap_or_default();
    let found = conditions_of(facts, now);
    // A condition that no part reports any more would stay for ever.
    conditions.retain(|old| found.iter().any(|new| new.type_ == old.type_));
    for new in found {
        set(&mut conditions, new);
    }
    GPUNodeStatus {
        observed_generation: policy.generation,
        driver_version: inventory.driver_version.clone(),
        nvml_version: inventory.nvml_version.clone(),
        cuda_version: inventory.cuda_version.clone(),
        pool: pool.map(|pool| pool.name.clone()),
        other_pools: policy.other_pools.iter().take(MAX_OTHER_POOLS).cloned().collect(),
        mode: pool.map(|pool| pool.mode),
        isolation: pool.map(|pool| isolation(pool.mode)),
        agent_instance: Some(identity.agent_instance.clone()),
        agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        boot_id: Some(identity.boot_id.clone()),
        epoch: i64::try_from(*epoch).unwrap_or(i64::MAX),
        card_count: i32::try_from(cards.len()).unwrap_or(i32::MAX),
        slots: Some(in_use(&cards, pool)),
        health: worst_health(&cards),
        holders: holders(slots),
        cards,
        seats: Seats {
            total: i32::try_from(kubelet.seats()).unwrap_or(i32::MAX),
            used: i32::try_from(kubelet.seats_used()).unwrap_or(i32::MAX),
        },
        reported_at: previous.and_then(|status| status.reported_at.clone()),
        conditions,
    }
}

fn card_status(
    card: &crate::inventory::Card,
    pool: Option<&PoolPolicy>,
    kubelet: &KubeletView,
    slots: &SlotView,
) -> Card {
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    let used_as = match kubelet.offer.uses.get(&card.index) {
        Some(Use::TimeShared) => CardUse::TimeShared,
        Some(Use::Dedicated(_)) => CardUse::Dedicated,
        Some(Use::Unused) | None => CardUse::Unused,
    };
    let (health, reason) = match &card.health {
        // Healthy, but leases cannot have it: MIG mode is never toggled by us (N17).
        Health::Healthy if card.mig_enabled => {
            (CardHealth::Healthy, Some("the card is in MIG mode; nothing is granted"))
        }
        Health::Healthy => (CardHealth::Healthy, None),
        Health::Unmonitored { reason } => (CardHealth::Unmonitored, Some(reason.as_str())),
        Health::Lost { reason } => (CardHealth::Unhealthy, Some(reason.as_str())),
    };
    let shared = pool.filter(|_| used_as == CardUse::TimeShared);
    Card {
        index: number(card.index),
        uuid: card.uuid.clone(),
        model: card.model.clone(),
        memory_bytes: i64::try_from(card.memory_total_bytes).unwrap_or(i64::MAX),
        minor: number(card.minor),
        compute_capability: card.compute_capability.clone(),
        used_as,
        mode: pool.map(|pool| pool.mode).unwrap_or_default(),
        health,
        reason: reason.map(|reason| shortened(reason, REASON_CHARACTERS_MAX)),
        slots: shared.map(|pool| card_slots(card, pool, slots)).unwrap_or_default(),
    }
}

/// The slots of a card: those that are in use, and the free parts beside them. A whole card in use has no free parts.
fn card_slots(card: &crate::inventory::Card, pool: &PoolPolicy, slots: &SlotView) -> Vec<Slot> {
    let used: Vec<&SlotStatus> = slots.slots.iter().filter(|slot| slot.place.card == card.index).collect();
    let parts = large_slots(pool.mode, pool.large).map_or(Vec::new(), |parts| of_card(card.index, parts, Size::Large));
    let free = parts.into_iter().filter(|part| used.iter().all(|slot| !slot.place.overlaps(*part)));
    let shown = |place: Place| Slot {
        nvidia_index: i32::try_from(place.index()).unwrap_or(i32::MAX),
        uuid: Some(card.uuid.clone()),
        size: match place.size() {
            Size::Large => GpuSize::Large,
            Size::Xlarge => GpuSize::Xlarge,
        },
        ..Slot::default()
    };
    let mut all: Vec<Slot> = free.map(shown).collect();
    all.extend(used.iter().map(|slot| Slot {
        state: slot.state,
        lease: slot.lease.clone(),
        space: slot.space.clone(),
        reason: slot.reason.clone(),
        ..shown(slot.place)
    }));
    all.sort_by_key(|slot| slot.nvidia_index);
    all
}

/// The column `SLOTS`: of all `large` slots, how many cannot be had. An idle worker does not count, it makes room (L16).
fn in_use(cards: &[Card], pool: Option<&PoolPolicy>) -> String {
    let parts = pool.and_then(|pool| large_slots(pool.mode, pool.large).ok()).unwrap_or(0);
    let taken = |slot: &Slot| match (slot.state, slot.size) {
        (SlotState::Free | SlotState::IdleHeld, _) => 0,
        (_, GpuSize::Large) => 1,
        (_, GpuSize::Xlarge) => parts,
    };
    let used: u32 = cards.iter().flat_map(|card| &card.slots).map(taken).sum();
    let shared = cards.iter().filter(|card| card.used_as == CardUse::TimeShared).count();
    format!("{used}/{}", shared * usize::try_from(parts).unwrap_or(0))
}

fn worst_health(cards: &[Card]) -> Option<String> {
    let worst_first = [
        CardHealth::Unhealthy,
        CardHealth::Unmonitored,
        CardHealth::Suspect,
        CardHealth::Probation,
        CardHealth::Healthy,
    ];
    worst_first.into_iter().find_map(|health| {
        let count = cards.iter().filter(|card| card.health == health).count();
        match (health, count) {
            (_, 0) => None,
            (CardHealth::Healthy, _) => Some(health.to_string()),
            _ => Some(format!("{health} ({count})")),
        }
    })
}

fn holders(slots: &SlotView) -> Option<String> {
    let holder = |slot: &SlotStatus| Some(format!("{}:{}", slot.place.index(), slot.space.as_ref()?));
    let text = slots.slots.iter().filter_map(holder).collect::<Vec<_>>().join(" ");
    (!text.is_empty()).then(|| shortened(&text, HOLDERS_CHARACTERS_MAX))
}

fn shortened(text: &str, characters: usize) -> String {
    match text.char_indices().nth(characters) {
        None => text.to_owned(),
        Some(_) => text.chars().take(characters - 1).chain(['…']).collect(),
    }
}

/// Every condition, [`GPUNodeCondition::Ready`] included.
fn conditions_of(facts: &Facts<'_>, now: Timestamp) -> Vec<Condition> {
    let mut found = facts.findings.to_vec();
    found.push(cordoned(facts.policy));
    found.push(mode_change(facts.kubelet));
    found.extend(too_small(facts));
    let ready = ready(facts, &found);
    found.push(ready);
    let made = |finding: &Finding| {
        let message = finding.message.as_str();
        let (kind, reason) = (finding.condition.as_str(), finding.reason.as_str());
        condition(kind, finding.holds, reason, message, facts.policy.generation, now)
    };
    found.iter().map(made).collect()
}

fn finding(condition: GPUNodeCondition, holds: bool, reason: GPUNodeReason, message: String) -> Finding {
    let holds = if holds { ConditionStatus::True } else { ConditionStatus::False };
    Finding { condition, holds, reason, message, blocks: false }
}

fn cordoned(policy: &Policy) -> Finding {
    let kind = GPUNodeCondition::Cordoned;
    match &policy.cordon {
        None => finding(kind, false, GPUNodeReason::AsExpected, "spec.cordon is not set".to_owned()),
        Some(cordon) => {
            let what =
                if cordon.cards.is_empty() { "all cards".to_owned() } else { format!("cards {:?}", cordon.cards) };
            let why = cordon.reason.as_deref().unwrap_or("no reason given");
            let message = format!("nothing new is granted on {what}: {why}; remove spec.cordon to grant again");
            finding(kind, true, GPUNodeReason::CordonedByAdmin, message)
        }
    }
}

fn mode_change(kubelet: &KubeletView) -> Finding {
    let kind = GPUNodeCondition::ModeChangePending;
    match kubelet.offer.pending.as_slice() {
        [] => finding(kind, false, GPUNodeReason::AsExpected, "every card is used as its pool says".to_owned()),
        pending => {
            let told: Vec<String> =
                pending.iter().map(|change| format!("card {} is held by {}", change.card, change.held_by)).collect();
            let message = format!("{}; the change is made when they end", told.join(", "));
            finding(kind, true, GPUNodeReason::CardInUse, message)
        }
    }
}

/// Only where the pool names a minimum.
fn too_small(facts: &Facts<'_>) -> Option<Finding> {
    let kind = GPUNodeCondition::CardSmallerThanClientAssumes;
    let pool = facts.policy.pool.as_ref()?;
    let minimum = pool.min_memory.as_ref()?;
    let parts = large_slots(pool.mode, pool.large).ok()?;
    let minimum = match bytes_of_quantity(&minimum.0) {
        Ok(bytes) => bytes,
        Err(error) => {
            let message = format!("sizes.minMemory of pool {}: {error}; write it as 74G or 70Gi", pool.name);
            return Some(Finding {
                holds: ConditionStatus::Unknown,
                ..finding(kind, false, GPUNodeReason::SliceTooSmall, message)
            });
        }
    };
    let uses = &facts.kubelet.offer.uses;
    let shared = facts.inventory.cards.iter().filter(|card| uses.get(&card.index) == Some(&Use::TimeShared));
    let shared: Vec<_> = shared.cloned().collect();
    let short = card_smaller_than_client_assumes(&shared, parts, minimum);
    Some(match short.first() {
        None => finding(kind, false, GPUNodeReason::AsExpected, format!("a large slot has at least {minimum} bytes")),
        Some(first) => {
            let message = format!(
                "a large slot of card {} ({}) has {} bytes, the pool wants {}; {} such cards; set sizes.large to Whole \
                 or take them out of the pool",
                first.card,
                first.model,
                first.slot_bytes,
                first.minimum_bytes,
                short.len()
            );
            finding(kind, true, GPUNodeReason::SliceTooSmall, message)
        }
    })
}

/// The summary: the first thing that keeps the node from granting leases.
fn ready(facts: &Facts<'_>, found: &[Finding]) -> Finding {
    let kind = GPUNodeCondition::Ready;
    let not = |reason, message: String| finding(kind, false, reason, message);
    match &facts.inventory.library {
        LibraryState::Starting => return not(GPUNodeReason::Starting, "NVML has not been asked yet".to_owned()),
        LibraryState::Unavailable { reason } => {
            return not(GPUNodeReason::NvmlUnavailable, format!("{reason}; check the driver and --nvml-library"));
        }
        LibraryState::Hangs { reason } => {
            return not(GPUNodeReason::NvmlHangs, format!("{reason}; a reboot of the node usually helps"));
        }
        LibraryState::Loaded => {}
    }
    if let Some(blocking) = found.iter().find(|finding| finding.blocks) {
        return not(blocking.reason, blocking.message.clone());
    }
    match &facts.policy.pool {
        None => return not(GPUNodeReason::Starting, "no GPUPool selects this node; check its nodeSelector".to_owned()),
        Some(pool) => {
            if let Err(unsupported) = large_slots(pool.mode, pool.large) {
                return not(GPUNodeReason::NoCards, format!("pool {}: {unsupported}", pool.name));
            }
        }
    }
    let uses = &facts.kubelet.offer.uses;
    let shared = || facts.inventory.cards.iter().filter(|card| uses.get(&card.index) == Some(&Use::TimeShared));
    if facts.inventory.cards.is_empty() {
        return not(GPUNodeReason::NoCards, "NVML lists no card".to_owned());
    }
    if shared().next().is_none() {
        return not(GPUNodeReason::NoCards, "the pool shares none of this node's cards".to_owned());
    }
    if let Some(sick) = shared().next().filter(|_| !shared().any(|card| card.health.is_healthy() && !card.mig_enabled))
    {
        let reason = sick.health.reason().unwrap_or("it is in MIG mode");
        return not(GPUNodeReason::NoHealthyCard, format!("no shared card is healthy; card {}: {reason}", sick.index));
    }
    if shared().all(|card| facts.policy.is_cordoned(card.index)) {
        return not(GPUNodeReason::CordonedByAdmin, "every shared card is cordoned".to_owned());
    }
    if let Some(problem) = facts.kubelet.problem() {
        return not(GPUNodeReason::KubeletUnavailable, problem);
    }
    finding(kind, true, GPUNodeReason::AsExpected, format!("{} cards are shared", shared().count()))
}

/// Where the facts come from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The cards.
    pub inventory: watch::Receiver<Arc<NodeInventory>>,
    /// What they are for.
    pub policy: watch::Receiver<Policy>,
    /// What kubelet has of them.
    pub kubelet: watch::Receiver<KubeletView>,
    /// Who uses them.
    pub leases: watch::Receiver<View>,
    /// Highest epoch seen.
    pub epoch: watch::Receiver<u64>,
    /// What other parts found.
    pub findings: watch::Receiver<Vec<Finding>>,
}

impl Sources {
    /// Waits for any change; false if a source has ended.
    async fn changed(&mut self) -> bool {
        tokio::select! {
            changed = self.inventory.changed() => changed.is_ok(),
            changed = self.policy.changed() => changed.is_ok(),
            changed = self.kubelet.changed() => changed.is_ok(),
            changed = self.leases.changed() => changed.is_ok(),
            changed = self.epoch.changed() => changed.is_ok(),
            changed = self.findings.changed() => changed.is_ok(),
        }
    }

    fn status(&mut self, identity: &NodeIdentity, previous: Option<&GPUNodeStatus>, now: Timestamp) -> GPUNodeStatus {
        let slots = SlotView::from(&*self.leases.borrow_and_update());
        let facts = Facts {
            identity,
            epoch: *self.epoch.borrow_and_update(),
            inventory: &self.inventory.borrow_and_update(),
            policy: &self.policy.borrow_and_update(),
            kubelet: &self.kubelet.borrow_and_update(),
            slots: &slots,
            findings: &self.findings.borrow_and_update(),
        };
        status(&facts, previous, now)
    }
}

/// Writes the status until `stop` or until a source ends.
pub async fn run(client: kube::Client, identity: NodeIdentity, mut sources: Sources, stop: CancellationToken) {
    let nodes: Api<GPUNode> = Api::all(client);
    // What another agent wrote before: its times of transition are still true where nothing changed.
    let mut written: Option<GPUNodeStatus> = match nodes.get_opt(&identity.node).await {
        Ok(node) => node.and_then(|node| node.status),
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "The earlier status is not known; its times of transition are lost");
            None
        }
    };
    let mut resync = Instant::now();
    let mut retry = RETRY_MIN;
    loop {
        let now = now();
        let wanted = sources.status(&identity, written.as_ref(), now);
        let differs = written.as_ref() != Some(&wanted);
        let mut pause = PAUSE;
        if differs || resync <= Instant::now() {
            let wanted = if differs { GPUNodeStatus { reported_at: Some(Time(now)), ..wanted } } else { wanted };
            match write(&nodes, &identity.node, &wanted).await {
                Ok(()) => {
                    written = Some(wanted);
                    resync = Instant::now() + RESYNC;
                    retry = RETRY_MIN;
                }
                Err(error) => {
                    tracing::warn!(error = %error_chain(&error), "The GPUNode's status cannot be written");
                    resync = Instant::now();
                    pause = retry;
                    retry = (retry * 2).min(RETRY_MAX);
                }
            }
        }
        let failed = resync <= Instant::now();
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        if failed {
            continue;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep_until(resync) => {}
            alive = sources.changed() => if !alive { return },
        }
    }
}

/// Applies the status; makes the object if it is missing.
async fn write(nodes: &Api<GPUNode>, name: &str, status: &GPUNodeStatus) -> kube::Result<()> {
    let ours = PatchParams::apply(FIELD_MANAGER).force();
    let body = serde_json::json!({
        "apiVersion": API_VERSION,
        "kind": "GPUNode",
        "metadata": { "name": name },
        "status": status,
    });
    match nodes.patch_status(name, &ours, &Patch::Apply(&body)).await {
        Err(kube::Error::Api(refusal)) if refusal.is_not_found() => {}
        other => return other.map(drop),
    }
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let empty = GPUNode { metadata, spec: GPUNodeSpec::default(), status: None };
    match nodes
        .create(&PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }, &empty)
        .await
    {
        // Somebody was faster; the status is ours all the same.
        Err(kube::Error::Api(refusal)) if refusal.is_already_exists() => {}
        other => drop(other?),
    }
    nodes.patch_status(name, &ours, &Patch::Apply(&body)).await.map(drop)
}

/// Stamps conditions and `reportedAt`; nothing is decided from them.
#[allow(clippy::disallowed_methods, reason = "the shell's clock for what people read")]
fn now() -> Timestamp {
    Timestamp::now()
}

#[cfg(test)]
mod tests;
