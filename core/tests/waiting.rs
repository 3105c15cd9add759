//! Who waits for the limit of leases of a Space, and how many are told of it at once.

#![allow(clippy::unwrap_used, clippy::panic)] // A story that cannot go on ends there.

use std::collections::BTreeSet;

use spaceport_core::ids::{
    AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
};
use spaceport_core::lease::{
    ANNOUNCED_MAX, Command, Departure, Effect, EndReport, Event, FreedAs, Moment, Order, Outcome, PickedSlot, Place,
    Policy, Priority, Request, SpaceSettings, State, step,
};
use spaceport_core::page::Ending;
use spaceport_core::protocol::CallerClass;
use spaceport_core::queue::{Lanes, QueueBounds, WaitsFor};
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;

const NODE: &str = "gpu-1";

struct Story {
    state: State,
    now: u64,
    seed: u128,
    tickets: u64,
    events: Vec<Event>,
    effects: Vec<Effect>,
}

fn card(index: u32, large_slots: u32) -> Card {
    Card { index, large_slots, grantable: true, quarantined_slots: 0 }
}

fn node() -> NodeName {
    NodeName::new(NODE)
}

impl Story {
    /// A term with a node of these cards.
    fn begin(cards: Vec<Card>) -> Self {
        let state = State::new(Epoch(1), BTreeSet::new());
        let mut story = Self { state, now: 0, seed: 0, tickets: 0, events: Vec::new(), effects: Vec::new() };
        story.tell(Command::NodeHello { node: node(), agent_instance: "a".into(), highest_epoch: Epoch(0) });
        story.tell(Command::NodeJoined { node: node(), epoch: Epoch(1), cards, leases: Vec::new(), idle: Vec::new() });
        story
    }

    fn account(&mut self, name: &str) {
        let allowance = Allowance {
            per_cookie_ms: None,
            base_ms: 600_000,
            longest_call_ms: 50_000,
            runs_per_window: None,
            generation: 1,
            grants: Vec::new(),
        };
        let policy = Policy {
            tier: "demo".into(),
            allowance,
            concurrent: 64,
            priority: Priority::Medium,
            caller: CallerClass::Regular,
            deleting: false,
            conflict: None,
        };
        self.tell(Command::AccountSeen { account: AccountName::new(name), page: Box::default(), policy });
    }

