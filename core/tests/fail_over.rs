//! What is left of an earlier leader. L7: leases that a node has and that no page is known to hold; their pages decide, read
//! behind the node's Joined, for an earlier leader may have written a hold, and ordered its lease, that no watch has shown yet.
//! L9: an order leaves soon after its hold was decided, or not at all, for a later leader gives the lease up.

#![allow(clippy::unwrap_used, clippy::panic)] // A story that cannot go on ends there.

use std::collections::BTreeSet;

use spaceport_core::ids::{
    AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Command, Effect, EndReport, FreedAs, Moment, NOBODYS, ORDER_AGE_MAX_MS, PickedSlot, Policy,
    Priority, Request, State, step,
};
use spaceport_core::page::{Ending, Page};
use spaceport_core::protocol::CallerClass;
use spaceport_core::queue::History;
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;

const BOB: &str = "bob";
const NODE: &str = "gpu-1";
const DECLARED_MS: u64 = 10_000;
const REPORT: EndReport = EndReport { ending: Ending::Released, used_ms: 4_000 };

/// A term, with a store that answers writes at once; reads are answered by the test.
struct Term {
    state: State,
    now: u64,
    /// Time that its clock of intervals did not count.
    slept: i64,
    seed: u128,
}

impl Term {
    /// A term that has been shown bob's page, and one node with a card of two slots that has these leases.
    fn begin(epoch: u64, page: Page, leases: Vec<AgentLease>) -> (Self, Vec<Effect>) {
        let state = State::new(Epoch(epoch), BTreeSet::new());
        let mut term = Self { state, now: 0, slept: 0, seed: u128::from(epoch) << 64 };
        term.show(page);
        let effects = term.join(leases);
        (term, effects)
    }

    fn show(&mut self, page: Page) -> Vec<Effect> {
        let allowance = Allowance {
            base_ms: 60_000,
            longest_call_ms: 50_000,
            runs_per_window: None,
            generation: 1,
            grants: Vec::new(),
            per_cookie_ms: None,
        };
        let (tier, priority, caller) = ("demo".into(), Priority::Medium, CallerClass::Regular);
        let policy = Policy { tier, allowance, concurrent: 9, priority, caller, deleting: false, conflict: None };
        self.tell(Command::AccountSeen { account: AccountName::new(BOB), page: Box::new(page), policy })
    }

    fn join(&mut self, leases: Vec<AgentLease>) -> Vec<Effect> {
        let (node, epoch) = (NodeName::new(NODE), self.state.epoch);
        let cards = vec![Card { index: 0, large_slots: 2, grantable: true, quarantined_slots: 0 }];
        self.tell(Command::NodeHello { node: node.clone(), agent_instance: "a".into(), highest_epoch: Epoch(0) });
        self.tell(Command::NodeJoined { node, epoch, cards, leases, idle: Vec::new() })
    }

    fn tell(&mut self, command: Command) -> Vec<Effect> {
        let mut commands = vec![command];
        let mut effects = Vec::new();
        while let Some(command) = commands.pop() {
            self.seed += 1000;
            let at = self.at();
            let outcome = step(&mut self.state, at, IdSeed(self.seed), command);
            assert_eq!(outcome.violations, []);
            for effect in outcome.effects {
                match effect {
                    Effect::Write { account, page } => {
                        commands.push(Command::PageWritten { account, write_id: page.write_id.clone() });
                    }
                    // Receipts are not what this is about.
                    Effect::Receipt { .. } => {}
                    effect => effects.push(effect),
                }
            }
        }
        effects
    }

    /// Asks, and leaves the write of the hold unanswered.
    fn decide(&mut self) -> Command {
        self.seed += 1000;
        let (at, request) = (self.at(), self.request(Size::Large));
        let outcome = step(&mut self.state, at, IdSeed(self.seed), request);
        let write = outcome.effects.into_iter().find_map(|effect| match effect {
            Effect::Write { account, page } => Some(Command::PageWritten { account, write_id: page.write_id.clone() }),
            _ => None,
        });
        write.expect("a hold is written")
    }

    fn ask(&mut self, size: Size) -> Vec<Effect> {
        let request = self.request(size);
        self.tell(request)
    }

    fn at(&self) -> Moment {
        Moment { wall: LedgerTime(1_000_000 + self.now as i64 + self.slept), steady: Steady(self.now) }
    }

