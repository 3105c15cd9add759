//! The world of these tests: one term of the ledger, one node, and a store that answers at once.

use std::collections::BTreeSet;

use spaceport_core::ids::{
    AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket,
};
use spaceport_core::lease::{
    AgentLease, Command, Effect, EndReport, Event, FreedAs, IdleWorker, Moment, Order, Outcome, PickedSlot, Place,
    Policy, Priority, Request, State, step,
};
use spaceport_core::page::{Ending, Page};
use spaceport_core::protocol::{CallerClass, Denial};
use spaceport_core::quota::Allowance;
use spaceport_core::slots::Card;

pub const BOB: &str = "bob";
pub const NODE: &str = "gpu-1";

/// What becomes of receipts.
#[derive(PartialEq, Eq)]
pub enum Receipts {
    /// They are among the effects, and the test writes them if it likes.
    Told,
    /// The store writes them at once.
    Written,
    /// They are not what the test is about.
    Ignored,
}

pub struct World {
    pub state: State,
    pub now: u64,
    /// Time that its clock of intervals did not count.
    pub slept: i64,
    pub seed: u128,
    pub tickets: u64,
    /// Of the app that calls from now on.
    pub revision: Revision,
    /// Of the node, when it joins.
    pub cards: Vec<Card>,
    /// The latest term that the node has joined.
    pub joined: Epoch,
    pub receipts: Receipts,
    /// Writes of this account's page are answered when the test says so.
    pub late: Option<&'static str>,
    /// The answers to them.
    pub unanswered: Vec<Command>,
    pub writes: u32,
    pub events: Vec<Event>,
    /// What was told since the last look.
    pub effects: Vec<Effect>,
}

impl World {
    /// A term with nobody in it.
    pub fn empty(epoch: u64, cards: Vec<Card>) -> Self {
        Self {
            state: State::new(Epoch(epoch), BTreeSet::new()),
            now: 0,
            slept: 0,
            seed: u128::from(epoch) << 64,
            tickets: 0,
            revision: Revision::default(),
            cards,
            joined: Epoch(0),
            receipts: Receipts::Told,
            late: None,
            unanswered: Vec::new(),
            writes: 0,
            events: Vec::new(),
            effects: Vec::new(),
        }
    }

    /// A term with bob, and a node with so many cards of two slots.
    pub fn begin(cards: u32, base_ms: u64, concurrent: u32) -> Self {
        let mut world = Self::empty(1, (0..cards).map(|index| card(index, 2)).collect());
        world.account(BOB, policy(base_ms, concurrent));
        world.join(Vec::new(), Vec::new());
        world
    }

    pub fn account(&mut self, name: &str, policy: Policy) {
        self.tell(Command::AccountSeen { account: AccountName::new(name), page: Box::default(), policy });
    }

    pub fn hello(&mut self, instance: &str) -> Vec<Effect> {
        let highest_epoch = self.joined;
        self.tell(Command::NodeHello { node: node(), agent_instance: instance.into(), highest_epoch })
    }

    /// The node says hello and joins, with these leases and these workers that it keeps.
    pub fn join(&mut self, leases: Vec<AgentLease>, idle: Vec<IdleWorker>) -> Vec<Effect> {
        self.hello("a");
        let (epoch, cards) = (self.state.epoch, self.cards.clone());
        self.joined = epoch;
        self.tell(Command::NodeJoined { node: node(), epoch, cards, leases, idle })
    }

    /// The node is gone.
    pub fn leave(&mut self) -> Vec<Effect> {
        self.tell(Command::NodeDisconnected { node: node() })
    }

    /// All that follows from it at once, but for what the store answers.
    pub fn tell(&mut self, command: Command) -> Vec<Effect> {
        let (mut commands, mut told) = (vec![command], Vec::new());
        while let Some(command) = commands.pop() {
            for effect in self.step(command) {
                match effect {
                    Effect::Write { account, page } => {
                        self.writes += 1;
                        let late = self.late == Some(account.as_str());
                        let answer = Command::PageWritten { account, write_id: page.write_id.clone() };
                        if late { &mut self.unanswered } else { &mut commands }.push(answer);
                    }
                    Effect::Receipt { account, closed } if self.receipts == Receipts::Written => {
                        commands.push(Command::ReceiptWritten { account, lease: closed.hold.lease.clone() });
                    }
                    Effect::Receipt { .. } if self.receipts == Receipts::Ignored => {}
                    effect => told.push(effect),
                }
            }
        }
        self.effects.extend(told.iter().cloned());
        told
    }

