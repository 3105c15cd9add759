//! The report: one JSON object for programs, a table for people.

use std::fmt;

use serde::Serialize;

use crate::bench::percentiles::rounded;

/// Cycles a second over page writes a second: at least, the goal.
const RATIO_GOAL: f64 = 0.25;
/// Mutating calls a lease: at most, the goal (docs/rules.md, Writes per lease).
const WRITES_GOAL: f64 = 4.5;

/// What was found with one number of replicas. The field names are those of the JSON.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sustained {
    /// Whole cycles a second: `/schedule`, `/allow`, `/release`.
    pub cycles_per_s: f64,
    /// Bare compare-and-swaps of pages a second, 16 writers.
    pub cas_per_s: f64,
    /// `cycles_per_s` over `cas_per_s`.
    pub ratio: f64,
    /// Leases without a receipt or without their charge.
    pub lost: u64,
    /// Leases that are charged twice, or that nobody was given.
    pub doubled: u64,
    /// Mutating calls of the API server for each lease, of operator and agent.
    pub writes_per_lease: f64,
}

/// The whole report: one replica at the top, two below it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SustainReport {
    /// With one operator.
    #[serde(flatten)]
    pub one_replica: Sustained,
    /// With two operators.
    pub two_replicas: Sustained,
}

impl Sustained {
    pub(super) fn new(cycles_per_s: f64, cas_per_s: f64, lost: u64, doubled: u64, writes_per_lease: f64) -> Self {
        Self {
            cycles_per_s: rounded(cycles_per_s),
            cas_per_s: rounded(cas_per_s),
            ratio: rounded(cycles_per_s / cas_per_s),
            lost,
            doubled,
            writes_per_lease: rounded(writes_per_lease),
        }
    }
}

impl SustainReport {
    /// Leases that were lost or doubled, with one or with two operators.
    pub fn wrong(&self) -> u64 {
        [self.one_replica, self.two_replicas].iter().map(|part| part.lost + part.doubled).sum()
    }
}

impl fmt::Display for SustainReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (one, two) = (&self.one_replica, &self.two_replicas);
        writeln!(formatter, "{:<36}{:>11}{:>11}", "operators", 1, 2)?;
        let goal = |met: bool| if met { "met" } else { "missed" };
        let mut row = |name: &str, value: fn(&Sustained) -> f64, told: String| {
            writeln!(formatter, "{name:<36}{:>11.3}{:>11.3}{told}", value(one), value(two))
        };
        row("lease cycles a second", |part| part.cycles_per_s, String::new())?;
        row("page writes a second, 16 writers", |part| part.cas_per_s, String::new())?;
        let met = one.ratio >= RATIO_GOAL && two.ratio >= RATIO_GOAL;
        row("cycles / page writes", |part| part.ratio, format!("   goal at least {RATIO_GOAL}: {}", goal(met)))?;
        let met = one.writes_per_lease <= WRITES_GOAL && two.writes_per_lease <= WRITES_GOAL;
        let told = format!("   goal at most {WRITES_GOAL}: {}", goal(met));
        row("mutating calls a lease", |part| part.writes_per_lease, told)?;
        let told = format!("   goal 0: {}", goal(self.wrong() == 0));
        writeln!(formatter, "{:<36}{:>11}{:>11}{told}", "leases lost", one.lost, two.lost)?;
        writeln!(formatter, "{:<36}{:>11}{:>11}{told}", "leases doubled", one.doubled, two.doubled)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn report() -> SustainReport {
        let one_replica = Sustained::new(80.123_45, 300.0, 0, 0, 4.21);
        SustainReport { one_replica, two_replicas: Sustained::new(60.0, 300.0, 1, 2, 4.6) }
    }

    #[test]
    fn the_json_has_the_promised_fields_and_no_other() {
        let value = serde_json::to_value(report()).unwrap();
        let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let fields = ["cas_per_s", "cycles_per_s", "doubled", "lost", "ratio", "writes_per_lease"];
        let mut top = names(&value);
        top.sort_unstable();
        assert_eq!(top, [&fields[..5], &["two_replicas"], &fields[5..]].concat());
        let mut two = names(&value["two_replicas"]);
        two.sort_unstable();
        assert_eq!(two, fields);
        assert_eq!((&value["cycles_per_s"], &value["ratio"]), (&json!(80.123), &json!(0.267)));
        assert_eq!(value["two_replicas"]["doubled"], 2);
    }

    #[test]
    fn the_table_says_which_goals_are_met() {
        let text = report().to_string();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        assert!(line("cycles / page writes").ends_with("0.267      0.200   goal at least 0.25: missed"), "{text}");
        assert!(line("mutating calls").ends_with("4.210      4.600   goal at most 4.5: missed"), "{text}");
        assert!(line("leases lost").ends_with("0          1   goal 0: missed"), "{text}");
        assert_eq!(report().wrong(), 3);
        let well = SustainReport { two_replicas: report().one_replica, ..report() };
        assert_eq!(well.wrong(), 0);
        assert!(!well.to_string().contains("missed"), "{well}");
    }
}