    fn request(&self, size: Size) -> Command {
        let ticket = Ticket { agent_instance: "a".into(), number: (self.seed % 1_000_000) as u64 };
        let space = SpaceKey::new("n", "s", "u");
        let (node, caller) = (NodeName::new(NODE), Ok(AccountName::new(BOB)));
        let request = Request {
            ticket,
            node,
            space,
            revision: Revision::default(),
            worker: None,
            size,
            declared_ms: DECLARED_MS,
            caller,
            cookie: None,
            budget: None,
            presented: None,
        };
        Command::Request(Box::new(request))
    }

    fn confirm(&mut self, page: Option<Page>) -> Vec<Effect> {
        let (account, node) = (AccountName::new(BOB), NodeName::new(NODE));
        self.tell(Command::PageConfirmed { account, node, page: page.map(Box::new) })
    }

    fn end(&mut self, lease: &LeaseId) -> Vec<Effect> {
        self.tell(Command::Ended { node: NodeName::new(NODE), lease: lease.clone(), report: REPORT, kept: false })
    }

    fn free(&mut self, lease: &LeaseId) -> Vec<Effect> {
        self.tell(Command::Freed { node: NodeName::new(NODE), lease: lease.clone(), how: FreedAs::Free })
    }

    fn pass(&mut self, ms: u64) -> Vec<Effect> {
        self.now += ms;
        self.tell(Command::Tick)
    }

    fn page(&self) -> Page {
        (*self.state.accounts[&AccountName::new(BOB)].durable).clone()
    }
}

/// What an earlier leader did that the next one has not been shown: the page with its hold, and the lease.
fn late_hold() -> (Page, LeaseId) {
    let (mut earlier, _) = Term::begin(1, Page::default(), Vec::new());
    let effects = earlier.ask(Size::Large);
    let order = effects.into_iter().find_map(|effect| match effect {
        Effect::Start(order) => Some(order),
        _ => None,
    });
    let order = order.expect("the hold is durable");
    assert_eq!(order.account, AccountName::new(BOB), "the node can say whose it is");
    (earlier.page(), order.lease)
}

fn on_node(lease: &LeaseId, phase: AgentPhase) -> AgentLease {
    AgentLease {
        lease: lease.clone(),
        account: Some(AccountName::new(BOB)),
        size: Size::Large,
        slot: PickedSlot::Has(0),
        phase,
    }
}

fn confirms() -> Vec<Effect> {
    vec![Effect::Confirm { account: AccountName::new(BOB), node: NodeName::new(NODE) }]
}

fn acknowledged(lease: &LeaseId, ended: bool, freed: bool) -> Effect {
    Effect::Acknowledge { node: NodeName::new(NODE), lease: lease.clone(), ended, freed }
}

fn cancel(lease: &LeaseId) -> Effect {
    Effect::Cancel { node: NodeName::new(NODE), lease: lease.clone(), reason: NOBODYS }
}

/// A term that meets the lease of an earlier leader and has not been shown its hold.
fn meets(phase: AgentPhase) -> (Term, Page, LeaseId) {
    let (page, lease) = late_hold();
    let (term, effects) = Term::begin(2, Page::default(), vec![on_node(&lease, phase)]);
    assert_eq!(effects, confirms(), "its page is read, and nothing else is done");
    (term, page, lease)
}

/// Which version of its app it was a call of stood in the earlier leader's memory alone.
#[test]
fn a_call_that_runs_across_a_fail_over_is_charged_and_teaches_nothing() {
    let (page, lease) = late_hold();
    let (mut term, _) = Term::begin(2, page, vec![on_node(&lease, AgentPhase::Running)]);
    term.end(&lease);
    assert!(term.page().windows[0].charged_ms > 0);
    assert_eq!(term.state.history, History::default());
    term.free(&lease);
    let Some(Effect::Start(order)) = term.ask(Size::Large).pop() else { panic!("there is room") };
    term.end(&order.lease);
    assert_ne!(term.state.history, History::default(), "one of this term does");
}

#[test]
fn a_lease_whose_hold_was_not_seen_runs_on_and_is_charged() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    assert_eq!(term.pass(60_000), [], "while the page can not be read nothing is decided");
    assert!(matches!(term.ask(Size::Xlarge)[..], [Effect::Queue(_)]), "its slot stays taken");
    assert_eq!(term.confirm(Some(page)), []);
    let effects = term.end(&lease);
    assert!(effects.contains(&acknowledged(&lease, true, false)), "{effects:?}");
    assert_eq!((term.page().closed[0].ending, term.page().windows[0].charged_ms), (Ending::Released, 4_000));
    assert!(term.state.strangers.is_empty());
}

