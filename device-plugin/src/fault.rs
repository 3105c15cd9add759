//! Faults on purpose, so that each story on the real node can be seen to fail (`e2e/tests/broken_on_purpose.rs`).
//!
//! Without the feature `faults`, which no image of the charts has, none can be chosen and the compiler removes the switches.

use spaceport_shell::fault::Chosen;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "faults", derive(clap::ValueEnum))]
pub enum Fault {
    /// Against invariant 9: every pod is exempt from the gate.
    GateOpenToAll,
    /// Against N9: a lease opens the gate for the whole container of its worker, and nothing shuts that again.
    GateOpenToContainer,
    /// The gate stays shut for the worker that was allowed.
    GateStaysShut,
    /// Against N11: a worker that is kept for reuse runs on.
    IdleWorkersRun,
    /// Against invariant 8: nothing is killed.
    NothingIsKilled,
    /// A token opens the gate as often as it is presented.
    TokensAreSpentAgain,
    /// Requests wait on although their visitors have left.
    VisitorsStay,
}

/// None unless the process was started with one.
static CHOSEN: Chosen<Fault> = Chosen::none();

/// Chooses for the life of the process.
#[cfg(feature = "faults")]
pub fn choose(fault: Option<Fault>) {
    CHOSEN.choose(fault);
}

/// True if this fault was chosen.
pub fn is(fault: Fault) -> bool {
    cfg!(feature = "faults") && CHOSEN.is(fault)
}
