//! The broker: the single writer around the core's ledger.
//!
//! receive -> one [`step`] of the core -> carry out its effects. The actor never waits for I/O: page writes and reads run in
//! tasks whose results come back as commands, messages to nodes go into bounded channels, receipts into a table. It lives
//! for one term; when the term ends it ends, and the process with it (the next start begins a new term).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use spaceport_core::ids::{AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Size, SpaceKey, Steady, Ticket};
use spaceport_core::lease::{Budget, Command, Effect, Event, Moment, Outcome, Request, State, TermEnd, step};
use spaceport_core::protocol::{CallerClass, Denial, UnauthenticatedReason};
use spaceport_crds::names::SPACE_PAGE_PREFIX;
use spaceport_proto::nodelink as proto;
use spaceport_proto::nodelink::broker_message::Message as Outgoing;
use spaceport_proto::nodelink::node_message::Message as Incoming;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::display::{Display, TierShown};
use super::node_messages;
use super::policy;
use super::ports::{ActorParts, Input};
use super::receipt::{LeaseRecord, ReceiptEvent, Receipts};
use super::records::{Records, Report};
use super::seen::{AccountSeen, GrantSeen, PoolSeen, TierSeen};
use super::store::{PageStore, PageTarget, TermBegun, TermError, WriteOutcome};
use super::watches::{StoreEvent, Watched};
use crate::identity::TokenVerifier;
use crate::kubeapi::pause;
use crate::metrics::Metrics;
use crate::node_link::{NodeEvent, Outbound, SessionId};
use crate::{clock, error_chain};

/// The ledger's own clock tick: what only time changes happens within this.
const TICK: Duration = Duration::from_secs(1);
/// Calls that wait for one account to be made on first use; beyond it the Space is told that the broker is busy.
const FIRST_CALLS_MAX: usize = 16;
/// Waits between two tries to read a page whose write has an unknown outcome; the last is repeated until it is read, as
/// quota and place stay taken meanwhile (L2).
const READ_WAITS_MS: [u64; 5] = [0, 50, 200, 1_000, 5_000];

