//! Requests that wait across leaders (L17), and leases that wait for a slot and get none in time (L9).

use super::*;

/// What the broker says to a request that waits for the node.
fn place(ticket: u64, epoch: u64, number: u64, latest_start_ms: u64) -> Event {
    let (place_epoch, place_number) = (epoch, number);
    Event::Queued(link::Queued { ticket, place_epoch, place_number, latest_start_ms, ..link::Queued::default() })
}

impl Node {
    fn requests(&mut self) -> Vec<link::Request> {
        let requests = self.seen().into_iter().filter_map(|step| match step {
            Step::Send(Message::Request(request)) => Some(request),
            _ => None,
        });
        requests.collect()
    }

    /// `l1` had the whole card, which clears; `l2` waits for it, and its request is the fifth of the term.
    fn waits_for_a_slot(wait_limit_ms: u64) -> (Self, u64) {
        let (mut node, one, two) = (Self::with_cards(1), pod("one"), pod("two"));
        node.runs("l1", &one, 1, XLARGE);
        let ticket = node.asks(&two, 1, Some(Size::Xlarge));
        node.happens(place(ticket, 7, 5, 60_000)).releases("l1", &one, true);
        let mut order = node.order("l2", ticket, XLARGE);
        (order.after, order.wait_limit_ms) = ("l1".to_owned(), wait_limit_ms);
        node.happens(Event::Start(order));
        let acknowledged = link::Acknowledged { lease: "l1".to_owned(), ended: true, freed: false };
        node.happens(Event::Acknowledged(acknowledged));
        (node, ticket)
    }
}

fn waiting(steps: &[Step]) -> Vec<(bool, bool, u32)> {
    let started = steps.iter().filter_map(|step| match step {
        Step::Send(Message::Started(started)) => Some((started.waiting, started.slot_picked, started.card)),
        _ => None,
    });
    started.collect()
}

#[test]
fn a_request_presents_its_place_and_what_it_was_promised_to_the_next_leader() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let ticket = node.asks(&app, 1, None);
    let first = node.requests().remove(0);
    assert_eq!((first.place_number, first.promised_ms), (0, 0), "nobody has told it anything");
    node.happens(place(ticket, 7, 5, 60_000)).passes(4_000).happens(Event::Unlinked).passes(1_000);
    node.happens(Event::Linked { epoch: 8 });
    let again = node.requests().remove(0);
    assert_eq!((again.ticket, again.place_epoch, again.place_number), (ticket, 7, 5));
    assert_eq!((again.promised_ms, again.promised_ago_ms), (60_000, 5_000));
}

#[test]
fn what_waits_for_its_account_was_promised_nothing_and_keeps_its_place() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let ticket = node.asks(&app, 1, None);
    node.happens(place(ticket, 7, 5, 60_000)).happens(place(ticket, 7, 5, 0)).seen();
    node.happens(Event::Unlinked).happens(Event::Linked { epoch: 8 });
    let again = node.requests().remove(0);
    assert_eq!((again.place_number, again.promised_ms, again.promised_ago_ms), (5, 0, 0));
}

#[test]
fn with_fewer_slots_than_when_it_was_made_no_promise_is_presented() {
    let (mut node, app) = (Node::with_cards(2), pod("app"));
    let ticket = node.asks(&app, 1, None);
    node.happens(place(ticket, 7, 5, 60_000)).happens(Event::Unlinked);
    node.happens(Event::Inventory(vec![card(0), Card { grantable: false, ..card(1) }])).seen();
    node.happens(Event::Linked { epoch: 8 });
    let again = node.requests().remove(0);
    assert_eq!((again.place_epoch, again.place_number, again.promised_ms), (7, 5, 0));
}

/// A leader may start a request as soon as it has heard of it, so its elders must be there by then. Tickets do not tell: who
/// waited for an account to be made, or was refused an order, has a later place or an earlier one.
#[test]
fn requests_are_presented_in_the_order_of_their_places() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let tickets = [1, 2, 3, 4].map(|task| node.asks(&app, task, None));
    node.happens(place(tickets[0], 7, 9, 1)).happens(place(tickets[2], 6, 11, 1)).happens(place(tickets[3], 7, 8, 1));
    node.seen();
    node.happens(Event::Unlinked).happens(Event::Linked { epoch: 8 });
    let order: Vec<u64> = node.requests().iter().map(|request| request.ticket).collect();
    assert_eq!(order, [tickets[2], tickets[3], tickets[0], tickets[1]], "who has no place comes last");
}

#[test]
fn the_request_of_an_order_of_an_earlier_term_is_presented_behind_its_refusal() {
    let (mut node, ticket) = Node::waits_for_a_slot(10_000);
    node.happens(Event::Unlinked).happens(Event::Linked { epoch: 8 }).seen();
    node.happens(Event::ClearOverdue { cgroup_id: 1, reason: "memory stays".to_owned() });
    let steps = node.seen();
    let refused = steps.iter().position(|step| matches!(step, Step::Send(Message::Refused(_))));
    let request = steps.iter().position(|step| {
        matches!(step, Step::Send(Message::Request(request)) if (request.ticket, request.place_number) == (ticket, 5))
    });
    assert!(refused.is_some() && refused < request, "the leader of now has never heard of it: {steps:?}");
    let promised = steps.iter().find_map(|step| match step {
        Step::Send(Message::Request(request)) => Some(request.promised_ms),
        _ => None,
    });
    assert_eq!(promised, Some(0), "the promise counted on the slot that is lost");
}

