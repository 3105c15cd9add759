//! What GPUs this node has, how they are and who uses them (N17, N18, N20, N21).
//!
//! NVML calls hang on a sick card. So all of them are made by one thread, each is watched from outside ([`watchdog`]),
//! and everybody else talks to that thread through a bounded queue, with a time limit: [`NvmlHandle`]. Who wants to know
//! the cards follows [`NvmlHandle::inventory`], which changes only when something did.

mod device_nodes;
mod nvml;
mod roster;
mod selection;
mod sensors;
mod slots;
#[cfg(test)]
pub(crate) mod tests;
mod watchdog;

use std::path::PathBuf;
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use nvml_wrapper::error::NvmlError;
use tokio::sync::{mpsc, oneshot, watch};

use crate::cdi::DriverRoot;

pub use device_nodes::{DeviceNode, DeviceNodes};
pub use selection::{Use, card_uses, time_shared};
pub use sensors::NodeSensors;
pub use slots::{
    AllocatableSlot, QuantityError, Shortfall, UnsupportedMode, bytes_of_quantity, card_smaller_than_client_assumes,
    isolation, large_slots, slots,
};
pub use watchdog::Supervisor;

/// The library by the name under which the driver installs it; the loader finds it.
pub const DEFAULT_LIBRARY: &str = "libnvidia-ml.so.1";

/// Requests that wait for the NVML thread. Every lease that clears asks at most once per 100 ms and a node has at most 48
/// slots; a queue longer than this means that NVML is far too slow, and the caller must hear of it.
const QUEUE_MAX: usize = 64;

/// How a card is, as far as NVML tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Every call about it is answered.
    Healthy,
    /// NVML does not answer for it, or with an error that says nothing about the card. Leases on it run on; new ones wait.
    Unmonitored {
        /// The call, and what came of it.
        reason: String,
    },
    /// It fell off the bus, must be reset, or is no longer listed.
    Lost {
        /// The call, and what it answered.
        reason: String,
    },
}

impl Health {
    /// New leases may be put on the card.
    pub const fn is_healthy(&self) -> bool {
        matches!(self, Self::Healthy)
    }

    /// Why it is not healthy.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Healthy => None,
            Self::Unmonitored { reason } | Self::Lost { reason } => Some(reason),
        }
    }
}

/// One card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Index on this node: NVML's when this agent first saw the card. It stays with the uuid, because leases and slots are
    /// named by it and NVML numbers anew when a card falls off the bus.
    pub index: u32,
    /// NVML's index for it at present.
    pub nvml_index: u32,
    /// Minor number of its device node: `/dev/nvidia<minor>`.
    pub minor: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Product name.
    pub model: String,
    /// All of its memory.
    pub memory_total_bytes: u64,
    /// CUDA compute capability, `9.0`; `None` if NVML does not say.
    pub compute_capability: Option<String>,
    /// It is in MIG mode. The agent never changes that.
    pub mig_enabled: bool,
    /// How it is.
    pub health: Health,
}

/// The NVML library itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LibraryState {
    /// It has not been asked yet.
    #[default]
    Starting,
    /// It answers.
    Loaded,
    /// It cannot be loaded or initialised; tried again at each refresh.
    Unavailable {
        /// What failed, with the library's path.
        reason: String,
    },
    /// A call that concerns no single card does not return.
    Hangs {
        /// Which call.
        reason: String,
    },
}

/// The node's cards at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeInventory {
    /// The library.
    pub library: LibraryState,
    /// Version of the driver.
    pub driver_version: Option<String>,
    /// Version of NVML.
    pub nvml_version: Option<String>,
    /// Newest CUDA version the driver supports: `13.0`.
    pub cuda_version: Option<String>,
    /// Every card seen since the agent started, by index; also those that are lost now.
    pub cards: Vec<Card>,
    /// What this NVML could not tell, a sentence each: the agent says it instead of guessing (N21).
    pub missing: Vec<String>,
}

