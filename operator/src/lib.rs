//! The operator: leader election, the lease broker with its ledger, the link to node agents, and the controllers.
//!
//! `runtime` starts everything; `kubeapi` alone talks to the API server; `ledger` owns the pages (ledger.md),
//! `account` keeps their objects.

pub mod account;
pub mod admin;
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

/// An error with its sources on one line, for logs: Display of our errors never repeats the source.
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
