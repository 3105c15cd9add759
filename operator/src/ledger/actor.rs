//! The broker: the single writer around the core's ledger.
//!
//! receive -> one [`step`] of the core -> carry out its effects. The actor never waits for I/O: page writes and reads run in
//! tasks whose results come back as commands, messages to nodes go into bounded channels, receipts into a table. An
//! [`Actor`] lives for one term. A node that has seen a later one makes us begin another above it; another leader ends us.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::OptionFuture;
use spaceport_core::ids::{AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Steady, Ticket};
use spaceport_core::lease::{
    Command, Departure, Effect, Event, Moment, Outcome, PageChange, Policy, Request, State, TermEnd, step,
};
use spaceport_core::page::{Ending, Page};
use spaceport_core::protocol::{CallerClass, Denial, human_message};
use spaceport_proto::nodelink::broker_message::Message as Outgoing;
use spaceport_shell::error_chain;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::display::{Display, TierShown};
use super::durations::Durations;
use super::findings::Findings;
use super::known::{Known, Session};
use super::pages::{self, Done, Pages, Wanted};
use super::ports::{ActorParts, Input};
use super::receipt::{LeaseRecord, Receipts};
use super::records::{Records, Unserved};
use super::seen::{AccountSeen, TermSeen};
use super::store::{PageTarget, TermBegun, TermError};
use super::watches::StoreEvent;
use super::{convert, node_messages};
use crate::account::status::{conditions, is_shown, ready};
use crate::clock;
use crate::fault::{self, Place};
use crate::identity::TokenVerifier;
use crate::metrics::Metrics;

mod inputs;
mod objects;
#[cfg(test)]
mod tests;

/// The ledger's own clock tick: what only time changes happens within this.
const TICK: Duration = Duration::from_millis(500);
/// How often it is told what became of tiers, grants and pools, and how long after the beginning of a term for the first
/// time: by then the nodes are back. A person who has just written one does not wait for long, and hundreds of leases
/// are one change of what is shown.
const FINDINGS_PERIOD: Duration = Duration::from_secs(5);
/// The same, as a multiple of the time that it took to find out: a few milliseconds for 100 000 accounts. However many
/// there are, decisions have the rest.
const FINDINGS_PERIOD_BY_WORK: u32 = 1000;
/// Between two tries to begin a term: a few requests a second are nothing even to an API server that comes back.
const TERM_PAUSE: Duration = Duration::from_secs(1);

