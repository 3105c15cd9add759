//! The report: one JSON object for programs, a table for people.

use std::fmt;

use serde::Serialize;

use super::goals;
use super::percentiles::{Percentiles, rounded};

/// Median of a grant over the median of the bare write: the goal.
const RATIO_GOAL: f64 = 2.0;
/// Median of a hand-over over the median of a grant: the goal.
const HANDOVER_GOAL: f64 = 1.25;
/// Resident memory of the idle operator: the goal, MiB.
const OPERATOR_GOAL_MIB: f64 = 80.0;
/// Resident memory of the idle agent: the goal, MiB.
const AGENT_GOAL_MIB: f64 = 40.0;

/// What one run found. The field names are those of the JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The bare compare-and-swap of a page.
    pub cas_ms: Percentiles,
    /// A grant with a free slot, one caller.
    pub grant_ms: Percentiles,
    /// The same with 16 callers at once.
    pub grant16_ms: Percentiles,
    /// From a release to the `succeeded` event of the call that waited.
    pub handover_ms: Percentiles,
    /// `grant_ms.p50` over `cas_ms.p50`.
    pub ratio_p50: f64,
    /// Whole calls a second of the 16 callers together, each with `/allow` and `/release`.
    pub grants_per_s: f64,
    /// Resident memory of the operator before the load, MiB.
    pub operator_rss_mib: f64,
    /// Resident memory of the node agent before the load, MiB.
    pub agent_rss_mib: f64,
}

impl Report {
    #[allow(clippy::too_many_arguments)] // The fields, once, with what is derived from them.
    pub(super) fn new(
        cas_ms: Percentiles,
        grant_ms: Percentiles,
        grant16_ms: Percentiles,
        handover_ms: Percentiles,
        grants_per_s: f64,
        operator_rss_mib: f64,
        agent_rss_mib: f64,
    ) -> Self {
        Self {
            cas_ms,
            grant_ms,
            grant16_ms,
            handover_ms,
            ratio_p50: rounded(grant_ms.p50 / cas_ms.p50),
            grants_per_s: rounded(grants_per_s),
            operator_rss_mib: rounded(operator_rss_mib),
            agent_rss_mib: rounded(agent_rss_mib),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "{:<36}{:>9}{:>9}{:>9}", "milliseconds", "p50", "p90", "p99")?;
        for (name, row) in [
            ("page write (compare-and-swap)", self.cas_ms),
            ("grant, free slot, 1 caller", self.grant_ms),
            ("grant, free slot, 16 callers", self.grant16_ms),
            ("hand-over to the next in the queue", self.handover_ms),
        ] {
            writeln!(formatter, "{name:<36}{:>9.2}{:>9.2}{:>9.2}", row.p50, row.p90, row.p99)?;
        }
        writeln!(formatter)?;
        let numbers = [
            ("grant / page write, p50", self.ratio_p50, Some(RATIO_GOAL)),
            ("hand-over / grant, p50", self.handover_ms.p50 / self.grant_ms.p50, Some(HANDOVER_GOAL)),
            ("calls a second, 16 callers", self.grants_per_s, None),
            ("operator resident, MiB, idle", self.operator_rss_mib, Some(OPERATOR_GOAL_MIB)),
            ("agent resident, MiB, idle", self.agent_rss_mib, Some(AGENT_GOAL_MIB)),
        ];
        goals::lines(formatter, 36, &numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let row = |p50: f64| Percentiles { p50, p90: 2.0 * p50, p99: 3.0 * p50 };
        Report::new(row(2.5), row(4.0), row(9.0), row(6.0), 123.456_78, 30.0, 41.0)
    }

    #[test]
    fn the_json_has_the_promised_fields_and_no_other() {
        let value = serde_json::to_value(report()).unwrap();
        let mut names: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        let mut promised = [
            "cas_ms",
            "grant_ms",
            "grant16_ms",
            "handover_ms",
            "ratio_p50",
            "grants_per_s",
            "operator_rss_mib",
            "agent_rss_mib",
        ];
        promised.sort_unstable();
        assert_eq!(names, promised);
        assert_eq!(value["cas_ms"], serde_json::json!({ "p50": 2.5, "p90": 5.0, "p99": 7.5 }));
        assert_eq!(value["ratio_p50"], 1.6);
        assert_eq!(value["grants_per_s"], 123.457);
    }

    #[test]
    fn the_table_says_which_goals_are_met() {
        let text = report().to_string();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        assert!(line("grant / page write").ends_with("1.60   goal 2: met"), "{text}");
        assert!(line("hand-over / grant").ends_with("1.50   goal 1.25: missed"), "{text}");
        assert!(line("operator resident").ends_with("met") && line("agent resident").ends_with("missed"), "{text}");
    }
}
