//! A node agent, as the design wants it: the truth about slots and clocks (L7 to L11).

use std::collections::{BTreeMap, VecDeque};

use spaceport_core::ids::{Epoch, LeaseId, NodeName, Size, Ticket};
use spaceport_core::lease::{AgentLease, AgentPhase, Command, EndReport, FreedAs, Order};
use spaceport_core::page::Ending;
use spaceport_core::slots::{Card, Occupancy, pick};

/// A lease on its node.
#[derive(Clone, Debug)]
pub struct Held {
    pub order: Order,
    pub card: Option<u32>,
    pub phase: Phase,
    pub ended_acknowledged: bool,
    pub freed_acknowledged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    Waiting,
    Assigned { since: u64 },
    Running { since: u64 },
    Ended { report: EndReport, freed: bool },
}

/// From the broker, with the time of the stamp it echoes.
#[derive(Clone, Debug)]
pub enum ToAgent {
    Start(Order, u64),
    Cancel(LeaseId),
    Acknowledge(LeaseId, bool, bool),
    Deny(Ticket),
}

/// What the ticket was for, so that it can be presented again.
#[derive(Clone, Debug)]
pub struct Asked {
    pub request: spaceport_core::lease::Request,
    pub sent: bool,
}

pub struct Agent {
    pub name: NodeName,
    pub instance: u64,
    pub epoch: Epoch,
    pub connected: bool,
    pub cards: Vec<Card>,
    pub tickets: BTreeMap<Ticket, Asked>,
    pub leases: BTreeMap<LeaseId, Held>,
    pub outbox: VecDeque<Command>,
    pub inbox: VecDeque<ToAgent>,
    /// Orders refused although nothing but the order itself was wrong: no free slot.
    pub no_slot: u32,
    /// Requests that were answered.
    pub answered: u32,
}

impl Agent {
    pub fn new(name: &str, cards: u32) -> Self {
        Self {
            name: NodeName::new(name),
            instance: 1,
            epoch: Epoch(0),
            connected: false,
            cards: (0..cards)
                .map(|index| Card { index, large_slots: 2, grantable: true, quarantined_slots: 0 })
                .collect(),
            tickets: BTreeMap::new(),
            leases: BTreeMap::new(),
            outbox: VecDeque::new(),
            inbox: VecDeque::new(),
            no_slot: 0,
            answered: 0,
        }
    }

    pub fn instance_name(&self) -> String {
        format!("{}-{}", self.name, self.instance)
    }

    fn send(&mut self, command: Command) {
        if self.connected {
            self.outbox.push_back(command);
        }
    }

    pub fn connect(&mut self, epoch: Epoch, now: u64) {
        self.connected = true;
        self.epoch = self.epoch.max(epoch);
        (self.inbox, self.outbox) = (VecDeque::new(), VecDeque::new());
        let leases = self.leases.values().map(|held| self.told(held)).collect();
        let (node, cards) = (self.name.clone(), self.cards.clone());
        self.send(Command::NodeJoined { node, epoch, cards, leases });
        let again: Vec<_> = self
            .tickets
            .values_mut()
            .map(|asked| {
                asked.sent = true;
                asked.request.clone()
            })
            .collect();
        for request in again {
            self.send(Command::Request(Box::new(request)));
        }
        self.repeat(now);
    }

    pub fn disconnect(&mut self) {
        self.connected = false;
        (self.inbox, self.outbox) = (VecDeque::new(), VecDeque::new());
        for asked in self.tickets.values_mut() {
            asked.sent = false;
        }
    }

    /// The agent's process dies: connections are gone, leases live on from the checkpoint, unless that is lost too.
    pub fn restart(&mut self, checkpoint_lost: bool, now: u64) {
        self.disconnect();
        self.instance += 1;
        self.tickets.clear();
        if checkpoint_lost {
            self.leases.clear();
            return;
        }
        let waiting: Vec<LeaseId> =
            self.leases.iter().filter(|(_, held)| held.phase == Phase::Waiting).map(|(id, _)| id.clone()).collect();
        for lease in waiting {
            self.end(&lease, Ending::Undelivered, now);
        }
    }

    fn told(&self, held: &Held) -> AgentLease {
        AgentLease {
            lease: held.order.lease.clone(),
            size: held.order.size,
            card: held.card.unwrap_or(0),
            phase: match held.phase {
                Phase::Waiting | Phase::Assigned { .. } => AgentPhase::Assigned,
                Phase::Running { .. } => AgentPhase::Running,
                Phase::Ended { report, freed } => AgentPhase::Ended { report, freed },
            },
        }
    }

    /// True while somebody could use a GPU by this lease, or come to.
    pub fn is_live(&self, lease: &LeaseId) -> bool {
        self.leases.get(lease).is_some_and(|held| !matches!(held.phase, Phase::Ended { .. }))
    }

