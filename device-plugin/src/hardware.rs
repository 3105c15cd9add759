//! Carries the machine's steps out on the node: cgroups, gate, pidfds, memory. Everything here blocks for at most a few
//! milliseconds; what takes longer runs on a thread of its own and reports back as an event.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as blocking};
use std::time::Duration;

use spaceport_core::protocol::AllowRefusal;
use spaceport_shell::error_chain;
use tokio_util::task::TaskTracker;

use crate::clock::boottime_ms;
use crate::converge::{Caller, Event, Worker};
use crate::fault::{self, Fault};
use crate::gate::lease_cgroup::LeaseCgroup;
use crate::gate::{Device, Gate, Opens, cgroup_id};
use crate::node_actor::Input;
use crate::pod_events::{DEVICE_HELD_WITHOUT_LEASE, PodEvent, PodEvents};
use crate::process_status::ProcessStatus;
use crate::processes::{self, Held, ProcessError};
use crate::sandbox;
use crate::slots::Slot;

/// A worker that does not stand still after this long cannot be stopped safely; it is killed instead (L16). Freezing takes
/// milliseconds unless a process sits in an uninterruptible driver call.
const FREEZE_LIMIT: Duration = Duration::from_secs(1);
/// When a frozen worker's card is looked at for kernels that run on (N11).
const RESIDENT_KERNEL_AFTER: Duration = Duration::from_millis(200);
/// Between two looks at a card's memory while a slot clears: at first often, as hand-over waits for it and it is usually
/// back with the process, then no more often than the NVML thread's queue is made for.
const MEMORY_LOOK_MIN: Duration = Duration::from_millis(5);
const MEMORY_LOOK_MAX: Duration = Duration::from_millis(100);
/// From the end of a lease to the look at who still holds a device in its pod. The look reads the mappings of every process
/// there, which takes milliseconds of a core that the hand-over to the next visitor needs; what is held stays held.
const HOLDER_LOOK_AFTER: Duration = Duration::from_millis(100);
/// Between two looks at a quarantined slot, for as long as it stays one.
const QUARANTINE_LOOK: Duration = Duration::from_secs(1);

/// A card could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("card {card} cannot be asked: {reason}")]
pub struct SensorError {
    /// Which card.
    pub card: u32,
    /// Why.
    pub reason: String,
}

/// What leases must know about cards. The inventory implements it; each call may block for a few milliseconds and must not
/// hang (N20).
pub trait Sensors: Send + Sync + 'static {
    /// The device nodes that a lease on this card may open: the card's own and those all cards share.
    fn devices(&self, card: u32) -> Vec<Device>;

    /// Host pids with a context on this card, and their device memory in bytes where that is known.
    ///
    /// # Errors
    /// If the card cannot be asked; nothing is then known.
    fn memory_by_process(&self, card: u32) -> Result<Vec<(u32, Option<u64>)>, SensorError>;

    /// Whether kernels of these host pids ran on the card during the last `window`.
    ///
    /// # Errors
    /// If the card cannot be asked.
    fn is_busy(&self, card: u32, pids: &[u32], window: Duration) -> Result<bool, SensorError>;
}

/// Why a worker was not admitted.
#[derive(Debug)]
pub enum AdmitError {
    /// The pid may not be allowed.
    Refused(AllowRefusal),
    /// Cgroup or gate failed.
    Failed(String),
}

/// The node's hardware as far as leases touch it.
pub struct Hardware {
    /// Cgroup above all pods.
    pub pods_cgroup: PathBuf,
    /// The gate.
    pub gate: Arc<Gate>,
    /// The cards.
    pub sensors: Arc<dyn Sensors>,
    /// Where results go.
    pub inputs: blocking::Sender<Input>,
    /// Where the owners of pods are told.
    pub events: PodEvents,
    /// Pods that are about to be looked through for holders, by uid. A std mutex: it is held for a lookup.
    pub looks: Arc<Mutex<BTreeSet<String>>>,
    /// Owner of the helper threads and tasks: at most one of each kind for each worker.
    pub tasks: TaskTracker,
    /// The runtime that they run on.
    pub runtime: tokio::runtime::Handle,
}

