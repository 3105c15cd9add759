//! Frozen workers: who gets them back, whom they make room for, and which must go although nobody needs their slot.

use super::*;
use crate::process_status::SignalSet;

/// A frozen worker of [`worker`], with its parent and nothing waiting for it.
fn at_rest() -> ProcessStatus {
    ProcessStatus { parent: 900, pending: SignalSet::default(), ignored: SignalSet::default() }
}

fn pending(signal: libc::c_int) -> ProcessStatus {
    ProcessStatus { pending: SignalSet::of(&[signal]), ..at_rest() }
}

fn clears(steps: &[Step], id: u64) -> bool {
    steps.iter().any(|step| matches!(step, Step::Clear { worker, .. } if worker.cgroup_id == id))
}

#[test]
fn the_same_function_gets_its_idle_worker_back_and_the_clock_runs_from_the_answer() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    let ticket = node.asks(&app, 1, None);
    node.passes(50).starts("l2", ticket, LARGE);
    let steps = node.seen();
    let reuse = steps.iter().position(|step| matches!(step, Step::Reuse { .. }));
    let answer = steps.iter().position(|step| matches!(step, Step::Answer { .. }));
    assert!(reuse < answer, "thawed before it is answered: {steps:?}");
    assert!(matches!(&steps[answer.unwrap()], Step::Answer { answer: Answer::Granted { idle: true, .. }, .. }));
    node.passes(2_000).releases("l2", &app, false);
    assert_eq!(Node::ended(&node.seen()), [("l2".to_owned(), link::EndKind::Released, 2_000)]);
}

#[test]
fn another_function_of_the_same_app_does_not_get_the_idle_worker() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    let ticket = node.asks(&app, 2, None);
    node.starts("l2", ticket, LARGE);
    // The free half is taken; the idle worker keeps its own.
    assert_eq!(node.granted(), (false, 1));
}

#[test]
fn an_idle_worker_that_is_in_the_way_is_killed_and_waited_for() {
    let (mut node, one, two) = (Node::with_cards(1), pod("one"), pod("two"));
    node.runs("l1", &one, 1, LARGE).releases("l1", &one, false).seen();
    let ticket = node.asks(&two, 1, Some(Size::Xlarge));
    node.starts("l2", ticket, XLARGE);
    let steps = node.seen();
    assert!(steps.iter().any(|step| matches!(step, Step::Clear { worker, .. } if worker.cgroup_id == 1)));
    assert!(steps.iter().any(|step| matches!(step, Step::Send(Message::Started(started)) if started.waiting)));
    assert!(!steps.iter().any(|step| matches!(step, Step::Answer { .. })), "not before the memory is back");
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert_eq!(node.granted(), (false, 2));
}

/// Its seconds would be free, and its lease would last twice as long as it may.
#[test]
fn a_reused_worker_that_has_worked_gets_no_successor() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    let ticket = node.asks(&app, 1, None);
    node.starts("l2", ticket, LARGE).passes(500).allows("l2", &app);
    assert!(node.seen().contains(&Step::ReplyAllow { call: 3, reply: Err(AllowRefusal::AlreadyUsed) }), "it lives");
    node.passes(1_501).happens(Event::WorkerExited { cgroup_id: 1 }).allows("l2", &app);
    let steps = node.seen();
    assert!(steps.contains(&Step::ReplyAllow { call: 4, reply: Err(AllowRefusal::TooLate) }), "{steps:?}");
    node.passes(100).releases("l2", &app, true);
    assert_eq!(Node::ended(&node.seen()), [("l2".to_owned(), link::EndKind::Failed, 2_001)]);
}

#[test]
fn an_idle_worker_dead_before_its_reuse_costs_a_new_allow_and_restarts_the_clock() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    let ticket = node.asks(&app, 1, None);
    node.starts("l2", ticket, LARGE).happens(Event::WorkerExited { cgroup_id: 1 });
    node.passes(300).happens(Event::Tick).allows("l2", &app);
    let steps = node.seen();
    assert!(steps.contains(&Step::ReplyAllow { call: 3, reply: Ok(()) }), "{steps:?}");
    node.passes(1_000).releases("l2", &app, false);
    assert_eq!(Node::ended(&node.seen()), [("l2".to_owned(), link::EndKind::Released, 1_000)]);
}

#[test]
fn an_idle_worker_that_dies_gives_its_slot_back() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).happens(Event::WorkerExited { cgroup_id: 1 });
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert_eq!(node.machine.snapshot().book, Book::default());
}

