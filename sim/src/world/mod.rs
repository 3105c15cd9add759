//! A whole small cluster without I/O: brokers that come and go, node agents, clients, an API server, and a network that
//! delays, cuts and repeats. Time is virtual; a seed determines everything.

use std::collections::{BTreeMap, BTreeSet};

use spaceport_core::ids::{AccountName, Epoch, LeaseId, NodeName};
use spaceport_core::lease::{Limits, Policy, State};

use crate::agenda::{Agenda, Happening, SharedPage};
use crate::agent::Agent;
use crate::broker::{Broker, Target};
use crate::check::calls::CallsSeen;
use crate::check::nodes::NodesSeen;
use crate::check::{self};
use crate::coverage::Coverage;
use crate::links::{Link, LinkId};
use crate::plan::Plan;
use crate::random::Random;
use crate::store::{Store, Swapped};
use crate::violation::{Checked, Rule, Violation};
use crate::weather::FaultKind;
use clients::Clients;

mod api;
mod brokers;
pub mod clients;
mod faults;
mod streams;

/// An agent's timer: its heartbeat, with the stamp that orders echo (L8).
const NODE_TICK_MS: u64 = 1_000;
/// A history that has not become quiet so long after its last fault never will: far beyond every limit and back-off.
const HEALING_MAX_MS: u64 = 15 * 60 * 1_000;
/// More than any history takes; one that takes more runs in a circle.
const STEPS_MAX: u64 = 400_000;

/// A page write in the network.
pub struct Write {
    /// Whose.
    pub broker: u64,
    /// Whose page.
    pub account: AccountName,
    /// What it expects.
    pub target: Target,
    /// What it writes.
    pub page: SharedPage,
    /// It can still happen.
    pub open: bool,
    /// What became of it at the API server.
    pub outcome: Option<Swapped>,
    /// It does not arrive before, world time: its broker is gone and it is still in the network.
    pub held_up_until: u64,
    /// The broker waits for its answer.
    pub awaited: bool,
}

/// How a history went.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its seed.
    pub seed: u64,
    /// What did not hold, if anything.
    pub violation: Option<Violation>,
    /// Commands that brokers decided.
    pub steps: u64,
    /// Weighted milliseconds charged.
    pub charged_ms: u64,
    /// What happened.
    pub coverage: Coverage,
    /// Faults, by kind.
    pub faults: Vec<u64>,
    /// What was said, if it was to be.
    pub lines: Vec<String>,
}

/// The cluster.
pub struct World {
    /// What it follows.
    pub plan: Plan,
    /// Milliseconds since the beginning.
    pub now: u64,
    pub(crate) random: Random,
    pub(crate) agenda: Agenda,
    /// API server.
    pub store: Store,
    /// API server's clock minus true time, milliseconds.
    pub server_offset: i64,
    /// What tiers and grants say now.
    pub policies: BTreeMap<AccountName, Policy>,
    /// What pools say now.
    pub limits: BTreeMap<NodeName, Limits>,
    /// Nodes.
    pub agents: BTreeMap<NodeName, Agent>,
    /// Processes, by number.
    pub brokers: BTreeMap<u64, Broker>,
    /// Which of them is elected.
    pub elected: u64,
    pub(crate) next_broker: u64,
    /// Streams.
    pub links: BTreeMap<LinkId, Link>,
    pub(crate) next_link: u64,
    /// Page writes under way.
    pub writes: BTreeMap<u64, Write>,
    pub(crate) next_write: u64,
    pub(crate) ids: u128,
    /// Page writes take long until then.
    pub(crate) slow_until: u64,
    /// Nodes hear late of a leader that is elected before then.
    pub(crate) slow_dials_until: u64,
    /// Nodes that stand still, and until when.
    pub(crate) asleep: BTreeMap<NodeName, u64>,
    /// Node and broker (None: all) that do not reach each other, until when.
    pub(crate) partitions: Vec<(NodeName, Option<u64>, u64)>,
    /// Clients.
    pub clients: Clients,
    /// Settled rows that went with their account.
    pub lost_rows: BTreeSet<LeaseId>,
    /// Accounts that were made again.
    pub(crate) remade: BTreeSet<AccountName>,
    /// For the checks.
    pub seen_nodes: NodesSeen,
    /// For the checks.
    pub seen_calls: CallsSeen,
    /// No more faults: everything heals.
    pub healing: bool,
    pub(crate) steps: u64,
    pub(crate) commands: u64,
    pub(crate) published: usize,
    pub(crate) coverage: Coverage,
    pub(crate) faults: Vec<u64>,
    /// What happens is written down.
    pub trace: bool,
    pub(crate) lines: Vec<String>,
}

// === impl World ===

