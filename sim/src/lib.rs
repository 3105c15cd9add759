//! A seeded simulation of the ledger: brokers that come and go, node agents, clients, an API server, clocks, and a network
//! that delays, cuts and repeats, in virtual time. After every step the invariants of docs/rules.md are checked.
//!
//! A seed determines everything: `spaceport-sim run --seed S --trace` tells the same history again.

pub mod agenda;
pub mod agent;
pub mod broken;
pub mod broker;
pub mod check;
pub mod coverage;
pub mod links;
#[cfg(feature = "mutants")]
pub mod mutants;
pub mod plan;
pub mod random;
pub mod runs;
pub mod store;
pub mod violation;
pub mod weather;
pub mod world;

pub use plan::Plan;
pub use world::{Told, World};
