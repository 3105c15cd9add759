//! Whether the API server can hardly keep up with page writes. Then receipts give way: they are written at their end only,
//! and old ones stay a little longer. Pages never give way (docs/rules.md, Writes per lease).
//!
//! What is measured are the page writes themselves: how long they take, how long the oldest has been under way, and
//! whether the server sends them away. A state machine without a clock, and a handle that measures.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;

/// Page writes that take this long on average: a healthy etcd answers in a few milliseconds, one on a slow disk in some
/// tens, and visitors begin to feel more than this.
const SLOW: Duration = Duration::from_millis(250);
/// The average that is calm again. Far below the other, so that receipts do not come and go with each of them.
const CALM: Duration = Duration::from_millis(100);
/// A single write that is under way for so long: nothing is answered at present, so that no average would show it.
const STUCK: Duration = Duration::from_secs(1);
/// How long it must be calm. Longer than etcd needs to elect a leader, and than most leases that a receipt is put off for.
const CALM_FOR: Duration = Duration::from_secs(10);
/// Each write counts for one part of so many in the average.
const SMOOTHING: u32 = 8;
/// Writes that are watched at once. The ledger has at most 64 under way; more would be those of a term that has ended.
const UNDER_WAY_MAX: usize = 256;

/// How a write was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// By the API server, with whatever it decided.
    Decided,
    /// Sent away for now (429), or not answered at all.
    Overloaded,
}

/// Why there is pressure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// Writes take this long on average.
    Slow(Duration),
    /// The oldest write has been under way for so long.
    Stuck(Duration),
    /// A write was sent away or not answered.
    Overloaded,
}

/// The state machine.
#[derive(Debug, Default)]
struct Pressure {
    under_way: BTreeMap<u64, Instant>,
    next: u64,
    /// The average, and when it was last added to.
    average: Option<(Duration, Instant)>,
    overloaded: Option<Instant>,
    /// Since when the pressure is high, and when it last was not calm.
    high: Option<(Instant, Instant)>,
}

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Rose(Sign),
    Fell { lasted: Duration },
}

/// Measures, and says how it is; a cheap handle.
#[derive(Clone, Debug, Default)]
pub struct PressureGauge {
    /// A std mutex: it is never held across an await.
    state: Arc<Mutex<Pressure>>,
}

/// A page write under way. Dropped without an answer, as at the end of a term, it counts for nothing.
#[derive(Debug)]
pub struct WriteUnderWay {
    gauge: PressureGauge,
    number: Option<u64>,
}

// === impl Sign ===

impl fmt::Display for Sign {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slow(average) => write!(
                formatter,
                "page writes take {} ms on average, {} ms or more",
                average.as_millis(),
                SLOW.as_millis()
            ),
            Self::Stuck(age) => write!(formatter, "a page write is under way for {} ms", age.as_millis()),
            Self::Overloaded => formatter.write_str("the API server sends writes away or does not answer"),
        }
    }
}

// === impl Pressure ===

impl Pressure {
    /// A write leaves. None if too many are watched already.
    fn begun(&mut self, now: Instant) -> Option<u64> {
        if self.under_way.len() >= UNDER_WAY_MAX {
            return None;
        }
        self.next = self.next.wrapping_add(1);
        self.under_way.insert(self.next, now);
        Some(self.next)
    }

    fn ended(&mut self, number: u64, answer: Answer, now: Instant) {
        let Some(begun) = self.under_way.remove(&number) else { return };
        let took = now.saturating_duration_since(begun);
        let average = match self.fresh_average(now) {
            Some(average) => (average * (SMOOTHING - 1) + took) / SMOOTHING,
            None => took,
        };
        self.average = Some((average, now));
        if answer == Answer::Overloaded {
            self.overloaded = Some(now);
        }
    }

    /// The average of late; where nothing was written for a while it says nothing.
    fn fresh_average(&self, now: Instant) -> Option<Duration> {
        let (average, at) = self.average?;
        (now.saturating_duration_since(at) < CALM_FOR).then_some(average)
    }

    /// The sign that there is, with `slow` and `stuck` as the bounds.
    fn sign(&self, now: Instant, slow: Duration) -> Option<Sign> {
        let age = |since: Instant| now.saturating_duration_since(since);
        if self.overloaded.is_some_and(|at| age(at) < CALM_FOR) {
            return Some(Sign::Overloaded);
        }
        let oldest = self.under_way.values().min().map(|begun| age(*begun));
        let stuck = oldest.filter(|oldest| *oldest >= STUCK).map(Sign::Stuck);
        stuck.or_else(|| self.fresh_average(now).filter(|average| *average >= slow).map(Sign::Slow))
    }

    fn is_high(&self) -> bool {
        self.high.is_some()
    }

    /// Takes in that time has passed.
    fn look(&mut self, now: Instant) -> Option<Change> {
        let Some((since, last)) = self.high else {
            let sign = self.sign(now, SLOW)?;
            self.high = Some((now, now));
            return Some(Change::Rose(sign));
        };
        if self.sign(now, CALM).is_some() {
            self.high = Some((since, now));
            return None;
        }
        if now.saturating_duration_since(last) < CALM_FOR {
            return None;
        }
        self.high = None;
        Some(Change::Fell { lasted: now.saturating_duration_since(since) })
    }
}

