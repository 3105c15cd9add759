//! `bench recovery`: how long nothing is granted after the leader's death, and after a start from nothing, with many
//! accounts and many open leases.
//!
//! - `warm_s`: two operators; kill -9 of the one that leads, until the first lease that was asked for after it;
//! - `cold_s`: no operator; from the start of one's process to the first lease;
//! - `list_s`: a raw LIST of what it lists, before and after each cold start, while no operator runs.
//!
//! Leases are asked for inside the pod of the Space of the stories, all the time, by two accounts of their own. The other
//! accounts are there to be read; see [`population`]. Nothing is removed or put back: the cluster is the benchmark's own, and
//! ends with it or is used again by the next run.

mod operator;
mod population;
mod probe;
mod raw_list;
mod report;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

pub use self::population::Size;
pub use self::report::RecoveryReport;

use self::operator::{Operator, Replica};
use self::population::Population;
use self::probe::Probe;
use self::report::Measured;
use super::accounts::Accounts;
use super::cluster::Cluster;
use super::sustain::calm;
use crate::replicas::{kill, leader_pid};
use crate::story::{NAMESPACE, SPACE};
use crate::wait::wall;
use crate::world::World;

/// Two accounts that ask at once: while the end of a lease of one is written, the other asks.
const CALLERS: usize = 2;
/// Leases that the callers are given before the leader is killed: then all is as it always is.
const GRANTS_BEFORE: usize = 5;
const KILLS: usize = 3;
const COLD_STARTS: usize = 3;
/// A first lease, on a cluster in which nothing is wrong.
const FIRST_LIMIT: Duration = Duration::from_secs(60);
/// A recovery that takes longer has failed.
const WARM_LIMIT: Duration = Duration::from_secs(120);
/// The same of a cold start, which lists everything.
const COLD_LIMIT: Duration = Duration::from_secs(300);
/// A new leader begins with the receipts of open leases 2 s after its term began: it is calm before, too.
const RECEIPTS_BEGIN: Duration = Duration::from_secs(5);
/// The first leader writes a receipt for each lease; each later one looks whether it is there.
const CALM_LIMIT: Duration = Duration::from_secs(900);

/// Runs the benchmark; `say` shows each step. The accounts stay, and no operator runs any more.
pub fn recovery(world: &World, size: Size, say: &mut dyn FnMut(&str)) -> Result<RecoveryReport> {
    ensure!(size.leases <= size.accounts, "{} accounts cannot hold {} leases", size.accounts, size.leases);
    say("applying examples/");
    world.apply_examples()?;
    say("waiting for Space demo/hello-zero (its first start installs gradio and spaces)");
    let space = world.running(NAMESPACE, SPACE, |seen| say(&format!("  {seen}")))?;
    let cluster = Cluster::connect()?;
    let operator = Operator::new(world, &cluster);
    // It would write what it finds in the middle.
    operator.end()?;
    let run = Run { world, cluster: &cluster, operator: &operator, space: &space, size };
    // Those of an earlier run stay as they are: they call no more.
    let callers = Accounts::named_for_this_run(CALLERS, 0);
    run.prepare(&callers, say)?;
    RecoveryReport::new(size, run.measure(&callers, say)?)
}

struct Run<'run> {
    world: &'run World,
    cluster: &'run Cluster,
    operator: &'run Operator<'run>,
    space: &'run str,
    size: Size,
}

