//! What is to be done about an account's finalizer (L4). Pure.

use spaceport_core::ids::LedgerTime;
use spaceport_crds::names::{LEDGER_FINALIZER, SYSTEM_PAGE_PREFIX};

use super::observe::Observed;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing, before a change of the account.
    Nothing,
    /// Put our finalizer on it, so that it cannot vanish while something is open.
    Keep,
    /// It is being deleted, and only its window keeps it: look again then.
    Wait {
        /// End of the window.
        until: LedgerTime,
    },
    /// It is being deleted, and nothing keeps it: take our finalizer off.
    Release {
        /// Its window ended at a time, so the clock must be right.
        by_clock: bool,
    },
}

/// True if an account of this name gets the finalizer. Pages of the system charge nobody.
pub fn is_kept(name: &str) -> bool {
    !name.starts_with(SYSTEM_PAGE_PREFIX)
}

/// What is to be done about this revision at `now`, by the wall clock.
pub fn plan(observed: &Observed, now: LedgerTime) -> Plan {
    let has_ours = observed.finalizers.iter().any(|finalizer| finalizer == LEDGER_FINALIZER);
    match (observed.deleting, has_ours) {
        // The API server takes no new finalizer on an object that is being deleted.
        (false, true) | (true, false) => Plan::Nothing,
        (false, false) if is_kept(observed.name.as_str()) => Plan::Keep,
        (false, false) => Plan::Nothing,
        (true, true) => release(observed, now),
    }
}

fn release(observed: &Observed, now: LedgerTime) -> Plan {
    // A page that cannot be read may hold anything. Its watch has said so; an admin repairs it.
    let Some(open) = observed.open else { return Plan::Nothing };
    if open.holds > 0 || open.closed > 0 {
        // The page write that ends it brings a new revision.
        return Plan::Nothing;
    }
    match open.window_end {
        Some(end) if now.max(open.last_time) < end => Plan::Wait { until: end },
        end => Plan::Release { by_clock: end.is_some() },
    }
}

/// The finalizers of a revision with ours, or without it.
pub fn finalizers(observed: &Observed, with_ours: bool) -> Vec<String> {
    let others = observed.finalizers.iter().filter(|finalizer| *finalizer != LEDGER_FINALIZER);
    others.cloned().chain(with_ours.then(|| LEDGER_FINALIZER.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::AccountName;

    use super::*;
    use crate::account::observe::Open;

    const NOW: LedgerTime = LedgerTime(1_800_000_000_000);

    fn observed(finalizers: &[&str], deleting: bool, open: Option<Open>) -> Observed {
        Observed {
            name: AccountName::new("bob"),
            resource_version: "7".to_owned(),
            finalizers: finalizers.iter().map(|finalizer| (*finalizer).to_owned()).collect(),
            deleting,
            open,
        }
    }

    #[test]
    fn every_account_is_kept_and_no_page_of_the_system() {
        let new = observed(&[], false, Some(Open::default()));
        assert_eq!(plan(&new, NOW), Plan::Keep);
        assert_eq!(plan(&observed(&["example.com/other"], false, None), NOW), Plan::Keep, "also with a broken page");
        assert_eq!(plan(&observed(&[LEDGER_FINALIZER], false, Some(Open::default())), NOW), Plan::Nothing);
        let term = Observed { name: AccountName::new("spaceport-term"), ..new };
        assert_eq!(plan(&term, NOW), Plan::Nothing);
    }

    #[test]
    fn a_deleted_account_stays_until_nothing_is_open_the_outbox_is_empty_and_the_window_has_ended() {
        let at = |open: Open| plan(&observed(&[LEDGER_FINALIZER], true, Some(open)), NOW);
        let ended = Some(NOW);
        assert_eq!(at(Open { holds: 1, window_end: ended, ..Open::default() }), Plan::Nothing, "a lease is open");
        assert_eq!(at(Open { closed: 1, window_end: ended, ..Open::default() }), Plan::Nothing, "a receipt is missing");
        let tomorrow = NOW.plus(86_400_000);
        assert_eq!(at(Open { window_end: Some(tomorrow), ..Open::default() }), Plan::Wait { until: tomorrow });
        assert_eq!(at(Open { window_end: ended, ..Open::default() }), Plan::Release { by_clock: true });
        assert_eq!(at(Open::default()), Plan::Release { by_clock: false }, "it was never used");
        // A clock that was stepped back does not open the window again (L20).
        let later = Open { window_end: Some(tomorrow), last_time: tomorrow, ..Open::default() };
        assert_eq!(at(later), Plan::Release { by_clock: true });
        let broken = observed(&[LEDGER_FINALIZER], true, None);
        assert_eq!(plan(&broken, NOW), Plan::Nothing, "nobody can tell what is open");
    }

    #[test]
    fn an_account_that_others_keep_is_left_to_them() {
        assert_eq!(plan(&observed(&["example.com/other"], true, Some(Open::default())), NOW), Plan::Nothing);
        let both = observed(&["example.com/other", LEDGER_FINALIZER], true, None);
        assert_eq!(finalizers(&both, false), ["example.com/other"]);
        assert_eq!(finalizers(&both, true), ["example.com/other", LEDGER_FINALIZER]);
    }
}
