//! Leases from request to free slot, with the real actor, gate and cgroups. The test plays client, broker and card.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc as blocking};
use std::thread::JoinHandle;
use std::time::Duration;

use spaceport_core::protocol::{AllowRefusal, Released, ScheduleQuery, Secret};
use spaceport_device_plugin::checkpoint::{Checkpoint, Found};
use spaceport_device_plugin::clock::boottime_ms;
use spaceport_device_plugin::converge::{Card, Event, IDLE_LOOK_MS, Machine, SpacePod};
use spaceport_device_plugin::device_api::{Granted, PodBackend as _, ScheduleOutcome};
use spaceport_device_plugin::epoch::EpochFile;
use spaceport_device_plugin::gate::lease_cgroup::{self, LeaseCgroup};
use spaceport_device_plugin::gate::{Device, Gate};
use spaceport_device_plugin::hardware::{Hardware, SensorError, Sensors};
use spaceport_device_plugin::metrics::Metrics;
use spaceport_device_plugin::node_actor::{ActorError, Input, NodeActor, NodeHandle, Records};
use spaceport_device_plugin::node_link::{LinkEvent, Outbound, Session};
use spaceport_device_plugin::pod_events::{DEVICE_HELD_WITHOUT_LEASE, PodEvent, PodEvents};
use spaceport_device_plugin::recovery;
use spaceport_device_plugin::space_backend::{AppContainer, SpaceBackend};
use spaceport_proto::nodelink::{self as link, EndKind, FreedKind, LeasePhase, broker_message, node_message::Message};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::NVIDIA;
use crate::pod::{self, Denied, Node, Pod};

/// Far longer than anything here takes; a wait that reaches it is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// A card whose memory stays taken for as long as the test says.
#[derive(Default)]
struct FakeCard {
    memory_stays: AtomicBool,
}

impl Sensors for FakeCard {
    fn devices(&self, _card: u32) -> Vec<Device> {
        vec![Device { major: NVIDIA, minor: 0 }, Device { major: NVIDIA, minor: 255 }]
    }

    fn memory_by_process(&self, _card: u32) -> Result<Vec<(u32, Option<u64>)>, SensorError> {
        let every_pid = || (1..4_194_304).map(|pid| (pid, Some(1 << 30))).collect();
        Ok(if self.memory_stays.load(Ordering::Relaxed) { every_pid() } else { Vec::new() })
    }

    fn is_busy(&self, _card: u32, _pids: &[u32], _window: Duration) -> Result<bool, SensorError> {
        Ok(false)
    }
}

/// A running agent and the broker's end of its link.
struct Agent {
    runtime: tokio::runtime::Runtime,
    handle: NodeHandle,
    thread: JoinHandle<Result<(), ActorError>>,
    gate: Arc<Gate>,
    card: Arc<FakeCard>,
    told: mpsc::Receiver<PodEvent>,
    from_node: mpsc::Receiver<Message>,
    seen: Vec<Message>,
    state: PathBuf,
}

/// What a test orders.
struct Order {
    declared_ms: u64,
    grace_ms: u64,
    allow_limit_ms: u64,
    clear_limit_ms: u64,
}

const RELAXED: Order = Order { declared_ms: 60_000, grace_ms: 2_000, allow_limit_ms: 30_000, clear_limit_ms: 10_000 };

impl Agent {
    fn start(node: &Node) -> Self {
        let state = node.path("state");
        fs::create_dir_all(&state).unwrap();
        let (gate, card) = (node.gate(), Arc::new(FakeCard::default()));
        let sensors: Arc<dyn Sensors> = card.clone();
        let checkpoint = Checkpoint::new(&state, "this-boot".to_owned());
        let instance = format!("agent-{}", boottime_ms());
        let mut machine = Machine::new(instance, 7);
        let devices = |card| sensors.devices(card);
        recovery::recover(&mut machine, &checkpoint, &gate, &node.pods, boottime_ms(), devices).unwrap();
        let (inputs, from_all) = blocking::channel();
        let (epoch, _) = watch::channel(7);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (events, told) = PodEvents::channel();
        let hardware = Hardware {
            pods_cgroup: node.pods.clone(),
            gate: Arc::clone(&gate),
            sensors,
            inputs: inputs.clone(),
            events,
            looks: Arc::default(),
            tasks: TaskTracker::new(),
            runtime: runtime.handle().clone(),
        };
        let records = Records { checkpoint, epoch_file: EpochFile::new(&state), epoch };
        let (actor, handle) = NodeActor::new(machine, hardware, records, Metrics::new(), from_all).unwrap();
        let thread = std::thread::spawn(move || actor.run());
        let cards = vec![Card {
            index: 0,
            uuid: "GPU-test".to_owned(),
            model: "NVIDIA H200".to_owned(),
            large_slots: 2,
            grantable: true,
            fault: None,
        }];
        handle.send(Input::Event(Event::Inventory(cards)));
        let (outbound, from_node, _) = Outbound::new();
        handle.send(Input::Link(LinkEvent::Welcome { session: Session(1), epoch: 7, outbound }));
        Self { runtime, handle, thread, gate, card, told, from_node, seen: Vec::new(), state }
    }

