//! `GPUAccount.status` as it is read back, and what the ledger does with it.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use spaceport_core::ids::{CookieId, Epoch, LeaseId, NodeName, Size};
use spaceport_core::lease::{Command, EndReport, FreedAs};
use spaceport_core::page::{Ending, Page};
use spaceport_crds::{GPUAccount, GPUAccountSpec, GPUAccountStatus};
use spaceport_operator::ledger::convert::KeptFields;
use spaceport_operator::ledger::seen::AccountSeen;
use spaceport_shell::error_chain;

use crate::Verdict;
use crate::ledger::{ACCOUNT, GUESTS, Ledger, stored_alike};

/// Longest the ledger waits for anything: beyond a window, and the bound of L9 for the longest call.
const LONG_MS: u64 = 2 * 24 * 3600 * 1000;

/// A status as JSON.
///
/// # Panics
/// If it is refused without words, or is taken and cannot be written back as it is, or the ledger stumbles over it.
pub fn check(bytes: &[u8]) -> Verdict {
    let Ok(status) = serde_json::from_slice::<GPUAccountStatus>(bytes) else { return Verdict::Refused };
    let kept = KeptFields::of(&status);
    let name = if status.cookies.is_empty() { ACCOUNT } else { GUESTS };
    let mut account = GPUAccount::new(name, GPUAccountSpec::default());
    account.status = Some(status);
    let page = match AccountSeen::of(&account).page {
        Ok(page) => page,
        Err(problem) => {
            assert!(error_chain(&problem).len() > 20, "{problem:?}");
            return Verdict::Refused;
        }
    };
    stored_alike(&page, Some(&kept));
    goes_on(page, ids(bytes));
    Verdict::Taken
}

/// Where the ids of the story come from. Of all bytes, so that none of them can name an id that will be drawn: nobody draws
/// an id twice.
fn ids(bytes: &[u8]) -> u128 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    u128::from(hasher.finish()) << 48
}

/// The next term takes the account, lets it call, and settles everything that is open.
fn goes_on(page: Page, ids: u128) {
    let holds: Vec<(LeaseId, NodeName)> =
        page.holds.iter().map(|hold| (hold.lease.clone(), hold.node.clone())).collect();
    let mut ledger = Ledger::new(Epoch(page.epoch.0 + 1)).drawing_from(ids);
    let [first, second, third] = callers(&page);
    match &first {
        Some(_) => ledger.guests(page),
        None => ledger.account(page),
    }
    ledger.request_of(first.as_ref(), 1, Size::Large, 30_000);
    ledger.request_of(second.as_ref(), 2, Size::Xlarge, 60_000);
    for (number, (lease, node)) in holds.into_iter().enumerate() {
        // Some report that they ended, of the others nothing is heard.
        if number % 2 == 0 {
            let report = EndReport { ending: Ending::Released, used_ms: 1234 };
            ledger.command(Command::Ended { node: node.clone(), lease: lease.clone(), report, kept: false });
            ledger.command(Command::Freed { node, lease, how: FreedAs::Free });
        }
    }
    for milliseconds in [1_000, 60_000, LONG_MS] {
        ledger.wait(milliseconds);
    }
    ledger.request_of(third.as_ref(), 3, Size::Large, 1_000);
}

/// Who calls: the account itself; on a page with rows of visitors those of the first and of the last row, and a new one.
fn callers(page: &Page) -> [Option<CookieId>; 3] {
    match (page.cookies.first(), page.cookies.last()) {
        (Some(first), Some(last)) => [first.cookie.clone(), last.cookie.clone(), CookieId::new("new")].map(Some),
        _ => [None, None, None],
    }
}
