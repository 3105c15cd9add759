//! `bench grant --sustain`: whole lease cycles under a steady load, beside the bare compare-and-swaps of the same run, with
//! one operator and with two; whether every lease is charged once; and how many calls a lease costs the API server.
//!
//! A part is one number of operators: page writes, leases, page writes, leases, page writes, so that whatever slows the
//! machine down for a while meets both. The API server's own counter is read before the first leases and when the last
//! are settled; the page writes of the benchmark in between are taken off.

pub(super) mod mutations;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use spaceport_crds::names::TERM_PAGE;

pub use self::report::{SustainReport, Sustained};

use self::mutations::{Mutations, OwnCount};
use super::accounts::{self, Accounts};
use super::cluster::{AT_ONCE, Cluster};
use super::enough_slots;
use super::page_write::{AccountPage, charged_page, give_a_past, quiet_page};
use crate::books::{self, Told, Verdict};
use crate::kubectl::at;
use crate::pod_program::{self, ADDRESS, SUSTAIN_LOAD};
use crate::pool::ChangedPool;
use crate::replicas::Replicas;
use crate::story::{NAMESPACE, SPACE};
use crate::wait::now;
use crate::world::World;

/// Accounts that call in turn.
const ACCOUNTS: usize = 1_000;
/// Each writes a page of its own.
const WRITERS: usize = AT_ONCE;
/// Callers at once for each two slots: a slot that is cleared is waited for by then, and none is ever idle.
const CALLERS_PER_TWO_SLOTS: usize = 3;
/// More callers than that are more than two cores can run.
const CALLERS_MAX: usize = 64;
/// What a call declares; it ends at once.
const DECLARED_S: u64 = 5;
/// Cycles at the beginning of a load that do not count: the callers start one after the other.
const WARM_UP: Duration = Duration::from_secs(3);
/// Beyond the time of the load: its start, the calls under way, the ends of their workers.
const OVERTIME: Duration = Duration::from_secs(60);
/// Loads of a part, with page writes before, between and after them.
const LOADS: u32 = 2;
/// Nothing was written for so long: the ledger has nothing to do. Longer than the second for which the end of a receipt
/// waits for its slot.
const CALM: Duration = Duration::from_secs(2);
/// From the end of a load to the last receipt.
const CALM_LIMIT: Duration = Duration::from_secs(60);
/// The last receipts, and those whose write failed once or twice.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// More receipts than a run makes (the most a pool can keep): none may be removed before it is counted.
const RECEIPTS_KEPT: u32 = 100_000;
/// Old receipts that the operator deletes with one call (`operator/src/ledger/retention.rs`).
const DELETED_AT_ONCE: u64 = 50;

/// Runs the benchmark, `time` of leases for each number of operators; `say` shows each step.
pub fn sustain(world: &World, time: Duration, say: &mut dyn FnMut(&str)) -> Result<SustainReport> {
    say("applying examples/");
    world.apply_examples()?;
    say("waiting for Space demo/hello-zero (its first start installs gradio and spaces)");
    let space = world.running(NAMESPACE, SPACE, |seen| say(&format!("  {seen}")))?;
    let slots = enough_slots(world, say)?;
    let cluster = Cluster::connect()?;
    accounts::remove_leftovers(world, &cluster)?;
    let changes = json!({ "receipts": { "timing": "Live", "perSpace": RECEIPTS_KEPT } });
    let pool = ChangedPool::with(world, &changes)?;
    let replicas = Replicas::note(world)?;
    let callers = callers(slots);
    let run = Run { world, cluster: &cluster, space: &space, callers, time };
    let mut part = |count| {
        say(&format!("{count} operator(s)"));
        replicas.set(count)?;
        run.part(say).with_context(|| format!("with {count} operator(s)"))
    };
    let report = SustainReport { one_replica: part(1)?, two_replicas: part(2)? };
    replicas.put_back()?;
    pool.put_back()?;
    Ok(report)
}

/// So many that every slot is busy and somebody waits for the next.
fn callers(slots: usize) -> usize {
    (slots * CALLERS_PER_TWO_SLOTS / 2).min(CALLERS_MAX)
}

/// What both parts have in common.
struct Run<'run> {
    world: &'run World,
    cluster: &'run Cluster,
    space: &'run str,
    callers: usize,
    time: Duration,
}

/// The plan of a load, as the program reads it.
#[derive(Serialize)]
struct Plan<'run> {
    address: (&'static str, u16),
    tokens: &'run [String],
    callers: usize,
    declared_s: u64,
    warm_up_s: f64,
    seconds: f64,
}

