//! Single rules of the ledger, each as a story with a store that answers at once.

use std::collections::BTreeSet;

use spaceport_core::ids::{
    AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Budget, Command, Effect, EndReport, FreedAs, LAZY_PATIENCE_MS, Limits, Moment,
    NO_DEVICE_FREE_PER_HOUR, NOTE_PERIOD_MS, NodeSettings, Order, PickedSlot, Place, Policy, Priority, Request,
    SETTLE_PATIENCE_MS, State, TermEnd, step,
};
use spaceport_core::page::{CLOSED_MAX, Ending, Page};
use spaceport_core::protocol::{CallerClass, Denial, UnauthenticatedReason};
use spaceport_core::queue::WaitsFor;
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;

const BOB: &str = "bob";
const NODE: &str = "gpu-1";

struct Story {
    state: State,
    now: u64,
    seed: u128,
    tickets: u64,
    writes: u32,
    effects: Vec<Effect>,
}

fn policy(base_ms: u64, concurrent: u32) -> Policy {
    Policy {
        tier: "demo".into(),
        allowance: Allowance {
            per_cookie_ms: None,
            base_ms,
            longest_call_ms: 50_000,
            runs_per_window: None,
            generation: 1,
            grants: Vec::new(),
        },
        concurrent,
        priority: Priority::Medium,
        caller: CallerClass::Regular,
        deleting: false,
        conflict: None,
    }
}

impl Story {
    /// A term with bob, and a node with so many cards of two slots.
    fn begin(cards: u32, base_ms: u64, concurrent: u32) -> Self {
        let state = State::new(Epoch(1), BTreeSet::new());
        let mut story = Self { state, now: 0, seed: 0, tickets: 0, writes: 0, effects: Vec::new() };
        story.account(BOB, policy(base_ms, concurrent));
        let cards = (0..cards).map(|index| Card { index, large_slots: 2, grantable: true, quarantined_slots: 0 });
        let (node, cards) = (NodeName::new(NODE), cards.collect());
        story.tell(Command::NodeHello { node: node.clone(), agent_instance: "a".into(), highest_epoch: Epoch(0) });
        story.tell(Command::NodeJoined { node, epoch: Epoch(1), cards, leases: Vec::new(), idle: Vec::new() });
        story
    }

    fn account(&mut self, name: &str, policy: Policy) {
        self.tell(Command::AccountSeen { account: AccountName::new(name), page: Box::default(), policy });
    }

    fn tell(&mut self, command: Command) -> Vec<Effect> {
        let mut commands = vec![command];
        let mut effects = Vec::new();
        while let Some(command) = commands.pop() {
            self.seed += 1000;
            let at = Moment { wall: LedgerTime(1_000_000 + self.now as i64), steady: Steady(self.now) };
            let outcome = step(&mut self.state, at, IdSeed(self.seed), command);
            assert_eq!(outcome.violations, []);
            for effect in outcome.effects {
                if let Effect::Write { account, page } = &effect {
                    self.writes += 1;
                    commands.push(Command::PageWritten { account: account.clone(), write_id: page.write_id.clone() });
                } else {
                    effects.push(effect);
                }
            }
        }
        self.effects.extend(effects.clone());
        effects
    }

    fn ask(&mut self, account: &str, size: Size, declared_ms: u64) -> Vec<Effect> {
        self.ask_with(account, size, declared_ms, None)
    }

    fn ask_with(&mut self, account: &str, size: Size, declared_ms: u64, budget: Option<Budget>) -> Vec<Effect> {
        self.tickets += 1;
        self.tell(Command::Request(Box::new(Request {
            cookie: None,
            ticket: Ticket { agent_instance: "a".into(), number: self.tickets },
            node: NodeName::new(NODE),
            space: SpaceKey::new("n", "s", "u"),
            revision: Revision::default(),
            worker: None,
            size,
            declared_ms,
            caller: Ok(AccountName::new(account)),
            budget,
            presented: None,
        })))
    }

    fn started(&mut self, lease: &LeaseId, card: u32) {
        let (node, lease) = (NodeName::new(NODE), lease.clone());
        self.tell(Command::Started { node, lease, slot: PickedSlot::Has(card) });
    }