impl Hardware {
    /// N9: pid check, own cgroup, and only then the gate.
    ///
    /// # Errors
    /// Nothing is left behind on an error.
    pub fn admit(&self, lease: &str, caller: &Caller, pid: u32, card: u32) -> Result<Worker, AdmitError> {
        let (container, held) = self.find(caller, pid)?;
        let failed = |error: &dyn std::error::Error| AdmitError::Failed(error_chain(error));
        let cgroup = LeaseCgroup::create(&container, lease).map_err(|error| failed(&error))?;
        let admitted = cgroup.take_in(held.pid).map_err(|error| failed(&error)).and_then(|()| {
            // Alive after the move: it was this process that moved.
            if !held.is_alive() {
                return Err(AdmitError::Refused(AllowRefusal::ForeignProcess));
            }
            if fault::is(Fault::GateStaysShut) {
                return Ok(());
            }
            let devices = self.sensors.devices(card);
            if fault::is(Fault::GateOpenToContainer)
                && let Ok(container) = cgroup_id(&container)
            {
                self.gate.open(container, &devices).map_err(|error| failed(&error))?;
            }
            self.gate.open(cgroup.id(), &devices).map_err(|error| failed(&error))
        });
        if let Err(error) = admitted {
            self.undo(&cgroup);
            return Err(error);
        }
        let worker = Worker {
            pid: held.pid,
            start_ticks: held.start_ticks,
            cgroup: cgroup.path().to_owned(),
            cgroup_id: cgroup.id(),
            parent: ProcessStatus::read(held.pid).map(|status| status.parent),
            opened: false,
        };
        self.watch_held(worker.cgroup_id, held);
        Ok(worker)
    }

    /// A half-done admission: the process ends with its cgroup, as it can not be put back among the ungated.
    fn undo(&self, cgroup: &LeaseCgroup) {
        let undone = cgroup.kill().and_then(|()| cgroup.wait_empty(FREEZE_LIMIT)).and_then(|_| cgroup.remove());
        if let Err(error) = undone {
            tracing::error!(error = %error_chain(&error), "A half-made lease cgroup stays behind");
        }
    }

    fn find(&self, caller: &Caller, pid: u32) -> Result<(PathBuf, Held), AdmitError> {
        let foreign = AdmitError::Refused(AllowRefusal::ForeignProcess);
        let Some(pod) = sandbox::pod_cgroup(&self.pods_cgroup, &caller.pod.pod_uid) else { return Err(foreign) };
        let containers = sandbox::container_cgroups(&pod);
        // The pod's status lags behind a container's restart; then any container of the pod may have forked the pid, and
        // it is taken only if one alone has.
        let named: Vec<&PathBuf> =
            containers.iter().filter(|path| sandbox::is_container(path, &caller.container)).collect();
        let candidates = if named.is_empty() { containers.iter().collect() } else { named };
        let mut found = Vec::new();
        for container in candidates {
            match processes::in_container(container, pid) {
                Ok(held) => found.push((container.clone(), held)),
                Err(ProcessError::Refused(AllowRefusal::InitProcess)) => {
                    return Err(AdmitError::Refused(AllowRefusal::InitProcess));
                }
                Err(ProcessError::Refused(_)) => {}
                Err(error @ ProcessError::Unreadable { .. }) => {
                    tracing::debug!(error = %error_chain(&error), "A container was gone while a worker was looked for");
                }
            }
        }
        match found.pop() {
            Some(only) if found.is_empty() => Ok(only),
            _ => Err(foreign),
        }
    }

