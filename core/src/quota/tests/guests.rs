//! Guest pages: each visitor's limit and that of the address prefix, in one page (L1).

use proptest::prelude::*;

use super::*;
use crate::lease::change::Misfit;

const COOKIE_MS: u64 = 120_000;
const PREFIX_MS: u64 = 600_000;

fn guests() -> Allowance {
    Allowance { per_cookie_ms: Some(COOKIE_MS), longest_call_ms: 60_000, ..allowance(PREFIX_MS) }
}

fn ask(
    page: &Page,
    cookie: &str,
    at: LedgerTime,
    allowance: &Allowance,
    declared_ms: u64,
) -> Result<Admission, Denial> {
    let cookie = CookieId::new(cookie);
    let payer = Payer { page, allowance, cookie: Some(&cookie), at };
    admit(payer, &large(declared_ms), Queued::default(), FreesIn { account_ms: 7, cookie_ms: 9 })
}

fn hold(page: &mut Page, cookie: &str, lease: &str, at: LedgerTime, declared_ms: u64) {
    let admission = ask(page, cookie, at, &guests(), declared_ms).unwrap();
    held(admission, lease, at, large(declared_ms)).make(page).unwrap();
}

fn charge(page: &mut Page, cookie: &str, at: LedgerTime, ms: u64) {
    hold(page, cookie, cookie, at, ms);
    settle(page, cookie, at, ms);
    // Its receipt is written.
    page.closed.clear();
}

#[test]
fn two_visitors_behind_one_address_have_rows_of_their_own() {
    let mut page = Page::default();
    charge(&mut page, "ann", NOW, 60_000);
    hold(&mut page, "ann", "a", NOW.plus(1), 30_000);
    let Denial::PendingOverquota { left_ms, reserved_ms, limit_ms, limiter, largest_declared_ms, .. } =
        ask(&page, "ann", NOW.plus(2), &guests(), 60_000).unwrap_err()
    else {
        panic!("60 of 120 s are charged and 30 s reserved: 60 s fit when those are back")
    };
    assert_eq!((left_ms, reserved_ms, limit_ms, limiter), (30_000, 30_000, COOKIE_MS, Limiter::Cookie));
    assert_eq!(largest_declared_ms, 30_000);
    charge(&mut page, "bob", NOW.plus(3), 60_000);
    let rows: Vec<_> = page.cookies.iter().map(|row| (row.cookie.as_str(), row.charged_ms, row.runs)).collect();
    assert_eq!(rows, [("ann", 60_000, 1), ("bob", 60_000, 1)]);
    assert_eq!(page.windows[0].charged_ms, 120_000, "both count in the prefix");
}

#[test]
fn each_limit_refuses_with_its_own_numbers() {
    let mut page = Page::default();
    charge(&mut page, "ann", NOW, 60_000);
    charge(&mut page, "ann", NOW.plus(1_000), 59_000);
    let Denial::QuotaExceeded { left_ms, limit_ms, resets_in_ms, limiter: Limiter::Cookie, .. } =
        ask(&page, "ann", NOW.plus(2_000), &guests(), 2_000).unwrap_err()
    else {
        panic!("1 of the visitor's 120 s is left")
    };
    assert_eq!((left_ms, limit_ms, resets_in_ms), (1_000, COOKIE_MS, WINDOW_MS - 2_000));
    for name in 0..8 {
        charge(&mut page, &name.to_string(), NOW.plus(3_000), 60_000);
    }
    let Denial::QuotaExceeded {
        left_ms,
        limit_ms,
        resets_in_ms,
        limiter: Limiter::AddressPrefix,
        largest_declared_ms,
        ..
    } = ask(&page, "new", NOW.plus(4_000), &guests(), 2_000).unwrap_err()
    else {
        panic!("a visitor who never called has all of its own, and the prefix 1 of 600 s")
    };
    assert_eq!((left_ms, limit_ms, resets_in_ms), (1_000, PREFIX_MS, WINDOW_MS - 4_000));
    assert_eq!(largest_declared_ms, 1_000);
}

