//! Deliberate faults, one for each property, so that the simulation can show that its checks see them (`sim/`,
//! docs/simulation.md). Without the feature `mutants` no fault can be set and the compiler removes the switches.

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Against invariant 1 and L3: decisions read the durable page, without what is in flight.
    DecideOnDurable,
    /// Against invariant 1: on a guest page only the visitors' own limits count, not that of their address prefix.
    PrefixCapIgnored,
    /// Against invariant 2: orders leave when the hold is decided.
    OrderEarly,
    /// Against invariant 2 and L10: an end is acknowledged before its settlement is durable.
    AcknowledgeEarly,
    /// Against invariant 3: a hold stays open when it is settled.
    SettleTwice,
    /// Against invariant 3: what a rebase has to carry over is dropped.
    RebaseForgets,
    /// Against invariant 4: a lease that was never allowed pays what it declared.
    ChargeUnallowed,
    /// Against invariant 5: the charge is what was used, without a bound.
    ChargeUnbounded,
    /// Against invariant 5: the charge is what was declared, however short the use.
    ChargeDeclared,
    /// Against invariant 5: every size weighs 1.
    WeightIgnored,
    /// Against invariant 6: a slot counts as free when its lease ends, before the node says so.
    FreeAtEnd,
    /// Against invariant 10: the budget of a call is not looked at.
    BudgetIgnored,
    /// Against invariant 10: what ended leases took of the budget of a call is forgotten.
    BudgetForgotten,
    /// Against invariant 11: a request whose order failed is forgotten.
    ForgetsReturned,
    /// Against L16: what nodes say of the workers that they keep is not heard.
    IdleUnheard,
    /// Against L17: a place that was told in an earlier term is not looked at.
    ForgetsPlaces,
    /// Against invariant 12: a request that dies leaves no row.
    NoOutcome,
    /// Against invariant 12: a lease leaves no receipt.
    NoReceipt,
    /// Against L2 and L6: a leader goes on when it is shown a page of a later term.
    NeverDeposed,
    /// Against L2: a read that does not show our write is taken for a failure.
    ReadProvesFailure,
    /// Against L7: a lease that no known page holds is nobody's, without a look at its page.
    JudgeAtOnce,
    /// Against L9: an order leaves however long ago its hold was decided.
    OrderLate,
    /// Against L9: a silent node's lease expires at once.
    ExpireAtOnce,
    /// Against L9: the limits of a lease are those that its node has now, not those of its order.
    PresentLimits,
    /// Against L20: a settlement is dated by the wall clock, wherever it stands.
    TimeGoesBack,
    /// Against the replay: applying looks at how often it was called.
    Stateful,
}

/// Counts its own calls, which nothing pure may do.
#[cfg(feature = "mutants")]
pub(super) fn applied() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static APPLIED: AtomicUsize = AtomicUsize::new(0);
    APPLIED.fetch_add(1, Ordering::Relaxed)
}

#[cfg(not(feature = "mutants"))]
pub(super) const fn applied() -> usize {
    0
}
