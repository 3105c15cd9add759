//! The built library, loaded and called as the agent does it: through `nvml-wrapper`, and through the raw functions
//! where the wrapper has none.

// The lint's exception for tests covers test functions only, and here even the helpers are test code.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    ptr,
    sync::mpsc,
    thread,
    time::Duration,
};

use nvml_wrapper::{
    Device, Nvml,
    bitmasks::{InitFlags, event::EventTypes},
    enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor},
    enums::{
        device::{DeviceArchitecture, UsedGpuMemory},
        event::XidError,
    },
    error::NvmlError,
    structs::device::FieldId,
    sys_exports::field_id,
};
use nvml_wrapper_sys::bindings::*;
use standin_nvml::{
    Card, Ecc, EventKind, Process, RecoveryAction, RemappedRows, STATE_PATH_VARIABLE, State, announce_process,
    withdraw_process,
};

const GIB: u64 = 1 << 30;
/// A call that does return takes microseconds; this is for a machine that is busy with builds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `story` in a process of its own: a loaded library has one state file, and it learns its path from the
/// environment, which must not change under running threads.
fn alone(test: &str, state: Option<State>, story: impl FnOnce(&Path)) {
    #[allow(clippy::disallowed_methods, reason = "the library under test is told its state file this way")]
    if let Some(path) = std::env::var_os(STATE_PATH_VARIABLE) {
        let path = PathBuf::from(path);
        story(&path);
        fs::write(path.with_file_name("done"), "").unwrap();
        return;
    }
    let directory = std::env::temp_dir().join(format!("standin-nvml-{test}-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("state.json");
    if let Some(state) = state {
        state.save(&path).unwrap();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([test, "--exact", "--nocapture"]).env(STATE_PATH_VARIABLE, &path).output().unwrap();
    let told = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", told(&output.stdout), told(&output.stderr));
    assert!(directory.join("done").exists(), "no test is called {test}");
    fs::remove_dir_all(&directory).unwrap();
}

/// Cargo puts the library beside the test, in `deps`, or one folder up.
fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let places = test.ancestors().skip(1).take(2).map(|folder| folder.join("libstandin_nvml.so"));
    places.into_iter().find(|path| path.exists()).expect("libstandin_nvml.so is built with this test")
}

fn start() -> Nvml {
    try_start(InitFlags::empty()).unwrap()
}

fn try_start(flags: InitFlags) -> Result<Nvml, NvmlError> {
    Nvml::builder().lib_path(library().as_os_str()).flags(flags).init()
}

/// A process that does nothing until it is killed.
fn worker() -> Child {
    Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap()
}

fn process(pid: u32, used_bytes: u64, sm_util: u32) -> Process {
    Process { pid, used_bytes, sm_util, gpu_instance_id: None, compute_instance_id: None }
}

fn pids(device: &Device<'_>) -> Vec<u32> {
    device.running_compute_processes().unwrap().into_iter().map(|process| process.pid).collect()
}

/// Looks until `holds`, or fails when the patience ends.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    const PAUSE: Duration = Duration::from_millis(10);
    for _ in 0..PATIENCE.as_millis() / PAUSE.as_millis() {
        if holds() {
            return;
        }
        thread::sleep(PAUSE);
    }
    panic!("it never came to: {what}");
}

#[test]
fn inventory_of_three_cards() {
    alone("inventory_of_three_cards", Some(State::h200(3)), |_| {
        let nvml = start();
        assert_eq!(nvml.device_count().unwrap(), 3);
        assert_eq!(nvml.sys_driver_version().unwrap(), "580.95.05");
        assert_eq!(nvml.sys_nvml_version().unwrap(), "13.580.95.05");
        assert_eq!(nvml.sys_cuda_driver_version().unwrap(), 13_000);
        for index in 0..3 {
            let device = nvml.device_by_index(index).unwrap();
            assert_eq!(device.index().unwrap(), index);
            assert_eq!(device.minor_number().unwrap(), index);
            assert_eq!(device.name().unwrap(), "NVIDIA H200");
            assert_eq!(device.architecture().unwrap(), DeviceArchitecture::Hopper);
            let capability = device.cuda_compute_capability().unwrap();
            assert_eq!((capability.major, capability.minor), (9, 0));
            let memory = device.memory_info().unwrap();
            assert_eq!((memory.total, memory.used), (150_754_820_096, 0));
            assert_eq!(memory.total, memory.free + memory.reserved);
            assert_eq!(device.running_compute_processes().unwrap().len(), 0);

            let pci = device.pci_info().unwrap();
            assert_eq!(pci.pci_device_id, 0x2335_10DE);
            let same = |other: Device<'_>| assert_eq!(other.index().unwrap(), index);
            same(nvml.device_by_uuid(device.uuid().unwrap()).unwrap());
            same(nvml.device_by_pci_bus_id(pci.bus_id.as_str()).unwrap());
            same(nvml.device_by_pci_bus_id(&pci.bus_id[4..]).unwrap());
        }
        assert!(matches!(nvml.device_by_index(3), Err(NvmlError::InvalidArg)));
        assert!(matches!(nvml.device_by_uuid("GPU-none"), Err(NvmlError::NotFound)));
    });
}

#[test]
fn without_a_file_there_is_one_card() {
    alone("without_a_file_there_is_one_card", None, |path| {
        let nvml = start();
        assert_eq!(nvml.device_count().unwrap(), 1);
        State::h200(2).save(path).unwrap();
        assert_eq!(nvml.device_count().unwrap(), 2);
    });
}

#[test]
fn processes_come_and_go() {
    alone("processes_come_and_go", Some(State::h200(2)), |path| {
        let nvml = start();
        let (device, other) = (nvml.device_by_index(0).unwrap(), nvml.device_by_index(1).unwrap());
        assert!(matches!(device.process_utilization_stats(None), Err(NvmlError::NotFound)));

        // One is announced by a file, one stands in the state.
        let (mut announced, mut listed) = (worker(), worker());
        announce_process(path, 0, &process(announced.id(), 4 * GIB, 60)).unwrap();
        assert_eq!(pids(&device), [announced.id()]);
        State::update(path, |state| state.cards[0].processes = vec![process(listed.id(), GIB, 10)]).unwrap();
        let mut expected = [announced.id(), listed.id()];
        expected.sort();
        assert_eq!(pids(&device), expected);
        assert!(pids(&other).is_empty());
        assert_eq!(device.memory_info().unwrap().used, 5 * GIB);
        assert_eq!(device.utilization_rates().unwrap().gpu, 70);
        let first = device.running_compute_processes().unwrap().into_iter().find(|p| p.pid == announced.id()).unwrap();
        assert!(matches!(first.used_gpu_memory, UsedGpuMemory::Used(used) if used == 4 * GIB));
        assert_eq!(first.gpu_instance_id, None);
        let samples = device.process_utilization_stats(None).unwrap();
        let sample = samples.iter().find(|sample| sample.pid == announced.id()).unwrap();
        assert_eq!(sample.sm_util, 60);
        assert!(matches!(device.process_utilization_stats(sample.timestamp + 3_600_000_000), Err(NvmlError::NotFound)));

        // Too little room is said, with what is needed.
        let mut count = 1;
        let mut room = [nvmlProcessInfo_v2_t { pid: 0, usedGpuMemory: 0, gpuInstanceId: 0, computeInstanceId: 0 }];
        // SAFETY: `count` says how much room there is.
        let code = unsafe {
            nvml.lib().nvmlDeviceGetComputeRunningProcesses_v3(device.handle(), &mut count, room.as_mut_ptr())
        };
        assert_eq!((code, count, room[0].pid), (nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE, 2, 0));

        // A killed process is gone before anyone reaps it.
        announced.kill().unwrap();
        eventually("only the listed process is left", || pids(&device) == [listed.id()]);
        announced.wait().unwrap();
        assert_eq!(device.memory_info().unwrap().used, GIB);

        // A process can leave the card and live on.
        announce_process(path, 1, &process(listed.id(), 2 * GIB, 0)).unwrap();
        assert_eq!(pids(&other), [listed.id()]);
        withdraw_process(path, 1, listed.id()).unwrap();
        assert!(pids(&other).is_empty());
        listed.kill().unwrap();
        listed.wait().unwrap();
        assert!(pids(&device).is_empty());
    });
}

#[test]
fn two_halves_are_made_used_and_destroyed() {
    let mut state = State::h200(1);
    state.cards[0].mig.enabled = true;
    alone("two_halves_are_made_used_and_destroyed", Some(state), |path| {
        let nvml = start();
        let (lib, device) = (nvml.lib(), nvml.device_by_index(0).unwrap());
        // SAFETY: `device` outlives its handle.
        let card = unsafe { device.handle() };
        assert_eq!(device.mig_mode().unwrap().current, 1);
        assert!(matches!(device.mig_device_by_index(0), Err(NvmlError::NotFound)));
        assert!(matches!(device.utilization_rates(), Err(NvmlError::NotSupported)));

        // The half is the profile with two placements.
        let half = device.profile_info(NVML_GPU_INSTANCE_PROFILE_3_SLICE).unwrap();
        assert_eq!((half.id, half.slice_count, half.instance_count), (9, 3, 2));
        let mut info = nvmlGpuInstanceProfileInfo_v2_t {
            version: 2 << 24 | size_of::<nvmlGpuInstanceProfileInfo_v2_t>() as u32,
            // SAFETY: all fields are numbers.
            ..unsafe { std::mem::zeroed() }
        };
        // SAFETY: the structure says its own version; the others too below.
        let code =
            unsafe { lib.nvmlDeviceGetGpuInstanceProfileInfoV(card, NVML_GPU_INSTANCE_PROFILE_3_SLICE, &mut info) };
        assert_eq!((code, info.id), (0, 9));
        assert!(info.name.iter().map(|byte| *byte as u8 as char).collect::<String>().starts_with("MIG 3g.71gb\0"));
        info.version = 1;
        // SAFETY: as above.
        let code =
            unsafe { lib.nvmlDeviceGetGpuInstanceProfileInfoV(card, NVML_GPU_INSTANCE_PROFILE_3_SLICE, &mut info) };
        assert_eq!(code, nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);

        let mut count = 0;
        // SAFETY: without an array only the count is answered.
        let code = unsafe { lib.nvmlDeviceGetGpuInstancePossiblePlacements_v2(card, 9, ptr::null_mut(), &mut count) };
        assert_eq!((code, count), (0, 2));
        let mut places = [nvmlGpuInstancePlacement_t { start: 9, size: 9 }; 2];
        // SAFETY: `count` is the room in `places`.
        let code =
            unsafe { lib.nvmlDeviceGetGpuInstancePossiblePlacements_v2(card, 9, places.as_mut_ptr(), &mut count) };
        assert_eq!((code, places.map(|place| (place.start, place.size))), (0, [(0, 4), (4, 4)]));

        // Two are made; a third has no room.
        let mut halves = [ptr::null_mut(); 2];
        for (half, place) in halves.iter_mut().zip(&places) {
            // SAFETY: all pointers are to values that live on.
            assert_eq!(unsafe { lib.nvmlDeviceCreateGpuInstanceWithPlacement(card, 9, place, half) }, 0);
        }
        let mut third = ptr::null_mut();
        // SAFETY: as above.
        let code = unsafe { lib.nvmlDeviceCreateGpuInstance(card, 9, &mut third) };
        assert_eq!(code, nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES);
        let mut found = [ptr::null_mut(); 2];
        // SAFETY: the profile allows two.
        assert_eq!(unsafe { lib.nvmlDeviceGetGpuInstances(card, 9, found.as_mut_ptr(), &mut count) }, 0);
        assert_eq!((count, found), (2, [halves[1], halves[0]]), "in the order of their ids");
        assert_eq!(State::load(path).unwrap().cards[0].mig.gpu_instances.len(), 2);

        // A GPU instance is no device before it has a compute instance.
        assert!(matches!(device.mig_device_by_index(0), Err(NvmlError::NotFound)));
        let mut compute = ptr::null_mut();
        // SAFETY: as above.
        let code = unsafe {
            lib.nvmlGpuInstanceCreateComputeInstance(halves[1], NVML_COMPUTE_INSTANCE_PROFILE_3_SLICE, &mut compute)
        };
        assert_eq!(code, 0);
        let slice = device.mig_device_by_index(0).unwrap();
        assert!(slice.mig_is_mig_device_handle().unwrap());
        assert!(!device.mig_is_mig_device_handle().unwrap());
        assert_eq!(slice.name().unwrap(), "NVIDIA H200 MIG 3g.71gb");
        assert_eq!(slice.memory_info().unwrap().total, 71_168 << 20);
        assert_eq!(slice.mig_parent_device().unwrap().uuid().unwrap(), device.uuid().unwrap());
        let uuid = slice.uuid().unwrap();
        assert!(uuid.starts_with("MIG-"), "{uuid}");
        assert_eq!(nvml.device_by_uuid(uuid).unwrap().attributes().unwrap().multiprocessor_count, 60);
        let mut gpu_instance = 0;
        // SAFETY: `slice` outlives its handle.
        assert_eq!(unsafe { lib.nvmlDeviceGetGpuInstanceId(slice.handle(), &mut gpu_instance) }, 0);
        assert_eq!(gpu_instance, 1);

        // What runs on it shows there and on the card, and keeps it from being destroyed.
        let mut busy = worker();
        let process = Process { gpu_instance_id: Some(1), compute_instance_id: Some(0), ..process(busy.id(), GIB, 50) };
        announce_process(path, 0, &process).unwrap();
        assert_eq!(pids(&slice), [busy.id()]);
        assert_eq!(device.running_compute_processes().unwrap()[0].gpu_instance_id, Some(1));
        assert_eq!(slice.memory_info().unwrap().used, GIB);
        // SAFETY: the handles are those from above; destroyed ones are errors, not crashes.
        unsafe {
            assert_eq!(lib.nvmlComputeInstanceDestroy(compute), nvmlReturn_enum_NVML_ERROR_IN_USE);
            busy.kill().unwrap();
            busy.wait().unwrap();
            assert_eq!(lib.nvmlGpuInstanceDestroy(halves[1]), nvmlReturn_enum_NVML_ERROR_IN_USE);
            assert_eq!(lib.nvmlComputeInstanceDestroy(compute), 0);
            assert_eq!(lib.nvmlComputeInstanceDestroy(compute), nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
            assert_eq!(halves.map(|half| lib.nvmlGpuInstanceDestroy(half)), [0, 0]);
        }
        assert!(matches!(slice.uuid(), Err(NvmlError::InvalidArg)));
        assert_eq!(State::load(path).unwrap().cards[0].mig.gpu_instances, []);
    });
}

#[test]
fn each_event_set_gets_each_later_event_once() {
    alone("each_event_set_gets_each_later_event_once", Some(State::h200(2)), |path| {
        let push = |card: usize, xid| State::update(path, |state| state.cards[card].push_xid(xid)).unwrap();
        push(1, 13);
        let nvml = start();
        let listen = |card, types| {
            let device = nvml.device_by_index(card).unwrap();
            assert!(device.supported_event_types().unwrap().contains(types));
            device.register_events(types, nvml.create_event_set().unwrap()).unwrap()
        };
        let set = listen(1, EventTypes::CRITICAL_XID_ERROR);
        assert!(matches!(set.wait(0), Err(NvmlError::Timeout)));

        // A wait that is under way ends with the event.
        let (set, index, event) = thread::scope(|scope| {
            let waiting = scope.spawn(move || {
                let event = set.wait(PATIENCE.as_millis() as u32).unwrap();
                let index = event.device.index().unwrap();
                (set, index, event.event_data)
            });
            push(0, 31);
            push(1, 79);
            waiting.join().unwrap()
        });
        assert_eq!((index, event), (1, Some(XidError::Value(79))));
        assert!(matches!(set.wait(50), Err(NvmlError::Timeout)));

        // Two more: in order, each once, to each set; another kind only to those who asked.
        let both = listen(1, EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR);
        push(1, 48);
        State::update(path, |state| state.cards[1].push_event(EventKind::DoubleBitEcc, 0)).unwrap();
        push(1, 63);
        let xids = |set: &nvml_wrapper::EventSet<'_>| {
            let next = || set.wait(0).ok().map(|event| event.event_data);
            std::iter::from_fn(next).collect::<Vec<_>>()
        };
        let (first, last) = (Some(XidError::Value(48)), Some(XidError::Value(63)));
        assert_eq!(xids(&set), [first.clone(), last.clone()]);
        assert_eq!(xids(&both), [first, None, last]);

        let unknown = nvml.device_by_index(0).unwrap();
        let refused = unknown.register_events(EventTypes::CLOCK_CHANGE, nvml.create_event_set().unwrap());
        assert!(matches!(refused, Err(error) if matches!(error.error, NvmlError::NotSupported)));
    });
}

#[test]
fn a_hung_card_blocks_until_the_flag_is_gone() {
    alone("a_hung_card_blocks_until_the_flag_is_gone", Some(State::h200(2)), |path| {
        let nvml = start();
        let (hung, healthy) = (nvml.device_by_index(0).unwrap(), nvml.device_by_index(1).unwrap());
        State::update(path, |state| state.cards[0].hang = true).unwrap();
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            scope.spawn(move || sender.send(hung.memory_info().map(|memory| memory.total)));
            assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err(), "the call came back");
            // Others are not held up.
            assert_eq!(nvml.device_count().unwrap(), 2);
            assert_eq!(healthy.index().unwrap(), 1);
            State::update(path, |state| state.cards[0].hang = false).unwrap();
            assert_eq!(receiver.recv_timeout(PATIENCE).unwrap().unwrap(), 150_754_820_096);
        });
    });
}

