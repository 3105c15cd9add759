//! Receipts on the API server.

use std::time::Duration;

use spaceport_core::ids::{AccountName, Epoch, LeaseId, LedgerTime, NodeName, Size, SpaceKey, Ticket};
use spaceport_core::lease::Place;
use spaceport_core::page::{Closed, Ending, Hold, Part, Source};
use spaceport_core::protocol::CallerClass;
use spaceport_core::queue::WaitsFor;
use spaceport_crds::{GPULease, LeasePhase};
use spaceport_operator::ledger::pressure::PressureGauge;
use spaceport_operator::ledger::receipt::{
    self, Crossing, LeaseEnd, LeaseRecord, Progress, ReceiptEvent, Receipts, Standing,
};
use spaceport_operator::ledger::retention::{self, Retention};
use spaceport_operator::metrics::Metrics;
use spaceport_shell::error_chain;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{connect, fresh, namespace, next, wait_for};

const AT: LedgerTime = LedgerTime(1_800_000_000_000);

fn hold(namespace: &str) -> Hold {
    Hold {
        cookie: None,
        shortened: None,
        budget: None,
        lease: LeaseId::new(format!("01jd8x000000000000{:08x}", rand::random::<u32>())),
        space: SpaceKey::new(namespace, "hello", "u"),
        parts: vec![Part { source: Source::Window(AT), ms: 10_000 }],
        node: NodeName::new("gpu-1"),
        avoid: Vec::new(),
        size: Size::Large,
        weight: 1,
        declared_ms: 10_000,
        epoch: Epoch(1),
        since: AT,
        after: None,
        generation: 1,
        via: "token".to_owned(),
    }
}

fn cross(record: &mut LeaseRecord, boundary: &str, after_ms: u64) {
    record.timeline.push(Crossing { boundary: boundary.to_owned(), at: AT.plus(after_ms), detail: String::new() });
}

