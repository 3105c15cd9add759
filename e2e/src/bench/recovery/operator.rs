//! The operator's Deployment while it is measured: how many replicas, which process, what each says. The memory for so many
//! accounts it has from the chart's values, which `cargo xtask bench recovery` sets.

use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::core::Request;
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use super::super::cluster::Cluster;
use super::super::memory::{Resident, resident};
use super::super::sustain::mutations::gauge;
use crate::breakable::SYSTEM;
use crate::replicas::{PROGRAM, leader_pid, pid_of};
use crate::wait::eventually_every;
use crate::world::World;

/// Admin port of the operator.
const ADMIN_PORT: u16 = 8080;
/// A replica that ends has 30 s of grace; kubelet and a slow machine need some more.
const END_LIMIT: Duration = Duration::from_secs(120);
/// From the change of the Deployment to the new process, whose container is made first.
const START_LIMIT: Duration = Duration::from_secs(120);
/// A list of a million objects on a slow machine, and the pause of a container that was killed several times.
const WARM_LIMIT: Duration = Duration::from_secs(600);
/// Between two looks at replicas that list: each look is work for the same cores.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Between two looks for a process; what is measured begins with the process itself.
const PROCESS_PERIOD: Duration = Duration::from_millis(50);
/// Ticks of the kernel's clock in `/proc/<pid>/stat`: 100 a second on every Linux that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// The Deployment under our hands.
pub(super) struct Operator<'a> {
    world: &'a World,
    cluster: &'a Cluster,
}

/// One replica, as it was seen.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Replica {
    pub(super) leads: bool,
    pub(super) resident: Resident,
}

/// What a replica says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Said {
    warm: bool,
    leads: bool,
    accounts: u64,
    open_leases: u64,
}

impl<'a> Operator<'a> {
    pub(super) fn new(world: &'a World, cluster: &'a Cluster) -> Self {
        Self { world, cluster }
    }

    /// Ends every replica, and waits until all are gone.
    pub(super) fn end(&self) -> Result<()> {
        self.scale(0)?;
        eventually_every(LOOK_PERIOD, "no operator runs", END_LIMIT, || {
            let pods = self.pods()?.len();
            Ok(if pods == 0 { Ok(()) } else { Err(format!("{pods} pods")) })
        })
    }

    /// Starts so many replicas, without waiting for anything.
    pub(super) fn scale(&self, replicas: i32) -> Result<()> {
        let deployments = Api::<Deployment>::namespaced(self.cluster.admin().clone(), SYSTEM);
        let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let patched = self.cluster.wait(deployments.patch(PROGRAM, &PatchParams::default(), &patch));
        patched.context("the operator's Deployment cannot be changed")?;
        Ok(())
    }

    /// The only process, and when it began, in seconds since 1970.
    pub(super) fn process(&self) -> Result<(u32, f64)> {
        eventually_every(PROCESS_PERIOD, "an operator runs", START_LIMIT, || {
            // Its pod may still be another's that ends; all had ended before.
            let found = crate::story::pids_of(PROGRAM)?;
            Ok(match found[..] {
                [pid] => Ok((pid, began(pid)?)),
                _ => Err(format!("processes {found:?}")),
            })
        })
    }

    /// Waits until so many replicas know so many accounts, and the one that leads has so many leases.
    pub(super) fn warm(&self, replicas: usize, accounts: usize, leases: usize) -> Result<Vec<Replica>> {
        let what = format!("{replicas} operators know {accounts} accounts, and one leads with {leases} leases");
        eventually_every(LOOK_PERIOD, &what, WARM_LIMIT, || {
            let pods = self.pods()?;
            let said: Vec<Said> = pods.iter().filter_map(|pod| self.said(pod).ok()).collect();
            let leaders = said.iter().filter(|said| said.leads && said.open_leases >= leases as u64).count();
            let know = said.iter().all(|said| said.warm && said.accounts >= accounts as u64);
            if pods.len() != replicas || said.len() != replicas || !know || leaders != 1 {
                return Ok(Err(format!("{} pods; {said:?}", pods.len())));
            }
            // One may end between two looks.
            Ok(self.processes(&pods).map_err(|error| format!("{error:#}")))
        })
    }

    fn processes(&self, pods: &[Pod]) -> Result<Vec<Replica>> {
        let leader = leader_pid(self.world)?;
        pods.iter().map(|pod| replica(pod, leader)).collect()
    }

    fn pods(&self) -> Result<Vec<Pod>> {
        let pods = Api::<Pod>::namespaced(self.cluster.admin().clone(), SYSTEM);
        let selected = ListParams::default().labels(&format!("app.kubernetes.io/name={PROGRAM}"));
        Ok(self.cluster.wait(pods.list(&selected)).context("cannot list the operator's pods")?.items)
    }

    fn said(&self, pod: &Pod) -> Result<Said> {
        let name = format!("{}:{ADMIN_PORT}", pod.name_any());
        let request = Request::new(Pod::url_path(&(), Some(SYSTEM))).get_subresource("proxy/metrics", &name)?;
        Ok(Said::of(&self.cluster.wait(self.cluster.admin().request_text(request))?))
    }
}

impl Said {
    fn of(metrics: &str) -> Self {
        let value = |name| gauge(metrics, name).unwrap_or_default();
        Self {
            warm: value("spaceport_warm") == 1,
            leads: value("spaceport_leader") == 1,
            accounts: value("spaceport_accounts"),
            open_leases: value("spaceport_open_leases"),
        }
    }
}

fn replica(pod: &Pod, leader: u32) -> Result<Replica> {
    let uid = pod.uid().context("a pod without uid")?;
    let pid = pid_of(&uid)?.with_context(|| format!("no process of pod {uid}"))?;
    Ok(Replica { leads: pid == leader, resident: resident(pid)? })
}

/// When a process began, in seconds since 1970, as exactly as the kernel notes it: a hundredth of a second.
fn began(pid: u32) -> Result<f64> {
    let read = |path: String| std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"));
    let ticks = start_ticks(&read(format!("/proc/{pid}/stat"))?).context("no start time in /proc/<pid>/stat")?;
    let uptime = read("/proc/uptime".to_owned())?;
    let uptime: f64 = uptime.split(' ').next().unwrap_or_default().parse().context("/proc/uptime is no number")?;
    Ok(crate::wait::wall()? - (uptime - ticks as f64 / TICKS_PER_SECOND))
}

/// The 22nd field of `/proc/<pid>/stat`; the second is the program's name, in which anything can be.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::wall;

    #[test]
    fn what_a_replica_says_is_read() {
        let text = "# TYPE spaceport_warm gauge\nspaceport_warm 1\nspaceport_accounts 100003\nspaceport_open_leases 10000\n\
                    spaceport_leader 1\n";
        assert_eq!(Said::of(text), Said { warm: true, leads: true, accounts: 100_003, open_leases: 10_000 });
        assert_eq!(Said::of("# EOF\n"), Said::default(), "one that has just begun says nothing yet");
    }

    #[test]
    fn a_process_began_when_the_kernel_says() {
        let mut child = std::process::Command::new("sleep").arg("5").spawn().unwrap();
        let (began, now) = (began(child.id()).unwrap(), wall().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!((now - began).abs() < 2.0, "{began} {now}");
        assert_eq!(start_ticks("1 (a) b) S 2 3 4"), None);
        let fields: Vec<String> = (3..=24).map(|field| field.to_string()).collect();
        assert_eq!(start_ticks(&format!("1 (a) b) {}", fields.join(" "))), Some(22));
    }
}
