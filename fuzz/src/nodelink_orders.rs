//! What a broker says to an agent, and what the agent's machine does about it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use prost::Message as _;
use spaceport_core::protocol::{CallerClass, Denial, wire};
use spaceport_device_plugin::converge::{Answer, Caller, Card, Event, Machine, SpacePod, Step, Worker};
use spaceport_device_plugin::gate::Opens;
use spaceport_proto::nodelink as link;
use spaceport_proto::nodelink::broker_message::Message;
use spaceport_proto::nodelink::node_message::Message as Said;

use crate::Verdict;
use crate::client::readable;

/// Messages that are taken of one input.
const MESSAGES_MAX: usize = 64;
/// Steps that one event may cause.
const STEPS_MAX: usize = 10_000;
/// BOOTTIME of the first message.
const BEGIN_MS: u64 = 1_000_000;
/// The agent's start.
pub const AGENT: &str = "agent-1";

/// A machine, with hardware and clients that do at once what they are told.
pub struct Node {
    /// The machine.
    pub machine: Machine,
    /// BOOTTIME.
    pub now_ms: u64,
    /// Steps it has asked for.
    pub steps: usize,
    running: Vec<(String, String)>,
    refused: Vec<String>,
    /// The place that is being told.
    heard: Option<link::Queued>,
    /// What each request that waits was told last, and when.
    told: BTreeMap<u64, (link::Queued, u64)>,
    calls: u64,
    cgroups: u64,
}

/// A card of two halves.
pub fn card(index: u32) -> Card {
    let (uuid, model) = (format!("GPU-{index}"), "NVIDIA H200".to_owned());
    Card { index, uuid, model, large_slots: 2, grantable: true, fault: None }
}

/// Messages, each with its length before it, as gRPC's frames are.
///
/// # Panics
/// If a message does not survive being sent again, an order is neither taken nor refused or is taken against the fence, a
/// request presents another place than it was told, or the machine stumbles.
pub fn check(bytes: &[u8]) -> Verdict {
    let mut node = Node::new(Machine::new(AGENT.to_owned(), 0), BEGIN_MS);
    node.happens(Event::Inventory(vec![card(0), card(1)]));
    node.happens(Event::Linked { epoch: 7 });
    for ticket in 1..=4 {
        node.schedules(ticket);
    }
    let mut rest = bytes;
    let mut verdict = Verdict::Refused;
    for _ in 0..MESSAGES_MAX {
        let Ok(message) = link::BrokerMessage::decode_length_delimited(&mut rest) else { break };
        let again = link::BrokerMessage::decode(message.encode_to_vec().as_slice());
        assert_eq!(again.as_ref(), Ok(&message), "sent again");
        if let Some(message) = message.message {
            verdict = Verdict::Taken;
            node.hears(message);
        }
        if rest.is_empty() {
            break;
        }
    }
    verdict
}

impl Node {
    /// A node around a machine.
    pub fn new(machine: Machine, now_ms: u64) -> Self {
        let (running, refused, told) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { machine, now_ms, steps: 0, running, refused, heard: None, told, calls: 0, cgroups: 1 << 20 }
    }

    /// A client asks for a GPU; there are two apps.
    pub fn schedules(&mut self, ticket: u64) {
        let app = format!("app-{}", ticket % 2);
        let pod = SpacePod { pod_uid: app.clone(), space: app.clone(), ..SpacePod::default() };
        let caller = Caller { pod, container: app };
        let declared_ms = 30_000;
        self.happens(Event::Scheduled { ticket, caller, task: 1, size: None, declared_ms, token: None });
    }

    /// An order that is in order.
    pub fn ordered(&mut self, ticket: u64, lease: &str) {
        self.hears(Message::Start(start(ticket, lease, self.now_ms)));
    }

    fn hears(&mut self, message: Message) {
        self.now_ms += 50;
        match message {
            Message::Welcome(welcome) => self.happens(Event::Linked { epoch: welcome.epoch }),
            Message::Standby(_) => self.happens(Event::Unlinked),
            Message::Queued(queued) => {
                self.heard = Some(queued);
                self.happens(Event::Queued(queued));
                self.heard = None;
            }
            Message::Denied(denied) => self.happens(Event::Denied(denied)),
            Message::Start(order) => self.starts(order),
            Message::Cancel(order) => self.happens(Event::Cancel(order)),
            Message::Acknowledged(acknowledged) => self.happens(Event::Acknowledged(acknowledged)),
        }
        if self.running.len() > 1 {
            let (token, pod_uid) = self.running.remove(0);
            self.calls += 1;
            self.happens(Event::Release { call: self.calls, pod_uid, token, fail: self.calls.is_multiple_of(3) });
        }
        self.happens(Event::Tick);
    }

