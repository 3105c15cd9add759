//! What accounts show of themselves, and those that are being deleted.

use spaceport_core::lease::{NOTE_PERIOD_MS, SpaceSettings};
use spaceport_core::page::{Closed, Hold};

use super::*;
use crate::clock::ClockDifference;
use crate::ledger::seen::{ReadyShown, SpaceSeen};

const BOB: &str = "bob";

impl Memory {
    /// Status and reason of a condition as the last write of the account showed it.
    fn condition(&self, account: &str, kind: &str) -> Option<(String, String)> {
        let objects = self.0.lock().unwrap();
        let shown = objects.shown.get(&AccountName::new(account))?;
        let found = shown.conditions.iter().find(|condition| condition.type_ == kind)?;
        Some((found.status.clone(), found.reason.clone()))
    }

    fn writes(&self) -> u64 {
        self.0.lock().unwrap().writes
    }

    /// The account as the watch shows it now.
    fn shown(&self, account: &str) -> AccountSeen {
        let name = AccountName::new(account);
        let ready =
            self.condition(account, "Ready").map(|(status, reason)| ReadyShown { holds: status == "True", reason });
        let mut objects = self.0.lock().unwrap();
        let (revision, page) = objects.accounts.entry(name.clone()).or_insert((1, Page::default()));
        AccountSeen { ready, ..Self::seen(&name, *revision, page) }
    }
}

fn of(status: &str, reason: &str) -> Option<(String, String)> {
    Some((status.to_owned(), reason.to_owned()))
}

#[tokio::test]
async fn pages_show_their_conditions_and_a_lease_costs_no_write_for_them() {
    let mut story = Story::begin(Memory::default()).await;
    let memory = story.memory.clone();
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    assert_eq!(memory.condition(SPACE, "Ready"), of("True", "AsExpected"));
    assert_eq!(memory.condition(SPACE, "OutboxDrained"), of("True", "AsExpected"));
    story.run_lease(&order.lease, 1_000).await;
    assert_eq!(memory.condition(SPACE, "OutboxDrained"), of("False", "ReceiptsPending"));
    let watched = memory.shown(SPACE);
    story.store(StoreEvent::Account(Box::new(watched))).await;
    story.tick().await;
    assert_eq!(memory.writes(), 2, "the hold and its settlement");
    story.stop().await;
}

/// None stands in for it, and nobody is told that it does not exist.
#[tokio::test]
async fn calls_of_an_account_whose_page_cannot_be_used_are_told_so() {
    let memory = Memory::default();
    let broken = Page { seq: u64::MAX, ..Page::default() };
    memory.0.lock().unwrap().accounts.insert(AccountName::new(SPACE), (7, broken));
    let mut story = Story::begin(memory.clone()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    assert_eq!(story.denial().await, Denial::AccountUnusable);
    memory.0.lock().unwrap().accounts.insert(AccountName::new(SPACE), (8, Page::default()));
    story.request(2, 10_000, "").await;
    assert_eq!(story.order().await.ticket, 2, "repaired, and nobody has to tell the operator");
    story.stop().await;
}

#[tokio::test]
async fn an_account_that_gets_no_gpu_says_why_without_a_lease() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    let memory = story.memory.clone();
    let untiered = AccountSeen { tier: Some("missing".to_owned()), ..memory.shown(BOB) };
    story.store(StoreEvent::Account(Box::new(untiered))).await;
    wait_for(|| memory.condition(BOB, "Ready").filter(|found| Some(found) == of("False", "UnknownTier").as_ref()))
        .await;
    assert_eq!(memory.page(BOB).windows, [], "nothing else is on its page");
    // The watch shows that write: no other follows it.
    let watched = AccountSeen { tier: Some("missing".to_owned()), ..memory.shown(BOB) };
    story.store(StoreEvent::Account(Box::new(watched))).await;
    story.tick().await;
    // Notes of one account are written every 5 s at most (L5).
    clock::passed::pass(Duration::from_millis(NOTE_PERIOD_MS));
    story.tick().await;
    assert_eq!(memory.writes(), 1);
    story.stop().await;
}

/// Names that sort before that of any Space of the other tests: as many as are looked at in one tick.
fn crowd() -> Vec<String> {
    (0..16).map(|number| format!("space-{number:02}")).collect()
}

#[tokio::test]
async fn accounts_whose_writes_take_long_do_not_keep_others_from_showing_their_condition() {
    let memory = Memory::default();
    for name in crowd() {
        memory.shown(&name);
        memory.fate(Fate::NoAnswer);
    }
    let story = Story::begin(memory.clone()).await;
    let tier_gone = || StoreEvent::TierGone { name: "space".to_owned() };
    story.store(tier_gone()).await;
    wait_for(|| memory.0.lock().unwrap().fates.is_empty().then_some(())).await;
    let other = memory.shown(SPACE);
    story.store(StoreEvent::Account(Box::new(other))).await;
    story.store(tier_gone()).await;
    wait_for(|| memory.condition(SPACE, "Ready").filter(|found| Some(found) == of("False", "NoTier").as_ref())).await;
    assert_eq!(memory.writes(), 1, "no other write was answered");
    story.stop().await;
}

