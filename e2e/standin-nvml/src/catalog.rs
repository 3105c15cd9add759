//! What a real H200 says about itself, as far as the stand-in repeats it.

use crate::{Card, Mig, MigProfile};

/// What an H200 reports as its total memory: 143771 MiB.
const H200_MEMORY_BYTES: u64 = 143_771 << 20;
/// A driver keeps some hundred MiB for itself; the exact number differs by driver.
const H200_RESERVED_BYTES: u64 = 605 << 20;

impl Card {
    /// The H200 with this NVML index. The same index always gives the same UUID, serial number and bus address.
    pub fn h200(index: u32) -> Self {
        Self {
            index,
            minor: index,
            uuid: derived_uuid("GPU", &[b"h200", &index.to_le_bytes()]),
            name: "NVIDIA H200".into(),
            serial: format!("16418240{index:05}"),
            pci_domain: 0,
            // Bus 0 holds the bridges on real boards.
            pci_bus: index + 1,
            pci_device: 0,
            pci_device_id: 0x2335_10DE,
            pci_sub_system_id: 0x18BE_10DE,
            compute_capability: (9, 0),
            memory_total_bytes: H200_MEMORY_BYTES,
            memory_reserved_bytes: H200_RESERVED_BYTES,
            processes: Vec::new(),
            temperature_celsius: 31,
            power_usage_milliwatts: 76_000,
            power_limit_milliwatts: 700_000,
            ecc: Default::default(),
            remapped_rows: Default::default(),
            recovery_action: Default::default(),
            events: Vec::new(),
            hang: false,
            lost: false,
            unsupported_calls: Vec::new(),
            mig: Mig { enabled: false, profiles: h200_profiles(), gpu_instances: Vec::new() },
        }
    }
}

/// The GPU-instance profiles that an H200 lists, with NVML's ids, engines and memory.
///
/// Engines are in NVML's order: multiprocessors, copy, decode, JPEG, optical flow.
pub(crate) fn h200_profiles() -> Vec<MigProfile> {
    let every_slice: &[u32] = &[0, 1, 2, 3, 4, 5, 6];
    [
        ("1g.18gb", 0, 19, 1, 7, 16_384, [16, 1, 1, 1, 0], 1, every_slice),
        ("1g.18gb+me", 7, 20, 1, 1, 16_384, [16, 1, 1, 1, 1], 1, every_slice),
        ("1g.35gb", 9, 15, 1, 4, 33_024, [26, 1, 1, 1, 0], 2, &[0, 2, 4, 6]),
        ("2g.35gb", 1, 14, 2, 3, 33_024, [32, 2, 2, 2, 0], 2, &[0, 2, 4]),
        ("3g.71gb", 2, 9, 3, 2, 71_168, [60, 3, 3, 3, 0], 4, &[0, 4]),
        ("4g.71gb", 3, 5, 4, 1, 71_168, [64, 4, 4, 4, 0], 4, &[0]),
        ("7g.141gb", 4, 0, 7, 1, 143_360, [132, 8, 7, 7, 1], 8, &[0]),
    ]
    .map(|(name, profile, id, slices, instances_max, memory_mib, engines, placement_size, placement_starts)| {
        let [multiprocessors, copy_engines, decoders, jpeg_engines, optical_flow_engines] = engines;
        MigProfile {
            name: name.into(),
            profile,
            id,
            slices,
            instances_max,
            memory_mib,
            multiprocessors,
            copy_engines,
            decoders,
            encoders: 0,
            jpeg_engines,
            optical_flow_engines,
            placement_size,
            placement_starts: placement_starts.to_vec(),
        }
    })
    .to_vec()
}

/// A name in the form of a UUID that is the same for the same parts, so that a restart changes no identity.
pub(crate) fn derived_uuid(prefix: &str, parts: &[&[u8]]) -> String {
    // FNV-1a over the parts, twice with different starts: 128 bits that differ for different parts. It only has to
    // tell a handful of cards and slices apart.
    let hash = |start: u64| {
        let bytes = parts.iter().flat_map(|part| part.iter().copied().chain([0xFF]));
        bytes.fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3))
    };
    let (high, low) = (hash(0xCBF2_9CE4_8422_2325), hash(0x6C62_272E_07BB_0142));
    format!(
        "{prefix}-{:08x}-{:04x}-5{:03x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xFFFF,
        high & 0xFFF,
        0x8000 | ((low >> 48) & 0x3FFF),
        low & 0xFFFF_FFFF_FFFF
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_stable_and_differ() {
        assert_eq!(Card::h200(0).uuid, Card::h200(0).uuid);
        assert_ne!(Card::h200(0).uuid, Card::h200(1).uuid);
        let uuid = Card::h200(0).uuid;
        assert_eq!(uuid.len(), "GPU-".len() + 36, "{uuid}");
    }

    #[test]
    fn only_one_large_profile_has_two_placements() {
        let halves: Vec<_> = h200_profiles().into_iter().filter(|p| p.placement_starts.len() == 2).collect();
        assert_eq!(halves.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["3g.71gb"]);
    }
}
