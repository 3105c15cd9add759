//! The only writer of the state.

use std::sync::Arc;

use super::change::{Misfit, PageChange, Urgency};
use super::event::Event;
use super::mutant::Mutant;
use super::state::{Account, Batch, Lease, Node, SlotUse, Stage, State, Stranger};
use crate::ids::{AccountName, LeaseId, NodeName, Size, Steady};
use crate::page::Page;
use crate::queue::Lane;
use crate::slots;

impl State {
    /// Makes one event so. An event that does not fit is refused and leaves the state as it was.
    ///
    /// # Errors
    /// Says which invariant the event would have broken.
    pub fn apply(&mut self, event: &Event) -> Result<(), Misfit> {
        match event {
            Event::AccountTaken { account, page, policy } => {
                self.longest_call_ms = self.longest_call_ms.max(policy.allowance.longest_call_ms);
                let policy = self.policies.share(policy);
                self.accounts.insert(account.clone(), Box::new(Account::new(page, policy)));
                self.unpark(account);
            }
            Event::PolicyChanged { account, policy } => {
                self.longest_call_ms = self.longest_call_ms.max(policy.allowance.longest_call_ms);
                let policy = self.policies.share(policy);
                if let Some(found) = self.accounts.get_mut(account) {
                    found.policy = policy;
                }
                self.reschedule(account);
                self.unpark(account);
            }
            Event::AccountDropped { account } => self.drop_account(account),
            Event::Changed { account, change, at } => self.change(account, change, *at)?,
            Event::WriteBegun { account, write_id, at } => self.begin_write(account, write_id, *at),
            Event::WriteUnknown { account } => {
                if let Some(batch) = self.accounts.get_mut(account).and_then(|account| account.in_flight.as_mut()) {
                    batch.unknown = true;
                }
            }
            Event::Committed { account } => self.commit(account),
            Event::WriteFailed { account, aborted, retry_at } => self.write_failed(account, aborted, *retry_at),
            Event::Rebased { account, page, kept } => self.rebase(account, page, kept)?,

            Event::Queued(waiting) => {
                self.next_place = self.next_place.max(waiting.place.saturating_add(1));
                let settings = self.settings(&waiting.node).lanes;
                self.queue.insert(Arc::clone(waiting), settings);
            }
            Event::Confirmed { ticket } => {
                self.queue.confirm(ticket);
                if let Some(lease) = self.tickets.get(ticket).and_then(|lease| self.leases.get_mut(lease)) {
                    // Given up, perhaps, at a late word of an earlier start of its agent; but its caller waits.
                    lease.abandoned = false;
                    if let Some(waiting) = lease.request.as_mut() {
                        Arc::make_mut(waiting).unconfirmed = None;
                    }
                }
            }
            Event::Left { ticket, .. } => {
                let left = self.queue.remove(ticket);
                if let Some(waiting) = left {
                    self.space_changed(&waiting.space.uid);
                }
            }
            Event::Announced { ticket, lease, promise, .. } => self.queue.announce(ticket, lease, *promise),
            Event::Parked { ticket, waits_for } => {
                self.queue.park(ticket, *waits_for);
                // Another of its Space has its turn in its stead.
                let space = self.queue.get(ticket).map(|waiting| waiting.space.uid.clone());
                if let Some(space) = space {
                    self.space_changed(&space);
                }
            }
            Event::Unparked { account } => self.unpark_where(account),
            Event::CardKept { ticket, lane } => self.queue.reserve(ticket, *lane),
            Event::CardReleased { node } => self.queue.release_card(node),
            Event::PromisesWithdrawn { node } => self.withdraw_promises(node),

            Event::Reserved { .. }
            | Event::Unreserved { .. }
            | Event::Ordered { .. }
            | Event::Adopted { .. }
            | Event::Assigned { .. }
            | Event::Running { .. }
            | Event::Ended { .. }
            | Event::Settled { .. }
            | Event::SlotFreed { .. }
            | Event::Abandoned { .. }
            | Event::Cancelled { .. } => self.apply_lease(event),

            Event::StrangerMet { node, lease } => {
                let stranger = Stranger { node: node.clone(), lease: (**lease).clone() };
                self.strangers.insert(lease.lease.clone(), stranger);
            }
            Event::StrangerJudged { lease } => drop(self.strangers.remove(lease)),
            Event::NoDeviceCounted { space, at } => {
                let count = self.no_device.entry(space.uid.clone()).or_insert((*at, 0));
                count.1 = count.1.saturating_add(1);
            }
            Event::NodeConfigured { node, settings } => {
                self.nodes.entry(node.clone()).or_default().settings = *settings;
                self.queue.configure(node, settings.lanes);
            }
            Event::SpaceConfigured { space, settings } => self.configure_space(space, *settings),
            Event::NodeHello { node, agent_instance } => {
                self.nodes.entry(node.clone()).or_default().agent_instance.clone_from(agent_instance);
            }
            Event::NodeJoined { node, cards, idle, confirm_by } => {
                let known = self.nodes.entry(node.clone()).or_default();
                (known.joined, known.rests, known.silent_since) = (true, false, None);
                known.cards.clone_from(cards);
                known.idle.clone_from(idle);
                self.awaited.remove(node);
                self.unconfirm(node, *confirm_by);
            }
            Event::InventoryTaken { node, cards } => {
                if let Some(known) = self.nodes.get_mut(node) {
                    known.cards.clone_from(cards);
                    known.rests = false;
                }
            }
            Event::IdleTaken { node, idle } => {
                if let Some(known) = self.nodes.get_mut(node) {
                    known.idle.clone_from(idle);
                }
            }
            Event::WorkerKept { node, idle } => {
                // A node has room for so many; its next list has the rest, if there is one.
                let has_room =
                    |known: &&mut Node| (known.idle.len() as u64) < slots::capacity(&known.cards, Size::Large);
                if let Some(known) = self.nodes.get_mut(node).filter(has_room) {
                    known.idle.push(idle.clone());
                }
            }
            Event::NodeLost { node, at } => self.lose_node(node, *at),
            Event::NodeRests { node } => self.set_rest(node, true),
            Event::NodeHeard { node } => self.set_rest(node, false),

            Event::ClockJudged { off_ms } => self.clock_off_ms = *off_ms,
            Event::Forgotten { at } => {
                self.no_device.retain(|_, (since, _)| at.since(*since) < super::report::NO_DEVICE_PERIOD_MS);
            }
            Event::TermEnded(end) => self.ended = Some(*end),
            Event::Denied { .. }
            | Event::PromiseOver { .. }
            | Event::Acknowledged { .. }
            | Event::PageDoubted { .. }
            | Event::WriteContested { .. }
            | Event::WriteRepeated { .. } => {}
        }
        Ok(())
    }

