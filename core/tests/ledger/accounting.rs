//! Limits of guests and Spaces, calls that are given less than they declare, budgets of tokens, and what is free.

use std::sync::Arc;

use spaceport_core::ids::{AccountName, CookieId, LeaseId, LedgerTime, Revision, Size, SpaceKey};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Command, Effect, Misfit, NO_DEVICE_FREE_PER_HOUR, NodeSettings, Order, PageChange,
    PickedSlot, Policy, Request, SpaceSettings,
};
use spaceport_core::page::{Budget, Ending, Hold, Shortened, ShortenedBy};
use spaceport_core::protocol::{Denial, DurationLimit, Limiter, QueueOf, UnauthenticatedReason, human_message};
use spaceport_core::queue::{QueueBounds, SUGGEST_MIN, WaitsFor};

use crate::world::{self, Receipts, World, node, order, orders, policy, ticket};

const GUESTS: &str = "guest-0af3";

/// Who calls.
#[derive(Clone, Copy)]
struct Who<'a> {
    account: &'a str,
    cookie: Option<&'a str>,
    space: &'a str,
}

const BOB: Who<'_> = Who { account: world::BOB, cookie: None, space: "u" };

const fn guest(cookie: &str) -> Who<'_> {
    Who { account: GUESTS, cookie: Some(cookie), space: "u" }
}

/// A term with bob (600 s), an address prefix (120 s a visitor, 300 s in all), and a node with 8 slots.
fn begin() -> World {
    let mut story = World::begin(4, 600_000, 9);
    (story.revision, story.receipts) = (Revision(1), Receipts::Written);
    let mut guests = policy(300_000, 1);
    guests.allowance.per_cookie_ms = Some(120_000);
    story.account(GUESTS, guests);
    story
}

fn space(story: &mut World, settings: SpaceSettings) -> Vec<Effect> {
    story.tell(Command::SpaceSettings { space: "u".into(), settings })
}

fn ask(story: &mut World, who: Who<'_>, declared_ms: u64) -> Vec<Effect> {
    ask_with(story, who, declared_ms, None)
}

fn ask_with(story: &mut World, who: Who<'_>, declared_ms: u64, budget: Option<Budget>) -> Vec<Effect> {
    let (space, cookie) = (SpaceKey::new("n", "s", who.space), who.cookie.map(CookieId::new));
    let request = story.request(who.account, Size::Large, declared_ms);
    story.send(Request { space, cookie, budget, ..request })
}

/// The lease gets its slot, ends, and its slot is back.
fn serve(story: &mut World, lease: &LeaseId, ending: Ending, used_ms: u64) -> Vec<Effect> {
    story.started(lease, 0);
    story.finish(lease, ending, used_ms)
}

fn run(story: &mut World, who: Who<'_>, declared_ms: u64, ending: Ending, used_ms: u64) {
    let order = ordered(&ask(story, who, declared_ms)).expect("there is room");
    serve(story, &order.lease, ending, used_ms);
}

/// The first one, if there is any.
fn ordered(effects: &[Effect]) -> Option<Order> {
    orders(effects).into_iter().next()
}

fn refusal(effects: &[Effect]) -> Denial {
    world::denial(effects).unwrap_or_else(|| panic!("no refusal: {effects:?}"))
}

/// True if it was told that it waits for a limit of leases at once.
fn waits_for_concurrency(effects: &[Effect]) -> bool {
    effects
        .iter()
        .any(|effect| matches!(effect, Effect::Queue(place) if place.waits_for != WaitsFor::Node && place.latest_start_ms.is_none()))
}

