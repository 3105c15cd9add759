//! When a receipt is written. Pure: the time comes in as an argument.

use std::time::{Duration, Instant};

use spaceport_crds::LeasePhase;

use super::record::LeaseRecord;
use super::standing::Standing;

/// A lease that is open for this long gets its receipt while it is open: so that everything a person has time to look for
/// is there (docs/rules.md, Writes per lease).
const OPEN_FOR: Duration = Duration::from_secs(2);
/// A phase rests for this long before it is written: Reserved and Running follow each other closely.
const PHASE_RESTS: Duration = Duration::from_secs(1);
/// What is written of a lease's place in its queue rests for this long: a queue moves with every lease that ends, and who
/// looks twice within seconds loses nothing. So a lease that waits for a minute costs five writes more at the most, and
/// one that is granted within 12 s costs none.
const PLACE_RESTS: Duration = Duration::from_secs(10);
/// The end waits this long for the slot to come back, so that both are one write.
const END_RESTS: Duration = Duration::from_secs(1);
/// The same while receipts give way: nobody looks, and a second write would be one more.
const END_RESTS_UNDER_PRESSURE: Duration = Duration::from_secs(3);
/// A lease whose slot never comes back (quarantine, lost node) is followed this long after its end is written.
const FREED_WITHIN: Duration = Duration::from_secs(60);
/// First and longest time between tries of a write that fails.
const BACKOFF_FIRST: Duration = Duration::from_millis(500);
const BACKOFF_LAST: Duration = Duration::from_secs(30);

/// How much is written of leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// All that a person may want to see while it happens.
    Live,
    /// Ends only: there is write pressure. What is left out is written when it is over, if it still says anything.
    EndsOnly,
}

/// What there is to write of a lease; the first goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum News {
    /// Its end: a row of an outbox waits for it (L10).
    End,
    /// That it is there, has got on, or has given its slot back.
    Phase,
    /// Nothing but where it stands in its queue.
    Place,
}

/// What is on the API server.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Written {
    /// The revision, to write over.
    pub(super) resource_version: String,
    phase: LeasePhase,
    standing: Option<Standing>,
    end: bool,
    complete: bool,
    at: Instant,
}

/// One lease that is followed.
#[derive(Debug)]
pub(super) struct Pending {
    record: LeaseRecord,
    live: bool,
    since: Instant,
    /// When the phase last changed.
    changed: Instant,
    written: Option<Written>,
    being_written: bool,
    failures: u32,
    not_before: Instant,
}

impl Pending {
    pub(super) fn new(record: LeaseRecord, live: bool, now: Instant) -> Self {
        Self {
            record,
            live,
            since: now,
            changed: now,
            written: None,
            being_written: false,
            failures: 0,
            not_before: now,
        }
    }

    /// Takes a newer state. One with an end is never replaced by one without (invariant 3).
    pub(super) fn update(&mut self, record: LeaseRecord, live: bool, now: Instant) {
        if self.record.end.is_some() && record.end.is_none() {
            return;
        }
        if self.record.phase() != record.phase() {
            self.changed = now;
        }
        self.record = record;
        self.live = live;
    }

    /// The newest state.
    #[cfg(test)]
    pub(super) fn record(&self) -> &LeaseRecord {
        &self.record
    }

    pub(super) fn is_unwritten(&self) -> bool {
        self.written.is_none() && !self.being_written && self.record.end.is_none()
    }

    pub(super) fn end_is_unwritten(&self) -> bool {
        self.record.end.is_some() && !self.written.as_ref().is_some_and(|written| written.end)
    }

    /// What a write would say first.
    pub(super) fn news(&self) -> News {
        let Some(written) = self.written.as_ref().filter(|_| !self.end_is_unwritten()) else {
            return if self.end_is_unwritten() { News::End } else { News::Phase };
        };
        let is_same = written.phase == self.record.phase() && written.end == self.record.end.is_some();
        let moved = match (self.record.shown_standing(), &written.standing) {
            (Some(now), Some(before)) => now.is_news(before),
            (now, before) => now.is_some() != before.is_some(),
        };
        if is_same && moved { News::Place } else { News::Phase }
    }