    fn end(&mut self, lease: &LeaseId, ending: Ending, used_ms: u64) -> Vec<Effect> {
        let (node, lease) = (NodeName::new(NODE), lease.clone());
        self.tell(Command::Ended { node, lease, report: EndReport { ending, used_ms }, kept: false })
    }

    fn free(&mut self, lease: &LeaseId) -> Vec<Effect> {
        let (node, lease) = (NodeName::new(NODE), lease.clone());
        self.tell(Command::Freed { node, lease, how: FreedAs::Free })
    }

    /// The pool of the node changes.
    fn limits(&mut self, limits: Limits) {
        let settings = NodeSettings { limits, ..NodeSettings::default() };
        self.tell(Command::NodeSettings { node: NodeName::new(NODE), settings });
    }

    fn pass(&mut self, ms: u64) -> Vec<Effect> {
        self.now += ms;
        self.tell(Command::Tick)
    }

    fn page(&self) -> &Page {
        &self.state.accounts[&AccountName::new(BOB)].durable
    }

    /// One step with its writes left unanswered: which accounts are written, and with which write.
    fn tell_unanswered(&mut self, command: Command) -> Vec<(AccountName, String)> {
        self.seed += 1000;
        let at = Moment { wall: LedgerTime(1_000_000 + self.now as i64), steady: Steady(self.now) };
        let outcome = step(&mut self.state, at, IdSeed(self.seed), command);
        assert_eq!(outcome.violations, []);
        let written = outcome.effects.into_iter().filter_map(|effect| match effect {
            Effect::Write { account, page } => Some((account, page.write_id.clone())),
            _ => None,
        });
        written.collect()
    }

    /// A lease from its order to its free slot.
    fn run(&mut self, ending: Ending, used_ms: u64) {
        let lease = order(&self.ask(BOB, Size::Large, 10_000)).lease;
        self.started(&lease, 0);
        self.end(&lease, ending, used_ms);
        self.free(&lease);
    }
}

fn order(effects: &[Effect]) -> Order {
    let orders: Vec<_> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Start(order) => Some((**order).clone()),
            _ => None,
        })
        .collect();
    assert_eq!(orders.len(), 1, "{effects:?}");
    orders[0].clone()
}

fn denial(effects: &[Effect]) -> Option<Denial> {
    effects.iter().find_map(|effect| match effect {
        Effect::Deny { denial, .. } => Some(denial.clone()),
        _ => None,
    })
}

#[test]
fn the_next_one_is_held_while_the_slot_still_clears() {
    let mut story = Story::begin(1, 600_000, 9);
    let first = order(&story.ask(BOB, Size::Xlarge, 10_000));
    story.started(&first.lease, 0);
    assert!(matches!(story.ask(BOB, Size::Large, 10_000)[..], [Effect::Queue(_)]));
    story.ask(BOB, Size::Large, 10_000);
    let effects = story.end(&first.lease, Ending::Released, 5_000);
    let orders: Vec<_> = effects.iter().filter(|effect| matches!(effect, Effect::Start(_))).collect();
    assert_eq!(orders.len(), 2, "both halves of the card are handed over");
    for effect in orders {
        let Effect::Start(order) = effect else { continue };
        assert_eq!(order.after.as_ref(), Some(&first.lease));
    }
    // The card is spoken for.
    assert!(matches!(story.ask(BOB, Size::Large, 10_000)[..], [Effect::Queue(_)]));
}

