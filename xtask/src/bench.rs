//! `cargo xtask bench …`: numbers, most of them taken on the local cluster. Never part of the tests: a slow machine is no
//! fault.

use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use standin_nvml::State;

use crate::charts::{self, ChartsArguments};
use crate::clients;
use crate::cluster::machine::Machine;
use crate::cluster::{self, UpArguments, standin};
use crate::command::headline;
use crate::workspace::Workspace;

/// Two halves each: 16 callers find a free slot also while others are being cleared.
const CARDS: u32 = 16;

#[derive(Args)]
pub struct BenchArguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// What a durable grant costs, beside the bare compare-and-swap it rests on
    Grant {
        /// Print exactly one JSON object on standard output
        #[arg(long)]
        json: bool,
        /// Whole lease cycles a second under a steady load instead, with one operator and with two, and what a lease costs
        /// the API server
        #[arg(long)]
        sustain: bool,
        /// Seconds of leases for each number of operators (default 60)
        #[arg(long, value_name = "N", requires = "sustain", value_parser = clap::value_parser!(u64).range(10..=600))]
        seconds: Option<u64>,
    },
    /// How long nothing is granted after the leader's death, and after a cold start, with many accounts
    Recovery {
        /// Print exactly one JSON object on standard output
        #[arg(long)]
        json: bool,
        /// Accounts that the operators know
        #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        accounts: u32,
        /// Accounts of them that hold a lease; no more than there are accounts
        #[arg(long, value_name = "M", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=14_000))]
        leases: u32,
        /// Leave the accounts, and the operator's memory for them, so that the next run need not make them
        #[arg(long)]
        keep: bool,
    },
    /// How many decisions the ledger makes a second, and what an idle account costs; needs no cluster
    Ledger {
        /// Print exactly one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
}

pub fn bench(workspace: &Workspace, arguments: &BenchArguments) -> Result<()> {
    match arguments.what {
        What::Ledger { json } => ledger(workspace, json),
        What::Grant { json, .. } | What::Recovery { json, .. } => on_cluster(workspace, json, &arguments.what.words()?),
    }
}

fn ledger(workspace: &Workspace, json: bool) -> Result<()> {
    let words = ["bench", "--quiet", "--locked", "--package", "spaceport-core", "--bench", "ledger", "--"];
    let mut cargo = workspace.cargo(&words);
    if json {
        cargo.arg("--json");
    }
    let status = cargo.stdin(Stdio::null()).status().context("cannot start cargo")?;
    ensure!(status.success(), "there are no numbers (see above)");
    Ok(())
}

impl What {
    /// The words by which the benchmark is told what to measure.
    fn words(&self) -> Result<Vec<String>> {
        let text = match *self {
            Self::Ledger { .. } => "ledger".to_owned(),
            Self::Grant { sustain: false, .. } => "grant".to_owned(),
            Self::Grant { seconds: None, .. } => "grant --sustain".to_owned(),
            Self::Grant { seconds: Some(seconds), .. } => format!("grant --sustain --seconds {seconds}"),
            Self::Recovery { accounts, leases, keep, .. } => {
                ensure!(leases <= accounts, "{accounts} accounts cannot hold {leases} leases: each holds one");
                let keep = if keep { " --keep" } else { "" };
                format!("recovery --accounts {accounts} --leases {leases}{keep}")
            }
        };
        Ok(text.split(' ').map(str::to_owned).collect())
    }
}

fn on_cluster(workspace: &Workspace, json: bool, words: &[String]) -> Result<()> {
    enough_cards(workspace)?;
    headline("the local cluster");
    cluster::up(workspace, &UpArguments { cards: CARDS, real_gpu: false })?;
    headline("images and charts");
    charts::run(workspace, &ChartsArguments::default())?;
    headline("building the benchmark");
    // Without --package: the features that cargo resolves are those of the images, and so are the compiled libraries.
    let program = ["--locked", "--bin", "spaceport-bench"];
    // With optimisation, as the images: a slow client would make the API server look slow, and the ratio good.
    let built = workspace.cargo(&["build", "--release"]).args(program).stdin(Stdio::null()).status();
    ensure!(built.context("cannot start cargo")?.success(), "the benchmark does not build (see above)");
    headline("the benchmark");
    let mut run = workspace.cargo(&["run", "--release", "--quiet"]);
    run.args(program).arg("--").args(words);
    if json {
        run.arg("--json");
    }
    clients::environment(workspace, &mut run)?;
    let status = run.stdin(Stdio::null()).status().context("cannot start the benchmark")?;
    ensure!(status.success(), "the benchmark failed (see above); the cluster stays up for you to look");
    Ok(())
}

/// A cluster that is up keeps its cards here: pods that run cannot be given more device nodes.
fn enough_cards(workspace: &Workspace) -> Result<()> {
    let is_up = Machine::read(workspace)?.is_some_and(|machine| !machine.devices.is_empty());
    let state = workspace.short(standin::STATE);
    if !is_up || !state.exists() {
        return Ok(());
    }
    let cards = State::load(&state)?.cards.len();
    if cards != CARDS as usize {
        bail!(
            "the local cluster is up with {cards} card(s); the benchmark needs {CARDS}, so that 16 callers find free \
             slots. Run `cargo xtask down` and then this command again: it starts the cluster with {CARDS}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Bench {
        #[command(flatten)]
        arguments: BenchArguments,
    }

    #[test]
    fn what_is_asked_for_is_what_the_benchmark_is_told() {
        let told = |text: &str| {
            let bench = Bench::try_parse_from(text.split(' ')).map_err(|error| error.kind())?;
            Ok(bench.arguments.what.words().map_or_else(|error| error.to_string(), |words| words.join(" ")))
        };
        let is_told = |text: &str, words: &str| assert_eq!(told(text), Ok(words.to_owned()));
        is_told("bench grant --json", "grant");
        is_told("bench grant --sustain --json", "grant --sustain");
        is_told("bench grant --sustain --seconds 20", "grant --sustain --seconds 20");
        assert_eq!(told("bench grant --seconds 20"), Err(clap::error::ErrorKind::MissingRequiredArgument));
        assert_eq!(told("bench grant --sustain --seconds 5"), Err(clap::error::ErrorKind::ValueValidation));
        is_told("bench recovery --json", "recovery --accounts 100000 --leases 10000");
        is_told("bench recovery --accounts 2000 --leases 200 --keep", "recovery --accounts 2000 --leases 200 --keep");
        is_told("bench recovery --accounts 20", "20 accounts cannot hold 10000 leases: each holds one");
        // More than the receipts that an operator follows.
        assert_eq!(told("bench recovery --leases 20000"), Err(clap::error::ErrorKind::ValueValidation));
    }
}
