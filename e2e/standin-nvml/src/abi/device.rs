//! Who a card is, and its memory.
#![allow(non_snake_case, reason = "the names are NVML's")]

use std::ffi::c_char;

use nvml_wrapper_sys::bindings::*;

use super::{
    argument::{Device, Out, OutText, VersionedOut},
    code, exported,
};
use crate::{Card, library::Answer, processes};

/// What `nvmlDeviceGetBAR1MemoryInfo` answers: the window is larger than the memory, as on every Hopper board.
const BAR1_BYTES: u64 = 256 << 30;

exported! {
    fn nvmlDeviceGetName(device: Device, name: OutText, length: u32) {
        name.put(length, &device.name()?)
    }

    fn nvmlDeviceGetUUID(device: Device, uuid: OutText, length: u32) {
        let text = match device.instances()? {
            Some((gpu, compute)) => device.card()?.mig_uuid(gpu, compute),
            None => device.card()?.uuid.clone(),
        };
        uuid.put(length, &text)
    }

    fn nvmlDeviceGetSerial(device: Device, serial: OutText, length: u32) {
        serial.put(length, &device.card()?.serial)
    }

    fn nvmlDeviceGetIndex(device: Device, index: Out<u32>) {
        let card = device.card()?;
        index.put(match device.slice {
            None => card.index,
            Some((gpu, compute)) => {
                let place = card.mig.devices().position(|(g, c)| (g.id, c.id) == (gpu, compute));
                place.ok_or(code::INVALID_ARGUMENT)? as u32
            }
        })
    }

    fn nvmlDeviceGetMinorNumber(device: Device, minor: Out<u32>) {
        minor.put(device.card()?.minor)
    }

    fn nvmlDeviceGetBoardId(device: Device, board: Out<u32>) {
        let card = device.whole_card()?;
        board.put(card.pci_domain << 16 | card.pci_bus << 8 | card.pci_device << 3)
    }

    fn nvmlDeviceGetPciInfo_v3(device: Device, info: Out<nvmlPciInfo_t>) {
        let card = device.card()?;
        let address = card.pci_address();
        info.put(nvmlPciInfo_t {
            // The old form has a domain of four digits.
            busIdLegacy: text_field(&address[4..]),
            domain: card.pci_domain,
            bus: card.pci_bus,
            device: card.pci_device,
            pciDeviceId: card.pci_device_id,
            pciSubSystemId: card.pci_sub_system_id,
            busId: text_field(&address),
        })
    }

    fn nvmlDeviceGetBrand(device: Device, brand: Out<nvmlBrandType_t>) {
        device.card()?;
        brand.put(nvmlBrandType_enum_NVML_BRAND_NVIDIA)
    }

    fn nvmlDeviceGetArchitecture(device: Device, architecture: Out<nvmlDeviceArchitecture_t>) {
        architecture.put(match device.card()?.compute_capability {
            (8, 9) => NVML_DEVICE_ARCH_ADA,
            (8, _) => NVML_DEVICE_ARCH_AMPERE,
            (9, _) => NVML_DEVICE_ARCH_HOPPER,
            (10 | 12, _) => NVML_DEVICE_ARCH_BLACKWELL,
            _ => NVML_DEVICE_ARCH_UNKNOWN,
        })
    }

    fn nvmlDeviceGetCudaComputeCapability(device: Device, major: Out<i32>, minor: Out<i32>) {
        let capability = device.card()?.compute_capability;
        major.put(capability.0)?;
        minor.put(capability.1)
    }

    fn nvmlDeviceGetMemoryInfo(device: Device, memory: Out<nvmlMemory_t>) {
        let now = device.memory()?;
        // Version 1 has no field for the driver's part and counts it as used.
        memory.put(nvmlMemory_t { total: now.total, free: now.free(), used: now.used + now.reserved })
    }

    fn nvmlDeviceGetMemoryInfo_v2(device: Device, memory: VersionedOut<nvmlMemory_v2_t>) {
        if !memory.is::<nvmlMemory_v2_t>(2) {
            return Err(code::ARGUMENT_VERSION_MISMATCH);
        }
        let now = device.memory()?;
        let version = 2 << 24 | size_of::<nvmlMemory_v2_t>() as u32;
        let answer =
            nvmlMemory_v2_t { version, total: now.total, reserved: now.reserved, free: now.free(), used: now.used };
        // SAFETY: the version was checked above.
        unsafe { memory.put_as(answer) }
    }

    fn nvmlDeviceGetBAR1MemoryInfo(device: Device, memory: Out<nvmlBAR1Memory_t>) {
        device.whole_card()?;
        memory.put(nvmlBAR1Memory_t { bar1Total: BAR1_BYTES, bar1Free: BAR1_BYTES, bar1Used: 0 })
    }

    fn nvmlDeviceGetPersistenceMode(device: Device, mode: Out<nvmlEnableState_t>) {
        device.card()?;
        mode.put(nvmlEnableState_enum_NVML_FEATURE_ENABLED)
    }

    fn nvmlDeviceGetComputeMode(device: Device, mode: Out<nvmlComputeMode_t>) {
        device.card()?;
        mode.put(nvmlComputeMode_enum_NVML_COMPUTEMODE_DEFAULT)
    }
}

/// A card's or a slice's memory, in bytes.
struct Memory {
    total: u64,
    reserved: u64,
    /// By the processes that live.
    used: u64,
}

impl Memory {
    /// A state file may claim more use than there is memory; then nothing is free.
    fn free(&self) -> u64 {
        self.total.saturating_sub(self.reserved).saturating_sub(self.used)
    }
}

impl Device {
    /// The product name; for a slice, with its profile.
    fn name(&self) -> Answer<String> {
        let card = self.card()?;
        match self.instances()? {
            None => Ok(card.name.clone()),
            Some((gpu, compute)) => {
                let profile = crate::mig::ComputeProfile::of(card.mig.profile(gpu.profile_id)?, compute)?;
                Ok(format!("{} MIG {}", card.name, profile.name))
            }
        }
    }

    fn memory(&self) -> Answer<Memory> {
        let card = self.card()?;
        let on_card = processes::live(&self.snapshot.path, card);
        // A sum over a file's numbers; wrapping around would make a full card look empty.
        let sum = |used: u64, more: u64| used.saturating_add(more);
        Ok(match self.instances()? {
            None => Memory {
                total: card.memory_total_bytes,
                reserved: card.memory_reserved_bytes,
                used: on_card.iter().map(|process| process.used_bytes).fold(0, sum),
            },
            Some((gpu, _)) => Memory {
                total: card.mig.profile(gpu.profile_id)?.memory_mib << 20,
                reserved: 0,
                // Memory belongs to the GPU instance, whose compute instances share it.
                used: on_card
                    .iter()
                    .filter(|process| process.gpu_instance_id == Some(gpu.id))
                    .map(|process| process.used_bytes)
                    .fold(0, sum),
            },
        })
    }
}

impl Card {
    /// `00000000:1B:00.0`.
    pub(crate) fn pci_address(&self) -> String {
        format!("{:08X}:{:02X}:{:02X}.0", self.pci_domain, self.pci_bus, self.pci_device)
    }
}

/// A text in a fixed field, cut to leave room for the zero byte.
pub(super) fn text_field<const N: usize>(text: &str) -> [c_char; N] {
    let mut field = [0; N];
    for (place, byte) in field[..N - 1].iter_mut().zip(text.bytes()) {
        *place = byte as c_char;
    }
    field
}
