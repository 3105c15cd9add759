//! Workers that are kept for the next call of their own function (L16): where they are, whom they make room for, and what
//! the broker hears of them.

use spaceport_core::ids::{LeaseId, Size};
use spaceport_core::lease::{Command, IdleWorker, Order, Request};

use super::{Agent, Notice, Phase};

/// A worker that is kept.
#[derive(Clone, Debug)]
pub struct Idle {
    /// The call that it served last.
    pub request: Request,
    /// The lease that it had then; names it.
    pub lease: LeaseId,
    /// Its card.
    pub card: u32,
    /// Size of its slot.
    pub size: Size,
}

/// What a lease finds on its card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spot {
    /// Its own worker.
    Own,
    /// A clear slot.
    Clear,
    /// A slot that is clear when a worker of somebody else has gone.
    Evicts,
    /// A slot that clears.
    Clears,
}

// === impl Spot ===

impl Spot {
    pub(super) const fn is_clear(self) -> bool {
        matches!(self, Self::Own | Self::Clear)
    }

    /// The clock of one that finds its own worker starts at once.
    pub(super) const fn phase(self, now: u64) -> Phase {
        match self {
            Self::Own => Phase::Running { since: now, reused: true },
            Self::Clear => Phase::Assigned { since: now },
            Self::Evicts | Self::Clears => Phase::Waiting,
        }
    }
}

// === impl Agent ===

impl Agent {
    /// All of them, and those that have to go, for the broker.
    pub fn idle_list(&self) -> Vec<IdleWorker> {
        let told = |idle: &Idle| IdleWorker { worker: idle.request.worker.clone(), card: idle.card, size: idle.size };
        let leaving = self.evicted.values().map(|(card, size)| IdleWorker { worker: None, card: *card, size: *size });
        self.idle.iter().map(told).chain(leaving).collect()
    }

    /// Tells the leader of them when they are others than it was told last.
    pub(super) fn tell_idle(&mut self) {
        let idle = self.idle_list();
        if self.leader.is_some() && idle != self.idle_told {
            self.idle_told.clone_from(&idle);
            let node = self.name.clone();
            self.send(Command::Heartbeat { node, cards: None, idle: Some(idle) });
        }
    }

    /// The card of a worker that served a call like this one.
    pub(super) fn own_idle(&self, order: &Order, request: &Request) -> Option<u32> {
        self.find_own(order, request).map(|index| self.idle[index].card)
    }

    fn find_own(&self, order: &Order, request: &Request) -> Option<usize> {
        let grantable = |card: u32| self.cards.iter().any(|known| known.index == card && known.fits(order.size));
        self.idle.iter().position(|idle| {
            let serves = idle.request.worker == request.worker && idle.size == order.size;
            serves && grantable(idle.card) && !order.avoid.contains(&idle.card)
        })
    }

    /// A lease takes what it has found: its own worker is kept no longer, others make room. The leader is told behind the
    /// lease's own report.
    pub(super) fn take(&mut self, card: u32, spot: Spot, order: &Order, request: &Request) {
        match spot {
            Spot::Own => {
                if let Some(index) = self.find_own(order, request) {
                    self.idle.remove(index);
                }
            }
            Spot::Evicts => self.make_room(card, true, order),
            Spot::Clears => self.make_room(card, false, order),
            Spot::Clear => {}
        }
    }

    /// For a lease on a slot that is not clear: `now` it lacks nothing but a worker's slot, else one that clears too.
    fn make_room(&mut self, card: u32, now: bool, order: &Order) {
        let Some(known) = self.cards.iter().find(|known| known.index == card).cloned() else { return };
        let slots = known.large_slots.saturating_sub(known.quarantined_slots);
        let mut used = self.spoken_for(now, Some(&order.lease)).used(card) + known.slots_of(order.size);
        let kept = self.idle.iter().filter(|idle| idle.card == card);
        used += kept.map(|idle| known.slots_of(idle.size)).sum::<u32>();
        // Each round takes one of them away; the first has the first slot.
        while used > slots {
            let Some(index) = self.idle.iter().position(|idle| idle.card == card) else { break };
            used -= known.slots_of(self.idle[index].size);
            self.evict(index);
        }
    }

    fn evict(&mut self, index: usize) {
        let Idle { lease, card, size, .. } = self.idle.remove(index);
        self.evicted.insert(lease.clone(), (card, size));
        self.notices.push(Notice::Evicted(lease));
    }

    /// A worker that is kept is asked to end, or its app is gone.
    pub fn lose_idle(&mut self, number: usize) {
        if number < self.idle.len() {
            self.evict(number);
            self.tell_idle();
        }
    }

    /// The worker of this lease stays, if it can: true if it does.
    pub(super) fn keep(&mut self, lease: &LeaseId) -> bool {
        let Some(held) = self.leases.get(lease) else { return false };
        let Some(card) = held.card else { return false };
        let grantable = self.cards.iter().any(|known| known.index == card && known.grantable);
        let needed = self.others_wait(&held.request);
        if needed || !grantable || held.request.worker.is_none() {
            return false;
        }
        let idle = Idle { request: held.request.clone(), lease: lease.clone(), card, size: held.order.size };
        let place = self.idle.partition_point(|other| other.card <= card);
        self.idle.insert(place, idle);
        true
    }

    fn others_wait(&self, request: &Request) -> bool {
        let waiting = self.leases.values().any(|held| held.phase == Phase::Waiting);
        let others = self.tickets.values().any(|asked| {
            let waits_for_node = asked.told.is_some_and(|told| told.wait_ms.is_some());
            waits_for_node && asked.request.worker != request.worker
        });
        waiting || (others && !self.keeps_eagerly)
    }

    /// Tells the leader that a lease began on its own worker.
    pub(super) fn tell_reuse(&mut self, lease: &LeaseId) {
        let reused =
            self.leases.get(lease).is_some_and(|held| matches!(held.phase, Phase::Running { reused: true, .. }));
        if reused {
            let (node, lease) = (self.name.clone(), lease.clone());
            self.send(Command::Running { node, lease });
        }
    }
}
