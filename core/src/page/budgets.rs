//! Invariant 10 on a page: a Space can spend its caller's quota only within the budget of the call, whoever leads.

use super::{BUDGETS_MAX, Budget, BudgetRow, Budgets, Ending, Hold, Page, Taken};
use crate::ids::LedgerTime;

impl Taken {
    /// Both together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { calls: self.calls.saturating_add(other.calls), ms: self.ms.saturating_add(other.ms) }
    }
}

impl Budget {
    /// So much more fits beside what is taken.
    pub const fn has(&self, taken: Taken, more: Taken) -> bool {
        let sum = taken.and(more);
        sum.calls <= self.max_calls && sum.ms <= self.max_ms
    }
}

impl Ending {
    /// A call that ended like this counts: its grant has reached its app. Not where the platform failed it or gave it up, nor
    /// where its caller was gone before.
    pub const fn spends_call(self, charged_ms: u64) -> bool {
        match self {
            Self::Released | Self::Failed | Self::WorkerDied | Self::Deadline | Self::NeverAllowed | Self::NoDevice => {
                true
            }
            Self::Cancelled => charged_ms > 0,
            Self::Undelivered | Self::Refused | Self::PlatformFault | Self::Expired => false,
        }
    }
}

impl Page {
    /// What open leases have reserved of a budget.
    pub fn held_of_budget(&self, root: &str) -> Taken {
        let is_of = |hold: &&Hold| hold.budget.as_ref().is_some_and(|budget| budget.root == root);
        let holds = self.holds.iter().map(|hold| &**hold).filter(is_of);
        holds.fold(Taken::default(), |sum, hold| sum.and(Taken { calls: 1, ms: hold.held_ms() }))
    }

    /// What open and ended leases took of a budget.
    pub fn taken_of_budget(&self, root: &str) -> Taken {
        let row = self.budgets.iter().flat_map(|budgets| &budgets.rows).find(|row| row.root == root);
        let ended = row.map_or(Taken::default(), |row| Taken { calls: row.calls, ms: row.ms });
        self.held_of_budget(root).and(ended)
    }

    /// It is known what is left of this budget: nothing of it was ever forgotten.
    pub fn remembers(&self, budget: &Budget) -> bool {
        let forgotten = self.budgets.as_ref().map_or(LedgerTime(0), |budgets| budgets.forgotten);
        forgotten < budget.expires
            || self.budgets.iter().flat_map(|budgets| &budgets.rows).any(|row| row.root == budget.root)
    }

    /// A lease has ended: its row says so for as long as its token is worth anything.
    pub fn spend(&mut self, hold: &Hold, ending: Ending, charged_ms: u64, at: LedgerTime) {
        let Some(budget) = &hold.budget else { return };
        let spends_call = ending.spends_call(charged_ms);
        if budget.expires <= at || (!spends_call && charged_ms == 0) {
            return;
        }
        let budgets = self.budgets.get_or_insert_default();
        let calls = u64::from(spends_call);
        match budgets.rows.iter_mut().find(|row| row.root == budget.root) {
            Some(row) => {
                row.calls = row.calls.saturating_add(calls);
                row.ms = row.ms.saturating_add(charged_ms);
                row.expires = row.expires.max(budget.expires);
            }
            // Forgotten once, it stays so: a row of this call alone would say that the rest was never taken.
            None if budget.expires <= budgets.forgotten => {}
            None => {
                let row = BudgetRow { root: budget.root.clone(), calls, ms: charged_ms, expires: budget.expires };
                budgets.rows.push(row);
            }
        }
        if budgets.rows.len() > BUDGETS_MAX
            && let Some(soonest) = (0..budgets.rows.len()).min_by_key(|index| budgets.rows[*index].expires)
        {
            // Its token is worth nothing soonest.
            let dropped = budgets.rows.remove(soonest);
            budgets.forgotten = budgets.forgotten.max(dropped.expires);
        }
    }

