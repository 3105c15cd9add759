//! What an admin is told of what the admin wrote: tiers, pools and grants.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::SETTLE_LIMIT;
use crate::kubectl::at;
use crate::story::{NAMESPACE, SPACE, account};
use crate::wait::eventually;
use crate::world::World;

/// Statuses follow within seconds; the rest is for this machine's load and for the rounds of writes before.
const SHOWN_LIMIT: Duration = Duration::from_secs(60);
/// A tier without a base: grants pay everything.
const TIER: &str = "granted";
/// On the grants of this story, so that those of an ended run are found.
const LABEL: &str = "spaceport.dev/story";
/// The pool of `examples/`, which has every node.
const POOL: &str = "default";
/// A pool that comes too late.
const LATE_POOL: &str = "late";

/// A grant says what is used of it, to the millisecond of the page, or why it is not in force. A tier says how many accounts
/// are in it and which older one has its callers; a pool, what its nodes have together, and a younger one that it has none.
///
/// # Errors
/// What was not as it must be.
pub fn what_an_admin_wrote_says_what_became_of_it(world: &World) -> Result<()> {
    world.story_space()?;
    let remove = || -> Result<()> {
        world.kubectl.run(&["delete", "gpupool", LATE_POOL, "--ignore-not-found"])?;
        world.kubectl.run(&["delete", "gputier", TIER, "--ignore-not-found"])?;
        world.kubectl.run(&["delete", "gpuquotagrants", "--selector", &format!("{LABEL}={TIER}")])?;
        Ok(())
    };
    // Those that an ended run has left.
    remove()?;
    let told = told_of_grants(world).and_then(|()| told_of_a_tier(world)).and_then(|()| told_of_pools(world));
    // Also for the stories after one that failed.
    remove()?;
    told
}

fn told_of_grants(world: &World) -> Result<()> {
    world.kubectl.apply(&tier().to_string())?;
    let name = format!("granted-{}", ulid::Ulid::generate().to_string().to_lowercase());
    let grant = Grant { world, name: format!("{name}-30s") };
    grant.apply(&name)?;
    grant.is("False", "AccountMissing")?;
    world.kubectl.apply(&account(&name, TIER).to_string())?;
    let status = grant.is("True", "OnPage")?;
    ensure!(at(&status, "/used") == "0s", "nothing was used: {status}");

    let answer = world.call_as(&name, NAMESPACE, SPACE, "large")?;
    ensure!(answer.error.is_none(), "the grant pays where the tier has no base: {answer:?}");
    let page = world.settled(&name, SETTLE_LIMIT)?;
    let paid = at(&page, "/grants/0/usedMilliseconds").as_i64().context("the page has no row of the grant")?;
    ensure!(paid > 0 && paid == world.charged_ms(&name)?, "the grant paid all of it: {page}");
    let status = eventually("the grant shows what is used of it", SHOWN_LIMIT, || {
        let status = grant.status()?;
        Ok(if at(&status, "/usedMilliseconds") == paid { Ok(status) } else { Err(status.to_string()) })
    })?;
    ensure!(condition(&status, "Applied")["reason"] == "OnPage", "{status}");
    let columns = world.kubectl.run(&["get", "gpuquotagrant", &grant.name, "--no-headers"])?;
    let used = at(&status, "/used").as_str().context("the column USED is empty")?;
    ensure!(columns.split_whitespace().any(|column| column == used), "no {used} in the columns: {columns}");
    let shown_ms = used.strip_suffix('s').and_then(|seconds| seconds.parse::<f64>().ok()).map(|seconds| seconds * 1e3);
    ensure!(shown_ms.is_some_and(|shown_ms| (shown_ms - paid as f64).abs() < 0.5), "{used} is not {paid} ms");

    // By the time that another one is told something, the writer has been there again: nothing of this one has changed, so it
    // was left alone (L21).
    let before = grant.object()?;
    let plain = format!("{name}-plain");
    world.kubectl.apply(&account(&plain, "free").to_string())?;
    let other = Grant { world, name: plain.clone() };
    other.apply(&plain)?;
    other.is("False", "TierNotExtendable")?;
    let after = grant.object()?;
    ensure!(
        at(&before, "/metadata/resourceVersion") == at(&after, "/metadata/resourceVersion"),
        "a grant of which nothing has changed was written again: {before} then {after}"
    );
    Ok(())
}

fn told_of_a_tier(world: &World) -> Result<()> {
    // Earlier runs have left accounts that name it: pages cannot be reset.
    let accounts = world.kubectl.items(&["get", "gpuaccounts"])?;
    let named = accounts.iter().filter(|account| at(account, "/spec/tier") == TIER).count();
    let status = eventually("the tier counts its accounts", SHOWN_LIMIT, || {
        let status = status(world, "gputier", TIER)?;
        let is_counted = at(&status, "/accounts") == named && at(&status, "/observedGeneration") == 1;
        Ok(if is_counted { Ok(status) } else { Err(format!("{named} name it, it says {status}")) })
    })?;
    // It is for everyone who is signed in, as `free` of `examples/` is.
    let conflicted = condition(&status, "Conflicted");
    ensure!(conflicted["status"] == "True" && conflicted["reason"] == "OverlappingRule", "{status}");
    ensure!(conflicted["message"].as_str().is_some_and(|said| said.contains("tier free")), "{status}");
    ensure!(condition(&status, "Accepted")["status"] == "False", "{status}");
    let columns = world.kubectl.run(&["get", "gputiers"])?;
    ensure!(columns.lines().next().is_some_and(|head| head.contains("ACCOUNTS")), "{columns}");
    let older = self::status(world, "gputier", "free")?;
    ensure!(condition(&older, "Conflicted")["status"] == "False", "the older one has them: {older}");
    Ok(())
}

