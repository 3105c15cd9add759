//! A ledger whose pages are all written at once, with a look at each: what the broker does with what it was told.

mod places;
mod visitors;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use spaceport_core::ids::{
    AccountName, CookieId, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
    WorkerKey,
};
use spaceport_core::lease::{Command, Effect, Moment, Order, Place, Policy, Priority, Request, State, step};
use spaceport_core::page::{Page, Source, Unsound};
use spaceport_core::protocol::{CallerClass, Denial};
use spaceport_core::queue::Presented;
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;
use spaceport_operator::ledger::convert::{KeptFields, page_of, status_of};
use spaceport_operator::ledger::display::{Display, TierShown};

/// The one node, with one card of two halves.
pub const NODE: &str = "gpu-1";
/// Its agent's start.
pub const AGENT: &str = "agent-1";
/// The one account.
pub const ACCOUNT: &str = "bob";
/// The page of an address prefix, in stories of visitors who are not signed in.
pub const GUESTS: &str = "guest-0af3";
/// What each of them has in a day, weighted milliseconds; all together have what the account has.
const VISITOR_MS: u64 = 120_000;
/// Commands that may follow from one: a page and its answers are a few for each row.
const CONSEQUENCES_MAX: usize = 4096;
/// When the stories happen.
const BEGIN: LedgerTime = LedgerTime(1_800_000_000_000);

/// The ledger, its store and its clock.
pub struct Ledger {
    state: State,
    elapsed_ms: u64,
    ids: u128,
    payer: AccountName,
    durable: Page,
    /// Orders that left.
    pub orders: Vec<Order>,
    /// Places, as those who wait were told them.
    told: Vec<Place>,
    /// Who was refused, and why.
    denied: Vec<(Ticket, Denial)>,
}

/// A request of the node's agent.
pub fn ticket(number: u64) -> Ticket {
    Ticket { agent_instance: AGENT.into(), number }
}

/// A tier of ten minutes.
pub fn allowance() -> Allowance {
    Allowance {
        base_ms: 600_000,
        longest_call_ms: 120_000,
        runs_per_window: Some(1000),
        generation: 1,
        grants: Vec::new(),
        per_cookie_ms: None,
    }
}

impl Ledger {
    /// A term whose only node has joined.
    pub fn new(epoch: Epoch) -> Self {
        let node = NodeName::new(NODE);
        let state = State::new(epoch, BTreeSet::from([node.clone()]));
        let mut ledger = Self {
            state,
            elapsed_ms: 0,
            ids: 1 << 80,
            payer: AccountName::new(ACCOUNT),
            durable: Page::default(),
            orders: Vec::new(),
            told: Vec::new(),
            denied: Vec::new(),
        };
        let agent_instance = AGENT.to_owned();
        ledger.command(Command::NodeHello { node: node.clone(), agent_instance, highest_epoch: Epoch(0) });
        let card = Card { index: 0, large_slots: 2, grantable: true, quarantined_slots: 0 };
        ledger.command(Command::NodeJoined { node, epoch, cards: vec![card], leases: Vec::new(), idle: Vec::new() });
        ledger
    }

    /// The same with other ids than any other story: in a cluster they are random, so that no term draws those of another.
    #[must_use]
    pub fn drawing_from(self, ids: u128) -> Self {
        Self { ids, ..self }
    }

    /// The page of the account, as last written.
    pub fn page(&self) -> &Page {
        &self.durable
    }

    /// The term is over: a node or a page has a later one.
    pub fn is_over(&self) -> bool {
        self.state.ended.is_some()
    }

    /// Shows the account with this page.
    pub fn account(&mut self, page: Page) {
        self.shown(ACCOUNT, allowance(), page);
    }

    /// Shows the address prefix with this page instead; from now on its visitors call.
    pub fn guests(&mut self, page: Page) {
        self.shown(GUESTS, Allowance { per_cookie_ms: Some(VISITOR_MS), ..allowance() }, page);
    }

    fn shown(&mut self, name: &str, allowance: Allowance, page: Page) {
        self.payer = AccountName::new(name);
        self.durable = page.clone();
        let policy = Policy {
            tier: "demo".to_owned(),
            allowance,
            concurrent: 4,
            priority: Priority::Medium,
            caller: CallerClass::Regular,
            deleting: false,
            conflict: None,
        };
        self.command(Command::AccountSeen { account: self.payer.clone(), page: Box::new(page), policy });
    }

    /// A call of the account.
    pub fn request(&mut self, number: u64, size: Size, declared_ms: u64) {
        self.request_of(None, number, size, declared_ms);
    }

    /// A call of the account, or of a visitor of the address prefix.
    pub fn request_of(&mut self, visitor: Option<&CookieId>, number: u64, size: Size, declared_ms: u64) {
        self.call(visitor.cloned(), number, size, declared_ms, None);
    }

    fn call(
        &mut self,
        cookie: Option<CookieId>,
        number: u64,
        size: Size,
        declared_ms: u64,
        presented: Option<Presented>,
    ) {
        let space = SpaceKey::new("demo", "hello", "space-uid");
        self.command(Command::Request(Box::new(Request {
            ticket: ticket(number),
            node: NodeName::new(NODE),
            space,
            revision: Revision::default(),
            // One function, so that a worker that the node says it keeps serves its next call.
            worker: WorkerKey::new("pod", "container", 1),
            size,
            declared_ms,
            caller: Ok(self.payer.clone()),
            cookie,
            budget: None,
            presented,
        })));
    }

