//! What the node does about leases, as a pure machine: events in, steps out (ARCHITECTURE.md, "functional core").
//!
//! [`Machine::handle`] is the only way in. It never waits, reads no clock and touches nothing: `now` is BOOTTIME in
//! milliseconds and comes with every event. The executor carries the steps out in order and feeds their results back as
//! events. Before a step that touches hardware it writes [`Machine::snapshot`] to the checkpoint (N19: Started before
//! hardware); after the steps of an event it writes it again if anything changed (Done after).
//!
//! The life of a lease here:
//! ```text
//! Start order -> Waiting (slot still clears, L14) -> Assigned (answered) -> Running (allowed, or an idle worker reused)
//!             -> Ended (gate closed; repeated until acknowledged, L10) -> forgotten
//! ```
//! and of its slot: owned -> held idle by a frozen worker (N12), or clearing -> free, or quarantined.

mod end;
mod grant;
mod idle;
mod places;
mod restore;
mod sound;
mod state;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use spaceport_core::ids::Size;
use spaceport_core::protocol::{AllowRefusal, Released, Secret};
use spaceport_proto::nodelink as link;

pub use idle::{IDLE_LOOK_MS, IdleEnd};
pub use sound::Unsound;
pub use state::{
    Book, Caller, Card, Ending, EndingKind, FreedKind, Idle, Lease, Mark, Order, Phase, Report, Snapshot, SpacePod,
    Worker,
};

use places::Place;

use crate::gate::Opens;
use crate::process_status::ProcessStatus;
use crate::sizes::SizeMemory;
use crate::slots::Slot;

