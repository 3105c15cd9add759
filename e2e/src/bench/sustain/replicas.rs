//! How many operators run.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::breakable::{ROLLOUT_LIMIT, SYSTEM, leases_are_granted};
use crate::kubectl::at;
use crate::wait::eventually;
use crate::world::World;

const OPERATOR: &str = "deployment/spaceport-operator";
const SELECTOR: [&str; 2] = ["--selector", "app.kubernetes.io/name=spaceport-operator"];
/// A pod that ends has 30 s of grace.
const GONE_LIMIT: Duration = Duration::from_secs(60);

/// The number of replicas as it was, to be put back; dropping it does so too. A run that is killed leaves another number:
/// the next `cargo xtask charts` sets what the chart says.
#[derive(Debug)]
pub(super) struct Replicas<'a> {
    world: &'a World,
    before: u64,
    is_back: bool,
}

impl<'a> Replicas<'a> {
    /// Notes how many there are. Nothing changes until [`Replicas::set`].
    pub(super) fn note(world: &'a World) -> Result<Self> {
        let deployment = world.kubectl.json(&["--namespace", SYSTEM, "get", OPERATOR])?;
        let before = at(&deployment, "/spec/replicas").as_u64().context("the operator's Deployment has no replicas")?;
        Ok(Self { world, before, is_back: false })
    }

    /// Scales to so many, and waits until exactly they run and leases are granted.
    pub(super) fn set(&self, replicas: u64) -> Result<()> {
        let kubectl = &self.world.kubectl;
        let count = format!("--replicas={replicas}");
        kubectl.run(&["--namespace", SYSTEM, "scale", OPERATOR, &count])?;
        let limit = format!("--timeout={}s", ROLLOUT_LIMIT.as_secs());
        kubectl.run(&["--namespace", SYSTEM, "rollout", "status", OPERATOR, &limit])?;
        eventually(&format!("{replicas} operators run"), GONE_LIMIT, || {
            let pods = kubectl.items(&[&["--namespace", SYSTEM, "get", "pods"], &SELECTOR[..]].concat())?;
            let found = pods.len() as u64;
            Ok(if found == replicas { Ok(()) } else { Err(format!("{found} pods")) })
        })?;
        // The one that was ended may have been the leader.
        leases_are_granted(self.world)
    }

    /// Scales to what was there.
    pub(super) fn put_back(mut self) -> Result<()> {
        self.is_back = true;
        self.set(self.before)
    }
}

impl Drop for Replicas<'_> {
    fn drop(&mut self) {
        if self.is_back {
            return;
        }
        // Without waiting: whatever failed may be why nothing becomes ready.
        let count = format!("--replicas={}", self.before);
        if let Err(error) = self.world.kubectl.run(&["--namespace", SYSTEM, "scale", OPERATOR, &count]) {
            eprintln!("the operator does not have its {} replicas back: {error:#}", self.before);
        }
    }
}
