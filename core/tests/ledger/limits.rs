//! How long a lease may last: what its order carried, whatever applies to its node since, and what ends it then.

use spaceport_core::ids::{AccountName, LeaseId, NodeName, Size};
use spaceport_core::lease::{Command, Effect, Limits, NodeSettings};
use spaceport_core::page::Ending;

use crate::world::{BOB, World, node, order, policy};

/// The pool of the node changes.
fn limits(story: &mut World, limits: Limits) {
    let settings = NodeSettings { limits, ..NodeSettings::default() };
    story.tell(Command::NodeSettings { node: node(), settings });
}

#[test]
fn a_silent_node_is_given_up_at_its_bound_and_not_before() {
    let mut story = World::begin(1, 600_000, 9);
    let lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    story.started(&lease, 0);
    story.leave();
    // order_ttl 5 + allow_limit 30 + declared 10 + grace 2 + clear_limit 10
    story.pass(57_000);
    assert_eq!(story.page(BOB).holds.len(), 1);
    story.pass(1);
    let closed = &story.page(BOB).closed[0];
    assert_eq!((closed.ending, closed.charged_ms), (Ending::Expired, 0));
    // It comes back with its report: nothing changes, and it may forget it.
    let late = story.end(&lease, Ending::Released, 9_000);
    assert!(matches!(late[..], [Effect::Acknowledge { ended: true, .. }]));
    assert!(story.page(BOB).windows.is_empty());
}

#[test]
fn a_node_that_is_there_is_told_instead() {
    let mut story = World::begin(1, 600_000, 9);
    let lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    story.started(&lease, 0);
    let effects = story.pass(57_001);
    assert!(matches!(effects[..], [Effect::Cancel { .. }]), "only the node ends a granted lease");
    assert_eq!(story.pass(1_000), [], "not at every tick");
    story.end(&lease, Ending::Cancelled, 57_000);
    assert_eq!(story.page(BOB).closed[0].charged_ms, 10_000);
}

const QUICK: Limits = Limits { allow_limit_ms: 1_000, grace_ms: 0, clear_limit_ms: 1_000, order_ttl_ms: 1_000 };
const PATIENT: Limits =
    Limits { allow_limit_ms: 200_000, grace_ms: 60_000, clear_limit_ms: 100_000, order_ttl_ms: 20_000 };
/// Of a lease of 10 s: when it is over at the latest.
const PATIENT_BOUND_MS: u64 = 20_000 + 200_000 + 10_000 + 60_000 + 100_000;
const DEFAULT_BOUND_MS: u64 = 5_000 + 30_000 + 10_000 + 2_000 + 10_000;
/// And as much longer if its order was an earlier leader's to send.
const ORDER_AGE_MS: u64 = 10_000;

/// A term with one lease of 10 s, ordered under the patient limits; then the quick ones apply to its node.
fn under_other_limits() -> (World, LeaseId) {
    let mut story = World::begin(1, 600_000, 9);
    limits(&mut story, PATIENT);
    let order = order(&story.ask(BOB, Size::Large, 10_000));
    assert_eq!(order.limits, PATIENT);
    story.started(&order.lease, 0);
    limits(&mut story, QUICK);
    (story, order.lease)
}

/// The pool is edited, or the node is put into another, while a lease runs: its node obeys the limits of its order.
#[test]
fn a_running_lease_is_not_cancelled_before_the_limits_of_its_order() {
    let (mut story, lease) = under_other_limits();
    assert_eq!(story.pass(PATIENT_BOUND_MS), []);
    let effects = story.pass(1);
    assert!(matches!(&effects[..], [Effect::Cancel { lease: cancelled, .. }] if *cancelled == lease), "{effects:?}");
    let next = order(&story.ask(BOB, Size::Large, 10_000));
    assert_eq!(next.limits, QUICK, "the next one has the new limits");
}

#[test]
fn a_lease_of_a_silent_node_is_not_given_up_before_the_limits_of_its_order() {
    let (mut story, _) = under_other_limits();
    story.leave();
    story.pass(PATIENT_BOUND_MS);
    assert_eq!(story.page(BOB).holds.len(), 1);
    story.pass(1);
    assert_eq!(story.page(BOB).closed[0].ending, Ending::Expired);
}

#[test]
fn a_lease_that_waits_for_a_slot_has_the_time_in_which_that_slot_must_clear() {
    let (mut story, first) = under_other_limits();
    story.ask(BOB, Size::Xlarge, 10_000);
    let next = order(&story.end(&first, Ending::Released, 5_000));
    assert_eq!((next.after, next.limits), (Some(first), QUICK));
    story.leave();
    // The first clears by its own limit; all limits of the next begin then.
    story.pass(PATIENT.clear_limit_ms + 1_000 + 1_000 + 10_000 + 1_000);
    assert_eq!(story.page(BOB).holds.len(), 1);
    story.pass(1);
    assert!(story.page(BOB).holds.is_empty());
}

/// What the order of an earlier term carried nobody can tell: of all that is likely the longest.
#[test]
fn a_lease_of_an_earlier_term_has_the_longest_limits_that_are_likely() {
    for (own, others, bound_ms) in [
        (QUICK, QUICK, DEFAULT_BOUND_MS),
        (PATIENT, QUICK, PATIENT_BOUND_MS),
        // It may have been in the pool of the other until a moment ago.
        (QUICK, PATIENT, PATIENT_BOUND_MS),
    ] {
        let (story, lease) = under_other_limits();
        let (page, policy) = (Box::new(story.page(BOB).clone()), policy(600_000, 9));
        let mut next = World::empty(2, story.cards);
        let settings = NodeSettings { limits: others, ..NodeSettings::default() };
        next.tell(Command::NodeSettings { node: NodeName::new("gpu-2"), settings });
        limits(&mut next, own);
        next.tell(Command::AccountSeen { account: AccountName::new(BOB), page, policy });
        // What applies to its node later does not count either way.
        limits(&mut next, QUICK);
        next.pass(bound_ms + ORDER_AGE_MS);
        assert_eq!(next.page(BOB).holds[0].lease, lease);
        next.pass(1);
        assert_eq!(next.page(BOB).closed[0].ending, Ending::Expired);
    }
}
