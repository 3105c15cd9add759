//! What one compare-and-swap does to a page. A change is checked against the page it meets, so that the same change can
//! be made on the working state, on the durable page, and again on a page that somebody else has written (L2).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{LeaseId, LedgerTime};
use crate::page::{
    Budget, CLOSED_MAX, COOKIES_MAX, Closed, CookieRow, DenialRow, Ending, GRANTS_MAX, GrantRow, HOLDS_MAX, Hold,
    OUTCOMES_MAX, Outcome, Page, Source, Taken, WINDOWS_MAX, Window,
};
use crate::quota::{fill, keeps};

/// A change of one page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageChange {
    /// Reserves. Opens its window if it is not on the page, and takes the base that applies into it.
    Hold {
        /// The reservation.
        hold: Arc<Hold>,
        /// Its window as admission saw it: start, base and generation.
        window: Window,
        /// Grants among its parts.
        grants: Vec<GrantRow>,
        /// On a guest page the visitor's row as admission saw it.
        cookie: Option<Box<CookieRow>>,
    },
    /// Posts or voids a hold: once only (invariant 3).
    Settle {
        /// Whose.
        lease: LeaseId,
        /// How it ended.
        ending: Ending,
        /// From clock start to end.
        used_ms: u64,
        /// weight x min(used, declared), or 0.
        charged_ms: u64,
        /// Ledger time of the page.
        at: LedgerTime,
    },
    /// The receipt exists: the row leaves the outbox (L10).
    ReceiptWritten {
        /// Whose.
        lease: LeaseId,
    },
    /// The tier's base changed while a window is open.
    Base {
        /// Start of the window.
        window: LedgerTime,
        /// The base that applies.
        base_ms: u64,
        /// Of the tier.
        generation: i64,
    },
    /// Remembers the last refusal (L5).
    Denied(Arc<DenialRow>),
    /// Remembers an ending without receipt.
    Outcome(Arc<Outcome>),
    /// Nothing that is decided upon, so not its time either (L20): what the shell shows beside the page has changed, and no
    /// other write carries it.
    Shown,
}

/// How soon a change has to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Rides along with the next write; alone only after a long while: a settled row whose receipt exists does no harm.
    Lazy,
    /// At most one write per account and 5 s (L5).
    Note,
    /// Behind the writes that a visitor waits for, and no later than
    /// [`SETTLE_PATIENCE_MS`](super::SETTLE_PATIENCE_MS): the API server makes two writes at once slower than each alone.
    Soon,
    /// At once: something waits for it.
    Now,
}

/// A change that does not fit the page it meets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// Invariant 3: the lease is on the page already.
    #[error("lease {0} is on the page already")]
    AlreadyHeld(LeaseId),
    /// Invariant 3: no open hold to settle.
    #[error("lease {0} has no open hold on the page")]
    NotHeld(LeaseId),
    /// No settled row to remove.
    #[error("lease {0} has no settled row on the page")]
    NotClosed(LeaseId),
    /// Invariant 1: charged + reserved + new is above the limit of a source.
    #[error("lease {lease} would bring {which:?} to {sum_ms} ms of {limit_ms} ms")]
    OverLimit {
        /// Whose hold.
        lease: LeaseId,
        /// Which source.
        which: Source,
        /// charged + reserved + new.
        sum_ms: u64,
        /// Its limit.
        limit_ms: u64,
    },
    /// Invariant 1: the same of a visitor's row on a guest page.
    #[error("lease {lease} would bring its visitor to {sum_ms} ms of {limit_ms} ms")]
    OverCookie {
        /// Whose hold.
        lease: LeaseId,
        /// charged + reserved + new.
        sum_ms: u64,
        /// The visitor's limit.
        limit_ms: u64,
    },
    /// Invariant 5: more than weight x declared.
    #[error("lease {lease} would be charged {charged_ms} ms of at most {bound_ms} ms")]
    OverCharge {
        /// Whose.
        lease: LeaseId,
        /// The charge.
        charged_ms: u64,
        /// weight x declared.
        bound_ms: u64,
    },
    /// Invariant 10: more than its token is worth.
    #[error("lease {lease} would bring its token to {calls} of {max_calls} calls and {ms} of {max_ms} ms")]
    OverBudget {
        /// Whose hold.
        lease: LeaseId,
        /// Calls with it.
        calls: u64,
        /// What the token is worth.
        max_calls: u64,
        /// Reserved, charged and new.
        ms: u64,
        /// What the token is worth.
        max_ms: u64,
    },
    /// A part refers to a window or grant that is not on the page, or a window that ended or overlaps another.
    #[error("lease {0} refers to a source that is not on the page")]
    NoSource(LeaseId),
    /// A list of the page is at its maximum.
    #[error("the page has no room for another of its {0}")]
    Full(&'static str),
    /// A window that is gone.
    #[error("no window starts at {}", .0.0)]
    NoWindow(LedgerTime),
}

