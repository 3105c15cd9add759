//! A whole small cluster without I/O: leaders that come and go, node agents, clients, an API server, and a network that
//! delays, cuts and repeats. A script of numbers drives it, so that every history can be replayed.

pub mod agent;
pub mod audit;
mod pools;
pub mod store;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use agent::{Agent, Asked, Phase, ToAgent};
use spaceport_core::ids::{AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Size, SpaceKey, Steady, Ticket};
use spaceport_core::lease::{
    Command, Effect, Event, FreedAs, Limits, Moment, Mutant, Policy, Priority, Request, State, step,
};
use spaceport_core::page::{Ending, Page};
use spaceport_core::protocol::CallerClass;
use spaceport_core::quota::{Allowance, Grant};
use store::Store;

pub const ACCOUNTS: [&str; 3] = ["ann", "bob", "eve"];
pub const NODES: [&str; 2] = ["gpu-1", "gpu-2"];
const START: i64 = 1_800_000_000_000;

/// One leader and all it has done.
pub struct Leader {
    pub state: State,
    pub initial: State,
    pub events: Vec<Event>,
    pub number: u64,
    began: u64,
    revisions: BTreeMap<AccountName, u64>,
}

/// A page write in the network.
struct Write {
    leader: u64,
    account: AccountName,
    page: Page,
    revision: u64,
}

/// Which faults a history may contain.
#[derive(Clone, Copy)]
pub struct Faults {
    pub mutant: Option<Mutant>,
    /// Crashes, cuts, unknown outcomes, sick slots. Without them no order may be refused for want of a slot.
    pub storms: bool,
}

pub struct World {
    pub faults: Faults,
    pub now: u64,
    wall_offset: i64,
    seed: u128,
    tickets: u64,
    epoch: u64,
    leaders: u64,
    pub store: Store,
    pub agents: BTreeMap<NodeName, Agent>,
    /// What the pool of each node says now.
    limits: BTreeMap<NodeName, Limits>,
    pub leader: Option<Leader>,
    writes: Vec<Write>,
    reads: VecDeque<(u64, AccountName)>,
    receipts: BTreeSet<(AccountName, LeaseId)>,
    /// What `apply` refused, across leaders.
    pub violations: Vec<String>,
    /// Prints what happens, for whoever looks for the reason of a failure.
    pub trace: bool,
    /// No more faults: everything heals.
    healing: bool,
    /// Requests whose answer was delivered as an order or a refusal.
    pub granted: u32,
}

