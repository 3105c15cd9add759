//! Each policy on small traces, with the start times that its rules say.

#![allow(clippy::unwrap_used, clippy::panic, reason = "outside #[test] functions clippy does not know a test")]

use spaceport_core::queue::LaneSettings;
use spaceport_core::queue::QueueBounds;
use spaceport_replay::admission::{Quota, Refusal};
use spaceport_replay::comparison::Comparison;
use spaceport_replay::demand::{Declare, Demand};
use spaceport_replay::policy::PolicyName;
use spaceport_replay::promise::HoldLimits;
use spaceport_replay::replay::{Outcome, Rules, replay};
use spaceport_replay::trace::parse;

fn rules(cards: u32) -> Rules {
    Rules { nodes: 1, cards, limits: HoldLimits::NONE, quota: Quota::Off, bounds: None, lanes: LaneSettings::default() }
}

/// Start times in seconds.
fn starts(csv: &str, policy: PolicyName, cards: u32) -> Vec<f64> {
    let trace = parse(csv).unwrap();
    let outcomes = replay(&trace, policy, &rules(cards)).outcomes;
    let start = |(request, outcome): (&spaceport_replay::request::Request, &Outcome)| match outcome {
        Outcome::Started { wait_ms, .. } => (request.arrival_ms + wait_ms) as f64 / 1000.0,
        Outcome::Refused(refusal) => panic!("refused: {refusal:?}"),
    };
    trace.requests.iter().zip(&outcomes).map(start).collect()
}

#[test]
fn easy_lets_a_short_half_pass_but_never_delays_the_head() {
    // A half runs until 100; a whole card is wanted; a half of 10 s and one of 200 s come after it.
    let csv = "0,100,0.5,a,100\n1,50,1,b,50\n2,10,0.5,c,10\n3,200,0.5,d,200\n";
    assert_eq!(starts(csv, PolicyName::Fcfs, 1), [0.0, 100.0, 150.0, 150.0]);
    assert_eq!(starts(csv, PolicyName::FcfsEasy, 1), [0.0, 100.0, 2.0, 150.0]);
    // One that ends with the head's moment passes, one a second longer does not.
    assert_eq!(starts("0,100,0.5,a,100\n1,50,1,b,50\n2,98,0.5,c,98\n", PolicyName::FcfsEasy, 1)[2], 2.0);
    assert_eq!(starts("0,100,0.5,a,100\n1,50,1,b,50\n2,99,0.5,c,99\n", PolicyName::FcfsEasy, 1)[2], 150.0);
}

#[test]
fn shortest_first_goes_by_what_is_declared_and_the_clairvoyant_by_what_is_true() {
    // The card is taken until 10. The first in line declares 50 and needs 5, the second declares 20 and needs 20.
    let csv = "0,10,1,a,10\n1,5,1,b,50\n2,20,1,c,20\n";
    assert_eq!(starts(csv, PolicyName::Fcfs, 1), [0.0, 10.0, 15.0]);
    assert_eq!(starts(csv, PolicyName::SjfEasy, 1), [0.0, 30.0, 10.0]);
    assert_eq!(starts(csv, PolicyName::Clairvoyant, 1), [0.0, 10.0, 15.0]);
}

#[test]
fn who_outlasts_his_declaration_is_killed_then() {
    assert_eq!(starts("0,100,1,a,10\n0,5,1,b,5\n", PolicyName::Fcfs, 1), [0.0, 10.0]);
}

#[test]
fn two_lane_prefers_the_higher_tier_among_equals() {
    let csv = "0,10,1,z,10,free\n1,20,1,a,20,guest\n2,20,1,b,20,free\n3,20,1,c,20,pro\n";
    assert_eq!(starts(csv, PolicyName::TwoLane, 1), [0.0, 50.0, 30.0, 10.0]);
}

#[test]
fn two_lane_ages() {
    // A long request, and forty short ones of other people that come with it, on two halves.
    let long_first = format!("0,60,0.5,long,60\n{}", "0,10,0.5,short,10\n".repeat(40));
    // Shortest first leaves it for the end. Here, each start of 10 s is worth 10 x 0.25 / 0.75 s to the age lane: 18 of
    // them are worth 60, and they have started when the tenth round begins.
    assert_eq!(starts(&long_first, PolicyName::SjfEasy, 1)[0], 200.0);
    assert_eq!(starts(&long_first, PolicyName::TwoLane, 1)[0], 90.0);
}

