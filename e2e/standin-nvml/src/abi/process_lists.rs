//! Which processes use a card, and how much of it.
#![allow(non_snake_case, reason = "the names are NVML's")]

use std::time::{SystemTime, UNIX_EPOCH};

use nvml_wrapper_sys::bindings::*;

use super::{
    argument::{Device, Out, OutArray},
    code, exported,
};
use crate::{Process, library::Answer, processes};

/// What NVML writes where an id does not apply.
pub(super) const NO_ID: u32 = u32::MAX;

exported! {
    fn nvmlDeviceGetComputeRunningProcesses_v3(
        device: Device, count: Out<u32>, infos: OutArray<nvmlProcessInfo_v2_t>
    ) {
        infos.list(&count, &device.process_infos()?)
    }

    fn nvmlDeviceGetComputeRunningProcesses_v2(
        device: Device, count: Out<u32>, infos: OutArray<nvmlProcessInfo_v2_t>
    ) {
        infos.list(&count, &device.process_infos()?)
    }

    fn nvmlDeviceGetComputeRunningProcesses(
        device: Device, count: Out<u32>, infos: OutArray<nvmlProcessInfo_v1_t>
    ) {
        let v1 = |p: nvmlProcessInfo_v2_t| nvmlProcessInfo_v1_t { pid: p.pid, usedGpuMemory: p.usedGpuMemory };
        let processes: Vec<_> = device.process_infos()?.into_iter().map(v1).collect();
        infos.list(&count, &processes)
    }

    /// Nothing here draws.
    fn nvmlDeviceGetGraphicsRunningProcesses_v3(
        device: Device, count: Out<u32>, infos: OutArray<nvmlProcessInfo_v2_t>
    ) {
        device.card()?;
        infos.list(&count, &[])
    }

    /// No process of the state is an MPS client.
    fn nvmlDeviceGetMPSComputeRunningProcesses_v3(
        device: Device, count: Out<u32>, infos: OutArray<nvmlProcessInfo_v2_t>
    ) {
        device.card()?;
        infos.list(&count, &[])
    }

    /// The utilisation of the whole card; NVML has none for a card in MIG mode or a slice.
    fn nvmlDeviceGetUtilizationRates(device: Device, rates: Out<nvmlUtilization_t>) {
        let processes = device.processes_of_undivided_card()?;
        let busy = processes.iter().fold(0, |busy: u32, process| busy.saturating_add(process.sm_util));
        rates.put(nvmlUtilization_t { gpu: busy.min(100), memory: 0 })
    }

    /// One sample a process, taken at the moment of the call. NOT_FOUND when nobody is on the card, as with NVML.
    fn nvmlDeviceGetProcessUtilization(
        device: Device, samples: OutArray<nvmlProcessUtilizationSample_t>, count: Out<u32>, last_seen: u64
    ) {
        let now = microseconds_since_1970();
        let processes = device.processes_of_undivided_card()?;
        let processes = processes.iter().filter(|_| now > last_seen);
        let taken: Vec<_> = processes.map(|process| nvmlProcessUtilizationSample_t {
            pid: process.pid,
            timeStamp: now,
            smUtil: process.sm_util,
            memUtil: 0,
            encUtil: 0,
            decUtil: 0,
        }).collect();
        if taken.is_empty() {
            count.put(0)?;
            return Err(code::NOT_FOUND);
        }
        if samples.is_null() {
            count.put(taken.len() as u32)?;
            return Err(code::INSUFFICIENT_SIZE);
        }
        samples.list(&count, &taken)
    }
}

impl Device {
    /// The processes on the card, or on the slice if this is one.
    fn processes(&self) -> Answer<Vec<Process>> {
        let mut on_card = processes::live(&self.snapshot.path, self.card()?);
        if let Some((gpu, compute)) = self.slice {
            on_card.retain(|process| process.is_on(gpu, compute));
        }
        Ok(on_card)
    }

    fn process_infos(&self) -> Answer<Vec<nvmlProcessInfo_v2_t>> {
        let divided = self.card()?.mig.enabled;
        let id = |id: Option<u32>| id.filter(|_| divided).unwrap_or(NO_ID);
        let info = |process: &Process| nvmlProcessInfo_v2_t {
            pid: process.pid,
            usedGpuMemory: process.used_bytes,
            gpuInstanceId: id(process.gpu_instance_id),
            computeInstanceId: id(process.compute_instance_id),
        };
        Ok(self.processes()?.iter().map(info).collect())
    }

    fn processes_of_undivided_card(&self) -> Answer<Vec<Process>> {
        if self.whole_card()?.mig.enabled { Err(code::NOT_SUPPORTED) } else { self.processes() }
    }
}

/// NVML stamps samples with the clock of the machine.
#[allow(clippy::disallowed_methods)]
pub(super) fn microseconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
