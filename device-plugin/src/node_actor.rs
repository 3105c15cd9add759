//! The shell around the machine of [`crate::converge`]: one thread that takes inputs one at a time, so that slots are
//! picked under one lock (L7), carries the steps out and feeds their results back.
//!
//! It is a thread of its own, and its queue is a blocking one, because everything it does for a step (a cgroup, a map
//! entry, an fsync) blocks, and because deadlines must not wait for a busy runtime. The queue has no bound of its own:
//! its senders do. A connection sends one call and waits, a worker sends a handful of events, and a broker sends orders
//! for the requests of those connections.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use spaceport_core::ids::Size;
use spaceport_core::protocol::{AllowRefusal, CallerClass, Denial, QueuingReason, Released, ScheduleResponse, Secret};
use spaceport_proto::nodelink::{self as link, broker_message, node_message::Message};
use spaceport_shell::error_chain;
use tokio::sync::{oneshot, watch};

use crate::checkpoint::{Checkpoint, CheckpointError, Syncer};
use crate::clock::boottime_ms;
use crate::converge::{Answer, Caller, Event, Machine, Step, View};
use crate::device_api::{Denied, Granted, OnDrop, Queued, ScheduleOutcome, Verdict};
use crate::epoch::EpochFile;
use crate::fault::{self, Fault, Place};
use crate::hardware::{AdmitError, Hardware, is_alive};
use crate::metrics::Metrics;
use crate::node_link::{LinkEvent, Outbound, Session};

/// Longest sleep: BOOTTIME runs on while the machine is suspended and a sleep does not, so deadlines are looked at again.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// Inputs taken before the checkpoint is written once for all of them.
const BATCH_MAX: usize = 64;

/// Something for the actor.
#[derive(Debug)]
pub enum Input {
    /// A result of a step, or news of the node.
    Event(Event),
    /// A `/schedule`.
    Schedule {
        /// Minted for it.
        ticket: u64,
        /// From whom.
        caller: Caller,
        /// CPython `id()` of the function.
        task: u64,
        /// If named.
        size: Option<Size>,
        /// Asked for.
        declared_ms: u64,
        /// The visitor's.
        token: Option<Secret>,
        /// For the first answer.
        reply: oneshot::Sender<ScheduleOutcome>,
    },
    /// An `/allow`.
    Allow {
        /// Pod of the socket.
        pod_uid: String,
        /// As sent.
        token: Secret,
        /// As sent.
        pid: u32,
        /// For the answer.
        reply: oneshot::Sender<Result<(), AllowRefusal>>,
    },
    /// A `/release`.
    Release {
        /// Pod of the socket.
        pod_uid: String,
        /// As sent.
        token: Secret,
        /// As sent.
        fail: bool,
        /// For the answer.
        reply: oneshot::Sender<Released>,
    },
    /// From the link.
    Link(LinkEvent),
    /// Nothing: a sender finds out whether the actor is there.
    Nothing,
    /// The agent stops. Leases run on under the checkpoint, the gate stays as it is.
    Stop,
}

/// Why the actor cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ActorError {
    /// Without it orders of an old leader could not be told apart after a restart.
    #[error("the fence cannot be recorded")]
    Fence(#[source] std::io::Error),
}

/// The way to the actor.
#[derive(Clone, Debug)]
pub struct NodeHandle {
    inputs: blocking::Sender<Input>,
    tickets: Arc<AtomicU64>,
    view: watch::Receiver<View>,
}

impl NodeHandle {
    /// Sends an input; false while the agent stops.
    pub fn send(&self, input: Input) -> bool {
        self.inputs.send(input).is_ok()
    }

    /// A ticket that no other request of this agent has (L15).
    pub fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// What the machine shows, always the newest.
    pub fn view(&self) -> watch::Receiver<View> {
        self.view.clone()
    }
}

/// Who waits for the answer of a `/schedule`: for the first, or in the queue for the verdict.
enum Waiting {
    First(oneshot::Sender<ScheduleOutcome>),
    Verdict(oneshot::Sender<Verdict>),
}