#[tokio::test]
async fn a_receipt_follows_its_lease_and_a_lost_one_is_rebuilt_on_top_of_what_is_there() {
    let api = connect().await;
    let namespace = namespace(&api).await;
    let stop = CancellationToken::new();
    let receipts = Receipts::new();
    let (events, mut said) = mpsc::channel::<ReceiptEvent>(16);
    let writing = tokio::spawn(receipt::run(receipts.clone(), api.clone(), Metrics::new(), events, stop.clone()));
    let objects = api.namespace::<GPULease>(&namespace);
    let bob = AccountName::new("bob");

    // A long lease: created while it runs.
    let hold = hold(&namespace);
    let mut record = LeaseRecord::of_hold(&bob, &hold);
    record.progress = Progress::Running;
    cross(&mut record, "Assigned", 5);
    cross(&mut record, "Allowed", 10);
    receipts.record(record.clone(), true).unwrap();
    let name = record.object_name();
    let running = wait_for("the receipt", async || objects.get(&name).await.unwrap()).await;
    assert_eq!((running.spec.phase, running.spec.used), (LeasePhase::Running, None));

    // The writer dies and another takes over, which has only the settled row.
    let closed = Closed {
        hold: hold.clone().into(),
        ending: Ending::Released,
        used_ms: 5000,
        charged_ms: 5000,
        at: AT.plus(5010),
    };
    let successor = Receipts::new();
    let (events, mut successor_said) = mpsc::channel::<ReceiptEvent>(16);
    let succeeding = tokio::spawn(receipt::run(successor.clone(), api.clone(), Metrics::new(), events, stop.clone()));
    successor.record(LeaseRecord::rebuilt(&bob, &closed), true).unwrap();
    let written = ReceiptEvent::Written { account: bob.clone(), lease: hold.lease.clone() };
    next("that it is written", &mut successor_said, |event| (event == written).then_some(())).await;
    let rebuilt = objects.get(&name).await.unwrap().unwrap().spec;
    assert_eq!((rebuilt.phase, rebuilt.charged.as_deref()), (LeasePhase::Settled, Some("5s")));
    assert!(rebuilt.boundaries.allowed.is_some(), "the lost writer knew it");
    assert!(rebuilt.timeline.iter().any(|line| line.contains("Rebuilt")), "{:?}", rebuilt.timeline);

    // The first writer was only slow: its own end changes nothing of what is final, and is acknowledged.
    record.end = Some(LeaseEnd { ending: Ending::Released, used_ms: 5000, charged_ms: 5000, message: String::new() });
    receipts.record(record, true).unwrap();
    next("that it is written", &mut said, |event| (event == written).then_some(())).await;
    assert_eq!(objects.get(&name).await.unwrap().unwrap().spec, rebuilt);

    stop.cancel();
    writing.await.unwrap().unwrap();
    succeeding.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_receipt_has_a_place_for_as_long_as_its_lease_waits() {
    let api = connect().await;
    let namespace = namespace(&api).await;
    let stop = CancellationToken::new();
    let receipts = Receipts::new();
    let (events, _said) = mpsc::channel::<ReceiptEvent>(16);
    let writing = tokio::spawn(receipt::run(receipts.clone(), api.clone(), Metrics::new(), events, stop.clone()));
    let objects = api.namespace::<GPULease>(&namespace);
    let mut record = LeaseRecord::of_hold(&AccountName::new("bob"), &hold(&namespace));
    let place = Place {
        ticket: Ticket { agent_instance: "a".into(), number: 1 },
        node: NodeName::new("gpu-1"),
        waits_for: WaitsFor::Node,
        position: 3,
        eta_ms: 5_000,
        latest_start_ms: Some(70_000),
        late_ms: 0,
        place: (Epoch(1), 1),
        caller: CallerClass::Regular,
    };
    record.progress = Progress::Queued;
    record.standing = Some(Standing::of(&place, AT));
    receipts.record(record.clone(), true).unwrap();
    let name = record.object_name();
    let mut waits = wait_for("the receipt", async || objects.get(&name).await.unwrap()).await;
    let shown = waits.spec.place.clone().unwrap();
    assert_eq!((waits.spec.waits.as_deref(), shown.position), (Some("node, 3rd"), Some(3)));
    assert_eq!(shown, record.receipt().spec.place.unwrap(), "times as they were written");

    record.progress = Progress::Running;
    receipts.record(record, true).unwrap();
    let runs = |receipt: &GPULease| receipt.spec.phase == LeasePhase::Running;
    let running = wait_for("that it runs", async || objects.get(&name).await.unwrap().filter(runs)).await;
    assert_eq!((&running.spec.waits, &running.spec.place), (&None, &None));
    waits.metadata.resource_version = running.metadata.resource_version;
    waits.spec.phase = LeasePhase::Running;
    let refused = objects.replace(&waits, Duration::from_secs(10)).await.unwrap_err();
    assert!(error_chain(&refused).contains("only a lease that waits has a place"), "{refused:?}");
    stop.cancel();
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_receipt_without_a_namespace_does_not_hold_up_its_account() {
    let api = connect().await;
    let stop = CancellationToken::new();
    let receipts = Receipts::new();
    let (events, mut said) = mpsc::channel::<ReceiptEvent>(16);
    let writing = tokio::spawn(receipt::run(receipts.clone(), api.clone(), Metrics::new(), events, stop.clone()));
    let closed =
        Closed { hold: hold(&fresh("gone")).into(), ending: Ending::Refused, used_ms: 0, charged_ms: 0, at: AT };
    receipts.record(LeaseRecord::rebuilt(&AccountName::new("bob"), &closed), true).unwrap();
    next("that it is done", &mut said, |event| {
        let ReceiptEvent::Written { lease, .. } = event;
        (lease == closed.hold.lease).then_some(())
    })
    .await;
    stop.cancel();
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn old_receipts_go_in_one_request() {
    const FINAL: usize = 12;
    // More than a Space of any other test has: a round looks at all namespaces.
    const KEPT: usize = 8;
    let api = connect().await;
    let namespace = namespace(&api).await;
    let stop = CancellationToken::new();
    let receipts = Receipts::new();
    let (events, mut said) = mpsc::channel::<ReceiptEvent>(16);
    let writing = tokio::spawn(receipt::run(receipts.clone(), api.clone(), Metrics::new(), events, stop.clone()));
    let bob = AccountName::new("bob");
    let mut running = LeaseRecord::of_hold(&bob, &hold(&namespace));
    running.progress = Progress::Running;
    receipts.record(running.clone(), true).unwrap();
    for _ in 0..FINAL {
        let hold = hold(&namespace).into();
        let closed = Closed { hold, ending: Ending::Refused, used_ms: 0, charged_ms: 0, at: AT };
        receipts.record(LeaseRecord::rebuilt(&bob, &closed), true).unwrap();
        next("that it is written", &mut said, |ReceiptEvent::Written { lease, .. }| {
            (lease == closed.hold.lease).then_some(())
        })
        .await;
    }
    let objects = api.namespace::<GPULease>(&namespace);
    wait_for("the open receipt", async || objects.get(&running.object_name()).await.unwrap()).await;
    let kept = async || {
        let left = objects.list(None).await.unwrap();
        let open = left.iter().filter(|receipt| !receipt.spec.phase.is_final()).count();
        (left.len() - open, open)
    };

    assert_eq!(kept().await, (FINAL, 1));
    let metrics = Metrics::new();
    let counted = api.clone().counted_by(metrics.clone());
    let limits = Some(Retention { kept: KEPT, age_max_seconds: 3600 });
    let round = retention::round(&counted, limits, &receipts, &PressureGauge::default(), &stop).await;
    assert_eq!((round.removed, round.is_whole), (FINAL - KEPT, true));
    assert_eq!(kept().await, (KEPT, 1), "an open one stays, however many there are");
    let text = metrics.encode().unwrap();
    let mutations: Vec<&str> = text.lines().filter(|line| line.starts_with("spaceport_api_mutations_total{")).collect();
    let [deletion] = mutations[..] else { panic!("one kind of request changed something: {mutations:?}") };
    assert!(deletion.contains("\"deletecollection\"") && deletion.ends_with(" 1"), "not one for each: {deletion}");
    stop.cancel();
    writing.await.unwrap().unwrap();
}