impl PageChange {
    /// How soon it has to be written.
    pub const fn urgency(&self) -> Urgency {
        match self {
            Self::Hold { .. } | Self::Base { .. } => Urgency::Now,
            Self::Settle { .. } => Urgency::Soon,
            Self::Denied(_) | Self::Outcome(_) | Self::Shown => Urgency::Note,
            Self::ReceiptWritten { .. } => Urgency::Lazy,
        }
    }

    /// True if it would lower the base of a window, or of a visitor's row.
    pub(super) fn lowers_base(&self, page: &Page) -> bool {
        if let Self::Hold { cookie: Some(row), .. } = self
            && let Some(known) =
                page.cookies.iter().find(|known| known.start == row.start && known.cookie == row.cookie)
            && known.base_ms > row.base_ms
        {
            return true;
        }
        let (start, base_ms) = match self {
            Self::Base { window, base_ms, .. } => (window, base_ms),
            Self::Hold { window, .. } => (&window.start, &window.base_ms),
            _ => return false,
        };
        page.windows.iter().any(|window| window.start == *start && window.base_ms > *base_ms)
    }

    /// Makes the change, or leaves the page as it is.
    ///
    /// # Errors
    /// Says what does not fit.
    pub fn make(&self, page: &mut Page) -> Result<(), Misfit> {
        match self {
            Self::Hold { hold, window, grants, cookie } => make_hold(page, hold, window, grants, cookie.as_deref()),
            Self::Settle { lease, ending, used_ms, charged_ms, at } => {
                let index =
                    page.holds.iter().position(|hold| hold.lease == *lease).ok_or(Misfit::NotHeld(lease.clone()))?;
                settle(page, index, *ending, *used_ms, *charged_ms, *at)
            }
            Self::ReceiptWritten { lease } => {
                let index = page
                    .closed
                    .iter()
                    .position(|closed| closed.hold.lease == *lease)
                    .ok_or(Misfit::NotClosed(lease.clone()))?;
                page.closed.remove(index);
                Ok(())
            }
            Self::Base { window, base_ms, generation } => {
                let found = page.windows.iter_mut().find(|found| found.start == *window);
                let found = found.ok_or(Misfit::NoWindow(*window))?;
                (found.base_ms, found.generation) = (*base_ms, *generation);
                Ok(())
            }
            Self::Denied(row) => {
                page.last_time = page.last_time.max(row.at);
                page.last_denial = Some(Arc::clone(row));
                Ok(())
            }
            Self::Outcome(outcome) => {
                page.last_time = page.last_time.max(outcome.at);
                let surplus = (page.recent_outcomes.len() + 1).saturating_sub(OUTCOMES_MAX);
                page.recent_outcomes.drain(..surplus);
                page.recent_outcomes.push(Arc::clone(outcome));
                Ok(())
            }
            Self::Shown => Ok(()),
        }
    }
}

/// Limit and charges of a source on the page.
fn limit_of(page: &Page, source: &Source) -> Option<(u64, u64)> {
    match source {
        Source::Window(start) => {
            page.windows.iter().find(|window| window.start == *start).map(|window| (window.base_ms, window.charged_ms))
        }
        Source::Grant(uid) => page.grants.iter().find(|row| row.uid == *uid).map(|row| (row.ms, row.used_ms)),
    }
}

