//! Between the inventory and the leases: which cards leases may have, who is seen on them (N16), and the watch over memory on
//! cards that two leases share (N18).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::converge::{Card, Event, Running, View};
use crate::gate::lease_cgroup::LeaseCgroup;
use crate::inventory::{self, GpuProcess, Health, NodeInventory, NvmlHandle, Use};
use crate::kubelet::KubeletView;
use crate::node_actor::{Input, NodeHandle};
use crate::policy::Policy;
use crate::slots::Place;

/// How often the memory of leases on shared cards is summed (N18).
const MEMORY_LOOK: Duration = Duration::from_millis(100);

/// The cards as leases see them: those that are time-shared at present and are to stay so. One that a pod still holds as
/// dedicated is not for leases yet, and one that is to be dedicated takes no new ones, so that it can change (N4).
pub fn lease_cards(inventory: &NodeInventory, policy: &Policy, present: &BTreeMap<u32, Use>) -> Vec<Card> {
    let Some(pool) = &policy.pool else { return Vec::new() };
    let Ok(large_slots) = inventory::large_slots(pool.mode, pool.large) else { return Vec::new() };
    let wanted = inventory::card_uses(&inventory.cards, &pool.cards);
    let is_shared = |uses: &BTreeMap<u32, Use>, card: u32| uses.get(&card) == Some(&Use::TimeShared);
    let shared = inventory.cards.iter().filter(|card| is_shared(&wanted, card.index) && is_shared(present, card.index));
    shared
        .map(|card| Card {
            index: card.index,
            uuid: card.uuid.clone(),
            model: card.model.clone(),
            large_slots,
            grantable: card.health.is_healthy() && !card.mig_enabled && !policy.is_cordoned(card.index),
            // A card that does not answer is no proof that its leases failed: they run on.
            fault: match &card.health {
                Health::Lost { reason } => Some(reason.clone()),
                Health::Healthy | Health::Unmonitored { .. } => None,
            },
        })
        .collect()
}

/// Tells the machine about cards whenever inventory, policy or the cards' present use change, until `stop`.
pub async fn follow(
    mut inventory: watch::Receiver<Arc<NodeInventory>>,
    mut policy: watch::Receiver<Policy>,
    mut kubelet: watch::Receiver<KubeletView>,
    node: NodeHandle,
    stop: CancellationToken,
) {
    loop {
        let present = kubelet.borrow_and_update().offer.uses.clone();
        let cards = lease_cards(&inventory.borrow_and_update(), &policy.borrow_and_update(), &present);
        node.send(Input::Event(Event::Inventory(cards)));
        tokio::select! {
            () = stop.cancelled() => return,
            changed = inventory.changed() => if changed.is_err() { return },
            changed = policy.changed() => if changed.is_err() { return },
            changed = kubelet.changed() => if changed.is_err() { return },
        }
    }
}

/// Sees who has a context on the card (N16), and ends the lease that takes more than its half of a shared card (N18).
/// Until `stop`.
pub async fn watch_memory(nvml: NvmlHandle, node: NodeHandle, stop: CancellationToken) {
    let mut look = tokio::time::interval(MEMORY_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut view = node.view();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        let seen = view.borrow_and_update().clone();
        let inventory = nvml.inventory().borrow().clone();
        for (card, leases) in watched(&seen) {
            let Ok(processes) = nvml.processes(card).await else {
                // The inventory says that the card does not answer; nothing is known until it does.
                continue;
            };
            let memory = inventory.card(card).map_or(0, |card| card.memory_total_bytes);
            for lease in leases {
                judge(lease, &processes, memory, &node);
            }
        }
    }
}

/// The leases worth a look, by card: those on shared cards always, others until their context was seen.
fn watched(view: &View) -> BTreeMap<u32, Vec<&Running>> {
    let mut by_card: BTreeMap<u32, Vec<&Running>> = BTreeMap::new();
    for lease in view.running.iter().filter(|lease| lease.memory_share > 1 || !lease.context_seen) {
        by_card.entry(lease.slot.card).or_default().push(lease);
    }
    by_card
}

fn judge(lease: &Running, processes: &[GpuProcess], card_bytes: u64, node: &NodeHandle) {
    let pids = LeaseCgroup::open(&lease.worker.cgroup).and_then(|cgroup| cgroup.processes()).unwrap_or_default();
    let mine: Vec<&GpuProcess> = processes.iter().filter(|process| pids.contains(&process.pid)).collect();
    let cgroup_id = lease.worker.cgroup_id;
    if !mine.is_empty() && !lease.context_seen {
        node.send(Input::Event(Event::ContextSeen { cgroup_id }));
    }
    let used: u64 = mine.iter().filter_map(|process| process.used_bytes).sum();
    if let Some(message) = breach(lease.slot.place, lease.memory_share, used, card_bytes) {
        node.send(Input::Event(Event::Breach { cgroup_id, message }));
    }
}

