//! The rows of a guest page (L1): the window of each visitor, beside that of the whole address prefix.

use spaceport_core::ids::AccountName;
use spaceport_core::page::{Closed, CookieRow, CookieWindow, Hold, Page};

use super::VISITOR_MS;

/// Of a new hold: a guest's counts in the row of its visitor as well, where invariant 1 holds too; nobody else's has one.
pub(super) fn fits(payer: &AccountName, page: &Page, hold: &Hold) {
    let lease = &hold.lease;
    assert_eq!(hold.cookie.is_some(), payer.is_guests(), "{lease} is of {:?} (L1)", hold.cookie);
    let Some(window) = &hold.cookie else { return };
    let row = page.cookies.iter().find(|row| row.is_of(window)).expect("a row of the page");
    let (charged_ms, reserved_ms) = (row.charged_ms, page.reserved_of_row_ms(row));
    // By what the tier gives, not by what the row says of it.
    assert!(charged_ms + reserved_ms <= VISITOR_MS, "{lease}: {charged_ms} + {reserved_ms} of {VISITOR_MS} ms");
}

/// Each row has gained what the leases of its visitor were charged (3), and none with a charge goes before its day is over.
pub(super) fn add_up(before: &Page, after: &Page) {
    let is_new = |closed: &&Closed| !before.closed.iter().any(|known| known.hold.lease == closed.hold.lease);
    for row in &after.cookies {
        let had_ms = before.cookies.iter().find(|known| is_same(known, row)).map_or(0, |known| known.charged_ms);
        let is_own = |window: &CookieWindow| row.is_of(window);
        let settled = after.closed.iter().filter(is_new);
        let of_it = settled.filter(|closed| closed.hold.cookie.as_ref().is_some_and(is_own));
        let gained_ms: u64 = of_it.map(|closed| closed.charged_ms).sum();
        assert_eq!(row.charged_ms, had_ms + gained_ms, "{} had {had_ms} ms and was charged {gained_ms} ms", row.cookie);
    }
    for row in before.cookies.iter().filter(|row| row.charged_ms > 0) {
        let stays = after.cookies.iter().any(|known| is_same(known, row));
        assert!(stays || row.end() <= after.last_time, "the row of {} with a charge is lost", row.cookie);
    }
}

fn is_same(one: &CookieRow, other: &CookieRow) -> bool {
    one.cookie == other.cookie && one.start == other.start
}
