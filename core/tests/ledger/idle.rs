//! Workers that nodes keep (L16): whose calls they serve, whom that may overtake, and what a node can say of them.

use proptest::prelude::*;
use spaceport_core::ids::{LeaseId, Size, WorkerKey};
use spaceport_core::lease::{Command, EndReport, FreedAs, IdleWorker, Order, Request};
use spaceport_core::page::Ending;
use spaceport_core::queue::{Choice, EQUAL_KEY_PART, Fit, Job, Lane, LaneSettings, Lanes, Priority, Room};

use crate::world::{BOB, World, node, orders, places};

const REPORT: EndReport = EndReport { ending: Ending::Released, used_ms: 1_000 };

// === the order of the queue ===

fn job(place: u64, size: Size, key: u64) -> Job {
    let slots = if size == Size::Large { 1 } else { 2 };
    Job { place, size, class: Priority::Medium, key, expected_ms: key, declared_ms: key, held_ms: key, slots }
}

fn lanes_of(jobs: &[Job]) -> Lanes {
    let mut lanes = Lanes::default();
    jobs.iter().for_each(|job| lanes.insert(*job));
    lanes
}

const HALF: Room = Room { large: true, xlarge: false, reserved_for_ms: None };
const WHOLE: Room = Room { large: true, xlarge: true, reserved_for_ms: None };

fn start(place: u64) -> Option<Choice> {
    Some(Choice::Start { place, fit: Fit::Open })
}

#[test]
fn among_equal_keys_who_finds_its_own_worker_is_next() {
    let lanes = lanes_of(&[job(1, Size::Large, 100), job(2, Size::Large, 120), job(3, Size::Large, 121)]);
    assert_eq!(lanes.next(&HALF, &[2]), start(2), "a fifth more is as good as equal");
    assert_eq!(lanes.next(&HALF, &[3]), start(1), "more than that is not");
    assert_eq!(lanes.next(&HALF, &[2, 1]), start(1), "of two the one with the smaller key");
    assert_eq!(lanes.next(&HALF, &[9]), start(1), "nobody waits there");
}

#[test]
fn a_size_is_not_preferred_to_another_one() {
    let lanes = lanes_of(&[job(1, Size::Large, 100), job(2, Size::Xlarge, 100), job(3, Size::Xlarge, 90)]);
    assert_eq!(lanes.next(&WHOLE, &[1]), start(3));
    assert_eq!(lanes.next(&WHOLE, &[2]), start(2));
    assert_eq!(lanes.next(&HALF, &[2]), start(1), "no room for a whole card");
}

#[test]
fn a_card_that_is_kept_is_for_whoever_is_first() {
    let mut lanes = lanes_of(&[job(1, Size::Xlarge, 100), job(2, Size::Xlarge, 100)]);
    lanes.reserve(1, Lane::Fast);
    assert_eq!(lanes.next(&WHOLE, &[2]), start(1));
    lanes.reserve(1, Lane::Age);
    assert_eq!(lanes.next(&WHOLE, &[2]), start(1));
}

/// phi = 1/4: three starts by key earn one by age, whoever they were for.
#[test]
fn who_is_overtaken_again_and_again_has_its_turn_by_age() {
    let mut lanes = lanes_of(&[job(1, Size::Large, 10_000)]);
    for place in 2..=4 {
        lanes.insert(job(place, Size::Large, 10_000));
        assert_eq!(lanes.next(&HALF, &[place]), start(place));
        lanes.started(place);
    }
    lanes.insert(job(5, Size::Large, 10_000));
    assert_eq!(lanes.next(&HALF, &[5]), start(1));
}

fn any_job() -> impl Strategy<Value = Job> {
    let class = prop::sample::select(vec![Priority::Low, Priority::Medium, Priority::Highest]);
    (any::<bool>(), class, 0_u64..40, 1_u64..100).prop_map(|(large, class, key, seconds)| Job {
        class,
        expected_ms: seconds * 1_000,
        declared_ms: seconds * 1_000,
        held_ms: seconds * 1_000,
        ..job(0, if large { Size::Large } else { Size::Xlarge }, key)
    })
}

