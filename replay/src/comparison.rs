//! Policies side by side on the same requests.

use std::collections::BTreeMap;

use serde::Serialize;
use spaceport_core::ids::Size;

use crate::admission::Refusal;
use crate::policy::PolicyName;
use crate::replay::{Outcome, Replay, Rules, replay};
use crate::request::{Request, Tier, Trace};

/// What came of the traces, policy by policy.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Nodes.
    pub nodes: usize,
    /// Cards of each.
    pub cards: u32,
    /// Traces (seeds) that the figures are of, together.
    pub traces: usize,
    /// Requests in them.
    pub requests: usize,
    /// Asked slot-seconds over those there are until the last arrival.
    pub load: f64,
    /// The figures.
    pub policies: BTreeMap<PolicyName, Figures>,
    /// Waits in seconds, sorted, for the plot.
    #[serde(skip)]
    pub waits_s: BTreeMap<PolicyName, Vec<f64>>,
}

/// Figures of one policy over all traces. Waits are of the requests that started.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Waits of all.
    #[serde(flatten)]
    pub waits: Waits,
    /// Largest share of its promised wait that any request used: above 1, a promise was broken.
    pub worst_over_bound: f64,
    /// Jain's index over the accounts' shares of their time that went into running: 1 if all are equal. Mean over the
    /// traces.
    pub jain: f64,
    /// Slot-seconds of requests that came to their end before the last arrival, over those of the clairvoyant.
    pub goodput_ratio: f64,
    /// Mean wait over that of fcfs+easy.
    pub mean_over_fcfs_easy: f64,
    /// The same for each trace.
    pub mean_over_fcfs_easy_by_trace: Vec<f64>,
    /// Requests that were killed at what they declared.
    pub killed: usize,
    /// Refused requests by cause.
    pub refused: BTreeMap<Refusal, usize>,
    /// Waits by tier.
    pub by_tier: BTreeMap<Tier, Waits>,
    /// Waits by size.
    pub by_size: BTreeMap<&'static str, Waits>,
}

/// Waits in seconds; percentiles are samples (nearest rank). All 0 where nobody started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Waits {
    /// How many.
    pub started: usize,
    /// Mean.
    pub mean_wait_s: f64,
    /// Half wait at most this long.
    pub p50_wait_s: f64,
    /// Of a hundred, 95 wait at most this long.
    pub p95_wait_s: f64,
    /// Of a hundred, 99.
    pub p99_wait_s: f64,
    /// The longest.
    pub max_wait_s: f64,
}

/// One policy on one trace.
struct Run<'a> {
    trace: &'a Trace,
    replay: Replay,
}

// === impl Comparison ===

impl Comparison {
    /// Replays the traces under all policies.
    pub fn of(traces: &[Trace], rules: &Rules) -> Self {
        let runs: BTreeMap<PolicyName, Vec<Run<'_>>> = PolicyName::ALL
            .into_iter()
            .map(|policy| {
                let run = |trace| Run { trace, replay: replay(trace, policy, rules) };
                (policy, traces.iter().map(run).collect())
            })
            .collect();
        let base_means: Vec<f64> = runs[&PolicyName::FcfsEasy].iter().map(Run::mean_wait_s).collect();
        let best_goodput: f64 = runs[&PolicyName::Clairvoyant].iter().map(Run::goodput_ms).sum();
        let figures = |runs: &Vec<Run<'_>>| Figures::of(runs, &base_means, best_goodput);
        let slots = rules.nodes as f64 * f64::from(rules.cards) * 2.0;
        let asked_ms: u64 = traces.iter().map(Trace::work_ms).sum();
        let spans_ms: u64 = traces.iter().map(Trace::last_arrival_ms).sum();
        Self {
            nodes: rules.nodes,
            cards: rules.cards,
            traces: traces.len(),
            requests: traces.iter().map(|trace| trace.requests.len()).sum(),
            load: ratio(asked_ms as f64, (spans_ms as f64).max(1.0) * slots),
            policies: runs.iter().map(|(policy, runs)| (*policy, figures(runs))).collect(),
            waits_s: runs.iter().map(|(policy, runs)| (*policy, sorted(waits(runs, |_, _| true)))).collect(),
        }
    }
}

// === impl Figures ===

