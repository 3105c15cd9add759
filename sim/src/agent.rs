//! A node agent, as the design wants it: the truth about slots and clocks (L7 to L11, L16, L17).

use std::collections::BTreeMap;

use spaceport_core::ids::{Epoch, LeaseId, NodeName, Size, Ticket};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Command, EndReport, FreedAs, IdleWorker, Order, PickedSlot, Place, Request,
};
use spaceport_core::page::Ending;
use spaceport_core::slots::{Card, Occupancy, pick};

use crate::broken::NodeFault;
use crate::links::LinkId;
use idle::{Idle, Spot};

/// So long after its reuse a dead worker's successor is allowed, as on a real node.
const SUCCESSOR_MS: u64 = 2_000;

pub mod idle;
pub mod reports;
pub mod waiting;

/// A lease on its node.
#[derive(Clone, Debug)]
pub struct Held {
    /// As ordered.
    pub order: Order,
    /// The call it is for.
    pub request: Request,
    /// Where; None while it waits for a slot, and after a reboot.
    pub card: Option<u32>,
    /// While it waits: the card whose slot will be its own as soon as that is clear.
    pub reserved: Option<u32>,
    /// It had to wait for its slot.
    pub waited: bool,
    /// Counts the orders that were taken: who waits begins in this order.
    pub arrival: u64,
    /// It does not begin later than this, for the broker may have given it up (L9); BOOTTIME.
    pub begin_by: u64,
    /// Where its call waited (L17).
    pub told: Option<Told>,
    /// How far it is.
    pub phase: Phase,
    /// The broker has its end.
    pub ended_acknowledged: bool,
    /// The broker has its slot.
    pub freed_acknowledged: bool,
}

/// How far a lease is on its node; times are the node's BOOTTIME.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    /// For a slot that clears (L14).
    Waiting,
    /// For `/allow`.
    Assigned {
        /// The grant was answered.
        since: u64,
    },
    /// The clock runs.
    Running {
        /// It began.
        since: u64,
        /// On an idle worker's slot, without `/allow`.
        reused: bool,
    },
    /// Over.
    Ended {
        /// As told to the broker.
        report: EndReport,
        /// The slot is back.
        freed: bool,
    },
}

/// From the broker.
#[derive(Clone, Debug)]
pub enum ToAgent {
    /// It leads this term.
    Welcome(Epoch),
    /// An order, with the stamp of the node's BOOTTIME that it echoes (L8).
    Start(Box<Order>, u64),
    /// End a lease; an order too.
    Cancel {
        /// Of the broker.
        epoch: Epoch,
        /// Echoed.
        stamp: u64,
        /// Age at which it is refused.
        order_ttl_ms: u64,
        /// Which.
        lease: LeaseId,
    },
    /// A report need not be repeated: lease, ended, freed.
    Acknowledge(LeaseId, bool, bool),
    /// A request is refused.
    Deny(Ticket),
    /// A request waits.
    Queued(Box<Place>),
}

/// What a request was told (L17).
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// Its place.
    pub place: (Epoch, u64),
    /// The longest wait that was promised, milliseconds.
    pub wait_ms: Option<u64>,
    /// When, BOOTTIME.
    pub at: u64,
}

/// What the ticket was for, so that it can be presented again.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The call.
    pub request: Request,
    /// The leader of now has it.
    pub sent: bool,
    /// Since when it has been without a broker, BOOTTIME.
    pub unsent_since: u64,
    /// Where it waits.
    pub told: Option<Told>,
}

/// What the world has to know of what an agent did.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// A lease got its slot.
    Began(LeaseId),
    /// It took the order.
    Taken(LeaseId, Ticket),
    /// It ended.
    Ended(LeaseId, EndReport),
    /// It refused an order that was too old.
    RefusedAge(LeaseId),
    /// It refused an order of an earlier term.
    RefusedEpoch(LeaseId),
    /// It refused an order for want of a slot.
    NoSlot {
        /// Which.
        lease: LeaseId,
    },
    /// It refused a lease that had waited too long for a slot.
    WaitedTooLong(LeaseId),
    /// It refused an order whose caller is gone.
    CallerGone(LeaseId),
    /// A caller was refused.
    Refused(Ticket),
    /// A caller was told that there is no broker.
    GaveUp(Ticket),
    /// A waiting lease began on another card than the one its predecessor had.
    Swapped(LeaseId),
    /// The worker that was kept of this lease has to go.
    Evicted(LeaseId),
}

