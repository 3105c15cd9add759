//! Everything there is at one moment.

use std::sync::Arc;

use spaceport_core::page::Ending;

use crate::api::{Api, Broken, Fate, Write};
use crate::bounds::{ACCOUNTS, BROKERS, Budget, NODES};
use crate::broker::{Broker, Leading};
use crate::names;
use crate::node::{Node, ToBroker, ToNode};

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
