//! The accounts of one run: made, given tokens, checked, removed.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::load::LONG_S;
use crate::books::is_over;
use crate::kubectl::at;
use crate::story::{NAMESPACE, account};
use crate::token::{Signer, Token};
use crate::wait::eventually;
use crate::world::World;

/// Every name begins with it, so that a later run finds what a crashed one left.
const PREFIX: &str = "bench-";
const TIER: &str = "bench";
/// Receipts follow off the critical path; several hundred may be under way when the load ends.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// The most a tier can give, far above what all calls of a run can use.
pub(super) const QUOTA_S: u64 = 10_000_000;
/// Longer than the longest run with all its checks.
const TOKEN_LIFETIME_S: i64 = 4 * 3600;

/// The accounts of one run. Their names are new with each run: a page cannot be reset, and the operator may remember one
/// that is gone.
#[derive(Debug)]
pub(super) struct Accounts {
    callers: Vec<String>,
    pages: Vec<String>,
}

/// What the accounts say in the end, over all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Total {
    pub(super) leases: u64,
    pub(super) charged_ms: i64,
    /// Size of the largest page.
    pub(super) page_bytes: usize,
}

impl Accounts {
    /// Of so many accounts that are called with, and so many whose pages the benchmark itself writes.
    pub(super) fn named_for_this_run(callers: usize, pages: usize) -> Self {
        let ulid = ulid::Ulid::generate().to_string().to_lowercase();
        // The end of a ULID is random: eight letters of 32 tell runs apart.
        let run = &ulid[ulid.len() - 8..];
        Self {
            callers: (0..callers).map(|number| format!("{PREFIX}{run}-{number}")).collect(),
            pages: (0..pages).map(|number| format!("{PREFIX}{run}-page-{number}")).collect(),
        }
    }

    /// The accounts whose pages only the benchmark writes: nobody calls with them.
    pub(super) fn pages(&self) -> &[String] {
        &self.pages
    }

    /// The accounts that are called with.
    pub(super) fn callers(&self) -> &[String] {
        &self.callers
    }

    fn all(&self) -> impl Iterator<Item = &str> {
        self.callers.iter().chain(&self.pages).map(String::as_str)
    }

    pub(super) fn create(&self, world: &World, cluster: &Cluster) -> Result<()> {
        world.kubectl.apply(&tier(TIER).to_string())?;
        cluster.create(self.all().map(|name| account(name, TIER)).collect())
    }

    /// A token of each caller, good for every call of the run.
    pub(super) fn tokens(&self, world: &World, space: &str) -> Result<Vec<String>> {
        let signer = Signer::read(&world.kubectl)?;
        let sign = |name: &String| {
            let token = Token::one_call(name, space);
            let token = Token { max_calls: 1_000_000, max_ms: QUOTA_S * 1000, lifetime_s: TOKEN_LIFETIME_S, ..token };
            signer.sign(&token)
        };
        self.callers.iter().map(sign).collect()
    }

    /// Waits until nothing is held and every lease has its receipt, then compares: each account is charged what its
    /// receipts say, and has as many as there were grants.
    pub(super) fn check(&self, world: &World, granted: &[u64]) -> Result<Total> {
        eventually("the accounts of the benchmark add up", SETTLE_LIMIT, || {
            let pages = world.kubectl.items(&["get", "gpuaccounts"])?;
            let receipts = world.kubectl.items(&["--namespace", NAMESPACE, "get", "gpuleases"])?;
            let mut total = Total::default();
            for (name, granted) in self.callers.iter().zip(granted) {
                let page = pages.iter().find(|page| at(page, "/metadata/name") == name.as_str());
                let page = page.with_context(|| format!("account {name} is gone"))?;
                let own: Vec<&Value> =
                    receipts.iter().filter(|receipt| at(receipt, "/spec/account") == name.as_str()).collect();
                match add_up(at(page, "/status"), &own, *granted) {
                    Ok(charged_ms) => {
                        total.leases += granted;
                        total.charged_ms += charged_ms;
                        total.page_bytes = total.page_bytes.max(at(page, "/status").to_string().len());
                    }
                    Err(problem) => return Ok(Err(format!("{name}: {problem}"))),
                }
            }
            Ok(Ok(total))
        })
    }

    /// Removes the accounts, their receipts and the tier.
    pub(super) fn remove(&self, world: &World, cluster: &Cluster) -> Result<()> {
        let names: BTreeSet<&str> = self.all().collect();
        cluster.remove(|name| names.contains(name))?;
        remove_tier(world)
    }
}

/// Removes what an earlier run left behind when it was ended in the middle.
pub(super) fn remove_leftovers(world: &World, cluster: &Cluster) -> Result<()> {
    cluster.remove(|name| name.starts_with(PREFIX))?;
    remove_tier(world)
}

