//! The weather: what goes wrong, and how it gets well again.

use spaceport_core::ids::{AccountName, LeaseId, NodeName};
use spaceport_core::lease::Limits;
use spaceport_core::quota::WINDOW_MS;

use super::World;
use crate::agenda::Happening;
use crate::agent::reports::Restart;
use crate::coverage::Scenario;
use crate::links::LinkId;
use crate::plan::{self, QUICK};
use crate::violation::Checked;
use crate::weather::FaultKind;

impl World {
    /// When the next fault of a kind comes.
    pub(super) fn next_fault(&mut self, kind: FaultKind) {
        if let Some(gap_ms) = self.plan.weather.gap_ms(kind) {
            let at = self.now + self.random.around(gap_ms);
            self.agenda.add(at, Happening::Fault(kind));
        }
    }

    pub(super) fn fault(&mut self, kind: FaultKind) -> Checked {
        if self.healing {
            return Ok(());
        }
        self.count(kind);
        self.next_fault(kind);
        match kind {
            FaultKind::BrokerCrash => return self.end_broker(self.elected),
            FaultKind::FailOver => self.fail_over(),
            FaultKind::BrokerPause => self.pause(),
            FaultKind::BrokerCutOff => self.cut_off(),
            FaultKind::WatchStall => {
                let until = self.now + self.random.between(500, 8_000);
                self.some_broker(|broker| broker.stalled_until = until);
            }
            FaultKind::WatchRestart => {
                if let Some(number) = self.any_broker().filter(|number| self.brokers[number].listed) {
                    self.agenda.add(self.now, Happening::Listed(number));
                }
            }
            FaultKind::Cut => {
                let links: Vec<LinkId> = self.links.keys().copied().collect();
                if let Some(link) = self.random.pick(&links) {
                    self.cut(*link);
                }
            }
            FaultKind::Partition => self.partition(),
            FaultKind::NodePause => self.pause_node(),
            FaultKind::AgentRestart => self.restart(Restart::Process),
            FaultKind::CheckpointLost => self.restart(Restart::Checkpoint),
            FaultKind::Reboot => {
                let what = if self.random.chance(300) { Restart::RebootAndCheckpoint } else { Restart::Reboot };
                self.restart(what);
            }
            FaultKind::CardSick => self.sick_card(),
            FaultKind::PolicyChange => self.change_policy(),
            FaultKind::AdminEdit => {
                if let Some(account) = self.any_account() {
                    self.store.edit(&account, |_| {});
                    self.publish();
                }
            }
            FaultKind::AccountDeleted => self.delete_account(),
            FaultKind::PoolChange => self.change_pool(),
            FaultKind::BrokerClock => self.set_broker_clock(),
            FaultKind::ServerClock => self.set_server_clock(),
            FaultKind::Night => self.night(),
            // They come with messages.
            FaultKind::WriteLost
            | FaultKind::AnswerLost
            | FaultKind::WriteLate
            | FaultKind::WriteRefused
            | FaultKind::ReceiptLate
            | FaultKind::Stall
            | FaultKind::Repeat
            | FaultKind::UnknownReport
            | FaultKind::SlotStuck => {}
        }
        Ok(())
    }

    fn any_broker(&mut self) -> Option<u64> {
        let numbers: Vec<u64> = self.brokers.keys().copied().collect();
        self.random.pick(&numbers).copied()
    }

    fn some_broker(&mut self, change: impl FnOnce(&mut crate::broker::Broker)) {
        if let Some(broker) = self.any_broker().and_then(|number| self.brokers.get_mut(&number)) {
            change(broker);
        }
    }

    fn any_node(&mut self) -> Option<NodeName> {
        self.random.pick(&self.plan.nodes).map(|node| node.name.clone())
    }

    fn any_account(&mut self) -> Option<AccountName> {
        let names: Vec<AccountName> = self.store.objects.keys().cloned().collect();
        self.random.pick(&names).cloned()
    }

    /// A new leader while the old one goes on: it is slow to hear of it, stands still, or has lost the API server.
    fn fail_over(&mut self) {
        // More than three processes at once show nothing new.
        if self.brokers.len() >= 3 {
            return;
        }
        let until = self.now + self.random.between(500, 10_000);
        let how = self.random.below(4);
        if let Some(broker) = self.brokers.get_mut(&self.elected) {
            match how {
                0 => broker.paused_until = until,
                1 => broker.cut_off_until = until,
                2 => broker.stalled_until = until,
                _ => {}
            }
        }
        self.hold_up_writes(self.elected);
        if self.random.chance(500) {
            self.slow_dials_until = self.now + 5_000;
        }
        self.agenda.add(self.now, Happening::Elected);
    }