impl NodeInventory {
    /// The card with this index.
    pub fn card(&self, index: u32) -> Option<&Card> {
        self.cards.iter().find(|card| card.index == index)
    }
}

/// A process with a context on a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuProcess {
    /// Its pid in the agent's pid namespace, which is the host's.
    pub pid: u32,
    /// Device memory it holds; `None` if NVML does not say.
    pub used_bytes: Option<u64>,
}

/// NVML's answer to a question did not come, or was an error.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The queue of the NVML thread is full.
    #[error("{QUEUE_MAX} requests wait for NVML already")]
    Busy,
    /// No answer within the limit.
    #[error("NVML did not answer within {} ms", limit.as_millis())]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// The call began and hung; the watchdog gave it up.
    #[error("the NVML call hung and was given up")]
    GivenUp,
    /// No card has this index.
    #[error("there is no card {card}")]
    UnknownCard {
        /// Index.
        card: u32,
    },
    /// An earlier call about this card hangs.
    #[error("card {card} is unmonitored: {reason}")]
    Unmonitored {
        /// Index.
        card: u32,
        /// Which call.
        reason: String,
    },
    /// NVML cannot be used at all.
    #[error("NVML cannot be used: {reason}")]
    LibraryUnavailable {
        /// Why.
        reason: String,
    },
    /// NVML answered with an error.
    #[error("{call} failed on card {card}")]
    Nvml {
        /// Index.
        card: u32,
        /// Function of NVML.
        call: &'static str,
        /// Its answer.
        source: NvmlError,
    },
    /// The agent is stopping.
    #[error("the NVML thread has ended")]
    Stopped,
}

/// Time limits of NVML.
#[derive(Clone, Copy, Debug)]
pub struct NvmlLimits {
    /// A call about a card. Answers take microseconds to a few milliseconds; a driver that wakes a card without
    /// persistence mode takes one to three seconds.
    pub call: Duration,
    /// A call about the library. Initialisation wakes every card, one after the other.
    pub library_call: Duration,
    /// How long a caller waits for its answer, its place in the queue included.
    pub answer: Duration,
    /// How often the inventory is read.
    pub refresh: Duration,
}

impl Default for NvmlLimits {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(5),
            library_call: Duration::from_secs(90),
            answer: Duration::from_secs(6),
            refresh: Duration::from_secs(5),
        }
    }
}

/// Settings of the inventory.
#[derive(Clone, Debug)]
pub struct NvmlSettings {
    /// `--nvml-library`: a path, or a name to be found.
    pub library: PathBuf,
    /// The driver's file system, where a name is looked for first: the loader of a container does not know the host's.
    pub driver: Option<DriverRoot>,
    /// Time limits.
    pub limits: NvmlLimits,
}

impl NvmlSettings {
    /// What to load now: a driver may be installed, or replaced, while the agent runs.
    fn library(&self) -> PathBuf {
        let name = self.library.to_str().filter(|name| !name.contains('/'));
        let found = name.zip(self.driver.as_ref()).and_then(|(name, driver)| driver.library_here(name));
        found.unwrap_or_else(|| self.library.clone())
    }
}

impl Default for NvmlSettings {
    fn default() -> Self {
        Self { library: PathBuf::from(DEFAULT_LIBRARY), driver: None, limits: NvmlLimits::default() }
    }
}

/// Takes the answer to whoever asked, be it a task or a thread. Dropped uncalled if the call was given up.
type Reply<T> = Box<dyn FnOnce(Result<T, InventoryError>) + Send>;

/// What the NVML thread can be asked.
enum Request {
    Refresh(oneshot::Sender<NodeInventory>),
    Processes { card: u32, reply: Reply<Vec<GpuProcess>> },
    Utilisation { card: u32, pids: Vec<u32>, after_us: u64, reply: Reply<u32> },
}

