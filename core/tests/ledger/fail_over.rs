//! What is left of an earlier leader. L7: leases that a node has and that no page is known to hold; their pages decide, read
//! behind the node's Joined, for an earlier leader may have written a hold, and ordered its lease, that no watch has shown yet.
//! L9: an order leaves soon after its hold was decided, or not at all, for a later leader gives the lease up.

use spaceport_core::ids::{AccountName, LeaseId, NodeName, Size};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Command, Effect, EndReport, NOBODYS, ORDER_AGE_MAX_MS, PickedSlot,
};
use spaceport_core::page::{Ending, Page};
use spaceport_core::queue::History;

use crate::world::{BOB, Receipts, World, card, node, order, orders, policy};

const DECLARED_MS: u64 = 10_000;
const REPORT: EndReport = EndReport { ending: Ending::Released, used_ms: 4_000 };

fn empty(epoch: u64) -> World {
    World { receipts: Receipts::Ignored, ..World::empty(epoch, vec![card(0, 2)]) }
}

/// A term that has been shown bob's page, and one node with a card of two slots that has these leases. Reads are answered by
/// the test.
fn begin(epoch: u64, page: Page, leases: Vec<AgentLease>) -> (World, Vec<Effect>) {
    let mut term = empty(epoch);
    show(&mut term, page);
    let effects = term.join(leases, Vec::new());
    (term, effects)
}

fn show(term: &mut World, page: Page) -> Vec<Effect> {
    let (account, policy) = (AccountName::new(BOB), policy(60_000, 9));
    term.tell(Command::AccountSeen { account, page: Box::new(page), policy })
}

/// Asks, and leaves the write of the hold unanswered.
fn decide(term: &mut World) -> Command {
    let request = term.request(BOB, Size::Large, DECLARED_MS);
    let (account, write_id) = term.tell_unanswered(Command::Request(Box::new(request))).remove(0);
    Command::PageWritten { account, write_id }
}

fn confirm(term: &mut World, page: Option<Page>) -> Vec<Effect> {
    term.tell(Command::PageConfirmed { account: AccountName::new(BOB), node: node(), page: page.map(Box::new) })
}

fn end(term: &mut World, lease: &LeaseId) -> Vec<Effect> {
    term.end(lease, REPORT.ending, REPORT.used_ms)
}

/// What an earlier leader did that the next one has not been shown: the page with its hold, and the lease.
fn late_hold() -> (Page, LeaseId) {
    let (mut earlier, _) = begin(1, Page::default(), Vec::new());
    let order = order(&earlier.ask(BOB, Size::Large, DECLARED_MS));
    assert_eq!(order.account, AccountName::new(BOB), "the node can say whose it is");
    (earlier.page(BOB).clone(), order.lease)
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
    vec![Effect::Confirm { account: AccountName::new(BOB), node: node() }]
}

fn acknowledged(lease: &LeaseId, ended: bool, freed: bool) -> Effect {
    Effect::Acknowledge { node: node(), lease: lease.clone(), ended, freed }
}

fn cancel(lease: &LeaseId) -> Effect {
    Effect::Cancel { node: node(), lease: lease.clone(), reason: NOBODYS }
}

/// A term that meets the lease of an earlier leader and has not been shown its hold.
fn meets(phase: AgentPhase) -> (World, Page, LeaseId) {
    let (page, lease) = late_hold();
    let (term, effects) = begin(2, Page::default(), vec![on_node(&lease, phase)]);
    assert_eq!(effects, confirms(), "its page is read, and nothing else is done");
    (term, page, lease)
}

/// Which version of its app it was a call of stood in the earlier leader's memory alone.
#[test]
fn a_call_that_runs_across_a_fail_over_is_charged_and_teaches_nothing() {
    let (page, lease) = late_hold();
    let (mut term, _) = begin(2, page, vec![on_node(&lease, AgentPhase::Running)]);
    end(&mut term, &lease);
    assert!(term.page(BOB).windows[0].charged_ms > 0);
    assert_eq!(term.state.history, History::default());
    term.free(&lease);
    let Some(Effect::Start(order)) = term.ask(BOB, Size::Large, DECLARED_MS).pop() else { panic!("there is room") };
    end(&mut term, &order.lease);
    assert_ne!(term.state.history, History::default(), "one of this term does");
}