/// A node and its agent.
pub struct Agent {
    /// Its node.
    pub name: NodeName,
    /// Counts the starts of the agent.
    pub instance: u64,
    /// The highest that was accepted; in a file that survives everything (L6).
    pub epoch: Epoch,
    /// The stream of the broker that leads, as far as the agent knows.
    pub leader: Option<LinkId>,
    /// World time at which BOOTTIME began.
    pub booted: u64,
    /// Its cards.
    pub cards: Vec<Card>,
    /// Callers that wait.
    pub tickets: BTreeMap<Ticket, Asked>,
    /// Leases that the broker has not forgotten.
    pub leases: BTreeMap<LeaseId, Held>,
    /// Workers that are kept, in the order of their cards.
    pub idle: Vec<Idle>,
    /// Workers that were kept and have not given their slots back, by the lease that each was of.
    pub evicted: BTreeMap<LeaseId, (u32, Size)>,
    /// Workers are kept although others wait: these go first only where their keys are no better than equal.
    pub keeps_eagerly: bool,
    /// The kept workers that the leader was told of last.
    idle_told: Vec<IdleWorker>,
    /// What it says to the leader.
    pub sends: Vec<Command>,
    /// What it did.
    pub notices: Vec<Notice>,
    arrivals: u64,
    /// What is wrong with it on purpose.
    pub fault: Option<NodeFault>,
}

// === impl Agent ===

impl Agent {
    /// A node with so many slots on each card.
    pub fn new(name: &NodeName, cards: &[u32], fault: Option<NodeFault>) -> Self {
        let card = |(index, large_slots): (u32, &u32)| Card {
            index,
            large_slots: *large_slots,
            grantable: true,
            quarantined_slots: 0,
        };
        Self {
            name: name.clone(),
            instance: 1,
            epoch: Epoch(0),
            leader: None,
            booted: 0,
            cards: (0..).zip(cards).map(card).collect(),
            tickets: BTreeMap::new(),
            leases: BTreeMap::new(),
            idle: Vec::new(),
            evicted: BTreeMap::new(),
            keeps_eagerly: false,
            idle_told: Vec::new(),
            sends: Vec::new(),
            notices: Vec::new(),
            arrivals: 0,
            fault,
        }
    }

    /// Fresh at every start.
    pub fn instance_name(&self) -> String {
        format!("{}-{}", self.name, self.instance)
    }

    /// BOOTTIME, milliseconds.
    pub const fn clock(&self, world_ms: u64) -> u64 {
        world_ms.saturating_sub(self.booted)
    }

    fn has(&self, fault: NodeFault) -> bool {
        self.fault == Some(fault)
    }

    fn send(&mut self, command: Command) {
        if self.leader.is_some() {
            self.sends.push(command);
        }
    }

    /// A broker says that it leads. The highest epoch wins (L17); false if it is not joined.
    pub fn welcome(&mut self, link: LinkId, epoch: Epoch, now: u64) -> bool {
        if epoch < self.epoch && !self.has(NodeFault::IgnoresEpoch) {
            return false;
        }
        self.epoch = self.epoch.max(epoch);
        // Joined is the first that a leader hears.
        self.leader = None;
        self.refuse_overdue(now);
        self.leader = Some(link);
        let leases = self.leases.values().map(told).collect();
        let (node, cards) = (self.name.clone(), self.cards.clone());
        self.idle_told = self.idle_list();
        let idle = self.idle_told.clone();
        self.send(Command::NodeJoined { node, epoch, cards, leases, idle });
        self.present_all(now);
        self.repeat();
        true
    }

