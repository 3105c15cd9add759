//! `spaceport-sim run` lives through many histories, or tells one again; `spaceport-sim mutants` shows that the checks see
//! what is wrong.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use spaceport_sim::coverage::Scenario;
use spaceport_sim::runs::{self, Summary};
use spaceport_sim::weather::FaultKind;
use spaceport_sim::world::Told;

/// Fewer seeds than this are too few for every scenario to happen.
const SEEDS_FOR_COVERAGE: u64 = 10_000;
/// Lines of a failed history that are shown; all of them come with --trace.
const LAST_LINES: usize = 40;

#[derive(Parser)]
#[command(version, about = "Seeded simulation of the Spaceport ledger (docs/simulation.md)")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Lives through histories and checks every rule at every step
    Run(RunArguments),
    /// Shows that what is wrong on purpose is seen
    #[cfg(feature = "mutants")]
    Mutants(MutantsArguments),
}

#[derive(Args)]
struct RunArguments {
    /// How many seeds
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Threads; as many as there are processors without it
    #[arg(long)]
    threads: Option<usize>,
    /// Only this seed
    #[arg(long)]
    seed: Option<u64>,
    /// With --seed: print all that happens
    #[arg(long, requires = "seed")]
    trace: bool,
    /// With --seed: what is wrong on purpose
    #[cfg(feature = "mutants")]
    #[arg(long, requires = "seed")]
    mutant: Option<String>,
}

#[cfg(feature = "mutants")]
#[derive(Args)]
struct MutantsArguments {
    /// Seeds within which each must be seen
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// Threads; as many as there are processors without it
    #[arg(long)]
    threads: Option<usize>,
}

fn main() -> ExitCode {
    let healthy = match Arguments::parse().what {
        What::Run(arguments) => run(&arguments),
        #[cfg(feature = "mutants")]
        What::Mutants(arguments) => mutants(&arguments),
    };
    if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn threads(wanted: Option<usize>) -> usize {
    wanted.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1)
}

fn run(arguments: &RunArguments) -> bool {
    if let Some(seed) = arguments.seed {
        return run_one(arguments, seed);
    }
    let summary = runs::run(arguments.first, arguments.seeds, threads(arguments.threads));
    print_coverage(&summary);
    for told in &summary.failures {
        print_failure(told);
    }
    print_summary(&summary);
    let missing = if arguments.seeds >= SEEDS_FOR_COVERAGE { summary.coverage.missing() } else { Vec::new() };
    for scenario in &missing {
        println!("never happened: {}", scenario.as_str());
    }
    summary.failed == 0 && missing.is_empty()
}

#[cfg(feature = "mutants")]
fn run_one(arguments: &RunArguments, seed: u64) -> bool {
    let row = |name: &String| spaceport_sim::mutants::TABLE.iter().find(|row| row.broken.name() == *name);
    let broken = match arguments.mutant.as_ref().map(|name| (name, row(name))) {
        None => None,
        Some((_, Some(row))) => Some(row.broken),
        Some((name, None)) => {
            println!("there is no mutant {name}");
            return false;
        }
    };
    tell_one(seed, broken, arguments.trace)
}

#[cfg(not(feature = "mutants"))]
fn run_one(arguments: &RunArguments, seed: u64) -> bool {
    tell_one(seed, None, arguments.trace)
}

fn tell_one(seed: u64, broken: Option<spaceport_sim::broken::Broken>, trace: bool) -> bool {
    let told = runs::tell(seed, broken, true);
    let skipped = if trace { 0 } else { told.lines.len().saturating_sub(LAST_LINES) };
    for line in told.lines.iter().skip(skipped) {
        println!("{line}");
    }
    match &told.violation {
        None => println!("seed {seed}: {} steps, every rule held", told.steps),
        Some(violation) => println!("SEED={seed} {violation}"),
    }
    told.violation.is_none()
}

/// The violation, what led to it, and how to see all of it.
fn print_failure(told: &Told) {
    let Some(violation) = &told.violation else { return };
    println!("\nSEED={} {violation}", told.seed);
    let again = runs::tell(told.seed, None, true);
    for line in again.lines.iter().skip(again.lines.len().saturating_sub(LAST_LINES)) {
        println!("  {line}");
    }
    println!("  all of it: cargo xtask sim --seed {} --trace", told.seed);
}

fn print_coverage(summary: &Summary) {
    println!("{:>12} {:>9}  what happened", "times", "seeds");
    for scenario in Scenario::ALL {
        let (times, seeds) = (summary.coverage.count(*scenario), summary.coverage.seeds(*scenario));
        println!("{times:>12} {seeds:>9}  {}", scenario.as_str());
    }
    println!("{:>12} {:>9}  fault", "times", "");
    for kind in FaultKind::all() {
        println!("{:>12} {:>9}  {kind:?}", summary.faults[kind as usize], "");
    }
}

fn print_summary(summary: &Summary) {
    let grants = summary.coverage.count(Scenario::Granted);
    let faults: u64 = summary.faults.iter().sum();
    println!(
        "{} seeds, {} steps, {grants} grants, {} charges of {} s together, {faults} faults, {} violations",
        summary.seeds,
        summary.steps,
        summary.coverage.count(Scenario::Charged),
        summary.charged_ms / 1000,
        summary.failed
    );
}

#[cfg(feature = "mutants")]
fn mutants(arguments: &MutantsArguments) -> bool {
    let threads = threads(arguments.threads);
    if let Some(told) = runs::first_failure(0, arguments.seeds, threads, None, |_| true) {
        println!("the healthy world fails, so nothing is shown by the others");
        print_failure(&told);
        return false;
    }
    println!("| Mutant | Against | What is wrong | Seen at seed | As |");
    println!("| --- | --- | --- | --- | --- |");
    let mut all = true;
    for row in spaceport_sim::mutants::TABLE {
        let (name, against, what) = (row.broken.name(), row.against, row.what);
        match spaceport_sim::mutants::catch(row, arguments.seeds, threads) {
            Some(caught) => println!("| {name} | {against} | {what} | {} | {} |", caught.seed, caught.violation),
            None => {
                all = false;
                println!("| {name} | {against} | {what} | - | NOT SEEN in {} seeds |", arguments.seeds);
            }
        }
    }
    all
}