/// Requests that wait at once on one node. The broker's own queue bounds (pool, Space, account) are far lower; this one
/// protects the agent's memory while no broker answers.
pub const TICKETS_MAX: usize = 4096;
/// How long a request waits for a broker before it is told that there is none. Covers a leader's restart within a term;
/// a longer wait would only be a slower 503.
pub const BROKER_WAIT_MS: u64 = 2_000;
/// How long a request that a broker had already taken waits for the next one after a fail-over (L17). Longer than the
/// leader lease, shorter than the client's read timeout of 60 s.
pub const FAILOVER_WAIT_MS: u64 = 30_000;
/// After a worker's death the parent still sends `/release?fail=true` (device API A7) about 20 ms later; whichever
/// comes first settles, and the release knows more.
pub const DEATH_GRACE_MS: u64 = 200;
/// The same for a reused worker that died before its parent noticed: the parent forks anew and sends `/allow`, which
/// restarts the clock (L16). Forking a large app takes tens of milliseconds.
pub const REUSED_DEATH_GRACE_MS: u64 = 1_000;
/// So long after its reuse the successor of a worker that had died is allowed (L16), and no longer than any worker: within a
/// second its death is noticed, within the grace above its parent has forked. One that dies later dies in the middle of its
/// call: if its lease could begin anew, the time before were free, and the lease outlast what a broker waits for (L9). One
/// that lives has none.
pub const SUCCESSOR_MS: u64 = 2_000;
/// A failure this soon after a neighbour on the card was killed or took too much memory is the platform's (N18).
pub const NEIGHBOUR_MS: u64 = 5_000;
/// How often a report is repeated while it is not acknowledged (L10). The broker answers within milliseconds; this only
/// matters for a message that was lost with a stream, and `Joined` repeats those at once.
pub const REPEAT_MS: u64 = 5_000;

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A well-formed `/schedule`.
    Scheduled {
        /// Minted by the agent for this HTTP request (L15).
        ticket: u64,
        /// Who asks: known from the listening socket.
        caller: Caller,
        /// CPython `id()` of the function.
        task: u64,
        /// Size, if the request named one.
        size: Option<Size>,
        /// Milliseconds asked for.
        declared_ms: u64,
        /// `X-IP-Token` as received.
        token: Option<Secret>,
    },
    /// The socket of this request closed before its answer was delivered.
    Disconnected {
        /// Of the request.
        ticket: u64,
    },
    /// `/allow`.
    Allow {
        /// Names the HTTP call to reply to.
        call: u64,
        /// The pod of the socket.
        pod_uid: String,
        /// As answered to `/schedule`.
        token: String,
        /// In the container's pid namespace, as sent.
        pid: u32,
    },
    /// `/release`.
    Release {
        /// Names the HTTP call to reply to.
        call: u64,
        /// The pod of the socket.
        pod_uid: String,
        /// As answered to `/schedule`.
        token: String,
        /// The function raised, or the worker is gone.
        fail: bool,
    },
    /// Result of [`Step::Admit`]: the worker is in its cgroup and the gate is open.
    Admitted {
        /// Of the step.
        lease: String,
        /// The worker.
        worker: Worker,
    },
    /// Result of [`Step::Admit`]: the pid is not one that may be allowed. The lease waits on for a good one.
    AdmitRefused {
        /// Of the step.
        lease: String,
        /// Why.
        refusal: AllowRefusal,
    },
    /// Result of [`Step::Admit`]: cgroup or gate failed.
    AdmitFailed {
        /// Of the step.
        lease: String,
        /// What failed.
        reason: String,
    },
    /// Result of [`Step::Reuse`]: gate open, worker thawed.
    Reused {
        /// Of the step.
        lease: String,
    },
    /// Result of [`Step::Reuse`]: the worker is gone or cannot be thawed; the slot is cleared instead.
    ReuseFailed {
        /// Of the step.
        lease: String,
    },
    /// Result of [`Step::CloseGate`].
    GateClosed {
        /// Of the step.
        lease: String,
        /// How often the lease's processes were let through, and when first.
        opens: Opens,
    },
    /// Result of [`Step::Clear`].
    Cleared {
        /// Of the worker.
        cgroup_id: u64,
    },
    /// [`Step::Clear`] goes on past its limit.
    ClearOverdue {
        /// Of the worker.
        cgroup_id: u64,
        /// What is still there.
        reason: String,
    },
    /// The first process of a lease cgroup, the allowed worker, ended.
    WorkerExited {
        /// Of the worker.
        cgroup_id: u64,
    },
    /// A held worker does not stand still: it did not freeze, or its kernels run on (N11, L16).
    IdleUnsafe {
        /// Of the worker.
        cgroup_id: u64,
    },
    /// Result of [`Step::LookAtIdle`]. There is none if the worker has ended, as [`Event::WorkerExited`] tells of that.
    IdleSeen {
        /// Of the worker.
        cgroup_id: u64,
        /// How it was.
        seen: ProcessStatus,
    },
    /// NVML shows a process of the lease on the card.
    ContextSeen {
        /// Of the worker.
        cgroup_id: u64,
    },
    /// A lease on a shared card uses more memory than its share (N18).
    Breach {
        /// Of the worker.
        cgroup_id: u64,
        /// Limit and use.
        message: String,
    },
    /// A broker leads a term that the fence accepts.
    Linked {
        /// Its term.
        epoch: u64,
    },
    /// The leader's stream ended.
    Unlinked,
    /// From the broker.
    Queued(link::Queued),
    /// From the broker.
    Denied(link::Denied),
    /// From the broker.
    Start(link::Start),
    /// From the broker.
    Cancel(link::Cancel),
    /// From the broker.
    Acknowledged(link::Acknowledged),
    /// The cards as they are now.
    Inventory(Vec<Card>),
    /// A container or pod is going away: its idle workers must not hold up its end.
    PodEnding {
        /// Of the pod.
        pod_uid: String,
    },
    /// The time asked for by [`Machine::next_wake`] has come.
    Tick,
}

