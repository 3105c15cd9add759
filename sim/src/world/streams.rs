//! Streams between brokers and agents, and what agents do by themselves.

use spaceport_core::ids::NodeName;
use spaceport_core::lease::Command;

use super::{NODE_TICK_MS, World};
use crate::agenda::Happening;
use crate::agent::{Notice, ToAgent};
use crate::broker::Session;
use crate::check;
use crate::coverage::Scenario;
use crate::links::{Link, LinkId, Up};
use crate::violation::{Checked, Rule};
use crate::weather::FaultKind;

/// Longest time until the end of a broken stream is noticed (keepalives).
const NOTICE_MAX_MS: u64 = 4_000;
/// Longest pause between two dials.
const DIAL_PAUSE_MAX_MS: u64 = 2_000;

impl World {
    pub(super) fn dial(&mut self, node: NodeName, broker: u64) {
        if !self.brokers.contains_key(&broker) {
            return;
        }
        // One stream to each broker: the next is dialed when this one has ended.
        if self.links.values().any(|link| link.node == node && link.broker == broker && link.node_open) {
            return;
        }
        if self.is_cut_off(&node, broker) {
            let at = self.now + self.random.between(50, DIAL_PAUSE_MAX_MS);
            return self.agenda.add(at, Happening::Dial(node, broker));
        }
        let id = LinkId(self.next_link);
        self.next_link += 1;
        self.links.insert(id, Link::new(node.clone(), broker));
        let Some(agent) = self.agents.get(&node) else { return };
        let (agent_instance, highest_epoch) = (agent.instance_name(), agent.epoch);
        self.send_up(id, Command::NodeHello { node, agent_instance, highest_epoch });
    }

    pub(super) fn is_cut_off(&self, node: &NodeName, broker: u64) -> bool {
        self.partitions
            .iter()
            .any(|(cut, from, until)| cut == node && from.is_none_or(|from| from == broker) && *until > self.now)
    }

    pub(super) fn send_up(&mut self, id: LinkId, command: Command) {
        let mut latency = self.latency();
        if self.strikes(FaultKind::Stall) {
            latency += self.random.between(500, 9_000);
        }
        let Some(link) = self.links.get_mut(&id).filter(|link| link.node_open && !link.broken) else { return };
        let Some(agent) = self.agents.get(&link.node) else { return };
        link.up_at = link.up_at.max(self.now + latency);
        link.up.push_back(Up { stamp: agent.clock(self.now), command });
        self.agenda.add(link.up_at, Happening::ToBroker(id));
    }

    pub(super) fn send_down(&mut self, id: LinkId, message: ToAgent) {
        let mut latency = self.latency();
        if self.strikes(FaultKind::Stall) {
            latency += self.random.between(500, 9_000);
        }
        let Some(link) = self.links.get_mut(&id).filter(|link| link.broker_open && !link.broken) else { return };
        link.down_at = link.down_at.max(self.now + latency);
        link.down.push_back(message);
        self.agenda.add(link.down_at, Happening::ToAgent(id));
    }

    /// To the node's session of a broker; without one the message is dropped, for what it says is derived again.
    pub(super) fn send_to(&mut self, broker: u64, node: &NodeName, message: impl FnOnce(&Session) -> ToAgent) {
        let Some(session) = self.brokers.get(&broker).and_then(|broker| broker.sessions.get(node)) else { return };
        let (link, message) = (session.link, message(session));
        self.send_down(link, message);
    }

    pub(super) fn reach_broker(&mut self, id: LinkId) -> Checked {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let broker = link.broker;
        let paused_until = self.brokers.get(&broker).map_or(0, |broker| broker.paused_until);
        if paused_until > self.now {
            self.agenda.add(paused_until, Happening::ToBroker(id));
            return Ok(());
        }
        let Some(up) = link.up.pop_front() else { return Ok(()) };
        if !link.broker_open {
            return Ok(());
        }
        let node = link.node.clone();
        self.hear_agent(broker, id, &node, up)
    }

