//! Terms of brokers: how they begin, what their ledgers want done, how they end.

use std::sync::Arc;

use spaceport_core::ids::Epoch;
use spaceport_core::lease::{Command, State};

use super::Cluster;
use crate::api::{Api, Broken, Fate, Write};
use crate::bounds::{Fault, NODES};
use crate::broker::{self, Broker, Leading, Out, Read};
use crate::names;
use crate::node::ToNode;
use crate::world::World;

impl Cluster {
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

    /// Gives a leader's ledger a command and carries its effects out.
    pub(super) fn tell(&self, world: &mut World, broker: usize, command: Command) {
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
                self.send(world, broker, *node, ToNode::Start(order.clone()));
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

    /// A leader looks at its clock.
    pub fn tick(&self, world: &mut World, broker: usize) {
        if let Some(leading) = world.leading(broker) {
            leading.tick_due = false;
        }
        self.tell(world, broker, Command::Tick);
    }
}
