//! What the loaded library holds: how often it was initialised, the state as last read, handles and event sets.
//!
//! Handles are numbers in the form of pointers. Nothing is ever behind them, so a wrong one is an error and never a
//! crash.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use nvml_wrapper_sys::bindings::nvmlReturn_t;

use crate::{
    Card, State, StoreError,
    abi::code,
    store::{DEFAULT_STATE_PATH, STATE_PATH_VARIABLE},
};

/// How often a call on a hung card looks whether the hang is over.
const HANG_POLL: Duration = Duration::from_millis(50);
/// A real hang has no end. This one ends after an hour, so that a forgotten flag does not keep a process for ever.
const HANG_POLLS_MAX: u32 = 72_000;
/// Callers use one event set; a thousand are a leak.
const EVENT_SETS_MAX: usize = 1_000;
/// The first handle, and the step to the next: never null, and apart like pointers to small structures.
const HANDLE_STEP: usize = 16;
const FIRST_OBJECT: usize = 0x1_0000;
const FIRST_EVENT_SET: usize = 0x1000_0000;

/// A result in NVML's terms.
pub(crate) type Answer<T = ()> = Result<T, nvmlReturn_t>;

/// What a handle stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    Card { uuid: String },
    MigDevice { card: String, gpu_instance: u32, compute_instance: u32 },
    GpuInstance { card: String, id: u32 },
    ComputeInstance { card: String, gpu_instance: u32, id: u32 },
}

/// One card that an event set listens to.
#[derive(Debug)]
pub(crate) struct Listener {
    pub card: String,
    /// The bits of the event types asked for.
    pub types: u64,
    /// The sequence number of the last event that was delivered or had happened before.
    pub seen: u64,
}

/// The state as it stood at one moment, and the file it came from.
#[derive(Clone)]
pub(crate) struct Snapshot {
    pub state: Arc<State>,
    pub path: Arc<Path>,
}

impl Snapshot {
    pub fn card(&self, uuid: &str) -> Option<&Card> {
        self.state.cards.iter().find(|card| card.uuid == uuid)
    }
}

struct Library {
    initialised: u32,
    /// Read from the environment at the first initialisation.
    path: Option<Arc<Path>>,
    read: Option<Read>,
    /// Grows by one an object; instances come back with the same ids, so there are few of them.
    objects: Vec<Object>,
    event_sets: Vec<Option<Vec<Listener>>>,
}

/// The result of the last read of the file, kept while the file stays as it was.
struct Read {
    stamp: Stamp,
    /// None: the file was wrong, which has been said on standard error.
    state: Option<Arc<State>>,
    /// Held open, so that its inode number is not given to a later version of the file.
    _file: Option<File>,
}

/// Device, inode, size and time of change: another version of the file differs in one of them. None: no file.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

static LIBRARY: Mutex<Library> =
    Mutex::new(Library { initialised: 0, path: None, read: None, objects: Vec::new(), event_sets: Vec::new() });

/// A panic under the lock leaves nothing half-done that matters, so a poisoned lock is taken all the same.
fn library() -> MutexGuard<'static, Library> {
    LIBRARY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts one more user, as `nvmlInit` does. `without_cards`: no card at all is no error.
pub(crate) fn initialise(without_cards: bool) -> Answer {
    let mut library = library();
    let path = library.path.get_or_insert_with(state_path).clone();
    let state = library.current(&path)?;
    if !state.driver_loaded {
        return Err(code::DRIVER_NOT_LOADED);
    }
    if state.cards.is_empty() && !without_cards {
        return Err(code::GPU_NOT_FOUND);
    }
    library.initialised += 1;
    Ok(())
}

/// Counts one user less; after the last one, event sets are gone.
pub(crate) fn shut_down() -> Answer {
    let mut library = library();
    library.initialised = library.initialised.checked_sub(1).ok_or(code::UNINITIALIZED)?;
    if library.initialised == 0 {
        library.event_sets.clear();
        library.read = None;
        library.path = None;
    }
    Ok(())
}

/// The state as the file says now.
pub(crate) fn snapshot() -> Answer<Snapshot> {
    let mut library = library();
    let path = library.path.clone().filter(|_| library.initialised > 0).ok_or(code::UNINITIALIZED)?;
    Ok(Snapshot { state: library.current(&path)?, path })
}

/// Waits while the card hangs, then answers whether a call on it can go on.
pub(crate) fn reach(uuid: &str, call: &str) -> Answer<Snapshot> {
    for _ in 0..HANG_POLLS_MAX {
        let snapshot = snapshot()?;
        let card = snapshot.card(uuid).ok_or(code::GPU_IS_LOST)?;
        match card {
            Card { hang: true, .. } => thread::sleep(HANG_POLL),
            Card { lost: true, .. } => return Err(code::GPU_IS_LOST),
            card if card.unsupported_calls.iter().any(|name| name == call) => return Err(code::NOT_SUPPORTED),
            _ => return Ok(snapshot),
        }
    }
    Err(code::TIMEOUT)
}

