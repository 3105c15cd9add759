//! `cargo xtask fuzz …`: the targets of `fuzz/`. Nothing is installed for it: libFuzzer comes with a crate, and
//! `xtask/programs/rustc-coverage` makes our libraries tell it which ways they took.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::command::{headline, progress};
use crate::images;
use crate::prerequisites;
use crate::wait;
use crate::workspace::Workspace;

/// The targets, and how many inputs of each the test command makes up: what takes a few seconds. A signature is made and
/// checked several times for each token, and for each key; a trace is replayed under each policy.
const TARGETS: [(&str, u32); 8] = [
    ("account_status", 20_000),
    ("checkpoint", 10_000),
    ("device_api", 100_000),
    ("nodelink_orders", 10_000),
    ("nodelink_reports", 10_000),
    ("replay_trace", 10_000),
    ("token", 10_000),
    ("token_keys", 10_000),
];

/// Of every run: longest input, seconds for one, memory. A page has a few hundred KiB at most, but what is wrong in a long
/// one is wrong in a short one.
const BOUNDS: [&str; 3] = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=2048"];

#[derive(Args)]
pub struct FuzzArguments {
    /// Which target: a file name in fuzz/fuzz_targets; all, one after the other, without a word
    target: Option<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Run the target on this file alone, for example on one that was found
    #[arg(long, requires = "target", value_name = "FILE")]
    input: Option<PathBuf>,
}

/// One target.
struct Target<'a> {
    workspace: &'a Workspace,
    name: &'a str,
    program: PathBuf,
}

pub fn fuzz(workspace: &Workspace, arguments: &FuzzArguments) -> Result<()> {
    prerequisites::building(workspace)?;
    let FuzzArguments { target, seconds, input } = arguments;
    let known = TARGETS.map(|(name, _)| name);
    let wanted: Vec<&str> =
        known.into_iter().filter(|name| target.as_ref().is_none_or(|target| target == name)).collect();
    ensure!(!wanted.is_empty(), "there is no such target; these are: {}", known.join(", "));
    for target in build(workspace, &wanted)? {
        match input {
            Some(input) => target.input(input)?,
            None => target.longer(*seconds)?,
        }
    }
    Ok(())
}

/// What the test command does of it: the same inputs each time, as far as the code is the same.
pub fn test(workspace: &Workspace) -> Result<()> {
    headline("fuzz targets");
    for (target, (_, runs)) in build(workspace, &TARGETS.map(|(name, _)| name))?.iter().zip(TARGETS) {
        target.bounded(runs)?;
    }
    Ok(())
}

/// Builds the targets beside what the tests have built, of which only our own libraries are compiled anew.
fn build<'a>(workspace: &'a Workspace, names: &[&'a str]) -> Result<Vec<Target<'a>>> {
    progress("building them");
    let mut cargo =
        workspace.cargo(&["build", "--workspace", "--locked", "--message-format=json-render-diagnostics", "--quiet"]);
    cargo.env("RUSTC_WORKSPACE_WRAPPER", workspace.root.join("xtask/programs/rustc-coverage"));
    names.iter().for_each(|name| {
        cargo.args(["--bin", name]);
    });
    let artifacts = images::cargo::artifacts(&mut cargo)?;
    let programs: BTreeMap<&str, &str> = artifacts
        .iter()
        .filter_map(|artifact| Some((artifact["target"]["name"].as_str()?, artifact["executable"].as_str()?)))
        .collect();
    let of = |name: &&'a str| {
        let program = PathBuf::from(programs.get(name).with_context(|| format!("cargo has not built {name}"))?);
        Ok(Target { workspace, name, program })
    };
    names.iter().map(of).collect()
}

