//! Whose turn it is, and what is kept for whom.

use super::*;

const ALL: Room = Room { large: true, xlarge: true, reserved_for_ms: None };
const HALF: Room = Room { large: true, xlarge: false, reserved_for_ms: None };
const NONE: Room = Room { large: false, xlarge: false, reserved_for_ms: None };

fn job(place: u64, size: Size, seconds: u64) -> Job {
    let ms = seconds * 1000;
    Job {
        place,
        size,
        class: Priority::Medium,
        key: ms,
        expected_ms: ms,
        declared_ms: ms,
        held_ms: ms,
        slots: if size == Size::Large { 1 } else { 2 },
    }
}

fn lanes(jobs: &[Job]) -> Lanes {
    let mut lanes = Lanes::default();
    jobs.iter().for_each(|job| lanes.insert(*job));
    lanes
}

fn start(place: u64) -> Option<Choice> {
    Some(Choice::Start { place, fit: Fit::Open })
}

#[test]
fn shorter_calls_go_first_and_equals_in_the_order_they_came() {
    let mut lanes = lanes(&[job(1, Size::Large, 30), job(2, Size::Large, 10), job(3, Size::Large, 10)]);
    for place in [2, 3, 1] {
        assert_eq!(lanes.next(&HALF, &[]), start(place));
        lanes.started(place);
    }
    assert_eq!(lanes.next(&ALL, &[]), None);
}

#[test]
fn keys_are_dearer_for_who_used_much_and_cheaper_for_higher_tiers() {
    let settings = LaneSettings::default();
    let key = |class, used| settings.key(class, 1000, 1, used, 100);
    assert_eq!(key(Priority::Low, 0), 1_000_000);
    assert_eq!(key(Priority::Low, 50), 1_500_000);
    assert_eq!(key(Priority::Low, 100), 2_000_000);
    assert_eq!(key(Priority::Low, 900), 2_000_000, "a lowered tier can have used more than its quota");
    assert_eq!(key(Priority::Highest, 0), 250_000);
    assert_eq!(settings.key(Priority::Low, 1000, 2, 0, 0), 4_000_000, "no quota counts as used up");
}

/// phi = 1/4: three slot-seconds out of turn earn one.
#[test]
fn the_oldest_goes_when_its_class_has_earned_it() {
    let mut lanes = lanes(&[job(1, Size::Large, 30)]);
    let mut place = 2;
    for _ in 0..10 {
        lanes.insert(job(place, Size::Large, 9));
        assert_eq!(lanes.next(&HALF, &[]), start(place), "nine seconds are shorter than thirty");
        lanes.started(place);
        place += 1;
    }
    lanes.insert(job(place, Size::Large, 9));
    assert_eq!(lanes.next(&HALF, &[]), start(1), "ninety seconds out of turn have earned thirty");
    lanes.started(1);
    assert_eq!(lanes.next(&HALF, &[]), start(place));
}

#[test]
fn earnings_go_by_floors_to_the_classes_that_wait() {
    let of = |class, place| Job { class, key: u64::MAX, ..job(place, Size::Large, 1000) };
    let mut lanes = lanes(&[of(Priority::Highest, 1), of(Priority::Low, 2), job(3, Size::Large, 210)]);
    let earned = |lanes: &Lanes| lanes.age.each_ref().map(|class| class.credit / CREDIT_UNITS);
    assert_eq!(lanes.started(3).map(|(_, lane)| lane), Some(Lane::Fast));
    // 70 s for two classes with floors of 50 and 20.
    assert_eq!(earned(&lanes), [20_000, 0, 50_000]);
    lanes.owe(21_000);
    assert_eq!(earned(&lanes), [22_000, 0, 55_000], "it ran longer than was expected");
    lanes.remove(2);
    assert_eq!(earned(&lanes), [0, 0, 55_000], "nobody is left to use it");
}

#[test]
fn a_blocked_whole_card_gets_a_reservation_and_the_first_card() {
    let mut lanes = lanes(&[job(1, Size::Xlarge, 5), job(2, Size::Large, 10)]);
    assert_eq!(lanes.next(&HALF, &[]), Some(Choice::Reserve { place: 1, lane: Lane::Fast }));
    lanes.reserve(1, Lane::Fast);
    assert_eq!(lanes.next(&HALF, &[]), start(2), "others go on beside it");
    lanes.insert(job(3, Size::Xlarge, 1));
    assert_eq!(lanes.next(&NONE, &[]), None, "one reservation at a time");
    assert_eq!(lanes.next(&ALL, &[]), start(3), "the card is for whoever is first by then");
    lanes.started(3);
    assert_eq!((lanes.reserved(), lanes.next(&ALL, &[])), (None, start(1)));
}