// === impl PressureGauge ===

impl PressureGauge {
    /// A page write begins now, by waiting for its turn.
    pub fn write(&self) -> WriteUnderWay {
        let number = self.lock().begun(clock::monotonic());
        WriteUnderWay { gauge: self.clone(), number }
    }

    /// A write of something else was sent away or not answered: that goes for pages as well.
    pub fn overloaded(&self) {
        self.lock().overloaded = Some(clock::monotonic());
    }

    /// Whether receipts have to give way at `now`.
    pub fn is_high(&self, now: Instant) -> bool {
        let mut state = self.lock();
        match state.look(now) {
            Some(Change::Rose(sign)) => {
                tracing::warn!(%sign, "Write pressure: receipts are written at their end only, old ones stay for now");
            }
            Some(Change::Fell { lasted }) => {
                tracing::info!(
                    seconds = lasted.as_secs(),
                    "The write pressure is over; receipts follow their leases again"
                );
            }
            None => {}
        }
        state.is_high()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pressure> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl WriteUnderWay ===

impl WriteUnderWay {
    /// It was answered, or will not be.
    pub fn ended(mut self, answer: Answer) {
        if let Some(number) = self.number.take() {
            self.gauge.lock().ended(number, answer, clock::monotonic());
        }
    }
}

impl Drop for WriteUnderWay {
    fn drop(&mut self) {
        if let Some(number) = self.number.take() {
            self.gauge.lock().under_way.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes one after the other, on a clock of its own.
    struct Story {
        pressure: Pressure,
        now: Instant,
    }

    impl Story {
        fn new() -> Self {
            Self { pressure: Pressure::default(), now: clock::monotonic() }
        }

        fn passes(&mut self, ms: u64) -> Option<Change> {
            self.now += Duration::from_millis(ms);
            self.pressure.look(self.now)
        }

        /// `count` writes that take `ms` each; the changes on the way.
        fn writes(&mut self, count: usize, ms: u64) -> Vec<Change> {
            let mut changes = Vec::new();
            for _ in 0..count {
                let number = self.pressure.begun(self.now).unwrap();
                self.now += Duration::from_millis(ms);
                self.pressure.ended(number, Answer::Decided, self.now);
                changes.extend(self.pressure.look(self.now));
            }
            changes
        }
    }

    #[test]
    fn writes_that_are_slow_on_average_are_pressure_and_a_single_slow_one_is_none() {
        let mut story = Story::new();
        assert_eq!(story.writes(100, 10), []);
        assert_eq!(story.writes(1, 900), [], "a hiccup");
        assert_eq!(story.writes(50, 10), []);
        let rose = story.writes(50, 300);
        assert!(matches!(rose[..], [Change::Rose(Sign::Slow(average))] if average >= SLOW), "{rose:?}");
    }

    #[test]
    fn it_falls_only_after_it_was_calm_for_long() {
        let mut story = Story::new();
        assert_eq!(story.writes(20, 400).len(), 1);
        assert_eq!(story.writes(200, 150), [], "faster, and far from calm: 30 s of it");
        assert!(story.pressure.is_high());
        assert_eq!(story.writes(90, 50), [], "less than 10 s since the average is calm");
        let fell = story.writes(200, 50);
        assert!(matches!(fell[..], [Change::Fell { .. }]), "{fell:?}");
        assert!(!story.pressure.is_high());
        assert_eq!(story.writes(100, 150), [], "what kept it high does not raise it");
    }

    #[test]
    fn writes_that_are_not_answered_are_pressure_before_they_end() {
        let mut story = Story::new();
        let number = story.pressure.begun(story.now).unwrap();
        assert_eq!(story.passes(999), None);
        assert_eq!(story.passes(1), Some(Change::Rose(Sign::Stuck(STUCK))));
        assert_eq!(story.passes(4_000), None);
        story.pressure.ended(number, Answer::Overloaded, story.now);
        assert_eq!(story.passes(9_999), None);
        assert_eq!(story.passes(9_999), None, "calm for less than 10 s");
        assert!(matches!(story.passes(10_000), Some(Change::Fell { .. })), "and nothing was written meanwhile");
    }

    #[test]
    fn a_write_that_is_sent_away_is_pressure_at_once() {
        let mut story = Story::new();
        let number = story.pressure.begun(story.now).unwrap();
        story.now += Duration::from_millis(2);
        story.pressure.ended(number, Answer::Overloaded, story.now);
        assert_eq!(story.passes(0), Some(Change::Rose(Sign::Overloaded)));
    }

    #[test]
    fn a_write_whose_term_has_ended_counts_for_nothing() {
        let gauge = PressureGauge::default();
        drop(gauge.write());
        let later = clock::monotonic() + Duration::from_secs(5);
        assert!(!gauge.is_high(later));
        let under_way = gauge.write();
        assert!(gauge.is_high(later + Duration::from_secs(5)));
        under_way.ended(Answer::Decided);
    }

    #[test]
    fn what_is_watched_has_a_bound() {
        let mut story = Story::new();
        assert!((0..UNDER_WAY_MAX).all(|_| story.pressure.begun(story.now).is_some()));
        assert_eq!(story.pressure.begun(story.now), None);
    }
}
