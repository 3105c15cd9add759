//! Test equipment: NVML's C interface over a JSON state file.
//!
//! Built as `libstandin_nvml.so`, it is loaded in the place of `libnvidia-ml.so.1` on a machine that has no card, so
//! that the whole agent runs there unchanged (N21). What the cards are and what happens to them stands in a
//! state file that the library looks at on every call; see [`State`].
//!
//! Built as a Rust library, it gives tests and the local cluster's tooling the types of that file:
//!
//! ```no_run
//! use standin_nvml::State;
//! # fn main() -> Result<(), standin_nvml::StoreError> {
//! let path = std::path::Path::new("/run/spaceport-standin/state.json");
//! State::h200(2).save(path)?;
//! State::update(path, |state| state.cards[1].push_xid(79))?;
//! # Ok(())
//! # }
//! ```

mod abi;
mod catalog;
mod library;
mod mig;
mod nodes;
mod processes;
mod state;
mod store;

pub use nodes::{DeviceNode, NVIDIA_MAJOR, NVIDIACTL_MINOR, UVM_MAJOR, device_nodes};
pub use processes::{announce_process, process_file, withdraw_process};
pub use state::{
    Card, ComputeInstance, Ecc, Event, EventKind, GpuInstance, Mig, MigProfile, Process, RecoveryAction, RemappedRows,
    State,
};
pub use store::{DEFAULT_STATE_PATH, STATE_PATH_VARIABLE, StoreError};
