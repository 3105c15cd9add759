//! Clients and their workers: they call, wait or leave, are allowed in time or not, use what they asked for or more.

use std::collections::BTreeMap;

use spaceport_core::ids::{AccountName, CookieId, LeaseId, NodeName, Revision, Size, Ticket, WorkerKey};
use spaceport_core::lease::{EndReport, FreedAs, Request};
use spaceport_core::page::{Budget, Ending};
use spaceport_core::protocol::UnauthenticatedReason;

use super::World;
use crate::agenda::Happening;
use crate::agent::Phase;
use crate::coverage::Scenario;
use crate::weather::FaultKind;

/// How often a client makes a call again that was not served.
const RETRIES_MAX: u32 = 2;
/// Visitors of an address prefix.
const VISITORS: u64 = 5;
/// Functions of an app.
const FUNCTIONS: u64 = 3;
/// How long it takes, on average, until a kept worker that is killed has given its memory back.
const EVICTED_MS: u64 = 300;
/// `/allow` this near to the limit is a race.
const RACE_MS: u64 = 20;

/// What became of a call.
#[derive(Clone, Debug)]
pub struct Called {
    /// As its agent asked.
    pub request: Request,
    /// What its client does.
    pub habit: Habit,
    /// Calls like it that were made before.
    pub retries: u32,
}

/// How a client and its worker behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// Its worker is allowed after so long, runs so long, and ends like this.
    Works {
        /// From the grant, milliseconds.
        allow_ms: u64,
        /// From the accepted `/allow`, milliseconds.
        run_ms: u64,
        /// How.
        ending: Ending,
    },
    /// Asks for its device at the very limit.
    Races,
    /// Its worker never asks for its device.
    NeverAllows,
    /// Its connection closes so long after the grant.
    Leaves {
        /// Milliseconds.
        after_ms: u64,
    },
}

/// Everybody.
#[derive(Default)]
pub struct Clients {
    /// Calls that were made.
    pub calls: BTreeMap<Ticket, Called>,
    /// Calls by the lease that they got.
    pub leases: BTreeMap<LeaseId, Ticket>,
    /// Calls that are still to be made.
    pub left: u64,
    tickets: u64,
    /// Retries under way.
    waiting: u64,
    /// What each lease's node said of its end.
    pub ends: BTreeMap<LeaseId, EndReport>,
    /// World time at which it said so, until the settlement is durable.
    pub ended_at: BTreeMap<LeaseId, u64>,
}

// === impl Clients ===

impl Clients {
    /// Somebody is about to call again.
    pub const fn retrying(&self) -> bool {
        self.waiting > 0
    }
}

// === impl World ===

impl World {
    pub(super) fn call(&mut self) {
        self.clients.left -= 1;
        if self.clients.left > 0 {
            let at = self.now + self.random.around(self.plan.call_gap_ms);
            self.agenda.add(at, Happening::Call);
        }
        let Some(node) = self.random.pick(&self.plan.nodes).map(|node| node.name.clone()) else { return };
        let Some(space) = self.random.pick(&self.plan.spaces).cloned() else { return };
        let token = if self.random.chance(600) { self.random.pick(&self.plan.tokens).cloned() } else { None };
        let account = match &token {
            Some(token) => self.plan.accounts.get(token.account).map(|account| account.name.clone()),
            None => self.random.pick(&self.plan.accounts).map(|account| account.name.clone()),
        };
        let bad = self.random.chance(20);
        let caller = account.filter(|_| !bad).ok_or(UnauthenticatedReason::BadSignature);
        let budget = token.map(|token| Budget {
            root: token.root,
            max_ms: token.max_ms,
            max_calls: token.max_calls,
            expires: token.expires,
        });
        let size = if self.random.chance(200) { Size::Xlarge } else { Size::Large };
        let declared_ms = match self.random.below(40) {
            0 => 0,
            1 => 100_000,
            _ => self.random.between(500, self.plan.declared_max_ms),
        };
        let is_guest = caller.as_ref().is_ok_and(AccountName::is_guests);
        let cookie = is_guest.then(|| CookieId::new(format!("c{}", self.random.below(VISITORS))));
        let ticket = Ticket { agent_instance: "".into(), number: 0 };
        let (revision, presented) = (Revision::default(), None);
        let worker = WorkerKey::new(&space.uid, node.as_str(), self.random.below(FUNCTIONS));
        let request =
            Request { cookie, ticket, node, space, revision, worker, size, declared_ms, caller, budget, presented };
        self.ask(request, 0);
    }

    /// A call reaches the agent of its node.
    pub(super) fn ask(&mut self, request: Request, retries: u32) {
        if let Some(until) = self.asleep.get(&request.node).copied() {
            return self.agenda.add(until, Happening::Asked(Box::new(request), retries));
        }
        let habit = self.habit(request.declared_ms);
        self.clients.tickets += 1;
        let number = self.clients.tickets;
        let Some(agent) = self.agents.get_mut(&request.node) else { return };
        let ticket = Ticket { agent_instance: agent.instance_name().into(), number };
        let request = Request { ticket: ticket.clone(), ..request };
        let (node, now) = (request.node.clone(), agent.clock(self.now));
        agent.ask(request.clone(), now);
        self.clients.calls.insert(ticket.clone(), Called { request, habit, retries });
        if self.random.chance(150) {
            let at = self.now + self.random.between(1, 20_000);
            self.agenda.add(at, Happening::CallerLeaves(node, ticket));
        }
    }