#[test]
fn a_lease_whose_hold_was_not_seen_runs_on_and_is_charged() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    assert_eq!(term.pass(60_000), [], "while the page can not be read nothing is decided");
    assert!(matches!(term.ask(BOB, Size::Xlarge, DECLARED_MS)[..], [Effect::Queue(_)]), "its slot stays taken");
    assert_eq!(confirm(&mut term, Some(page)), []);
    let effects = end(&mut term, &lease);
    assert!(effects.contains(&acknowledged(&lease, true, false)), "{effects:?}");
    assert_eq!((term.page(BOB).closed[0].ending, term.page(BOB).windows[0].charged_ms), (Ending::Released, 4_000));
    assert!(term.state.strangers.is_empty());
}

#[test]
fn a_lease_that_its_page_does_not_hold_is_ended() {
    for page in [Some(Page::default()), None] {
        let (mut term, _, lease) = meets(AgentPhase::Running);
        assert_eq!(confirm(&mut term, page), [cancel(&lease)]);
        assert_eq!(end(&mut term, &lease), [acknowledged(&lease, true, false)]);
        term.free(&lease);
        assert!(term.state.strangers.is_empty() && term.state.leases.is_empty());
        assert!(term.page(BOB).windows.is_empty(), "nobody pays");
    }
}

#[test]
fn an_end_that_is_reported_before_the_page_was_read_is_settled_by_it() {
    let (mut term, page, lease) = meets(AgentPhase::Assigned);
    term.tell(Command::Running { node: node(), lease: lease.clone() });
    assert_eq!(end(&mut term, &lease), [], "it is acknowledged when it is settled, or known to be nobody's");
    assert_eq!(end(&mut term, &lease), []);
    assert_eq!(term.free(&lease), [acknowledged(&lease, false, true)]);
    let effects = confirm(&mut term, Some(page));
    assert!(effects.contains(&acknowledged(&lease, true, false)), "{effects:?}");
    assert_eq!(term.page(BOB).closed[0].charged_ms, 4_000);
    assert!(term.state.leases.is_empty() && term.state.strangers.is_empty());
}

#[test]
fn what_had_ended_before_its_node_joined_is_settled_as_its_node_says() {
    for freed in [false, true] {
        let (mut term, page, lease) = meets(AgentPhase::Ended { report: REPORT, freed });
        assert!(confirm(&mut term, Some(page)).contains(&acknowledged(&lease, true, false)));
        assert_eq!(term.page(BOB).closed[0].charged_ms, 4_000);
        assert_eq!(term.state.leases.is_empty(), freed, "its slot is free when its node says so");
    }
    let (mut term, _, lease) = meets(AgentPhase::Ended { report: REPORT, freed: true });
    assert_eq!(confirm(&mut term, Some(Page::default())), [acknowledged(&lease, true, true)]);
}

#[test]
fn the_watch_may_be_faster_than_the_read() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    assert_eq!(show(&mut term, page.clone()), []);
    assert!(term.state.strangers.is_empty());
    assert_eq!(confirm(&mut term, Some(page)), []);
    assert_eq!(end(&mut term, &lease), [acknowledged(&lease, true, false)]);
    assert_eq!(term.page(BOB).windows[0].charged_ms, 4_000);
}

/// It was held when the page was read, and settled by its own leader before the answer came.
#[test]
fn a_read_that_is_older_than_what_the_watch_has_shown_settles_nothing() {
    let (page, lease) = late_hold();
    let (mut earlier, _) = begin(1, page.clone(), vec![on_node(&lease, AgentPhase::Running)]);
    end(&mut earlier, &lease);
    let (mut term, _) =
        begin(2, Page::default(), vec![on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true })]);
    assert_eq!(show(&mut term, earlier.page(BOB).clone()), [acknowledged(&lease, true, true)]);
    assert_eq!(confirm(&mut term, Some(page)), []);
    assert!(term.state.strangers.is_empty() && term.page(BOB).holds.is_empty());
}

/// The page of one node's lease says nothing about those of another node that joined later.
#[test]
fn a_read_for_another_node_judges_nothing() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    let (account, node) = (AccountName::new(BOB), NodeName::new("gpu-2"));
    let early = Some(Box::default());
    assert_eq!(term.tell(Command::PageConfirmed { account, node, page: early }), []);
    assert_eq!(confirm(&mut term, Some(page)), []);
    assert!(term.state.leases[&lease].is_open());
}

#[test]
fn a_node_that_goes_away_tells_of_its_leases_again() {
    let (mut term, page, lease) = meets(AgentPhase::Running);
    term.leave();
    assert!(term.state.strangers.is_empty());
    assert_eq!(
        term.join(vec![on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true })], Vec::new()),
        confirms()
    );
    assert!(confirm(&mut term, Some(page)).contains(&acknowledged(&lease, true, false)));
    assert_eq!(term.page(BOB).windows[0].charged_ms, 4_000);
}