    /// Drops what no token needs any more.
    pub fn prune_budgets(&mut self, at: LedgerTime) {
        let Some(budgets) = &mut self.budgets else { return };
        budgets.rows.retain(|row| at < row.expires);
        if budgets.forgotten <= at {
            budgets.forgotten = LedgerTime(0);
        }
        if **budgets == Budgets::default() {
            self.budgets = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, LeaseId, NodeName, Size, SpaceKey};
    use crate::page::{Part, Source};

    const NOW: LedgerTime = LedgerTime(1_000);

    fn budget(number: usize) -> Budget {
        Budget { root: format!("r{number}"), max_ms: 10_000, max_calls: 2, expires: NOW.plus(1 + number as u64) }
    }

    fn hold(budget: Budget) -> Hold {
        Hold {
            lease: LeaseId::new("a"),
            space: SpaceKey::new("demo", "hello", "u"),
            parts: vec![Part { source: Source::Window(NOW), ms: 4_000 }],
            node: NodeName::new("gpu-1"),
            avoid: Vec::new(),
            size: Size::Large,
            weight: 1,
            declared_ms: 4_000,
            epoch: Epoch(1),
            since: NOW,
            after: None,
            generation: 1,
            via: "token".to_owned(),
            cookie: None,
            shortened: None,
            budget: Some(budget),
        }
    }

    #[test]
    fn what_was_charged_is_taken_and_what_was_not_used_is_given_back() {
        let mut page = Page { holds: vec![hold(budget(1)).into()], ..Page::default() };
        assert_eq!(page.taken_of_budget("r1"), Taken { calls: 1, ms: 4_000 });
        assert_eq!(page.taken_of_budget("r2"), Taken::default());
        let ended = page.holds.remove(0);
        page.spend(&ended, Ending::Released, 1_500, NOW);
        assert_eq!(page.taken_of_budget("r1"), Taken { calls: 1, ms: 1_500 });
        page.spend(&ended, Ending::NeverAllowed, 0, NOW);
        assert_eq!(page.taken_of_budget("r1"), Taken { calls: 2, ms: 1_500 });
        let free = [Ending::Undelivered, Ending::Refused, Ending::PlatformFault, Ending::Expired, Ending::Cancelled];
        for ending in free {
            page.spend(&ended, ending, 0, NOW);
        }
        assert_eq!(page.taken_of_budget("r1"), Taken { calls: 2, ms: 1_500 }, "the platform's fault spends nothing");
    }

    #[test]
    fn a_row_goes_when_its_token_is_worth_nothing() {
        let mut page = Page::default();
        page.spend(&hold(budget(1)), Ending::Released, 1, NOW);
        page.prune_budgets(NOW.plus(1));
        assert!(page.budgets.is_some());
        page.prune_budgets(NOW.plus(2));
        assert_eq!(page.budgets, None);
        page.spend(&hold(budget(1)), Ending::Released, 1, NOW.plus(2));
        assert_eq!(page.budgets, None, "it ended after its token");
    }

    #[test]
    fn a_budget_that_had_no_room_is_worth_nothing_until_it_expires() {
        let mut page = Page::default();
        for number in 0..=BUDGETS_MAX {
            page.spend(&hold(budget(number)), Ending::Released, 1, NOW);
        }
        assert_eq!(page.budgets.as_ref().map(|budgets| budgets.rows.len()), Some(BUDGETS_MAX));
        assert!(!page.remembers(&budget(0)));
        assert!(page.remembers(&budget(1)) && page.remembers(&budget(BUDGETS_MAX + 1)));
        assert_eq!(page.taken_of_budget("r1").calls, 1);
        page.prune_budgets(NOW.plus(1));
        assert_eq!(page.budgets.as_ref().map(|budgets| budgets.forgotten), Some(LedgerTime(0)));
    }

    /// Tokens live for whole seconds, so that ties are ordinary.
    #[test]
    fn a_budget_that_was_forgotten_does_not_begin_anew_when_its_other_call_ends() {
        let until = |number| Budget { expires: NOW.plus(9_000), ..budget(number) };
        let mut page = Page::default();
        for number in 0..=BUDGETS_MAX {
            page.spend(&hold(until(number)), Ending::Released, 1, NOW);
        }
        assert!(!page.remembers(&until(0)));
        page.spend(&hold(until(0)), Ending::Released, 1, NOW);
        assert!(!page.remembers(&until(0)));
        assert!(page.remembers(&until(1)));
    }

    #[test]
    fn a_budget_has_what_its_token_says() {
        let taken = Taken { calls: 1, ms: 6_000 };
        assert!(budget(1).has(taken, Taken { calls: 1, ms: 4_000 }));
        assert!(!budget(1).has(taken, Taken { calls: 1, ms: 4_001 }));
        assert!(!budget(1).has(taken, Taken { calls: 2, ms: 0 }));
        assert!(!budget(1).has(taken, Taken { calls: u64::MAX, ms: u64::MAX }));
    }
}