    /// The stream of the leader is over.
    pub fn unlink(&mut self, now: u64) {
        self.leader = None;
        for asked in self.tickets.values_mut().filter(|asked| asked.sent) {
            (asked.sent, asked.unsent_since) = (false, now);
        }
    }

    /// A call.
    pub fn ask(&mut self, request: Request, now: u64) {
        let ticket = request.ticket.clone();
        self.tickets.insert(ticket.clone(), Asked { request, sent: false, unsent_since: now, told: None });
        self.present(&ticket, now);
    }

    /// A caller goes while it waits.
    pub fn leave(&mut self, ticket: &Ticket) {
        if self.tickets.remove(ticket).is_some_and(|asked| asked.sent) {
            self.send(Command::Dequeue { ticket: ticket.clone() });
        }
    }

    /// True while somebody could use a GPU by this lease, or come to.
    pub fn is_live(&self, lease: &LeaseId) -> bool {
        self.leases.get(lease).is_some_and(|held| !matches!(held.phase, Phase::Ended { .. }))
    }

    /// It has its own worker back.
    pub fn is_reused(&self, lease: &LeaseId) -> bool {
        self.leases.get(lease).is_some_and(|held| matches!(held.phase, Phase::Running { reused: true, .. }))
    }

    /// Slots in use, kept or not clear: what the hardware shows.
    pub fn occupancy(&self) -> Occupancy {
        let mut occupancy = Occupancy::default();
        for held in self.leases.values().filter(|held| !matches!(held.phase, Phase::Ended { freed: true, .. })) {
            if let Some(card) = held.card {
                occupancy.add(card, self.slots_of(card, held.order.size));
            }
        }
        let idle = self.idle.iter().map(|idle| (idle.card, idle.size));
        for (card, size) in idle.chain(self.evicted.values().copied()) {
            occupancy.add(card, self.slots_of(card, size));
        }
        occupancy
    }

    /// Slots that a new lease cannot have: `now`, or when all that clears is clear. Who waits for a slot has it already.
    fn spoken_for(&self, now: bool, but: Option<&LeaseId>) -> Occupancy {
        let mut occupancy = Occupancy::default();
        for card in &self.cards {
            let (mut taken, mut clearing, mut reserved) = (0, 0, 0);
            for (_, held) in self.leases.iter().filter(|(id, _)| Some(*id) != but) {
                let slots = card.slots_of(held.order.size);
                match held.phase {
                    Phase::Waiting if held.reserved == Some(card.index) => reserved += slots,
                    Phase::Ended { freed: false, .. } if held.card == Some(card.index) => clearing += slots,
                    Phase::Assigned { .. } | Phase::Running { .. } if held.card == Some(card.index) => taken += slots,
                    _ => {}
                }
            }
            let evicted = self.evicted.values().filter(|(evicted, _)| *evicted == card.index);
            clearing += evicted.map(|(_, size)| card.slots_of(*size)).sum::<u32>();
            occupancy.add(card.index, taken + if now { clearing.max(reserved) } else { reserved });
        }
        occupancy
    }

    /// The card for a lease, none of those that it is to avoid (L7): that of its own worker, else one with a clear slot, else one
    /// whose worker goes, else one with a slot that clears.
    fn place(&self, order: &Order, request: &Request, but: Option<&LeaseId>) -> Option<(u32, Spot)> {
        let (now, later) = (self.spoken_for(true, but), self.spoken_for(false, but));
        let mut beside_idle = now.clone();
        self.idle.iter().for_each(|idle| beside_idle.add(idle.card, self.slots_of(idle.card, idle.size)));
        let pick = |occupancy: &Occupancy| pick(&self.cards, occupancy, order.size, &order.avoid);
        let own = self.own_idle(order, request).map(|card| (card, Spot::Own));
        own.or_else(|| pick(&beside_idle).map(|card| (card, Spot::Clear)))
            .or_else(|| pick(&now).map(|card| (card, Spot::Evicts)))
            .or_else(|| pick(&later).map(|card| (card, Spot::Clears)))
    }