/// Why the broker ended.
#[derive(Debug, thiserror::Error)]
pub enum TermOver {
    /// No term can be begun before an admin has done something.
    #[error("cannot begin a term")]
    NotBegun(#[source] TermError),
    /// Another leader has begun a term or written a page (L2, L6).
    #[error("deposed by a leader of epoch {}", .by.0)]
    Deposed {
        /// Its epoch.
        by: Epoch,
    },
    /// A task of the actor panicked; what it was to do is unknown.
    #[error("a task of the broker died")]
    TaskDied(#[source] tokio::task::JoinError),
    /// Nothing feeds the actor any more.
    #[error("the broker's input is closed")]
    InputClosed,
}

/// One term.
struct Actor<P> {
    state: State,
    begun: Instant,
    store: P,
    receipts: Receipts,
    verifier: TokenVerifier,
    metrics: Metrics,
    durations: Durations,
    findings: watch::Sender<Option<Arc<Findings>>>,
    /// When it is told next what was found.
    findings_due: Instant,
    known: Known,
    targets: BTreeMap<AccountName, PageTarget>,
    /// Reads under way. Bounded by the accounts, and by the leases that nodes have.
    reading: BTreeSet<(AccountName, Wanted)>,
    /// Calls whose account is being made or looked for.
    first_calls: BTreeMap<AccountName, Vec<Request>>,
    records: Records,
    /// Accounts whose condition `Ready` is out of date. Bounded by the number of accounts; a few leave with each tick.
    out_of_date: BTreeSet<AccountName>,
    /// What the node said at the end of a lease, for its receipt.
    end_messages: BTreeMap<LeaseId, String>,
    /// Final records that the writer had no room for; offered again at each tick (L10).
    unoffered: Vec<LeaseRecord>,
    /// Writes and reads; they end with the term, and what was under way then has an unknown outcome.
    tasks: JoinSet<Done>,
    stop: CancellationToken,
}

/// How a term of ours ended.
enum Over {
    /// It is time to stop.
    Stopped,
    /// The election took the lease from us; we stand by, and may lead again.
    SteppedDown,
    /// The ledger ended it.
    Term(TermEnd),
}

/// Runs until `stop`, term after term.
///
/// # Errors
/// [`TermOver`]: the process should end, and begin a new term when it leads again.
pub async fn run<P: Pages>(parts: ActorParts<P>, stop: CancellationToken) -> Result<(), TermOver> {
    let ActorParts { mut inputs, mut leading, store, receipts, verifier, metrics, durations, findings, clock_skew_max } =
        parts;
    let mut known = Known::new(clock_skew_max);
    let mut above = Epoch(0);
    loop {
        let Some(term) = begin(&mut inputs, &mut leading, &store, &metrics, &mut known, above, &stop).await? else {
            return Ok(());
        };
        info!(epoch = term.epoch.0, accounts = known.accounts.len(), "The term begins");
        metrics.set_epoch(term.epoch.0);
        let mut actor = Actor {
            state: State::new(term.epoch, known.awaited()),
            begun: clock::monotonic(),
            store: store.clone(),
            receipts: receipts.clone(),
            verifier: verifier.clone(),
            metrics: metrics.clone(),
            durations: durations.clone(),
            findings: findings.clone(),
            findings_due: clock::monotonic() + FINDINGS_PERIOD,
            known,
            targets: BTreeMap::new(),
            reading: BTreeSet::new(),
            first_calls: BTreeMap::new(),
            records: Records::default(),
            out_of_date: BTreeSet::new(),
            end_messages: BTreeMap::new(),
            unoffered: Vec::new(),
            tasks: JoinSet::new(),
            stop: stop.clone(),
        };
        let over = actor.serve(&mut inputs, &mut leading).await?;
        metrics.forget_term();
        durations.forget_term();
        findings.send_replace(None);
        match over {
            Over::Stopped => return Ok(()),
            Over::SteppedDown => {
                info!(epoch = term.epoch.0, "The term is over; what was under way is found again in pages and reports");
                // Whoever leads next writes them, from the outboxes.
                receipts.forget();
                above = term.epoch;
                known = actor.known;
            }
            Over::Term(TermEnd::Deposed { by }) => return Err(TermOver::Deposed { by }),
            Over::Term(TermEnd::NodeAhead { epoch }) => {
                warn!(epoch = epoch.0, "A node has accepted a later term; another begins above it");
                // The next term writes them, from the outboxes.
                receipts.forget();
                above = epoch;
                known = actor.known;
            }
        }
    }
}

/// What the receipt of a request says that waits no longer and got no slot.
fn end_of_unserved(denial: Option<&Denial>, why: Departure) -> (Ending, String) {
    match (denial, why) {
        (Some(denial), _) => (Ending::Cancelled, human_message(denial)),
        // Requirement D5: nobody left.
        (None, Departure::AgentRestarted) => (Ending::PlatformFault, why.words().to_owned()),
        (None, _) => (Ending::Undelivered, why.words().to_owned()),
    }
}

/// Waits until this replica leads and everything was listed, begins a term above every epoch seen in pages and hellos, and
/// waits until our own watch shows it: every page written before is in our hands then (L6). None if it is time to stop.
async fn begin<P: Pages>(
    inputs: &mut mpsc::Receiver<Input>,
    leading: &mut watch::Receiver<bool>,
    store: &P,
    metrics: &Metrics,
    known: &mut Known,
    above: Epoch,
    stop: &CancellationToken,
) -> Result<Option<TermBegun>, TermOver> {
    let mut above = above;
    let mut begun: Option<TermBegun> = None;
    // The watch may show our term before the answer to its write is here.
    let mut shown: Option<TermSeen> = None;
    let mut trying = None;
    loop {
        let leads = *leading.borrow_and_update();
        match (&begun, &shown) {
            (Some(term), Some(seen)) if leads && seen.write_id == term.write_id => return Ok(begun),
            // Another replica was faster after us; ours begins anew above it.
            (Some(term), Some(seen)) if seen.epoch > term.epoch => (above, begun) = (seen.epoch, None),
            _ => {}
        }
        if !leads {
            // Another replica may have begun a later term meanwhile, which our watch need not have shown: ours would be below
            // it (L6). The next one is above whatever is there.
            (trying, begun) = (None, None);
        } else if begun.is_none() && trying.is_none() && known.unlisted.is_empty() {
            trying = Some(Box::pin(begin_while_leading(store, above.max(known.highest_epoch()))));
        }
        let input = tokio::select! {
            () = stop.cancelled() => return Ok(None),
            changed = leading.changed() => match changed {
                Ok(()) => continue,
                // The election has ended, and with it the process.
                Err(_) => return Ok(None),
            },
            Some(tried) = OptionFuture::from(trying.as_mut()) => {
                trying = None;
                begun = Some(tried?);
                continue;
            }
            input = inputs.recv() => input.ok_or(TermOver::InputClosed)?,
        };
        match input {
            Input::Store(StoreEvent::Term(seen)) => shown = Some(seen),
            Input::Store(event) => {
                known.store(event);
                metrics.set_shown(known.unlisted.is_empty(), known.accounts.len());
            }
            Input::Node(event) => known.node(event),
            // The rows of receipts that are written now are still in their outboxes, and are offered again.
            Input::Receipt(_) => {}
        }
    }
}

/// Tries until a term is begun: an API server that comes back is overloaded at first, and to end then would mean to list
/// every account again. Dropped when this replica does not lead any more; a term that was begun without us knowing does no
/// harm.
async fn begin_while_leading<P: Pages>(store: &P, above: Epoch) -> Result<TermBegun, TermOver> {
    loop {
        match store.begin_term(above).await {
            Ok(term) => return Ok(term),
            Err(error) if error.is_final() => return Err(TermOver::NotBegun(error)),
            Err(error) => warn!(error = %error_chain(&error), "No term can be begun yet; it is tried again"),
        }
        tokio::time::sleep(TERM_PAUSE).await;
    }
}

impl<P: Pages> Actor<P> {
    /// Serves until the term ends.
    async fn serve(
        &mut self,
        inputs: &mut mpsc::Receiver<Input>,
        leading: &mut watch::Receiver<bool>,
    ) -> Result<Over, TermOver> {
        self.take_over();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if let Some(ended) = self.state.ended {
                return Ok(Over::Term(ended));
            }
            let stop = self.stop.clone();
            tokio::select! {
                () = stop.cancelled() => return Ok(Over::Stopped),
                // The election ends only with the process.
                led = leading.wait_for(|leads| !*leads) => {
                    return Ok(if led.is_ok() { Over::SteppedDown } else { Over::Stopped });
                }
                input = inputs.recv() => match input.ok_or(TermOver::InputClosed)? {
                    // Another replica leads: our orders and page writes are refused from now on (L6).
                    Input::Store(StoreEvent::Term(seen)) if seen.epoch > self.state.epoch => {
                        return Ok(Over::Term(TermEnd::Deposed { by: seen.epoch }));
                    }
                    input => self.input(input),
                },
                Some(done) = self.tasks.join_next() => self.done(done.map_err(TermOver::TaskDied)?),
                _ = tick.tick() => self.tick(),
            }
        }
    }

    /// The first commands of the term: pages, pools and the sessions that wait.
    fn take_over(&mut self) {
        self.command(Command::ClockJudged { off_ms: self.known.clock_off_ms });
        // Before the pages, and also of nodes whose agents are away: the limits of leases of earlier terms depend on it (L9).
        for node in self.known.awaited() {
            self.configure(&node);
        }
        for (space, settings) in self.known.spaces.clone() {
            self.command(Command::SpaceSettings { space, settings });
        }
        for account in self.known.accounts.keys().cloned().collect::<Vec<_>>() {
            self.account_seen(&account);
        }
        for node in self.known.sessions.keys().cloned().collect::<Vec<_>>() {
            self.welcome(&node);
        }
        // Every lease with a hold is followed by now.
        self.receipts.begin(self.state.epoch);
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
        fault::into_ledger(&mut self.state);
        let outcome = step(&mut self.state, at, IdSeed(ulid::Ulid::generate().0), command);
        self.carry_out(at, outcome);
    }

    fn carry_out(&mut self, at: Moment, outcome: Outcome) {
        let Outcome { events, effects, violations, .. } = outcome;
        for violation in violations {
            error!(%violation, "An event did not fit the ledger; nothing was granted or charged by it");
        }
        self.note_unserved(at, &events);
        for event in &events {
            self.note(at, event);
        }
        for effect in effects {
            self.effect(effect);
        }
    }

    /// Requests that wait no longer and got no slot.
    fn note_unserved(&mut self, at: Moment, events: &[Event]) {
        for event in events {
            let Event::Left { ticket, why } = event else { continue };
            let denial = events.iter().find_map(|event| match event {
                Event::Denied { ticket: denied, denial, .. } if denied == ticket => Some(denial),
                _ => None,
            });
            let (ending, message) = end_of_unserved(denial, *why);
            let unserved = self.records.unserved(ticket, ending, message, at);
            self.unserved(unserved);
        }
    }

    fn unserved(&mut self, unserved: Option<Unserved>) {
        let Some(Unserved { record, is_short }) = unserved else { return };
        if !(is_short && self.receipts.drop_unwritten(&record.lease)) {
            self.receipt(record);
        }
    }

    /// What events mean for receipts and metrics.
    fn note(&mut self, at: Moment, event: &Event) {
        match event {
            Event::Announced { ticket, lease, .. } => {
                let place = self.state.standing(ticket, at.steady);
                if let Some((waiting, place)) = self.state.queue.get(ticket).zip(place) {
                    let record = self.records.queued(lease, waiting, &place, self.state.epoch, at);
                    self.receipt(record);
                }
            }
            Event::Reserved { lease, waiting, .. } => {
                Place::HoldDecided.reached();
                self.records.reserved(lease, waiting, self.state.epoch);
                if let Some(shortened) = waiting.demand.shortened {
                    self.metrics.shortened(convert::shortened_reason(shortened.by).as_str());
                }
                if let Some(promise) = waiting.promise {
                    self.metrics.waited(promise.waited_ms(at.steady), promise.wait_ms);
                }
            }
            Event::PromisesWithdrawn { node } => {
                warn!(%node, "The node has fewer slots than when those who wait for it were told when they begin at the latest");
                self.metrics.promises_withdrawn();
            }
            Event::PromiseOver { node, waited_ms, promised_ms, .. } => {
                warn!(%node, waited_ms, promised_ms, "The latest start that an earlier leader promised had passed; another is told");
                self.metrics.waited(*waited_ms, *promised_ms);
                self.metrics.promises_withdrawn();
            }
            Event::Unreserved { lease } => {
                let message = "the reservation could not be written; nothing was granted".to_owned();
                let unserved = self.records.unreserved(lease, Ending::Cancelled, message, at);
                self.unserved(unserved);
            }
            Event::Ordered { lease, .. } => {
                Place::HoldWritten.reached();
                self.note_hold(lease, at.wall);
            }
            Event::Adopted { lease, account: Some(_), .. } => self.note_hold(lease, at.wall),
            Event::Changed { change: PageChange::Settle { lease, ending, .. }, .. } => {
                Place::SettleDecided.reached();
                self.metrics.lease_ended(convert::outcome_reason(*ending).as_str());
                self.note_learned(lease);
            }
            Event::Denied { denial, .. } => self.metrics.denied(denial.kind()),
            _ => {}
        }
    }

    /// What was learned of its function. Of one only, for this is done at every end.
    fn note_learned(&self, lease: &LeaseId) {
        let Some(waiting) = self.state.leases.get(lease).and_then(|found| found.request.as_ref()) else { return };
        let function = waiting.function();
        if let Some(learned) = self.state.history.learned(&function) {
            self.durations.put(&function.space_uid, learned);
        }
    }

    /// A lease whose hold is durable.
    fn note_hold(&mut self, lease: &LeaseId, now: LedgerTime) {
        let account = self.state.leases.get(lease).and_then(|found| found.account.clone());
        let Some(account) = account else { return };
        let Some(found) = self.state.accounts.get(&account) else { return };
        if let Some(record) = self.records.held(&account, lease, &found.durable, now) {
            self.receipt(record);
        }
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Write { account, page } => self.write(account, page),
            Effect::Read { account } => self.read(account, Wanted::Outcome),
            Effect::Confirm { account, node } => self.read(account, Wanted::Leases(node)),
            Effect::Receipt { account, closed } => {
                let message = self.end_messages.remove(&closed.hold.lease).unwrap_or_default();
                let record = self.records.settled(&account, &closed, message);
                self.receipt(record);
            }
            Effect::Start(order) => {
                let node = order.node.clone();
                self.send(&node, |session| node_messages::start(&order, session.boottime_ms));
            }
            Effect::Cancel { node, lease, reason } => {
                let (epoch, ttl) = (self.state.epoch, self.state.settings(&node).limits.order_ttl_ms);
                self.send(&node, |session| node_messages::cancel(epoch, &lease, reason, session.boottime_ms, ttl));
            }
            Effect::Acknowledge { node, lease, ended, freed } => {
                if ended {
                    Place::SettleWritten.reached();
                }
                self.send(&node, |_| node_messages::acknowledged(&lease, ended, freed));
            }
            Effect::Deny { ticket, node, caller, denial } => self.deny(&ticket, &node, caller, &denial),
            Effect::Queue(place) => {
                let instance = place.ticket.agent_instance.clone();
                self.send_to_instance(&place.node.clone(), &instance, |_| node_messages::queued(&place));
            }
            // `serve` looks at the state.
            Effect::EndTerm(_) => {}
        }
    }

