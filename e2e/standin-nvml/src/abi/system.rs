//! Initialisation, versions and finding cards.
#![allow(non_snake_case, reason = "the names are NVML's")]

use std::{ffi::c_char, fs};

use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlReturn_t};

use super::{
    answered,
    argument::{InText, Out, OutText},
    code, exported,
};
use crate::{
    Card,
    library::{self, Answer, Object},
};

/// `NVML_INIT_FLAG_NO_GPUS`: a machine without a card is no error.
const INIT_NO_GPUS: u32 = 1;

// Not by `exported!`, like the others: these four work before the library is initialised.

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> nvmlReturn_t {
    answered(|| library::initialise(false))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(flags: u32) -> nvmlReturn_t {
    answered(|| library::initialise(flags & INIT_NO_GPUS != 0))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> nvmlReturn_t {
    answered(library::shut_down)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(result: nvmlReturn_t) -> *const c_char {
    code::text(result).as_ptr()
}

exported! {
    fn nvmlSystemGetDriverVersion(version: OutText, length: u32) {
        version.put(length, &library::snapshot()?.state.driver_version)
    }

    fn nvmlSystemGetNVMLVersion(version: OutText, length: u32) {
        version.put(length, &library::snapshot()?.state.nvml_version)
    }

    fn nvmlSystemGetCudaDriverVersion(version: Out<i32>) {
        version.put(library::snapshot()?.state.cuda_driver_version)
    }

    fn nvmlSystemGetCudaDriverVersion_v2(version: Out<i32>) {
        version.put(library::snapshot()?.state.cuda_driver_version)
    }

    fn nvmlSystemGetProcessName(pid: u32, name: OutText, length: u32) {
        library::snapshot()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| code::NOT_FOUND)?;
        let program = command.split(|byte| *byte == 0).next().unwrap_or_default();
        // A name that is too long is cut, unlike other texts.
        let fitting = &program[..program.len().min((length as usize).saturating_sub(1))];
        name.put(length, &String::from_utf8_lossy(fitting))
    }

    fn nvmlDeviceGetCount_v2(count: Out<u32>) {
        count.put(library::snapshot()?.state.cards.len() as u32)
    }

    fn nvmlDeviceGetHandleByIndex_v2(index: u32, device: Out<nvmlDevice_t>) {
        device.put(handle("nvmlDeviceGetHandleByIndex_v2", |card| card.index == index, code::INVALID_ARGUMENT)?)
    }

    fn nvmlDeviceGetHandleByUUID(uuid: InText, device: Out<nvmlDevice_t>) {
        let slice = mig_device(&uuid.0)?;
        device.put(match slice {
            Some(slice) => library::handle_of(slice),
            None => handle("nvmlDeviceGetHandleByUUID", |card| card.uuid == uuid.0, code::NOT_FOUND)?,
        })
    }

    fn nvmlDeviceGetHandleBySerial(serial: InText, device: Out<nvmlDevice_t>) {
        device.put(handle("nvmlDeviceGetHandleBySerial", |card| card.serial == serial.0, code::NOT_FOUND)?)
    }

    fn nvmlDeviceGetHandleByPciBusId_v2(address: InText, device: Out<nvmlDevice_t>) {
        let wanted = address.0.to_ascii_uppercase();
        // The domain may be left out or have four digits: both are the end of the long form.
        let same = |card: &Card| card.pci_address().to_ascii_uppercase().ends_with(&wanted);
        let long_enough = wanted.len() >= "00:00.0".len();
        device.put(handle(
            "nvmlDeviceGetHandleByPciBusId_v2", |card| long_enough && same(card), code::NOT_FOUND,
        )?)
    }
}

/// The handle of the card that `is_it` picks, once the card can be reached.
fn handle(call: &str, is_it: impl Fn(&Card) -> bool, otherwise: nvmlReturn_t) -> Answer<nvmlDevice_t> {
    let snapshot = library::snapshot()?;
    let uuid = snapshot.state.cards.iter().find(|card| is_it(card)).map(|card| card.uuid.clone()).ok_or(otherwise)?;
    library::reach(&uuid, call)?;
    Ok(library::handle_of(Object::Card { uuid }))
}

/// The MIG device with this UUID, once its card can be reached.
fn mig_device(uuid: &str) -> Answer<Option<Object>> {
    let snapshot = library::snapshot()?;
    for card in &snapshot.state.cards {
        let found = card.mig.devices().find(|(gpu, compute)| card.mig_uuid(gpu, compute) == uuid);
        if let Some((gpu, compute)) = found {
            library::reach(&card.uuid, "nvmlDeviceGetHandleByUUID")?;
            return Ok(Some(Object::MigDevice {
                card: card.uuid.clone(),
                gpu_instance: gpu.id,
                compute_instance: compute.id,
            }));
        }
    }
    Ok(None)
}
