//! What is asked of NVML. Runs on the NVML thread only; every call goes through [`Post::call`], so that the watchdog sees
//! it. Optional calls that this NVML lacks are said, not guessed (N21).

use std::path::Path;
use std::sync::Arc;

use nvml_wrapper::bitmasks::InitFlags;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::roster::{Identity, Reading, all_unread, merge};
use super::watchdog::{CallError, Post};
use super::{Card, GpuProcess, Health, InventoryError, LibraryState, NodeInventory, Request};

/// `NVML_ERROR_GPU_NOT_FOUND`, for which the wrapper has no variant: the driver is there and finds no card.
const GPU_NOT_FOUND: u32 = 28;

/// Tries at a list that grew between the call for its length and the call for its content.
const LIST_TRIES: usize = 3;

/// What the NVML thread keeps between requests; shared with its successor.
#[derive(Debug, Default)]
pub(super) struct Book {
    nvml: Option<Arc<Nvml>>,
    known: Vec<Card>,
}

/// Loads and initialises the library.
pub(super) fn open(library: &Path) -> Result<Nvml, NvmlError> {
    let start = |flags| Nvml::builder().lib_path(library.as_os_str()).flags(flags).init();
    // A node without a card has an inventory too: an empty one.
    match start(InitFlags::NO_GPUS) {
        // Another implementation may have the plain function only.
        Err(NvmlError::FailedToLoadSymbol(_)) => start(InitFlags::empty()),
        other => other,
    }
}

/// Answers one request. [`CallError::Abandoned`] if a call in it was given up by the watchdog.
pub(super) fn answer(post: &Post, request: Request) -> Result<(), CallError> {
    match request {
        Request::Refresh(reply) => {
            let inventory = refresh(post)?;
            // The asker may have given up; the next refresh is seconds away.
            drop(reply.send(inventory));
        }
        Request::Processes { card, reply } => {
            reply(about(post, card, |nvml, card| processes(post, nvml, card))?);
        }
        Request::Utilisation { card, pids, after_us, reply } => {
            reply(about(post, card, |nvml, card| utilisation(post, nvml, card, &pids, after_us))?);
        }
    }
    Ok(())
}

/// Runs `question` about a known card; the outer error is an abandoned call.
fn about<T>(
    post: &Post,
    index: u32,
    question: impl FnOnce(&Nvml, &Card) -> Result<T, Failed>,
) -> Result<Result<T, InventoryError>, CallError> {
    let (nvml, card) = post.book(|book| (book.nvml.clone(), book.known.iter().find(|c| c.index == index).cloned()));
    let Some(nvml) = nvml else {
        let reason = "it is not initialised".to_owned();
        return Ok(Err(InventoryError::LibraryUnavailable { reason }));
    };
    let Some(card) = card else { return Ok(Err(InventoryError::UnknownCard { card: index })) };
    match question(&nvml, &card) {
        Ok(answer) => Ok(Ok(answer)),
        Err(Failed { error: CallError::Abandoned, .. }) => Err(CallError::Abandoned),
        Err(Failed { error: CallError::Stuck(reason), .. }) => {
            Ok(Err(InventoryError::Unmonitored { card: index, reason }))
        }
        Err(Failed { call, error: CallError::Nvml(source) }) => {
            Ok(Err(InventoryError::Nvml { card: index, call, source }))
        }
    }
}

/// A call and what became of it.
struct Failed {
    call: &'static str,
    error: CallError,
}

/// A watched call about the card at an NVML index.
fn ask<T>(
    post: &Post,
    nvml_index: u32,
    call: &'static str,
    make: impl FnOnce() -> Result<T, NvmlError>,
) -> Result<T, Failed> {
    post.call(Some(nvml_index), call, make).map_err(|error| Failed { call, error })
}

fn device<'nvml>(post: &Post, nvml: &'nvml Nvml, card: &Card) -> Result<Device<'nvml>, Failed> {
    ask(post, card.nvml_index, "nvmlDeviceGetHandleByUUID", || nvml.device_by_uuid(card.uuid.as_str()))
}