#[test]
fn what_a_visitor_has_waiting_counts_for_itself_and_for_the_prefix() {
    let (page, guests, ann) = (Page::default(), guests(), CookieId::new("ann"));
    let payer = Payer { page: &page, allowance: &guests, cookie: Some(&ann), at: NOW };
    let refused = |queued| admit(payer, &large(60_000), queued, FreesIn { account_ms: 7, cookie_ms: 9 }).unwrap_err();
    let by = |denial| match denial {
        Denial::PendingOverquota { limiter, left_ms, frees_in_ms, .. } => (limiter, left_ms, frees_in_ms),
        other => panic!("{other:?}"),
    };
    assert_eq!(by(refused(Queued { account_ms: 90_000, cookie_ms: 90_000 })), (Limiter::Cookie, 30_000, 9));
    assert_eq!(by(refused(Queued { account_ms: 550_000, cookie_ms: 0 })), (Limiter::AddressPrefix, 50_000, 7));
}

#[test]
fn a_full_page_loses_no_row_and_says_when_one_is_free() {
    let mut page = Page::default();
    for number in 0..COOKIES_MAX as u64 {
        charge(&mut page, &number.to_string(), NOW.plus(number), 1);
    }
    hold(&mut page, "0", "open", NOW.plus(100), 1_000);
    let full = || Denial::TooManyGuests { limit: 64, frees_in_ms: WINDOW_MS - 1_000 };
    assert_eq!(ask(&page, "new", NOW.plus(1_000), &guests(), 1), Err(full()));
    assert!(ask(&page, "7", NOW.plus(1_000), &guests(), 1).is_ok(), "whoever has a row keeps it");
    // The first row's day is over, but its lease still runs; the second's is over and nothing is held.
    let later = NOW.plus(WINDOW_MS);
    assert!(matches!(ask(&page, "new", later, &guests(), 1), Err(Denial::TooManyGuests { frees_in_ms: 1, .. })));
    hold(&mut page, "new", "new", later.plus(1), 1);
    let names: Vec<&str> = page.cookies.iter().map(|row| row.cookie.as_str()).collect();
    assert_eq!((names.len(), names[0], names[1], names[63]), (64, "0", "2", "new"));
}

#[test]
fn a_row_of_refunds_was_never_opened() {
    let mut page = Page::default();
    hold(&mut page, "ann", "a", NOW, 1_000);
    settle(&mut page, "a", NOW.plus(1), 0);
    assert!(page.cookies.is_empty() && page.windows.is_empty());
}

#[test]
fn runs_are_counted_for_each_visitor() {
    let guests = Allowance { runs_per_window: Some(1), ..guests() };
    let mut page = Page::default();
    charge(&mut page, "ann", NOW, 1_000);
    assert!(matches!(ask(&page, "ann", NOW, &guests, 1), Err(Denial::RunsExceeded { limit: 1, .. })));
    assert!(ask(&page, "bob", NOW, &guests, 1).is_ok());
}

#[test]
fn a_hold_beyond_its_visitors_row_does_not_fit_the_page() {
    let mut page = Page::default();
    let admission = ask(&page, "ann", NOW, &guests(), 60_000).unwrap();
    let of = |lease: &str| held(admission.clone(), lease, NOW, large(60_000));
    of("a").make(&mut page).unwrap();
    of("b").make(&mut page).unwrap();
    let before = page.clone();
    let third = of("c").make(&mut page).unwrap_err();
    assert_eq!(third, Misfit::OverCookie { lease: LeaseId::new("c"), sum_ms: 180_000, limit_ms: COOKIE_MS });
    assert_eq!(page, before, "nothing of a hold that does not fit is left");
    settle(&mut page, "a", NOW, 1);
    settle(&mut page, "b", NOW, 1);
    let (before, next_day) = (page.clone(), NOW.plus(WINDOW_MS));
    let admission = ask(&page, "bob", next_day, &guests(), 60_000).unwrap();
    let PageChange::Hold { hold, window, grants, .. } = held(admission, "d", next_day, large(60_000)) else {
        unreachable!()
    };
    let without_row = PageChange::Hold { hold, window, grants, cookie: None };
    assert_eq!(without_row.make(&mut page), Err(Misfit::NoSource(LeaseId::new("d"))));
    assert_eq!(page, before, "nor is a new window, or what was dropped for it");
}

