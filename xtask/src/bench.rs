//! `cargo xtask bench …`: numbers, most of them taken on the local cluster. Never part of the tests: a slow machine is no
//! fault.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use standin_nvml::State;

use crate::charts::{self, ChartsArguments};
use crate::clients;
use crate::cluster::machine::{self, Machine};
use crate::cluster::{self, UpArguments, standin};
use crate::command::headline;
use crate::down;
use crate::workspace::{Workspace, write_atomically};

/// Two halves each: 16 callers find a free slot also while others are being cleared.
const CARDS: u32 = 16;
/// Values of the chart on the cluster of `bench recovery`, below `target/local`: no other cluster has them, and they go
/// with it, so that by them a run knows the cluster that an earlier one left.
const RECOVERY_VALUES: &str = "recovery-bench-values.yaml";
/// A million accounts, the most that can be asked for, take some 5 GiB: what is looked for is what an operator takes, and no
/// run shall find this limit instead.
const RECOVERY_MEMORY: &str = "operator: { resources: { limits: { memory: 8Gi } } }\n";

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
    /// How long nothing is granted after the leader's death, and after a cold start, with many accounts. On a cluster of
    /// its own, which it starts and ends with everything in it: refused while any other is up
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
        /// Leave the cluster with its accounts, so that the next run need not make them. That run ends it, or `cargo xtask
        /// down`
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
        What::Grant { json, .. } => {
            let words = arguments.what.words()?;
            up(workspace)?;
            on_cluster(workspace, &ChartsArguments::default(), json, &words)
        }
        What::Recovery { json, keep, .. } => recovery(workspace, json, keep, &arguments.what.words()?),
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
            // Whether the cluster stays is nothing that is measured.
            Self::Recovery { accounts, leases, .. } => {
                ensure!(leases <= accounts, "{accounts} accounts cannot hold {leases} leases: each holds one");
                format!("recovery --accounts {accounts} --leases {leases}")
            }
        };
        Ok(text.split(' ').map(str::to_owned).collect())
    }
}

/// On a cluster of its own that ends with it: removing so many accounts, each with a finalizer and a page, takes longer than
/// making and measuring them.
fn recovery(workspace: &Workspace, json: bool, keep: bool, words: &[String]) -> Result<()> {
    let values = recovery_values(workspace)?;
    up(workspace)?;
    // Only now: were `up` to fail, the next cluster here could be somebody's.
    write_atomically(&values, RECOVERY_MEMORY.as_bytes())?;
    on_cluster(workspace, &ChartsArguments { values: vec![values] }, json, words)?;
    if keep {
        headline("the cluster stays up with its accounts: this command uses it again, `cargo xtask down` ends it");
        return Ok(());
    }
    // Everything is printed by now, and stays true if this fails.
    let _alone = machine::alone()?;
    down::down(workspace).context("the numbers above are whole, but the benchmark's cluster is still there")
}

/// Where the values are, or are to be; refused on a cluster that `bench recovery` did not make.
fn recovery_values(workspace: &Workspace) -> Result<PathBuf> {
    let values = workspace.local.join(RECOVERY_VALUES);
    // Also a cluster that was up before a reboot: what is in it is still there.
    let is_anothers = !values.exists() && Machine::read(workspace)?.is_some();
    ensure!(
        !is_anothers,
        "there is a local cluster, and this benchmark ends its cluster with everything in it: run `cargo xtask down`, if \
         nothing in it is needed any more, and then this command again, which starts one of its own"
    );
    Ok(values)
}

fn up(workspace: &Workspace) -> Result<()> {
    enough_cards(workspace)?;
    headline("the local cluster");
    cluster::up(workspace, &UpArguments { cards: CARDS, real_gpu: false })
}

/// The benchmark on the cluster that is up.
fn on_cluster(workspace: &Workspace, charts: &ChartsArguments, json: bool, words: &[String]) -> Result<()> {
    headline("images and charts");
    charts::run(workspace, charts)?;
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
    use crate::workspace::HostSettings;

    #[derive(Parser)]
    struct Bench {
        #[command(flatten)]
        arguments: BenchArguments,
    }

    #[derive(Parser)]
    struct Settings {
        #[command(flatten)]
        host: HostSettings,
    }

    #[test]
    fn a_cluster_that_the_recovery_did_not_make_is_not_ended_by_it() {
        let folder = std::env::temp_dir().join(format!("spaceport-recovery-{}", std::process::id()));
        let host = Settings::parse_from(["x", "--home", "/home/somebody"]).host;
        let mut workspace = Workspace::locate(host).unwrap();
        workspace.local = folder.join("local");
        workspace.run = folder.join("run");
        let values = recovery_values(&workspace).unwrap();
        Machine::default().write(&workspace).unwrap();
        let refused = recovery_values(&workspace).unwrap_err().to_string();
        write_atomically(&values, RECOVERY_MEMORY.as_bytes()).unwrap();
        let own = recovery_values(&workspace);
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(refused.contains("run `cargo xtask down`"), "{refused}");
        assert_eq!(own.unwrap(), values);
        let read: serde_json::Value = serde_norway::from_str(RECOVERY_MEMORY).unwrap();
        assert_eq!(read["operator"]["resources"]["limits"]["memory"], "8Gi");
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
        is_told("bench recovery --accounts 2000 --leases 200 --keep", "recovery --accounts 2000 --leases 200");
        is_told("bench recovery --accounts 20", "20 accounts cannot hold 10000 leases: each holds one");
        // More than the receipts that an operator follows.
        assert_eq!(told("bench recovery --leases 20000"), Err(clap::error::ErrorKind::ValueValidation));
    }
}