    fn pause(&mut self) {
        let (now, ms, counts) = (self.now, self.random.between(200, 20_000), self.random.chance(500));
        let mut stood = false;
        self.some_broker(|broker| {
            if broker.paused_until <= now {
                broker.paused_until = now + ms;
                // A suspended machine's monotonic clock stands still too.
                if !counts {
                    broker.stood_ms += ms;
                    stood = true;
                }
            }
        });
        if stood {
            self.coverage.saw(Scenario::SteadyLost);
        }
    }

    fn cut_off(&mut self) {
        let until = self.now + self.random.between(500, 15_000);
        self.some_broker(|broker| broker.cut_off_until = until);
    }

    fn partition(&mut self) {
        let Some(node) = self.any_node() else { return };
        let until = self.now
            + if self.random.chance(300) {
                self.random.between(10_000, 120_000)
            } else {
                self.random.between(500, 10_000)
            };
        let from = if self.random.chance(300) { self.any_broker() } else { None };
        self.partitions.push((node.clone(), from, until));
        let links: Vec<LinkId> = self
            .links
            .iter()
            .filter(|(_, link)| link.node == node && from.is_none_or(|from| from == link.broker))
            .map(|(id, _)| *id)
            .collect();
        for link in links {
            self.cut(link);
        }
        // A pool that is edited while a node is away must not touch the leases there (L9).
        if self.random.chance(300) {
            self.set_pool(node, QUICK);
        }
    }

    /// A node stands still, its workers with it; what reaches it meanwhile waits in its sockets. BOOTTIME goes on.
    fn pause_node(&mut self) {
        let Some(node) = self.awake_node() else { return };
        let until = self.now + self.random.between(1_000, 40_000);
        self.asleep.insert(node.clone(), until);
        self.agenda.add(until, Happening::Limit(node.clone()));
        let links: Vec<LinkId> = self.links.iter().filter(|(_, link)| link.node == node).map(|(id, _)| *id).collect();
        for link in links {
            // The broker hears nothing more from it.
            let at = self.now + self.random.between(2_000, 4_000);
            if at < until {
                self.agenda.add(at, Happening::BrokerNotices(link));
                // Before that it reads what had reached its sockets.
                self.agenda.add(until + self.random.between(100, 2_000), Happening::AgentNotices(link));
            }
        }
    }

    fn awake_node(&mut self) -> Option<NodeName> {
        self.any_node().filter(|node| !self.asleep.contains_key(node))
    }

    fn restart(&mut self, what: Restart) {
        let Some(node) = self.awake_node() else { return };
        let links: Vec<LinkId> =
            self.links.iter().filter(|(_, link)| link.node == node && link.node_open).map(|(id, _)| *id).collect();
        for link in links {
            self.cut(link);
            self.agent_notices(link);
        }
        let Some(agent) = self.agents.get_mut(&node) else { return };
        let now = agent.clock(self.now);
        agent.expire(now);
        let holds = !agent.leases.is_empty();
        let callers: Vec<_> = agent.tickets.keys().cloned().collect();
        let is_open = |lease: &LeaseId| !self.store.settled.contains_key(lease);
        let ends: Vec<LeaseId> = agent.open_ends().into_iter().filter(is_open).collect();
        agent.restart(what, self.now);
        match what {
            Restart::Process | Restart::Reboot => self.seen_nodes.ends_kept.extend(ends),
            Restart::Checkpoint | Restart::RebootAndCheckpoint => self.seen_nodes.ends_lost.extend(ends),
        }
        match what {
            Restart::Process => {}
            Restart::Checkpoint if holds => self.coverage.saw(Scenario::BackWithoutCheckpoint),
            Restart::RebootAndCheckpoint if holds => {
                self.coverage.saw(Scenario::BackWithoutCheckpoint);
                self.coverage.saw(Scenario::BackAfterReboot);
            }
            Restart::Reboot if holds => self.coverage.saw(Scenario::BackAfterReboot),
            _ => {}
        }
        if matches!(what, Restart::Reboot | Restart::RebootAndCheckpoint) {
            self.coverage.saw(Scenario::BootClockReset);
        }
        for ticket in callers {
            self.answered(&ticket, 600);
        }
    }

    fn sick_card(&mut self) {
        let Some(node) = self.awake_node() else { return };
        let back = self.now + self.random.between(500, 20_000);
        let Some(agent) = self.agents.get_mut(&node) else { return };
        let indexes: Vec<u32> = agent.cards.iter().map(|card| card.index).collect();
        if let Some(card) = self.random.pick(&indexes).copied() {
            let now = agent.clock(self.now);
            agent.expire(now);
            agent.set_card(card, false, now);
            self.agenda.add(back, Happening::CardBack(node, card));
        }
    }

    pub(super) fn card_back(&mut self, node: &NodeName, card: u32) {
        if let Some(agent) = self.agents.get_mut(node) {
            let now = agent.clock(self.now);
            agent.set_card(card, true, now);
        }
    }

