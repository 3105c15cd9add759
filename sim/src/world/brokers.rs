//! Brokers: elections and terms, commands and what follows from them.

use spaceport_core::ids::{Epoch, IdSeed, NodeName};
use spaceport_core::lease::{Command, Effect, Event, Order, Outcome, State, TermEnd, step};
use spaceport_core::page::Page;
use spaceport_core::protocol::{Denial, Limiter, UnauthenticatedReason};
use spaceport_core::queue::WaitsFor;

use super::World;
use crate::agenda::{Happening, Wanted};
use crate::agent::ToAgent;
use crate::broker::{Broker, Session, Term};
use crate::check;
use crate::coverage::Scenario;
use crate::links::{LinkId, Up};
use crate::violation::{Checked, Rule};

/// The ledger's own clock tick, as in the operator.
const BROKER_TICK_MS: u64 = 500;
/// Nodes that hear late of a new leader: meanwhile they take orders of the old one.
const SLOW_DIAL_MAX_MS: u64 = 4_000;
/// How often a broker compares its clock with the API server's.
const CLOCK_READ_MS: u64 = 2_000;
/// How far off a clock may be (L20), with the uncertainty of a `Date` in whole seconds.
const CLOCK_SKEW_MAX_MS: u64 = 5_500;

impl World {
    pub(super) fn elect(&mut self) {
        let number = self.next_broker;
        self.next_broker += 1;
        self.elected = number;
        self.brokers.insert(number, Broker::new(number, self.plan.queue));
        let listed = self.now + self.random.between(5, 300);
        self.agenda.add(listed, Happening::Listed(number));
        self.agenda.add(self.now + BROKER_TICK_MS, Happening::BrokerTick(number));
        self.agenda.add(self.now + self.random.below(CLOCK_READ_MS), Happening::ClockRead(number));
        for node in self.agents.keys().cloned().collect::<Vec<_>>() {
            let within_ms = if self.now < self.slow_dials_until { SLOW_DIAL_MAX_MS } else { 500 };
            let at = self.now + self.random.between(5, within_ms);
            self.agenda.add(at, Happening::Dial(node, number));
        }
    }

    /// A process ends: crashed, or deposed.
    pub(super) fn end_broker(&mut self, number: u64) -> Checked {
        let Some(broker) = self.brokers.remove(&number) else { return Ok(()) };
        if let Some(term) = &broker.term {
            check::end::replay(term)?;
            let rows = term.state.accounts.values().flat_map(|account| &account.durable.closed);
            if rows.into_iter().any(|closed| !self.store.receipts.contains_key(&closed.hold.lease)) {
                self.coverage.saw(Scenario::DeadBeforeReceipt);
            }
        }
        let links: Vec<LinkId> =
            self.links.iter().filter(|(_, link)| link.broker == number).map(|(id, _)| *id).collect();
        for id in links {
            self.cut(id);
            if let Some(link) = self.links.get_mut(&id) {
                link.broker_open = false;
            }
        }
        self.hold_up_writes(number);
        if self.elected == number {
            let at = self.now + self.random.between(300, 5_000);
            self.agenda.add(at, Happening::Elected);
        }
        Ok(())
    }

    /// What a broker that is gone or cut off has written may still be in the network.
    pub(super) fn hold_up_writes(&mut self, number: u64) {
        if self.healing {
            return;
        }
        // Leaders are lost when the API server is slow, so their followers begin on a slow one.
        if self.random.chance(500) {
            self.slow_until = self.now + self.random.between(2_000, 10_000);
        }
        for write in self.writes.values_mut().filter(|write| write.broker == number && write.open) {
            if self.random.chance(700) {
                write.held_up_until = self.now + self.random.between(100, 8_000);
            }
        }
    }