impl Figures {
    fn of(runs: &[Run<'_>], base_means: &[f64], best_goodput: f64) -> Self {
        let all = Waits::of(waits(runs, |_, _| true));
        let means: Vec<f64> = runs.iter().map(Run::mean_wait_s).collect();
        let base = mean(base_means.iter().copied());
        let mut refused = BTreeMap::new();
        for (_, outcome) in runs.iter().flat_map(Run::outcomes) {
            if let Outcome::Refused(refusal) = outcome {
                *refused.entry(*refusal).or_default() += 1;
            }
        }
        let by_tier = Tier::ALL.map(|tier| (tier, Waits::of(waits(runs, |of, _| of == tier))));
        let by_size = [Size::Large, Size::Xlarge]
            .map(|size| (size.as_str(), Waits::of(waits(runs, |_, request| request.size == size))));
        Self {
            waits: all,
            worst_over_bound: runs.iter().flat_map(Run::shares_of_promise).fold(0.0, f64::max),
            jain: mean(runs.iter().map(Run::jain)),
            goodput_ratio: ratio(runs.iter().map(Run::goodput_ms).sum(), best_goodput),
            mean_over_fcfs_easy: ratio(mean(means.iter().copied()), base),
            mean_over_fcfs_easy_by_trace: means
                .iter()
                .zip(base_means)
                .map(|(mean, base)| ratio(*mean, *base))
                .collect(),
            killed: runs.iter().flat_map(Run::started).filter(|(request, ..)| request.is_killed()).count(),
            refused,
            by_tier: by_tier.into_iter().filter(|(_, waits)| waits.started > 0).collect(),
            by_size: by_size.into_iter().filter(|(_, waits)| waits.started > 0).collect(),
        }
    }
}

// === impl Waits ===

impl Waits {
    /// The figures of these waits, seconds.
    pub fn of(waits: Vec<f64>) -> Self {
        let sorted = sorted(waits);
        let percentile = |percent: usize| {
            // Nearest rank; an empty list has none.
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or(0.0)
        };
        Self {
            started: sorted.len(),
            mean_wait_s: mean(sorted.iter().copied()),
            p50_wait_s: percentile(50),
            p95_wait_s: percentile(95),
            p99_wait_s: percentile(99),
            max_wait_s: percentile(100),
        }
    }
}

// === impl Run ===

impl Run<'_> {
    fn outcomes(&self) -> impl Iterator<Item = (&Request, &Outcome)> {
        self.trace.requests.iter().zip(&self.replay.outcomes)
    }

    /// Request, wait and promise, milliseconds.
    fn started(&self) -> impl Iterator<Item = (&Request, u64, u64)> {
        self.outcomes().filter_map(|(request, outcome)| match outcome {
            Outcome::Started { wait_ms, promised_ms, .. } => Some((request, *wait_ms, *promised_ms)),
            Outcome::Refused(_) => None,
        })
    }

    fn shares_of_promise(&self) -> impl Iterator<Item = f64> {
        self.started().map(|(_, wait_ms, promised_ms)| ratio(wait_ms as f64, promised_ms as f64))
    }

    fn mean_wait_s(&self) -> f64 {
        mean(self.started().map(|(_, wait_ms, _)| seconds(wait_ms)))
    }

    /// Slot-milliseconds of what came to its end before the last arrival. What is done later, all policies do.
    fn goodput_ms(&self) -> f64 {
        let until_ms = self.trace.last_arrival_ms();
        let done = |(request, wait_ms, _): &(&Request, u64, u64)| {
            !request.is_killed() && request.arrival_ms + wait_ms + request.duration_ms <= until_ms
        };
        let work_ms: u64 = self.started().filter(done).map(|(request, ..)| request.duration_ms * request.slots()).sum();
        work_ms as f64
    }

    fn jain(&self) -> f64 {
        let mut accounts: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        for (request, wait_ms, _) in self.started() {
            let (served, spent) = accounts.entry(request.user).or_default();
            *served += request.served_ms();
            *spent += request.served_ms() + wait_ms;
        }
        jain(accounts.values().map(|(served, spent)| ratio(*served as f64, *spent as f64)))
    }
}

/// Jain's fairness index: (sum of x)^2 / (n x sum of x^2); 1 for an empty list.
fn jain(values: impl Iterator<Item = f64>) -> f64 {
    let (count, sum, squares) = values
        .fold((0.0, 0.0, 0.0), |(count, sum, squares), value| (count + 1.0, sum + value, squares + value * value));
    ratio(sum * sum, count * squares)
}

fn waits(runs: &[Run<'_>], belongs: impl Fn(Tier, &Request) -> bool) -> Vec<f64> {
    runs.iter()
        .flat_map(|run| run.started().map(|(request, wait_ms, _)| (run.trace.tier(request), request, wait_ms)))
        .filter(|(tier, request, _)| belongs(*tier, request))
        .map(|(_, _, wait_ms)| seconds(wait_ms))
        .collect()
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (count, sum) = values.fold((0_u32, 0.0), |(count, sum), value| (count + 1, sum + value));
    if count == 0 { 0.0 } else { sum / f64::from(count) }
}

/// `a / b`; 1 for nothing over nothing.
fn ratio(a: f64, b: f64) -> f64 {
    if a == 0.0 && b == 0.0 { 1.0 } else { a / b }
}

const fn seconds(milliseconds: u64) -> f64 {
    milliseconds as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let waits = Waits::of((1..=200).rev().map(f64::from).collect());
        let expected = Waits {
            started: 200,
            mean_wait_s: 100.5,
            p50_wait_s: 100.0,
            p95_wait_s: 190.0,
            p99_wait_s: 198.0,
            max_wait_s: 200.0,
        };
        assert_eq!(waits, expected);
        assert_eq!(Waits::of(Vec::new()), Waits::default());
    }

    #[test]
    fn jain_is_one_for_equals_and_one_nth_for_one_of_many() {
        assert_eq!(jain([0.5, 0.5, 0.5].into_iter()), 1.0);
        assert_eq!(jain([1.0, 0.0, 0.0, 0.0].into_iter()), 0.25);
    }
}
