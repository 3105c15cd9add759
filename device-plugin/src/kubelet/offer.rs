//! What the node offers to kubelet: pure (N4, N5).

use std::collections::{BTreeMap, BTreeSet};

use spaceport_crds::GpuSize;

use super::pod_resources::Holding;
use super::{PluginDevice, Resource};
use crate::cdi::{self, CdiCards};
use crate::inventory::{Card, NodeInventory, Use, card_uses, large_slots};
use crate::policy::Policy;

/// What is offered, and what follows for the cards.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offer {
    /// What each card is for at present. It lags behind the pool while the card is in use.
    pub uses: BTreeMap<u32, Use>,
    /// Changes that wait for that.
    pub pending: Vec<PendingChange>,
    /// The devices of each resource; a resource that is not offered has none.
    pub devices: BTreeMap<Resource, Vec<PluginDevice>>,
    /// The cards of the CDI spec.
    pub cdi: CdiCards,
}

impl Offer {
    /// Nothing is offered.
    pub fn is_empty(&self) -> bool {
        self.devices.values().all(Vec::is_empty)
    }
}

/// A card whose use is to change and cannot yet (condition `ModeChangePending`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingChange {
    /// Card.
    pub card: u32,
    /// What it is for still.
    pub present: Use,
    /// What the pool wants.
    pub wanted: Use,
    /// Who uses it.
    pub held_by: String,
}

/// The offer. `holdings` is what pods hold according to kubelet, `None` if kubelet has not told yet; `leased` are the cards
/// with a lease or a kept worker.
///
/// Seats are offered while there is a card that leases share, healthy or not: a Space pod runs without a lease most of its
/// time. A dedicated card is one device of the one resource that advertises it, whichever the size, since nothing here cuts
/// a card for two pods. Dedicated cards wait for `holdings`: before that one of them may be in use for something else.
pub fn offer(
    inventory: &NodeInventory,
    policy: &Policy,
    holdings: Option<&[Holding]>,
    leased: &BTreeSet<u32>,
) -> Offer {
    let wanted = match &policy.pool {
        Some(pool) => card_uses(&inventory.cards, &pool.cards),
        None => inventory.cards.iter().map(|card| (card.index, Use::Unused)).collect(),
    };
    let mut offer = Offer::default();
    for (card, wanted) in wanted {
        let (present, held_by) = match (holder(holdings, card), leased.contains(&card)) {
            (Some((size, pod)), _) => (Use::Dedicated(size), pod),
            (None, true) => (Use::TimeShared, "a lease".to_owned()),
            (None, false) => (wanted, String::new()),
        };
        if present != wanted {
            offer.pending.push(PendingChange { card, present, wanted, held_by });
        }
        offer.uses.insert(card, present);
    }
    let of_use = |used: Use| -> Vec<Card> {
        inventory.cards.iter().filter(|card| offer.uses.get(&card.index) == Some(&used)).cloned().collect()
    };
    let time_shared = of_use(Use::TimeShared);
    if let Some(pool) = &policy.pool
        && large_slots(pool.mode, pool.large).is_ok()
        && !time_shared.is_empty()
    {
        let seat =
            |number| PluginDevice { id: format!("seat-{number}"), healthy: true, cdi_device: cdi::seat_device() };
        offer.devices.insert(Resource::Seat, (0..pool.seats).map(seat).collect());
    }
    let mut dedicated = Vec::new();
    for (resource, size) in [(Resource::Large, GpuSize::Large), (Resource::Xlarge, GpuSize::Xlarge)] {
        let cards = of_use(Use::Dedicated(size));
        if holdings.is_some() && !cards.is_empty() {
            let device = |card: &Card| PluginDevice {
                id: device_id(card.index),
                healthy: card.health.is_healthy() && !policy.is_cordoned(card.index),
                cdi_device: cdi::card_device(card.index),
            };
            offer.devices.insert(resource, cards.iter().map(device).collect());
        }
        dedicated.extend(cards);
    }
    dedicated.sort_by_key(|card| card.index);
    offer.cdi = CdiCards { time_shared, dedicated };
    offer
}

/// Id of a dedicated card's device.
fn device_id(card: u32) -> String {
    format!("card-{card}")
}

/// The pod that holds this card as a dedicated one, and as what.
fn holder(holdings: Option<&[Holding]>, card: u32) -> Option<(GpuSize, String)> {
    let id = device_id(card);
    holdings?.iter().find_map(|holding| {
        let size = match holding.resource {
            Resource::Seat => return None,
            Resource::Large => GpuSize::Large,
            Resource::Xlarge => GpuSize::Xlarge,
        };
        holding.devices.contains(&id).then(|| (size, format!("pod {}/{}", holding.namespace, holding.pod)))
    })
}

#[cfg(test)]
mod tests {
    use spaceport_crds::{CardSelection, DedicatedCards, LargeShare, SlicingMode};

