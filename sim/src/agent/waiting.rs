//! Calls and leases that wait: places that are presented to the next leader (L17), slots that clear (L14), and how long that
//! may take (L9).

use spaceport_core::ids::{Epoch, LeaseId, Size, Ticket};
use spaceport_core::lease::{Command, Place};
use spaceport_core::queue::{Presented, Promised};
use spaceport_core::slots::{Card, Occupancy, pick};

use super::idle::Spot;
use super::{Agent, Asked, Notice, Phase, Told};
use crate::broken::NodeFault;

/// Without a broker an agent tells its callers so after this (docs/rules.md, Queue).
const FAILOVER_WAIT_MS: u64 = 30_000;

impl Agent {
    /// A request waits.
    pub(super) fn queued(&mut self, place: &Place, now: u64) {
        if let Some(asked) = self.tickets.get_mut(&place.ticket) {
            asked.told = Some(Told { place: place.place, wait_ms: place.latest_start_ms, at: now });
        }
    }

    /// Tells the leader of every request, in the order of their places.
    pub(super) fn present_all(&mut self, now: u64) {
        let place = |asked: &Asked| asked.told.map_or((Epoch(u64::MAX), 0), |told| told.place);
        let mut waiting: Vec<((Epoch, u64), Ticket)> =
            self.tickets.iter().map(|(ticket, asked)| (place(asked), ticket.clone())).collect();
        waiting.sort();
        for (_, ticket) in waiting {
            self.present(&ticket, now);
        }
    }

    /// Tells the leader of a request, if there is one.
    pub(super) fn present(&mut self, ticket: &Ticket, now: u64) {
        let leads = self.leader.is_some();
        let Some(asked) = self.tickets.get_mut(ticket).filter(|_| leads) else { return };
        asked.sent = true;
        let mut request = asked.request.clone();
        request.presented = asked.told.map(|told| Presented {
            epoch: told.place.0,
            number: told.place.1,
            promised: told.wait_ms.map(|wait_ms| Promised { wait_ms, ago_ms: now.saturating_sub(told.at) }),
        });
        self.send(Command::Request(Box::new(request)));
    }

    /// Callers without a broker are told so.
    pub fn give_up(&mut self, now: u64) {
        let is_late = |asked: &Asked| !asked.sent && asked.unsent_since + FAILOVER_WAIT_MS <= now;
        let late: Vec<Ticket> =
            self.tickets.iter().filter(|(_, asked)| is_late(asked)).map(|(ticket, _)| ticket.clone()).collect();
        for ticket in late {
            self.tickets.remove(&ticket);
            self.notices.push(Notice::GaveUp(ticket));
        }
    }

    /// Begins what waits and has a clear slot now, in the order in which it came; refuses what can have none any more.
    pub(super) fn begin_waiting(&mut self, now: u64) {
        let mut waiting = self.of_phase(|phase| *phase == Phase::Waiting);
        waiting.sort_by_key(|id| self.leases.get(id).map(|held| held.arrival));
        for id in waiting {
            self.begin(&id, now);
        }
    }

    fn begin(&mut self, id: &LeaseId, now: u64) {
        let Some(held) = self.leases.get(id) else { return };
        if held.begin_by < now && !self.has(NodeFault::WaitsForEver) {
            self.notices.push(Notice::WaitedTooLong(id.clone()));
            return self.refuse_waiting(id, now);
        }
        let (size, after) = (held.order.size, held.order.after.clone());
        let kept = held.reserved.filter(|card| self.fits(*card, size, &self.spoken_for(false, Some(id))));
        let place = kept.map(|card| {
            let is_clear = self.fits(card, size, &self.occupancy());
            (card, if is_clear { Spot::Clear } else { Spot::Clears })
        });
        let (order, request) = (held.order.clone(), held.request.clone());
        let place = place.or_else(|| self.place(&order, &request, Some(id)));
        if let Some((card, spot)) = place {
            self.take(card, spot, &order, &request);
        }
        match place {
            Some((card, spot)) if spot.is_clear() => {
                if self.is_pending(after.as_ref()) {
                    self.notices.push(Notice::Swapped(id.clone()));
                }
                if let Some(held) = self.leases.get_mut(id) {
                    (held.card, held.reserved, held.phase) = (Some(card), None, spot.phase(now));
                }
                self.tell_slot(id);
                self.tell_reuse(id);
                self.notices.push(Notice::Began(id.clone()));
            }
            Some((card, _)) => self.await_slot(id, Some(card)),
            None if self.is_pending(after.as_ref()) => self.await_slot(id, None),
            None => {
                self.notices.push(Notice::NoSlot { lease: id.clone() });
                self.refuse_waiting(id, now);
            }
        }
        self.tell_idle();
    }

    fn await_slot(&mut self, id: &LeaseId, card: Option<u32>) {
        let Some(held) = self.leases.get_mut(id) else { return };
        if std::mem::replace(&mut held.reserved, card) != card {
            self.tell_slot(id);
        }
    }

    /// Tells the leader where a lease is or will be.
    pub(super) fn tell_slot(&mut self, id: &LeaseId) {
        let Some(slot) = self.leases.get(id).map(super::Held::slot) else { return };
        let node = self.name.clone();
        self.send(Command::Started { node, lease: id.clone(), slot });
    }

    /// Leases that have waited for a slot as long as their orders allow do not begin any more.
    pub(super) fn refuse_overdue(&mut self, now: u64) {
        if self.has(NodeFault::WaitsForEver) {
            return;
        }
        let is_overdue = |id: &LeaseId| self.leases.get(id).is_some_and(|held| held.begin_by < now);
        let overdue: Vec<LeaseId> =
            self.of_phase(|phase| *phase == Phase::Waiting).into_iter().filter(is_overdue).collect();
        for id in &overdue {
            self.notices.push(Notice::WaitedTooLong(id.clone()));
            self.refuse_waiting(id, now);
        }
        if !overdue.is_empty() {
            self.begin_waiting(now);
        }
    }

    /// Its call waits again. A leader of a later term than its order's has never heard of it, so it is presented again.
    fn refuse_waiting(&mut self, id: &LeaseId, now: u64) {
        let Some(held) = self.leases.remove(id) else { return };
        self.refuse(id.clone());
        let ticket = held.request.ticket.clone();
        let sent = self.leader.is_some();
        let asked = Asked { request: held.request, sent, unsent_since: now, told: held.told };
        self.tickets.insert(ticket.clone(), asked);
        if held.order.epoch < self.epoch {
            self.present(&ticket, now);
        }
    }

    fn fits(&self, card: u32, size: Size, occupancy: &Occupancy) -> bool {
        let cards: Vec<Card> = self.cards.iter().filter(|known| known.index == card).cloned().collect();
        pick(&cards, occupancy, size, &[]).is_some()
    }
}
