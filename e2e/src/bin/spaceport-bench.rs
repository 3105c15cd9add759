//! `spaceport-bench grant [--sustain] [--json]` and `spaceport-bench recovery [--json]`: the benchmarks of `cargo xtask bench`
//! on the cluster. It is up, with the charts, when they run.

use std::fmt::Display;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use clap::{Parser, Subcommand};
use serde::Serialize;
use spaceport_e2e::bench::Size;
use spaceport_e2e::{World, bench};

#[derive(Parser)]
#[command(about, version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// What a grant costs, beside the bare write of a page
    Grant {
        /// Print one JSON object on standard output and everything else on standard error
        #[arg(long)]
        json: bool,
        /// Whole lease cycles under a steady load instead, with one operator and with two
        #[arg(long)]
        sustain: bool,
        /// Seconds of leases for each number of operators
        #[arg(long, value_name = "N", requires = "sustain", default_value_t = 60,
            value_parser = clap::value_parser!(u64).range(10..=600))]
        seconds: u64,
    },
    /// How long nothing is granted after the leader's death and after a cold start. The cluster is to end with it
    Recovery {
        /// Print one JSON object on standard output and everything else on standard error
        #[arg(long)]
        json: bool,
        /// Accounts that the operators know
        #[arg(long, value_name = "N", default_value_t = 100_000)]
        accounts: usize,
        /// Accounts of them that hold a lease
        #[arg(long, value_name = "M", default_value_t = 10_000)]
        leases: usize,
    },
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain is for people; a backtrace, which anyhow adds where RUST_BACKTRACE is set, says them nothing.
            eprintln!("error: {error}");
            error.chain().skip(1).for_each(|cause| eprintln!("  because: {cause}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let what = Arguments::parse().what;
    let world = World::connect()?;
    let say = &mut |line: &str| eprintln!("{line}");
    match what {
        What::Grant { json, sustain: false, .. } => print(&bench::grant(&world, say)?, json),
        What::Grant { json, sustain: true, seconds } => {
            let report = bench::sustain(&world, Duration::from_secs(seconds), say)?;
            print(&report, json)?;
            let wrong = report.wrong();
            ensure!(
                wrong == 0,
                "{wrong} leases are lost or doubled; their accounts and receipts are still there, to be looked at"
            );
            Ok(())
        }
        What::Recovery { json, accounts, leases } => {
            print(&bench::recovery(&world, Size { accounts, leases }, say)?, json)
        }
    }
}

fn print(report: &(impl Display + Serialize), json: bool) -> anyhow::Result<()> {
    if json {
        eprint!("\n{report}");
        println!("{}", serde_json::to_string(report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}