    fn occupancy(&self) -> Occupancy {
        let mut occupancy = Occupancy::default();
        for held in self.leases.values() {
            if let Some(card) = held.card
                && !matches!(held.phase, Phase::Ended { freed: true, .. })
            {
                let slots = self.cards.iter().find(|known| known.index == card);
                occupancy.add(card, slots.map_or(2, |card| card.slots_of(held.order.size)));
            }
        }
        occupancy
    }

    /// Invariant 6, on the node itself.
    pub fn assert_exclusive(&self) -> Result<(), String> {
        let occupancy = self.occupancy();
        for card in &self.cards {
            if occupancy.used(card.index) > card.large_slots {
                return Err(format!("invariant 6: card {} of {} is used twice", card.index, self.name));
            }
        }
        Ok(())
    }

    pub fn receive(&mut self, message: ToAgent, now: u64) {
        match message {
            ToAgent::Start(order, stamp) => self.start(order, stamp, now),
            ToAgent::Cancel(lease) => {
                if self.leases.contains_key(&lease) {
                    self.end(&lease, Ending::Cancelled, now);
                } else {
                    let report = EndReport { ending: Ending::Cancelled, used_ms: 0 };
                    let node = self.name.clone();
                    self.send(Command::Ended { node: node.clone(), lease: lease.clone(), report });
                    self.send(Command::Freed { node, lease, how: FreedAs::Free });
                }
            }
            ToAgent::Acknowledge(lease, ended, freed) => {
                if let Some(held) = self.leases.get_mut(&lease) {
                    if let Phase::Ended { freed: is_free, .. } = held.phase {
                        held.ended_acknowledged |= ended;
                        held.freed_acknowledged |= freed && is_free;
                    }
                    if held.ended_acknowledged && held.freed_acknowledged {
                        self.leases.remove(&lease);
                    }
                }
            }
            ToAgent::Deny(ticket) => {
                if self.tickets.remove(&ticket).is_some() {
                    self.answered += 1;
                }
            }
        }
    }

    fn refuse(&mut self, lease: LeaseId) {
        let node = self.name.clone();
        self.send(Command::Refused { node, lease });
    }

    fn start(&mut self, order: Order, stamp: u64, now: u64) {
        let late = now.saturating_sub(stamp) > order.limits.order_ttl_ms;
        if order.epoch < self.epoch || late || !self.tickets.contains_key(&order.ticket) {
            return self.refuse(order.lease);
        }
        if self.leases.contains_key(&order.lease) {
            return;
        }
        let card = pick(&self.cards, &self.occupancy(), order.size, &[]);
        if card.is_none() && !self.is_pending(order.after.as_ref()) && !self.will_have_room(order.size, None) {
            self.no_slot += 1;
            return self.refuse(order.lease);
        }
        self.tickets.remove(&order.ticket);
        self.answered += 1;
        let id = order.lease.clone();
        let phase = if card.is_some() { Phase::Assigned { since: now } } else { Phase::Waiting };
        let held = Held { order, card, phase, ended_acknowledged: false, freed_acknowledged: false };
        self.leases.insert(id.clone(), held);
        let node = self.name.clone();
        self.send(Command::Started { node, lease: id, card });
    }

    fn is_pending(&self, after: Option<&LeaseId>) -> bool {
        after
            .and_then(|after| self.leases.get(after))
            .is_some_and(|held| !matches!(held.phase, Phase::Ended { freed: true, .. }))
    }

    pub fn allow(&mut self, lease: &LeaseId, now: u64) {
        let Some(held) = self.leases.get_mut(lease) else { return };
        if matches!(held.phase, Phase::Assigned { .. }) {
            held.phase = Phase::Running { since: now };
            let (node, lease) = (self.name.clone(), lease.clone());
            self.send(Command::Running { node, lease });
        }
    }

    pub fn end(&mut self, lease: &LeaseId, ending: Ending, now: u64) {
        let Some(held) = self.leases.get_mut(lease) else { return };
        let (used_ms, ending) = match (held.phase, ending) {
            (Phase::Ended { .. }, _) => return,
            (Phase::Running { since }, ending) => (now - since, ending),
            // Nothing ran, whatever was meant.
            (_, Ending::Cancelled | Ending::Undelivered | Ending::PlatformFault) => (0, ending),
            (_, _) => (0, Ending::NeverAllowed),
        };
        let report = EndReport { ending, used_ms };
        // Without a slot there is nothing to clear.
        let freed = held.card.is_none();
        held.phase = Phase::Ended { report, freed };
        let (node, lease) = (self.name.clone(), lease.clone());
        self.send(Command::Ended { node: node.clone(), lease: lease.clone(), report });
        if freed {
            self.send(Command::Freed { node, lease, how: FreedAs::Free });
        }
    }