#[test]
fn visitors_behind_one_address_run_beside_each_other_and_each_waits_for_itself_alone() {
    let mut story = begin();
    let ann = ordered(&ask(&mut story, guest("ann"), 30_000)).unwrap();
    assert!(waits_for_concurrency(&ask(&mut story, guest("ann"), 30_000)), "one lease at a time for each visitor");
    let bob = ordered(&ask(&mut story, guest("bob"), 30_000)).expect("another visitor is not in the way");
    assert!(ordered(&serve(&mut story, &bob.lease, Ending::Released, 1_000)).is_none(), "ann still waits for ann");
    let second = ordered(&serve(&mut story, &ann.lease, Ending::Released, 2_000))
        .expect("it was ann's own lease that it waited for");
    serve(&mut story, &second.lease, Ending::Released, 3_000);
    let page = story.page(GUESTS);
    let rows: Vec<_> = page.cookies.iter().map(|row| (row.cookie.as_str(), row.charged_ms)).collect();
    assert_eq!(rows, [("ann", 5_000), ("bob", 1_000)]);
    assert_eq!(page.windows[0].charged_ms, 6_000);
}

#[test]
fn the_refusal_of_a_guest_says_which_limit_fired() {
    let mut story = begin();
    for cookie in ["a", "b", "c", "d"] {
        run(&mut story, guest(cookie), 60_000, Ending::Released, 60_000);
    }
    run(&mut story, guest("a"), 55_000, Ending::Released, 55_000);
    let refused = refusal(&ask(&mut story, guest("a"), 10_000));
    assert!(matches!(
        refused,
        Denial::QuotaExceeded { limiter: Limiter::Cookie, left_ms: 5_000, limit_ms: 120_000, .. }
    ));
    assert!(human_message(&refused).contains("5 s of 120 s for one visitor who is not signed in are left"));
    let refused = refusal(&ask(&mut story, guest("e"), 10_000));
    assert!(matches!(
        refused,
        Denial::QuotaExceeded { limiter: Limiter::AddressPrefix, left_ms: 5_000, limit_ms: 300_000, .. }
    ));
    assert!(human_message(&refused).contains("5 s of 300 s for all visitors behind this address"));
}

#[test]
fn a_call_over_the_limit_of_its_space_waits_and_is_no_matter_of_quota() {
    let mut story = begin();
    space(&mut story, SpaceSettings { concurrent: Some(2), ..SpaceSettings::default() });
    let first = ordered(&ask(&mut story, BOB, 10_000)).unwrap();
    ordered(&ask(&mut story, guest("ann"), 10_000)).unwrap();
    assert!(waits_for_concurrency(&ask(&mut story, BOB, 10_000)));
    assert!(
        ordered(&ask(&mut story, Who { space: "other", ..BOB }, 10_000)).is_some(),
        "another Space is not in the way"
    );
    let third = ordered(&serve(&mut story, &first.lease, Ending::Released, 1_000));
    assert!(third.is_some(), "the next begins when a lease of the Space has ended");
    assert!(waits_for_concurrency(&ask(&mut story, BOB, 10_000)));
    let effects = space(&mut story, SpaceSettings::default());
    assert!(ordered(&effects).is_some(), "the limit is taken away");
    assert_eq!(story.state.spaces["u"].leases, 3);
}

#[test]
fn beyond_the_bound_of_those_who_wait_for_a_space_the_refusal_names_its_limit() {
    let mut story = begin();
    let queue = QueueBounds { node: 9, space: 1, account: 9 };
    let settings = NodeSettings { queue, ..NodeSettings::default() };
    story.tell(Command::NodeSettings { node: node(), settings });
    space(&mut story, SpaceSettings { concurrent: Some(1), ..SpaceSettings::default() });
    ask(&mut story, BOB, 10_000);
    ask(&mut story, BOB, 10_000);
    assert_eq!(refusal(&ask(&mut story, BOB, 10_000)), Denial::ConcurrencyExceeded { limit: 1, of: QueueOf::Space });
}

#[test]
fn a_space_is_forgotten_with_its_last_lease() {
    let mut story = begin();
    let lease = ordered(&ask(&mut story, BOB, 10_000)).unwrap();
    assert_eq!(story.state.spaces["u"].leases, 1);
    serve(&mut story, &lease.lease, Ending::Released, 1);
    assert!(story.state.spaces.is_empty());
}

