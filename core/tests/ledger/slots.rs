//! What the ledger knows of the slots of leases that wait for one (L7, L14).

use spaceport_core::ids::{AccountName, LeaseId, Size};
use spaceport_core::lease::{AgentLease, AgentPhase, Command, Effect, EndReport, Order, PickedSlot};
use spaceport_core::page::Ending;
use spaceport_core::slots::{Occupancy, pick};

use crate::world::{BOB, World, node, order, orders, policy};

const REPORT: EndReport = EndReport { ending: Ending::Released, used_ms: 1_000 };
/// Writes of her page are answered when the story says so.
const ANN: &str = "ann";

/// A term of both, and a node with so many cards of two slots.
fn begin(cards: u32) -> World {
    let mut story = World::begin(cards, 600_000, 64);
    story.account(ANN, policy(600_000, 64));
    story.late = Some(ANN);
    story
}

/// The node was away.
fn rejoin(story: &mut World, leases: Vec<AgentLease>) {
    story.leave();
    story.join(leases, Vec::new());
}

/// Ann's writes are answered.
fn answer(story: &mut World) -> Vec<Order> {
    let answers = std::mem::take(&mut story.unanswered);
    answers.into_iter().flat_map(|answer| orders(&story.tell(answer))).collect()
}

fn ask(story: &mut World, caller: &str, size: Size) -> Vec<Order> {
    orders(&story.ask(caller, size, 10_000))
}

fn lease(story: &mut World, size: Size) -> LeaseId {
    order(&story.ask(BOB, size, 10_000)).lease
}

fn end(story: &mut World, lease: &LeaseId) -> Vec<Effect> {
    story.end(lease, REPORT.ending, REPORT.used_ms)
}

/// A lease on the only card as a whole has ended, and the one that follows it waits.
fn follower(cards: u32) -> (World, LeaseId, LeaseId) {
    let mut story = begin(cards);
    let first = lease(&mut story, Size::Xlarge);
    story.started(&first, 0);
    let others: Vec<LeaseId> = (1..cards).map(|_| lease(&mut story, Size::Xlarge)).collect();
    for (other, card) in others.iter().zip(1..) {
        story.started(other, card);
    }
    ask(&mut story, BOB, Size::Large);
    let follower = orders(&end(&mut story, &first))[0].clone();
    assert_eq!((follower.after.as_ref(), follower.wait_ms), (Some(&first), 10_000));
    (story, first, follower.lease)
}

/// The node had to look for another slot than the predicted one, which the broker would take for free.
#[test]
fn where_a_waiting_lease_will_be_is_not_predicted_any_more_when_its_node_has_said_it() {
    let (mut story, first, waits) = follower(2);
    let second = story.state.leases_on(&node()).map(|(id, _)| id.clone()).find(|id| *id != first && *id != waits);
    let second = second.expect("the other card's");
    end(&mut story, &second);
    story.placed(&waits, PickedSlot::Awaits(1));
    let next = ask(&mut story, BOB, Size::Xlarge);
    assert_eq!(next.len(), 1);
    assert_eq!(next[0].after, Some(first), "the first card will be clear as a whole, the second one will not");
    assert_eq!(ask(&mut story, BOB, Size::Large).first().and_then(|order| order.after.clone()), Some(second));
}

/// Invariant 6: its slot is not clear, whatever it waited for when its node was heard of last.
#[test]
fn a_lease_that_got_its_slot_and_ended_while_its_node_was_away_holds_it_until_that_is_clear() {
    for told in [PickedSlot::Awaits(0), PickedSlot::Open] {
        let (mut story, _, waits) = follower(1);
        story.placed(&waits, told);
        let phase = AgentPhase::Ended { report: REPORT, freed: false };
        let (account, slot) = (Some(AccountName::new(BOB)), PickedSlot::Has(0));
        let lease = AgentLease { account, lease: waits.clone(), size: Size::Large, slot, phase };
        rejoin(&mut story, vec![lease]);
        let orders = ask(&mut story, BOB, Size::Xlarge);
        assert!(orders.iter().all(|order| order.after.as_ref() == Some(&waits)), "{told:?}: {orders:?}");
        story.free(&waits);
    }
}

