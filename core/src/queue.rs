//! Who waits for a GPU, in which order, and how many may (docs/rules.md, Queue). Oldest first, for each node: a pod can
//! only use the cards of its own node.
//!
//! The head blocks: a whole-card job at the head is not passed by the halves behind it, so it can not starve. Only a
//! request that waits for something of its own account (its concurrency limit) is passed, see `lease::dispatch`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{AccountName, LeaseId, LedgerTime, NodeName, SpaceKey, Steady, Ticket};
use crate::protocol::{CallerClass, QueueOf};
use crate::quota::Demand;

/// A request that waits, or that a lease was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Its idempotency key (L15).
    pub ticket: Ticket,
    /// Its place: requests of one term are numbered as they come. It keeps the number when a grant fails, and so returns
    /// to where it was.
    pub place: u64,
    /// Node of its pod.
    pub node: NodeName,
    /// Who pays.
    pub account: AccountName,
    /// The Space that asks.
    pub space: SpaceKey,
    /// What it asks for.
    pub demand: Demand,
    /// What the client is told about its caller.
    pub caller: CallerClass,
    /// Id of the token that the visitor's call began with; None without a token.
    pub root: Option<String>,
    /// How its caller was known, for the row: `token` or `space`.
    pub via: String,
    /// When it came, wall clock, for people.
    pub since: LedgerTime,
    /// When it came.
    pub arrived: Steady,
    /// Orders for it that a node refused or a store did not take.
    pub attempts: u32,
    /// Its place was told to the agent.
    pub announced: bool,
    /// The lease it will get, named when it has to wait, so that people can see it from then on. None again after a hold
    /// that failed: ids are never used twice.
    pub lease: Option<LeaseId>,
    /// Its agent's stream was cut since: dropped at this time unless the agent presents it again. Its visitor may have
    /// left meanwhile, of which nobody told us.
    pub unconfirmed: Option<Steady>,
}

/// Most requests that wait at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueBounds {
    /// On one node. The pool's bound applies to each of its nodes, for queues are per node.
    pub node: usize,
    /// Of one Space.
    pub space: usize,
    /// Of one account.
    pub account: usize,
}

impl Default for QueueBounds {
    /// The chart's defaults.
    fn default() -> Self {
        Self { node: 1000, space: 200, account: 16 }
    }
}

/// All queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    nodes: BTreeMap<NodeName, BTreeMap<u64, Waiting>>,
    tickets: BTreeMap<Ticket, (NodeName, u64)>,
    spaces: BTreeMap<SpaceKey, usize>,
    accounts: BTreeMap<AccountName, AccountLoad>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct AccountLoad {
    requests: usize,
    needed_ms: u64,
}

impl Queue {
    /// Takes a request in at its place. One that is here already stays as it is.
    pub fn insert(&mut self, waiting: Waiting) {
        if self.tickets.contains_key(&waiting.ticket) {
            return;
        }
        self.tickets.insert(waiting.ticket.clone(), (waiting.node.clone(), waiting.place));
        *self.spaces.entry(waiting.space.clone()).or_default() += 1;
        let load = self.accounts.entry(waiting.account.clone()).or_default();
        load.requests += 1;
        load.needed_ms = load.needed_ms.saturating_add(waiting.demand.needed_ms());
        self.nodes.entry(waiting.node.clone()).or_default().insert(waiting.place, waiting);
    }