/// Invariant 6: two leases end, and the first one's successor gets the second one's slot, which is back earlier.
#[test]
fn a_successor_on_another_slot_than_its_predecessors_keeps_it_until_it_is_clear() {
    let mut story = Story::begin(1, 600_000, 9);
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
    let mut story = Story::begin(1, 600_000, 9);
    story.account("carol", policy(600_000, 9));
    let first = order(&story.ask(BOB, Size::Xlarge, 10_000)).lease;
    story.started(&first, 0);
    let node = || NodeName::new(NODE);
    let report = EndReport { ending: Ending::Released, used_ms: 5_000 };
    story.tell_unanswered(Command::Ended { node: node(), lease: first.clone(), report, kept: false });
    story.tell(Command::NodeDisconnected { node: node() });
    story.tell(Command::NodeHello { node: node(), agent_instance: "a".into(), highest_epoch: Epoch(1) });
    let cards = vec![Card { index: 0, large_slots: 2, grantable: true, quarantined_slots: 0 }];
    let phase = AgentPhase::Ended { report, freed: false };
    let account = Some(AccountName::new(BOB));
    let lease = AgentLease { lease: first.clone(), account, size: Size::Xlarge, slot: PickedSlot::Has(0), phase };
    story.tell(Command::NodeJoined { node: node(), epoch: Epoch(1), cards, leases: vec![lease], idle: Vec::new() });
    assert_eq!(order(&story.ask("carol", Size::Xlarge, 10_000)).after, Some(first));
}

/// Two sessions of a node that starts anew may be heard of in another order than they began.
#[test]
fn who_is_presented_again_after_a_late_word_of_an_earlier_start_is_served() {
    let mut story = Story::begin(1, 600_000, 9);
    let request = || {
        Command::Request(Box::new(Request {
            cookie: None,
            ticket: Ticket { agent_instance: "a".into(), number: 1 },
            node: NodeName::new(NODE),
            space: SpaceKey::new("n", "s", "u"),
            revision: Revision::default(),
            worker: None,
            size: Size::Large,
            declared_ms: 10_000,
            caller: Ok(AccountName::new(BOB)),
            budget: None,
            presented: None,
        }))
    };
    let (account, write_id) = story.tell_unanswered(request()).remove(0);
    let hello = |instance: &str| Command::NodeHello {
        node: NodeName::new(NODE),
        agent_instance: instance.into(),
        highest_epoch: Epoch(1),
    };
    story.tell(hello("before-a"));
    story.tell(hello("a"));
    let cards = vec![Card { index: 0, large_slots: 2, grantable: true, quarantined_slots: 0 }];
    let (node, epoch) = (NodeName::new(NODE), Epoch(1));
    story.tell(Command::NodeJoined { node, epoch, cards, leases: Vec::new(), idle: Vec::new() });
    story.tell(request());
    assert_eq!(order(&story.tell(Command::PageWritten { account, write_id })).ticket.number, 1);
}

