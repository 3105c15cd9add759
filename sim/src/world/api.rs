//! Between brokers and the API server: writes whose answers may be lost, reads, receipts, watches and terms.

use std::rc::Rc;

use spaceport_core::ids::{AccountName, LeaseId, NodeName};
use spaceport_core::lease::{Command, Request};
use spaceport_core::page::{Closed, Page};

use super::{World, Write};
use crate::agenda::{Asked, Happening, Wanted};
use crate::broker::Target;
use crate::check;
use crate::coverage::Scenario;
use crate::store::{Change, Object, Swapped};
use crate::violation::Checked;
use crate::weather::FaultKind;

/// A write without an answer is unknown after this.
const WRITE_TIMEOUT_MS: u64 = 2_000;

impl World {
    // === writes ===

    pub(super) fn write(&mut self, number: u64, account: AccountName, page: Page) -> Checked {
        let now = self.now;
        let Some(broker) = self.brokers.get(&number) else { return Ok(()) };
        let cut_off = broker.cut_off_until > now;
        let Some(target) = broker.targets.get(&account).copied() else {
            return self.command(number, Command::PageConflict { account, write_id: page.write_id });
        };
        let id = self.next_write;
        self.next_write += 1;
        let refused = !cut_off && self.strikes(FaultKind::WriteRefused);
        let lost = cut_off || (!refused && self.strikes(FaultKind::WriteLost));
        let late = !lost && !refused && self.strikes(FaultKind::WriteLate);
        let answer_lost = !late && !refused && self.strikes(FaultKind::AnswerLost);
        let arrives = now + self.latency() + if late { WRITE_TIMEOUT_MS + self.random.below(8_000) } else { 0 };
        let slow = if now < self.slow_until { self.random.between(100, 3_000) } else { 0 };
        let arrives = arrives + slow;
        let answered = arrives + self.latency();
        let outcome = refused.then_some(Swapped::Refused);
        let write = Write {
            broker: number,
            account,
            target,
            page: Rc::new(page),
            open: !lost && !refused,
            outcome,
            held_up_until: 0,
            awaited: true,
        };
        self.writes.insert(id, write);
        if !lost && !refused {
            self.agenda.add(arrives, Happening::WriteArrives(id));
        }
        if !lost && !answer_lost && !late {
            self.agenda.add(answered, Happening::WriteAnswered(id));
        }
        self.agenda.add(now + WRITE_TIMEOUT_MS, Happening::WriteTimesOut(id));
        Ok(())
    }

    pub(super) fn write_arrives(&mut self, id: u64) -> Checked {
        let Some(write) = self.writes.get_mut(&id) else { return Ok(()) };
        if write.held_up_until > self.now {
            self.agenda.add(write.held_up_until, Happening::WriteArrives(id));
            return Ok(());
        }
        write.open = false;
        let (account, target, page, awaited) =
            (write.account.clone(), write.target, Rc::clone(&write.page), write.awaited);
        let outcome = self.store.swap(&account, target, &page, &mut self.coverage)?;
        let written = matches!(outcome, Swapped::Written(_));
        if page.epoch < self.store.term.0 {
            self.coverage.saw(if written { Scenario::LateWriteLanded } else { Scenario::LateWriteRefused });
        }
        if awaited {
            if let Some(write) = self.writes.get_mut(&id) {
                write.outcome = Some(outcome);
            }
        } else {
            if written {
                self.coverage.saw(Scenario::UnknownLater);
            }
            self.writes.remove(&id);
        }
        if written {
            check::nodes::given_up(self)?;
            check::nodes::in_time(self, &page)?;
            check::nodes::as_noted(self, &page)?;
            self.may_be_finalized(&account);
        }
        self.publish();
        Ok(())
    }

