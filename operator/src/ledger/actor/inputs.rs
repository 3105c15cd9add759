//! What reaches the broker: from the watches, from agents, from tasks that looked for an account.

use std::collections::BTreeMap;
use std::sync::Arc;

use spaceport_core::ids::{AccountName, CookieId, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Ticket};
use spaceport_core::lease::{Command, NodeSettings, Request};
use spaceport_core::page::Budget;
use spaceport_core::protocol::{CallerClass, Denial, UnauthenticatedReason};
use spaceport_crds::WaitReason;
use spaceport_proto::nodelink as proto;
use spaceport_proto::nodelink::broker_message::Message as Outgoing;
use spaceport_proto::nodelink::node_message::Message as Incoming;
use spaceport_shell::error_chain;
use tracing::{error, info, warn};

use super::{Actor, FINDINGS_PERIOD, FINDINGS_PERIOD_BY_WORK};
use crate::clock;
use crate::fault::Place;
use crate::ledger::convert::wait_reason;
use crate::ledger::findings::Findings;
use crate::ledger::node_messages;
use crate::ledger::pages::{self, Pages, Wanted};
use crate::ledger::policy;
use crate::ledger::ports::Input;
use crate::ledger::receipt::ReceiptEvent;
use crate::ledger::records::Report;
use crate::ledger::seen::{AccountSeen, SpaceSeen};
use crate::ledger::watches::StoreEvent;
use crate::node_link::{BELIEVED_MAX, NodeEvent};

/// Calls that wait for one account to be made or found; beyond it the Space is told that the broker is busy.
const FIRST_CALLS_MAX: usize = 16;
/// Accounts that are being made or looked for at once; each is a call of the API server.
const FIRST_ACCOUNTS_MAX: usize = 256;

/// Pages written a tick because of a condition alone: 32 a second are far below what an etcd writes, and far above what
/// admins change by hand.
const SHOWN_PER_TICK: usize = 16;

/// Requests looked at a tick for where they stand: thousands within the 10 s after which it is looked again, and less than a
/// millisecond of the broker's time.
const LOOKS_PER_TICK: usize = 256;

/// Who pays for a call.
struct Paying {
    caller: Result<AccountName, UnauthenticatedReason>,
    cookie: Option<CookieId>,
    budget: Option<Budget>,
}

impl<P: Pages> Actor<P> {
    pub(super) fn input(&mut self, input: Input) {
        match input {
            Input::Store(event) => self.store_event(event),
            Input::Node(event) => self.node_event(event),
            Input::Receipt(ReceiptEvent::Written { account, lease }) => {
                Place::ReceiptWritten.reached();
                self.command(Command::ReceiptWritten { account, lease });
            }
        }
    }

    pub(super) fn tick(&mut self) {
        self.command(Command::Tick);
        for record in std::mem::take(&mut self.unoffered) {
            self.receipt(record);
        }
        self.show_conditions();
        self.tell_findings();
        self.look_who_waits();
        let leases = &self.state.leases;
        self.records.keep(|lease| leases.contains_key(lease));
        self.end_messages.retain(|lease, _| leases.contains_key(lease));
        let without_pool = self.state.nodes.keys().filter(|node| self.known.pool(node).is_err()).count();
        self.metrics.set_nodes_without_pool(without_pool);
        self.metrics.set_leases_in_doubt(self.state.strangers.len());
        self.metrics.set_open_leases(self.state.leases.len());
        self.metrics.set_shown(self.known.unlisted.is_empty(), self.known.accounts.len());
        self.count_who_waits();
    }

