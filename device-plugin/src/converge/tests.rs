//! Stories of leases on one node, told to the machine without any hardware.

mod idle;
mod places;

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::*;
use crate::gate::{Device, FirstOpen};
use link::node_message::Message;

/// A node with one card of two halves, a broker that leads epoch 7, and a clock that the test moves.
struct Node {
    machine: Machine,
    now: u64,
    tickets: u64,
    calls: u64,
    cgroups: u64,
    steps: Vec<Step>,
}

fn pod(name: &str) -> Caller {
    let pod = SpacePod { pod_uid: format!("uid-{name}"), space: name.to_owned(), ..SpacePod::default() };
    Caller { pod, container: format!("container-{name}") }
}

/// This many, the first at 1500 ms.
fn opens(count: u64) -> Opens {
    let first = FirstOpen { at_ms: 1_500, device: Device { major: 195, minor: 255 } };
    Opens { count, first: (count > 0).then_some(first) }
}

fn card(index: u32) -> Card {
    Card {
        index,
        uuid: format!("GPU-{index}"),
        model: "NVIDIA H200".to_owned(),
        large_slots: 2,
        grantable: true,
        fault: None,
    }
}

impl Node {
    fn with_cards(count: u32) -> Self {
        let mut machine = Machine::new("agent-1".to_owned(), 0);
        machine.handle(1_000, Event::Inventory((0..count).map(card).collect()));
        let mut node = Self { machine, now: 1_000, tickets: 0, calls: 0, cgroups: 0, steps: Vec::new() };
        node.happens(Event::Linked { epoch: 7 });
        node
    }

    /// Takes an event in and plays the executor: hardware works at once, except that nothing clears by itself.
    fn happens(&mut self, event: Event) -> &mut Self {
        let mut open = self.machine.handle(self.now, event);
        while let Some(step) = open.pop_front() {
            self.steps.push(step.clone());
            let result = match step {
                Step::Admit { lease, .. } => {
                    self.cgroups += 1;
                    Some(Event::Admitted { lease, worker: worker(self.cgroups) })
                }
                Step::Reuse { lease, .. } => Some(Event::Reused { lease }),
                Step::CloseGate { lease, .. } => Some(Event::GateClosed { lease, opens: opens(3) }),
                _ => None,
            };
            open.extend(result.into_iter().flat_map(|event| self.machine.handle(self.now, event)));
        }
        assert_eq!(self.machine.snapshot().sound(), Ok(()));
        self
    }

    fn passes(&mut self, ms: u64) -> &mut Self {
        self.now += ms;
        self
    }

    fn asks(&mut self, caller: &Caller, task: u64, size: Option<Size>) -> u64 {
        self.tickets += 1;
        let ticket = self.tickets;
        let caller = caller.clone();
        self.happens(Event::Scheduled { ticket, caller, task, size, declared_ms: 10_000, token: None });
        ticket
    }

    fn order(&self, lease: &str, ticket: u64, size: link::Size) -> link::Start {
        link::Start {
            epoch: 7,
            boottime_ms: self.now,
            lease: lease.to_owned(),
            ticket,
            agent_instance: "agent-1".to_owned(),
            size: size.into(),
            declared_ms: 10_000,
            grace_ms: 2_000,
            allow_limit_ms: 30_000,
            clear_limit_ms: 10_000,
            order_ttl_ms: 5_000,
            ..link::Start::default()
        }
    }

    fn starts(&mut self, lease: &str, ticket: u64, size: link::Size) -> &mut Self {
        let order = self.order(lease, ticket, size);
        self.happens(Event::Start(order))
    }

    fn allows(&mut self, lease: &str, caller: &Caller) -> &mut Self {
        self.calls += 1;
        let (call, pod_uid) = (self.calls, caller.pod.pod_uid.clone());
        self.happens(Event::Allow { call, pod_uid, token: lease.to_owned(), pid: 42 })
    }

    fn releases(&mut self, lease: &str, caller: &Caller, fail: bool) -> &mut Self {
        self.calls += 1;
        let (call, pod_uid) = (self.calls, caller.pod.pod_uid.clone());
        self.happens(Event::Release { call, pod_uid, token: lease.to_owned(), fail })
    }

    /// From request to running clock.
    fn runs(&mut self, lease: &str, caller: &Caller, task: u64, size: link::Size) -> &mut Self {
        let named = if size == link::Size::Xlarge { Size::Xlarge } else { Size::Large };
        let ticket = self.asks(caller, task, Some(named));
        self.starts(lease, ticket, size).allows(lease, caller)
    }

