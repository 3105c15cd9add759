//! Everything there is at one moment, and what can happen next.

use std::sync::Arc;

use spaceport_core::ids::Epoch;
use spaceport_core::lease::{Command, State};
use spaceport_core::page::Ending;

use crate::api::{Api, Broken, Fate, Write};
use crate::bounds::{ACCOUNTS, BROKERS, Bounds, Budget, Fault, Gap, NODES};
use crate::broker::{self, Broker, Leading, Out, Read, Steps};
use crate::names;
use crate::node::{Node, Order, Phase, ToBroker, ToNode, Told};

/// One moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// The API server.
    pub api: Arc<Api>,
    /// The replicas.
    pub brokers: [Arc<Broker>; BROKERS],
    /// The nodes.
    pub nodes: [Arc<Node>; NODES],
    /// Session of each broker with each node.
    pub links: [[Arc<Link>; NODES]; BROKERS],
    /// The calls.
    pub calls: Vec<CallState>,
    /// How leases ended on their nodes that are not settled, ascending.
    pub ended: Vec<(u32, Ending)>,
    /// What went wrong so far.
    pub spent: Budget,
    /// Rules that were broken, ascending.
    pub broken: Vec<Broken>,
}

/// A session: two streams in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Link {
    /// The broker's end is open. The node finds out later: until then it reads what was sent before.
    pub up: bool,
    /// On its way to the node.
    pub to_node: Vec<ToNode>,
    /// On its way to the broker.
    pub to_broker: Vec<ToBroker>,
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallState {
    /// It has not come.
    Ahead,
    /// It waits for its answer.
    Open,
    /// It has a slot.
    Granted,
    /// It was refused, left, or its connection was cut.
    Over,
}

/// The world, with what does not change.
pub struct Cluster {
    /// How large it is and what may happen.
    pub bounds: Bounds,
    /// What commands to ledgers bring about.
    pub steps: Steps,
}

