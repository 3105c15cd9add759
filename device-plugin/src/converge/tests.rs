//! Stories of leases on one node, told to the machine without any hardware. Here is their world; each file tells of one
//! subject.

mod broker;
mod charge;
mod idle;
mod orders;
mod places;
mod restart;

use std::path::PathBuf;

use super::*;
use crate::gate::{Device, FirstOpen};
use link::node_message::Message;

/// A node with one card of two halves, a broker that leads epoch 7, and a clock that the test moves.
struct Node {
    machine: Machine,
    now: u64,
    tickets: u64,
    calls: u64,
    cgroups: u64,
    steps: Vec<Step>,
}

fn pod(name: &str) -> Caller {
    let pod = SpacePod { pod_uid: format!("uid-{name}"), space: name.to_owned(), ..SpacePod::default() };
    Caller { pod, container: format!("container-{name}") }
}

/// This many, the first at 1500 ms.
fn opens(count: u64) -> Opens {
    let first = FirstOpen { at_ms: 1_500, device: Device { major: 195, minor: 255 } };
    Opens { count, first: (count > 0).then_some(first) }
}

fn card(index: u32) -> Card {
    Card {
        index,
        uuid: format!("GPU-{index}"),
        model: "NVIDIA H200".to_owned(),
        large_slots: 2,
        grantable: true,
        fault: None,
    }
}

impl Node {
    fn with_cards(count: u32) -> Self {
        let mut machine = Machine::new("agent-1".to_owned(), 0);
        machine.handle(1_000, Event::Inventory((0..count).map(card).collect()));
        let mut node = Self { machine, now: 1_000, tickets: 0, calls: 0, cgroups: 0, steps: Vec::new() };
        node.happens(Event::Linked { epoch: 7 });
        node
    }

    /// Takes an event in and plays the executor: hardware works at once, except that nothing clears by itself.
    fn happens(&mut self, event: Event) -> &mut Self {
        let mut open = self.machine.handle(self.now, event);
        while let Some(step) = open.pop_front() {
            self.steps.push(step.clone());
            let result = match step {
                Step::Admit { lease, .. } => {
                    self.cgroups += 1;
                    Some(Event::Admitted { lease, worker: worker(self.cgroups) })
                }
                Step::Reuse { lease, .. } => Some(Event::Reused { lease }),
                Step::CloseGate { lease, .. } => Some(Event::GateClosed { lease, opens: opens(3) }),
                _ => None,
            };
            open.extend(result.into_iter().flat_map(|event| self.machine.handle(self.now, event)));
        }
        assert_eq!(self.machine.snapshot().sound(), Ok(()));
        self
    }

    fn passes(&mut self, ms: u64) -> &mut Self {
        self.now += ms;
        self
    }

    fn asks(&mut self, caller: &Caller, task: u64, size: Option<Size>) -> u64 {
        self.tickets += 1;
        let ticket = self.tickets;
        let caller = caller.clone();
        self.happens(Event::Scheduled { ticket, caller, task, size, declared_ms: 10_000, token: None });
        ticket
    }

    fn order(&self, lease: &str, ticket: u64, size: link::Size) -> link::Start {
        link::Start {
            epoch: 7,
            boottime_ms: self.now,
            lease: lease.to_owned(),
            ticket,
            agent_instance: "agent-1".to_owned(),
            size: size.into(),
            declared_ms: 10_000,
            grace_ms: 2_000,
            allow_limit_ms: 30_000,
            clear_limit_ms: 10_000,
            order_ttl_ms: 5_000,
            account: "bob".to_owned(),
            ..link::Start::default()
        }
    }

    fn starts(&mut self, lease: &str, ticket: u64, size: link::Size) -> &mut Self {
        let order = self.order(lease, ticket, size);
        self.happens(Event::Start(order))
    }

    fn allows(&mut self, lease: &str, caller: &Caller) -> &mut Self {
        self.calls += 1;
        let (call, pod_uid) = (self.calls, caller.pod.pod_uid.clone());
        self.happens(Event::Allow { call, pod_uid, token: lease.to_owned(), pid: 42 })
    }

    fn releases(&mut self, lease: &str, caller: &Caller, fail: bool) -> &mut Self {
        self.calls += 1;
        let (call, pod_uid) = (self.calls, caller.pod.pod_uid.clone());
        self.happens(Event::Release { call, pod_uid, token: lease.to_owned(), fail })
    }

    /// From request to running clock.
    fn runs(&mut self, lease: &str, caller: &Caller, task: u64, size: link::Size) -> &mut Self {
        let named = if size == link::Size::Xlarge { Size::Xlarge } else { Size::Large };
        let ticket = self.asks(caller, task, Some(named));
        self.starts(lease, ticket, size).allows(lease, caller)
    }

    /// What was done since the last look.
    fn seen(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    fn answers(&mut self) -> Vec<Answer> {
        self.seen()
            .into_iter()
            .filter_map(|step| match step {
                Step::Answer { answer, .. } => Some(answer),
                _ => None,
            })
            .collect()
    }

    fn ended(steps: &[Step]) -> Vec<(String, link::EndKind, u64)> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Send(Message::Ended(ended)) => Some((ended.lease.clone(), ended.kind(), ended.used_ms)),
                _ => None,
            })
            .collect()
    }

    fn freed(steps: &[Step]) -> Vec<(String, link::FreedKind)> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Send(Message::Freed(freed)) => Some((freed.lease.clone(), freed.kind())),
                _ => None,
            })
            .collect()
    }

    fn refused(steps: &[Step]) -> Vec<String> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Send(Message::Refused(refused)) => Some(refused.reason.clone()),
                _ => None,
            })
            .collect()
    }

    fn granted(&mut self) -> (bool, u32) {
        match self.answers().pop() {
            Some(Answer::Granted { idle, nvidia_index, .. }) => (idle, nvidia_index),
            other => panic!("no grant: {other:?}"),
        }
    }
}

fn worker(cgroup_id: u64) -> Worker {
    let cgroup = PathBuf::from(format!("/pods/lease-{cgroup_id}"));
    Worker { pid: 1_000 + cgroup_id as u32, start_ticks: 5, cgroup, cgroup_id, parent: Some(900), opened: false }
}

const LARGE: link::Size = link::Size::Large;
const XLARGE: link::Size = link::Size::Xlarge;
