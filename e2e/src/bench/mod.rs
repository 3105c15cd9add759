//! `bench grant`: what a durable grant costs, beside the bare compare-and-swap it cannot be faster than.
//!
//! All numbers of one report come from one run on one cluster, so that their ratios mean something:
//! - `cas_ms`: PUT of the status of a GPUAccount of real size with its resourceVersion, half of the samples before and
//!   half after the calls of the one caller (whose account has a page of about that size, too);
//! - `grant_ms`: `POST /schedule` to its whole 200 answer with a free slot, one caller inside a Space's pod;
//! - `grant16_ms`: the same with 16 callers on 16 accounts at once, without pauses;
//! - `handover_ms`: from `/release` to the `succeeded` event of the call that waited, all slots taken.
//!
//! Afterwards the accounts must add up, or there is no report.

mod accounts;
mod cluster;
mod goals;
mod load;
mod memory;
mod page_write;
mod percentiles;
mod recovery;
mod report;
mod sustain;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

pub use percentiles::Percentiles;
pub use recovery::{RecoveryReport, Size, recovery};
pub use report::Report;
pub use sustain::{SustainReport, sustain};

use self::accounts::Accounts;
use self::cluster::Cluster;
use self::load::{Load, Phase};
use self::page_write::PageWriter;
use crate::kubectl::at;
use crate::story::{NAMESPACE, SPACE};
use crate::wait::now;
use crate::world::World;

/// Callers at once in the second phase.
const CALLERS: usize = 16;
/// Slots that so many callers need: one each, and some that clear while their next calls come already.
const SLOTS_MIN: usize = CALLERS + CALLERS / 2;
/// All measuring together.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// Between two calls of one caller, and between two page writes: the end of a call (settlement, receipts of this lease and
/// of one that began 2 s before) costs three writes of its own, which shall not be in the way of the next measurement. On a
/// fast disk it is this, on a slow one [`PAUSE_WRITES`] page writes.
const PAUSE_MIN: Duration = Duration::from_millis(40);
/// The three, one after the other, and as much again.
const PAUSE_WRITES: f64 = 7.0;
/// 300 calls with this pause take a third of [`TIME_LIMIT`].
const PAUSE_MAX: Duration = Duration::from_millis(150);

/// Samples of a phase: how many are tried for, and without how many there is no report.
struct Samples {
    warm_up: usize,
    wanted: usize,
    least: usize,
}

/// In each of the two halves.
const PAGE_WRITES: Samples = Samples { warm_up: 10, wanted: 110, least: 100 };
const ONE_CALLER: Samples = Samples { warm_up: 20, wanted: 220, least: 200 };
/// Of each caller. Together with the other phases below the 1000 receipts that a pool keeps for a Space by default,
/// because each receipt is counted in the end.
const MANY_CALLERS: Samples = Samples { warm_up: 3, wanted: 16, least: 13 };
const HANDOVERS: Samples = Samples { warm_up: 5, wanted: 80, least: 60 };

/// Runs the benchmark; `say` shows each step.
pub fn grant(world: &World, say: &mut dyn FnMut(&str)) -> Result<Report> {
    say("applying examples/");
    world.apply_examples()?;
    say("waiting for Space demo/hello-zero (its first start installs gradio and spaces)");
    let space = world.running(NAMESPACE, SPACE, |seen| say(&format!("  {seen}")))?;
    enough_slots(world, say)?;
    let operator_rss_mib = memory::resident_mib("spaceport-operator")?;
    let agent_rss_mib = memory::resident_mib("spaceport-device-plugin")?;

    let cluster = Cluster::connect()?;
    accounts::remove_leftovers(world, &cluster)?;
    let accounts = Accounts::named_for_this_run(CALLERS, 1);
    // After a failure they stay, with their pages and receipts, for whoever looks; the next run removes them.
    let measured = measure(world, &cluster, &accounts, &space, say)?;
    accounts.remove(world, &cluster).context("the accounts of the benchmark cannot be removed")?;

    Ok(Report::new(
        Percentiles::of(&measured.page_writes)?,
        Percentiles::of(&measured.one.milliseconds)?,
        Percentiles::of(&measured.many.milliseconds)?,
        Percentiles::of(&measured.handover.milliseconds)?,
        measured.many.per_second()?,
        operator_rss_mib,
        agent_rss_mib,
    ))
}

struct Measured {
    page_writes: Vec<f64>,
    one: Load,
    many: Load,
    handover: Load,
}

