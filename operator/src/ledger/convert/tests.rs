use proptest::prelude::*;

use super::*;

const AMOUNT: std::ops::Range<u64> = 0..i64::MAX as u64;

fn ledger_time() -> impl Strategy<Value = LedgerTime> {
    (0..4_000_000_000_000_i64).prop_map(LedgerTime)
}

fn part() -> impl Strategy<Value = Part> {
    let window = ledger_time().prop_map(Source::Window);
    let grant = "[a-f0-9-]{1,36}".prop_map(Source::Grant);
    (prop_oneof![window, grant], AMOUNT).prop_map(|(source, ms)| Part { source, ms })
}

prop_compose! {
    fn hold()(
        (lease, namespace, name, uid) in ("[0-9a-z]{26}", "[a-z]{1,9}", "[a-z]{1,9}", "[a-f0-9-]{0,36}"),
        parts in prop::collection::vec(part(), 0..4),
        node in "[a-z0-9]{1,9}",
        avoid in prop::collection::vec(0..16_u32, 0..3),
        large in any::<bool>(),
        (weight, declared_ms, epoch) in (0..64_u64, AMOUNT, AMOUNT),
        since in ledger_time(),
        after in prop::option::of("[0-9a-z]{26}"),
        generation in any::<i64>(),
        via in "[a-z]{0,9}",
        shortened in prop::option::of((AMOUNT, any::<bool>()).prop_map(|(declared_ms, learned)| Shortened {
            declared_ms,
            by: if learned { ShortenedBy::LearnedDuration } else { ShortenedBy::RemainingQuota },
        })),
        cookie in prop::option::of(("[a-f0-9]{1,64}", ledger_time())
            .prop_map(|(cookie, start)| CookieWindow { cookie: CookieId::new(cookie), start })),
        budget in prop::option::of(("[!-~]{1,64}", AMOUNT, AMOUNT, ledger_time())
            .prop_map(|(root, max_ms, max_calls, expires)| Budget { root, max_ms, max_calls, expires })),
    ) -> Hold {
        Hold {
            cookie,
            shortened,
            budget,
            lease: LeaseId::new(lease),
            space: SpaceKey::new(namespace, name, uid),
            parts,
            node: NodeName::new(node),
            avoid,
            size: if large { Size::Large } else { Size::Xlarge },
            weight,
            declared_ms,
            epoch: Epoch(epoch),
            since,
            after: after.map(LeaseId::new),
            generation,
            via,
        }
    }
}

prop_compose! {
    fn closed()(
        hold in hold(),
        ending in prop::sample::select(ENDINGS.to_vec()),
        (used_ms, charged_ms) in (AMOUNT, AMOUNT),
        at in ledger_time(),
    ) -> Closed {
        // A settled row keeps none of them: two mattered only before the start, and what it took of its budget has a row.
        Closed { hold: Hold { avoid: Vec::new(), after: None, budget: None, ..hold }.into(), ending, used_ms, charged_ms, at }
    }
}

prop_compose! {
    fn page()(
        windows in prop::collection::vec((ledger_time(), AMOUNT, AMOUNT, AMOUNT, any::<i64>()), 0..=WINDOWS_MAX),
        cookies in prop::collection::vec(("[a-f0-9]{1,64}", ledger_time(), AMOUNT, AMOUNT, AMOUNT), 0..4),
        holds in prop::collection::vec(hold(), 0..5),
        grants in prop::collection::vec(("[a-f0-9-]{1,36}", AMOUNT, ledger_time(), AMOUNT), 0..4),
        closed in prop::collection::vec(closed(), 0..4),
        budgets in (prop::collection::vec(("[!-~]{1,64}", AMOUNT, AMOUNT, ledger_time()), 0..4), ledger_time()),
        outcomes in prop::collection::vec(("[a-z0-9/]{1,20}", "[A-Z][a-z]{1,9}", "[A-Z][a-z]{0,9}", ".{0,40}", ledger_time()), 0..4),
        last_time in ledger_time(),
        (seq, epoch) in (AMOUNT, AMOUNT),
        write_id in "[0-9A-Z]{0,26}",
    ) -> Page {
        Page {
            windows: windows.into_iter().map(|(start, base_ms, charged_ms, runs, generation)| Window { start, base_ms, charged_ms, runs, generation }).collect(),
            cookies: cookies.into_iter().map(|(cookie, start, base_ms, charged_ms, runs)| CookieRow { cookie: CookieId::new(cookie), start, base_ms, charged_ms, runs, generation: 3 }).collect(),
            holds: holds.into_iter().map(Arc::new).collect(),
            grants: grants.into_iter().map(|(uid, ms, expires, used_ms)| GrantRow { uid, ms, expires, used_ms }).collect(),
            closed,
            budgets: Some(Box::new(Budgets {
                rows: budgets.0.into_iter().map(|(root, calls, ms, expires)| BudgetRow { root, calls, ms, expires }).collect(),
                forgotten: budgets.1,
            }))
            .filter(|budgets| **budgets != Budgets::default()),
            last_denial: None,
            recent_outcomes: outcomes.into_iter().map(|(id, kind, boundary, message, at)| Arc::new(Outcome { id, kind, boundary, message, at })).collect(),
            last_time,
            seq,
            write_id,
            epoch: Epoch(epoch),
        }
    }
}

