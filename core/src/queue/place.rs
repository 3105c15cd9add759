//! Places in the queue and what was told with them, across terms (L17).

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Steady};

/// Bits of a place that number the requests of its term; the rest are the term's epoch. A trillion requests a term, and
/// sixteen million terms, one every two seconds for a year; terms after that count as one.
const NUMBER_BITS: u32 = 40;
const NUMBER_MAX: u64 = (1 << NUMBER_BITS) - 1;
/// The last term whose places can be told from those of the next.
pub const EPOCH_MAX: u64 = u64::MAX >> NUMBER_BITS;

/// The n-th place of a term as one number: every place of an earlier term is smaller.
pub const fn place_of(epoch: Epoch, number: u64) -> u64 {
    let epoch = if epoch.0 < EPOCH_MAX { epoch.0 } else { EPOCH_MAX };
    let number = if number < NUMBER_MAX { number } else { NUMBER_MAX };
    (epoch << NUMBER_BITS) | number
}

/// `(epoch, n)` of a place.
pub const fn parts_of(place: u64) -> (Epoch, u64) {
    (Epoch(place >> NUMBER_BITS), place & NUMBER_MAX)
}

/// What a request was told where it waited before, as its agent presents it to the next leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presented {
    /// Term of its place.
    pub epoch: Epoch,
    /// Number of its place in that term, from 1 on.
    pub number: u64,
    /// Its latest start; None if it waited for its account.
    pub promised: Option<Promised>,
}

/// A latest start as an agent was told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promised {
    /// Longest wait, milliseconds from when it was told.
    pub wait_ms: u64,
    /// How long ago that was, milliseconds.
    pub ago_ms: u64,
}

/// When a request begins at the latest (invariant 11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// When it was given, or presented to this term.
    pub given: Steady,
    /// How long it had waited for it by then, in an earlier term; milliseconds.
    pub earlier_ms: u64,
    /// The longest wait that was promised, milliseconds; that in earlier terms is a part of it.
    pub wait_ms: u64,
}

// === impl Promised ===

impl Promised {
    /// It had run out before it was presented: nobody can keep it any more.
    pub const fn is_over(&self) -> bool {
        self.wait_ms <= self.ago_ms
    }
}

// === impl Promise ===

impl Promise {
    /// Given now.
    pub const fn new(given: Steady, wait_ms: u64) -> Self {
        Self { given, earlier_ms: 0, wait_ms }
    }

    /// Given in an earlier term, and presented now.
    pub const fn presented(now: Steady, promised: &Promised) -> Self {
        Self { given: now, earlier_ms: promised.ago_ms, wait_ms: promised.wait_ms }
    }

    /// What was promised.
    pub const fn latest_start(&self) -> Steady {
        self.given.plus(self.wait_ms.saturating_sub(self.earlier_ms))
    }

    /// How long it has been kept waiting since it was promised, milliseconds.
    pub const fn waited_ms(&self, now: Steady) -> u64 {
        now.since(self.given).saturating_add(self.earlier_ms)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// L17: an earlier epoch before a later one, then n.
        #[test]
        fn places_are_in_the_order_of_their_terms_and_numbers(
            one in (0..EPOCH_MAX, 0..NUMBER_MAX),
            other in (0..EPOCH_MAX, 0..NUMBER_MAX),
        ) {
            let place = |(epoch, number)| place_of(Epoch(epoch), number);
            prop_assert_eq!(place(one).cmp(&place(other)), one.cmp(&other));
            prop_assert_eq!(parts_of(place(one)), (Epoch(one.0), one.1));
        }
    }

    #[test]
    fn no_number_reaches_into_another_term() {
        assert_eq!(parts_of(place_of(Epoch(3), u64::MAX)), (Epoch(3), NUMBER_MAX));
        assert!(place_of(Epoch(3), u64::MAX) < place_of(Epoch(4), 0));
        assert_eq!(place_of(Epoch(u64::MAX), 1), place_of(Epoch(EPOCH_MAX), 1));
    }

    #[test]
    fn a_promise_goes_on_where_it_was_presented() {
        let promise = Promise::presented(Steady(1_000), &Promised { wait_ms: 60_000, ago_ms: 40_000 });
        assert_eq!(promise.latest_start(), Steady(21_000));
        assert_eq!((promise.waited_ms(Steady(1_000)), promise.waited_ms(Steady(31_000))), (40_000, 70_000));
        assert!(Promised { wait_ms: 5, ago_ms: 5 }.is_over() && !Promised { wait_ms: 5, ago_ms: 4 }.is_over());
    }
}