    pub(super) fn write_answered(&mut self, id: u64) -> Checked {
        let Some(write) = self.writes.get(&id).filter(|write| write.awaited) else { return Ok(()) };
        let Some(outcome) = write.outcome else { return Ok(()) };
        let Some(write) = self.writes.remove(&id) else { return Ok(()) };
        let (number, account, write_id) = (write.broker, write.account, write.page.write_id.clone());
        // The tasks of a term end with it: a process that leads again does not hear of its former writes.
        let term = self.brokers.get(&number).and_then(|broker| broker.term.as_ref());
        if term.is_none_or(|term| term.state.epoch != write.page.epoch) {
            return Ok(());
        }
        let name = account.clone();
        match outcome {
            Swapped::Written(revision) => {
                let known = self.state(number).and_then(|state| state.accounts.get(&account));
                let in_flight = known.and_then(|known| known.in_flight.as_ref());
                // Otherwise a read or the watch was faster, or the account has another object now.
                if in_flight.is_some_and(|batch| batch.write_id == write_id)
                    && let Some(broker) = self.brokers.get_mut(&number)
                {
                    broker.targets.insert(account.clone(), Target { revision, ..write.target });
                }
                self.command(number, Command::PageWritten { account, write_id })?;
            }
            Swapped::Conflict => {
                self.coverage.saw(Scenario::WriteConflict);
                self.command(number, Command::PageConflict { account, write_id })?;
            }
            Swapped::Refused => self.command(number, Command::PageFailed { account, write_id })?,
            Swapped::Gone => self.gone_if(number, account, write.target.uid)?,
        }
        self.show_again(number, &name)
    }

    pub(super) fn write_times_out(&mut self, id: u64) -> Checked {
        let Some(write) = self.writes.get_mut(&id).filter(|write| write.awaited) else { return Ok(()) };
        write.awaited = false;
        let (number, account, write_id) = (write.broker, write.account.clone(), write.page.write_id.clone());
        if !write.open {
            match write.outcome {
                Some(Swapped::Written(_)) => self.coverage.saw(Scenario::UnknownHappened),
                Some(_) | None => self.coverage.saw(Scenario::UnknownNever),
            }
            self.writes.remove(&id);
        }
        self.command(number, Command::PageUnknown { account, write_id })
    }

    // === reads ===

    /// Reads an account, unless a read for the same is under way. Of its writes only one is under way at a time.
    pub(super) fn read(&mut self, number: u64, account: AccountName, wanted: Wanted) {
        let at = self.now + self.latency();
        let Some(epoch) = self.state(number).map(|state| state.epoch) else { return };
        let Some(broker) = self.brokers.get_mut(&number) else { return };
        let is_new = broker.reading.insert((account.clone(), wanted.clone()));
        if is_new || wanted == Wanted::Outcome {
            let uid = broker.uid_of(&account);
            self.agenda.add(at, Happening::ReadArrives(number, Asked { epoch, account, uid, wanted }));
        }
    }

    pub(super) fn read_arrives(&mut self, number: u64, asked: Asked) {
        let Some(broker) = self.brokers.get(&number) else { return };
        if broker.cut_off_until > self.now {
            let at = broker.cut_off_until + self.random.between(1, 500);
            return self.agenda.add(at, Happening::ReadArrives(number, asked));
        }
        let object = self.store.objects.get(&asked.account).cloned();
        let at = self.now + self.latency();
        self.agenda.add(at, Happening::ReadAnswered(number, asked, object));
    }

