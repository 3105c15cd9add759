//! The changes that wait for a write, and which of them the next one carries (L5).

use std::sync::Arc;

use super::change::PageChange;
use super::state::Account;
use crate::page::{OUTCOMES_MAX, Page};

impl Account {
    /// True if the next write carries all the changes that wait, as all but one case do: a base that is lowered after a hold
    /// was admitted under the higher one goes into a write of its own, so that at every revision the limit that admitted a
    /// hold is the one on the page (invariant 1).
    pub(super) fn fits_one_write(&self) -> bool {
        let mut from_first_hold = self.pending.iter().skip_while(|change| !matches!(change, PageChange::Hold { .. }));
        let _first_hold = from_first_hold.next();
        !from_first_hold.any(|change| matches!(change, PageChange::Hold { .. } | PageChange::Base { .. }))
    }

    /// The changes that the next write carries, and the page with them, where not all that wait may be among them
    /// ([`Self::fits_one_write`]).
    pub(super) fn take_first(&mut self) -> (Vec<PageChange>, Arc<Page>) {
        let mut page = (*self.durable).clone();
        let mut changes = Vec::new();
        let mut waiting = std::mem::take(&mut self.pending).into_iter();
        for change in waiting.by_ref() {
            let holds = changes.iter().any(|change| matches!(change, PageChange::Hold { .. }));
            if holds && change.lowers_base(&page) {
                self.pending.push(change);
                break;
            }
            // It was made on the working page in this order before, so it fits.
            if change.make(&mut page).is_ok() {
                changes.push(change);
            }
        }
        self.pending.extend(waiting);
        (changes, Arc::new(page))
    }

    /// Of notes that no write carries yet only the newest are kept (L5).
    pub(super) fn coalesce(&mut self, change: &PageChange) {
        match change {
            PageChange::Denied(_) => self.pending.retain(|pending| !matches!(pending, PageChange::Denied(_))),
            PageChange::Shown => self.pending.retain(|pending| *pending != PageChange::Shown),
            PageChange::Outcome(_) => {
                let is_outcome = |pending: &PageChange| matches!(pending, PageChange::Outcome(_));
                if self.pending.iter().filter(|pending| is_outcome(pending)).count() >= OUTCOMES_MAX
                    && let Some(oldest) = self.pending.iter().position(is_outcome)
                {
                    self.pending.remove(oldest);
                }
            }
            _ => {}
        }
    }
}
