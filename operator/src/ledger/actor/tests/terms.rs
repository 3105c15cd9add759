//! How terms begin and end, and what is left of one.

use spaceport_core::ids::{Revision, Size};
use spaceport_core::queue::Learned;

use super::*;
use crate::kubeapi::Call;
use crate::ledger::seen::MalformedAccount;
use crate::node_link::BELIEVED_MAX;

fn will(fate: TermFate) -> Memory {
    let memory = Memory::default();
    memory.0.lock().unwrap().term_fates.push_back(fate);
    memory
}

/// From when the term has begun until the broker knows that it does not lead any more.
async fn step_down(story: &Story) {
    wait_for(|| (!story.metrics.encode().unwrap().contains("spaceport_epoch 0")).then_some(())).await;
    story.metrics.set_queued("of-this-term", "Node", 1);
    story.leading.send_replace(false);
    wait_for(|| (!story.metrics.encode().unwrap().contains("of-this-term")).then_some(())).await;
}

fn call() -> Call {
    Call { verb: "get", kind: "GPUAccount".to_owned(), name: "spaceport-term".to_owned() }
}

/// An API server that has just come back is overloaded.
#[tokio::test]
async fn a_try_to_begin_a_term_that_fails_is_followed_by_another() {
    let limit = Duration::from_secs(10);
    let begins = async |error| {
        let story = Story::begin(will(TermFate::Fails(error))).await;
        assert_eq!(story.stop().await.0.lock().unwrap().epoch, 1);
    };
    // At once, for each waits a second.
    tokio::join!(
        begins(TermError::Api(ApiError::TimedOut { call: call(), limit })),
        begins(TermError::Refused { reason: "TooManyRequests".to_owned() }),
        begins(TermError::Contended),
    );
}

#[tokio::test]
async fn without_a_term_page_that_can_be_read_the_broker_ends() {
    let memory = will(TermFate::Fails(TermError::Malformed(MalformedAccount::Object("test".to_owned()))));
    let story = Story::before_its_term(memory).await;
    let over = tokio::time::timeout(LIMIT, story.broker).await.unwrap().unwrap();
    assert!(matches!(over, Err(TermOver::NotBegun(TermError::Malformed(_)))));
}

#[tokio::test]
async fn a_broker_whose_term_is_not_answered_takes_what_it_is_shown_and_stops_when_it_is_told_to() {
    let story = Story::before_its_term(will(TermFate::NoAnswer)).await;
    // More than its input holds.
    for _ in 0..200 {
        story.store(StoreEvent::Listed(Watched::Accounts)).await;
    }
    story.stop().await;
}

#[tokio::test]
async fn a_try_to_begin_a_term_ends_with_leading() {
    let story = Story::before_its_term(will(TermFate::NoAnswer)).await;
    let memory = story.memory.clone();
    wait_for(|| memory.0.lock().unwrap().term_fates.is_empty().then_some(())).await;
    story.leading.send_replace(false);
    tokio::task::yield_now().await;
    story.leading.send_replace(true);
    story.see_term(0).await;
    story.stop().await;
}

#[tokio::test]
async fn a_term_that_was_begun_before_leading_was_lost_is_not_served() {
    let mut story = Story::before_its_term(Memory::default()).await;
    let memory = story.memory.clone();
    let begun = async |epoch: u64| {
        wait_for(|| Some(()).filter(|()| memory.0.lock().unwrap().epoch == epoch)).await;
    };
    begun(1).await;
    story.leading.send_replace(false);
    tokio::task::yield_now().await;
    // Another replica has led since. Our watch is late: it shows what we have written ourselves.
    memory.0.lock().unwrap().epoch = 2;
    story.leading.send_replace(true);
    story.store(StoreEvent::Term(TermSeen { epoch: Epoch(1), write_id: "term-1".to_owned() })).await;
    begun(3).await;
    story.see_term(2).await;
    story.connect(0).await;
    assert_eq!(story.hear().await, Outgoing::Welcome(proto::Welcome { epoch: 3 }));
    story.stop().await;
}

#[tokio::test]
async fn the_watch_may_show_a_term_before_its_write_is_answered() {
    let mut story = Story::before_its_term(will(TermFate::AnsweredLater)).await;
    story.see_term(0).await;
    story.connect(0).await;
    story.memory.0.lock().unwrap().answer.notify_one();
    assert_eq!(story.hear().await, Outgoing::Welcome(proto::Welcome { epoch: 1 }));
    story.stop().await;
}

#[tokio::test]
async fn what_an_earlier_term_has_learned_is_not_shown_in_a_later_one() {
    let story = Story::begin(Memory::default()).await;
    let learned = Learned {
        revision: Revision::default(),
        size: Size::Large,
        declared_ms: 10_000,
        calls: 5,
        p50_ms: 1_000,
        p95_ms: 1_000,
        max_ms: 1_000,
        suggested_ms: None,
    };
    story.durations.put("space-uid", learned);
    step_down(&story).await;
    assert_eq!(story.durations.get("space-uid"), None);
    story.stop().await;
}