proptest! {
    /// Whatever workers are kept, and wherever the books of the lanes stand: what changes is only who starts by key, to one
    /// of its size with a worker of its own whose key is as good as equal. Cards are kept, and turns by age come, as
    /// without.
    #[test]
    fn nobody_is_overtaken_but_by_key_and_among_equals(
        jobs in prop::collection::vec(any_job(), 1..30),
        kept in prop::collection::vec(0_u64..35, 0..6),
        (large, xlarge, reserved_for_ms) in (any::<bool>(), any::<bool>(), prop::option::of(0_u64..60_000)),
        age_percent in prop::sample::select(vec![1_u64, 25, 50, 100]),
        reserved in prop::option::of((0_u64..30, any::<bool>())),
        owed in 0_u64..200_000,
    ) {
        let mut lanes = Lanes::new(LaneSettings { age_percent, ..LaneSettings::default() });
        for (place, job) in (0..).zip(jobs) {
            lanes.insert(Job { place, ..job });
        }
        lanes.owe(owed);
        if let Some((place, by_age)) = reserved {
            lanes.reserve(place, if by_age { Lane::Age } else { Lane::Fast });
        }
        let room = Room { large, xlarge, reserved_for_ms };
        let (without, with) = (lanes.next(&room, &[]), lanes.next(&room, &kept));
        if with != without {
            let (Some(Choice::Start { place: first, fit }), Some(Choice::Start { place: chosen, fit: chosen_fit })) =
                (without, with)
            else {
                panic!("{without:?} became {with:?}");
            };
            prop_assert_eq!(fit, chosen_fit);
            prop_assert!(kept.contains(&chosen));
            let (one, other) = (lanes.get(first).unwrap(), lanes.get(chosen).unwrap());
            prop_assert_eq!(one.size, other.size);
            prop_assert!(other.key >= one.key && other.key - one.key <= one.key / EQUAL_KEY_PART);
            for place in [first, chosen] {
                let lane = lanes.clone().started(place).map(|(_, lane)| lane);
                prop_assert_eq!(lane, Some(Lane::Fast), "{} was due by age", place);
            }
        }
    }
}

// === the ledger ===

fn function(task: u64) -> WorkerKey {
    WorkerKey::new("pod", "container", task).unwrap()
}

fn idle(task: u64, card: u32, size: Size) -> IdleWorker {
    IdleWorker { worker: Some(function(task)), card, size }
}

/// A term, and a node with cards of two halves.
fn begin(cards: u32) -> World {
    World::begin(cards, 600_000, 64)
}

fn ask(story: &mut World, task: u64, size: Size, declared_ms: u64) -> Vec<Order> {
    let request = story.request(BOB, size, declared_ms);
    orders(&story.send(Request { worker: Some(function(task)), ..request }))
}

/// A call that gets a slot of this card at once.
fn runs(story: &mut World, task: u64, size: Size, card: u32) -> LeaseId {
    let orders = ask(story, task, size, 10_000);
    assert_eq!(orders.len(), 1, "there is room");
    let lease = orders[0].lease.clone();
    story.started(&lease, card);
    story.tell(Command::Running { node: node(), lease: lease.clone() });
    lease
}

fn ends(story: &mut World, lease: &LeaseId, kept: bool) -> Vec<Order> {
    let mut effects = story.tell(Command::Ended { node: node(), lease: lease.clone(), report: REPORT, kept });
    let how = if kept { FreedAs::Held } else { FreedAs::Free };
    effects.extend(story.tell(Command::Freed { node: node(), lease: lease.clone(), how }));
    orders(&effects)
}

fn keeps(story: &mut World, idle: Vec<IdleWorker>) -> Vec<Order> {
    orders(&story.tell(Command::Heartbeat { node: node(), cards: None, idle: Some(idle) }))
}