    fn deny(&self, ticket: &Ticket, node: &NodeName, caller: CallerClass, denial: &Denial) {
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
        let live = record.node.as_ref().is_none_or(|node| self.known.receipts_live(node));
        let ended = record.end.is_some();
        if self.receipts.record(record.clone(), live).is_err() && ended {
            // At most the rows of all outboxes.
            self.unoffered.push(record);
        }
    }

    // === pages ===

    fn write(&mut self, account: AccountName, page: Arc<Page>) {
        let Some(target) = self.targets.get(&account).cloned() else {
            // Every account in the ledger was seen once, with its revision.
            error!(%account, "A page without a known revision is to be written; it is read first");
            self.command(Command::PageConflict { account, write_id: page.write_id.clone() });
            return;
        };
        let display = self.display(&account, &page);
        self.tasks.spawn(pages::write(self.store.clone(), target, page, display));
    }

    /// What is shown beside the page.
    fn display(&self, account: &AccountName, page: &Page) -> Display {
        let Some(found) = self.state.accounts.get(account) else { return Display::of(page, None) };
        let policy = &found.policy;
        let tier = TierShown { name: policy.tier.clone(), allowance: policy.allowance.clone() };
        let shown = Display::of(page, Some(&tier).filter(|tier| !tier.name.is_empty()));
        let seen = self.known.accounts.get(account);
        let (tier, generation) = seen.map_or((None, None), |seen| (seen.tier.as_deref(), seen.generation));
        Display { conditions: conditions(page, policy, tier, generation, clock::wall()), generation, ..shown }
    }

