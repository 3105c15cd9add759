//! From a request to a running clock: tickets, Start orders, the choice of the slot, `/allow`.

use spaceport_core::ids::Size;
use spaceport_core::protocol::{AllowRefusal, Secret};
use spaceport_core::slots as packing;
use spaceport_crds::Isolation;
use spaceport_proto::nodelink::{self as link, node_message::Message};

use super::state::{Caller, Card, Clearing, Ending, EndingKind, Idle, Lease, Order, Phase, Worker};
use super::{Answer, BROKER_WAIT_MS, Machine, Pending, SUCCESSOR_MS, Step, TICKETS_MAX, wire};
use crate::epoch;
use crate::slots::{self, Slot};

/// What separates the lease from its neighbour on the card (N18). Cards are not cut into instances here: a lease has a card
/// alone, or nothing but the watch over memory.
fn isolation(slot: Slot, cards: &[Card]) -> &'static str {
    let alone = cards.iter().any(|card| card.index == slot.card && card.large_slots <= 1);
    let isolation = if slot.size() == Size::Xlarge || alone { Isolation::Exclusive } else { Isolation::None };
    isolation.as_str()
}

impl Machine {
    #[allow(clippy::too_many_arguments)] // The fields of one event, taken apart.
    pub(super) fn scheduled(
        &mut self,
        now_ms: u64,
        ticket: u64,
        caller: Caller,
        task: u64,
        size: Option<Size>,
        declared_ms: u64,
        token: Option<Secret>,
    ) {
        if self.tickets.len() >= TICKETS_MAX {
            let reason = format!("{TICKETS_MAX} requests wait on this node already");
            self.steps.push_back(Step::Answer { ticket, answer: Answer::Unavailable { reason } });
            return;
        }
        self.void_uncertain(now_ms, &caller, task);
        let model = self.cards.first().map_or("", |card| card.model.as_str());
        let asked = self.sizes.settle(&caller, task, size, declared_ms, model);
        let pending = Pending {
            caller,
            task,
            size: asked.size,
            declared_ms: asked.declared_ms,
            token,
            give_up_ms: now_ms.saturating_add(BROKER_WAIT_MS),
            sent: false,
            waits_for_node: false,
            place: None,
        };
        self.tickets.insert(ticket, pending);
        if self.linked {
            self.send_request(now_ms, ticket);
        }
    }

    /// L16: the agent restarted after it answered `idle: true`; the same function asks again, so the answer was lost.
    fn void_uncertain(&mut self, now_ms: u64, caller: &Caller, task: u64) {
        let lost = self.leases.values().find(|lease| {
            lease.uncertain
                && lease.task == task
                && lease.caller.container == caller.container
                && matches!(lease.phase, Phase::Running { reused: true, .. })
        });
        if let Some(id) = lost.map(|lease| lease.id.clone()) {
            let message = "the agent restarted before the answer was delivered and the function asked again";
            self.end(now_ms, &id, EndingKind::Undelivered, message, None);
        }
    }

    pub(super) fn disconnected(&mut self, now_ms: u64, ticket: u64) {
        if let Some(pending) = self.tickets.remove(&ticket) {
            if pending.sent {
                self.steps.push_back(Step::Send(Message::Dequeue(link::Dequeue { ticket })));
            }
            return;
        }
        let lease = self.leases.values().find(|lease| lease.ticket == ticket && !lease.is_over());
        if let Some(id) = lease.map(|lease| lease.id.clone()) {
            let message = "the caller's connection closed before the answer was delivered";
            self.end(now_ms, &id, EndingKind::Undelivered, message, None);
        }
    }

    pub(super) fn linked(&mut self, now_ms: u64, epoch: u64) {
        if epoch < self.epoch {
            return;
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            self.steps.push_back(Step::RecordEpoch(epoch));
        }
        // What waited too long is no lease any more (L9). Joined says so, and is the first that this leader hears.
        self.refuse_overdue(now_ms);
        self.steps.retain(|step| !matches!(step, Step::Send(_)));
        self.linked = true;
        let leases = self.leases.values().map(|lease| wire::node_lease(lease, now_ms)).collect();
        self.idle_told = self.idle_report();
        let joined = link::Joined { epoch, cards: self.inventory_report(), leases, idle: self.idle_told.clone() };
        self.steps.push_back(Step::Send(Message::Joined(joined)));
        self.present_requests(now_ms);
        self.repeat_reports(now_ms, true);
    }