    fn habit(&mut self, declared_ms: u64) -> Habit {
        let random = &mut self.random;
        let run_ms = match random.below(8) {
            0 => declared_ms + random.between(0, 5_000),
            _ => random.between(0, declared_ms),
        };
        match random.below(20) {
            0 => Habit::NeverAllows,
            1 => Habit::Races,
            2 => Habit::Leaves { after_ms: random.between(0, 3_000) },
            _ => {
                let ending = match random.below(10) {
                    0 => Ending::Failed,
                    1 => Ending::WorkerDied,
                    2 => Ending::NoDevice,
                    _ => Ending::Released,
                };
                Habit::Works { allow_ms: random.around(300), run_ms, ending }
            }
        }
    }

    /// A lease has its slot, and its client its answer.
    pub(super) fn began(&mut self, node: &NodeName, lease: &LeaseId) {
        let Some(habit) = self.clients.leases.get(lease).and_then(|ticket| self.clients.calls.get(ticket)) else {
            return;
        };
        let habit = habit.habit;
        let Some(held) = self.agents.get(node).and_then(|agent| agent.leases.get(lease)) else { return };
        let allow_limit_ms = held.order.limits.allow_limit_ms;
        let (now, name, id) = (self.now, node.clone(), lease.clone());
        if matches!(held.phase, Phase::Running { reused: true, .. }) {
            return self.began_again(node, lease, habit);
        }
        self.agenda.add(now + allow_limit_ms, Happening::Limit(name.clone()));
        match habit {
            Habit::Works { allow_ms, .. } => self.agenda.add(now + allow_ms, Happening::Allow(name, id)),
            Habit::Races => {
                let at = now + (allow_limit_ms + RACE_MS).saturating_sub(self.random.below(2 * RACE_MS));
                self.agenda.add(at, Happening::Allow(name, id));
            }
            Habit::NeverAllows => {}
            Habit::Leaves { after_ms } => {
                self.agenda.add(now + after_ms, Happening::Done(name, id, Ending::Undelivered));
            }
        }
    }

    /// A lease has its own worker back, and its clock runs. The worker may have died since it was kept: then a new one is
    /// allowed.
    fn began_again(&mut self, node: &NodeName, lease: &LeaseId, habit: Habit) {
        let (now, name, id) = (self.now, node.clone(), lease.clone());
        self.deadline(node, lease);
        if self.random.chance(300) {
            self.coverage.saw(Scenario::IdleWorkerDead);
            let at = now + self.random.between(10, 1_000);
            return self.agenda.add(at, Happening::Allow(name, id));
        }
        self.coverage.saw(Scenario::ReusedWorker);
        let (run_ms, ending) = match habit {
            Habit::Works { run_ms, ending, .. } => (run_ms, ending),
            Habit::Races | Habit::NeverAllows => (100, Ending::Released),
            Habit::Leaves { after_ms } => (after_ms, Ending::Undelivered),
        };
        self.agenda.add(now + run_ms, Happening::Done(name, id, ending));
    }

    fn deadline(&mut self, node: &NodeName, lease: &LeaseId) {
        let held = self.agents.get(node).and_then(|agent| Some((agent.booted, agent.leases.get(lease)?)));
        if let Some((limit, _)) = held.and_then(|(booted, held)| Some((booted + held.limit()?.0, ()))) {
            self.agenda.add(limit, Happening::Limit(node.clone()));
        }
    }

    pub(super) fn allow(&mut self, node: &NodeName, lease: &LeaseId) {
        let now = self.now;
        let Some(agent) = self.agents.get_mut(node) else { return };
        let clock = agent.clock(now);
        // The limit's timer may come later in the same millisecond; it is the clock that decides.
        agent.expire(clock);
        let limit = agent.leases.get(lease).and_then(crate::agent::Held::limit).map(|(limit, _)| limit);
        let assigned = agent.leases.get(lease).is_some_and(|held| matches!(held.phase, Phase::Assigned { .. }));
        let Some(habit) = self.clients.leases.get(lease).and_then(|ticket| self.clients.calls.get(ticket)) else {
            return;
        };
        let habit = habit.habit;
        let accepted = agent.allow(lease, clock);
        if habit == Habit::Races {
            match (accepted, limit) {
                (true, Some(limit)) if assigned && limit.saturating_sub(clock) <= RACE_MS => {
                    self.coverage.saw(Scenario::AllowJustInTime);
                }
                (false, _) => self.coverage.saw(Scenario::AllowJustTooLate),
                _ => {}
            }
        }
        if !accepted {
            let agent = self.agents.get_mut(node);
            // Its worker had died, and it has no other.
            if let Some(agent) = agent.filter(|agent| agent.is_reused(lease)) {
                agent.end(lease, Ending::WorkerDied, clock);
            }
            return;
        }
        let (run_ms, ending) = match habit {
            Habit::Works { run_ms, ending, .. } => (run_ms, ending),
            Habit::Races | Habit::NeverAllows | Habit::Leaves { .. } => (100, Ending::Released),
        };
        self.deadline(node, lease);
        self.agenda.add(now + run_ms, Happening::Done(node.clone(), lease.clone(), ending));
    }