    /// A stop or a crash: what matters is on the disk either way.
    fn stop(self) -> PathBuf {
        self.handle.send(Input::Stop);
        self.thread.join().unwrap().unwrap();
        self.runtime.shutdown_timeout(Duration::from_millis(100));
        self.state
    }

    fn backend(&self, pod: &Pod) -> SpaceBackend {
        let container = AppContainer::default();
        container.write().unwrap().push_str(&format!("container-{}", pod.uid));
        let pod = SpacePod { pod_uid: pod.uid.clone(), ..SpacePod::default() };
        SpaceBackend::new(pod, container, self.handle.clone())
    }

    /// The first message that fits, whenever it came.
    fn hears<T>(&mut self, fits: impl Fn(&Message) -> Option<T>) -> T {
        if let Some(found) = self.seen.iter().find_map(&fits) {
            return found;
        }
        loop {
            let next = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, self.from_node.recv()).await });
            let message = next.expect("the node says nothing").expect("the node is gone");
            let found = fits(&message);
            self.seen.push(message);
            if let Some(found) = found {
                return found;
            }
        }
    }

    fn ended(&mut self, lease: &str) -> link::Ended {
        self.hears(|message| match message {
            Message::Ended(ended) if ended.lease == lease => Some(ended.clone()),
            _ => None,
        })
    }

    fn freed(&mut self, lease: &str) -> FreedKind {
        self.hears(|message| match message {
            Message::Freed(freed) if freed.lease == lease => Some(freed.kind()),
            _ => None,
        })
    }

    /// `/schedule` of the pod's function, granted as `lease`.
    fn grants(&mut self, pod: &Pod, lease: &str, order: &Order) -> Granted {
        let backend = self.backend(pod);
        let query = ScheduleQuery {
            cgroup_path: "/".to_owned(),
            task_id: 5,
            enable_queue: true,
            token_version: 2,
            duration_seconds: 60,
            size: None,
            token: None,
        };
        let answer = self.runtime.spawn(async move { backend.schedule(query).await });
        let known: BTreeSet<u64> = self.seen.iter().filter_map(ticket_of).collect();
        let ticket = self.hears(|message| ticket_of(message).filter(|ticket| !known.contains(ticket)));
        let instance = self.instance();
        let start = link::Start {
            epoch: 7,
            boottime_ms: boottime_ms(),
            lease: lease.to_owned(),
            ticket,
            agent_instance: instance,
            size: link::Size::Large.into(),
            declared_ms: order.declared_ms,
            grace_ms: order.grace_ms,
            allow_limit_ms: order.allow_limit_ms,
            clear_limit_ms: order.clear_limit_ms,
            order_ttl_ms: 5_000,
            ..link::Start::default()
        };
        let message = broker_message::Message::Start(start);
        self.handle.send(Input::Link(LinkEvent::Message { session: Session(1), message }));
        match self.runtime.block_on(async { tokio::time::timeout(PATIENCE, answer).await }).unwrap().unwrap() {
            ScheduleOutcome::Answer(Ok(granted)) => granted,
            other => panic!("no grant: {other:?}"),
        }
    }

    fn instance(&self) -> String {
        self.handle.view().borrow().instance.clone()
    }

    fn allows(&self, pod: &Pod, lease: &str, pid: u32) -> Result<(), AllowRefusal> {
        let backend = self.backend(pod);
        let pid = i32::try_from(pid).unwrap();
        self.runtime.block_on(async { backend.allow(Secret::new(lease), pid).await })
    }

    fn releases(&self, pod: &Pod, lease: &str, failed: bool) -> Released {
        let backend = self.backend(pod);
        self.runtime.block_on(async { backend.release(Secret::new(lease), failed).await })
    }

    /// From `/schedule` to a running clock. The grant counts as delivered.
    fn runs(&mut self, pod: &mut Pod, lease: &str, order: &Order) {
        let granted = self.grants(pod, lease, order);
        assert!(!granted.response.idle);
        granted.undelivered.disarm();
        let pid = pod.worker().container_pid;
        assert_eq!(self.allows(pod, lease, pid), Ok(()));
    }
}

