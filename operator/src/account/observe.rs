//! What the ledger's watch has shown of one account, as far as its finalizer depends on it. The controller has no watch of
//! its own: a second one would double what every page write costs the API server.

use spaceport_core::ids::{AccountName, LedgerTime};
use spaceport_core::page::Page;

use crate::ledger::seen::AccountSeen;

/// One revision of an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its name.
    pub name: AccountName,
    /// The revision that all this is of; the compare of a write.
    pub resource_version: String,
    /// All its finalizers: a write must not lose those of others.
    pub finalizers: Vec<String>,
    /// It is being deleted.
    pub deleting: bool,
    /// What keeps it; none if its page cannot be used, so that nobody can tell.
    pub open: Option<Open>,
}

/// What of a page keeps its account (L4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// Open holds.
    pub holds: usize,
    /// Settled rows whose receipt is not known to be written.
    pub closed: usize,
    /// End of the last window, whether it has passed or not.
    pub window_end: Option<LedgerTime>,
    /// No decision on the page is before it (L20).
    pub last_time: LedgerTime,
}

impl Observed {
    /// Of an account as its watch shows it.
    pub fn of(seen: &AccountSeen) -> Self {
        Self {
            name: seen.name.clone(),
            resource_version: seen.resource_version.clone(),
            finalizers: seen.finalizers.clone(),
            deleting: seen.deleting,
            open: seen.page.as_ref().ok().map(Open::of),
        }
    }
}

impl Open {
    /// Of a page.
    pub fn of(page: &Page) -> Self {
        Self {
            holds: page.holds.len(),
            closed: page.closed.len(),
            window_end: page.windows.iter().map(spaceport_core::page::Window::end).max(),
            last_time: page.last_time,
        }
    }
}
