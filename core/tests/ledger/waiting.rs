//! Who waits for the limit of leases of a Space, and how many are told of it at once.

use spaceport_core::ids::{AccountName, LeaseId, Size, SpaceKey, Ticket};
use spaceport_core::lease::{ANNOUNCED_MAX, Command, Departure, Event, Request, SpaceSettings};
use spaceport_core::page::Ending;
use spaceport_core::queue::{Lanes, QueueBounds, WaitsFor};
use spaceport_core::slots::Card;

use crate::world::{World, card, node, order, orders, places, policy, ticket};

/// A term with a node of these cards.
fn begin(cards: Vec<Card>) -> World {
    let mut story = World::empty(1, cards);
    story.join(Vec::new(), Vec::new());
    story
}

fn limit(story: &mut World, space: &str, concurrent: u32) {
    let settings = SpaceSettings { concurrent: Some(concurrent), ..SpaceSettings::default() };
    story.tell(Command::SpaceSettings { space: space.to_owned(), settings });
}

/// A call to this Space, of an account of its own.
fn ask(story: &mut World, space: &str, size: Size) -> Ticket {
    let account = format!("account-{}", story.tickets + 1);
    story.account(&account, policy(600_000, 64));
    let request = Request { space: SpaceKey::new("n", space, space), ..story.request(&account, size, 10_000) };
    let ticket = request.ticket.clone();
    story.send(request);
    ticket
}

fn waits_for(story: &World, ticket: &Ticket) -> WaitsFor {
    story.state.queue.get(ticket).unwrap().waits_for
}

fn waiting_for_node(story: &World) -> Vec<u64> {
    let node = node();
    let line = story.state.queue.line(&node).filter(|waiting| waiting.waits_for == WaitsFor::Node);
    line.map(|waiting| waiting.ticket.number).collect()
}

/// A Space at its limit of one with its lease, and so many that wait for it, beside another Space on the only card.
fn full_space(waiting: usize) -> (World, LeaseId) {
    let mut story = begin(vec![card(0, 2)]);
    limit(&mut story, "busy", 1);
    ask(&mut story, "busy", Size::Large);
    let lease = order(&story.look()).lease;
    story.started(&lease, 0);
    ask(&mut story, "other", Size::Large);
    let other = order(&story.look()).lease;
    story.started(&other, 0);
    for _ in 0..waiting {
        ask(&mut story, "busy", Size::Large);
    }
    assert_eq!(waiting_for_node(&story), [0; 0]);
    story.effects.clear();
    (story, lease)
}

#[test]
fn as_many_as_a_space_may_have_wait_for_the_node_and_the_others_are_told_nothing() {
    let (mut story, lease) = full_space(50);
    let other = ask(&mut story, "other", Size::Large).number;
    story.effects.clear();
    story.finish(&lease, Ending::Released, 1_000);
    assert_eq!(order(&story.look()).ticket.number, 3, "the oldest of all");
    assert_eq!(waiting_for_node(&story), [other]);
    let told = story.events.iter().filter(|event| matches!(event, Event::Announced { .. })).count();
    assert_eq!(told, 51, "each once, when it came");
}

#[test]
fn when_the_limit_rises_the_oldest_wait_for_the_node() {
    let (mut story, _) = full_space(10);
    limit(&mut story, "busy", 4);
    assert_eq!(waiting_for_node(&story), [3, 4, 5]);
    assert_eq!(places(&story.look()).len(), 3);
    // Who leaves, or is over, makes room for the next one.
    story.tell(Command::Dequeue { ticket: ticket(4) });
    assert_eq!(waiting_for_node(&story), [3, 5, 6]);
    limit(&mut story, "busy", 100);
    assert_eq!(waiting_for_node(&story).len(), 9);
}

#[test]
fn a_half_is_not_held_up_by_a_whole_card_of_its_space() {
    let mut story = begin(vec![card(0, 2)]);
    limit(&mut story, "busy", 1);
    ask(&mut story, "busy", Size::Large);
    let lease = order(&story.look()).lease;
    story.started(&lease, 0);
    ask(&mut story, "other", Size::Large);
    let other = order(&story.look()).lease;
    story.started(&other, 0);
    let whole = ask(&mut story, "busy", Size::Xlarge);
    let half = ask(&mut story, "busy", Size::Large);
    assert_eq!([waits_for(&story, &whole), waits_for(&story, &half)], [WaitsFor::Space; 2]);
    story.finish(&lease, Ending::Released, 1_000);
    assert_eq!(order(&story.look()).ticket, half);
}