    /// How a worker is now; `None` if it has ended.
    pub fn look_at(&self, worker: &Worker) -> Option<ProcessStatus> {
        let held = Held::open(worker.pid).filter(|held| held.start_ticks == worker.start_ticks)?;
        // Alive after the read: the status is this process's.
        ProcessStatus::read(worker.pid).filter(|_| held.is_alive())
    }

    /// Opens the gate for an idle worker's cgroup again and lets it run; false if it is gone, has to go, or cannot be thawed.
    pub fn reuse(&self, worker: &Worker, card: u32) -> bool {
        // A signal that came since the last look would end it as soon as it runs.
        if let Some(why) = self.look_at(worker).and_then(|seen| worker.must_end(&seen)) {
            tracing::info!(pid = worker.pid, cgroup = %worker.cgroup.display(), %why, "An idle worker is not used again");
            return false;
        }
        let alive = is_alive(worker);
        let cgroup = match LeaseCgroup::open(&worker.cgroup) {
            Ok(cgroup) if alive => cgroup,
            _ => return false,
        };
        let opened = self.gate.open(worker.cgroup_id, &self.sensors.devices(card));
        let error = match opened {
            Ok(()) => match cgroup.thaw() {
                Ok(()) => return true,
                Err(error) => error_chain(&error),
            },
            Err(error) => error_chain(&error),
        };
        tracing::error!(error, cgroup = %worker.cgroup.display(), "An idle worker could not be used again");
        self.shut(worker.cgroup_id);
        false
    }

    /// Shuts the gate for a worker and returns the count; then looks for devices that its pod holds elsewhere (N10).
    /// If the gate cannot be shut, the worker is killed at once, which has the same effect.
    pub fn close_gate(&self, worker: &Worker, caller: &Caller) -> Opens {
        let opens = match self.gate.close(worker.cgroup_id) {
            Ok(opens) => opens,
            Err(error) => {
                tracing::error!(error = %error_chain(&error), "The gate could not be shut; its worker is killed");
                kill(worker);
                Opens::default()
            }
        };
        self.look_for_holders(caller.clone());
        opens
    }

    /// Shuts the gate for a cgroup that is about to be killed.
    pub fn shut(&self, cgroup_id: u64) {
        if let Err(error) = self.gate.close(cgroup_id) {
            tracing::error!(error = %error_chain(&error), "The gate could not be shut for a cgroup that is being killed");
        }
    }

    /// N10, off the path of the answer: a process outside every lease cgroup that has a device open or mapped ends its
    /// container. One look serves every lease of the pod that ends until it begins.
    fn look_for_holders(&self, caller: Caller) {
        let (pods, majors, events) = (self.pods_cgroup.clone(), self.gate.majors(), self.events.clone());
        let looks = Arc::clone(&self.looks);
        let is_new = locked(&looks).insert(caller.pod.pod_uid.clone());
        if !is_new {
            return;
        }
        self.tasks.spawn_blocking_on(
            move || {
                std::thread::sleep(HOLDER_LOOK_AFTER);
                // Before the look: a lease that ends during it has one of its own.
                locked(&looks).remove(&caller.pod.pod_uid);
                let Some(pod) = sandbox::pod_cgroup(&pods, &caller.pod.pod_uid) else { return };
                match processes::holders(&pod, &majors) {
                    Ok(holders) => holders.iter().for_each(|holder| end_container(&pod, holder, &caller, &events)),
                    Err(error) => {
                        tracing::debug!(error = %error_chain(&error), "A pod was gone before its descriptors were")
                    }
                }
            },
            &self.runtime,
        );
    }

