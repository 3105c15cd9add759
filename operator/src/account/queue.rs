//! Between the ledger's watch, which never waits, and the controller: at most one entry an account, always of its newest
//! revision, and only of accounts about which something is to be done.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use spaceport_core::ids::{AccountName, LedgerTime};
use tokio::sync::Notify;

use super::observe::Observed;
use super::plan::{Plan, plan};
use crate::clock;
use crate::ledger::seen::AccountSeen;

/// Accounts that the controller has to look at. A cheap handle; only one worker takes items out.
#[derive(Clone, Default)]
pub struct WorkQueue {
    /// A std mutex: it is never held across an await.
    items: Arc<Mutex<Items>>,
    changed: Arc<Notify>,
}

/// Bounded by the number of accounts.
#[derive(Default)]
struct Items {
    by_name: BTreeMap<AccountName, (Instant, Item)>,
    by_time: BTreeSet<(Instant, AccountName)>,
    /// What the worker took out last, as long as the watch has shown nothing newer of it.
    in_work: Option<AccountName>,
}

/// One account to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// Its newest revision.
    pub observed: Observed,
    /// Failed writes in a row.
    pub failures: u32,
}

/// What is next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This one, now; it is taken out.
    Due(Item),
    /// Nothing before this time; without one nothing at all.
    At(Option<Instant>),
}

impl WorkQueue {
    /// Takes a revision of an account that the watch shows.
    pub fn seen(&self, account: &AccountSeen) {
        self.observe(Observed::of(account), LedgerTime(clock::wall().as_millisecond()), clock::monotonic());
    }

    /// An account is gone.
    pub fn gone(&self, account: &AccountName) {
        let mut items = self.lock();
        items.outdate(account);
        items.remove(account);
    }

    fn observe(&self, observed: Observed, wall: LedgerTime, now: Instant) {
        let mut items = self.lock();
        items.outdate(&observed.name);
        let old = items.remove(&observed.name);
        if plan(&observed, wall) == Plan::Nothing {
            return;
        }
        // A write that keeps failing is not tried more often because the account is busy.
        let (due, failures) = match old {
            Some((due, Item { failures, .. })) if failures > 0 => (due, failures),
            _ => (now, 0),
        };
        items.insert(due, Item { observed, failures });
        drop(items);
        self.changed.notify_one();
    }

    /// Takes the first that is due.
    pub(super) fn next(&self, now: Instant) -> Next {
        let mut items = self.lock();
        let Some((due, account)) = items.by_time.first().cloned() else { return Next::At(None) };
        if due > now {
            return Next::At(Some(due));
        }
        let Some((_, item)) = items.remove(&account) else { return Next::At(None) };
        items.in_work = Some(account);
        Next::Due(item)
    }

    /// Gives the item that was taken out last back for later. If the watch has shown a newer revision meanwhile, or that
    /// the account is gone, it is dropped: that revision is waiting here, or there is nothing to be done about it. Only the
    /// wait after a failure is handed on.
    pub(super) fn put_back(&self, item: Item, due: Instant) {
        let mut items = self.lock();
        let account = &item.observed.name;
        if items.in_work.as_ref() == Some(account) {
            items.in_work = None;
            items.insert(due, item);
        } else if item.failures > 0
            && let Some((_, Item { observed, .. })) = items.remove(account)
        {
            items.insert(due, Item { observed, failures: item.failures });
        }
    }

    /// Waits until something was put in.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Items> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Items {
    fn insert(&mut self, due: Instant, item: Item) {
        let account = item.observed.name.clone();
        self.remove(&account);
        self.by_time.insert((due, account.clone()));
        self.by_name.insert(account, (due, item));
    }

    fn remove(&mut self, account: &AccountName) -> Option<(Instant, Item)> {
        let (due, item) = self.by_name.remove(account)?;
        self.by_time.remove(&(due, account.clone()));
        Some((due, item))
    }

