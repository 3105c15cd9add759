//! Who waits for a GPU, in which order, and how many may (docs/rules.md, Queue). For each node: a pod can only use the cards
//! of its own node.
//!
//! [`Lanes`] says who is next. This module keeps who waits, by whom they can be found: request, node, Space, account. Every
//! operation takes O(log n) steps of the number of requests that wait.

mod history;
mod lanes;
mod parked;
mod place;
mod ranked;
mod ready;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use history::{FUNCTIONS_MAX, Function, History, Learned, SAMPLES_MAX, SUGGEST_MIN};
pub use lanes::{
    BACKFILL_LOOK_MAX, Choice, EQUAL_KEY_PART, Fit, Job, Lane, LaneSettings, Lanes, Priority, RESERVE_PERCENT, Room,
};
pub use place::{EPOCH_MAX, Presented, Promise, Promised, parts_of, place_of};
pub use ranked::{Ahead, Ranked};

use parked::ParkedFor;
use ready::Ready;

use crate::ids::{
    AccountName, ByName, CookieId, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket, WorkerKey,
};
use crate::page::{Budget, Taken};
use crate::protocol::{CallerClass, QueueOf};
use crate::quota::{Demand, Queued};

/// A request that waits, or that a lease was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Its idempotency key (L15).
    pub ticket: Ticket,
    /// Its place ([`place_of`]): requests of one term are numbered as they come. It keeps it when a grant fails, and so
    /// returns to where it was, and in later terms, where its agent presents it (L17).
    pub place: u64,
    /// Node of its pod.
    pub node: NodeName,
    /// Who pays.
    pub account: AccountName,
    /// The visitor, if that is a guest page.
    pub cookie: Option<CookieId>,
    /// The Space that asks.
    pub space: SpaceKey,
    /// The version of its app that asks.
    pub revision: Revision,
    /// Whose calls a worker must have served that can serve this one again; None if that is not known.
    pub worker: Option<WorkerKey>,
    /// What it asks for.
    pub demand: Demand,
    /// What its turn depends on.
    pub turn: Turn,
    /// What the client is told about its caller.
    pub caller: CallerClass,
    /// The budget of its token; None without a token.
    pub budget: Option<Budget>,
    /// How its caller was known, for the row: `token`, `guest` or `space`.
    pub via: Cow<'static, str>,
    /// When it came, wall clock, for people.
    pub since: LedgerTime,
    /// When it came.
    pub arrived: Steady,
    /// Orders for it that a node refused or a store did not take.
    pub attempts: u32,
    /// What it waits for, as its agent was told.
    pub told: Option<WaitsFor>,
    /// What its caller was told about its wait for the node; None while it waits for its account.
    pub promise: Option<Promise>,
    /// What it waits for.
    pub waits_for: WaitsFor,
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

/// What a request waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitsFor {
    /// A slot of its node.
    #[default]
    Node,
    /// Something of its own account, mostly its concurrency limit: it is passed, and keeps its place.
    Account,
    /// The same of its Space.
    Space,
}

/// What the turn of a request depends on, as it was when it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Class of its tier.
    pub class: Priority,
    /// Its key in the fast lane.
    pub key: u64,
    /// How long it is expected to run, milliseconds; never more than declared.
    pub expected_ms: u64,
    /// How long it can hold its slots: H of docs/rules.md, milliseconds.
    pub held_ms: u64,
    /// How many slots it takes.
    pub slots: u64,
}

/// All queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    lines: BTreeMap<NodeName, Line>,
    tickets: ByName<Ticket, (NodeName, u64)>,
    spaces: ByName<SpaceKey, usize>,
    accounts: ByName<AccountName, AccountLoad>,
    /// Who waits for its account or Space.
    parked: BTreeMap<ParkedFor, BTreeSet<(NodeName, u64)>>,
    /// Who has not been told where it stands.
    untold: BTreeSet<Ticket>,
    /// Who has to be presented again by its agent.
    unconfirmed: BTreeSet<(NodeName, u64)>,
}