/// Asks the NVML thread; cheap to clone.
#[derive(Clone, Debug)]
pub struct NvmlHandle {
    requests: mpsc::Sender<Request>,
    inventory: watch::Receiver<Arc<NodeInventory>>,
    answer: Duration,
}

impl NvmlHandle {
    /// The inventory, now and whenever it changes.
    pub fn inventory(&self) -> watch::Receiver<Arc<NodeInventory>> {
        self.inventory.clone()
    }

    /// Processes with a context on the card.
    ///
    /// # Errors
    /// If NVML does not answer in time or answers with an error; then nothing is known, not "no process".
    pub async fn processes(&self, card: u32) -> Result<Vec<GpuProcess>, InventoryError> {
        self.ask(|reply| Request::Processes { card, reply }).await
    }

    /// The largest multiprocessor utilisation, in percent, that any of these processes had in a sample taken after
    /// `after_us` (microseconds since 1970, the clock of NVML's samples); 0 if there is no such sample. For the check of
    /// N11: a frozen worker whose utilisation is not 0 has a resident kernel.
    ///
    /// # Errors
    /// As [`Self::processes`]; on a card in MIG mode NVML has no utilisation by process.
    pub async fn utilisation(&self, card: u32, pids: &[u32], after_us: u64) -> Result<u32, InventoryError> {
        let pids = pids.to_vec();
        self.ask(|reply| Request::Utilisation { card, pids, after_us, reply }).await
    }

    /// [`Self::processes`] for a thread that may block.
    ///
    /// # Errors
    /// As there.
    pub fn processes_blocking(&self, card: u32) -> Result<Vec<GpuProcess>, InventoryError> {
        self.ask_blocking(|reply| Request::Processes { card, reply })
    }

    /// [`Self::utilisation`] for a thread that may block.
    ///
    /// # Errors
    /// As there.
    pub fn utilisation_blocking(&self, card: u32, pids: &[u32], after_us: u64) -> Result<u32, InventoryError> {
        let pids = pids.to_vec();
        self.ask_blocking(|reply| Request::Utilisation { card, pids, after_us, reply })
    }

    async fn ask<T: Send + 'static>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, InventoryError> {
        let (answer, arrived) = oneshot::channel();
        // A send that fails means that the asker stopped waiting.
        self.send(request(Box::new(|outcome| drop(answer.send(outcome)))))?;
        match tokio::time::timeout(self.answer, arrived).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(InventoryError::GivenUp),
            Err(_) => Err(InventoryError::TimedOut { limit: self.answer }),
        }
    }

    fn ask_blocking<T: Send + 'static>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, InventoryError> {
        let (answer, arrived) = blocking::sync_channel(1);
        self.send(request(Box::new(move |outcome| drop(answer.send(outcome)))))?;
        match arrived.recv_timeout(self.answer) {
            Ok(outcome) => outcome,
            Err(blocking::RecvTimeoutError::Disconnected) => Err(InventoryError::GivenUp),
            Err(blocking::RecvTimeoutError::Timeout) => Err(InventoryError::TimedOut { limit: self.answer }),
        }
    }

    fn send(&self, request: Request) -> Result<(), InventoryError> {
        self.requests.try_send(request).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => InventoryError::Busy,
            mpsc::error::TrySendError::Closed(_) => InventoryError::Stopped,
        })
    }
}

/// The NVML thread's handle, and the supervisor that must be run for it to be watched and for the inventory to be
/// refreshed.
pub fn nvml(settings: NvmlSettings) -> (NvmlHandle, Supervisor) {
    let (requests, queue) = mpsc::channel(QUEUE_MAX);
    let (publish, inventory) = watch::channel(Arc::new(NodeInventory::default()));
    let handle = NvmlHandle { requests, inventory, answer: settings.limits.answer };
    let supervisor = Supervisor::new(settings, handle.requests.clone(), queue, publish);
    (handle, supervisor)
}
