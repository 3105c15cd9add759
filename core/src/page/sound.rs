//! What every page is that the ledger has written. A page that is read back and is not like this was written by somebody
//! else or by a bug: to decide on it could charge twice, or make a page that can never be written again.

use std::collections::BTreeSet;

use super::{CLOSED_MAX, CookieRow, Page, Source};
use crate::ids::{CookieId, LeaseId, LedgerTime};

/// Largest amount, number or sum that the stored form can hold: an `int64`.
const NUMBER_MAX: u64 = i64::MAX.unsigned_abs();
/// From here on a page cannot count much longer. Nobody writes a page this often: it would take 100 million years.
const COUNT_MAX: u64 = 1 << 62;
/// The end of the year 9999, the last time that a Kubernetes object can show.
const TIME_MAX: LedgerTime = LedgerTime(253_402_300_799_999);

/// Why a page is none of the ledger's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsound {
    /// The page could not be followed by another one.
    #[error("{field} is {value}, beyond which no write can count")]
    Exhausted {
        /// Which count.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Nothing on the page could ever become due.
    #[error("{field} is {} ms, later than the year 9999", .time.0)]
    Time {
        /// Which time.
        field: &'static str,
        /// Its value.
        time: LedgerTime,
    },
    /// L20: what begins does so at the page's time. Until then nothing else could.
    #[error("{field} is {} ms, later than the page's time", .time.0)]
    Ahead {
        /// Which time.
        field: &'static str,
        /// Its value.
        time: LedgerTime,
    },
    /// Invariant 3: a lease is open or settled once.
    #[error("lease {0} is on the page more than once")]
    LeaseTwice(LeaseId),
    /// It could not be told which row is meant.
    #[error("{0:?} is on the page more than once, or overlaps another window")]
    SourceTwice(Source),
    /// The same of a visitor's row.
    #[error("visitor {cookie} is on the page more than once, or overlaps another row of its own")]
    VisitorTwice {
        /// Whose row.
        cookie: CookieId,
    },
    /// Every open hold needs a row in the outbox when it ends.
    #[error("{holds} holds and {closed} settled rows are more than the {CLOSED_MAX} rows of the outbox")]
    Outbox {
        /// Open holds.
        holds: usize,
        /// Settled rows.
        closed: usize,
    },
    /// It could not be told what is left of the budget.
    #[error("the budget of token {root} is on the page more than once")]
    BudgetTwice {
        /// `root_jti`.
        root: String,
    },
    /// L12: a hold is paid by sources of its page.
    #[error("lease {lease} is paid by {which:?}, which is not on the page")]
    NoSource {
        /// Whose hold.
        lease: LeaseId,
        /// Which source.
        which: Source,
    },
    /// The same of the visitor's row, to which a hold of a guest page is charged as well.
    #[error("lease {lease} is of visitor {cookie}, whose row is not on the page")]
    NoVisitor {
        /// Whose hold.
        lease: LeaseId,
        /// Which visitor.
        cookie: CookieId,
    },
    /// Invariant 1: what is reserved is what was declared.
    #[error("lease {lease} has reserved {reserved_ms} ms for {weight} x {declared_ms} ms")]
    Reserved {
        /// Whose hold.
        lease: LeaseId,
        /// The sum of its parts.
        reserved_ms: u128,
        /// Its weight.
        weight: u64,
        /// Its declared duration.
        declared_ms: u64,
    },
    /// Invariant 5: a charge has a bound.
    #[error("lease {lease} was charged {charged_ms} ms for {weight} x {declared_ms} ms")]
    Charge {
        /// Whose row.
        lease: LeaseId,
        /// Its charge.
        charged_ms: u64,
        /// Its weight.
        weight: u64,
        /// Its declared duration.
        declared_ms: u64,
    },
    /// Settling what is open would bring a source beyond what can be stored.
    #[error("{which:?} has {charged_ms} ms charged and {reserved_ms} ms reserved, together more than can be stored")]
    Sum {
        /// Which source.
        which: Source,
        /// Charged to it.
        charged_ms: u64,
        /// Reserved in it.
        reserved_ms: u128,
    },
    /// The same of a visitor's row.
    #[error(
        "visitor {cookie} has {charged_ms} ms charged and {reserved_ms} ms reserved, together more than can be stored"
    )]
    VisitorSum {
        /// Whose row.
        cookie: CookieId,
        /// Charged to it.
        charged_ms: u64,
        /// Reserved in it.
        reserved_ms: u128,
    },
}

