//! Faults on purpose, so that each story on the real node can be seen to fail (`e2e/tests/broken_on_purpose.rs`).
//!
//! Without the feature `faults`, which no image of the charts has, none can be chosen and the compiler removes the switches.

use spaceport_shell::admin::Routes;
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
    /// Against L17: another leader is told of those who wait in another order, and not where they stood.
    PlacesAreForgotten,
    /// Requests wait on although their visitors have left.
    VisitorsStay,
}

/// None unless the process was started with one, or told of one since.
static CHOSEN: Chosen<Fault> = Chosen::none();

/// Chooses for the start of the process.
#[cfg(feature = "faults")]
pub fn choose(fault: Option<Fault>) {
    CHOSEN.choose(fault);
}

/// True if this fault is chosen.
pub fn is(fault: Fault) -> bool {
    cfg!(feature = "faults") && CHOSEN.is(fault)
}

/// Where the process can be made to stand still, in the order in which a lease passes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A request is about to be sent to the broker.
    RequestNotSent,
    /// An order has come; nothing of it is done.
    OrderReceived,
    /// The slot is given, and the caller does not know.
    GrantNotAnswered,
    /// A worker asks to be allowed; its gate is shut.
    WorkerNotAdmitted,
    /// The worker runs behind an open gate; the broker does not know.
    RunningNotSent,
    /// The lease is over; the broker does not know.
    EndNotSent,
    /// The slot is clear; the broker does not know.
    FreedNotSent,
}

impl Place {
    /// The names, as `PUT /failpoint/NAME` knows them.
    #[cfg(feature = "faults")]
    pub const NAMES: &'static [&'static str] = &[
        "request-not-sent",
        "order-received",
        "grant-not-answered",
        "worker-not-admitted",
        "running-not-sent",
        "end-not-sent",
        "freed-not-sent",
    ];

    /// Stands still here, in a build for tests that was told to; nothing in any other.
    pub fn reached(self) {
        if cfg!(feature = "faults") {
            spaceport_shell::failpoint::reached(self.name());
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::RequestNotSent => "request-not-sent",
            Self::OrderReceived => "order-received",
            Self::GrantNotAnswered => "grant-not-answered",
            Self::WorkerNotAdmitted => "worker-not-admitted",
            Self::RunningNotSent => "running-not-sent",
            Self::EndNotSent => "end-not-sent",
            Self::FreedNotSent => "freed-not-sent",
        }
    }
}

/// The admin endpoint's routes of a build for tests.
pub fn routes() -> Routes {
    #[cfg(feature = "faults")]
    return spaceport_shell::failpoint::routes(Place::NAMES).merge(spaceport_shell::fault::routes(&CHOSEN));
    #[cfg(not(feature = "faults"))]
    return Routes::new();
}