#[tokio::test]
async fn a_later_term_of_another_ends_the_broker() {
    let story = Story::begin(Memory::default()).await;
    story.store(StoreEvent::Term(TermSeen { epoch: Epoch(9), write_id: "theirs".to_owned() })).await;
    let over = tokio::time::timeout(LIMIT, story.broker).await.unwrap().unwrap();
    assert!(matches!(over, Err(TermOver::Deposed { by: Epoch(9) })));
}

#[tokio::test]
async fn a_leader_that_steps_down_grants_nothing_and_leads_again_in_a_later_term() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let runs = story.order().await;
    assert_eq!(runs.epoch, 1);
    story.metrics.set_queued(NODE, "Node", 1);
    let followed = LeaseId::new(&runs.lease);
    wait_for(|| story.receipts.latest(&followed)).await;

    // The API server was away for too long. The link ends its sessions with the term.
    story.leading.send_replace(false);
    wait_for(|| Some(()).filter(|()| story.receipts.latest(&followed).is_none())).await;
    story.connect(1).await;
    assert_eq!(story.memory.0.lock().unwrap().epoch, 1, "who does not lead begins no term");
    assert!(!story.metrics.encode().unwrap().contains(NODE), "and knows of nobody who waits");

    story.see_pages().await;
    story.leading.send_replace(true);
    story.see_term(1).await;
    assert_eq!(story.hear().await, Outgoing::Welcome(proto::Welcome { epoch: 2 }));
    let lease = proto::NodeLease {
        lease: runs.lease.clone(),
        phase: proto::LeasePhase::Running.into(),
        size: proto::Size::Large.into(),
        running_ms: 100,
        ..proto::NodeLease::default()
    };
    story.joined(2, vec![lease]).await;
    story.end_lease(&runs.lease, 2_000).await;
    let page = story.memory.page(SPACE);
    assert_eq!((page.epoch, page.holds.len(), page.windows[0].charged_ms), (Epoch(2), 0, 2_000));
    story.stop().await;
}

#[tokio::test]
async fn a_node_that_is_ahead_makes_a_new_term_begin() {
    let mut story = Story::begin(Memory::default()).await;
    story.connect(40).await;
    story.see_term(40).await;
    assert_eq!(story.hear().await, Outgoing::Welcome(proto::Welcome { epoch: 41 }));
    story.joined(41, Vec::new()).await;
    story.request(1, 10_000, "").await;
    assert_eq!(story.order().await.epoch, 41);
    story.stop().await;
}

#[tokio::test]
async fn a_node_that_says_it_is_ahead_of_all_terms_is_sent_away_and_the_others_are_served() {
    let said = BELIEVED_MAX.0 + 1;
    let mut story = Story::begin(Memory::default()).await;
    story.connect(said).await;
    let metrics = story.metrics.clone();
    let refused = "spaceport_sessions_refused_total{kind=\"EpochTooHigh\"} 1";
    wait_for(|| metrics.encode().unwrap().contains(refused).then_some(())).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    assert_eq!(story.order().await.epoch, 1);

    // What a node may say at most leaves terms, in which every node is welcome.
    story.connect(BELIEVED_MAX.0).await;
    story.see_term(1).await;
    assert_eq!(story.hear().await, Outgoing::Welcome(proto::Welcome { epoch: said }));
    story.connect(said).await;
    assert_eq!(story.hear().await, Outgoing::Welcome(proto::Welcome { epoch: said }));
    story.stop().await;
}

/// It connects while no term is begun.
#[tokio::test]
async fn what_no_node_can_have_accepted_is_no_reason_for_a_later_term() {
    let mut story = Story::begin(Memory::default()).await;
    step_down(&story).await;
    story.connect(BELIEVED_MAX.0 + 1).await;
    // It takes what is there before it gives way to this test.
    tokio::task::yield_now().await;
    story.leading.send_replace(true);
    story.see_term(1).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    assert_eq!(story.order().await.epoch, 2);
    story.stop().await;
}

#[test]
fn a_receipt_says_whose_fault_it_was_that_a_request_waits_no_longer() {
    let (ending, message) = end_of_unserved(None, Departure::AgentRestarted);
    assert_eq!(
        (ending, message.as_str()),
        (Ending::PlatformFault, "the node agent restarted while the request waited")
    );
    assert_eq!(end_of_unserved(None, Departure::CallerGone).0, Ending::Undelivered);
    let denial = Denial::NoCapacity { size: Size::Large };
    assert_eq!(end_of_unserved(Some(&denial), Departure::Refused), (Ending::Cancelled, human_message(&denial)));
}

#[tokio::test]
async fn of_a_term_that_a_node_has_ended_nothing_more_is_written() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let followed = LeaseId::new(&story.order().await.lease);
    wait_for(|| story.receipts.latest(&followed)).await;
    story.connect(40).await;
    wait_for(|| Some(()).filter(|()| story.receipts.latest(&followed).is_none())).await;
    story.stop().await;
}
