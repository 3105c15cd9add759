//! What an author is told before the first visitor comes (requirement A14).

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::kubectl::at;
use crate::story::{NAMESPACE, SPACE};
use crate::wait::eventually;
use crate::world::World;

/// The operator watches tiers; the rest is for this machine's load.
const JUDGED_LIMIT: Duration = Duration::from_secs(30);
const TIER: &str = "strict";

/// A tier that allows less than an app declares is named on its Space, with the function, its line and what to do, while
/// the Space runs on. Another tier, another verdict.
///
/// # Errors
/// What was not as it must be.
pub fn an_author_is_told_of_a_duration_that_a_tier_refuses(world: &World) -> Result<()> {
    world.story_space()?;
    let remove_tier = || world.kubectl.run(&["delete", "gputier", TIER, "--ignore-not-found"]);
    // One that an ended run has left.
    remove_tier()?;
    let told = judged_by_a_strict_tier(world);
    // Also for the stories after one that failed.
    remove_tier()?;
    told?;
    says(world, "the tier is gone and nobody is warned of it", |message| !message.contains(TIER)).map(drop)
}

fn judged_by_a_strict_tier(world: &World) -> Result<()> {
    let before = says(world, "the durations of the example are judged", |message| !message.contains(TIER))?;
    world.kubectl.apply(&tier(2).to_string())?;
    let shown = says(world, "the condition names the tier", |message| message.contains("strict at most 2s"))?;
    ensure!(shown["status"] == "False" && shown["reason"] == "LongerThanTierAllows", "{shown}");
    let message = shown["message"].as_str().unwrap_or_default();
    for part in ["long (app.py:", "declares 50s of large", "xlarge (app.py:", "declare at most "] {
        ensure!(message.contains(part), "{part:?} is missing: {message}");
    }
    let space = world.kubectl.json(&["--namespace", NAMESPACE, "get", "space", SPACE])?;
    ensure!(at(&space, "/status/stage") == "Running", "a warning stops nothing: {}", at(&space, "/status"));
    if before["status"] == "True" {
        eventually("an Event says so once", JUDGED_LIMIT, || {
            let selector = "reason=LongerThanTierAllows";
            let events =
                world.kubectl.items(&["--namespace", NAMESPACE, "get", "events", "--field-selector", selector])?;
            Ok(if events.is_empty() { Err("no Event".to_owned()) } else { Ok(()) })
        })?;
    }
    world.kubectl.apply(&tier(600).to_string())?;
    says(world, "the tier allows more and is named no longer", |message| !message.contains(TIER)).map(drop)
}

/// The condition, once it is there and its message is as it should be.
fn says(world: &World, what: &str, is_so: impl Fn(&str) -> bool) -> Result<Value> {
    eventually(what, JUDGED_LIMIT, || {
        let space = world.kubectl.json(&["--namespace", NAMESPACE, "get", "space", SPACE])?;
        let conditions = at(&space, "/status/conditions").as_array().context("the Space has no conditions")?;
        let shown = conditions.iter().find(|condition| condition["type"] == "DurationsAllowed");
        Ok(match shown {
            Some(shown) if is_so(shown["message"].as_str().unwrap_or_default()) => Ok(shown.clone()),
            Some(shown) => Err(shown.to_string()),
            None => Err("no condition DurationsAllowed".to_owned()),
        })
    })
}

/// A tier that nobody is in.
fn tier(longest: i64) -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUTier",
        "metadata": { "name": TIER },
        "spec": {
            "callers": "SignedIn",
            "authenticatedAs": "Regular",
            "priority": "Low",
            "gpuSecondsPerWindow": 3600,
            "longestCallSeconds": longest,
            "concurrentLeases": 1,
            "extendableByGrants": "Never",
            "windowPolicy": "FirstUse24h",
        },
    })
}
