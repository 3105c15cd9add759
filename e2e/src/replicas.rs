//! How many operators run, and which of them leads.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::breakable::{ROLLOUT_LIMIT, SYSTEM, leases_are_granted};
use crate::kubectl::at;
use crate::story::pids_of;
use crate::wait::eventually;
use crate::world::World;

/// Name of its program, and of the Lease by which one of its replicas leads.
pub(crate) const PROGRAM: &str = "spaceport-operator";
const OPERATOR: &str = "deployment/spaceport-operator";
const SELECTOR: [&str; 2] = ["--selector", "app.kubernetes.io/name=spaceport-operator"];
/// A pod that ends has 30 s of grace.
const GONE_LIMIT: Duration = Duration::from_secs(60);

/// The number of replicas as it was, to be put back; dropping it does so too. A run that is killed leaves another number:
/// the next `cargo xtask charts` sets what the chart says.
#[derive(Debug)]
pub(crate) struct Replicas<'a> {
    world: &'a World,
    before: u64,
    is_back: bool,
}

impl<'a> Replicas<'a> {
    /// Notes how many there are. Nothing changes until [`Replicas::set`].
    pub(crate) fn note(world: &'a World) -> Result<Self> {
        let deployment = world.kubectl.json(&["--namespace", SYSTEM, "get", OPERATOR])?;
        let before = at(&deployment, "/spec/replicas").as_u64().context("the operator's Deployment has no replicas")?;
        Ok(Self { world, before, is_back: false })
    }

    /// Scales to so many, and waits until exactly they run and leases are granted.
    pub(crate) fn set(&self, replicas: u64) -> Result<()> {
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
    pub(crate) fn put_back(mut self) -> Result<()> {
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

/// The process of the replica that holds the leader's lease.
pub(crate) fn leader_pid(world: &World) -> Result<u32> {
    let lease = world.kubectl.json(&["--namespace", SYSTEM, "get", "lease", PROGRAM])?;
    let holder = at(&lease, "/spec/holderIdentity").as_str().unwrap_or_default().to_owned();
    // The replica's name is its pod's, and a random part follows.
    let pod = holder.rsplit_once('_').map_or(holder.as_str(), |(pod, _)| pod).to_owned();
    let pod = world.kubectl.json(&["--namespace", SYSTEM, "get", "pod", &pod])?;
    let uid = at(&pod, "/metadata/uid").as_str().context("a pod without uid")?.to_owned();
    pid_of(&uid)?.with_context(|| format!("no process of the leader's pod {uid}"))
}

/// The process of the replica whose pod has this uid, if one runs.
pub(crate) fn pid_of(uid: &str) -> Result<Option<u32>> {
    let is_of_pod = |pid: &u32| {
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        groups.contains(uid) || groups.contains(&uid.replace('-', "_"))
    };
    Ok(pids_of(PROGRAM)?.into_iter().find(is_of_pod))
}

/// kill -9 of one of them.
pub(crate) fn kill(pid: u32) -> Result<()> {
    let status = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status()?;
    ensure!(status.success(), "cannot kill the operator (pid {pid}): {status}");
    Ok(())
}
