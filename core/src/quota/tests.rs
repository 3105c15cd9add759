//! What one account has left, reserves and pays. Here is the world of guests' tests too.

mod guests;

use super::*;
use crate::ids::{Epoch, LeaseId, NodeName, SpaceKey};
use crate::lease::change::PageChange;
use crate::page::Ending;

const NOW: LedgerTime = LedgerTime(1_000_000);

fn allowance(base_ms: u64) -> Allowance {
    Allowance {
        base_ms,
        per_cookie_ms: None,
        longest_call_ms: 50_000,
        runs_per_window: None,
        generation: 1,
        grants: Vec::new(),
    }
}

fn grant(uid: &str, ms: u64, expires: i64) -> Grant {
    Grant { uid: uid.to_owned(), ms, expires: LedgerTime(expires) }
}

fn large(declared_ms: u64) -> Demand {
    Demand { size: Size::Large, weight: 1, declared_ms, duration_factor_percent: 100, shortened: None }
}

fn xlarge(declared_ms: u64) -> Demand {
    Demand { size: Size::Xlarge, weight: 2, declared_ms, duration_factor_percent: 100, shortened: None }
}

fn payer<'a>(page: &'a Page, allowance: &'a Allowance, at: LedgerTime) -> Payer<'a> {
    Payer { page, allowance, cookie: None, at }
}

fn hold(page: &mut Page, lease: &str, allowance: &Allowance, at: LedgerTime, demand: Demand) {
    let admission = admit(payer(page, allowance, at), &demand, Queued::default(), FreesIn::default()).unwrap();
    held(admission, lease, at, demand).make(page).unwrap();
}

/// The hold of a call that was admitted.
fn held(admission: Admission, lease: &str, at: LedgerTime, demand: Demand) -> PageChange {
    let Admission { window, parts, grants, cookie } = admission;
    let hold = Hold {
        lease: LeaseId::new(lease),
        space: SpaceKey::new("n", "s", "u"),
        parts,
        node: NodeName::new("node"),
        avoid: Vec::new(),
        size: demand.size,
        weight: demand.weight,
        declared_ms: demand.declared_ms,
        epoch: Epoch(1),
        since: at,
        after: None,
        generation: 1,
        via: "token".into(),
        cookie: cookie.as_ref().map(|row| CookieWindow { cookie: row.cookie.clone(), start: row.start }),
        shortened: None,
        budget: None,
    };
    PageChange::Hold { hold: hold.into(), window, grants, cookie: cookie.map(Box::new) }
}

fn settle(page: &mut Page, lease: &str, at: LedgerTime, charged_ms: u64) {
    let lease = LeaseId::new(lease);
    let change = PageChange::Settle { lease, ending: Ending::Released, used_ms: charged_ms, charged_ms, at };
    change.make(page).unwrap();
}

#[test]
fn the_story_of_the_demo() {
    let (mut page, bob) = (Page::default(), allowance(60_000));
    hold(&mut page, "a", &bob, NOW, large(10_000));
    settle(&mut page, "a", NOW.plus(5_000), 5_000);
    hold(&mut page, "b", &bob, NOW.plus(6_000), xlarge(10_000));
    settle(&mut page, "b", NOW.plus(11_000), 10_000);
    let denial =
        admit(payer(&page, &bob, NOW.plus(12_000)), &large(50_000), Queued::default(), FreesIn::default()).unwrap_err();
    assert_eq!(
        denial,
        Denial::QuotaExceeded {
            declared_ms: 50_000,
            given_ms: None,
            weight: 1,
            needed_ms: 50_000,
            left_ms: 45_000,
            reserved_ms: 0,
            limit_ms: 60_000,
            resets_in_ms: WINDOW_MS - 12_000,
            largest_declared_ms: 45_000,
            limiter: Limiter::Account,
        }
    );
}

#[test]
fn each_refusal_is_its_own() {
    let (mut page, mut bob) = (Page::default(), allowance(60_000));
    hold(&mut page, "a", &bob, NOW, large(40_000));
    let refuse = |bob: &Allowance, demand| {
        admit(payer(&page, bob, NOW), &demand, Queued::default(), FreesIn { account_ms: 7, cookie_ms: 9 }).unwrap_err()
    };
    assert!(matches!(
        refuse(&bob, large(30_000)),
        Denial::PendingOverquota {
            left_ms: 20_000,
            reserved_ms: 40_000,
            frees_in_ms: 7,
            largest_declared_ms: 20_000,
            ..
        }
    ));
    assert!(matches!(
        refuse(&bob, large(50_001)),
        Denial::IllegalDuration { limit_ms: 50_000, what: DurationLimit::LongestCall, .. }
    ));
    assert!(matches!(
        refuse(&bob, xlarge(30_001)),
        Denial::IllegalDuration { limit_ms: 30_000, what: DurationLimit::WholeQuota, .. }
    ));
    assert!(matches!(refuse(&bob, large(0)), Denial::IllegalDuration { what: DurationLimit::Zero, .. }));
    bob.runs_per_window = Some(1);
    assert_eq!(refuse(&bob, large(1)), Denial::RunsExceeded { limit: 1, resets_in_ms: WINDOW_MS });
}

