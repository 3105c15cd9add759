//! Places in the queue across a fail-over (L17): a request is told its place, and its agent presents it to the next leader.

use proptest::prelude::*;
use spaceport_core::ids::{Epoch, LeaseId, Size, Steady};
use spaceport_core::lease::{Event, Place, Policy, Priority, Request};
use spaceport_core::page::Ending;
use spaceport_core::protocol::Denial;
use spaceport_core::queue::{Presented, Promised, QueueBounds};

use crate::world::{BOB, World, card, denial, node, orders, places, policy, ticket};

/// Ann's and bob's term, with one slot that somebody has.
fn begin(epoch: u64) -> (World, LeaseId) {
    let mut term = World::empty(epoch, vec![card(0, 1)]);
    for (account, priority) in [("ann", Priority::Medium), (BOB, Priority::Medium), ("pro", Priority::Highest)] {
        term.account(account, Policy { priority, ..policy(600_000, 64) });
    }
    term.join(Vec::new(), Vec::new());
    ask(&mut term, 1_000 + epoch, "pro", None);
    let (lease, _) = ordered(&mut term).expect("the slot is free");
    (term, lease)
}

fn ask(term: &mut World, number: u64, account: &str, presented: Option<Presented>) {
    let request = term.request(account, Size::Large, 10_000);
    term.send(Request { ticket: ticket(number), presented, ..request });
}

/// The lease that was ordered since the last look, and for which ticket.
fn ordered(term: &mut World) -> Option<(LeaseId, u64)> {
    orders(&term.look()).into_iter().next().map(|order| (order.lease, order.ticket.number))
}

fn its_place(term: &mut World) -> Place {
    let mut places = places(&term.look());
    assert_eq!(places.len(), 1, "{places:?}");
    places.remove(0)
}

/// The lease runs to its end, and the next one is ordered, for this ticket.
fn next_after(term: &mut World, lease: &LeaseId) -> Option<(LeaseId, u64)> {
    term.started(lease, 0);
    term.finish(lease, Ending::Released, 10_000);
    ordered(term)
}

/// Who waits, oldest first.
fn line(term: &World) -> Vec<u64> {
    term.state.queue.line(&node()).map(|waiting| waiting.ticket.number).collect()
}

/// What an agent presents of a place that it was told so long ago.
fn of(place: &Place, ago_ms: u64) -> Option<Presented> {
    let (epoch, number) = place.place;
    let promised = place.latest_start_ms.map(|wait_ms| Promised { wait_ms, ago_ms });
    Some(Presented { epoch, number, promised })
}

#[test]
fn earlier_terms_come_first_then_numbers_and_last_who_has_no_place() {
    let (mut third, _) = begin(3);
    let place = |epoch, number| Some(Presented { epoch: Epoch(epoch), number, promised: None });
    let asked = [(1, None), (2, place(2, 1)), (3, place(1, 9)), (4, place(2, 7)), (5, place(1, 8)), (6, None)];
    asked.into_iter().for_each(|(number, place)| ask(&mut third, number, "ann", place));
    assert_eq!(line(&third), [5, 3, 2, 4, 1, 6]);
    // Its own numbers go on as they were.
    let told: Vec<(Epoch, u64)> = places(&third.look()).iter().map(|place| place.place).collect();
    let expected = [(3, 2), (2, 1), (1, 9), (2, 7), (1, 8), (3, 3)].map(|(epoch, number)| (Epoch(epoch), number));
    assert_eq!(told, expected);
}

/// No agent can make itself a place: not of this term or a later one, nor one that somebody has.
#[test]
fn a_place_that_nobody_was_given_or_somebody_has_is_none() {
    let (mut term, _) = begin(2);
    let place = |epoch, number| Some(Presented { epoch: Epoch(epoch), number, promised: None });
    ask(&mut term, 1, "ann", place(1, 4));
    for (number, place) in [(2, place(1, 4)), (3, place(2, 50)), (4, place(3, 1)), (5, place(1, 0))] {
        ask(&mut term, number, "ann", place);
    }
    assert_eq!(line(&term), [1, 2, 3, 4, 5]);
    let told: Vec<(Epoch, u64)> = places(&term.look()).iter().map(|place| place.place).collect();
    assert_eq!(told, [(1, 4), (2, 2), (2, 3), (2, 4), (2, 5)].map(|(epoch, number)| (Epoch(epoch), number)));
}

