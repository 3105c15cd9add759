//! How leases end on their node, what is said of it, and what a restart leaves (L10, L11).

use spaceport_core::ids::{LeaseId, Size};
use spaceport_core::lease::{Command, EndReport, FreedAs};
use spaceport_core::page::Ending;

use super::{Agent, Held, Notice, Phase};
use crate::broken::NodeFault;

/// What is left of an agent that begins anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// The process alone: workers live on.
    Process,
    /// The process, and its checkpoint is lost: what it finds it kills (docs/rules.md, N19).
    Checkpoint,
    /// The node.
    Reboot,
    /// The node, and the checkpoint is lost.
    RebootAndCheckpoint,
}

impl Agent {
    /// The worker is done, dead, or its caller gone.
    pub fn end(&mut self, lease: &LeaseId, ending: Ending, now: u64) {
        let Some(held) = self.leases.get_mut(lease) else { return };
        let (used_ms, ending) = match (held.phase, ending) {
            (Phase::Ended { .. }, _) => return,
            (Phase::Running { since, .. }, ending) => (now.saturating_sub(since), ending),
            // Nothing ran, whatever was meant.
            (_, Ending::Cancelled | Ending::Undelivered | Ending::PlatformFault) => (0, ending),
            (_, _) => (0, Ending::NeverAllowed),
        };
        let report = EndReport { ending, used_ms };
        let returned = matches!(held.phase, Phase::Running { .. }) && ending == Ending::Released;
        let kept = returned && self.keep(lease);
        let Some(held) = self.leases.get_mut(lease) else { return };
        // Without a slot there is nothing to clear.
        let freed = kept || held.card.is_none();
        held.phase = Phase::Ended { report, freed };
        self.notices.push(Notice::Ended(lease.clone(), report));
        let (node, lease) = (self.name.clone(), lease.clone());
        self.send(Command::Ended { node, lease: lease.clone(), report, kept });
        if freed {
            self.tell_freed(lease, if kept { FreedAs::Held } else { FreedAs::Free });
        }
        self.tell_idle();
    }

    pub(super) fn cancel(&mut self, lease: &LeaseId, now: u64) {
        match self.leases.get(lease).map(|held| held.phase) {
            Some(Phase::Ended { .. }) => self.repeat(),
            Some(_) => self.end(lease, Ending::Cancelled, now),
            // Not on this node, or forgotten: the broker voids on this answer (L9).
            None => {
                let report = EndReport { ending: Ending::Cancelled, used_ms: 0 };
                let node = self.name.clone();
                self.send(Command::Ended { node, lease: lease.clone(), report, kept: false });
                self.tell_freed(lease.clone(), FreedAs::Free);
            }
        }
    }

    pub(super) fn acknowledged(&mut self, lease: &LeaseId, ended: bool, freed: bool) {
        let Some(held) = self.leases.get_mut(lease) else { return };
        if let Phase::Ended { freed: is_free, .. } = held.phase {
            held.ended_acknowledged |= ended;
            held.freed_acknowledged |= freed && is_free;
        }
        if held.ended_acknowledged && held.freed_acknowledged {
            self.leases.remove(lease);
        }
    }

    /// The slot of a worker that was kept is clear, or will not be. Nobody but the inventory tells of it.
    pub fn free_evicted(&mut self, lease: &LeaseId, how: FreedAs, now: u64) {
        let Some((card, size)) = self.evicted.remove(lease) else { return };
        if how == FreedAs::Quarantined {
            self.quarantine(card, size);
        }
        self.tell_idle();
        self.begin_waiting(now);
    }

    fn quarantine(&mut self, index: u32, size: Size) {
        if let Some(card) = self.cards.iter_mut().find(|known| known.index == index) {
            card.quarantined_slots = (card.quarantined_slots + card.slots_of(size)).min(card.large_slots);
            self.tell_cards();
        }
    }

    /// Its slot is clear, or will not be.
    pub fn free(&mut self, lease: &LeaseId, how: FreedAs, now: u64) {
        let Some(held) = self.leases.get_mut(lease) else { return };
        let Phase::Ended { report, freed: false } = held.phase else { return };
        held.phase = Phase::Ended { report, freed: true };
        let (card, size) = (held.card, held.order.size);
        if let Some(card) = card.filter(|_| how == FreedAs::Quarantined) {
            self.quarantine(card, size);
        }
        self.tell_freed(lease.clone(), how);
        self.begin_waiting(now);
    }