/// What the client of a `/schedule` is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It waits.
    Queued {
        /// For the concurrency limit, not for the node.
        concurrency: bool,
        /// Class of the account.
        caller: link::CallerClass,
    },
    /// It has a slot.
    Granted {
        /// Reuse the worker of this index.
        idle: bool,
        /// The slot's own index.
        nvidia_index: u32,
        /// For `CUDA_VISIBLE_DEVICES`.
        nvidia_uuid: String,
        /// For `/allow` and `/release`.
        allow_token: String,
        /// Class of the account.
        caller: link::CallerClass,
    },
    /// It is refused by a rule.
    Denied {
        /// JSON of `spaceport_core::protocol::Denial`.
        denial: String,
        /// Class of the account.
        caller: link::CallerClass,
    },
    /// No broker or no room: 503, nothing charged.
    Unavailable {
        /// For the log.
        reason: String,
    },
}

/// A thing to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Tell the client of a `/schedule`. If it cannot be delivered, [`Event::Disconnected`] follows.
    Answer {
        /// Of the request.
        ticket: u64,
        /// What.
        answer: Answer,
    },
    /// Tell the sender of an `/allow`.
    ReplyAllow {
        /// Of the event.
        call: u64,
        /// What.
        reply: Result<(), AllowRefusal>,
    },
    /// Tell the sender of a `/release`. Never an error: the result of the function would be thrown away.
    ReplyRelease {
        /// Of the event.
        call: u64,
        /// What.
        reply: Released,
    },
    /// Send to the leading broker; dropped while there is none.
    Send(link::node_message::Message),
    /// Record the epoch durably before anything else of this term is done.
    RecordEpoch(u64),
    /// Check the pid, move the process into `lease-<id>`, watch it, open the gate (N9).
    Admit {
        /// Also names the cgroup.
        lease: String,
        /// Container of the lease.
        caller: Caller,
        /// As sent.
        pid: u32,
        /// Whose devices.
        card: u32,
    },
    /// Check that the worker lives and need not end ([`Worker::must_end`]), open the gate for its cgroup, thaw it.
    Reuse {
        /// Of the new lease.
        lease: String,
        /// The frozen worker.
        worker: Worker,
        /// Whose devices.
        card: u32,
    },
    /// Shut the gate for the worker's cgroup and read its counter; then look for descriptors that outlive it (N10).
    CloseGate {
        /// Of the worker.
        lease: String,
        /// Whose cgroup.
        worker: Worker,
        /// The lease's container, whose other processes must hold no device.
        caller: Caller,
    },
    /// Shut the gate for a cgroup that is about to be cleared.
    ShutGate {
        /// Which.
        cgroup_id: u64,
    },
    /// Freeze a worker for reuse; [`Event::IdleUnsafe`] follows if it does not stand still.
    Hold {
        /// The worker.
        worker: Worker,
        /// Where its kernels would show.
        card: u32,
    },
    /// Look at a frozen worker's process, without waiting for anything.
    LookAtIdle {
        /// The worker.
        worker: Worker,
    },
    /// Say that a frozen worker ends although nobody needs its slot; [`Step::Clear`] follows.
    IdleEnds {
        /// The worker.
        worker: Worker,
        /// Why.
        why: IdleEnd,
    },
    /// Kill the cgroup, wait until its processes and their memory are gone, remove it.
    Clear {
        /// To be reported back.
        slot: Slot,
        /// What is cleared.
        worker: Worker,
        /// When it is overdue.
        limit_ms: u64,
    },
    /// Watch a worker that was taken over from an earlier agent.
    Watch {
        /// The worker.
        worker: Worker,
    },
}

/// A request that has no slot yet.
#[derive(Clone, Debug, PartialEq)]
struct Pending {
    caller: Caller,
    task: u64,
    size: Size,
    declared_ms: u64,
    token: Option<Secret>,
    /// When it is told that there is no broker, unless it was sent to one by then.
    give_up_ms: u64,
    /// It was sent to the broker that leads now.
    sent: bool,
    /// It waits for a slot of the node (not for a concurrency limit).
    waits_for_node: bool,
    /// Where it waits, as a leader told it last (L17).
    place: Option<Place>,
}

