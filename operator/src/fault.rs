//! Faults on purpose, so that each story on the real cluster can be seen to fail (`e2e/tests/broken_on_purpose.rs`).
//!
//! Without the feature `faults`, which no image of the charts has, none can be chosen and the compiler removes the switches.

#[cfg(not(feature = "faults"))]
use spaceport_core::lease::State;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "faults", derive(clap::ValueEnum))]
pub enum Fault {
    /// A whole card counts once.
    WholeCardsCountOnce,
    /// Against invariant 5: what was used is charged without a bound.
    ChargeUnbounded,
    /// Against invariant 4: a lease that was never allowed pays what it declared.
    ChargeUnallowed,
    /// The page does not show the last refusal.
    RefusalsLeaveNothing,
    /// Against invariant 10: a token is good for every Space.
    AnyAudience,
    /// Against invariant 12: receipts do not say when the worker was allowed.
    ReceiptsForgetAllowed,
}

#[cfg(feature = "faults")]
mod chosen {
    use std::sync::OnceLock;

    use spaceport_core::lease::{Mutant, State};

    use super::Fault;

    static CHOSEN: OnceLock<Fault> = OnceLock::new();

    /// Chooses for the life of the process, which then says so in its log.
    pub fn choose(fault: Option<Fault>) {
        let Some(fault) = fault else { return };
        tracing::error!(?fault, "Broken on purpose: this is a build for tests");
        // Called once, at the start.
        let _ = CHOSEN.set(fault);
    }

    /// True if this fault was chosen.
    pub fn is(fault: Fault) -> bool {
        CHOSEN.get() == Some(&fault)
    }

    /// The ledger with the core's own fault, where that is the one chosen.
    pub fn in_ledger(state: State) -> State {
        match CHOSEN.get() {
            Some(Fault::ChargeUnbounded) => state.with_mutant(Mutant::ChargeUnbounded),
            Some(Fault::ChargeUnallowed) => state.with_mutant(Mutant::ChargeUnallowed),
            _ => state,
        }
    }
}

#[cfg(feature = "faults")]
pub use chosen::{choose, in_ledger, is};

/// No fault can be chosen in this build.
#[cfg(not(feature = "faults"))]
pub const fn is(_fault: Fault) -> bool {
    false
}

/// No fault can be chosen in this build.
#[cfg(not(feature = "faults"))]
pub fn in_ledger(state: State) -> State {
    state
}