#[test]
fn a_lease_that_its_page_does_not_hold_is_ended() {
    for page in [Some(Page::default()), None] {
        let (mut term, _, lease) = meets(AgentPhase::Running);
        assert_eq!(term.confirm(page), [cancel(&lease)]);
        assert_eq!(term.end(&lease), [acknowledged(&lease, true, false)]);
        term.free(&lease);
        assert!(term.state.strangers.is_empty() && term.state.leases.is_empty());
        assert!(term.page().windows.is_empty(), "nobody pays");
    }
}

#[test]
fn an_end_that_is_reported_before_the_page_was_read_is_settled_by_it() {
    let (mut term, page, lease) = meets(AgentPhase::Assigned);
    term.tell(Command::Running { node: NodeName::new(NODE), lease: lease.clone() });
    assert_eq!(term.end(&lease), [], "it is acknowledged when it is settled, or known to be nobody's");
    assert_eq!(term.end(&lease), []);
    assert_eq!(term.free(&lease), [acknowledged(&lease, false, true)]);
    let effects = term.confirm(Some(page));
    assert!(effects.contains(&acknowledged(&lease, true, false)), "{effects:?}");
    assert_eq!(term.page().closed[0].charged_ms, 4_000);
    assert!(term.state.leases.is_empty() && term.state.strangers.is_empty());
}

#[test]
fn what_had_ended_before_its_node_joined_is_settled_as_its_node_says() {
    for freed in [false, true] {
        let (mut term, page, lease) = meets(AgentPhase::Ended { report: REPORT, freed });
        assert!(term.confirm(Some(page)).contains(&acknowledged(&lease, true, false)));
        assert_eq!(term.page().closed[0].charged_ms, 4_000);
        assert_eq!(term.state.leases.is_empty(), freed, "its slot is free when its node says so");
    }
    let (mut term, _, lease) = meets(AgentPhase::Ended { report: REPORT, freed: true });
    assert_eq!(term.confirm(Some(Page::default())), [acknowledged(&lease, true, true)]);
}

#[test]
fn the_watch_may_be_faster_than_the_read() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    assert_eq!(term.show(page.clone()), []);
    assert!(term.state.strangers.is_empty());
    assert_eq!(term.confirm(Some(page)), []);
    assert_eq!(term.end(&lease), [acknowledged(&lease, true, false)]);
    assert_eq!(term.page().windows[0].charged_ms, 4_000);
}

/// It was held when the page was read, and settled by its own leader before the answer came.
#[test]
fn a_read_that_is_older_than_what_the_watch_has_shown_settles_nothing() {
    let (page, lease) = late_hold();
    let (mut earlier, _) = Term::begin(1, page.clone(), vec![on_node(&lease, AgentPhase::Running)]);
    earlier.end(&lease);
    let (mut term, _) =
        Term::begin(2, Page::default(), vec![on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true })]);
    assert_eq!(term.show(earlier.page()), [acknowledged(&lease, true, true)]);
    assert_eq!(term.confirm(Some(page)), []);
    assert!(term.state.strangers.is_empty() && term.page().holds.is_empty());
}

/// The page of one node's lease says nothing about those of another node that joined later.
#[test]
fn a_read_for_another_node_judges_nothing() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    let (account, node) = (AccountName::new(BOB), NodeName::new("gpu-2"));
    let early = Some(Box::default());
    assert_eq!(term.tell(Command::PageConfirmed { account, node, page: early }), []);
    assert_eq!(term.confirm(Some(page)), []);
    assert!(term.state.leases[&lease].is_open());
}

#[test]
fn a_node_that_goes_away_tells_of_its_leases_again() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    term.tell(Command::NodeDisconnected { node: NodeName::new(NODE) });
    assert!(term.state.strangers.is_empty());
    assert_eq!(term.join(vec![on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true })]), confirms());
    assert!(term.confirm(Some(page)).contains(&acknowledged(&lease, true, false)));
    assert_eq!(term.page().windows[0].charged_ms, 4_000);
}

