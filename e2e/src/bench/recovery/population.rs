//! The accounts that a recovery has to do with: each has the page of somebody who has used Spaces today, some hold a lease.
//!
//! The leases run on nodes that are made up and never join, so the broker adopts them in each term and waits for their nodes
//! (L7, L9) until their declared hour and their limits are over, counted from that term's beginning. Everything is named
//! by its number: a run finds what an earlier one left and makes only what is missing or not as it should be.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use spaceport_crds::conditions::{ConditionStatus, GPUAccountCondition, GPUAccountReason, condition};
use spaceport_crds::names::LEDGER_FINALIZER;
use spaceport_crds::{GPUAccount, GPUAccountStatus, GPUTier, Hold, Window};

use super::super::accounts::{QUOTA_S, tier};
use super::super::cluster::Cluster;
use super::super::page_write::{AccountPage, hold, written_again};
use crate::story::account;
use crate::world::World;

/// What every name begins with; not that of the other benchmarks, which remove what is theirs.
const PREFIX: &str = "recovery-bench-";
const TIER: &str = "recovery-bench";
/// Where the receipts of the leases are.
const RECEIPTS: &str = "recovery-bench";
/// Leases of a node: as many as a node with eight cards has halves.
const LEASES_PER_NODE: usize = 16;
/// Spaces that the leases are of.
const SPACES: usize = 100;
/// Requests at once: beyond it an API server on two cores only gets slower.
const AT_ONCE: usize = 32;
/// Accounts between two lines of progress.
const STEP: usize = 5_000;
/// Objects of one page of a list, as the operator asks for.
pub(super) const LIST_PAGE: u32 = 500;
/// Charged in the open window of each.
const CHARGED_MS: i64 = 412_377;
/// How long ago the window was opened that a new page shows.
const WINDOW_AGE_MS: i64 = 3_500_000;

/// How many accounts, and how many of them hold a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Accounts.
    pub accounts: usize,
    /// Those of them that hold one lease.
    pub leases: usize,
}

/// What one account is to be like.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    number: usize,
    holds: bool,
    /// Generation of the tier: of a window of another the broker would write the page.
    generation: i64,
}

/// The accounts.
pub(super) struct Population<'a> {
    world: &'a World,
    cluster: &'a Cluster,
    size: Size,
}

impl<'a> Population<'a> {
    pub(super) fn new(world: &'a World, cluster: &'a Cluster, size: Size) -> Self {
        Self { world, cluster, size }
    }

    /// Makes what is not there. No operator may run meanwhile: it would write too.
    pub(super) fn make(&self, say: &mut dyn FnMut(&str)) -> Result<()> {
        self.world.kubectl.apply(&tier(TIER).to_string())?;
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": RECEIPTS } });
        self.world.kubectl.apply(&namespace.to_string())?;
        let tiers = Api::<GPUTier>::all(self.cluster.admin().clone());
        let tier = self.cluster.wait(tiers.get(TIER)).context("cannot read the tier")?;
        let generation = tier.metadata.generation.context("the tier has no generation")?;
        let wanted = |number| Wanted { number, holds: number < self.size.leases, generation };

        let (intact, surplus) = self.look(&wanted)?;
        // Removing them one by one takes longer than making them, so nothing here does.
        ensure!(
            surplus == 0,
            "an earlier run left {surplus} accounts more than these: `cargo xtask down` ends its cluster, then try again"
        );
        let missing: Vec<Wanted> =
            (0..self.size.accounts).filter(|number| !intact.contains(number)).map(wanted).collect();
        say(&format!("  {} are there already, {} are to be made", intact.len(), missing.len()));
        let all = missing.len();
        let mut made = 0;
        for step in missing.chunks(STEP) {
            let make = |wanted: Wanted| {
                let (admin, operator) = (self.cluster.admin().clone(), self.cluster.operator().clone());
                async move { make(&admin, &operator, wanted).await.with_context(|| format!("account {}", wanted.name())) }
            };
            self.cluster.each_of(step.to_vec(), AT_ONCE, make)?;
            made += step.len();
            say(&format!("  {made} of {all} accounts are made"));
        }
        Ok(())
    }

