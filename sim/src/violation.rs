//! What a check says.

use std::fmt;

/// A rule of docs/rules.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// One of the twelve invariants.
    Invariant(u8),
    /// A rule of the ledger.
    L(u8),
    /// The same events give the same state.
    Replay,
}

/// A rule that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// One sentence with names and numbers.
    pub what: String,
}

/// What a check comes to.
pub type Checked = Result<(), Violation>;

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invariant(number) => write!(formatter, "invariant {number}"),
            Self::L(number) => write!(formatter, "L{number}"),
            Self::Replay => formatter.write_str("replay"),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.rule, self.what)
    }
}

impl Rule {
    /// It does not hold.
    pub fn broken(self, what: impl Into<String>) -> Violation {
        Violation { rule: self, what: what.into() }
    }

    /// It holds if `holds` is true; `what` says otherwise.
    ///
    /// # Errors
    /// The violation.
    pub fn check(self, holds: bool, what: impl FnOnce() -> String) -> Checked {
        if holds { Ok(()) } else { Err(self.broken(what())) }
    }
}
