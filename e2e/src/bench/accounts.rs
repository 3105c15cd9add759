//! The accounts of one run: made, given tokens, checked, removed.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use spaceport_crds::names::BREAK_GLASS_ANNOTATION;

use super::load::LONG_S;
use super::page_write::OPERATOR;
use crate::kubectl::{Kubectl, at};
use crate::story::NAMESPACE;
use crate::token::Token;
use crate::wait::eventually;
use crate::world::World;

/// Every name begins with it, so that a later run finds what a crashed one left.
const PREFIX: &str = "bench-";
const TIER: &str = "bench";
/// Receipts follow off the critical path; several hundred may be under way when the load ends.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// The most a tier can give, far above what all calls of a run can use.
const QUOTA_S: u64 = 10_000_000;
/// Objects named in one command line; a name has about 20 bytes, a command line takes 128 KiB.
const NAMES_PER_COMMAND: usize = 200;

/// The accounts of one run. Their names are new with each run: a page cannot be reset, and the operator may remember one
/// that is gone.
#[derive(Debug)]
pub(super) struct Accounts {
    callers: Vec<String>,
    page: String,
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
    pub(super) fn named_for_this_run(callers: usize) -> Self {
        let ulid = ulid::Ulid::generate().to_string().to_lowercase();
        // The end of a ULID is random: eight letters of 32 tell runs apart.
        let run = &ulid[ulid.len() - 8..];
        Self {
            callers: (0..callers).map(|number| format!("{PREFIX}{run}-{number}")).collect(),
            page: format!("{PREFIX}{run}-page"),
        }
    }

    /// The account whose page only the benchmark writes: nobody calls with it.
    pub(super) fn page(&self) -> &str {
        &self.page
    }

    /// The accounts that are called with.
    pub(super) fn callers(&self) -> &[String] {
        &self.callers
    }

    fn all(&self) -> Vec<&str> {
        self.callers.iter().chain([&self.page]).map(String::as_str).collect()
    }

