//! What is wrong on purpose, and that a check sees it.

use spaceport_core::lease::Mutant;

use crate::broken::{Broken, NodeFault, Row};
use crate::runs::first_failure;
use crate::violation::Rule::{Invariant, L, Replay};
use crate::violation::{Rule, Violation};

const fn ledger(mutant: Mutant, against: Rule, seen_as: &'static [Rule], what: &'static str) -> Row {
    Row { broken: Broken::Ledger(mutant), against, seen_as, what }
}

const fn node(fault: NodeFault, against: Rule, what: &'static str) -> Row {
    Row { broken: Broken::Node(fault), against, seen_as: &[], what }
}

/// All of them. Invariant 9 needs a kernel; its faults are those of the agent's own tests and stories.
pub const TABLE: &[Row] = &[
    ledger(Mutant::DecideOnDurable, Invariant(1), &[], "decisions do not see what is in flight"),
    ledger(Mutant::PrefixCapIgnored, Invariant(1), &[], "the limit of an address prefix does not count"),
    ledger(Mutant::OrderEarly, Invariant(2), &[], "orders leave when the hold is decided"),
    ledger(Mutant::AcknowledgeEarly, Invariant(2), &[], "an end is acknowledged before it is durable"),
    ledger(Mutant::SettleTwice, Invariant(3), &[L(3)], "a settled hold stays open"),
    ledger(Mutant::RebaseForgets, Invariant(3), &[], "a settlement is lost in a rebase"),
    ledger(Mutant::ChargeUnallowed, Invariant(4), &[], "who was never allowed pays what was declared"),
    ledger(Mutant::ChargeUnbounded, Invariant(5), &[], "a charge has no bound"),
    ledger(Mutant::ChargeDeclared, Invariant(5), &[], "a short use pays what was declared"),
    ledger(Mutant::WeightIgnored, Invariant(5), &[], "a whole card counts once"),
    ledger(Mutant::FreeAtEnd, Invariant(6), &[], "a slot is free when its lease ends"),
    node(NodeFault::IgnoresEpoch, Invariant(7), "a node takes orders of any term from any broker"),
    node(NodeFault::ForgetsDeadline, Invariant(8), "a node kills nothing at its deadline"),
    ledger(Mutant::BudgetIgnored, Invariant(10), &[], "the budget of a call is not looked at"),
    ledger(Mutant::BudgetForgotten, Invariant(10), &[], "what ended leases took of a budget is forgotten"),
    ledger(Mutant::ForgetsReturned, Invariant(11), &[], "a request whose order failed is forgotten"),
    ledger(Mutant::NoOutcome, Invariant(12), &[], "a request that dies leaves no row"),
    ledger(Mutant::NoReceipt, Invariant(12), &[], "a lease leaves no receipt"),
    ledger(Mutant::JudgeAtOnce, L(7), &[Invariant(2)], "a lease that no known page holds is ended without a look"),
    ledger(Mutant::NeverDeposed, L(2), &[], "a leader goes on when it is shown a later term"),
    ledger(Mutant::ReadProvesFailure, L(2), &[], "a read without our write counts as its failure"),
    node(NodeFault::TakesStaleOrders, L(8), "a node takes orders of any age"),
    ledger(Mutant::OrderLate, L(9), &[], "an order leaves however long ago its hold was decided"),
    ledger(Mutant::ExpireAtOnce, L(9), &[], "a silent node's lease expires at once"),
    ledger(Mutant::PresentLimits, L(9), &[], "a lease is held to the limits its pool has now"),
    node(NodeFault::WaitsForEver, L(9), "a lease waits on its node for as long as its slot takes"),
    node(NodeFault::ForgetsEnds, L(10), "a node that begins anew has forgotten the ends that nobody has acknowledged"),
    ledger(Mutant::IdleUnheard, L(16), &[], "what a node says of the workers that it keeps is not heard"),
    ledger(Mutant::ForgetsPlaces, L(17), &[], "a place that an earlier leader told is not looked at"),
    ledger(Mutant::TimeGoesBack, L(20), &[], "a settlement is dated by the wall clock"),
    ledger(Mutant::Stateful, Replay, &[], "applying counts its calls"),
];

/// How a mutant was seen.
#[derive(Clone, Debug)]
pub struct Caught {
    /// At which seed.
    pub seed: u64,
    /// As what.
    pub violation: Violation,
}

/// The first of so many seeds that sees it as what it is.
pub fn catch(row: &Row, seeds: u64, threads: usize) -> Option<Caught> {
    let is_it = |violation: &Violation| violation.rule == row.against || row.seen_as.contains(&violation.rule);
    let told = first_failure(0, seeds, threads, Some(row.broken), is_it)?;
    Some(Caught { seed: told.seed, violation: told.violation? })
}