#[test]
fn a_space_that_clamps_gives_what_is_left_as_a_hard_limit() {
    let mut story = begin();
    story.account("bob", policy(100_000, 9));
    run(&mut story, BOB, 60_000, Ending::Released, 60_000);
    let Denial::QuotaExceeded { left_ms: 40_000, .. } = refusal(&ask(&mut story, BOB, 60_000)) else {
        panic!("without the choice it is refused")
    };
    space(&mut story, SpaceSettings { clamp_to_remaining: true, ..SpaceSettings::default() });
    let clamped = ordered(&ask(&mut story, BOB, 60_000)).unwrap();
    assert_eq!(clamped.declared_ms, 40_000, "the node kills it there");
    let hold = &story.page(world::BOB).holds[0];
    let shortened = Some(Shortened { declared_ms: 60_000, by: ShortenedBy::RemainingQuota });
    assert_eq!((hold.declared_ms, hold.shortened), (40_000, shortened));
    let Denial::PendingOverquota {
        declared_ms: 60_000,
        given_ms: Some(40_000),
        needed_ms: 40_000,
        left_ms: 0,
        reserved_ms: 40_000,
        ..
    } = refusal(&ask(&mut story, BOB, 60_000))
    else {
        panic!("nothing is left while it runs; when it has ended, something may be")
    };
    let history = story.state.history.clone();
    serve(&mut story, &clamped.lease, Ending::Deadline, 40_000);
    assert!(matches!(refusal(&ask(&mut story, BOB, 60_000)), Denial::QuotaExceeded { left_ms: 0, .. }));
    assert_eq!(story.state.history, history, "how long it would have run nobody knows");
}

#[test]
fn what_no_tier_allows_no_space_can_clamp() {
    let mut story = begin();
    space(&mut story, SpaceSettings { clamp_to_remaining: true, ..SpaceSettings::default() });
    let refused = refusal(&ask(&mut story, BOB, 61_000));
    assert!(matches!(refused, Denial::IllegalDuration { what: DurationLimit::LongestCall, limit_ms: 60_000, .. }));
    assert!(human_message(&refused).contains("tier free allows at most 60 s of large and 60 s of xlarge"));
}

/// What is left when a call has its turn may be less than when it came. What it takes of its token's budget is what it got.
#[test]
fn a_waiting_call_is_clamped_again_when_it_has_its_turn() {
    let mut story = begin();
    story.account("bob", policy(100_000, 1));
    space(&mut story, SpaceSettings { clamp_to_remaining: true, ..SpaceSettings::default() });
    let first = ordered(&ask(&mut story, BOB, 30_000)).unwrap();
    let budget = Budget { root: "r".into(), max_ms: 60_000, max_calls: 9, expires: LedgerTime(i64::MAX) };
    assert!(waits_for_concurrency(&ask_with(&mut story, BOB, 60_000, Some(budget))));
    story.account("bob", policy(50_000, 1));
    let second = ordered(&serve(&mut story, &first.lease, Ending::Released, 30_000)).unwrap();
    assert_eq!(second.declared_ms, 20_000);
    assert_eq!(story.page(world::BOB).taken_of_budget("r").ms, 20_000);
    serve(&mut story, &second.lease, Ending::Released, 5_000);
    assert_eq!(story.page(world::BOB).taken_of_budget("r").ms, 5_000);
}

#[test]
fn a_space_that_trusts_its_history_reserves_what_was_learned() {
    let mut story = begin();
    space(&mut story, SpaceSettings { learned_reservation: true, ..SpaceSettings::default() });
    for _ in 0..SUGGEST_MIN {
        run(&mut story, BOB, 60_000, Ending::Released, 4_000);
    }
    let learned = ordered(&ask(&mut story, BOB, 60_000)).unwrap();
    assert_eq!(learned.declared_ms, 6_000, "1.5 x 4 s");
    assert_eq!(story.page(world::BOB).reserved_ms(&story.page(world::BOB).holds[0].parts[0].source), 6_000);
    serve(&mut story, &learned.lease, Ending::Deadline, 6_000);
    let wiser = ordered(&ask(&mut story, BOB, 60_000)).unwrap();
    assert_eq!(wiser.declared_ms, 9_000, "a call that was cut short gives the next one more");
    assert!(ordered(&ask(&mut story, BOB, 5_000)).is_some_and(|order| order.declared_ms == 5_000), "another function");
}