/// What a lease is told that took more than its part of a shared card.
fn breach(place: Place, share: u32, used: u64, card_bytes: u64) -> Option<String> {
    let limit = card_bytes / u64::from(share.max(1));
    (matches!(place, Place::Part(_)) && share > 1 && card_bytes > 0 && used > limit).then(|| {
        let mib = |bytes: u64| bytes >> 20;
        format!("its processes use {} MiB of device memory, a large slot has {} MiB", mib(used), mib(limit))
    })
}

#[cfg(test)]
mod tests {
    use spaceport_crds::{CardSelection, Cordon, CordonScope, GpuSize, LargeShare, SelectCards, SlicingMode};

    use super::*;
    use crate::inventory::LibraryState;
    use crate::policy::PoolPolicy;

    fn policy(mode: SlicingMode) -> Policy {
        let pool = PoolPolicy {
            name: "p".to_owned(),
            mode,
            large: LargeShare::Half,
            cards: CardSelection::default(),
            seats: 4,
            min_memory: None,
        };
        Policy { pool: Some(pool), ..Policy::default() }
    }

    fn inventory(health: Health) -> NodeInventory {
        let card = inventory::Card {
            index: 0,
            nvml_index: 0,
            minor: 4,
            uuid: "GPU-a".to_owned(),
            model: "NVIDIA H200".to_owned(),
            memory_total_bytes: 100 << 20,
            compute_capability: None,
            mig_enabled: false,
            health,
        };
        NodeInventory { library: LibraryState::Loaded, cards: vec![card], ..NodeInventory::default() }
    }

    fn used(used: Use) -> BTreeMap<u32, Use> {
        BTreeMap::from([(0, used)])
    }

    #[test]
    fn a_card_that_a_pod_still_holds_is_not_for_leases_yet() {
        let (cards, shared) = (inventory(Health::Healthy), policy(SlicingMode::Shared));
        assert_eq!(lease_cards(&cards, &shared, &used(Use::Dedicated(GpuSize::Xlarge))), []);
        assert_eq!(lease_cards(&cards, &shared, &BTreeMap::new()), [], "not looked at yet");
        assert_eq!(lease_cards(&cards, &shared, &used(Use::TimeShared)).len(), 1);
        let mut leaving = policy(SlicingMode::Shared);
        let selection = leaving.pool.as_mut().map(|pool| &mut pool.cards).unwrap();
        selection.time_shared.select = SelectCards::None;
        assert_eq!(
            lease_cards(&cards, &leaving, &used(Use::TimeShared)),
            [],
            "no new ones: it is to be free some time"
        );
    }

    #[test]
    fn a_node_without_a_pool_has_no_cards_for_leases() {
        assert_eq!(lease_cards(&inventory(Health::Healthy), &Policy::default(), &used(Use::TimeShared)), []);
    }

    #[test]
    fn only_a_lost_card_ends_its_leases_and_a_silent_or_cordoned_one_gets_no_new_ones() {
        let (shared, present) = (policy(SlicingMode::Shared), used(Use::TimeShared));
        let healthy = &lease_cards(&inventory(Health::Healthy), &shared, &present)[0];
        assert!(healthy.grantable && healthy.fault.is_none() && healthy.large_slots == 2);
        let silent = &lease_cards(&inventory(Health::Unmonitored { reason: "hangs".to_owned() }), &shared, &present)[0];
        assert!(!silent.grantable && silent.fault.is_none());
        let lost = &lease_cards(&inventory(Health::Lost { reason: "off the bus".to_owned() }), &shared, &present)[0];
        assert_eq!((lost.grantable, lost.fault.as_deref()), (false, Some("off the bus")));
        let cordon = Some(Cordon { scope: CordonScope::Node, cards: Vec::new(), reason: None });
        assert!(!lease_cards(&inventory(Health::Healthy), &Policy { cordon, ..shared }, &present)[0].grantable);
        assert_eq!(lease_cards(&inventory(Health::Healthy), &policy(SlicingMode::Whole), &present)[0].large_slots, 1);
    }

    #[test]
    fn more_than_half_of_a_shared_card_is_a_breach_and_says_the_numbers() {
        let half = Place::Part(0);
        assert_eq!(breach(half, 2, 50 << 20, 100 << 20), None);
        let message = breach(half, 2, 51 << 20, 100 << 20).unwrap();
        assert_eq!(message, "its processes use 51 MiB of device memory, a large slot has 50 MiB");
        assert_eq!(breach(Place::Whole, 2, 90 << 20, 100 << 20), None);
        assert_eq!(breach(half, 1, 90 << 20, 100 << 20), None);
    }
}