impl Cluster {
    /// A cluster.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, steps: Steps::new() }
    }

    fn fault(&self) -> Fault {
        self.bounds.fault
    }

    /// The first broker leads its first term and both nodes have joined: how they get there is what every fail-over does too.
    pub fn begin(&self) -> World {
        let link = Arc::new(Link { up: true, ..Link::default() });
        let mut world = World {
            api: Arc::new(Api::new()),
            brokers: [Arc::new(Broker::Standby), Arc::new(Broker::Standby)],
            nodes: [Arc::new(Node::new()), Arc::new(Node::new())],
            links: std::array::from_fn(|_| std::array::from_fn(|_| link.clone())),
            calls: vec![CallState::Ahead; self.bounds.calls.len()],
            ended: Vec::new(),
            spent: Budget::default(),
            broken: Vec::new(),
        };
        for node in self.bounds.nodes..NODES {
            world.node(node).gone = true;
            (0..BROKERS).for_each(|broker| world.link(broker, node).up = false);
        }
        self.begin_term(&mut world, 0);
        self.start_term(&mut world, 0);
        self.settle_messages(&mut world);
        for call in 0..self.bounds.running {
            self.run_up(&mut world, call);
        }
        world
    }

    /// A call arrives, and its worker runs.
    fn run_up(&self, world: &mut World, call: usize) {
        world.calls[call] = CallState::Open;
        let node = self.bounds.calls[call].node;
        let told = world.node(node).call(u8::try_from(call).unwrap_or(u8::MAX));
        self.hear(world, node, told);
        self.settle_messages(world);
        if let Some(index) = world.nodes[node].leases.iter().position(|lease| lease.phase == Phase::Assigned) {
            let told = world.node(node).allow(index);
            self.hear(world, node, told);
        }
        self.settle_messages(world);
    }

    /// Everything arrives and is answered, until nothing is on its way between the first broker and anyone.
    fn settle_messages(&self, world: &mut World) {
        while !world.api.writes.is_empty() || world.links[0].iter().any(|link| !link.is_empty()) {
            if !world.api.writes.is_empty() {
                self.write_arrives(world, 0);
                self.answer(world, 0);
            }
            for node in 0..NODES {
                if !world.links[0][node].to_node.is_empty() {
                    self.deliver_to_node(world, 0, node);
                }
                if !world.links[0][node].to_broker.is_empty() {
                    self.deliver_to_broker(world, 0, node);
                }
            }
        }
    }

    // === brokers ===

    /// Raises the term page. The account pages that the broker will have when its watch shows that write are those of now.
    pub fn begin_term(&self, world: &mut World, broker: usize) {
        let Epoch(epoch) = world.api().begin_term();
        // With the fault it has what it knew when its process started.
        let pages = if self.fault() == Fault::EarlyStart { Api::new().pages } else { world.api.pages.clone() };
        world.brokers[broker] = Arc::new(Broker::Beginning { epoch, pages });
    }

    /// Its watch shows that write: the term starts.
    pub fn start_term(&self, world: &mut World, broker: usize) {
        let Broker::Beginning { epoch, pages } = Broker::clone(&world.brokers[broker]) else { return };
        let awaited = (0..NODES).map(names::node).collect();
        let mut leading = Leading::new((self.bounds.begin)(State::new(Epoch(epoch), awaited)));
        leading.targets = std::array::from_fn(|account| pages[account].seq);
        leading.shown = leading.targets;
        world.brokers[broker] = Arc::new(Broker::Leading(leading));
        for node in 0..NODES {
            self.tell(world, broker, broker::settings(node));
        }
        for (account, page) in pages.iter().enumerate() {
            self.tell(world, broker, broker::seen(account, page));
        }
        for node in 0..NODES {
            if world.links[broker][node].up {
                self.welcome(world, broker, node);
            }
        }
    }

    fn welcome(&self, world: &mut World, broker: usize, node: usize) {
        let (start, highest) = (world.nodes[node].start, world.nodes[node].epoch);
        self.tell(world, broker, broker::settings(node));
        self.tell(world, broker, broker::hello(node, start, highest));
        if let Broker::Leading(leading) = &*world.brokers[broker] {
            let epoch = leading.core.epoch.0;
            world.link(broker, node).to_node.push(ToNode::Welcome { epoch });
        }
    }

    /// Gives a leader's ledger a command and carries its effects out.
    fn tell(&self, world: &mut World, broker: usize, command: Command) {
        let Some(leading) = world.leading(broker) else { return };
        let stepped = self.steps.take(leading, command);
        leading.core = stepped.core.clone();
        if stepped.misfit {
            world.break_rule(Broken::Misfit);
        }
        if !stepped.sound {
            world.break_rule(Broken::Working);
        }
        for out in &stepped.outs {
            self.carry_out(world, broker, out);
        }
        if let Some(leading) = world.leading(broker) {
            leading.forget_reads();
        }
    }

    fn carry_out(&self, world: &mut World, broker: usize, out: &Out) {
        match out {
            Out::Write { account, page } => {
                let Broker::Leading(leading) = &*world.brokers[broker] else { return };
                let write = Write {
                    broker: Some(broker),
                    account: *account,
                    page: page.clone(),
                    expects: leading.targets[*account],
                    fate: Fate::Sent,
                };
                world.api().writes.push(write);
            }
            Out::Read { account, node } => {
                let read = Read { account: *account, node: *node, page: None };
                let is_same = |known: &Read| (known.account, known.node) == (*account, *node);
                if let Some(leading) = world.leading(broker)
                    && (node.is_none() || !leading.reads.iter().any(is_same))
                {
                    leading.reads.push(read);
                }
            }
            Out::Receipt { account, lease } => {
                let receipt = (*account, *lease);
                if let Some(leading) = world.leading(broker)
                    && self.bounds.receipts
                    && !leading.receipts.contains(&receipt)
                {
                    leading.receipts.push(receipt);
                    leading.receipts.sort_unstable();
                }
            }
            Out::Start { node, order } => {
                // Invariant 2: nobody hears of a hold that a crash could undo.
                if world.api.held_ever.binary_search(&order.lease).is_err() {
                    world.break_rule(Broken::Visible);
                }
                let slept = matches!(&*world.brokers[broker], Broker::Leading(leading) if leading.pauses > 0);
                let late = slept && order.epoch < world.api.term && self.bounds.gap != Some(Gap::LateOrder);
                let order = Order { stale: late, ..order.clone() };
                self.send(world, broker, *node, ToNode::Start(order));
            }
            Out::Cancel { node, epoch, lease, nobodys } => {
                if *nobodys && *epoch == world.api.term && world.api.is_held(*lease) {
                    world.break_rule(Broken::Killed);
                }
                self.send(world, broker, *node, ToNode::Cancel { epoch: *epoch, lease: *lease, stale: false });
            }
            Out::Acknowledge { node, lease, ended, freed } => {
                // Invariant 2: a node may forget an end when it is settled for good.
                if *ended && world.api.is_held(*lease) {
                    world.break_rule(Broken::Visible);
                }
                self.send(world, broker, *node, ToNode::Acknowledge { lease: *lease, ended: *ended, freed: *freed });
            }
            Out::Deny { node, call, start } => {
                if world.nodes[*node].start == *start {
                    self.send(world, broker, *node, ToNode::Deny { call: *call });
                }
            }
            Out::EndTerm => self.stop(world, broker),
        }
    }

    /// The process of a broker ends. What it sent is still on its way.
    pub fn stop(&self, world: &mut World, broker: usize) {
        world.brokers[broker] = Arc::new(Broker::Standby);
        for write in world.api().writes.iter_mut().filter(|write| write.broker == Some(broker)) {
            write.broker = None;
        }
        world.api().forget_impossible(self.is_blind());
        for node in 0..NODES {
            self.lose_session(world, broker, node);
        }
    }

    /// A page write reaches the API server.
    pub fn write_arrives(&self, world: &mut World, index: usize) {
        let mut broken = Vec::new();
        world.api().take(index, self.is_blind(), &mut broken);
        broken.into_iter().for_each(|rule| world.break_rule(rule));
        for (lease, ending) in world.ended.clone() {
            let Some(settled) = world.api.settled(lease).copied() else { continue };
            world.ended.retain(|(known, _)| *known != lease);
            // A node that was silent beyond the bound is not asked any more (L9).
            if settled.ending != ending && settled.ending != Ending::Expired {
                world.break_rule(Broken::Report);
            }
        }
    }

    /// Page writes name no revision.
    pub fn is_blind(&self) -> bool {
        self.fault() == Fault::NoCompare
    }

    /// The broker's end of a session is closed.
    fn lose_session(&self, world: &mut World, broker: usize, node: usize) {
        let link = world.link(broker, node);
        link.up = false;
        link.to_broker.clear();
        self.forget_unread(world, node);
    }

    /// What a node will not look at is not on its way: that of brokers it does not follow, unless they are about to lead.
    fn forget_unread(&self, world: &mut World, node: usize) {
        if self.fault() == Fault::NoFence {
            return;
        }
        for broker in 0..BROKERS {
            let follows = world.nodes[node].leader == Some(broker);
            let unread = &world.links[broker][node].to_node;
            let welcome = unread.iter().position(|message| matches!(message, ToNode::Welcome { .. }));
            let over = welcome.unwrap_or(unread.len());
            if !follows && over > 0 {
                world.link(broker, node).to_node.drain(..over);
            }
        }
    }

    /// A broker cuts a session, or notices that it is gone.
    pub fn cut(&self, world: &mut World, broker: usize, node: usize) {
        self.lose_session(world, broker, node);
        self.tell(world, broker, broker::disconnected(node));
    }

    /// The node notices as well, and there is a new session.
    pub fn reconnect(&self, world: &mut World, broker: usize, node: usize) {
        if world.nodes[node].leader == Some(broker) {
            world.node(node).unlink();
        }
        world.links[broker][node] = Arc::new(Link { up: true, ..Link::default() });
        self.welcome(world, broker, node);
    }

    fn send(&self, world: &mut World, broker: usize, node: usize, message: ToNode) {
        if world.links[broker][node].up {
            world.link(broker, node).to_node.push(message);
            self.forget_unread(world, node);
        }
    }

    // === nodes ===

    /// A node reads the next message.
    pub fn deliver_to_node(&self, world: &mut World, broker: usize, node: usize) {
        let message = world.link(broker, node).to_node.remove(0);
        let waited: Vec<u8> = world.nodes[node].waiting_leases().collect();
        let mut told = world.node(node).receive(broker, &message, self.fault());
        if matches!(message, ToNode::Cancel { .. }) && self.fault() != Fault::SilentCancel {
            let waits: Vec<u8> = world.nodes[node].waiting_leases().chain(told.granted.iter().copied()).collect();
            told.cut.extend(waited.into_iter().filter(|call| !waits.contains(call)));
        }
        self.hear(world, node, told);
        self.forget_unread(world, node);
    }

    /// What a node says and did.
    pub fn hear(&self, world: &mut World, node: usize, told: Told) {
        if told.no_room && world.spent.is_calm() {
            world.break_rule(Broken::Room);
        }
        if let Some(broken) = told.broken {
            world.break_rule(broken);
        }
        for call in told.granted {
            if world.calls[usize::from(call)] == CallState::Granted {
                world.break_rule(Broken::TwoGrants);
            }
            world.calls[usize::from(call)] = CallState::Granted;
        }
        for call in told.denied.into_iter().chain(told.cut) {
            world.calls[usize::from(call)] = CallState::Over;
        }
        self.note_ends(world, node);
        if let Some(broker) = world.nodes[node].leader
            && world.links[broker][node].up
        {
            world.link(broker, node).to_broker.extend(told.messages);
        }
        if self.fault() == Fault::ReportOnce {
            world.node(node).forget_reported();
        }
    }

    fn note_ends(&self, world: &mut World, node: usize) {
        for known in &Arc::clone(&world.nodes[node]).leases {
            let Phase::Ended { ending, .. } = known.phase else { continue };
            let is_settled = world.api.settled(known.lease).is_some();
            if let Err(at) = world.ended.binary_search_by_key(&known.lease, |(lease, _)| *lease)
                && !is_settled
            {
                world.ended.insert(at, (known.lease, ending));
            }
        }
    }

    /// A node loses its records: what it would have said, nobody will hear.
    pub fn forget_ends(&self, world: &mut World, node: usize) {
        let lost = Arc::clone(&world.nodes[node]);
        world.ended.retain(|(lease, _)| !lost.leases.iter().any(|known| known.lease == *lease));
    }

    /// A broker reads the next message.
    pub fn deliver_to_broker(&self, world: &mut World, broker: usize, node: usize) {
        let message = world.link(broker, node).to_broker.remove(0);
        self.tell(world, broker, broker::command(node, &message, &self.bounds.calls));
    }

    /// An agent starts anew: its sessions are gone.
    pub fn drop_sessions(&self, world: &mut World, node: usize) {
        for broker in 0..BROKERS {
            let was_up = world.links[broker][node].up;
            world.links[broker][node] = Arc::new(Link::default());
            if was_up {
                self.tell(world, broker, broker::disconnected(node));
            }
        }
    }

    /// Nothing happens for longer than every limit: nothing runs, and what is on its way is too old.
    pub fn pause(&self, world: &mut World) {
        for node in 0..NODES {
            let told = world.node(node).outlast();
            self.hear(world, node, told);
            for broker in 0..BROKERS {
                world.link(broker, node).to_node.iter_mut().for_each(age);
            }
        }
        for broker in 0..BROKERS {
            if let Some(leading) = world.leading(broker) {
                leading.pauses += 1;
                leading.tick_due = true;
            }
        }
    }

    /// A leader looks at its clock.
    pub fn tick(&self, world: &mut World, broker: usize) {
        if let Some(leading) = world.leading(broker) {
            leading.tick_due = false;
        }
        self.tell(world, broker, Command::Tick);
    }

    // === pages ===

    /// A leader hears what became of a write.
    pub fn answer(&self, world: &mut World, index: usize) {
        let Write { broker, account, page, fate, .. } = world.api().writes.remove(index);
        let Some(broker) = broker else { return };
        let (name, write_id) = (names::account(account), page.write_id.clone());
        let command = match fate {
            // It was not answered: nobody knows.
            Fate::Sent => Command::PageUnknown { account: name, write_id },
            Fate::Done => {
                if let Some(leading) = world.leading(broker) {
                    leading.targets[account] = page.seq;
                    leading.shown[account] = leading.shown[account].max(page.seq);
                }
                Command::PageWritten { account: name, write_id }
            }
            Fate::Conflict => Command::PageConflict { account: name, write_id },
            Fate::Refused => Command::PageFailed { account: name, write_id },
        };
        self.tell(world, broker, command);
        self.show_again(world, broker, account);
    }

    /// What the watch has shown while a write was in flight, as if the gap [`Gap::DroppedPage`] were closed.
    fn show_again(&self, world: &mut World, broker: usize, account: usize) {
        let Some(leading) = world.leading(broker) else { return };
        let found = leading.core.accounts.get(&names::account(account));
        let behind = found.is_some_and(|found| found.in_flight.is_none() && found.durable.seq < leading.shown[account]);
        if behind && self.bounds.gap != Some(Gap::DroppedPage) {
            self.watch(world, broker, account);
        }
    }

    /// The answer of a write is lost. One that has not arrived may still do so.
    pub fn lose_answer(&self, world: &mut World, index: usize) {
        let write = world.api.writes[index].clone();
        world.api().writes[index].fate = Fate::Sent;
        self.answer(world, index);
        if write.fate == Fate::Sent {
            world.api().writes.push(Write { broker: None, ..write });
            world.api().forget_impossible(self.is_blind());
        }
    }

    /// A leader gets the page that was read for it.
    pub fn answer_read(&self, world: &mut World, broker: usize, index: usize) {
        let Some(leading) = world.leading(broker) else { return };
        let Read { account, node, page } = leading.reads.remove(index);
        let Some(page) = page else { return };
        let newest = leading.core.accounts.get(&names::account(account)).map_or(0, |found| found.durable.seq);
        if node.is_none() || page.seq >= newest {
            leading.targets[account] = page.seq;
        }
        self.tell(world, broker, broker::read(account, node, &page));
        self.show_again(world, broker, account);
    }

    /// A leader's account watch shows the page as it is now. In between it may have shown others; each of those would be
    /// ignored for this one.
    pub fn watch(&self, world: &mut World, broker: usize, account: usize) {
        let page = world.api.pages[account].clone();
        let Some(leading) = world.leading(broker) else { return };
        leading.shown[account] = page.seq;
        let newest = leading.core.accounts.get(&names::account(account)).map_or(0, |found| found.durable.seq);
        if page.seq >= newest {
            leading.targets[account] = page.seq;
        }
        self.tell(world, broker, broker::seen(account, &page));
    }

    /// A receipt is written.
    pub fn receipt(&self, world: &mut World, broker: usize, index: usize) {
        let Some(leading) = world.leading(broker) else { return };
        let (account, lease) = leading.receipts.remove(index);
        if let Err(at) = world.api.receipts.binary_search(&lease) {
            world.api().receipts.insert(at, lease);
        }
        let command = Command::ReceiptWritten { account: names::account(account), lease: names::lease(lease) };
        self.tell(world, broker, command);
    }
}

