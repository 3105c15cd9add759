//! `spaceport-replay`: the comparison of policies and the sweep over quotas, on the command line.

mod args;

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::{Value, json};
use spaceport_replay::comparison::Comparison;
use spaceport_replay::demand::{Declare, Demand};
use spaceport_replay::report::{comparison_table, plot, sweep_table};
use spaceport_replay::request::Trace;
use spaceport_replay::sweep::sweep;
use spaceport_replay::trace;

use crate::args::{Arguments, Shape, Site};

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            error.chain().skip(1).for_each(|cause| eprintln!("  because: {cause}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { trace, generate: _, shape, site, quota_sweep, write, json, svg } = arguments;
    let rules = site.rules();
    let declare = Declare::from(shape.declare);
    let traces = match trace {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            vec![trace::parse(&text).with_context(|| format!("{} is no trace", path.display()))?]
        }
        None => generate(shape, site, declare),
    };
    if let Some(path) = write {
        let [trace] = traces.as_slice() else {
            anyhow::bail!("--write needs a single seed, such as --seeds 1");
        };
        fs::write(path, trace::write(trace)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    ensure!(!traces.iter().any(|trace| trace.requests.is_empty()), "so little load makes no request at all");
    if *quota_sweep {
        let rows = sweep(&traces, &rules);
        print(*json, &json!({ "quota_sweep": rows }), &sweep_table(&rows))?;
        return Ok(());
    }
    let comparison = Comparison::of(&traces, &rules);
    if let Some(path) = svg {
        let title = title(&comparison);
        fs::write(path, plot(&comparison, &title)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut object = serde_json::to_value(&comparison)?;
    let mut text = comparison_table(&comparison);
    if trace.is_none() && declare == Declare::AsFitted {
        let beside = Comparison::of(&generate(shape, site, Declare::Default), &rules);
        object["declared_60"] = serde_json::to_value(&beside)?;
        text.push_str(&format!("\nThe same requests when everyone declares 60 s:\n\n{}", comparison_table(&beside)));
    }
    print(*json, &object, &text)
}

fn generate(shape: &Shape, site: &Site, declare: Declare) -> Vec<Trace> {
    let Shape { load, hours, seeds, declare: _, between_functions } = shape;
    let slots = u64::from(site.nodes) * u64::from(site.cards) * 2;
    let demand = Demand { load: *load, hours: *hours, slots, declare, between_functions: *between_functions };
    (seeds.first..=seeds.last).map(|seed| demand.generate(seed)).collect()
}

fn title(comparison: &Comparison) -> String {
    let Comparison { nodes, cards, traces, load, .. } = comparison;
    format!("Waits by policy: {nodes} node(s) with {cards} cards, load {load:.2}, {traces} trace(s)")
}

fn print(as_json: bool, object: &Value, text: &str) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string_pretty(object)?);
    } else {
        print!("{text}");
    }
    Ok(())
}
