//! What is checked of everything that comes from outside: each module is one target, a plain function over bytes.
//!
//! libFuzzer calls it with what it makes up (`fuzz_targets/`, `cargo xtask fuzz`); the tests here call it with the seeds,
//! which are real examples and what was once found. A target panics where something is wrong, and otherwise says how far
//! the bytes came.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)] // Every function here is an assertion.

pub mod account_status;
pub mod checkpoint;
pub mod client;
pub mod device_api;
pub mod ledger;
pub mod nodelink_orders;
pub mod nodelink_reports;
pub mod numbers;
pub mod replay_trace;
pub mod token;
pub mod token_keys;

/// How far the bytes came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They were refused, with a reason.
    Refused,
    /// They were taken, and everything that must hold then holds.
    Taken,
}

#[cfg(test)]
mod tests;
