//! What a starting agent does with what an earlier one left behind (N19): the checkpoint, lease cgroups, open
//! doors of the gate.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::time::Duration;

use spaceport_shell::error_chain;

use crate::checkpoint::{Checkpoint, Found};
use crate::converge::{Machine, Phase, Snapshot, Worker};
use crate::gate::lease_cgroup::{self, CgroupError, LeaseCgroup};
use crate::gate::{Device, Gate, GateError};
use crate::hardware;

/// How long the start waits for a killed stranger; one that sits in the driver longer is killed anyway, and its directory
/// is removed by the next start.
const STRANGER_LIMIT: Duration = Duration::from_secs(2);

/// Why the start cannot go on: what is on the node is not known, so nothing may be granted.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// Lease cgroups cannot be listed.
    #[error("lease cgroups cannot be looked for")]
    Cgroups(#[source] CgroupError),
    /// The gate's map cannot be cleaned.
    #[error("the gate cannot be put in order")]
    Gate(#[source] GateError),
}

/// Puts node and machine in agreement. Blocks for at most a few seconds.
///
/// # Errors
/// [`RecoveryError`]; a checkpoint that cannot be used is no error, its leases end.
pub fn recover(
    machine: &mut Machine,
    checkpoint: &Checkpoint,
    gate: &Gate,
    pods_cgroup: &Path,
    now_ms: u64,
    devices: impl Fn(u32) -> Vec<Device>,
) -> Result<(), RecoveryError> {
    let found = lease_cgroup::find_all(pods_cgroup).map_err(RecoveryError::Cgroups)?;
    let known = match checkpoint.read() {
        Ok(Found::SameBoot(snapshot)) => {
            adopt(machine, snapshot, gate, now_ms, devices).map_err(RecoveryError::Gate)?
        }
        Ok(Found::OtherBoot(snapshot)) => {
            tracing::info!(leases = snapshot.leases.len(), "The node rebooted; its leases are over");
            machine.restore_lost(now_ms, snapshot, "the node rebooted");
            Known::default()
        }
        Ok(Found::Nothing) => Known::default(),
        Err(error) => {
            tracing::error!(error = %error_chain(&error), "Everything that runs is stopped");
            Known::default()
        }
    };
    let shut = gate.close_all_but(&known.leases).map_err(RecoveryError::Gate)?;
    if shut > 0 {
        tracing::warn!(cgroups = shut, "The gate was shut for cgroups without a lease");
    }
    for cgroup in found.iter().filter(|cgroup| !known.workers.contains(&cgroup.id())) {
        end_stranger(machine, cgroup, now_ms);
    }
    Ok(())
}

/// Cgroups that the checkpoint names.
#[derive(Default)]
struct Known {
    workers: BTreeSet<u64>,
    /// Whose gate its lease opens or shuts.
    leases: HashSet<u64>,
}

fn adopt(
    machine: &mut Machine,
    snapshot: Snapshot,
    gate: &Gate,
    now_ms: u64,
    devices: impl Fn(u32) -> Vec<Device>,
) -> Result<Known, GateError> {
    let leases = snapshot.leases.iter().filter(|lease| !matches!(lease.phase, Phase::Ended { .. }));
    let idle = snapshot.book.idle.values().map(|idle| &idle.worker);
    let clearing = snapshot.book.clearing.values().map(|clearing| &clearing.worker);
    let workers: BTreeMap<u64, &Worker> = leases
        .clone()
        .filter_map(|lease| lease.worker.as_ref())
        .chain(idle)
        .chain(clearing)
        .map(|worker| (worker.cgroup_id, worker))
        .collect();
    let alive: BTreeSet<u64> =
        workers.iter().filter(|(_, worker)| hardware::is_alive(worker)).map(|(id, _)| *id).collect();
    let mut with_gate = HashSet::new();
    for lease in leases {
        let (Some(worker), Some(slot)) = (&lease.worker, lease.slot) else { continue };
        if matches!(lease.phase, Phase::Closing { .. }) {
            // Its gate counts how often the card was opened (N16); the machine shuts it at its first tick.
            with_gate.insert(worker.cgroup_id);
        }
        if matches!(lease.phase, Phase::Running { .. }) && alive.contains(&worker.cgroup_id) {
            with_gate.insert(worker.cgroup_id);
            // Usually open still, as the map is pinned; not if somebody unmounted bpffs.
            if !gate.is_open(worker.cgroup_id)? {
                gate.open(worker.cgroup_id, &devices(slot.card))?;
            }
        }
    }
    // A half-done admission is rolled back by the machine, which has no worker for it: its cgroup counts as a stranger.
    let known = Known { workers: workers.keys().copied().collect(), leases: with_gate };
    tracing::info!(workers = known.workers.len(), alive = alive.len(), "Taking leases over from the checkpoint");
    machine.restore(now_ms, snapshot, &alive);
    Ok(known)
}

/// Kills what no checkpoint names.
fn end_stranger(machine: &mut Machine, cgroup: &LeaseCgroup, now_ms: u64) {
    tracing::warn!(cgroup = %cgroup.path().display(), "A lease cgroup that no checkpoint names is killed");
    let ended = cgroup.kill().and_then(|()| cgroup.wait_empty(STRANGER_LIMIT)).and_then(|_| cgroup.remove());
    if let Err(error) = ended {
        tracing::error!(error = %error_chain(&error), "It is not gone yet");
    }
    let name = cgroup.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if let Some(lease) = name.strip_prefix(lease_cgroup::PREFIX) {
        machine.report_lost_cgroup(now_ms, lease);
    }
}