#[test]
fn a_lost_card_says_so_and_can_come_back() {
    alone("a_lost_card_says_so_and_can_come_back", Some(State::h200(2)), |path| {
        let nvml = start();
        let device = nvml.device_by_index(1).unwrap();
        let set = nvml.create_event_set().unwrap();
        let set = device.register_events(EventTypes::CRITICAL_XID_ERROR, set).unwrap();
        State::update(path, |state| {
            state.cards[1].push_xid(79);
            state.cards[1].lost = true;
        })
        .unwrap();
        assert!(matches!(device.memory_info(), Err(NvmlError::GpuLost)));
        assert!(matches!(device.uuid(), Err(NvmlError::GpuLost)));
        assert!(matches!(nvml.device_by_index(1), Err(NvmlError::GpuLost)));
        assert!(nvml.device_by_index(0).is_ok());
        assert_eq!(set.wait(0).unwrap().event_data, Some(XidError::Value(79)));
        assert!(matches!(set.wait(0), Err(NvmlError::GpuLost)));

        State::update(path, |state| state.cards[1].lost = false).unwrap();
        assert_eq!(device.index().unwrap(), 1);
        assert!(matches!(set.wait(0), Err(NvmlError::Timeout)));
        // A card that goes from the file is lost as well.
        State::h200(1).save(path).unwrap();
        assert!(matches!(device.index(), Err(NvmlError::GpuLost)));
    });
}