    fn change_policy(&mut self) {
        let Some(name) = self.any_account() else { return };
        let random = &mut self.random;
        let Some(policy) = self.policies.get_mut(&name) else { return };
        let allowance = &mut policy.allowance;
        match random.below(6) {
            0 | 1 => (allowance.base_ms, allowance.generation) = (allowance.base_ms / 2, allowance.generation + 1),
            2 => {
                (allowance.base_ms, allowance.generation) = (random.between(10_000, 150_000), allowance.generation + 1)
            }
            3 => policy.concurrent = u32::try_from(random.between(1, 4)).unwrap_or(1),
            4 if allowance.grants.len() < 4 => {
                let uid = format!("{name}-n{}-{}", self.now, random.below(1_000_000));
                allowance.grants.push(plan::grant(&uid, self.now, random));
            }
            _ => {
                allowance.grants.pop();
            }
        }
        let highest_ms = self.store.highest_base_ms.entry(name.clone()).or_default();
        *highest_ms = (*highest_ms).max(policy.allowance.base_ms);
        for number in self.brokers.keys().copied().collect::<Vec<_>>() {
            let at = self.now + self.random.between(1, 500);
            self.agenda.add(at, Happening::PolicyShown(number, name.clone()));
        }
    }

    fn delete_account(&mut self) {
        let Some(name) = self.any_account() else { return };
        let holds = self.store.objects.get(&name).is_some_and(|object| !object.page.holds.is_empty());
        // Mostly its finalizer holds it; sometimes an admin takes that away too.
        if self.random.chance(250) {
            if holds {
                self.coverage.saw(Scenario::AccountGoneMidLease);
            }
            return self.take_away(&name);
        }
        if holds {
            self.coverage.saw(Scenario::AccountDeletedMidLease);
        }
        self.store.edit(&name, |object| object.deleting = true);
        self.publish();
        self.may_be_finalized(&name);
    }

    /// A node is put into another pool, or its pool is edited; its leases run on, whether it is heard of or not.
    fn change_pool(&mut self) {
        if let Some(node) = self.any_node() {
            let limits = if self.random.chance(400) { Limits::default() } else { QUICK };
            self.set_pool(node, limits);
        }
    }

    fn set_pool(&mut self, node: NodeName, limits: Limits) {
        self.limits.insert(node.clone(), limits);
        for number in self.brokers.keys().copied().collect::<Vec<_>>() {
            let at = self.now + self.random.between(1, 500);
            self.agenda.add(at, Happening::PoolShown(number, node.clone()));
        }
    }

    fn step_of_clock(&mut self) -> i64 {
        let ms = match self.random.below(4) {
            0 => self.random.between(100, 5_000),
            1 => self.random.between(5_000, 60_000),
            2 => 3 * 3_600_000,
            _ => WINDOW_MS + self.random.between(0, 3_600_000),
        };
        let step = i64::try_from(ms).unwrap_or_default();
        if self.random.chance(500) { step } else { -step }
    }

    fn set_broker_clock(&mut self) {
        // Back to the right time, or away from it.
        let step = self.step_of_clock();
        let right = self.random.chance(400);
        let mut moved = 0;
        self.some_broker(|broker| {
            let offset = if right { 0 } else { step };
            moved = offset - broker.wall_offset;
            broker.wall_offset = offset;
        });
        match moved {
            1.. => self.coverage.saw(Scenario::BrokerWallForward),
            0 => {}
            _ => self.coverage.saw(Scenario::BrokerWallBack),
        }
    }

    fn set_server_clock(&mut self) {
        let step = self.step_of_clock();
        let offset = if self.random.chance(400) { 0 } else { step };
        match offset - self.server_offset {
            1.. => self.coverage.saw(Scenario::ServerWallForward),
            0 => {}
            _ => self.coverage.saw(Scenario::ServerWallBack),
        }
        self.server_offset = offset;
    }

    /// A day passes while nothing is under way, so that windows end; if something is, it does not.
    fn night(&mut self) {
        if !crate::check::end::is_quiet(self) {
            return;
        }
        self.coverage.saw(Scenario::NightPassed);
        let by_ms = WINDOW_MS - self.random.between(0, 60_000);
        self.now += by_ms;
        self.agenda.shift(by_ms);
        for link in self.links.values_mut() {
            (link.up_at, link.down_at) = (link.up_at + by_ms, link.down_at + by_ms);
        }
    }

    /// No more faults: clocks are right, everybody reaches everybody.
    pub(super) fn heal(&mut self) {
        self.healing = true;
        self.say("everything heals".to_owned());
        self.partitions.clear();
        self.server_offset = 0;
        let now = self.now;
        for broker in self.brokers.values_mut() {
            broker.wall_offset = 0;
            broker.paused_until = broker.paused_until.min(now);
            broker.cut_off_until = broker.cut_off_until.min(now);
            broker.stalled_until = broker.stalled_until.min(now);
        }
    }
}