impl Target<'_> {
    /// A number of inputs, from the seeds on.
    fn bounded(&self, runs: u32) -> Result<()> {
        // Empty each time, so that nothing of an earlier run decides what is made up in this one.
        let grown = self.folder("test");
        if grown.exists() {
            fs::remove_dir_all(&grown).with_context(|| format!("cannot empty {}", grown.display()))?;
        }
        self.run(&grown, &[format!("-runs={runs}"), "-seed=1".to_owned()])
    }

    /// For a time, from where the last such run has ended.
    fn longer(&self, seconds: u32) -> Result<()> {
        progress(&format!("{} for {seconds} s", self.name));
        self.run(&self.folder("corpus"), &[format!("-max_total_time={seconds}")])
    }

    fn input(&self, input: &Path) -> Result<()> {
        let input = std::path::absolute(input).with_context(|| format!("{} is no path", input.display()))?;
        let status = self.command().arg(&input).status().context("cannot start the target")?;
        ensure!(status.success(), "{} does not survive {} (see above)", self.name, input.display());
        Ok(())
    }

    fn run(&self, grown: &Path, limits: &[String]) -> Result<()> {
        let found = self.folder("found");
        for folder in [grown, &found] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let dictionary = self.of_fuzz("dictionaries").with_extension("dict");
        let mut command = self.command();
        command.args(BOUNDS).args(limits).arg(format!("-artifact_prefix={}/", found.display()));
        if dictionary.exists() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        let begin = wait::now();
        let output = command.arg(grown).arg(self.of_fuzz("seeds")).output().context("cannot start the target")?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let lines: Vec<&str> = said.lines().collect();
            bail!(
                "{} has found something:\n{}\n\nAgain: cargo xtask fuzz {} --input FILE. Keep the file as {}/found-…, \
                 and make it a unit test of the crate at fault",
                self.name,
                lines[lines.len().saturating_sub(40)..].join("\n"),
                self.name,
                self.of_fuzz("seeds").display(),
            );
        }
        let Some((inputs, ways)) = done(&said) else { bail!("{} did not say how it ended: {said}", self.name) };
        ensure!(ways > 100, "{} saw {ways} ways through the code: it is not built with coverage", self.name);
        let seconds = begin.elapsed().as_secs_f32();
        progress(&format!("{}: {inputs} inputs, {ways} ways through the code, {seconds:.1} s", self.name));
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // A backtrace of each panic costs more than the runs do; whoever looks at one finding sets it.
        command.env("RUST_BACKTRACE", "0").current_dir(&self.workspace.root).stdin(Stdio::null());
        command
    }

    fn folder(&self, what: &str) -> PathBuf {
        self.workspace.root.join("target/fuzz").join(what).join(self.name)
    }

    fn of_fuzz(&self, what: &str) -> PathBuf {
        self.workspace.root.join("fuzz").join(what).join(self.name)
    }
}

/// Inputs and covered ways in libFuzzer's last words: `#20000  DONE   cov: 812 ft: 2301 corp: …`.
fn done(said: &str) -> Option<(u64, u64)> {
    let mut words = said.lines().find(|line| line.contains("DONE") && line.starts_with('#'))?.split_whitespace();
    let inputs = words.next()?.trim_start_matches('#').parse().ok()?;
    words.find(|word| *word == "cov:")?;
    Some((inputs, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_libfuzzer_are_understood() {
        let said = "INFO: Seed: 1\n#2\tINITED cov: 4 ft: 5\n\
                    #20000\tDONE   cov: 812 ft: 2301 corp: 97/8Kb lim: 4096 exec/s: 5000 rss: 60Mb\nDone 20000 runs\n";
        assert_eq!(done(said), Some((20_000, 812)));
        assert_eq!(done("#2 INITED cov: 4"), None);
    }

    #[test]
    fn every_target_is_there_with_its_seeds() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let names = |folder: &str| -> Vec<String> {
            let entries = fs::read_dir(fuzz.join(folder)).unwrap().map(|entry| entry.unwrap().path());
            let mut names: Vec<String> =
                entries.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        };
        let ours = TARGETS.map(|(name, _)| name.to_owned()).to_vec();
        assert_eq!((names("fuzz_targets"), names("seeds")), (ours.clone(), ours));
    }
}
