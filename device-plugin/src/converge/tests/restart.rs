//! What a new process of the agent makes of the leases that it finds in the checkpoint.

use std::collections::BTreeSet;

use super::*;

#[test]
fn a_restarted_agent_takes_live_workers_over_and_ends_what_is_gone() {
    let (mut node, one, two) = (Node::with_cards(2), pod("one"), pod("two"));
    node.runs("l1", &one, 1, LARGE).runs("l2", &two, 1, LARGE);
    let ticket = node.asks(&one, 2, None);
    node.starts("l3", ticket, LARGE);
    let text = serde_json::to_string(&node.machine.snapshot()).unwrap();

    let mut machine = Machine::new("agent-2".to_owned(), 7);
    machine.handle(node.now, Event::Inventory(vec![card(0), card(1)]));
    machine.restore(node.now + 3_000, serde_json::from_str(&text).unwrap(), &BTreeSet::from([1]));
    node.machine = machine;
    node.passes(3_000).seen();
    node.happens(Event::Tick);
    let steps = node.seen();
    assert!(steps.iter().any(|step| matches!(step, Step::Watch { worker } if worker.cgroup_id == 1)));
    assert_eq!(Node::ended(&steps), [("l2".to_owned(), link::EndKind::PlatformFault, 3_000)]);
    // The deadline counts from the recorded start, and an answered client may still come with its /allow.
    node.allows("l3", &one).passes(9_000).happens(Event::Tick);
    assert!(Node::ended(&node.seen()).contains(&("l1".to_owned(), link::EndKind::Deadline, 12_000)));
}

#[test]
fn a_reused_lease_whose_answer_was_lost_with_the_agent_is_voided_when_its_function_asks_again() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false);
    let ticket = node.asks(&app, 1, None);
    node.starts("l2", ticket, LARGE);
    let snapshot = node.machine.snapshot();
    node.machine = Machine::new("agent-2".to_owned(), 7);
    node.machine.restore(node.now, snapshot, &BTreeSet::from([1]));
    node.happens(Event::Inventory(vec![card(0)])).happens(Event::Linked { epoch: 7 }).seen();
    node.asks(&app, 1, None);
    let steps = node.seen();
    assert!(Node::ended(&steps).iter().any(|(lease, kind, _)| lease == "l2" && *kind == link::EndKind::Undelivered));
    let place = |is_it: fn(&Step) -> bool| steps.iter().position(is_it).unwrap();
    let ended = place(|step| matches!(step, Step::Send(Message::Ended(_))));
    let asked = place(|step| matches!(step, Step::Send(Message::Request(_))));
    assert!(ended < asked, "its token may be good for one call: {steps:?}");
}

#[test]
fn after_a_reboot_running_leases_are_platform_faults_and_ended_ones_keep_their_numbers() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).passes(2_500).releases("l1", &app, false).runs("l2", &app, 2, LARGE);
    let snapshot = node.machine.snapshot();
    let mut machine = Machine::new("agent-2".to_owned(), 7);
    machine.restore_lost(10, snapshot, "the node rebooted");
    let mut steps: Vec<Step> = machine.handle(10, Event::Tick).into();
    steps.extend(machine.handle(20, Event::Linked { epoch: 7 }));
    let ended = Node::ended(&steps);
    assert!(ended.contains(&("l1".to_owned(), link::EndKind::Released, 2_500)), "{ended:?}");
    assert!(ended.contains(&("l2".to_owned(), link::EndKind::PlatformFault, 0)), "{ended:?}");
    assert_eq!(machine.snapshot().book, Book::default());
}

#[test]
fn a_worker_that_is_kept_by_a_new_agent_is_watched_in_its_next_lease_too() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).passes(1_000);
    // The agent dies behind its checkpoint, before it has shut the gate.
    let release = Event::Release { call: 9, pod_uid: "uid-app".to_owned(), token: "l1".to_owned(), fail: false };
    node.machine.handle(node.now, release);
    let snapshot = node.machine.snapshot();
    node.machine = Machine::new("agent-1".to_owned(), 7);
    node.machine.restore(node.now, snapshot, &BTreeSet::from([1]));
    node.happens(Event::Inventory(vec![card(0)]));
    let steps = node.seen();
    assert_eq!(Node::ended(&steps), [("l1".to_owned(), link::EndKind::Released, 1_000)]);
    let held = steps.iter().position(|step| matches!(step, Step::Hold { worker, .. } if worker.cgroup_id == 1));
    let watched = steps.iter().position(|step| matches!(step, Step::Watch { worker } if worker.cgroup_id == 1));
    assert!(held.is_some() && watched.is_some(), "{steps:?}");
    // The same function calls again, and its worker dies in mid lease.
    let ticket = node.asks(&app, 1, None);
    node.starts("l2", ticket, LARGE).passes(2_000).happens(Event::WorkerExited { cgroup_id: 1 });
    node.passes(5_000).happens(Event::Tick);
    assert!(Node::ended(&node.seen()).contains(&("l2".to_owned(), link::EndKind::WorkerDied, 2_000)));
}
