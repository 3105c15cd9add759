//! Many seeds at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::broken::Broken;
use crate::coverage::Coverage;
use crate::plan::Plan;
use crate::violation::Violation;
use crate::weather::FaultKind;
use crate::world::{Told, World};

/// Failures that are kept; more of them say nothing new.
const FAILURES_MAX: usize = 20;

/// What came of a range of seeds.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Histories.
    pub seeds: u64,
    /// Commands that brokers decided and that changed something.
    pub steps: u64,
    /// Weighted milliseconds charged.
    pub charged_ms: u64,
    /// What happened.
    pub coverage: Coverage,
    /// Faults, by kind.
    pub faults: Vec<u64>,
    /// Histories in which something did not hold.
    pub failed: u64,
    /// The first of them, by seed.
    pub failures: Vec<Told>,
}

/// One history.
pub fn tell(seed: u64, broken: Option<Broken>, trace: bool) -> Told {
    World::new(Plan { broken, ..Plan::of(seed) }, trace).tell()
}

/// The histories of `seeds` seeds from `first` on.
pub fn run(first: u64, seeds: u64, threads: usize) -> Summary {
    let next = AtomicU64::new(0);
    let whole = Mutex::new(Summary { faults: vec![0; FaultKind::COUNT], ..Summary::default() });
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let mut part = Summary { faults: vec![0; FaultKind::COUNT], ..Summary::default() };
                // Ends with the last seed.
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= seeds {
                        break;
                    }
                    part.take(tell(first + index, None, false));
                }
                let mut whole = whole.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                whole.add(part);
            });
        }
    });
    whole.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The failure of the kind with the lowest seed, of `seeds` seeds from `first` on.
pub fn first_failure(
    first: u64,
    seeds: u64,
    threads: usize,
    broken: Option<Broken>,
    is_it: impl Fn(&Violation) -> bool + Sync,
) -> Option<Told> {
    let (next, lowest) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let found: Mutex<Option<Told>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                // Ends with the last seed, or when no lower one is left.
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= seeds || index > lowest.load(Ordering::Relaxed) {
                        break;
                    }
                    let told = tell(first + index, broken, false);
                    if told.violation.as_ref().is_some_and(&is_it) {
                        let before = lowest.fetch_min(index, Ordering::Relaxed);
                        if index < before {
                            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            if found.as_ref().is_none_or(|known| known.seed > told.seed) {
                                *found = Some(told);
                            }
                        }
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

// === impl Summary ===

impl Summary {
    fn take(&mut self, told: Told) {
        self.seeds += 1;
        self.steps += told.steps;
        self.charged_ms += told.charged_ms;
        self.coverage.add(&told.coverage);
        for (sum, count) in self.faults.iter_mut().zip(&told.faults) {
            *sum += count;
        }
        if told.violation.is_some() {
            self.failed += 1;
            self.keep(told);
        }
    }

    fn keep(&mut self, told: Told) {
        self.failures.push(told);
        self.failures.sort_by_key(|told| told.seed);
        self.failures.truncate(FAILURES_MAX);
    }

    fn add(&mut self, part: Self) {
        self.seeds += part.seeds;
        self.steps += part.steps;
        self.charged_ms += part.charged_ms;
        self.failed += part.failed;
        self.coverage.merge(&part.coverage);
        for (sum, count) in self.faults.iter_mut().zip(&part.faults) {
            *sum += count;
        }
        for told in part.failures {
            self.keep(told);
        }
    }
}