    fn slots_of(&self, card: u32, size: Size) -> u32 {
        self.cards.iter().find(|known| known.index == card).map_or(1, |card| card.slots_of(size))
    }

    /// The broker of a stream says something.
    pub fn receive(&mut self, link: LinkId, message: ToAgent, now: u64) {
        let leads = self.leader == Some(link);
        match message {
            ToAgent::Welcome(epoch) => drop(self.welcome(link, epoch, now)),
            ToAgent::Start(order, stamp) if leads || self.has(NodeFault::IgnoresEpoch) => {
                self.start(*order, stamp, now);
            }
            ToAgent::Start(order, _) => self.notices.push(Notice::RefusedEpoch(order.lease)),
            _ if !leads => {}
            ToAgent::Cancel { epoch, stamp, order_ttl_ms, lease } => {
                // The broker repeats an order that is still wanted.
                if epoch >= self.epoch && is_fresh(now, stamp, order_ttl_ms) {
                    self.cancel(&lease, now);
                }
            }
            ToAgent::Acknowledge(lease, ended, freed) => self.acknowledged(&lease, ended, freed),
            ToAgent::Deny(ticket) => {
                if self.tickets.remove(&ticket).is_some() {
                    self.notices.push(Notice::Refused(ticket));
                }
            }
            ToAgent::Queued(place) => self.queued(&place, now),
        }
    }

    fn refuse(&mut self, lease: LeaseId) {
        let node = self.name.clone();
        self.send(Command::Refused { node, lease });
    }

    fn start(&mut self, order: Order, stamp: u64, now: u64) {
        let lease = || order.lease.clone();
        if order.epoch < self.epoch && !self.has(NodeFault::IgnoresEpoch) {
            self.notices.push(Notice::RefusedEpoch(lease()));
            return self.refuse(order.lease);
        }
        if !is_fresh(now, stamp, order.limits.order_ttl_ms) && !self.has(NodeFault::TakesStaleOrders) {
            self.notices.push(Notice::RefusedAge(lease()));
            return self.refuse(order.lease);
        }
        if self.leases.contains_key(&order.lease) {
            return;
        }
        let Some(asked) = self.tickets.get(&order.ticket) else {
            self.notices.push(Notice::CallerGone(lease()));
            return self.refuse(order.lease);
        };
        let place = self.place(&order, &asked.request, None);
        if place.is_none() && !self.is_pending(order.after.as_ref()) {
            self.notices.push(Notice::NoSlot { lease: lease() });
            return self.refuse(order.lease);
        }
        let (id, ticket) = (lease(), order.ticket.clone());
        let Some(asked) = self.tickets.remove(&ticket) else { return };
        if let Some((card, spot)) = place {
            self.take(card, spot, &order, &asked.request);
        }
        let card = place.filter(|(_, spot)| spot.is_clear()).map(|(card, _)| card);
        let reserved = place.filter(|(_, spot)| !spot.is_clear()).map(|(card, _)| card);
        let phase = place.map_or(Phase::Waiting, |(_, spot)| spot.phase(now));
        let (request, arrival, told) = (asked.request, self.arrivals, asked.told);
        let begin_by = stamp + order.limits.order_ttl_ms + order.wait_ms;
        self.arrivals += 1;
        let (ended_acknowledged, freed_acknowledged) = (false, false);
        let waited = card.is_none();
        let held = Held {
            order,
            request,
            card,
            reserved,
            waited,
            arrival,
            begin_by,
            told,
            phase,
            ended_acknowledged,
            freed_acknowledged,
        };
        self.leases.insert(id.clone(), held);
        self.notices.push(Notice::Taken(id.clone(), ticket));
        self.tell_slot(&id);
        if card.is_some() {
            self.tell_reuse(&id);
            self.notices.push(Notice::Began(id));
        }
        self.tell_idle();
    }

