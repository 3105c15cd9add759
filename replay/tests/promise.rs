//! Invariant 11 on hostile traces: nobody waits longer than he was promised, slots are never over-used, and everybody
//! runs once. The traces are made to break two-lane: few cards, aligned ends, long halves against short whole cards,
//! bursts, and leases that take all they declare. A failing seed is a bug report.

#![allow(clippy::unwrap_used, clippy::panic, reason = "outside #[test] functions clippy does not know a test")]

use std::collections::BTreeMap;

use spaceport_core::ids::Size;
use spaceport_core::queue::LaneSettings;
use spaceport_replay::admission::Quota;
use spaceport_replay::policy::PolicyName;
use spaceport_replay::promise::HoldLimits;
use spaceport_replay::random::Random;
use spaceport_replay::replay::{Outcome, Replay, Rules, replay};
use spaceport_replay::request::{Request, Tier, Trace, User};

/// Seeds tried each time. 200,000 were once: the worst wait was 0.82 of its promise.
const SEEDS: u64 = 400;
/// Seeds that broke something: 764 a half that whole cards kept waiting 23 times its promise; 7301 a class that paid
/// for turns of another; 12172 a drain that a half had to sit out; 193044 whole cards of one class behind another's;
/// 192995 and 84894 the largest shares of a promise that are known.
const KNOWN: [u64; 6] = [764, 7301, 12_172, 193_044, 192_995, 84_894];

/// One kind of request: declared milliseconds, size, index of its user.
type Kind = (u64, Size, usize);

fn rules(cards: u32) -> Rules {
    Rules {
        nodes: 1,
        cards,
        // A lease takes what it declares and the promise knows it: no slack hides a late start.
        limits: HoldLimits::NONE,
        quota: Quota::Off,
        bounds: None,
        lanes: LaneSettings::default(),
    }
}

fn one_of<T: Copy>(random: &mut Random, values: &[T]) -> T {
    values[random.below(values.len())]
}

fn size(random: &mut Random, whole: f64) -> Size {
    if random.chance(whole) { Size::Xlarge } else { Size::Large }
}

fn hostile(seed: u64) -> (Trace, u32) {
    let mut random = Random::new(seed);
    let cards = 1 + random.below(12) as u32;
    let count = 5 + random.below(400);
    let whole = one_of(&mut random, &[0.02, 0.15, 0.5, 0.9]);
    let gap_ms = one_of(&mut random, &[0.0, 200.0, 1000.0, 4000.0]) * 11.0 / f64::from(cards);
    let kinds: Vec<Kind> = (0..1 + random.below(4))
        .map(|_| {
            let declared_ms = one_of(&mut random, &[1000, 5000, 20_000, 60_000, 300_000]);
            (declared_ms, size(&mut random, whole), random.below(4))
        })
        .collect();
    let mixed = random.chance(0.5);
    let takes_all = random.chance(0.7);
    let burst = one_of(&mut random, &[1.0, 0.3, 0.05]);
    let mut now_ms = 0.0;
    let requests = (0..count).map(|_| {
        if random.chance(burst) {
            now_ms += random.exponential(gap_ms / burst);
        }
        let (declared_ms, size, user) = if mixed {
            let declared_ms = (1000.0 * (random.unit() * 5.7).exp()) as u64;
            (declared_ms, size(&mut random, whole), random.below(4))
        } else {
            one_of(&mut random, &kinds)
        };
        let share = if takes_all { 1.0 } else { random.unit() };
        let duration_ms = (declared_ms as f64 * share).ceil() as u64;
        Request { arrival_ms: now_ms as u64, duration_ms, declared_ms, size, user, function: None }
    });
    let requests = requests.collect();
    let users = Tier::ALL.map(|tier| User { name: tier.as_str().into(), tier }).to_vec();
    (Trace { requests, users }, cards)
}

/// Slots in use on each card over time never exceed two, and nobody starts before he came.
fn assert_conserved(trace: &Trace, replay: &Replay, cards: u32, what: &str) {
    let mut changes: BTreeMap<(u64, bool), Vec<(u32, i64)>> = BTreeMap::new();
    for (request, outcome) in trace.requests.iter().zip(&replay.outcomes) {
        let Outcome::Started { wait_ms, place: (_, card), .. } = outcome else {
            panic!("{what}: refused without rules")
        };
        let start_ms = request.arrival_ms + wait_ms;
        let slots = request.slots().cast_signed();
        assert!(*card < cards, "{what}: there is no card {card}");
        // Ends come before starts of the same moment.
        changes.entry((start_ms, true)).or_default().push((*card, slots));
        changes.entry((start_ms + request.served_ms(), false)).or_default().push((*card, -slots));
    }
    let mut used: BTreeMap<u32, i64> = BTreeMap::new();
    for ((at_ms, _), changes) in changes {
        for (card, change) in changes {
            let used = used.entry(card).or_default();
            *used += change;
            assert!((0..=2).contains(used), "{what}: {used} halves of card {card} in use at {at_ms} ms");
        }
    }
}

#[test]
fn two_lane_keeps_its_promises_on_hostile_traces() {
    let mut worst = (0.0, 0);
    for seed in KNOWN.into_iter().chain(0..SEEDS) {
        let (trace, cards) = hostile(seed);
        for outcome in replay(&trace, PolicyName::TwoLane, &rules(cards)).outcomes {
            let Outcome::Started { wait_ms, promised_ms, .. } = outcome else { panic!("refused without rules") };
            let share = wait_ms as f64 / promised_ms as f64;
            assert!(share <= 1.0, "seed {seed}: waited {wait_ms} ms, promised {promised_ms} ms");
            worst = if share > worst.0 { (share, seed) } else { worst };
        }
    }
    println!("worst wait / promise {:.3}, of seed {}", worst.0, worst.1);
    // A promise that nothing comes near would be no promise.
    assert!(worst.0 > 0.7, "{worst:?}");
}

#[test]
fn shortest_first_breaks_the_promise() {
    let breaks = KNOWN.into_iter().any(|seed| {
        let (trace, cards) = hostile(seed);
        replay(&trace, PolicyName::SjfEasy, &rules(cards))
            .outcomes
            .into_iter()
            .any(|outcome| matches!(outcome, Outcome::Started { wait_ms, promised_ms, .. } if wait_ms > promised_ms))
    });
    assert!(breaks, "the traces are not hostile enough to tell policies apart");
}

#[test]
fn slots_are_conserved_and_replays_repeat_under_every_policy() {
    for seed in KNOWN.into_iter().chain(0..30) {
        let (trace, cards) = hostile(seed);
        for policy in PolicyName::ALL {
            let first = replay(&trace, policy, &rules(cards));
            assert_conserved(&trace, &first, cards, &format!("seed {seed}, {}", policy.as_str()));
            assert_eq!(first, replay(&trace, policy, &rules(cards)), "seed {seed}, {policy:?}");
        }
    }
}
