//! A node agent as the protocol sees it: what `converge` and `epoch` of the device plugin do about leases, with one slot,
//! without workers, gates and timers. Limits in time are actions of the world.

use spaceport_core::page::Ending;

use crate::api::Broken;
use crate::bounds::{Fault, USED_MS};

/// A node agent, and what it keeps on disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// The highest epoch it has seen (L6); survives everything.
    pub epoch: u64,
    /// Counts the starts of the agent.
    pub start: u8,
    /// It went away for good.
    pub gone: bool,
    /// The broker whose session it follows.
    pub leader: Option<usize>,
    /// Calls without a slot, in the order they came.
    pub waiting: Vec<u8>,
    /// Leases it has not forgotten, in the order they came.
    pub leases: Vec<NodeLease>,
}

/// A lease on its node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeLease {
    /// Its number.
    pub lease: u32,
    /// The call it was made for.
    pub call: u8,
    /// The term of its order.
    pub epoch: u64,
    /// The lease whose slot it waits for (L14).
    pub after: Option<u32>,
    /// Where it stands.
    pub phase: Phase,
}

/// Where a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Its slot still clears; the client waits.
    Waiting,
    /// The client has its answer.
    Assigned,
    /// The clock runs.
    Running,
    /// Over, and not forgotten.
    Ended {
        /// How.
        ending: Ending,
        /// From clock start to end.
        used_ms: u64,
        /// `Ended` was acknowledged.
        told: bool,
        /// The slot came back.
        freed: bool,
        /// `Freed` was acknowledged.
        freed_told: bool,
    },
}

/// From a broker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Fields as in nodelink.
pub enum ToNode {
    /// It leads this term.
    Welcome { epoch: u64 },
    /// Begin a lease.
    Start(Order),
    /// End a lease. Stale: it stalled for longer than `order_ttl` (L8).
    Cancel { epoch: u64, lease: u32, stale: bool },
    /// Reports need not be repeated.
    Acknowledge { lease: u32, ended: bool, freed: bool },
    /// A call is refused.
    Deny { call: u8 },
}

/// An order to begin a lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Order {
    /// Of its term.
    pub epoch: u64,
    /// Its number.
    pub lease: u32,
    /// For which call.
    pub call: u8,
    /// Of which start of the agent.
    pub start: u8,
    /// Begin when this lease is freed (L14).
    pub after: Option<u32>,
    /// It stalled for longer than `order_ttl` (L8).
    pub stale: bool,
}

/// To a broker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Fields as in nodelink.
pub enum ToBroker {
    /// The term is accepted; this is what is here.
    Joined { epoch: u64, leases: Vec<NodeLease> },
    /// A call wants a slot.
    Request { call: u8, start: u8 },
    /// The visitor left.
    Dequeue { call: u8, start: u8 },
    /// The order was taken; with its card, unless the slot still clears.
    Started { lease: u32, card: bool },
    /// The order was not taken.
    Refused { lease: u32 },
    /// The clock runs.
    Running { lease: u32 },
    /// The clock stopped.
    Ended { lease: u32, ending: Ending, used_ms: u64 },
    /// The slot came back.
    Freed { lease: u32 },
    /// The node lives.
    Heartbeat,
}

/// What a node did about an event.
#[derive(Debug, Default)]
pub struct Told {
    /// To its leader, in order.
    pub messages: Vec<ToBroker>,
    /// Calls that were granted.
    pub granted: Vec<u8>,
    /// Calls that were refused.
    pub denied: Vec<u8>,
    /// Calls whose connection is cut.
    pub cut: Vec<u8>,
    /// An order was refused because there is no slot for it.
    pub no_room: bool,
    /// A rule was broken.
    pub broken: Option<Broken>,
}

impl NodeLease {
    /// Has its slot, or waits for it.
    pub const fn is_live(&self) -> bool {
        !matches!(self.phase, Phase::Ended { .. })
    }