/// What the actor is made of.
pub struct NodeActor {
    machine: Machine,
    hardware: Hardware,
    checkpoint: Checkpoint,
    syncer: Syncer,
    epoch_file: EpochFile,
    epoch: watch::Sender<u64>,
    view: watch::Sender<View>,
    metrics: Metrics,
    inputs: blocking::Receiver<Input>,
    waiting: BTreeMap<u64, Waiting>,
    calls: u64,
    allows: BTreeMap<u64, oneshot::Sender<Result<(), AllowRefusal>>>,
    releases: BTreeMap<u64, oneshot::Sender<Released>>,
    leader: Option<(Session, Outbound)>,
    dirty: bool,
}

/// Where the actor keeps what must survive it.
pub struct Records {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The fence.
    pub epoch_file: EpochFile,
    /// Tells the link which epoch to say in `Hello`.
    pub epoch: watch::Sender<u64>,
}

impl NodeActor {
    /// Puts it together. `inputs` is the other end of the hardware's sender.
    ///
    /// # Errors
    /// If there can be no thread for the checkpoint.
    pub fn new(
        machine: Machine,
        hardware: Hardware,
        records: Records,
        metrics: Metrics,
        inputs: blocking::Receiver<Input>,
    ) -> std::io::Result<(Self, NodeHandle)> {
        let (view, seen) = watch::channel(machine.view());
        let handle = NodeHandle { inputs: hardware.inputs.clone(), tickets: Arc::new(AtomicU64::new(1)), view: seen };
        let Records { checkpoint, epoch_file, epoch } = records;
        let failures = metrics.clone();
        let syncer = Syncer::start(checkpoint.clone(), move |error| checkpoint_failed(&failures, error))?;
        let actor = Self {
            machine,
            hardware,
            checkpoint,
            syncer,
            epoch_file,
            epoch,
            view,
            metrics,
            inputs,
            waiting: BTreeMap::new(),
            calls: 0,
            allows: BTreeMap::new(),
            releases: BTreeMap::new(),
            leader: None,
            dirty: false,
        };
        Ok((actor, handle))
    }

    /// Works until [`Input::Stop`]. Blocks its thread.
    ///
    /// # Errors
    /// [`ActorError`]: the process must end, the gate stays shut.
    pub fn run(mut self) -> Result<(), ActorError> {
        // The steps that restoring left behind, and deadlines that passed while no agent ran.
        self.event(Event::Tick)?;
        loop {
            self.write_checkpoint();
            let view = self.machine.view();
            self.metrics.observe(&view);
            self.view.send_if_modified(|old| std::mem::replace(old, view.clone()) != view);
            let mut next = match self.inputs.recv_timeout(self.sleep()) {
                Ok(input) => Some(input),
                Err(blocking::RecvTimeoutError::Timeout) => None,
                Err(blocking::RecvTimeoutError::Disconnected) => return Ok(()),
            };
            for _ in 0..BATCH_MAX {
                let Some(input) = next else { break };
                if matches!(input, Input::Stop) {
                    self.write_checkpoint();
                    return Ok(());
                }
                self.input(input)?;
                next = self.inputs.try_recv().ok();
            }
            if let Some(input) = next {
                // Taken from the queue, so it is worked on before the checkpoint is written.
                self.input(input)?;
            }
            if self.machine.next_wake().is_some_and(|wake| wake <= boottime_ms()) {
                self.event(Event::Tick)?;
            }
        }
    }

    fn sleep(&self) -> Duration {
        let left = |wake: u64| Duration::from_millis(wake.saturating_sub(boottime_ms()));
        self.machine.next_wake().map_or(SLEEP_MAX, left).min(SLEEP_MAX)
    }