#[test]
fn what_an_old_version_of_an_app_needed_limits_no_call_of_the_new_one() {
    let mut story = begin();
    space(&mut story, SpaceSettings { learned_reservation: true, ..SpaceSettings::default() });
    for _ in 0..SUGGEST_MIN {
        run(&mut story, BOB, 60_000, Ending::Released, 4_000);
    }
    story.revision = Revision(2);
    let new = ordered(&ask(&mut story, BOB, 60_000)).unwrap();
    assert_eq!(new.declared_ms, 60_000);
    story.revision = Revision(1);
    let old = ordered(&ask(&mut story, BOB, 60_000)).unwrap();
    assert_eq!(old.declared_ms, 6_000, "its pod still answers, or was made anew");
    serve(&mut story, &new.lease, Ending::Released, 50_000);
    serve(&mut story, &old.lease, Ending::Released, 4_000);
    assert_eq!(ordered(&ask(&mut story, BOB, 60_000)).unwrap().declared_ms, 6_000, "each learns from its own");
}

#[test]
fn an_account_with_an_identity_of_another_gets_nothing() {
    let mut story = begin();
    story.account("bob", Policy { conflict: Some(AccountName::new("zoe")), ..policy(100_000, 1) });
    let reason = UnauthenticatedReason::IdentityConflict;
    assert_eq!(refusal(&ask(&mut story, BOB, 10_000)), Denial::Unauthenticated { reason });
    story.account("bob", policy(100_000, 1));
    assert!(ordered(&ask(&mut story, BOB, 10_000)).is_some());
}

#[test]
fn a_call_has_the_budget_of_its_token() {
    let mut story = World::begin(1, 600_000, 9);
    let budget =
        |max_ms, max_calls| Some(Budget { root: "r".into(), max_ms, max_calls, expires: LedgerTime(i64::MAX) });
    let exhausted = Some(Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted });
    let first = order(&ask_with(&mut story, BOB, 10_000, budget(15_000, 2)));
    assert_eq!(world::denial(&ask_with(&mut story, BOB, 10_000, budget(15_000, 2))), exhausted, "too many seconds");
    story.started(&first.lease, 0);
    story.end(&first.lease, Ending::Released, 2_000);
    order(&ask_with(&mut story, BOB, 13_000, budget(15_000, 2)));
    assert_eq!(world::denial(&ask_with(&mut story, BOB, 1, budget(99_000, 2))), exhausted, "too many calls");
}

/// The next leader is shown bob's page, and joins his node, where this lease of his runs.
fn next_term(story: &World, running: Option<&LeaseId>) -> World {
    let epoch = story.state.epoch.0 + 1;
    let mut next = World { now: story.now, tickets: story.tickets, ..World::empty(epoch, story.cards.clone()) };
    let (account, page) = (AccountName::new(world::BOB), Box::new(story.page(world::BOB).clone()));
    next.tell(Command::AccountSeen { account: account.clone(), page, policy: policy(600_000, 9) });
    let on_node = |lease: &LeaseId| AgentLease {
        lease: lease.clone(),
        account: Some(account),
        size: Size::Large,
        slot: PickedSlot::Has(0),
        phase: AgentPhase::Running,
    };
    next.join(running.map(on_node).into_iter().collect(), Vec::new());
    next
}

/// Invariant 10: a Space that saw its caller's token cannot spend it once more because somebody else leads now.
#[test]
fn the_next_leader_knows_what_was_taken_of_a_budget() {
    let mut story = World::begin(1, 600_000, 9);
    let budget = || Some(Budget { root: "r".into(), max_ms: 15_000, max_calls: 3, expires: LedgerTime(i64::MAX) });
    let exhausted = Some(Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted });
    let first = order(&ask_with(&mut story, BOB, 10_000, budget()));
    serve(&mut story, &first.lease, Ending::Released, 4_000);
    let second = order(&ask_with(&mut story, BOB, 6_000, budget()));
    story.started(&second.lease, 0);
    let mut next = next_term(&story, Some(&second.lease));
    assert_eq!(world::denial(&ask_with(&mut next, BOB, 5_001, budget())), exhausted, "4 s charged and 6 s held");
    next.finish(&second.lease, Ending::Released, 1_000);
    let refused = order(&ask_with(&mut next, BOB, 10_000, budget()));
    serve(&mut next, &refused.lease, Ending::PlatformFault, 9_000);
    let mut last = next_term(&next, None);
    let third = order(&ask_with(&mut last, BOB, 10_000, budget()));
    serve(&mut last, &third.lease, Ending::NeverAllowed, 0);
    assert_eq!(world::denial(&ask_with(&mut last, BOB, 1, budget())), exhausted, "three calls had their turn");
    let taken = last.page(world::BOB).taken_of_budget("r");
    assert_eq!((taken.calls, taken.ms), (3, 5_000));
}