    /// Its slot has not come back.
    pub const fn clears(&self) -> bool {
        matches!(self.phase, Phase::Ended { freed: false, .. })
    }

    const fn uses_slot(&self) -> bool {
        matches!(self.phase, Phase::Assigned | Phase::Running | Phase::Ended { freed: false, .. })
    }

    const fn is_freed(&self) -> bool {
        matches!(self.phase, Phase::Ended { freed: true, .. })
    }

    const fn end(&mut self, ending: Ending, used_ms: u64, freed: bool) {
        self.phase = Phase::Ended { ending, used_ms, told: false, freed, freed_told: false };
    }

    fn reports(&self) -> Vec<ToBroker> {
        let Phase::Ended { ending, used_ms, told, freed, freed_told } = self.phase else { return Vec::new() };
        let lease = self.lease;
        let ended = (!told).then_some(ToBroker::Ended { lease, ending, used_ms });
        let freed = (freed && !freed_told).then_some(ToBroker::Freed { lease });
        ended.into_iter().chain(freed).collect()
    }
}

impl Node {
    /// A node that was never in a term.
    pub const fn new() -> Self {
        Self { epoch: 0, start: 1, gone: false, leader: None, waiting: Vec::new(), leases: Vec::new() }
    }

    /// Calls whose leases wait for their slot.
    pub fn waiting_leases(&self) -> impl Iterator<Item = u8> {
        self.leases.iter().filter(|lease| lease.phase == Phase::Waiting).map(|lease| lease.call)
    }

    /// A call arrives.
    pub fn call(&mut self, call: u8) -> Told {
        self.waiting.push(call);
        self.say(vec![ToBroker::Request { call, start: self.start }])
    }

    /// The connection of a call closes before its answer is delivered.
    pub fn leave(&mut self, call: u8) -> Told {
        if self.waiting.contains(&call) {
            self.waiting.retain(|waiting| *waiting != call);
            return self.say(vec![ToBroker::Dequeue { call, start: self.start }]);
        }
        match self.leases.iter().position(|lease| lease.call == call && lease.is_live()) {
            Some(index) => self.end(index, Ending::Undelivered),
            None => Told::default(),
        }
    }

    /// A broker says something on a session that is not closed.
    pub fn receive(&mut self, broker: usize, message: &ToNode, fault: Fault) -> Told {
        let unfenced = fault == Fault::NoFence;
        if let ToNode::Welcome { epoch } = message {
            if *epoch < self.epoch && !unfenced {
                return Told::default();
            }
            self.epoch = self.epoch.max(*epoch);
            self.leader = Some(broker);
            return self.join(*epoch, fault);
        }
        if self.leader != Some(broker) && !unfenced {
            return Told::default();
        }
        match message {
            ToNode::Welcome { .. } => Told::default(),
            ToNode::Start(order) => self.start(order, fault),
            ToNode::Cancel { epoch, lease, stale } => {
                let stale = *stale && fault != Fault::NoAge;
                if stale || (*epoch < self.epoch && !unfenced) {
                    return Told::default();
                }
                let mut told = self.cancel(*lease);
                told.broken = (*epoch < self.epoch).then_some(Broken::Fence);
                told
            }
            ToNode::Acknowledge { lease, ended, freed } => {
                self.acknowledge(*lease, *ended, *freed);
                Told::default()
            }
            ToNode::Deny { call } => {
                let waited = self.waiting.contains(call);
                self.waiting.retain(|waiting| waiting != call);
                Told { denied: if waited { vec![*call] } else { Vec::new() }, ..Told::default() }
            }
        }
    }

    fn say(&self, messages: Vec<ToBroker>) -> Told {
        Told { messages, ..Told::default() }
    }

