//! The accounts that a recovery has to do with: each has the page of somebody who has used Spaces today, some hold a lease.
//!
//! The leases run on nodes that are made up and never join, so the broker adopts them in each term and waits for their nodes
//! (L7, L9) until their declared hour and their limits are over, counted from that term's beginning. Everything is named
//! by its number: a run finds what an earlier one left and makes only what is missing or not as it should be.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use spaceport_crds::conditions::{ConditionStatus, GPUAccountCondition, GPUAccountReason, condition};
use spaceport_crds::names::{BREAK_GLASS_ANNOTATION, LEDGER_FINALIZER};
use spaceport_crds::{GPUAccount, GPUAccountStatus, GPUTier, Hold, Window};

use super::super::accounts::{QUOTA_S, tier};
use super::super::cluster::{Cluster, gone};
use super::super::page_write::{AccountPage, hold, written_again};
use crate::story::account;
use crate::wait::eventually_every;
use crate::world::World;

/// What every name begins with; not that of the other benchmarks, which remove what is theirs.
const PREFIX: &str = "recovery-bench-";
const TIER: &str = "recovery-bench";
/// Where the receipts of the leases are; it goes with all of them.
const RECEIPTS: &str = "recovery-bench";
/// Leases of a node: as many as a node with eight cards has halves.
const LEASES_PER_NODE: usize = 16;
/// Spaces that the leases are of.
const SPACES: usize = 100;
/// Requests at once: beyond it an API server on two cores only gets slower.
const AT_ONCE: usize = 32;
/// Accounts between two lines of progress.
const STEP: usize = 5_000;
/// The namespace controller removes some hundred receipts a second.
const GONE_LIMIT: Duration = Duration::from_secs(300);
const GONE_PERIOD: Duration = Duration::from_secs(1);
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

/// The accounts, as long as they are to be there.
pub(super) struct Population<'a> {
    world: &'a World,
    cluster: &'a Cluster,
    size: Size,
}

impl<'a> Population<'a> {
    pub(super) fn new(world: &'a World, cluster: &'a Cluster, size: Size) -> Self {
        Self { world, cluster, size }
    }

    /// Makes what is not there, and removes what is too much. No operator may run meanwhile: it would write too.
    pub(super) fn make(&self, say: &mut dyn FnMut(&str)) -> Result<()> {
        self.world.kubectl.apply(&tier(TIER).to_string())?;
        self.make_namespace()?;
        let tiers = Api::<GPUTier>::all(self.cluster.admin().clone());
        let tier = self.cluster.wait(tiers.get(TIER)).context("cannot read the tier")?;
        let generation = tier.metadata.generation.context("the tier has no generation")?;
        let wanted = |number| Wanted { number, holds: number < self.size.leases, generation };

        let (intact, surplus) = self.look(&wanted)?;
        if !surplus.is_empty() {
            say(&format!("  removing {} accounts of an earlier run", surplus.len()));
            self.remove_accounts(surplus, say)?;
        }
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

    /// Removes everything. No operator may run meanwhile.
    pub(super) fn remove(&self, say: &mut dyn FnMut(&str)) -> Result<()> {
        let namespaces = Api::<Namespace>::all(self.cluster.admin().clone());
        // Its receipts go with it, meanwhile.
        let deleted = self.cluster.wait(namespaces.delete(RECEIPTS, &DeleteParams::background())).map(drop);
        gone(deleted).context("cannot delete the namespace of the receipts")?;
        let ours = self.names()?;
        say(&format!("  removing {} accounts", ours.len()));
        self.remove_accounts(ours, say)?;
        self.world.kubectl.run(&["delete", "gputier", TIER, "--ignore-not-found"])?;
        eventually_every(GONE_PERIOD, "the namespace of the receipts is gone", GONE_LIMIT, || {
            let found = self.cluster.wait(namespaces.get_opt(RECEIPTS))?;
            let conditions = found.map(|found| found.status.and_then(|status| status.conditions).unwrap_or_default());
            Ok(conditions.map_or(Ok(()), |conditions| Err(format!("{conditions:?}"))))
        })
    }

    fn make_namespace(&self) -> Result<()> {
        let namespaces = Api::<Namespace>::all(self.cluster.admin().clone());
        let metadata = ObjectMeta { name: Some(RECEIPTS.to_owned()), ..ObjectMeta::default() };
        let namespace = Namespace { metadata, ..Namespace::default() };
        match self.cluster.wait(namespaces.create(&PostParams::default(), &namespace)) {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let found = self.cluster.wait(namespaces.get(RECEIPTS))?;
                ensure!(
                    found.metadata.deletion_timestamp.is_none(),
                    "the namespace {RECEIPTS} of an earlier run is still being deleted; try again in a minute"
                );
                Ok(())
            }
            Err(error) => Err(error).context("cannot make the namespace of the receipts"),
        }
    }