/// What a load tells.
#[derive(Debug, Deserialize)]
struct Load {
    cycles: u64,
    seconds: f64,
    queued: u64,
    reused: u64,
    longest_ms: f64,
    accounts: Vec<Told>,
}

/// Whole numbers of something and the seconds that they took, over several slices.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    count: u64,
    seconds: f64,
}

impl Rate {
    fn add(&mut self, more: Self) {
        self.count += more.count;
        self.seconds += more.seconds;
    }

    fn per_second(&self) -> Result<f64> {
        ensure!(self.seconds > 0.0 && self.count > 0, "{} in {} s is no rate", self.count, self.seconds);
        Ok(self.count as f64 / self.seconds)
    }
}

/// What a part measured, before it is judged.
struct Measured {
    cycles: Rate,
    cas: Rate,
    told: BTreeMap<String, Told>,
    /// By operator and agent, from the first lease until all were settled.
    counted: Mutations,
    /// The operator's own count before and after, where it can be read.
    own: Option<(OwnCount, OwnCount)>,
    /// Pages with the row of a lease whose receipt is written.
    rows: u64,
}

impl Run<'_> {
    fn part(&self, say: &mut dyn FnMut(&str)) -> Result<Sustained> {
        let accounts = Accounts::named_for_this_run(ACCOUNTS, WRITERS);
        say(&format!("  making {} accounts of tier bench", ACCOUNTS + WRITERS));
        accounts.create(self.world, self.cluster)?;
        // The operator puts its finalizer on each.
        calm(self.world, CALM_LIMIT)?;
        give_a_past(self.cluster, accounts.callers())?;
        let mut writers = Writers::begin(self.cluster, accounts.pages())?;
        calm(self.world, CALM_LIMIT)?;
        let term = self.term()?;
        let measured = self.measure(&accounts, &mut writers, say)?;
        let terms = self.term()? - term;
        if terms != 0 {
            say(&format!(
                "    {terms} new terms began meanwhile: the leader was slow to renew its lease, or was ended"
            ));
        }
        say(&format!("    {} bytes a page", writers.bytes()));
        say("  comparing pages, receipts and what the callers were told");
        let verdict = books::judged(self.world, &measured.told, SETTLE_LIMIT)?;
        tell(&verdict, say);
        ensure!(verdict.open.is_empty(), "not settled within {} s: {}", SETTLE_LIMIT.as_secs(), verdict.open[0]);
        let writes = measured.writes_per_lease(verdict.leases, say)?;
        if verdict.adds_up() {
            // After a failure they stay, with their pages and receipts, for whoever looks; the next run removes them.
            accounts.remove(self.world, self.cluster).context("the accounts of the benchmark cannot be removed")?;
        }
        let (cycles_per_s, cas_per_s) = (measured.cycles.per_second()?, measured.cas.per_second()?);
        Ok(Sustained::new(cycles_per_s, cas_per_s, verdict.lost, verdict.doubled, writes))
    }

    fn measure(&self, accounts: &Accounts, writers: &mut Writers, say: &mut dyn FnMut(&str)) -> Result<Measured> {
        let tokens = accounts.tokens(self.world, self.space)?;
        let slice = self.time / LOADS;
        let (mut cycles, mut cas) = (Rate::default(), Rate::default());
        let mut told: BTreeMap<String, Told> = BTreeMap::new();
        say("  page writes");
        cas.add(writers.write(self.cluster, slice / 2)?);
        let own_before = OwnCount::read(self.world);
        let (before, attempts) = (Mutations::read(self.world)?, writers.attempts());
        for number in 1..=LOADS {
            if number > 1 {
                say("  page writes");
                cas.add(writers.write(self.cluster, slice / 2)?);
            }
            say(&format!("  leases with {} callers", self.callers));
            let load = self.load(&tokens, slice)?;
            self.remarks(&load, say);
            cycles.add(Rate { count: load.cycles, seconds: load.seconds });
            ensure!(load.accounts.len() == ACCOUNTS, "the load tells of {} accounts", load.accounts.len());
            for (name, more) in accounts.callers().iter().zip(&load.accounts) {
                told.entry(name.clone()).or_default().extend(more);
            }
            let start = now();
            calm(self.world, CALM_LIMIT)?;
            let written = start.elapsed().saturating_sub(CALM).as_secs_f64();
            say(&format!("    all is written {written:.1} s later"));
        }
        let counted = Mutations::read(self.world)?.since(&before)?;
        let counted = counted.without("PUT", "gpuaccounts/status", writers.attempts() - attempts)?;
        let own = own_before.and_then(|before| Ok((before, OwnCount::read(self.world)?))).ok();
        let rows = self.pages_with_a_closed_row(accounts)?;
        say("  page writes");
        cas.add(writers.write(self.cluster, slice / 2)?);
        Ok(Measured { cycles, cas, told, counted, own, rows })
    }

    fn load(&self, tokens: &[String], time: Duration) -> Result<Load> {
        let plan = Plan {
            address: ADDRESS,
            tokens,
            callers: self.callers,
            declared_s: DECLARED_S,
            warm_up_s: WARM_UP.as_secs_f64(),
            seconds: time.as_secs_f64(),
        };
        let load = pod_program::run(self.world, SUSTAIN_LOAD, &plan, WARM_UP + time + OVERTIME);
        load.context("the load in the pod")
    }

    fn remarks(&self, load: &Load, say: &mut dyn FnMut(&str)) {
        say(&format!(
            "    {} cycles in {} s, the longest {:.0} ms; {} waited for a slot, {} reused a worker",
            load.cycles, load.seconds, load.longest_ms, load.queued, load.reused
        ));
        // A number for people; the leases are counted where they end up.
        if let Ok(own) = OwnCount::read(self.world) {
            say(&format!("    {} receipts were still to be written at its end", own.receipts_pending));
            if own.under_pressure > 0 {
                say("    write pressure at its end: receipts were written at the ends of leases only");
            }
        }
    }

    /// Number of the ledger's term (L6).
    fn term(&self) -> Result<i64> {
        at(&self.world.page(TERM_PAGE)?, "/epoch").as_i64().context("the term page has no epoch")
    }

    /// Pages that still have the row of a lease whose receipt is written: each costs a write of its own, unless it rides
    /// along with the account's next lease.
    fn pages_with_a_closed_row(&self, accounts: &Accounts) -> Result<u64> {
        let pages = self.world.kubectl.items(&["get", "gpuaccounts"])?;
        let names: BTreeSet<&str> = accounts.callers().iter().map(String::as_str).collect();
        let is_ours = |page: &&Value| at(page, "/metadata/name").as_str().is_some_and(|name| names.contains(name));
        let has_row = |page: &&Value| at(page, "/status/closed").as_array().is_some_and(|rows| !rows.is_empty());
        Ok(pages.iter().filter(is_ours).filter(has_row).count() as u64)
    }
}

