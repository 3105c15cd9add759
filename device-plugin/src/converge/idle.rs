//! Frozen workers that wait for reuse (N11, N12, L16), and when they must go.
//!
//! A process in a frozen cgroup runs no handler. A worker of the `spaces` client has one for SIGTERM (device API A7), so
//! the signal waits, and so does whoever joins the worker: a Python parent at the end of its interpreter, for ever. To thaw
//! the worker so that it leaves by itself would let it compute outside every lease for as long as its handler likes, and
//! an idle worker has nothing to finish; so it is killed, as one that must make room.

use super::state::{Idle, Phase, Worker};
use super::{Machine, Step};
use crate::process_status::{ProcessStatus, SignalSet};
use crate::slots::Slot;

/// Between two looks at the frozen workers. Somebody may be waiting for the worker's end, for whom a quarter of a second is
/// no wait (Ctrl-C, a container's stop with its 30 s); a look reads one small file for each held slot. While nothing is
/// held there are none.
pub const IDLE_LOOK_MS: u64 = 250;

/// Why a frozen worker ends although nobody needs its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdleEnd {
    /// It was sent a signal that it would act on if it ran.
    #[error("signal {0} waits for it")]
    AskedToEnd(u32),
    /// Nobody is left who could use it again: only the process that forked it holds the pipe to it.
    #[error("its parent {was} has ended and it belongs to {now} now")]
    Orphaned {
        /// Host pid of the process that forked it.
        was: u32,
        /// Host pid of its parent now.
        now: u32,
    },
}

impl Worker {
    /// Whether this worker, seen like this while frozen, must go. Its children are not asked about: whoever waits for one of
    /// those is the worker itself. A blocked signal counts: it says what its sender wants, and losing an idle worker costs
    /// a fork.
    pub fn must_end(&self, seen: &ProcessStatus) -> Option<IdleEnd> {
        let asked = seen.pending.intersection(SignalSet::ASK_TO_END).without(seen.ignored).first();
        let orphaned = self.parent.filter(|was| *was != seen.parent);
        asked.map(IdleEnd::AskedToEnd).or(orphaned.map(|was| IdleEnd::Orphaned { was, now: seen.parent }))
    }
}

impl Machine {
    /// A worker has just become idle: looks begin, one pause from now.
    pub(super) fn expect_idle_look(&mut self, now_ms: u64) {
        if self.book.idle.is_empty() {
            self.idle_look_ms = now_ms.saturating_add(IDLE_LOOK_MS);
        }
    }

    /// When the frozen workers are looked at next; `None` while there are none.
    pub(super) fn next_idle_look(&self) -> Option<u64> {
        (!self.book.idle.is_empty()).then_some(self.idle_look_ms)
    }

    pub(super) fn look_at_idle(&mut self, now_ms: u64) {
        if self.next_idle_look().is_some_and(|due_ms| due_ms <= now_ms) {
            self.idle_look_ms = now_ms.saturating_add(IDLE_LOOK_MS);
            let looks = self.book.idle.values().map(|idle| Step::LookAtIdle { worker: idle.worker.clone() });
            self.steps.extend(looks);
        }
    }

    pub(super) fn idle_seen(&mut self, cgroup_id: u64, seen: &ProcessStatus) {
        let held = self.book.idle.iter().find(|(_, idle)| idle.worker.cgroup_id == cgroup_id);
        // Gone meanwhile, or being thawed for a lease: `Step::Reuse` looks for itself.
        let Some((_, idle)) = held.filter(|(slot, _)| !self.is_being_reused(**slot)) else { return };
        if let Some(why) = idle.worker.must_end(seen) {
            self.steps.push_back(Step::IdleEnds { worker: idle.worker.clone(), why });
            self.end_idle(|idle| idle.worker.cgroup_id == cgroup_id);
        }
    }

    fn is_being_reused(&self, slot: Slot) -> bool {
        let owner = self.book.owners.get(&slot).and_then(|id| self.leases.get(id));
        owner.is_some_and(|lease| matches!(lease.phase, Phase::Starting { .. }))
    }

    /// Kills the frozen workers on any part of the slot.
    pub(super) fn end_idle_on(&mut self, slot: Slot) {
        self.end_idle_where(|held, _| held.overlaps(slot));
    }

    /// Kills the frozen workers that match; their slots clear.
    pub(super) fn end_idle(&mut self, matches: impl Fn(&Idle) -> bool) {
        self.end_idle_where(|_, idle| matches(idle));
    }

    fn end_idle_where(&mut self, matches: impl Fn(Slot, &Idle) -> bool) {
        let found: Vec<Slot> =
            self.book.idle.iter().filter(|(slot, idle)| matches(**slot, idle)).map(|(slot, _)| *slot).collect();
        for slot in found {
            if let Some(idle) = self.book.idle.remove(&slot) {
                self.clear(slot, None, idle.worker, idle.clear_limit_ms);
            }
        }
    }
}