    /// Asks for page writes where only a condition has changed. A few a tick: when a tier goes, the pages of all its
    /// accounts are out of date, and their writes must not stand before those of grants.
    fn show_conditions(&mut self) {
        // What pages show has times in it (L20), and it can wait until the clock is right.
        if self.state.clock_off_ms.is_some() {
            return;
        }
        let is_written_soon = |account: &&AccountName| {
            // That write shows it too; if it fails, the next tick looks again. What only waits for company goes with ours.
            self.state.accounts.get(*account).is_some_and(|found| found.is_written_soon())
        };
        let accounts = self.out_of_date.iter().filter(|account| !is_written_soon(account));
        for account in accounts.take(SHOWN_PER_TICK).cloned().collect::<Vec<_>>() {
            // Once: the watch shows what the write made of it.
            self.out_of_date.remove(&account);
            let wrong = self.known.accounts.get(&account).is_some_and(|seen| {
                let policy = self.known.policy(seen);
                self.shows_wrong(seen, &policy)
            });
            if wrong {
                self.command(Command::Show { account });
            }
        }
    }

    /// Leaves what became of tiers, grants and pools to who writes it on them, where that is due. Whether a grant has ended
    /// can wait until the clock is right (L20).
    fn tell_findings(&mut self) {
        let begun = clock::monotonic();
        if self.findings_due > begun || self.state.clock_off_ms.is_some() {
            return;
        }
        let found = Findings::of(&self.state, &self.known, LedgerTime(clock::wall().as_millisecond()));
        self.findings.send_replace(Some(Arc::new(found)));
        let ended = clock::monotonic();
        let work = ended.saturating_duration_since(begun);
        self.findings_due = ended + FINDINGS_PERIOD.max(work.saturating_mul(FINDINGS_PERIOD_BY_WORK));
    }

    fn count_who_waits(&self) {
        for node in self.state.nodes.keys() {
            // As many as the bound of the node's queue.
            let mut counts = WaitReason::ALL.iter().map(|reason| (*reason, 0)).collect::<BTreeMap<_, usize>>();
            for waiting in self.state.queue.line(node) {
                *counts.entry(wait_reason(waiting.waits_for)).or_default() += 1;
            }
            for (reason, count) in counts {
                self.metrics.set_queued(node.as_str(), reason.as_str(), count);
            }
        }
    }

    /// Notes for receipts where those who wait stand now.
    fn look_who_waits(&mut self) {
        let at = self.moment();
        for ticket in self.records.looks_due(at.steady, LOOKS_PER_TICK) {
            let place = self.state.standing(&ticket, at.steady);
            if let Some(record) = place.and_then(|place| self.records.stands(&place, at.wall)) {
                self.receipt(record);
            }
        }
    }

    // === watches ===

    fn store_event(&mut self, event: StoreEvent) {
        if self.known.is_old_news(&event) {
            return;
        }
        match event {
            StoreEvent::AccountGone { name, uid } => return self.object_gone(name, &uid),
            StoreEvent::Account(seen) if self.is_another(&seen) => return self.read(seen.name, Wanted::Object),
            _ => {}
        }
        let concerned = self.known.concerned(&event);
        let pools = matches!(event, StoreEvent::Pool(_) | StoreEvent::PoolGone { .. });
        let moved = self.known.moved(&event);
        let space = match &event {
            StoreEvent::Space(SpaceSeen { uid, .. }) | StoreEvent::SpaceGone { uid } => Some(uid.clone()),
            _ => None,
        };
        self.known.store(event);
        if let Some(space) = space {
            let settings = self.known.spaces.get(&space).copied().unwrap_or_default();
            self.command(Command::SpaceSettings { space, settings });
        }
        for account in concerned {
            self.account_seen(&account);
        }
        // Every node of this term, with or without a session: requests keep their place while an agent is away. Leases that
        // are ordered keep the limits of their order.
        let is_concerned = |node: &&NodeName| pools || moved.as_ref() == Some(*node);
        for node in self.state.nodes.keys().filter(is_concerned).cloned().collect::<Vec<_>>() {
            self.configure(&node);
        }
        if self.state.clock_off_ms != self.known.clock_off_ms {
            if let Some(off_ms) = self.known.clock_off_ms {
                error!(off_ms, "ClockSkew: our clock is too far from the API server's; nothing is granted");
            }
            self.command(Command::ClockJudged { off_ms: self.known.clock_off_ms });
        }
    }

