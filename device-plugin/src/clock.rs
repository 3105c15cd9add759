//! The only clocks of the agent (L20): BOOTTIME, which neither steps nor stops while the machine sleeps.

use rustix::time::{ClockId, clock_gettime};

/// CLOCK_BOOTTIME in milliseconds.
pub fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs().saturating_mul(1000).saturating_add(now.tv_nsec.unsigned_abs() / 1_000_000)
}
