//! What a lease is charged: from `/allow` to its end, whoever brings that about.

use super::*;

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
fn what_happens_within_one_millisecond_is_told_in_its_order() {
    for (before, after) in [(0, 0), (0, 300), (300, 0)] {
        let (mut node, app) = (Node::with_cards(1), pod("app"));
        // The gate says that the card was opened at 1500 ms.
        node.now = 1_500 - before;
        node.runs("l1", &app, 1, LARGE).passes(before + after).releases("l1", &app, false);
        let steps = node.seen();
        let ended = steps.iter().find_map(|step| match step {
            Step::Send(Message::Ended(ended)) => Some(ended),
            _ => None,
        });
        let names: Vec<&str> = ended.unwrap().boundaries.iter().map(|boundary| boundary.name.as_str()).collect();
        assert_eq!(names, ["Assigned", "Allowed", "DeviceOpened", "Released", "GateClosed"], "{before} {after}");
    }
}