#[test]
fn what_is_missing_is_reported_as_missing() {
    let mut state = State::h200(2);
    state.cards[0].unsupported_calls = vec!["nvmlDeviceGetTotalEccErrors".into()];
    alone("what_is_missing_is_reported_as_missing", Some(state), |_| {
        let nvml = start();
        let device = nvml.device_by_index(0).unwrap();
        assert!(matches!(device.fan_speed(0), Err(NvmlError::FailedToLoadSymbol(_))));
        let errors = |device: &Device<'_>| device.total_ecc_errors(MemoryError::Corrected, EccCounter::Volatile);
        assert!(matches!(errors(&device), Err(NvmlError::NotSupported)));
        assert_eq!(errors(&nvml.device_by_index(1).unwrap()).unwrap(), 0);
    });
}

#[test]
fn health_is_what_the_file_says() {
    let card = Card {
        temperature_celsius: 88,
        power_usage_milliwatts: 690_000,
        ecc: Ecc { volatile_uncorrected: 3, aggregate_corrected: 7, ..Ecc::default() },
        remapped_rows: RemappedRows { uncorrectable: 2, pending: true, ..RemappedRows::default() },
        recovery_action: RecoveryAction::DrainAndReset,
        ..Card::h200(0)
    };
    alone("health_is_what_the_file_says", Some(State { cards: vec![card], ..State::default() }), |path| {
        let nvml = start();
        let device = nvml.device_by_index(0).unwrap();
        assert_eq!(device.temperature(TemperatureSensor::Gpu).unwrap(), 88);
        assert_eq!(device.power_usage().unwrap(), 690_000);
        assert!(device.is_ecc_enabled().unwrap().currently_enabled);
        assert_eq!(device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).unwrap(), 3);
        assert_eq!(device.total_ecc_errors(MemoryError::Corrected, EccCounter::Aggregate).unwrap(), 7);
        let (mut rows, mut pending) = ([9; 2], [9; 2]);
        let [corrected, uncorrected] = &mut rows;
        let [is_pending, failed] = &mut pending;
        // SAFETY: four places for four numbers.
        let code = unsafe {
            nvml.lib().nvmlDeviceGetRemappedRows(device.handle(), corrected, uncorrected, is_pending, failed)
        };
        assert_eq!((code, rows, pending), (0, [0, 2], [1, 0]));
        let ids = [field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, field_id::NVML_FI_DEV_NVLINK_LINK_COUNT];
        let fields = device.field_values_for(&ids.map(FieldId)).unwrap();
        let known = fields[0].as_ref().unwrap().value.as_ref().unwrap();
        assert!(matches!(known, nvml_wrapper::enums::device::SampleValue::U32(4)), "{known:?}");
        assert!(matches!(fields[1].as_ref().unwrap().value, Err(NvmlError::NotSupported)));

        State::update(path, |state| state.cards[0].ecc.enabled = false).unwrap();
        let errors = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
        assert!(matches!(errors, Err(NvmlError::NotSupported)));
    });
}

