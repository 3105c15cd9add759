//! Which device majors the gate covers (N8). nvidia's own is fixed, the others are given out by the kernel when the
//! driver is loaded.

use std::collections::BTreeSet;
use std::fs;

use crate::gate::program::NVIDIA_MAJOR;
use crate::inventory::DeviceNodes;

/// Names in `/proc/devices` whose majors are gated.
const NAMES: [&str; 5] = ["nvidia", "nvidia-frontend", "nvidia-uvm", "nvidia-caps", "nvidia-caps-imex-channels"];

/// The majors to cover now: nvidia's, those the kernel names, those of the device nodes that pods are given, and those of
/// the settings.
pub fn gated(proc_devices: &str, nodes: &DeviceNodes, settings: &[u32]) -> BTreeSet<u32> {
    let mut majors = BTreeSet::from([NVIDIA_MAJOR]);
    majors.extend(settings);
    majors.extend(named(proc_devices));
    match nodes.shared() {
        Ok(nodes) => majors.extend(nodes.iter().map(|node| node.device.major)),
        Err(error) => tracing::error!(%error, "The driver's device nodes cannot be looked at"),
    }
    majors
}

/// The text of `/proc/devices`; it is the host's in every container.
pub fn proc_devices() -> String {
    fs::read_to_string("/proc/devices").unwrap_or_else(|error| {
        tracing::error!(%error, "/proc/devices cannot be read");
        String::new()
    })
}

fn named(proc_devices: &str) -> Vec<u32> {
    let characters = proc_devices.split("Block devices:").next().unwrap_or_default();
    characters
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .filter(|(_, name)| NAMES.contains(&name.trim()))
        .filter_map(|(major, _)| major.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_majors_are_taken_and_others_are_left() {
        let text = "Character devices:\n  1 mem\n195 nvidia\n235 nvidia-caps\n511 nvidia-uvm\n\nBlock devices:\n  7 nvidia-uvm\n";
        assert_eq!(named(text), [195, 235, 511]);
        let nodes = DeviceNodes::new("/nonexistent".into());
        assert_eq!(gated("", &nodes, &[120]), BTreeSet::from([120, 195]));
    }
}