    /// Freezes a worker for reuse and makes sure that it stands still (N11).
    pub fn hold(&self, worker: &Worker, card: u32) {
        if fault::is(Fault::IdleWorkersRun) {
            return;
        }
        let (worker, sensors, inputs) = (worker.clone(), Arc::clone(&self.sensors), self.inputs.clone());
        let frozen = LeaseCgroup::open(&worker.cgroup).and_then(|cgroup| cgroup.freeze().map(|()| cgroup));
        self.tasks.spawn_blocking_on(
            move || {
                let safe = match frozen.and_then(|cgroup| Ok((cgroup.wait_frozen(FREEZE_LIMIT)?, cgroup))) {
                    Ok((true, cgroup)) => stands_still(&cgroup, sensors.as_ref(), card),
                    Ok((false, _)) => false,
                    Err(error) => {
                        tracing::warn!(error = %error_chain(&error), "A worker could not be frozen");
                        false
                    }
                };
                if !safe {
                    send(&inputs, Event::IdleUnsafe { cgroup_id: worker.cgroup_id });
                }
            },
            &self.runtime,
        );
    }

    /// Kills a worker's cgroup and waits until processes and memory are gone; overdue after `limit_ms`, and still waiting.
    pub fn clear(&self, slot: Slot, worker: &Worker, limit_ms: u64) {
        self.shut(worker.cgroup_id);
        let (worker, sensors, inputs) = (worker.clone(), Arc::clone(&self.sensors), self.inputs.clone());
        let pids = kill(&worker);
        self.tasks.spawn_blocking_on(
            move || {
                let cgroup_id = worker.cgroup_id;
                let end_ms = boottime_ms().saturating_add(limit_ms);
                let mut overdue = false;
                // Ends when the slot is clear, or with the process; until then the slot stays quarantined.
                while let Err(reason) = cleared(&worker, slot.card, &pids, sensors.as_ref(), end_ms) {
                    if !overdue {
                        overdue = true;
                        tracing::error!(reason, cgroup = %worker.cgroup.display(), "A slot does not clear");
                        send(&inputs, Event::ClearOverdue { cgroup_id, reason });
                    }
                    std::thread::sleep(QUARANTINE_LOOK);
                    kill(&worker);
                    if inputs.send(Input::Nothing).is_err() {
                        return; // The agent stops; the next one goes on by its checkpoint.
                    }
                }
                send(&inputs, Event::Cleared { cgroup_id });
            },
            &self.runtime,
        );
    }

    /// Watches a worker that an earlier agent admitted. One that has ended meanwhile is reported at once.
    pub fn watch(&self, worker: &Worker) {
        match Held::open(worker.pid).filter(|held| held.start_ticks == worker.start_ticks) {
            Some(held) => self.watch_held(worker.cgroup_id, held),
            None => send(&self.inputs, Event::WorkerExited { cgroup_id: worker.cgroup_id }),
        }
    }

    fn watch_held(&self, cgroup_id: u64, held: Held) {
        let inputs = self.inputs.clone();
        self.tasks.spawn_on(
            async move {
                if let Err(error) = held.ended().await {
                    // Its end is then noticed at the deadline.
                    tracing::error!(%error, "A worker cannot be watched");
                    return;
                }
                send(&inputs, Event::WorkerExited { cgroup_id });
            },
            &self.runtime,
        );
    }
}

