//! Rules of the ledger, each as a story in a world with one node: a module is a subject, and all share the world.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails by panicking, also in its helpers"
)]

mod accounting;
mod fail_over;
mod handover;
mod idle;
mod limits;
mod places;
mod queue;
mod slots;
mod terms;
mod waiting;
mod world;
mod writes;
