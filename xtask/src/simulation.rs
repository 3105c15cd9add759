//! `cargo xtask sim …`: the ledger in a simulated cluster, its protocol in a model checker, and its queue on traces. The
//! programs are built with optimisation, for they live through thousands of histories.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::command::headline;
use crate::workspace::Workspace;

/// Told instead of the words of one program, as they go to three.
const HELP: &str = "\
Simulates the ledger, checks its protocol, and replays demand under several queueing policies

cargo xtask sim --seeds N             N histories of a simulated cluster, every rule checked at every step
cargo xtask sim --seed S --trace      one of them again, with all that happens
cargo xtask sim --mutants             breaks each rule on purpose and shows that the checks see it
cargo xtask sim --model               every order of events of a small cluster
cargo xtask sim --generate --load 1.2 waits under each policy, for demand in the shape of real demand
cargo xtask sim --trace FILE.csv      the same for a trace: arrival_s,duration_s,gpu_fraction_or_count,user[,declared_s[,tier[,function]]]

With --help behind one of them: all its options.";

#[derive(Args)]
pub struct SimulationArguments {
    /// For the program that they are meant for
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

const LEDGER: Program = Program { name: "spaceport-sim", features: &["--features", "mutants"] };
const MODEL: Program = Program { name: "spaceport-model", features: &[] };
const REPLAY: Program = Program { name: "spaceport-replay", features: &[] };

/// A package of the workspace with one binary.
struct Program {
    name: &'static str,
    features: &'static [&'static str],
}

pub fn simulate(workspace: &Workspace, arguments: &SimulationArguments) -> Result<()> {
    let words: Vec<&str> = arguments.words.iter().map(String::as_str).collect();
    let has = |word: &str| words.iter().any(|other| *other == word || other.starts_with(&format!("{word}=")));
    let without = |word: &str| words.iter().copied().filter(|other| *other != word).collect::<Vec<_>>();
    if words == ["--help"] || words == ["-h"] || words.is_empty() {
        println!("{HELP}");
        return Ok(());
    }
    if has("--mutants") {
        return LEDGER.run(workspace, &[&["mutants"], &without("--mutants")[..]].concat());
    }
    if has("--model") {
        return MODEL.run(workspace, &without("--model"));
    }
    // A seed's --trace is its log; without a seed it is a file.
    if !has("--seed") && (has("--trace") || has("--generate")) {
        return REPLAY.run(workspace, &words);
    }
    LEDGER.run(workspace, &[&["run"], &words[..]].concat())
}

/// What the test command does of it.
pub fn test(workspace: &Workspace) -> Result<()> {
    headline("10,000 histories of a simulated cluster");
    LEDGER.run(workspace, &["run", "--seeds", "10000"])?;
    headline("every order of events of small clusters");
    MODEL.run(workspace, &[])
}

impl Program {
    fn run(&self, workspace: &Workspace, words: &[&str]) -> Result<()> {
        // With --package, or else cargo would not hear of the feature.
        let mut cargo = workspace.cargo(&["run", "--release", "--quiet", "--locked", "--package", self.name]);
        cargo.args(self.features).arg("--").args(words);
        let status = cargo.stdin(Stdio::null()).status().context("cannot start cargo")?;
        ensure!(status.success(), "{} says that something is wrong (see above)", self.name);
        Ok(())
    }
}
