//! Which page writes begin now: one per account at a time, carrying everything that has gathered (group commit).

use super::Moment;
use super::event::Event;
use super::state::{State, WRITES_IN_FLIGHT_MAX};
use crate::ids::{AccountName, IdSeed};

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

/// Begins the writes that are due, those first that somebody waits for. While somebody waits for a hold, what can wait does,
/// up to its limit; `tick` is the limit of what only time has made due.
pub fn begin(at: Moment, ids: &mut IdSeed, state: &State, tick: bool) -> Vec<Event> {
    let room = WRITES_IN_FLIGHT_MAX.saturating_sub(state.writes_in_flight);
    if room == 0 {
        return Vec::new();
    }
    let schedule = &state.schedule;
    let mut names: Vec<&AccountName> = schedule.now(at.steady).take(room).collect();
    let holds = state.holds_in_flight > 0 || !names.is_empty();
    let left = |names: &[&AccountName]| room - names.len();
    if holds {
        names.extend(schedule.soon(at.steady).take(left(&names)).collect::<Vec<_>>());
    } else {
        let may_try = |name: &&AccountName| {
            let retry_at = state.accounts.get(*name).and_then(|account| account.retry_at);
            retry_at.is_none_or(|retry_at| retry_at <= at.steady)
        };
        names.extend(schedule.settlements().filter(may_try).take(left(&names)).collect::<Vec<_>>());
    }
    if tick || !holds {
        names.extend(schedule.later(at.steady).take(left(&names)).collect::<Vec<_>>());
    }
    names
        .into_iter()
        .map(|name| Event::WriteBegun { account: name.clone(), write_id: ids.draw(), at: at.steady })
        .collect()
}
