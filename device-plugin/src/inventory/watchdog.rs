//! The NVML thread and the watch over it (N20).
//!
//! One thread at a time owns NVML. Before each call it notes what it is about to do; the supervisor looks at that note
//! from outside. A call past its limit is given up: its card counts as hung, and a successor takes over the queue and
//! leaves that card alone until the stuck call comes back. So a sick card costs one stuck thread and its own monitoring,
//! nothing else. A stuck call about the library itself stops all monitoring until it returns: a second thread would only
//! get stuck too. At most one thread is stuck for each card, and one for the library.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::nvml::{Book, answer};
use super::{Health, LibraryState, NodeInventory, NvmlLimits, NvmlSettings, Request};

/// What became of a watched call.
#[derive(Debug)]
pub(super) enum CallError {
    /// NVML's error.
    Nvml(NvmlError),
    /// Not made: an earlier call about this card hangs, named here.
    Stuck(String),
    /// It took so long that a successor was put in place; the thread that made it must end.
    Abandoned,
}

/// The note about the call that is under way.
struct Doing {
    /// NVML index; `None` for a call about the library.
    card: Option<u32>,
    call: &'static str,
    since: Instant,
}

#[derive(Default)]
struct Duty {
    /// Which thread is in office. A thread of an earlier generation must end.
    generation: u64,
    doing: Option<Doing>,
    /// Calls that were given up and have not come back.
    stuck: BTreeMap<Option<u32>, Doing>,
}

struct Shared {
    settings: NvmlSettings,
    /// Held only while a thread waits for work, never during a call.
    queue: Mutex<mpsc::Receiver<Request>>,
    duty: Mutex<Duty>,
    book: Mutex<Book>,
}

/// Nothing that these locks guard is left half-changed by a panic: each is held for a few assignments.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is under the clock here is how long a call of this process takes, not anything that is recorded.
#[allow(clippy::disallowed_methods, reason = "the watchdog measures calls; this is the shell")]
fn now() -> Instant {
    Instant::now()
}

fn told(doing: &Doing) -> String {
    format!("{} has not returned for more than its limit", doing.call)
}

/// The place of one NVML thread: what it may touch, and its duty to note its calls.
pub(super) struct Post {
    shared: Arc<Shared>,
    generation: u64,
}

impl Post {
    /// Makes a call under the watchdog's eye. `card` is an NVML index, `None` for the library.
    pub(super) fn call<T>(
        &self,
        card: Option<u32>,
        call: &'static str,
        make: impl FnOnce() -> Result<T, NvmlError>,
    ) -> Result<T, CallError> {
        {
            let mut duty = locked(&self.shared.duty);
            if duty.generation != self.generation {
                return Err(CallError::Abandoned);
            }
            if let Some(stuck) = duty.stuck.get(&card) {
                return Err(CallError::Stuck(told(stuck)));
            }
            duty.doing = Some(Doing { card, call, since: now() });
        }
        // The note must not outlive the call, even if the wrapper panics.
        let outcome = catch_unwind(AssertUnwindSafe(make));
        let in_office = {
            let mut duty = locked(&self.shared.duty);
            let in_office = duty.generation == self.generation;
            if in_office {
                duty.doing = None;
            } else {
                duty.stuck.remove(&card);
            }
            in_office
        };
        match outcome {
            Err(panic) => resume_unwind(panic),
            Ok(_) if !in_office => Err(CallError::Abandoned),
            Ok(outcome) => outcome.map_err(CallError::Nvml),
        }
    }

    /// Reads or changes the book; not for calls to NVML.
    pub(super) fn book<T>(&self, with: impl FnOnce(&mut Book) -> T) -> T {
        with(&mut locked(&self.shared.book))
    }

    /// The library's path, or a name for the loader.
    pub(super) fn library(&self) -> PathBuf {
        self.shared.settings.library()
    }

    /// Serves the queue until it closes or a successor is in office.
    fn serve(&self) {
        loop {
            let request = locked(&self.shared.queue).blocking_recv();
            let Some(request) = request else { return };
            if answer(self, request).is_err() {
                return;
            }
        }
    }
}

/// Watches the NVML thread, refreshes the inventory and publishes it. Nothing works before [`Self::run`] is polled.
#[must_use = "the inventory is read only while the supervisor runs"]
pub struct Supervisor {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
    publish: watch::Sender<Arc<NodeInventory>>,
    in_office: Option<JoinHandle<()>>,
}

impl Supervisor {
    pub(super) fn new(
        settings: NvmlSettings,
        requests: mpsc::Sender<Request>,
        queue: mpsc::Receiver<Request>,
        publish: watch::Sender<Arc<NodeInventory>>,
    ) -> Self {
        let shared =
            Arc::new(Shared { settings, queue: Mutex::new(queue), duty: Mutex::default(), book: Mutex::default() });
        Self { shared, requests, publish, in_office: None }
    }