    /// When it should be written, if nothing changes.
    pub(super) fn due(&self, pace: Pace) -> Option<Instant> {
        let record = &self.record;
        let due = match &self.written {
            _ if self.end_is_unwritten() && record.is_complete() => self.changed,
            _ if self.end_is_unwritten() && pace == Pace::EndsOnly => self.changed + END_RESTS_UNDER_PRESSURE,
            _ if self.end_is_unwritten() => self.changed + END_RESTS,
            _ if pace == Pace::EndsOnly => return None,
            // The slot came back after the end was written.
            Some(written) if written.end && record.is_complete() && !written.complete => self.changed,
            Some(written) if written.end => return None,
            Some(written) if self.live && written.phase != record.phase() => self.changed + PHASE_RESTS,
            Some(written) if self.live && self.news() == News::Place => written.at + PLACE_RESTS,
            Some(_) => return None,
            None if self.live => self.since + OPEN_FOR,
            None => return None,
        };
        Some(due.max(self.not_before))
    }

    /// When it was to be written, if that is over and nobody does it.
    pub(super) fn overdue_since(&self, now: Instant, pace: Pace) -> Option<Instant> {
        self.due(pace).filter(|due| !self.being_written && *due <= now)
    }

    /// True when nothing more is to be written. Boundaries that are known and rest while receipts give way are written
    /// when that is over, however long it lasts.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let Some(written) = &self.written else { return false };
        let late = now.saturating_duration_since(written.at) >= FREED_WITHIN;
        self.can_be_spared() && (written.complete || (late && !self.record.is_complete()))
    }

    /// True if its end is written: at most its last boundaries are missing, and those hold nobody up.
    pub(super) fn can_be_spared(&self) -> bool {
        !self.being_written && self.written.as_ref().is_some_and(|written| written.end)
    }

    /// Starts a write of the present state.
    pub(super) fn begin(&mut self) -> (LeaseRecord, Option<Written>) {
        self.being_written = true;
        (self.record.clone(), self.written.clone())
    }

    /// The state was written. True if its end is durable by that for the first time.
    pub(super) fn succeeded(&mut self, record: &LeaseRecord, resource_version: String, now: Instant) -> bool {
        let end_was_written = self.written.as_ref().is_some_and(|written| written.end);
        self.being_written = false;
        self.failures = 0;
        let (phase, end, complete) = (record.phase(), record.end.is_some(), record.is_complete());
        let standing = record.shown_standing().cloned();
        self.written = Some(Written { resource_version, phase, standing, end, complete, at: now });
        end && !end_was_written
    }

    /// The write failed; the next try waits longer.
    pub(super) fn failed(&mut self, now: Instant) {
        self.being_written = false;
        // 2^6 times the first is already beyond the last.
        let wait = BACKOFF_FIRST * 2_u32.pow(self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        self.not_before = now + wait.min(BACKOFF_LAST);
    }
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::AccountName;
    use spaceport_core::page::Ending;

    use super::super::record::{Crossing, LeaseEnd, Progress, tests::hold};
    use super::super::standing::tests::place;
    use super::*;
    use crate::clock;

    struct Story {
        begin: Instant,
        pending: Pending,
        record: LeaseRecord,
        version: u32,
    }

    impl Story {
        fn new(live: bool) -> Self {
            let begin = clock::monotonic();
            let mut record = LeaseRecord::of_hold(&AccountName::new("bob"), &hold());
            record.progress = Progress::Queued;
            Self { begin, pending: Pending::new(record.clone(), live, begin), record, version: 0 }
        }

        fn at(&self, ms: u64) -> Instant {
            self.begin + Duration::from_millis(ms)
        }

        fn goes_on(&mut self, ms: u64, change: impl FnOnce(&mut LeaseRecord)) {
            change(&mut self.record);
            self.pending.update(self.record.clone(), self.pending.live, self.at(ms));
        }

        fn crosses(&mut self, ms: u64, boundary: &str) {
            self.goes_on(ms, |record| {
                let at = record.timeline[0].at.plus(ms);
                record.timeline.push(Crossing { boundary: boundary.to_owned(), at, detail: String::new() });
            });
        }

        /// Where it stands, as that is noted: with news only.
        fn stands(&mut self, ms: u64, position: u32) {
            self.goes_on(ms, |record| {
                let at = record.timeline[0].at.plus(ms);
                let mut place = place(position);
                // The promise stays where it is.
                place.latest_start_ms = place.latest_start_ms.map(|left| left.saturating_sub(ms));
                record.standing = Some(Standing::of(&place, at));
            });
        }

        fn ends(&mut self, ms: u64) {
            self.goes_on(ms, |record| {
                let end = LeaseEnd { ending: Ending::Released, used_ms: 1, charged_ms: 2, message: String::new() };
                record.end = Some(end);
            });
        }

        /// First millisecond within 200 s at which it is due.
        fn due_ms(&self) -> Option<u64> {
            self.due_ms_at(Pace::Live)
        }

        fn due_ms_at(&self, pace: Pace) -> Option<u64> {
            (0..200_000).step_by(100).find(|ms| self.pending.overdue_since(self.at(*ms), pace).is_some())
        }

        fn is_written(&mut self, ms: u64) -> bool {
            assert!(self.pending.overdue_since(self.at(ms), Pace::Live).is_some(), "not due at {ms}");
            let (record, _) = self.pending.begin();
            let again = self.pending.overdue_since(self.at(ms + 100_000), Pace::Live);
            assert_eq!(again, None, "one write at a time");
            self.version += 1;
            self.pending.succeeded(&record, self.version.to_string(), self.at(ms))
        }
    }

    #[test]
    fn short_lease_is_one_write() {
        let mut story = Story::new(true);
        story.goes_on(100, |record| record.progress = Progress::Running);
        story.crosses(100, "Assigned");
        story.ends(500);
        assert_eq!(story.due_ms(), Some(1500), "waits for its slot");
        story.crosses(700, "Freed");
        assert_eq!(story.due_ms(), Some(500), "then nothing is missing");
        assert!(story.is_written(700), "its end is durable");
        assert!(story.pending.is_over(story.at(700)));
    }

    #[test]
    fn long_lease_is_created_updated_and_ended() {
        let mut story = Story::new(true);
        assert_eq!(story.due_ms(), Some(2000));
        assert!(!story.is_written(2000), "created while it waits");
        assert_eq!(story.due_ms(), None, "nothing changes");
        story.goes_on(5000, |record| record.progress = Progress::Reserved);
        story.crosses(5000, "Assigned");
        story.goes_on(5100, |record| record.progress = Progress::Running);
        assert_eq!(story.due_ms(), Some(6100), "two phases, one write");
        assert!(!story.is_written(6100));
        story.ends(9000);
        assert!(story.is_written(10_000));
        assert!(!story.pending.is_over(story.at(10_000)), "its slot is not back");
        story.crosses(12_000, "Freed");
        assert!(!story.is_written(12_000), "a second write of the end is no second end");
        assert!(story.pending.is_over(story.at(12_000)));
    }

    #[test]
    fn where_a_lease_stands_is_written_again_when_that_is_news_and_not_often() {
        let mut story = Story::new(true);
        story.stands(0, 9);
        assert!(!story.is_written(2000));
        assert_eq!(story.due_ms(), None, "that time passes is no news");
        story.stands(5000, 4);
        story.stands(8000, 3);
        assert_eq!((story.due_ms(), story.pending.news()), (Some(12_000), News::Place));
        assert_eq!(story.due_ms_at(Pace::EndsOnly), None, "never under pressure");
        assert!(!story.is_written(12_000));
        assert_eq!(story.due_ms(), None, "both steps were one write");
        story.stands(13_000, 1);
        story.stands(14_000, 3);
        assert_eq!(story.due_ms(), None, "it stands where it stood when it was written");
        story.stands(15_000, 1);
        assert_eq!(story.due_ms(), Some(22_000));
        story.goes_on(16_000, |record| record.progress = Progress::Reserved);
        let news = (story.due_ms(), story.pending.news());
        assert_eq!(news, (Some(17_000), News::Phase), "it gets on: no write for its place");
        assert!(!story.is_written(17_000));
        story.ends(18_000);
        assert_eq!(story.pending.news(), News::End);
    }

    #[test]
    fn a_lease_that_gets_on_soon_costs_no_write_more_for_its_place() {
        for is_moving in [false, true] {
            let mut story = Story::new(true);
            let mut writes = 0;
            for ms in (0..11_000).step_by(500) {
                if is_moving {
                    story.stands(ms, 30 - (ms / 500) as u32);
                }
                if story.pending.overdue_since(story.at(ms), Pace::Live).is_some() {
                    story.is_written(ms);
                    writes += 1;
                }
            }
            assert_eq!(writes, 1);
        }
    }

    #[test]
    fn with_receipts_at_the_end_no_place_is_written() {
        let mut story = Story::new(false);
        story.stands(0, 2);
        story.stands(30_000, 1);
        assert_eq!(story.due_ms(), None);
    }

    #[test]
    fn receipts_at_the_end_only() {
        let mut story = Story::new(false);
        assert_eq!(story.due_ms(), None);
        story.goes_on(5000, |record| record.progress = Progress::Running);
        assert_eq!(story.due_ms(), None);
        story.ends(9000);
        assert!(story.due_ms().is_some());
    }

    #[test]
    fn under_pressure_a_lease_is_one_write_and_what_was_left_out_comes_when_it_is_over() {
        let mut story = Story::new(true);
        story.goes_on(5000, |record| record.progress = Progress::Running);
        story.crosses(5000, "Assigned");
        assert_eq!(story.due_ms_at(Pace::EndsOnly), None, "it is not created while it runs");
        assert_eq!(story.due_ms(), Some(2000), "but as soon as the pressure is over");
        assert!(!story.is_written(6000));
        story.goes_on(7000, |record| record.progress = Progress::Queued);
        assert_eq!(story.due_ms_at(Pace::EndsOnly), None, "it is not updated");
        story.ends(9000);
        assert_eq!(story.due_ms_at(Pace::EndsOnly), Some(12_000), "its end waits longer for its slot");
        story.crosses(10_000, "Freed");
        assert_eq!(story.due_ms_at(Pace::EndsOnly), Some(9000), "then both are one write");
    }

    #[test]
    fn under_pressure_a_slot_that_comes_back_late_is_no_write_of_its_own() {
        let mut story = Story::new(true);
        story.crosses(0, "Assigned");
        story.ends(0);
        assert!(story.is_written(3000));
        story.crosses(4000, "Freed");
        assert_eq!(story.due_ms_at(Pace::EndsOnly), None);
        assert!(story.due_ms().is_some(), "it is written when the pressure is over");
        assert!(!story.pending.is_over(story.at(10 * 60_000)), "however long that lasts");
        assert!(!story.is_written(10 * 60_000), "a second write of the end is no second end");
        assert!(story.pending.is_over(story.at(10 * 60_000)));
    }

    #[test]
    fn failed_writes_are_tried_again_ever_more_slowly() {
        let mut story = Story::new(true);
        story.ends(0);
        for wait in [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000] {
            let _ = story.pending.begin();
            story.pending.failed(story.begin);
            assert_eq!(story.due_ms(), Some(wait));
        }
    }

    #[test]
    fn slot_that_never_comes_back_is_not_waited_for_for_ever() {
        let mut story = Story::new(true);
        story.crosses(0, "Assigned");
        story.ends(0);
        assert!(story.is_written(1000));
        assert!(!story.pending.is_over(story.at(60_900)));
        assert!(story.pending.is_over(story.at(61_000)));
    }

    #[test]
    fn end_is_not_forgotten() {
        let mut story = Story::new(true);
        let before = story.record.clone();
        story.ends(100);
        story.pending.update(before, true, story.at(200));
        assert!(story.pending.end_is_unwritten());
    }
}
