//! How a card is divided: what fits where, and which ids come of it.

use crate::{
    Card, ComputeInstance, GpuInstance, Mig, MigProfile, Process, abi::code, catalog::derived_uuid, library::Answer,
};

/// The compute-instance profiles: compute slices, and NVML's number of the profile. Number and id are the same.
const COMPUTE_PROFILES: [(u32, u32); 7] = [(1, 0), (2, 1), (3, 2), (4, 3), (7, 4), (8, 5), (6, 6)];

impl Mig {
    /// The profile with this id, if the card is in MIG mode.
    pub(crate) fn profile(&self, id: u32) -> Answer<&MigProfile> {
        self.in_mig_mode()?.iter().find(|profile| profile.id == id).ok_or(code::INVALID_ARGUMENT)
    }

    /// The card's profiles; NVML tells them only of a card in MIG mode.
    pub(crate) fn in_mig_mode(&self) -> Answer<&[MigProfile]> {
        if self.enabled { Ok(&self.profiles) } else { Err(code::NOT_SUPPORTED) }
    }

    pub(crate) fn gpu_instance(&self, id: u32) -> Option<&GpuInstance> {
        self.gpu_instances.iter().find(|instance| self.enabled && instance.id == id)
    }

    pub(crate) fn gpu_instance_mut(&mut self, id: u32) -> Answer<&mut GpuInstance> {
        self.gpu_instances.iter_mut().find(|instance| instance.id == id).ok_or(code::INVALID_ARGUMENT)
    }

    /// The starts at which one more instance of the profile would fit.
    pub(crate) fn free_starts(&self, profile: &MigProfile) -> Vec<u32> {
        let same = self.gpu_instances.iter().filter(|instance| instance.profile_id == profile.id).count();
        if same >= profile.instances_max as usize {
            return Vec::new();
        }
        let fits = |start: u32| {
            let end = start + profile.placement_size;
            self.gpu_instances.iter().all(|other| end <= other.start || other.start + other.size <= start)
        };
        profile.placement_starts.iter().copied().filter(|start| fits(*start)).collect()
    }

    /// How many more instances of the profile would fit, placed first come first served.
    pub(crate) fn remaining(&self, profile: &MigProfile) -> u32 {
        let mut filled = self.clone();
        let mut remaining = 0;
        // Each turn takes at least one of the 8 memory slices, so this ends.
        while filled.create(profile.id, None).is_ok() {
            remaining += 1;
        }
        remaining
    }

    /// Makes a GPU instance, at `start` or at the free place with the lowest id, and answers its id.
    pub(crate) fn create(&mut self, profile_id: u32, start: Option<u32>) -> Answer<u32> {
        let profile = self.profile(profile_id)?;
        if start.is_some_and(|start| !profile.placement_starts.contains(&start)) {
            return Err(code::INVALID_ARGUMENT);
        }
        let size = profile.placement_size;
        let free = self.free_starts(profile).into_iter().filter(|free| start.is_none_or(|start| start == *free));
        let (id, start) = free.map(|start| (place_id(start, size), start)).min().ok_or(code::INSUFFICIENT_RESOURCES)?;
        self.gpu_instances.push(GpuInstance { id, profile_id, start, size, compute_instances: Vec::new() });
        self.gpu_instances.sort_by_key(|instance| instance.id);
        Ok(id)
    }

    /// Removes an empty GPU instance.
    pub(crate) fn destroy(&mut self, id: u32, on_card: &[Process]) -> Answer {
        let instance = self.gpu_instance_mut(id)?;
        let used = on_card.iter().any(|process| process.gpu_instance_id == Some(id));
        if used || !instance.compute_instances.is_empty() {
            return Err(code::IN_USE);
        }
        self.gpu_instances.retain(|instance| instance.id != id);
        Ok(())
    }

