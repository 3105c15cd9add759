//! Requests that wait, across leaders and refused orders: where they stand, and that each is known to the leader of now (L17).

use spaceport_core::ids::Size;
use spaceport_core::slots as packing;
use spaceport_proto::nodelink::{self as link, node_message::Message};

use super::state::Phase;
use super::{Answer, FAILOVER_WAIT_MS, Machine, Pending, Step, wire};
use crate::fault::{self, Fault};

/// Where a request waits, as a leader told it. The next leader is told the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Term in which it was given.
    pub epoch: u64,
    /// Its number there.
    pub number: u64,
    /// What was promised with it.
    pub promise: Option<Promise>,
}

/// A latest start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promise {
    /// The longest wait.
    pub wait_ms: u64,
    /// When it was told, BOOTTIME.
    pub told_ms: u64,
}

impl Machine {
    /// Tells the leader of every request, those first that have waited longest: one that it can start at once must not be
    /// one whose elders it has not heard of.
    pub(super) fn present_requests(&mut self, now_ms: u64) {
        let place = |pending: &Pending| pending.place.map_or((u64::MAX, 0), |place| (place.epoch, place.number));
        let mut waiting: Vec<((u64, u64), u64)> =
            self.tickets.iter().map(|(ticket, pending)| (place(pending), *ticket)).collect();
        waiting.sort_unstable();
        if fault::is(Fault::PlacesAreForgotten) {
            self.tickets.values_mut().for_each(|pending| pending.place = None);
            waiting.reverse();
        }
        for (_, ticket) in waiting {
            self.send_request(now_ms, ticket);
        }
    }

    /// Requests that waited for an end to be told (L16).
    pub(super) fn send_unsent(&mut self, now_ms: u64) {
        if !self.linked {
            return;
        }
        let unsent: Vec<u64> =
            self.tickets.iter().filter(|(_, pending)| !pending.sent).map(|(ticket, _)| *ticket).collect();
        unsent.into_iter().for_each(|ticket| self.send_request(now_ms, ticket));
    }

    pub(super) fn send_request(&mut self, now_ms: u64, ticket: u64) {
        let Some(pending) = self.tickets.get_mut(&ticket) else { return };
        pending.sent = true;
        let promise = pending.place.and_then(|place| place.promise);
        self.steps.push_back(Step::Send(Message::Request(link::Request {
            ticket,
            pod: Some(wire::pod(&pending.caller)),
            task_id: pending.task,
            size: wire::size(pending.size).into(),
            declared_ms: pending.declared_ms,
            token: pending.token.as_ref().map_or_else(String::new, |token| token.expose().to_owned()),
            place_epoch: pending.place.map_or(0, |place| place.epoch),
            place_number: pending.place.map_or(0, |place| place.number),
            promised_ms: promise.map_or(0, |promise| promise.wait_ms),
            promised_ago_ms: promise.map_or(0, |promise| now_ms.saturating_sub(promise.told_ms)),
        })));
    }

    pub(super) fn unlinked(&mut self, now_ms: u64) {
        self.linked = false;
        for pending in self.tickets.values_mut().filter(|pending| pending.sent) {
            pending.sent = false;
            pending.give_up_ms = now_ms.saturating_add(FAILOVER_WAIT_MS);
        }
    }

    pub(super) fn give_up_tickets(&mut self, now_ms: u64) {
        let late: Vec<u64> = self
            .tickets
            .iter()
            .filter(|(_, pending)| !pending.sent && pending.give_up_ms <= now_ms)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in late {
            self.tickets.remove(&ticket);
            let reason = "no lease broker is connected to this node".to_owned();
            self.steps.push_back(Step::Answer { ticket, answer: Answer::Unavailable { reason } });
        }
    }

    pub(super) fn queued(&mut self, now_ms: u64, queued: &link::Queued) {
        let Some(pending) = self.tickets.get_mut(&queued.ticket) else { return };
        pending.waits_for_node = !queued.concurrency;
        let promise = Promise { wait_ms: queued.latest_start_ms, told_ms: now_ms };
        pending.place = Some(Place {
            epoch: queued.place_epoch,
            number: queued.place_number,
            promise: (promise.wait_ms > 0).then_some(promise),
        });
        let answer = Answer::Queued { concurrency: queued.concurrency, caller: queued.caller() };
        self.steps.push_back(Step::Answer { ticket: queued.ticket, answer });
    }

    /// With fewer slots than when it was made no promise holds. A leader that is there tells new ones; whoever comes next must
    /// not be asked to keep the old ones.
    pub(super) fn note_capacity(&mut self) {
        let cards: Vec<packing::Card> = self.packing_cards().collect();
        let capacity = packing::capacity(&cards, Size::Large);
        if capacity < std::mem::replace(&mut self.capacity, capacity) {
            // One that was ordered and waits for its slot may be presented again, too.
            let ordered = self.leases.values_mut().filter_map(|lease| lease.order.place.as_mut());
            let waiting = self.tickets.values_mut().filter_map(|pending| pending.place.as_mut());
            waiting.chain(ordered).for_each(|place| place.promise = None);
        }
    }

    pub(super) fn packing_cards(&self) -> impl Iterator<Item = packing::Card> {
        self.cards.iter().map(|card| packing::Card {
            index: card.index,
            large_slots: card.large_slots,
            grantable: card.grantable,
            quarantined_slots: wire::quarantined(card, &self.book),
        })
    }

    /// Leases that have waited for a slot as long as their orders allow: the broker may give them up from now on, so they do
    /// not begin any more (L9).
    pub(super) fn refuse_overdue(&mut self, now_ms: u64) {
        let overdue: Vec<(String, String)> = self
            .leases
            .values()
            .filter(|lease| lease.phase == Phase::Waiting && lease.order.is_overdue(now_ms))
            .map(|lease| (lease.id.clone(), lease.order.overdue_reason()))
            .collect();
        let any = !overdue.is_empty();
        for (id, reason) in overdue {
            self.refuse_waiting(now_ms, &id, reason);
        }
        if any {
            // The slots that they were to have are for others who wait.
            self.begin_waiting(now_ms);
        }
    }

    /// A lease that waited for a slot which did not come back: its hold is voided at no charge, and its request goes back to
    /// the broker. A leader of a later term than its order's has never heard of the request, so it is presented to that one.
    pub(super) fn refuse_waiting(&mut self, now_ms: u64, id: &str, reason: String) {
        let Some(lease) = self.leases.remove(id) else { return };
        self.book.owners.retain(|_, owner| owner != id);
        self.dirty = true;
        let ticket = lease.ticket;
        let is_unknown = self.linked && lease.order.epoch < self.epoch;
        let pending = Pending {
            caller: lease.caller,
            task: lease.task,
            size: lease.size,
            declared_ms: lease.declared_ms,
            token: lease.token,
            give_up_ms: now_ms.saturating_add(FAILOVER_WAIT_MS),
            sent: self.linked,
            waits_for_node: true,
            place: lease.order.place,
        };
        self.tickets.insert(ticket, pending);
        self.steps.push_back(Step::Send(Message::Refused(link::Refused { lease: id.to_owned(), reason })));
        if is_unknown {
            self.send_request(now_ms, ticket);
        }
    }
}