    pub(super) fn done(&mut self, node: &NodeName, lease: &LeaseId, ending: Ending) {
        if let Some(agent) = self.agents.get_mut(node) {
            let now = agent.clock(self.now);
            agent.expire(now);
            agent.end(lease, ending, now);
        }
    }

    /// A lease ended on its node.
    pub(super) fn ended(&mut self, node: &NodeName, lease: LeaseId, report: EndReport) {
        let Some(held) = self.agents.get(node).and_then(|agent| agent.leases.get(&lease)) else { return };
        let clear_ms = self.random.around(held.order.limits.clear_limit_ms / 4);
        let again = matches!(report.ending, Ending::PlatformFault | Ending::Undelivered);
        self.clients.ends.insert(lease.clone(), report);
        self.clients.ended_at.insert(lease.clone(), self.now);
        if let Some(ticket) = self.clients.leases.get(&lease).cloned()
            && again
        {
            self.answered(&ticket, 300);
        }
        self.agenda.add(self.now + clear_ms, Happening::Cleared(node.clone(), lease));
    }

    pub(super) fn cleared(&mut self, node: &NodeName, lease: &LeaseId) {
        let Some(agent) = self.agents.get(node) else { return };
        let evicted = agent.evicted.contains_key(lease);
        let ended = agent.leases.get(lease).map(|held| held.phase);
        if !evicted && !matches!(ended, Some(Phase::Ended { freed: false, .. })) {
            return;
        }
        let how = if self.strikes(FaultKind::SlotStuck) {
            self.coverage.saw(Scenario::Quarantined);
            FreedAs::Quarantined
        } else {
            FreedAs::Free
        };
        let Some(agent) = self.agents.get_mut(node) else { return };
        let now = agent.clock(self.now);
        if evicted {
            agent.free_evicted(lease, how, now);
        } else {
            agent.free(lease, how, now);
        }
    }

    /// A worker that was kept is killed; there is nothing else to wait for.
    pub(super) fn evicted(&mut self, node: &NodeName, lease: LeaseId) {
        self.coverage.saw(Scenario::IdleEvicted);
        let at = self.now + self.random.around(EVICTED_MS);
        self.agenda.add(at, Happening::Cleared(node.clone(), lease));
    }

    /// A worker that is kept is asked to end. Not in a calm world: an order may be on its way to where it was.
    pub(super) fn lose_idle(&mut self, node: &NodeName) {
        let kept = self.agents.get(node).map_or(0, |agent| agent.idle.len());
        if kept > 0 && !self.plan.weather.is_calm() && self.random.chance(20) {
            let number = usize::try_from(self.random.below(kept as u64)).unwrap_or_default();
            if let Some(agent) = self.agents.get_mut(node) {
                agent.lose_idle(number);
            }
        }
    }

    pub(super) fn caller_leaves(&mut self, node: &NodeName, ticket: &Ticket) {
        let Some(agent) = self.agents.get_mut(node) else { return };
        if !agent.tickets.contains_key(ticket) {
            return;
        }
        agent.leave(ticket);
        self.answered(ticket, 300);
    }

    /// A call was not served: its client may make it again, so many times in a thousand.
    pub(super) fn answered(&mut self, ticket: &Ticket, per_mille: u64) {
        let retries = self.clients.calls.get(ticket).map_or(RETRIES_MAX, |call| call.retries);
        if retries < RETRIES_MAX && self.random.chance(per_mille) {
            self.clients.waiting += 1;
            let at = self.now + self.random.between(1, 3_000);
            self.agenda.add(at, Happening::Retry(ticket.clone()));
        }
    }

    pub(super) fn retry(&mut self, ticket: &Ticket) {
        self.clients.waiting -= 1;
        let Some(call) = self.clients.calls.get(ticket).cloned() else { return };
        self.coverage.saw(Scenario::RetriedCall);
        self.ask(call.request, call.retries + 1);
    }

    /// A node speaks of a lease that nobody knows.
    pub(super) fn report_unknown(&mut self, node: &NodeName) {
        use spaceport_core::lease::Command;
        let Some(agent) = self.agents.get_mut(node) else { return };
        let lease = LeaseId::new(format!("nobody{}", self.now));
        let report = EndReport { ending: Ending::Released, used_ms: 5_000 };
        if agent.leader.is_some() {
            agent.sends.push(Command::Ended { node: node.clone(), lease: lease.clone(), report, kept: true });
            agent.sends.push(Command::Freed { node: node.clone(), lease, how: FreedAs::Free });
        }
    }
}
