//! What the ledger knows of the slots of leases that wait for one (L7, L14).

#![allow(clippy::unwrap_used, clippy::panic)] // A story that cannot go on ends there.

use std::collections::BTreeSet;

use spaceport_core::ids::{
    AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Command, Effect, EndReport, FreedAs, Moment, Order, PickedSlot, Policy, Priority, Request,
    State, step,
};
use spaceport_core::page::Ending;
use spaceport_core::protocol::CallerClass;
use spaceport_core::quota::Allowance;
use spaceport_core::slots::{Card, Occupancy, pick};

const NODE: &str = "gpu-1";
const REPORT: EndReport = EndReport { ending: Ending::Released, used_ms: 1_000 };

const BOB: &str = "bob";
/// Writes of her page are answered when the story says so.
const ANN: &str = "ann";

/// A term of both, and a node with so many cards of two slots.
struct Story {
    state: State,
    cards: Vec<Card>,
    seed: u128,
    tickets: u64,
    unanswered: Vec<Command>,
}

impl Story {
    fn begin(cards: u32) -> Self {
        let cards = (0..cards).map(|index| Card { index, large_slots: 2, grantable: true, quarantined_slots: 0 });
        let cards: Vec<Card> = cards.collect();
        let state = State::new(Epoch(1), BTreeSet::new());
        let mut story = Self { state, cards, seed: 0, tickets: 0, unanswered: Vec::new() };
        let allowance = Allowance {
            base_ms: 600_000,
            per_cookie_ms: None,
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
        for account in [BOB, ANN] {
            let (account, policy) = (AccountName::new(account), policy.clone());
            story.tell(Command::AccountSeen { account, page: Box::default(), policy });
        }
        story.join(Vec::new());
        story
    }

    fn join(&mut self, leases: Vec<AgentLease>) {
        let (node, cards) = (NodeName::new(NODE), self.cards.clone());
        self.tell(Command::NodeDisconnected { node: node.clone() });
        let hello = Command::NodeHello { node: node.clone(), agent_instance: "a".into(), highest_epoch: Epoch(0) };
        self.tell(hello);
        self.tell(Command::NodeJoined { node, epoch: Epoch(1), cards, leases, idle: Vec::new() });
    }

    fn tell(&mut self, command: Command) -> Vec<Order> {
        let (mut commands, mut orders) = (vec![command], Vec::new());
        while let Some(command) = commands.pop() {
            self.seed += 1000;
            let at = Moment { wall: LedgerTime(1_000_000), steady: Steady(1_000) };
            let outcome = step(&mut self.state, at, IdSeed(self.seed), command);
            assert_eq!(outcome.violations, []);
            for effect in outcome.effects {
                match effect {
                    Effect::Write { account, page } => {
                        let late = account == AccountName::new(ANN);
                        let answer = Command::PageWritten { account, write_id: page.write_id.clone() };
                        if late { &mut self.unanswered } else { &mut commands }.push(answer);
                    }
                    Effect::Start(order) => orders.push(*order),
                    _ => {}
                }
            }
        }
        orders
    }

    /// Ann's writes are answered.
    fn answer(&mut self) -> Vec<Order> {
        let answers = std::mem::take(&mut self.unanswered);
        answers.into_iter().flat_map(|answer| self.tell(answer)).collect()
    }

    fn ask(&mut self, size: Size) -> Vec<Order> {
        self.ask_as(BOB, size)
    }

    fn ask_as(&mut self, caller: &str, size: Size) -> Vec<Order> {
        self.tickets += 1;
        self.tell(Command::Request(Box::new(Request {
            cookie: None,
            ticket: Ticket { agent_instance: "a".into(), number: self.tickets },
            node: NodeName::new(NODE),
            space: SpaceKey::new("n", "s", "u"),
            revision: Revision::default(),
            worker: None,
            size,
            declared_ms: 10_000,
            caller: Ok(AccountName::new(caller)),
            budget: None,
            presented: None,
        })))
    }

    fn lease(&mut self, size: Size) -> LeaseId {
        let orders = self.ask(size);
        assert_eq!(orders.len(), 1, "there is room");
        orders[0].lease.clone()
    }

    fn started(&mut self, lease: &LeaseId, slot: PickedSlot) -> Vec<Order> {
        self.tell(Command::Started { node: NodeName::new(NODE), lease: lease.clone(), slot })
    }

    fn end(&mut self, lease: &LeaseId) -> Vec<Order> {
        self.tell(Command::Ended { node: NodeName::new(NODE), lease: lease.clone(), report: REPORT, kept: false })
    }

    fn free(&mut self, lease: &LeaseId) -> Vec<Order> {
        self.tell(Command::Freed { node: NodeName::new(NODE), lease: lease.clone(), how: FreedAs::Free })
    }

    /// A lease on the only card as a whole has ended, and the one that follows it waits.
    fn follower(cards: u32) -> (Self, LeaseId, LeaseId) {
        let mut story = Self::begin(cards);
        let first = story.lease(Size::Xlarge);
        story.started(&first, PickedSlot::Has(0));
        let others: Vec<LeaseId> = (1..cards).map(|_| story.lease(Size::Xlarge)).collect();
        for (other, card) in others.iter().zip(1..) {
            story.started(other, PickedSlot::Has(card));
        }
        story.ask(Size::Large);
        let follower = story.end(&first)[0].clone();
        assert_eq!((follower.after.as_ref(), follower.wait_ms), (Some(&first), 10_000));
        (story, first, follower.lease)
    }
}

/// The node had to look for another slot than the predicted one, which the broker would take for free.
#[test]
fn where_a_waiting_lease_will_be_is_not_predicted_any_more_when_its_node_has_said_it() {
    let (mut story, first, waits) = Story::follower(2);
    let second =
        story.state.leases_on(&NodeName::new(NODE)).map(|(id, _)| id.clone()).find(|id| *id != first && *id != waits);
    let second = second.expect("the other card's");
    story.end(&second);
    story.started(&waits, PickedSlot::Awaits(1));
    let next = story.ask(Size::Xlarge);
    assert_eq!(next.len(), 1);
    assert_eq!(next[0].after, Some(first), "the first card will be clear as a whole, the second one will not");
    assert_eq!(story.ask(Size::Large).first().and_then(|order| order.after.clone()), Some(second));
}

/// Invariant 6: its slot is not clear, whatever it waited for when its node was heard of last.
#[test]
fn a_lease_that_got_its_slot_and_ended_while_its_node_was_away_holds_it_until_that_is_clear() {
    for told in [PickedSlot::Awaits(0), PickedSlot::Open] {
        let (mut story, _, waits) = Story::follower(1);
        story.started(&waits, told);
        let phase = AgentPhase::Ended { report: REPORT, freed: false };
        story.join(vec![AgentLease {
            account: Some(AccountName::new(BOB)),
            lease: waits.clone(),
            size: Size::Large,
            slot: PickedSlot::Has(0),
            phase,
        }]);
        let orders = story.ask(Size::Xlarge);
        assert!(orders.iter().all(|order| order.after.as_ref() == Some(&waits)), "{told:?}: {orders:?}");
        story.free(&waits);
    }
}

/// The same where nobody pays any more.
#[test]
fn a_lease_whose_account_is_gone_tells_of_its_slot_too() {
    let (mut story, first, waits) = Story::follower(1);
    story.started(&waits, PickedSlot::Awaits(0));
    story.tell(Command::AccountGone { account: AccountName::new(BOB) });
    story.free(&first);
    story.started(&waits, PickedSlot::Has(0));
    story.end(&waits);
    assert!(story.state.leases.contains_key(&waits), "it is known until its slot is clear");
    story.free(&waits);
    assert!(story.state.leases.is_empty());
}

/// Her whole card is promised first, and his order leaves first, for his page is written faster. A node puts a half on the
/// card with the lowest number where it can: that was hers, and she was refused.
#[test]
fn an_order_that_overtakes_another_one_leaves_it_its_card() {
    let mut story = Story::begin(2);
    let [first, other, running] = [Size::Large, Size::Large, Size::Large].map(|size| story.lease(size));
    for (lease, card) in [(&first, 0), (&other, 0), (&running, 1)] {
        story.started(lease, PickedSlot::Has(card));
    }
    story.end(&other);
    story.free(&other);
    assert_eq!(story.ask_as(ANN, Size::Xlarge), [], "a half runs on each card");
    assert_eq!(story.end(&first), [], "its card is hers, and her page is not written");
    let half = story.ask(Size::Large);
    let mut in_use = Occupancy::default();
    in_use.add(0, 1);
    in_use.add(1, 1);
    assert_eq!(half.len(), 1);
    assert_eq!(pick(&story.cards, &in_use, Size::Large, &half[0].avoid), Some(1), "{half:?}");
    let whole = story.answer();
    assert_eq!(whole.iter().map(|order| order.after.as_ref()).collect::<Vec<_>>(), [Some(&first)]);
    assert!(whole[0].avoid.is_empty(), "nobody is before her any more");
}

/// It is meant for the card that is kept, and its node gives it another one if that is clear first. Who has to leave the kept
/// card alone then found none.
#[test]
fn a_lease_under_way_to_the_kept_card_is_waited_for() {
    let mut story = Story::begin(3);
    for card in &mut story.cards {
        card.large_slots = 1;
    }
    story.join(Vec::new());
    let [first, second, third] = [Size::Large, Size::Large, Size::Large].map(|size| story.lease(size));
    for (lease, card) in [(&first, 0), (&second, 1), (&third, 2)] {
        story.started(lease, PickedSlot::Has(card));
    }
    story.ask_as(ANN, Size::Large);
    assert_eq!(story.end(&first), [], "its card is hers, and her page is not written");
    assert_eq!(story.ask(Size::Xlarge), [], "the card of the first one is kept for it");
    assert_eq!(story.ask(Size::Large), []);
    assert_eq!(story.end(&second), [], "her node may give her this card");
    let hers = story.answer();
    assert_eq!(hers.len(), 1, "{hers:#?}");
    let next = story.started(&hers[0].lease, PickedSlot::Awaits(0));
    assert_eq!(next.iter().map(|order| order.after.as_ref()).collect::<Vec<_>>(), [Some(&second)]);
}

/// L17: it was sent to an earlier term of the same replica, and read in this one. What its agent was told since comes behind
/// Joined.
#[test]
fn a_request_that_comes_before_its_node_has_joined_is_not_taken() {
    let mut story = Story::begin(1);
    story.tell(Command::NodeDisconnected { node: NodeName::new(NODE) });
    assert_eq!(story.ask(Size::Large), []);
    assert!(story.state.queue.is_empty());
}
