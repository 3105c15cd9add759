//! What can happen next: all that goes on by itself, and as many faults as the budget allows.

use std::fmt;

use spaceport_core::page::Ending;

use crate::api::Fate;
use crate::bounds::{BROKERS, NODES};
use crate::broker::Broker;
use crate::cluster::{Cluster, stall};
use crate::node::{Node, Order, Phase, ToBroker, ToNode, Told};
use crate::world::{CallState, World, accounts};

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Indices into the world's lists.
pub enum Action {
    // What goes on by itself.
    /// A call reaches its node.
    Call {
        call: usize,
    },
    /// A broker's message reaches a node.
    NodeReads {
        broker: usize,
        node: usize,
    },
    /// A node's message reaches a broker.
    BrokerReads {
        broker: usize,
        node: usize,
    },
    /// A worker is allowed: the clock runs.
    Allow {
        node: usize,
        lease: u32,
    },
    /// It returns, or its `/allow` does not come.
    End {
        node: usize,
        lease: u32,
        ending: Ending,
    },
    /// Its slot comes back.
    Free {
        node: usize,
        lease: u32,
    },
    /// A node that was left alone says that it lives.
    Heartbeat {
        broker: usize,
        node: usize,
    },
    /// A page write reaches the API server.
    WriteArrives {
        index: usize,
    },
    /// Its answer reaches the leader.
    WriteAnswered {
        index: usize,
    },
    /// The API server reads a page.
    ReadServed {
        broker: usize,
        index: usize,
    },
    /// The leader gets it.
    ReadAnswered {
        broker: usize,
        index: usize,
    },
    /// A leader's watch shows a page that somebody else wrote.
    WatchShows {
        broker: usize,
        account: usize,
    },
    /// A leader's watch shows a later term.
    Deposed {
        broker: usize,
    },
    /// A receipt is written.
    ReceiptWritten {
        broker: usize,
        index: usize,
    },
    /// A broker raises the term page, whoever else leads.
    TermBegins {
        broker: usize,
    },
    /// Its watch shows that.
    TermStarts {
        broker: usize,
    },
    /// A node finds out that its session is gone, and there is another.
    Reconnected {
        broker: usize,
        node: usize,
    },
    /// A leader looks at its clock after a long pause.
    Tick {
        broker: usize,
    },

