//! Checks every cluster of [`spaceport_model::scenario`], prints what it cost, and exits with 1 and the shortest way to a broken
//! property if there is one. Arguments: `--long` for those that take many minutes instead, and parts of names, to check some
//! of them only.

#![allow(clippy::disallowed_methods)] // This is the shell: it measures what the check takes.

use std::process::ExitCode;
use std::time::Instant;

use spaceport_model::action::Action;
use spaceport_model::bounds::Bounds;
use spaceport_model::cluster::Cluster;
use spaceport_model::scenario;
use spaceport_model::world::World;
use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};

/// Threads: the machines that run the tests have two cores.
const THREADS: usize = 2;

fn main() -> ExitCode {
    let mut wanted: Vec<String> = std::env::args().skip(1).collect();
    let long = wanted.iter().any(|part| part == "--long");
    wanted.retain(|part| part != "--long");
    let clusters = if long { scenario::long } else { scenario::all };
    let is_wanted = |bounds: &Bounds| wanted.is_empty() || wanted.iter().any(|part| bounds.name.contains(part));
    let chosen: Vec<Bounds> = clusters().into_iter().filter(is_wanted).collect();
    if chosen.is_empty() {
        eprintln!("no cluster has such a name; the names are:");
        clusters().iter().for_each(|bounds| eprintln!("  {}", bounds.name));
        return ExitCode::FAILURE;
    }
    let begun = Instant::now();
    let broken = chosen.into_iter().filter(|bounds| !check(bounds)).count();
    println!("{broken} broken, {:.1} s", begun.elapsed().as_secs_f64());
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// True if every property holds, and all that has to happen does. Depth first, because breadth first holds millions of
/// states in memory that are still to be looked at.
fn check(bounds: &Bounds) -> bool {
    let begun = Instant::now();
    let checker = Cluster::new(bounds.clone()).checker().threads(THREADS).spawn_dfs().join();
    println!(
        "{}: {} states, {} unique, depth {}, {:.1} s",
        bounds.name,
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    let found = checker.discoveries();
    let mut good = true;
    for property in checker.model().properties() {
        match (property.expectation, found.contains_key(property.name)) {
            (Expectation::Sometimes, false) => {
                good = false;
                println!("  never happened: {}", property.name);
            }
            (Expectation::Always, true) => {
                good = false;
                println!("  BROKEN: {}", property.name);
                shortest(bounds, property.name).iter().for_each(print_path);
            }
            _ => {}
        }
    }
    good
}

/// Again, breadth first and in one thread: then the first way that is found is a shortest one.
fn shortest(bounds: &Bounds, property: &'static str) -> Option<Path<World, Action>> {
    let wanted = HasDiscoveries::AnyOf([property].into());
    let checker = Cluster::new(bounds.clone()).checker().finish_when(wanted).spawn_bfs().join();
    checker.discovery(property)
}

fn print_path(path: &Path<World, Action>) {
    for (step, action) in path.clone().into_actions().iter().enumerate() {
        println!("    {:3}. {action}", step + 1);
    }
    println!("    and then: {:#?}", path.last_state());
}