    /// The inventory has changed.
    pub fn tell_cards(&mut self) {
        let (node, cards) = (self.name.clone(), Some(self.cards.clone()));
        self.send(Command::Heartbeat { node, cards, idle: None });
    }

    /// A card fails or comes back. What runs there ends as a platform fault (N3, docs/rules.md).
    pub fn set_card(&mut self, index: u32, grantable: bool, now: u64) {
        let Some(card) = self.cards.iter_mut().find(|card| card.index == index) else { return };
        card.grantable = grantable;
        if !grantable {
            let on_card = |id: &LeaseId| self.leases.get(id).is_some_and(|held| held.card == Some(index));
            for lease in self
                .of_phase(|phase| !matches!(phase, Phase::Ended { .. }))
                .into_iter()
                .filter(on_card)
                .collect::<Vec<_>>()
            {
                self.end(&lease, Ending::PlatformFault, now);
            }
        }
        self.tell_cards();
        self.begin_waiting(now);
    }

    /// L10: reports are repeated until they are acknowledged.
    pub fn repeat(&mut self) {
        let reports: Vec<(LeaseId, EndReport, bool)> = self
            .leases
            .iter()
            .filter_map(|(id, held)| match held.phase {
                Phase::Ended { report, freed } => Some((id.clone(), report, freed)),
                _ => None,
            })
            .collect();
        for (lease, report, freed) in reports {
            let node = self.name.clone();
            self.send(Command::Ended { node, lease: lease.clone(), report, kept: false });
            if freed {
                self.tell_freed(lease, FreedAs::Free);
            }
        }
    }

    /// Leases whose ends its checkpoint has, and of which no broker has said that they are durable (L10).
    pub fn open_ends(&self) -> Vec<LeaseId> {
        let is_open = |held: &Held| matches!(held.phase, Phase::Ended { .. }) && !held.ended_acknowledged;
        self.leases.iter().filter(|(_, held)| is_open(held)).map(|(lease, _)| lease.clone()).collect()
    }

    /// The agent begins anew at world time `world_ms`. Every connection is gone.
    pub fn restart(&mut self, what: Restart, world_ms: u64) {
        let now = self.clock(world_ms);
        self.unlink(now);
        self.instance += 1;
        self.tickets.clear();
        if self.has(NodeFault::ForgetsEnds) {
            for lease in self.open_ends() {
                self.leases.remove(&lease);
            }
        }
        match what {
            Restart::Process => {
                for lease in self.of_phase(|phase| *phase == Phase::Waiting) {
                    self.end(&lease, Ending::Undelivered, now);
                }
            }
            Restart::Checkpoint => {
                // What has ended is forgotten; what lives is found by its cgroup and killed.
                self.leases.retain(|_, held| !matches!(held.phase, Phase::Ended { .. } | Phase::Waiting));
                self.lose_all(now);
            }
            Restart::Reboot | Restart::RebootAndCheckpoint => {
                self.lose_all(now);
                self.booted = world_ms;
                if what == Restart::RebootAndCheckpoint {
                    self.leases.clear();
                }
                for card in &mut self.cards {
                    card.quarantined_slots = 0;
                }
            }
        }
    }

    /// Nothing runs any more, and the memory of everything is back; the end is reported as a platform fault.
    fn lose_all(&mut self, now: u64) {
        self.idle.clear();
        self.evicted.clear();
        for lease in self.leases.keys().cloned().collect::<Vec<_>>() {
            if let Some(held) = self.leases.get_mut(&lease) {
                let over = matches!(held.phase, Phase::Ended { .. });
                if !over {
                    held.phase = Phase::Assigned { since: now };
                }
                held.card = None;
            }
            self.end(&lease, Ending::PlatformFault, now);
            if let Some(held) = self.leases.get_mut(&lease)
                && let Phase::Ended { report, .. } = held.phase
            {
                held.phase = Phase::Ended { report, freed: true };
            }
        }
    }
}
