use spaceport_crds::{CardSelection, Cordon, CordonScope, LargeShare, SlicingMode};

use super::*;
use crate::inventory::tests::h200;
use crate::kubelet::offer::offer;
use crate::slots::Place as Part;

struct Story {
    identity: NodeIdentity,
    inventory: NodeInventory,
    policy: Policy,
    kubelet: KubeletView,
    slots: SlotView,
    findings: Vec<Finding>,
}

impl Story {
    fn two_shared_cards() -> Self {
        let pool = PoolPolicy {
            name: "default".to_owned(),
            mode: SlicingMode::Shared,
            large: LargeShare::Half,
            cards: CardSelection::default(),
            seats: 4,
            min_memory: None,
        };
        let mut story = Self {
            identity: NodeIdentity {
                node: "gpu-1".to_owned(),
                agent_instance: "a".to_owned(),
                boot_id: "b".to_owned(),
            },
            inventory: NodeInventory {
                library: LibraryState::Loaded,
                cards: vec![h200(0), h200(1)],
                ..NodeInventory::default()
            },
            policy: Policy { pool: Some(pool), generation: Some(3), ..Policy::default() },
            kubelet: KubeletView::default(),
            slots: SlotView::default(),
            findings: Vec::new(),
        };
        story.kubelet.offer = offer(&story.inventory, &story.policy, Some(&[]), &Default::default());
        story
    }

    fn with_slot(mut self, card: u32, place: Part, state: SlotState, space: &str) -> Self {
        let place = Place { card, place };
        let space = Some(space.to_owned()).filter(|space| !space.is_empty());
        self.slots.slots.push(SlotStatus { place, state, lease: Some("l".to_owned()), space, reason: None });
        self
    }

    fn status(&self) -> GPUNodeStatus {
        self.status_after(None, 0)
    }

    fn status_after(&self, previous: Option<&GPUNodeStatus>, seconds: i64) -> GPUNodeStatus {
        let facts = Facts {
            identity: &self.identity,
            epoch: 7,
            inventory: &self.inventory,
            policy: &self.policy,
            kubelet: &self.kubelet,
            slots: &self.slots,
            findings: &self.findings,
        };
        status(&facts, previous, Timestamp::from_second(seconds).unwrap())
    }
}

fn told(status: &GPUNodeStatus, kind: GPUNodeCondition) -> (String, String, String) {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind.as_str()).unwrap();
    (found.status.clone(), found.reason.clone(), found.message.clone())
}

fn shown(status: &GPUNodeStatus, card: usize) -> Vec<(i32, SlotState)> {
    status.cards[card].slots.iter().map(|slot| (slot.nvidia_index, slot.state)).collect()
}

#[test]
fn an_idle_node_shows_its_free_halves_and_is_ready() {
    let status = Story::two_shared_cards().status();
    assert_eq!(shown(&status, 1), [(3, SlotState::Free), (4, SlotState::Free)]);
    assert_eq!((status.slots.as_deref(), status.health.as_deref()), (Some("0/4"), Some("Healthy")));
    assert_eq!((status.holders, status.seats.total, status.epoch), (None, 4, 7));
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.observed_generation), ("True", Some(3)));
}

#[test]
fn a_whole_card_in_use_has_no_free_halves_and_an_idle_worker_takes_no_room() {
    let status = Story::two_shared_cards()
        .with_slot(0, Part::Whole, SlotState::Leased, "alice/flux")
        .with_slot(1, Part::Part(1), SlotState::IdleHeld, "alice/tts")
        .status();
    assert_eq!(shown(&status, 0), [(2, SlotState::Leased)]);
    assert_eq!(shown(&status, 1), [(3, SlotState::Free), (4, SlotState::IdleHeld)]);
    assert_eq!(status.slots.as_deref(), Some("2/4"));
    assert_eq!(status.holders.as_deref(), Some("2:alice/flux 4:alice/tts"));
}

#[test]
fn the_worst_card_names_the_nodes_health_and_one_healthy_card_is_enough_to_be_ready() {
    let mut story = Story::two_shared_cards();
    story.inventory.cards[1].health = Health::Lost { reason: "nvmlDeviceGetUUID: off the bus".to_owned() };
    let status = story.status();
    assert_eq!(status.health.as_deref(), Some("Unhealthy (1)"));
    assert_eq!(status.cards[1].reason.as_deref(), Some("nvmlDeviceGetUUID: off the bus"));
    assert_eq!(told(&status, GPUNodeCondition::Ready).0, "True");
    story.inventory.cards[0].health = Health::Unmonitored { reason: "hangs".to_owned() };
    let (holds, reason, message) = told(&story.status(), GPUNodeCondition::Ready);
    assert_eq!((holds.as_str(), reason.as_str()), ("False", "NoHealthyCard"));
    assert_eq!(message, "no shared card is healthy; card 0: hangs");
}

