//! What a settlement says about how long a function runs.

use super::change::PageChange;
use super::state::State;
use crate::ids::AccountName;
use crate::page::{Ending, ShortenedBy};
use crate::queue::Function;

impl State {
    /// How long a call ran to its end, if that is what the change says: from it the queue learns. One that failed or was cut
    /// short says nothing about the next.
    pub(super) fn learned_of(&self, account: &AccountName, change: &PageChange) -> Option<(Function, u64)> {
        let PageChange::Settle { lease, ending: Ending::Released | Ending::Deadline, used_ms, .. } = change else {
            return None;
        };
        let hold = self.accounts.get(account)?.working.holds.iter().find(|hold| hold.lease == *lease)?;
        // Which version of its app a call of an earlier term was of stands on no page: what was learned ended with that
        // term, and of the few calls that run across a fail-over nothing is.
        let revision = self.leases.get(lease)?.request.as_ref()?.revision;
        let shortened = hold.shortened;
        let cut = matches!(change, PageChange::Settle { ending: Ending::Deadline, .. });
        if cut && shortened.is_some_and(|shortened| shortened.by == ShortenedBy::RemainingQuota) {
            // How long it would have run nobody knows. One that what was learned cut short is learned from: so the next
            // one gets more.
            return None;
        }
        let declared_ms = shortened.map_or(hold.declared_ms, |shortened| shortened.declared_ms);
        let function = Function { space_uid: hold.space.uid.clone(), revision, size: hold.size, declared_ms };
        Some((function, *used_ms))
    }
}