    /// Time passes.
    pub fn wait(&mut self, milliseconds: u64) {
        self.elapsed_ms = self.elapsed_ms.saturating_add(milliseconds);
        self.command(Command::Tick);
    }

    /// Takes a command and everything that follows from it.
    ///
    /// # Panics
    /// If an event does not fit the ledger, a page is written that must not be, or the ledger does not come to rest.
    pub fn command(&mut self, command: Command) {
        let mut commands = VecDeque::from([command]);
        for _ in 0..CONSEQUENCES_MAX {
            let Some(command) = commands.pop_front() else { return };
            let at = Moment { wall: BEGIN.plus(self.elapsed_ms), steady: Steady(self.elapsed_ms) };
            self.ids += 1 << 16;
            let outcome = step(&mut self.state, at, IdSeed(self.ids), command);
            assert!(outcome.violations.is_empty(), "{:?}", outcome.violations);
            for effect in outcome.effects {
                commands.extend(self.effect(effect));
            }
        }
        panic!("the ledger does not come to rest");
    }

    fn effect(&mut self, effect: Effect) -> Option<Command> {
        match effect {
            Effect::Write { account, page } => {
                self.written(&page);
                let write_id = page.write_id.clone();
                Some(Command::PageWritten { account, write_id })
            }
            Effect::Read { account } => Some(Command::PageRead { account, page: Box::new(self.durable.clone()) }),
            Effect::Confirm { account, node } => {
                Some(Command::PageConfirmed { account, node, page: Some(Box::new(self.durable.clone())) })
            }
            Effect::Receipt { account, closed } => {
                Some(Command::ReceiptWritten { account, lease: closed.hold.lease.clone() })
            }
            Effect::Start(order) => {
                self.orders.push(*order);
                None
            }
            Effect::Queue(place) => {
                self.told.push(*place);
                None
            }
            Effect::Deny { ticket, denial, .. } => {
                self.denied.push((ticket, denial));
                None
            }
            Effect::Cancel { .. } | Effect::Acknowledge { .. } | Effect::EndTerm(_) => None,
        }
    }

    /// Looks at a page as it leaves, and keeps it.
    fn written(&mut self, page: &Page) {
        let before = &self.durable;
        // A story may begin just before a count is exhausted, which no ledger comes near.
        let sound = page.sound();
        let is_fine = matches!(sound, Ok(()) | Err(Unsound::Exhausted { .. }));
        assert!(is_fine, "the ledger writes a page that it would not take back: {sound:?}");
        assert_eq!(page.seq, before.seq + 1);
        assert!(page.last_time >= before.last_time, "ledger time goes back (L20)");
        for hold in &page.holds {
            if !before.holds.iter().any(|known| known.lease == hold.lease) {
                hold.parts.iter().filter(|part| part.ms > 0).for_each(|part| fits(page, &part.source));
                visitors::fits(&self.payer, page, hold);
            }
        }
        for hold in &before.holds {
            let open = page.holds.iter().any(|known| known.lease == hold.lease);
            let settled = page.closed.iter().any(|known| known.hold.lease == hold.lease);
            assert!(open != settled, "{} is open {open} and settled {settled} (invariant 3)", hold.lease);
        }
        visitors::add_up(before, page);
        stored_alike(page, None);
        self.durable = page.clone();
    }
}

/// Invariant 1.
fn fits(page: &Page, source: &Source) {
    let window = |start: &LedgerTime| page.windows.iter().find(|window| window.start == *start);
    let found = match source {
        Source::Window(start) => window(start).map(|window| (window.base_ms, window.charged_ms)),
        Source::Grant(uid) => page.grants.iter().find(|row| row.uid == *uid).map(|row| (row.ms, row.used_ms)),
    };
    let (limit_ms, charged_ms) = found.expect("a source of the page");
    let reserved_ms = page.reserved_ms(source);
    assert!(charged_ms + reserved_ms <= limit_ms, "{charged_ms} + {reserved_ms} of {limit_ms} ms");
}

/// A page that is stored, as JSON, and read again is the same.
///
/// # Panics
/// If it is not.
pub fn stored_alike(page: &Page, kept: Option<&KeptFields>) {
    let tier = TierShown { name: "demo".to_owned(), allowance: allowance() };
    let status = status_of(page, Display::of(page, Some(&tier)), kept).expect("a page can be stored");
    let text = serde_json::to_vec(&status).expect("a status is JSON");
    let read = page_of(&serde_json::from_slice(&text).expect("it is read as it was written")).expect("a page");
    // The stored form has the denial's numbers only, and of a settled hold nothing that mattered only before its start or has
    // a row of its own.
    let mut page = Page { last_denial: None, ..page.clone() };
    for closed in &mut page.closed {
        let hold = Arc::make_mut(&mut closed.hold);
        (hold.avoid, hold.after, hold.budget) = (Vec::new(), None, None);
    }
    assert_eq!(read, page);
}

/// The lease of the first order, for examples.
pub fn first_lease(ledger: &Ledger) -> Option<&LeaseId> {
    ledger.orders.first().map(|order| &order.lease)
}
