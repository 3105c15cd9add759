//! Which page writes begin now: one per account at a time, carrying everything that has gathered (group commit).

use super::Moment;
use super::change::{PageChange, Urgency};
use super::event::Event;
use super::state::{Account, State, WRITES_IN_FLIGHT_MAX};
use crate::ids::{AccountName, IdSeed, Steady};

/// Least time between two writes of one account that notes alone cause (L5).
pub const NOTE_PERIOD_MS: u64 = 5_000;
/// So many settled rows with a receipt cause a write by themselves: long before the outbox is full.
pub const LAZY_MAX: usize = 8;
/// After so long a single one does. Until then it rides along with the account's next lease, which spares a write per
/// lease ("Writes per lease"). A minute, because `OutboxDrained` is false meanwhile and an admin may be looking; a lease
/// that stays alone then costs two page writes, its receipt and this one.
pub const LAZY_PATIENCE_MS: u64 = 60 * 1000;

/// So long a settlement lets the holds of others go first. A hand-over settles one account and holds on another's at the
/// same moment, and its visitor waits for the hold alone. Far below the second of invariant 4, also with the tick on top.
pub const SETTLE_PATIENCE_MS: u64 = 50;

/// Begins the writes that are due, those first that somebody waits for. On a tick also of accounts where only time has made
/// them so.
pub fn begin(at: Moment, ids: &mut IdSeed, state: &State, tick: bool) -> Vec<Event> {
    let room = WRITES_IN_FLIGHT_MAX.saturating_sub(state.writes_in_flight);
    let names = if tick { &state.dirty } else { &state.urgent };
    // Behind the one that began last, so that a busy account does not keep others waiting.
    let is_behind = |name: &&AccountName| state.cursor.as_ref().is_none_or(|cursor| *name > cursor);
    let behind = names.iter().filter(is_behind);
    let before = names.iter().filter(|name| !is_behind(name));
    let in_turn = || behind.clone().chain(before.clone());
    let is_first = |account: &Account| account.urgency() == Some(Urgency::Now);
    let due = |name: &&AccountName, first: bool, holds: bool| {
        let account = state.accounts.get(name).filter(|account| is_first(account) == first);
        account.is_some_and(|account| is_due(account, at.steady, holds))
    };
    let first: Vec<&AccountName> = in_turn().filter(|name| due(name, true, true)).take(room).collect();
    let holds = state.holds_in_flight > 0 || !first.is_empty();
    let rest = in_turn().filter(|name| due(name, false, holds)).take(room - first.len());
    let all: Vec<&AccountName> = first.iter().copied().chain(rest).collect();
    all.into_iter()
        .map(|name| Event::WriteBegun { account: name.clone(), write_id: ids.draw(), at: at.steady })
        .collect()
}

/// True if a write of the account begins now; `holds`: somebody waits for a write of another.
fn is_due(account: &Account, now: Steady, holds: bool) -> bool {
    if account.in_flight.is_some() || account.retry_at.is_some_and(|retry_at| now < retry_at) {
        return false;
    }
    let Some(urgency) = account.urgency() else { return false };
    let note = || account.noted_at.is_none_or(|noted_at| now.since(noted_at) >= NOTE_PERIOD_MS);
    let lazy = || {
        let count = account.pending.iter().filter(|change| matches!(change, PageChange::ReceiptWritten { .. })).count();
        let waited = account.lazy_since.is_some_and(|since| now.since(since) >= LAZY_PATIENCE_MS);
        count >= LAZY_MAX || waited || account.policy.deleting
    };
    match urgency {
        Urgency::Now => true,
        Urgency::Soon => !holds || account.settle_since.is_none_or(|since| now.since(since) >= SETTLE_PATIENCE_MS),
        Urgency::Note => note() || lazy(),
        Urgency::Lazy => lazy(),
    }
}