    fn set_rest(&mut self, node: &NodeName, rests: bool) {
        if let Some(known) = self.nodes.get_mut(node) {
            known.rests = rests;
        }
    }

    fn unconfirm(&mut self, node: &NodeName, confirm_by: Steady) {
        self.queue.unconfirm(node, confirm_by);
        let Some(known) = self.nodes.get(node) else { return };
        for id in &known.leases {
            if let Some(waiting) = self.leases.get_mut(id).and_then(|lease| lease.request.as_mut()) {
                Arc::make_mut(waiting).unconfirmed = Some(confirm_by);
            }
        }
    }

    fn lose_node(&mut self, node: &NodeName, at: Steady) {
        let Some(known) = self.nodes.get_mut(node) else { return };
        (known.joined, known.rests, known.silent_since) = (false, false, Some(at));
        // What it keeps it says anew when it joins again.
        known.idle.clear();
        self.unconfirm(node, at.plus(super::expiry::DISCONNECTED_QUEUE_MS));
        // It tells of them again when it joins again.
        self.strangers.retain(|_, stranger| stranger.node != *node);
        // Its slots do not exist until it joins again and says who uses them (L7).
        let gone: Vec<LeaseId> = self
            .leases_on(node)
            .filter(|(_, lease)| lease.account.is_none() || lease.stage >= Stage::Settling)
            .map(|(id, _)| id.clone())
            .collect();
        for lease in gone {
            self.free_slot(&lease);
        }
    }

    // === pages ===

    fn drop_account(&mut self, account: &AccountName) {
        if let Some(dropped) = self.accounts.remove(account) {
            self.schedule.place(account, None, dropped.scheduled);
            if let Some(batch) = dropped.in_flight {
                self.write_is_over(&batch);
            }
        }
        let orphans: Vec<LeaseId> = self
            .leases()
            .filter(|(_, lease)| lease.account.as_ref() == Some(account))
            .map(|(id, _)| id.clone())
            .collect();
        for id in orphans {
            if let Some(lease) = self.leases.get_mut(&id) {
                // Nobody can be charged any more; what is left of it is its slot.
                lease.account = None;
                if let Some(request) = lease.request.take() {
                    self.tickets.remove(&request.ticket);
                }
                if lease.stage == Stage::Reserving {
                    lease.slot = SlotUse::Free;
                }
            }
            self.note_holder(&id);
            self.remove_if_over(&id);
        }
    }

