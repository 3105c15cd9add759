//! What the queue of each node holds, and who is found in it.

use super::*;

fn waiting(place: u64, node: &str, account: &str) -> Waiting {
    Waiting {
        ticket: Ticket { agent_instance: node.into(), number: place },
        place,
        node: NodeName::new(node),
        account: AccountName::new(account),
        cookie: None,
        space: SpaceKey::new("n", "s", "u"),
        revision: Revision(1),
        worker: WorkerKey::new("pod", "container", 1),
        demand: Demand { size: Size::Large, weight: 1, declared_ms: 10, duration_factor_percent: 100, shortened: None },
        turn: Turn { class: Priority::Medium, key: 10, expected_ms: 10, held_ms: 10, slots: 1 },
        caller: CallerClass::Regular,
        budget: None,
        via: "token".into(),
        since: LedgerTime(0),
        arrived: Steady(0),
        attempts: 0,
        told: None,
        promise: None,
        waits_for: WaitsFor::Node,
        lease: None,
        unconfirmed: None,
    }
}

fn insert(queue: &mut Queue, waiting: impl Into<Arc<Waiting>>) {
    queue.insert(waiting.into(), LaneSettings::default());
}

#[test]
fn a_request_returns_to_its_place() {
    let mut queue = Queue::default();
    for place in 1..=3 {
        insert(&mut queue, waiting(place, "a", "bob"));
    }
    insert(&mut queue, waiting(4, "b", "bob"));
    let first = queue.remove(&waiting(1, "a", "bob").ticket).unwrap();
    insert(&mut queue, first.clone());
    insert(&mut queue, Waiting { place: 9, ..Waiting::clone(&first) });
    let node = NodeName::new("a");
    assert_eq!(queue.line(&node).map(|waiting| waiting.place).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!((queue.len(), queue.needed(&AccountName::new("bob"), None).account_ms), (4, 40));
}

#[test]
fn bounds_name_whose_queue_is_full() {
    let mut queue = Queue::default();
    let bounds = QueueBounds { node: 3, space: 2, account: 1 };
    let full = |queue: &Queue, account| {
        let sample = waiting(0, "a", account);
        queue.full(&sample.node, &sample.space, &sample.account, &bounds)
    };
    assert_eq!(full(&queue, "bob"), None);
    insert(&mut queue, waiting(1, "a", "bob"));
    assert_eq!(full(&queue, "bob"), Some((QueueOf::Account, 1)));
    assert_eq!(full(&queue, "eve"), None);
    insert(&mut queue, waiting(2, "a", "eve"));
    assert_eq!(full(&queue, "joe"), Some((QueueOf::Space, 2)));
    queue.remove(&waiting(1, "a", "bob").ticket);
    queue.remove(&waiting(2, "a", "eve").ticket);
    assert_eq!(queue, Queue::default());
}

/// Whoever is next on a node with room for a half.
fn next(queue: &Queue) -> Option<u64> {
    let room = Room { large: true, ..Room::default() };
    match queue.lanes(&NodeName::new("a"))?.next(&room, &[])? {
        Choice::Start { place, .. } => Some(place),
        Choice::Reserve { .. } => None,
    }
}

#[test]
fn a_parked_request_is_passed_until_its_account_changes() {
    let mut queue = Queue::default();
    insert(&mut queue, waiting(1, "a", "bob"));
    insert(&mut queue, waiting(2, "a", "eve"));
    queue.park(&waiting(1, "a", "bob").ticket, WaitsFor::Account);
    assert_eq!((next(&queue), queue.len()), (Some(2), 2));
    assert_eq!(queue.parked_accounts().collect::<Vec<_>>(), [&AccountName::new("bob")]);
    queue.unpark(&AccountName::new("eve"), |_| true);
    assert_eq!(next(&queue), Some(2));
    assert_eq!(queue.parked_on(&AccountName::new("bob")).count(), 1);
    queue.unpark(&AccountName::new("bob"), |_| true);
    assert_eq!((next(&queue), queue.parked_accounts().count()), (Some(1), 0));
}

#[test]
fn what_it_waits_for_is_told_when_that_changes() {
    let mut queue = Queue::default();
    let first = waiting(1, "a", "bob");
    let untold = |queue: &Queue| queue.untold().count();
    let tell = |queue: &mut Queue| queue.announce(&first.ticket, &LeaseId::new("7"), None);
    insert(&mut queue, first.clone());
    tell(&mut queue);
    queue.park(&first.ticket, WaitsFor::Account);
    assert_eq!(untold(&queue), 1);
    tell(&mut queue);
    queue.unpark(&first.account, |_| true);
    queue.park(&first.ticket, WaitsFor::Account);
    assert_eq!(untold(&queue), 0, "it waits for what it was told");
    queue.unpark(&first.account, |_| true);
    assert_eq!(untold(&queue), 1);
    tell(&mut queue);
    queue.withdraw_promises(&first.node);
    assert_eq!(untold(&queue), 1);
}

#[test]
fn who_is_not_confirmed_is_passed_and_told_anew_afterwards() {
    let mut queue = Queue::default();
    let first = waiting(1, "a", "bob");
    insert(&mut queue, first.clone());
    insert(&mut queue, waiting(2, "b", "bob"));
    queue.announce(&first.ticket, &LeaseId::new("7"), None);
    assert_eq!(queue.untold().map(|waiting| waiting.place).collect::<Vec<_>>(), [2]);
    queue.unconfirm(&first.node, Steady(5));
    assert_eq!((next(&queue), queue.untold().count()), (None, 1));
    queue.park(&first.ticket, WaitsFor::Account);
    queue.confirm(&first.ticket);
    assert_eq!((next(&queue), queue.untold().count()), (None, 2), "it waits for its account still");
    queue.unpark(&AccountName::new("bob"), |_| true);
    assert_eq!(next(&queue), Some(1));
    queue.start(&first.ticket);
    queue.remove(&waiting(2, "b", "bob").ticket);
    assert_eq!(queue, Queue::default());
}

#[test]
fn who_could_use_a_kept_worker_is_found_by_it_while_it_is_ready() {
    let mut queue = Queue::default();
    let key = WorkerKey::new("pod", "container", 1).unwrap();
    let node = NodeName::new("a");
    let ready = |queue: &Queue, size| queue.ready_for(&node, &key, size);
    let dear = Waiting { turn: Turn { key: 20, ..waiting(1, "a", "eve").turn }, ..waiting(1, "a", "eve") };
    insert(&mut queue, dear);
    insert(&mut queue, waiting(2, "a", "bob"));
    insert(&mut queue, Waiting { worker: WorkerKey::new("pod", "container", 2), ..waiting(3, "a", "ann") });
    insert(&mut queue, Waiting { worker: None, ..waiting(4, "a", "joe") });
    insert(&mut queue, waiting(5, "b", "joe"));
    assert_eq!((ready(&queue, Size::Large), ready(&queue, Size::Xlarge)), (Some(2), None));
    queue.park(&waiting(2, "a", "bob").ticket, WaitsFor::Account);
    assert_eq!(ready(&queue, Size::Large), Some(1), "it waits for its account");
    queue.unpark(&AccountName::new("bob"), |_| true);
    assert_eq!(ready(&queue, Size::Large), Some(2));
    queue.start(&waiting(2, "a", "bob").ticket);
    queue.unconfirm(&node, Steady(5));
    assert_eq!(ready(&queue, Size::Large), None, "its agent has not presented it");
    queue.confirm(&waiting(1, "a", "eve").ticket);
    assert_eq!(ready(&queue, Size::Large), Some(1));
    for (place, node, account) in [(1, "a", "eve"), (3, "a", "ann"), (4, "a", "joe"), (5, "b", "joe")] {
        queue.remove(&waiting(place, node, account).ticket);
    }
    assert_eq!(queue, Queue::default());
}
