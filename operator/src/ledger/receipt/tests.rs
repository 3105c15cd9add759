//! Which receipts are due, and what becomes of them.

use spaceport_core::ids::LedgerTime;

use super::record::tests::hold;
use super::*;

fn record(lease: &str, progress: Progress) -> LeaseRecord {
    let mut hold = hold();
    hold.lease = LeaseId::new(lease);
    LeaseRecord { progress, ..LeaseRecord::of_hold(&AccountName::new("bob"), &hold) }
}

fn ended(lease: &str) -> LeaseRecord {
    let end =
        LeaseEnd { ending: spaceport_core::page::Ending::Released, used_ms: 1, charged_ms: 1, message: String::new() };
    LeaseRecord { end: Some(end), ..record(lease, Progress::Running) }
}

fn taken(receipts: &Receipts, now: Instant, count: usize, pace: Pace) -> Vec<String> {
    let due = receipts.take_due(now, count, pace, &mut Found::default());
    due.into_iter().map(|(record, _)| record.lease.to_string()).collect()
}

#[test]
fn ends_go_before_what_only_shows_a_lease_and_who_waits_longest_goes_first() {
    let receipts = Receipts::new();
    receipts.record(record("open", Progress::Running), true).unwrap();
    for lease in ["a", "b", "c", "d"] {
        receipts.record(ended(lease), true).unwrap();
    }
    let later = clock::monotonic() + Duration::from_secs(60);
    assert_eq!(taken(&receipts, later, 2, Pace::Live), ["a", "b"]);
    assert_eq!(taken(&receipts, later, 8, Pace::Live), ["c", "d", "open"]);
}

#[test]
fn what_a_look_has_found_is_written_as_it_is_when_its_write_begins() {
    let receipts = Receipts::new();
    for lease in ["a", "b", "c", "d"] {
        receipts.record(record(lease, Progress::Queued), true).unwrap();
    }
    let begin = clock::monotonic() + Duration::from_secs(60);
    let mut found = Found::default();
    let mut taken = |ms, count| {
        let due = receipts.take_due(begin + Duration::from_millis(ms), count, Pace::Live, &mut found);
        due.iter().map(|(record, _)| (record.lease.to_string(), record.phase())).collect::<Vec<_>>()
    };
    assert_eq!(taken(0, 1), [("a".to_owned(), LeasePhase::Queued)]);
    receipts.record(record("b", Progress::Running), true).unwrap();
    receipts.record(ended("c"), true).unwrap();
    receipts.drop_unwritten(&LeaseId::new("d"));
    receipts.record(ended("e"), true).unwrap();
    let as_now = [("b".to_owned(), LeasePhase::Running), ("c".to_owned(), LeasePhase::Settled)];
    assert_eq!(taken(10, 8), as_now, "one write each");
    assert_eq!(taken(49, 8), [], "who comes later waits for the next look");
    assert_eq!(taken(50, 8), [("e".to_owned(), LeasePhase::Settled)]);
}

#[test]
fn a_look_that_finds_very_many_is_followed_by_another_when_they_are_begun() {
    let receipts = Receipts::new();
    for index in 0..FOUND_MAX + 3 {
        receipts.record(ended(&format!("r{index}")), true).unwrap();
    }
    receipts.record(record("open", Progress::Running), true).unwrap();
    let now = clock::monotonic() + Duration::from_secs(60);
    let mut found = Found::default();
    let mut taken = |count| receipts.take_due(now, count, Pace::Live, &mut found).len();
    assert_eq!((taken(8), taken(FOUND_MAX - 8), taken(0)), (8, FOUND_MAX - 8, 0));
    assert_eq!((taken(2), taken(8), taken(8)), (2, 2, 0), "the last end, and what only shows a lease");
    assert_eq!(found.unwritten_ends, FOUND_MAX + 3, "they are only begun");
}

#[test]
fn a_receipt_that_is_there_or_on_its_way_is_not_dropped() {
    let receipts = Receipts::new();
    let lease = LeaseId::new("a");
    assert!(receipts.drop_unwritten(&lease), "it was never followed");
    receipts.record(record("a", Progress::Queued), true).unwrap();
    assert!(receipts.drop_unwritten(&lease) && receipts.latest(&lease).is_none());
    receipts.record(record("a", Progress::Queued), true).unwrap();
    let later = clock::monotonic() + Duration::from_secs(3);
    let (record, _) = receipts.take_due(later, 1, Pace::Live, &mut Found::default()).remove(0);
    assert!(!receipts.drop_unwritten(&lease), "it is being written");
    receipts.finish(&record, &Outcome::Written { resource_version: "1".to_owned() }, later);
    assert!(!receipts.drop_unwritten(&lease) && receipts.latest(&lease).is_some());
}