    pub fn free(&mut self, lease: &LeaseId, how: FreedAs, now: u64) {
        let Some(held) = self.leases.get_mut(lease) else { return };
        let Phase::Ended { report, freed: false } = held.phase else { return };
        held.phase = Phase::Ended { report, freed: true };
        if how == FreedAs::Quarantined
            && let Some(card) = held.card
        {
            let slots = if held.order.size == Size::Large { 1 } else { 2 };
            if let Some(card) = self.cards.iter_mut().find(|known| known.index == card) {
                card.quarantined_slots = (card.quarantined_slots + slots).min(card.large_slots);
            }
            let (node, cards) = (self.name.clone(), Some(self.cards.clone()));
            self.send(Command::Heartbeat { node, cards });
        }
        let (node, lease) = (self.name.clone(), lease.clone());
        self.send(Command::Freed { node, lease, how });
        self.begin_waiting(now);
    }

    /// Slots that clear are enough for everybody who waits, `but` one, and for one more of this size. Whose successor takes
    /// which of them does not matter.
    fn will_have_room(&self, size: Size, but: Option<&LeaseId>) -> bool {
        let waiting = self.leases.iter().filter(|(id, held)| held.phase == Phase::Waiting && Some(*id) != but);
        let sizes: Vec<Size> = waiting.map(|(_, held)| held.order.size).chain([size]).collect();
        let mut occupancy = Occupancy::default();
        for held in self.leases.values().filter(|held| !matches!(held.phase, Phase::Ended { .. })) {
            if let Some(card) = self.cards.iter().find(|card| Some(card.index) == held.card) {
                occupancy.add(card.index, card.slots_of(held.order.size));
            }
        }
        sizes.into_iter().all(|size| {
            let card = pick(&self.cards, &occupancy, size, &[]).and_then(|index| self.cards.get(index as usize));
            if let Some(card) = card {
                occupancy.add(card.index, card.slots_of(size));
            }
            card.is_some()
        })
    }

    fn begin_waiting(&mut self, now: u64) {
        let waiting: Vec<LeaseId> =
            self.leases.iter().filter(|(_, held)| held.phase == Phase::Waiting).map(|(id, _)| id.clone()).collect();
        for id in waiting {
            let order = self.leases[&id].order.clone();
            let card = pick(&self.cards, &self.occupancy(), order.size, &[]);
            if card.is_some() {
                if let Some(held) = self.leases.get_mut(&id) {
                    (held.card, held.phase) = (card, Phase::Assigned { since: now });
                }
                let node = self.name.clone();
                self.send(Command::Started { node, lease: id, card });
            } else if !self.is_pending(order.after.as_ref()) && !self.will_have_room(order.size, Some(&id)) {
                self.leases.remove(&id);
                self.refuse(id);
            }
        }
    }

    /// Deadlines: invariant 8, whatever became of everyone else. Ends at the limit itself, as a timer would.
    pub fn expire(&mut self, now: u64) {
        let due: Vec<(LeaseId, Ending, u64)> = self
            .leases
            .iter()
            .filter_map(|(id, held)| match held.phase {
                Phase::Assigned { since } => {
                    let limit = since + held.order.limits.allow_limit_ms;
                    (limit <= now).then(|| (id.clone(), Ending::NeverAllowed, limit))
                }
                Phase::Running { since } => {
                    let limit = since + held.order.declared_ms + held.order.limits.grace_ms;
                    (limit <= now).then(|| (id.clone(), Ending::Deadline, limit))
                }
                _ => None,
            })
            .collect();
        for (lease, ending, at) in due {
            self.end(&lease, ending, at);
        }
    }

    /// L10: reports are repeated until they are acknowledged.
    pub fn repeat(&mut self, _now: u64) {
        let reports: Vec<(LeaseId, EndReport, bool)> = self
            .leases
            .iter()
            .filter_map(|(id, held)| match held.phase {
                Phase::Ended { report, freed } => Some((id.clone(), report, freed)),
                _ => None,
            })
            .collect();
        for (lease, report, freed) in reports {
            let node = self.name.clone();
            self.send(Command::Ended { node: node.clone(), lease: lease.clone(), report });
            if freed {
                self.send(Command::Freed { node, lease, how: FreedAs::Free });
            }
        }
        let node = self.name.clone();
        self.send(Command::Heartbeat { node, cards: None });
    }

    pub fn leave(&mut self, ticket: &Ticket) {
        if let Some(asked) = self.tickets.remove(ticket) {
            self.answered += 1;
            if asked.sent {
                self.send(Command::Dequeue { ticket: ticket.clone() });
            }
        }
    }
}