    pub(super) fn reach_agent(&mut self, id: LinkId) -> Checked {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let Some(message) = link.down.pop_front() else { return Ok(()) };
        if !link.node_open {
            return Ok(());
        }
        let node = link.node.clone();
        let Some(agent) = self.agents.get_mut(&node) else { return Ok(()) };
        let now = agent.clock(self.now);
        if let ToAgent::Welcome(epoch) = &message {
            link.welcomed = true;
            let epoch = *epoch;
            agent.expire(now);
            if agent.welcome(id, epoch, now) {
                let seen = self.seen_nodes.epochs.entry(node.clone()).or_default();
                *seen = epoch.max(*seen);
                if agent.leases.keys().any(|lease| agent.is_live(lease)) {
                    self.coverage.saw(Scenario::BackAfterPartition);
                }
            }
        } else {
            agent.receive(id, message, now);
        }
        self.after_agent(&node)
    }

    pub(super) fn broker_notices(&mut self, id: LinkId) -> Checked {
        let Some(link) = self.links.get_mut(&id).filter(|link| link.broker_open) else { return Ok(()) };
        link.broker_open = false;
        let (node, broker) = (link.node.clone(), link.broker);
        self.forget_over(id);
        let Some(found) = self.brokers.get_mut(&broker) else { return Ok(()) };
        if found.sessions.get(&node).is_some_and(|session| session.link == id) {
            found.sessions.remove(&node);
            self.command(broker, Command::NodeDisconnected { node })?;
        }
        Ok(())
    }