/// The queue of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line {
    waiting: BTreeMap<u64, Arc<Waiting>>,
    /// Of those who wait, who could start now if there were room.
    lanes: Lanes,
    /// The same, by their workers.
    ready: Ready,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct AccountLoad {
    requests: usize,
    needed_ms: u64,
    /// Of each visitor of a guest page; no more than there are requests.
    by_cookie: BTreeMap<CookieId, u64>,
    /// Of each token, by its `root_jti`; no more than there are requests.
    by_root: BTreeMap<String, Taken>,
}

impl AccountLoad {
    fn add(&mut self, waiting: &Waiting) {
        let ms = waiting.demand.needed_ms();
        self.requests += 1;
        self.needed_ms = self.needed_ms.saturating_add(ms);
        if let Some(cookie) = &waiting.cookie {
            let of_cookie = self.by_cookie.entry(cookie.clone()).or_default();
            *of_cookie = of_cookie.saturating_add(ms);
        }
        if let Some(budget) = &waiting.budget {
            let of_root = self.by_root.entry(budget.root.clone()).or_default();
            *of_root = of_root.and(Taken { calls: 1, ms });
        }
    }

    fn remove(&mut self, waiting: &Waiting) {
        let ms = waiting.demand.needed_ms();
        self.requests = self.requests.saturating_sub(1);
        self.needed_ms = self.needed_ms.saturating_sub(ms);
        if let Some(cookie) = &waiting.cookie
            && let Some(of_cookie) = self.by_cookie.get_mut(cookie)
        {
            *of_cookie = of_cookie.saturating_sub(ms);
            if *of_cookie == 0 {
                self.by_cookie.remove(cookie);
            }
        }
        if let Some(budget) = &waiting.budget
            && let Some(of_root) = self.by_root.get_mut(&budget.root)
        {
            *of_root = Taken { calls: of_root.calls.saturating_sub(1), ms: of_root.ms.saturating_sub(ms) };
            if of_root.calls == 0 {
                self.by_root.remove(&budget.root);
            }
        }
    }
}

impl Waiting {
    /// What is learned of a call like this one is learned of this.
    pub fn function(&self) -> Function {
        Function {
            space_uid: self.space.uid.clone(),
            revision: self.revision,
            size: self.demand.size,
            declared_ms: self.demand.asked_ms(),
        }
    }

    fn job(&self) -> Job {
        let Turn { class, key, expected_ms, held_ms, slots } = self.turn;
        let declared_ms = self.demand.declared_ms;
        Job { place: self.place, size: self.demand.size, class, key, expected_ms, declared_ms, held_ms, slots }
    }

    /// It can start as soon as there is room.
    const fn is_ready(&self) -> bool {
        matches!(self.waits_for, WaitsFor::Node) && self.unconfirmed.is_none()
    }

    fn parked_for(&self) -> Option<ParkedFor> {
        match self.waits_for {
            WaitsFor::Node => None,
            WaitsFor::Account => Some(ParkedFor::Account(self.account.clone())),
            WaitsFor::Space => Some(ParkedFor::Space(self.space.uid.clone())),
        }
    }

    /// Its agent does not know what it waits for.
    fn is_untold(&self) -> bool {
        self.told != Some(self.waits_for) && self.unconfirmed.is_none()
    }
}

impl Queue {
    /// Takes a request in at its place. One that is here already stays as it is. `settings` are those of its node.
    pub fn insert(&mut self, waiting: Arc<Waiting>, settings: LaneSettings) {
        if self.tickets.contains_key(&waiting.ticket) {
            return;
        }
        self.tickets.insert(waiting.ticket.clone(), (waiting.node.clone(), waiting.place));
        *self.spaces.entry(waiting.space.clone()).or_default() += 1;
        self.accounts.entry(waiting.account.clone()).or_default().add(&waiting);
        if let Some(parked_for) = waiting.parked_for() {
            self.parked.entry(parked_for).or_default().insert((waiting.node.clone(), waiting.place));
        }
        if waiting.is_untold() {
            self.untold.insert(waiting.ticket.clone());
        }
        if waiting.unconfirmed.is_some() {
            self.unconfirmed.insert((waiting.node.clone(), waiting.place));
        }
        let line = self.lines.entry(waiting.node.clone()).or_default();
        line.lanes.configure(settings);
        if waiting.is_ready() {
            line.lanes.insert(waiting.job());
            line.ready.insert(&waiting);
        }
        line.waiting.insert(waiting.place, waiting);
    }