    fn join(&mut self, epoch: u64, fault: Fault) -> Told {
        let leases = if fault == Fault::JoinsEmpty { Vec::new() } else { self.leases.clone() };
        let mut messages = vec![ToBroker::Joined { epoch, leases }];
        messages.extend(self.waiting.iter().map(|call| ToBroker::Request { call: *call, start: self.start }));
        messages.extend(self.reports());
        self.say(messages)
    }

    /// Every report that is not acknowledged (L10).
    pub fn reports(&self) -> Vec<ToBroker> {
        self.leases.iter().flat_map(NodeLease::reports).collect()
    }

    fn start(&mut self, order: &Order, fault: Fault) -> Told {
        let lease = order.lease;
        let refused = |told: Told| Told { messages: vec![ToBroker::Refused { lease }], ..told };
        if (order.stale && fault != Fault::NoAge) || (order.epoch < self.epoch && fault != Fault::NoFence) {
            return refused(Told::default());
        }
        if self.leases.iter().any(|known| known.lease == lease) {
            return Told::default();
        }
        if order.start != self.start || !self.waiting.contains(&order.call) {
            return refused(Told::default());
        }
        let owned = self.leases.iter().any(NodeLease::is_live);
        if owned && !self.is_pending(order.after) {
            return refused(Told { no_room: true, ..Told::default() });
        }
        self.waiting.retain(|waiting| *waiting != order.call);
        let broken = (order.epoch < self.epoch).then_some(Broken::Fence);
        let (call, epoch) = (order.call, order.epoch);
        self.leases.push(NodeLease { lease, call, epoch, after: order.after, phase: Phase::Waiting });
        let mut told = self.begin_waiting();
        if self.leases.last().is_some_and(|lease| lease.phase == Phase::Waiting) {
            told.messages.push(ToBroker::Started { lease, card: false });
        }
        Told { broken, ..told }
    }

    /// The named lease still has its slot.
    fn is_pending(&self, after: Option<u32>) -> bool {
        self.leases.iter().any(|lease| Some(lease.lease) == after && !lease.is_freed())
    }

    /// The oldest that waits begins if the slot is free; those that can have none any more are refused.
    fn begin_waiting(&mut self) -> Told {
        let mut told = Told::default();
        let mut index = 0;
        while index < self.leases.len() {
            let NodeLease { lease, call, epoch, after, phase } = self.leases[index];
            if phase == Phase::Waiting {
                let first = self.leases.iter().position(|lease| lease.phase == Phase::Waiting) == Some(index);
                if first && !self.leases.iter().any(NodeLease::uses_slot) {
                    self.leases[index].phase = Phase::Assigned;
                    told.granted.push(call);
                    told.messages.push(ToBroker::Started { lease, card: true });
                } else if !first && !self.is_pending(after) {
                    self.leases.remove(index);
                    self.waiting.push(call);
                    told.messages.push(ToBroker::Refused { lease });
                    if epoch < self.epoch {
                        // Only the leader of its order's term knows whose lease it was.
                        told.messages.push(ToBroker::Request { call, start: self.start });
                    }
                    continue;
                }
            }
            index += 1;
        }
        told
    }

    /// `/allow`: the clock runs.
    pub fn allow(&mut self, index: usize) -> Told {
        let lease = self.leases[index].lease;
        self.leases[index].phase = Phase::Running;
        self.say(vec![ToBroker::Running { lease }])
    }

    /// A lease is over. Only what ran has something to clear.
    pub fn end(&mut self, index: usize, ending: Ending) -> Told {
        let lease = &mut self.leases[index];
        let ran = lease.phase == Phase::Running;
        lease.end(ending, if ran { USED_MS } else { 0 }, !ran);
        let mut told = Told { messages: lease.reports(), ..Told::default() };
        told.messages.extend(self.follow(&mut told.granted));
        told
    }

    fn follow(&mut self, granted: &mut Vec<u8>) -> Vec<ToBroker> {
        let next = self.begin_waiting();
        granted.extend(next.granted);
        next.messages
    }