    /// What was done since the last look.
    fn seen(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    fn answers(&mut self) -> Vec<Answer> {
        self.seen()
            .into_iter()
            .filter_map(|step| match step {
                Step::Answer { answer, .. } => Some(answer),
                _ => None,
            })
            .collect()
    }

    fn ended(steps: &[Step]) -> Vec<(String, link::EndKind, u64)> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Send(Message::Ended(ended)) => Some((ended.lease.clone(), ended.kind(), ended.used_ms)),
                _ => None,
            })
            .collect()
    }

    fn freed(steps: &[Step]) -> Vec<(String, link::FreedKind)> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Send(Message::Freed(freed)) => Some((freed.lease.clone(), freed.kind())),
                _ => None,
            })
            .collect()
    }

    fn refused(steps: &[Step]) -> Vec<String> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Send(Message::Refused(refused)) => Some(refused.reason.clone()),
                _ => None,
            })
            .collect()
    }

    fn granted(&mut self) -> (bool, u32) {
        match self.answers().pop() {
            Some(Answer::Granted { idle, nvidia_index, .. }) => (idle, nvidia_index),
            other => panic!("no grant: {other:?}"),
        }
    }
}

fn worker(cgroup_id: u64) -> Worker {
    let cgroup = PathBuf::from(format!("/pods/lease-{cgroup_id}"));
    Worker { pid: 1_000 + cgroup_id as u32, start_ticks: 5, cgroup, cgroup_id, parent: Some(900), opened: false }
}

const LARGE: link::Size = link::Size::Large;
const XLARGE: link::Size = link::Size::Xlarge;

#[test]
fn a_lease_is_charged_from_allow_to_release_and_its_worker_is_kept_frozen() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let ticket = node.asks(&app, 1, None);
    node.passes(5).starts("l1", ticket, LARGE);
    let assigned = node.seen();
    let is_none = |started: &link::Started| started.isolation == spaceport_crds::Isolation::None.as_str();
    assert!(assigned.iter().any(|step| matches!(step, Step::Send(Message::Started(started)) if is_none(started))));
    node.passes(400).allows("l1", &app).passes(5_000).seen();
    node.releases("l1", &app, false);
    let steps = node.seen();
    assert!(steps.contains(&Step::ReplyRelease { call: 2, reply: Released::Ended }));
    assert!(steps.iter().any(|step| matches!(step, Step::Hold { .. })));
    assert_eq!(Node::ended(&steps), [("l1".to_owned(), link::EndKind::Released, 5_000)]);
    assert_eq!(Node::freed(&steps), [("l1".to_owned(), link::FreedKind::Held)]);
    let boundaries = steps.iter().find_map(|step| match step {
        Step::Send(Message::Ended(ended)) => Some(ended.boundaries.iter()),
        _ => None,
    });
    let lines: Vec<(&str, u64)> =
        boundaries.unwrap().map(|boundary| (boundary.name.as_str(), boundary.ago_ms)).collect();
    // The gate's count comes last and tells of a time before.
    let expected =
        [("Assigned", 5_400), ("Allowed", 5_000), ("DeviceOpened", 4_905), ("Released", 0), ("GateClosed", 0)];
    assert_eq!(lines, expected);
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

#[test]
fn a_failed_function_gets_its_worker_killed_and_its_slot_back_when_it_is_gone() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).passes(700).releases("l1", &app, true);
    let steps = node.seen();
    assert_eq!(Node::ended(&steps), [("l1".to_owned(), link::EndKind::Failed, 700)]);
    assert_eq!(Node::freed(&steps), []);
    node.happens(Event::Cleared { cgroup_id: 1 });
    assert_eq!(Node::freed(&node.seen()), [("l1".to_owned(), link::FreedKind::Free)]);
}

#[test]
fn a_failure_that_never_opened_the_device_is_reported_as_such() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).seen();
    node.machine.handle(
        node.now,
        Event::Release { call: 9, pod_uid: app.pod.pod_uid.clone(), token: "l1".to_owned(), fail: true },
    );
    let steps: Vec<Step> =
        node.machine.handle(node.now, Event::GateClosed { lease: "l1".to_owned(), opens: opens(0) }).into();
    assert_eq!(Node::ended(&steps)[0].1, link::EndKind::NoDevice);
}

#[test]
fn allow_that_never_comes_costs_nothing_and_gives_the_slot_back_at_its_limit() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let ticket = node.asks(&app, 1, None);
    node.starts("l1", ticket, LARGE);
    assert_eq!(node.machine.next_wake(), Some(node.now + 30_000));
    node.passes(29_999).happens(Event::Tick).passes(1).seen();
    node.happens(Event::Tick);
    let steps = node.seen();
    assert_eq!(Node::ended(&steps), [("l1".to_owned(), link::EndKind::NeverAllowed, 0)]);
    assert_eq!(Node::freed(&steps), [("l1".to_owned(), link::FreedKind::Free)]);
    // The race of docs/rules.md: the worker's /allow loses, and finds nothing.
    node.allows("l1", &app);
    assert!(node.seen().contains(&Step::ReplyAllow { call: 1, reply: Err(AllowRefusal::TooLate) }));
}