    // Faults, and what is up to people.
    Crash {
        broker: usize,
    },
    SessionCut {
        broker: usize,
        node: usize,
    },
    OrderStalls {
        broker: usize,
        node: usize,
    },
    AnswerLost {
        index: usize,
    },
    WriteRejected {
        index: usize,
    },
    ReportsRepeated {
        node: usize,
    },
    AgentRestarts {
        node: usize,
    },
    NodeReboots {
        node: usize,
        wiped: bool,
    },
    NodeLost {
        node: usize,
    },
    LongPause,
    ShortPause {
        broker: usize,
    },
    VisitorLeaves {
        call: usize,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call { call } => write!(formatter, "call {call} reaches its node"),
            Self::NodeReads { broker, node } => write!(formatter, "node {node} reads what broker {broker} sent"),
            Self::BrokerReads { broker, node } => write!(formatter, "broker {broker} reads what node {node} sent"),
            Self::Allow { node, lease } => write!(formatter, "node {node} allows the worker of lease {lease}"),
            Self::End { node, lease, ending } => write!(formatter, "on node {node} lease {lease} ends: {ending:?}"),
            Self::Free { node, lease } => write!(formatter, "on node {node} the slot of lease {lease} is free"),
            Self::Heartbeat { broker, node } => write!(formatter, "node {node} tells broker {broker} that it lives"),
            Self::WriteArrives { index } => write!(formatter, "page write {index} reaches the API server"),
            Self::WriteAnswered { index } => write!(formatter, "the answer of page write {index} arrives"),
            Self::ReadServed { broker, .. } => write!(formatter, "the API server reads a page for broker {broker}"),
            Self::ReadAnswered { broker, .. } => write!(formatter, "broker {broker} gets the page that was read"),
            Self::WatchShows { broker, account } => write!(formatter, "the watch shows broker {broker} page {account}"),
            Self::Deposed { broker } => write!(formatter, "the watch shows broker {broker} a later term: it ends"),
            Self::ReceiptWritten { broker, .. } => write!(formatter, "a receipt of broker {broker} is written"),
            Self::TermBegins { broker } => write!(formatter, "broker {broker} raises the term page"),
            Self::TermStarts { broker } => write!(formatter, "the watch shows broker {broker} its term: it leads"),
            Self::Reconnected { broker, node } => {
                write!(formatter, "node {node} opens a new session with broker {broker}")
            }
            Self::Tick { broker } => write!(formatter, "broker {broker} looks at its clock"),
            Self::Crash { broker } => write!(formatter, "broker {broker} dies"),
            Self::SessionCut { broker, node } => {
                write!(formatter, "broker {broker} loses its session with node {node}")
            }
            Self::OrderStalls { broker, node } => write!(formatter, "broker {broker}'s order to node {node} stalls"),
            Self::AnswerLost { index } => write!(formatter, "the answer of page write {index} is lost"),
            Self::WriteRejected { index } => write!(formatter, "the API server refuses page write {index}"),
            Self::ReportsRepeated { node } => write!(formatter, "node {node} repeats its reports"),
            Self::AgentRestarts { node } => write!(formatter, "the agent of node {node} restarts"),
            Self::NodeReboots { node, wiped: false } => write!(formatter, "node {node} reboots"),
            Self::NodeReboots { node, wiped: true } => write!(formatter, "node {node} reboots without its records"),
            Self::NodeLost { node } => write!(formatter, "node {node} is gone for good"),
            Self::LongPause => write!(formatter, "nothing happens for longer than every limit"),
            Self::ShortPause { broker } => write!(formatter, "half a minute passes for broker {broker}"),
            Self::VisitorLeaves { call } => write!(formatter, "the visitor of call {call} leaves"),
        }
    }
}

impl Cluster {
    /// What goes on by itself, and at last the time that has to pass until L9 gives up what is silent.
    pub fn progress(&self, world: &World) -> Vec<Action> {
        let mut actions = self.ongoing(world);
        if let Some((broker, leading)) = world.leader()
            && actions.is_empty()
        {
            let mut holds = world.api.pages.iter().flat_map(|page| &page.holds).peekable();
            let open = holds.peek().is_some();
            if holds.any(|hold| !crate::check::is_overdue(leading, &hold.lease)) {
                actions.push(Action::LongPause);
            } else if open && leading.ticks == 0 {
                // A Cancel that was lost or came too late is repeated.
                actions.push(Action::ShortPause { broker });
            }
        }
        actions
    }

    /// What goes on by itself without a long wait.
    pub fn ongoing(&self, world: &World) -> Vec<Action> {
        let mut actions = Vec::new();
        let next = world.calls.iter().position(|state| *state == CallState::Ahead);
        actions.extend(next.map(|call| Action::Call { call }));
        for (index, write) in world.api.writes.iter().enumerate() {
            match write.fate {
                Fate::Sent => actions.push(Action::WriteArrives { index }),
                Fate::Done | Fate::Conflict | Fate::Refused => actions.push(Action::WriteAnswered { index }),
            }
        }
        for node in 0..NODES {
            self.node_progress(world, node, &mut actions);
        }
        for broker in 0..BROKERS {
            self.broker_progress(world, broker, &mut actions);
        }
        let nobody = world.leader().is_none() && !self.is_beginning(world);
        if nobody && world.spent.terms < self.bounds.budget.terms {
            begin_term(world, &mut actions);
        }
        actions
    }

