//! What receipts say of the card.

use super::*;

impl Story {
    /// Index and UUID of the card as the newest state of the receipt has them, once it has them.
    async fn receipt_card(&self, lease: &str) -> (Option<i32>, Option<String>) {
        let lease = LeaseId::new(lease);
        let spec = wait_for(|| {
            let spec = self.receipts.latest(&lease)?.receipt().spec;
            spec.gpu.is_some().then_some(spec)
        })
        .await;
        (spec.gpu, spec.gpu_uuid)
    }

    async fn start(&self, lease: &str) {
        self.say(8, Incoming::Started(proto::Started { lease: lease.to_owned(), ..proto::Started::default() })).await;
    }

    /// The node's only card is another one now.
    async fn replace_card(&self, uuid: &str) {
        let card = proto::Card {
            index: 0,
            uuid: uuid.to_owned(),
            model: "NVIDIA H200".to_owned(),
            large_slots: 2,
            grantable: true,
            quarantined_slots: 0,
        };
        let heartbeat = proto::Heartbeat { inventory_changed: true, cards: vec![card], ..proto::Heartbeat::default() };
        self.say(8, Incoming::Heartbeat(heartbeat)).await;
    }
}

fn given(uuid: &str) -> (Option<i32>, Option<String>) {
    (Some(0), Some(uuid.to_owned()))
}

#[tokio::test]
async fn a_receipt_names_the_card_by_its_uuid() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let first = story.order().await;
    story.start(&first.lease).await;
    assert_eq!(story.receipt_card(&first.lease).await, given("GPU-0"));
    // A heartbeat without inventory says nothing about cards.
    story.say(8, Incoming::Heartbeat(proto::Heartbeat::default())).await;
    story.run_lease(&first.lease, 1_000).await;
    story.replace_card("GPU-9").await;
    story.request(2, 10_000, "").await;
    let second = story.order().await;
    story.start(&second.lease).await;
    assert_eq!(story.receipt_card(&second.lease).await, given("GPU-9"));
    assert_eq!(story.receipt_card(&first.lease).await, given("GPU-0"), "it ran on the card of then");
    story.stop().await;
}

#[tokio::test]
async fn a_receipt_names_the_card_also_after_a_fail_over() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    let mut story = Story::begin(story.stop().await).await;
    let lease = proto::NodeLease {
        lease: order.lease.clone(),
        phase: proto::LeasePhase::Running.into(),
        size: proto::Size::Large.into(),
        ..proto::NodeLease::default()
    };
    story.join(vec![lease]).await;
    assert_eq!(story.receipt_card(&order.lease).await, given("GPU-0"));
    story.stop().await;
}
