//! Answers that come late: of an object of the account's name that is not there any more, or of a page that was written
//! since. And holds that were written late.

use spaceport_core::page::{Hold, Window};

use super::*;

impl Memory {
    /// Deletes the account and makes it anew. What the watch shows of it then.
    fn remake(&self, account: &str, uid: &str) -> AccountSeen {
        let name = AccountName::new(account);
        let mut objects = self.0.lock().unwrap();
        objects.uids.insert(name.clone(), uid.to_owned());
        objects.accounts.insert(name.clone(), (1, Page::default()));
        AccountSeen { uid: uid.to_owned(), ..Self::seen(&name, 1, &Page::default()) }
    }

    /// Somebody else makes changes to the page. What the watch shows of it then.
    fn change(&self, account: &str, changes: &[PageChange]) -> AccountSeen {
        let name = AccountName::new(account);
        let mut objects = self.0.lock().unwrap();
        let (revision, page) = objects.accounts.get_mut(&name).unwrap();
        changes.iter().for_each(|change| change.make(page).unwrap());
        (*revision, page.seq, page.write_id) = (*revision + 1, page.seq + 1, format!("another-{}", page.seq));
        Self::seen(&name, *revision, page)
    }

    fn hold_reads(&self, holds: bool) {
        self.0.lock().unwrap().holds_reads = holds;
    }

    async fn reads_begun(&self, reads: u64) {
        wait_for(|| (self.0.lock().unwrap().reads >= reads).then_some(())).await;
    }
}

impl Story {
    async fn shows(&self, seen: AccountSeen) {
        self.store(StoreEvent::Account(Box::new(seen))).await;
    }

    async fn shows_gone(&self, uid: &str) {
        self.store(StoreEvent::AccountGone { name: AccountName::new(SPACE), uid: uid.to_owned() }).await;
    }

    /// The lease ends as its node says, and its account pays.
    async fn is_charged(&mut self, lease: &str) {
        self.run_lease(lease, 2_000).await;
        let page = self.memory.page(SPACE);
        let charged_ms: u64 = page.windows.iter().map(|window| window.charged_ms).sum();
        assert_eq!((page.holds.len(), charged_ms), (0, 2_000));
    }
}

fn running(order: &proto::Start) -> proto::NodeLease {
    proto::NodeLease {
        lease: order.lease.clone(),
        account: order.account.clone(),
        phase: proto::LeasePhase::Running.into(),
        size: proto::Size::Large.into(),
        ..proto::NodeLease::default()
    }
}

/// The account was made anew by a call before the watch has shown the end of the one before.
#[tokio::test]
async fn the_end_of_the_object_before_is_not_that_of_the_known_one() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    story.shows_gone("before").await;
    story.is_charged(&order.lease).await;
    story.stop().await;
}

#[tokio::test]
async fn the_object_before_is_not_taken_for_the_newest() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    let page = Page { seq: 40, write_id: "before".to_owned(), ..Page::default() };
    story.shows(AccountSeen { uid: "before".to_owned(), ..Memory::seen(&AccountName::new(SPACE), 90, &page) }).await;
    story.memory.reads_begun(1).await;
    story.is_charged(&order.lease).await;
    story.stop().await;
}

/// The watch may also lag behind so far that it shows the next object without the end of the one before.
#[tokio::test]
async fn the_object_after_is_taken() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    story.order().await;
    let seen = story.memory.remake(SPACE, "after");
    story.shows(seen).await;
    assert!(matches!(story.hear().await, Outgoing::Denied(_)), "nobody can be charged for it any more");
    assert!(matches!(story.hear().await, Outgoing::Cancel(_)));
    story.request(2, 10_000, "").await;
    let order = story.order().await;
    story.is_charged(&order.lease).await;
    story.stop().await;
}