impl Page {
    /// True of every page of the ledger's own. Not that charges stay below limits: a limit may have been lowered since.
    ///
    /// # Errors
    /// The first thing that is not so; then nothing may be decided on the page.
    pub fn sound(&self) -> Result<(), Unsound> {
        self.sound_numbers()?;
        self.sound_rows()?;
        for hold in &self.holds {
            let reserved_ms: u128 = hold.parts.iter().map(|part| u128::from(part.ms)).sum();
            let whole_ms = u128::from(hold.weight) * u128::from(hold.declared_ms);
            if reserved_ms != whole_ms {
                let (weight, declared_ms) = (hold.weight, hold.declared_ms);
                return Err(Unsound::Reserved { lease: hold.lease.clone(), reserved_ms, weight, declared_ms });
            }
            if let Some(part) = hold.parts.iter().find(|part| self.charged_to(&part.source).is_none()) {
                return Err(Unsound::NoSource { lease: hold.lease.clone(), which: part.source.clone() });
            }
            if let Some(window) = &hold.cookie
                && !self.cookies.iter().any(|row| row.is_of(window))
            {
                return Err(Unsound::NoVisitor { lease: hold.lease.clone(), cookie: window.cookie.clone() });
            }
        }
        for closed in &self.closed {
            let (weight, declared_ms, charged_ms) = (closed.hold.weight, closed.hold.declared_ms, closed.charged_ms);
            if u128::from(charged_ms) > u128::from(weight) * u128::from(declared_ms) {
                return Err(Unsound::Charge { lease: closed.hold.lease.clone(), charged_ms, weight, declared_ms });
            }
        }
        self.sound_sums()
    }

    fn sound_numbers(&self) -> Result<(), Unsound> {
        let runs = self.windows.iter().map(|window| ("a window's runs", window.runs));
        let of_visitors = self.cookies.iter().map(|row| ("a visitor's runs", row.runs));
        let budgets = || self.budgets.iter().flat_map(|budgets| &budgets.rows);
        let of_budgets = budgets().flat_map(|row| [("a budget's calls", row.calls), ("a budget's use", row.ms)]);
        let of_page = [("seq", self.seq), ("epoch", self.epoch.0)];
        let mut counts = runs.chain(of_visitors).chain(of_budgets).chain(of_page);
        if let Some((field, value)) = counts.find(|(_, value)| *value >= COUNT_MAX) {
            return Err(Unsound::Exhausted { field, value });
        }
        let begun = || {
            let windows = self.windows.iter().map(|window| ("a window's start", window.start));
            windows.chain(self.cookies.iter().map(|row| ("the start of a visitor's row", row.start)))
        };
        let of_holds = self.holds.iter().filter_map(|hold| hold.budget.as_ref());
        let of_holds = of_holds.map(|budget| ("the end of a hold's budget", budget.expires));
        let of_budgets = budgets().map(|row| ("a budget's end", row.expires));
        let forgotten = self.budgets.iter().map(|budgets| ("the end of a forgotten budget", budgets.forgotten));
        let ends = of_holds.chain(of_budgets).chain(forgotten).chain([("the page's time", self.last_time)]);
        if let Some((field, time)) = begun().chain(ends).find(|(_, time)| *time > TIME_MAX) {
            return Err(Unsound::Time { field, time });
        }
        match begun().find(|(_, start)| *start > self.last_time) {
            Some((field, time)) => Err(Unsound::Ahead { field, time }),
            None => Ok(()),
        }
    }

    fn sound_rows(&self) -> Result<(), Unsound> {
        let mut leases = BTreeSet::new();
        for lease in self.holds.iter().chain(self.closed.iter().map(|closed| &closed.hold)).map(|hold| &hold.lease) {
            if !leases.insert(lease) {
                return Err(Unsound::LeaseTwice(lease.clone()));
            }
        }
        let (holds, closed) = (self.holds.len(), self.closed.len());
        if holds.saturating_add(closed) > CLOSED_MAX {
            return Err(Unsound::Outbox { holds, closed });
        }
        for (index, window) in self.windows.iter().enumerate() {
            if self.windows[..index].iter().any(|other| other.covers(window.start) || window.covers(other.start)) {
                return Err(Unsound::SourceTwice(Source::Window(window.start)));
            }
        }
        for (index, row) in self.grants.iter().enumerate() {
            if self.grants[..index].iter().any(|other| other.uid == row.uid) {
                return Err(Unsound::SourceTwice(Source::Grant(row.uid.clone())));
            }
        }
        let mut roots = BTreeSet::new();
        if let Some(row) =
            self.budgets.iter().flat_map(|budgets| &budgets.rows).find(|row| !roots.insert(row.root.as_str()))
        {
            return Err(Unsound::BudgetTwice { root: row.root.clone() });
        }
        for (index, row) in self.cookies.iter().enumerate() {
            let is_same =
                |other: &CookieRow| other.cookie == row.cookie && (other.covers(row.start) || row.covers(other.start));
            if self.cookies[..index].iter().any(is_same) {
                return Err(Unsound::VisitorTwice { cookie: row.cookie.clone() });
            }
        }
        Ok(())
    }