    pub(super) fn denied(&mut self, denied: link::Denied) {
        if self.tickets.remove(&denied.ticket).is_some() {
            let caller = denied.caller();
            let answer = Answer::Denied { denial: denied.denial, caller };
            self.steps.push_back(Step::Answer { ticket: denied.ticket, answer });
        }
    }

    pub(super) fn start(&mut self, now_ms: u64, order: link::Start) {
        let refuse = |machine: &mut Self, reason: String| {
            let refused = link::Refused { lease: order.lease.clone(), reason };
            machine.steps.push_back(Step::Send(Message::Refused(refused)));
        };
        if let Err(stale) = epoch::admit(self.epoch, order.epoch, now_ms, order.boottime_ms, order.order_ttl_ms) {
            return refuse(self, stale.to_string());
        }
        if self.leases.contains_key(&order.lease) {
            // The order came twice; Joined or the repeated reports say where the lease stands.
            return;
        }
        let Some(size) = wire::read_size(order.size()) else {
            return refuse(self, "the order names no size".to_owned());
        };
        if order.agent_instance != self.instance {
            return refuse(self, "the agent restarted; the request's connection is gone".to_owned());
        }
        let Some(pending) = self.tickets.get(&order.ticket) else {
            return refuse(self, "the caller is gone".to_owned());
        };
        // Orders that come after 2^64 others begin in no order; a checkpoint may say that this many have come.
        self.arrivals = self.arrivals.saturating_add(1);
        let mut lease = Lease {
            id: order.lease.clone(),
            arrival: self.arrivals,
            ticket: order.ticket,
            caller: pending.caller.clone(),
            task: pending.task,
            size,
            slot: None,
            order: Order::taken(&order, pending.place),
            after: (!order.after.is_empty()).then(|| order.after.clone()),
            avoid: order.avoid.clone(),
            declared_ms: order.declared_ms,
            grace_ms: order.grace_ms,
            allow_limit_ms: order.allow_limit_ms,
            clear_limit_ms: order.clear_limit_ms,
            class: order.caller,
            account: order.account.clone(),
            token: pending.token.clone(),
            phase: Phase::Waiting,
            worker: None,
            context_seen: false,
            uncertain: false,
            marks: Vec::new(),
        };
        lease.slot = self.pick(&lease);
        if lease.slot.is_none() && !self.is_pending(lease.after.as_deref()) {
            return refuse(self, self.no_slot(size));
        }
        self.tickets.remove(&order.ticket);
        if let Some(slot) = lease.slot {
            self.book.owners.insert(slot, lease.id.clone());
        }
        self.dirty = true;
        let id = lease.id.clone();
        self.leases.insert(id.clone(), lease);
        self.begin(now_ms, &id);
        self.tell_waiting(now_ms, &id);
    }

    /// The broker knows where a lease will be that waits, or that nobody knows it yet (L14).
    pub(super) fn tell_waiting(&mut self, now_ms: u64, id: &str) {
        if let Some(lease) = self.leases.get(id).filter(|lease| lease.phase == Phase::Waiting) {
            let started = wire::started(lease, isolation_of(lease, &self.cards), now_ms);
            self.steps.push_back(Step::Send(Message::Started(started)));
        }
    }

    fn no_slot(&self, size: Size) -> String {
        let grantable = self.cards.iter().filter(|card| card.grantable).count();
        format!(
            "no free {size} slot: {} cards ({grantable} grantable), {} slots leased, {} quarantined",
            self.cards.len(),
            self.book.owners.len(),
            self.book.quarantined.len()
        )
    }

    /// The named lease still owns its slot or the slot has not come back yet.
    fn is_pending(&self, after: Option<&str>) -> bool {
        after
            .and_then(|id| self.leases.get(id))
            .is_some_and(|lease| !matches!(&lease.phase, Phase::Ended { freed: Some(_), .. }))
    }