/// What visitors do, and what an admin changes.
#[derive(Clone, Debug)]
enum Deed {
    Call { cookie: u8, declared_ms: u64 },
    End { which: usize, used_percent: u64 },
    Pass { ms: u64 },
    Limits { cookie_ms: u64, prefix_ms: u64 },
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        6 => (0..90_u8, 1..60_000_u64).prop_map(|(cookie, declared_ms)| Deed::Call { cookie, declared_ms }),
        5 => (0..40_usize, 0..=100_u64).prop_map(|(which, used_percent)| Deed::End { which, used_percent }),
        2 => (0..WINDOW_MS / 3).prop_map(|ms| Deed::Pass { ms }),
        1 => (1..200_000_u64, 1..900_000_u64).prop_map(|(cookie_ms, prefix_ms)| Deed::Limits { cookie_ms, prefix_ms }),
    ]
}

proptest! {
    /// Invariants 1, 3 and 5 for both limits: at each admission charged + reserved is within each, nothing that was charged
    /// is forgotten within its day, and both count the same.
    #[test]
    fn no_history_breaks_either_limit(deeds in prop::collection::vec(deed(), 1..160)) {
        let (mut page, mut allowance, mut now) = (Page::default(), guests(), NOW);
        // What each visitor was charged, by an account of the test's own: time of the hold's row, and amount.
        let mut charges: Vec<(String, LedgerTime, u64)> = Vec::new();
        for (number, deed) in deeds.into_iter().enumerate() {
            match deed {
                Deed::Pass { ms } => now = now.plus(ms),
                Deed::Limits { cookie_ms, prefix_ms } => {
                    (allowance.per_cookie_ms, allowance.base_ms) = (Some(cookie_ms), prefix_ms);
                }
                Deed::Call { cookie, declared_ms } => {
                    let cookie = cookie.to_string();
                    let Ok(admission) = ask(&page, &cookie, now, &allowance, declared_ms) else { continue };
                    // The outbox may be full; the receipts are then written.
                    page.closed.clear();
                    let made = held(admission, &number.to_string(), now, large(declared_ms)).make(&mut page);
                    if page.holds.len() < crate::page::CLOSED_MAX {
                        prop_assert_eq!(&made, &Ok(()));
                    }
                    if made.is_err() {
                        continue;
                    }
                    let row = page.open_cookie(&CookieId::new(&cookie), now).unwrap();
                    let taken = row.charged_ms + page.reserved_of_row_ms(row);
                    prop_assert!(taken <= row.base_ms && row.base_ms == allowance.per_cookie_ms.unwrap());
                    let window = page.open_window(now).unwrap();
                    let taken = window.charged_ms + page.reserved_ms(&Source::Window(window.start));
                    prop_assert!(taken <= window.base_ms && window.base_ms == allowance.base_ms);
                }
                Deed::End { which, used_percent } => {
                    if page.holds.is_empty() {
                        continue;
                    }
                    let hold = page.holds[which % page.holds.len()].clone();
                    let used_ms = hold.declared_ms * used_percent / 100;
                    page.closed.clear();
                    settle(&mut page, hold.lease.as_str(), now, used_ms);
                    let window = hold.cookie.clone().unwrap();
                    charges.push((window.cookie.to_string(), window.start, used_ms));
                }
            }
            prop_assert!(page.cookies.len() <= COOKIES_MAX);
            for row in &page.cookies {
                let own = charges.iter().filter(|(cookie, start, _)| row.cookie.as_str() == cookie && row.start == *start);
                prop_assert_eq!(own.map(|(_, _, ms)| ms).sum::<u64>(), row.charged_ms);
            }
            let kept = |cookie: &str, start| {
                page.cookies.iter().any(|row| row.cookie.as_str() == cookie && row.start == start)
            };
            for (cookie, start, ms) in &charges {
                prop_assert!(*ms == 0 || start.plus(WINDOW_MS) <= now || kept(cookie, *start), "a charge of {cookie} is lost");
            }
        }
    }
}