fn ticket_of(message: &Message) -> Option<u64> {
    match message {
        Message::Request(request) => Some(request.ticket),
        _ => None,
    }
}

fn lease_cgroup(pod: &Pod, lease: &str) -> Option<LeaseCgroup> {
    LeaseCgroup::open(&pod.container().join(format!("lease-{lease}"))).ok()
}

fn counted(path: &std::path::Path) -> u64 {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Waits for a value, not for a time.
fn until(what: &str, holds: impl Fn() -> bool) {
    let end = boottime_ms() + PATIENCE.as_millis() as u64;
    while !holds() {
        assert!(boottime_ms() < end, "{what} does not come");
        std::thread::yield_now();
    }
}

#[test]
fn a_worker_opens_the_card_between_allow_and_release_stands_still_after_it_and_is_used_again() {
    let node = Node::new("story");
    let mut pod = node.pod("a");
    let gpu = node.device("nvidia0", NVIDIA, 0);
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &RELAXED);
    assert_eq!(pod.worker().opens(&gpu), Denied::NoDevice);
    assert_eq!(pod.parent().opens(&gpu), Denied::ByGate);
    // A thread left behind would compute on for free.
    let counter = node.path("counter");
    pod.worker().leaves_counter(&counter);
    until("the first count", || counted(&counter) > 0);

    assert_eq!(agent.releases(&pod, "l1", false), Released::Ended);
    let ended = agent.ended("l1");
    assert_eq!((ended.kind(), ended.device_opens), (EndKind::Released, 1));
    let names: Vec<&str> = ended.boundaries.iter().map(|boundary| boundary.name.as_str()).collect();
    let place = |name: &str| names.iter().position(|found| *found == name);
    assert!(place("DeviceOpened").is_some() && place("DeviceOpened") < place("Released"), "{names:?}");
    assert_eq!(agent.freed("l1"), FreedKind::Held);
    let cgroup = lease_cgroup(&pod, "l1").unwrap();
    assert!(!agent.gate.is_open(cgroup.id()).unwrap());
    assert!(cgroup.wait_frozen(PATIENCE).unwrap());
    let stopped_at = counted(&counter);
    for _ in 0..100 {
        assert_eq!(pod.parent().opens(&gpu), Denied::ByGate);
    }
    assert_eq!(counted(&counter), stopped_at, "an idle worker makes no progress");

    let again = agent.grants(&pod, "l2", &RELAXED);
    assert!(again.response.idle);
    again.undelivered.disarm();
    assert_eq!(pod.worker().opens(&gpu), Denied::NoDevice, "no /allow is needed");
    until("a further count", || counted(&counter) > stopped_at);
    assert_eq!(agent.releases(&pod, "l2", true), Released::Ended);
    assert_eq!(agent.ended("l2").kind(), EndKind::Failed);
    assert_eq!(agent.freed("l2"), FreedKind::Free);
    assert!(lease_cgroup(&pod, "l1").is_none(), "killed and removed");
    agent.stop();
}

#[test]
fn a_worker_and_its_children_are_gone_after_the_deadline_and_the_gate_is_closed() {
    let node = Node::new("deadline");
    let mut pod = node.pod("a");
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &Order { declared_ms: 300, grace_ms: 100, ..RELAXED });
    let counter = node.path("counter");
    pod.worker().leaves_counter(&counter);
    let id = lease_cgroup(&pod, "l1").unwrap().id();
    let ended = agent.ended("l1");
    assert_eq!(ended.kind(), EndKind::Deadline);
    assert!((400..2_000).contains(&ended.used_ms), "{}", ended.used_ms);
    assert_eq!(agent.freed("l1"), FreedKind::Free);
    assert!(!agent.gate.is_open(id).unwrap());
    assert!(lease_cgroup(&pod, "l1").is_none());
    assert!(fs::metadata(format!("/proc/{}/cwd", pod.worker().host_pid)).is_err(), "killed");
    // The parent says so afterwards, and settles nothing again.
    assert_eq!(agent.releases(&pod, "l1", true), Released::Unknown);
    agent.stop();
}

#[test]
fn a_worker_that_dies_ends_its_lease_without_anybody_saying_so() {
    let node = Node::new("death");
    let mut pod = node.pod("a");
    let gpu = node.device("nvidia0", NVIDIA, 0);
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &RELAXED);
    assert_eq!(pod.worker().opens(&gpu), Denied::NoDevice);
    pod.worker().exits();
    assert_eq!(agent.ended("l1").kind(), EndKind::WorkerDied);
    assert_eq!(agent.freed("l1"), FreedKind::Free);
    agent.stop();
}

