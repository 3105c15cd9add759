//! Quota against expected wait: what a quota for everyone would refuse, and what the rest would wait. In overload the
//! quota matters more than the order of the queue.

use serde::Serialize;

use crate::admission::Quota;
use crate::comparison::Waits;
use crate::policy::PolicyName;
use crate::replay::{Outcome, Rules, replay};
use crate::request::Trace;

/// Quotas that are tried, slot-seconds per account and window, after none at all.
pub const QUOTAS_S: [u64; 8] = [4800, 2400, 1800, 1200, 900, 600, 300, 120];

/// What one quota does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SweepRow {
    /// Slot-seconds of each account; None for no quota.
    pub quota_s: Option<u64>,
    /// Requests that were refused, of all.
    pub refused_share: f64,
    /// Slot-seconds that were let in over those there are until the last arrival.
    pub load: f64,
    /// What the others waited.
    #[serde(flatten)]
    pub waits: Waits,
}

/// Replays the traces under two-lane with each quota, of accounts that start the day unused.
pub fn sweep(traces: &[Trace], rules: &Rules) -> Vec<SweepRow> {
    std::iter::once(None).chain(QUOTAS_S.map(Some)).map(|quota_s| row(traces, rules, quota_s)).collect()
}

fn row(traces: &[Trace], rules: &Rules, quota_s: Option<u64>) -> SweepRow {
    let quota = quota_s.map_or(Quota::Off, |seconds| Quota::Each(seconds * 1000));
    let rules = Rules { quota, ..rules.clone() };
    let slots = rules.nodes as f64 * f64::from(rules.cards) * 2.0;
    let (mut waits, mut requests, mut served_ms, mut span_ms) = (Vec::new(), 0, 0, 0);
    for trace in traces {
        for (request, outcome) in trace.requests.iter().zip(replay(trace, PolicyName::TwoLane, &rules).outcomes) {
            if let Outcome::Started { wait_ms, .. } = outcome {
                waits.push(wait_ms as f64 / 1000.0);
                served_ms += request.served_ms() * request.slots();
            }
        }
        requests += trace.requests.len();
        span_ms += trace.last_arrival_ms();
    }
    let refused = requests - waits.len();
    SweepRow {
        quota_s,
        refused_share: refused as f64 / requests.max(1) as f64,
        load: served_ms as f64 / (span_ms.max(1) as f64 * slots),
        waits: Waits::of(waits),
    }
}
