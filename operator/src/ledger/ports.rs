//! What the broker's actor is connected to: one bounded input for everything that happens, and handles that never make it
//! wait for I/O.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::durations::Durations;
use super::findings::Findings;
use super::receipt::{ReceiptEvent, Receipts};
use super::store::PageStore;
use super::watches::StoreEvent;
use crate::identity::TokenVerifier;
use crate::metrics::Metrics;
use crate::node_link::NodeEvent;

/// Everything that happens outside, in the order in which it reached us.
#[derive(Debug)]
pub enum Input {
    /// On the link to node agents.
    Node(NodeEvent),
    /// On the API server.
    Store(StoreEvent),
    /// In the receipt writer.
    Receipt(ReceiptEvent),
}

impl From<NodeEvent> for Input {
    fn from(event: NodeEvent) -> Self {
        Self::Node(event)
    }
}

impl From<StoreEvent> for Input {
    fn from(event: StoreEvent) -> Self {
        Self::Store(event)
    }
}

impl From<ReceiptEvent> for Input {
    fn from(event: ReceiptEvent) -> Self {
        Self::Receipt(event)
    }
}

/// What the actor is given.
pub struct ActorParts<P = PageStore> {
    /// Everything that happens.
    pub inputs: mpsc::Receiver<Input>,
    /// Whether this replica leads. Until it does, the broker only takes in what it is shown.
    pub leading: watch::Receiver<bool>,
    /// Pages: written and read by tasks of the actor's own, never awaited by it.
    pub store: P,
    /// Takes records of leases without waiting.
    pub receipts: Receipts,
    /// Checks callers' tokens; pure work, no I/O.
    pub verifier: TokenVerifier,
    /// What it counts.
    pub metrics: Metrics,
    /// Where it leaves what it learns of how long functions run.
    pub durations: Durations,
    /// Where it leaves what became of tiers, grants and pools, every few seconds of a term; none while there is no term.
    pub findings: watch::Sender<Option<Arc<Findings>>>,
    /// A clock further off than this from the API server's grants nothing (L20).
    pub clock_skew_max: Duration,
}