/// The recorded process still lives in its cgroup.
pub fn is_alive(worker: &Worker) -> bool {
    let held = Held::open(worker.pid).filter(|held| held.start_ticks == worker.start_ticks);
    let inside = LeaseCgroup::open(&worker.cgroup)
        .ok()
        .filter(|cgroup| cgroup.id() == worker.cgroup_id)
        .and_then(|cgroup| cgroup.processes().ok())
        .is_some_and(|pids| pids.contains(&worker.pid));
    held.is_some() && inside
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends an event; the actor outlives everything that sends, except while the agent stops.
fn send(inputs: &blocking::Sender<Input>, event: Event) {
    if inputs.send(Input::Event(event)).is_err() {
        tracing::debug!("An event came after the agent stopped");
    }
}

/// Kills a cgroup; returns the pids that were in it. A cgroup that is gone held none.
fn kill(worker: &Worker) -> BTreeSet<u32> {
    let Ok(cgroup) = LeaseCgroup::open(&worker.cgroup) else { return BTreeSet::from([worker.pid]) };
    let mut pids: BTreeSet<u32> = cgroup.processes().unwrap_or_default().into_iter().collect();
    pids.insert(worker.pid);
    if fault::is(Fault::NothingIsKilled) {
        return pids;
    }
    if let Err(error) = cgroup.kill() {
        tracing::warn!(error = %error_chain(&error), "A lease cgroup could not be killed");
    }
    pids
}

/// Waits until `end_ms` for the cgroup to be empty and its memory to be back, and removes it.
fn cleared(worker: &Worker, card: u32, pids: &BTreeSet<u32>, sensors: &dyn Sensors, end_ms: u64) -> Result<(), String> {
    let left = || Duration::from_millis(end_ms.saturating_sub(boottime_ms()));
    let cgroup = LeaseCgroup::open(&worker.cgroup).ok();
    if let Some(cgroup) = &cgroup
        && !cgroup.wait_empty(left()).map_err(|error| error_chain(&error))?
    {
        return Err(format!("processes {:?} do not end", cgroup.processes().unwrap_or_default()));
    }
    let mut pause = MEMORY_LOOK_MIN;
    // Bounded by end_ms: a pause passes in each round.
    loop {
        let problem = match sensors.memory_by_process(card) {
            Ok(using) => match using.iter().find(|(pid, _)| pids.contains(pid)) {
                None => break,
                Some((pid, Some(bytes))) => format!("process {pid} is gone but {bytes} bytes of card {card} are not"),
                Some((pid, None)) => format!("process {pid} is gone but its context on card {card} is not"),
            },
            Err(error) => error_chain(&error),
        };
        if left().is_zero() {
            return Err(problem);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(MEMORY_LOOK_MAX);
    }
    cgroup.map_or(Ok(()), |cgroup| cgroup.remove()).map_err(|error| error_chain(&error))
}

/// True unless one of the frozen processes still has a kernel on the card.
fn stands_still(cgroup: &LeaseCgroup, sensors: &dyn Sensors, card: u32) -> bool {
    std::thread::sleep(RESIDENT_KERNEL_AFTER);
    let pids = cgroup.processes().unwrap_or_default();
    match sensors.is_busy(card, &pids, RESIDENT_KERNEL_AFTER / 2) {
        Ok(busy) => !busy,
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "Whether a frozen worker's kernels stand still is not known");
            false
        }
    }
}

fn end_container(pod: &Path, holder: &processes::Holder, caller: &Caller, events: &PodEvents) {
    let containers = sandbox::container_cgroups(pod);
    let container = containers
        .into_iter()
        .find(|container| processes::members(container).is_ok_and(|members| members.contains(&holder.pid)));
    tracing::error!(
        reason = DEVICE_HELD_WITHOUT_LEASE,
        namespace = caller.pod.namespace,
        pod = caller.pod.name,
        pid = holder.pid,
        major = holder.device.major,
        minor = holder.device.minor,
        "A process holds a GPU device outside every lease; its container is ended"
    );
    let processes::Holder { pid, device } = holder;
    events.tell(PodEvent {
        pod: caller.pod.clone(),
        reason: DEVICE_HELD_WITHOUT_LEASE,
        action: "EndContainer",
        note: format!(
            "process {pid} (on the host) held device {}:{} outside every lease, so its container was ended; open the GPU \
             only inside functions decorated with spaces.GPU, and pass none of its descriptors on",
            device.major, device.minor
        ),
    });
    let members = container.and_then(|container| processes::members(&container).ok()).unwrap_or_default();
    for pid in members.into_iter().chain([holder.pid]) {
        if let Some(Err(error)) = Held::open(pid).map(|held| held.kill()) {
            tracing::error!(%error, pid, "It could not be killed");
        }
    }
}