    use super::*;
    use crate::inventory::Health;
    use crate::inventory::tests::h200;
    use crate::policy::PoolPolicy;

    fn inventory() -> NodeInventory {
        NodeInventory { cards: (0..3).map(h200).collect(), ..NodeInventory::default() }
    }

    fn policy(dedicated: &[(GpuSize, i32)], mode: SlicingMode) -> Policy {
        let dedicated = dedicated.iter().map(|(size, card)| DedicatedCards { size: *size, indexes: vec![*card] });
        let cards = CardSelection { dedicated: dedicated.collect(), ..CardSelection::default() };
        let (name, large) = ("pool".to_owned(), LargeShare::Half);
        let pool = PoolPolicy { name, mode, large, cards, seats: 3, min_memory: None };
        Policy { pool: Some(pool), ..Policy::default() }
    }

    fn held(resource: Resource, device: &str) -> Holding {
        Holding {
            namespace: "alice".to_owned(),
            pod: "job".to_owned(),
            container: "app".to_owned(),
            resource,
            devices: vec![device.to_owned()],
        }
    }

    fn ids(offer: &Offer, resource: Resource) -> Vec<(&str, bool)> {
        let devices = offer.devices.get(&resource).map_or(&[][..], Vec::as_slice);
        devices.iter().map(|device| (device.id.as_str(), device.healthy)).collect()
    }

    #[test]
    fn seats_for_shared_cards_and_one_device_for_each_dedicated_one() {
        let policy = policy(&[(GpuSize::Large, 1), (GpuSize::Xlarge, 2)], SlicingMode::Shared);
        let offer = offer(&inventory(), &policy, Some(&[]), &BTreeSet::new());
        assert_eq!(ids(&offer, Resource::Seat), [("seat-0", true), ("seat-1", true), ("seat-2", true)]);
        assert_eq!(ids(&offer, Resource::Large), [("card-1", true)]);
        assert_eq!(ids(&offer, Resource::Xlarge), [("card-2", true)]);
        assert_eq!(offer.devices[&Resource::Xlarge][0].cdi_device, "spaceport.dev/gpu=card-2");
        assert_eq!(offer.cdi.time_shared, [h200(0)]);
        assert_eq!(offer.cdi.dedicated, [h200(1), h200(2)]);
        assert!(offer.pending.is_empty());
    }

    #[test]
    fn nothing_is_offered_without_a_pool_cards_or_a_mode_that_we_can_do() {
        let shared = policy(&[], SlicingMode::Shared);
        assert!(offer(&inventory(), &Policy::default(), Some(&[]), &BTreeSet::new()).is_empty());
        assert!(offer(&NodeInventory::default(), &shared, Some(&[]), &BTreeSet::new()).is_empty());
        let mig = offer(&inventory(), &policy(&[], SlicingMode::Mig), Some(&[]), &BTreeSet::new());
        assert!(mig.is_empty());
    }

    #[test]
    fn seats_do_not_wait_for_kubelet_and_outlive_a_sick_card_but_dedicated_cards_do_not() {
        let policy = policy(&[(GpuSize::Xlarge, 2)], SlicingMode::Shared);
        let mut sick = inventory();
        sick.cards[0].health = Health::Lost { reason: "off the bus".to_owned() };
        sick.cards[2].health = Health::Lost { reason: "off the bus".to_owned() };
        let early = offer(&sick, &policy, None, &BTreeSet::new());
        assert_eq!((early.devices[&Resource::Seat].len(), early.devices.get(&Resource::Xlarge)), (3, None));
        let later = offer(&sick, &policy, Some(&[]), &BTreeSet::new());
        assert_eq!(ids(&later, Resource::Xlarge), [("card-2", false)]);
    }

    #[test]
    fn a_card_in_use_keeps_its_use_and_the_change_waits() {
        // Card 0 has a lease and is to be dedicated; card 1 is held by a pod and is to be shared.
        let wanted = policy(&[(GpuSize::Xlarge, 0)], SlicingMode::Shared);
        let holdings = [held(Resource::Seat, "seat-0"), held(Resource::Large, "card-1")];
        let offer = offer(&inventory(), &wanted, Some(&holdings), &BTreeSet::from([0]));
        let uses: Vec<Use> = offer.uses.values().copied().collect();
        assert_eq!(uses, [Use::TimeShared, Use::Dedicated(GpuSize::Large), Use::TimeShared]);
        assert_eq!(ids(&offer, Resource::Xlarge), []);
        assert_eq!(ids(&offer, Resource::Large), [("card-1", true)]);
        let told: Vec<_> = offer.pending.iter().map(|change| (change.card, change.held_by.as_str())).collect();
        assert_eq!(told, [(0, "a lease"), (1, "pod alice/job")]);
    }
}
