//! Places in the queue across a fail-over (L17): a request is told its place, and its agent presents it to the next leader.

use std::collections::BTreeSet;

use proptest::prelude::*;
use spaceport_core::ids::{
    AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
};
use spaceport_core::lease::{
    Command, Effect, EndReport, Event, FreedAs, Moment, Order, Outcome, PickedSlot, Place, Policy, Priority, Request,
    State, step,
};
use spaceport_core::page::{Ending, Page};
use spaceport_core::protocol::{CallerClass, Denial};
use spaceport_core::queue::{Presented, Promised, QueueBounds};
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;

const NODE: &str = "gpu-1";

struct Term {
    state: State,
    now: u64,
    seed: u128,
    events: Vec<Event>,
    effects: Vec<Effect>,
}

fn policy(priority: Priority, base_ms: u64) -> Policy {
    Policy {
        tier: "demo".into(),
        allowance: Allowance {
            base_ms,
            longest_call_ms: 50_000,
            runs_per_window: None,
            generation: 1,
            grants: Vec::new(),
            per_cookie_ms: None,
        },
        concurrent: 64,
        priority,
        caller: CallerClass::Regular,
        deleting: false,
        conflict: None,
    }
}

fn request(number: u64, account: &str, presented: Option<Presented>) -> Request {
    Request {
        ticket: Ticket { agent_instance: "a".into(), number },
        node: NodeName::new(NODE),
        space: SpaceKey::new("n", "s", "u"),
        revision: Revision::default(),
        worker: None,
        size: Size::Large,
        declared_ms: 10_000,
        caller: Ok(AccountName::new(account)),
        cookie: None,
        budget: None,
        presented,
    }
}

impl Term {
    /// Ann's and bob's term, with one slot that somebody has.
    fn begin(epoch: u64) -> (Self, LeaseId) {
        let state = State::new(Epoch(epoch), BTreeSet::new());
        let mut term = Self { state, now: 0, seed: u128::from(epoch) << 64, events: Vec::new(), effects: Vec::new() };
        for (account, priority) in [("ann", Priority::Medium), ("bob", Priority::Medium), ("pro", Priority::Highest)] {
            let (account, policy) = (AccountName::new(account), policy(priority, 600_000));
            term.tell(Command::AccountSeen { account, page: Box::default(), policy });
        }
        let cards = vec![Card { index: 0, large_slots: 1, grantable: true, quarantined_slots: 0 }];
        let (node, highest_epoch) = (NodeName::new(NODE), Epoch(0));
        term.tell(Command::NodeHello { node: node.clone(), agent_instance: "a".into(), highest_epoch });
        term.tell(Command::NodeJoined { node, epoch: Epoch(epoch), cards, leases: Vec::new(), idle: Vec::new() });
        term.ask(request(1_000 + epoch, "pro", None));
        let lease = term.order().expect("the slot is free").lease;
        (term, lease)
    }

    fn tell(&mut self, command: Command) {
        let mut commands = vec![command];
        while let Some(command) = commands.pop() {
            self.seed += 1000;
            let at = Moment { wall: LedgerTime(1_000_000 + self.now as i64), steady: Steady(self.now) };
            let Outcome { events, effects, violations, .. } = step(&mut self.state, at, IdSeed(self.seed), command);
            assert_eq!(violations, []);
            self.events.extend(events);
            for effect in effects {
                if let Effect::Write { account, page } = &effect {
                    commands.push(Command::PageWritten { account: account.clone(), write_id: page.write_id.clone() });
                } else {
                    self.effects.push(effect);
                }
            }
        }
    }

    fn ask(&mut self, request: Request) {
        self.tell(Command::Request(Box::new(request)));
    }

    /// The order since the last look.
    fn order(&mut self) -> Option<Order> {
        std::mem::take(&mut self.effects).into_iter().find_map(|effect| match effect {
            Effect::Start(order) => Some(*order),
            _ => None,
        })
    }

