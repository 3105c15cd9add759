//! The report: the three numbers for programs, and for people what they are made of.

use std::fmt;

use serde::Serialize;

use super::super::goals;
use super::super::percentiles::{Percentiles, rounded};
use super::population::Size;
use super::raw_list::Listed;

/// From the kill to the first grant: the goal, seconds.
const WARM_GOAL_S: f64 = 5.0;
/// A cold start over a raw LIST: the goal.
const COLD_GOAL: f64 = 1.5;

/// What one run measured.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Measured {
    /// From each kill -9 of the leader to the first lease that was asked for after it.
    pub(super) warm_s: Vec<f64>,
    /// From the start of each operator's process, with no other one running, to the first lease.
    pub(super) cold_s: Vec<f64>,
    /// The lists before, between and after them.
    pub(super) lists: Vec<Listed>,
    /// Memory that the leader had before it was killed, MiB.
    pub(super) leader_mib: f64,
    /// Memory that the other one had meanwhile, MiB.
    pub(super) standby_mib: f64,
    /// The most that any of them ever had, MiB.
    pub(super) most_mib: f64,
}

/// What one run found. The fields that are not skipped are those of the JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RecoveryReport {
    /// From kill -9 of the leader to the first lease that was asked for after it, with a warm standby; median.
    pub warm_s: f64,
    /// From the start of the only operator's process to the first lease; median.
    pub cold_s: f64,
    /// A raw LIST of what it lists; mean.
    pub list_s: f64,
    #[serde(skip)]
    size: Size,
    #[serde(skip)]
    measured: Measured,
}

impl RecoveryReport {
    pub(super) fn new(size: Size, measured: Measured) -> anyhow::Result<Self> {
        let lists: Vec<f64> = measured.lists.iter().map(|list| list.seconds).collect();
        anyhow::ensure!(!lists.is_empty(), "nothing was listed");
        Ok(Self {
            warm_s: Percentiles::of(&measured.warm_s)?.p50,
            cold_s: Percentiles::of(&measured.cold_s)?.p50,
            list_s: rounded(lists.iter().sum::<f64>() / lists.len() as f64),
            size,
            measured,
        })
    }
}

impl fmt::Display for RecoveryReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { warm_s, cold_s, list_s, size, measured } = self;
        writeln!(formatter, "{} accounts, {} of them with an open lease", size.accounts, size.leases)?;
        writeln!(formatter)?;
        writeln!(formatter, "{:<48}{:>9}   each", "seconds", "")?;
        let lists: Vec<f64> = measured.lists.iter().map(|list| list.seconds).collect();
        for (name, value, each) in [
            ("kill -9 of the leader to the first grant, median", *warm_s, &measured.warm_s),
            ("cold start to the first grant, median", *cold_s, &measured.cold_s),
            ("raw LIST of the same objects, mean", *list_s, &lists),
        ] {
            let each: Vec<String> = each.iter().map(|value| format!("{value:.2}")).collect();
            writeln!(formatter, "{name:<48}{value:>9.2}   {}", each.join(", "))?;
        }
        if let Some(list) = measured.lists.last() {
            let mib = list.bytes as f64 / 1024.0 / 1024.0;
            writeln!(formatter, "    {} objects, {mib:.0} MiB of JSON", list.objects)?;
        }
        writeln!(formatter)?;
        let numbers = [
            ("kill -9 of the leader to the first grant, s", *warm_s, Some(WARM_GOAL_S)),
            ("cold start / raw LIST", cold_s / list_s, Some(COLD_GOAL)),
            ("leader resident, MiB", measured.leader_mib, None),
            ("standby resident, MiB", measured.standby_mib, None),
            ("the most that an operator had, MiB", measured.most_mib, None),
            ("the same for each account, KiB", measured.most_mib * 1024.0 / size.accounts.max(1) as f64, None),
        ];
        goals::lines(formatter, 48, &numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> RecoveryReport {
        let list = |seconds| Listed { seconds, objects: 100_012, bytes: 300 << 20 };
        let measured = Measured {
            warm_s: vec![3.5, 2.812_34, 4.0],
            cold_s: vec![15.0, 18.0, 17.0],
            lists: vec![list(9.0), list(11.0)],
            leader_mib: 400.0,
            standby_mib: 390.0,
            most_mib: 781.25,
        };
        RecoveryReport::new(Size { accounts: 100_000, leases: 10_000 }, measured).unwrap()
    }

    #[test]
    fn the_json_has_the_promised_fields_and_no_other() {
        let value = serde_json::to_value(report()).unwrap();
        assert_eq!(value, serde_json::json!({ "warm_s": 3.5, "cold_s": 17.0, "list_s": 10.0 }));
    }

    #[test]
    fn the_table_has_every_sample_and_says_which_goals_are_met() {
        let text = report().to_string();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
        assert!(
            line("kill -9 of the leader to the first grant, median").ends_with("3.50   3.50, 2.81, 4.00"),
            "{text}"
        );
        assert!(line("kill -9 of the leader to the first grant, s").ends_with("goal 5: met"), "{text}");
        assert!(line("cold start / raw LIST").ends_with("1.70   goal 1.5: missed"), "{text}");
        assert!(line("the same for each account").ends_with("8.00"), "{text}");
        assert!(text.contains("100012 objects, 300 MiB of JSON"), "{text}");
    }
}
