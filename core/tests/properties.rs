//! Invariants 1 to 6 and L3 of the ledger over random histories, and for each check a deliberate fault that it sees.

mod world;

use proptest::prelude::*;
use spaceport_core::lease::Mutant;
use world::{Faults, World, script};

fn history(script: &[u32], faults: Faults) -> Result<World, String> {
    let mut world = World::new(faults);
    world.run(script)?;
    world.replay()?;
    world.settle_down()?;
    Ok(world)
}

const STORMS: Faults = Faults { mutant: None, storms: true };
const CALM: Faults = Faults { mutant: None, storms: false };

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Crashes, cuts, conflicts, unknown outcomes, stepped clocks: the accounts add up and every lease is settled once.
    #[test]
    fn every_history_adds_up(script in prop::collection::vec(any::<u32>(), 1..400)) {
        if let Err(error) = history(&script, STORMS) {
            prop_assert!(false, "{}", error);
        }
    }

    /// Without faults the broker's picture of a node is right: no order is refused for want of a slot.
    #[test]
    fn calm_histories_order_only_what_fits(script in prop::collection::vec(any::<u32>(), 1..400)) {
        if let Err(error) = history(&script, CALM) {
            prop_assert!(false, "{}", error);
        }
    }
}

/// The histories are worth something: leases are granted, settled and charged in them.
#[test]
fn histories_reach_far() {
    let (mut granted, mut charged_ms) = (0, 0);
    for seed in 0..50 {
        let world = history(&script(seed, 400), STORMS).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        granted += world.granted;
        charged_ms += world.store.settled.values().map(|closed| closed.charged_ms).sum::<u64>();
    }
    assert!(granted > 500, "{granted} orders");
    assert!(charged_ms > 100_000, "{charged_ms} ms charged");
}

/// Some history must fail, with an error that names what was broken.
fn is_seen(mutant: Mutant, storms: bool, names: &[&str]) {
    let faults = Faults { mutant: Some(mutant), storms };
    let error = (0..300).find_map(|seed| history(&script(seed, 400), faults).err());
    let error = error.unwrap_or_else(|| "nothing, in 300 histories".to_owned());
    assert!(names.iter().any(|name| error.contains(name)), "{mutant:?} was seen as: {error}");
}

#[test]
fn a_decision_without_what_is_in_flight_is_seen() {
    is_seen(Mutant::DecideOnDurable, true, &["apply refused"]);
}

#[test]
fn an_order_before_its_hold_is_durable_is_seen() {
    is_seen(Mutant::OrderEarly, true, &["invariant 2"]);
}

#[test]
fn a_hold_that_is_settled_twice_is_seen() {
    is_seen(Mutant::SettleTwice, true, &["L3", "invariant 3"]);
}

#[test]
fn a_settlement_lost_in_a_rebase_is_seen() {
    is_seen(Mutant::RebaseForgets, true, &["invariant 3"]);
}

#[test]
fn a_charge_without_a_gpu_is_seen() {
    is_seen(Mutant::ChargeUnallowed, true, &["invariant 5", "invariant 4"]);
}

#[test]
fn a_charge_without_a_bound_is_seen() {
    is_seen(Mutant::ChargeUnbounded, true, &["would be charged", "invariant 5"]);
}

#[test]
fn a_charge_of_what_was_declared_is_seen() {
    is_seen(Mutant::ChargeDeclared, true, &["invariant 5"]);
}

#[test]
fn a_slot_given_before_it_is_back_is_seen() {
    is_seen(Mutant::FreeAtEnd, false, &["invariant 6"]);
}

#[test]
fn a_read_taken_for_a_proof_of_failure_is_seen() {
    is_seen(Mutant::ReadProvesFailure, true, &["L2"]);
}

#[test]
fn a_silent_node_given_up_too_early_is_seen() {
    is_seen(Mutant::ExpireAtOnce, true, &["L9"]);
}

#[test]
fn a_lease_held_to_other_limits_than_those_of_its_order_is_seen() {
    is_seen(Mutant::PresentLimits, true, &["L9"]);
}

#[test]
fn an_apply_that_is_not_pure_is_seen() {
    is_seen(Mutant::Stateful, true, &["replay"]);
}

#[test]
fn successors_may_take_each_others_slots() {
    // Two leases of one card end; the second one's slot comes back first, and the first one's successor takes it. The
    // other successor then waits for the first one's slot instead.
    let script = [
        3835482419_u32,
        560784017_u32,
        2113201335_u32,
        874541416_u32,
        2183562598_u32,
        91895709_u32,
        267634996_u32,
        1997313211_u32,
        2633884120_u32,
        3914635702_u32,
        989763306_u32,
        1418836217_u32,
        4250319095_u32,
        2922979291_u32,
        316046599_u32,
        884721886_u32,
        398272420_u32,
        1214410430_u32,
        3239282717_u32,
        3387557001_u32,
        3664232320_u32,
        181997461_u32,
        3825410828_u32,
        3456449222_u32,
        193728949_u32,
        275289102_u32,
        254678736_u32,
        2303227103_u32,
        2224806385_u32,
        3434625967_u32,
        1988098862_u32,
        1068719034_u32,
        2640760029_u32,
        2865679600_u32,
        943436438_u32,
        2363994298_u32,
        3249465679_u32,
        2829899268_u32,
        3362063787_u32,
        889619485_u32,
        1443388412_u32,
        1990137622_u32,
        3668690076_u32,
        3017430316_u32,
        2346613209_u32,
        1902399323_u32,
        3951941018_u32,
        341827486_u32,
        3762490581_u32,
        3154193331_u32,
        4263190502_u32,
        1735693906_u32,
        3121213522_u32,
        2493385436_u32,
        1784636291_u32,
        3333205364_u32,
        487846748_u32,
        2942476291_u32,
        3506873909_u32,
        15394034_u32,
        4007607391_u32,
        1869526034_u32,
        1815555831_u32,
        3387939328_u32,
        1660890798_u32,
        2948475637_u32,
        1863575186_u32,
        680612852_u32,
        2529595493_u32,
        3751801506_u32,
        4180891835_u32,
    ];
    if let Err(error) = history(&script, CALM) {
        panic!("{error}");
    }
}
