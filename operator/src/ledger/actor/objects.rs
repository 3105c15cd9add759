//! Which object of an account's name an answer is about. Accounts are deleted and made anew under the same name while our
//! watch lags, reads and writes are under way, and a first call makes one before the watch shows it: what is said of an
//! object that is not the known one any more must not touch the one after it.

use spaceport_core::ids::AccountName;
use spaceport_core::lease::Command;

use super::Actor;
use crate::ledger::pages::{self, Asked, Pages, Wanted};
use crate::ledger::seen::AccountSeen;
use crate::ledger::store::{PageTarget, WriteOutcome};

impl<P: Pages> Actor<P> {
    fn uid_of(&self, account: &AccountName) -> Option<&String> {
        self.targets.get(account).map(|target| &target.uid)
    }

    /// True if the object is another one than that which is known under its name, before or after it.
    pub(super) fn is_another(&self, seen: &AccountSeen) -> bool {
        self.uid_of(&seen.name).is_some_and(|uid| *uid != seen.uid)
    }

    /// Reads a page, unless a read for the same is under way: a node that comes and goes while the API server is away begins
    /// no second one. Of an account only one write is under way at a time, so each of its reads is wanted.
    pub(super) fn read(&mut self, account: AccountName, wanted: Wanted) {
        let is_new = self.reading.insert((account.clone(), wanted.clone()));
        if is_new || wanted == Wanted::Outcome {
            let uid = self.uid_of(&account).cloned();
            let asked = Asked { account, uid, wanted };
            self.tasks.spawn(pages::read(self.store.clone(), asked, self.stop.clone()));
        }
    }

    pub(super) fn written(
        &mut self,
        account: AccountName,
        write_id: String,
        target: PageTarget,
        outcome: WriteOutcome,
    ) {
        match outcome {
            WriteOutcome::Written { resource_version } => {
                let in_flight = self.state.accounts.get(&account).and_then(|found| found.in_flight.as_ref());
                // Otherwise a read or the watch was faster, or the account has another object now.
                if in_flight.is_some_and(|batch| batch.write_id == write_id) {
                    self.targets.insert(account.clone(), PageTarget { resource_version, ..target });
                }
                self.command(Command::PageWritten { account, write_id });
            }
            WriteOutcome::Conflict => self.command(Command::PageConflict { account, write_id }),
            WriteOutcome::Unknown { .. } => self.command(Command::PageUnknown { account, write_id }),
            WriteOutcome::Refused { .. } => self.command(Command::PageFailed { account, write_id }),
            WriteOutcome::Gone => self.object_gone(account, &target.uid),
        }
    }

    /// This object of the name is gone; a later one may be known.
    pub(super) fn object_gone(&mut self, account: AccountName, uid: &str) {
        if self.uid_of(&account).is_none_or(|known| known == uid) {
            self.account_gone(account);
        }
    }

    /// A read sees what was there when it began, or came later. So if another object than the one that was known then is
    /// found, it is a later one; but if meanwhile the watch has shown yet another, nobody can tell, and it is read again.
    pub(super) fn page_read(&mut self, asked: Asked, found: Option<AccountSeen>) {
        let Asked { account, uid, wanted } = asked;
        self.reading.remove(&(account.clone(), wanted.clone()));
        let unchanged = self.uid_of(&account) == uid.as_ref();
        match &found {
            None if unchanged => self.account_gone(account.clone()),
            // The one that was known is gone, and a later one was shown. What the read was for went with it; but for a
            // node's leases, which the later one may hold.
            None if matches!(wanted, Wanted::Leases(_)) => return self.read(account, wanted),
            None => return,
            Some(seen) if self.uid_of(&account) == Some(&seen.uid) => self.take_revision(seen),
            Some(seen) if unchanged => {
                if uid.is_some() {
                    self.account_gone(account.clone());
                }
                self.known.take_account(seen.clone());
                self.account_seen(&account);
            }
            Some(_) => return self.read(account, wanted),
        }
        let page = found.and_then(|seen| seen.page.ok()).map(Box::new);
        match (wanted, page) {
            (Wanted::Leases(node), page) => self.command(Command::PageConfirmed { account, node, page }),
            (Wanted::Outcome, Some(page)) => self.command(Command::PageRead { account, page }),
            (Wanted::Outcome, None) | (Wanted::Object, _) => {}
        }
    }

    /// The next write expects the revision of the page that it is made from, so not one of before.
    fn take_revision(&mut self, seen: &AccountSeen) {
        let newest = self.state.accounts.get(&seen.name).map_or(0, |found| found.durable.seq);
        if seen.page.as_ref().is_ok_and(|page| page.seq >= newest) {
            self.targets.insert(seen.name.clone(), PageTarget::of(seen));
        }
    }

    /// What the watch shows while a write is under way is not taken, for that write will meet it (L2). If then the answer comes
    /// from a read that is older, it is still to be taken, or a hold on it would stay unknown until the account's next event.
    pub(super) fn show_again(&mut self, account: &AccountName) {
        let shown = self.known.accounts.get(account).and_then(|seen| seen.page.as_ref().ok()).map(|page| page.seq);
        let known = self.state.accounts.get(account).filter(|known| known.in_flight.is_none());
        if known.is_some_and(|known| Some(known.durable.seq) < shown) {
            self.account_seen(account);
        }
    }
}