fn told_of_pools(world: &World) -> Result<()> {
    eventually("the pool shows what its nodes have, and is ready", SHOWN_LIMIT, || {
        let nodes = world.kubectl.items(&["get", "gpunodes"])?;
        let own: Vec<&Value> = nodes.iter().filter(|node| at(node, "/status/pool") == POOL).collect();
        let sum = |field: &str| own.iter().map(|node| at(node, field).as_i64().unwrap_or_default()).sum::<i64>();
        let slots = |part: usize| {
            let counts = own
                .iter()
                .filter_map(|node| at(node, "/status/slots").as_str()?.split('/').nth(part)?.parse::<u64>().ok());
            counts.sum::<u64>()
        };
        let status = status(world, "gpupool", POOL)?;
        let is_sum = at(&status, "/nodes") == own.len()
            && at(&status, "/cards") == sum("/status/cardCount")
            && at(&status, "/seats") == sum("/status/seats/total")
            && at(&status, "/slots") == format!("{}/{}", slots(0), slots(1)).as_str();
        let is_ready =
            condition(&status, "Ready")["status"] == "True" && condition(&status, "Accepted")["status"] == "True";
        let has_cards = at(&status, "/cards").as_i64() > Some(0);
        Ok(if is_sum && is_ready && has_cards {
            Ok(())
        } else {
            Err(format!("{} nodes follow it, it says {status}", own.len()))
        })
    })?;
    let columns = world.kubectl.run(&["get", "gpupools"])?;
    let head: Vec<&str> = columns.lines().next().unwrap_or_default().split_whitespace().collect();
    ensure!(head == ["NAME", "MODE", "NODES", "CARDS", "SLOTS", "SEATS", "AGE"], "{columns}");

    // Every node follows the older one, and says so.
    world.kubectl.apply(&late_pool().to_string())?;
    let status = eventually("the late pool is told that others have its nodes", SHOWN_LIMIT, || {
        let status = status(world, "gpupool", LATE_POOL)?;
        let is_told = condition(&status, "Conflicted")["reason"] == "OverlappingNodes";
        Ok(if is_told { Ok(status) } else { Err(status.to_string()) })
    })?;
    ensure!(at(&status, "/nodes") == 0 && condition(&status, "Accepted")["status"] == "False", "{status}");
    ensure!(condition(&status, "Ready")["reason"] == "NoNodes", "{status}");
    let older = self::status(world, "gpupool", POOL)?;
    ensure!(condition(&older, "Conflicted")["status"] == "False", "the older one has its nodes: {older}");
    Ok(())
}

/// A grant of 30 s.
struct Grant<'a> {
    world: &'a World,
    name: String,
}

impl Grant<'_> {
    fn apply(&self, account: &str) -> Result<()> {
        let grant = json!({
            "apiVersion": "spaceport.dev/v1alpha1",
            "kind": "GPUQuotaGrant",
            "metadata": { "name": self.name, "labels": { LABEL: TIER } },
            "spec": {
                "account": account,
                "gpuSeconds": 30,
                "expiresAt": "2100-01-01T00:00:00Z",
                "kind": "Event",
                "reason": "a story",
            },
        });
        self.world.kubectl.apply(&grant.to_string()).map(drop)
    }

    fn object(&self) -> Result<Value> {
        self.world.kubectl.json(&["get", "gpuquotagrant", &self.name])
    }

    fn status(&self) -> Result<Value> {
        Ok(at(&self.object()?, "/status").clone())
    }

    /// Waits until its condition says so, and gives its status.
    fn is(&self, applied: &str, reason: &str) -> Result<Value> {
        eventually(&format!("grant {} is {reason}", self.name), SHOWN_LIMIT, || {
            let status = self.status()?;
            let shown = condition(&status, "Applied");
            let is_so = shown["status"] == applied && shown["reason"] == reason && shown["observedGeneration"] == 1;
            Ok(if is_so { Ok(status) } else { Err(status.to_string()) })
        })
    }
}

fn status(world: &World, kind: &str, name: &str) -> Result<Value> {
    Ok(at(&world.kubectl.json(&["get", kind, name])?, "/status").clone())
}

/// The condition of this type, or null.
fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
    let conditions = at(status, "/conditions").as_array().map(Vec::as_slice).unwrap_or_default();
    conditions.iter().find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

fn tier() -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUTier",
        "metadata": { "name": TIER },
        "spec": {
            "callers": "SignedIn",
            "authenticatedAs": "Pro",
            "priority": "Medium",
            "gpuSecondsPerWindow": 0,
            "longestCallSeconds": 50,
            "concurrentLeases": 2,
            "extendableByGrants": "Always",
            "windowPolicy": "FirstUse24h",
            "identities": [{}],
        },
    })
}

fn late_pool() -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUPool",
        "metadata": { "name": LATE_POOL },
        "spec": { "cards": { "timeShared": { "select": "All" } }, "mode": "Whole", "sizes": { "large": "Whole" },
                  "weights": { "large": 1, "xlarge": 1 } },
    })
}
