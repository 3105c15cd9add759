//! How long the calls of a function really run. Prediction orders, declaration kills: what is learned here decides who goes
//! first, never how long anybody may run.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::ids::{ByName, Size};

/// Functions that are remembered; beyond it the one that ran least recently is forgotten. About 400 bytes each.
pub const FUNCTIONS_MAX: usize = 8192;
/// Calls of each that count: enough for a ninth decile, and few enough to follow a change within an hour of use.
pub const SAMPLES_MAX: usize = 32;
/// Calls before anything is expected but what was declared: the ninth decile of fewer says nothing.
const SAMPLES_MIN: usize = 5;

/// What calls with a common history have in common. `taskId` is no part of it, for it changes at each start (L15).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Function {
    /// uid of the Space.
    pub space_uid: String,
    /// What is asked for.
    pub size: Size,
    /// As declared, milliseconds.
    pub declared_ms: u64,
}

/// All that was learned in a term.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    functions: ByName<Function, Samples>,
    /// By the number of their last call.
    by_use: BTreeMap<u64, Function>,
    calls: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Samples {
    last_call: u64,
    /// Milliseconds, newest last.
    used_ms: VecDeque<u64>,
}

impl History {
    /// A call ran so long.
    pub fn learn(&mut self, function: &Function, used_ms: u64) {
        self.calls += 1;
        if !self.functions.contains_key(function) {
            self.functions.insert(function.clone(), Samples::default());
        }
        let Some(samples) = self.functions.get_mut(function) else { return };
        if samples.used_ms.len() >= SAMPLES_MAX {
            samples.used_ms.pop_front();
        }
        samples.used_ms.push_back(used_ms);
        let last_call = std::mem::replace(&mut samples.last_call, self.calls);
        let used = self.by_use.remove(&last_call).unwrap_or_else(|| function.clone());
        self.by_use.insert(self.calls, used);
        if self.functions.len() > FUNCTIONS_MAX
            && let Some((_, forgotten)) = self.by_use.pop_first()
        {
            self.functions.remove(&forgotten);
        }
    }

    /// How long the next call is expected to run: the ninth decile of the last ones, or what it declares while too few are
    /// known; never more than it declares. Milliseconds.
    pub fn expected_ms(&self, function: &Function) -> u64 {
        let Some(samples) = self.functions.get(function).filter(|samples| samples.used_ms.len() >= SAMPLES_MIN) else {
            return function.declared_ms;
        };
        let mut used_ms = [0; SAMPLES_MAX];
        let count = samples.used_ms.len().min(SAMPLES_MAX);
        used_ms.iter_mut().zip(&samples.used_ms).for_each(|(place, used_ms)| *place = *used_ms);
        let rank = (count * 9).div_ceil(10);
        let (_, ninth_decile, _) = used_ms[..count].select_nth_unstable(rank - 1);
        (*ninth_decile).min(function.declared_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(declared_ms: u64) -> Function {
        Function { space_uid: "u".to_owned(), size: Size::Large, declared_ms }
    }

    #[test]
    fn what_was_declared_is_expected_until_enough_is_known() {
        let mut history = History::default();
        for used_ms in [100, 200, 300, 400] {
            history.learn(&function(60_000), used_ms);
            assert_eq!(history.expected_ms(&function(60_000)), 60_000);
        }
        history.learn(&function(60_000), 500);
        assert_eq!(history.expected_ms(&function(60_000)), 500);
        assert_eq!(history.expected_ms(&function(30_000)), 30_000, "another declaration is another function");
    }

    #[test]
    fn the_ninth_decile_of_the_newest_counts() {
        let mut history = History::default();
        (1..=10).for_each(|second| history.learn(&function(60_000), second * 1000));
        assert_eq!(history.expected_ms(&function(60_000)), 9_000);
        (0..SAMPLES_MAX).for_each(|_| history.learn(&function(60_000), 2_000));
        assert_eq!(history.expected_ms(&function(60_000)), 2_000, "old calls are forgotten");
        (0..SAMPLES_MAX).for_each(|_| history.learn(&function(60_000), 70_000));
        assert_eq!(history.expected_ms(&function(60_000)), 60_000, "never more than declared");
    }

    #[test]
    fn the_least_recently_used_function_is_forgotten() {
        let mut history = History::default();
        let busy = function(1);
        (0..5).for_each(|_| history.learn(&busy, 1));
        for declared_ms in 2..FUNCTIONS_MAX as u64 + 2 {
            history.learn(&busy, 1);
            history.learn(&function(declared_ms), 1);
        }
        assert_eq!((history.functions.len(), history.by_use.len()), (FUNCTIONS_MAX, FUNCTIONS_MAX));
        assert!(history.functions.contains_key(&busy) && !history.functions.contains_key(&function(2)));
    }
}
