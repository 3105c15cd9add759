//! Streams between brokers and nodes: what is sent, read, cut and late.

use std::sync::Arc;

use super::Cluster;
use crate::bounds::{BROKERS, Fault};
use crate::broker::{self, Broker};
use crate::node::ToNode;
use crate::world::{Link, World};

impl Cluster {
    pub(super) fn welcome(&self, world: &mut World, broker: usize, node: usize) {
        let (start, highest) = (world.nodes[node].start, world.nodes[node].epoch);
        self.tell(world, broker, broker::settings(node));
        self.tell(world, broker, broker::hello(node, start, highest));
        if let Broker::Leading(leading) = &*world.brokers[broker] {
            let epoch = leading.core.epoch.0;
            world.link(broker, node).to_node.push(ToNode::Welcome { epoch });
        }
    }

    pub(super) fn send(&self, world: &mut World, broker: usize, node: usize, message: ToNode) {
        if world.links[broker][node].up {
            world.link(broker, node).to_node.push(message);
            self.forget_unread(world, node);
        }
    }

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

    /// A broker reads the next message.
    pub fn deliver_to_broker(&self, world: &mut World, broker: usize, node: usize) {
        let message = world.link(broker, node).to_broker.remove(0);
        self.tell(world, broker, broker::command(node, &message, &self.bounds.calls));
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

    /// The broker's end of a session is closed.
    pub(super) fn lose_session(&self, world: &mut World, broker: usize, node: usize) {
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
}

pub(super) const fn age(message: &mut ToNode) {
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