    /// Times, weights and bounds of the node's pool, or the defaults.
    pub(super) fn configure(&mut self, node: &NodeName) {
        let settings = match self.known.pool(node) {
            Ok(pool) => policy::settings_of(pool),
            Err(problem) => {
                warn!(%node, %problem, "The pool of a node is not known; the defaults apply to it");
                NodeSettings::default()
            }
        };
        self.command(Command::NodeSettings { node: node.clone(), settings });
    }

    // === agents ===

    /// Greets an agent: from its answer on its slots exist in this term (L7).
    pub(super) fn welcome(&mut self, node: &NodeName) {
        let Some(session) = self.known.sessions.get(node) else { return };
        let (agent_instance, highest_epoch) = (session.agent_instance.clone(), session.highest_epoch);
        if highest_epoch > self.state.epoch.max(BELIEVED_MAX) {
            let (said, ours) = (highest_epoch.0, self.state.epoch.0);
            error!(%node, said, ours, "A node says that it has accepted a term that cannot have been; its session is ended");
            self.metrics.session_refused("EpochTooHigh");
            session.outbound.close();
            return;
        }
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
                let current = self.known.is_current(node, session);
                let node = node.clone();
                self.known.node(event);
                if current {
                    warn!(%node, "An agent's session is over; its leases run on");
                    self.command(Command::NodeDisconnected { node });
                }
            }
            NodeEvent::Message { session, ref node, ref message } => {
                if !self.known.is_current(node, session) {
                    return;
                }
                let (node, message) = (node.clone(), message.message.clone());
                self.known.node(event);
                if let Some(message) = message {
                    self.message(&node, message);
                }
            }
        }
        self.metrics.set_nodes_connected(self.known.sessions.len());
    }

    fn message(&mut self, node: &NodeName, message: Incoming) {
        match message {
            Incoming::Request(request) => {
                Place::RequestReceived.reached();
                self.request(node, request);
            }
            Incoming::Dequeue(dequeue) => {
                if let Some(ticket) = self.known.ticket(node, dequeue.ticket) {
                    for calls in self.first_calls.values_mut() {
                        calls.retain(|call| call.ticket != ticket);
                    }
                    self.command(Command::Dequeue { ticket });
                }
            }
            report => {
                self.note_report(node, &report);
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

    /// Evidence of a report, for the receipt; before its command, so that the end of a lease has all its boundaries.
    fn note_report(&mut self, node: &NodeName, message: &Incoming) {
        let (lease, boundaries, report) = match message {
            Incoming::Joined(joined) => return self.note_joined(node, joined),
            Incoming::Started(started) => {
                let card = (!started.waiting).then(|| self.known.given_card(node, started.card));
                (&started.lease, &started.boundaries, Report::Started { card, isolation: started.isolation.clone() })
            }
            Incoming::Running(running) => (&running.lease, &running.boundaries, Report::Running),
            Incoming::Ended(ended) => {
                Place::EndReceived.reached();
                let lease = LeaseId::new(&ended.lease);
                if !ended.message.is_empty() && self.state.leases.contains_key(&lease) {
                    self.end_messages.insert(lease, ended.message.clone());
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

    /// Cards of leases that run since before this term.
    fn note_joined(&mut self, node: &NodeName, joined: &proto::Joined) {
        let now = LedgerTime(clock::wall().as_millisecond());
        // The card of one that waits for its slot is not known, and what has ended is told again by its own reports.
        for lease in joined.leases.iter().filter(|lease| lease.phase() == proto::LeasePhase::Running) {
            let card = Some(self.known.given_card(node, lease.card));
            let report = Report::Started { card, isolation: String::new() };
            if let Some(record) = self.records.report(&LeaseId::new(&lease.lease), &[], now, report) {
                self.receipt(record);
            }
        }
    }

    // === requests ===

    fn request(&mut self, node: &NodeName, request: proto::Request) {
        let Some(ticket) = self.known.ticket(node, request.ticket) else { return };
        // Where the decorator names no size it is `large`.
        let size = node_messages::size(request.size()).unwrap_or(Size::Large);
        let presented = node_messages::presented(&request);
        let Some(pod) = request.pod else {
            error!(%node, "A request without its pod");
            self.deny(&ticket, node, CallerClass::Guest, &Denial::PlatformFault);
            return;
        };
        let worker = node_messages::worker(&pod, request.task_id);
        let (revision, space) = (Revision(pod.revision), SpaceKey::new(pod.namespace, pod.space, pod.space_uid));
        let Paying { caller, cookie, budget } = self.caller(&request.token, &space);
        let declared_ms = request.declared_ms;
        let request = Request {
            ticket,
            node: node.clone(),
            space,
            revision,
            worker,
            size,
            declared_ms,
            caller,
            cookie,
            budget,
            presented,
        };
        match &request.caller {
            Ok(account) if !self.state.accounts.contains_key(account) => self.first_call(account.clone(), request),
            _ => self.command(Command::Request(Box::new(request))),
        }
    }

    /// Who pays: the token's account, or without a token the Space's own.
    fn caller(&self, token: &str, space: &SpaceKey) -> Paying {
        if token.is_empty() {
            return Paying { caller: Ok(AccountName::of_space(&space.uid)), cookie: None, budget: None };
        }
        match self.verifier.verify(token, &space.uid, clock::wall()) {
            Ok(caller) => {
                let budget = Budget {
                    root: caller.root_jti,
                    max_ms: caller.max_ms,
                    max_calls: caller.max_calls,
                    expires: LedgerTime(caller.expires.as_millisecond()),
                };
                Paying { caller: Ok(caller.account), cookie: caller.cookie, budget: Some(budget) }
            }
            Err(reason) => Paying { caller: Err(reason), cookie: None, budget: None },
        }
    }

    /// A call whose account is not known here. The Space's own and guest pages are made with their first call (L4); that of
    /// a user's token was made by whoever minted it, and may be newer than what our watch has shown.
    fn first_call(&mut self, account: AccountName, request: Request) {
        let full = self.first_calls.len() >= FIRST_ACCOUNTS_MAX;
        match self.first_calls.get_mut(&account) {
            Some(calls) if calls.len() < FIRST_CALLS_MAX => calls.push(request),
            None if !full => {
                let make = request.budget.is_none() || request.cookie.is_some();
                self.first_calls.insert(account.clone(), vec![request]);
                self.tasks.spawn(pages::first_see(self.store.clone(), account, make));
            }
            _ => self.refuse(&request.ticket, &request.node, Denial::BrokerUnavailable),
        }
    }

    /// A call that the ledger never saw.
    fn refuse(&self, ticket: &Ticket, node: &NodeName, denial: Denial) {
        self.metrics.denied(denial.kind());
        self.deny(ticket, node, CallerClass::Guest, &denial);
    }

    pub(super) fn first_seen(&mut self, account: AccountName, found: Result<Option<Box<AccountSeen>>, String>) {
        let calls = self.first_calls.remove(&account).unwrap_or_default();
        match found {
            Err(reason) => {
                warn!(%account, reason, "An account can neither be made nor looked for");
                for call in calls {
                    self.refuse(&call.ticket, &call.node, Denial::BrokerUnavailable);
                }
                return;
            }
            Ok(Some(seen)) if !self.state.accounts.contains_key(&account) => {
                let unusable = seen.page.as_ref().err().map(|error| error_chain(error));
                self.known.take_account(*seen);
                if let Some(reason) = unusable {
                    // It is there, and so is its caller: none stands in for it.
                    warn!(%account, reason, "Calls of an account are refused: its page cannot be used");
                    for call in calls {
                        self.refuse(&call.ticket, &call.node, Denial::AccountUnusable);
                    }
                    return;
                }
                self.account_seen(&account);
            }
            // The watch was faster; or there is none, which is for the ledger to say.
            Ok(_) => {}
        }
        for call in calls {
            self.command(Command::Request(Box::new(call)));
        }
    }
}