fn make_hold(
    page: &mut Page,
    hold: &Arc<Hold>,
    window: &Window,
    grants: &[GrantRow],
    cookie: Option<&CookieRow>,
) -> Result<(), Misfit> {
    let lease = &hold.lease;
    let closed = page.closed.iter().any(|closed| closed.hold.lease == *lease);
    if closed || page.holds.iter().any(|open| open.lease == *lease) {
        return Err(Misfit::AlreadyHeld(lease.clone()));
    }
    // Every hold will need a place in the outbox; so settling never has to wait for one.
    if page.holds.len() >= HOLDS_MAX || page.holds.len() + page.closed.len() >= CLOSED_MAX {
        return Err(Misfit::Full("holds"));
    }
    check_budget(page, hold)?;
    // The visitors' rows of other pages than a guest's take no memory, nor does their copy.
    let before = (page.last_time, page.windows.clone(), page.grants.clone(), page.cookies.clone());
    let admitted = open_sources(page, hold, window, grants)
        .and_then(|()| open_row(page, hold, cookie))
        .and_then(|()| check_parts(page, hold));
    match admitted {
        Ok(()) => {
            page.holds.push(Arc::clone(hold));
            page.prune_budgets(hold.since);
        }
        Err(_) => (page.last_time, page.windows, page.grants, page.cookies) = before,
    }
    admitted
}

/// Brings the window and the grants of a hold onto the page.
fn open_sources(page: &mut Page, hold: &Hold, window: &Window, grants: &[GrantRow]) -> Result<(), Misfit> {
    page.last_time = page.last_time.max(hold.since);
    prune(page, hold.since);
    match page.windows.iter_mut().find(|found| found.start == window.start) {
        Some(found) => (found.base_ms, found.generation) = (window.base_ms, window.generation),
        None => {
            if page.windows.iter().any(|other| other.covers(window.start) || window.covers(other.start)) {
                return Err(Misfit::NoSource(hold.lease.clone()));
            }
            if page.windows.len() >= WINDOWS_MAX {
                return Err(Misfit::Full("windows"));
            }
            page.windows.push(Window { charged_ms: 0, runs: 0, ..window.clone() });
        }
    }
    for row in grants {
        if page.grants.iter().any(|known| known.uid == row.uid) {
            continue;
        }
        if page.grants.len() >= GRANTS_MAX {
            return Err(Misfit::Full("grants"));
        }
        page.grants.push(GrantRow { used_ms: 0, ..row.clone() });
    }
    Ok(())
}

/// Invariant 1: each part fits its source.
fn check_parts(page: &Page, hold: &Hold) -> Result<(), Misfit> {
    let lease = &hold.lease;
    for part in &hold.parts {
        let (limit_ms, charged_ms) = limit_of(page, &part.source).ok_or(Misfit::NoSource(lease.clone()))?;
        let sum_ms = charged_ms.saturating_add(page.reserved_ms(&part.source)).saturating_add(part.ms);
        // A part of 0 ms takes nothing, also from a base that was lowered below what is charged.
        if part.ms > 0 && sum_ms > limit_ms {
            return Err(Misfit::OverLimit { lease: lease.clone(), which: part.source.clone(), sum_ms, limit_ms });
        }
    }
    Ok(())
}

/// Invariant 10: another leader may have written a hold of the same token since this one was decided. When its call came, all
/// that was taken was known and counted, and all that waits with it: so that a row which had to go since does no harm.
fn check_budget(page: &Page, hold: &Hold) -> Result<(), Misfit> {
    let Some(budget) = &hold.budget else { return Ok(()) };
    let taken = page.taken_of_budget(&budget.root);
    let more = Taken { calls: 1, ms: hold.held_ms() };
    if budget.has(taken, more) {
        return Ok(());
    }
    let (sum, lease) = (taken.and(more), hold.lease.clone());
    let Budget { max_calls, max_ms, .. } = *budget;
    Err(Misfit::OverBudget { lease, calls: sum.calls, max_calls, ms: sum.ms, max_ms })
}