    /// Takes a request out that starts now, and says by which lane it had its turn.
    pub fn start(&mut self, ticket: &Ticket) -> Option<Lane> {
        let (node, place) = self.tickets.get(ticket)?;
        let started = self.lines.get_mut(node).and_then(|line| line.lanes.started(*place));
        self.remove(ticket);
        started.map(|(_, lane)| lane)
    }

    /// Somebody who had its turn by key takes so many slot-milliseconds more of the node than was expected of it.
    pub fn owe(&mut self, node: &NodeName, slot_ms: u64) {
        if let Some(line) = self.lines.get_mut(node) {
            line.lanes.owe(slot_ms);
        }
    }

    /// No card of the node is kept any more.
    pub fn release_card(&mut self, node: &NodeName) {
        if let Some(line) = self.lines.get_mut(node) {
            line.lanes.release();
        }
    }

    /// Takes a request out.
    pub fn remove(&mut self, ticket: &Ticket) -> Option<Arc<Waiting>> {
        let (node, place) = self.tickets.remove(ticket)?;
        self.untold.remove(ticket);
        let line = self.lines.get_mut(&node)?;
        line.lanes.remove(place);
        let waiting = line.waiting.remove(&place)?;
        line.ready.remove(&waiting);
        if line.waiting.is_empty() {
            self.lines.remove(&node);
        }
        if waiting.unconfirmed.is_some() {
            self.unconfirmed.remove(&(node.clone(), place));
        }
        if let Some(count) = self.spaces.get_mut(&waiting.space) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.spaces.remove(&waiting.space);
            }
        }
        if let Some(load) = self.accounts.get_mut(&waiting.account) {
            load.remove(&waiting);
            if load.requests == 0 {
                self.accounts.remove(&waiting.account);
            }
        }
        if let Some(parked_for) = waiting.parked_for() {
            self.forget_parked(&parked_for, node, place);
        }
        Some(waiting)
    }

    /// The request of this ticket, if it waits.
    pub fn get(&self, ticket: &Ticket) -> Option<&Waiting> {
        let (node, place) = self.tickets.get(ticket)?;
        self.lines.get(node)?.waiting.get(place).map(Arc::as_ref)
    }

    /// Changes a request in place, and what is known of it with it.
    fn change(&mut self, ticket: &Ticket, change: impl FnOnce(&mut Waiting)) {
        let Some((node, place)) = self.tickets.get(ticket) else { return };
        let Some(line) = self.lines.get_mut(node) else { return };
        let Some(waiting) = line.waiting.get_mut(place).map(Arc::make_mut) else { return };
        let (was_ready, waited_for, was_parked) = (waiting.is_ready(), waiting.waits_for, waiting.parked_for());
        let was_confirmed = waiting.unconfirmed.is_none();
        change(waiting);
        match (was_confirmed, waiting.unconfirmed.is_none()) {
            (true, false) => drop(self.unconfirmed.insert((node.clone(), *place))),
            (false, true) => drop(self.unconfirmed.remove(&(node.clone(), *place))),
            (true, true) | (false, false) => {}
        }
        match (was_ready, waiting.is_ready()) {
            (false, true) => {
                line.lanes.insert(waiting.job());
                line.ready.insert(waiting);
            }
            (true, false) => {
                line.lanes.remove(*place);
                line.ready.remove(waiting);
            }
            (true, true) | (false, false) => {}
        }
        if waiting.is_untold() {
            self.untold.insert(ticket.clone());
        } else {
            self.untold.remove(ticket);
        }
        if waited_for == waiting.waits_for {
            return;
        }
        let (node, place) = (node.clone(), *place);
        if let Some(parked_for) = waiting.parked_for() {
            self.parked.entry(parked_for).or_default().insert((node.clone(), place));
        }
        if let Some(parked_for) = was_parked {
            self.forget_parked(&parked_for, node, place);
        }
    }

    /// Its agent presented it again; it is told its place anew.
    pub fn confirm(&mut self, ticket: &Ticket) {
        self.change(ticket, |waiting| (waiting.unconfirmed, waiting.told) = (None, None));
    }

    /// The agent of these has to present them again until then.
    pub fn unconfirm(&mut self, node: &NodeName, confirm_by: Steady) {
        let tickets: Vec<Ticket> = self.line(node).map(|waiting| waiting.ticket.clone()).collect();
        for ticket in tickets {
            self.change(&ticket, |waiting| waiting.unconfirmed = Some(confirm_by));
        }
    }

    /// Its agent was told what it waits for and where it stands.
    pub fn announce(&mut self, ticket: &Ticket, lease: &LeaseId, promise: Option<Promise>) {
        self.change(ticket, |waiting| {
            (waiting.told, waiting.lease) = (Some(waiting.waits_for), Some(lease.clone()));
            waiting.promise = promise;
        });
    }

    /// What was promised to those who wait for this node does not hold any more: they are told anew.
    pub fn withdraw_promises(&mut self, node: &NodeName) {
        let tickets: Vec<Ticket> = self.line(node).map(|waiting| waiting.ticket.clone()).collect();
        for ticket in tickets {
            self.change(&ticket, |waiting| (waiting.told, waiting.promise) = (None, None));
        }
    }

    /// A card is kept for it.
    pub fn reserve(&mut self, ticket: &Ticket, lane: Lane) {
        let Some((node, place)) = self.tickets.get(ticket) else { return };
        if let Some(line) = self.lines.get_mut(node) {
            line.lanes.reserve(*place, lane);
        }
    }

    /// What the pool of a node says about its queue.
    pub fn configure(&mut self, node: &NodeName, settings: LaneSettings) {
        if let Some(line) = self.lines.get_mut(node) {
            line.lanes.configure(settings);
        }
    }

    /// The order in which those who wait for a node are served.
    pub fn lanes(&self, node: &NodeName) -> Option<&Lanes> {
        self.lines.get(node).map(|line| &line.lanes)
    }

    /// The place of who has its turn first by key among those of a size who could be served by a worker of this function.
    pub fn ready_for(&self, node: &NodeName, worker: &WorkerKey, size: Size) -> Option<u64> {
        self.lines.get(node)?.ready.first(worker, size)
    }

    /// The request at a place of a node.
    pub fn at(&self, node: &NodeName, place: u64) -> Option<&Arc<Waiting>> {
        self.lines.get(node)?.waiting.get(&place)
    }

    /// Who has not been told where it stands.
    pub fn untold(&self) -> impl Iterator<Item = &Waiting> {
        self.untold.iter().filter_map(|ticket| self.get(ticket))
    }

    /// Who has to be presented again by its agent, node by node, oldest first.
    pub fn unconfirmed(&self) -> impl Iterator<Item = &Waiting> {
        self.unconfirmed.iter().filter_map(|(node, place)| self.at(node, *place)).map(Arc::as_ref)
    }

    /// Nodes that somebody waits for.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.lines.keys()
    }

    /// Who waits for a node, oldest first.
    pub fn line(&self, node: &NodeName) -> impl Iterator<Item = &Waiting> {
        self.lines.get(node).into_iter().flat_map(|line| line.waiting.values()).map(Arc::as_ref)
    }

    /// How many wait for a node.
    pub fn waiting_for(&self, node: &NodeName) -> usize {
        self.lines.get(node).map_or(0, |line| line.waiting.len())
    }

    /// Everybody who waits.
    pub fn iter(&self) -> impl Iterator<Item = &Waiting> {
        self.lines.values().flat_map(|line| line.waiting.values()).map(Arc::as_ref)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.tickets.len()
    }

    /// True if nobody waits.
    pub fn is_empty(&self) -> bool {
        self.tickets.is_empty()
    }

    /// What the account's waiting requests will need together, and those of one visitor of a guest page.
    pub fn needed(&self, account: &AccountName, cookie: Option<&CookieId>) -> Queued {
        let Some(load) = self.accounts.get(account) else { return Queued::default() };
        let of_cookie = cookie.and_then(|cookie| load.by_cookie.get(cookie));
        Queued { account_ms: load.needed_ms, cookie_ms: of_cookie.copied().unwrap_or_default() }
    }

    /// What the account's waiting requests will take of a token's budget.
    pub fn taken_of_budget(&self, account: &AccountName, root: &str) -> Taken {
        self.accounts.get(account).and_then(|load| load.by_root.get(root)).copied().unwrap_or_default()
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
        let of_node = self.waiting_for(node);
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
mod tests;