impl Run<'_> {
    fn prepare(&self, callers: &Accounts, say: &mut dyn FnMut(&str)) -> Result<()> {
        let Size { accounts, leases } = self.size;
        say(&format!(
            "{accounts} accounts, {leases} of them with a lease on one of {} nodes",
            population::nodes(self.size)
        ));
        Population::new(self.world, self.cluster, self.size).make(say)?;
        callers.create(self.world, self.cluster)
    }

    fn measure(&self, callers: &Accounts, say: &mut dyn FnMut(&str)) -> Result<Measured> {
        let tokens = callers.tokens(self.world, self.space)?;
        say("two operators start, and read everything");
        self.operator.scale(2)?;
        let mut replicas = self.operator.warm(2, self.size.accounts, self.size.leases)?;
        tell(&replicas, say);
        let mut most_mib = most(&replicas);
        let mut warm_s = Vec::with_capacity(KILLS);
        let (mut leader_mib, mut standby_mib) = (0.0, 0.0);
        for number in 1..=KILLS {
            std::thread::sleep(RECEIPTS_BEGIN);
            calm(self.world, CALM_LIMIT)?;
            replicas = self.operator.warm(2, self.size.accounts, self.size.leases)?;
            let of = |leads| replicas.iter().filter(move |replica| replica.leads == leads);
            leader_mib = of(true).map(|replica| replica.resident.now_mib).fold(0.0, f64::max);
            standby_mib = of(false).map(|replica| replica.resident.now_mib).fold(0.0, f64::max);
            most_mib = most(&replicas).max(most_mib);
            let seconds = self.kill(&tokens).with_context(|| format!("kill {number} of the leader"))?;
            say(&format!("  kill {number}: granted {seconds:.2} s after it"));
            warm_s.push(seconds);
        }
        replicas = self.operator.warm(2, self.size.accounts, self.size.leases)?;
        tell(&replicas, say);
        most_mib = most(&replicas).max(most_mib);

        say("no operator");
        self.operator.end()?;
        let mut lists = vec![self.list(say)?];
        let mut cold_s = Vec::with_capacity(COLD_STARTS);
        for number in 1..=COLD_STARTS {
            let seconds = self.start(&tokens).with_context(|| format!("cold start {number}"))?;
            say(&format!("  cold start {number}: granted {seconds:.2} s after it"));
            cold_s.push(seconds);
            replicas = self.operator.warm(1, self.size.accounts, self.size.leases)?;
            most_mib = most(&replicas).max(most_mib);
            self.operator.end()?;
            lists.push(self.list(say)?);
        }
        Ok(Measured { warm_s, cold_s, lists, leader_mib, standby_mib, most_mib })
    }

    /// Seconds from kill -9 of the leader to the first lease that was asked for after it.
    fn kill(&self, tokens: &[String]) -> Result<f64> {
        let probe = Probe::start(self.world, tokens)?;
        for _ in 0..GRANTS_BEFORE {
            probe.granted_after(wall()?, FIRST_LIMIT)?;
        }
        // Looked up now: a leader that was slow to renew its lease leads no more.
        let leader = leader_pid(self.world)?;
        let killed = wall()?;
        kill(leader)?;
        let granted = probe.granted_after(killed, WARM_LIMIT)?;
        probe.stop()?;
        Ok(granted - killed)
    }

    /// Seconds from the start of the only operator to the first lease.
    fn start(&self, tokens: &[String]) -> Result<f64> {
        let probe = Probe::start(self.world, tokens)?;
        self.operator.scale(1)?;
        let (pid, began) = self.operator.process()?;
        let granted = probe.granted_after(began, COLD_LIMIT)?;
        let (still, _) = self.operator.process()?;
        ensure!(pid == still, "the operator died at its start, and another process began");
        probe.stop()?;
        Ok(granted - began)
    }

    fn list(&self, say: &mut dyn FnMut(&str)) -> Result<raw_list::Listed> {
        let listed = raw_list::list(self.cluster)?;
        say(&format!("  raw LIST of {} objects: {:.2} s", listed.objects, listed.seconds));
        Ok(listed)
    }
}

fn most(replicas: &[Replica]) -> f64 {
    replicas.iter().map(|replica| replica.resident.most_mib).fold(0.0, f64::max)
}

fn tell(replicas: &[Replica], say: &mut dyn FnMut(&str)) {
    for replica in replicas {
        let (role, resident) = (if replica.leads { "leader" } else { "standby" }, replica.resident);
        say(&format!("  {role}: {:.0} MiB resident, {:.0} MiB at most", resident.now_mib, resident.most_mib));
    }
}