#[test]
fn what_was_promised_is_kept_by_the_next_leader() {
    let (mut first, _) = begin(1);
    ask(&mut first, 1, "ann", None);
    let told = its_place(&mut first);
    let promised_ms = told.latest_start_ms.unwrap();
    let (mut second, _) = begin(2);
    second.now = 7_000;
    ask(&mut second, 1, "ann", of(&told, 30_000));
    let again = its_place(&mut second);
    assert_eq!((again.place, again.latest_start_ms), (told.place, Some(promised_ms - 30_000)));
    let promise = second.state.queue.iter().next().unwrap().promise.unwrap();
    assert_eq!((promise.waited_ms(Steady(8_000)), promise.wait_ms), (31_000, promised_ms), "what the metric compares");
    assert!(!second.events.iter().any(|event| matches!(event, Event::PromiseOver { .. })));
}

#[test]
fn what_was_promised_and_has_passed_is_promised_anew_with_its_reason() {
    let (mut second, _) = begin(2);
    let promised = Some(Promised { wait_ms: 20_000, ago_ms: 20_001 });
    ask(&mut second, 1, "ann", Some(Presented { epoch: Epoch(1), number: 3, promised }));
    let told = its_place(&mut second);
    assert!(told.latest_start_ms > Some(10_000), "{told:?}");
    let over = second.events.iter().find_map(|event| match event {
        Event::PromiseOver { waited_ms, promised_ms, .. } => Some((*waited_ms, *promised_ms)),
        _ => None,
    });
    assert_eq!(over, Some((20_001, 20_000)));
}

/// Somebody who came later was faster to reach the new leader: bounds of the queue and the fast refusal for quota are for
/// those who come, not for those who wait.
#[test]
fn whoever_waited_is_not_pushed_out_by_who_was_faster() {
    let (mut term, _) = begin(2);
    let place = |number| Some(Presented { epoch: Epoch(1), number, promised: None });
    let bound = QueueBounds::default().account as u64;
    (1..=bound).for_each(|number| ask(&mut term, number, "ann", None));
    term.effects.clear();
    ask(&mut term, 100, "ann", None);
    assert!(matches!(denial(&term.look()), Some(Denial::QueueFull { .. })));
    ask(&mut term, 101, "ann", place(1));
    assert_eq!(denial(&term.look()), None);
    assert_eq!(line(&term).first(), Some(&101));

    term.account("eve", policy(15_000, 64));
    ask(&mut term, 200, "eve", None);
    term.effects.clear();
    ask(&mut term, 201, "eve", None);
    assert!(matches!(denial(&term.look()), Some(Denial::PendingOverquota { .. } | Denial::QuotaExceeded { .. })));
    ask(&mut term, 202, "eve", place(2));
    assert_eq!(denial(&term.look()), None);
}

/// The node's own bound stays, so that a queue stays bounded whatever agents say.
#[test]
fn a_queue_has_its_bound_for_those_who_waited_too() {
    let (mut term, _) = begin(2);
    let bound = QueueBounds::default().node as u64;
    let place = |number| Some(Presented { epoch: Epoch(1), number, promised: None });
    (1..=bound).for_each(|number| ask(&mut term, number, "ann", place(number)));
    term.effects.clear();
    ask(&mut term, bound + 1, "ann", place(bound + 1));
    assert!(matches!(denial(&term.look()), Some(Denial::QueueFull { .. })));
}

proptest! {
    /// Whoever was ahead is ahead: the same class, the same account, any order in which they reach the new leader, and others
    /// who come in between. All are of one key, so it is the order of the places that decides.
    #[test]
    fn those_who_waited_start_in_the_order_of_their_places(
        mut order in Just((1..=12_u64).collect::<Vec<_>>()).prop_shuffle(),
        newcomers in prop::collection::vec(0..12_usize, 0..5),
        told in prop::collection::vec(any::<bool>(), 12),
    ) {
        let (mut first, _) = begin(1);
        let mut places = Vec::new();
        for number in 1..=12 {
            ask(&mut first, number, "ann", None);
            places.push(its_place(&mut first));
        }
        let (mut second, mut lease) = begin(2);
        for (index, at) in newcomers.iter().enumerate() {
            order.insert(*at, 100 + index as u64);
        }
        for number in &order {
            let known = places.get((*number - 1) as usize).filter(|_| *number <= 12 && told[(*number - 1) as usize]);
            ask(&mut second, *number, "ann", known.and_then(|place| of(place, 1_000)));
        }
        // First those who were told a place, as they were told; then the others, as they came.
        let has_place = |number: &u64| *number <= 12 && told[(*number - 1) as usize];
        let mut expected: Vec<u64> = order.iter().copied().filter(has_place).collect();
        expected.sort_unstable();
        expected.extend(order.iter().copied().filter(|number| !has_place(number)));
        prop_assert_eq!(line(&second), expected.clone());
        second.effects.clear();
        let mut started = Vec::new();
        while let Some((next, ticket)) = next_after(&mut second, &lease) {
            lease = next;
            started.push(ticket);
        }
        prop_assert_eq!(started, expected);
    }
}
