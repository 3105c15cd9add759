//! Who waits, and what it is told: the head of the queue, where one stands, the promised start, and orders that come to nothing.

use std::collections::BTreeSet;

use spaceport_core::ids::{NodeName, Size, Steady};
use spaceport_core::lease::{Command, Effect, Limits, Place};
use spaceport_core::page::Ending;
use spaceport_core::protocol::Denial;
use spaceport_core::queue::WaitsFor;
use spaceport_core::slots::Card;

use crate::world::{BOB, World, denial, node, order, policy};

#[test]
fn the_head_blocks_and_whoever_waits_for_his_own_account_does_not() {
    let mut story = World::begin(1, 600_000, 1);
    story.account("ann", policy(600_000, 9));
    let first = order(&story.ask(BOB, Size::Large, 10_000));
    story.started(&first.lease, 0);
    let Effect::Queue(place) = &story.ask(BOB, Size::Large, 10_000)[0] else { panic!("bob is at his limit") };
    assert_eq!(place.waits_for, WaitsFor::Account);
    // Ann passes bob, who waits for himself; then her whole card waits, and nobody passes it.
    order(&story.ask("ann", Size::Large, 10_000));
    let Effect::Queue(place) = &story.ask("ann", Size::Xlarge, 10_000)[0] else { panic!("the card is in use") };
    assert!(place.waits_for == WaitsFor::Node && place.latest_start_ms > Some(place.eta_ms));
    story.end(&first.lease, Ending::Released, 1_000);
    // Bob is older than the whole card, so the slot is his.
    let waiting: Vec<_> = story.state.queue.iter().map(|waiting| waiting.demand.size).collect();
    assert_eq!(waiting, [Size::Xlarge]);
    assert!(matches!(story.ask("ann", Size::Large, 10_000)[..], [Effect::Queue(_)]));
}

#[test]
fn who_waits_is_told_where_it_stands_now_as_well_as_when_it_came() {
    let mut story = World::begin(1, 6_000_000, 9);
    let running = order(&story.ask(BOB, Size::Xlarge, 10_000));
    story.started(&running.lease, 0);
    let places: Vec<Place> = [20_000, 30_000, 10_000]
        .map(|declared_ms| match &story.ask(BOB, Size::Xlarge, declared_ms)[0] {
            Effect::Queue(place) => (**place).clone(),
            other => panic!("the card is in use: {other:?}"),
        })
        .into();
    let stands = |story: &World| -> Vec<Option<u32>> {
        let now = Steady(story.now);
        places.iter().map(|told| story.state.standing(&told.ticket, now).map(|place| place.position)).collect()
    };
    assert_eq!(
        places.iter().map(|told| told.position).collect::<Vec<_>>(),
        [1, 2, 1],
        "the shortest passes the others"
    );
    assert_eq!(stands(&story), [Some(2), Some(3), Some(1)]);
    story.now += 5_000;
    let later = story.state.standing(&places[0].ticket, Steady(story.now)).unwrap();
    assert_eq!(later.latest_start_ms, places[0].latest_start_ms.map(|ms| ms - 5_000), "the promise stays");
    let over = Steady(story.now + later.latest_start_ms.unwrap() + 3_000);
    let late = story.state.standing(&places[0].ticket, over).unwrap();
    assert_eq!((late.latest_start_ms, late.late_ms, later.late_ms), (Some(0), 3_000, 0), "also when it is broken");
    story.end(&running.lease, Ending::Released, 1_000);
    assert_eq!(stands(&story), [Some(1), Some(2), None]);
}

/// Two sessions of a node that starts anew may be heard of in another order than they began.
#[test]
fn who_is_presented_again_after_a_late_word_of_an_earlier_start_is_served() {
    let mut story = World::begin(1, 600_000, 9);
    let request = story.request(BOB, Size::Large, 10_000);
    let request = || Command::Request(Box::new(request.clone()));
    let (account, write_id) = story.tell_unanswered(request()).remove(0);
    story.hello("before-a");
    story.join(Vec::new(), Vec::new());
    story.tell(request());
    assert_eq!(order(&story.tell(Command::PageWritten { account, write_id })).ticket.number, 1);
}

#[test]
fn a_refused_order_is_tried_again_and_not_for_ever() {
    let mut story = World::begin(1, 600_000, 9);
    let mut lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    for attempt in 1..=3 {
        let effects = story.refused(&lease);
        if attempt == 3 {
            assert_eq!(denial(&effects), Some(Denial::PlatformFault));
            continue;
        }
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Start(_))), "not before the node is heard");
        let again = order(&story.tell(Command::Heartbeat { node: node(), cards: None, idle: None })).lease;
        assert_ne!(again, lease, "an id is used once");
        lease = again;
    }
    assert_eq!((story.page(BOB).holds.len(), story.page(BOB).closed.len()), (0, 3));
    assert!(story.page(BOB).windows.is_empty(), "nothing was charged, so no window was opened");
}

/// Invariant 11: what was just reserved will hold its slot as long as if the term had begun a moment ago.
#[test]
fn the_promised_start_counts_a_lease_whose_hold_is_on_its_way() {
    let mut story = World::begin(1, 600_000, 9);
    story.account("carol", policy(600_000, 9));
    story.pass(100_000);
    let request = story.request(BOB, Size::Xlarge, 10_000);
    story.tell_unanswered(Command::Request(Box::new(request)));
    let effects = story.ask("carol", Size::Xlarge, 10_000);
    let [Effect::Queue(place)] = &effects[..] else { panic!("{effects:?}") };
    let limits = Limits::default();
    let latest_start_ms = place.latest_start_ms.unwrap_or(0);
    assert!(latest_start_ms >= limits.order_ttl_ms + limits.held_ms(10_000) * 3, "{latest_start_ms}");
}

#[test]
fn without_a_healthy_card_of_that_size_there_is_no_queue() {
    let mut story = World::begin(1, 600_000, 9);
    let cards = vec![Card { index: 0, large_slots: 2, grantable: true, quarantined_slots: 1 }];
    story.tell(Command::Heartbeat { node: node(), cards: Some(cards), idle: None });
    assert_eq!(denial(&story.ask(BOB, Size::Xlarge, 10_000)), Some(Denial::NoCapacity { size: Size::Xlarge }));
    order(&story.ask(BOB, Size::Large, 10_000));
    assert_eq!(denial(&story.ask(BOB, Size::Large, 10_000)), None);
}

#[test]
fn a_new_leader_waits_for_its_nodes_but_not_long() {
    let awaited = BTreeSet::from([node(), NodeName::new("gpu-2")]);
    let mut story = World::begin(1, 600_000, 9);
    story.state.awaited = awaited;
    story.ask(BOB, Size::Large, 10_000);
    assert!(story.page(BOB).holds.is_empty());
    order(&story.pass(500));
}
