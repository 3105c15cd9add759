//! A host on which there can be no gate.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::breakable::{ROLLOUT_LIMIT, SYSTEM, leases_are_granted};
use crate::kubectl::at;
use crate::wait::eventually;
use crate::world::World;

const AGENT: &str = "daemonset/spaceport-device-plugin";
/// From the start of the agent to its report.
const REPORT_LIMIT: Duration = Duration::from_secs(60);

/// N8: where only cgroup v1 is mounted, the GPUNode says so and what to do, and nothing is offered to kubelet.
///
/// The agent is shown a tmpfs in place of the host's cgroup tree, which is what such a host has there.
///
/// # Errors
/// What was not as it must be.
pub fn a_host_with_only_cgroup_v1_says_so(world: &World) -> Result<()> {
    let container = json!({
        "name": "device-plugin",
        "env": [{ "name": "SPACEPORT_CGROUP_ROOT", "value": "/cgroup-v1" }],
        "volumeMounts": [{ "name": "cgroup-v1", "mountPath": "/cgroup-v1" }],
    });
    let volume = json!({ "name": "cgroup-v1", "emptyDir": { "medium": "Memory" } });
    let patch = json!({ "spec": { "template": { "spec": { "containers": [container], "volumes": [volume] } } } });
    world.kubectl.run(&["--namespace", SYSTEM, "patch", AGENT, "--patch", &patch.to_string()])?;
    let told = refused(world);
    // Also for the stories after one that failed.
    world.kubectl.run(&["--namespace", SYSTEM, "rollout", "undo", AGENT])?;
    let limit = format!("--timeout={}s", ROLLOUT_LIMIT.as_secs());
    world.kubectl.run(&["--namespace", SYSTEM, "rollout", "status", AGENT, &limit])?;
    leases_are_granted(world)?;
    told?;
    eventually("CgroupV2Missing is over", REPORT_LIMIT, || {
        Ok(reported(world)?.map_or(Ok(()), |condition| Err(condition.to_string())))
    })
}

fn refused(world: &World) -> Result<()> {
    let told = eventually("CgroupV2Missing is reported", REPORT_LIMIT, || {
        Ok(reported(world)?.ok_or_else(|| "no such condition".to_owned()))
    })?;
    let message = told["message"].as_str().context("a condition without a message")?;
    ensure!(told["reason"] == "CgroupV1Only", "{told}");
    ensure!(message.contains("unified_cgroup_hierarchy"), "the message names no next step: {message}");
    let node = world.kubectl.json(&["get", "node", "--output", "json"])?;
    let seats = at(&node, "/items/0/status/allocatable/spaceport.dev~1seat");
    ensure!(seats.is_null() || seats == "0", "the node offers {seats} seats without a gate");
    Ok(())
}

/// The condition `CgroupV2Missing` of the node, while it is true.
fn reported(world: &World) -> Result<Option<Value>> {
    let nodes = world.kubectl.items(&["get", "gpunodes"])?;
    let mut conditions = nodes.iter().flat_map(|node| at(node, "/status/conditions").as_array().into_iter().flatten());
    let found = conditions.find(|condition| condition["type"] == "CgroupV2Missing" && condition["status"] == "True");
    Ok(found.cloned())
}
