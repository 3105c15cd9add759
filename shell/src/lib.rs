//! The imperative shell around the functional core, as far as every process has the same: how it starts its log, tells
//! whether it is ready, runs its tasks and is told to stop. What a process does stands in its own crate.
//!
//! Nothing here knows Kubernetes, leases or cards.

pub mod admin;
pub mod error;
pub mod failpoint;
pub mod fault;
pub mod log;
pub mod readiness;
pub mod signal;
pub mod tasks;

pub use error::error_chain;
