//! How long the calls of a function really run. Prediction orders, declaration kills: what is learned here decides who goes
//! first, never how long anybody may run.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::ids::{ByName, Revision, Size};

/// Functions that are remembered; beyond it the one that ran least recently is forgotten. About 500 bytes each.
pub const FUNCTIONS_MAX: usize = 8192;
/// Calls of each that count: enough for a ninth decile, and few enough to follow a change within an hour of use.
pub const SAMPLES_MAX: usize = 32;
/// Calls before anything is expected but what was declared: the ninth decile of fewer says nothing.
const SAMPLES_MIN: usize = 5;

/// Calls before what was learned limits or suggests anything: the largest of fewer is too near to the others.
pub const SUGGEST_MIN: usize = 20;
/// Margin of what is suggested above the 99th percentile, percent (requirement A13).
const MARGIN_PERCENT: u64 = 150;

/// What is known of a function (requirement A13), over its last [`SAMPLES_MAX`] calls that ran to their end. Milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    /// Which version of the app it is known of.
    pub revision: Revision,
    /// What is asked for.
    pub size: Size,
    /// As declared.
    pub declared_ms: u64,
    /// Calls that this is about.
    pub calls: usize,
    /// Median.
    pub p50_ms: u64,
    /// 95th percentile.
    pub p95_ms: u64,
    /// Longest.
    pub max_ms: u64,
    /// The 99th percentile with a margin, in whole seconds: what would have been enough, if enough is known and it is less
    /// than what is declared.
    pub suggested_ms: Option<u64>,
}

/// What calls with a common history have in common. The revision is a part of it: what a version of an app needed says
/// nothing about the next one. `taskId` is none, for it changes at each start (L15).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Function {
    /// uid of the Space.
    pub space_uid: String,
    /// Which version of the app.
    pub revision: Revision,
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

    /// What a call of a Space that trusts its history is given: what it would be suggested to declare.
    pub fn suggested_ms(&self, function: &Function) -> Option<u64> {
        self.functions.get(function).and_then(|samples| samples.learned(function).suggested_ms)
    }

    /// What is known of a function, if it is enough to tell.
    pub fn learned(&self, function: &Function) -> Option<Learned> {
        let samples = self.functions.get(function).filter(|samples| samples.used_ms.len() >= SAMPLES_MIN)?;
        Some(samples.learned(function))
    }
}

impl Samples {
    fn sorted(&self) -> Vec<u64> {
        let mut sorted: Vec<u64> = self.used_ms.iter().copied().collect();
        sorted.sort_unstable();
        sorted
    }

    fn learned(&self, function: &Function) -> Learned {
        let sorted = self.sorted();
        let enough_ms = percentile(&sorted, 99).saturating_mul(MARGIN_PERCENT).div_ceil(100);
        let suggested_ms = enough_ms.div_ceil(1000).max(1).saturating_mul(1000);
        Learned {
            revision: function.revision,
            size: function.size,
            declared_ms: function.declared_ms,
            calls: sorted.len(),
            p50_ms: percentile(&sorted, 50),
            p95_ms: percentile(&sorted, 95),
            max_ms: percentile(&sorted, 100),
            suggested_ms: Some(suggested_ms).filter(|ms| sorted.len() >= SUGGEST_MIN && *ms < function.declared_ms),
        }
    }
}

/// By nearest rank; 0 of nothing.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(declared_ms: u64) -> Function {
        Function { space_uid: "u".to_owned(), revision: Revision(1), size: Size::Large, declared_ms }
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
    fn a_new_version_of_an_app_begins_without_what_the_old_one_needed() {
        let mut history = History::default();
        (0..SUGGEST_MIN).for_each(|_| history.learn(&function(60_000), 2_000));
        let new = Function { revision: Revision(2), ..function(60_000) };
        assert_eq!((history.expected_ms(&new), history.suggested_ms(&new)), (60_000, None));
        (0..SUGGEST_MIN).for_each(|_| history.learn(&new, 8_000));
        assert_eq!((history.expected_ms(&new), history.suggested_ms(&new)), (8_000, Some(12_000)));
        assert_eq!(history.expected_ms(&function(60_000)), 2_000, "who returns to the old one finds it again");
        let revision = |function: &Function| history.learned(function).map(|learned| learned.revision);
        assert_eq!([&function(60_000), &new].map(revision), [Some(Revision(1)), Some(Revision(2))]);
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
    fn what_would_have_been_enough_is_suggested_once_enough_is_known() {
        let mut history = History::default();
        let learned = |history: &History| history.learned(&function(60_000));
        (1..=4).for_each(|_| history.learn(&function(60_000), 2_000));
        assert_eq!(learned(&history), None, "of four calls nothing is told");
        (5..=19).for_each(|_| history.learn(&function(60_000), 2_000));
        assert_eq!(learned(&history).unwrap().suggested_ms, None);
        history.learn(&function(60_000), 7_900);
        let found = learned(&history).unwrap();
        assert_eq!((found.calls, found.p50_ms, found.p95_ms, found.max_ms), (20, 2_000, 2_000, 7_900));
        assert_eq!(found.suggested_ms, Some(12_000), "1.5 x 7.9 s in whole seconds");
        assert_eq!(history.suggested_ms(&function(60_000)), Some(12_000));
        assert_eq!(history.suggested_ms(&function(12_000)), None, "another function");
        (0..SAMPLES_MAX).for_each(|_| history.learn(&function(10_000), 9_000));
        assert_eq!(history.suggested_ms(&function(10_000)), None, "never more than is declared");
        assert_eq!(history.learned(&Function { space_uid: "v".to_owned(), ..function(60_000) }), None);
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
