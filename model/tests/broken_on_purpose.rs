//! Each rule matters: without it there is a way to break a property, and the check finds it.

use spaceport_core::lease::{Mutant, State};
use spaceport_model::bounds::{Bounds, Budget, Fault};
use spaceport_model::cluster::Cluster;
use spaceport_model::scenario::{call, calm};
use stateright::{Checker, Expectation, HasDiscoveries, Model};

const NONE: Budget = Budget::NONE;

/// One call on one node, and these faults.
fn one_call(budget: Budget) -> Bounds {
    Bounds { budget, ..calm("one call", 1, &[call(0, 0)]) }
}

/// The check must find a way to break this property.
fn is_seen(bounds: Bounds, property: &'static str) {
    let properties = Cluster::new(bounds.clone()).properties();
    let name = properties.iter().map(|known| known.name).find(|name| name.starts_with(property));
    let name = name.expect("a property of that name");
    // Depth first: it finds some way soon, and only whether there is one matters here.
    let wanted = HasDiscoveries::AnyOf([name].into());
    let checker = Cluster::new(bounds).checker().finish_when(wanted).spawn_dfs().join();
    let found = checker.discoveries();
    assert!(found.contains_key(name), "{property} held in {} states", checker.unique_state_count());
    println!("{name}:\n{:#?}", found[name].clone().into_actions());
}

/// The check must find nothing: what is broken above is not broken by what surrounds it.
fn is_kept(bounds: Bounds) {
    let checker = Cluster::new(bounds).checker().spawn_dfs().join();
    let found = checker.discoveries();
    let always = checker.model().properties().into_iter().filter(|known| known.expectation == Expectation::Always);
    let broken: Vec<&str> = always.map(|known| known.name).filter(|name| found.contains_key(name)).collect();
    assert!(broken.is_empty(), "{broken:?}");
}

#[test]
fn a_node_that_looks_at_no_epoch_is_seen() {
    let bounds = Bounds { fault: Fault::NoFence, ..one_call(Budget { terms: 1, ..NONE }) };
    is_seen(bounds, "invariant 7");
}

#[test]
fn an_order_of_any_age_is_seen() {
    let bounds = Bounds { fault: Fault::NoAge, ..one_call(Budget { cuts: 1, pauses: 1, ..NONE }) };
    is_seen(bounds, "L9: what is settled does not run");
}

/// Whoever reads the page of each lease that it does not know (L7) would get away with it, so that is left out too.
#[test]
fn a_leader_that_begins_before_it_saw_its_own_term_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::JudgeAtOnce);
    // The call runs before, so that no hold is late.
    let early = Bounds { fault: Fault::EarlyStart, begin, running: 1, ..one_call(Budget { terms: 1, ..NONE }) };
    is_seen(early.clone(), "L7: a fail-over ends no lease");
    is_seen(early.clone(), "invariant 2");
    is_kept(Bounds { fault: Fault::None, ..early });
}

#[test]
fn a_write_that_names_no_revision_is_seen() {
    let calls = [call(0, 1), call(0, 1)];
    let budget = Budget { terms: 1, ..NONE };
    is_seen(Bounds { fault: Fault::NoCompare, budget, ..calm("two calls", 1, &calls) }, "invariant 3");
}

#[test]
fn a_report_that_is_not_repeated_is_seen() {
    let bounds = Bounds { fault: Fault::ReportOnce, ..one_call(Budget { cuts: 1, ..NONE }) };
    // The hold is voided when the node joins without it: what was used is not charged, and the account never told.
    is_seen(bounds, "L10: a lease that ended is settled as its node said");
}

#[test]
fn a_node_that_joins_without_its_leases_is_seen() {
    let bounds = Bounds { fault: Fault::JoinsEmpty, ..one_call(Budget { terms: 1, ..NONE }) };
    is_seen(bounds, "L9: what is settled does not run");
}

#[test]
fn a_read_taken_for_a_proof_of_failure_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::ReadProvesFailure);
    let bounds = Bounds { begin, ..one_call(Budget { unknown: 1, ..NONE }) };
    is_seen(bounds, "L2: what may be reserved counts as reserved");
}

#[test]
fn a_silent_node_given_up_before_the_bound_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::ExpireAtOnce);
    let bounds = Bounds { begin, ..one_call(Budget { cuts: 1, ticks: 1, ..NONE }) };
    is_seen(bounds, "L9: what is settled does not run");
}

#[test]
fn a_hold_that_stays_open_when_it_is_settled_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::SettleTwice);
    let bounds = Bounds { begin, ..one_call(NONE) };
    is_seen(bounds, "L3: the working page is what is durable");
}

#[test]
fn a_settlement_lost_in_a_rebase_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::RebaseForgets);
    // One page, two nodes: while the new leader settles a lease, the old one reserves for the other node.
    let calls = [call(0, 0), call(1, 0)];
    let budget = Budget { terms: 1, ..NONE };
    let bounds = Bounds { begin, budget, running: 1, never_allowed: false, ..calm("two calls", 2, &calls) };
    is_seen(bounds, "L10: where nothing goes on");
}

#[test]
fn an_order_before_its_hold_is_durable_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::OrderEarly);
    is_seen(Bounds { begin, ..one_call(NONE) }, "invariant 2");
}

#[test]
fn a_decision_without_what_is_in_flight_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::DecideOnDurable);
    // Two nodes, so that both calls have a slot; quota for one of them.
    let calls = [call(0, 1), call(1, 1)];
    is_seen(Bounds { begin, ..calm("two calls", 2, &calls) }, "the ledger takes its own events");
}

/// An old leader's hold lands after the next term began, and its node joins before the new leader's watch shows it.
#[test]
fn a_late_hold_that_is_judged_without_a_read_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::JudgeAtOnce);
    let bounds = Bounds { begin, ..one_call(Budget { terms: 1, ..NONE }) };
    is_seen(bounds.clone(), "L7: a fail-over ends no lease");
    is_seen(bounds, "invariant 2");
}

#[test]
fn a_page_that_is_forgotten_behind_an_older_answer_is_seen() {
    let calls = [call(0, 0), call(0, 0)];
    // The visitor leaves, so that the new leader has nothing else to write to the page.
    let budget = Budget { terms: 1, leaves: 1, ..NONE };
    let fault = Fault::DroppedPage;
    let bounds = Bounds { fault, budget, running: 1, never_allowed: false, ..calm("two calls", 1, &calls) };
    is_seen(bounds, "L10: where nothing goes on");
}

/// The agent did that once.
#[test]
fn a_node_that_cancels_without_an_answer_is_seen() {
    let calls = [call(0, 0), call(0, 0)];
    // A leader that takes every lease to be over its limit tells the nodes that are there to end them.
    let begin = |state: State| state.with_mutant(Mutant::ExpireAtOnce);
    let budget = Budget { ticks: 1, ..NONE };
    let silent = Bounds { fault: Fault::SilentCancel, begin, budget, running: 1, ..calm("two calls", 1, &calls) };
    is_seen(silent.clone(), "L10: where nothing goes on");
    is_kept(Bounds { fault: Fault::None, ..silent });
}

/// A leader that was deposed long ago, and has not heard of it, hears that a hold is durable that it decided before.
#[test]
fn an_order_of_a_hold_that_is_known_late_is_seen() {
    let begin = |state: State| state.with_mutant(Mutant::OrderLate);
    let bounds = Bounds { begin, ..one_call(Budget { terms: 1, pauses: 1, ..NONE }) };
    is_seen(bounds, "L9: what is settled does not run");
}
