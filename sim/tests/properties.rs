//! The rules of the ledger over drawn histories, and for each check something wrong that it sees.

use proptest::prelude::*;
use spaceport_sim::coverage::{Coverage, Scenario};
use spaceport_sim::mutants::{TABLE, catch};
use spaceport_sim::world::Told;
use spaceport_sim::{Plan, World, runs};

/// Within so many seeds every mutant must be seen. The command that is run by hand and in CI says the same of the table
/// that it prints.
const SEEDS: u64 = 1_000;

fn held(told: &Told) -> Result<(), TestCaseError> {
    let violation = told.violation.as_ref().map(ToString::to_string);
    prop_assert_eq!(violation, None, "seed {}", told.seed);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Crashes, cuts, conflicts, unknown outcomes, stepped clocks: the accounts add up and every lease is settled once. A
    /// failure shrinks to the fewest calls that show it.
    #[test]
    fn every_history_adds_up(seed in any::<u64>(), calls in 1_u64..40) {
        held(&World::new(Plan { calls, ..Plan::of(seed) }, false).tell())?;
    }

    /// Without faults nobody waits longer than was promised, and settlements take less than a second.
    #[test]
    fn calm_histories_keep_their_promises(seed in any::<u64>(), calls in 1_u64..40) {
        held(&World::new(Plan { calls, ..Plan::of(seed).calm() }, false).tell())?;
    }
}

#[test]
fn a_seed_always_tells_the_same_history() {
    for seed in [3, 7, 15] {
        let (one, other) = (runs::tell(seed, None, true), runs::tell(seed, None, true));
        assert!(one.lines.len() > 100);
        assert_eq!(one.lines, other.lines);
    }
}

/// The histories are worth something: leases are granted, settled and charged in them.
#[test]
fn histories_reach_far() {
    let summary = runs::run(0, 100, 2);
    assert_eq!(summary.failed, 0, "{:?}", summary.failures.first().map(|told| told.seed));
    let granted = summary.coverage.count(Scenario::Granted);
    assert!(granted > 800, "{granted} orders");
    assert!(summary.charged_ms > 1_000_000, "{} ms charged", summary.charged_ms);
}

/// Two leases end; the second one's slot comes back first, and the first one's successor takes it. The other successor
/// then waits for the first one's slot instead. It once ended in a refusal.
#[test]
fn successors_may_take_each_others_slots() {
    let mut coverage = Coverage::default();
    for seed in 0..60 {
        let told = World::new(Plan::of(seed).calm(), false).tell();
        assert_eq!(told.violation, None, "seed {seed}");
        coverage.add(&told.coverage);
    }
    assert!(coverage.count(Scenario::HandoverSwapped) > 0);
}

/// Guests meet both of their limits, and Spaces theirs.
#[test]
fn histories_reach_the_limits_of_guests_and_spaces() {
    let coverage = runs::run(0, 400, 2).coverage;
    for scenario in [
        Scenario::GuestCharged,
        Scenario::DeniedCookie,
        Scenario::DeniedPrefix,
        Scenario::WaitedForSpace,
        Scenario::Clamped,
    ] {
        assert!(coverage.count(scenario) > 0, "never: {}", scenario.as_str());
    }
}

#[test]
fn everything_that_is_wrong_on_purpose_is_seen() {
    for row in TABLE {
        assert!(catch(row, SEEDS, 2).is_some(), "{} is not seen as {}", row.broken.name(), row.against);
    }
}

/// Whole cards were promised that a half took first: one that waited for a slot which cleared late, or one of which the broker
/// forgot where its node had put it when its predecessor's slot came back.
#[test]
fn a_whole_card_is_only_promised_where_no_half_can_come_first() {
    for seed in [1_781, 2_242, 3_469, 22_356, 28_181, 37_181, 40_709] {
        let told = runs::tell(seed, None, false);
        assert_eq!(told.violation.map(|violation| violation.to_string()), None, "seed {seed}");
    }
}
