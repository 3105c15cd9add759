//! `cargo xtask …`: everything a newcomer needs, from prerequisites to a running cluster.
//!
//! Only programs of the machine and pinned Go modules are started; there is no container engine, no registry and
//! no downloaded binary. See `README.md` for the two commands to begin with.

mod bench;
mod cargo_deny;
mod charts;
mod clients;
mod cluster;
mod command;
mod demo;
mod down;
mod fuzz;
mod generate;
mod images;
mod kubectl;
mod prerequisites;
mod simulation;
mod test;
mod wait;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::{HostSettings, Workspace};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, version, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    host: HostSettings,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Starts the local cluster (or what is missing of it) and waits until its node is Ready
    Up(cluster::UpArguments),
    /// Ends the local cluster and puts the machine back as it was, also after a crash
    Down,
    /// Runs kubectl against the local cluster: `cargo xtask kubectl get spaces -A`
    #[command(disable_help_flag = true)]
    Kubectl(kubectl::KubectlArguments),
    /// Builds the images and imports those that the cluster lacks
    Images(images::ImagesArguments),
    /// Builds the images and installs or upgrades the charts on the local cluster
    Charts(charts::ChartsArguments),
    /// Everything from nothing: the cluster, the charts, an app, three calls and their receipts
    Demo,
    /// Every check but the crash matrix, or one class: unit, api, e2e, crash
    Test(test::TestArguments),
    /// Simulates the ledger, checks its protocol, replays demand under several queueing policies
    #[command(disable_help_flag = true)]
    Sim(simulation::SimulationArguments),
    /// Makes up what strangers, nodes and old files may say, guided by the code that reads it
    Fuzz(fuzz::FuzzArguments),
    /// Measures, in one run
    Bench(bench::BenchArguments),
    /// Writes the files that are generated from the Rust types
    Gen(generate::GenerateArguments),
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

fn run() -> Result<()> {
    let Arguments { host, command } = Arguments::parse();
    let workspace = Workspace::locate(host)?;
    match command {
        Action::Up(arguments) => cluster::up(&workspace, &arguments),
        Action::Down => {
            let _alone = cluster::machine::alone()?;
            down::down(&workspace)
        }
        Action::Kubectl(arguments) => kubectl::run(&workspace, &arguments),
        Action::Images(arguments) => images::run_command(&workspace, &arguments),
        Action::Charts(arguments) => charts::run(&workspace, &arguments),
        Action::Demo => demo::demo(&workspace),
        Action::Test(arguments) => test::run_tests(&workspace, &arguments),
        Action::Sim(arguments) => simulation::simulate(&workspace, &arguments),
        Action::Fuzz(arguments) => fuzz::fuzz(&workspace, &arguments),
        Action::Bench(arguments) => bench::bench(&workspace, &arguments),
        Action::Gen(arguments) => generate::run(&workspace, &arguments),
    }
}