/// Why the term is over.
#[derive(Debug, thiserror::Error)]
pub enum TermOver {
    /// No term could be begun.
    #[error("cannot begin a term")]
    NotBegun(#[source] TermError),
    /// Another leader has written, or a node has seen a higher epoch: a new term has to begin above it (L2, L6).
    #[error("the term is over: {0}")]
    Ended(String),
    /// A task of the actor panicked; what it was to do is unknown.
    #[error("a task of the broker died")]
    TaskDied(#[source] tokio::task::JoinError),
    /// Nothing feeds the actor any more.
    #[error("the broker's input is closed")]
    InputClosed,
}

/// A session of an agent.
struct Session {
    id: SessionId,
    outbound: Outbound,
    agent_instance: String,
    highest_epoch: Epoch,
    /// Last stamp of the node's boot-time clock, echoed by orders (L8).
    boottime_ms: u64,
}

/// What came back from a task.
enum Done {
    Written {
        account: AccountName,
        write_id: String,
        target: PageTarget,
        outcome: WriteOutcome,
    },
    Read {
        account: AccountName,
        found: Option<Box<AccountSeen>>,
    },
    /// The term is ending while it was read.
    NotRead,
    Created {
        account: AccountName,
        created: Result<Box<AccountSeen>, String>,
    },
}

struct Actor {
    state: State,
    begun: Instant,
    store: PageStore,
    receipts: Receipts,
    verifier: TokenVerifier,
    metrics: Metrics,
    clock_skew_max: Duration,
    known: Known,
    targets: BTreeMap<AccountName, PageTarget>,
    /// Calls whose account is being made.
    first_calls: BTreeMap<AccountName, Vec<Request>>,
    records: Records,
    /// What the node said at the end of a lease, for its receipt.
    end_messages: BTreeMap<LeaseId, String>,
    /// Final records that the writer had no room for; offered again at each tick (L10).
    unoffered: Vec<LeaseRecord>,
    tasks: JoinSet<Done>,
    stop: CancellationToken,
}

/// What the watches have shown.
#[derive(Default)]
struct Known {
    accounts: BTreeMap<AccountName, AccountSeen>,
    tiers: BTreeMap<String, TierSeen>,
    pools: BTreeMap<String, PoolSeen>,
    grants: BTreeMap<String, GrantSeen>,
    sessions: BTreeMap<NodeName, Session>,
    /// Which account has an identity... is decided by the gateway; a token names the account.
    clock_off_ms: Option<u64>,
}

/// Runs one term.
///
/// # Errors
/// [`TermOver`]: the process should end, and begin a new term when it leads again.
pub async fn run(parts: ActorParts, stop: CancellationToken) -> Result<(), TermOver> {
    let ActorParts { mut inputs, store, receipts, verifier, metrics, clock_skew_max } = parts;
    let mut known = Known::default();
    let Some(term) = begin(&mut inputs, &store, &mut known, clock_skew_max, &stop).await? else { return Ok(()) };
    info!(epoch = term.epoch.0, accounts = known.accounts.len(), "The term begins");
    metrics.set_epoch(term.epoch.0);
    let pages = known.accounts.values().filter_map(|account| account.page.as_ref().ok());
    let awaited: BTreeSet<NodeName> = pages
        .flat_map(|page| page.holds.iter().map(|hold| hold.node.clone()))
        .chain(known.sessions.keys().cloned())
        .collect();
    let mut actor = Actor {
        state: State::new(term.epoch, awaited),
        begun: clock::monotonic(),
        store,
        receipts,
        verifier,
        metrics,
        clock_skew_max,
        known,
        targets: BTreeMap::new(),
        first_calls: BTreeMap::new(),
        records: Records::default(),
        end_messages: BTreeMap::new(),
        unoffered: Vec::new(),
        tasks: JoinSet::new(),
        stop: stop.clone(),
    };
    actor.take_over();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            input = inputs.recv() => actor.input(input.ok_or(TermOver::InputClosed)?),
            Some(done) = actor.tasks.join_next() => actor.done(done.map_err(TermOver::TaskDied)?),
            _ = tick.tick() => actor.tick(),
        }
        if let Some(end) = actor.state.ended {
            return Err(TermOver::Ended(match end {
                TermEnd::Deposed { by } => format!("a leader of epoch {} has written a page", by.0),
                TermEnd::NodeAhead { epoch } => format!("a node has accepted epoch {}", epoch.0),
            }));
        }
    }
}

/// Waits until everything was listed, begins a term above every epoch seen in pages and hellos, and waits until our own
/// watch shows it: every page written before is in our hands then (L6). None if it is time to stop.
async fn begin(
    inputs: &mut mpsc::Receiver<Input>,
    store: &PageStore,
    known: &mut Known,
    clock_skew_max: Duration,
    stop: &CancellationToken,
) -> Result<Option<TermBegun>, TermOver> {
    let mut unlisted: BTreeSet<Watched> = Watched::ALL.into_iter().collect();
    let mut begun: Option<TermBegun> = None;
    loop {
        let input = tokio::select! {
            () = stop.cancelled() => return Ok(None),
            input = inputs.recv() => input.ok_or(TermOver::InputClosed)?,
        };
        match input {
            Input::Store(StoreEvent::Listed(watched)) => {
                unlisted.remove(&watched);
                if unlisted.is_empty() && begun.is_none() {
                    let term = store.begin_term(known.highest_epoch(), fresh_id).await.map_err(TermOver::NotBegun)?;
                    begun = Some(term);
                }
            }
            Input::Store(StoreEvent::Term(seen)) => match &begun {
                Some(term) if seen.write_id == term.write_id => return Ok(begun),
                // Another replica was faster after us; ours begins anew above it.
                Some(term) if seen.epoch > term.epoch => {
                    let above = known.highest_epoch().max(seen.epoch);
                    begun = Some(store.begin_term(above, fresh_id).await.map_err(TermOver::NotBegun)?);
                }
                _ => {}
            },
            Input::Store(event) => known.store(event, clock_skew_max),
            Input::Node(event) => known.node(event),
            // A writer of receipts that works before the term has nothing of this term to say; the rows are still there.
            Input::Receipt(_) => {}
        }
    }
}

fn fresh_id() -> String {
    spaceport_core::ids::ulid_text(ulid::Ulid::generate().0)
}

// === impl Known ===

