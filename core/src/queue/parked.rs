//! Requests that have had their turn and wait for something of their own account or Space.

use std::collections::{BTreeMap, BTreeSet, btree_set};
use std::sync::Arc;

use super::{Queue, Waiting, WaitsFor};
use crate::ids::{AccountName, NodeName, Size, Ticket};

/// What a request waits for other than its node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ParkedFor {
    Account(AccountName),
    /// By uid.
    Space(String),
}

impl Queue {
    pub(super) fn forget_parked(&mut self, parked_for: &ParkedFor, node: NodeName, place: u64) {
        let Some(parked) = self.parked.get_mut(parked_for) else { return };
        parked.remove(&(node, place));
        if parked.is_empty() {
            self.parked.remove(parked_for);
        }
    }

    fn parked<'a>(&'a self, parked_for: &ParkedFor) -> btree_set::Iter<'a, (NodeName, u64)> {
        self.parked.get(parked_for).map(BTreeSet::iter).unwrap_or_default()
    }

    /// It waits for its own account or Space. What it was told about its wait for the node is over with that.
    pub fn park(&mut self, ticket: &Ticket, waits_for: WaitsFor) {
        self.change(ticket, |waiting| (waiting.waits_for, waiting.promise) = (waits_for, None));
    }

    /// The account has changed: its requests that `may` start do, or are parked again when their turn comes.
    pub fn unpark(&mut self, account: &AccountName, may: impl Fn(&Waiting) -> bool) {
        // No more than the account's queue bound.
        for (node, place) in self.parked.get(&ParkedFor::Account(account.clone())).cloned().unwrap_or_default() {
            let ticket = self.at(&node, place).filter(|waiting| may(waiting)).map(|waiting| waiting.ticket.clone());
            if let Some(ticket) = ticket {
                self.wait_for_node(&ticket);
            }
        }
    }

    /// The Space may have `room` more leases. So many of its requests wait for their node from now on, the oldest first; the
    /// others would be parked again at once, and each is told what it waits for. So many of each node and size: who waits for
    /// another card or node than the oldest does is not held up by it.
    pub fn unpark_space(&mut self, uid: &str, room: usize) {
        if self.parked.is_empty() || room == 0 {
            return;
        }
        let parked = self.parked.get(&ParkedFor::Space(uid.to_owned()));
        let mut ahead: BTreeMap<(&NodeName, Size), usize> = BTreeMap::new();
        for node in parked.into_iter().flatten().map(|(node, _)| node).collect::<BTreeSet<_>>() {
            let of_space = self.line(node).filter(|waiting| waiting.space.uid == uid);
            for waiting in of_space.filter(|waiting| waiting.waits_for == WaitsFor::Node) {
                *ahead.entry((node, waiting.demand.size)).or_default() += 1;
            }
        }
        let mut next: Vec<Ticket> = Vec::new();
        // In the order of their places on each node.
        for waiting in parked.into_iter().flatten().filter_map(|(node, place)| self.at(node, *place)) {
            let before = ahead.entry((&waiting.node, waiting.demand.size)).or_default();
            if *before < room {
                *before += 1;
                next.push(waiting.ticket.clone());
            }
        }
        for ticket in next {
            self.wait_for_node(&ticket);
        }
    }

    fn wait_for_node(&mut self, ticket: &Ticket) {
        self.change(ticket, |waiting| waiting.waits_for = WaitsFor::Node);
    }

    /// Requests of this account which are parked.
    pub fn parked_of(&self, account: &AccountName) -> impl Iterator<Item = &Waiting> {
        self.parked(&ParkedFor::Account(account.clone()))
            .filter_map(|(node, place)| self.at(node, *place))
            .map(Arc::as_ref)
    }

    /// Nodes that requests of this account wait for which are parked.
    pub fn parked_on(&self, account: &AccountName) -> impl Iterator<Item = &NodeName> {
        self.parked(&ParkedFor::Account(account.clone())).map(|(node, _)| node)
    }

    /// The same of a Space.
    pub fn parked_for_space(&self, uid: &str) -> impl Iterator<Item = &NodeName> {
        self.parked(&ParkedFor::Space(uid.to_owned())).map(|(node, _)| node)
    }

    /// Accounts with parked requests.
    pub fn parked_accounts(&self) -> impl Iterator<Item = &AccountName> {
        self.parked.keys().filter_map(|parked_for| match parked_for {
            ParkedFor::Account(account) => Some(account),
            ParkedFor::Space(_) => None,
        })
    }
}
