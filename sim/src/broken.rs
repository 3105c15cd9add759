//! What can be wrong on purpose: for each check something that it must see.

#[cfg(feature = "mutants")]
use spaceport_core::lease::Mutant;
use spaceport_core::lease::State;

use crate::violation::Rule;

/// A fault of the simulated node agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeFault {
    /// Against invariant 7: orders of any term are taken, from any broker.
    IgnoresEpoch,
    /// Against L8: orders of any age are taken.
    TakesStaleOrders,
    /// Against invariant 8: nothing is killed at its deadline.
    ForgetsDeadline,
    /// Against L9: a lease waits for its slot for as long as it takes.
    WaitsForEver,
    /// Against L10: an agent that begins anew, with or without its node, has forgotten the ends that nobody has acknowledged.
    ForgetsEnds,
}

/// Something that is wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The ledger.
    #[cfg(feature = "mutants")]
    Ledger(Mutant),
    /// The nodes.
    Node(NodeFault),
}

/// One row of the table of mutants.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What is wrong.
    pub broken: Broken,
    /// What it is against.
    pub against: Rule,
    /// Rules whose checks may see it: the one it is against, and those that a fault of this kind breaks first.
    pub seen_as: &'static [Rule],
    /// One sentence.
    pub what: &'static str,
}

// === impl Broken ===

impl Broken {
    /// Its name, for the table.
    pub fn name(self) -> String {
        match self {
            #[cfg(feature = "mutants")]
            Self::Ledger(mutant) => format!("{mutant:?}"),
            Self::Node(fault) => format!("{fault:?}"),
        }
    }

    /// The ledger with its fault, if it is one of the ledger.
    pub fn in_ledger(self, state: State) -> State {
        match self {
            #[cfg(feature = "mutants")]
            Self::Ledger(mutant) => state.with_mutant(mutant),
            Self::Node(_) => state,
        }
    }

    /// The fault of the nodes, if it is one.
    pub const fn of_node(self) -> Option<NodeFault> {
        match self {
            Self::Node(fault) => Some(fault),
            #[cfg(feature = "mutants")]
            Self::Ledger(_) => None,
        }
    }
}