    fn change(&mut self, account: &AccountName, change: &PageChange, at: Steady) -> Result<(), Misfit> {
        let twice = self.has(Mutant::SettleTwice);
        let learned = self.learned_of(account, change);
        let Some(found) = self.accounts.get_mut(account) else { return Ok(()) };
        let held = if twice { found.working.holds.clone() } else { Vec::new() };
        change.make(Arc::make_mut(&mut found.working))?;
        if twice && matches!(change, PageChange::Settle { .. }) {
            Arc::make_mut(&mut found.working).holds = held;
        }
        found.coalesce(change);
        found.pending.push(change.clone());
        match change.urgency() {
            Urgency::Lazy => found.lazy_since = found.lazy_since.or(Some(at)),
            Urgency::Soon => found.settle_since = found.settle_since.or(Some(at)),
            Urgency::Note | Urgency::Now => {}
        }
        self.reschedule(account);
        self.unpark(account);
        if let Some((function, used_ms)) = learned {
            self.history.learn(&function, used_ms);
        }
        if let PageChange::Settle { lease, .. } = change {
            self.owe_rest(lease, at);
        }
        Ok(())
    }

    /// What a lease that had its turn by key has held beyond what was expected of it when it began. All that it held, not
    /// only what it ran: a promise to those who wait counts time in use.
    fn owe_rest(&mut self, id: &LeaseId, now: Steady) {
        let Some(lease) = self.leases.get(id).filter(|lease| lease.lane == Some(Lane::Fast)) else { return };
        let Some(turn) = lease.request.as_ref().map(|request| request.turn) else { return };
        let rest_ms = now.since(lease.sent).saturating_sub(turn.expected_ms).saturating_mul(turn.slots);
        if rest_ms > 0 {
            self.queue.owe(&lease.node, rest_ms);
        }
    }

    fn reschedule(&mut self, account: &AccountName) {
        let Some(found) = self.accounts.get_mut(account) else { return };
        found.scheduled = self.schedule.place(account, Some(found), found.scheduled);
    }

    fn begin_write(&mut self, account: &AccountName, write_id: &str, at: Steady) {
        let epoch = self.epoch;
        let (stateful, twice) = (self.has(Mutant::Stateful), self.has(Mutant::SettleTwice));
        let Some(found) = self.accounts.get_mut(account) else { return };
        let seq = found.durable.seq.saturating_add(1);
        let head = |page: &mut Arc<Page>| {
            let page = Arc::make_mut(page);
            (page.seq, page.epoch) = (seq, epoch);
            write_id.clone_into(&mut page.write_id);
        };
        head(&mut found.working);
        // The fault leaves on the working page what no change accounts for.
        let (changes, page) = if found.fits_one_write() && !twice {
            // The working page has all the changes that wait, and nothing else that is not durable (L3).
            (std::mem::take(&mut found.pending), Arc::clone(&found.working))
        } else {
            let (changes, mut page) = found.take_first();
            head(&mut page);
            if found.pending.is_empty() && !twice {
                found.working = Arc::clone(&page);
            }
            (changes, page)
        };
        if changes.iter().any(|change| change.urgency() == Urgency::Note) {
            found.noted_at = Some(at);
        }
        found.retry_at = None;
        let still = |urgency| found.pending.iter().any(|change| change.urgency() == urgency);
        found.lazy_since = found.lazy_since.filter(|_| still(Urgency::Lazy));
        found.settle_since = found.settle_since.filter(|_| still(Urgency::Soon));
        let batch = Box::new(Batch { write_id: write_id.to_owned(), changes, page, unknown: false });
        self.writes_in_flight += 1;
        self.holds_in_flight += usize::from(batch.has_hold());
        found.in_flight = Some(batch);
        if stateful {
            self.next_place += u64::try_from(super::mutant::applied()).unwrap_or_default();
        }
        self.reschedule(account);
        self.unpark(account);
    }

    fn commit(&mut self, account: &AccountName) {
        let Some(found) = self.accounts.get_mut(account) else { return };
        if let Some(batch) = found.in_flight.take() {
            found.durable = Arc::clone(&batch.page);
            found.failures = 0;
            self.write_is_over(&batch);
        }
        self.reschedule(account);
    }

