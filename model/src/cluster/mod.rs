//! What can happen to a world, a step each; what an operator's actor does around the ledger is written again here.

mod nodes;
mod pages;
mod sessions;
mod terms;

pub use sessions::stall;

use std::sync::Arc;

use crate::api::Api;
use crate::bounds::{BROKERS, Bounds, Budget, Fault, NODES};
use crate::broker::{Broker, Steps};
use crate::node::{Node, Phase};
use crate::world::{CallState, Link, World};

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

    /// Nothing happens for longer than every limit: nothing runs, and what is on its way is too old.
    pub fn pause(&self, world: &mut World) {
        for node in 0..NODES {
            let told = world.node(node).outlast();
            self.hear(world, node, told);
            for broker in 0..BROKERS {
                world.link(broker, node).to_node.iter_mut().for_each(sessions::age);
            }
        }
        for broker in 0..BROKERS {
            if let Some(leading) = world.leading(broker) {
                leading.pauses += 1;
                leading.tick_due = true;
            }
        }
    }
}