impl Known {
    fn highest_epoch(&self) -> Epoch {
        let pages = self.accounts.values().filter_map(|account| account.page.as_ref().ok()).map(|page| page.epoch);
        pages.chain(self.sessions.values().map(|session| session.highest_epoch)).max().unwrap_or_default()
    }

    /// Takes what a watch shows.
    fn store(&mut self, event: StoreEvent, clock_skew_max: Duration) {
        match event {
            StoreEvent::Account(account) => {
                self.accounts.insert(account.name.clone(), *account);
            }
            StoreEvent::AccountGone { name, .. } => {
                self.accounts.remove(&name);
            }
            StoreEvent::Tier(tier) => {
                self.tiers.insert(tier.name.clone(), *tier);
            }
            StoreEvent::TierGone { name } => {
                self.tiers.remove(&name);
            }
            StoreEvent::Pool(pool) => {
                self.pools.insert(pool.name.clone(), *pool);
            }
            StoreEvent::PoolGone { name } => {
                self.pools.remove(&name);
            }
            StoreEvent::Grant(grant) => {
                self.grants.insert(grant.uid.clone(), grant);
            }
            StoreEvent::GrantGone { uid } => {
                self.grants.remove(&uid);
            }
            StoreEvent::Clock(difference) => {
                let off = difference.ahead_ms.unsigned_abs();
                let uncertain = difference.uncertainty_ms.unsigned_abs();
                let limit = u64::try_from(clock_skew_max.as_millis()).unwrap_or(u64::MAX);
                // Only what certainly is too far off stops grants (L20).
                self.clock_off_ms = (off.saturating_sub(uncertain) > limit).then_some(off);
            }
            StoreEvent::Term(_) | StoreEvent::Listed(_) => {}
        }
    }

    /// Takes what happens on the link. True if a session began.
    fn node(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::Connected { session, node, hello, boottime_ms, outbound } => {
                let session = Session {
                    id: session,
                    outbound,
                    agent_instance: hello.agent_instance,
                    highest_epoch: Epoch(hello.highest_epoch),
                    boottime_ms,
                };
                if let Some(old) = self.sessions.insert(node, session) {
                    old.outbound.close();
                }
            }
            NodeEvent::Message { session, node, message } => {
                if let Some(known) = self.sessions.get_mut(&node).filter(|known| known.id == session) {
                    known.boottime_ms = known.boottime_ms.max(message.boottime_ms);
                }
            }
            NodeEvent::Disconnected { session, node } => {
                if self.sessions.get(&node).is_some_and(|known| known.id == session) {
                    self.sessions.remove(&node);
                }
            }
        }
    }

    fn grants_of(&self, account: &AccountName) -> Vec<&GrantSeen> {
        self.grants.values().filter(|grant| grant.account == *account).collect()
    }
}

// === impl Actor ===

impl Actor {
    /// The first commands of the term: pages, pools and the sessions that wait.
    fn take_over(&mut self) {
        self.command(Command::ClockJudged { off_ms: self.known.clock_off_ms });
        for account in self.known.accounts.keys().cloned().collect::<Vec<_>>() {
            self.account_seen(&account);
        }
        for node in self.known.sessions.keys().cloned().collect::<Vec<_>>() {
            self.welcome(&node);
        }
    }

    fn moment(&self) -> Moment {
        let steady = clock::monotonic().saturating_duration_since(self.begun).as_millis();
        Moment {
            wall: LedgerTime(clock::wall().as_millisecond()),
            steady: Steady(u64::try_from(steady).unwrap_or(u64::MAX)),
        }
    }

    fn command(&mut self, command: Command) {
        let at = self.moment();
        let outcome = step(&mut self.state, at, IdSeed(ulid::Ulid::generate().0), command);
        self.carry_out(at, outcome);
    }

    fn carry_out(&mut self, at: Moment, outcome: Outcome) {
        let Outcome { events, effects, violations } = outcome;
        for violation in violations {
            error!(%violation, "An event did not fit the ledger; nothing was granted or charged by it");
        }
        for event in &events {
            self.note(at, event);
        }
        for effect in effects {
            self.effect(effect);
        }
    }