    fn sound_sums(&self) -> Result<(), Unsound> {
        let windows = self.windows.iter().map(|window| (Source::Window(window.start), window.charged_ms));
        let grants = self.grants.iter().map(|row| (Source::Grant(row.uid.clone()), row.used_ms));
        for (which, charged_ms) in windows.chain(grants) {
            let parts = self.holds.iter().flat_map(|hold| &hold.parts).filter(|part| part.source == which);
            let reserved_ms: u128 = parts.map(|part| u128::from(part.ms)).sum();
            if u128::from(charged_ms) + reserved_ms > u128::from(NUMBER_MAX) {
                return Err(Unsound::Sum { which, charged_ms, reserved_ms });
            }
        }
        for row in &self.cookies {
            let parts = self.holds_of_row(row).flat_map(|hold| &hold.parts);
            let reserved_ms: u128 = parts.map(|part| u128::from(part.ms)).sum();
            if u128::from(row.charged_ms) + reserved_ms > u128::from(NUMBER_MAX) {
                let (cookie, charged_ms) = (row.cookie.clone(), row.charged_ms);
                return Err(Unsound::VisitorSum { cookie, charged_ms, reserved_ms });
            }
        }
        Ok(())
    }

    /// What is charged to a source of the page; none if it is not there.
    fn charged_to(&self, source: &Source) -> Option<u64> {
        match source {
            Source::Window(start) => {
                self.windows.iter().find(|window| window.start == *start).map(|window| window.charged_ms)
            }
            Source::Grant(uid) => self.grants.iter().find(|row| row.uid == *uid).map(|row| row.used_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Budget, BudgetRow, Budgets, Closed, CookieWindow, Ending, GrantRow, Hold, Part, Window};
    use std::sync::Arc;

    use super::*;
    use crate::ids::{Epoch, NodeName, Size, SpaceKey};
    use crate::quota::WINDOW_MS;

    const START: LedgerTime = LedgerTime(1_800_000_000_000);

    fn hold(lease: &str) -> Hold {
        Hold {
            lease: LeaseId::new(lease),
            space: SpaceKey::new("demo", "hello", "u"),
            parts: vec![
                Part { source: Source::Window(START), ms: 15_000 },
                Part { source: Source::Grant("g".to_owned()), ms: 5_000 },
            ],
            node: NodeName::new("gpu-1"),
            avoid: Vec::new(),
            cookie: None,
            shortened: None,
            budget: None,
            size: Size::Xlarge,
            weight: 2,
            declared_ms: 10_000,
            epoch: Epoch(3),
            since: START,
            after: None,
            generation: 1,
            via: "token".to_owned(),
        }
    }

    fn page() -> Page {
        Page {
            windows: vec![Window { start: START, base_ms: 60_000, charged_ms: 70_000, runs: 1, generation: 1 }],
            holds: vec![Arc::new(hold("a"))],
            grants: vec![GrantRow { uid: "g".to_owned(), ms: 9_000, expires: START, used_ms: 0 }],
            closed: vec![Closed {
                hold: Arc::new(Hold { parts: Vec::new(), ..hold("b") }),
                ending: Ending::Released,
                used_ms: 12_000,
                charged_ms: 20_000,
                at: START,
            }],
            budgets: Some(Box::new(Budgets {
                rows: vec![BudgetRow { root: "r".to_owned(), calls: 1, ms: 1, expires: START }],
                forgotten: START,
            })),
            last_time: START.plus(2 * WINDOW_MS),
            seq: 9,
            epoch: Epoch(3),
            ..Page::default()
        }
    }

    #[test]
    fn a_page_whose_tier_was_lowered_and_whose_grant_has_expired_is_sound() {
        assert_eq!(page().sound(), Ok(()));
        assert_eq!(Page::default().sound(), Ok(()));
    }

    #[test]
    fn a_page_that_is_none_of_ours_says_what_is_wrong() {
        type BreakIt = fn(&mut Page);
        let broken: [(&str, BreakIt); 18] = [
            ("seq is 4611686018427387904, beyond", |page| page.seq = COUNT_MAX),
            ("epoch is 4611686018427387904, beyond", |page| page.epoch = Epoch(COUNT_MAX)),
            ("a window's runs is 4611686018427387904, beyond", |page| page.windows[0].runs = COUNT_MAX),
            ("the page's time is 253402300800000 ms, later", |page| page.last_time = TIME_MAX.plus(1)),
            ("a window's start is 1800000000000 ms, later than the page's", |page| {
                page.last_time = LedgerTime(START.0 - 1)
            }),
            ("the end of a hold's budget is 253402300800000 ms, later", |page| {
                let (root, expires) = ("r".to_owned(), TIME_MAX.plus(1));
                let budget = Budget { root, max_ms: 1, max_calls: 1, expires };
                Arc::make_mut(&mut page.holds[0]).budget = Some(budget);
            }),
            ("lease a is on the page more than once", |page| page.holds.push(Arc::new(hold("a")))),
            ("lease b is on the page more than once", |page| page.holds.push(Arc::new(hold("b")))),
            ("overlaps another window", |page| {
                page.windows.push(Window { start: START.plus(1), ..page.windows[0].clone() });
            }),
            ("Grant(\"g\") is on the page more than once", |page| page.grants.push(page.grants[0].clone())),
            ("which is not on the page", |page| page.grants.clear()),
            ("has reserved 20000 ms for 2 x 10001 ms", |page| Arc::make_mut(&mut page.holds[0]).declared_ms += 1),
            ("was charged 20001 ms for 2 x 10000 ms", |page| page.closed[0].charged_ms += 1),
            ("together more than can be stored", |page| page.windows[0].charged_ms = NUMBER_MAX - 14_999),
            ("the budget of token r is on the page more than once", |page| {
                let budgets = page.budgets.get_or_insert_default();
                budgets.rows.push(budgets.rows[0].clone());
            }),
            ("a budget's use is 4611686018427387904, beyond", |page| {
                page.budgets.get_or_insert_default().rows[0].ms = COUNT_MAX;
            }),
            ("a budget's end is 253402300800000 ms, later", |page| {
                page.budgets.get_or_insert_default().rows[0].expires = TIME_MAX.plus(1);
            }),
            ("the end of a forgotten budget is 253402300800000 ms, later", |page| {
                page.budgets.get_or_insert_default().forgotten = TIME_MAX.plus(1);
            }),
        ];
        for (complaint, break_it) in broken {
            let mut page = page();
            break_it(&mut page);
            let said = page.sound().unwrap_err().to_string();
            assert!(said.contains(complaint), "{said}");
        }
    }

    /// A visitor's lease runs, and an earlier one of the same day is charged.
    fn guest_page() -> Page {
        let cookie = CookieId::new("ann");
        let row =
            CookieRow { cookie: cookie.clone(), start: START, base_ms: 120_000, charged_ms: 9, runs: 1, generation: 1 };
        let of_ann = Hold { cookie: Some(CookieWindow { cookie, start: START }), ..hold("a") };
        Page { cookies: [row].into(), holds: vec![Arc::new(of_ann)], ..page() }
    }

    #[test]
    fn a_guest_page_that_is_none_of_ours_says_what_is_wrong() {
        type BreakIt = fn(&mut CookieRow);
        let row = |page: &Page| page.cookies[0].clone();
        assert_eq!(guest_page().sound(), Ok(()));
        let broken: [(&str, BreakIt); 5] = [
            ("a visitor's runs is 4611686018427387904, beyond", |row| row.runs = COUNT_MAX),
            ("the start of a visitor's row is 253402300800000 ms, later", |row| row.start = TIME_MAX.plus(1)),
            ("lease a is of visitor ann, whose row is not on the page", |row| row.start = START.plus(1)),
            ("lease a is of visitor ann, whose row is not on the page", |row| row.cookie = CookieId::new("bob")),
            ("visitor ann has 9223372036854755808 ms charged", |row| row.charged_ms = NUMBER_MAX - 19_999),
        ];
        for (complaint, break_it) in broken {
            let mut page = guest_page();
            break_it(&mut page.cookies[0]);
            let said = page.sound().unwrap_err().to_string();
            assert!(said.contains(complaint), "{said}");
        }
        let with = |other: CookieRow| Page { cookies: [row(&guest_page()), other].into(), ..guest_page() };
        let overlapping = with(CookieRow { start: START.plus(1), ..row(&guest_page()) });
        assert!(matches!(overlapping.sound(), Err(Unsound::VisitorTwice { .. })));
        let next_day = with(CookieRow { start: row(&guest_page()).end(), ..row(&guest_page()) });
        assert_eq!(next_day.sound(), Ok(()));
        assert_eq!(with(CookieRow { cookie: CookieId::new("bob"), ..row(&guest_page()) }).sound(), Ok(()));
    }

    #[test]
    fn more_holds_than_the_outbox_takes_are_no_page_of_ours() {
        let mut page = page();
        page.holds = (0..CLOSED_MAX).map(|index| Arc::new(hold(&format!("h{index}")))).collect();
        assert_eq!(page.sound(), Err(Unsound::Outbox { holds: CLOSED_MAX, closed: 1 }));
        page.closed.clear();
        assert_eq!(page.sound(), Ok(()));
    }
}
