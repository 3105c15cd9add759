//! The latest start that is promised to a request that has to wait (docs/rules.md, Queue; invariant 11).

use crate::request::{Request, SLOTS_MAX};

/// Limits in time around a lease (L8, L9), milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimits {
    /// From the grant to `/allow`.
    pub allow_ms: u64,
    /// From the declared end to the kill.
    pub grace_ms: u64,
    /// From the end to a free slot.
    pub clear_ms: u64,
}

/// What the promise is made from, at the moment of an arrival. Times are slot-milliseconds unless they are called hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// R: what running leases may still take.
    pub held_ms: u64,
    /// A: holds of those of its class that came before it and wait.
    pub ahead_ms: u64,
    /// B: holds of all that wait for a whole card, of whatever class.
    pub wholes_ms: u64,
    /// Longest hold (H) that the pool allows, milliseconds.
    pub longest_hold_ms: u64,
    /// C: slots of the node.
    pub slots: u64,
    /// phi, percent.
    pub age_lane_percent: u64,
    /// s: the floor of its class, percent.
    pub floor_percent: u64,
}

// === impl HoldLimits ===

impl HoldLimits {
    /// The pool's defaults.
    pub const PRODUCT: Self = Self { allow_ms: 30_000, grace_ms: 2000, clear_ms: 10_000 };
    /// A lease takes at most what it declares. The sharpest case for the promise.
    pub const NONE: Self = Self { allow_ms: 0, grace_ms: 0, clear_ms: 0 };

    /// H: from a start to a free slot at the latest.
    pub const fn hold_ms(self, declared_ms: u64) -> u64 {
        self.allow_ms + self.running_ms(declared_ms)
    }

    /// From `/allow` to a free slot at the latest.
    pub const fn running_ms(self, declared_ms: u64) -> u64 {
        declared_ms + self.grace_ms + self.clear_ms
    }
}

// === impl Standing ===

impl Standing {
    /// The longest wait that is promised, milliseconds:
    /// (R + (A + d) / (phi s) + 6 H_max) / (C - 1) + H_max, and B / 2 more for a whole card.
    ///
    /// A class that earns phi s / (1 - phi) for each slot-second of the fast lane can pay for A and d when all lanes have
    /// used (A + d) / (phi s). 6 H_max is what can be under way when it begins: a credit of two slots x H_max that each
    /// of the two other classes may have saved, and the fast start that makes up the last of it. One half is idle at
    /// most while a card is drained, hence C - 1. The last H_max is the drain itself, which a half too may have to sit
    /// out. Requests for whole cards pass one reservation, one after the other, whatever their class: B / 2.
    pub fn latest_ms(&self, request: &Request, hold_ms: u64) -> u64 {
        let own = hold_ms * request.slots();
        // Of a trace of years, of which nobody is told more than that it is for ever.
        let lanes = (self.ahead_ms + own).saturating_mul(10_000) / (self.age_lane_percent * self.floor_percent);
        let shared = (self.held_ms + lanes + 6 * self.longest_hold_ms) / (self.slots - 1).max(1);
        let in_turn = if request.slots() == SLOTS_MAX { self.wholes_ms / SLOTS_MAX } else { 0 };
        shared + self.longest_hold_ms + in_turn
    }
}