    /// Makes a compute instance of `slices` compute slices, at `start` or where there is room, and answers its id.
    pub(crate) fn create_compute(&mut self, gpu_instance: u32, profile: u32, start: Option<u32>) -> Answer<u32> {
        let found = self.gpu_instance(gpu_instance).ok_or(code::INVALID_ARGUMENT)?;
        let slices = ComputeProfile::within(self.profile(found.profile_id)?, profile)?.slices;
        let total = self.profile(found.profile_id)?.slices;
        let instance = self.gpu_instance_mut(gpu_instance)?;
        let free = instance.free_compute_starts(total, slices);
        let start = free.into_iter().find(|free| start.is_none_or(|start| start == *free));
        let start = start.ok_or(code::INSUFFICIENT_RESOURCES)?;
        let taken = |id: &u32| instance.compute_instance(*id).is_some();
        // A GPU instance has at most 8 compute slices, so one of 8 ids is free.
        let id = (0..8).find(|id| !taken(id)).ok_or(code::INSUFFICIENT_RESOURCES)?;
        instance.compute_instances.push(ComputeInstance { id, start, slices });
        Ok(id)
    }

    /// Removes a compute instance that nothing runs on.
    pub(crate) fn destroy_compute(&mut self, gpu_instance: u32, id: u32, on_card: &[Process]) -> Answer {
        let instance = self.gpu_instance_mut(gpu_instance)?;
        if on_card.iter().any(|process| process.is_on(gpu_instance, id)) {
            return Err(code::IN_USE);
        }
        instance.compute_instances.retain(|compute| compute.id != id);
        Ok(())
    }

    /// The MIG devices, in the order of their index: GPU and compute instance.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (&GpuInstance, &ComputeInstance)> {
        let instances = self.gpu_instances.iter().filter(|_| self.enabled);
        instances.flat_map(|gpu| gpu.compute_instances.iter().map(move |compute| (gpu, compute)))
    }
}

/// The driver numbers places as a binary tree: 0 is the whole card, 1 and 2 its halves, 3 to 6 its quarters. The half
/// that starts at memory slice 4 comes first: it has one compute slice less, so the larger one stays free longer.
fn place_id(start: u32, size: u32) -> u32 {
    8 / size - 1 + (start + 4) % 8 / size
}

impl GpuInstance {
    pub(crate) fn compute_instance(&self, id: u32) -> Option<&ComputeInstance> {
        self.compute_instances.iter().find(|instance| instance.id == id)
    }

    /// The compute slices at which `slices` more would fit, of `total`.
    pub(crate) fn free_compute_starts(&self, total: u32, slices: u32) -> Vec<u32> {
        let fits = |start: u32| {
            self.compute_instances.iter().all(|o| start + slices <= o.start || o.start + o.slices <= start)
        };
        (0..=total.saturating_sub(slices)).filter(|start| fits(*start)).collect()
    }
}

/// A compute-instance profile within a GPU instance.
pub(crate) struct ComputeProfile {
    pub id: u32,
    pub slices: u32,
    pub instances_max: u32,
    pub name: String,
    pub multiprocessors: u32,
}

impl ComputeProfile {
    /// The profile with NVML's number `profile` in a GPU instance of `gpu_profile`; NOT_SUPPORTED if it is too large.
    pub(crate) fn within(gpu_profile: &MigProfile, profile: u32) -> Answer<Self> {
        let slices = COMPUTE_PROFILES.iter().find(|(_, number)| *number == profile).map(|(slices, _)| *slices);
        let slices = slices.ok_or(code::INVALID_ARGUMENT)?;
        // Three of four slices is the one combination that fits and is not offered.
        if slices > gpu_profile.slices || (slices, gpu_profile.slices) == (3, 4) {
            return Err(code::NOT_SUPPORTED);
        }
        let whole = slices == gpu_profile.slices;
        Ok(Self {
            id: profile,
            slices,
            instances_max: gpu_profile.slices / slices,
            name: if whole { gpu_profile.name.clone() } else { format!("{slices}c.{}", gpu_profile.name) },
            multiprocessors: gpu_profile.multiprocessors * slices / gpu_profile.slices,
        })
    }

    /// The profile of a compute instance that exists.
    pub(crate) fn of(gpu_profile: &MigProfile, instance: &ComputeInstance) -> Answer<Self> {
        let profile = COMPUTE_PROFILES.iter().find(|(slices, _)| *slices == instance.slices);
        Self::within(gpu_profile, profile.ok_or(code::UNKNOWN)?.1)
    }
}

