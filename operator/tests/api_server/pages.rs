//! Pages, terms and watches.

use std::sync::Arc;
use std::time::Duration;

use spaceport_core::ids::{AccountName, Epoch, LeaseId, LedgerTime, NodeName, Size, SpaceKey};
use spaceport_core::page::{BUDGETS_MAX, Budget, BudgetRow, Budgets, Hold, Page, Part, Source, Window};
use spaceport_crds::{GPUAccount, GPUTier, GPUTierSpec};
use spaceport_operator::account::{self, WorkQueue};
use spaceport_operator::kubeapi::{ApiError, KubeApi};
use spaceport_operator::ledger::display::Display;
use spaceport_operator::ledger::store::{PageStore, PageTarget, WriteOutcome};
use spaceport_operator::ledger::watches::{self, StoreEvent, WatchParts, Watched};
use spaceport_operator::metrics::Metrics;
use spaceport_operator::status::observe::Observed;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{connect, fresh, next};

fn store(api: &KubeApi) -> PageStore {
    PageStore::new(api, Duration::from_secs(5), Metrics::new())
}

fn page(seq: u64, epoch: u64) -> Page {
    let start = LedgerTime(1_800_000_000_000);
    Page {
        seq,
        epoch: Epoch(epoch),
        write_id: fresh("w"),
        last_time: start,
        windows: vec![Window { start, base_ms: 60_000, charged_ms: seq, runs: 1, generation: 1 }],
        ..Page::default()
    }
}

fn written(outcome: WriteOutcome, target: &PageTarget) -> PageTarget {
    match outcome {
        WriteOutcome::Written { resource_version } => PageTarget { resource_version, ..target.clone() },
        other => panic!("not written: {other:?}"),
    }
}

#[tokio::test]
async fn a_page_is_swapped_only_against_the_revision_that_was_seen() {
    let api = connect().await;
    let store = store(&api);
    let name = AccountName::new(fresh("bob"));
    let created = store.create(&name, Some("demo".to_owned()), Vec::new()).await.unwrap();
    assert_eq!(created.page, Ok(Page::default()));
    let again = store.create(&name, Some("other".to_owned()), Vec::new()).await.unwrap();
    assert_eq!((&again.uid, again.tier.as_deref()), (&created.uid, Some("demo")), "the first one stays");

    let first = PageTarget::of(&created);
    let one = page(1, 4);
    let second = written(store.write(&first, &one, Display::of(&one, None)).await, &first);
    let read = store.read(&name).await.unwrap().unwrap();
    assert_eq!(read.page, Ok(one.clone()));
    assert_eq!((read.tier.as_deref(), &read.resource_version), (Some("demo"), &second.resource_version));

    assert_eq!(store.write(&first, &page(2, 4), Display::default()).await, WriteOutcome::Conflict, "an old revision");
    let other = PageTarget { uid: "00000000-0000-0000-0000-000000000000".to_owned(), ..second.clone() };
    assert_eq!(store.write(&other, &page(2, 4), Display::default()).await, WriteOutcome::Conflict, "another object");
    let fallen = store.write(&second, &page(2, 3), Display::default()).await;
    assert!(matches!(fallen, WriteOutcome::Refused { .. }), "an old leader's epoch: {fallen:?}");
    assert_eq!(store.read(&name).await.unwrap().unwrap().page, Ok(one), "none of them did anything");
    let third = written(store.write(&second, &page(2, 5), Display::default()).await, &second);

    let accounts = api.cluster::<GPUAccount>();
    accounts.delete(name.as_str(), &third.uid).await.unwrap();
    let deleting = store.read(&name).await.unwrap().unwrap();
    assert!(deleting.deleting, "its finalizer keeps it (L4)");
    let stale = serde_json::json!({ "resourceVersion": third.resource_version, "finalizers": [] });
    let refused = accounts.patch_metadata(name.as_str(), &stale).await;
    assert!(matches!(refused, Err(ApiError::Conflict { .. })), "a finalizer goes from the revision that was seen only");
    let fourth = written(store.write(&PageTarget::of(&deleting), &page(3, 5), Display::default()).await, &third);
    let current = serde_json::json!({ "resourceVersion": fourth.resource_version, "finalizers": [] });
    accounts.patch_metadata(name.as_str(), &current).await.unwrap();
    assert_eq!(store.write(&fourth, &page(4, 5), Display::default()).await, WriteOutcome::Gone);
    assert_eq!(store.read(&name).await.unwrap(), None);
}