    /// Time alone has made something due. Ticks come all the time; only those are looked at that change something.
    fn is_due(&self, leading: &crate::broker::Leading) -> bool {
        let paused = leading.pauses > 0 || leading.ticks > 0;
        paused && self.steps.take(leading, spaceport_core::lease::Command::Tick).core != leading.core
    }

    fn is_beginning(&self, world: &World) -> bool {
        let term = world.api.term;
        world.brokers.iter().any(|broker| matches!(&**broker, Broker::Beginning { epoch, .. } if *epoch == term))
    }

    fn node_progress(&self, world: &World, node: usize, actions: &mut Vec<Action>) {
        for broker in 0..BROKERS {
            let link = &world.links[broker][node];
            if !link.to_node.is_empty() && !world.nodes[node].gone {
                actions.push(Action::NodeReads { broker, node });
            }
            if !link.to_broker.is_empty() && link.up {
                actions.push(Action::BrokerReads { broker, node });
            }
        }
        for known in &world.nodes[node].leases {
            let lease = known.lease;
            match known.phase {
                Phase::Assigned => {
                    actions.push(Action::Allow { node, lease });
                    if self.bounds.never_allowed {
                        actions.push(Action::End { node, lease, ending: Ending::NeverAllowed });
                    }
                }
                Phase::Running => actions.push(Action::End { node, lease, ending: Ending::Released }),
                Phase::Ended { freed: false, .. } => actions.push(Action::Free { node, lease }),
                Phase::Waiting | Phase::Ended { .. } => {}
            }
        }
    }

    fn broker_progress(&self, world: &World, broker: usize, actions: &mut Vec<Action>) {
        let leading = match &*world.brokers[broker] {
            Broker::Standby => return,
            Broker::Beginning { .. } => return actions.push(Action::TermStarts { broker }),
            Broker::Leading(leading) => leading,
        };
        if leading.core.epoch.0 < world.api.term {
            actions.push(Action::Deposed { broker });
        }
        if leading.tick_due || self.is_due(leading) {
            actions.push(Action::Tick { broker });
        }
        for (index, read) in leading.reads.iter().enumerate() {
            actions.push(match read.page {
                None => Action::ReadServed { broker, index },
                Some(_) => Action::ReadAnswered { broker, index },
            });
        }
        actions.extend((0..leading.receipts.len()).map(|index| Action::ReceiptWritten { broker, index }));
        for account in accounts() {
            let page = &world.api.pages[account];
            // With its own write in flight, the page that this write made says nothing: its answer does.
            let found = leading.core.accounts.get(&crate::names::account(account));
            let batch = found.and_then(|found| found.in_flight.as_ref());
            let own = batch.is_some_and(|batch| batch.write_id == page.write_id && batch.page.seq == page.seq);
            if page.seq > leading.shown[account] && !own {
                actions.push(Action::WatchShows { broker, account });
            }
        }
        for node in 0..NODES {
            let link = &world.links[broker][node];
            if !link.up && !world.nodes[node].gone {
                actions.push(Action::Reconnected { broker, node });
            }
            let rests = leading.core.nodes.get(&crate::names::node(node)).is_some_and(|known| known.rests);
            let follows = link.up && world.nodes[node].leader == Some(broker);
            if rests && follows && !link.to_broker.contains(&ToBroker::Heartbeat) {
                actions.push(Action::Heartbeat { broker, node });
            }
        }
        if world.spent.rejected > 0 && leading.ticks < self.bounds.budget.ticks {
            actions.push(Action::ShortPause { broker });
        }
    }

