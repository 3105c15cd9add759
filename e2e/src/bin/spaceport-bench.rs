//! `spaceport-bench grant [--sustain] [--json]`: the benchmark of `cargo xtask bench`. The cluster and the charts are up
//! when it runs.

use std::fmt::Display;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use clap::{Parser, Subcommand};
use serde::Serialize;
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
    let What::Grant { json, sustain, seconds } = Arguments::parse().what;
    let world = World::connect()?;
    let say = &mut |line: &str| eprintln!("{line}");
    if !sustain {
        return print(&bench::grant(&world, say)?, json);
    }
    let report = bench::sustain(&world, Duration::from_secs(seconds), say)?;
    print(&report, json)?;
    let wrong = report.wrong();
    ensure!(
        wrong == 0,
        "{wrong} leases are lost or doubled; their accounts and receipts are still there, to be looked at"
    );
    Ok(())
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