    /// The slot for a lease: its own idle worker's, else a clear one, else one whose idle worker must go, else one that
    /// clears already. Within each the card is picked by the function with which the broker predicted it (L7).
    fn pick(&self, lease: &Lease) -> Option<Slot> {
        let own = self.book.idle.iter().filter(|(_, idle)| serves(idle, lease)).map(|(slot, _)| *slot);
        let mut own = own.filter(|slot| slot.size() == lease.size && !self.book.clears(*slot));
        let owners: Vec<Slot> = self.book.owners.keys().copied().collect();
        let clearing: Vec<Slot> = self.book.clearing.values().map(|clearing| clearing.slot).collect();
        let idle: Vec<Slot> = self.book.idle.keys().copied().collect();
        own.find(|slot| self.pick_among(lease, &owners, Some(*slot)).is_some())
            .or_else(|| self.pick_among(lease, &[&owners[..], &clearing[..], &idle[..]].concat(), None))
            .or_else(|| self.pick_among(lease, &[&owners[..], &clearing[..]].concat(), None))
            .or_else(|| self.pick_among(lease, &owners, None))
    }

    /// A slot apart from all of `taken`; that one, if one is named.
    fn pick_among(&self, lease: &Lease, taken: &[Slot], only: Option<Slot>) -> Option<Slot> {
        let here = |card: &packing::Card| only.is_none_or(|slot| slot.card == card.index);
        let cards: Vec<packing::Card> = self.packing_cards().filter(here).collect();
        let mut occupancy = packing::Occupancy::default();
        for card in &cards {
            let parts = slots::of_card(card.index, card.large_slots, Size::Large);
            let used = parts.iter().filter(|part| taken.iter().any(|slot| slot.overlaps(**part))).count();
            // A card has at most two parts.
            occupancy.add(card.index, used as u32);
        }
        let index = packing::pick(&cards, &occupancy, lease.size, &lease.avoid)?;
        let card = cards.iter().find(|card| card.index == index)?;
        let apart = |slot: &Slot| {
            let quarantined = self.book.quarantined.keys();
            taken.iter().chain(quarantined).all(|other| !other.overlaps(*slot))
        };
        let candidates = slots::of_card(index, card.large_slots, lease.size);
        candidates.into_iter().filter(|slot| only.is_none_or(|only| only == *slot)).find(apart)
    }

    /// Begins every lease whose slot has become clear, in the order they came; refuses those that can have none any more.
    pub(super) fn begin_waiting(&mut self, now_ms: u64) {
        let mut waiting: Vec<(u64, String)> = self
            .leases
            .values()
            .filter(|lease| lease.phase == Phase::Waiting)
            .map(|lease| (lease.arrival, lease.id.clone()))
            .collect();
        waiting.sort();
        for (_, id) in waiting {
            self.begin(now_ms, &id);
        }
    }

    /// Moves a waiting lease on as far as its slot allows.
    fn begin(&mut self, now_ms: u64, id: &str) {
        let Some(lease) = self.leases.get(id) else { return };
        if lease.order.is_overdue(now_ms) {
            // The broker may have given it up already (L9).
            let reason = lease.order.overdue_reason();
            return self.refuse_waiting(now_ms, id, reason);
        }
        let had = lease.slot;
        let slot = match had {
            Some(slot) => slot,
            None => match self.pick(lease) {
                Some(slot) => slot,
                None if self.is_pending(lease.after.as_deref()) => return,
                None => {
                    let reason = self.no_slot(lease.size);
                    return self.refuse_waiting(now_ms, id, reason);
                }
            },
        };
        self.book.owners.insert(slot, id.to_owned());
        let own = self.book.idle.get(&slot).filter(|idle| serves(idle, lease)).map(|idle| idle.worker.clone());
        if own.is_none() {
            self.end_idle_on(slot);
        }
        let clears = self.book.clears(slot);
        let Some(lease) = self.leases.get_mut(id) else { return };
        lease.slot = Some(slot);
        self.dirty = true;
        if clears {
            if had.is_none() {
                self.tell_waiting(now_ms, id);
            }
            return;
        }
        lease.mark(now_ms, "Assigned", format!("card {} slot {}", slot.card, slot.index()));
        if let Some(worker) = own {
            lease.phase = Phase::Starting { call: None, since_ms: now_ms };
            self.steps.push_back(Step::Reuse { lease: id.to_owned(), worker, card: slot.card });
            return;
        }
        lease.phase = Phase::Assigned { since_ms: now_ms };
        let started = wire::started(lease, isolation(slot, &self.cards), now_ms);
        let answer = granted(lease, slot, &self.cards, false);
        let ticket = lease.ticket;
        self.steps.push_back(Step::Answer { ticket, answer });
        self.steps.push_back(Step::Send(Message::Started(started)));
    }