fn processes(post: &Post, nvml: &Nvml, card: &Card) -> Result<Vec<GpuProcess>, Failed> {
    let device = device(post, nvml, card)?;
    let call = "nvmlDeviceGetComputeRunningProcesses_v3";
    let mut tries = 0;
    let found = loop {
        tries += 1;
        match ask(post, card.nvml_index, call, || device.running_compute_processes()) {
            Err(Failed { error: CallError::Nvml(NvmlError::InsufficientSize(_)), .. }) if tries < LIST_TRIES => {}
            other => break other?,
        }
    };
    let used = |memory| match memory {
        UsedGpuMemory::Used(bytes) => Some(bytes),
        UsedGpuMemory::Unavailable => None,
    };
    Ok(found.into_iter().map(|info| GpuProcess { pid: info.pid, used_bytes: used(info.used_gpu_memory) }).collect())
}

fn utilisation(post: &Post, nvml: &Nvml, card: &Card, pids: &[u32], after_us: u64) -> Result<u32, Failed> {
    let device = device(post, nvml, card)?;
    let call = "nvmlDeviceGetProcessUtilization";
    let samples = match ask(post, card.nvml_index, call, || device.process_utilization_stats(after_us)) {
        Ok(samples) => samples,
        // NVML's way to say that nobody was active since then.
        Err(Failed { error: CallError::Nvml(NvmlError::NotFound), .. }) => return Ok(0),
        Err(failed) => return Err(failed),
    };
    let of_these = samples.iter().filter(|sample| sample.timestamp > after_us && pids.contains(&sample.pid));
    Ok(of_these.map(|sample| sample.sm_util).max().unwrap_or(0))
}

/// Reads everything anew.
fn refresh(post: &Post) -> Result<NodeInventory, CallError> {
    let nvml = match library(post)? {
        Ok(nvml) => nvml,
        Err(state) => return Ok(post.book(|book| unread(book, state))),
    };
    let count = match post.call(None, "nvmlDeviceGetCount_v2", || nvml.device_count()) {
        Ok(count) => count,
        Err(CallError::Nvml(NvmlError::UnexpectedVariant(GPU_NOT_FOUND))) => 0,
        Err(CallError::Nvml(error)) => return let_go(post, nvml, &error),
        Err(other) => return Err(other),
    };
    let mut missing = Vec::new();
    let driver_version = fact(post, "nvmlSystemGetDriverVersion", &mut missing, || nvml.sys_driver_version())?;
    let nvml_version = fact(post, "nvmlSystemGetNVMLVersion", &mut missing, || nvml.sys_nvml_version())?;
    let cuda = fact(post, "nvmlSystemGetCudaDriverVersion_v2", &mut missing, || nvml.sys_cuda_driver_version())?;
    let cuda_version = cuda.map(|version| {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        format!("{major}.{minor}")
    });
    let mut readings = Vec::new();
    for nvml_index in 0..count {
        let outcome = match read_card(post, &nvml, nvml_index, &mut missing) {
            Ok(identity) => Ok(identity),
            Err(Failed { error: CallError::Abandoned, .. }) => return Err(CallError::Abandoned),
            Err(failed) => Err(health_of(&failed)),
        };
        readings.push(Reading { nvml_index, outcome });
    }
    missing.sort();
    missing.dedup();
    Ok(post.book(|book| {
        let (cards, unknown) = merge(&book.known, readings);
        book.known.clone_from(&cards);
        missing.extend(unknown);
        NodeInventory { library: LibraryState::Loaded, driver_version, nvml_version, cuda_version, cards, missing }
    }))
}

/// The library, opened if it is not; the inner error is the state to show.
fn library(post: &Post) -> Result<Result<Arc<Nvml>, LibraryState>, CallError> {
    if let Some(nvml) = post.book(|book| book.nvml.clone()) {
        return Ok(Ok(nvml));
    }
    let path = post.library();
    match post.call(None, "nvmlInit", || open(&path)) {
        Ok(nvml) => {
            let nvml = Arc::new(nvml);
            post.book(|book| book.nvml = Some(Arc::clone(&nvml)));
            Ok(Ok(nvml))
        }
        Err(CallError::Nvml(error)) => {
            let reason = format!("{} cannot be used: {error}", path.display());
            Ok(Err(LibraryState::Unavailable { reason }))
        }
        Err(other) => Err(other),
    }
}

