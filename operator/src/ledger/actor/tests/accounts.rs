//! What accounts show of themselves, and those that are being deleted.

use super::*;
use crate::ledger::seen::ReadyShown;

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
    assert_eq!(memory.writes(), 1);
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