/// Invariant 10: the next leader reads what this one knew of tokens, at the bounds of each field.
#[tokio::test]
async fn what_was_taken_of_tokens_is_stored_whole() {
    let api = connect().await;
    let store = store(&api);
    let name = AccountName::new(fresh("bob"));
    let target = PageTarget::of(&store.create(&name, None, Vec::new()).await.unwrap());
    let one = page(1, 4);
    let start = one.last_time;
    let root = |number: usize| format!("{number:~>64}");
    let row = |number| BudgetRow { root: root(number), calls: 1 << 61, ms: 1 << 61, expires: start.plus(900_000) };
    let most = i64::MAX.unsigned_abs();
    let hold = Hold {
        lease: LeaseId::new("01jd8x00000000000000000000"),
        space: SpaceKey::new("demo", "hello", "u"),
        parts: vec![Part { source: Source::Window(start), ms: 10_000 }],
        node: NodeName::new("gpu-1"),
        avoid: Vec::new(),
        size: Size::Large,
        weight: 1,
        declared_ms: 10_000,
        epoch: Epoch(4),
        since: start,
        after: None,
        generation: 1,
        via: "token".to_owned(),
        cookie: None,
        shortened: None,
        budget: Some(Budget { root: root(0), max_ms: most, max_calls: most, expires: start.plus(900_000) }),
    };
    let budgets = Budgets { rows: (0..BUDGETS_MAX).map(row).collect(), forgotten: start.plus(5) };
    let page = Page { holds: vec![Arc::new(hold)], budgets: Some(Box::new(budgets)), ..one };
    assert_eq!(page.sound(), Ok(()));
    written(store.write(&target, &page, Display::of(&page, None)).await, &target);
    assert_eq!(store.read(&name).await.unwrap().unwrap().page, Ok(page));
}

#[tokio::test]
async fn a_write_without_answer_is_unknown() {
    let api = connect().await;
    let name = AccountName::new(fresh("slow"));
    let created = store(&api).create(&name, None, Vec::new()).await.unwrap();
    let hasty = PageStore::new(&api, Duration::from_nanos(1), Metrics::new());
    let outcome = hasty.write(&PageTarget::of(&created), &page(1, 1), Display::default()).await;
    assert!(matches!(outcome, WriteOutcome::Unknown { .. }), "{outcome:?}");
}

#[tokio::test]
async fn terms_go_up_whoever_begins_them_and_show_after_every_earlier_page() {
    let api = connect().await;
    let store = store(&api);
    let ids = || fresh("term");
    let (one, two) = tokio::join!(store.begin_term(Epoch(3), ids), store.begin_term(Epoch(3), ids));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_ne!(one.epoch, two.epoch);
    assert!(one.epoch.min(two.epoch) > Epoch(3));
    let last = store.begin_term(Epoch(0), ids).await.unwrap();
    assert!(last.epoch > one.epoch.max(two.epoch), "below nothing that was");

    // An account whose name sorts after the term page's: a list must not deliver the term before it.
    let name = AccountName::new(fresh("zoe"));
    store.create(&name, None, Vec::new()).await.unwrap();
    let tier = fresh("tier");
    let spec = GPUTierSpec {
        gpu_seconds_per_window: 60,
        longest_call_seconds: 50,
        concurrent_leases: 2,
        ..GPUTierSpec::default()
    };
    api.cluster::<GPUTier>().create(&GPUTier::new(&tier, spec)).await.unwrap();
    let stop = CancellationToken::new();
    let (events, mut seen) = mpsc::channel::<StoreEvent>(16);
    let (retention, _) = watch::channel(None);
    let accounts = WorkQueue::default();
    let keeping = tokio::spawn(account::run(api.clone(), accounts.clone(), Duration::from_secs(5), stop.clone()));
    let parts = WatchParts {
        api: api.clone(),
        store: store.clone(),
        accounts,
        observed: Observed::default(),
        metrics: Metrics::new(),
        retention,
        events,
    };
    let watching = tokio::spawn(watches::run(parts, stop.clone()));
    let (mut listed, mut zoe, mut term, mut demo, mut clock) = (Vec::new(), false, None, false, false);
    next("everything that is there", &mut seen, |event| {
        match event {
            StoreEvent::Account(account) => zoe |= account.name == name,
            StoreEvent::Term(seen) => {
                assert!(zoe, "the term is shown before a page that is older");
                term = Some(seen);
            }
            StoreEvent::Tier(seen) => demo |= seen.name == tier && seen.base_ms == 60_000,
            StoreEvent::Clock(difference) => clock = !difference.exceeds(5000),
            StoreEvent::Listed(kind) => listed.push(kind),
            _ => {}
        }
        (listed.len() == Watched::ALL.len() && clock).then_some(())
    })
    .await;
    assert!(demo);
    assert_eq!(term.map(|term| term.write_id), Some(last.write_id));

    let begun = store.begin_term(Epoch(0), ids).await.unwrap();
    next("our own term", &mut seen, |event| match event {
        StoreEvent::Term(seen) if seen.write_id == begun.write_id => Some(()),
        _ => None,
    })
    .await;
    let account = store.read(&name).await.unwrap().unwrap();
    api.cluster::<GPUAccount>().delete(name.as_str(), &account.uid).await.unwrap();
    // Nothing of it is open: the account controller lets it go.
    let gone = next("that zoe is gone", &mut seen, |event| match event {
        StoreEvent::AccountGone { name: gone, uid } if gone == name => Some(uid),
        _ => None,
    })
    .await;
    assert_eq!(gone, account.uid);
    stop.cancel();
    watching.await.unwrap();
    keeping.await.unwrap();
}
