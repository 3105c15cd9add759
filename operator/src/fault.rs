//! Faults on purpose, so that each story on the real cluster can be seen to fail (`e2e/tests/broken_on_purpose.rs`).
//!
//! Without the feature `faults`, which no image of the charts has, none can be chosen and the compiler removes the switches.

#[cfg(feature = "faults")]
use spaceport_core::lease::Mutant;
use spaceport_core::lease::State;
use spaceport_shell::admin::Routes;
use spaceport_shell::fault::Chosen;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "faults", derive(clap::ValueEnum))]
pub enum Fault {
    /// A whole card counts once.
    WholeCardsCountOnce,
    /// Against invariant 5: what was declared is charged, however short the use.
    ChargeDeclared,
    /// Against invariant 4: a lease that was never allowed pays what it declared.
    ChargeUnallowed,
    /// Against L10: the node is told that an end is settled before that is durable.
    AcknowledgeEarly,
    /// Against invariant 2: leads on when its Lease cannot be renewed, and takes a page for written whatever becomes of it.
    GrantsFromMemory,
    /// Against invariant 12: receipts say half of what the page says.
    ReceiptsSayLess,
    /// The page does not show the last refusal.
    RefusalsLeaveNothing,
    /// Against invariant 10: a token is good for every Space.
    AnyAudience,
    /// Against invariant 12: receipts do not say when the worker was allowed.
    ReceiptsForgetAllowed,
    /// Grants say that nothing of them was used.
    GrantsLookUnused,
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

/// Gives the ledger the core's own fault, where that is the one chosen.
#[cfg(feature = "faults")]
pub fn into_ledger(state: &mut State) {
    state.set_mutant(match CHOSEN.get() {
        Some(Fault::WholeCardsCountOnce) => Some(Mutant::WeightIgnored),
        Some(Fault::ChargeDeclared) => Some(Mutant::ChargeDeclared),
        Some(Fault::AcknowledgeEarly) => Some(Mutant::AcknowledgeEarly),
        Some(Fault::ChargeUnallowed) => Some(Mutant::ChargeUnallowed),
        _ => None,
    });
}

/// No fault can be chosen in this build.
#[cfg(not(feature = "faults"))]
pub const fn into_ledger(_: &mut State) {}

/// Where the process can be made to stand still, in the order in which a lease passes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A request has come; nothing is decided.
    RequestReceived,
    /// A slot is meant for a request; the hold is not written.
    HoldDecided,
    /// The hold is durable; its order is not sent.
    HoldWritten,
    /// The end of a lease has come; nothing is settled.
    EndReceived,
    /// The settlement is decided and not written.
    SettleDecided,
    /// The settlement is durable; the node does not know.
    SettleWritten,
    /// The final receipt is durable; its row is still in the outbox.
    ReceiptWritten,
}

impl Place {
    /// The names, as `PUT /failpoint/NAME` knows them.
    #[cfg(feature = "faults")]
    pub const NAMES: &'static [&'static str] = &[
        "request-received",
        "hold-decided",
        "hold-written",
        "end-received",
        "settle-decided",
        "settle-written",
        "receipt-written",
    ];

    /// Stands still here, in a build for tests that was told to; nothing in any other.
    pub fn reached(self) {
        if cfg!(feature = "faults") {
            spaceport_shell::failpoint::reached(self.name());
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::RequestReceived => "request-received",
            Self::HoldDecided => "hold-decided",
            Self::HoldWritten => "hold-written",
            Self::EndReceived => "end-received",
            Self::SettleDecided => "settle-decided",
            Self::SettleWritten => "settle-written",
            Self::ReceiptWritten => "receipt-written",
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
