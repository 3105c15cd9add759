//! A slot goes from one lease to the next: when the next is ordered, what is not free yet, and what is written first.

use spaceport_core::ids::{AccountName, Size};
use spaceport_core::lease::{AgentLease, AgentPhase, Command, Effect, EndReport, PickedSlot, SETTLE_PATIENCE_MS};
use spaceport_core::page::Ending;

use crate::world::{BOB, World, node, order, orders, policy};

#[test]
fn the_next_one_is_held_while_the_slot_still_clears() {
    let mut story = World::begin(1, 600_000, 9);
    let first = order(&story.ask(BOB, Size::Xlarge, 10_000));
    story.started(&first.lease, 0);
    assert!(matches!(story.ask(BOB, Size::Large, 10_000)[..], [Effect::Queue(_)]));
    story.ask(BOB, Size::Large, 10_000);
    let orders = orders(&story.end(&first.lease, Ending::Released, 5_000));
    assert_eq!(orders.len(), 2, "both halves of the card are handed over");
    for order in orders {
        assert_eq!(order.after.as_ref(), Some(&first.lease));
    }
    // The card is spoken for.
    assert!(matches!(story.ask(BOB, Size::Large, 10_000)[..], [Effect::Queue(_)]));
}

/// Invariant 6: two leases end, and the first one's successor gets the second one's slot, which is back earlier.
#[test]
fn a_successor_on_another_slot_than_its_predecessors_keeps_it_until_it_is_clear() {
    let mut story = World::begin(1, 600_000, 9);
    let first = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    let second = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    story.started(&first, 0);
    story.started(&second, 0);
    story.ask(BOB, Size::Large, 10_000);
    let successor = order(&story.end(&first, Ending::Released, 5_000)).lease;
    story.end(&second, Ending::Released, 5_000);
    story.free(&second);
    story.started(&successor, 0);
    story.end(&successor, Ending::Released, 100);
    // Nothing of the card is clear: the first one's slot and the successor's both are not.
    assert!(order(&story.ask(BOB, Size::Large, 10_000)).after.is_some());
}

/// Invariant 6: the node is away while its lease is being settled, and says that the slot still clears.
#[test]
fn a_slot_that_still_clears_when_its_node_is_back_is_not_free() {
    let mut story = World::begin(1, 600_000, 9);
    story.account("carol", policy(600_000, 9));
    let first = order(&story.ask(BOB, Size::Xlarge, 10_000)).lease;
    story.started(&first, 0);
    let report = EndReport { ending: Ending::Released, used_ms: 5_000 };
    story.tell_unanswered(Command::Ended { node: node(), lease: first.clone(), report, kept: false });
    story.leave();
    let phase = AgentPhase::Ended { report, freed: false };
    let account = Some(AccountName::new(BOB));
    let lease = AgentLease { lease: first.clone(), account, size: Size::Xlarge, slot: PickedSlot::Has(0), phase };
    story.join(vec![lease], Vec::new());
    assert_eq!(order(&story.ask("carol", Size::Xlarge, 10_000)).after, Some(first));
}

/// A lease of bob's ends, and carol's call has waited for its slot.
fn hand_over() -> (World, Vec<(AccountName, String)>) {
    let mut story = World::begin(1, 600_000, 9);
    story.account("carol", policy(600_000, 9));
    let first = order(&story.ask(BOB, Size::Xlarge, 10_000));
    story.started(&first.lease, 0);
    assert!(matches!(story.ask("carol", Size::Xlarge, 10_000)[..], [Effect::Queue(_)]));
    let report = EndReport { ending: Ending::Released, used_ms: 5_000 };
    let written = story.tell_unanswered(Command::Ended { node: node(), lease: first.lease, report, kept: false });
    (story, written)
}

fn accounts(written: &[(AccountName, String)]) -> Vec<&str> {
    written.iter().map(|(account, _)| account.as_str()).collect()
}

#[test]
fn at_a_hand_over_the_hold_that_a_visitor_waits_for_is_written_first() {
    let (mut story, written) = hand_over();
    assert_eq!(accounts(&written), ["carol"]);
    let (account, write_id) = written[0].clone();
    assert_eq!(accounts(&story.tell_unanswered(Command::PageWritten { account, write_id })), [BOB]);
}

#[test]
fn a_settlement_does_not_wait_long_for_the_hold_of_another() {
    let (mut story, _) = hand_over();
    story.now += SETTLE_PATIENCE_MS - 1;
    assert_eq!(accounts(&story.tell_unanswered(Command::Tick)), [""; 0]);
    story.now += 1;
    assert_eq!(accounts(&story.tell_unanswered(Command::Tick)), [BOB]);
}