    /// Numbers of the accounts that are as they should be, and names of those that are too much.
    fn look(&self, wanted: &impl Fn(usize) -> Wanted) -> Result<(BTreeSet<usize>, Vec<String>)> {
        let api = Api::<GPUAccount>::all(self.cluster.admin().clone());
        let (mut intact, mut surplus) = (BTreeSet::new(), Vec::new());
        let mut parameters = ListParams::default().limit(LIST_PAGE);
        loop {
            // A page at a time: all of them are hundreds of megabytes.
            let page = self.cluster.wait(api.list(&parameters)).context("cannot list the accounts")?;
            for account in &page.items {
                let name = account.name_any();
                match number_of(&name) {
                    Some(number) if number >= self.size.accounts => surplus.push(name),
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

    fn names(&self) -> Result<Vec<String>> {
        let api = Api::<GPUAccount>::all(self.cluster.admin().clone());
        let mut names = Vec::new();
        let mut parameters = ListParams::default().limit(LIST_PAGE);
        loop {
            let page = self.cluster.wait(api.list_metadata(&parameters)).context("cannot list the accounts")?;
            let found = page.items.iter().map(|account| account.name_any());
            names.extend(found.filter(|name| number_of(name).is_some()));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters.continue_token = Some(token),
                None => return Ok(names),
            }
        }
    }

    fn remove_accounts(&self, names: Vec<String>, say: &mut dyn FnMut(&str)) -> Result<()> {
        let all = names.len();
        let mut removed = 0;
        for step in names.chunks(STEP) {
            let remove = |name: String| {
                let (admin, operator) = (self.cluster.admin().clone(), self.cluster.operator().clone());
                async move { remove(&admin, &operator, &name).await.with_context(|| format!("account {name}")) }
            };
            self.cluster.each_of(step.to_vec(), AT_ONCE, remove)?;
            removed += step.len();
            say(&format!("  {removed} of {all} accounts are removed"));
        }
        Ok(())
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
                bail!("an earlier run's is being deleted");
            }
            AccountPage::of(found)
        }
        Err(error) => return Err(error).context("cannot be made"),
    };
    page.become_page(operator, |stored, now_ms| page_of(stored, wanted, now_ms)).await
}

/// Takes off what keeps an account, and deletes it.
async fn remove(admin: &Client, operator: &Client, name: &str) -> Result<()> {
    let api = Api::<GPUAccount>::all(admin.clone());
    let patch = json!({ "metadata": {
        "annotations": { BREAK_GLASS_ANNOTATION: "end of a benchmark" },
        "finalizers": null,
    } });
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
    let release = || api.patch_metadata(name, &parameters, &patch);
    match release().await {
        Err(kube::Error::Api(status)) if status.code == 403 => {
            // It holds a lease, and keeps its finalizer as long as it does.
            AccountPage::read(operator, name).await?.become_page(operator, without_holds).await?;
            gone(release().await.map(drop)).context("its finalizer stays")?;
        }
        released => gone(released.map(drop)).context("its finalizer stays")?,
    }
    gone(api.delete(name, &DeleteParams::default()).await.map(drop)).context("cannot be deleted")
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

fn without_holds(stored: GPUAccountStatus, now_ms: i64) -> GPUAccountStatus {
    GPUAccountStatus { holds: Vec::new(), closed: Vec::new(), leases: 0, ..written_again(stored, now_ms) }
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
        let closed = without_holds(again.clone(), NOW);
        assert!(closed.holds.is_empty() && closed.windows == again.windows && closed.leases == 0);
        assert!(closed.last_time_milliseconds >= again.last_time_milliseconds);
    }

    #[test]
    fn leases_are_spread_over_nodes_of_a_real_size() {
        assert_eq!(nodes(Size { accounts: 100_000, leases: 10_000 }), 625);
        assert_eq!(nodes(Size { accounts: 10, leases: 1 }), 1);
    }
}