fn measure(
    world: &World,
    cluster: &Cluster,
    accounts: &Accounts,
    space: &str,
    say: &mut dyn FnMut(&str),
) -> Result<Measured> {
    say(&format!("making {CALLERS} accounts of tier bench"));
    accounts.create(world, cluster)?;
    let tokens = accounts.tokens(world, space)?;
    let mut pages = PageWriter::begin(cluster, &accounts.pages()[0], accounts.callers())?;
    let end = now() + TIME_LIMIT;

    say("page writes, first half");
    let mut page_writes = write_pages(&mut pages, end)?;
    let pause = pause(Percentiles::of(&page_writes)?.p50);
    say(&format!("  {} ms between two calls", pause.as_millis()));
    say("grants with one caller");
    let one = load::run(world, &Phase::grant(&tokens[..1], &ONE_CALLER, pause), left(end))?;
    check_samples("grants with one caller", one.milliseconds.len(), ONE_CALLER.least)?;
    say(&one.remarks());
    say("page writes, second half");
    page_writes.extend(write_pages(&mut pages, end)?);
    say(&format!("  {} bytes a page, {} writes of others in between", pages.bytes(), pages.disturbed()));
    say(&format!("grants with {CALLERS} callers"));
    let many = load::run(world, &Phase::grant(&tokens, &MANY_CALLERS, Duration::ZERO), left(end))?;
    check_samples("grants with many callers", many.milliseconds.len(), MANY_CALLERS.least * CALLERS)?;
    say(&many.remarks());
    say("hand-overs with all slots taken");
    let handover = load::run(world, &Phase::handover(&tokens, &HANDOVERS, pause), left(end))?;
    check_samples("hand-overs", handover.milliseconds.len(), HANDOVERS.least)?;
    say(&handover.remarks());

    pages.close_page()?;
    say("checking that the accounts add up");
    let mut granted = vec![0; CALLERS];
    for load in [&one, &many, &handover] {
        for (sum, more) in granted.iter_mut().zip(&load.granted) {
            *sum += more;
        }
    }
    let total = accounts.check(world, &granted)?;
    say(&format!("  {} leases, {} ms charged, all on their receipts, nothing held", total.leases, total.charged_ms));
    say(&format!("  the largest page of a caller has {} bytes", total.page_bytes));
    Ok(Measured { page_writes, one, many, handover })
}

fn write_pages(pages: &mut PageWriter<'_>, end: Instant) -> Result<Vec<f64>> {
    let samples = pages.measure(PAGE_WRITES.warm_up, PAGE_WRITES.wanted, PAUSE_MIN, end)?;
    check_samples("page writes", samples.len(), PAGE_WRITES.least)?;
    Ok(samples)
}

fn left(end: Instant) -> Duration {
    end.saturating_duration_since(now())
}

fn pause(page_write_ms: f64) -> Duration {
    Duration::from_secs_f64(page_write_ms * PAUSE_WRITES / 1000.0).clamp(PAUSE_MIN, PAUSE_MAX)
}

fn check_samples(what: &str, found: usize, least: usize) -> Result<()> {
    let limit = TIME_LIMIT.as_secs();
    ensure!(found >= least, "{what}: {found} samples, {least} are needed; the whole run may take {limit} s");
    Ok(())
}

/// The slots that the callers find, or how to get more.
fn enough_slots(world: &World, say: &mut dyn FnMut(&str)) -> Result<usize> {
    let nodes = world.kubectl.items(&["get", "gpunodes"])?;
    let slots = large_slots(&nodes);
    say(&format!("{slots} large slots"));
    ensure!(
        slots >= SLOTS_MIN,
        "the node has {slots} large slots; {CALLERS} callers that all find a free one need {SLOTS_MIN}. Run \
         `cargo xtask down` and then `cargo xtask bench grant`, which starts the cluster with 16 cards"
    );
    Ok(slots)
}

fn large_slots(nodes: &[Value]) -> usize {
    let list = |value: &Value, pointer: &str| at(value, pointer).as_array().cloned().unwrap_or_default();
    nodes
        .iter()
        .flat_map(|node| list(node, "/status/cards"))
        .flat_map(|card| list(&card, "/slots"))
        .filter(|slot| slot["size"] == "large" && slot["state"] != "Quarantined")
        .count()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_large_slots_that_can_be_granted_count() {
        let slot = |size: &str, state: &str| json!({ "size": size, "state": state });
        let slots = [slot("large", "Free"), slot("large", "Quarantined"), slot("xlarge", "Free")];
        let node = json!({ "status": { "cards": [{ "slots": slots }, { "slots": slots }, {}] } });
        assert_eq!(large_slots(&[node, json!({})]), 2);
    }

    #[test]
    fn a_slow_disk_gets_longer_pauses_within_bounds() {
        let of = |page_write_ms| pause(page_write_ms).as_millis();
        assert_eq!((of(2.5), of(10.0), of(60.0)), (40, 70, 150));
    }

    #[test]
    fn all_receipts_of_a_run_fit_what_a_pool_keeps() {
        let calls = |samples: &Samples| samples.warm_up + samples.wanted;
        // Each caller may be sent to the queue once in a while and try again; a third more is plenty.
        let all = calls(&ONE_CALLER) + CALLERS * calls(&MANY_CALLERS) + calls(&HANDOVERS) + 2 * CALLERS;
        assert!(all * 4 / 3 < 1000, "{all}");
    }
}
