//! Streams between brokers and agents: in order as long as they live, and lost from some point on when they break.

use std::collections::VecDeque;

use spaceport_core::ids::NodeName;
use spaceport_core::lease::Command;

use crate::agent::ToAgent;

/// A stream, never numbered twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// What an agent says, with its BOOTTIME when it said it (L8).
#[derive(Clone, Debug)]
pub struct Up {
    /// BOOTTIME, milliseconds.
    pub stamp: u64,
    /// What.
    pub command: Command,
}

/// A stream.
pub struct Link {
    /// Its agent's node.
    pub node: NodeName,
    /// Its broker.
    pub broker: u64,
    /// On the way to the broker.
    pub up: VecDeque<Up>,
    /// On the way to the agent.
    pub down: VecDeque<ToAgent>,
    /// The agent reads and writes it.
    pub node_open: bool,
    /// The broker does.
    pub broker_open: bool,
    /// The broker said on it that it leads: heartbeats are sent.
    pub welcomed: bool,
    /// Nothing new gets through any more.
    pub broken: bool,
    /// When what was sent last arrives, world time.
    pub up_at: u64,
    /// The same in the other direction.
    pub down_at: u64,
}

// === impl Link ===

impl Link {
    /// A fresh stream.
    pub const fn new(node: NodeName, broker: u64) -> Self {
        Self {
            node,
            broker,
            up: VecDeque::new(),
            down: VecDeque::new(),
            node_open: true,
            broker_open: true,
            welcomed: false,
            broken: false,
            up_at: 0,
            down_at: 0,
        }
    }

    /// Nobody reads it any more.
    pub const fn is_over(&self) -> bool {
        !self.node_open && !self.broker_open
    }
}