#[test]
fn bad_pids_open_nothing_and_the_right_one_still_does() {
    let node = Node::new("badpids");
    let (mut pod, mut other) = (node.pod("a"), node.pod("b"));
    let mut agent = Agent::start(&node);
    agent.grants(&pod, "l1", &RELAXED).undelivered.disarm();
    assert_eq!(agent.allows(&pod, "l1", 1), Err(AllowRefusal::InitProcess));
    assert_eq!(agent.allows(&pod, "l1", other.worker().host_pid), Err(AllowRefusal::ForeignProcess));
    let pid = other.worker().container_pid;
    assert_eq!(agent.allows(&other, "l1", pid), Err(AllowRefusal::UnknownToken));
    let pid = pod.worker().container_pid;
    assert_eq!(agent.allows(&pod, "l1", pid), Ok(()));
    assert_eq!(agent.allows(&pod, "l1", pid), Err(AllowRefusal::AlreadyUsed));
    agent.stop();
}

#[test]
fn a_grant_that_cannot_be_delivered_costs_nothing() {
    let node = Node::new("undelivered");
    let pod = node.pod("a");
    let mut agent = Agent::start(&node);
    drop(agent.grants(&pod, "l1", &RELAXED));
    let ended = agent.ended("l1");
    assert_eq!((ended.kind(), ended.used_ms), (EndKind::Undelivered, 0));
    assert_eq!(agent.freed("l1"), FreedKind::Free);
    agent.stop();
}

#[test]
fn an_agent_that_restarts_takes_the_worker_over_and_keeps_its_deadline() {
    let node = Node::new("restart");
    let mut pod = node.pod("a");
    let gpu = node.device("nvidia0", NVIDIA, 0);
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &Order { declared_ms: 2_000, grace_ms: 100, ..RELAXED });
    agent.stop();
    assert_eq!(pod.worker().opens(&gpu), Denied::NoDevice, "the lease runs on");
    assert_eq!(pod.parent().opens(&gpu), Denied::ByGate, "and the gate stays shut");

    let mut agent = Agent::start(&node);
    let (phase, running_ms) = agent.hears(|message| match message {
        Message::Joined(joined) => joined.leases.first().map(|lease| (lease.phase(), lease.running_ms)),
        _ => None,
    });
    assert!(phase == LeasePhase::Running && running_ms > 0);
    assert_eq!(pod.worker().opens(&gpu), Denied::NoDevice);
    let ended = agent.ended("l1");
    assert_eq!(ended.kind(), EndKind::Deadline);
    assert!((2_100..3_500).contains(&ended.used_ms), "counted from the recorded start: {}", ended.used_ms);
    assert_eq!(agent.freed("l1"), FreedKind::Free);
    agent.stop();
}

#[test]
fn a_lease_that_was_closing_when_its_agent_died_keeps_what_it_opened() {
    let node = Node::new("closing");
    let mut pod = node.pod("a");
    let gpu = node.device("nvidia0", NVIDIA, 0);
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &RELAXED);
    assert_eq!(pod.worker().opens(&gpu), Denied::NoDevice);
    let id = lease_cgroup(&pod, "l1").unwrap().id();
    // What an agent leaves that dies between the release and the gate.
    let checkpoint = Checkpoint::new(&agent.stop(), "this-boot".to_owned());
    let Ok(Found::SameBoot(snapshot)) = checkpoint.read() else { panic!("no checkpoint of this boot") };
    let mut machine = Machine::new("agent-that-dies".to_owned(), 7);
    machine.restore(boottime_ms(), snapshot, &BTreeSet::from([id]));
    let (pod_uid, token) = (pod.uid.clone(), "l1".to_owned());
    machine.handle(boottime_ms(), Event::Release { call: 1, pod_uid, token, fail: true });
    checkpoint.write(&machine.snapshot()).unwrap();

    let mut agent = Agent::start(&node);
    let ended = agent.ended("l1");
    assert_eq!((ended.kind(), ended.device_opens), (EndKind::Failed, 1), "{}", ended.message);
    assert!(!agent.gate.is_open(id).unwrap());
    agent.stop();
}

#[test]
fn a_corrupt_checkpoint_stops_everything_and_charges_nothing() {
    let node = Node::new("corrupt");
    let mut pod = node.pod("a");
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &RELAXED);
    let id = lease_cgroup(&pod, "l1").unwrap().id();
    let state = agent.stop();
    fs::write(state.join("checkpoint.json"), "{").unwrap();

    let mut agent = Agent::start(&node);
    assert!(lease_cgroup::find_all(&node.pods).unwrap().is_empty());
    assert!(!agent.gate.is_open(id).unwrap());
    assert_eq!(agent.ended("l1").kind(), EndKind::PlatformFault);
    agent.stop();
}