#[test]
fn the_deadline_kills_at_declared_plus_grace() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).seen();
    node.passes(11_999).happens(Event::Tick);
    assert_eq!(node.seen(), []);
    node.passes(1).happens(Event::Tick);
    let steps = node.seen();
    assert_eq!(Node::ended(&steps), [("l1".to_owned(), link::EndKind::Deadline, 12_000)]);
    assert!(steps.iter().any(|step| matches!(step, Step::Clear { .. })));
}

#[test]
fn a_worker_that_dies_is_charged_until_its_death_whoever_reports_it() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    node.runs("l1", &app, 1, LARGE).passes(1_000).happens(Event::WorkerExited { cgroup_id: 1 }).seen();
    node.passes(60).releases("l1", &app, true);
    assert_eq!(Node::ended(&node.seen()), [("l1".to_owned(), link::EndKind::Failed, 1_000)]);

    let mut node = Node::with_cards(1);
    node.runs("l1", &app, 1, LARGE).passes(1_000).happens(Event::WorkerExited { cgroup_id: 1 }).seen();
    node.passes(DEATH_GRACE_MS).happens(Event::Tick);
    assert_eq!(Node::ended(&node.seen()), [("l1".to_owned(), link::EndKind::WorkerDied, 1_000)]);
    node.releases("l1", &app, true);
    assert_eq!(node.seen(), [Step::ReplyRelease { call: 2, reply: Released::Unknown }], "settled once");
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
fn tokens_of_another_pod_and_replayed_tokens_open_nothing() {
    let (mut node, app, thief) = (Node::with_cards(1), pod("app"), pod("thief"));
    let ticket = node.asks(&app, 1, None);
    node.starts("l1", ticket, LARGE).allows("l1", &thief).releases("l1", &thief, false);
    let steps = node.seen();
    assert!(steps.contains(&Step::ReplyAllow { call: 1, reply: Err(AllowRefusal::UnknownToken) }));
    assert!(steps.contains(&Step::ReplyRelease { call: 2, reply: Released::Unknown }));
    node.allows("l1", &app).allows("l1", &app);
    let steps = node.seen();
    assert!(steps.contains(&Step::ReplyAllow { call: 3, reply: Ok(()) }));
    assert!(steps.contains(&Step::ReplyAllow { call: 4, reply: Err(AllowRefusal::AlreadyUsed) }));
}

#[test]
fn a_refused_pid_leaves_the_lease_waiting_under_its_old_limit() {
    let (mut node, app) = (Node::with_cards(1), pod("app"));
    let ticket = node.asks(&app, 1, None);
    node.starts("l1", ticket, LARGE).passes(10_000);
    let uid = app.pod.pod_uid.clone();
    node.machine.handle(node.now, Event::Allow { call: 1, pod_uid: uid, token: "l1".to_owned(), pid: 1 });
    let refusal = AllowRefusal::InitProcess;
    let steps = node.machine.handle(node.now, Event::AdmitRefused { lease: "l1".to_owned(), refusal });
    assert_eq!(Vec::from(steps), [Step::ReplyAllow { call: 1, reply: Err(refusal) }]);
    assert_eq!(node.machine.next_wake(), Some(31_000));
}

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

#[test]
fn a_failure_just_after_the_neighbour_was_killed_is_the_platforms() {
    for (after_ms, kind) in [(NEIGHBOUR_MS, link::EndKind::PlatformFault), (NEIGHBOUR_MS + 1, link::EndKind::Failed)] {
        let (mut node, one, two) = (Node::with_cards(1), pod("one"), pod("two"));
        node.runs("l1", &one, 1, LARGE).passes(3_000).runs("l2", &two, 1, LARGE);
        let message = "too much".to_owned();
        node.happens(Event::Breach { cgroup_id: 1, message }).passes(after_ms).seen();
        node.releases("l2", &two, true);
        assert_eq!(Node::ended(&node.seen())[0].1, kind);
    }
}

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
    node.happens(Event::Inventory(vec![card(0)])).seen();
    node.asks(&app, 1, None);
    assert!(
        Node::ended(&node.seen()).iter().any(|(lease, kind, _)| lease == "l2" && *kind == link::EndKind::Undelivered)
    );
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