#[test]
fn the_reservation_is_exact() {
    // Card 0 is taken until 100, a half of card 1 until 50. A whole card is wanted at 1.
    let csv = "0,100,0.5,a,100\n0,100,0.5,b,100\n0.5,49.5,0.5,c,49.5\n1,5,1,whole,5\n2,200,0.5,d,200\n3,20,0.5,e,20\n";
    // Card 1 is kept: 200 s would pass its moment, 20 s end before it. The whole card starts at 50 and not later.
    assert_eq!(starts(csv, PolicyName::TwoLane, 2), [0.0, 0.0, 0.5, 50.0, 55.0, 3.0]);
    // Whatever becomes free earlier is taken earlier.
    let early = csv.replace("0.5,49.5,0.5,c,49.5", "0.5,29.5,0.5,c,49.5");
    assert_eq!(starts(&early, PolicyName::TwoLane, 2)[3], 30.0);
}

#[test]
fn two_lane_learns_what_a_function_takes() {
    // Both functions declare 60 s. Function 1 always takes 5 s; after eight ends it goes first though it came last.
    let past: String = (0..8).map(|second| format!("{},5,1,a,60,free,1\n", second * 10)).collect();
    let csv = format!("{past}80,10,1,z,10\n81,60,1,b,60,free,2\n82,5,1,a,60,free,1\n");
    let starts = starts(&csv, PolicyName::TwoLane, 1);
    assert_eq!(starts[8..], [80.0, 95.0, 90.0]);
}

#[test]
fn each_refusal_has_its_cause() {
    let outcome_of_last =
        |csv: &str, rules: &Rules| *replay(&parse(csv).unwrap(), PolicyName::TwoLane, rules).outcomes.last().unwrap();
    let tiers = Rules { quota: Quota::Tiers, ..rules(4) };
    let refused = |csv: &str| match outcome_of_last(csv, &tiers) {
        Outcome::Refused(refusal) => Some(refusal),
        Outcome::Started { .. } => None,
    };
    // A guest has 120 s, and 60 s a call; a whole card costs double.
    assert_eq!(refused("0,60,1,a,60,guest\n"), None);
    assert_eq!(refused("0,61,0.5,a,61,guest\n"), Some(Refusal::IllegalDuration));
    assert_eq!(refused("0,60,1,a,60,guest\n1,5,0.5,a,5,guest\n"), Some(Refusal::PendingOverquota));
    assert_eq!(refused("0,60,1,a,60,guest\n60,5,0.5,a,5,guest\n"), Some(Refusal::QuotaExceeded));
    // Only what was used is charged, and a window ends after a day.
    assert_eq!(refused("0,20,1,a,60,guest\n60,5,0.5,a,5,guest\n"), None);
    assert_eq!(refused("0,60,1,a,60,guest\n86400,5,0.5,a,5,guest\n"), None);
    let bounded = Rules { bounds: Some(QueueBounds { node: 9, space: 9, account: 1 }), ..rules(1) };
    let queue = "0,10,1,z,10\n1,5,1,a,5\n";
    assert_eq!(outcome_of_last(&format!("{queue}2,5,1,a,5\n"), &bounded), Outcome::Refused(Refusal::QueueFull));
    assert!(matches!(outcome_of_last(&format!("{queue}2,5,1,b,5\n"), &bounded), Outcome::Started { .. }));
}

#[test]
fn a_space_stays_on_its_node_while_it_is_busy() {
    let trace = parse("0,10,1,a\n0,10,1,b\n1,10,1,a\n50,10,1,b\n").unwrap();
    let outcomes = replay(&trace, PolicyName::Fcfs, &Rules { nodes: 2, ..rules(1) }).outcomes;
    let places: Vec<_> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Started { wait_ms, place, .. } => (place.0, *wait_ms),
            Outcome::Refused(refusal) => panic!("refused: {refusal:?}"),
        })
        .collect();
    // The second call of `a` waits for its own node although the other is free at 10; `b` moves when it is idle.
    assert_eq!(places, [(0, 0), (1, 0), (0, 9000), (0, 0)]);
}

/// The goals of the policy table: one node with 11 cards, 4 h at 1.2, seeds 1 to 5.
#[test]
fn two_lane_meets_its_goals_on_the_fixed_demand() {
    let demand = Demand { load: 1.2, hours: 4.0, slots: 22, declare: Declare::AsFitted, between_functions: 0.5 };
    let traces: Vec<_> = (1..=5).map(|seed| demand.generate(seed)).collect();
    let comparison = Comparison::of(&traces, &Rules { limits: HoldLimits::PRODUCT, ..rules(11) });
    let two_lane = &comparison.policies[&PolicyName::TwoLane];
    assert!(two_lane.mean_over_fcfs_easy <= 0.55, "{}", two_lane.mean_over_fcfs_easy);
    assert!(two_lane.worst_over_bound <= 1.0, "{}", two_lane.worst_over_bound);
    let longest = |policy| comparison.policies[&policy].waits.max_wait_s;
    assert!(longest(PolicyName::TwoLane) < 0.65 * longest(PolicyName::SjfEasy));
}