#[test]
fn a_frozen_worker_goes_when_it_is_asked_to_end_or_loses_its_parent_and_stays_otherwise() {
    let worker = worker(1);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        assert_eq!(worker.must_end(&pending(signal)), Some(IdleEnd::AskedToEnd(signal as u32)));
        let ignored = ProcessStatus { ignored: SignalSet::of(&[signal]), ..pending(signal) };
        assert_eq!(worker.must_end(&ignored), None, "it would not act on {signal}");
    }
    for signal in [libc::SIGCHLD, libc::SIGUSR1, libc::SIGALRM, libc::SIGCONT, libc::SIGWINCH] {
        assert_eq!(worker.must_end(&pending(signal)), None, "{signal} asks nobody to end");
    }
    let orphan = ProcessStatus { parent: 899, ..at_rest() };
    assert_eq!(worker.must_end(&orphan), Some(IdleEnd::Orphaned { was: 900, now: 899 }));
    assert_eq!(Worker { parent: None, ..worker }.must_end(&orphan), None, "who forked it is not known");
}

#[test]
fn idle_workers_are_looked_at_while_there_are_any() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    node.happens(Event::Acknowledged(link::Acknowledged { lease: "l1".to_owned(), ended: true, freed: true }));
    assert_eq!(node.machine.next_wake(), Some(node.now + IDLE_LOOK_MS));
    node.passes(IDLE_LOOK_MS - 1).happens(Event::Tick);
    assert_eq!(node.seen(), [], "not before its time");
    for _ in 0..2 {
        node.passes(IDLE_LOOK_MS).happens(Event::Tick);
        assert_eq!(node.seen(), [Step::LookAtIdle { worker: Worker { opened: true, ..worker(1) } }]);
        assert_eq!(node.machine.next_wake(), Some(node.now + IDLE_LOOK_MS));
        node.happens(Event::IdleSeen { cgroup_id: 1, seen: at_rest() });
        assert_eq!(node.seen(), [], "it stays");
    }
    node.happens(Event::WorkerExited { cgroup_id: 1 }).seen();
    assert_eq!(node.machine.next_wake(), None, "nothing is held, nothing is looked at");
}

#[test]
fn an_idle_worker_that_was_asked_to_end_is_killed_frees_its_slot_and_is_not_used_again() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    node.happens(Event::IdleSeen { cgroup_id: 1, seen: pending(libc::SIGTERM) });
    let (steps, why) = (node.seen(), IdleEnd::AskedToEnd(15));
    let [Step::IdleEnds { why: told, .. }, Step::Clear { .. }, Step::Send(Message::Heartbeat(_))] = &steps[..] else {
        panic!("{steps:?}");
    };
    assert_eq!(*told, why);
    let ticket = node.asks(&app, 1, None);
    node.starts("l2", ticket, LARGE);
    assert!(!node.granted().0, "a new worker");
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert!(node.machine.snapshot().book.clearing.is_empty() && node.machine.snapshot().book.idle.is_empty());
    // Told of once more, late.
    node.seen();
    node.happens(Event::IdleSeen { cgroup_id: 1, seen: pending(libc::SIGTERM) });
    assert_eq!(node.seen(), []);
}

#[test]
fn a_look_that_crosses_a_reuse_does_not_take_the_worker_from_under_it() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    let ticket = node.asks(&app, 1, None);
    let order = node.order("l2", ticket, LARGE);
    let steps = node.machine.handle(node.now, Event::Start(order));
    assert!(steps.iter().any(|step| matches!(step, Step::Reuse { .. })));
    let seen = Event::IdleSeen { cgroup_id: 1, seen: pending(libc::SIGTERM) };
    assert!(node.machine.handle(node.now, seen).is_empty());
    // The executor looks before it thaws, and says so: then the worker goes, and the lease gets a fresh one.
    node.happens(Event::ReuseFailed { lease: "l2".to_owned() });
    assert!(clears(&node.seen(), 1));
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert_eq!(node.granted(), (false, 0));
}

fn listed(idle: &[link::IdleWorker]) -> Vec<(&str, u64, u32, link::Size)> {
    idle.iter().map(|idle| (idle.container.as_str(), idle.task_id, idle.card, idle.size())).collect()
}

fn leaving(card: u32, size: link::Size) -> link::IdleWorker {
    link::IdleWorker { card, size: size.into(), leaving: true, ..link::IdleWorker::default() }
}

/// What the broker is told of kept workers, in order: `true` with an end, or the list of all.
fn told(steps: &[Step]) -> Vec<Result<bool, Vec<link::IdleWorker>>> {
    steps
        .iter()
        .filter_map(|step| match step {
            Step::Send(Message::Ended(ended)) => Some(Ok(ended.kept)),
            Step::Send(Message::Heartbeat(heartbeat)) if heartbeat.idle_changed => Some(Err(heartbeat.idle.clone())),
            _ => None,
        })
        .collect()
}

fn joined(node: &mut Node, epoch: u64) -> link::Joined {
    let steps = node.happens(Event::Linked { epoch }).seen();
    let found = steps.iter().find_map(|step| match step {
        Step::Send(Message::Joined(joined)) => Some(joined.clone()),
        _ => None,
    });
    assert_eq!(told(&steps).iter().filter(|told| told.is_err()).count(), 0, "Joined has said it: {steps:?}");
    found.unwrap()
}