    /// What was told since the last look.
    fn places(&mut self) -> Vec<Place> {
        let queued = std::mem::take(&mut self.effects).into_iter().filter_map(|effect| match effect {
            Effect::Queue(place) => Some(*place),
            _ => None,
        });
        queued.collect()
    }

    fn place(&mut self) -> Place {
        let mut places = self.places();
        assert_eq!(places.len(), 1, "{places:?}");
        places.remove(0)
    }

    fn denial(&mut self) -> Option<Denial> {
        std::mem::take(&mut self.effects).into_iter().find_map(|effect| match effect {
            Effect::Deny { denial, .. } => Some(denial),
            _ => None,
        })
    }

    /// The lease runs to its end, and the next one is ordered, for this ticket.
    fn next_after(&mut self, lease: &LeaseId) -> Option<(LeaseId, u64)> {
        let (node, report) = (NodeName::new(NODE), EndReport { ending: Ending::Released, used_ms: 10_000 });
        self.tell(Command::Started { node: node.clone(), lease: lease.clone(), slot: PickedSlot::Has(0) });
        self.tell(Command::Ended { node: node.clone(), lease: lease.clone(), report, kept: false });
        self.tell(Command::Freed { node, lease: lease.clone(), how: FreedAs::Free });
        self.order().map(|order| (order.lease, order.ticket.number))
    }

    /// Who waits, oldest first.
    fn line(&self) -> Vec<u64> {
        self.state.queue.line(&NodeName::new(NODE)).map(|waiting| waiting.ticket.number).collect()
    }
}

/// What an agent presents of a place that it was told so long ago.
fn of(place: &Place, ago_ms: u64) -> Option<Presented> {
    let (epoch, number) = place.place;
    let promised = place.latest_start_ms.map(|wait_ms| Promised { wait_ms, ago_ms });
    Some(Presented { epoch, number, promised })
}

#[test]
fn earlier_terms_come_first_then_numbers_and_last_who_has_no_place() {
    let (mut third, _) = Term::begin(3);
    let place = |epoch, number| Some(Presented { epoch: Epoch(epoch), number, promised: None });
    let asked = [(1, None), (2, place(2, 1)), (3, place(1, 9)), (4, place(2, 7)), (5, place(1, 8)), (6, None)];
    asked.into_iter().for_each(|(number, place)| third.ask(request(number, "ann", place)));
    assert_eq!(third.line(), [5, 3, 2, 4, 1, 6]);
    // Its own numbers go on as they were.
    let told: Vec<(Epoch, u64)> = third.places().iter().map(|place| place.place).collect();
    let expected = [(3, 2), (2, 1), (1, 9), (2, 7), (1, 8), (3, 3)].map(|(epoch, number)| (Epoch(epoch), number));
    assert_eq!(told, expected);
}

/// No agent can make itself a place: not of this term or a later one, nor one that somebody has.
#[test]
fn a_place_that_nobody_was_given_or_somebody_has_is_none() {
    let (mut term, _) = Term::begin(2);
    let place = |epoch, number| Some(Presented { epoch: Epoch(epoch), number, promised: None });
    term.ask(request(1, "ann", place(1, 4)));
    for (number, place) in [(2, place(1, 4)), (3, place(2, 50)), (4, place(3, 1)), (5, place(1, 0))] {
        term.ask(request(number, "ann", place));
    }
    assert_eq!(term.line(), [1, 2, 3, 4, 5]);
    let told: Vec<(Epoch, u64)> = term.places().iter().map(|place| place.place).collect();
    assert_eq!(told, [(1, 4), (2, 2), (2, 3), (2, 4), (2, 5)].map(|(epoch, number)| (Epoch(epoch), number)));
}