    /// Something newer is known of the account than what the worker has in hand.
    fn outdate(&mut self, account: &AccountName) {
        if self.in_work.as_ref() == Some(account) {
            self.in_work = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use spaceport_crds::names::LEDGER_FINALIZER;

    use super::*;
    use crate::account::observe::Open;

    const WALL: LedgerTime = LedgerTime(1_800_000_000_000);

    fn revision(number: u32, finalizers: &[&str], deleting: bool) -> Observed {
        Observed {
            name: AccountName::new("bob"),
            resource_version: number.to_string(),
            finalizers: finalizers.iter().map(|finalizer| (*finalizer).to_owned()).collect(),
            deleting,
            open: Some(Open::default()),
        }
    }

    fn taken(queue: &WorkQueue, now: Instant) -> (String, u32) {
        let item = take(queue, now);
        (item.observed.resource_version, item.failures)
    }

    fn take(queue: &WorkQueue, now: Instant) -> Item {
        match queue.next(now) {
            Next::Due(item) => item,
            Next::At(due) => panic!("nothing is due before {due:?}"),
        }
    }

    #[test]
    fn only_the_newest_revision_is_worked_on_and_only_while_something_is_to_be_done() {
        let (queue, now) = (WorkQueue::default(), clock::monotonic());
        queue.observe(revision(1, &[], false), WALL, now);
        queue.observe(revision(2, &[], false), WALL, now);
        assert_eq!(taken(&queue, now), ("2".to_owned(), 0));
        assert_eq!(queue.next(now), Next::At(None), "one entry an account");
        queue.observe(revision(3, &[], false), WALL, now);
        queue.observe(revision(4, &[LEDGER_FINALIZER], false), WALL, now);
        assert_eq!(queue.next(now), Next::At(None), "the finalizer is there");
        queue.observe(revision(5, &[LEDGER_FINALIZER], true), WALL, now);
        queue.gone(&AccountName::new("bob"));
        assert_eq!(queue.next(now), Next::At(None), "the account is gone");
    }

    #[test]
    fn what_is_given_back_waits_and_gives_way_to_a_newer_revision() {
        let (queue, now) = (WorkQueue::default(), clock::monotonic());
        let later = now + Duration::from_secs(1);
        queue.observe(revision(1, &[], false), WALL, now);
        let first = take(&queue, now);
        queue.put_back(first.clone(), later);
        assert_eq!(queue.next(now), Next::At(Some(later)));
        assert_eq!(take(&queue, later), first);
        queue.observe(revision(2, &[], false), WALL, now);
        queue.put_back(first, later);
        assert_eq!(taken(&queue, now), ("2".to_owned(), 0));
        assert_eq!(queue.next(later), Next::At(None));
    }

    #[test]
    fn a_newer_revision_needs_nothing_while_the_old_one_is_being_worked_on() {
        let (queue, now) = (WorkQueue::default(), clock::monotonic());
        let later = now + Duration::from_secs(1);
        queue.observe(revision(1, &[], false), WALL, now);
        let old = take(&queue, now);
        queue.observe(revision(2, &[LEDGER_FINALIZER], false), WALL, now);
        queue.put_back(Item { failures: 1, ..old.clone() }, later);
        assert_eq!(queue.next(later), Next::At(None), "the old revision can never be written again");
        // The same if it vanishes.
        queue.observe(revision(3, &[], false), WALL, now);
        let old = take(&queue, now);
        queue.gone(&AccountName::new("bob"));
        queue.put_back(old, later);
        assert_eq!(queue.next(later), Next::At(None));
    }

    #[test]
    fn a_busy_account_does_not_shorten_the_wait_after_a_failure() {
        let (queue, now) = (WorkQueue::default(), clock::monotonic());
        let later = now + Duration::from_secs(8);
        queue.observe(revision(1, &[], false), WALL, now);
        let old = take(&queue, now);
        queue.put_back(Item { failures: 3, ..old }, later);
        queue.observe(revision(2, &[], false), WALL, now);
        assert_eq!(queue.next(now), Next::At(Some(later)));
        let old = take(&queue, later);
        assert_eq!((old.observed.resource_version.as_str(), old.failures), ("2", 3));
        // Neither if the account changes while the write fails.
        queue.observe(revision(3, &[], false), WALL, later);
        let last = later + Duration::from_secs(16);
        queue.put_back(Item { failures: 4, ..old }, last);
        assert_eq!(queue.next(later), Next::At(Some(last)));
        assert_eq!(taken(&queue, last), ("3".to_owned(), 4));
    }
}