    fn limit(&mut self, space: &str, concurrent: u32) {
        let settings = SpaceSettings { concurrent: Some(concurrent), ..SpaceSettings::default() };
        self.tell(Command::SpaceSettings { space: space.to_owned(), settings });
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

    /// A call to this Space, of an account of its own.
    fn ask(&mut self, space: &str, size: Size) -> Ticket {
        self.tickets += 1;
        let (account, number) = (format!("account-{}", self.tickets), self.tickets);
        self.account(&account);
        let ticket = Ticket { agent_instance: "a".into(), number };
        self.tell(Command::Request(Box::new(Request {
            cookie: None,
            ticket: ticket.clone(),
            node: node(),
            space: SpaceKey::new("n", space, space),
            revision: Revision::default(),
            worker: None,
            size,
            declared_ms: 10_000,
            caller: Ok(AccountName::new(account)),
            budget: None,
            presented: None,
        })));
        ticket
    }

    fn orders(&mut self) -> Vec<Order> {
        let effects = std::mem::take(&mut self.effects).into_iter();
        let orders = effects.filter_map(|effect| if let Effect::Start(order) = effect { Some(*order) } else { None });
        orders.collect()
    }

    fn order(&mut self) -> Order {
        let mut orders = self.orders();
        assert_eq!(orders.len(), 1, "{orders:?}");
        orders.remove(0)
    }

    fn places(&mut self) -> Vec<Place> {
        let effects = std::mem::take(&mut self.effects).into_iter();
        let places = effects.filter_map(|effect| if let Effect::Queue(place) = effect { Some(*place) } else { None });
        places.collect()
    }

    fn starts(&mut self, lease: &LeaseId) {
        self.tell(Command::Started { node: node(), lease: lease.clone(), slot: PickedSlot::Has(0) });
    }

    fn ends(&mut self, lease: &LeaseId) {
        let report = EndReport { ending: Ending::Released, used_ms: 1_000 };
        self.tell(Command::Ended { node: node(), lease: lease.clone(), report, kept: false });
        self.tell(Command::Freed { node: node(), lease: lease.clone(), how: FreedAs::Free });
    }

    fn waits_for(&self, ticket: &Ticket) -> WaitsFor {
        self.state.queue.get(ticket).unwrap().waits_for
    }

    fn waiting_for_node(&self) -> Vec<u64> {
        let node = node();
        let line = self.state.queue.line(&node).filter(|waiting| waiting.waits_for == WaitsFor::Node);
        line.map(|waiting| waiting.ticket.number).collect()
    }
}

/// A Space at its limit of one with its lease, and so many that wait for it, beside another Space on the only card.
fn full_space(waiting: usize) -> (Story, LeaseId) {
    let mut story = Story::begin(vec![card(0, 2)]);
    story.limit("busy", 1);
    story.ask("busy", Size::Large);
    let lease = story.order().lease;
    story.starts(&lease);
    story.ask("other", Size::Large);
    let other = story.order().lease;
    story.starts(&other);
    for _ in 0..waiting {
        story.ask("busy", Size::Large);
    }
    assert_eq!(story.waiting_for_node(), [0; 0]);
    story.effects.clear();
    (story, lease)
}

#[test]
fn as_many_as_a_space_may_have_wait_for_the_node_and_the_others_are_told_nothing() {
    let (mut story, lease) = full_space(50);
    let other = story.ask("other", Size::Large).number;
    story.effects.clear();
    story.ends(&lease);
    assert_eq!(story.order().ticket.number, 3, "the oldest of all");
    assert_eq!(story.waiting_for_node(), [other]);
    let told = story.events.iter().filter(|event| matches!(event, Event::Announced { .. })).count();
    assert_eq!(told, 51, "each once, when it came");
}

#[test]
fn when_the_limit_rises_the_oldest_wait_for_the_node() {
    let (mut story, _) = full_space(10);
    story.limit("busy", 4);
    assert_eq!(story.waiting_for_node(), [3, 4, 5]);
    assert_eq!(story.places().len(), 3);
    // Who leaves, or is over, makes room for the next one.
    story.tell(Command::Dequeue { ticket: Ticket { agent_instance: "a".into(), number: 4 } });
    assert_eq!(story.waiting_for_node(), [3, 5, 6]);
    story.limit("busy", 100);
    assert_eq!(story.waiting_for_node().len(), 9);
}

#[test]
fn a_half_is_not_held_up_by_a_whole_card_of_its_space() {
    let mut story = Story::begin(vec![card(0, 2)]);
    story.limit("busy", 1);
    story.ask("busy", Size::Large);
    let lease = story.order().lease;
    story.starts(&lease);
    story.ask("other", Size::Large);
    let other = story.order().lease;
    story.starts(&other);
    let whole = story.ask("busy", Size::Xlarge);
    let half = story.ask("busy", Size::Large);
    assert_eq!([story.waits_for(&whole), story.waits_for(&half)], [WaitsFor::Space; 2]);
    story.ends(&lease);
    assert_eq!(story.order().ticket, half);
}

#[test]
fn no_card_is_kept_for_a_space_that_may_have_no_other_lease() {
    let mut story = Story::begin(vec![card(0, 2)]);
    story.limit("busy", 1);
    story.ask("other", Size::Large);
    let other = story.order().lease;
    story.starts(&other);
    story.ask("other", Size::Large);
    let another = story.order().lease;
    story.starts(&another);
    let whole = story.ask("busy", Size::Xlarge);
    story.ends(&other);
    let kept = |story: &Story| story.state.queue.lanes(&node()).and_then(Lanes::reserved).is_some();
    assert!(kept(&story), "the card drains for it");
    story.limit("busy", 0);
    story.tell(Command::Tick);
    assert_eq!(story.waits_for(&whole), WaitsFor::Space);
    assert!(!kept(&story));
    story.ask("other", Size::Large);
    assert_eq!(story.orders().len(), 1, "nobody has to wait for it");
}

#[test]
fn a_node_that_loses_slots_is_told_in_portions() {
    let mut story = Story::begin(vec![card(0, 2), card(1, 2)]);
    let many = ANNOUNCED_MAX * 2 + 44;
    let spaces = many / QueueBounds::default().space + 1;
    for call in 0..many + 4 {
        story.ask(&format!("space-{}", call % spaces), Size::Large);
    }
    story.effects.clear();
    story.tell(Command::Heartbeat { node: node(), cards: Some(vec![card(0, 2)]), idle: None });
    let mut told = vec![story.places().len()];
    for _ in 0..3 {
        story.tell(Command::Tick);
        told.push(story.places().len());
    }
    assert_eq!(told, [ANNOUNCED_MAX, ANNOUNCED_MAX, 44, 0]);
}

/// An order is on its way when its node loses a slot, and is refused: what its caller was told counts no more.
#[test]
fn a_promise_does_not_survive_the_slot_it_counted_on() {
    let mut story = Story::begin(vec![card(0, 2)]);
    story.ask("a", Size::Large);
    let first = story.order().lease;
    story.starts(&first);
    story.ask("a", Size::Large);
    let second = story.order().lease;
    story.starts(&second);
    let ticket = story.ask("a", Size::Large);
    assert!(story.state.queue.get(&ticket).unwrap().promise.is_some());
    story.ends(&first);
    let ordered = story.order();
    assert_eq!(ordered.ticket, ticket);
    story.events.clear();
    story.tell(Command::Heartbeat { node: node(), cards: Some(vec![card(0, 1)]), idle: None });
    story.tell(Command::Refused { node: node(), lease: ordered.lease });
    let again = story.events.iter().find_map(|event| if let Event::Queued(again) = event { Some(again) } else { None });
    assert_eq!(again.map(|again| (&again.ticket, again.promise)), Some((&ticket, None)));
}

#[test]
fn a_node_that_comes_back_with_fewer_slots_is_told_anew() {
    let mut story = Story::begin(vec![card(0, 2)]);
    for _ in 0..3 {
        story.ask("a", Size::Large);
    }
    story.tell(Command::NodeDisconnected { node: node() });
    story.tell(Command::NodeHello { node: node(), agent_instance: "a".into(), highest_epoch: Epoch(1) });
    let cards = vec![card(0, 1)];
    story.tell(Command::NodeJoined { node: node(), epoch: Epoch(1), cards, leases: Vec::new(), idle: Vec::new() });
    assert!(story.events.iter().any(|event| matches!(event, Event::PromisesWithdrawn { .. })));
}

/// D5: who is gone for which reason is told apart.
#[test]
fn whoever_waits_no_longer_has_its_own_reason() {
    let mut story = Story::begin(vec![card(0, 1)]);
    story.ask("a", Size::Large);
    let first = story.order().lease;
    story.starts(&first);
    let left = story.ask("a", Size::Large);
    let silent = story.ask("a", Size::Large);
    let departures = |story: &mut Story| {
        let events = std::mem::take(&mut story.events).into_iter();
        let left =
            events.filter_map(|event| if let Event::Left { ticket, why } = event { Some((ticket, why)) } else { None });
        left.collect::<Vec<_>>()
    };
    story.tell(Command::Dequeue { ticket: left.clone() });
    assert_eq!(departures(&mut story), [(left, Departure::CallerGone)]);
    story.tell(Command::NodeDisconnected { node: node() });
    story.now += 60_001;
    story.tell(Command::Tick);
    assert_eq!(departures(&mut story), [(silent.clone(), Departure::NotPresented)]);
    let kind = |story: &Story, ticket: &Ticket| {
        let account = &story.state.accounts[&AccountName::new(format!("account-{}", ticket.number))];
        account.working.recent_outcomes[0].kind.clone()
    };
    assert_eq!(kind(&story, &silent), "NotPresented");

    let mut story = Story::begin(vec![card(0, 1)]);
    story.ask("a", Size::Large);
    let waits = story.ask("a", Size::Large);
    story.tell(Command::NodeHello { node: node(), agent_instance: "b".into(), highest_epoch: Epoch(1) });
    assert_eq!(departures(&mut story), [(waits.clone(), Departure::AgentRestarted)]);
    assert_eq!(kind(&story, &waits), "AgentRestarted");
}