    fn is_pending(&self, after: Option<&LeaseId>) -> bool {
        after
            .and_then(|after| self.leases.get(after))
            .is_some_and(|held| !matches!(held.phase, Phase::Ended { freed: true, .. }))
    }

    fn of_phase(&self, is: impl Fn(&Phase) -> bool) -> Vec<LeaseId> {
        self.leases.iter().filter(|(_, held)| is(&held.phase)).map(|(id, _)| id.clone()).collect()
    }

    /// `/allow` is accepted: false if it comes too late or twice. On a reused worker's lease it starts the clock anew, for
    /// the worker had died (L16).
    pub fn allow(&mut self, lease: &LeaseId, now: u64) -> bool {
        let Some(held) = self.leases.get_mut(lease) else { return false };
        match held.phase {
            Phase::Assigned { .. } => {}
            Phase::Running { since, reused: true }
                if now.saturating_sub(since) <= held.order.limits.allow_limit_ms.min(SUCCESSOR_MS) => {}
            Phase::Running { .. } | Phase::Waiting | Phase::Ended { .. } => return false,
        }
        held.phase = Phase::Running { since: now, reused: false };
        let (node, lease) = (self.name.clone(), lease.clone());
        self.send(Command::Running { node, lease });
        true
    }

    /// Ends what passed its limits, at the limit itself, as a timer would: invariant 8, whatever became of everyone else.
    pub fn expire(&mut self, now: u64) {
        let due: Vec<(LeaseId, Ending, u64)> = self
            .leases
            .iter()
            .filter_map(|(id, held)| {
                let (limit, ending) = held.limit()?;
                (limit <= now).then(|| (id.clone(), ending, limit))
            })
            .filter(|(_, ending, _)| *ending != Ending::Deadline || !self.has(NodeFault::ForgetsDeadline))
            // It was never there: it is refused instead.
            .filter(|(_, ending, _)| *ending != Ending::Refused)
            .collect();
        for (lease, ending, at) in due {
            self.end(&lease, ending, at);
        }
        self.refuse_overdue(now);
    }
}

// === impl Held ===

impl Held {
    /// Its slot, as its broker is told. One that is over and was lost with everything else had the first card.
    pub fn slot(&self) -> PickedSlot {
        match (self.phase, self.reserved) {
            (Phase::Waiting, Some(card)) => PickedSlot::Awaits(card),
            (Phase::Waiting, None) => PickedSlot::Open,
            (_, _) => PickedSlot::Has(self.card.unwrap_or(0)),
        }
    }

    /// When its node ends it by itself, or gives it back, and how.
    pub const fn limit(&self) -> Option<(u64, Ending)> {
        match self.phase {
            Phase::Assigned { since } => Some((since + self.order.limits.allow_limit_ms, Ending::NeverAllowed)),
            Phase::Running { since, .. } => {
                Some((since + self.order.declared_ms + self.order.limits.grace_ms, Ending::Deadline))
            }
            Phase::Waiting => Some((self.begin_by, Ending::Refused)),
            Phase::Ended { .. } => None,
        }
    }
}

/// L8, also for stamps of another boot.
const fn is_fresh(now: u64, stamp: u64, order_ttl_ms: u64) -> bool {
    stamp <= now && now - stamp <= order_ttl_ms
}

fn told(held: &Held) -> AgentLease {
    AgentLease {
        lease: held.order.lease.clone(),
        account: Some(held.order.account.clone()),
        size: held.order.size,
        slot: held.slot(),
        phase: match held.phase {
            Phase::Waiting | Phase::Assigned { .. } => AgentPhase::Assigned,
            Phase::Running { .. } => AgentPhase::Running,
            Phase::Ended { report, freed } => AgentPhase::Ended { report, freed },
        },
    }
}

impl Agent {
    /// Tells of a slot that came back.
    fn tell_freed(&mut self, lease: LeaseId, how: FreedAs) {
        let node = self.name.clone();
        self.send(Command::Freed { node, lease, how });
    }
}