const fn age(message: &mut ToNode) {
    match message {
        ToNode::Start(order) => order.stale = true,
        ToNode::Cancel { stale, .. } => *stale = true,
        ToNode::Welcome { .. } | ToNode::Acknowledge { .. } | ToNode::Deny { .. } => {}
    }
}

/// An order stalls.
pub fn stall(world: &mut World, broker: usize, node: usize) {
    if let Some(message) = world.link(broker, node).to_node.first_mut() {
        age(message);
    }
}

impl Link {
    /// Nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.to_node.is_empty() && self.to_broker.is_empty()
    }
}

impl World {
    /// To change the API server.
    pub fn api(&mut self) -> &mut Api {
        Arc::make_mut(&mut self.api)
    }

    /// To change a node.
    pub fn node(&mut self, node: usize) -> &mut Node {
        Arc::make_mut(&mut self.nodes[node])
    }

    /// To change a session.
    pub fn link(&mut self, broker: usize, node: usize) -> &mut Link {
        Arc::make_mut(&mut self.links[broker][node])
    }

    /// To change a term, if the broker leads.
    pub fn leading(&mut self, broker: usize) -> Option<&mut Leading> {
        match &*self.brokers[broker] {
            Broker::Leading(_) => match Arc::make_mut(&mut self.brokers[broker]) {
                Broker::Leading(leading) => Some(leading),
                Broker::Standby | Broker::Beginning { .. } => None,
            },
            Broker::Standby | Broker::Beginning { .. } => None,
        }
    }