    fn write_failed(&mut self, account: &AccountName, aborted: &[LeaseId], retry_at: Steady) {
        let Some(found) = self.accounts.get_mut(account) else { return };
        let Some(batch) = found.in_flight.take() else { return };
        found.failures = found.failures.saturating_add(1);
        found.retry_at = Some(retry_at);
        let rest = std::mem::take(&mut found.pending);
        let is_aborted =
            |change: &PageChange| matches!(change, PageChange::Hold { hold, .. } if aborted.contains(&hold.lease));
        let kept = batch.changes.iter().filter(|change| !is_aborted(change)).cloned().chain(rest);
        let mut working = (*found.durable).clone();
        for change in kept {
            // What does not fit without the aborted holds went with them: a window's base, for example.
            if change.make(&mut working).is_ok() {
                found.pending.push(change);
            }
        }
        found.working = Arc::new(working);
        self.write_is_over(&batch);
        self.reschedule(account);
        self.unpark(account);
    }

    fn rebase(&mut self, account: &AccountName, page: &Page, kept: &[PageChange]) -> Result<(), Misfit> {
        let Some(found) = self.accounts.get_mut(account) else { return Ok(()) };
        let mut working = page.clone();
        for change in kept {
            change.make(&mut working)?;
        }
        let batch = found.in_flight.take();
        found.durable = Arc::new(page.clone());
        found.working = Arc::new(working);
        found.pending = kept.to_vec();
        if let Some(batch) = batch {
            self.write_is_over(&batch);
        }
        self.reschedule(account);
        self.unpark(account);
        Ok(())
    }

    fn write_is_over(&mut self, batch: &Batch) {
        self.writes_in_flight = self.writes_in_flight.saturating_sub(1);
        self.holds_in_flight = self.holds_in_flight.saturating_sub(usize::from(batch.has_hold()));
    }

    // === leases ===

    fn apply_lease(&mut self, event: &Event) {
        match event {
            Event::Reserved { lease, waiting, after, avoid, at } => {
                self.next_reservation += 1;
                let lane = self.queue.start(&waiting.ticket);
                self.tickets.insert(waiting.ticket.clone(), lease.clone());
                let limits = self.settings(&waiting.node).limits;
                self.add_lease(
                    lease,
                    Lease {
                        account: Some(waiting.account.clone()),
                        space: Some(waiting.space.uid.as_str().into()),
                        node: waiting.node.clone(),
                        size: waiting.demand.size,
                        declared_ms: waiting.demand.declared_ms,
                        request: Some(Arc::clone(waiting)),
                        lane,
                        stage: Stage::Reserving,
                        card: None,
                        awaits: None,
                        number: self.next_reservation,
                        after: after.clone(),
                        follows: after.is_some(),
                        avoid: avoid.clone(),
                        limits,
                        waits_ms: 0,
                        slot: SlotUse::Taken,
                        sent: *at,
                        abandoned: false,
                        cancelled: None,
                    },
                );
            }
            Event::Unreserved { lease } => self.remove_lease(lease),
            Event::Adopted { lease, account, node, size, declared_ms, card, stage, slot, limits, waits_ms, at } => {
                let page = account.as_ref().and_then(|account| self.accounts.get(account)).map(|found| &found.working);
                let hold = page.and_then(|page| page.holds.iter().find(|hold| hold.lease == *lease));
                let space = hold.map(|hold| hold.space.uid.as_str().into());
                self.add_lease(
                    lease,
                    Lease {
                        account: account.clone(),
                        space,
                        node: node.clone(),
                        size: *size,
                        declared_ms: *declared_ms,
                        request: None,
                        lane: None,
                        stage: *stage,
                        card: *card,
                        awaits: None,
                        number: 0,
                        after: None,
                        follows: false,
                        avoid: Vec::new(),
                        limits: *limits,
                        waits_ms: *waits_ms,
                        slot: *slot,
                        sent: *at,
                        abandoned: false,
                        cancelled: None,
                    },
                );
            }
            Event::SlotFreed { lease } => self.free_slot(lease),
            Event::Ordered { lease, .. }
            | Event::Assigned { lease, .. }
            | Event::Running { lease }
            | Event::Ended { lease, .. }
            | Event::Settled { lease, .. }
            | Event::Abandoned { lease }
            | Event::Cancelled { lease, .. } => self.advance_lease(lease, event),
            _ => {}
        }
    }

