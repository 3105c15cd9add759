//! The cards as leases look at them ([`crate::hardware::Sensors`]).

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use spaceport_shell::error_chain;
use tokio::sync::watch;

use super::{DeviceNodes, InventoryError, NodeInventory, NvmlHandle};
use crate::gate::Device;
use crate::hardware::{SensorError, Sensors};

/// Sensors by way of the NVML thread and the host's `/dev`.
#[derive(Clone, Debug)]
pub struct NodeSensors {
    nvml: NvmlHandle,
    inventory: watch::Receiver<Arc<NodeInventory>>,
    nodes: DeviceNodes,
}

impl NodeSensors {
    /// Puts them together.
    pub fn new(nvml: NvmlHandle, nodes: DeviceNodes) -> Self {
        let inventory = nvml.inventory();
        Self { nvml, inventory, nodes }
    }
}

impl Sensors for NodeSensors {
    fn devices(&self, card: u32) -> Vec<Device> {
        let minor = self.inventory.borrow().card(card).map(|card| card.minor);
        let own = minor.map_or(Ok(None), |minor| self.nodes.card(minor));
        match own.and_then(|own| Ok((own, self.nodes.shared()?))) {
            // A lease without its card's node could open nothing that is of use to it.
            Ok((Some(own), shared)) => shared.into_iter().chain([own]).map(|node| node.device).collect(),
            Ok((None, _)) => {
                tracing::error!(card, minor, "The card has no device node");
                Vec::new()
            }
            Err(error) => {
                tracing::error!(card, minor, %error, "The card's device nodes cannot be looked at");
                Vec::new()
            }
        }
    }

    fn memory_by_process(&self, card: u32) -> Result<Vec<(u32, Option<u64>)>, SensorError> {
        let processes = self.nvml.processes_blocking(card).map_err(|error| refused(card, &error))?;
        Ok(processes.into_iter().map(|process| (process.pid, process.used_bytes)).collect())
    }

    fn is_busy(&self, card: u32, pids: &[u32], window: Duration) -> Result<bool, SensorError> {
        let after_us = now_us().saturating_sub(u64::try_from(window.as_micros()).unwrap_or(u64::MAX));
        let percent = self.nvml.utilisation_blocking(card, pids, after_us).map_err(|error| refused(card, &error))?;
        Ok(percent > 0)
    }
}

fn refused(card: u32, error: &InventoryError) -> SensorError {
    SensorError { card, reason: error_chain(error) }
}

/// The clock with which NVML stamps its samples.
#[allow(clippy::disallowed_methods, reason = "compared with NVML's own stamps, never recorded")]
fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