/// The driver went away or was replaced: what is loaded is of no use, so it is let go and opened again at the next
/// refresh.
fn let_go(post: &Post, nvml: Arc<Nvml>, error: &NvmlError) -> Result<NodeInventory, CallError> {
    let kept = post.book(|book| book.nvml.take());
    let shut_down = || {
        // The last of these calls `nvmlShutdown`, which may hang as any other call.
        drop((kept, nvml));
        Ok(())
    };
    post.call(None, "nvmlShutdown", shut_down)?;
    let reason = format!("nvmlDeviceGetCount_v2: {error}");
    Ok(post.book(|book| unread(book, LibraryState::Unavailable { reason })))
}

fn unread(book: &mut Book, library: LibraryState) -> NodeInventory {
    let reason = match &library {
        LibraryState::Unavailable { reason } | LibraryState::Hangs { reason } => reason.as_str(),
        LibraryState::Starting | LibraryState::Loaded => "",
    };
    let cards = all_unread(&book.known, reason);
    book.known.clone_from(&cards);
    NodeInventory { library, cards, ..NodeInventory::default() }
}

/// A fact about the library that the agent can do without.
fn fact<T>(
    post: &Post,
    call: &'static str,
    missing: &mut Vec<String>,
    make: impl FnOnce() -> Result<T, NvmlError>,
) -> Result<Option<T>, CallError> {
    match post.call(None, call, make) {
        Ok(value) => Ok(Some(value)),
        Err(CallError::Nvml(error)) => {
            missing.push(format!("{call}: {error}"));
            Ok(None)
        }
        Err(other) => Err(other),
    }
}

fn read_card(post: &Post, nvml: &Nvml, index: u32, missing: &mut Vec<String>) -> Result<Identity, Failed> {
    let device = ask(post, index, "nvmlDeviceGetHandleByIndex_v2", || nvml.device_by_index(index))?;
    let uuid = ask(post, index, "nvmlDeviceGetUUID", || device.uuid())?;
    let minor = ask(post, index, "nvmlDeviceGetMinorNumber", || device.minor_number())?;
    let model = ask(post, index, "nvmlDeviceGetName", || device.name())?;
    let memory = ask(post, index, "nvmlDeviceGetMemoryInfo_v2", || device.memory_info())?;
    let call = "nvmlDeviceGetCudaComputeCapability";
    let capability = optional(ask(post, index, call, || device.cuda_compute_capability()), index, missing)?;
    let mig = match ask(post, index, "nvmlDeviceGetMigMode", || device.mig_mode()) {
        // A card that cannot be divided, which is no gap in what is known.
        Err(Failed { error: CallError::Nvml(NvmlError::NotSupported), .. }) => None,
        other => optional(other, index, missing)?,
    };
    Ok(Identity {
        minor,
        uuid,
        model,
        memory_total_bytes: memory.total,
        compute_capability: capability.map(|version| format!("{}.{}", version.major, version.minor)),
        mig_enabled: mig.is_some_and(|mode| mode.current == 1),
    })
}

/// An answer the agent can do without: a function that this NVML lacks or does not support is noted. Any other error is
/// one of the card.
fn optional<T>(answer: Result<T, Failed>, index: u32, missing: &mut Vec<String>) -> Result<Option<T>, Failed> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(Failed {
            call,
            error:
                CallError::Nvml(
                    error @ (NvmlError::FailedToLoadSymbol(_) | NvmlError::FunctionNotFound | NvmlError::NotSupported),
                ),
        }) => {
            missing.push(format!("{call} on card {index}: {error}"));
            Ok(None)
        }
        Err(failed) => Err(failed),
    }
}

fn health_of(failed: &Failed) -> Health {
    match &failed.error {
        CallError::Nvml(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) => {
            Health::Lost { reason: format!("{}: {error}", failed.call) }
        }
        CallError::Nvml(error) => Health::Unmonitored { reason: format!("{}: {error}", failed.call) },
        CallError::Stuck(reason) => Health::Unmonitored { reason: reason.clone() },
        CallError::Abandoned => Health::Unmonitored { reason: format!("{} was given up", failed.call) },
    }
}
