//! Frozen workers that wait for reuse (N11, N12, L16), and when they must go.
//!
//! A process in a frozen cgroup runs no handler. A worker of the `spaces` client has one for SIGTERM (device API A7), so
//! the signal waits, and so does whoever joins the worker: a Python parent at the end of its interpreter, for ever. To thaw
//! the worker so that it leaves by itself would let it compute outside every lease for as long as its handler likes, and
//! an idle worker has nothing to finish; so it is killed, as one that must make room.

use std::collections::BTreeMap;

use spaceport_proto::nodelink::{self as link, node_message::Message};

use super::state::{Idle, Phase, Worker};
use super::{Machine, Step, wire};
use crate::process_status::{ProcessStatus, SignalSet};
use crate::slots::{Slot, of_card};

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

    /// The frozen workers that a call of their own function would get, and those that have to go and whose slots clear, in the
    /// order of their slots, for the broker. Not those whose slot it knows to be in use by a lease, nor those on a card that
    /// has no such slot any more.
    pub(super) fn idle_report(&self) -> Vec<link::IdleWorker> {
        let is_begun = |id: &String| self.leases.get(id).is_some_and(|lease| lease.phase != Phase::Waiting);
        let begun: Vec<Slot> = self.book.owners.iter().filter(|(_, id)| is_begun(id)).map(|(slot, _)| *slot).collect();
        let kept = self.book.idle.iter().filter(|(slot, _)| !self.book.clears(**slot));
        let kept = kept.map(|(slot, idle)| (*slot, wire::idle(*slot, idle)));
        let leaving = self.book.clearing.values().filter(|clearing| clearing.lease.is_none());
        let leaving = leaving.map(|clearing| clearing.slot).filter(|slot| !self.book.quarantined.contains_key(slot));
        // Two workers may leave one slot: one that was kept, and one that had died before.
        let all: BTreeMap<Slot, link::IdleWorker> =
            kept.chain(leaving.map(|slot| (slot, wire::leaving(slot)))).collect();
        let is_there = |slot: Slot| {
            let card = self.cards.iter().find(|card| card.index == slot.card);
            card.is_some_and(|card| of_card(card.index, card.large_slots, slot.size()).contains(&slot))
        };
        // Until it runs again, which is told first, a lease is expected to find its worker there.
        let is_reused = |slot: Slot| self.book.idle.contains_key(&slot) && self.is_being_reused(slot);
        let is_free = |slot: Slot| is_reused(slot) || !begun.iter().any(|other| other.overlaps(slot));
        let told = |slot: Slot| is_there(slot) && is_free(slot);
        all.into_iter().filter(|(slot, _)| told(*slot)).map(|(_, worker)| worker).collect()
    }

    /// Tells the leader of the frozen workers when they are others than it was told last. At once: it expects orders where
    /// they are (L7).
    pub(super) fn tell_idle(&mut self) {
        if !self.linked {
            return;
        }
        let idle = self.idle_report();
        if idle != self.idle_told {
            self.idle_told.clone_from(&idle);
            let heartbeat = link::Heartbeat { idle_changed: true, idle, ..link::Heartbeat::default() };
            self.steps.push_back(Step::Send(Message::Heartbeat(heartbeat)));
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