    /// The first commands of a term: pages, pools and the sessions that wait.
    pub(super) fn take_over(&mut self, number: u64, epoch: Epoch) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        broker.begun = None;
        broker.reading.clear();
        let awaited = broker.awaited();
        let state = self.plan.broken.map_or_else(
            || State::new(epoch, awaited.clone()),
            |broken| broken.in_ledger(State::new(epoch, awaited.clone())),
        );
        broker.term = Some(Term::new(state, self.now, broker.stood_ms));
        // What an old leader still writes is seen late.
        if self.now < self.slow_dials_until && self.random.chance(500) {
            broker.stalled_until = self.now + self.random.between(200, 5_000);
        }
        let off_ms = broker.clock_off_ms;
        let accounts: Vec<_> = broker.accounts.keys().cloned().collect();
        let sessions: Vec<_> = broker.sessions.keys().cloned().collect();
        self.say(format!("    broker {number} begins term {}", epoch.0));
        self.command(number, Command::ClockJudged { off_ms })?;
        for node in awaited {
            self.configure(number, &node)?;
        }
        for (space, settings) in self.plan.chosen.clone() {
            self.command(number, Command::SpaceSettings { space, settings })?;
        }
        for account in accounts {
            self.account_seen(number, &account)?;
        }
        for node in sessions {
            self.greet(number, &node)?;
        }
        Ok(())
    }

    pub(super) fn configure(&mut self, number: u64, node: &NodeName) -> Checked {
        let Some(broker) = self.brokers.get(&number) else { return Ok(()) };
        let settings = broker.settings(node);
        self.command(number, Command::NodeSettings { node: node.clone(), settings })
    }

    /// Greets an agent: from its answer on its slots exist in this term (L7).
    fn greet(&mut self, number: u64, node: &NodeName) -> Checked {
        let Some(session) = self.brokers.get(&number).and_then(|broker| broker.sessions.get(node)).cloned() else {
            return Ok(());
        };
        self.configure(number, node)?;
        let (agent_instance, highest_epoch) = (session.instance, session.highest_epoch);
        self.command(number, Command::NodeHello { node: node.clone(), agent_instance, highest_epoch })?;
        if let Some(epoch) = self.state(number).filter(|state| state.ended.is_none()).map(|state| state.epoch) {
            self.send_to(number, node, |_| ToAgent::Welcome(epoch));
        }
        Ok(())
    }

    pub(super) fn hear_agent(&mut self, number: u64, link: LinkId, node: &NodeName, up: Up) -> Checked {
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        if let Command::NodeHello { agent_instance, highest_epoch, .. } = up.command {
            let session = Session { link, instance: agent_instance, highest_epoch, stamp: up.stamp };
            if let Some(replaced) = broker.sessions.insert(node.clone(), session) {
                self.close(replaced.link);
                self.command(number, Command::NodeDisconnected { node: node.clone() })?;
            }
            return self.greet(number, node);
        }
        let Some(session) = broker.sessions.get_mut(node).filter(|session| session.link == link) else {
            return Ok(());
        };
        session.stamp = session.stamp.max(up.stamp);
        if !broker.serves() {
            return Ok(());
        }
        match up.command {
            Command::Request(request) => {
                let epoch = broker.term.as_ref().map(|term| term.state.epoch);
                if request.presented.is_some_and(|presented| Some(presented.epoch) < epoch) {
                    self.coverage.saw(Scenario::PlacePresented);
                }
                let account = request.caller.as_ref().ok();
                let known = |state: &State| account.is_none_or(|account| state.accounts.contains_key(account));
                if broker.term.as_ref().is_some_and(|term| known(&term.state)) {
                    return self.command(number, Command::Request(request));
                }
                broker.first_calls.insert(request.ticket.clone());
                let at = self.now + 2 * self.latency();
                self.agenda.add(at, Happening::FirstSeen(number, request));
                Ok(())
            }
            Command::Dequeue { ticket } => {
                broker.first_calls.remove(&ticket);
                self.command(number, Command::Dequeue { ticket })
            }
            command => {
                self.cover_report(number, &command);
                self.command(number, command)
            }
        }
    }

    fn cover_report(&mut self, number: u64, command: &Command) {
        if let Command::Ended { lease, .. } = command
            && self.state(number).is_some_and(|state| !state.leases.contains_key(lease))
        {
            self.coverage.saw(Scenario::UnknownReport);
        }
    }

    pub(super) fn broker_tick(&mut self, number: u64) -> Checked {
        if !self.brokers.contains_key(&number) {
            return Ok(());
        }
        self.agenda.add(self.now + BROKER_TICK_MS, Happening::BrokerTick(number));
        self.command(number, Command::Tick)
    }

    /// The API server's `Date` against our clock (L20).
    pub(super) fn clock_read(&mut self, number: u64) -> Checked {
        let (now, server_offset) = (self.now, self.server_offset);
        let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
        self.agenda.add(now + CLOCK_READ_MS, Happening::ClockRead(number));
        if broker.cut_off_until > now {
            return Ok(());
        }
        let off_ms = broker.wall_offset.abs_diff(server_offset);
        broker.clock_off_ms = Some(off_ms).filter(|off_ms| *off_ms > CLOCK_SKEW_MAX_MS);
        let off_ms = broker.clock_off_ms;
        self.command(number, Command::ClockJudged { off_ms })
    }

    /// One command, all the way.
    pub(super) fn command(&mut self, number: u64, command: Command) -> Checked {
        let two = self.brokers.values().filter(|broker| broker.serves()).count() > 1;
        let Some(broker) = self.brokers.get_mut(&number).filter(|broker| broker.serves()) else { return Ok(()) };
        let at = broker.moment(self.now);
        let Some(term) = &mut broker.term else { return Ok(()) };
        self.ids += 1 << 20;
        let said = self.trace.then(|| format!("    broker {number} <- {command:?}"));
        let mut outcome = step(&mut term.state, at, IdSeed(self.ids), command);
        if let Some(said) = said.filter(|_| !outcome.events.is_empty()) {
            self.say(said);
            for event in &outcome.events {
                self.say(format!("        {event:?}"));
            }
        }
        if outcome.events.is_empty() && outcome.violations.is_empty() {
            return Ok(());
        }
        if two {
            self.coverage.saw(Scenario::TwoLeaders);
        }
        self.commands += 1;
        self.cover_strangers(&outcome);
        check::ledger::after(self, number, &outcome)?;
        check::calls::after(self, number, &outcome)?;
        let Outcome { events, effects, .. } = std::mem::take(&mut outcome);
        if let Some(term) = self.brokers.get_mut(&number).and_then(|broker| broker.term.as_mut()) {
            term.events.extend(events);
        }
        for effect in effects {
            self.carry_out(number, effect)?;
        }
        check::nodes::pictures(self, number)
    }

    fn carry_out(&mut self, number: u64, effect: Effect) -> Checked {
        match effect {
            Effect::Write { account, page } => self.write(number, account, Page::clone(&page))?,
            Effect::Read { account } => self.read(number, account, Wanted::Outcome),
            Effect::Confirm { account, node } => self.read(number, account, Wanted::Leases(node)),
            Effect::Receipt { account, closed } => self.receipt(number, account, closed)?,
            Effect::Start(order) => self.order(number, order)?,
            Effect::Cancel { node, lease, reason } => {
                let Some(state) = self.state(number) else { return Ok(()) };
                check::nodes::killed(self, state.epoch, &lease, reason)?;
                let (epoch, order_ttl_ms) = (state.epoch, state.settings(&node).limits.order_ttl_ms);
                self.send_to(number, &node, |session| ToAgent::Cancel {
                    epoch,
                    stamp: session.stamp,
                    order_ttl_ms,
                    lease,
                });
            }
            Effect::Acknowledge { node, lease, ended, freed } => {
                let early = ended && self.store.is_held(&lease);
                Rule::Invariant(2).check(!early, || format!("{lease} is acknowledged before it is settled"))?;
                self.send_to(number, &node, |_| ToAgent::Acknowledge(lease, ended, freed));
            }
            Effect::Deny { ticket, node, denial, .. } => {
                self.cover_denial(&denial);
                let session = self.brokers.get(&number).and_then(|broker| broker.sessions.get(&node));
                if session.is_some_and(|session| *session.instance == *ticket.agent_instance) {
                    self.send_to(number, &node, |_| ToAgent::Deny(ticket));
                }
            }
            Effect::Queue(place) => {
                let waited = match place.waits_for {
                    WaitsFor::Node => Scenario::Waited,
                    WaitsFor::Account | WaitsFor::Space => Scenario::WaitedForAccount,
                };
                self.coverage.saw(waited);
                check::calls::queued(self, number, &place)?;
                let node = place.node.clone();
                let session = self.brokers.get(&number).and_then(|broker| broker.sessions.get(&node));
                if session.is_some_and(|session| *session.instance == *place.ticket.agent_instance) {
                    self.send_to(number, &node, |_| ToAgent::Queued(place));
                }
            }
            Effect::EndTerm(end) => self.term_ended(number, end)?,
        }
        Ok(())
    }

    fn cover_strangers(&mut self, outcome: &Outcome) {
        let judged = outcome.events.iter().filter_map(|event| match event {
            Event::StrangerJudged { lease } => Some(lease),
            _ => None,
        });
        for lease in judged {
            let held = self.store.late_holds.contains(lease) && self.store.is_held(lease);
            self.coverage.saw(if held { Scenario::LateHoldFound } else { Scenario::Stranger });
        }
    }

    fn order(&mut self, number: u64, order: Box<Order>) -> Checked {
        let durable = self.store.held_ever.contains_key(&order.lease);
        Rule::Invariant(2).check(durable, || format!("{} is ordered before its hold is durable", order.lease))?;
        check::calls::ordered(self, &order)?;
        if let Some(now) = self.brokers.get(&number).map(|broker| broker.moment(self.now).steady) {
            check::calls::soon(self, &order, now)?;
        }
        self.seen_calls.promised.remove(&order.ticket);
        if order.after.is_some() {
            self.coverage.saw(Scenario::Handover);
        }
        let others = self.links.values().filter(|link| link.node == order.node && link.broker != number);
        let start = |message: &ToAgent| matches!(message, ToAgent::Start(..));
        if others.into_iter().any(|link| link.down.iter().any(start)) {
            self.coverage.saw(Scenario::TwoOrders);
        }
        let node = order.node.clone();
        self.send_to(number, &node, |session| ToAgent::Start(order, session.stamp));
        Ok(())
    }

    fn term_ended(&mut self, number: u64, end: TermEnd) -> Checked {
        match end {
            TermEnd::Deposed { .. } => {
                self.coverage.saw(Scenario::Deposed);
                self.coverage.saw(Scenario::OldLeaderEndedByPage);
                self.end_broker(number)
            }
            TermEnd::NodeAhead { epoch } => {
                self.coverage.saw(Scenario::NodeAhead);
                let Some(broker) = self.brokers.get_mut(&number) else { return Ok(()) };
                broker.above = epoch;
                if let Some(term) = broker.term.take() {
                    check::end::replay(&term)?;
                }
                self.agenda.add(self.now, Happening::TermRead(number));
                Ok(())
            }
        }
    }

    fn cover_denial(&mut self, denial: &Denial) {
        self.coverage.saw(Scenario::Denied);
        self.coverage.saw(match denial {
            Denial::QuotaExceeded { limiter: Limiter::Cookie, .. }
            | Denial::PendingOverquota { limiter: Limiter::Cookie, .. }
            | Denial::TooManyGuests { .. } => Scenario::DeniedCookie,
            Denial::QuotaExceeded { limiter: Limiter::AddressPrefix, .. }
            | Denial::PendingOverquota { limiter: Limiter::AddressPrefix, .. } => Scenario::DeniedPrefix,
            Denial::QuotaExceeded { .. } => Scenario::DeniedQuota,
            Denial::PendingOverquota { .. } => Scenario::DeniedPending,
            Denial::RunsExceeded { .. } => Scenario::DeniedRuns,
            Denial::IllegalDuration { .. } => Scenario::DeniedIllegal,
            Denial::NoCapacity { .. } => Scenario::DeniedCapacity,
            Denial::QueueFull { .. } | Denial::ConcurrencyExceeded { .. } => Scenario::DeniedQueueFull,
            Denial::Unauthenticated { reason: UnauthenticatedReason::Exhausted } => Scenario::BudgetExhausted,
            Denial::Unauthenticated { .. } => Scenario::DeniedUnauthenticated,
            Denial::AccountDeleting => Scenario::DeniedDeleting,
            Denial::ClockSkew { .. } => Scenario::DeniedClock,
            Denial::PlatformFault | Denial::BrokerUnavailable | Denial::AccountUnusable => Scenario::DeniedFault,
        });
    }
}
