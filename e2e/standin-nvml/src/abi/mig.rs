//! Multi-instance GPU: profiles, instances, and the devices that come of them.
//!
//! There is no `nvmlDeviceSetMigMode`: nobody may change the mode of a card under its users (N17).
#![allow(non_snake_case, reason = "the names are NVML's")]

use nvml_wrapper_sys::bindings::*;

use super::{
    argument::{ComputeInstanceHandle, Device, GpuInstanceHandle, In, Out, OutArray, VersionedOut},
    code,
    device::text_field,
    exported,
};
use crate::{
    MigProfile,
    library::{self, Answer, Object},
    mig::ComputeProfile,
    processes,
};

exported! {
    fn nvmlDeviceGetMigMode(device: Device, current: Out<u32>, pending: Out<u32>) {
        let mig = &device.whole_card()?.mig;
        if mig.profiles.is_empty() {
            return Err(code::NOT_SUPPORTED);
        }
        current.put(mig.enabled.into())?;
        pending.put(mig.enabled.into())
    }

    fn nvmlDeviceGetMaxMigDeviceCount(device: Device, count: Out<u32>) {
        let profiles = &device.whole_card()?.mig.profiles;
        count.put(profiles.iter().map(|profile| profile.instances_max).max().unwrap_or(0))
    }

    fn nvmlDeviceGetMigDeviceHandleByIndex(device: Device, index: u32, slice: Out<nvmlDevice_t>) {
        let card = device.whole_card()?;
        card.mig.in_mig_mode()?;
        let (gpu, compute) = card.mig.devices().nth(index as usize).ok_or(code::NOT_FOUND)?;
        let card = card.uuid.clone();
        slice.put(library::handle_of(Object::MigDevice { card, gpu_instance: gpu.id, compute_instance: compute.id }))
    }

    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice: Device, device: Out<nvmlDevice_t>) {
        slice.instances()?.ok_or(code::INVALID_ARGUMENT)?;
        device.put(library::handle_of(Object::Card { uuid: slice.card()?.uuid.clone() }))
    }

    fn nvmlDeviceIsMigDeviceHandle(device: Device, is_slice: Out<u32>) {
        is_slice.put(device.slice.is_some().into())
    }

    fn nvmlDeviceGetGpuInstanceId(slice: Device, id: Out<u32>) {
        id.put(slice.slice.ok_or(code::INVALID_ARGUMENT)?.0)
    }

    fn nvmlDeviceGetComputeInstanceId(slice: Device, id: Out<u32>) {
        id.put(slice.slice.ok_or(code::INVALID_ARGUMENT)?.1)
    }

    fn nvmlDeviceGetAttributes_v2(slice: Device, attributes: Out<nvmlDeviceAttributes_t>) {
        let (gpu, compute) = slice.instances()?.ok_or(code::NOT_SUPPORTED)?;
        let profile = slice.card()?.mig.profile(gpu.profile_id)?;
        attributes.put(nvmlDeviceAttributes_t {
            multiprocessorCount: ComputeProfile::of(profile, compute)?.multiprocessors,
            sharedCopyEngineCount: profile.copy_engines,
            sharedDecoderCount: profile.decoders,
            sharedEncoderCount: profile.encoders,
            sharedJpegCount: profile.jpeg_engines,
            sharedOfaCount: profile.optical_flow_engines,
            gpuInstanceSliceCount: profile.slices,
            computeInstanceSliceCount: compute.slices,
            memorySizeMB: profile.memory_mib,
        })
    }

    fn nvmlDeviceGetGpuInstanceProfileInfo(device: Device, profile: u32, info: Out<nvmlGpuInstanceProfileInfo_t>) {
        let p = numbered_profile(&device, profile)?;
        info.put(nvmlGpuInstanceProfileInfo_t {
            id: p.id,
            isP2pSupported: 0,
            sliceCount: p.slices,
            instanceCount: p.instances_max,
            multiprocessorCount: p.multiprocessors,
            copyEngineCount: p.copy_engines,
            decoderCount: p.decoders,
            encoderCount: p.encoders,
            jpegCount: p.jpeg_engines,
            ofaCount: p.optical_flow_engines,
            memorySizeMB: p.memory_mib,
        })
    }

    fn nvmlDeviceGetGpuInstanceProfileInfoV(
        device: Device, profile: u32, info: VersionedOut<nvmlGpuInstanceProfileInfo_v2_t>
    ) {
        put_profile(numbered_profile(&device, profile)?, &info)
    }

    fn nvmlDeviceGetGpuInstanceProfileInfoByIdV(
        device: Device, id: u32, info: VersionedOut<nvmlGpuInstanceProfileInfo_v2_t>
    ) {
        put_profile(device.whole_card()?.mig.profile(id)?, &info)
    }

    fn nvmlDeviceGetGpuInstancePossiblePlacements_v2(
        device: Device, profile: u32, placements: OutArray<nvmlGpuInstancePlacement_t>, count: Out<u32>
    ) {
        let profile = device.whole_card()?.mig.profile(profile)?;
        let size = profile.placement_size;
        let starts = profile.placement_starts.iter();
        let possible: Vec<_> = starts.map(|start| nvmlGpuInstancePlacement_t { start: *start, size }).collect();
        // Without an array this is the question how many there are, and no error.
        if placements.is_null() { count.put(possible.len() as u32) } else { placements.list(&count, &possible) }
    }

    fn nvmlDeviceGetGpuInstanceRemainingCapacity(device: Device, profile: u32, count: Out<u32>) {
        let mig = &device.whole_card()?.mig;
        count.put(mig.remaining(mig.profile(profile)?))
    }

    fn nvmlDeviceCreateGpuInstance(device: Device, profile: u32, instance: Out<nvmlGpuInstance_t>) {
        instance.put(create_gpu_instance(&device, profile, None)?)
    }

    fn nvmlDeviceCreateGpuInstanceWithPlacement(
        device: Device, profile: u32, placement: In<nvmlGpuInstancePlacement_t>, instance: Out<nvmlGpuInstance_t>
    ) {
        if device.whole_card()?.mig.profile(profile)?.placement_size != placement.0.size {
            return Err(code::INVALID_ARGUMENT);
        }
        instance.put(create_gpu_instance(&device, profile, Some(placement.0.start))?)
    }

    fn nvmlGpuInstanceDestroy(instance: GpuInstanceHandle) {
        library::change_card(&instance.card, |card, path| {
            let on_card = processes::live(path, card);
            card.mig.destroy(instance.id, &on_card)
        })
    }

    /// The caller has room for as many as the profile allows.
    fn nvmlDeviceGetGpuInstances(
        device: Device, profile: u32, instances: OutArray<nvmlGpuInstance_t>, count: Out<u32>
    ) {
        let card = device.whole_card()?;
        let limit = card.mig.profile(profile)?.instances_max;
        let of_profile = card.mig.gpu_instances.iter().filter(|instance| instance.profile_id == profile);
        let handles: Vec<nvmlGpuInstance_t> = of_profile
            .take(limit as usize)
            .map(|instance| library::handle_of(Object::GpuInstance { card: card.uuid.clone(), id: instance.id }))
            .collect();
        count.put(handles.len() as u32)?;
        // SAFETY: by NVML's documentation the array has room for the profile's `instanceCount`; no more are taken.
        unsafe { instances.fill(&handles) }
    }

    fn nvmlDeviceGetGpuInstanceById(device: Device, id: u32, instance: Out<nvmlGpuInstance_t>) {
        let card = device.whole_card()?;
        card.mig.in_mig_mode()?;
        card.mig.gpu_instance(id).ok_or(code::NOT_FOUND)?;
        instance.put(library::handle_of(Object::GpuInstance { card: card.uuid.clone(), id }))
    }

    fn nvmlGpuInstanceGetInfo(instance: GpuInstanceHandle, info: Out<nvmlGpuInstanceInfo_t>) {
        let found = instance.instance()?;
        info.put(nvmlGpuInstanceInfo_t {
            device: library::handle_of(Object::Card { uuid: instance.card.clone() }),
            id: found.id,
            profileId: found.profile_id,
            placement: nvmlGpuInstancePlacement_t { start: found.start, size: found.size },
        })
    }

    fn nvmlGpuInstanceGetComputeInstanceProfileInfo(
        instance: GpuInstanceHandle, profile: u32, engines: u32, info: Out<nvmlComputeInstanceProfileInfo_t>
    ) {
        let gpu = instance.profile()?;
        let compute = compute_profile(gpu, profile, engines)?;
        info.put(nvmlComputeInstanceProfileInfo_t {
            id: compute.id,
            sliceCount: compute.slices,
            instanceCount: compute.instances_max,
            multiprocessorCount: compute.multiprocessors,
            sharedCopyEngineCount: gpu.copy_engines,
            sharedDecoderCount: gpu.decoders,
            sharedEncoderCount: gpu.encoders,
            sharedJpegCount: gpu.jpeg_engines,
            sharedOfaCount: gpu.optical_flow_engines,
        })
    }

    fn nvmlGpuInstanceGetComputeInstanceProfileInfoV(
        instance: GpuInstanceHandle, profile: u32, engines: u32, info: VersionedOut<nvmlComputeInstanceProfileInfo_v2_t>
    ) {
        type Version2 = nvmlComputeInstanceProfileInfo_v2_t;
        if !info.is::<Version2>(2) {
            return Err(code::ARGUMENT_VERSION_MISMATCH);
        }
        let gpu = instance.profile()?;
        let compute = compute_profile(gpu, profile, engines)?;
        let answer = Version2 {
            version: 2 << 24 | size_of::<Version2>() as u32,
            id: compute.id,
            sliceCount: compute.slices,
            instanceCount: compute.instances_max,
            multiprocessorCount: compute.multiprocessors,
            sharedCopyEngineCount: gpu.copy_engines,
            sharedDecoderCount: gpu.decoders,
            sharedEncoderCount: gpu.encoders,
            sharedJpegCount: gpu.jpeg_engines,
            sharedOfaCount: gpu.optical_flow_engines,
            name: text_field(&format!("MIG {}", compute.name)),
        };
        // SAFETY: the version was checked above.
        unsafe { info.put_as(answer) }
    }

    fn nvmlGpuInstanceGetComputeInstanceRemainingCapacity(
        instance: GpuInstanceHandle, profile: u32, count: Out<u32>
    ) {
        let gpu = instance.profile()?;
        let slices = ComputeProfile::within(gpu, profile)?.slices;
        let used: u32 = instance.instance()?.compute_instances.iter().map(|compute| compute.slices).sum();
        count.put(gpu.slices.saturating_sub(used) / slices)
    }

    fn nvmlGpuInstanceCreateComputeInstance(
        instance: GpuInstanceHandle, profile: u32, compute: Out<nvmlComputeInstance_t>
    ) {
        compute.put(create_compute_instance(instance, profile, None)?)
    }

    fn nvmlGpuInstanceCreateComputeInstanceWithPlacement(
        instance: GpuInstanceHandle, profile: u32, placement: In<nvmlComputeInstancePlacement_t>,
        compute: Out<nvmlComputeInstance_t>
    ) {
        if ComputeProfile::within(instance.profile()?, profile)?.slices != placement.0.size {
            return Err(code::INVALID_ARGUMENT);
        }
        compute.put(create_compute_instance(instance, profile, Some(placement.0.start))?)
    }

    fn nvmlComputeInstanceDestroy(compute: ComputeInstanceHandle) {
        library::change_card(&compute.card, |card, path| {
            let on_card = processes::live(path, card);
            card.mig.destroy_compute(compute.gpu_instance, compute.id, &on_card)
        })
    }

    /// The caller has room for as many as the profile allows.
    fn nvmlGpuInstanceGetComputeInstances(
        instance: GpuInstanceHandle, profile: u32, computes: OutArray<nvmlComputeInstance_t>, count: Out<u32>
    ) {
        let wanted = ComputeProfile::within(instance.profile()?, profile)?;
        let of_profile = instance.instance()?.compute_instances.iter().filter(|c| c.slices == wanted.slices);
        let handles: Vec<nvmlComputeInstance_t> = of_profile
            .take(wanted.instances_max as usize)
            .map(|compute| library::handle_of(Object::ComputeInstance {
                card: instance.card.clone(), gpu_instance: instance.id, id: compute.id,
            }))
            .collect();
        count.put(handles.len() as u32)?;
        // SAFETY: by NVML's documentation the array has room for the profile's `instanceCount`; no more are taken.
        unsafe { computes.fill(&handles) }
    }

    fn nvmlGpuInstanceGetComputeInstanceById(
        instance: GpuInstanceHandle, id: u32, compute: Out<nvmlComputeInstance_t>
    ) {
        instance.instance()?.compute_instance(id).ok_or(code::NOT_FOUND)?;
        compute.put(library::handle_of(Object::ComputeInstance { card: instance.card, gpu_instance: instance.id, id }))
    }

    fn nvmlComputeInstanceGetInfo_v2(compute: ComputeInstanceHandle, info: Out<nvmlComputeInstanceInfo_t>) {
        let found = compute.instance()?;
        let card = compute.snapshot.card(&compute.card).ok_or(code::GPU_IS_LOST)?;
        let gpu = card.mig.gpu_instance(compute.gpu_instance).ok_or(code::INVALID_ARGUMENT)?;
        info.put(nvmlComputeInstanceInfo_t {
            device: library::handle_of(Object::Card { uuid: compute.card.clone() }),
            gpuInstance: library::handle_of(Object::GpuInstance { card: compute.card.clone(), id: gpu.id }),
            id: found.id,
            profileId: ComputeProfile::of(card.mig.profile(gpu.profile_id)?, found)?.id,
            placement: nvmlComputeInstancePlacement_t { start: found.start, size: found.slices },
        })
    }
}