    /// What events mean for receipts and metrics.
    fn note(&mut self, at: Moment, event: &Event) {
        match event {
            Event::Reserved { lease, waiting, .. } => {
                let generation =
                    self.state.accounts.get(&waiting.account).map_or(0, |found| found.policy.allowance.generation);
                self.records.reserved(lease, waiting, self.state.epoch, generation);
            }
            Event::Unreserved { lease } => {
                self.records.unreserved(lease);
                self.receipts.drop_unwritten(lease);
            }
            Event::Ordered { lease, .. } => {
                let Some(account) = self.records.account(lease).cloned() else { return };
                let Some(found) = self.state.accounts.get(&account) else { return };
                if let Some(record) = self.records.held(&account, lease, &found.durable, at.wall) {
                    self.receipt(record);
                }
            }
            Event::Adopted { lease, account: Some(account), .. } => {
                let Some(found) = self.state.accounts.get(account) else { return };
                if let Some(hold) = found.durable.holds.iter().find(|hold| hold.lease == *lease) {
                    let since = hold.since;
                    if let Some(record) = self.records.held(account, lease, &found.durable, since) {
                        self.receipt(record);
                    }
                }
            }
            Event::Denied { denial, .. } => self.metrics.denied(denial.kind()),
            _ => {}
        }
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Write { account, page } => self.write(account, *page),
            Effect::Read { account } => self.read(account),
            Effect::Receipt { account, closed } => {
                self.metrics.lease_ended(super::convert::outcome_reason(closed.ending).as_str());
                let message = self.end_messages.remove(&closed.hold.lease).unwrap_or_default();
                let record = self.records.settled(&account, &closed, message);
                self.receipt(record);
            }
            Effect::Start(order) => {
                let node = order.node.clone();
                self.send(&node, |session| node_messages::start(&order, session.boottime_ms));
            }
            Effect::Cancel { node, lease, reason } => {
                let (epoch, ttl) = (self.state.epoch, self.state.settings(&node).order_ttl_ms);
                self.send(&node, |session| node_messages::cancel(epoch, &lease, reason, session.boottime_ms, ttl));
            }
            Effect::Acknowledge { node, lease, ended, freed } => {
                self.send(&node, |_| node_messages::acknowledged(&lease, ended, freed));
            }
            Effect::Deny { ticket, node, caller, denial } => self.deny(&ticket, &node, caller, &denial),
            Effect::Queue(place) => {
                let instance = place.ticket.agent_instance.clone();
                self.send_to_instance(&place.node.clone(), &instance, |_| node_messages::queued(&place));
            }
            // The loop looks at the state.
            Effect::EndTerm(_) => {}
        }
    }

    fn deny(&mut self, ticket: &Ticket, node: &NodeName, caller: CallerClass, denial: &Denial) {
        match node_messages::denied(ticket.number, denial, caller) {
            Ok(message) => self.send_to_instance(node, &ticket.agent_instance, |_| message),
            Err(problem) => error!(%problem, "A denial cannot be written"),
        }
    }

    /// Messages to nodes without a session are dropped: what they said is derived again when the node rejoins.
    fn send(&self, node: &NodeName, message: impl FnOnce(&Session) -> Outgoing) {
        let Some(session) = self.known.sessions.get(node) else { return };
        if session.outbound.send(message(session)).is_err() {
            debug!(%node, "The agent's session is over; it connects anew");
        }
    }

    /// The same for answers to requests, which mean nothing to another start of the agent (L15).
    fn send_to_instance(&self, node: &NodeName, instance: &str, message: impl FnOnce(&Session) -> Outgoing) {
        if self.known.sessions.get(node).is_some_and(|session| session.agent_instance == instance) {
            self.send(node, message);
        }
    }

    fn receipt(&mut self, record: LeaseRecord) {
        let live = record.node.as_ref().is_none_or(|node| policy::receipts_live(node, &self.known.pools));
        let ended = record.end.is_some();
        if self.receipts.record(record.clone(), live).is_err() && ended {
            self.unoffered.push(record);
        }
    }

    // Pages.

    fn write(&mut self, account: AccountName, page: spaceport_core::page::Page) {
        let Some(target) = self.targets.get(&account).cloned() else {
            error!(%account, "A page without a known revision is to be written; it is read first");
            self.command(Command::PageConflict { account, write_id: page.write_id });
            return;
        };
        let tier = self.state.accounts.get(&account).filter(|found| !found.policy.tier.is_empty());
        let tier =
            tier.map(|found| TierShown { name: found.policy.tier.clone(), allowance: found.policy.allowance.clone() });
        let display = Display::of(&page, tier.as_ref());
        let store = self.store.clone();
        self.tasks.spawn(async move {
            let outcome = store.write(&target, &page, display).await;
            Done::Written { account, write_id: page.write_id, target, outcome }
        });
    }

    fn read(&mut self, account: AccountName) {
        let (store, stop) = (self.store.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            let mut tries = 0;
            loop {
                let wait = READ_WAITS_MS.get(tries).or(READ_WAITS_MS.last()).copied().unwrap_or_default();
                if !pause(Duration::from_millis(wait), &stop).await {
                    return Done::NotRead;
                }
                match store.read(&account).await {
                    Ok(found) => return Done::Read { account, found: found.map(Box::new) },
                    Err(error) => {
                        warn!(%account, error = %error_chain(&error), "A page cannot be read; it is tried again")
                    }
                }
                tries = (tries + 1).min(READ_WAITS_MS.len());
            }
        });
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Written { account, write_id, target, outcome } => self.written(account, write_id, target, outcome),
            Done::Read { account, found: Some(seen) } => {
                self.targets.insert(account.clone(), PageTarget::of(&seen));
                match seen.page.clone() {
                    Ok(page) => self.command(Command::PageRead { account, page: Box::new(page) }),
                    // Closed until an admin has repaired it; the watch brings the repaired page.
                    Err(problem) => error!(%account, error = %error_chain(&problem), "A page cannot be used"),
                }
            }
            Done::Read { account, found: None } => self.account_gone(account),
            Done::NotRead => {}
            Done::Created { account, created } => self.created(account, created),
        }
    }

    fn written(&mut self, account: AccountName, write_id: String, target: PageTarget, outcome: WriteOutcome) {
        match outcome {
            WriteOutcome::Written { resource_version } => {
                self.targets.insert(account.clone(), PageTarget { resource_version, ..target });
                self.command(Command::PageWritten { account, write_id });
            }
            WriteOutcome::Conflict => self.command(Command::PageConflict { account, write_id }),
            WriteOutcome::Gone => self.account_gone(account),
            WriteOutcome::Refused { reason } => {
                error!(%account, reason, "A page write was refused");
                self.command(Command::PageFailed { account, write_id });
            }
            WriteOutcome::Unknown { reason } => {
                warn!(%account, reason, "Nobody knows whether a page was written; quota and place stay taken");
                self.command(Command::PageUnknown { account, write_id });
            }
        }
    }

    fn account_gone(&mut self, account: AccountName) {
        self.known.accounts.remove(&account);
        self.targets.remove(&account);
        self.command(Command::AccountGone { account });
    }

    /// An account as its watch shows it.
    fn account_seen(&mut self, name: &AccountName) {
        let Some(seen) = self.known.accounts.get(name) else { return };
        let tier = policy::tier_of(seen, &self.known.tiers);
        if tier.is_none() {
            warn!(account = %name, tier = seen.tier.as_deref().unwrap_or("(by rule)"), "The account has no tier: nothing is granted to it");
        }
        let policy = policy::policy_of(seen, tier, &self.known.grants_of(name));
        // A malformed page closes the account: it is not in the ledger, and was reported by the watch.
        let Ok(page) = seen.page.clone() else { return };
        // An older event must not bring an older revision back; one of the same seq may carry a newer spec (L2).
        let newest = self.state.accounts.get(name).map_or(0, |found| found.durable.seq);
        if page.seq >= newest {
            self.targets.insert(name.clone(), PageTarget::of(seen));
        }
        self.command(Command::AccountSeen { account: name.clone(), page: Box::new(page), policy });
        for request in self.first_calls.remove(name).unwrap_or_default() {
            self.command(Command::Request(Box::new(request)));
        }
    }

    fn created(&mut self, account: AccountName, created: Result<Box<AccountSeen>, String>) {
        match created {
            Ok(seen) => {
                // The watch may have been faster, with a newer state.
                self.known.accounts.entry(account.clone()).or_insert(*seen);
                self.account_seen(&account);
            }
            Err(reason) => {
                warn!(%account, reason, "An account cannot be made");
                for request in self.first_calls.remove(&account).unwrap_or_default() {
                    self.deny(&request.ticket, &request.node, CallerClass::Guest, &Denial::BrokerUnavailable);
                }
            }
        }
    }

    // Input.

    fn input(&mut self, input: Input) {
        match input {
            Input::Store(event) => self.store_event(event),
            Input::Node(event) => self.node_event(event),
            Input::Receipt(ReceiptEvent::Written { account, lease }) => {
                self.command(Command::ReceiptWritten { account, lease });
            }
        }
    }

    fn store_event(&mut self, event: StoreEvent) {
        let changed = match &event {
            StoreEvent::Account(account) => vec![account.name.clone()],
            StoreEvent::Grant(grant) => vec![grant.account.clone()],
            StoreEvent::GrantGone { uid } => {
                self.known.grants.get(uid).map(|grant| grant.account.clone()).into_iter().collect()
            }
            StoreEvent::Tier(_) | StoreEvent::TierGone { .. } => self.known.accounts.keys().cloned().collect(),
            StoreEvent::AccountGone { name, .. } => {
                self.account_gone(name.clone());
                return;
            }
            _ => Vec::new(),
        };
        let pools = matches!(event, StoreEvent::Pool(_) | StoreEvent::PoolGone { .. });
        let clock = matches!(event, StoreEvent::Clock(_));
        self.known.store(event, self.clock_skew_max);
        for account in changed {
            self.account_seen(&account);
        }
        if pools {
            for node in self.known.sessions.keys().cloned().collect::<Vec<_>>() {
                self.configure(&node);
            }
        }
        if clock && self.state.clock_off_ms != self.known.clock_off_ms {
            if let Some(off_ms) = self.known.clock_off_ms {
                error!(off_ms, "ClockSkew: our clock is too far from the API server's; nothing is granted");
            }
            self.command(Command::ClockJudged { off_ms: self.known.clock_off_ms });
        }
    }

    fn configure(&mut self, node: &NodeName) {
        let settings = policy::settings_of(node, &self.known.pools);
        self.command(Command::NodeSettings { node: node.clone(), settings });
    }

    fn welcome(&mut self, node: &NodeName) {
        let Some(session) = self.known.sessions.get(node) else { return };
        let (agent_instance, highest_epoch) = (session.agent_instance.clone(), session.highest_epoch);
        self.configure(node);
        self.command(Command::NodeHello { node: node.clone(), agent_instance, highest_epoch });
        if self.state.ended.is_none() {
            self.send(node, |_| Outgoing::Welcome(proto::Welcome { epoch: self.state.epoch.0 }));
        }
    }

    fn node_event(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::Connected { ref node, .. } => {
                let node = node.clone();
                if self.known.sessions.contains_key(&node) {
                    self.command(Command::NodeDisconnected { node: node.clone() });
                }
                self.known.node(event);
                info!(%node, "An agent is here");
                self.welcome(&node);
            }
            NodeEvent::Disconnected { session, ref node } => {
                let current = self.known.sessions.get(node).is_some_and(|known| known.id == session);
                let node = node.clone();
                self.known.node(event);
                if current {
                    warn!(%node, "An agent's session is over; its leases run on");
                    self.command(Command::NodeDisconnected { node });
                }
            }
            NodeEvent::Message { session, ref node, ref message } => {
                if self.known.sessions.get(node).is_none_or(|known| known.id != session) {
                    return;
                }
                let (node, message) = (node.clone(), message.clone());
                self.known.node(event);
                if let Some(message) = message.message {
                    self.message(&node, message);
                }
            }
        }
        self.metrics.set_nodes_connected(self.known.sessions.len());
    }

    fn message(&mut self, node: &NodeName, message: Incoming) {
        match message {
            Incoming::Request(request) => self.request(node, request),
            Incoming::Dequeue(dequeue) => {
                if let Some(ticket) = self.ticket(node, dequeue.ticket) {
                    self.first_calls.values_mut().for_each(|calls| calls.retain(|call| call.ticket != ticket));
                    self.command(Command::Dequeue { ticket });
                }
            }
            report => {
                self.report(&report);
                match node_messages::command(node, &report) {
                    Ok(Some(command)) => self.command(command),
                    Ok(None) => {}
                    Err(nonsense) => {
                        error!(%node, %nonsense, "An agent speaks nonsense; its session is ended");
                        if let Some(session) = self.known.sessions.get(node) {
                            session.outbound.close();
                        }
                    }
                }
            }
        }
    }

    fn ticket(&self, node: &NodeName, number: u64) -> Option<Ticket> {
        let session = self.known.sessions.get(node)?;
        Some(Ticket { agent_instance: session.agent_instance.clone(), number })
    }

    /// Evidence of a report, for the receipt; before its command, so that the end of a lease has all its boundaries.
    fn report(&mut self, message: &Incoming) {
        let (lease, boundaries, report) = match message {
            Incoming::Started(started) => {
                let card = (!started.waiting).then_some(started.card);
                (&started.lease, &started.boundaries, Report::Started { card, isolation: started.isolation.clone() })
            }
            Incoming::Running(running) => (&running.lease, &running.boundaries, Report::Running),
            Incoming::Ended(ended) => {
                if !ended.message.is_empty() && self.records.account(&LeaseId::new(&ended.lease)).is_some() {
                    self.end_messages.insert(LeaseId::new(&ended.lease), ended.message.clone());
                }
                (&ended.lease, &ended.boundaries, Report::Over)
            }
            Incoming::Freed(freed) => (&freed.lease, &freed.boundaries, Report::Over),
            _ => return,
        };
        let now = LedgerTime(clock::wall().as_millisecond());
        if let Some(record) = self.records.report(&LeaseId::new(lease), boundaries, now, report) {
            self.receipt(record);
        }
    }

    fn request(&mut self, node: &NodeName, request: proto::Request) {
        let Some(ticket) = self.ticket(node, request.ticket) else { return };
        let size = node_messages::size(request.size()).unwrap_or(Size::Large);
        let Some(pod) = request.pod else {
            self.deny(&ticket, node, CallerClass::Guest, &Denial::PlatformFault);
            return;
        };
        let space = SpaceKey { namespace: pod.namespace, name: pod.space, uid: pod.space_uid };
        let (caller, budget) = self.caller(&request.token, &space);
        let request =
            Request { ticket, node: node.clone(), space, size, declared_ms: request.declared_ms, caller, budget };
        match &request.caller {
            // The Space's own account is made with its first call (L4); a token's account has to exist.
            Ok(account) if request.budget.is_none() && !self.state.accounts.contains_key(account) => {
                self.first_call(account.clone(), request);
            }
            _ => self.command(Command::Request(Box::new(request))),
        }
    }

    fn caller(&self, token: &str, space: &SpaceKey) -> (Result<AccountName, UnauthenticatedReason>, Option<Budget>) {
        if token.is_empty() {
            return (Ok(AccountName::new(format!("{SPACE_PAGE_PREFIX}{}", space.uid))), None);
        }
        match self.verifier.verify(token, &space.uid, clock::wall()) {
            Ok(caller) => {
                let budget = Budget {
                    root: caller.root_jti,
                    max_ms: caller.max_ms,
                    max_calls: caller.max_calls,
                    expires: LedgerTime(caller.expires.as_millisecond()),
                };
                (Ok(caller.account), Some(budget))
            }
            Err(reason) => (Err(reason), None),
        }
    }

    fn first_call(&mut self, account: AccountName, request: Request) {
        if let Some(calls) = self.first_calls.get_mut(&account) {
            if calls.len() < FIRST_CALLS_MAX {
                calls.push(request);
            } else {
                self.deny(&request.ticket, &request.node, CallerClass::Guest, &Denial::BrokerUnavailable);
            }
            return;
        }
        self.first_calls.insert(account.clone(), vec![request]);
        let store = self.store.clone();
        self.tasks.spawn(async move {
            let created = store.create(&account, None, Vec::new()).await;
            Done::Created { account, created: created.map(Box::new).map_err(|error| error_chain(&error)) }
        });
    }

    fn tick(&mut self) {
        self.command(Command::Tick);
        for record in std::mem::take(&mut self.unoffered) {
            self.receipt(record);
        }
        for node in self.state.nodes.keys() {
            self.metrics.set_queued(node.as_str(), self.state.queue.line(node).count());
        }
    }
}
