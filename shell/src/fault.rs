//! The fault by which a build for tests breaks its process on purpose. Which faults there are, and that only builds with
//! the feature `faults` know them, is said by the crate that has them.

use std::fmt::Debug;
use std::sync::OnceLock;

/// The fault that was chosen at the start of a process; none in any process that people use. For a static.
#[derive(Debug)]
pub struct Chosen<F>(OnceLock<F>);

impl<F: Copy + Debug + PartialEq> Chosen<F> {
    /// None yet.
    pub const fn none() -> Self {
        Self(OnceLock::new())
    }

    /// Chooses for the life of the process, which then says so in its log. The first choice stays.
    pub fn choose(&self, fault: Option<F>) {
        let Some(fault) = fault else { return };
        tracing::error!(?fault, "Broken on purpose: this is a build for tests");
        // Called once, at the start.
        let _ = self.0.set(fault);
    }

    /// The one that was chosen.
    pub fn get(&self) -> Option<F> {
        self.0.get().copied()
    }

    /// True if this fault was chosen.
    pub fn is(&self, fault: F) -> bool {
        self.get() == Some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_chosen_fault_is_there_and_it_stays() {
        let chosen = Chosen::none();
        chosen.choose(None);
        assert_eq!(chosen.get(), None);
        assert!(!chosen.is('a'));
        chosen.choose(Some('a'));
        chosen.choose(Some('b'));
        assert!(chosen.is('a') && !chosen.is('b'));
    }
}