/// The profile with NVML's enumerator `number`, of a card in MIG mode.
fn numbered_profile(device: &Device, number: u32) -> Answer<&MigProfile> {
    if number >= NVML_GPU_INSTANCE_PROFILE_COUNT {
        return Err(code::INVALID_ARGUMENT);
    }
    let profiles = device.whole_card()?.mig.in_mig_mode()?;
    profiles.iter().find(|profile| profile.profile == number).ok_or(code::NOT_SUPPORTED)
}

/// Fills in version 2 or 3 of the structure, whichever the caller has.
fn put_profile(p: &MigProfile, info: &VersionedOut<nvmlGpuInstanceProfileInfo_v2_t>) -> Answer {
    type Version2 = nvmlGpuInstanceProfileInfo_v2_t;
    type Version3 = nvmlGpuInstanceProfileInfo_v3_t;
    let name = text_field(&format!("MIG {}", p.name));
    if info.is::<Version2>(2) {
        let answer = Version2 {
            version: 2 << 24 | size_of::<Version2>() as u32,
            id: p.id,
            isP2pSupported: 0,
            sliceCount: p.slices,
            instanceCount: p.instances_max,
            multiprocessorCount: p.multiprocessors,
            copyEngineCount: p.copy_engines,
            decoderCount: p.decoders,
            encoderCount: p.encoders,
            jpegCount: p.jpeg_engines,
            ofaCount: p.optical_flow_engines,
            memorySizeMB: p.memory_mib,
            name,
        };
        // SAFETY: the version was checked just above.
        unsafe { info.put_as(answer) }
    } else if info.is::<Version3>(3) {
        let answer = Version3 {
            version: 3 << 24 | size_of::<Version3>() as u32,
            id: p.id,
            sliceCount: p.slices,
            instanceCount: p.instances_max,
            multiprocessorCount: p.multiprocessors,
            copyEngineCount: p.copy_engines,
            decoderCount: p.decoders,
            encoderCount: p.encoders,
            jpegCount: p.jpeg_engines,
            ofaCount: p.optical_flow_engines,
            memorySizeMB: p.memory_mib,
            name,
            capabilities: 0,
        };
        // SAFETY: the version was checked just above.
        unsafe { info.put_as(answer) }
    } else {
        Err(code::ARGUMENT_VERSION_MISMATCH)
    }
}