    /// Remembers a broken rule.
    pub fn break_rule(&mut self, broken: Broken) {
        if let Err(at) = self.broken.binary_search(&broken) {
            self.broken.insert(at, broken);
        }
    }

    /// The leader of the newest term, if it has started.
    pub fn leader(&self) -> Option<(usize, &Leading)> {
        self.brokers.iter().enumerate().find_map(|(index, broker)| match &**broker {
            Broker::Leading(leading) if leading.core.epoch.0 == self.api.term => Some((index, leading)),
            _ => None,
        })
    }

    /// What was settled is over: no node has it any more (L9). Otherwise somebody uses a slot that nobody pays for, or
    /// that somebody else was promised.
    pub fn runs_only_what_is_held(&self) -> bool {
        let live = self.nodes.iter().flat_map(|node| &node.leases).filter(|lease| lease.is_live());
        live.map(|lease| lease.lease).all(|lease| self.api.settled(lease).is_none())
    }

    /// L2: what a write has reserved counts as reserved as long as that write can still happen.
    pub fn may_happen_is_reserved(&self) -> bool {
        let open = self
            .api
            .writes
            .iter()
            .filter(|write| write.fate == Fate::Sent && write.expects == self.api.pages[write.account].seq);
        open.flat_map(|write| write.page.holds.iter().map(move |hold| (write, hold))).all(|(write, hold)| {
            let Some((_, leading)) = self.leader().filter(|(_, leading)| leading.core.epoch == write.page.epoch) else {
                return true;
            };
            leading.core.accounts.get(&names::account(write.account)).is_some_and(|account| {
                let working = &account.working;
                working.holds.iter().any(|known| known.lease == hold.lease)
                    || working.closed.iter().any(|closed| closed.hold.lease == hold.lease)
            })
        })
    }

    /// Brings what has no order of its own into one, so that states that differ in nothing else are one.
    pub fn settle_order(&mut self) {
        let key = |write: &Write| (write.account, write.broker, write.expects, write.page.fingerprint());
        if !self.api.writes.is_sorted_by_key(key) {
            self.api().writes.sort_by_key(key);
        }
    }
}

impl Budget {
    /// Nothing has gone wrong that could make a broker's picture of its nodes old.
    pub fn is_calm(&self) -> bool {
        *self == Self { repeats: self.repeats, leaves: self.leaves, pauses: 0, ..Self::default() }
    }
}

/// The accounts, for loops.
pub const fn accounts() -> std::ops::Range<usize> {
    0..ACCOUNTS
}