/// The same where nobody pays any more.
#[test]
fn a_lease_whose_account_is_gone_tells_of_its_slot_too() {
    let (mut story, first, waits) = follower(1);
    story.placed(&waits, PickedSlot::Awaits(0));
    story.tell(Command::AccountGone { account: AccountName::new(BOB) });
    story.free(&first);
    story.started(&waits, 0);
    end(&mut story, &waits);
    assert!(story.state.leases.contains_key(&waits), "it is known until its slot is clear");
    story.free(&waits);
    assert!(story.state.leases.is_empty());
}

/// Her whole card is promised first, and his order leaves first, for his page is written faster. A node puts a half on the
/// card with the lowest number where it can: that was hers, and she was refused.
#[test]
fn an_order_that_overtakes_another_one_leaves_it_its_card() {
    let mut story = begin(2);
    let [first, other, running] = [Size::Large, Size::Large, Size::Large].map(|size| lease(&mut story, size));
    for (lease, card) in [(&first, 0), (&other, 0), (&running, 1)] {
        story.started(lease, card);
    }
    end(&mut story, &other);
    story.free(&other);
    assert_eq!(ask(&mut story, ANN, Size::Xlarge), [], "a half runs on each card");
    assert_eq!(orders(&end(&mut story, &first)), [], "its card is hers, and her page is not written");
    let half = ask(&mut story, BOB, Size::Large);
    let mut in_use = Occupancy::default();
    in_use.add(0, 1);
    in_use.add(1, 1);
    assert_eq!(half.len(), 1);
    assert_eq!(pick(&story.cards, &in_use, Size::Large, &half[0].avoid), Some(1), "{half:?}");
    let whole = answer(&mut story);
    assert_eq!(whole.iter().map(|order| order.after.as_ref()).collect::<Vec<_>>(), [Some(&first)]);
    assert!(whole[0].avoid.is_empty(), "nobody is before her any more");
}

/// It is meant for the card that is kept, and its node gives it another one if that is clear first. Who has to leave the kept
/// card alone then found none.
#[test]
fn a_lease_under_way_to_the_kept_card_is_waited_for() {
    let mut story = begin(3);
    for card in &mut story.cards {
        card.large_slots = 1;
    }
    rejoin(&mut story, Vec::new());
    let [first, second, third] = [Size::Large, Size::Large, Size::Large].map(|size| lease(&mut story, size));
    for (lease, card) in [(&first, 0), (&second, 1), (&third, 2)] {
        story.started(lease, card);
    }
    ask(&mut story, ANN, Size::Large);
    assert_eq!(orders(&end(&mut story, &first)), [], "its card is hers, and her page is not written");
    assert_eq!(ask(&mut story, BOB, Size::Xlarge), [], "the card of the first one is kept for it");
    assert_eq!(ask(&mut story, BOB, Size::Large), []);
    assert_eq!(orders(&end(&mut story, &second)), [], "her node may give her this card");
    let hers = answer(&mut story);
    assert_eq!(hers.len(), 1, "{hers:#?}");
    let next = orders(&story.placed(&hers[0].lease, PickedSlot::Awaits(0)));
    assert_eq!(next.iter().map(|order| order.after.as_ref()).collect::<Vec<_>>(), [Some(&second)]);
}

/// L17: it was sent to an earlier term of the same replica, and read in this one. What its agent was told since comes behind
/// Joined.
#[test]
fn a_request_that_comes_before_its_node_has_joined_is_not_taken() {
    let mut story = begin(1);
    story.leave();
    assert_eq!(ask(&mut story, BOB, Size::Large), []);
    assert!(story.state.queue.is_empty());
}