/// Everything the node knows about leases.
#[derive(Debug)]
pub struct Machine {
    instance: String,
    epoch: u64,
    linked: bool,
    cards: Vec<Card>,
    book: Book,
    leases: BTreeMap<String, Lease>,
    tickets: BTreeMap<u64, Pending>,
    sizes: SizeMemory,
    /// `large` slots that can be granted: with fewer, no leader can keep what was promised.
    capacity: u64,
    /// Counts Start orders, so that waiting leases begin in the order they came.
    arrivals: u64,
    /// The last lease of each card that was killed or took too much memory, and when (N18).
    trouble: BTreeMap<u32, (String, u64)>,
    /// When frozen workers are looked at next, while there are any.
    idle_look_ms: u64,
    /// The frozen workers that the leader was told of last.
    idle_told: Vec<link::IdleWorker>,
    steps: VecDeque<Step>,
    dirty: bool,
}

impl Machine {
    /// A machine that knows no lease. `instance` is fresh at every start of the agent, `epoch` is the fence's.
    pub fn new(instance: String, epoch: u64) -> Self {
        Self {
            instance,
            epoch,
            linked: false,
            cards: Vec::new(),
            book: Book::default(),
            leases: BTreeMap::new(),
            tickets: BTreeMap::new(),
            sizes: SizeMemory::default(),
            capacity: 0,
            arrivals: 0,
            trouble: BTreeMap::new(),
            idle_look_ms: 0,
            idle_told: Vec::new(),
            steps: VecDeque::new(),
            dirty: false,
        }
    }

    /// Takes one event in and says what to do, in order.
    pub fn handle(&mut self, now_ms: u64, event: Event) -> VecDeque<Step> {
        match event {
            Event::Scheduled { ticket, caller, task, size, declared_ms, token } => {
                self.scheduled(now_ms, ticket, caller, task, size, declared_ms, token);
            }
            Event::Disconnected { ticket } => self.disconnected(now_ms, ticket),
            Event::Allow { call, pod_uid, token, pid } => self.allow(now_ms, call, &pod_uid, &token, pid),
            Event::Release { call, pod_uid, token, fail } => self.release(now_ms, call, &pod_uid, &token, fail),
            Event::Admitted { lease, worker } => self.admitted(now_ms, &lease, worker),
            Event::AdmitRefused { lease, refusal } => self.admit_refused(&lease, refusal),
            Event::AdmitFailed { lease, reason } => self.admit_failed(now_ms, &lease, reason),
            Event::Reused { lease } => self.reused(now_ms, &lease),
            Event::ReuseFailed { lease } => self.reuse_failed(now_ms, &lease),
            Event::GateClosed { lease, opens } => self.gate_closed(now_ms, &lease, &opens),
            Event::Cleared { cgroup_id } => self.cleared(now_ms, cgroup_id),
            Event::ClearOverdue { cgroup_id, reason } => self.clear_overdue(now_ms, cgroup_id, &reason),
            Event::WorkerExited { cgroup_id } => self.worker_exited(now_ms, cgroup_id),
            Event::IdleUnsafe { cgroup_id } => self.end_idle(|idle| idle.worker.cgroup_id == cgroup_id),
            Event::IdleSeen { cgroup_id, seen } => self.idle_seen(cgroup_id, &seen),
            Event::ContextSeen { cgroup_id } => self.context_seen(now_ms, cgroup_id),
            Event::Breach { cgroup_id, message } => self.breach(now_ms, cgroup_id, &message),
            Event::Linked { epoch } => self.linked(now_ms, epoch),
            Event::Unlinked => self.unlinked(now_ms),
            Event::Queued(queued) => self.queued(now_ms, &queued),
            Event::Denied(denied) => self.denied(denied),
            Event::Start(order) => self.start(now_ms, order),
            Event::Cancel(order) => self.cancel(now_ms, &order),
            Event::Acknowledged(acknowledged) => self.acknowledged(&acknowledged),
            Event::Inventory(cards) => self.inventory(now_ms, cards),
            Event::PodEnding { pod_uid } => {
                self.sizes.forget(&pod_uid);
                self.end_idle(|idle| idle.caller.pod.pod_uid == pod_uid);
            }
            Event::Tick => self.tick(now_ms),
        }
        self.tell_idle();
        self.book.assert_exclusive();
        std::mem::take(&mut self.steps)
    }

