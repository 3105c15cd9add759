//! A model check of the lease protocol (docs/decisions/0006): the real ledger of `spaceport_core` in two operator replicas,
//! two nodes, an API server and a network, in every order in which a small number of calls and faults can happen.

pub mod action;
pub mod api;
pub mod bounds;
pub mod broker;
pub mod check;
pub mod cluster;
pub mod names;
pub mod node;
pub mod scenario;
pub mod shared;
pub mod world;