fn create_gpu_instance(device: &Device, profile: u32, start: Option<u32>) -> Answer<nvmlGpuInstance_t> {
    let card = device.whole_card()?.uuid.clone();
    let id = library::change_card(&card, |card, _| card.mig.create(profile, start))?;
    Ok(library::handle_of(Object::GpuInstance { card, id }))
}

fn create_compute_instance(
    instance: GpuInstanceHandle,
    profile: u32,
    start: Option<u32>,
) -> Answer<nvmlComputeInstance_t> {
    let GpuInstanceHandle { card, id: gpu_instance, .. } = instance;
    let id = library::change_card(&card, |card, _| card.mig.create_compute(gpu_instance, profile, start))?;
    Ok(library::handle_of(Object::ComputeInstance { card, gpu_instance, id }))
}

/// All engines of a GPU instance are shared by its compute instances; there is no other engine profile.
fn compute_profile(gpu: &MigProfile, profile: u32, engines: u32) -> Answer<ComputeProfile> {
    if engines != NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED {
        return Err(code::INVALID_ARGUMENT);
    }
    ComputeProfile::within(gpu, profile)
}

impl GpuInstanceHandle {
    fn profile(&self) -> Answer<&MigProfile> {
        self.card()?.mig.profile(self.instance()?.profile_id)
    }
}
