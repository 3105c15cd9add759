//! Faults on purpose, so that each story on the real node can be seen to fail (`e2e/tests/broken_on_purpose.rs`).
//!
//! Without the feature `faults`, which no image of the charts has, none can be chosen and the compiler removes the switches.

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
    /// Requests wait on although their visitors have left.
    VisitorsStay,
}

#[cfg(feature = "faults")]
mod chosen {
    use std::sync::OnceLock;

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
}

#[cfg(feature = "faults")]
pub use chosen::{choose, is};

/// No fault can be chosen in this build.
#[cfg(not(feature = "faults"))]
pub const fn is(_fault: Fault) -> bool {
    false
}
