//! Requests that have had their turn and wait for something of their own account or Space.

use std::collections::{BTreeSet, btree_set};
use std::sync::Arc;

use super::{Queue, Waiting, WaitsFor};
use crate::ids::{AccountName, NodeName, Ticket};

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
        self.unpark_where(&ParkedFor::Account(account.clone()), may);
    }

    /// The same of a Space, of all its requests.
    pub fn unpark_space(&mut self, uid: &str) {
        if self.parked.is_empty() {
            return;
        }
        // No more than the Space's queue bound.
        self.unpark_where(&ParkedFor::Space(uid.to_owned()), |_| true);
    }

    fn unpark_where(&mut self, parked_for: &ParkedFor, may: impl Fn(&Waiting) -> bool) {
        for (node, place) in self.parked.get(parked_for).cloned().unwrap_or_default() {
            let ticket = self.at(&node, place).filter(|waiting| may(waiting)).map(|waiting| waiting.ticket.clone());
            if let Some(ticket) = ticket {
                self.change(&ticket, |waiting| waiting.waits_for = WaitsFor::Node);
            }
        }
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
