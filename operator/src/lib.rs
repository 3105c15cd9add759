//! The operator: leader election, the lease broker with its ledger, the link to node agents, and the controllers.
//!
//! `runtime` starts everything; `kubeapi` alone talks to the API server; `ledger` owns the pages (docs/rules.md),
//! `account` keeps their objects, `status` tells on tiers, pools and grants what became of them.

pub mod account;
pub mod args;
pub mod clock;
pub mod credentials;
pub mod fault;
pub mod identity;
pub mod kubeapi;
pub mod leader;
pub mod ledger;
pub mod metrics;
pub mod node_link;
pub mod runtime;
pub mod space;
pub mod status;