#[tokio::test]
async fn a_condition_takes_along_what_waits_for_company() {
    let memory = Memory::default();
    let leases = crowd().into_iter().map(|name| (LeaseId::new(format!("lease-of-{name}")), name));
    let leases: Vec<(LeaseId, String)> = leases.collect();
    for (lease, name) in &leases {
        let hold = Hold { lease: lease.clone(), ..pools::hold("gpu-away", LedgerTime(0)) };
        let at = LedgerTime(0);
        let closed = Closed { hold: hold.into(), ending: Ending::Released, used_ms: 0, charged_ms: 0, at };
        let page = Page { closed: vec![closed], ..Page::default() };
        memory.0.lock().unwrap().accounts.insert(AccountName::new(name), (1, page));
    }
    memory.shown(SPACE);
    let story = Story::begin(memory.clone()).await;
    for (lease, name) in &leases {
        let (account, lease) = (AccountName::new(name), lease.clone());
        story.inputs.send(Input::Receipt(ReceiptEvent::Written { account, lease })).await.unwrap();
    }
    story.store(StoreEvent::TierGone { name: "space".to_owned() }).await;
    for name in crowd().iter().map(String::as_str).chain([SPACE]) {
        wait_for(|| memory.condition(name, "Ready").filter(|found| Some(found) == of("False", "NoTier").as_ref()))
            .await;
        assert_eq!(memory.page(name).closed, [], "{name}");
    }
    assert_eq!(memory.writes(), 17, "one for each account");
    story.stop().await;
}

/// What a page shows has times in it, and its next lease does not depend on it (L20).
#[tokio::test]
async fn nothing_is_shown_while_the_clock_is_off() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    let memory = story.memory.clone();
    story.store(StoreEvent::Clock(ClockDifference { ahead_ms: 90_000_000, uncertainty_ms: 500 })).await;
    let untiered = AccountSeen { tier: Some("missing".to_owned()), ..memory.shown(BOB) };
    story.store(StoreEvent::Account(Box::new(untiered))).await;
    story.tick().await;
    assert_eq!(memory.writes(), 0);
    story.store(StoreEvent::Clock(ClockDifference { ahead_ms: 0, uncertainty_ms: 500 })).await;
    wait_for(|| memory.condition(BOB, "Ready")).await;
    story.stop().await;
}

#[tokio::test]
async fn a_deleted_account_gets_nothing_more_and_empties_its_outbox() {
    let mut story = Story::begin(Memory::default()).await;
    let memory = story.memory.clone();
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    let deleting = AccountSeen { deleting: true, ..memory.shown(SPACE) };
    story.store(StoreEvent::Account(Box::new(deleting))).await;
    story.request(2, 10_000, "").await;
    assert_eq!(story.denial().await, Denial::AccountDeleting);
    wait_for(|| memory.condition(SPACE, "Ready").filter(|found| Some(found) == of("False", "Deleting").as_ref())).await;
    // The running lease is charged as ever, and its row leaves without waiting for a next lease.
    story.run_lease(&order.lease, 1_000).await;
    assert_eq!(memory.page(SPACE).windows[0].charged_ms, 1_000);
    let (account, lease) = (AccountName::new(SPACE), LeaseId::new(&order.lease));
    story.inputs.send(Input::Receipt(ReceiptEvent::Written { account, lease })).await.unwrap();
    wait_for(|| memory.page(SPACE).closed.is_empty().then_some(())).await;
    assert_eq!(memory.condition(SPACE, "OutboxDrained"), of("True", "AsExpected"));
    story.stop().await;
}

#[tokio::test]
async fn a_finalizer_that_is_written_beside_a_page_write_costs_one_more_try() {
    let mut story = Story::begin(Memory::default()).await;
    let memory = story.memory.clone();
    story.join(Vec::new()).await;
    // The account controller was faster; the watch shows the new revision of the same page later.
    memory.fate(Fate::SpecEdited);
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    let watched = AccountSeen { finalizers: vec!["spaceport.dev/ledger".to_owned()], ..memory.shown(SPACE) };
    story.store(StoreEvent::Account(Box::new(watched))).await;
    story.run_lease(&order.lease, 1_000).await;
    assert_eq!((memory.page(SPACE).seq, memory.writes()), (2, 3), "two writes and the one that met another revision");
    story.stop().await;
}

#[tokio::test]
async fn an_identity_of_two_accounts_belongs_to_the_older_one() {
    let story = Story::begin(Memory::default()).await;
    let memory = story.memory.clone();
    let identity = spaceport_crds::Identity { issuer: "i".to_owned(), subject: "bob".to_owned() };
    let seen = |name: &str, second: i64| AccountSeen {
        tier: Some("space".to_owned()),
        identities: vec![identity.clone()],
        created: Timestamp::from_second(second).unwrap(),
        ..memory.shown(name)
    };
    story.store(StoreEvent::Account(Box::new(seen(BOB, 2)))).await;
    story.store(StoreEvent::Account(Box::new(seen("older", 1)))).await;
    let ready = |status, reason| {
        let memory = memory.clone();
        wait_for(move || memory.condition(BOB, "Ready").filter(|found| Some(found) == of(status, reason).as_ref()))
    };
    ready("False", "IdentityConflict").await;
    assert_eq!(memory.condition("older", "Ready"), None, "it is as expected and costs no write");
    story.store(StoreEvent::Account(Box::new(seen(BOB, 2)))).await;
    story.store(StoreEvent::AccountGone { name: AccountName::new("older"), uid: memory.shown("older").uid }).await;
    // Notes of one account are written every 5 s at most (L5).
    clock::passed::pass(Duration::from_millis(NOTE_PERIOD_MS));
    ready("True", "AsExpected").await;
    story.stop().await;
}

#[tokio::test]
async fn what_the_owner_of_a_space_chose_applies_to_its_calls() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    let settings = SpaceSettings { clamp_to_remaining: true, ..SpaceSettings::default() };
    story.store(StoreEvent::Space(SpaceSeen { uid: "space-uid".to_owned(), settings })).await;
    story.request(1, 40_000, "").await;
    let first = story.order().await;
    story.request(2, 40_000, "").await;
    assert_eq!((first.declared_ms, story.order().await.declared_ms), (40_000, 20_000), "20 of 60 s are left");
    story.stop().await;
}