#[tokio::test]
async fn a_late_answer_to_a_write_of_the_object_before_changes_nothing() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    story.is_charged(&order.lease).await;
    story.memory.fate(Fate::GoneLater);
    story.request(2, 10_000, "").await;
    wait_for(|| story.memory.0.lock().unwrap().fates.is_empty().then_some(())).await;
    let after = story.memory.remake(SPACE, "after");
    story.shows_gone("uid").await;
    assert_eq!(story.denial().await, Denial::AccountDeleting);
    story.shows(after).await;
    story.request(3, 10_000, "").await;
    let order = story.order().await;
    story.memory.0.lock().unwrap().refuse.notify_one();
    story.is_charged(&order.lease).await;
    story.stop().await;
}

#[tokio::test]
async fn a_late_answer_to_a_read_of_the_object_before_changes_nothing() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.memory.fate(Fate::LostAnswer);
    story.memory.hold_reads(true);
    story.request(1, 10_000, "").await;
    story.memory.reads_begun(1).await;
    let after = story.memory.remake(SPACE, "after");
    story.shows_gone("uid").await;
    assert_eq!(story.denial().await, Denial::AccountDeleting);
    story.shows(after).await;
    story.request(2, 10_000, "").await;
    let order = story.order().await;
    story.memory.hold_reads(false);
    story.memory.0.lock().unwrap().answer.notify_one();
    // Nobody can tell which of the two objects is the later one, so it is read again.
    story.memory.reads_begun(2).await;
    story.is_charged(&order.lease).await;
    story.stop().await;
}

/// An old leader settles a lease and reserves another; its second page is shown while a read of its first is under way.
#[tokio::test]
async fn a_page_that_is_shown_before_an_older_answer_is_not_forgotten() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    let memory = story.stop().await;
    let mut story = Story::begin(memory).await;
    story.join(vec![running(&order)]).await;
    let page = story.memory.page(SPACE);
    let (hold, window): (Hold, Window) = (page.holds[0].as_ref().clone(), page.windows[0].clone());
    let at = hold.since;
    let settled = PageChange::Settle {
        lease: hold.lease.clone(),
        ending: Ending::Released,
        used_ms: 1_000,
        charged_ms: 1_000,
        at,
    };
    story.memory.change(SPACE, &[settled]);
    story.memory.hold_reads(true);
    story.say(10, Incoming::Ended(ended(&order.lease, 1_000))).await;
    story.memory.reads_begun(1).await;
    let late = Arc::new(Hold { lease: LeaseId::new("late"), ..hold });
    let shown =
        story.memory.change(SPACE, &[PageChange::Hold { hold: late, window, grants: Vec::new(), cookie: None }]);
    story.shows(shown).await;
    // Nothing answers that it was taken in, but what is said behind it on the same input is.
    story
        .say(
            11,
            Incoming::Freed(proto::Freed {
                lease: order.lease.clone(),
                kind: proto::FreedKind::Free.into(),
                ..proto::Freed::default()
            }),
        )
        .await;
    assert!(matches!(story.hear().await, Outgoing::Acknowledged(told) if told.freed));
    story.memory.0.lock().unwrap().answer.notify_one();
    let memory = story.memory.clone();
    let closed =
        wait_for(|| memory.page(SPACE).closed.iter().find(|row| row.hold.lease.as_str() == "late").cloned()).await;
    assert_eq!((closed.ending, closed.charged_ms), (Ending::Refused, 0), "its node does not have it");
    story.stop().await;
}

/// L7: the node has the lease, and our watch has shown neither its hold nor even its account.
#[tokio::test]
async fn a_lease_of_a_hold_that_was_not_shown_is_not_ended() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    assert_eq!(order.account, SPACE);
    let memory = story.stop().await;
    let late = memory.0.lock().unwrap().accounts.remove(&AccountName::new(SPACE)).unwrap();
    let mut story = Story::begin(memory).await;
    story.memory.0.lock().unwrap().accounts.insert(AccountName::new(SPACE), late);
    story.join(vec![running(&order)]).await;
    story.end_lease(&order.lease, 2_000).await;
    assert_eq!(story.memory.page(SPACE).windows[0].charged_ms, 2_000);
    story.stop().await;
}
