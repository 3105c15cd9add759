//! Which orders a node takes, and which slot they get.

use super::*;

#[test]
fn stale_orders_are_refused_and_begin_nothing() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let ticket = node.asks(&app, 1, None);
    let mut old = node.order("l1", ticket, LARGE);
    old.epoch = 6;
    let mut slow = node.order("l2", ticket, LARGE);
    node.seen();
    node.happens(Event::Start(old)).passes(5_001);
    slow.epoch = 7;
    node.happens(Event::Start(slow));
    let refused = Node::refused(&node.seen());
    assert!(refused[0].contains("epoch 6 is below 7") && refused[1].contains("5001 ms old"), "{refused:?}");
    assert_eq!(node.machine.snapshot(), Snapshot::default());
}

#[test]
fn an_epoch_is_recorded_before_the_node_joins_it_and_a_lower_leader_is_not_joined() {
    let mut node = Node::with_cards(1);
    let steps = node.seen();
    assert_eq!(steps[0], Step::RecordEpoch(7));
    assert!(matches!(&steps[1], Step::Send(Message::Joined(joined)) if joined.epoch == 7 && joined.cards.len() == 1));
    node.happens(Event::Linked { epoch: 6 });
    assert_eq!(node.seen(), []);
}

#[test]
fn halves_are_packed_so_that_whole_cards_stay_free() {
    let mut node = Node::with_cards(2);
    let apps = ["a", "b", "c"].map(pod);
    node.runs("l1", &apps[0], 1, LARGE).runs("l2", &apps[1], 1, LARGE).seen();
    let ticket = node.asks(&apps[2], 1, Some(Size::Xlarge));
    node.starts("l3", ticket, XLARGE);
    assert_eq!(node.granted(), (false, 5), "the second card is whole");
}

#[test]
fn cards_to_avoid_are_avoided_and_a_full_node_refuses_with_numbers() {
    let (mut node, app) = (Node::with_cards(2), pod("app"));
    let ticket = node.asks(&app, 1, None);
    let mut order = node.order("l1", ticket, LARGE);
    order.avoid = vec![0];
    node.happens(Event::Start(order));
    assert_eq!(node.granted(), (false, 3));
    let ticket = node.asks(&app, 2, None);
    let mut order = node.order("l2", ticket, LARGE);
    order.avoid = vec![0, 1];
    node.happens(Event::Start(order));
    assert!(Node::refused(&node.seen())[0].contains("no free large slot: 2 cards"));
}

#[test]
fn an_order_after_another_lease_begins_when_that_slot_is_free() {
    let (mut node, one, two) = (Node::with_cards(1), pod("one"), pod("two"));
    node.runs("l1", &one, 1, XLARGE);
    let ticket = node.asks(&two, 1, None);
    node.happens(Event::Queued(link::Queued { ticket, ..link::Queued::default() }));
    node.releases("l1", &one, false);
    // With someone waiting the worker is not kept: clearing has begun.
    assert_eq!(Node::freed(&node.seen()), []);
    let mut order = node.order("l2", ticket, LARGE);
    order.after = "l1".to_owned();
    node.happens(Event::Start(order));
    assert_eq!(node.answers(), []);
    node.happens(Event::Cleared { cgroup_id: 1 });
    let steps = node.seen();
    let freed = steps.iter().position(|step| matches!(step, Step::Send(Message::Freed(_))));
    let answer = steps.iter().position(|step| matches!(step, Step::Answer { .. }));
    assert!(freed.is_some() && freed < answer, "{steps:?}");
}

#[test]
fn a_slot_that_does_not_clear_is_quarantined_and_comes_back_when_it_does() {
    let (mut node, one, two) = (Node::with_cards(1), pod("one"), pod("two"));
    node.runs("l1", &one, 1, XLARGE).releases("l1", &one, true);
    let ticket = node.asks(&two, 1, None);
    let mut order = node.order("l2", ticket, LARGE);
    order.after = "l1".to_owned();
    node.happens(Event::Start(order)).seen();
    node.happens(Event::ClearOverdue { cgroup_id: 1, reason: "pid 1001 holds 2 GiB".to_owned() });
    let steps = node.seen();
    assert_eq!(Node::freed(&steps), [("l1".to_owned(), link::FreedKind::Quarantined)]);
    assert_eq!(Node::refused(&steps).len(), 1, "its hold is voided: {steps:?}");
    assert_eq!(node.machine.inventory_report()[0].quarantined_slots, 2, "a whole card is both halves");
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert_eq!(node.machine.inventory_report()[0].quarantined_slots, 0);
    // The request is with the broker again, under its old ticket.
    node.starts("l3", ticket, LARGE);
    assert_eq!(node.granted(), (false, 0));
}

#[test]
fn a_sick_card_ends_its_leases_uncharged_and_gets_no_new_ones() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).seen();
    let sick = Card { grantable: false, fault: Some("XID 79".to_owned()), ..card(0) };
    node.happens(Event::Inventory(vec![sick]));
    assert_eq!(Node::ended(&node.seen())[0].1, link::EndKind::PlatformFault);
    let ticket = node.asks(&app, 2, None);
    node.starts("l2", ticket, LARGE);
    assert_eq!(Node::refused(&node.seen()).len(), 1);
}
