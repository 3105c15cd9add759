//! The one place where the operator reads clocks; everything else gets the time as an argument (L20).

use std::time::Instant;

use jiff::Timestamp;

/// The wall clock.
#[allow(clippy::disallowed_methods)] // The shell's only read of the wall clock.
pub fn wall() -> Timestamp {
    Timestamp::now()
}

/// The monotonic clock: intervals are measured with it, so that a stepped wall clock can not stretch them.
#[allow(clippy::disallowed_methods)] // The shell's only read of the monotonic clock.
pub fn monotonic() -> Instant {
    #[cfg(test)]
    let now = Instant::now() + passed::PASSED.get();
    #[cfg(not(test))]
    let now = Instant::now();
    now
}

/// Time that a test lets pass without waiting for it.
#[cfg(test)]
pub mod passed {
    use std::cell::Cell;
    use std::time::Duration;

    thread_local! {
        /// Of this thread: a test runs on one, and so do the tasks it starts.
        pub(super) static PASSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// From now on the monotonic clock is so much later.
    pub fn pass(time: Duration) {
        PASSED.set(PASSED.get() + time);
    }
}

/// Our wall clock against the API server's, in milliseconds; positive when ours is ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockDifference {
    /// Best estimate.
    pub ahead_ms: i64,
    /// The truth lies within this much of it: half a second for the header's whole seconds, and half the round trip.
    pub uncertainty_ms: i64,
}

impl ClockDifference {
    /// Computes the difference from an HTTP `Date` header and the times between which it was made. None if the header is
    /// not an HTTP date.
    pub fn measure(sent: Timestamp, received: Timestamp, date: &str) -> Option<Self> {
        let server = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date).ok()?;
        let (sent, received) = (sent.as_millisecond(), received.as_millisecond());
        let round_trip = received.saturating_sub(sent).max(0);
        // The header drops the fraction of a second, so on average the server's clock was half a second further.
        let server = server.as_millisecond().saturating_add(500);
        Some(Self {
            ahead_ms: sent.saturating_add(round_trip / 2).saturating_sub(server),
            uncertainty_ms: 500 + round_trip / 2,
        })
    }

    /// True if the clocks certainly differ by more than `limit_ms`.
    pub fn exceeds(self, limit_ms: u64) -> bool {
        self.ahead_ms.unsigned_abs() > limit_ms.saturating_add(self.uncertainty_ms.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn difference_is_taken_in_the_middle_of_the_round_trip() {
        let sent = at("2026-11-21T12:00:10.000Z");
        let received = at("2026-11-21T12:00:10.200Z");
        let same = ClockDifference::measure(sent, received, "Sat, 21 Nov 2026 12:00:10 GMT").unwrap();
        assert_eq!(same, ClockDifference { ahead_ms: -400, uncertainty_ms: 600 });
        assert!(!same.exceeds(5000));
        let ahead = ClockDifference::measure(sent, received, "Sat, 21 Nov 2026 12:00:03 GMT").unwrap();
        assert_eq!(ahead.ahead_ms, 6600);
        assert!(ahead.exceeds(5000));
        let behind = ClockDifference::measure(sent, received, "Sat, 21 Nov 2026 12:00:17 GMT").unwrap();
        assert_eq!(behind.ahead_ms, -7400);
        assert!(behind.exceeds(5000));
    }

    #[test]
    fn what_is_no_http_date_is_refused() {
        let now = at("2026-11-21T12:00:10Z");
        for bad in ["", "today", "2026-11-21T12:00:10Z"] {
            assert_eq!(ClockDifference::measure(now, now, bad), None, "{bad}");
        }
    }
}