    /// The worker that a lease got back, if nobody has noticed that it died: its successor's `/allow` may be faster than that.
    pub fn reused_worker(&self, lease: &str) -> Option<&Worker> {
        self.leases.get(lease)?.reused_worker()
    }

    /// When [`Event::Tick`] is due, BOOTTIME milliseconds.
    pub fn next_wake(&self) -> Option<u64> {
        let leases = self.leases.values().filter_map(|lease| lease.next_wake(self.linked));
        let tickets = self.tickets.values().filter(|pending| !pending.sent).map(|pending| pending.give_up_ms);
        leases.chain(tickets).chain(self.next_idle_look()).min()
    }

    /// True once after something that the checkpoint holds has changed.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    /// What the checkpoint holds.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { leases: self.leases.values().cloned().collect(), book: self.book.clone() }
    }

    /// The cards with the slots that are quarantined now, for `Joined` and heartbeats.
    pub fn inventory_report(&self) -> Vec<link::Card> {
        self.cards.iter().map(|card| wire::card(card, &self.book)).collect()
    }

    /// Highest epoch accepted.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    fn memory_share(&self, slot: Slot) -> u32 {
        let large_slots = self.cards.iter().find(|card| card.index == slot.card).map_or(1, |card| card.large_slots);
        if slot.size() == Size::Large { large_slots } else { 1 }
    }

    /// Cards and occupancy, for GPUNode's status and for sampling memory.
    pub fn view(&self) -> View {
        View {
            instance: self.instance.clone(),
            linked: self.linked,
            running: self
                .leases
                .values()
                .filter_map(|lease| match (&lease.phase, &lease.worker, lease.slot) {
                    (Phase::Running { .. }, Some(worker), Some(slot)) => Some(Running {
                        lease: lease.id.clone(),
                        slot,
                        worker: worker.clone(),
                        memory_share: self.memory_share(slot),
                        context_seen: lease.context_seen,
                        caller: lease.caller.clone(),
                    }),
                    _ => None,
                })
                .collect(),
            owned: self.book.owners.clone(),
            idle: self.book.idle.iter().map(|(slot, idle)| (*slot, idle.caller.clone())).collect(),
            quarantined: self.book.quarantined.clone(),
            queued: self.tickets.values().fold(BTreeMap::new(), |mut queued, pending| {
                *queued.entry(pending.caller.pod.pod_uid.clone()).or_default() += 1;
                queued
            }),
        }
    }
}

/// What others may know of the machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// This start of the agent.
    pub instance: String,
    /// A broker's term is joined.
    pub linked: bool,
    /// Leases whose clock runs.
    pub running: Vec<Running>,
    /// Slot to lease, running or not.
    pub owned: BTreeMap<Slot, String>,
    /// Slots held by a frozen worker.
    pub idle: BTreeMap<Slot, Caller>,
    /// Slots that did not clear, with the reason.
    pub quarantined: BTreeMap<Slot, String>,
    /// Requests without a slot, by pod uid.
    pub queued: BTreeMap<String, u32>,
}

/// A lease whose clock runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// Its id.
    pub lease: String,
    /// Its slot.
    pub slot: Slot,
    /// Its worker.
    pub worker: Worker,
    /// Into how many parts its card's memory is shared; 1 where the lease may use all of it.
    pub memory_share: u32,
    /// NVML has shown it.
    pub context_seen: bool,
    /// Whose it is.
    pub caller: Caller,
}