impl Card {
    /// The UUID of a MIG device: the same whenever the same place is divided in the same way.
    pub(crate) fn mig_uuid(&self, gpu: &GpuInstance, compute: &ComputeInstance) -> String {
        let numbers = [gpu.id, gpu.profile_id, compute.id, compute.slices].map(u32::to_le_bytes);
        derived_uuid("MIG", &[self.uuid.as_bytes(), &numbers.concat()])
    }
}

impl Process {
    /// Whether it runs on this slice; one that names no compute instance counts for each of its GPU instance.
    pub(crate) fn is_on(&self, gpu_instance: u32, compute_instance: u32) -> bool {
        self.gpu_instance_id == Some(gpu_instance)
            && self.compute_instance_id.is_none_or(|compute| compute == compute_instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divided() -> Mig {
        Mig { enabled: true, ..Mig::default() }
    }

    #[test]
    fn two_halves_fill_a_card() {
        let mut mig = divided();
        assert_eq!(mig.create(9, None), Ok(1));
        assert_eq!(mig.create(9, None), Ok(2));
        assert_eq!(mig.create(9, None), Err(code::INSUFFICIENT_RESOURCES));
        assert_eq!(mig.create(19, None), Err(code::INSUFFICIENT_RESOURCES));
        mig.destroy(1, &[]).unwrap();
        assert_eq!(mig.create(9, Some(0)), Err(code::INSUFFICIENT_RESOURCES));
        assert_eq!(mig.create(9, Some(4)), Ok(1));
    }

    #[test]
    fn capacity_follows_what_is_there() {
        let mut mig = divided();
        let remaining = |mig: &Mig, id| mig.remaining(mig.profile(id).unwrap());
        assert_eq!([19, 20, 15, 14, 9, 5, 0].map(|id| remaining(&mig, id)), [7, 1, 4, 3, 2, 1, 1]);
        mig.create(5, None).unwrap();
        assert_eq!([19, 20, 15, 14, 9, 5, 0].map(|id| remaining(&mig, id)), [3, 1, 2, 1, 1, 0, 0]);
    }

    #[test]
    fn places_have_the_drivers_ids() {
        let mut mig = divided();
        let ids: Vec<_> = (0..7).map(|_| mig.create(19, None).unwrap()).collect();
        assert_eq!(ids, [7, 8, 9, 11, 12, 13, 14]);
        let mut mixed = divided();
        assert_eq!([9, 14, 19, 20].map(|profile| mixed.create(profile, None)), [Ok(1), Ok(5), Ok(13), Ok(14)]);
        assert_eq!(place_id(0, 8), 0);
    }

    #[test]
    fn nothing_is_made_outside_mig_mode() {
        assert_eq!(Mig::default().create(9, None), Err(code::NOT_SUPPORTED));
        assert_eq!(divided().create(77, None), Err(code::INVALID_ARGUMENT));
        assert_eq!(divided().create(9, Some(2)), Err(code::INVALID_ARGUMENT));
    }

    #[test]
    fn a_gpu_instance_is_divided_by_compute_slices() {
        let mut mig = divided();
        mig.create(9, None).unwrap();
        assert_eq!(mig.create_compute(1, 3, None), Err(code::NOT_SUPPORTED));
        assert_eq!(mig.create_compute(1, 1, None), Ok(0));
        assert_eq!(mig.create_compute(1, 0, None), Ok(1));
        assert_eq!(mig.create_compute(1, 0, None), Err(code::INSUFFICIENT_RESOURCES));
        assert_eq!(mig.destroy(1, &[]), Err(code::IN_USE));
        mig.destroy_compute(1, 0, &[]).unwrap();
        mig.destroy_compute(1, 1, &[]).unwrap();
        let process =
            Process { pid: 1, used_bytes: 0, sm_util: 0, gpu_instance_id: Some(1), compute_instance_id: None };
        assert_eq!(mig.destroy(1, &[process]), Err(code::IN_USE));
        assert_eq!(mig.destroy(1, &[]), Ok(()));
    }
}