/// A lease of bob's ends, and carol's call has waited for its slot.
fn hand_over() -> (Story, Vec<(AccountName, String)>) {
    let mut story = Story::begin(1, 600_000, 9);
    story.account("carol", policy(600_000, 9));
    let first = order(&story.ask(BOB, Size::Xlarge, 10_000));
    story.started(&first.lease, 0);
    assert!(matches!(story.ask("carol", Size::Xlarge, 10_000)[..], [Effect::Queue(_)]));
    let report = EndReport { ending: Ending::Released, used_ms: 5_000 };
    let written =
        story.tell_unanswered(Command::Ended { node: NodeName::new(NODE), lease: first.lease, report, kept: false });
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

#[test]
fn the_head_blocks_and_whoever_waits_for_his_own_account_does_not() {
    let mut story = Story::begin(1, 600_000, 1);
    story.account("ann", policy(600_000, 9));
    let first = order(&story.ask(BOB, Size::Large, 10_000));
    story.started(&first.lease, 0);
    let Effect::Queue(place) = &story.ask(BOB, Size::Large, 10_000)[0] else { panic!("bob is at his limit") };
    assert_eq!(place.waits_for, WaitsFor::Account);
    // Ann passes bob, who waits for himself; then her whole card waits, and nobody passes it.
    order(&story.ask("ann", Size::Large, 10_000));
    let Effect::Queue(place) = &story.ask("ann", Size::Xlarge, 10_000)[0] else { panic!("the card is in use") };
    assert!(place.waits_for == WaitsFor::Node && place.latest_start_ms > Some(place.eta_ms));
    story.end(&first.lease, Ending::Released, 1_000);
    // Bob is older than the whole card, so the slot is his.
    let waiting: Vec<_> = story.state.queue.iter().map(|waiting| waiting.demand.size).collect();
    assert_eq!(waiting, [Size::Xlarge]);
    assert!(matches!(story.ask("ann", Size::Large, 10_000)[..], [Effect::Queue(_)]));
}

#[test]
fn who_waits_is_told_where_it_stands_now_as_well_as_when_it_came() {
    let mut story = Story::begin(1, 6_000_000, 9);
    let running = order(&story.ask(BOB, Size::Xlarge, 10_000));
    story.started(&running.lease, 0);
    let places: Vec<Place> = [20_000, 30_000, 10_000]
        .map(|declared_ms| match &story.ask(BOB, Size::Xlarge, declared_ms)[0] {
            Effect::Queue(place) => (**place).clone(),
            other => panic!("the card is in use: {other:?}"),
        })
        .into();
    let stands = |story: &Story| -> Vec<Option<u32>> {
        let now = Steady(story.now);
        places.iter().map(|told| story.state.standing(&told.ticket, now).map(|place| place.position)).collect()
    };
    assert_eq!(
        places.iter().map(|told| told.position).collect::<Vec<_>>(),
        [1, 2, 1],
        "the shortest passes the others"
    );
    assert_eq!(stands(&story), [Some(2), Some(3), Some(1)]);
    story.now += 5_000;
    let later = story.state.standing(&places[0].ticket, Steady(story.now)).unwrap();
    assert_eq!(later.latest_start_ms, places[0].latest_start_ms.map(|ms| ms - 5_000), "the promise stays");
    let over = Steady(story.now + later.latest_start_ms.unwrap() + 3_000);
    let late = story.state.standing(&places[0].ticket, over).unwrap();
    assert_eq!((late.latest_start_ms, late.late_ms, later.late_ms), (Some(0), 3_000, 0), "also when it is broken");
    story.end(&running.lease, Ending::Released, 1_000);
    assert_eq!(stands(&story), [Some(1), Some(2), None]);
}

#[test]
fn a_refused_order_is_tried_again_and_not_for_ever() {
    let mut story = Story::begin(1, 600_000, 9);
    let mut lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    for attempt in 1..=3 {
        let effects = story.tell(Command::Refused { node: NodeName::new(NODE), lease: lease.clone() });
        if attempt == 3 {
            assert_eq!(denial(&effects), Some(Denial::PlatformFault));
            continue;
        }
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Start(_))), "not before the node is heard");
        let again = order(&story.tell(Command::Heartbeat { node: NodeName::new(NODE), cards: None, idle: None })).lease;
        assert_ne!(again, lease, "an id is used once");
        lease = again;
    }
    assert_eq!((story.page().holds.len(), story.page().closed.len()), (0, 3));
    assert!(story.page().windows.is_empty(), "nothing was charged, so no window was opened");
}

#[test]
fn refusals_are_written_at_most_every_five_seconds() {
    let mut story = Story::begin(1, 60_000, 9);
    story.run(Ending::Released, 5_000);
    let before = story.writes;
    for _ in 0..50 {
        assert!(denial(&story.ask(BOB, Size::Large, 99_000)).is_some());
    }
    assert_eq!(story.writes, before + 1, "the first at once");
    story.pass(NOTE_PERIOD_MS);
    assert_eq!(story.writes, before + 2, "all others together");
    let row = story.page().last_denial.clone().map(|row| row.denial.kind());
    assert_eq!(row, Some("IllegalDuration"));
    assert_eq!(story.page().recent_outcomes.len(), 20);
}

#[test]
fn what_is_shown_beside_a_page_costs_at_most_a_write_in_five_seconds() {
    let mut story = Story::begin(1, 60_000, 9);
    let show = || Command::Show { account: AccountName::new(BOB) };
    let before = story.writes;
    for _ in 0..50 {
        story.tell(show());
    }
    assert_eq!(story.writes, before + 1, "the first at once");
    // A lease's writes show it as well: nothing is left to be written for it.
    story.run(Ending::Released, 10);
    story.pass(NOTE_PERIOD_MS);
    assert_eq!(story.writes, before + 3);
    let windows = story.page().windows.clone();
    story.tell(show());
    assert_eq!((story.writes, &story.page().windows), (before + 4, &windows), "it changes nothing else");
    story.tell(Command::Show { account: AccountName::new("nobody") });
    assert_eq!(story.writes, before + 4);
}