#[test]
fn a_card_is_drained_by_key_only_where_that_is_worth_it() {
    let mut lanes = lanes(&[job(1, Size::Xlarge, 8), job(2, Size::Large, 10)]);
    assert_eq!(lanes.next(&NONE, &[]), None, "eight is more than seven tenths of ten");
    lanes.insert(job(3, Size::Xlarge, 7));
    assert_eq!(lanes.next(&NONE, &[]), Some(Choice::Reserve { place: 3, lane: Lane::Fast }));
}

#[test]
fn only_what_is_surely_over_uses_the_reserved_card() {
    let mut lanes = lanes(&[job(1, Size::Xlarge, 1), job(2, Size::Large, 10), job(3, Size::Large, 20)]);
    lanes.reserve(1, Lane::Fast);
    let until = |seconds: u64| Room { reserved_for_ms: Some(seconds * 1000), ..NONE };
    let before_drain = Some(Choice::Start { place: 2, fit: Fit::BeforeDrain });
    assert_eq!(lanes.next(&until(9), &[]), None);
    assert_eq!(lanes.next(&until(10), &[]), before_drain);
    // The one with the smaller key is too long; the one behind it fits.
    lanes.insert(Job { key: 1, ..job(4, Size::Large, 60) });
    assert_eq!(lanes.next(&until(10), &[]), before_drain);
}

/// Or else whole cards, one reservation after the other, would keep the oldest waiting for ever.
#[test]
fn a_reservation_by_key_gives_way_to_who_is_due_by_age() {
    let due = |size| {
        let oldest = Job { class: Priority::Low, key: u64::MAX, ..job(1, size, 20) };
        let mut lanes = lanes(&[oldest, job(2, Size::Xlarge, 1), job(3, Size::Large, 300)]);
        lanes.reserve(2, Lane::Fast);
        lanes.started(3);
        lanes
    };
    let drains = Room { reserved_for_ms: Some(5_000), ..NONE };
    let half = due(Size::Large);
    assert_eq!(half.next(&drains, &[]), Some(Choice::Start { place: 1, fit: Fit::InsteadOfReserved }));
    let mut whole = due(Size::Xlarge);
    assert_eq!(whole.next(&drains, &[]), Some(Choice::Reserve { place: 1, lane: Lane::Age }));
    whole.reserve(1, Lane::Age);
    assert_eq!((whole.next(&drains, &[]), whole.next(&ALL, &[])), (None, start(1)));
    assert_eq!(whole.started(1).map(|(_, lane)| lane), Some(Lane::Age));
}

#[test]
fn who_leaves_takes_the_reservation_along() {
    let mut lanes = lanes(&[job(1, Size::Xlarge, 1)]);
    lanes.reserve(1, Lane::Fast);
    lanes.remove(1);
    assert_eq!((lanes.reserved(), lanes.is_empty()), (None, true));
    lanes.reserve(1, Lane::Fast);
    assert_eq!(lanes.reserved(), None);
}

#[test]
fn a_lane_of_age_alone_is_first_come_first_served() {
    let mut lanes = Lanes::new(LaneSettings { age_percent: 100, ..LaneSettings::default() });
    [job(1, Size::Large, 30), job(2, Size::Large, 1)].into_iter().for_each(|job| lanes.insert(job));
    assert_eq!(lanes.next(&HALF, &[]), start(1));
}

#[test]
fn what_is_ahead_is_counted_over_both_sizes() {
    let lanes = lanes(&[job(1, Size::Xlarge, 5), job(2, Size::Large, 10), job(3, Size::Large, 7)]);
    let of = |place| {
        let job = lanes.get(place).unwrap();
        lanes.ahead_by_key(job.key, place)
    };
    assert_eq!(of(1), Ahead { count: 0, sum: 0 });
    assert_eq!(of(3), Ahead { count: 1, sum: 10_000 });
    assert_eq!(of(2), Ahead { count: 2, sum: 17_000 });
    assert_eq!(lanes.held_by_class_ms(Priority::Medium), 27_000);
}