#[test]
fn no_card_is_kept_for_a_space_that_may_have_no_other_lease() {
    let mut story = begin(vec![card(0, 2)]);
    limit(&mut story, "busy", 1);
    ask(&mut story, "other", Size::Large);
    let other = order(&story.look()).lease;
    story.started(&other, 0);
    ask(&mut story, "other", Size::Large);
    let another = order(&story.look()).lease;
    story.started(&another, 0);
    let whole = ask(&mut story, "busy", Size::Xlarge);
    story.finish(&other, Ending::Released, 1_000);
    let kept = |story: &World| story.state.queue.lanes(&node()).and_then(Lanes::reserved).is_some();
    assert!(kept(&story), "the card drains for it");
    limit(&mut story, "busy", 0);
    story.tell(Command::Tick);
    assert_eq!(waits_for(&story, &whole), WaitsFor::Space);
    assert!(!kept(&story));
    ask(&mut story, "other", Size::Large);
    assert_eq!(orders(&story.look()).len(), 1, "nobody has to wait for it");
}

#[test]
fn a_node_that_loses_slots_is_told_in_portions() {
    let mut story = begin(vec![card(0, 2), card(1, 2)]);
    let many = ANNOUNCED_MAX * 2 + 44;
    let spaces = many / QueueBounds::default().space + 1;
    for call in 0..many + 4 {
        ask(&mut story, &format!("space-{}", call % spaces), Size::Large);
    }
    story.effects.clear();
    story.tell(Command::Heartbeat { node: node(), cards: Some(vec![card(0, 2)]), idle: None });
    let mut told = vec![places(&story.look()).len()];
    for _ in 0..3 {
        story.tell(Command::Tick);
        told.push(places(&story.look()).len());
    }
    assert_eq!(told, [ANNOUNCED_MAX, ANNOUNCED_MAX, 44, 0]);
}

/// An order is on its way when its node loses a slot, and is refused: what its caller was told counts no more.
#[test]
fn a_promise_does_not_survive_the_slot_it_counted_on() {
    let mut story = begin(vec![card(0, 2)]);
    ask(&mut story, "a", Size::Large);
    let first = order(&story.look()).lease;
    story.started(&first, 0);
    ask(&mut story, "a", Size::Large);
    let second = order(&story.look()).lease;
    story.started(&second, 0);
    let ticket = ask(&mut story, "a", Size::Large);
    assert!(story.state.queue.get(&ticket).unwrap().promise.is_some());
    story.finish(&first, Ending::Released, 1_000);
    let ordered = order(&story.look());
    assert_eq!(ordered.ticket, ticket);
    story.events.clear();
    story.tell(Command::Heartbeat { node: node(), cards: Some(vec![card(0, 1)]), idle: None });
    story.refused(&ordered.lease);
    let again = story.events.iter().find_map(|event| if let Event::Queued(again) = event { Some(again) } else { None });
    assert_eq!(again.map(|again| (&again.ticket, again.promise)), Some((&ticket, None)));
}

#[test]
fn a_node_that_comes_back_with_fewer_slots_is_told_anew() {
    let mut story = begin(vec![card(0, 2)]);
    for _ in 0..3 {
        ask(&mut story, "a", Size::Large);
    }
    story.leave();
    story.cards = vec![card(0, 1)];
    story.join(Vec::new(), Vec::new());
    assert!(story.events.iter().any(|event| matches!(event, Event::PromisesWithdrawn { .. })));
}

/// D5: who is gone for which reason is told apart.
#[test]
fn whoever_waits_no_longer_has_its_own_reason() {
    let mut story = begin(vec![card(0, 1)]);
    ask(&mut story, "a", Size::Large);
    let first = order(&story.look()).lease;
    story.started(&first, 0);
    let left = ask(&mut story, "a", Size::Large);
    let silent = ask(&mut story, "a", Size::Large);
    let departures = |story: &mut World| {
        let events = std::mem::take(&mut story.events).into_iter();
        let left =
            events.filter_map(|event| if let Event::Left { ticket, why } = event { Some((ticket, why)) } else { None });
        left.collect::<Vec<_>>()
    };
    story.tell(Command::Dequeue { ticket: left.clone() });
    assert_eq!(departures(&mut story), [(left, Departure::CallerGone)]);
    story.leave();
    story.now += 60_001;
    story.tell(Command::Tick);
    assert_eq!(departures(&mut story), [(silent.clone(), Departure::NotPresented)]);
    let kind = |story: &World, ticket: &Ticket| {
        let account = &story.state.accounts[&AccountName::new(format!("account-{}", ticket.number))];
        account.working.recent_outcomes[0].kind.clone()
    };
    assert_eq!(kind(&story, &silent), "NotPresented");

    let mut story = begin(vec![card(0, 1)]);
    ask(&mut story, "a", Size::Large);
    let waits = ask(&mut story, "a", Size::Large);
    story.hello("b");
    assert_eq!(departures(&mut story), [(waits.clone(), Departure::AgentRestarted)]);
    assert_eq!(kind(&story, &waits), "AgentRestarted");
}