/// Its own leader returns it to its place, and counts how often.
#[test]
fn the_request_of_an_order_of_this_term_is_not_presented_twice() {
    let (mut node, _) = Node::waits_for_a_slot(10_000);
    node.seen();
    node.happens(Event::ClearOverdue { cgroup_id: 1, reason: "memory stays".to_owned() });
    let steps = node.seen();
    assert_eq!(Node::refused(&steps).len(), 1);
    assert!(!steps.iter().any(|step| matches!(step, Step::Send(Message::Request(_)))), "{steps:?}");
}

/// There is nobody to refuse it to: the request waits for the next leader, and not for ever.
#[test]
fn what_is_refused_without_a_leader_waits_for_the_next_one_and_not_longer_than_others() {
    let refused = || {
        let (mut node, ticket) = Node::waits_for_a_slot(10_000);
        node.happens(Event::Unlinked).happens(Event::ClearOverdue { cgroup_id: 1, reason: "stuck".to_owned() }).seen();
        (node, ticket)
    };
    let (mut node, ticket) = refused();
    node.happens(Event::Linked { epoch: 8 });
    assert_eq!(node.requests().iter().map(|request| request.ticket).collect::<Vec<_>>(), [ticket]);
    let (mut node, _) = refused();
    node.passes(FAILOVER_WAIT_MS).happens(Event::Tick);
    assert!(matches!(&node.answers()[..], [Answer::Unavailable { .. }]));
}

/// The broker gives it up from then on: it must not begin, however long the node stood still (L9).
#[test]
fn a_lease_that_has_waited_too_long_for_its_slot_does_not_begin() {
    let (mut node, ticket) = Node::waits_for_a_slot(10_000);
    node.seen();
    assert_eq!(node.machine.next_wake(), Some(node.now + 15_001));
    node.passes(15_000).happens(Event::Tick);
    assert_eq!(Node::refused(&node.seen()), Vec::<String>::new());
    node.passes(1).happens(Event::Tick);
    let steps = node.seen();
    assert_eq!(Node::refused(&steps), ["no slot for it was clear within 15000 ms of its order"]);
    assert_eq!(Node::ended(&steps), [], "it never was, so there is no end to settle");
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert_eq!(node.answers(), [], "and the slot that comes back later is not its own");
    // The request is with the broker again, under its old ticket.
    node.starts("l3", ticket, XLARGE);
    assert_eq!(node.granted(), (false, 2));
}

/// What reaches a node that stood still comes in any order: the slot is clear before any timer was looked at.
#[test]
fn a_slot_that_is_clear_too_late_begins_nothing() {
    let (mut node, _) = Node::waits_for_a_slot(10_000);
    node.passes(15_001).seen();
    node.happens(Event::Cleared { cgroup_id: 1 });
    let steps = node.seen();
    assert_eq!(Node::refused(&steps).len(), 1, "{steps:?}");
    assert!(!steps.iter().any(|step| matches!(step, Step::Answer { .. })), "{steps:?}");
}

#[test]
fn a_node_that_stood_still_joins_without_the_lease_and_presents_its_request() {
    let (mut node, ticket) = Node::waits_for_a_slot(10_000);
    node.happens(Event::Unlinked).passes(60_000).seen();
    node.happens(Event::Linked { epoch: 7 });
    let steps = node.seen();
    let Some(Step::Send(Message::Joined(joined))) = steps.first() else { panic!("Joined comes first: {steps:?}") };
    assert_eq!(joined.leases.iter().map(|lease| lease.lease.as_str()).collect::<Vec<_>>(), ["l1"]);
    let presented = |step: &Step| matches!(step, Step::Send(Message::Request(request)) if request.ticket == ticket);
    assert_eq!(steps.iter().filter(|step| presented(step)).count(), 1, "{steps:?}");
}

#[test]
fn an_order_that_waits_for_an_idle_worker_to_go_has_the_same_limit() {
    let (mut node, one, two) = (Node::with_cards(1), pod("one"), pod("two"));
    node.runs("l1", &one, 1, LARGE).releases("l1", &one, false);
    let ticket = node.asks(&two, 1, Some(Size::Xlarge));
    node.starts("l2", ticket, XLARGE).seen();
    node.passes(5_001).happens(Event::Tick);
    assert_eq!(Node::refused(&node.seen()).len(), 1, "the broker counted with no wait beyond order_ttl");
}

/// The broker predicts the slots of others from it (L7).
#[test]
fn where_a_lease_waits_is_told_and_told_again_when_that_changes() {
    let (mut node, apps) = (Node::with_cards(2), ["one", "two", "three"].map(pod));
    node.runs("l1", &apps[0], 1, XLARGE).runs("l2", &apps[1], 1, XLARGE).releases("l2", &apps[1], true);
    let ticket = node.asks(&apps[2], 1, Some(Size::Xlarge));
    let mut order = node.order("l3", ticket, XLARGE);
    (order.after, order.wait_limit_ms) = ("l2".to_owned(), 10_000);
    node.seen();
    node.happens(Event::Start(order));
    assert_eq!(waiting(&node.seen()), [(true, true, 1)], "the second card clears");
    node.releases("l1", &apps[0], true).seen();
    node.happens(Event::ClearOverdue { cgroup_id: 2, reason: "stuck".to_owned() });
    assert_eq!(waiting(&node.seen()), [(true, true, 0)], "that one is out of use, and the first clears");
    node.happens(Event::Unlinked).happens(Event::Linked { epoch: 8 });
    let joined = node.seen().into_iter().find_map(|step| match step {
        Step::Send(Message::Joined(joined)) => Some(joined.leases),
        _ => None,
    });
    let told: Vec<(bool, bool, u32)> = joined
        .unwrap()
        .iter()
        .filter(|lease| lease.lease == "l3")
        .map(|lease| (lease.waiting, lease.slot_picked, lease.card))
        .collect();
    assert_eq!(told, [(true, true, 0)]);
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert_eq!(waiting(&node.seen()), [(false, true, 0)]);
}