    pub(super) fn clear(&mut self, slot: Slot, lease: Option<String>, worker: Worker, limit_ms: u64) {
        self.dirty = true;
        self.steps.push_back(Step::Clear { slot, worker: worker.clone(), limit_ms });
        self.book.clearing.insert(worker.cgroup_id, Clearing { slot, lease, worker, limit_ms });
    }

    pub(super) fn reused(&mut self, now_ms: u64, id: &str) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let Some(slot) = lease.slot else { return };
        let Some(idle) = self.book.idle.remove(&slot) else { return };
        // The clock of a reused worker starts at the answer, which is the next step (docs/rules.md).
        lease.worker = Some(idle.worker);
        lease.phase = Phase::Running { started_ms: now_ms, reused: true, died_ms: None };
        lease.mark(now_ms, "Reused", format!("worker idle for {} ms", now_ms.saturating_sub(idle.since_ms)));
        self.dirty = true;
        let started = wire::started(lease, isolation(slot, &self.cards), now_ms);
        let running = wire::running(lease, true, now_ms);
        let answer = granted(lease, slot, &self.cards, true);
        let ticket = lease.ticket;
        self.steps.push_back(Step::Answer { ticket, answer });
        self.steps.push_back(Step::Send(Message::Started(started)));
        self.steps.push_back(Step::Send(Message::Running(running)));
    }

    pub(super) fn reuse_failed(&mut self, now_ms: u64, id: &str) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let Some(slot) = lease.slot else { return };
        lease.phase = Phase::Waiting;
        self.end_idle_on(slot);
        self.begin(now_ms, id);
    }

    pub(super) fn allow(&mut self, now_ms: u64, call: u64, pod_uid: &str, token: &str, pid: u32) {
        let lease = self.leases.get_mut(token).filter(|lease| lease.caller.pod.pod_uid == pod_uid);
        let Some((lease, slot)) = lease.and_then(|lease| lease.slot.map(|slot| (lease, slot))) else {
            let reply = Err(AllowRefusal::UnknownToken);
            return self.steps.push_back(Step::ReplyAllow { call, reply });
        };
        let since_ms = match lease.phase {
            Phase::Assigned { since_ms } => since_ms,
            // The idle worker had died, so the client forked a new one: the clock begins anew at its /allow (L16). The
            // old worker's cgroup is cleared beside the new one; both belong to this lease, its slot stays owned.
            Phase::Running { reused: true, started_ms, died_ms: Some(_) } => {
                if now_ms > started_ms.saturating_add(lease.allow_limit_ms.min(SUCCESSOR_MS)) {
                    let reply = Err(AllowRefusal::TooLate);
                    return self.steps.push_back(Step::ReplyAllow { call, reply });
                }
                let old = lease.worker.take();
                let limit_ms = lease.clear_limit_ms;
                if let Some(old) = old {
                    self.steps.push_back(Step::ShutGate { cgroup_id: old.cgroup_id });
                    self.clear(slot, None, old, limit_ms);
                }
                started_ms
            }
            Phase::Waiting | Phase::Starting { .. } | Phase::Running { .. } => {
                let reply = Err(AllowRefusal::AlreadyUsed);
                return self.steps.push_back(Step::ReplyAllow { call, reply });
            }
            Phase::Closing { .. } | Phase::Ended { .. } => {
                let reply = Err(AllowRefusal::TooLate);
                return self.steps.push_back(Step::ReplyAllow { call, reply });
            }
        };
        let Some(lease) = self.leases.get_mut(token) else { return };
        lease.phase = Phase::Starting { call: Some(call), since_ms };
        self.dirty = true;
        let caller = lease.caller.clone();
        self.steps.push_back(Step::Admit { lease: token.to_owned(), caller, pid, card: slot.card });
    }

    pub(super) fn admitted(&mut self, now_ms: u64, id: &str, worker: Worker) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let Phase::Starting { call, .. } = lease.phase else { return };
        lease.mark(now_ms, "Allowed", format!("pid {} in {}", worker.pid, worker.cgroup.display()));
        lease.worker = Some(worker);
        lease.uncertain = false;
        lease.phase = Phase::Running { started_ms: now_ms, reused: false, died_ms: None };
        self.dirty = true;
        let running = wire::running(lease, false, now_ms);
        if let Some(call) = call {
            self.steps.push_back(Step::ReplyAllow { call, reply: Ok(()) });
        }
        self.steps.push_back(Step::Send(Message::Running(running)));
    }

    pub(super) fn admit_refused(&mut self, id: &str, refusal: AllowRefusal) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let Phase::Starting { call, since_ms } = lease.phase else { return };
        // The allow limit counts from the answer: bad pids do not stretch it.
        lease.phase = Phase::Assigned { since_ms };
        self.dirty = true;
        if let Some(call) = call {
            self.steps.push_back(Step::ReplyAllow { call, reply: Err(refusal) });
        }
    }

    pub(super) fn admit_failed(&mut self, now_ms: u64, id: &str, reason: String) {
        let Some(lease) = self.leases.get(id) else { return };
        let Phase::Starting { call, .. } = lease.phase else { return };
        if let Some(call) = call {
            let reply = Err(AllowRefusal::DeviceUnavailable);
            self.steps.push_back(Step::ReplyAllow { call, reply });
        }
        self.end(now_ms, id, EndingKind::PlatformFault, &reason, None);
    }

    pub(super) fn cancel(&mut self, now_ms: u64, order: &link::Cancel) {
        if epoch::admit(self.epoch, order.epoch, now_ms, order.boottime_ms, order.order_ttl_ms).is_err() {
            return; // The broker repeats an order that is still wanted.
        }
        match self.leases.get(&order.lease) {
            Some(lease) if lease.is_over() => self.repeat_reports(now_ms, true),
            Some(_) => self.end(now_ms, &order.lease, EndingKind::Cancelled, &order.reason, None),
            // Not on this node, or forgotten: the broker voids on this answer (L9).
            None => {
                let ending = Ending {
                    kind: EndingKind::Cancelled,
                    used_ms: 0,
                    opens: 0,
                    message: "this node does not know the lease".to_owned(),
                };
                self.steps.push_back(Step::Send(Message::Ended(wire::unknown_ended(&order.lease, &ending))));
                self.steps.push_back(Step::Send(Message::Freed(wire::unknown_freed(&order.lease))));
            }
        }
    }

    pub(super) fn inventory(&mut self, now_ms: u64, cards: Vec<Card>) {
        if cards == self.cards {
            return;
        }
        self.cards = cards;
        let sick: Vec<(String, String)> = self
            .leases
            .values()
            .filter(|lease| !lease.is_over())
            .filter_map(|lease| {
                let slot = lease.slot?;
                // A card that is listed no more was taken out of the pool: what runs there runs on.
                let card = self.cards.iter().find(|card| card.index == slot.card)?;
                Some((lease.id.clone(), card.fault.clone()?))
            })
            .collect();
        for (id, fault) in sick {
            self.end(now_ms, &id, EndingKind::PlatformFault, &fault, None);
        }
        self.report_inventory();
        self.begin_waiting(now_ms);
    }

    pub(super) fn report_inventory(&mut self) {
        self.note_capacity();
        let cards = self.inventory_report();
        let heartbeat = link::Heartbeat { inventory_changed: true, cards, ..link::Heartbeat::default() };
        self.steps.push_back(Step::Send(Message::Heartbeat(heartbeat)));
    }

    /// Someone other than this function's own next call waits for a slot of the node: nothing is kept for reuse (N12).
    pub(super) fn others_wait(&self, lease: &Lease) -> bool {
        let waiting = self.leases.values().any(|other| other.phase == Phase::Waiting);
        waiting
            || self.tickets.values().any(|pending| {
                pending.waits_for_node
                    && (pending.caller.container != lease.caller.container || pending.task != lease.task)
            })
    }
}

fn isolation_of(lease: &Lease, cards: &[Card]) -> &'static str {
    lease.slot.map_or("", |slot| isolation(slot, cards))
}

/// L16: an idle worker serves the next call of its own function only.
fn serves(idle: &Idle, lease: &Lease) -> bool {
    idle.caller.container == lease.caller.container
        && idle.caller.pod.pod_uid == lease.caller.pod.pod_uid
        && idle.task == lease.task
}

fn granted(lease: &Lease, slot: Slot, cards: &[Card], idle: bool) -> Answer {
    let uuid = cards.iter().find(|card| card.index == slot.card).map_or("", |card| card.uuid.as_str());
    Answer::Granted {
        idle,
        nvidia_index: slot.index(),
        nvidia_uuid: uuid.to_owned(),
        allow_token: lease.id.clone(),
        caller: lease.caller_class(),
    }
}