    fn advance_lease(&mut self, id: &LeaseId, event: &Event) {
        let early = self.has(Mutant::FreeAtEnd);
        let Some(lease) = self.leases.get_mut(id) else { return };
        let space = lease.space.clone().filter(|_| lease.busy_space().is_some());
        match event {
            Event::Ordered { at, limits, waits_ms, avoid, .. } => {
                (lease.stage, lease.sent) = (Stage::Ordered, *at);
                (lease.limits, lease.waits_ms) = (*limits, *waits_ms);
                lease.avoid.clone_from(avoid);
            }
            Event::Assigned { slot, .. } => {
                lease.stage = lease.stage.max(Stage::Assigned);
                lease.card = slot.has().or(lease.card);
                lease.awaits = slot.awaits();
                // The node has it, so its request is alive if the node gives it back.
                if let Some(waiting) = lease.request.as_mut().filter(|waiting| waiting.unconfirmed.is_some()) {
                    Arc::make_mut(waiting).unconfirmed = None;
                }
            }
            Event::Running { .. } => lease.stage = lease.stage.max(Stage::Running),
            Event::Ended { slot, .. } => {
                lease.stage = lease.stage.max(Stage::Settling);
                lease.slot = if early { SlotUse::Free } else { *slot };
            }
            Event::Settled { .. } => lease.stage = Stage::Settled,
            Event::Abandoned { .. } => lease.abandoned = true,
            Event::Cancelled { at, .. } => lease.cancelled = Some(*at),
            _ => {}
        }
        let (over, freed) = (lease.busy_space().is_none(), lease.slot == SlotUse::Free);
        if let Some(space) = space.filter(|_| over) {
            self.space_lease_over(&space);
        }
        if freed && matches!(event, Event::Ended { .. }) {
            self.free_slot(id);
            return;
        }
        self.note_holder(id);
        self.remove_if_over(id);
    }

    /// Brings the node's copy of a lease up to date.
    fn note_holder(&mut self, id: &LeaseId) {
        let Some(lease) = self.leases.get(id) else { return };
        let Some(node) = self.nodes.get_mut(&lease.node) else { return };
        // They are in the order of their numbers; only leases of earlier terms have one in common.
        let first = node.holders.partition_point(|other| other.number < lease.number);
        let same = node.holders[first..].iter().take_while(|other| other.number == lease.number).count();
        let known = node.holders[first..first + same].iter().position(|holder| holder.lease == *id);
        match (known.map(|index| first + index), lease.holder(id)) {
            (Some(index), Some(holder)) => node.holders[index] = holder,
            (Some(index), None) => drop(node.holders.remove(index)),
            (None, Some(holder)) => node.holders.insert(first + same, holder),
            (None, None) => {}
        }
    }

    fn add_lease(&mut self, id: &LeaseId, lease: Lease) {
        self.nodes.entry(lease.node.clone()).or_default().leases.insert(id.clone());
        if let Some(space) = lease.busy_space() {
            let space = space.to_owned();
            self.space_lease_begins(&space);
        }
        let before = self.leases.insert(id.clone(), lease);
        if let Some(space) = before.as_ref().and_then(Lease::busy_space) {
            self.space_lease_over(space);
        }
        self.note_holder(id);
    }

    fn remove_lease(&mut self, id: &LeaseId) {
        let Some(lease) = self.leases.remove(id) else { return };
        if let Some(space) = lease.busy_space() {
            self.space_lease_over(space);
        }
        if let Some(request) = &lease.request
            && self.tickets.get(&request.ticket) == Some(id)
        {
            self.tickets.remove(&request.ticket);
        }
        self.release_followers(&lease.node, id);
        if let Some(node) = self.nodes.get_mut(&lease.node) {
            node.leases.remove(id);
            node.holders.retain(|holder| holder.lease != *id);
        }
    }

    fn free_slot(&mut self, id: &LeaseId) {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.slot = SlotUse::Free;
            let node = lease.node.clone();
            self.note_holder(id);
            self.release_followers(&node, id);
        }
        self.remove_if_over(id);
    }

    /// Whoever got the slot of this lease has it now (L14).
    fn release_followers(&mut self, node: &NodeName, id: &LeaseId) {
        let Some(known) = self.nodes.get_mut(node) else { return };
        for holder in known.holders.iter_mut().filter(|holder| holder.after.as_ref() == Some(id)) {
            holder.after = None;
            if let Some(lease) = self.leases.get_mut(&holder.lease) {
                lease.after = None;
            }
        }
    }

    fn remove_if_over(&mut self, id: &LeaseId) {
        let over = self.leases.get(id).is_some_and(|lease| {
            lease.slot == SlotUse::Free && (lease.account.is_none() || lease.stage == Stage::Settled)
        });
        if over {
            self.remove_lease(id);
        }
    }
}

impl Account {
    fn new(page: &Page, policy: Arc<super::command::Policy>) -> Self {
        let page = Arc::new(page.clone());
        Self {
            policy,
            durable: Arc::clone(&page),
            working: page,
            in_flight: None,
            pending: Vec::new(),
            noted_at: None,
            lazy_since: None,
            settle_since: None,
            retry_at: None,
            failures: 0,
            scheduled: None,
        }
    }
}
