//! Places in the queue across a fail-over (L17).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

use super::*;

impl Story {
    /// A term in which an account can have more leases than the card has slots.
    async fn begin_for_many(memory: Memory) -> Self {
        let story = Self::begin(memory).await;
        story.store(StoreEvent::Tier(Box::new(TierSeen { concurrent_leases: 9, ..tier() }))).await;
        story
    }

    async fn queued(&mut self) -> proto::Queued {
        match self.hear().await {
            Outgoing::Queued(queued) => queued,
            other => panic!("{other:?} instead of a place"),
        }
    }

    /// The same request as [`Self::request`], with what it was told.
    async fn presents(&self, told: &proto::Queued, ago_ms: u64) {
        let pod = proto::Pod {
            namespace: "demo".to_owned(),
            space: "hello".to_owned(),
            space_uid: "space-uid".to_owned(),
            ..proto::Pod::default()
        };
        let request = proto::Request {
            ticket: told.ticket,
            pod: Some(pod),
            size: proto::Size::Large.into(),
            declared_ms: 10_000,
            place_epoch: told.place_epoch,
            place_number: told.place_number,
            promised_ms: told.latest_start_ms,
            promised_ago_ms: ago_ms,
            ..proto::Request::default()
        };
        self.say(7, Incoming::Request(request)).await;
    }
}

#[tokio::test]
async fn who_waits_keeps_place_and_promise_under_the_next_leader() {
    let mut story = Story::begin_for_many(Memory::default()).await;
    story.join(Vec::new()).await;
    for ticket in 1..=4 {
        story.request(ticket, 10_000, "").await;
    }
    // Orders wait for their holds, places for nothing.
    let (mut orders, mut places) = (Vec::new(), Vec::new());
    while orders.len() + places.len() < 4 {
        match story.hear().await {
            Outgoing::Start(order) => orders.push(order),
            Outgoing::Queued(place) => places.push(place),
            other => panic!("{other:?}"),
        }
    }
    let [third, fourth] = &places[..] else { panic!("{places:?}") };
    assert_eq!((third.place_epoch, third.place_number), (1, 3));
    let memory = story.stop().await;

    let mut story = Story::begin_for_many(memory).await;
    let running = orders.into_iter().map(|order| proto::NodeLease {
        lease: order.lease,
        phase: proto::LeasePhase::Running.into(),
        size: proto::Size::Large.into(),
        ..proto::NodeLease::default()
    });
    story.join(running.collect()).await;
    // A new one is faster than those who waited.
    story.request(5, 10_000, "").await;
    let fifth = story.queued().await;
    story.presents(fourth, 1_000).await;
    let kept = story.queued().await;
    assert_eq!((kept.place_epoch, kept.place_number), (fourth.place_epoch, fourth.place_number));
    let left_ms = fourth.latest_start_ms - 1_000;
    assert!(kept.latest_start_ms <= left_ms && kept.latest_start_ms + 1_000 > left_ms, "{}", kept.latest_start_ms);
    story.presents(third, third.latest_start_ms).await;
    let late = story.queued().await;
    assert_eq!((late.place_epoch, late.place_number), (1, 3));
    assert!(late.latest_start_ms > 1_000, "what had passed is promised anew: {}", late.latest_start_ms);
    assert_eq!((fifth.place_epoch, fifth.place_number), (2, 1));
    story.stop().await;
}

#[tokio::test]
async fn the_receipt_of_who_waits_says_what_its_caller_was_told() {
    let mut story = Story::begin_for_many(Memory::default()).await;
    story.join(Vec::new()).await;
    for ticket in 1..=3 {
        story.request(ticket, 10_000, "").await;
    }
    let told = loop {
        if let Outgoing::Queued(place) = story.hear().await {
            break place;
        }
    };
    let waits = |record: &LeaseRecord| record.receipt().spec.place;
    let place = wait_for(|| story.receipts.followed().iter().find_map(waits)).await;
    assert_eq!((place.reason, place.position), (crds::WaitReason::Node, Some(1)));
    let after = |at: &Option<MicroTime>| at.as_ref().map(|at| at.0.as_millisecond() - place.as_of.0.as_millisecond());
    let told_ms = |ms: u64| i64::try_from(ms).ok();
    assert_eq!(after(&place.expected_start), told_ms(told.eta_ms));
    assert_eq!(after(&place.latest_start), told_ms(told.latest_start_ms));
    story.stop().await;
}
