//! Limits of guests and Spaces, and calls that are given less than they declare: stories with a store that answers at once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails by panicking, also in its helpers"
)]

use std::collections::BTreeSet;

use spaceport_core::ids::{
    AccountName, CookieId, Epoch, IdSeed, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
};
use spaceport_core::lease::{
    Budget, Command, Effect, EndReport, FreedAs, Moment, NodeSettings, Order, PickedSlot, Policy, Priority, Request,
    SpaceSettings, State, step,
};
use spaceport_core::page::{Ending, Page, Shortened, ShortenedBy};
use spaceport_core::protocol::{
    CallerClass, Denial, DurationLimit, Limiter, QueueOf, UnauthenticatedReason, human_message,
};
use spaceport_core::queue::{QueueBounds, SUGGEST_MIN, WaitsFor};
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;

const GUESTS: &str = "guest-0af3";
const NODE: &str = "gpu-1";

struct Story {
    state: State,
    now: u64,
    seed: u128,
    tickets: u64,
    /// Of the app that calls from now on.
    revision: Revision,
}

fn policy(base_ms: u64, concurrent: u32) -> Policy {
    Policy {
        tier: "free".into(),
        allowance: Allowance {
            base_ms,
            per_cookie_ms: None,
            longest_call_ms: 60_000,
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

/// Who calls.
#[derive(Clone, Copy)]
struct Who<'a> {
    account: &'a str,
    cookie: Option<&'a str>,
    space: &'a str,
}

const BOB: Who<'_> = Who { account: "bob", cookie: None, space: "u" };

const fn guest(cookie: &str) -> Who<'_> {
    Who { account: GUESTS, cookie: Some(cookie), space: "u" }
}

impl Story {
    /// A term with bob (600 s), an address prefix (120 s a visitor, 300 s in all), and a node with 8 slots.
    fn begin() -> Self {
        let mut story =
            Self { state: State::new(Epoch(1), BTreeSet::new()), now: 0, seed: 0, tickets: 0, revision: Revision(1) };
        story.account("bob", policy(600_000, 9));
        let mut guests = policy(300_000, 1);
        guests.allowance.per_cookie_ms = Some(120_000);
        story.account(GUESTS, guests);
        let cards = (0..4).map(|index| Card { index, large_slots: 2, grantable: true, quarantined_slots: 0 }).collect();
        let node = NodeName::new(NODE);
        story.tell(Command::NodeHello { node: node.clone(), agent_instance: "a".into(), highest_epoch: Epoch(0) });
        story.tell(Command::NodeJoined { node, epoch: Epoch(1), cards, leases: Vec::new(), idle: Vec::new() });
        story
    }

    fn account(&mut self, name: &str, policy: Policy) {
        self.tell(Command::AccountSeen { account: AccountName::new(name), page: Box::default(), policy });
    }

    fn space(&mut self, settings: SpaceSettings) -> Vec<Effect> {
        self.tell(Command::SpaceSettings { space: "u".into(), settings })
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
                match effect {
                    Effect::Write { account, page } => {
                        commands.push(Command::PageWritten { account, write_id: page.write_id.clone() });
                    }
                    Effect::Receipt { account, closed } => {
                        commands.push(Command::ReceiptWritten { account, lease: closed.hold.lease.clone() });
                    }
                    effect => effects.push(effect),
                }
            }
        }
        effects
    }

    fn ask(&mut self, who: Who<'_>, declared_ms: u64) -> Vec<Effect> {
        self.ask_with(who, declared_ms, None)
    }

    fn ask_with(&mut self, who: Who<'_>, declared_ms: u64, budget: Option<Budget>) -> Vec<Effect> {
        self.tickets += 1;
        self.tell(Command::Request(Box::new(Request {
            ticket: Ticket { agent_instance: "a".into(), number: self.tickets },
            node: NodeName::new(NODE),
            space: SpaceKey::new("n", "s", who.space),
            revision: self.revision,
            worker: None,
            size: Size::Large,
            declared_ms,
            caller: Ok(AccountName::new(who.account)),
            cookie: who.cookie.map(CookieId::new),
            budget,
            presented: None,
        })))
    }

    /// The lease ends and its slot is back.
    fn end(&mut self, order: &Order, ending: Ending, used_ms: u64) -> Vec<Effect> {
        let (node, lease) = (NodeName::new(NODE), order.lease.clone());
        self.tell(Command::Started { node: node.clone(), lease: lease.clone(), slot: PickedSlot::Has(0) });
        let report = EndReport { ending, used_ms };
        let mut effects = self.tell(Command::Ended { node: node.clone(), lease: lease.clone(), report, kept: false });
        effects.extend(self.tell(Command::Freed { node, lease, how: FreedAs::Free }));
        effects
    }

    fn run(&mut self, who: Who<'_>, declared_ms: u64, ending: Ending, used_ms: u64) {
        let order = order(&self.ask(who, declared_ms)).expect("there is room");
        self.end(&order, ending, used_ms);
    }

    fn page(&self, account: &str) -> &Page {
        &self.state.accounts[&AccountName::new(account)].durable
    }
}