impl World {
    /// The world of a plan, at its beginning.
    pub fn new(plan: Plan, trace: bool) -> Self {
        let fault = plan.broken.and_then(crate::broken::Broken::of_node);
        let agent = |name, cards| {
            let mut agent = Agent::new(name, cards, fault);
            agent.keeps_eagerly = plan.keeps_eagerly;
            agent
        };
        let agents = plan.nodes.iter().map(|node| (node.name.clone(), agent(&node.name, &node.cards)));
        Self {
            now: 1_000,
            random: Random::new(plan.seed ^ 0xfeed),
            agenda: Agenda::default(),
            store: Store::new(&plan.accounts),
            server_offset: 0,
            policies: plan.accounts.iter().map(|account| (account.name.clone(), account.policy.clone())).collect(),
            limits: plan.nodes.iter().map(|node| (node.name.clone(), node.limits)).collect(),
            agents: agents.collect(),
            brokers: BTreeMap::new(),
            elected: 0,
            next_broker: 1,
            links: BTreeMap::new(),
            next_link: 1,
            writes: BTreeMap::new(),
            next_write: 1,
            ids: u128::from(plan.seed) << 64,
            slow_until: 0,
            slow_dials_until: 0,
            asleep: BTreeMap::new(),
            partitions: Vec::new(),
            clients: Clients::default(),
            lost_rows: BTreeSet::new(),
            remade: BTreeSet::new(),
            seen_nodes: NodesSeen::default(),
            seen_calls: CallsSeen::default(),
            healing: false,
            steps: 0,
            commands: 0,
            published: 0,
            coverage: Coverage::default(),
            faults: vec![0; FaultKind::COUNT],
            trace,
            lines: Vec::new(),
            plan,
        }
    }

    /// Lives through its history.
    pub fn tell(mut self) -> Told {
        let violation = self.live().err();
        Told {
            seed: self.plan.seed,
            violation,
            steps: self.commands,
            charged_ms: self.store.charged_ms,
            coverage: self.coverage,
            faults: self.faults,
            lines: self.lines,
        }
    }

