//! Requests that wait for something of their own account: when they have their turn again.

use super::state::State;
use crate::ids::AccountName;

impl State {
    /// Lets the requests of an account have their turn again, if nothing of the account's own keeps them waiting. A pause
    /// after a failed write ends with time, see `expiry`.
    pub(super) fn unpark(&mut self, account: &AccountName) {
        if self.accounts.get(account).is_none_or(|found| found.retry_at.is_none()) {
            self.unpark_where(account);
        }
    }

    /// Those of them whose payer may have another lease: on a guest page each visitor has a limit of its own.
    pub(super) fn unpark_where(&mut self, account: &AccountName) {
        if self.queue.parked_on(account).next().is_none() {
            return;
        }
        let found = self.accounts.get(account);
        let page = found.map(|found| self.page_of(found));
        let payer = found.zip(page);
        self.queue
            .unpark(account, |waiting| payer.is_none_or(|(found, page)| !found.is_full(page, waiting.cookie.as_ref())));
    }
}