fn order(effects: &[Effect]) -> Option<Order> {
    effects.iter().find_map(|effect| match effect {
        Effect::Start(order) => Some((**order).clone()),
        _ => None,
    })
}

fn denial(effects: &[Effect]) -> Denial {
    let denial = effects.iter().find_map(|effect| match effect {
        Effect::Deny { denial, .. } => Some(denial.clone()),
        _ => None,
    });
    denial.unwrap_or_else(|| panic!("no refusal: {effects:?}"))
}

/// True if it was told that it waits for a limit of leases at once.
fn waits_for_concurrency(effects: &[Effect]) -> bool {
    effects
        .iter()
        .any(|effect| matches!(effect, Effect::Queue(place) if place.waits_for != WaitsFor::Node && place.latest_start_ms.is_none()))
}

#[test]
fn visitors_behind_one_address_run_beside_each_other_and_each_waits_for_itself_alone() {
    let mut story = Story::begin();
    let ann = order(&story.ask(guest("ann"), 30_000)).unwrap();
    assert!(waits_for_concurrency(&story.ask(guest("ann"), 30_000)), "one lease at a time for each visitor");
    let bob = order(&story.ask(guest("bob"), 30_000)).expect("another visitor is not in the way");
    assert!(order(&story.end(&bob, Ending::Released, 1_000)).is_none(), "ann still waits for ann");
    let second = order(&story.end(&ann, Ending::Released, 2_000)).expect("it was ann's own lease that it waited for");
    story.end(&second, Ending::Released, 3_000);
    let page = story.page(GUESTS);
    let rows: Vec<_> = page.cookies.iter().map(|row| (row.cookie.as_str(), row.charged_ms)).collect();
    assert_eq!(rows, [("ann", 5_000), ("bob", 1_000)]);
    assert_eq!(page.windows[0].charged_ms, 6_000);
}

#[test]
fn the_refusal_of_a_guest_says_which_limit_fired() {
    let mut story = Story::begin();
    for cookie in ["a", "b", "c", "d"] {
        story.run(guest(cookie), 60_000, Ending::Released, 60_000);
    }
    story.run(guest("a"), 55_000, Ending::Released, 55_000);
    let refused = denial(&story.ask(guest("a"), 10_000));
    assert!(matches!(
        refused,
        Denial::QuotaExceeded { limiter: Limiter::Cookie, left_ms: 5_000, limit_ms: 120_000, .. }
    ));
    assert!(human_message(&refused).contains("5 s of 120 s for one visitor who is not signed in are left"));
    let refused = denial(&story.ask(guest("e"), 10_000));
    assert!(matches!(
        refused,
        Denial::QuotaExceeded { limiter: Limiter::AddressPrefix, left_ms: 5_000, limit_ms: 300_000, .. }
    ));
    assert!(human_message(&refused).contains("5 s of 300 s for all visitors behind this address"));
}

