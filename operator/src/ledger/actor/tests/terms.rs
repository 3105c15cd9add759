//! How terms begin and end, and what is left of one.

use spaceport_core::ids::Size;
use spaceport_core::queue::Learned;

use super::*;

#[tokio::test]
async fn what_an_earlier_term_has_learned_is_not_shown_in_a_later_one() {
    let story = Story::begin(Memory::default()).await;
    let learned = Learned {
        size: Size::Large,
        declared_ms: 10_000,
        calls: 5,
        p50_ms: 1_000,
        p95_ms: 1_000,
        max_ms: 1_000,
        suggested_ms: None,
    };
    story.durations.put("space-uid", vec![learned]);
    story.leading.send_replace(false);
    wait_for(|| story.durations.get("space-uid").is_none().then_some(())).await;
    story.stop().await;
}