/// A leader whose clock was ahead has dropped the row already.
#[test]
fn a_token_expires_by_the_time_of_the_page() {
    let mut story = World::begin(1, 600_000, 9);
    run(&mut story, BOB, 10_000, Ending::Released, 1_000);
    let until = |expires| Some(Budget { root: "r".into(), max_ms: 15_000, max_calls: 3, expires });
    let time = story.page(world::BOB).last_time;
    let expired = Denial::Unauthenticated { reason: UnauthenticatedReason::Expired };
    assert_eq!(world::denial(&ask_with(&mut story, BOB, 10_000, until(time))), Some(expired));
    order(&ask_with(&mut story, BOB, 10_000, until(time.plus(1))));
}

/// Two leaders may each decide a call of one token: whoever writes second meets the other's hold.
#[test]
fn a_budget_holds_against_what_another_leader_wrote_meanwhile() {
    let budget = Budget { root: "r".into(), max_ms: 10_000, max_calls: 1, expires: LedgerTime(i64::MAX) };
    let mut story = World::begin(1, 600_000, 9);
    order(&ask_with(&mut story, BOB, 10_000, Some(budget)));
    let other = Arc::clone(&story.page(world::BOB).holds[0]);
    let window = story.page(world::BOB).windows[0].clone();
    let hold = Arc::new(Hold { lease: LeaseId::new("another"), ..Hold::clone(&other) });
    let late = PageChange::Hold { hold, window, grants: Vec::new(), cookie: None };
    let mut page = story.page(world::BOB).clone();
    let before = page.clone();
    assert!(matches!(late.make(&mut page), Err(Misfit::OverBudget { calls: 2, max_calls: 1, ms: 20_000, .. })));
    assert_eq!(page, before);
}

#[test]
fn a_call_that_waited_in_vain_keeps_its_budget() {
    let mut story = World::begin(1, 600_000, 1);
    order(&ask(&mut story, BOB, 10_000));
    let budget = Some(Budget { root: "r".into(), max_ms: 10_000, max_calls: 1, expires: LedgerTime(i64::MAX) });
    ask_with(&mut story, BOB, 10_000, budget.clone());
    let waits = ticket(story.tickets);
    let exhausted = Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted };
    assert_eq!(world::denial(&ask_with(&mut story, BOB, 10_000, budget.clone())), Some(exhausted), "what waits counts");
    story.tell(Command::Dequeue { ticket: waits });
    assert_eq!(world::denial(&ask_with(&mut story, BOB, 10_000, budget)), None);
}

#[test]
fn no_device_is_free_only_so_often() {
    let mut story = World::begin(1, 6_000_000, 9);
    for _ in 0..NO_DEVICE_FREE_PER_HOUR {
        story.run(Ending::NoDevice, 1_000);
        // The outbox drains meanwhile.
        let lease = story.page(world::BOB).closed[0].hold.lease.clone();
        story.tell(Command::ReceiptWritten { account: AccountName::new(world::BOB), lease });
    }
    assert!(story.page(world::BOB).windows.is_empty());
    story.run(Ending::NoDevice, 1_000);
    assert_eq!(story.page(world::BOB).windows[0].charged_ms, 1_000);
    story.pass(3_600_000);
    story.run(Ending::NoDevice, 1_000);
    assert_eq!(story.page(world::BOB).windows[0].charged_ms, 1_000);
}