    /// Faults that are left, and what people may do.
    pub fn faults(&self, world: &World) -> Vec<Action> {
        let (spent, budget) = (&world.spent, &self.bounds.budget);
        let mut actions = Vec::new();
        if spent.terms < budget.terms && world.leader().is_some() {
            begin_term(world, &mut actions);
        }
        for broker in 0..BROKERS {
            let Broker::Leading(leading) = &*world.brokers[broker] else { continue };
            if spent.crashes < budget.crashes {
                actions.push(Action::Crash { broker });
            }
            if leading.ticks < budget.ticks && budget.rejected == 0 {
                actions.push(Action::ShortPause { broker });
            }
        }
        for (index, write) in world.api.writes.iter().enumerate().filter(|(_, write)| write.broker.is_some()) {
            if spent.unknown < budget.unknown && matches!(write.fate, Fate::Sent | Fate::Done) {
                actions.push(Action::AnswerLost { index });
            }
            if spent.rejected < budget.rejected && write.fate == Fate::Sent {
                actions.push(Action::WriteRejected { index });
            }
        }
        for node in 0..NODES {
            self.node_faults(world, node, &mut actions);
        }
        if spent.pauses < budget.pauses {
            actions.push(Action::LongPause);
        }
        if spent.leaves < budget.leaves {
            let open = world.calls.iter().enumerate().filter(|(_, state)| **state == CallState::Open);
            actions.extend(open.map(|(call, _)| Action::VisitorLeaves { call }));
        }
        actions
    }

    fn node_faults(&self, world: &World, node: usize, actions: &mut Vec<Action>) {
        let (spent, budget) = (&world.spent, &self.bounds.budget);
        for broker in 0..BROKERS {
            let link = &world.links[broker][node];
            if spent.cuts < budget.cuts && link.up && matches!(&*world.brokers[broker], Broker::Leading(_)) {
                actions.push(Action::SessionCut { broker, node });
            }
            let fresh = matches!(
                link.to_node.first(),
                Some(ToNode::Cancel { stale: false, .. } | ToNode::Start(Order { stale: false, .. }))
            );
            if spent.stalls < budget.stalls && fresh {
                actions.push(Action::OrderStalls { broker, node });
            }
        }
        if world.nodes[node].gone {
            return;
        }
        if spent.restarts < budget.restarts {
            actions.push(Action::AgentRestarts { node });
        }
        if spent.reboots < budget.reboots {
            actions.push(Action::NodeReboots { node, wiped: false });
            actions.push(Action::NodeReboots { node, wiped: true });
        }
        if spent.losses < budget.losses {
            actions.push(Action::NodeLost { node });
        }
        let speaks = world.nodes[node].leader.is_some_and(|broker| world.links[broker][node].up);
        if spent.repeats < budget.repeats && speaks && !world.nodes[node].reports().is_empty() {
            actions.push(Action::ReportsRepeated { node });
        }
    }

    /// The world after an action.
    pub fn act(&self, before: &World, action: Action) -> World {
        let mut world = before.clone();
        self.happen(&mut world, action);
        world.settle_order();
        world
    }

    fn happen(&self, world: &mut World, action: Action) {
        match action {
            Action::Call { call } => {
                let node = self.bounds.calls[call].node;
                world.calls[call] = CallState::Open;
                let told = world.node(node).call(u8::try_from(call).unwrap_or(u8::MAX));
                self.hear(world, node, told);
            }
            Action::NodeReads { broker, node } => self.deliver_to_node(world, broker, node),
            Action::BrokerReads { broker, node } => self.deliver_to_broker(world, broker, node),
            Action::Allow { node, lease } => self.on_lease(world, node, lease, Node::allow),
            Action::End { node, lease, ending } => {
                self.on_lease(world, node, lease, |node, index| node.end(index, ending));
                if !self.bounds.clearing {
                    self.on_lease(world, node, lease, |node, index| {
                        if node.leases[index].clears() { node.free(index) } else { Told::default() }
                    });
                }
            }
            Action::Free { node, lease } => self.on_lease(world, node, lease, Node::free),
            Action::Heartbeat { broker, node } => world.link(broker, node).to_broker.push(ToBroker::Heartbeat),
            Action::WriteArrives { index } => self.write_arrives(world, index),
            Action::WriteAnswered { index } => self.answer(world, index),
            Action::ReadServed { broker, index } => {
                let pages = world.api.pages.clone();
                if let Some(leading) = world.leading(broker) {
                    let read = &mut leading.reads[index];
                    read.page = Some(pages[read.account].clone());
                }
            }
            Action::ReadAnswered { broker, index } => self.answer_read(world, broker, index),
            Action::WatchShows { broker, account } => self.watch(world, broker, account),
            Action::Deposed { broker } => self.stop(world, broker),
            Action::ReceiptWritten { broker, index } => self.receipt(world, broker, index),
            Action::TermBegins { broker } => {
                world.spent.terms += 1;
                self.begin_term(world, broker);
            }
            Action::TermStarts { broker } => self.start_term(world, broker),
            Action::Reconnected { broker, node } => self.reconnect(world, broker, node),
            Action::Tick { broker } => self.tick(world, broker),
            fault => self.go_wrong(world, fault),
        }
    }