    fn live(&mut self) -> Checked {
        self.begin();
        let mut healed_at = None;
        while let Some((at, happening)) = self.agenda.take() {
            self.now = self.now.max(at);
            if self.trace && !matches!(happening, Happening::BrokerTick(_) | Happening::NodeTick(_)) {
                self.say(format!("{happening:?}"));
            }
            let tick = matches!(happening, Happening::NodeTick(_));
            self.happen(happening)?;
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return Err(Rule::Invariant(11).broken(format!("{STEPS_MAX} steps and no end")));
            }
            if !self.healing && self.clients.left == 0 {
                self.heal();
                healed_at = Some(self.now);
            }
            if let Some(healed_at) = healed_at
                && tick
            {
                let over = self.now > healed_at + HEALING_MAX_MS;
                if over || (self.now > healed_at + 2_000 && check::end::is_quiet(self)) {
                    break;
                }
            }
        }
        check::end::balance(self)
    }

    fn begin(&mut self) {
        for node in self.agents.keys().cloned().collect::<Vec<_>>() {
            let at = self.now + self.random.below(NODE_TICK_MS);
            self.agenda.add(at, Happening::NodeTick(node));
        }
        self.agenda.add(self.now, Happening::Elected);
        self.clients.left = self.plan.calls;
        self.agenda.add(self.now + 200, Happening::Call);
        for kind in FaultKind::TIMED {
            self.next_fault(kind);
        }
    }

    fn happen(&mut self, happening: Happening) -> Checked {
        let number = match &happening {
            Happening::WriteAnswered(id) | Happening::WriteTimesOut(id) => {
                self.writes.get(id).map(|write| write.broker)
            }
            other => other.process(),
        };
        let until = number.and_then(|number| self.brokers.get(&number)).map_or(0, |broker| broker.paused_until);
        if until > self.now {
            self.agenda.add(until, happening);
            return Ok(());
        }
        if let Some(node) = self.node_of(&happening)
            && let Some(until) = self.asleep.get(&node).copied()
        {
            if until > self.now {
                self.agenda.add(until, happening);
                return Ok(());
            }
            self.wake(&node);
        }
        match happening {
            Happening::Dial(node, broker) => self.dial(node, broker),
            Happening::ToBroker(link) => self.reach_broker(link)?,
            Happening::ToAgent(link) => self.reach_agent(link)?,
            Happening::BrokerNotices(link) => self.broker_notices(link)?,
            Happening::AgentNotices(link) => self.agent_notices(link),

            Happening::WriteArrives(write) => self.write_arrives(write)?,
            Happening::WriteAnswered(write) => self.write_answered(write)?,
            Happening::WriteTimesOut(write) => self.write_times_out(write)?,
            Happening::ReadArrives(broker, asked) => self.read_arrives(broker, asked),
            Happening::ReadAnswered(broker, asked, object) => self.read_answered(broker, asked, object)?,
            Happening::FirstSeen(broker, request) => self.first_seen(broker, *request)?,
            Happening::ReceiptArrives(broker, account, closed) => self.receipt_arrives(broker, account, closed)?,
            Happening::ReceiptWritten(broker, account, lease) => self.receipt_written(broker, account, lease)?,
            Happening::WatchStep(broker) => self.watch_step(broker)?,
            Happening::Listed(broker) => self.listed(broker)?,
            Happening::PolicyShown(broker, account) => self.policy_shown(broker, &account)?,
            Happening::PoolShown(broker, node) => self.pool_shown(broker, &node)?,
            Happening::TermRead(broker) => self.term_read(broker),
            Happening::TermWritten(broker, revision) => self.term_written(broker, revision),
            Happening::Finalized(account) => self.finalized(&account),
            Happening::Created(account) => self.created(&account),

            Happening::Elected => self.elect(),
            Happening::BrokerTick(broker) => self.broker_tick(broker)?,
            Happening::ClockRead(broker) => self.clock_read(broker)?,
            Happening::NodeTick(node) => self.node_tick(&node),
            Happening::Limit(node) => self.limit(&node),

            Happening::Call => self.call(),
            Happening::Retry(ticket) => self.retry(&ticket),
            Happening::Asked(request, retries) => self.ask(*request, retries),
            Happening::CallerLeaves(node, ticket) => self.caller_leaves(&node, &ticket),
            Happening::Allow(node, lease) => self.allow(&node, &lease),
            Happening::Done(node, lease, ending) => self.done(&node, &lease, ending),
            Happening::Cleared(node, lease) => self.cleared(&node, &lease),

            Happening::Fault(kind) => self.fault(kind)?,
            Happening::Reachable(_) => {}
            Happening::CardBack(node, card) => self.card_back(&node, card),
        }
        self.after_nodes()
    }

    /// The node that has to do something; one that stands still does it later.
    fn node_of(&self, happening: &Happening) -> Option<NodeName> {
        if self.asleep.is_empty() {
            return None;
        }
        match happening {
            Happening::ToAgent(link) | Happening::AgentNotices(link) => {
                self.links.get(link).map(|link| link.node.clone())
            }
            Happening::Dial(node, _)
            | Happening::NodeTick(node)
            | Happening::Limit(node)
            | Happening::CallerLeaves(node, _)
            | Happening::Allow(node, _)
            | Happening::Done(node, ..)
            | Happening::Cleared(node, _)
            | Happening::CardBack(node, _) => Some(node.clone()),
            Happening::Asked(request, _) => Some(request.node.clone()),
            _ => None,
        }
    }

    /// What passed its limit meanwhile ends as if the timer had come in time.
    fn wake(&mut self, node: &NodeName) {
        self.asleep.remove(node);
        self.limit(node);
    }

    /// The ledger of a broker, while it serves.
    pub fn state(&self, broker: u64) -> Option<&State> {
        self.brokers.get(&broker).and_then(|broker| broker.term.as_ref()).map(|term| &term.state)
    }

    /// Page writes of this term of this account that can still happen.
    pub fn may_happen(&self, broker: u64, account: &AccountName) -> impl Iterator<Item = &SharedPage> {
        let epoch = self.state(broker).map(|state| state.epoch);
        let target = self.store.objects.get(account).map(Target::of);
        let is_open = move |write: &&Write| {
            write.open && write.account == *account && Some(write.page.epoch) == epoch && Some(write.target) == target
        };
        let open: Vec<&SharedPage> = self.writes.values().filter(is_open).map(|write| &write.page).collect();
        open.into_iter()
    }

    /// What a term that still goes on has noted of an account must be on its page in the end.
    pub fn noted_lately(&self, epoch: Epoch, account: &AccountName) -> bool {
        let serves = |broker: &Broker| broker.term.as_ref().is_some_and(|term| term.state.epoch == epoch);
        self.brokers.values().any(serves) && !self.remade.contains(account)
    }

    pub(crate) fn say(&mut self, line: String) {
        if self.trace {
            self.lines.push(format!("{:>9} {line}", self.now));
        }
    }

    /// The way of a message.
    pub(crate) fn latency(&mut self) -> u64 {
        self.random.between(1, self.plan.latency_ms)
    }

    /// True if this fault comes now; it is counted.
    pub(crate) fn strikes(&mut self, kind: FaultKind) -> bool {
        let per_mille = self.plan.weather.per_mille(kind);
        let strikes = !self.healing && per_mille > 0 && self.random.chance(per_mille);
        if strikes {
            self.count(kind);
        }
        strikes
    }

    pub(crate) fn count(&mut self, kind: FaultKind) {
        self.faults[kind as usize] += 1;
    }
}
