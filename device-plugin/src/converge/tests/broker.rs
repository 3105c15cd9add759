//! What a node and its broker tell each other of leases, and what is done while there is no broker.

use super::*;

/// A later leader that does not know the lease asks that account's page (L7).
#[test]
fn a_lease_is_told_with_the_account_of_its_order() {
    let mut node = Node::with_cards(1);
    node.runs("l1", &pod("a"), 1, LARGE).seen();
    let snapshot = serde_json::to_string(&node.machine.snapshot()).unwrap();
    assert!(snapshot.contains(r#""account":"bob""#), "also after a restart: {snapshot}");
    node.happens(Event::Linked { epoch: 8 });
    let told = node.seen().into_iter().find_map(|step| match step {
        Step::Send(Message::Joined(joined)) => Some(joined.leases),
        _ => None,
    });
    assert_eq!(told.unwrap()[0].account, "bob");
}

#[test]
fn reports_are_repeated_until_acknowledged_and_then_forgotten() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    node.happens(Event::Unlinked).passes(60_000).happens(Event::Tick);
    assert_eq!(Node::ended(&node.seen()), [], "nobody to tell");
    node.happens(Event::Linked { epoch: 8 });
    let steps = node.seen();
    assert_eq!((Node::ended(&steps).len(), Node::freed(&steps).len()), (1, 1));
    let acknowledged = |ended, freed| link::Acknowledged { lease: "l1".to_owned(), ended, freed };
    node.happens(Event::Acknowledged(acknowledged(true, false))).passes(REPEAT_MS).happens(Event::Tick);
    let steps = node.seen();
    assert_eq!((Node::ended(&steps).len(), Node::freed(&steps).len()), (0, 1));
    node.happens(Event::Acknowledged(acknowledged(false, true)));
    assert!(node.machine.snapshot().leases.is_empty());
}

#[test]
fn a_caller_who_leaves_while_queued_is_dequeued_and_one_who_leaves_before_the_answer_pays_nothing() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let ticket = node.asks(&app, 1, None);
    node.seen();
    node.happens(Event::Disconnected { ticket });
    assert!(matches!(&node.seen()[..], [Step::Send(Message::Dequeue(_))]));
    let late = node.order("l1", ticket, LARGE);
    node.happens(Event::Start(late));
    assert_eq!(Node::refused(&node.seen()), ["the caller is gone"]);

    let ticket = node.asks(&app, 1, None);
    node.starts("l2", ticket, LARGE).happens(Event::Disconnected { ticket });
    assert_eq!(Node::ended(&node.seen()), [("l2".to_owned(), link::EndKind::Undelivered, 0)]);
}

#[test]
fn without_a_broker_a_new_request_is_refused_soon_and_a_queued_one_waits_for_the_next_leader() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let queued = node.asks(&app, 1, None);
    node.happens(Event::Queued(link::Queued { ticket: queued, ..link::Queued::default() }));
    node.happens(Event::Unlinked).asks(&app, 2, None);
    node.seen();
    node.passes(BROKER_WAIT_MS).happens(Event::Tick);
    assert!(matches!(&node.answers()[..], [Answer::Unavailable { .. }]));
    node.happens(Event::Linked { epoch: 8 });
    let again = node.seen().into_iter().filter(|step| matches!(step, Step::Send(Message::Request(_)))).count();
    assert_eq!(again, 1);
}

#[test]
fn a_cancelled_lease_ends_and_an_unknown_one_is_answered_too() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).passes(500).seen();
    let cancel = |lease: &str, now| link::Cancel {
        epoch: 7,
        boottime_ms: now,
        lease: lease.to_owned(),
        reason: "voided".to_owned(),
        order_ttl_ms: 5_000,
    };
    let now = node.now;
    node.happens(Event::Cancel(cancel("l1", now))).happens(Event::Cancel(cancel("nobody", now)));
    let ended = Node::ended(&node.seen());
    assert_eq!(ended[0], ("l1".to_owned(), link::EndKind::Cancelled, 500));
    assert_eq!(ended[1], ("nobody".to_owned(), link::EndKind::Cancelled, 0));
}

/// The order was taken, but its slot still clears: the caller has no answer yet.
#[test]
fn a_lease_that_is_cancelled_before_it_has_a_slot_answers_its_caller() {
    let (mut node, one, two) = (Node::with_cards(1), pod("one"), pod("two"));
    node.runs("l1", &one, 1, XLARGE);
    let ticket = node.asks(&two, 1, None);
    node.happens(Event::Queued(link::Queued { ticket, ..link::Queued::default() }));
    node.releases("l1", &one, false);
    let mut order = node.order("l2", ticket, XLARGE);
    order.after = "l1".to_owned();
    node.happens(Event::Start(order)).seen();
    let reason = "the account is gone".to_owned();
    let cancel = link::Cancel { epoch: 7, boottime_ms: node.now, lease: "l2".to_owned(), reason, order_ttl_ms: 5_000 };
    node.happens(Event::Cancel(cancel));
    assert!(matches!(&node.answers()[..], [Answer::Unavailable { reason }] if reason == "the account is gone"));
}
