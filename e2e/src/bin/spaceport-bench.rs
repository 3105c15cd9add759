//! `spaceport-bench grant [--json]`: the benchmark of `cargo xtask bench`. The cluster and the charts are up when it runs.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
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
    let What::Grant { json } = Arguments::parse().what;
    let report = bench::grant(&World::connect()?, &mut |line| eprintln!("{line}"))?;
    if json {
        eprint!("\n{report}");
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}