/// It waited there for a slot that it will not get.
#[test]
fn a_lease_that_its_node_gives_back_is_voided_when_its_hold_is_found() {
    let (mut term, page, lease) = meets(AgentPhase::Assigned);
    term.tell(Command::Refused { node: NodeName::new(NODE), lease: lease.clone() });
    assert!(term.state.leases.is_empty(), "its slot is free");
    assert_eq!(term.confirm(Some(page.clone())), [], "nobody waits for it any more");
    assert_eq!(term.show(page), [acknowledged(&lease, true, false)]);
    let page = term.page();
    assert_eq!((page.holds.len(), page.windows.len(), page.closed[0].ending), (0, 0, Ending::Refused));
}

/// Its order was under way to a node that joined the next term first, and takes it no more.
#[test]
fn a_hold_that_is_found_after_its_node_joined_without_it_is_void() {
    let (page, _) = late_hold();
    let (mut term, _) = Term::begin(2, Page::default(), Vec::new());
    let effects = term.show(page);
    assert!(
        !effects.iter().any(|effect| matches!(effect, Effect::Cancel { .. })),
        "nobody has to be asked: {effects:?}"
    );
    let page = term.page();
    assert_eq!((page.holds.len(), page.windows.len(), page.closed[0].ending), (0, 0, Ending::Refused));
    assert!(term.state.leases.is_empty());
}

/// The usual stranger: its leader settled it and was gone before it could acknowledge that.
#[test]
fn what_a_known_page_has_settled_needs_no_read() {
    let (page, lease) = late_hold();
    let (mut earlier, _) = Term::begin(2, page, vec![on_node(&lease, AgentPhase::Running)]);
    earlier.end(&lease);
    let ended = on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true });
    let (term, effects) = Term::begin(3, earlier.page(), vec![ended]);
    assert_eq!(effects, [acknowledged(&lease, true, true)]);
    assert_eq!(term.page().closed[0].charged_ms, 4_000);
}

#[test]
fn a_lease_without_its_record_is_nobodys_at_once() {
    let (page, lease) = late_hold();
    let ended = on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true });
    let (_, effects) = Term::begin(2, page.clone(), vec![AgentLease { account: None, ..ended.clone() }]);
    assert!(!effects.contains(&acknowledged(&lease, true, true)), "this one is held");
    let (_, effects) = Term::begin(2, Page::default(), vec![AgentLease { account: None, ..ended }]);
    assert_eq!(effects, [acknowledged(&lease, true, true)]);
}

/// Its leader hears late that the hold is durable: a later leader may have met it and given it up meanwhile.
#[test]
fn a_hold_that_is_known_late_is_void_and_its_request_is_served_anew() {
    for asleep in [false, true] {
        let (mut term, _) = Term::begin(1, Page::default(), Vec::new());
        let written = term.decide();
        let late = ORDER_AGE_MAX_MS + 1;
        if asleep {
            term.slept = late as i64
        } else {
            term.now = late
        }
        let effects = term.tell(written);
        let closed = term.page().closed[0].clone();
        assert_eq!((closed.ending, closed.charged_ms), (Ending::Undelivered, 0));
        let orders: Vec<_> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Start(order) => Some(&order.lease),
                _ => None,
            })
            .collect();
        assert_eq!(orders.len(), 1, "its request has its turn again: {effects:?}");
        assert_ne!(*orders[0], closed.hold.lease, "the order of the late hold never leaves");
    }
}

#[test]
fn a_hold_that_is_known_in_time_is_ordered() {
    let (mut term, _) = Term::begin(1, Page::default(), Vec::new());
    let written = term.decide();
    term.now = ORDER_AGE_MAX_MS;
    let effects = term.tell(written);
    assert!(matches!(&effects[..], [Effect::Start(_)]), "{effects:?}");
    assert!(term.page().closed.is_empty());
}

/// The age limit is part of the bound of a lease whose order is another's to send, and of no other.
#[test]
fn a_met_hold_is_given_up_when_its_order_can_not_come_any_more() {
    let (page, lease) = late_hold();
    let state = State::new(Epoch(2), BTreeSet::new());
    let mut term = Term { state, now: 0, slept: 0, seed: 2 << 64 };
    term.show(page);
    // order_ttl 5 + allow_limit 30 + declared 10 + grace 2 + clear_limit 10
    term.pass(57_000 + ORDER_AGE_MAX_MS);
    assert_eq!(term.page().holds[0].lease, lease);
    term.pass(1);
    assert_eq!(term.page().closed[0].ending, Ending::Expired);
}