    pub(super) fn create(&self, world: &World) -> Result<()> {
        let mut items = vec![tier()];
        items.extend(self.all().into_iter().map(account));
        world.kubectl.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string())?;
        Ok(())
    }

    /// A token of each caller, good for every call of the run.
    pub(super) fn tokens(&self, world: &World, space: &str) -> Result<Vec<String>> {
        let sign = |name: &String| {
            let token = Token { max_calls: 1_000_000, max_ms: QUOTA_S * 1000, ..Token::one_call(name, space) };
            token.sign(&world.kubectl)
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
    pub(super) fn remove(&self, world: &World) -> Result<()> {
        remove(&world.kubectl, &self.all())
    }
}

/// Removes what an earlier run left behind when it was ended in the middle.
pub(super) fn remove_leftovers(world: &World) -> Result<()> {
    let accounts = world.kubectl.items(&["get", "gpuaccounts"])?;
    let names: Vec<&str> = accounts
        .iter()
        .filter_map(|account| at(account, "/metadata/name").as_str())
        .filter(|name| name.starts_with(PREFIX))
        .collect();
    remove(&world.kubectl, &names)
}

fn remove(kubectl: &Kubectl, accounts: &[&str]) -> Result<()> {
    if !accounts.is_empty() {
        let receipts = kubectl.items(&["--namespace", NAMESPACE, "get", "gpuleases"])?;
        let ours =
            |receipt: &&Value| at(receipt, "/spec/account").as_str().is_some_and(|name| accounts.contains(&name));
        let name = |receipt: &Value| at(receipt, "/metadata/name").as_str().map(str::to_owned);
        // The holds that were written on the page by the benchmark itself have receipts, and nobody else ends those.
        for open in receipts.iter().filter(ours).filter(|receipt| at(receipt, "/spec/phase") == "Reserved") {
            let open = name(open).context("a receipt without a name")?;
            let patch = json!({ "spec": {
                "phase": "Expired", "outcome": "Expired",
                "usedMilliseconds": 0, "chargedMilliseconds": 0, "used": "0s", "charged": "0s",
            } });
            let end = ["--as", OPERATOR, "--namespace", NAMESPACE, "patch", "gpulease", &open, "--type", "merge"];
            kubectl.run(&[&end[..], &["--patch", &patch.to_string()]].concat())?;
        }
        let names: Vec<String> = receipts.iter().filter(ours).filter_map(name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for names in names.chunks(NAMES_PER_COMMAND) {
            let delete = ["--namespace", NAMESPACE, "delete", "gpulease", "--ignore-not-found", "--wait=false"];
            kubectl.run(&[&delete[..], names].concat())?;
        }
        let found = present(kubectl, accounts)?;
        let found: Vec<&str> = found.iter().map(String::as_str).collect();
        let reason = format!("{BREAK_GLASS_ANNOTATION}=end of a benchmark");
        for names in found.chunks(NAMES_PER_COMMAND) {
            kubectl.run(&[&["annotate", "--overwrite", "gpuaccount"], names, &[&reason]].concat())?;
            kubectl.run(&[&["delete", "gpuaccount", "--ignore-not-found", "--wait=false"], names].concat())?;
        }
        // A finalizer keeps an account until its window has ended, a day (L4). These were made to be thrown away, which
        // the API server allows as soon as nothing of them is open.
        for name in present(kubectl, accounts)? {
            let patch = r#"{"metadata":{"finalizers":null}}"#;
            eventually(&format!("account {name} goes"), SETTLE_LIMIT, || {
                let output = kubectl.output(&["patch", "gpuaccount", &name, "--type", "merge", "--patch", patch])?;
                let said = String::from_utf8_lossy(&output.stderr);
                let gone = output.status.success() || said.contains("NotFound");
                Ok(if gone { Ok(()) } else { Err(said.into_owned()) })
            })?;
        }
    }
    kubectl.run(&["delete", "gputier", TIER, "--ignore-not-found"])?;
    Ok(())
}

/// Those of the accounts that exist.
fn present(kubectl: &Kubectl, accounts: &[&str]) -> Result<Vec<String>> {
    let all = kubectl.items(&["get", "gpuaccounts"])?;
    let names = all.iter().filter_map(|account| at(account, "/metadata/name").as_str());
    Ok(names.filter(|name| accounts.contains(name)).map(str::to_owned).collect())
}

fn tier() -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUTier",
        "metadata": { "name": TIER },
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

fn account(name: &str) -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUAccount",
        "metadata": { "name": name },
        "spec": {
            "identities": [{ "issuer": "https://issuer.example.com", "subject": format!("{name}@example.com") }],
            "tier": TIER,
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
    let open =
        receipts.iter().filter(|receipt| !matches!(at(receipt, "/spec/phase").as_str(), Some("Settled" | "Refunded")));
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
        let (one, other) = (Accounts::named_for_this_run(2), Accounts::named_for_this_run(2));
        assert_eq!(one.all().len(), 3);
        for name in one.all() {
            assert!(name.starts_with(PREFIX) && name.len() < 64 && !other.all().contains(&name), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'));
        }
    }

    /// The tier and the accounts are read back by the types that the API server's schema comes from.
    #[test]
    fn what_is_applied_is_of_the_kinds_it_says() {
        let read =
            |value: &Value| serde_json::from_value::<spaceport_crds::GPUTierSpec>(value["spec"].clone()).unwrap();
        let tier = tier();
        assert_eq!(serde_json::to_value(read(&tier)).unwrap(), tier["spec"]);
        let account = account("bench-x-0");
        let spec: spaceport_crds::GPUAccountSpec = serde_json::from_value(account["spec"].clone()).unwrap();
        assert_eq!(serde_json::to_value(spec).unwrap(), account["spec"]);
    }
}