#[test]
fn what_was_promised_is_kept_by_the_next_leader() {
    let (mut first, _) = Term::begin(1);
    first.ask(request(1, "ann", None));
    let told = first.place();
    let promised_ms = told.latest_start_ms.unwrap();
    let (mut second, _) = Term::begin(2);
    second.now = 7_000;
    second.ask(request(1, "ann", of(&told, 30_000)));
    let again = second.place();
    assert_eq!((again.place, again.latest_start_ms), (told.place, Some(promised_ms - 30_000)));
    let promise = second.state.queue.iter().next().unwrap().promise.unwrap();
    assert_eq!((promise.waited_ms(Steady(8_000)), promise.wait_ms), (31_000, promised_ms), "what the metric compares");
    assert!(!second.events.iter().any(|event| matches!(event, Event::PromiseOver { .. })));
}

#[test]
fn what_was_promised_and_has_passed_is_promised_anew_with_its_reason() {
    let (mut second, _) = Term::begin(2);
    let promised = Some(Promised { wait_ms: 20_000, ago_ms: 20_001 });
    second.ask(request(1, "ann", Some(Presented { epoch: Epoch(1), number: 3, promised })));
    let told = second.place();
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
    let (mut term, _) = Term::begin(2);
    let place = |number| Some(Presented { epoch: Epoch(1), number, promised: None });
    let bound = QueueBounds::default().account as u64;
    (1..=bound).for_each(|number| term.ask(request(number, "ann", None)));
    term.effects.clear();
    term.ask(request(100, "ann", None));
    assert!(matches!(term.denial(), Some(Denial::QueueFull { .. })));
    term.ask(request(101, "ann", place(1)));
    assert_eq!(term.denial(), None);
    assert_eq!(term.line().first(), Some(&101));

    let policy = policy(Priority::Medium, 15_000);
    term.tell(Command::AccountSeen { account: AccountName::new("eve"), page: Box::<Page>::default(), policy });
    term.ask(request(200, "eve", None));
    term.effects.clear();
    term.ask(request(201, "eve", None));
    assert!(matches!(term.denial(), Some(Denial::PendingOverquota { .. } | Denial::QuotaExceeded { .. })));
    term.ask(request(202, "eve", place(2)));
    assert_eq!(term.denial(), None);
}

/// The node's own bound stays, so that a queue stays bounded whatever agents say.
#[test]
fn a_queue_has_its_bound_for_those_who_waited_too() {
    let (mut term, _) = Term::begin(2);
    let bound = QueueBounds::default().node as u64;
    let place = |number| Some(Presented { epoch: Epoch(1), number, promised: None });
    (1..=bound).for_each(|number| term.ask(request(number, "ann", place(number))));
    term.effects.clear();
    term.ask(request(bound + 1, "ann", place(bound + 1)));
    assert!(matches!(term.denial(), Some(Denial::QueueFull { .. })));
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
        let (mut first, _) = Term::begin(1);
        let mut places = Vec::new();
        for number in 1..=12 {
            first.ask(request(number, "ann", None));
            places.push(first.place());
        }
        let (mut second, mut lease) = Term::begin(2);
        for (index, at) in newcomers.iter().enumerate() {
            order.insert(*at, 100 + index as u64);
        }
        for number in &order {
            let known = places.get((*number - 1) as usize).filter(|_| *number <= 12 && told[(*number - 1) as usize]);
            second.ask(request(*number, "ann", known.and_then(|place| of(place, 1_000))));
        }
        // First those who were told a place, as they were told; then the others, as they came.
        let has_place = |number: &u64| *number <= 12 && told[(*number - 1) as usize];
        let mut expected: Vec<u64> = order.iter().copied().filter(has_place).collect();
        expected.sort_unstable();
        expected.extend(order.iter().copied().filter(|number| !has_place(number)));
        prop_assert_eq!(second.line(), expected.clone());
        second.effects.clear();
        let mut started = Vec::new();
        while let Some((next, ticket)) = second.next_after(&lease) {
            lease = next;
            started.push(ticket);
        }
        prop_assert_eq!(started, expected);
    }
}
