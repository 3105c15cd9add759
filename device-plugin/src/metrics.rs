//! Numbers for `/metrics`.

use std::sync::Arc;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use spaceport_proto::nodelink::EndKind;

use crate::converge::View;

type Labels = [(&'static str, &'static str); 1];

/// The agent's metrics; cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    ended: Family<Labels, Counter>,
    refused: Counter,
    slots: Family<Labels, Gauge>,
    queued: Gauge,
    linked: Gauge,
    checkpoint_failures: Counter,
    pods: Gauge,
    left_unseen: Counter,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("spaceport_node");
        let ended = Family::default();
        registry.register("leases_ended", "Leases that ended on this node, by how", ended.clone());
        let refused = Counter::default();
        let text = "Orders that were not taken, or whose lease got no slot in time; nothing is charged";
        registry.register("orders_refused", text, refused.clone());
        let slots = Family::default();
        registry.register("slots", "Slots by state", slots.clone());
        let queued = Gauge::default();
        registry.register("requests_waiting", "Requests of this node's pods without a slot", queued.clone());
        let linked = Gauge::default();
        registry.register("broker_linked", "1 while the node has joined a broker's term", linked.clone());
        let checkpoint_failures = Counter::default();
        let text = "Times the checkpoint could not be written; nothing starts meanwhile";
        registry.register("checkpoint_write_failures", text, checkpoint_failures.clone());
        let pods = Gauge::default();
        registry.register("space_pods_served", "Space pods whose device API is open", pods.clone());
        let left_unseen = Counter::default();
        let text = "Requests given up because their caller had stopped reading the open connection";
        registry.register("callers_left_unseen", text, left_unseen.clone());
        let registry = Arc::new(registry);
        Self { registry, ended, refused, slots, queued, linked, checkpoint_failures, pods, left_unseen }
    }

    /// A lease ended.
    pub fn ended(&self, kind: EndKind) {
        self.ended.get_or_create(&[("how", kind.as_str_name())]).inc();
    }

    /// An order was refused.
    pub fn refused(&self) {
        self.refused.inc();
    }

    /// What the machine shows.
    pub fn observe(&self, view: &View) {
        let count = |state: &'static str, count: usize| {
            // A node has a few dozen slots.
            self.slots.get_or_create(&[("state", state)]).set(count as i64);
        };
        count("running", view.running.len());
        count("leased", view.owned.len());
        count("idle", view.idle.len());
        count("quarantined", view.quarantined.len());
        self.queued.set(view.queued.values().map(|queued| i64::from(*queued)).sum());
    }

    /// A broker's term was joined or lost.
    pub fn linked(&self, linked: bool) {
        self.linked.set(linked.into());
    }

    /// The checkpoint could not be written.
    pub fn checkpoint_failed(&self) {
        self.checkpoint_failures.inc();
    }

    /// A caller that waits has left without closing its connection.
    pub fn left_unseen(&self) {
        self.left_unseen.inc();
    }

    /// One more or one fewer pod is served.
    pub fn pod_served(&self, served: bool) {
        if served {
            self.pods.inc()
        } else {
            self.pods.dec()
        };
    }

    /// OpenMetrics text.
    ///
    /// # Errors
    /// If formatting fails.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_what_was_counted_and_ends_as_the_format_wants() {
        let metrics = Metrics::new();
        metrics.ended(EndKind::Released);
        metrics.refused();
        metrics.linked(true);
        metrics.pod_served(true);
        let text = metrics.encode().unwrap();
        for line in [
            "spaceport_node_leases_ended_total{how=\"END_KIND_RELEASED\"} 1",
            "spaceport_node_orders_refused_total 1",
            "spaceport_node_broker_linked 1",
            "spaceport_node_space_pods_served 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
