//! The API server: objects, compare-and-swap, and a log that watches follow. Every page that is written is audited.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use spaceport_core::ids::{AccountName, Epoch, LeaseId};
use spaceport_core::page::{Closed, Page};

use crate::agenda::SharedPage;
use crate::broker::Target;
use crate::check;
use crate::coverage::{Coverage, Scenario};
use crate::plan::AccountPlan;
use crate::violation::{Checked, Rule, Violation};

/// A GPUAccount.
#[derive(Clone, Debug)]
pub struct Object {
    /// Which object of its name.
    pub uid: u64,
    /// Counts every write of it.
    pub revision: u64,
    /// Its status.
    pub page: SharedPage,
    /// Somebody deleted it; its finalizer holds it.
    pub deleting: bool,
}

/// A change, as watches show it.
#[derive(Clone, Debug)]
pub enum Change {
    /// An account is there, like this.
    Account(AccountName, Object),
    /// An account's object, this one, is gone.
    Gone(AccountName, u64),
    /// A term began.
    Term(Epoch, String),
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// Written, and this is its revision.
    Written(u64),
    /// Another revision or another object is there.
    Conflict,
    /// No object.
    Gone,
    /// The schema refuses it (L5).
    Refused,
}

/// What the API server has, and what the audit has seen there.
#[derive(Default)]
pub struct Store {
    /// Accounts.
    pub objects: BTreeMap<AccountName, Object>,
    /// Everything that ever happened to them, in order.
    pub log: Vec<Change>,
    /// The term page.
    pub term: (Epoch, String),
    /// Its revision.
    pub term_revision: u64,
    /// Receipts.
    pub receipts: BTreeMap<LeaseId, Closed>,
    /// Every lease that was ever held on a durable page, and whose.
    pub held_ever: BTreeMap<LeaseId, AccountName>,
    /// Those that an old leader wrote after a later term had begun. The later leader may meet them on their node before its
    /// watch shows it their hold (L7).
    pub late_holds: BTreeSet<LeaseId>,
    /// How each of them was settled.
    pub settled: BTreeMap<LeaseId, Closed>,
    /// What was charged for calls of each token, by the account that is there now: calls and weighted milliseconds.
    pub spent: BTreeMap<(AccountName, String), (u64, u64)>,
    /// Those whose account object went while they were open: nobody can be charged.
    pub orphaned: BTreeSet<LeaseId>,
    /// Weighted milliseconds charged, of all accounts.
    pub charged_ms: u64,
    /// The highest base that each account's tier ever gave: of an address prefix that of all its visitors together.
    pub highest_base_ms: BTreeMap<AccountName, u64>,
    uids: u64,
}

// === impl Object ===

impl Object {
    /// It is being deleted, and nothing is open any more (L4).
    pub fn is_over(&self) -> bool {
        self.deleting && self.page.holds.is_empty() && self.page.closed.is_empty()
    }
}

// === impl Store ===

impl Store {
    /// The accounts of a plan.
    pub fn new(accounts: &[AccountPlan]) -> Self {
        let mut store = Self::default();
        for account in accounts {
            store.create(&account.name, account.page.clone());
            store.highest_base_ms.insert(account.name.clone(), account.policy.allowance.base_ms);
        }
        store
    }

    /// Makes an account that is not there.
    pub fn create(&mut self, account: &AccountName, page: Page) {
        self.uids += 1;
        let object = Object { uid: self.uids, revision: 1, page: Rc::new(page), deleting: false };
        self.put(account, object);
    }

    fn put(&mut self, account: &AccountName, object: Object) {
        self.log.push(Change::Account(account.clone(), object.clone()));
        self.objects.insert(account.clone(), object);
    }

    /// Changes anything but the page.
    pub fn edit(&mut self, account: &AccountName, edit: impl FnOnce(&mut Object)) {
        let Some(mut object) = self.objects.get(account).cloned() else { return };
        edit(&mut object);
        object.revision += 1;
        self.put(account, object);
    }

    /// The object goes, whatever is on its page.
    pub fn remove(&mut self, account: &AccountName) {
        let Some(object) = self.objects.remove(account) else { return };
        self.orphaned.extend(object.page.holds.iter().map(|hold| hold.lease.clone()));
        // The next one of its name owes nothing.
        self.spent.retain(|(of, _), _| of != account);
        self.log.push(Change::Gone(account.clone(), object.uid));
    }

    /// A call of a token was charged; one that was not may count or not.
    pub fn spend(&mut self, account: &AccountName, closed: &Closed) {
        let Some(budget) = closed.hold.budget.as_ref().filter(|_| closed.charged_ms > 0) else { return };
        let (calls, ms) = self.spent.entry((account.clone(), budget.root.clone())).or_default();
        (*calls, *ms) = (*calls + 1, *ms + closed.charged_ms);
    }

    /// A term begins, if the term page is still the one that was read.
    pub fn begin_term(&mut self, revision: u64, epoch: Epoch, write_id: &str) -> bool {
        if self.term_revision != revision {
            return false;
        }
        self.term_revision += 1;
        self.term = (epoch, write_id.to_owned());
        self.log.push(Change::Term(epoch, write_id.to_owned()));
        true
    }

    /// True if an open hold for it is on a page.
    pub fn is_held(&self, lease: &LeaseId) -> bool {
        self.held_ever.contains_key(lease) && !self.settled.contains_key(lease) && !self.orphaned.contains(lease)
    }

    /// A compare-and-swap.
    ///
    /// # Errors
    /// What the audit says of a page that was written.
    pub fn swap(
        &mut self,
        account: &AccountName,
        target: Target,
        page: &SharedPage,
        coverage: &mut Coverage,
    ) -> Result<Swapped, Violation> {
        let Some(object) = self.objects.get(account) else { return Ok(Swapped::Gone) };
        if Target::of(object) != target {
            return Ok(Swapped::Conflict);
        }
        // The schema's own rule (L5).
        if page.epoch < object.page.epoch {
            return Ok(Swapped::Refused);
        }
        let next = Object { revision: object.revision + 1, page: Rc::clone(page), ..object.clone() };
        let old = Rc::clone(&object.page);
        let violation =
            |violation: Violation| Violation { what: format!("{account}: {}", violation.what), ..violation };
        check::pages::audit(self, account, &old, page, coverage).map_err(violation)?;
        let revision = next.revision;
        self.put(account, next);
        Ok(Swapped::Written(revision))
    }

    /// A receipt is written; the same one may come again.
    ///
    /// # Errors
    /// Invariant 12, if it does not say what the page says.
    pub fn receipt(&mut self, closed: &Closed) -> Checked {
        let lease = &closed.hold.lease;
        let is_true = self.settled.get(lease) == Some(closed);
        Rule::Invariant(12).check(is_true, || format!("the receipt of {lease} is not what its page says"))?;
        self.receipts.insert(lease.clone(), closed.clone());
        Ok(())
    }

    pub(crate) fn settle(&mut self, closed: &Closed, coverage: &mut Coverage) {
        coverage.saw(Scenario::Settled);
        if closed.charged_ms > 0 {
            coverage.saw(Scenario::Charged);
        }
        self.charged_ms += closed.charged_ms;
        self.settled.insert(closed.hold.lease.clone(), closed.clone());
    }
}