#[test]
fn what_blocks_grants_is_the_reason_of_not_being_ready() {
    let mut story = Story::two_shared_cards();
    story.findings.push(Finding {
        blocks: true,
        ..finding(GPUNodeCondition::Reconciled, false, GPUNodeReason::BrokerUnreachable, "no broker".to_owned())
    });
    assert_eq!(told(&story.status(), GPUNodeCondition::Ready).1, "BrokerUnreachable");
    let mut story = Story::two_shared_cards();
    story.policy.cordon = Some(Cordon { scope: CordonScope::Node, cards: Vec::new(), reason: Some("fans".to_owned()) });
    let status = story.status();
    assert_eq!(told(&status, GPUNodeCondition::Ready).1, "CordonedByAdmin");
    assert!(told(&status, GPUNodeCondition::Cordoned).2.contains("fans"));
    let mut story = Story::two_shared_cards();
    story.inventory.library = LibraryState::Unavailable { reason: "libnvidia-ml.so.1 is not there".to_owned() };
    assert_eq!(told(&story.status(), GPUNodeCondition::Ready).1, "NvmlUnavailable");
    let mut story = Story::two_shared_cards();
    story.policy.pool.as_mut().unwrap().mode = SlicingMode::Mps;
    assert!(told(&story.status(), GPUNodeCondition::Ready).2.contains("mode Mps is not supported"));
    let mut story = Story::two_shared_cards();
    story.inventory.cards.iter_mut().for_each(|card| card.mig_enabled = true);
    assert_eq!(told(&story.status(), GPUNodeCondition::Ready).1, "NoHealthyCard");
    let mut story = Story::two_shared_cards();
    story.policy.pool = None;
    assert_eq!(told(&story.status(), GPUNodeCondition::Ready).0, "False");
}

#[test]
fn the_pools_that_have_no_say_here_are_named_up_to_a_bound() {
    let mut story = Story::two_shared_cards();
    assert_eq!(story.status().other_pools, [""; 0]);
    story.policy.other_pools = (0..=MAX_OTHER_POOLS).map(|number| format!("young-{number}")).collect();
    let shown = story.status();
    assert_eq!((shown.pool.as_deref(), shown.other_pools.len()), (Some("default"), MAX_OTHER_POOLS));
    assert_eq!(shown.other_pools[0], "young-0");
}

#[test]
fn a_slice_below_the_pools_minimum_is_a_condition_with_numbers() {
    let mut story = Story::two_shared_cards();
    let minimum = |story: &mut Story, text: &str| {
        let quantity = k8s_openapi::apimachinery::pkg::api::resource::Quantity(text.to_owned());
        story.policy.pool.as_mut().unwrap().min_memory = Some(quantity);
        told(&story.status(), GPUNodeCondition::CardSmallerThanClientAssumes)
    };
    assert_eq!(minimum(&mut story, "74G").0, "False");
    let (holds, reason, message) = minimum(&mut story, "80G");
    assert_eq!((holds.as_str(), reason.as_str()), ("True", "SliceTooSmall"));
    assert!(message.contains("75377410048 bytes, the pool wants 80000000000; 2 such cards"), "{message}");
    assert_eq!(minimum(&mut story, "much").0, "Unknown");
}

#[test]
fn the_same_facts_later_make_the_same_status_and_a_change_moves_its_own_time_only() {
    let mut story = Story::two_shared_cards();
    let first = story.status_after(None, 10);
    assert_eq!(story.status_after(Some(&first), 20), first);
    story.policy.cordon = Some(Cordon { scope: CordonScope::Node, cards: Vec::new(), reason: None });
    let later = story.status_after(Some(&first), 30);
    let since = |status: &GPUNodeStatus, kind: &str| {
        status.conditions.iter().find(|condition| condition.type_ == kind).unwrap().last_transition_time.0.as_second()
    };
    assert_eq!((since(&later, "Cordoned"), since(&later, "ModeChangePending")), (30, 10));
    // A finding that nobody reports any more goes.
    story.findings.push(finding(GPUNodeCondition::GateAttached, true, GPUNodeReason::AsExpected, "shut".to_owned()));
    let with = story.status_after(Some(&later), 40);
    story.findings.clear();
    let without = story.status_after(Some(&with), 50);
    assert_eq!(with.conditions.len(), without.conditions.len() + 1);
}

#[test]
fn long_texts_are_cut_to_what_the_schema_takes() {
    assert_eq!(shortened("abc", 3), "abc");
    assert_eq!(shortened("äbcd", 3), "äb…");
    let mut story = Story::two_shared_cards();
    for part in 0..2 {
        story = story.with_slot(0, Part::Part(part), SlotState::Leased, &"x".repeat(700));
    }
    assert_eq!(story.status().holders.unwrap().chars().count(), HOLDERS_CHARACTERS_MAX);
}

#[test]
fn a_host_without_cgroup_v2_says_so_and_is_not_ready() {
    let mut story = Story::two_shared_cards();
    story.findings = vec![Finding {
        condition: GPUNodeCondition::CgroupV2Missing,
        holds: ConditionStatus::True,
        reason: GPUNodeReason::CgroupV1Only,
        message: "boot with v2".to_owned(),
        blocks: true,
    }];
    let status = story.status();
    let expected = |holds: &str| (holds.to_owned(), "CgroupV1Only".to_owned(), "boot with v2".to_owned());
    assert_eq!(told(&status, GPUNodeCondition::CgroupV2Missing), expected("True"));
    assert_eq!(told(&status, GPUNodeCondition::Ready), expected("False"));
    // With the tree there, the next agent does not report it any more.
    story.findings.clear();
    let later = story.status_after(Some(&status), 60);
    assert!(later.conditions.iter().all(|condition| condition.type_ != GPUNodeCondition::CgroupV2Missing.as_str()));
}
