//! The ledger's shell: the API server's side (store, watches, receipts) and the broker around the core's rules.

pub mod actor;
pub mod convert;
pub mod display;
pub mod durations;
pub mod findings;
pub mod grants;
pub mod identities;
pub mod known;
pub mod node_messages;
pub mod pages;
pub mod policy;
pub mod ports;
pub mod pressure;
pub mod receipt;
pub mod records;
pub mod retention;
pub mod seen;
pub mod store;
pub mod watches;