/// The visitor's row of a hold on a guest page: opened if it is not there, with the base that applies. Invariant 1 holds
/// for it as for the window of the prefix, of which the parts are.
fn open_row(page: &mut Page, hold: &Hold, cookie: Option<&CookieRow>) -> Result<(), Misfit> {
    let lease = || hold.lease.clone();
    let (row, window) = match (cookie, &hold.cookie) {
        (None, None) => return Ok(()),
        (Some(row), Some(window)) if row.is_of(window) => (row, window),
        _ => return Err(Misfit::NoSource(lease())),
    };
    match page.cookies.iter_mut().find(|known| known.is_of(window)) {
        Some(known) => (known.base_ms, known.generation) = (row.base_ms, row.generation),
        None => {
            let same = |known: &&CookieRow| known.cookie == row.cookie;
            if page.cookies.iter().filter(same).any(|known| known.covers(row.start) || row.covers(known.start)) {
                return Err(Misfit::NoSource(lease()));
            }
            if page.cookies.len() >= COOKIES_MAX {
                return Err(Misfit::Full("cookies"));
            }
            let new = CookieRow { charged_ms: 0, runs: 0, ..row.clone() };
            page.cookies = page.cookies.iter().cloned().chain([new]).collect();
        }
    }
    let Some(known) = page.cookies.iter().find(|known| known.is_of(window)) else {
        return Err(Misfit::NoSource(lease()));
    };
    let reserved_ms = page.reserved_of_row_ms(known);
    let sum_ms = known.charged_ms.saturating_add(reserved_ms).saturating_add(hold.held_ms());
    if sum_ms > known.base_ms {
        return Err(Misfit::OverCookie { lease: lease(), sum_ms, limit_ms: known.base_ms });
    }
    Ok(())
}

fn settle(
    page: &mut Page,
    index: usize,
    ending: Ending,
    used_ms: u64,
    charged_ms: u64,
    at: LedgerTime,
) -> Result<(), Misfit> {
    let hold = Arc::clone(&page.holds[index]);
    let bound_ms = hold.weight.saturating_mul(hold.declared_ms);
    if charged_ms > bound_ms {
        return Err(Misfit::OverCharge { lease: hold.lease.clone(), charged_ms, bound_ms });
    }
    if page.closed.len() >= CLOSED_MAX {
        return Err(Misfit::Full("closed"));
    }
    if hold.parts.iter().any(|part| limit_of(page, &part.source).is_none()) {
        return Err(Misfit::NoSource(hold.lease.clone()));
    }
    if let Some(window) = &hold.cookie {
        let Some(row) = page.cookies.iter_mut().find(|row| row.is_of(window)) else {
            return Err(Misfit::NoSource(hold.lease.clone()));
        };
        row.charged_ms = row.charged_ms.saturating_add(charged_ms);
        row.runs = row.runs.saturating_add(u64::from(charged_ms > 0));
    }
    for (source, ms) in fill(&hold.parts, charged_ms) {
        match source {
            Source::Window(start) => {
                if let Some(window) = page.windows.iter_mut().find(|window| window.start == *start) {
                    window.charged_ms = window.charged_ms.saturating_add(ms);
                    // A voided lease is no run (L18).
                    window.runs = window.runs.saturating_add(u64::from(charged_ms > 0));
                }
            }
            Source::Grant(uid) => {
                if let Some(row) = page.grants.iter_mut().find(|row| row.uid == *uid) {
                    row.used_ms = row.used_ms.saturating_add(ms);
                }
            }
        }
    }
    page.holds.remove(index);
    page.spend(&hold, ending, charged_ms, at);
    page.closed.push(Closed { hold, ending, used_ms, charged_ms, at });
    page.last_time = page.last_time.max(at);
    prune(page, at);
    page.prune_budgets(at);
    Ok(())
}

/// Drops what is over and what never was: windows and visitors' rows that ended or of which all holds ended at charge 0
/// (L12), expired grants.
/// Nothing that an open hold refers to.
fn prune(page: &mut Page, at: LedgerTime) {
    let mut windows = std::mem::take(&mut page.windows);
    windows.retain(|window| {
        let unused = window.charged_ms == 0 && window.runs == 0;
        page.is_referenced(&Source::Window(window.start)) || (!unused && at < window.end())
    });
    page.windows = windows;
    let mut grants = std::mem::take(&mut page.grants);
    grants.retain(|row| keeps(page, row, at));
    page.grants = grants;
    if page.cookies.iter().any(|row| !row.is_kept(page, at)) {
        page.cookies = page.cookies.iter().filter(|row| row.is_kept(page, at)).cloned().collect();
    }
}