    /// The gate is closed and the memory is back.
    pub fn free(&mut self, index: usize) -> Told {
        let lease = self.leases[index].lease;
        if let Phase::Ended { freed, .. } = &mut self.leases[index].phase {
            *freed = true;
        }
        let mut told = self.say(vec![ToBroker::Freed { lease }]);
        told.messages.extend(self.follow(&mut told.granted));
        told
    }

    fn cancel(&mut self, lease: u32) -> Told {
        match self.leases.iter().position(|known| known.lease == lease) {
            Some(index) if self.leases[index].is_live() => self.end(index, Ending::Cancelled),
            Some(_) => self.say(self.reports()),
            None => self
                .say(vec![ToBroker::Ended { lease, ending: Ending::Cancelled, used_ms: 0 }, ToBroker::Freed { lease }]),
        }
    }

    fn acknowledge(&mut self, lease: u32, with_end: bool, with_slot: bool) {
        let Some(known) = self.leases.iter_mut().find(|known| known.lease == lease) else { return };
        if let Phase::Ended { told, freed, freed_told, .. } = &mut known.phase {
            *told |= with_end;
            *freed_told |= with_slot && *freed;
        }
        self.leases.retain(|known| !matches!(known.phase, Phase::Ended { told: true, freed_told: true, .. }));
    }

    /// Its session to the leader is closed.
    pub const fn unlink(&mut self) {
        self.leader = None;
    }

    /// What was reported is forgotten: the fault against L10.
    pub fn forget_reported(&mut self) {
        self.leases.retain(|lease| !lease.is_freed());
    }

    /// The agent restarts with its checkpoint: workers run on, calls that wait are cut.
    pub fn restart(&mut self) -> Told {
        let cut = self.begin_again();
        for lease in self.leases.iter_mut().filter(|lease| lease.phase == Phase::Waiting) {
            lease.end(Ending::Undelivered, 0, true);
        }
        Told { cut, ..Told::default() }
    }

    /// The node reboots: nothing runs, and its leases are known by name. `wiped`: not even that, nor the epoch, which is
    /// read from the term page then (L6).
    pub fn reboot(&mut self, wiped: Option<u64>) -> Told {
        let cut = self.begin_again();
        for lease in &mut self.leases {
            match &mut lease.phase {
                Phase::Ended { freed, .. } => *freed = true,
                _ => lease.end(Ending::PlatformFault, 0, true),
            }
        }
        if let Some(term) = wiped {
            self.epoch = term;
            self.leases.clear();
        }
        Told { cut, ..Told::default() }
    }

    fn begin_again(&mut self) -> Vec<u8> {
        self.start += 1;
        self.leader = None;
        let waited = self.leases.iter().filter(|lease| lease.phase == Phase::Waiting).map(|lease| lease.call);
        let cut = waited.chain(self.waiting.iter().copied()).collect();
        self.waiting.clear();
        cut
    }

    /// Every limit in time has passed: nothing runs any more, and every slot is back.
    pub fn outlast(&mut self) -> Told {
        let mut told = Told::default();
        for lease in &mut self.leases {
            match &mut lease.phase {
                Phase::Ended { freed: true, .. } => continue,
                Phase::Ended { freed, .. } => {
                    *freed = true;
                    told.messages.push(ToBroker::Freed { lease: lease.lease });
                    continue;
                }
                Phase::Waiting => {
                    told.granted.push(lease.call);
                    lease.end(Ending::NeverAllowed, 0, true);
                }
                Phase::Assigned => lease.end(Ending::NeverAllowed, 0, true),
                Phase::Running => lease.end(Ending::Deadline, crate::bounds::DEADLINE_MS, true),
            }
            told.messages.extend(lease.reports());
        }
        if self.leader.is_none() {
            // Callers do not wait for a broker forever.
            told.cut = std::mem::take(&mut self.waiting);
        }
        told
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}