fn remove_tier(world: &World) -> Result<()> {
    world.kubectl.run(&["delete", "gputier", TIER, "--ignore-not-found"])?;
    Ok(())
}

/// A tier that stands in nobody's way.
pub(super) fn tier(name: &str) -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUTier",
        "metadata": { "name": name },
        "spec": {
            "callers": "SignedIn",
            "authenticatedAs": "Pro",
            "priority": "Highest",
            "gpuSecondsPerWindow": QUOTA_S,
            "longestCallSeconds": LONG_S,
            "concurrentLeases": 64,
            "extendableByGrants": "Never",
            "windowPolicy": "FirstUse24h",
        },
    })
}

/// What is charged, if the page and its receipts agree and nothing is open; else what is wrong.
fn add_up(page: &Value, receipts: &[&Value], granted: u64) -> Result<i64, String> {
    let rows = |list: &str| at(page, list).as_array().map_or(0, Vec::len);
    if rows("/holds") > 0 {
        return Err(format!("{} leases are still held", rows("/holds")));
    }
    // A row of `closed` leaves with the next write of the page, so it may outlast its receipt: the receipts are counted.
    let open = receipts.iter().filter(|receipt| !is_over(receipt));
    if let Some(receipt) = open.into_iter().next() {
        return Err(format!("lease {} is {}", at(receipt, "/metadata/name"), at(receipt, "/spec/phase")));
    }
    if receipts.len() as u64 != granted {
        return Err(format!("{granted} leases were granted, {} have a receipt", receipts.len()));
    }
    let sum = |rows: &mut dyn Iterator<Item = &Value>, field: &str| -> i64 {
        rows.filter_map(|row| at(row, field).as_i64()).sum()
    };
    let on_page = sum(&mut at(page, "/windows").as_array().into_iter().flatten(), "/chargedMilliseconds");
    let on_receipts = sum(&mut receipts.iter().copied(), "/spec/chargedMilliseconds");
    if on_page != on_receipts {
        return Err(format!("{on_page} ms are charged, the receipts say {on_receipts} ms"));
    }
    Ok(on_page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(phase: &str, charged: i64) -> Value {
        json!({ "metadata": { "name": "r" }, "spec": { "phase": phase, "chargedMilliseconds": charged } })
    }

    fn page(charged: &[i64]) -> Value {
        let windows: Vec<Value> = charged.iter().map(|ms| json!({ "chargedMilliseconds": ms })).collect();
        json!({ "windows": windows })
    }

    #[test]
    fn an_account_adds_up_or_says_why_not() {
        let (first, second) = (receipt("Settled", 30), receipt("Refunded", 0));
        let both = [&first, &second];
        assert_eq!(add_up(&page(&[10, 20]), &both, 2), Ok(30));
        assert_eq!(add_up(&Value::Null, &[], 0), Ok(0));

        let wrong = |page: &Value, receipts: &[&Value], granted| add_up(page, receipts, granted).unwrap_err();
        assert_eq!(wrong(&page(&[31]), &both, 2), "31 ms are charged, the receipts say 30 ms");
        assert_eq!(wrong(&page(&[30]), &both, 3), "3 leases were granted, 2 have a receipt");
        let running = receipt("Running", 0);
        assert!(wrong(&page(&[30]), &[&first, &running], 2).contains("Running"));
        assert_eq!(wrong(&json!({ "holds": [{}] }), &both, 2), "1 leases are still held");
    }

    #[test]
    fn every_run_has_names_of_its_own_that_the_next_one_finds() {
        let (one, other) = (Accounts::named_for_this_run(1000, 16), Accounts::named_for_this_run(1000, 16));
        let (ours, theirs): (BTreeSet<&str>, BTreeSet<&str>) = (one.all().collect(), other.all().collect());
        assert_eq!(ours.len(), 1016);
        for name in ours {
            assert!(name.starts_with(PREFIX) && name.len() < 64 && !theirs.contains(name), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'));
        }
    }

    /// The tier and the accounts are read back by the types that the API server's schema comes from.
    #[test]
    fn what_is_applied_is_of_the_kinds_it_says() {
        let read =
            |value: &Value| serde_json::from_value::<spaceport_crds::GPUTierSpec>(value["spec"].clone()).unwrap();
        let tier = tier(TIER);
        assert_eq!(serde_json::to_value(read(&tier)).unwrap(), tier["spec"]);
        let account = account("bench-x-0", TIER);
        let spec: spaceport_crds::GPUAccountSpec = serde_json::from_value(account["spec"].clone()).unwrap();
        assert_eq!(serde_json::to_value(spec).unwrap(), account["spec"]);
    }
}