/// Waits until accounts, pages and receipts are not written any more.
pub(super) fn calm(world: &World, limit: Duration) -> Result<()> {
    let start = now();
    let mut before = Mutations::read(world)?;
    loop {
        std::thread::sleep(CALM);
        let after = Mutations::read(world)?;
        let written = after.since(&before)?.of_the_ledger();
        // A receipt may rest for longer than a look takes.
        let pending = OwnCount::read(world)?.receipts_pending;
        if written == 0 && pending == 0 {
            return Ok(());
        }
        ensure!(
            start.elapsed() < limit,
            "the ledger does not come to rest: after {} s without a call, {written} accounts, pages and receipts were \
             written within {} s, and {pending} receipts are not",
            limit.as_secs(),
            CALM.as_secs()
        );
        before = after;
    }
}

impl Measured {
    /// Mutating calls for each lease: those that were counted, and those that these leases will cost later. A page whose
    /// closed row has its receipt is written once more (it rides along only with a next lease), and receipts are deleted one
    /// day, [`DELETED_AT_ONCE`] with one call.
    fn writes_per_lease(&self, leases: u64, say: &mut dyn FnMut(&str)) -> Result<f64> {
        ensure!(leases > 0, "there were no leases");
        // None was deleted meanwhile: `receipts.perSpace` is high, and the benchmark ends within their age.
        let deletes = leases.div_ceil(DELETED_AT_ONCE);
        say(&format!("  calls a lease: {}", self.counted.each_of(leases)));
        say(&format!("    to come: {} writes of pages with a closed row, {deletes} deletions of receipts", self.rows));
        match self.own.as_ref().map(|(before, after)| after.each_of(before, leases)) {
            Some(Ok(Some(own))) => say(&format!("    the operator's own count: {own}")),
            Some(Ok(None)) => say("    the operator has no count of its own"),
            Some(Err(error)) => say(&format!("    the operator's own count is of no use: {error:#}")),
            None => say("    the operator's own count cannot be read"),
        }
        Ok((self.counted.total() + self.rows + deletes) as f64 / leases as f64)
    }
}