#[test]
fn wrong_arguments_are_errors_and_no_crashes() {
    alone("wrong_arguments_are_errors_and_no_crashes", Some(State::h200(1)), |_| {
        let nvml = start();
        let (lib, device) = (nvml.lib(), nvml.device_by_index(0).unwrap());
        let invalid = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
        let size = size_of::<nvmlMemory_v2_t>() as u32;
        let mut memory = nvmlMemory_v2_t { version: 2 << 24 | size, total: 0, reserved: 0, free: 0, used: 0 };
        let (mut number, mut name) = (0, [1; 8]);
        // SAFETY: the library never follows a handle, checks for null, and is told the true sizes.
        unsafe {
            let card = device.handle();
            assert_eq!(lib.nvmlDeviceGetMinorNumber(card, ptr::null_mut()), invalid);
            assert_eq!(lib.nvmlDeviceGetMinorNumber(ptr::null_mut(), &mut number), invalid);
            assert_eq!(lib.nvmlDeviceGetMinorNumber(ptr::without_provenance_mut(7), &mut number), invalid);
            assert_eq!(lib.nvmlEventSetFree(card.cast()), invalid);
            assert_eq!(lib.nvmlGpuInstanceDestroy(card.cast()), invalid);
            assert_eq!(lib.nvmlDeviceGetHandleByUUID(ptr::null(), ptr::null_mut()), invalid);
            let too_small = lib.nvmlDeviceGetName(card, name.as_mut_ptr(), name.len() as u32);
            assert_eq!((too_small, name), (nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE, [1; 8]));
            assert_eq!(lib.nvmlDeviceGetMemoryInfo_v2(card, &mut memory), 0);
            for version in [0, size, 1 << 24 | size, 2 << 24 | (size - 8)] {
                memory.version = version;
                let code = lib.nvmlDeviceGetMemoryInfo_v2(card, &mut memory);
                assert_eq!(code, nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
            }
        }
        // SAFETY: the texts are static.
        let text = unsafe { std::ffi::CStr::from_ptr(lib.nvmlErrorString(nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST)) };
        assert_eq!(text, c"the GPU is lost");

        // After the last shutdown nothing answers; the second load keeps the library in memory.
        // SAFETY: the same library, which has no requirements on being loaded.
        let kept = unsafe { NvmlLib::new(library()) }.unwrap();
        nvml.shutdown().unwrap();
        // SAFETY: a pointer to a number.
        let code = unsafe { kept.nvmlDeviceGetCount_v2(&mut number) };
        assert_eq!(code, nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
        // SAFETY: takes no arguments.
        assert_eq!(unsafe { kept.nvmlShutdown() }, nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
    });
}

#[test]
fn initialisation_can_fail() {
    alone("initialisation_can_fail", Some(State { driver_loaded: false, ..State::default() }), |path| {
        let failure = || try_start(InitFlags::empty()).err();
        assert!(matches!(failure(), Some(NvmlError::DriverNotLoaded)));
        fs::write(path, r#"{"cards":[{"hangs":true}]}"#).unwrap();
        assert!(matches!(failure(), Some(NvmlError::Unknown)));
        State::h200(0).save(path).unwrap();
        let no_card = |code| code == nvmlReturn_enum_NVML_ERROR_GPU_NOT_FOUND;
        assert!(matches!(failure(), Some(NvmlError::UnexpectedVariant(code)) if no_card(code)));
        assert_eq!(try_start(InitFlags::NO_GPUS).unwrap().device_count().unwrap(), 0);
    });
}