#[test]
fn a_slot_whose_memory_does_not_come_back_is_quarantined_until_it_does() {
    let node = Node::new("memory");
    let mut pod = node.pod("a");
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &Order { clear_limit_ms: 200, ..RELAXED });
    agent.card.memory_stays.store(true, Ordering::Relaxed);
    agent.releases(&pod, "l1", true);
    assert_eq!(agent.freed("l1"), FreedKind::Quarantined);
    let quarantined = |agent: &mut Agent, wanted: u32| {
        agent.hears(|message| match message {
            Message::Heartbeat(beat) => (beat.cards.first()?.quarantined_slots == wanted).then_some(()),
            _ => None,
        });
    };
    quarantined(&mut agent, 1);
    agent.seen.clear();
    agent.card.memory_stays.store(false, Ordering::Relaxed);
    quarantined(&mut agent, 0);
    agent.stop();
}

#[test]
fn a_device_held_outside_every_lease_ends_its_container() {
    let node = Node::new("held");
    let mut pod = node.pod("a");
    // Any device that can be opened here stands for the card's.
    let device = pod::numbers("/dev/ptmx".as_ref());
    let mut agent = Agent::start(&node);
    agent.gate.maintain(&BTreeSet::from([NVIDIA, device.major])).unwrap();
    agent.runs(&mut pod, "l1", &RELAXED);
    let _holder = pod.joins_holding("/dev/ptmx");
    agent.releases(&pod, "l1", false);
    let empty = || fs::read_to_string(pod.container().join("cgroup.procs")).unwrap().is_empty();
    until("the container's end", empty);
    let event = agent.told.blocking_recv().unwrap();
    assert_eq!((event.reason, event.pod.pod_uid), (DEVICE_HELD_WITHOUT_LEASE, pod.uid.clone()));
    assert!(event.note.contains(&format!("device {}:{} ", device.major, device.minor)), "{}", event.note);
    agent.stop();
}

#[test]
fn a_frozen_idle_worker_that_is_sent_sigterm_is_ended_and_not_used_again() {
    let node = Node::new("sigterm");
    let mut pod = node.pod("a");
    let mut agent = Agent::start(&node);
    agent.runs(&mut pod, "l1", &RELAXED);
    // Without a handler the kernel ends a frozen process by itself.
    pod.worker().traps();
    assert_eq!(agent.releases(&pod, "l1", false), Released::DeviceNotUsed);
    assert_eq!(agent.freed("l1"), FreedKind::Held);
    let cgroup = lease_cgroup(&pod, "l1").unwrap();
    assert!(cgroup.wait_frozen(PATIENCE).unwrap());
    let worker = pod.worker().host_pid;
    // That a look leaves it alone can only be seen by letting two of them pass.
    let looked_ms = boottime_ms() + 2 * IDLE_LOOK_MS + 50;
    until("two looks", || boottime_ms() > looked_ms);
    assert_eq!(cgroup.processes().unwrap(), [worker]);

    let sent = rustix::process::Pid::from_raw(worker.cast_signed()).unwrap();
    rustix::process::kill_process(sent, rustix::process::Signal::TERM).unwrap();
    until("the worker's end", || lease_cgroup(&pod, "l1").is_none());
    assert!(fs::metadata(format!("/proc/{worker}/cwd")).is_err(), "killed");
    until("its slot", || agent.handle.view().borrow().idle.is_empty());
    let again = agent.grants(&pod, "l2", &RELAXED);
    assert!(!again.response.idle, "a new worker is forked");
    agent.stop();
}

#[test]
fn a_frozen_idle_worker_whose_parent_has_ended_is_ended_too() {
    let node = Node::new("orphan");
    let mut pod = node.pod("a");
    let mut agent = Agent::start(&node);
    // The app is not the container's first process; it forks a worker and ends without it.
    let worker = pod.worker().forks();
    agent.grants(&pod, "l1", &RELAXED).undelivered.disarm();
    assert_eq!(agent.allows(&pod, "l1", worker.container_pid), Ok(()));
    agent.releases(&pod, "l1", false);
    assert_eq!(agent.freed("l1"), FreedKind::Held);
    assert!(lease_cgroup(&pod, "l1").unwrap().wait_frozen(PATIENCE).unwrap());
    pod.worker().exits();
    until("the worker's end", || lease_cgroup(&pod, "l1").is_none());
    assert!(fs::metadata(format!("/proc/{}/cwd", worker.host_pid)).is_err(), "killed");
    agent.stop();
}