    fn on_lease(&self, world: &mut World, node: usize, lease: u32, act: impl FnOnce(&mut Node, usize) -> Told) {
        let Some(index) = world.nodes[node].leases.iter().position(|known| known.lease == lease) else { return };
        let told = act(world.node(node), index);
        self.hear(world, node, told);
    }

    fn go_wrong(&self, world: &mut World, action: Action) {
        match action {
            Action::Crash { broker } => {
                world.spent.crashes += 1;
                self.stop(world, broker);
            }
            Action::SessionCut { broker, node } => {
                world.spent.cuts += 1;
                self.cut(world, broker, node);
            }
            Action::OrderStalls { broker, node } => {
                world.spent.stalls += 1;
                stall(world, broker, node);
            }
            Action::AnswerLost { index } => {
                world.spent.unknown += 1;
                self.lose_answer(world, index);
            }
            Action::WriteRejected { index } => {
                world.spent.rejected += 1;
                world.api().writes[index].fate = Fate::Refused;
                self.answer(world, index);
            }
            Action::ReportsRepeated { node } => {
                world.spent.repeats += 1;
                let messages = world.nodes[node].reports();
                self.hear(world, node, Told { messages, ..Default::default() });
            }
            Action::AgentRestarts { node } => {
                world.spent.restarts += 1;
                let told = world.node(node).restart();
                self.hear(world, node, told);
                self.drop_sessions(world, node);
            }
            Action::NodeReboots { node, wiped } => {
                world.spent.reboots += 1;
                let term = world.api.term;
                if wiped {
                    self.forget_ends(world, node);
                }
                let told = world.node(node).reboot(wiped.then_some(term));
                self.hear(world, node, told);
                self.drop_sessions(world, node);
            }
            Action::NodeLost { node } => {
                world.spent.losses += 1;
                let told = world.node(node).reboot(None);
                world.node(node).gone = true;
                self.forget_ends(world, node);
                world.node(node).leases.clear();
                self.hear(world, node, told);
                self.drop_sessions(world, node);
            }
            Action::LongPause => {
                world.spent.pauses += 1;
                self.pause(world);
            }
            Action::ShortPause { broker } => {
                if let Some(leading) = world.leading(broker) {
                    leading.ticks += 1;
                }
                self.tick(world, broker);
            }
            Action::VisitorLeaves { call } => {
                world.spent.leaves += 1;
                let node = self.bounds.calls[call].node;
                world.calls[call] = CallState::Over;
                let told = world.node(node).leave(u8::try_from(call).unwrap_or(u8::MAX));
                self.hear(world, node, told);
            }
            _ => {}
        }
    }
}

fn begin_term(world: &World, actions: &mut Vec<Action>) {
    for (broker, state) in world.brokers.iter().enumerate() {
        if **state == Broker::Standby {
            actions.push(Action::TermBegins { broker });
        }
    }
}
