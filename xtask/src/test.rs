//! `cargo xtask test [unit|api|e2e|crash]`: the checks, in the order in which they are cheap. `crash` takes a quarter of an hour
//! and is only run when it is named.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::charts::{self, ChartsArguments};
use crate::cluster::{self, UpArguments, binaries, control_plane};
use crate::command::{command, headline, progress, run};
use crate::generate::{self, GenerateArguments};
use crate::images::{self, Name};
use crate::workspace::Workspace;
use crate::{cargo_deny, clients, fuzz, prerequisites, simulation};

/// Rendered for the Kubernetes of the local cluster: a helm that is built from its module believes in a much older one.
const TEMPLATE: [&str; 4] = ["template", "spaceport", "--kube-version", "1.34.4"];

#[derive(Args)]
pub struct TestArguments {
    /// Which class; all of them but `crash` without a word
    class: Option<Class>,
    /// Of `e2e`: only the stories and faults with this in their name. Of `crash`: only such places
    #[arg(long, default_value = "")]
    only: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Class {
    /// Style, generated files, charts, unit and property tests: needs no cluster
    Unit,
    /// Schemas, CEL and admission on a real API server
    Api,
    /// The stories on the real node
    E2e,
    /// kill -9 of operator, agent, API server and kubelet at each place of a lease's path
    Crash,
}

pub fn run_tests(workspace: &Workspace, arguments: &TestArguments) -> Result<()> {
    ensure!(
        arguments.only.is_empty() || matches!(arguments.class, Some(Class::E2e | Class::Crash)),
        "--only {:?} chooses stories or places of the crash matrix: `cargo xtask test e2e --only …`, or `crash`",
        arguments.only
    );
    prerequisites::building(workspace)?;
    let wanted = |class| arguments.class.is_none_or(|only| only == class);
    let mut passed = 0;
    if wanted(Class::Unit) {
        passed += unit(workspace)?;
    }
    let crash = arguments.class == Some(Class::Crash);
    if wanted(Class::Api) || wanted(Class::E2e) || crash {
        headline("the local cluster with the charts");
        cluster::up(workspace, &UpArguments::default())?;
        charts::run(workspace, &ChartsArguments::default())?;
    }
    if wanted(Class::Api) {
        headline("the operator on an API server of its own");
        passed += operator_tests(workspace)?;
        headline("tests on the real API server");
        passed += cluster_tests(workspace, &["api"], "", &[])?;
    }
    if wanted(Class::E2e) {
        headline("root tests of the node agent");
        let only = arguments.only.as_str();
        let gate = ["--features", "spaceport-device-plugin/root-tests", "--test", "gate"];
        passed += cargo_tests(workspace, &gate, &[only], &[])?;
        headline("stories on the real node");
        passed += cluster_tests(workspace, &["node_stories"], only, &[])?;
        headline("the same stories on what is broken on purpose");
        passed += with_breakable(workspace, &["broken_on_purpose"], &[("SPACEPORT_FAULTS_ONLY", only)])?;
    }
    if crash {
        headline("everyone may die everywhere");
        passed += with_breakable(workspace, &["crash_matrix"], &[("SPACEPORT_CRASH_ONLY", &arguments.only)])?;
    }
    println!("{passed} tests passed");
    Ok(())
}

fn unit(workspace: &Workspace) -> Result<usize> {
    let cargo = |words: &[&str]| workspace.cargo(words);
    headline("rustfmt");
    run(&mut cargo(&["fmt", "--all", "--check"]))?;
    headline("generated files");
    generate::run(workspace, &GenerateArguments { check: true })?;
    headline("charts");
    lint_charts(workspace)?;
    headline("clippy, warnings denied");
    shown(&mut cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--all-features",
        "--locked",
        "--",
        "--deny",
        "warnings",
    ]))?;
    headline("cargo-deny");
    let deny = cargo_deny::program(workspace)?;
    run(command(
        deny,
        &["--all-features", "--locked", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"],
    )
    .current_dir(&workspace.root))?;
    headline("unit and property tests");
    let passed = cargo_tests(workspace, &[], &[], &[])?;
    simulation::test(workspace)?;
    fuzz::test(workspace)?;
    Ok(passed)
}

fn lint_charts(workspace: &Workspace) -> Result<()> {
    let helm = binaries::helm(workspace)?;
    // Names only: what the values must be like is what the schema says.
    let images = ["operator", "devicePlugin", "python", "tools"];
    let settings: Vec<String> =
        images.iter().map(|image| format!("images.{image}=example.com/spaceport:0.1.0")).collect();
    for chart in ["charts/spaceport-crds", "charts/spaceport"] {
        for verb in [&["lint", "--quiet"][..], &TEMPLATE[..]] {
            let mut helm = command(&helm, verb);
            helm.arg(workspace.root.join(chart));
            if chart.ends_with("spaceport") {
                for setting in &settings {
                    helm.args(["--set", setting]);
                }
            }
            run(&mut helm)?;
        }
    }
    // The schema must be able to say no.
    for (wrong, why) in [
        ("operator.replicas=0", "no replica"),
        ("images.operator=example.com/operator:latest", "a moving tag"),
        ("devicePlugin.kubeletRootDir=relative", "a relative path"),
        ("operators.replicas=1", "a misspelt value"),
    ] {
        let mut helm = command(&helm, &TEMPLATE);
        helm.arg(workspace.root.join("charts/spaceport")).args(["--set", wrong]);
        let output = helm.output().context("cannot start helm")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && said.contains("schema"),
            "values.schema.json takes {wrong} ({why}): {said}"
        );
    }
    Ok(())
}