    /// Numbers of the accounts that are as they should be, and how many are too much.
    fn look(&self, wanted: &impl Fn(usize) -> Wanted) -> Result<(BTreeSet<usize>, usize)> {
        let api = Api::<GPUAccount>::all(self.cluster.admin().clone());
        let (mut intact, mut surplus) = (BTreeSet::new(), 0);
        let mut parameters = ListParams::default().limit(LIST_PAGE);
        loop {
            // A page at a time: all of them are hundreds of megabytes.
            let page = self.cluster.wait(api.list(&parameters)).context("cannot list the accounts")?;
            for account in &page.items {
                match number_of(&account.name_any()) {
                    Some(number) if number >= self.size.accounts => surplus += 1,
                    Some(number) if is_intact(account, wanted(number)) => drop(intact.insert(number)),
                    _ => {}
                }
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters.continue_token = Some(token),
                None => return Ok((intact, surplus)),
            }
        }
    }
}

/// Makes an account and writes its page; one that is there gets its page anew.
async fn make(admin: &Client, operator: &Client, wanted: Wanted) -> Result<()> {
    let api = Api::<GPUAccount>::all(admin.clone());
    let mut new: GPUAccount = serde_json::from_value(account(&wanted.name(), TIER))?;
    // As the operator makes them: otherwise it would have to put it on each.
    new.metadata.finalizers = Some(vec![LEDGER_FINALIZER.to_owned()]);
    let mut page = match api.create(&PostParams::default(), &new).await {
        Ok(account) => AccountPage::of(account),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let found = api.get(&wanted.name()).await?;
            if found.metadata.deletion_timestamp.is_some() {
                bail!("somebody is deleting it");
            }
            AccountPage::of(found)
        }
        Err(error) => return Err(error).context("cannot be made"),
    };
    page.become_page(operator, |stored, now_ms| page_of(stored, wanted, now_ms)).await
}

impl Wanted {
    fn name(self) -> String {
        format!("{PREFIX}{:06}", self.number)
    }
}

/// The number in a name of ours.
fn number_of(name: &str) -> Option<usize> {
    let digits = name.strip_prefix(PREFIX)?;
    let is_number = digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok()).flatten()
}

/// The page of an account, on top of what is stored: one open window that stays, and the lease.
fn page_of(stored: GPUAccountStatus, wanted: Wanted, now_ms: i64) -> GPUAccountStatus {
    let start = stored.windows.last().map_or(now_ms - WINDOW_AGE_MS, |window| window.start_milliseconds);
    // Whole seconds, as times of objects are.
    let time = |milliseconds: i64| Timestamp::from_second(milliseconds / 1000).unwrap_or(Timestamp::UNIX_EPOCH);
    let since = time(start);
    // As the broker finds them: where it would find something else it writes the page.
    let is_so = |kind: GPUAccountCondition, message: &str| {
        let reason = GPUAccountReason::AsExpected.as_str();
        condition(kind.as_str(), ConditionStatus::True, reason, message, None, since)
    };
    let holds: Vec<Hold> = wanted.holds.then(|| open_hold(wanted.number, start)).into_iter().collect();
    let leases = i32::try_from(holds.len()).unwrap_or(i32::MAX);
    GPUAccountStatus {
        windows: vec![Window {
            start_milliseconds: start,
            base_milliseconds: i64::try_from(QUOTA_S).unwrap_or(i64::MAX).saturating_mul(1000),
            charged_milliseconds: CHARGED_MS,
            runs: 41,
            generation: wanted.generation,
        }],
        holds,
        closed: Vec::new(),
        recent_outcomes: Vec::new(),
        tier: Some(TIER.to_owned()),
        used: Some("412.377s".to_owned()),
        reserved: Some(if leases > 0 { "3600s" } else { "0s" }.to_owned()),
        left: Some("9995987.623s".to_owned()),
        resets_at: Some(Time(time(start.saturating_add(86_400_000)))),
        leases,
        conditions: vec![
            is_so(GPUAccountCondition::OutboxDrained, "every settled lease has its receipt"),
            is_so(GPUAccountCondition::Ready, &format!("tier {TIER}")),
        ],
        ..written_again(stored, now_ms)
    }
}

fn open_hold(number: usize, window: i64) -> Hold {
    let space = number % SPACES;
    Hold {
        space: format!("{RECEIPTS}/space-{space:02}"),
        space_uid: format!("recovery-bench-space-{space:02}"),
        node: format!("recovery-bench-node-{:04}", number / LEASES_PER_NODE),
        // As long as the ids of the broker.
        ..hold(&format!("00recovery{number:016}"), &format!("window:{window}"), window)
    }
}