/// Spreads a script's number.
fn mix(word: u64) -> u64 {
    let mut z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A reproducible script.
pub fn script(seed: u64, length: usize) -> Vec<u32> {
    (0..length as u64).map(|index| mix(seed.wrapping_mul(1_000_003).wrapping_add(index)) as u32).collect()
}

pub fn policy(account: &AccountName) -> Policy {
    let far = LedgerTime(START + 40 * 24 * 3_600_000);
    let (base_ms, concurrent, runs, grants) = match account.as_str() {
        "ann" => (60_000, 2, None, Vec::new()),
        "bob" => (100_000, 3, Some(4), Vec::new()),
        _ => (30_000, 3, None, vec![Grant { uid: "g1".into(), ms: 50_000, expires: far }]),
    };
    Policy {
        tier: "demo".into(),
        allowance: Allowance { base_ms, longest_call_ms: 50_000, runs_per_window: runs, generation: 1, grants },
        concurrent,
        priority: Priority::Medium,
        caller: CallerClass::Regular,
        deleting: false,
    }
}

impl World {
    pub fn new(faults: Faults) -> Self {
        let mut world = Self {
            faults,
            now: 1_000,
            wall_offset: 0,
            seed: 0,
            tickets: 0,
            epoch: 0,
            leaders: 0,
            store: Store::default(),
            agents: NODES.iter().map(|name| (NodeName::new(*name), Agent::new(name, 2))).collect(),
            limits: NODES.iter().map(|name| (NodeName::new(*name), Limits::default())).collect(),
            leader: None,
            writes: Vec::new(),
            reads: VecDeque::new(),
            receipts: BTreeSet::new(),
            violations: Vec::new(),
            trace: false,
            healing: false,
            granted: 0,
        };
        for account in ACCOUNTS {
            world.store.pages.insert(AccountName::new(account), store::Stored::default());
        }
        world
    }

    /// Runs a script and looks at everything after each step.
    pub fn run(&mut self, script: &[u32]) -> Result<(), String> {
        self.begin_term()?;
        for name in NODES {
            self.connect(&NodeName::new(name))?;
        }
        for word in script {
            self.act(*word)?;
            audit::look(self)?;
        }
        Ok(())
    }

    fn moment(&self, leader: &Leader) -> Moment {
        let wall = START.saturating_add_unsigned(self.now).saturating_add(self.wall_offset);
        Moment { wall: LedgerTime(wall), steady: Steady(self.now - leader.began) }
    }

    /// Gives the leader a command and carries its effects out.
    pub fn tell(&mut self, command: Command) -> Result<(), String> {
        let Some(mut leader) = self.leader.take() else { return Ok(()) };
        self.seed += 1 << 20;
        let at = self.moment(&leader);
        if self.trace {
            println!("{} {command:?}", self.now);
        }
        let outcome = step(&mut leader.state, at, IdSeed(self.seed), command);
        let before = leader.events.len();
        leader.events.extend(outcome.events);
        self.violations.extend(outcome.violations.iter().map(ToString::to_string));
        if self.trace {
            for event in leader.events.iter().skip(before) {
                println!("    {event:?}");
            }
        }
        let number = leader.number;
        self.leader = Some(leader);
        for effect in outcome.effects {
            self.carry_out(number, effect)?;
        }
        Ok(())
    }

    fn send_to(&mut self, node: &NodeName, message: ToAgent) {
        if let Some(agent) = self.agents.get_mut(node).filter(|agent| agent.connected) {
            agent.inbox.push_back(message);
        }
    }

    fn carry_out(&mut self, leader: u64, effect: Effect) -> Result<(), String> {
        match effect {
            Effect::Write { account, page } => {
                let revision = self.leader.as_ref().and_then(|leader| leader.revisions.get(&account).copied());
                let revision = revision.unwrap_or_default();
                self.writes.push(Write { leader, account, page: Page::clone(&page), revision });
            }
            Effect::Read { account } => self.reads.push_back((leader, account)),
            Effect::Receipt { account, closed } => {
                if !self.store.settled.contains_key(&closed.hold.lease) {
                    return Err("invariant 2: a receipt for what is not durable".to_owned());
                }
                self.receipts.insert((account, closed.hold.lease));
            }
            Effect::Start(order) => {
                if !self.store.is_held(&order.lease) {
                    return Err(format!("invariant 2: {} is ordered before its hold is durable", order.lease));
                }
                let now = self.now;
                self.send_to(&order.node.clone(), ToAgent::Start(*order, now));
            }
            Effect::Cancel { node, lease, .. } => self.send_to(&node, ToAgent::Cancel(lease)),
            Effect::Acknowledge { node, lease, ended, freed } => {
                if ended && self.store.is_held(&lease) {
                    return Err(format!("invariant 2: {lease} is acknowledged before it is settled"));
                }
                self.send_to(&node, ToAgent::Acknowledge(lease, ended, freed));
            }
            Effect::Deny { ticket, node, .. } => self.send_to(&node, ToAgent::Deny(ticket)),
            Effect::Queue(_) => {}
            Effect::EndTerm(_) => self.leader = None,
        }
        Ok(())
    }

    // === what a script can do ===

    fn act(&mut self, word: u32) -> Result<(), String> {
        let (kind, value) = (word % 100, mix(u64::from(word)));
        match kind {
            0..=17 => self.request(value),
            18..=37 => self.deliver_to_leader(value),
            38..=55 => self.deliver_to_agent(value),
            56..=69 => self.answer_write(value),
            70..=72 => self.answer_read(),
            73..=84 => {
                self.progress(value);
                Ok(())
            }
            85..=88 => self.pass(value % 3_000),
            89 => self.pass(value % 60_000),
            90 => self.write_receipts(),
            91 => self.client_leaves(value),
            92 => self.show_page(value),
            _ if !self.faults.storms => self.pass(200),
            93 => self.cut(value),
            94 => self.connect(&self.node(value)),
            95 => self.crash(value),
            96 => {
                self.agent_restarts(value);
                Ok(())
            }
            97 => self.jump(value),
            98 if value >> 8 & 1 == 0 => self.touch_spec(value),
            98 => self.change_pool(value),
            _ => self.land_late(value),
        }
    }

    fn node(&self, value: u64) -> NodeName {
        NodeName::new(NODES[usize::try_from(value % 2).unwrap_or_default()])
    }

    fn account(value: u64) -> AccountName {
        AccountName::new(ACCOUNTS[usize::try_from(value % 3).unwrap_or_default()])
    }

    pub fn request(&mut self, value: u64) -> Result<(), String> {
        let node = self.node(value >> 8);
        let size = if value >> 16 & 3 == 0 { Size::Xlarge } else { Size::Large };
        self.tickets += 1;
        let number = self.tickets;
        let Some(agent) = self.agents.get_mut(&node) else { return Ok(()) };
        let request = Request {
            ticket: Ticket { agent_instance: agent.instance_name(), number },
            node,
            space: SpaceKey { namespace: "n".into(), name: "s".into(), uid: "u".into() },
            size,
            declared_ms: 1_000 + (value >> 24) % 30_000,
            caller: Ok(Self::account(value)),
            budget: None,
        };
        let sent = agent.connected;
        agent.tickets.insert(request.ticket.clone(), Asked { request: request.clone(), sent });
        if sent {
            agent.outbox.push_back(Command::Request(Box::new(request)));
        }
        Ok(())
    }

    fn deliver_to_leader(&mut self, value: u64) -> Result<(), String> {
        let node = self.node(value);
        let Some(agent) = self.agents.get_mut(&node) else { return Ok(()) };
        let Some(command) = agent.outbox.pop_front() else { return Ok(()) };
        // Reports may be repeated; the same one twice changes nothing (L10).
        let twice = value >> 8 & 7 == 0
            && matches!(command, Command::Ended { .. } | Command::Freed { .. } | Command::Running { .. });
        if twice {
            self.tell(command.clone())?;
        }
        self.tell(command)
    }

    fn deliver_to_agent(&mut self, value: u64) -> Result<(), String> {
        let (node, now) = (self.node(value), self.now);
        let Some(agent) = self.agents.get_mut(&node) else { return Ok(()) };
        let Some(message) = agent.inbox.pop_front() else { return Ok(()) };
        if matches!(message, ToAgent::Start(..)) {
            self.granted += 1;
        }
        agent.receive(message, now);
        agent.assert_exclusive()
    }

    fn answer_write(&mut self, value: u64) -> Result<(), String> {
        if self.writes.is_empty() {
            return Ok(());
        }
        let write = self.writes.remove(usize::try_from(value).unwrap_or_default() % self.writes.len());
        let mode = if self.faults.storms && !self.healing { value >> 32 & 15 } else { 0 };
        let (account, write_id) = (write.account.clone(), write.page.write_id.clone());
        match mode {
            12 => {
                // It happened; nobody hears of it.
                self.store.swap(&write.account, write.revision, &write.page)?;
                self.hear(write.leader, Command::PageUnknown { account, write_id })
            }
            13 => {
                // It is still under way, and may happen later.
                let leader = write.leader;
                self.writes.push(Write { leader: u64::MAX, ..write });
                self.hear(leader, Command::PageUnknown { account, write_id })
            }
            14 => self.hear(write.leader, Command::PageUnknown { account, write_id }),
            15 => self.hear(write.leader, Command::PageFailed { account, write_id }),
            _ => {
                let happened = self.store.swap(&write.account, write.revision, &write.page)?;
                if happened {
                    self.know_revision(write.leader, &account, write.revision + 1);
                    self.hear(write.leader, Command::PageWritten { account, write_id })
                } else {
                    self.hear(write.leader, Command::PageConflict { account, write_id })
                }
            }
        }
    }

    /// A write that was given up lands after all, if the page is still the one it expects.
    fn land_late(&mut self, value: u64) -> Result<(), String> {
        let late: Vec<usize> = (0..self.writes.len()).filter(|index| self.writes[*index].leader == u64::MAX).collect();
        if late.is_empty() {
            return Ok(());
        }
        let write = self.writes.remove(late[usize::try_from(value).unwrap_or_default() % late.len()]);
        self.store.swap(&write.account, write.revision, &write.page).map(drop)
    }

    fn hear(&mut self, leader: u64, command: Command) -> Result<(), String> {
        if self.leader.as_ref().is_some_and(|current| current.number == leader) { self.tell(command) } else { Ok(()) }
    }

    fn know_revision(&mut self, leader: u64, account: &AccountName, revision: u64) {
        if let Some(current) = self.leader.as_mut().filter(|current| current.number == leader) {
            current.revisions.insert(account.clone(), revision);
        }
    }

    fn answer_read(&mut self) -> Result<(), String> {
        let Some((leader, account)) = self.reads.pop_front() else { return Ok(()) };
        let revision = self.store.pages[&account].revision;
        let page = Box::new(self.store.page(&account));
        self.know_revision(leader, &account, revision);
        self.hear(leader, Command::PageRead { account, page })
    }

    fn progress(&mut self, value: u64) {
        let (node, now) = (self.node(value), self.now);
        let storms = self.faults.storms && !self.healing;
        let Some(agent) = self.agents.get_mut(&node) else { return };
        let count = agent.leases.len();
        if count == 0 {
            return;
        }
        let index = usize::try_from(value >> 8).unwrap_or_default() % count;
        let Some((lease, held)) = agent.leases.iter().nth(index) else { return };
        let (lease, phase) = (lease.clone(), held.phase);
        match (phase, value >> 40 & 15) {
            (Phase::Assigned { .. }, 0) => agent.end(&lease, Ending::Undelivered, now),
            (Phase::Assigned { .. }, _) => agent.allow(&lease, now),
            (Phase::Running { .. }, 0) => agent.end(&lease, Ending::Failed, now),
            (Phase::Running { .. }, 1) => agent.end(&lease, Ending::PlatformFault, now),
            (Phase::Running { .. }, 2) => agent.end(&lease, Ending::WorkerDied, now),
            (Phase::Running { .. }, 3) => agent.end(&lease, Ending::NoDevice, now),
            (Phase::Running { .. }, _) => agent.end(&lease, Ending::Released, now),
            (Phase::Ended { freed: false, .. }, 0) if storms => agent.free(&lease, FreedAs::Quarantined, now),
            (Phase::Ended { freed: false, .. }, 1..=4) => agent.free(&lease, FreedAs::Held, now),
            (Phase::Ended { freed: false, .. }, _) => agent.free(&lease, FreedAs::Free, now),
            _ => {}
        }
    }

    /// Time passes in steps, with a tick after each: the leader's timer and the nodes' run all the while.
    pub fn pass(&mut self, ms: u64) -> Result<(), String> {
        let steps = ms.div_ceil(20_000).max(1);
        for _ in 0..steps {
            self.now += ms / steps;
            for agent in self.agents.values_mut() {
                agent.expire(self.now);
                agent.repeat(self.now);
            }
            self.tell(Command::Tick)?;
        }
        Ok(())
    }

    /// Beyond the window's end, or the wall clock is set, either way.
    fn jump(&mut self, value: u64) -> Result<(), String> {
        match value & 3 {
            0 => self.wall_offset += 25 * 3_600_000,
            1 => self.wall_offset -= 3 * 3_600_000,
            2 => self.wall_offset += 10_000,
            _ => return self.pass(600_000),
        }
        self.tell(Command::Tick)
    }

    pub fn write_receipts(&mut self) -> Result<(), String> {
        for (account, lease) in std::mem::take(&mut self.receipts) {
            self.tell(Command::ReceiptWritten { account, lease })?;
        }
        Ok(())
    }

    fn client_leaves(&mut self, value: u64) -> Result<(), String> {
        let node = self.node(value);
        let Some(agent) = self.agents.get_mut(&node) else { return Ok(()) };
        if let Some(ticket) = agent.tickets.keys().next().cloned() {
            agent.leave(&ticket);
        }
        Ok(())
    }

    /// The account watch: the page as it is, or as it was a write ago.
    fn show_page(&mut self, value: u64) -> Result<(), String> {
        let account = Self::account(value);
        let stored = self.store.pages[&account].clone();
        let mut policy = policy(&account);
        if value >> 8 & 7 == 0 {
            // The tier changes, and changes back with the next event.
            policy.allowance.base_ms /= 2;
            policy.allowance.generation += 1;
        }
        let page = if value >> 16 & 1 == 0 { stored.page } else { stored.previous };
        self.tell(Command::AccountSeen { account, page: Box::new(page), policy })
    }

    fn cut(&mut self, value: u64) -> Result<(), String> {
        let node = self.node(value);
        let Some(agent) = self.agents.get_mut(&node).filter(|agent| agent.connected) else { return Ok(()) };
        agent.disconnect();
        self.tell(Command::NodeDisconnected { node })
    }

    pub fn connect(&mut self, node: &NodeName) -> Result<(), String> {
        let Some(leader) = &self.leader else { return Ok(()) };
        let (epoch, now) = (leader.state.epoch, self.now);
        let Some(agent) = self.agents.get_mut(node).filter(|agent| !agent.connected) else { return Ok(()) };
        let (agent_instance, highest_epoch) = (agent.instance_name(), agent.epoch);
        let hello = Command::NodeHello { node: node.clone(), agent_instance, highest_epoch };
        agent.connect(epoch, now);
        self.tell(hello)
    }

    fn agent_restarts(&mut self, value: u64) {
        let (node, now) = (self.node(value), self.now);
        let lost = value >> 8 & 7 == 0;
        if let Some(agent) = self.agents.get_mut(&node) {
            agent.restart(lost, now);
        }
        // The leader hears of it now or when the agent comes back.
        if value >> 16 & 1 == 0 && self.tell(Command::NodeDisconnected { node }).is_err() {
            self.violations.push("an effect of a disconnection".to_owned());
        }
    }

    /// The leader dies. Its writes in the network may still happen; the next leader begins at once or later.
    fn crash(&mut self, value: u64) -> Result<(), String> {
        self.replay()?;
        self.leader = None;
        for agent in self.agents.values_mut() {
            agent.disconnect();
        }
        for write in &mut self.writes {
            write.leader = u64::MAX;
        }
        self.now += value % 10_000;
        for agent in self.agents.values_mut() {
            agent.expire(self.now);
        }
        self.begin_term()
    }

    pub fn begin_term(&mut self) -> Result<(), String> {
        self.epoch += 1;
        self.leaders += 1;
        let awaited = self.agents.keys().cloned().collect();
        let mut state = State::new(Epoch(self.epoch), awaited);
        if let Some(mutant) = self.faults.mutant {
            state = state.with_mutant(mutant);
        }
        let revisions = self.store.pages.iter().map(|(name, stored)| (name.clone(), stored.revision)).collect();
        self.leader = Some(Leader {
            initial: state.clone(),
            state,
            events: Vec::new(),
            number: self.leaders,
            began: self.now,
            revisions,
        });
        for node in NODES.map(NodeName::new) {
            self.tell_limits(&node)?;
        }
        for account in ACCOUNTS.map(AccountName::new) {
            let (page, policy) = (Box::new(self.store.page(&account)), policy(&account));
            self.tell(Command::AccountSeen { account, page, policy })?;
        }
        Ok(())
    }

    /// Someone edits the account's spec: another revision, the same page.
    fn touch_spec(&mut self, value: u64) -> Result<(), String> {
        let account = Self::account(value);
        if let Some(stored) = self.store.pages.get_mut(&account) {
            stored.revision += 1;
        }
        Ok(())
    }

    /// Folding the events from the beginning gives the same state.
    pub fn replay(&self) -> Result<(), String> {
        let Some(leader) = &self.leader else { return Ok(()) };
        let mut state = leader.initial.clone();
        for event in &leader.events {
            state.apply(event).map_err(|misfit| format!("replay: {misfit}"))?;
        }
        if state == leader.state { Ok(()) } else { Err("replay: the same events gave another state".to_owned()) }
    }

    /// Everything heals and everybody finishes. Then the account must add up.
    pub fn settle_down(&mut self) -> Result<(), String> {
        self.healing = true;
        self.wall_offset = self.wall_offset.max(0);
        if self.leader.is_none() {
            self.begin_term()?;
        }
        // Long enough for every limit, back-off and window; bounded, so that what never ends is a failure.
        for round in 0..400_u64 {
            for node in NODES.map(NodeName::new) {
                let (leader_joined, connected) = (
                    self.leader.as_ref().is_some_and(|leader| leader.state.joined(&node)),
                    self.agents[&node].connected,
                );
                if connected && !leader_joined && self.agents[&node].outbox.is_empty() {
                    // A session that the leader knows nothing of is cut by its keepalive.
                    self.cut(round_of(&node))?;
                }
                self.connect(&node)?;
            }
            for value in 0..40 {
                self.deliver_to_leader(mix(round * 64 + value) | 0x700)?;
                self.deliver_to_agent(mix(round * 64 + value))?;
                self.answer_write(value)?;
                self.answer_read()?;
                self.progress(mix(round * 1_000 + value) | 15 << 40);
            }
            for account in 0..3 {
                // The watch shows what others, earlier leaders, have written.
                self.show_page(account | 0x100)?;
            }
            self.write_receipts()?;
            self.pass(1_500)?;
            audit::look(self)?;
            if round > 60 && audit::is_quiet(self) {
                break;
            }
        }
        audit::balance(self)
    }
}

fn round_of(node: &NodeName) -> u64 {
    u64::from(node.as_str() == NODES[1])
}