    /// Whether the page shows another `Ready` than what is found now, and no newer page is known.
    fn shows_wrong(&self, seen: &AccountSeen, policy: &Policy) -> bool {
        let Ok(page) = &seen.page else { return false };
        let newest = self.state.accounts.get(&seen.name).map_or(0, |found| found.durable.seq);
        page.seq >= newest && !is_shown(&ready(page, policy, seen.tier.as_deref()), seen.ready.as_ref())
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Written { account, write_id, target, outcome } => {
                self.written(account.clone(), write_id, target, outcome);
                self.show_again(&account);
            }
            Done::Read { asked, found } => {
                let account = asked.account.clone();
                self.page_read(asked, found.map(|seen| *seen));
                self.show_again(&account);
            }
            Done::FirstSeen { account, found } => self.first_seen(account, found),
            Done::Stopped => {}
        }
    }

    fn account_gone(&mut self, account: AccountName) {
        let others = self.known.drop_account(&account);
        self.targets.remove(&account);
        self.command(Command::AccountGone { account });
        // What it had of an identity may be theirs now.
        for other in others {
            self.account_seen(&other);
        }
    }

    /// An account as its watch shows it.
    fn account_seen(&mut self, name: &AccountName) {
        let Some(seen) = self.known.accounts.get(name) else { return };
        let policy = self.known.policy(seen);
        if policy.tier.is_empty() {
            let tier = seen.tier.as_deref().unwrap_or("(by rule)");
            warn!(account = %name, tier, "The account has no tier: nothing is granted to it");
        }
        // A page that cannot be used closes its account: it is not in the ledger, and its watch has reported it.
        let Ok(page) = seen.page.clone() else { return };
        // An older event must not bring an older revision back; one of the same seq may carry a newer spec (L2). A newer page
        // is not taken while a write is under way: that write will meet it, and then the page is read.
        let takes_revision = self.state.accounts.get(name).is_none_or(|found| {
            let newest = found.durable.seq;
            page.seq == newest || (page.seq > newest && found.in_flight.is_none())
        });
        if takes_revision {
            self.targets.insert(name.clone(), PageTarget::of(seen));
        }
        if self.shows_wrong(seen, &policy) {
            self.out_of_date.insert(name.clone());
        } else {
            self.out_of_date.remove(name);
        }
        self.command(Command::AccountSeen { account: name.clone(), page: Box::new(page), policy });
    }
}