/// True if an account is as [`make`] would make it.
fn is_intact(account: &GPUAccount, wanted: Wanted) -> bool {
    let metadata = &account.metadata;
    let is_kept = metadata.finalizers.iter().flatten().any(|finalizer| finalizer == LEDGER_FINALIZER);
    let Some(stored) = &account.status else { return false };
    let again = page_of(stored.clone(), wanted, stored.last_time_milliseconds);
    is_kept
        && metadata.deletion_timestamp.is_none()
        && account.spec.tier.as_deref() == Some(TIER)
        && !stored.windows.is_empty()
        && *stored == GPUAccountStatus { seq: stored.seq, write_id: stored.write_id.clone(), ..again }
}

/// Nodes that the leases are on.
pub(super) fn nodes(size: Size) -> usize {
    size.leases.div_ceil(LEASES_PER_NODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000;

    fn wanted(number: usize, holds: bool) -> Wanted {
        Wanted { number, holds, generation: 1 }
    }

    fn made(wanted: Wanted) -> GPUAccount {
        let mut made: GPUAccount = serde_json::from_value(account(&wanted.name(), TIER)).unwrap();
        made.metadata.finalizers = Some(vec![LEDGER_FINALIZER.to_owned()]);
        made.status = Some(page_of(GPUAccountStatus::default(), wanted, NOW));
        made
    }

    #[test]
    fn names_are_numbers_that_are_found_again() {
        for number in [0, 7, 99_999, 1_234_567] {
            assert_eq!(number_of(&wanted(number, false).name()), Some(number));
        }
        for other in ["recovery-bench-", "recovery-bench-12", "recovery-bench-00000x", "bench-000001", "bob"] {
            assert_eq!(number_of(other), None, "{other}");
        }
        assert!(!wanted(0, false).name().starts_with("bench-"), "the other benchmarks would remove it");
    }

    #[test]
    fn what_was_made_is_intact_and_anything_else_is_not() {
        let held = made(wanted(3, true));
        assert!(is_intact(&held, wanted(3, true)));
        assert!(!is_intact(&held, wanted(3, false)), "it holds a lease");
        assert!(!is_intact(&held, Wanted { generation: 2, ..wanted(3, true) }), "the tier is another");
        let page = |change: fn(&mut GPUAccountStatus)| {
            let mut changed = held.clone();
            change(changed.status.as_mut().unwrap());
            is_intact(&changed, wanted(3, true))
        };
        assert!(page(|page| page.seq = 9), "whoever wrote it");
        assert!(!page(|page| page.holds.clear()));
        assert!(!page(|page| page.conditions.clear()));
        assert!(!page(|page| page.windows[0].charged_milliseconds += 1));
        assert!(!is_intact(&GPUAccount { status: None, ..held.clone() }, wanted(3, true)));
        let mut bare = held;
        bare.metadata.finalizers = None;
        assert!(!is_intact(&bare, wanted(3, true)));
    }

    /// What the core asks of a page that it is to decide on, and what the API server asks of the next one.
    #[test]
    fn a_page_that_is_made_anew_keeps_its_window_and_pays_its_lease_from_it() {
        let first = page_of(GPUAccountStatus::default(), wanted(20, true), NOW);
        let again = page_of(first.clone(), wanted(20, true), NOW + 86_400_000);
        assert_eq!((again.seq, &again.windows, &again.holds), (first.seq + 1, &first.windows, &first.holds));
        let hold = &first.holds[0];
        assert_eq!(hold.parts[0].source, format!("window:{}", first.windows[0].start_milliseconds));
        assert_eq!(hold.parts[0].milliseconds, hold.weight * hold.declared_milliseconds);
        assert_eq!((hold.node.as_str(), hold.lease.len()), ("recovery-bench-node-0001", 26));
        assert_eq!(again.last_time_milliseconds, NOW + 86_400_000);
    }

    #[test]
    fn leases_are_spread_over_nodes_of_a_real_size() {
        assert_eq!(nodes(Size { accounts: 100_000, leases: 10_000 }), 625);
        assert_eq!(nodes(Size { accounts: 10, leases: 1 }), 1);
    }
}
