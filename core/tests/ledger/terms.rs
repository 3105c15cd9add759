//! What ends a term, keeps it from granting, or takes an account away from it.

use spaceport_core::ids::{AccountName, Epoch, Size};
use spaceport_core::lease::{Command, Effect, TermEnd};
use spaceport_core::page::{Ending, Page};
use spaceport_core::protocol::Denial;

use crate::world::{BOB, World, denial, order, policy};

#[test]
fn another_leader_ends_the_term() {
    let mut story = World::begin(1, 600_000, 9);
    let page = Box::new(Page { epoch: Epoch(2), seq: 1, ..Page::default() });
    let account = AccountName::new(BOB);
    let effects = story.tell(Command::AccountSeen { account, page, policy: policy(1, 1) });
    assert_eq!(effects, [Effect::EndTerm(TermEnd::Deposed { by: Epoch(2) })]);
    assert_eq!(story.ask(BOB, Size::Large, 10_000), [], "nothing is decided any more");
}

#[test]
fn a_clock_that_is_off_grants_nothing() {
    let mut story = World::begin(1, 600_000, 9);
    story.tell(Command::ClockJudged { off_ms: Some(6_000) });
    assert_eq!(denial(&story.ask(BOB, Size::Large, 10_000)), Some(Denial::ClockSkew { ms: 6_000 }));
    story.tell(Command::ClockJudged { off_ms: None });
    order(&story.ask(BOB, Size::Large, 10_000));
}

#[test]
fn an_account_that_is_gone_leaves_nothing_behind() {
    let mut story = World::begin(1, 600_000, 1);
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

/// Its order has left, and the node refuses it or never gets it: the call is not left without an answer.
#[test]
fn a_call_whose_order_is_under_way_when_its_account_goes_is_answered() {
    let mut story = World::begin(1, 600_000, 1);
    let lease = order(&story.ask(BOB, Size::Large, 10_000)).lease;
    let effects = story.tell(Command::AccountGone { account: AccountName::new(BOB) });
    assert_eq!(denial(&effects), Some(Denial::AccountDeleting));
    story.refused(&lease);
    story.end(&lease, Ending::Cancelled, 0);
    story.free(&lease);
    assert!(story.state.leases.is_empty() && story.state.queue.is_empty());
}