    /// Takes a request out.
    pub fn remove(&mut self, ticket: &Ticket) -> Option<Waiting> {
        let (node, place) = self.tickets.remove(ticket)?;
        let line = self.nodes.get_mut(&node)?;
        let waiting = line.remove(&place)?;
        if line.is_empty() {
            self.nodes.remove(&node);
        }
        if let Some(count) = self.spaces.get_mut(&waiting.space) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.spaces.remove(&waiting.space);
            }
        }
        if let Some(load) = self.accounts.get_mut(&waiting.account) {
            load.requests = load.requests.saturating_sub(1);
            load.needed_ms = load.needed_ms.saturating_sub(waiting.demand.needed_ms());
            if load.requests == 0 {
                self.accounts.remove(&waiting.account);
            }
        }
        Some(waiting)
    }

    /// The request of this ticket, if it waits.
    pub fn get(&self, ticket: &Ticket) -> Option<&Waiting> {
        let (node, place) = self.tickets.get(ticket)?;
        self.nodes.get(node)?.get(place)
    }

    pub(crate) fn get_mut(&mut self, ticket: &Ticket) -> Option<&mut Waiting> {
        let (node, place) = self.tickets.get(ticket)?;
        self.nodes.get_mut(node)?.get_mut(place)
    }

    /// Nodes that somebody waits for.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.nodes.keys()
    }

    /// Who waits for a node, oldest first.
    pub fn line(&self, node: &NodeName) -> impl Iterator<Item = &Waiting> {
        self.nodes.get(node).into_iter().flat_map(BTreeMap::values)
    }

    pub(crate) fn line_mut(&mut self, node: &NodeName) -> impl Iterator<Item = &mut Waiting> {
        self.nodes.get_mut(node).into_iter().flat_map(BTreeMap::values_mut)
    }

    /// Everybody who waits.
    pub fn iter(&self) -> impl Iterator<Item = &Waiting> {
        self.nodes.values().flat_map(BTreeMap::values)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.tickets.len()
    }

    /// True if nobody waits.
    pub fn is_empty(&self) -> bool {
        self.tickets.is_empty()
    }

    /// What the account's waiting requests will need together, weighted milliseconds.
    pub fn needed_ms(&self, account: &AccountName) -> u64 {
        self.accounts.get(account).map_or(0, |load| load.needed_ms)
    }

    /// The bound that another request would break, if any, with its number.
    pub fn full(
        &self,
        node: &NodeName,
        space: &SpaceKey,
        account: &AccountName,
        bounds: &QueueBounds,
    ) -> Option<(QueueOf, u64)> {
        let of_account = self.accounts.get(account).map_or(0, |load| load.requests);
        let of_space = self.spaces.get(space).copied().unwrap_or_default();
        let of_node = self.nodes.get(node).map_or(0, BTreeMap::len);
        [
            (of_account, bounds.account, QueueOf::Account),
            (of_space, bounds.space, QueueOf::Space),
            (of_node, bounds.node, QueueOf::Pool),
        ]
        .into_iter()
        .find(|(waiting, bound, _)| waiting >= bound)
        .map(|(_, bound, of)| (of, bound as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Size;

    fn waiting(place: u64, node: &str, account: &str) -> Waiting {
        Waiting {
            ticket: Ticket { agent_instance: node.to_owned(), number: place },
            place,
            node: NodeName::new(node),
            account: AccountName::new(account),
            space: SpaceKey { namespace: "n".into(), name: "s".into(), uid: "u".into() },
            demand: Demand { size: Size::Large, weight: 1, declared_ms: 10, duration_factor_percent: 100 },
            caller: CallerClass::Regular,
            root: None,
            via: "token".into(),
            since: LedgerTime(0),
            arrived: Steady(0),
            attempts: 0,
            announced: false,
            lease: None,
            unconfirmed: None,
        }
    }

    #[test]
    fn a_request_returns_to_its_place() {
        let mut queue = Queue::default();
        for place in 1..=3 {
            queue.insert(waiting(place, "a", "bob"));
        }
        queue.insert(waiting(4, "b", "bob"));
        let first = queue.remove(&waiting(1, "a", "bob").ticket).unwrap();
        queue.insert(first.clone());
        queue.insert(Waiting { place: 9, ..first });
        let node = NodeName::new("a");
        assert_eq!(queue.line(&node).map(|waiting| waiting.place).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!((queue.len(), queue.needed_ms(&AccountName::new("bob"))), (4, 40));
    }

    #[test]
    fn bounds_name_whose_queue_is_full() {
        let mut queue = Queue::default();
        let bounds = QueueBounds { node: 3, space: 2, account: 1 };
        let full = |queue: &Queue, account| {
            let sample = waiting(0, "a", account);
            queue.full(&sample.node, &sample.space, &sample.account, &bounds)
        };
        assert_eq!(full(&queue, "bob"), None);
        queue.insert(waiting(1, "a", "bob"));
        assert_eq!(full(&queue, "bob"), Some((QueueOf::Account, 1)));
        assert_eq!(full(&queue, "eve"), None);
        queue.insert(waiting(2, "a", "eve"));
        assert_eq!(full(&queue, "joe"), Some((QueueOf::Space, 2)));
        queue.remove(&waiting(1, "a", "bob").ticket);
        queue.remove(&waiting(2, "a", "eve").ticket);
        assert_eq!(queue, Queue::default());
    }
}
