//! When a page is written: refusals, what is shown beside it, its outbox and the receipts.

use spaceport_core::ids::{AccountName, Size};
use spaceport_core::lease::{Command, Effect, LAZY_PATIENCE_MS, NOTE_PERIOD_MS};
use spaceport_core::page::{CLOSED_MAX, Ending};
use spaceport_core::queue::WaitsFor;

use crate::world::{BOB, World, denial, order, policy};

#[test]
fn refusals_are_written_at_most_every_five_seconds() {
    let mut story = World::begin(1, 60_000, 9);
    story.run(Ending::Released, 5_000);
    let before = story.writes;
    for _ in 0..50 {
        assert!(denial(&story.ask(BOB, Size::Large, 99_000)).is_some());
    }
    assert_eq!(story.writes, before + 1, "the first at once");
    story.pass(NOTE_PERIOD_MS);
    assert_eq!(story.writes, before + 2, "all others together");
    let row = story.page(BOB).last_denial.clone().map(|row| row.denial.kind());
    assert_eq!(row, Some("IllegalDuration"));
    assert_eq!(story.page(BOB).recent_outcomes.len(), 20);
}

#[test]
fn what_is_shown_beside_a_page_costs_at_most_a_write_in_five_seconds() {
    let mut story = World::begin(1, 60_000, 9);
    let show = || Command::Show { account: AccountName::new(BOB) };
    let before = story.writes;
    for _ in 0..50 {
        story.tell(show());
    }
    assert_eq!(story.writes, before + 1, "the first at once");
    // A lease's writes show it as well: nothing is left to be written for it.
    story.run(Ending::Released, 10);
    story.pass(NOTE_PERIOD_MS);
    assert_eq!(story.writes, before + 3);
    let windows = story.page(BOB).windows.clone();
    story.tell(show());
    assert_eq!((story.writes, &story.page(BOB).windows), (before + 4, &windows), "it changes nothing else");
    story.tell(Command::Show { account: AccountName::new("nobody") });
    assert_eq!(story.writes, before + 4);
}

/// A clock that is wrong for a while must not end a window by what is shown meanwhile (L20): a deleted account would be
/// let go before its window has ended (L4).
#[test]
fn what_is_shown_beside_a_page_does_not_move_its_time() {
    let mut story = World::begin(1, 60_000, 9);
    story.run(Ending::Released, 10);
    let (before, last_time) = (story.writes, story.page(BOB).last_time);
    story.pass(48 * 3_600_000);
    story.tell(Command::Show { account: AccountName::new(BOB) });
    assert_eq!((story.writes, story.page(BOB).last_time), (before + 1, last_time));
}

#[test]
fn a_full_outbox_pauses_its_account_only() {
    let mut story = World::begin(1, 6_000_000, 9);
    story.account("ann", policy(60_000, 9));
    for _ in 0..CLOSED_MAX {
        story.run(Ending::Released, 10);
    }
    let Effect::Queue(place) = &story.ask(BOB, Size::Large, 10_000)[0] else { panic!("the outbox is full") };
    assert_eq!(place.waits_for, WaitsFor::Account);
    order(&story.ask("ann", Size::Large, 10_000));
    let lease = story.page(BOB).closed[0].hold.lease.clone();
    order(&story.tell(Command::ReceiptWritten { account: AccountName::new(BOB), lease }));
}

#[test]
fn receipts_ride_along_with_the_next_write() {
    let mut story = World::begin(1, 6_000_000, 9);
    story.run(Ending::Released, 10);
    let (before, lease) = (story.writes, story.page(BOB).closed[0].hold.lease.clone());
    story.tell(Command::ReceiptWritten { account: AccountName::new(BOB), lease: lease.clone() });
    story.tell(Command::ReceiptWritten { account: AccountName::new(BOB), lease });
    story.pass(LAZY_PATIENCE_MS - 1);
    assert_eq!(story.writes, before);
    story.run(Ending::Released, 10);
    assert_eq!((story.writes, story.page(BOB).closed.len()), (before + 2, 1));
}