proptest! {
    #[test]
    fn page_survives_being_stored(page in page()) {
        let status = status_of(&page, Display::of(&page, None), None).unwrap();
        // Through JSON as well: that is what the API server stores.
        let json = serde_json::to_value(&status).unwrap();
        let stored: crds::GPUAccountStatus = serde_json::from_value(json).unwrap();
        prop_assert_eq!(page_of(&stored).unwrap(), page);
    }
}

fn stored() -> crds::GPUAccountStatus {
    let hold = crds::Hold {
        lease: "01".to_owned(),
        space: "demo/hello".to_owned(),
        space_uid: "u".to_owned(),
        parts: vec![crds::Part { source: "window:5".to_owned(), milliseconds: 1 }],
        node: "n".to_owned(),
        avoid: Vec::new(),
        size: GpuSize::Large,
        weight: 1,
        declared_milliseconds: 1,
        epoch: 1,
        since_milliseconds: 5,
        after: None,
        generation: 1,
        via: String::new(),
        cookie: None,
        shortened: None,
        budget: None,
    };
    crds::GPUAccountStatus { seq: 1, epoch: 1, holds: vec![hold], ..crds::GPUAccountStatus::default() }
}

#[test]
fn one_wrong_field_gives_no_page() {
    assert!(page_of(&stored()).is_ok());
    type BreakIt = fn(&mut crds::GPUAccountStatus);
    let broken: [(&str, BreakIt); 11] = [
        ("unknown reason", |status| status.holds[0].shortened = Some(crds::Shortened::default())),
        ("too many cookies", |status| status.cookies = vec![crds::CookieRow::default(); COOKIES_MAX + 1]),
        ("too many budgets", |status| status.budgets = vec![crds::BudgetRow::default(); BUDGETS_MAX + 1]),
        ("negative budget", |status| {
            status.holds[0].budget = Some(crds::Budget { max_calls: -1, ..Default::default() })
        }),
        ("negative seq", |status| status.seq = -1),
        ("negative epoch", |status| status.epoch = -1),
        ("negative part", |status| status.holds[0].parts[0].milliseconds = -5),
        ("no slash", |status| status.holds[0].space = "hello".to_owned()),
        ("two slashes", |status| status.holds[0].space = "a/b/c".to_owned()),
        ("unknown source", |status| status.holds[0].parts[0].source = "gift:1".to_owned()),
        ("too many holds", |status| status.holds = vec![status.holds[0].clone(); HOLDS_MAX + 1]),
    ];
    for (what, break_it) in broken {
        let mut status = stored();
        break_it(&mut status);
        assert!(page_of(&status).is_err(), "{what}");
    }
}

#[test]
fn unknown_ending_is_an_error_and_every_known_one_is_found() {
    assert!(ending_of("Vanished").is_err());
    for reason in LeaseOutcome::ALL {
        assert_eq!(outcome_reason(ending_of(reason.as_str()).unwrap()), *reason);
    }
}

#[test]
fn denial_is_shown_with_its_numbers_and_kept_until_the_next() {
    let row = DenialRow {
        denial: Denial::QuotaExceeded {
            declared_ms: 50_000,
            given_ms: None,
            weight: 1,
            needed_ms: 50_000,
            left_ms: 45_000,
            reserved_ms: 0,
            limit_ms: 60_000,
            resets_in_ms: 1000,
            largest_declared_ms: 45_000,
            limiter: Limiter::AddressPrefix,
        },
        space: SpaceKey::new("demo", "hello", "u"),
        at: LedgerTime(1_800_000_000_000),
    };
    let page = Page { last_denial: Some(row.into()), ..Page::default() };
    let first = status_of(&page, Display::default(), None).unwrap();
    let denial = first.last_denial.clone().unwrap();
    assert_eq!(
        (denial.kind.as_str(), denial.needed_milliseconds, denial.left_milliseconds),
        ("QuotaExceeded", 50_000, 45_000)
    );
    assert_eq!(denial.limiter, "AddressPrefix");
    assert_eq!(denial.resets_at, Timestamp::from_millisecond(1_800_000_001_000).ok().map(Time));
    assert_eq!(denial.space, "demo/hello");
    let read = page_of(&first).unwrap();
    assert_eq!(read.last_denial, None);
    let second = status_of(&read, Display::default(), Some(&KeptFields::of(&first))).unwrap();
    assert_eq!(second.last_denial, Some(denial), "a write that knows of no denial does not remove it");
}

#[test]
fn a_row_of_a_guest_page_says_what_is_used_and_reserved_in_seconds() {
    let row = CookieRow {
        cookie: CookieId::new("c"),
        start: LedgerTime(5),
        base_ms: 120_000,
        charged_ms: 18_400,
        runs: 2,
        generation: 1,
    };
    let mut status = stored();
    status.holds[0].cookie = Some(crds::CookieWindow { cookie: "c".to_owned(), start_milliseconds: 5 });
    status.holds[0].parts[0].milliseconds = 7_000;
    let page = Page { cookies: [row].into(), ..page_of(&status).unwrap() };
    let shown = status_of(&page, Display::default(), None).unwrap();
    let cookie = &shown.cookies[0];
    assert_eq!((cookie.used.as_str(), cookie.reserved.as_str(), shown.guests), ("18.4s", "7s", Some(1)));
    assert_eq!(page_of(&shown).unwrap(), page);
}

#[test]
fn numbers_that_do_not_fit_are_not_written() {
    let page = Page { seq: u64::MAX, ..Page::default() };
    let error = status_of(&page, Display::default(), None).unwrap_err();
    assert_eq!(error, PageError::OutOfRange { field: "seq", value: i128::from(u64::MAX) });
}