#[test]
fn places_are_written_one_after_the_other_behind_all_else() {
    let receipts = Receipts::new();
    let written = |record: &LeaseRecord, at| {
        let outcome = Outcome::Written { resource_version: "1".to_owned() };
        receipts.finish(record, &outcome, at);
    };
    let stands = |position| Some(Standing::of(&standing::tests::place(position), LedgerTime(0)));
    let waits = |lease, position| LeaseRecord { standing: stands(position), ..record(lease, Progress::Queued) };
    let begin = clock::monotonic();
    for lease in ["a", "b", "c"] {
        receipts.record(waits(lease, 2), true).unwrap();
    }
    let created = begin + Duration::from_secs(3);
    for (record, _) in receipts.take_due(created, 8, Pace::Live, &mut Found::default()) {
        written(&record, created);
    }
    for lease in ["a", "b", "c"] {
        receipts.record(waits(lease, 1), true).unwrap();
    }
    receipts.record(ended("end"), true).unwrap();
    let mut found = Found::default();
    let mut taken = |ms| {
        let now = begin + Duration::from_secs(60) + Duration::from_millis(ms);
        let due = receipts.take_due(now, 8, Pace::Live, &mut found);
        due.iter().map(|(record, _)| record.lease.as_str().len()).collect::<Vec<_>>()
    };
    assert_eq!(taken(0), [3, 1], "the end first, and one place");
    assert_eq!(taken(10), [0; 0]);
    assert_eq!((taken(50), taken(100), taken(150)), (vec![1], vec![1], vec![]));
}

#[test]
fn what_waited_under_an_earlier_leader_is_ended_and_nothing_else() {
    let of = |lease: &str, progress, epoch| {
        let record = LeaseRecord { epoch: Epoch(epoch), ..record(lease, progress) };
        (record.clone(), record.receipt())
    };
    let (waits, followed) = of("presented", Progress::Queued, 3);
    let (_, left) = of("left", Progress::Queued, 3);
    let (_, runs) = of("runs", Progress::Running, 3);
    let (_, ours) = of("ours", Progress::Queued, 4);
    let (found, now) = ([followed, left, runs, ours], LedgerTime(1_800_000_060_000));
    let receipts = Receipts::new();
    let ended = |receipts: &Receipts| receipts.end_left_behind(&found, now).ended;
    assert_eq!(ended(&receipts), 0, "no term has begun");
    receipts.begin(Epoch(4));
    receipts.record(waits, true).unwrap();
    assert_eq!(ended(&receipts), 1);
    assert!(receipts.latest(&LeaseId::new("left")).is_some_and(|record| record.end.is_some()));
    assert_eq!(ended(&receipts), 0, "it is being written");
    receipts.forget();
    assert_eq!(ended(&receipts), 0, "the term is over");
}

#[test]
fn under_pressure_only_ends_are_written_and_the_rest_follows_when_it_is_over() {
    let receipts = Receipts::new();
    receipts.record(record("open", Progress::Running), true).unwrap();
    receipts.record(ended("a"), true).unwrap();
    let later = clock::monotonic() + Duration::from_secs(60);
    assert_eq!(taken(&receipts, later, 8, Pace::EndsOnly), ["a"]);
    assert_eq!(taken(&receipts, later, 8, Pace::EndsOnly), [""; 0]);
    assert_eq!(taken(&receipts, later, 8, Pace::Live), ["open"]);
}

#[test]
fn what_lacks_only_its_last_boundaries_gives_its_place_to_others() {
    let receipts = Receipts::new();
    for index in 0..FOLLOWED_MAX {
        receipts.record(record(&format!("r{index}"), Progress::Running), true).unwrap();
    }
    assert_eq!(receipts.record(ended("other"), true), Err(ReceiptsFull));
    let mut incomplete = ended("r0");
    let assigned = Crossing { boundary: "Assigned".to_owned(), at: LedgerTime(1), detail: String::new() };
    incomplete.timeline.push(assigned);
    receipts.record(incomplete, true).unwrap();
    let now = clock::monotonic() + Duration::from_secs(60);
    let (written, _) = receipts.take_due(now, 1, Pace::EndsOnly, &mut Found::default()).remove(0);
    receipts.finish(&written, &Outcome::Written { resource_version: "1".to_owned() }, now);
    assert_eq!(receipts.record(ended("other"), true), Err(ReceiptsFull));
    assert_eq!(taken(&receipts, now, 1, Pace::EndsOnly), [""; 0]);
    assert_eq!(receipts.record(ended("other"), true), Ok(()));
    assert_eq!(receipts.latest(&written.lease), None);
}

#[test]
fn under_pressure_few_are_written_at_once_unless_many_wait() {
    let at_once = [0, 127, 128, 500, 100_000].map(at_once_under_pressure);
    assert_eq!(at_once, [2, 2, 3, 5, WRITES_AT_ONCE]);
}