    pub(super) fn agent_notices(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id).filter(|link| link.node_open) else { return };
        link.node_open = false;
        let (node, broker) = (link.node.clone(), link.broker);
        self.forget_over(id);
        if let Some(agent) = self.agents.get_mut(&node).filter(|agent| agent.leader == Some(id)) {
            let now = agent.clock(self.now);
            agent.unlink(now);
        }
        let at = self.now + self.random.between(50, DIAL_PAUSE_MAX_MS);
        self.agenda.add(at, Happening::Dial(node, broker));
    }

    /// The broker ends a stream that another has replaced.
    pub(super) fn close(&mut self, id: LinkId) {
        let at = self.now + self.latency();
        if let Some(link) = self.links.get_mut(&id) {
            (link.broker_open, link.broken) = (false, true);
            self.agenda.add(at, Happening::AgentNotices(id));
        }
        self.forget_over(id);
    }

    fn forget_over(&mut self, id: LinkId) {
        if self.links.get(&id).is_some_and(Link::is_over) {
            self.links.remove(&id);
        }
    }

    /// A stream breaks: what is on the way is lost, or some of it still arrives; each end notices at its time.
    pub(super) fn cut(&mut self, id: LinkId) {
        let (lose_up, lose_down) = (self.random.chance(600), self.random.chance(600));
        let Some(link) = self.links.get_mut(&id).filter(|link| !link.broken) else { return };
        link.broken = true;
        if lose_up {
            for up in std::mem::take(&mut link.up) {
                match up.command {
                    Command::Ended { .. } => self.coverage.saw(Scenario::LostEnded),
                    Command::Freed { .. } => self.coverage.saw(Scenario::LostFreed),
                    _ => {}
                }
            }
        }
        if lose_down {
            for message in std::mem::take(&mut link.down) {
                if matches!(message, ToAgent::Start(..)) {
                    self.coverage.saw(Scenario::LostOrder);
                }
            }
        }
        let (broker_at, agent_at) = (self.random.around(NOTICE_MAX_MS / 3), self.random.around(NOTICE_MAX_MS / 3));
        self.agenda.add(self.now + broker_at, Happening::BrokerNotices(id));
        self.agenda.add(self.now + agent_at, Happening::AgentNotices(id));
    }

    pub(super) fn node_tick(&mut self, node: &NodeName) {
        self.agenda.add(self.now + NODE_TICK_MS, Happening::NodeTick(node.clone()));
        let Some(agent) = self.agents.get_mut(node) else { return };
        let now = agent.clock(self.now);
        agent.expire(now);
        agent.give_up(now);
        // Every fifth heartbeat reports are repeated (L10).
        if (self.now / NODE_TICK_MS).is_multiple_of(5) {
            agent.repeat();
        }
        let links: Vec<LinkId> =
            self.links.iter().filter(|(_, link)| link.node == *node && link.welcomed).map(|(id, _)| *id).collect();
        for link in links {
            self.send_up(link, Command::Heartbeat { node: node.clone(), cards: None, idle: None });
        }
        self.lose_idle(node);
        if self.strikes(FaultKind::UnknownReport) {
            self.report_unknown(node);
        }
    }

    pub(super) fn limit(&mut self, node: &NodeName) {
        if let Some(agent) = self.agents.get_mut(node) {
            let now = agent.clock(self.now);
            agent.expire(now);
        }
    }

    /// What every agent did and said in this step.
    pub(super) fn after_nodes(&mut self) -> Checked {
        for node in self.agents.keys().cloned().collect::<Vec<_>>() {
            let idle = self.agents.get(&node).is_none_or(|agent| agent.notices.is_empty() && agent.sends.is_empty());
            if !idle {
                self.after_agent(&node)?;
            }
        }
        check::calls::on_time(self)
    }

    fn after_agent(&mut self, node: &NodeName) -> Checked {
        let Some(agent) = self.agents.get_mut(node) else { return Ok(()) };
        let (notices, sends) = (std::mem::take(&mut agent.notices), std::mem::take(&mut agent.sends));
        let leader = agent.leader;
        check::nodes::node(agent, self.now)?;
        for notice in notices {
            if self.trace {
                self.say(format!("    {node}: {notice:?}"));
            }
            self.notice(node, notice)?;
        }
        let Some(leader) = leader else { return Ok(()) };
        for command in sends {
            let report = matches!(
                command,
                Command::Ended { .. } | Command::Freed { .. } | Command::Running { .. } | Command::Started { .. }
            );
            if report && self.strikes(FaultKind::Repeat) {
                self.coverage.saw(Scenario::RepeatedReport);
                self.send_up(leader, command.clone());
            }
            self.send_up(leader, command);
        }
        Ok(())
    }

    fn notice(&mut self, node: &NodeName, notice: Notice) -> Checked {
        match notice {
            Notice::Taken(lease, ticket) => {
                self.coverage.saw(Scenario::Granted);
                check::nodes::taken(self, node, &lease)?;
                self.clients.leases.insert(lease, ticket);
            }
            Notice::Began(lease) => {
                check::nodes::began(self, &lease)?;
                self.began(node, &lease);
            }
            Notice::Ended(lease, report) => self.ended(node, lease, report),
            Notice::RefusedAge(_) => self.coverage.saw(Scenario::StalledOrder),
            Notice::RefusedEpoch(_) => self.coverage.saw(Scenario::OldEpochOrder),
            Notice::NoSlot { lease } => {
                self.coverage.saw(Scenario::Nack);
                let calm = self.plan.weather.is_calm();
                Rule::Invariant(6)
                    .check(!calm, || format!("{node} was ordered {lease} and has no room for it, in a calm world"))?;
            }
            Notice::WaitedTooLong(_) => self.coverage.saw(Scenario::WaitedTooLong),
            Notice::CallerGone(_) => self.coverage.saw(Scenario::Nack),
            Notice::Refused(ticket) => self.answered(&ticket, 100),
            Notice::GaveUp(ticket) => self.answered(&ticket, 500),
            Notice::Swapped(_) => self.coverage.saw(Scenario::HandoverSwapped),
            Notice::Evicted(lease) => self.evicted(node, lease),
        }
        Ok(())
    }
}