/// It waited there for a slot that it will not get.
#[test]
fn a_lease_that_its_node_gives_back_is_voided_when_its_hold_is_found() {
    let (mut term, page, lease) = meets(AgentPhase::Assigned);
    term.refused(&lease);
    assert!(term.state.leases.is_empty(), "its slot is free");
    assert_eq!(confirm(&mut term, Some(page.clone())), [], "nobody waits for it any more");
    assert_eq!(show(&mut term, page), [acknowledged(&lease, true, false)]);
    let page = term.page(BOB);
    assert_eq!((page.holds.len(), page.windows.len(), page.closed[0].ending), (0, 0, Ending::Refused));
}

/// Its order was under way to a node that joined the next term first, and takes it no more.
#[test]
fn a_hold_that_is_found_after_its_node_joined_without_it_is_void() {
    let (page, _) = late_hold();
    let (mut term, _) = begin(2, Page::default(), Vec::new());
    let effects = show(&mut term, page);
    assert!(
        !effects.iter().any(|effect| matches!(effect, Effect::Cancel { .. })),
        "nobody has to be asked: {effects:?}"
    );
    let page = term.page(BOB);
    assert_eq!((page.holds.len(), page.windows.len(), page.closed[0].ending), (0, 0, Ending::Refused));
    assert!(term.state.leases.is_empty());
}

/// The usual stranger: its leader settled it and was gone before it could acknowledge that.
#[test]
fn what_a_known_page_has_settled_needs_no_read() {
    let (page, lease) = late_hold();
    let (mut earlier, _) = begin(2, page, vec![on_node(&lease, AgentPhase::Running)]);
    end(&mut earlier, &lease);
    let ended = on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true });
    let (term, effects) = begin(3, earlier.page(BOB).clone(), vec![ended]);
    assert_eq!(effects, [acknowledged(&lease, true, true)]);
    assert_eq!(term.page(BOB).closed[0].charged_ms, 4_000);
}

#[test]
fn a_lease_without_its_record_is_nobodys_at_once() {
    let (page, lease) = late_hold();
    let ended = on_node(&lease, AgentPhase::Ended { report: REPORT, freed: true });
    let (_, effects) = begin(2, page.clone(), vec![AgentLease { account: None, ..ended.clone() }]);
    assert!(!effects.contains(&acknowledged(&lease, true, true)), "this one is held");
    let (_, effects) = begin(2, Page::default(), vec![AgentLease { account: None, ..ended }]);
    assert_eq!(effects, [acknowledged(&lease, true, true)]);
}

/// Its leader hears late that the hold is durable: a later leader may have met it and given it up meanwhile.
#[test]
fn a_hold_that_is_known_late_is_void_and_its_request_is_served_anew() {
    for asleep in [false, true] {
        let (mut term, _) = begin(1, Page::default(), Vec::new());
        let written = decide(&mut term);
        let late = ORDER_AGE_MAX_MS + 1;
        if asleep {
            term.slept = late as i64
        } else {
            term.now = late
        }
        let effects = term.tell(written);
        let closed = term.page(BOB).closed[0].clone();
        assert_eq!((closed.ending, closed.charged_ms), (Ending::Undelivered, 0));
        let orders = orders(&effects);
        assert_eq!(orders.len(), 1, "its request has its turn again: {effects:?}");
        assert_ne!(orders[0].lease, closed.hold.lease, "the order of the late hold never leaves");
    }
}

#[test]
fn a_hold_that_is_known_in_time_is_ordered() {
    let (mut term, _) = begin(1, Page::default(), Vec::new());
    let written = decide(&mut term);
    term.now = ORDER_AGE_MAX_MS;
    let effects = term.tell(written);
    assert!(matches!(&effects[..], [Effect::Start(_)]), "{effects:?}");
    assert!(term.page(BOB).closed.is_empty());
}

/// The age limit is part of the bound of a lease whose order is another's to send, and of no other.
#[test]
fn a_met_hold_is_given_up_when_its_order_can_not_come_any_more() {
    let (page, lease) = late_hold();
    let mut term = empty(2);
    show(&mut term, page);
    // order_ttl 5 + allow_limit 30 + declared 10 + grace 2 + clear_limit 10
    term.pass(57_000 + ORDER_AGE_MAX_MS);
    assert_eq!(term.page(BOB).holds[0].lease, lease);
    term.pass(1);
    assert_eq!(term.page(BOB).closed[0].ending, Ending::Expired);
}