    fn input(&mut self, input: Input) -> Result<(), ActorError> {
        match input {
            Input::Event(event) => {
                if let Event::Disconnected { ticket } = event {
                    if fault::is(Fault::VisitorsStay) {
                        return Ok(());
                    }
                    self.waiting.remove(&ticket);
                }
                self.event(event)
            }
            Input::Schedule { ticket, caller, task, size, declared_ms, token, reply } => {
                self.waiting.insert(ticket, Waiting::First(reply));
                self.event(Event::Scheduled { ticket, caller, task, size, declared_ms, token })
            }
            Input::Allow { pod_uid, token, pid, reply } => {
                let dead = self.machine.reused_worker(token.expose()).filter(|worker| !is_alive(worker));
                if let Some(cgroup_id) = dead.map(|worker| worker.cgroup_id) {
                    self.event(Event::WorkerExited { cgroup_id })?;
                }
                let call = self.next_call();
                self.allows.insert(call, reply);
                self.event(Event::Allow { call, pod_uid, token: token.into_exposed(), pid })
            }
            Input::Release { pod_uid, token, fail, reply } => {
                let call = self.next_call();
                self.releases.insert(call, reply);
                self.event(Event::Release { call, pod_uid, token: token.into_exposed(), fail })
            }
            Input::Link(event) => self.link(event),
            Input::Nothing | Input::Stop => Ok(()),
        }
    }

    fn next_call(&mut self) -> u64 {
        self.calls += 1;
        self.calls
    }

    fn link(&mut self, event: LinkEvent) -> Result<(), ActorError> {
        let leads =
            |actor: &Self, session: Session| actor.leader.as_ref().is_some_and(|(leader, _)| *leader == session);
        match event {
            LinkEvent::Welcome { session, epoch, outbound } => {
                if epoch < self.machine.epoch() {
                    tracing::warn!(epoch, highest = self.machine.epoch(), "A deposed leader was not joined");
                    return Ok(());
                }
                tracing::info!(epoch, "Joining a term");
                self.leader = Some((session, outbound));
                self.metrics.linked(true);
                self.event(Event::Linked { epoch })
            }
            LinkEvent::Standby { session } | LinkEvent::Closed { session } if leads(self, session) => self.unlink(),
            LinkEvent::Standby { .. } | LinkEvent::Closed { .. } => Ok(()),
            LinkEvent::Message { session, message } if leads(self, session) => match message {
                broker_message::Message::Queued(queued) => self.event(Event::Queued(queued)),
                broker_message::Message::Denied(denied) => self.event(Event::Denied(denied)),
                broker_message::Message::Start(order) => {
                    Place::OrderReceived.reached();
                    self.event(Event::Start(order))
                }
                broker_message::Message::Cancel(order) => self.event(Event::Cancel(order)),
                broker_message::Message::Acknowledged(done) => self.event(Event::Acknowledged(done)),
                broker_message::Message::Welcome(_) | broker_message::Message::Standby(_) => Ok(()),
            },
            LinkEvent::Message { .. } => Ok(()), // Of a replica that does not lead.
        }
    }

    fn unlink(&mut self) -> Result<(), ActorError> {
        self.leader = None;
        self.metrics.linked(false);
        self.event(Event::Unlinked)
    }

