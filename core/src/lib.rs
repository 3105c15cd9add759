//! The pure rules of Spaceport: ledger, quota, queue, slots and the device API's wire contract. No I/O, no clock, no
//! randomness: they come in as arguments, so that every history can be replayed (ARCHITECTURE.md).

pub mod ids;
pub mod lease;
pub mod page;
pub mod protocol;
pub mod queue;
pub mod quota;
pub mod slots;
pub mod stage;