    /// Invariant 7 and L7: an order is taken or refused, and one of an earlier term is not taken.
    fn starts(&mut self, order: link::Start) {
        let known = |machine: &Machine| machine.snapshot().leases.iter().any(|lease| lease.id == order.lease);
        let (before, fence) = (known(&self.machine), self.machine.epoch());
        self.refused.clear();
        self.happens(Event::Start(order.clone()));
        let (taken, refused) = (known(&self.machine), self.refused.contains(&order.lease));
        assert!(before || taken != refused, "an order is taken {taken} and refused {refused}");
        assert!(before || !taken || order.epoch >= fence, "taken with epoch {} of {fence}", order.epoch);
    }

    /// Takes an event in and does what the machine asks for.
    ///
    /// # Panics
    /// If the machine does, asks for too much, or makes a snapshot that it would not take back.
    pub fn happens(&mut self, event: Event) {
        let mut open = self.machine.handle(self.now_ms, event);
        let mut done = 0;
        while let Some(step) = open.pop_front() {
            done += 1;
            assert!(done < STEPS_MAX, "the machine does not come to rest");
            if let Some(event) = self.does(step) {
                open.extend(self.machine.handle(self.now_ms, event));
            }
        }
        self.steps += done;
        assert_eq!(self.machine.snapshot().sound(), Ok(()));
        let _ = (self.machine.next_wake(), self.machine.view(), self.machine.take_dirty());
    }

    fn does(&mut self, step: Step) -> Option<Event> {
        match step {
            Step::Admit { lease, caller, pid, .. } => {
                self.cgroups += 1;
                let cgroup = PathBuf::from(format!("/lease-{lease}"));
                let (cgroup_id, start_ticks) = (self.cgroups, 1);
                let worker = Worker { pid, start_ticks, cgroup, cgroup_id, parent: None, opened: false };
                self.running.push((lease.clone(), caller.pod.pod_uid));
                Some(Event::Admitted { lease, worker })
            }
            Step::Reuse { lease, .. } => Some(Event::Reused { lease }),
            Step::CloseGate { lease, .. } => Some(Event::GateClosed { lease, opens: Opens { count: 1, first: None } }),
            Step::Clear { worker, .. } => Some(Event::Cleared { cgroup_id: worker.cgroup_id }),
            Step::Answer { ticket, answer } => self.answers(ticket, answer),
            Step::Send(Said::Refused(refused)) => {
                self.refused.push(refused.lease);
                None
            }
            Step::Send(Said::Request(request)) => {
                self.presents(&request);
                None
            }
            _ => None,
        }
    }

    fn answers(&mut self, ticket: u64, answer: Answer) -> Option<Event> {
        match answer {
            Answer::Granted { idle: false, allow_token: token, .. } => {
                self.calls += 1;
                let pod_uid = format!("app-{}", ticket % 2);
                Some(Event::Allow { call: self.calls, pod_uid, token, pid: 100 })
            }
            Answer::Denied { denial, .. } => {
                // As the agent takes what it does not know.
                let denial = serde_json::from_str(&denial).unwrap_or(Denial::BrokerUnavailable);
                for caller in [CallerClass::Guest, CallerClass::Pro] {
                    readable(&wire(&denial, caller), &[401, 429, 503]);
                }
                None
            }
            Answer::Queued { .. } => {
                // Only of a request that waits; its place is not the client's business.
                let heard = self.heard.take().expect("a client is told that it waits when its broker says so");
                self.told.insert(ticket, (heard, self.now_ms));
                None
            }
            Answer::Granted { .. } | Answer::Unavailable { .. } => None,
        }
    }

    /// L17: the place that it was told last, by whichever leader, and how long ago; nothing if it was told none.
    fn presents(&self, request: &link::Request) {
        let told = self.told.get(&request.ticket).map_or((0, 0, 0, 0), |(told, at_ms)| {
            let ago_ms = if told.latest_start_ms > 0 { self.now_ms - at_ms } else { 0 };
            (told.place_epoch, told.place_number, told.latest_start_ms, ago_ms)
        });
        let link::Request { place_epoch, place_number, promised_ms, promised_ago_ms, .. } = *request;
        assert_eq!((place_epoch, place_number, promised_ms, promised_ago_ms), told, "of ticket {}", request.ticket);
    }
}

/// An order of the term, for one of the four requests.
pub fn start(ticket: u64, lease: &str, boottime_ms: u64) -> link::Start {
    link::Start {
        epoch: 7,
        boottime_ms,
        lease: lease.to_owned(),
        ticket,
        agent_instance: AGENT.to_owned(),
        size: link::Size::Large.into(),
        declared_ms: 30_000,
        grace_ms: 2_000,
        allow_limit_ms: 30_000,
        clear_limit_ms: 10_000,
        order_ttl_ms: 5_000,
        after: String::new(),
        avoid: Vec::new(),
        caller: link::CallerClass::Regular.into(),
        account: "account".to_owned(),
        wait_limit_ms: 60_000,
    }
}
