//! Which accounts have changes that no write carries yet, and when their writes begin: found in the order of their turns,
//! without a look at the others.

use std::collections::BTreeSet;
use std::fmt;

use super::begin::{LAZY_MAX, LAZY_PATIENCE_MS, NOTE_PERIOD_MS, SETTLE_PATIENCE_MS};
use super::change::{PageChange, Urgency};
use super::state::Account;
use crate::ids::{AccountName, Steady};

/// Accounts with something to write and none under way, each in one line. First come, first served within a line, so that
/// a busy account does not keep others waiting.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Schedule {
    /// Somebody waits for these.
    now: BTreeSet<Turn>,
    /// Settlements.
    soon: BTreeSet<Turn>,
    /// The rest.
    later: BTreeSet<Turn>,
    turns: u64,
}

type Turn = (Steady, u64, AccountName);

/// An account's turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Scheduled {
    line: Line,
    not_before: Steady,
    turn: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Now,
    Soon,
    Later,
}

/// Without the numbers of the turns: schedules with the same order do the same.
impl fmt::Debug for Schedule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = [&self.now, &self.soon, &self.later];
        let turns = lines.map(|line| line.iter().map(|(not_before, _, name)| (not_before, name)).collect::<Vec<_>>());
        formatter.debug_list().entries(turns).finish()
    }
}

impl fmt::Debug for Scheduled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.line, self.not_before).fmt(formatter)
    }
}

impl Schedule {
    /// Puts the account where it belongs after a change of it; `before` is where it was.
    pub fn place(
        &mut self,
        name: &AccountName,
        account: Option<&Account>,
        before: Option<Scheduled>,
    ) -> Option<Scheduled> {
        let wanted = account.and_then(due);
        if let (Some(before), Some((line, not_before))) = (before, wanted)
            && (before.line, before.not_before) == (line, not_before)
        {
            return Some(before);
        }
        if let Some(Scheduled { line, not_before, turn }) = before {
            self.line_mut(line).remove(&(not_before, turn, name.clone()));
        }
        let (line, not_before) = wanted?;
        let turn = before.filter(|before| before.line == line).map_or(self.turns, |before| before.turn);
        self.turns += 1;
        self.line_mut(line).insert((not_before, turn, name.clone()));
        Some(Scheduled { line, not_before, turn })
    }

    /// Accounts that somebody waits for, whose write can begin.
    pub fn now(&self, now: Steady) -> impl Iterator<Item = &AccountName> {
        begun(&self.now, now)
    }

    /// Accounts with a settlement that has waited long enough.
    pub fn soon(&self, now: Steady) -> impl Iterator<Item = &AccountName> {
        begun(&self.soon, now)
    }

    /// Accounts with a settlement, however long it has waited.
    pub fn settlements(&self) -> impl Iterator<Item = &AccountName> {
        self.soon.iter().map(|(_, _, name)| name)
    }

    /// Accounts where only time was missing.
    pub fn later(&self, now: Steady) -> impl Iterator<Item = &AccountName> {
        begun(&self.later, now)
    }

    fn line_mut(&mut self, line: Line) -> &mut BTreeSet<Turn> {
        match line {
            Line::Now => &mut self.now,
            Line::Soon => &mut self.soon,
            Line::Later => &mut self.later,
        }
    }
}

fn begun(line: &BTreeSet<Turn>, now: Steady) -> impl Iterator<Item = &AccountName> {
    line.iter().take_while(move |(not_before, ..)| *not_before <= now).map(|(_, _, name)| name)
}

/// When a write of the account begins.
fn due(account: &Account) -> Option<(Line, Steady)> {
    if account.in_flight.is_some() {
        return None;
    }
    let at_once = Steady(0);
    let after = |since: Option<Steady>, patience_ms| since.map_or(at_once, |since: Steady| since.plus(patience_ms));
    let lazy = || {
        let count = account.pending.iter().filter(|change| matches!(change, PageChange::ReceiptWritten { .. })).count();
        let at_once_too = count >= LAZY_MAX || account.policy.deleting;
        if at_once_too { at_once } else { after(account.lazy_since, LAZY_PATIENCE_MS) }
    };
    let has_lazy = || account.pending.iter().any(|change| change.urgency() == Urgency::Lazy);
    let (line, due) = match account.urgency()? {
        Urgency::Now => (Line::Now, at_once),
        Urgency::Soon => (Line::Soon, after(account.settle_since, SETTLE_PATIENCE_MS)),
        Urgency::Note => {
            let note = after(account.noted_at, NOTE_PERIOD_MS);
            (Line::Later, if has_lazy() { note.min(lazy()) } else { note })
        }
        Urgency::Lazy => (Line::Later, lazy()),
    };
    Some((line, due.max(account.retry_at.unwrap_or(at_once))))
}