#[test]
fn the_clients_factor_makes_no_default_call_illegal() {
    // L19: a guest's longest call is 60 s, the client asks for 90 s where the function declares nothing.
    let guest = Allowance { longest_call_ms: 60_000, ..allowance(120_000) };
    let factor = |demand: Demand| Demand { duration_factor_percent: 150, ..demand };
    assert_eq!(check_legal(payer(&Page::default(), &guest, NOW), &factor(large(90_000))), Ok(()));
    assert!(check_legal(payer(&Page::default(), &guest, NOW), &factor(large(90_001))).is_err());
    assert_eq!(check_legal(payer(&Page::default(), &guest, NOW), &factor(xlarge(60_000))), Ok(()));
    assert!(check_legal(payer(&Page::default(), &guest, NOW), &factor(xlarge(60_001))).is_err());
    // Of 45 s it makes 67.5 s and sends 68 s.
    let odd = Allowance { longest_call_ms: 45_000, ..allowance(120_000) };
    assert_eq!(check_legal(payer(&Page::default(), &odd, NOW), &factor(large(68_000))), Ok(()));
    let denial = check_legal(payer(&Page::default(), &odd, NOW), &factor(large(69_000)));
    assert!(matches!(denial, Err(Denial::IllegalDuration { limit_ms: 68_000, .. })), "{denial:?}");
}

#[test]
fn base_is_used_first_then_the_grant_that_expires_soonest() {
    let mut page = Page::default();
    let far = i64::MAX;
    let bob = Allowance {
        grants: vec![grant("late", 100, far), grant("gone", 500, NOW.0), grant("soon", 30, far - 1)],
        ..allowance(50)
    };
    hold(&mut page, "a", &bob, NOW, large(90));
    let parts: Vec<u64> = page.holds[0].parts.iter().map(|part| part.ms).collect();
    assert_eq!(parts, [50, 30, 10]);
    settle(&mut page, "a", NOW, 60);
    assert_eq!(page.windows[0].charged_ms, 50);
    let used: Vec<(&str, u64)> = page.grants.iter().map(|row| (row.uid.as_str(), row.used_ms)).collect();
    assert_eq!(used, [("soon", 10), ("late", 0)]);
    // What grants have paid is no part of the quota any more.
    assert_eq!(page.standing(&bob, NOW).limit_ms, 50 + 20 + 100);
}

#[test]
fn a_grant_can_pay_if_it_has_time_and_room_on_the_page() {
    let uid = |number: usize| format!("{number:02}");
    let expires = |number: usize| NOW.plus(1_000 + number as u64).0;
    let mut grants: Vec<Grant> = (0..GRANTS_MAX + 2).map(|number| grant(&uid(number), 10, expires(number))).collect();
    grants.push(grant("gone", 10, NOW.0));
    let bob = Allowance { grants, ..allowance(0) };
    let mut page = Page::default();
    let those_that_expire_first: Vec<String> = (0..GRANTS_MAX).map(uid).collect();
    assert_eq!(page.usable_grants(&bob, NOW), those_that_expire_first);
    // What has a row already keeps it, and takes the room of another.
    let last = GRANTS_MAX + 1;
    let row = GrantRow { uid: uid(last), ms: 10, expires: LedgerTime(expires(last)), used_ms: 1 };
    page.grants.push(row);
    let with_the_row: Vec<String> = (0..GRANTS_MAX - 1).chain([last]).map(uid).collect();
    assert_eq!(page.usable_grants(&bob, NOW), with_the_row);
    assert!(page.usable_grants(&allowance(0), NOW).is_empty(), "a tier without grants");
}

#[test]
fn a_window_of_refunds_was_never_opened() {
    let (mut page, bob) = (Page::default(), allowance(60_000));
    hold(&mut page, "a", &bob, NOW, large(10_000));
    hold(&mut page, "b", &bob, NOW.plus(1), large(10_000));
    settle(&mut page, "a", NOW.plus(2), 0);
    assert_eq!(page.windows.len(), 1);
    settle(&mut page, "b", NOW.plus(3), 0);
    assert!(page.windows.is_empty());
    assert_eq!(page.standing(&bob, NOW.plus(3)).resets_at, None);
}

#[test]
fn a_hold_is_charged_to_the_window_it_was_made_in() {
    let (mut page, bob) = (Page::default(), allowance(60_000));
    hold(&mut page, "a", &bob, NOW, large(10_000));
    let later = NOW.plus(WINDOW_MS);
    assert_eq!(page.standing(&bob, later).left_ms, 60_000);
    hold(&mut page, "b", &bob, later, large(50_000));
    assert_eq!(page.windows.len(), 2);
    settle(&mut page, "a", later.plus(5), 10_000);
    // The first window is over and nothing refers to it any more.
    assert_eq!(page.windows.len(), 1);
    assert_eq!((page.windows[0].start, page.windows[0].charged_ms), (later, 0));
    settle(&mut page, "b", later.plus(6), 50_000);
    assert_eq!(page.windows[0].charged_ms, 50_000);
}

#[test]
fn a_lowered_tier_leaves_nothing_and_touches_no_hold() {
    let (mut page, bob) = (Page::default(), allowance(60_000));
    hold(&mut page, "a", &bob, NOW, large(40_000));
    let lowered = allowance(30_000);
    assert_eq!(page.standing(&lowered, NOW).left_ms, 0);
    settle(&mut page, "a", NOW.plus(1), 40_000);
    assert_eq!(page.windows[0].charged_ms, 40_000);
    // A grant still pays; the part of the window is 0 and breaks no limit.
    let granted = Allowance { grants: vec![grant("g", 1_000, i64::MAX)], ..lowered };
    hold(&mut page, "b", &granted, NOW.plus(2), large(1_000));
    assert_eq!(page.holds[0].parts.iter().map(|part| part.ms).collect::<Vec<_>>(), [0, 1_000]);
}