#[test]
fn a_call_over_the_limit_of_its_space_waits_and_is_no_matter_of_quota() {
    let mut story = Story::begin();
    story.space(SpaceSettings { concurrent: Some(2), ..SpaceSettings::default() });
    let first = order(&story.ask(BOB, 10_000)).unwrap();
    order(&story.ask(guest("ann"), 10_000)).unwrap();
    assert!(waits_for_concurrency(&story.ask(BOB, 10_000)));
    assert!(order(&story.ask(Who { space: "other", ..BOB }, 10_000)).is_some(), "another Space is not in the way");
    let third = order(&story.end(&first, Ending::Released, 1_000));
    assert!(third.is_some(), "the next begins when a lease of the Space has ended");
    assert!(waits_for_concurrency(&story.ask(BOB, 10_000)));
    let effects = story.space(SpaceSettings::default());
    assert!(order(&effects).is_some(), "the limit is taken away");
    assert_eq!(story.state.spaces["u"].leases, 3);
}

#[test]
fn beyond_the_bound_of_those_who_wait_for_a_space_the_refusal_names_its_limit() {
    let mut story = Story::begin();
    let queue = QueueBounds { node: 9, space: 1, account: 9 };
    let settings = NodeSettings { queue, ..NodeSettings::default() };
    story.tell(Command::NodeSettings { node: NodeName::new(NODE), settings });
    story.space(SpaceSettings { concurrent: Some(1), ..SpaceSettings::default() });
    story.ask(BOB, 10_000);
    story.ask(BOB, 10_000);
    assert_eq!(denial(&story.ask(BOB, 10_000)), Denial::ConcurrencyExceeded { limit: 1, of: QueueOf::Space });
}

#[test]
fn a_space_is_forgotten_with_its_last_lease() {
    let mut story = Story::begin();
    let lease = order(&story.ask(BOB, 10_000)).unwrap();
    assert_eq!(story.state.spaces["u"].leases, 1);
    story.end(&lease, Ending::Released, 1);
    assert!(story.state.spaces.is_empty());
}

#[test]
fn a_space_that_clamps_gives_what_is_left_as_a_hard_limit() {
    let mut story = Story::begin();
    story.account("bob", policy(100_000, 9));
    story.run(BOB, 60_000, Ending::Released, 60_000);
    let Denial::QuotaExceeded { left_ms: 40_000, .. } = denial(&story.ask(BOB, 60_000)) else {
        panic!("without the choice it is refused")
    };
    story.space(SpaceSettings { clamp_to_remaining: true, ..SpaceSettings::default() });
    let clamped = order(&story.ask(BOB, 60_000)).unwrap();
    assert_eq!(clamped.declared_ms, 40_000, "the node kills it there");
    let hold = &story.page("bob").holds[0];
    let shortened = Some(Shortened { declared_ms: 60_000, by: ShortenedBy::RemainingQuota });
    assert_eq!((hold.declared_ms, hold.shortened), (40_000, shortened));
    let Denial::PendingOverquota {
        declared_ms: 60_000,
        given_ms: Some(40_000),
        needed_ms: 40_000,
        left_ms: 0,
        reserved_ms: 40_000,
        ..
    } = denial(&story.ask(BOB, 60_000))
    else {
        panic!("nothing is left while it runs; when it has ended, something may be")
    };
    let history = story.state.history.clone();
    story.end(&clamped, Ending::Deadline, 40_000);
    assert!(matches!(denial(&story.ask(BOB, 60_000)), Denial::QuotaExceeded { left_ms: 0, .. }));
    assert_eq!(story.state.history, history, "how long it would have run nobody knows");
}