/// The workers that the ledger knows of.
fn kept(story: &World) -> &[IdleWorker] {
    &story.state.nodes[&node()].idle
}

fn tickets(orders: &[Order]) -> Vec<u64> {
    orders.iter().map(|order| order.ticket.number).collect()
}

/// Both halves are taken; another function's call waits, and then one of the function whose call ends now.
fn crowded(declared_ms: u64) -> (World, LeaseId) {
    let mut story = begin(1);
    let first = runs(&mut story, 1, Size::Large, 0);
    runs(&mut story, 2, Size::Large, 0);
    assert_eq!(ask(&mut story, 3, Size::Large, 10_000), []);
    assert_eq!(ask(&mut story, 1, Size::Large, declared_ms), []);
    (story, first)
}

#[test]
fn the_next_call_of_the_same_function_finds_the_worker_that_was_just_kept() {
    let (mut story, first) = crowded(10_000);
    let next = orders(&story.tell(Command::Ended { node: node(), lease: first.clone(), report: REPORT, kept: true }));
    assert_eq!(tickets(&next), [4]);
    assert_eq!(next[0].after, None, "its slot can be had at once");
    assert_eq!(orders(&story.tell(Command::Freed { node: node(), lease: first, how: FreedAs::Held })), []);
}

#[test]
fn a_worker_that_is_not_kept_or_not_heard_of_prefers_nobody() {
    let (mut story, first) = crowded(10_000);
    assert_eq!(tickets(&ends(&mut story, &first, false)), [3]);
}

#[test]
fn a_call_that_is_dearer_than_a_fifth_more_does_not_overtake() {
    let (mut story, first) = crowded(12_000);
    assert_eq!(tickets(&ends(&mut story, &first, true)), [4]);
    let (mut story, first) = crowded(12_001);
    assert_eq!(tickets(&ends(&mut story, &first, true)), [3]);
}

/// What is promised counts on no worker, and no worker takes anything from it.
#[test]
fn the_latest_start_is_told_as_if_no_worker_were_kept() {
    let told = |kept: Vec<IdleWorker>| {
        let (mut story, _) = crowded(10_000);
        keeps(&mut story, kept);
        ask(&mut story, 3, Size::Xlarge, 10_000);
        places(&story.effects).iter().map(|place| (place.place, place.latest_start_ms)).collect::<Vec<_>>()
    };
    assert_eq!(told(Vec::new()), told(vec![idle(1, 0, Size::Large), idle(3, 0, Size::Large)]));
}

/// Its node puts a call on the card of its own worker. It once counted on another card: there a whole one was promised.
#[test]
fn an_order_is_expected_where_its_own_worker_is_kept() {
    for (kept, whole) in [(vec![], 1), (vec![idle(2, 1, Size::Large)], 0)] {
        let mut story = begin(2);
        runs(&mut story, 1, Size::Large, 0);
        keeps(&mut story, kept);
        assert_eq!(ask(&mut story, 2, Size::Large, 10_000).len(), 1);
        assert_eq!(ask(&mut story, 3, Size::Xlarge, 10_000).len(), whole);
    }
}

/// Its node puts a call rather beside a worker that is kept than in its stead.
#[test]
fn an_order_is_expected_beside_the_workers_of_others() {
    for (kept, whole) in [(vec![], 1), (vec![idle(2, 0, Size::Large)], 0)] {
        let mut story = begin(2);
        runs(&mut story, 1, Size::Large, 0);
        keeps(&mut story, kept);
        assert_eq!(ask(&mut story, 4, Size::Large, 10_000).len(), 1);
        assert_eq!(ask(&mut story, 3, Size::Xlarge, 10_000).len(), whole);
    }
}