/// A clock that is wrong for a while must not end a window by what is shown meanwhile (L20): a deleted account would be
/// let go before its window has ended (L4).
#[test]
fn what_is_shown_beside_a_page_does_not_move_its_time() {
    let mut story = Story::begin(1, 60_000, 9);
    story.run(Ending::Released, 10);
    let (before, last_time) = (story.writes, story.page().last_time);
    story.pass(48 * 3_600_000);
    story.tell(Command::Show { account: AccountName::new(BOB) });
    assert_eq!((story.writes, story.page().last_time), (before + 1, last_time));
}

#[test]
fn a_full_outbox_pauses_its_account_only() {
    let mut story = Story::begin(1, 6_000_000, 9);
    story.account("ann", policy(60_000, 9));
    for _ in 0..CLOSED_MAX {
        story.run(Ending::Released, 10);
    }
    let Effect::Queue(place) = &story.ask(BOB, Size::Large, 10_000)[0] else { panic!("the outbox is full") };
    assert_eq!(place.waits_for, WaitsFor::Account);
    order(&story.ask("ann", Size::Large, 10_000));
    let lease = story.page().closed[0].hold.lease.clone();
    order(&story.tell(Command::ReceiptWritten { account: AccountName::new(BOB), lease }));
}

#[test]
fn receipts_ride_along_with_the_next_write() {
    let mut story = Story::begin(1, 6_000_000, 9);
    story.run(Ending::Released, 10);
    let (before, lease) = (story.writes, story.page().closed[0].hold.lease.clone());
    story.tell(Command::ReceiptWritten { account: AccountName::new(BOB), lease: lease.clone() });
    story.tell(Command::ReceiptWritten { account: AccountName::new(BOB), lease });
    story.pass(LAZY_PATIENCE_MS - 1);
    assert_eq!(story.writes, before);
    story.run(Ending::Released, 10);
    assert_eq!((story.writes, story.page().closed.len()), (before + 2, 1));
}

#[test]
fn a_call_has_the_budget_of_its_token() {
    let mut story = Story::begin(1, 600_000, 9);
    let budget =
        |max_ms, max_calls| Some(Budget { root: "r".into(), max_ms, max_calls, expires: LedgerTime(i64::MAX) });
    let exhausted = Some(Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted });
    let first = order(&story.ask_with(BOB, Size::Large, 10_000, budget(15_000, 2)));
    assert_eq!(denial(&story.ask_with(BOB, Size::Large, 10_000, budget(15_000, 2))), exhausted, "too many seconds");
    story.started(&first.lease, 0);
    story.end(&first.lease, Ending::Released, 2_000);
    order(&story.ask_with(BOB, Size::Large, 13_000, budget(15_000, 2)));
    assert_eq!(denial(&story.ask_with(BOB, Size::Large, 1, budget(99_000, 2))), exhausted, "too many calls");
}

#[test]
fn a_call_that_waited_in_vain_keeps_its_budget() {
    let mut story = Story::begin(1, 600_000, 1);
    order(&story.ask(BOB, Size::Large, 10_000));
    let budget = Some(Budget { root: "r".into(), max_ms: 10_000, max_calls: 1, expires: LedgerTime(i64::MAX) });
    story.ask_with(BOB, Size::Large, 10_000, budget.clone());
    let ticket = Ticket { agent_instance: "a".into(), number: story.tickets };
    story.tell(Command::Dequeue { ticket });
    assert_eq!(denial(&story.ask_with(BOB, Size::Large, 10_000, budget)), None);
}

#[test]
fn no_device_is_free_only_so_often() {
    let mut story = Story::begin(1, 6_000_000, 9);
    for _ in 0..NO_DEVICE_FREE_PER_HOUR {
        story.run(Ending::NoDevice, 1_000);
        // The outbox drains meanwhile.
        let lease = story.page().closed[0].hold.lease.clone();
        story.tell(Command::ReceiptWritten { account: AccountName::new(BOB), lease });
    }
    assert!(story.page().windows.is_empty());
    story.run(Ending::NoDevice, 1_000);
    assert_eq!(story.page().windows[0].charged_ms, 1_000);
    story.pass(3_600_000);
    story.run(Ending::NoDevice, 1_000);
    assert_eq!(story.page().windows[0].charged_ms, 1_000);
}

