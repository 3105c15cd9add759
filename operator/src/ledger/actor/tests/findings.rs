//! What the broker tells of tiers, grants and pools while it leads.

use super::*;
use crate::clock::ClockDifference;
use crate::ledger::findings::GrantFate;
use crate::ledger::seen::GrantSeen;

const UID: &str = "grant-uid";

impl Story {
    /// The tier, with nothing of its own to give.
    async fn tier_without_base(&self, extendable: bool) {
        let tier = TierSeen { base_ms: 0, extendable, ..tier() };
        self.store(StoreEvent::Tier(Box::new(tier))).await;
    }

    /// A grant for the Space's account.
    async fn granted(&self, ms: u64) {
        let expires = LedgerTime(clock::wall().as_millisecond()).plus(3_600_000);
        let (name, account) = ("grant".to_owned(), AccountName::new(SPACE));
        self.store(StoreEvent::Grant(GrantSeen { name, uid: UID.to_owned(), account, ms, expires })).await;
    }

    /// The next findings.
    async fn found(&mut self) -> Arc<Findings> {
        clock::passed::pass(FINDINGS_PERIOD);
        let changed = tokio::time::timeout(LIMIT, self.findings.changed());
        changed.await.expect("nothing is found").unwrap();
        self.findings.borrow_and_update().clone().expect("there is a term")
    }

    /// This is found of the grant: whether it is in force, and what was charged to it.
    async fn grant_is(&mut self, fate: GrantFate, used_ms: Option<u64>) {
        let mut last = None;
        // What it was told last may be behind a tick that is due at the same time.
        for _ in 0..3 {
            let found = self.found().await;
            last = found.grants.get(UID).map(|grant| (grant.fate.clone(), grant.used_ms));
            if last == Some((fate.clone(), used_ms)) {
                return;
            }
        }
        panic!("{last:?} instead of {fate:?} with {used_ms:?} ms");
    }
}

#[tokio::test]
async fn what_became_of_a_grant_is_told_until_its_last_millisecond() {
    let mut story = Story::begin(Memory::default()).await;
    story.tier_without_base(true).await;
    story.granted(10_000).await;
    story.grant_is(GrantFate::NoAccount, None).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    story.grant_is(GrantFate::InForce, Some(0)).await;
    story.run_lease(&order.lease, 4_000).await;
    story.grant_is(GrantFate::InForce, Some(4_000)).await;
    story.tier_without_base(false).await;
    let tier = "space".to_owned();
    // What it has paid stays paid (L12).
    story.grant_is(GrantFate::NotExtendable { tier }, Some(4_000)).await;
    story.tier_without_base(true).await;
    story.grant_is(GrantFate::InForce, Some(4_000)).await;
    story.request(2, 6_000, "").await;
    let order = story.order().await;
    story.run_lease(&order.lease, 6_000).await;
    story.grant_is(GrantFate::UsedUp, Some(10_000)).await;
    let found = story.found().await;
    assert_eq!((found.accounts["space"], found.joined.contains(&NodeName::new(NODE))), (1, true));
    story.stop().await;
}

#[tokio::test]
async fn nothing_is_told_without_a_term_nor_while_the_clock_is_off() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.store(StoreEvent::Clock(ClockDifference { ahead_ms: 90_000_000, uncertainty_ms: 500 })).await;
    story.tick().await;
    clock::passed::pass(FINDINGS_PERIOD);
    story.tick().await;
    assert!(story.findings.borrow().is_none(), "whether a grant has ended is not known");
    story.store(StoreEvent::Clock(ClockDifference { ahead_ms: 0, uncertainty_ms: 500 })).await;
    assert_eq!(story.found().await.tiers.len(), 1);
    story.leading.send_replace(false);
    let over = tokio::time::timeout(LIMIT, story.findings.wait_for(Option::is_none)).await;
    assert!(over.expect("the term goes on").is_ok(), "another leader finds it anew");
    story.stop().await;
}
