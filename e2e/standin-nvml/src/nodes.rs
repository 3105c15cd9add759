//! The character devices that a node with these cards has.
//!
//! The tooling of the local cluster makes them with `mknod`; no driver stands behind them. An open that the gate lets
//! through ends in ENXIO, one that it stops in EPERM, and this difference is what the gate's tests look at.

use std::path::PathBuf;

use crate::State;

/// The major number of `nvidiaN` and `nvidiactl`, fixed by the kernel's device list.
pub const NVIDIA_MAJOR: u32 = 195;
/// The minor number of `nvidiactl`.
pub const NVIDIACTL_MINOR: u32 = 255;
/// The major number of the stand-in's `nvidia-uvm` nodes.
///
/// The real one is given out by the kernel at load time. This one is from the kernel's range for local use (120 to
/// 127), which it never gives out, so an open cannot reach some other driver.
pub const UVM_MAJOR: u32 = 120;

/// One character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// Where the node belongs, below `/dev`.
    pub path: PathBuf,
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
}

/// The nodes for the cards of `state`: one `nvidiaN` a card, `nvidiactl`, `nvidia-uvm` and `nvidia-uvm-tools`.
pub fn device_nodes(state: &State) -> Vec<DeviceNode> {
    let node = |name: String, major, minor| DeviceNode { path: PathBuf::from("/dev").join(name), major, minor };
    let cards = state.cards.iter().map(|card| node(format!("nvidia{}", card.minor), NVIDIA_MAJOR, card.minor));
    let shared = [
        node("nvidiactl".into(), NVIDIA_MAJOR, NVIDIACTL_MINOR),
        node("nvidia-uvm".into(), UVM_MAJOR, 0),
        node("nvidia-uvm-tools".into(), UVM_MAJOR, 1),
    ];
    cards.chain(shared).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cards_have_five_nodes() {
        let nodes = device_nodes(&State::h200(2));
        let told: Vec<_> = nodes.iter().map(|n| format!("{} {}:{}", n.path.display(), n.major, n.minor)).collect();
        assert_eq!(
            told,
            [
                "/dev/nvidia0 195:0",
                "/dev/nvidia1 195:1",
                "/dev/nvidiactl 195:255",
                "/dev/nvidia-uvm 120:0",
                "/dev/nvidia-uvm-tools 120:1",
            ]
        );
    }
}