#[test]
fn a_silent_node_is_given_up_at_its_bound_and_not_before() {
    let mut story = Story::begin(1, 600_000, 9);
    let lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    story.started(&lease, 0);
    story.tell(Command::NodeDisconnected { node: NodeName::new(NODE) });
    // order_ttl 5 + allow_limit 30 + declared 10 + grace 2 + clear_limit 10
    story.pass(57_000);
    assert_eq!(story.page().holds.len(), 1);
    story.pass(1);
    let closed = &story.page().closed[0];
    assert_eq!((closed.ending, closed.charged_ms), (Ending::Expired, 0));
    // It comes back with its report: nothing changes, and it may forget it.
    let late = story.end(&lease, Ending::Released, 9_000);
    assert!(matches!(late[..], [Effect::Acknowledge { ended: true, .. }]));
    assert!(story.page().windows.is_empty());
}

#[test]
fn a_node_that_is_there_is_told_instead() {
    let mut story = Story::begin(1, 600_000, 9);
    let lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    story.started(&lease, 0);
    let effects = story.pass(57_001);
    assert!(matches!(effects[..], [Effect::Cancel { .. }]), "only the node ends a granted lease");
    assert_eq!(story.pass(1_000), [], "not at every tick");
    story.end(&lease, Ending::Cancelled, 57_000);
    assert_eq!(story.page().closed[0].charged_ms, 10_000);
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
fn under_other_limits() -> (Story, LeaseId) {
    let mut story = Story::begin(1, 600_000, 9);
    story.limits(PATIENT);
    let order = order(&story.ask(BOB, Size::Large, 10_000));
    assert_eq!(order.limits, PATIENT);
    story.started(&order.lease, 0);
    story.limits(QUICK);
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
    story.tell(Command::NodeDisconnected { node: NodeName::new(NODE) });
    story.pass(PATIENT_BOUND_MS);
    assert_eq!(story.page().holds.len(), 1);
    story.pass(1);
    assert_eq!(story.page().closed[0].ending, Ending::Expired);
}

#[test]
fn a_lease_that_waits_for_a_slot_has_the_time_in_which_that_slot_must_clear() {
    let (mut story, first) = under_other_limits();
    story.ask(BOB, Size::Xlarge, 10_000);
    let next = order(&story.end(&first, Ending::Released, 5_000));
    assert_eq!((next.after, next.limits), (Some(first), QUICK));
    story.tell(Command::NodeDisconnected { node: NodeName::new(NODE) });
    // The first clears by its own limit; all limits of the next begin then.
    story.pass(PATIENT.clear_limit_ms + 1_000 + 1_000 + 10_000 + 1_000);
    assert_eq!(story.page().holds.len(), 1);
    story.pass(1);
    assert!(story.page().holds.is_empty());
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
        let (page, policy) = (Box::new(story.page().clone()), policy(600_000, 9));
        let mut next = Story { state: State::new(Epoch(2), BTreeSet::new()), ..story };
        next.now = 0;
        let settings = NodeSettings { limits: others, ..NodeSettings::default() };
        next.tell(Command::NodeSettings { node: NodeName::new("gpu-2"), settings });
        next.limits(own);
        next.tell(Command::AccountSeen { account: AccountName::new(BOB), page, policy });
        // What applies to its node later does not count either way.
        next.limits(QUICK);
        next.pass(bound_ms + ORDER_AGE_MS);
        assert_eq!(next.page().holds[0].lease, lease);
        next.pass(1);
        assert_eq!(next.page().closed[0].ending, Ending::Expired);
    }
}

#[test]
fn another_leader_ends_the_term() {
    let mut story = Story::begin(1, 600_000, 9);
    let page = Box::new(Page { epoch: Epoch(2), seq: 1, ..Page::default() });
    let account = AccountName::new(BOB);
    let effects = story.tell(Command::AccountSeen { account, page, policy: policy(1, 1) });
    assert_eq!(effects, [Effect::EndTerm(TermEnd::Deposed { by: Epoch(2) })]);
    assert_eq!(story.ask(BOB, Size::Large, 10_000), [], "nothing is decided any more");
}