    /// Runs until `stop`. A thread that is stuck in NVML then is left to the end of the process.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub async fn run(mut self, stop: CancellationToken) -> io::Result<()> {
        let limits = self.shared.settings.limits;
        // Four looks per limit find a hang at most a quarter of the limit late.
        let mut look = tokio::time::interval(limits.call.min(limits.refresh) / 4);
        let mut refresh = tokio::time::interval(limits.refresh);
        // A slow refresh must not be followed by a burst of them.
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reading: Option<oneshot::Receiver<NodeInventory>> = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                _ = look.tick() => {
                    if self.look(limits)? {
                        // The round of readings was given up with its thread; a new one tells of the other cards.
                        reading = self.ask();
                    }
                }
                _ = refresh.tick() => {
                    if reading.is_none() {
                        reading = self.ask();
                    }
                }
                outcome = arrival(&mut reading) => {
                    reading = None;
                    if let Some(inventory) = outcome {
                        self.publish(inventory);
                    }
                }
            }
        }
    }

    /// One look at the thread. True if a call was given up or a thread put in place.
    fn look(&mut self, limits: NvmlLimits) -> io::Result<bool> {
        let given_up = give_up(&self.shared, limits, now());
        if let Some((card, reason)) = &given_up {
            match card {
                Some(card) => tracing::error!(nvml_index = card, %reason, "NVML hangs on a card; it is unmonitored"),
                None => tracing::error!(%reason, "NVML hangs; every card is unmonitored"),
            }
            // The thread is not joined: it ends when, if ever, its call returns.
            self.in_office = None;
            self.publish_hang(*card, reason);
        }
        let library_stuck = locked(&self.shared.duty).stuck.contains_key(&None);
        let idle = self.in_office.as_ref().is_none_or(JoinHandle::is_finished);
        if !idle || library_stuck {
            return Ok(given_up.is_some());
        }
        if self.in_office.is_some() {
            tracing::error!("the NVML thread ended by a panic; it is started again");
        }
        let post = Post { shared: Arc::clone(&self.shared), generation: locked(&self.shared.duty).generation };
        let thread = std::thread::Builder::new().name("nvml".to_owned());
        self.in_office = Some(thread.spawn(move || post.serve())?);
        Ok(true)
    }

    fn ask(&self) -> Option<oneshot::Receiver<NodeInventory>> {
        let (reply, inventory) = oneshot::channel();
        // A full queue: the next refresh asks again.
        self.requests.try_send(Request::Refresh(reply)).ok().map(|()| inventory)
    }

    fn publish(&self, inventory: NodeInventory) {
        self.publish.send_if_modified(|published| {
            let changed = **published != inventory;
            if changed {
                log_changes(published, &inventory);
                *published = Arc::new(inventory);
            }
            changed
        });
    }

    /// A hang is shown at once, not at the next refresh.
    fn publish_hang(&self, nvml_index: Option<u32>, reason: &str) {
        let mut inventory = NodeInventory::clone(&self.publish.borrow());
        for card in &mut inventory.cards {
            let concerned = nvml_index.is_none_or(|hung| hung == card.nvml_index);
            if concerned && !matches!(card.health, Health::Lost { .. }) {
                card.health = Health::Unmonitored { reason: reason.to_owned() };
            }
        }
        if nvml_index.is_none() {
            inventory.library = LibraryState::Hangs { reason: reason.to_owned() };
        }
        self.publish(inventory);
    }
}

/// Gives up the present call if it is past its limit: which card, and what to say about it.
fn give_up(shared: &Shared, limits: NvmlLimits, now: Instant) -> Option<(Option<u32>, String)> {
    let mut duty = locked(&shared.duty);
    let limit: Duration = match duty.doing.as_ref()?.card {
        Some(_) => limits.call,
        None => limits.library_call,
    };
    let doing = duty.doing.take_if(|doing| now.saturating_duration_since(doing.since) > limit)?;
    let (card, reason) = (doing.card, told(&doing));
    duty.stuck.insert(card, doing);
    duty.generation += 1;
    Some((card, reason))
}

/// The inventory asked for, when it arrives; `None` if its thread was given up. Never while none is asked for.
async fn arrival(reading: &mut Option<oneshot::Receiver<NodeInventory>>) -> Option<NodeInventory> {
    match reading {
        Some(reading) => reading.await.ok(),
        None => std::future::pending().await,
    }
}

fn log_changes(before: &NodeInventory, after: &NodeInventory) {
    if before.library != after.library {
        match &after.library {
            LibraryState::Unavailable { reason } | LibraryState::Hangs { reason } => {
                tracing::warn!(%reason, "NVML cannot be used");
            }
            LibraryState::Loaded => tracing::info!(
                driver = after.driver_version.as_deref().unwrap_or("unknown"),
                cards = after.cards.len(),
                "NVML answers"
            ),
            LibraryState::Starting => {}
        }
    }
    for card in &after.cards {
        if before.card(card.index).is_some_and(|was| was.health == card.health) {
            continue;
        }
        match card.health.reason() {
            None => tracing::info!(card = card.index, uuid = %card.uuid, model = %card.model, "card is healthy"),
            Some(reason) => tracing::warn!(card = card.index, uuid = %card.uuid, reason, "card is not usable"),
        }
    }
    for sentence in after.missing.iter().filter(|sentence| !before.missing.contains(sentence)) {
        tracing::warn!(missing = %sentence, "this NVML does not tell everything");
    }
}