fn tell(verdict: &Verdict, say: &mut dyn FnMut(&str)) {
    say(&format!(
        "    {} leases, {} ms charged on pages and {} ms on receipts; {} lost, {} doubled, {} given up at no charge",
        verdict.leases, verdict.charged_ms, verdict.receipts_ms, verdict.lost, verdict.doubled, verdict.given_up
    ));
    for problem in &verdict.problems {
        say(&format!("    {problem}"));
    }
}

/// The pages of the bare writes.
struct Writers(Vec<AccountPage>);

impl Writers {
    fn begin(cluster: &Cluster, names: &[String]) -> Result<Self> {
        let begin = |name: String| {
            let client = cluster.operator().clone();
            async move {
                let mut page = AccountPage::read(&client, &name).await?;
                page.become_page(&client, quiet_page).await?;
                Ok(page)
            }
        };
        Ok(Self(cluster.each(names.to_vec(), begin)?))
    }

    /// Every writer writes its page, one write after the other, for this time. The writes that succeeded.
    fn write(&mut self, cluster: &Cluster, time: Duration) -> Result<Rate> {
        let start = now();
        let end = start + time;
        let write = |mut page: AccountPage| {
            let client = cluster.operator().clone();
            async move {
                let mut writes = 0_u64;
                while now() < end {
                    // One that met another's write is none.
                    writes += u64::from(page.write_next(&client, charged_page).await?.is_some());
                }
                Ok((page, writes))
            }
        };
        let done = cluster.each(std::mem::take(&mut self.0), write)?;
        let seconds = start.elapsed().as_secs_f64();
        let (pages, writes): (Vec<AccountPage>, Vec<u64>) = done.into_iter().unzip();
        self.0 = pages;
        Ok(Rate { count: writes.iter().sum(), seconds })
    }

    fn attempts(&self) -> u64 {
        self.0.iter().map(AccountPage::attempts).sum()
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(AccountPage::bytes).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod_program::tests::{device_api, here};

    #[test]
    fn every_slot_is_waited_for_within_bounds() {
        assert_eq!((callers(24), callers(32), callers(400)), (36, 48, CALLERS_MAX));
    }

    #[test]
    fn slices_are_summed_up_before_they_are_divided() {
        let mut rate = Rate::default();
        assert!(rate.per_second().is_err());
        rate.add(Rate { count: 10, seconds: 1.0 });
        rate.add(Rate { count: 10, seconds: 3.0 });
        assert_eq!(rate.per_second().unwrap(), 5.0);
    }

    #[test]
    fn what_leases_will_still_cost_is_counted_too() {
        let measured = Measured {
            cycles: Rate::default(),
            cas: Rate::default(),
            told: BTreeMap::new(),
            counted: Mutations::default(),
            own: None,
            rows: 3,
        };
        let mut said = String::new();
        assert_eq!(measured.writes_per_lease(10, &mut |line| said.push_str(line)).unwrap(), 0.4);
        assert!(said.contains("3 writes of pages with a closed row, 1 deletions of receipts"), "{said}");
        assert!(measured.writes_per_lease(0, &mut |_| {}).is_err());
    }

    /// The program itself, on a device API in miniature: every account gets its turn, and every lease that was granted is
    /// told of once.
    #[test]
    fn the_load_tells_of_every_lease_that_it_was_given() {
        let (port, answered) = device_api();
        let tokens: Vec<String> = (0..7).map(|number| format!("t{number}")).collect();
        let plan = Plan {
            address: ("127.0.0.1", port),
            tokens: &tokens,
            callers: 3,
            declared_s: DECLARED_S,
            warm_up_s: 0.1,
            // The first call of each works for half a second of it.
            seconds: 1.5,
        };
        let load: Load = here(SUSTAIN_LOAD, &plan).unwrap();
        assert_eq!(load.accounts.len(), 7);
        let granted: usize = load.accounts.iter().map(|told| told.settled.len()).sum();
        let answered = answered.lock().unwrap();
        assert_eq!(granted as u64, answered["/schedule"]);
        assert_eq!((answered["/allow"], answered["/release"]), (answered["/schedule"], answered["/schedule"]));
        for told in &load.accounts {
            assert!(!told.settled.is_empty() && told.free.is_empty() && told.either.is_empty());
            assert!(0 <= told.least_ms && told.least_ms <= told.most_ms, "{told:?}");
        }
        let worked = load.accounts.iter().filter(|told| told.least_ms >= 499).count();
        assert!(worked >= 3, "the first call of each caller works: {:?}", load.accounts);
        assert!(load.cycles > 0 && load.cycles <= granted as u64 && load.longest_ms > 0.0);
    }
}