    /// One step with its writes left unanswered: which accounts are written, and with which write.
    pub fn tell_unanswered(&mut self, command: Command) -> Vec<(AccountName, String)> {
        let written = self.step(command).into_iter().filter_map(|effect| match effect {
            Effect::Write { account, page } => Some((account, page.write_id.clone())),
            _ => None,
        });
        written.collect()
    }

    fn step(&mut self, command: Command) -> Vec<Effect> {
        self.seed += 1000;
        let at = Moment { wall: LedgerTime(1_000_000 + self.now as i64 + self.slept), steady: Steady(self.now) };
        let Outcome { events, effects, violations, .. } = step(&mut self.state, at, IdSeed(self.seed), command);
        assert_eq!(violations, []);
        self.events.extend(events);
        effects
    }

    /// What was told since the last look.
    pub fn look(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// The next call, for whoever changes something about it before it is sent.
    pub fn request(&mut self, account: &str, size: Size, declared_ms: u64) -> Request {
        self.tickets += 1;
        Request {
            ticket: ticket(self.tickets),
            node: node(),
            space: SpaceKey::new("n", "s", "u"),
            revision: self.revision,
            worker: None,
            size,
            declared_ms,
            caller: Ok(AccountName::new(account)),
            cookie: None,
            budget: None,
            presented: None,
        }
    }

    pub fn send(&mut self, request: Request) -> Vec<Effect> {
        self.tell(Command::Request(Box::new(request)))
    }

    pub fn ask(&mut self, account: &str, size: Size, declared_ms: u64) -> Vec<Effect> {
        let request = self.request(account, size, declared_ms);
        self.send(request)
    }

    /// The lease has a slot of this card.
    pub fn started(&mut self, lease: &LeaseId, card: u32) -> Vec<Effect> {
        self.placed(lease, PickedSlot::Has(card))
    }

    pub fn placed(&mut self, lease: &LeaseId, slot: PickedSlot) -> Vec<Effect> {
        self.tell(Command::Started { node: node(), lease: lease.clone(), slot })
    }

    pub fn refused(&mut self, lease: &LeaseId) -> Vec<Effect> {
        self.tell(Command::Refused { node: node(), lease: lease.clone() })
    }

    pub fn end(&mut self, lease: &LeaseId, ending: Ending, used_ms: u64) -> Vec<Effect> {
        let report = EndReport { ending, used_ms };
        self.tell(Command::Ended { node: node(), lease: lease.clone(), report, kept: false })
    }

    pub fn free(&mut self, lease: &LeaseId) -> Vec<Effect> {
        self.tell(Command::Freed { node: node(), lease: lease.clone(), how: FreedAs::Free })
    }

    /// The lease ends and its slot is back.
    pub fn finish(&mut self, lease: &LeaseId, ending: Ending, used_ms: u64) -> Vec<Effect> {
        let mut effects = self.end(lease, ending, used_ms);
        effects.extend(self.free(lease));
        effects
    }

    /// A lease of bob's from its order to its free slot.
    pub fn run(&mut self, ending: Ending, used_ms: u64) {
        let lease = order(&self.ask(BOB, Size::Large, 10_000)).lease;
        self.started(&lease, 0);
        self.finish(&lease, ending, used_ms);
    }

    pub fn pass(&mut self, ms: u64) -> Vec<Effect> {
        self.now += ms;
        self.tell(Command::Tick)
    }

    /// The durable one.
    pub fn page(&self, account: &str) -> &Page {
        &self.state.accounts[&AccountName::new(account)].durable
    }
}

pub fn policy(base_ms: u64, concurrent: u32) -> Policy {
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

pub fn card(index: u32, large_slots: u32) -> Card {
    Card { index, large_slots, grantable: true, quarantined_slots: 0 }
}

pub fn node() -> NodeName {
    NodeName::new(NODE)
}

pub fn ticket(number: u64) -> Ticket {
    Ticket { agent_instance: "a".into(), number }
}

pub fn orders(effects: &[Effect]) -> Vec<Order> {
    let orders = effects.iter().filter_map(|effect| match effect {
        Effect::Start(order) => Some((**order).clone()),
        _ => None,
    });
    orders.collect()
}

/// The only one.
pub fn order(effects: &[Effect]) -> Order {
    let mut orders = orders(effects);
    assert_eq!(orders.len(), 1, "{effects:?}");
    orders.remove(0)
}

/// The places that were told.
pub fn places(effects: &[Effect]) -> Vec<Place> {
    let places = effects.iter().filter_map(|effect| match effect {
        Effect::Queue(place) => Some((**place).clone()),
        _ => None,
    });
    places.collect()
}

pub fn denial(effects: &[Effect]) -> Option<Denial> {
    effects.iter().find_map(|effect| match effect {
        Effect::Deny { denial, .. } => Some(denial.clone()),
        _ => None,
    })
}