#[test]
fn the_broker_hears_of_a_kept_worker_with_the_end_of_its_lease_and_by_the_list_of_all() {
    let (mut node, app) = (Node::with_cards(2), pod("app"));
    node.runs("l1", &app, 7, LARGE).seen();
    let steps = node.releases("l1", &app, false).seen();
    let said = told(&steps);
    let [Ok(true), Err(idle)] = &said[..] else { panic!("{steps:?}") };
    assert_eq!(listed(idle), [("container-app", 7, 0, LARGE)]);
    assert_eq!(idle[0].pod_uid, "uid-app");
    node.runs("l2", &app, 8, XLARGE).seen();
    let steps = node.releases("l2", &app, false).seen();
    let said = told(&steps);
    let [Ok(true), Err(idle)] = &said[..] else { panic!("{steps:?}") };
    assert_eq!(listed(idle), [("container-app", 7, 0, LARGE), ("container-app", 8, 1, XLARGE)]);
    // Told again it says the same.
    let steps = node.passes(REPEAT_MS).happens(Event::Tick).seen();
    assert_eq!(told(&steps), [Ok(true), Ok(true)]);
}

#[test]
fn the_broker_hears_at_once_when_a_kept_worker_is_taken_or_gone() {
    let (mut node, app, other) = (Node::with_cards(1), pod("app"), pod("other"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    let ticket = node.asks(&app, 1, None);
    let steps = node.starts("l2", ticket, LARGE).seen();
    assert_eq!(told(&steps), [Err(Vec::new())], "a lease has it");
    let first = |is: fn(&Message) -> bool| steps.iter().position(|step| matches!(step, Step::Send(said) if is(said)));
    let (list, started) =
        (first(|said| matches!(said, Message::Heartbeat(_))), first(|said| matches!(said, Message::Started(_))));
    assert!(started < list, "it is said to have its slot first: {steps:?}");
    node.releases("l2", &app, false).seen();
    let ticket = node.asks(&other, 1, Some(Size::Xlarge));
    let steps = node.starts("l3", ticket, XLARGE).seen();
    assert_eq!(told(&steps), [Err(vec![leaving(0, LARGE)])], "it makes room");
    let steps = node.happens(Event::Cleared { cgroup_id: 1 }).seen();
    assert_eq!(told(&steps), [Err(Vec::new())], "its slot is clear");
}

/// It was told so and counted on the slot; only then the memory is back.
#[test]
fn the_broker_hears_which_slots_clear_because_a_kept_worker_has_to_go() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).releases("l1", &app, false).seen();
    let steps = node.happens(Event::WorkerExited { cgroup_id: 1 }).seen();
    assert_eq!(told(&steps), [Err(vec![leaving(0, LARGE)])]);
    let steps = node.happens(Event::ClearOverdue { cgroup_id: 1, reason: "memory in use".to_owned() }).seen();
    assert_eq!(told(&steps), [Err(Vec::new())], "the inventory says what has become of it");
    assert!(steps.iter().any(|step| matches!(step, Step::Send(Message::Heartbeat(said)) if said.inventory_changed)));
}

#[test]
fn a_worker_that_is_not_kept_is_not_told_of() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).seen();
    assert_eq!(told(&node.releases("l1", &app, true).seen()), [Ok(false)], "it failed");
    node.runs("l2", &app, 1, LARGE).seen();
    let waits = node.asks(&pod("other"), 1, None);
    node.happens(Event::Queued(link::Queued { ticket: waits, place_number: 1, ..link::Queued::default() })).seen();
    assert_eq!(told(&node.releases("l2", &app, false).seen()), [Ok(false)], "somebody else waits");
}

#[test]
fn a_leader_is_told_of_all_kept_workers_when_it_is_joined() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 7, LARGE).releases("l1", &app, false).seen();
    node.happens(Event::Unlinked);
    assert_eq!(listed(&joined(&mut node, 8).idle), [("container-app", 7, 0, LARGE)]);
    let gone = Event::PodEnding { pod_uid: app.pod.pod_uid.clone() };
    assert_eq!(told(&node.happens(Event::Unlinked).happens(gone).seen()), [], "nobody to tell");
    assert_eq!(joined(&mut node, 9).idle, [leaving(0, LARGE)]);
}

/// It holds memory of a card that is no longer shared out; no call can get it there.
#[test]
fn a_kept_worker_on_a_card_that_is_not_listed_any_more_is_not_told_of() {
    let (mut node, app) = (Node::with_cards(2), pod("app"));
    node.runs("l1", &app, 7, LARGE).releases("l1", &app, false).seen();
    let steps = node.happens(Event::Inventory(vec![card(1)])).seen();
    assert_eq!(told(&steps), [Err(Vec::new())]);
    assert_eq!(joined(&mut node, 8).idle, []);
}