    pub(super) fn read_answered(&mut self, number: u64, asked: Asked, found: Option<Object>) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        // The tasks of a term end with it.
        if broker.term.as_ref().is_none_or(|term| term.state.epoch != asked.epoch) {
            return Ok(());
        }
        let account = asked.account.clone();
        broker.reading.remove(&(account.clone(), asked.wanted.clone()));
        self.page_read(number, asked, found)?;
        self.show_again(number, &account)
    }

    /// A read sees what was there when it began, or came later. So another object than the one that was known then is a later
    /// one; but if the watch has shown yet another meanwhile, nobody can tell, and it is read again.
    fn page_read(&mut self, number: u64, asked: Asked, found: Option<Object>) -> Checked {
        let Asked { account, uid, wanted, .. } = asked;
        let known = self.brokers.get(&number).and_then(|broker| broker.uid_of(&account));
        match &found {
            None if known == uid => self.account_gone(number, account.clone())?,
            None if !matches!(wanted, Wanted::Leases(_)) => return Ok(()),
            Some(object) if known == Some(object.uid) => self.take_revision(number, &account, object),
            Some(object) if known == uid => {
                if uid.is_some() {
                    self.account_gone(number, account.clone())?;
                }
                self.take_object(number, &account, object.clone())?;
            }
            _ => {
                self.coverage.saw(Scenario::ReadAgain);
                self.read(number, account, wanted);
                return Ok(());
            }
        }
        let page = found.map(|object| object.page);
        let told = page.as_ref().map(|page| Box::new(Page::clone(page)));
        match (wanted, told) {
            (Wanted::Leases(node), page) => self.command(number, Command::PageConfirmed { account, node, page })?,
            (Wanted::Outcome, Some(page)) => self.command(number, Command::PageRead { account, page })?,
            (Wanted::Outcome, None) | (Wanted::Object, _) => return Ok(()),
        }
        page.map_or(Ok(()), |page| check::ledger::deposed(self, number, &page))
    }

    /// The next write expects the revision of the page that it is made from, so not one of before.
    fn take_revision(&mut self, number: u64, account: &AccountName, object: &Object) {
        let known = self.state(number).and_then(|state| state.accounts.get(account));
        let newest = known.map_or(0, |known| known.durable.seq);
        if object.page.seq >= newest
            && let Some(broker) = self.brokers.get_mut(&number)
        {
            broker.targets.insert(account.clone(), Target::of(object));
        }
    }

    /// What the watch has shown while a write was under way, behind an answer that was older.
    fn show_again(&mut self, number: u64, account: &AccountName) -> Checked {
        let Some(broker) = self.brokers.get(&number) else { return Ok(()) };
        let shown = broker.accounts.get(account).map(|object| object.page.seq);
        let known = broker.term.as_ref().and_then(|term| term.state.accounts.get(account));
        if known.is_some_and(|known| known.in_flight.is_none() && Some(known.durable.seq) < shown) {
            self.coverage.saw(Scenario::ShownAgain);
            return self.account_seen(number, account);
        }
        Ok(())
    }

    pub(super) fn first_seen(&mut self, number: u64, request: Request) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        // Its caller may have left meanwhile.
        if !broker.first_calls.remove(&request.ticket) {
            return Ok(());
        }
        if let Ok(account) = &request.caller
            && let Some(object) = self.store.objects.get(account).cloned()
            && self.state(number).is_some_and(|state| !state.accounts.contains_key(account))
        {
            self.show(number, account.clone(), object)?;
        }
        self.command(number, Command::Request(Box::new(request)))
    }

    // === receipts ===

    pub(super) fn receipt(&mut self, number: u64, account: AccountName, closed: Box<Closed>) -> Checked {
        let durable = self.store.settled.contains_key(&closed.hold.lease);
        crate::violation::Rule::Invariant(2)
            .check(durable, || format!("a receipt of {}, which is not settled", closed.hold.lease))?;
        let mut at = self.now + self.latency();
        if self.strikes(FaultKind::ReceiptLate) {
            at += self.random.between(10_000, 30_000);
            self.coverage.saw(Scenario::OutboxWaited);
        }
        self.agenda.add(at, Happening::ReceiptArrives(number, account, closed));
        Ok(())
    }

    pub(super) fn receipt_arrives(&mut self, number: u64, account: AccountName, closed: Box<Closed>) -> Checked {
        let Some(broker) = self.brokers.get(&number) else { return Ok(()) };
        if broker.cut_off_until > self.now {
            let at = broker.cut_off_until + self.random.between(1, 1_000);
            self.agenda.add(at, Happening::ReceiptArrives(number, account, closed));
            return Ok(());
        }
        self.store.receipt(&closed)?;
        let at = self.now + self.latency();
        self.agenda.add(at, Happening::ReceiptWritten(number, account, closed.hold.lease.clone()));
        Ok(())
    }

    pub(super) fn receipt_written(&mut self, number: u64, account: AccountName, lease: LeaseId) -> Checked {
        self.command(number, Command::ReceiptWritten { account, lease })
    }

    // === watches ===

    /// What was added to the log comes to every watch.
    pub(super) fn publish(&mut self) {
        while self.published < self.store.log.len() {
            self.published += 1;
            for number in self.brokers.keys().copied().collect::<Vec<_>>() {
                let at = self.now + self.latency();
                self.agenda.add(at, Happening::WatchStep(number));
            }
        }
    }

    pub(super) fn watch_step(&mut self, number: u64) -> Checked {
        let now = self.now;
        let Some(broker) = self.brokers.get_mut(&number).filter(|broker| broker.listed) else { return Ok(()) };
        let until = broker.stalled_until.max(broker.cut_off_until);
        if until > now {
            self.agenda.add(until + 1, Happening::WatchStep(number));
            return Ok(());
        }
        let Some(change) = self.store.log.get(broker.cursor).cloned() else { return Ok(()) };
        broker.cursor += 1;
        match change {
            Change::Account(account, object) => self.show(number, account, object),
            // The watch may lag behind a read that has shown the object after it.
            Change::Gone(account, uid) => self.gone_if(number, account, uid),
            Change::Term(epoch, write_id) => {
                let deposed = broker.term.as_ref().is_some_and(|term| epoch > term.state.epoch);
                match broker.begun.clone() {
                    Some((begun, own)) if own == write_id => return self.take_over(number, begun),
                    // Another replica was faster after us; ours begins anew above it.
                    Some((begun, _)) if epoch > begun => {
                        (broker.above, broker.begun) = (epoch, None);
                        self.agenda.add(now, Happening::TermRead(number));
                    }
                    _ => {}
                }
                if deposed {
                    self.coverage.saw(Scenario::Deposed);
                    return self.end_broker(number);
                }
                Ok(())
            }
        }
    }

    /// A process has listed everything: at its start, and when its watch begins anew.
    pub(super) fn listed(&mut self, number: u64) -> Checked {
        let (objects, term) = (self.store.objects.clone(), self.store.term.clone());
        let (log, policies, limits) = (self.store.log.len(), self.policies.clone(), self.limits.clone());
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        let first = !std::mem::replace(&mut broker.listed, true);
        broker.cursor = log;
        if first {
            (broker.accounts, broker.policies, broker.limits) = (objects, policies, limits);
            broker.targets = broker.accounts.iter().map(|(name, object)| (name.clone(), Target::of(object))).collect();
            self.agenda.add(self.now, Happening::TermRead(number));
            return Ok(());
        }
        let gone: Vec<AccountName> = broker
            .accounts
            .iter()
            .filter(|(name, known)| objects.get(name).is_none_or(|object| object.uid != known.uid))
            .map(|(name, _)| name.clone())
            .collect();
        for account in gone {
            self.account_gone(number, account)?;
        }
        for (account, object) in objects {
            self.show(number, account, object)?;
        }
        self.listed_term(number, term.0, &term.1)
    }

    fn listed_term(&mut self, number: u64, epoch: spaceport_core::ids::Epoch, write_id: &str) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        if broker.begun.as_ref().is_some_and(|(_, own)| own == write_id) {
            return self.take_over(number, epoch);
        }
        if broker.begun.as_ref().is_some_and(|(begun, _)| epoch > *begun) {
            (broker.above, broker.begun) = (epoch, None);
            self.agenda.add(self.now, Happening::TermRead(number));
        }
        if self.state(number).is_some_and(|state| epoch > state.epoch) {
            self.coverage.saw(Scenario::Deposed);
            return self.end_broker(number);
        }
        Ok(())
    }

    /// An account as a watch or a first read shows it.
    pub(super) fn show(&mut self, number: u64, account: AccountName, object: Object) -> Checked {
        let Some(broker) = self.brokers.get(&number) else { return Ok(()) };
        // Another object than the one that is known: of before, if the watch lags behind a read, or the one after it.
        if broker.serves() && broker.uid_of(&account).is_some_and(|uid| uid != object.uid) {
            self.read(number, account, Wanted::Object);
            return Ok(());
        }
        self.take_object(number, &account, object)
    }

    fn take_object(&mut self, number: u64, account: &AccountName, object: Object) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        broker.accounts.insert(account.clone(), object);
        self.account_seen(number, account)
    }

    pub(super) fn account_seen(&mut self, number: u64, account: &AccountName) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        let (Some(policy), Some(object)) = (broker.policy(account), broker.accounts.get(account)) else {
            return Ok(());
        };
        let (page, target) = (Rc::clone(&object.page), Target::of(object));
        let known = broker.term.as_ref().and_then(|term| term.state.accounts.get(account));
        // The next write expects the revision of the page that it is made from (L2). An older page is not that, and neither
        // is a newer one that the ledger does not take because a write of its own is under way; one of the same seq may carry
        // a newer spec.
        let stale = known.is_some_and(|known| page.seq < known.durable.seq);
        let takes = known.is_none_or(|known| page.seq == known.durable.seq || known.in_flight.is_none());
        if takes && !stale {
            broker.targets.insert(account.clone(), target);
        }
        if stale {
            self.coverage.saw(Scenario::StaleWatch);
        }
        let seen = Command::AccountSeen { account: account.clone(), page: Box::new((*page).clone()), policy };
        self.command(number, seen)?;
        check::ledger::deposed(self, number, &page)
    }

    /// This object of the name is gone; a newer one may be known.
    fn gone_if(&mut self, number: u64, account: AccountName, uid: u64) -> Checked {
        let known = self.brokers.get(&number).and_then(|broker| broker.uid_of(&account));
        if known.is_none_or(|known| known == uid) {
            return self.account_gone(number, account);
        }
        self.coverage.saw(Scenario::LateGone);
        Ok(())
    }

    pub(super) fn account_gone(&mut self, number: u64, account: AccountName) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        broker.accounts.remove(&account);
        broker.targets.remove(&account);
        self.command(number, Command::AccountGone { account })
    }

    pub(super) fn policy_shown(&mut self, number: u64, account: &AccountName) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        if let Some(policy) = self.policies.get(account) {
            broker.policies.insert(account.clone(), policy.clone());
        }
        self.account_seen(number, account)
    }

    pub(super) fn pool_shown(&mut self, number: u64, node: &NodeName) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        if let Some(limits) = self.limits.get(node) {
            broker.limits.insert(node.clone(), *limits);
        }
        self.configure(number, node)
    }

    // === terms (L6) ===

    pub(super) fn term_read(&mut self, number: u64) {
        let now = self.now;
        let Some(broker) = self.brokers.get(&number).filter(|broker| broker.begun.is_none() && broker.term.is_none())
        else {
            return;
        };
        if broker.cut_off_until > now {
            return self.agenda.add(broker.cut_off_until, Happening::TermRead(number));
        }
        let revision = self.store.term_revision;
        let at = now + 2 * self.latency();
        self.agenda.add(at, Happening::TermWritten(number, revision));
    }

    pub(super) fn term_written(&mut self, number: u64, revision: u64) {
        let (lost, answer_lost) = (self.strikes(FaultKind::WriteLost), self.strikes(FaultKind::AnswerLost));
        let Some(broker) = self.brokers.get_mut(&number) else { return };
        let epoch = self.store.term.0.max(broker.highest_epoch()).max(broker.above);
        let epoch = spaceport_core::ids::Epoch(epoch.0 + 1);
        let write_id = format!("term-{number}-{}", epoch.0);
        let written = !lost && self.store.begin_term(revision, epoch, &write_id);
        if written && !answer_lost {
            broker.begun = Some((epoch, write_id));
        } else {
            // An unknown outcome is overtaken: the next try is above whatever is there.
            self.agenda.add(self.now + 500, Happening::TermRead(number));
        }
        self.publish();
    }

    // === accounts that go and come ===

    pub(super) fn may_be_finalized(&mut self, account: &AccountName) {
        let is_over = self.store.objects.get(account).is_some_and(Object::is_over);
        if is_over {
            let at = self.now + self.random.between(50, 2_000);
            self.agenda.add(at, Happening::Finalized(account.clone()));
        }
    }

    pub(super) fn finalized(&mut self, account: &AccountName) {
        if self.store.objects.get(account).is_some_and(Object::is_over) {
            self.take_away(account);
        }
    }

    /// The object goes; somebody makes it anew later.
    pub(super) fn take_away(&mut self, account: &AccountName) {
        if let Some(object) = self.store.objects.get(account) {
            self.lost_rows.extend(object.page.closed.iter().map(|closed| closed.hold.lease.clone()));
        }
        self.remade.insert(account.clone());
        self.store.remove(account);
        let at = self.now + self.random.between(300, 5_000);
        self.agenda.add(at, Happening::Created(account.clone()));
        self.publish();
    }

    pub(super) fn created(&mut self, account: &AccountName) {
        if !self.store.objects.contains_key(account) {
            self.store.create(account, Page::default());
            self.publish();
        }
    }
}