/// Changes one card in the file.
pub(crate) fn change_card<T>(uuid: &str, change: impl FnOnce(&mut Card, &Path) -> Answer<T>) -> Answer<T> {
    let path = snapshot()?.path;
    let changed = State::update(&path, |state| {
        let card = state.cards.iter_mut().find(|card| card.uuid == uuid).ok_or(code::GPU_IS_LOST)?;
        change(card, &path)
    });
    changed.unwrap_or_else(|error| {
        report(&error);
        Err(match &error {
            StoreError::Io { .. } => code::NO_PERMISSION,
            StoreError::Locked { .. } => code::IN_USE,
            StoreError::Syntax { .. } | StoreError::Fault { .. } => code::UNKNOWN,
        })
    })
}

/// The handle of an object: always the same for the same object.
pub(crate) fn handle_of<T>(object: Object) -> *mut T {
    let mut library = library();
    let place = library.objects.iter().position(|known| *known == object).unwrap_or_else(|| {
        library.objects.push(object);
        library.objects.len() - 1
    });
    std::ptr::without_provenance_mut(FIRST_OBJECT + place * HANDLE_STEP)
}

/// The object of a handle.
pub(crate) fn object_of<T>(handle: *mut T) -> Answer<Object> {
    let place = handle.addr().checked_sub(FIRST_OBJECT).filter(|offset| offset % HANDLE_STEP == 0);
    let place = place.ok_or(code::INVALID_ARGUMENT)? / HANDLE_STEP;
    library().objects.get(place).cloned().ok_or(code::INVALID_ARGUMENT)
}

/// A new, empty event set.
pub(crate) fn create_event_set<T>() -> Answer<*mut T> {
    let sets = &mut library().event_sets;
    let place = match sets.iter().position(Option::is_none) {
        Some(free) => free,
        None if sets.len() < EVENT_SETS_MAX => {
            sets.push(None);
            sets.len() - 1
        }
        None => return Err(code::MEMORY),
    };
    sets[place] = Some(Vec::new());
    Ok(std::ptr::without_provenance_mut(FIRST_EVENT_SET + place * HANDLE_STEP))
}

/// Lets `act` work on the cards that an event set listens to.
pub(crate) fn with_event_set<H, T>(set: *mut H, act: impl FnOnce(&mut Vec<Listener>) -> T) -> Answer<T> {
    let place = event_set_place(set)?;
    library().event_sets.get_mut(place).and_then(Option::as_mut).map(act).ok_or(code::INVALID_ARGUMENT)
}

/// Frees an event set; its handle is an error from then on.
pub(crate) fn free_event_set<H>(set: *mut H) -> Answer {
    let place = event_set_place(set)?;
    library().event_sets.get_mut(place).and_then(Option::take).map(drop).ok_or(code::INVALID_ARGUMENT)
}

fn event_set_place<H>(set: *mut H) -> Answer<usize> {
    let offset = set.addr().checked_sub(FIRST_EVENT_SET).filter(|offset| offset % HANDLE_STEP == 0);
    Ok(offset.ok_or(code::INVALID_ARGUMENT)? / HANDLE_STEP)
}

impl Library {
    /// One `stat` while the file stays as it is.
    fn current(&mut self, path: &Path) -> Answer<Arc<State>> {
        let stamp = stamp_of(fs::metadata(path).ok());
        let read = match self.read.take().filter(|read| read.stamp == stamp) {
            Some(unchanged) => unchanged,
            None => Read::now(path, stamp),
        };
        let state = read.state.clone().ok_or(code::UNKNOWN);
        self.read = Some(read);
        state
    }
}

impl Read {
    /// `seen` is the stamp that made this read necessary; it stands for a file that cannot be opened.
    fn now(path: &Path, seen: Stamp) -> Self {
        let file = File::open(path).ok();
        // Taken from the open file, so that stamp and content are of one version.
        let stamp = file.as_ref().map_or(seen, |file| stamp_of(file.metadata().ok()));
        let state = match &file {
            None => State::load(path),
            Some(file) => std::io::read_to_string(file)
                .map_err(|source| StoreError::Io { doing: "read", path: path.to_owned(), source })
                .and_then(|text| State::parse(path, text.as_bytes())),
        };
        let state = state.map(Arc::new).inspect_err(report).ok();
        Self { stamp, state, _file: file }
    }
}

fn stamp_of(metadata: Option<fs::Metadata>) -> Stamp {
    metadata.map(|file| (file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec()))
}

/// NVML's codes have no room for a reason, so it goes to standard error, once for each version of the file.
fn report(error: &StoreError) {
    let reason = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    eprintln!("standin-nvml: {error}{reason}");
}

/// A C library has no arguments, so the environment is the only way to tell it where its state is.
#[allow(clippy::disallowed_methods)]
fn state_path() -> Arc<Path> {
    let path = std::env::var_os(STATE_PATH_VARIABLE).unwrap_or_else(|| DEFAULT_STATE_PATH.into());
    PathBuf::from(path).into()
}
