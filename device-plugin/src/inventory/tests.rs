//! Cards for tests.

use super::{Card, Health};

/// Memory of an H200.
pub(crate) const H200_BYTES: u64 = 150_754_820_096;

/// A healthy H200.
pub(crate) fn h200(index: u32) -> Card {
    Card {
        index,
        nvml_index: index,
        minor: index,
        uuid: format!("GPU-{index}"),
        model: "NVIDIA H200".to_owned(),
        memory_total_bytes: H200_BYTES,
        compute_capability: Some("9.0".to_owned()),
        mig_enabled: false,
        health: Health::Healthy,
    }
}