/// Terms, leader election, pages and receipts, where no installed operator is in the way.
fn operator_tests(workspace: &Workspace) -> Result<usize> {
    let kubeconfig = control_plane::ensure_for_tests(workspace)?;
    let kubeconfig = kubeconfig.to_str().context("the path of the checkout is not UTF-8")?;
    let test = ["--features", "spaceport-operator/api-server", "--test", "api_server"];
    // The tests elect leaders of one and the same Lease.
    let passed = cargo_tests(workspace, &test, &["--test-threads", "1"], &[("SPACEPORT_TEST_KUBECONFIG", kubeconfig)]);
    control_plane::end_for_tests(workspace)?;
    passed
}

/// Tests that replace operator and agent by builds for tests for a while, and put them back.
fn with_breakable(workspace: &Workspace, tests: &[&str], variables: &[(&str, &str)]) -> Result<usize> {
    let images = images::build(workspace, &[Name::BreakableOperator, Name::BreakableDevicePlugin])?;
    images::import_missing(workspace, &images)?;
    let images = ["SPACEPORT_BREAKABLE_OPERATOR", "SPACEPORT_BREAKABLE_DEVICE_PLUGIN"]
        .into_iter()
        .zip(images.iter().map(|image| image.reference.as_str()));
    let variables: Vec<(&str, &str)> = images.chain(variables.iter().copied()).collect();
    cluster_tests(workspace, tests, "", &variables)
}

/// `only`: a part of the names of tests; empty for all.
fn cluster_tests(workspace: &Workspace, names: &[&str], only: &str, variables: &[(&str, &str)]) -> Result<usize> {
    let mut arguments = vec!["--features", "spaceport-e2e/cluster"];
    for name in names {
        arguments.extend(["--test", name]);
    }
    // The stories share one small node; each owns it while it runs.
    cargo_tests(workspace, &arguments, &["--test-threads", "1", "--nocapture", only], variables)
}

/// Runs `cargo test`, shows what it prints, and counts the tests that passed. Always on the whole workspace, so that every
/// class sees the same features of the dependencies and nothing is compiled twice.
fn cargo_tests(
    workspace: &Workspace,
    arguments: &[&str],
    harness: &[&str],
    variables: &[(&str, &str)],
) -> Result<usize> {
    let mut cargo = workspace.cargo(&["test", "--workspace", "--locked"]);
    cargo.args(arguments).arg("--").args(harness);
    cargo.envs(variables.iter().copied());
    clients::environment(workspace, &mut cargo)?;
    let mut child = cargo.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start cargo test")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    let mut passed = 0;
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot read what cargo test prints")?;
        println!("{line}");
        passed += passed_in(&line);
    }
    let status = child.wait().context("cannot wait for cargo test")?;
    if !status.success() {
        bail!("cargo test {} ended with {status}", arguments.join(" "));
    }
    progress(&format!("{passed} passed"));
    Ok(passed)
}

/// The number in `test result: ok. 12 passed; 0 failed; …`.
fn passed_in(line: &str) -> usize {
    line.strip_prefix("test result: ok. ")
        .and_then(|rest| rest.split_once(" passed"))
        .and_then(|(number, _)| number.parse().ok())
        .unwrap_or(0)
}

fn shown(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().context("cannot start cargo")?;
    ensure!(status.success(), "ended with {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn counts_what_the_harness_says() {
        assert_eq!(passed_in("test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured"), 12);
        assert_eq!(passed_in("test result: FAILED. 3 passed; 1 failed"), 0);
        assert_eq!(passed_in("test ledger::holds ... ok"), 0);
    }

    #[test]
    fn every_document_of_ours_that_is_named_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let tracked = command("git", &["ls-files"]).current_dir(&root).output().unwrap();
        let mut missing = Vec::new();
        for file in String::from_utf8(tracked.stdout).unwrap().lines() {
            let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
            let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && !"/._-".contains(letter));
            let ours =
                words.filter(|word| word.ends_with(".md") && (word.starts_with("docs/") || *word == "ARCHITECTURE.md"));
            missing.extend(ours.filter(|word| !root.join(word).exists()).map(|word| format!("{file} names {word}")));
        }
        assert_eq!(missing, [""; 0]);
    }
}