#[test]
fn what_no_tier_allows_no_space_can_clamp() {
    let mut story = Story::begin();
    story.space(SpaceSettings { clamp_to_remaining: true, ..SpaceSettings::default() });
    let refused = denial(&story.ask(BOB, 61_000));
    assert!(matches!(refused, Denial::IllegalDuration { what: DurationLimit::LongestCall, limit_ms: 60_000, .. }));
    assert!(human_message(&refused).contains("tier free allows at most 60 s of large and 60 s of xlarge"));
}

/// What is left when a call has its turn may be less than when it came. What it takes of its token's budget is what it got.
#[test]
fn a_waiting_call_is_clamped_again_when_it_has_its_turn() {
    let mut story = Story::begin();
    story.account("bob", policy(100_000, 1));
    story.space(SpaceSettings { clamp_to_remaining: true, ..SpaceSettings::default() });
    let first = order(&story.ask(BOB, 30_000)).unwrap();
    let budget = Budget { root: "r".into(), max_ms: 60_000, max_calls: 9, expires: LedgerTime(i64::MAX) };
    assert!(waits_for_concurrency(&story.ask_with(BOB, 60_000, Some(budget))));
    story.account("bob", policy(50_000, 1));
    let second = order(&story.end(&first, Ending::Released, 30_000)).unwrap();
    assert_eq!(second.declared_ms, 20_000);
    assert_eq!(story.state.roots["r"].ms, 20_000);
    story.end(&second, Ending::Released, 5_000);
    assert_eq!(story.state.roots["r"].ms, 5_000);
}

#[test]
fn a_space_that_trusts_its_history_reserves_what_was_learned() {
    let mut story = Story::begin();
    story.space(SpaceSettings { learned_reservation: true, ..SpaceSettings::default() });
    for _ in 0..SUGGEST_MIN {
        story.run(BOB, 60_000, Ending::Released, 4_000);
    }
    let learned = order(&story.ask(BOB, 60_000)).unwrap();
    assert_eq!(learned.declared_ms, 6_000, "1.5 x 4 s");
    assert_eq!(story.page("bob").reserved_ms(&story.page("bob").holds[0].parts[0].source), 6_000);
    story.end(&learned, Ending::Deadline, 6_000);
    let wiser = order(&story.ask(BOB, 60_000)).unwrap();
    assert_eq!(wiser.declared_ms, 9_000, "a call that was cut short gives the next one more");
    assert!(order(&story.ask(BOB, 5_000)).is_some_and(|order| order.declared_ms == 5_000), "another function");
}

#[test]
fn what_an_old_version_of_an_app_needed_limits_no_call_of_the_new_one() {
    let mut story = Story::begin();
    story.space(SpaceSettings { learned_reservation: true, ..SpaceSettings::default() });
    for _ in 0..SUGGEST_MIN {
        story.run(BOB, 60_000, Ending::Released, 4_000);
    }
    story.revision = Revision(2);
    let new = order(&story.ask(BOB, 60_000)).unwrap();
    assert_eq!(new.declared_ms, 60_000);
    story.revision = Revision(1);
    let old = order(&story.ask(BOB, 60_000)).unwrap();
    assert_eq!(old.declared_ms, 6_000, "its pod still answers, or was made anew");
    story.end(&new, Ending::Released, 50_000);
    story.end(&old, Ending::Released, 4_000);
    assert_eq!(order(&story.ask(BOB, 60_000)).unwrap().declared_ms, 6_000, "each learns from its own");
}

#[test]
fn an_account_with_an_identity_of_another_gets_nothing() {
    let mut story = Story::begin();
    story.account("bob", Policy { conflict: Some(AccountName::new("zoe")), ..policy(100_000, 1) });
    let reason = UnauthenticatedReason::IdentityConflict;
    assert_eq!(denial(&story.ask(BOB, 10_000)), Denial::Unauthenticated { reason });
    story.account("bob", policy(100_000, 1));
    assert!(order(&story.ask(BOB, 10_000)).is_some());
}