/// Nobody gets the slot of a worker that has to go before that is clear; a call of its function is not preferred for it.
#[test]
fn the_slot_of_a_worker_that_has_to_go_clears() {
    let mut story = begin(1);
    let leaving = IdleWorker { worker: None, card: 0, size: Size::Large };
    keeps(&mut story, vec![leaving.clone()]);
    assert_eq!(ask(&mut story, 1, Size::Xlarge, 10_000), []);
    keeps(&mut story, vec![leaving.clone(), leaving]);
    assert_eq!(ask(&mut story, 1, Size::Large, 10_000), []);
    assert_eq!(tickets(&keeps(&mut story, Vec::new())), [1], "it is clear");
}

#[test]
fn workers_make_room_for_anybody() {
    let mut story = begin(1);
    keeps(&mut story, vec![idle(1, 0, Size::Large), idle(2, 0, Size::Large)]);
    assert_eq!(ask(&mut story, 3, Size::Xlarge, 10_000).len(), 1);
}

/// Two calls of one function and one worker: the other call is expected where its node puts it, with the rest.
#[test]
fn a_worker_serves_one_call_at_a_time() {
    let mut story = begin(2);
    keeps(&mut story, vec![idle(1, 1, Size::Large)]);
    assert_eq!(ask(&mut story, 1, Size::Large, 10_000).len(), 1);
    assert_eq!(ask(&mut story, 1, Size::Large, 10_000).len(), 1);
    assert_eq!(ask(&mut story, 3, Size::Xlarge, 10_000).len(), 1, "both are on the second card");
}

#[test]
fn what_a_node_keeps_is_known_from_its_list_and_ends_with_its_session() {
    let mut story = begin(1);
    story.join(Vec::new(), vec![idle(1, 0, Size::Large)]);
    assert_eq!(kept(&story), [idle(1, 0, Size::Large)]);
    keeps(&mut story, Vec::new());
    assert_eq!(kept(&story), []);
    let lease = runs(&mut story, 2, Size::Large, 0);
    ends(&mut story, &lease, true);
    assert_eq!(kept(&story), [idle(2, 0, Size::Large)]);
    story.tell(Command::Heartbeat { node: node(), cards: None, idle: None });
    assert_eq!(kept(&story).len(), 1, "a heartbeat without a list changes nothing");
    story.leave();
    assert_eq!(kept(&story), []);
    assert_eq!(keeps(&mut story, vec![idle(2, 0, Size::Large)]), [], "it has not joined again");
    assert_eq!(kept(&story), []);
}

/// A report may come twice, and the second time long after the worker has gone.
#[test]
fn an_end_that_is_told_again_keeps_no_second_worker() {
    let mut story = begin(1);
    let lease = runs(&mut story, 1, Size::Large, 0);
    ends(&mut story, &lease, true);
    keeps(&mut story, Vec::new());
    ends(&mut story, &lease, true);
    assert_eq!(kept(&story), []);
}

/// Workers where there is no such card, more of them than there are slots, and more ends with a kept worker than that: a node
/// that says so gets no slot by it, and nobody else loses one.
#[test]
fn a_node_that_lies_about_its_workers_gains_nothing() {
    let mut story = begin(1);
    let lies: Vec<IdleWorker> =
        (0..100).map(|task| idle(task, u32::try_from(task % 50).unwrap(), Size::Xlarge)).collect();
    keeps(&mut story, lies.clone());
    let (one, other) = (runs(&mut story, 200, Size::Large, 0), runs(&mut story, 201, Size::Large, 0));
    assert_eq!(ask(&mut story, 7, Size::Large, 10_000), [], "the node has two slots");
    keeps(&mut story, Vec::new());
    assert_eq!(tickets(&ends(&mut story, &one, true)), [3]);
    ends(&mut story, &other, true);
    for task in 0..10 {
        let lease = runs(&mut story, task, Size::Large, 0);
        ends(&mut story, &lease, true);
    }
    assert!(kept(&story).len() <= 2, "{:?}", kept(&story));
    story.join(Vec::new(), lies);
    assert_eq!(ask(&mut story, 300, Size::Xlarge, 10_000).len(), 1);
}