    /// One event and everything that follows from it.
    fn event(&mut self, event: Event) -> Result<(), ActorError> {
        let mut open: VecDeque<Step> = self.machine.handle(boottime_ms(), event);
        self.dirty |= self.machine.take_dirty();
        // Ends: each step feeds at most one result back, and no result leads to the step it came from.
        while let Some(step) = open.pop_front() {
            if let Some(result) = self.step(step)? {
                open.extend(self.machine.handle(boottime_ms(), result));
                self.dirty |= self.machine.take_dirty();
            }
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<Option<Event>, ActorError> {
        match step {
            Step::Answer { ticket, answer } => self.answer(ticket, answer),
            Step::ReplyAllow { call, mut reply } => {
                if fault::is(Fault::TokensAreSpentAgain) && reply == Err(AllowRefusal::AlreadyUsed) {
                    reply = Ok(());
                }
                if let Some(sender) = self.allows.remove(&call) {
                    // A worker that is gone meanwhile is noticed by its pidfd.
                    let _ = sender.send(reply);
                }
            }
            Step::ReplyRelease { call, reply } => {
                if let Some(sender) = self.releases.remove(&call) {
                    // The release counts whether its sender still listens or not.
                    let _ = sender.send(reply);
                }
            }
            Step::Send(message) => return self.send(message).map(|()| None),
            Step::RecordEpoch(epoch) => {
                self.epoch_file.write(epoch).map_err(ActorError::Fence)?;
                self.epoch.send_replace(epoch);
            }
            Step::Admit { lease, caller, pid, card } => return Ok(Some(self.admit(lease, &caller, pid, card))),
            Step::Reuse { lease, worker, card } => {
                let reused = self.write_checkpoint() && self.hardware.reuse(&worker, card);
                return Ok(Some(if reused { Event::Reused { lease } } else { Event::ReuseFailed { lease } }));
            }
            Step::CloseGate { lease, worker, caller } => {
                // Before anybody is told of the end: an agent that dies now must not find the lease running.
                self.write_checkpoint();
                let opens = self.hardware.close_gate(&worker, &caller);
                return Ok(Some(Event::GateClosed { lease, opens }));
            }
            Step::LookAtIdle { worker } => {
                let seen = self.hardware.look_at(&worker);
                return Ok(seen.map(|seen| Event::IdleSeen { cgroup_id: worker.cgroup_id, seen }));
            }
            Step::IdleEnds { worker, why } => {
                tracing::info!(pid = worker.pid, cgroup = %worker.cgroup.display(), %why, "An idle worker is ended");
            }
            Step::ShutGate { cgroup_id } => self.hardware.shut(cgroup_id),
            Step::Hold { worker, card } => self.hardware.hold(&worker, card),
            Step::Clear { slot, worker, limit_ms } => self.hardware.clear(slot, &worker, limit_ms),
            Step::Watch { worker } => self.hardware.watch(&worker),
        }
        Ok(None)
    }

    fn admit(&mut self, lease: String, caller: &Caller, pid: u32, card: u32) -> Event {
        Place::WorkerNotAdmitted.reached();
        if !self.write_checkpoint() {
            let reason = "the checkpoint cannot be written, so nothing may be started".to_owned();
            return Event::AdmitFailed { lease, reason };
        }
        match self.hardware.admit(&lease, caller, pid, card) {
            Ok(worker) => {
                tracing::info!(lease, pid = worker.pid, card, pod = caller.pod.name, "A worker was allowed");
                Event::Admitted { lease, worker }
            }
            Err(AdmitError::Refused(refusal)) => {
                tracing::warn!(lease, pid, pod = caller.pod.name, reason = %refusal, "A worker was not allowed");
                Event::AdmitRefused { lease, refusal }
            }
            Err(AdmitError::Failed(reason)) => {
                tracing::error!(lease, reason, "A worker could not be admitted");
                Event::AdmitFailed { lease, reason }
            }
        }
    }

    fn send(&mut self, message: Message) -> Result<(), ActorError> {
        match &message {
            Message::Request(_) => Place::RequestNotSent.reached(),
            Message::Running(_) => Place::RunningNotSent.reached(),
            Message::Ended(_) => Place::EndNotSent.reached(),
            Message::Freed(_) => Place::FreedNotSent.reached(),
            _ => {}
        }
        if let Message::Ended(ended) = &message {
            tracing::info!(
                lease = ended.lease,
                kind = ended.kind().as_str_name(),
                used_ms = ended.used_ms,
                opens = ended.device_opens,
                "A lease ended"
            );
            self.metrics.ended(ended.kind());
        }
        if let Message::Refused(refused) = &message {
            tracing::info!(lease = refused.lease, reason = refused.reason, "An order was refused");
            self.metrics.refused();
        }
        let Some((_, leader)) = &self.leader else { return Ok(()) };
        if !leader.send(message) {
            // Its stream is over; everything that matters is repeated to the next one.
            return self.unlink();
        }
        Ok(())
    }

    /// Delivers an answer. Whatever cannot be delivered is dropped, and what it carries acts on the drop.
    fn answer(&mut self, ticket: u64, answer: Answer) {
        let waiting = self.waiting.remove(&ticket);
        let verdict: Verdict = match answer {
            Answer::Queued { concurrency, caller } => {
                self.queue(ticket, waiting, concurrency, caller_class(caller));
                return;
            }
            Answer::Granted { idle, nvidia_index, nvidia_uuid, allow_token, caller } => {
                Place::GrantNotAnswered.reached();
                let allow_token = Secret::new(allow_token);
                Ok(Granted {
                    response: ScheduleResponse { idle, nvidia_index, nvidia_uuid, allow_token },
                    caller: caller_class(caller),
                    undelivered: self.withdraw(ticket),
                })
            }
            Answer::Denied { denial, caller } => {
                let denial = serde_json::from_str(&denial).unwrap_or_else(|error| {
                    tracing::error!(%error, "A denial of the broker is not one that this agent knows");
                    Denial::BrokerUnavailable
                });
                Err(Denied { denial, caller: caller_class(caller) })
            }
            Answer::Unavailable { reason } => {
                tracing::warn!(reason, "A request was not served");
                Err(Denied { denial: Denial::BrokerUnavailable, caller: CallerClass::Guest })
            }
        };
        match waiting {
            Some(Waiting::First(reply)) => drop(reply.send(ScheduleOutcome::Answer(verdict))),
            Some(Waiting::Verdict(reply)) => drop(reply.send(verdict)),
            None => drop(verdict),
        }
    }

    fn queue(&mut self, ticket: u64, waiting: Option<Waiting>, concurrency: bool, caller: CallerClass) {
        match waiting {
            Some(Waiting::First(reply)) => {
                let (sender, verdict) = oneshot::channel();
                self.waiting.insert(ticket, Waiting::Verdict(sender));
                let reason = if concurrency { QueuingReason::Concurrency } else { QueuingReason::Node };
                let place = self.withdraw(ticket);
                // If its connection is gone, the place acts.
                drop(reply.send(ScheduleOutcome::Queued(Queued { reason, caller, verdict, place })));
            }
            // It waits already; its place may have changed, which this client cannot be told.
            Some(waiting) => {
                self.waiting.insert(ticket, waiting);
            }
            None => {}
        }
    }

    fn withdraw(&self, ticket: u64) -> OnDrop {
        withdraw(self.hardware.inputs.clone(), ticket)
    }

    /// Writes the checkpoint if anything changed; true if it holds the present.
    fn write_checkpoint(&mut self) -> bool {
        if self.dirty {
            let snapshot = self.machine.snapshot();
            match self.checkpoint.write(&snapshot) {
                Ok(()) => self.dirty = false,
                Err(error) => checkpoint_failed(&self.metrics, &error),
            }
            self.syncer.follow(snapshot);
        }
        !self.dirty
    }
}

fn checkpoint_failed(metrics: &Metrics, error: &CheckpointError) {
    metrics.checkpoint_failed();
    tracing::error!(error = %error_chain(error), "The checkpoint cannot be written");
}

/// On drop, takes a request back.
pub fn withdraw(inputs: blocking::Sender<Input>, ticket: u64) -> OnDrop {
    OnDrop::new(move || {
        // While the agent stops there is nothing left to take back from.
        drop(inputs.send(Input::Event(Event::Disconnected { ticket })));
    })
}

impl NodeHandle {
    /// On drop, takes a request back.
    pub fn withdraw(&self, ticket: u64) -> OnDrop {
        withdraw(self.inputs.clone(), ticket)
    }
}

fn caller_class(class: link::CallerClass) -> CallerClass {
    match class {
        link::CallerClass::Unspecified | link::CallerClass::Guest => CallerClass::Guest,
        link::CallerClass::Regular => CallerClass::Regular,
        link::CallerClass::Pro => CallerClass::Pro,
    }
}
