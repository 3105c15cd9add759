//! What the stories on the local cluster are told with: plain kubectl, unmodified clients, waiting for values.
//!
//! Everything here goes the way a user goes. The cluster is found through two variables that `cargo xtask` sets:
//! `SPACEPORT_KUBECTL` (the kubectl program) and `KUBECONFIG`.

mod admin;
pub mod bench;
mod books;
pub mod breakable;
mod call;
mod component;
pub mod crash_matrix;
pub mod demo;
mod failpoint;
mod kubectl;
mod pod_program;
mod pool;
mod replicas;
pub mod stories;
pub mod story;
mod table;
mod token;
mod wait;
mod world;

pub use call::{Answer, CallError};
pub use kubectl::{Kubectl, at};
pub use token::Token;
pub use wait::eventually;
pub use world::World;