#[test]
fn a_clock_that_is_off_grants_nothing() {
    let mut story = Story::begin(1, 600_000, 9);
    story.tell(Command::ClockJudged { off_ms: Some(6_000) });
    assert_eq!(denial(&story.ask(BOB, Size::Large, 10_000)), Some(Denial::ClockSkew { ms: 6_000 }));
    story.tell(Command::ClockJudged { off_ms: None });
    order(&story.ask(BOB, Size::Large, 10_000));
}

#[test]
fn an_account_that_is_gone_leaves_nothing_behind() {
    let mut story = Story::begin(1, 600_000, 1);
    let lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    story.started(&lease, 0);
    story.ask(BOB, Size::Large, 10_000);
    let effects = story.tell(Command::AccountGone { account: AccountName::new(BOB) });
    assert_eq!(denial(&effects), Some(Denial::AccountDeleting));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Cancel { .. })));
    story.end(&lease, Ending::Cancelled, 0);
    story.free(&lease);
    assert!(story.state.leases.is_empty() && story.state.queue.is_empty() && story.state.accounts.is_empty());
}

/// Invariant 11: what was just reserved will hold its slot as long as if the term had begun a moment ago.
#[test]
fn the_promised_start_counts_a_lease_whose_hold_is_on_its_way() {
    let mut story = Story::begin(1, 600_000, 9);
    story.account("carol", policy(600_000, 9));
    story.pass(100_000);
    let request = Request {
        cookie: None,
        ticket: Ticket { agent_instance: "a".into(), number: 100 },
        node: NodeName::new(NODE),
        space: SpaceKey::new("n", "s", "u"),
        revision: Revision::default(),
        worker: None,
        size: Size::Xlarge,
        declared_ms: 10_000,
        caller: Ok(AccountName::new(BOB)),
        budget: None,
        presented: None,
    };
    story.tell_unanswered(Command::Request(Box::new(request)));
    let effects = story.ask("carol", Size::Xlarge, 10_000);
    let [Effect::Queue(place)] = &effects[..] else { panic!("{effects:?}") };
    let limits = Limits::default();
    let latest_start_ms = place.latest_start_ms.unwrap_or(0);
    assert!(latest_start_ms >= limits.order_ttl_ms + limits.held_ms(10_000) * 3, "{latest_start_ms}");
}

/// Its order has left, and the node refuses it or never gets it: the call is not left without an answer.
#[test]
fn a_call_whose_order_is_under_way_when_its_account_goes_is_answered() {
    let mut story = Story::begin(1, 600_000, 1);
    let lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    let effects = story.tell(Command::AccountGone { account: AccountName::new(BOB) });
    assert_eq!(denial(&effects), Some(Denial::AccountDeleting));
    story.tell(Command::Refused { node: NodeName::new(NODE), lease: lease.clone() });
    story.end(&lease, Ending::Cancelled, 0);
    story.free(&lease);
    assert!(story.state.leases.is_empty() && story.state.queue.is_empty());
}

#[test]
fn without_a_healthy_card_of_that_size_there_is_no_queue() {
    let mut story = Story::begin(1, 600_000, 9);
    let cards = vec![Card { index: 0, large_slots: 2, grantable: true, quarantined_slots: 1 }];
    story.tell(Command::Heartbeat { node: NodeName::new(NODE), cards: Some(cards), idle: None });
    assert_eq!(denial(&story.ask(BOB, Size::Xlarge, 10_000)), Some(Denial::NoCapacity { size: Size::Xlarge }));
    order(&story.ask(BOB, Size::Large, 10_000));
    assert_eq!(denial(&story.ask(BOB, Size::Large, 10_000)), None);
}

#[test]
fn a_new_leader_waits_for_its_nodes_but_not_long() {
    let awaited = BTreeSet::from([NodeName::new(NODE), NodeName::new("gpu-2")]);
    let mut story = Story::begin(1, 600_000, 9);
    story.state.awaited = awaited;
    story.ask(BOB, Size::Large, 10_000);
    assert!(story.page().holds.is_empty());
    order(&story.pass(500));
}
