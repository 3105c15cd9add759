//! What the operator counts. No label names a user, a Space or a lease: their number has no bound.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Buckets for a compare-and-swap, seconds: from a fast local etcd to the write time limit.
const WRITE_BUCKETS: [f64; 12] = [0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 5.0];

/// One word from a fixed list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    kind: &'static str,
}

/// A node, whose number is that of the cluster, and what is waited for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct QueueLabel {
    node: String,
    reason: &'static str,
}

/// A kind of request to the API server; their number is that of the resources we write.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabel {
    verb: &'static str,
    resource: String,
}

/// All metrics of the process; a cheap handle.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    leases: Family<KindLabel, Counter>,
    denials: Family<KindLabel, Counter>,
    shortened: Family<KindLabel, Counter>,
    queued: Family<QueueLabel, Gauge>,
    worst_wait_over_bound: Gauge<f64, AtomicU64>,
    promises_withdrawn: Counter,
    page_write_seconds: Histogram,
    page_writes: Family<KindLabel, Counter>,
    receipts_pending: Gauge,
    receipt_writes: Family<KindLabel, Counter>,
    write_pressure: Gauge,
    api_mutations: Family<RequestLabel, Counter>,
    malformed_objects: Family<KindLabel, Counter>,
    leader: Gauge,
    epoch: Gauge<u64, AtomicU64>,
    warm: Gauge,
    accounts: Gauge,
    open_leases: Gauge,
    nodes_connected: Gauge,
    nodes_without_pool: Gauge,
    leases_in_doubt: Gauge,
    sessions_refused: Family<KindLabel, Counter>,
    clock_ahead_seconds: Gauge<f64, AtomicU64>,
}

/// How a page write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageWrite {
    /// Written.
    Written,
    /// Another revision was there.
    Conflict,
    /// No answer, or one that proves nothing.
    Unknown,
    /// The account is gone.
    Gone,
    /// The API server refused it.
    Refused,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("spaceport");
        let leases = Family::default();
        registry.register("leases", "Leases that ended, by ending", leases.clone());
        let denials = Family::default();
        registry.register("denials", "Requests that were denied, by kind", denials.clone());
        let shortened = Family::default();
        registry.register(
            "leases_shortened",
            "Leases that were given less than they declare, by reason",
            shortened.clone(),
        );
        let queued = Family::default();
        registry.register("queued_requests", "Requests that wait on a node, by what they wait for", queued.clone());
        let worst_wait_over_bound = Gauge::<f64, AtomicU64>::default();
        registry.register(
            "worst_wait_over_bound",
            "Longest wait of a request for its node in this term, divided by what its caller was told; at most 1",
            worst_wait_over_bound.clone(),
        );
        let promises_withdrawn = Counter::default();
        registry.register(
            "promises_withdrawn",
            "Times that requests were told a later latest start: their node has fewer slots, or no leader was there in time",
            promises_withdrawn.clone(),
        );
        let page_write_seconds = Histogram::new(WRITE_BUCKETS);
        registry.register_with_unit(
            "page_write",
            "Time of one compare-and-swap of a page",
            Unit::Seconds,
            page_write_seconds.clone(),
        );
        let page_writes = Family::default();
        registry.register("page_writes", "Compare-and-swaps of pages, by outcome", page_writes.clone());
        let receipts_pending = Gauge::default();
        registry.register("receipts_pending", "Leases whose receipt is not written", receipts_pending.clone());
        let receipt_writes = Family::default();
        registry.register("receipt_writes", "Writes of receipts, by outcome", receipt_writes.clone());
        let write_pressure = Gauge::default();
        registry.register(
            "write_pressure",
            "1 while the API server can hardly keep up with page writes, and receipts give way",
            write_pressure.clone(),
        );
        let api_mutations = Family::default();
        registry.register(
            "api_mutations",
            "Requests to the API server that may change something, by verb and resource, however they end",
            api_mutations.clone(),
        );
        let malformed_objects = Family::default();
        registry.register("malformed_objects", "Objects seen that cannot be used, by kind", malformed_objects.clone());
        let leader = Gauge::default();
        registry.register("leader", "1 while this replica leads", leader.clone());
        let epoch = Gauge::default();
        registry.register("epoch", "Term of the ledger that this replica leads", epoch.clone());
        let warm = Gauge::default();
        registry.register(
            "warm",
            "1 once this replica was shown everything that a leader decides from: it can lead without reading it",
            warm.clone(),
        );
        let accounts = Gauge::default();
        registry.register("accounts", "Accounts that this replica knows", accounts.clone());
        let open_leases = Gauge::default();
        registry.register(
            "open_leases",
            "Leases of this replica's term that have an open hold, or a slot that is not back yet; 0 where it does not lead",
            open_leases.clone(),
        );
        let nodes_connected = Gauge::default();
        registry.register("nodes_connected", "Node agents with a session here", nodes_connected.clone());
        let nodes_without_pool = Gauge::default();
        registry.register(
            "nodes_without_pool",
            "Nodes of this term whose pool is not known; the defaults apply to them",
            nodes_without_pool.clone(),
        );
        let leases_in_doubt = Gauge::default();
        registry.register(
            "leases_in_doubt",
            "Leases that nodes had when they joined and no known page holds, until their pages are read; they keep their slots",
            leases_in_doubt.clone(),
        );
        let sessions_refused = Family::default();
        registry.register(
            "sessions_refused",
            "Sessions of agents that were refused, by reason",
            sessions_refused.clone(),
        );
        let clock_ahead_seconds = Gauge::default();
        registry.register_with_unit(
            "clock_ahead",
            "How far this clock is ahead of the API server's",
            Unit::Seconds,
            clock_ahead_seconds.clone(),
        );
        Self {
            inner: Arc::new(Inner {
                registry,
                leases,
                denials,
                shortened,
                queued,
                worst_wait_over_bound,
                promises_withdrawn,
                page_write_seconds,
                page_writes,
                receipts_pending,
                receipt_writes,
                write_pressure,
                api_mutations,
                malformed_objects,
                leader,
                epoch,
                warm,
                accounts,
                open_leases,
                nodes_connected,
                nodes_without_pool,
                leases_in_doubt,
                sessions_refused,
                clock_ahead_seconds,
            }),
        }
    }

    /// In the text form that Prometheus reads.
    ///
    /// # Errors
    /// The encoder's; none of the metrics here causes one.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.inner.registry)?;
        Ok(text)
    }

    /// A lease ended; `ending` is the name of a `spaceport_core::page::Ending`.
    pub fn lease_ended(&self, ending: &'static str) {
        self.inner.leases.get_or_create(&KindLabel { kind: ending }).inc();
    }

    /// A request was denied; `kind` is the name of a denial.
    pub fn denied(&self, kind: &'static str) {
        self.inner.denials.get_or_create(&KindLabel { kind }).inc();
    }

    /// A lease was given less than it declares; `kind` is a `ShortenedReason`.
    pub fn shortened(&self, kind: &'static str) {
        self.inner.shortened.get_or_create(&KindLabel { kind }).inc();
    }

    /// Requests that wait on a node.
    pub fn set_queued(&self, node: &str, reason: &'static str, requests: usize) {
        self.inner.queued.get_or_create(&QueueLabel { node: node.to_owned(), reason }).set(gauge(requests));
    }

    /// A term is over: nobody waits here, and nothing is known of its nodes.
    pub fn forget_term(&self) {
        self.inner.queued.clear();
        self.inner.worst_wait_over_bound.set(0.0);
        self.set_nodes_without_pool(0);
        self.set_leases_in_doubt(0);
        self.set_open_leases(0);
    }

    /// A request began after `waited_ms` of at most `bound_ms`.
    pub fn waited(&self, waited_ms: u64, bound_ms: u64) {
        #[allow(clippy::cast_precision_loss)] // Waits that need 53 bits of milliseconds are wrong in any case.
        let ratio = waited_ms as f64 / bound_ms.max(1) as f64;
        if ratio > self.inner.worst_wait_over_bound.get() {
            self.inner.worst_wait_over_bound.set(ratio);
        }
    }

    /// Somebody who waits, or all who wait for a node, were told a later latest start.
    pub fn promises_withdrawn(&self) {
        self.inner.promises_withdrawn.inc();
    }

    /// A compare-and-swap of a page ended after `time`.
    pub fn page_write(&self, outcome: PageWrite, time: Duration) {
        let kind = match outcome {
            PageWrite::Written => "written",
            PageWrite::Conflict => "conflict",
            PageWrite::Unknown => "unknown",
            PageWrite::Gone => "gone",
            PageWrite::Refused => "refused",
        };
        self.inner.page_writes.get_or_create(&KindLabel { kind }).inc();
        self.inner.page_write_seconds.observe(time.as_secs_f64());
    }

    /// Leases whose receipt waits to be written.
    pub fn set_receipts_pending(&self, receipts: usize) {
        self.inner.receipts_pending.set(gauge(receipts));
    }

    /// A write of a receipt ended.
    pub fn receipt_write(&self, succeeded: bool) {
        let kind = if succeeded { "written" } else { "failed" };
        self.inner.receipt_writes.get_or_create(&KindLabel { kind }).inc();
    }

    /// Whether receipts give way to page writes.
    pub fn set_write_pressure(&self, is_high: bool) {
        self.inner.write_pressure.set(i64::from(is_high));
    }

    /// A request that may change something is sent; `resource` as authorization knows it, `gpuaccounts/status`.
    pub fn api_mutation(&self, verb: &'static str, resource: &str) {
        self.inner.api_mutations.get_or_create(&RequestLabel { verb, resource: resource.to_owned() }).inc();
    }

    /// An object of this kind cannot be used.
    pub fn malformed(&self, kind: &'static str) {
        self.inner.malformed_objects.get_or_create(&KindLabel { kind }).inc();
    }

    /// Whether this replica leads.
    pub fn set_leader(&self, leads: bool) {
        self.inner.leader.set(i64::from(leads));
    }

    /// The term of the ledger.
    pub fn set_epoch(&self, epoch: u64) {
        self.inner.epoch.set(epoch);
    }

    /// What this replica was shown: all that a leader needs, and so many accounts.
    pub fn set_shown(&self, is_warm: bool, accounts: usize) {
        self.inner.warm.set(i64::from(is_warm));
        self.inner.accounts.set(gauge(accounts));
    }

    /// Leases of the term.
    pub fn set_open_leases(&self, leases: usize) {
        self.inner.open_leases.set(gauge(leases));
    }

    /// Node agents with a session here.
    pub fn set_nodes_connected(&self, nodes: usize) {
        self.inner.nodes_connected.set(gauge(nodes));
    }

    /// Nodes to which the defaults apply, for want of a pool.
    pub fn set_nodes_without_pool(&self, nodes: usize) {
        self.inner.nodes_without_pool.set(gauge(nodes));
    }

    /// Leases whose pages are being read, because no known one holds them.
    pub fn set_leases_in_doubt(&self, leases: usize) {
        self.inner.leases_in_doubt.set(gauge(leases));
    }

    /// A session of an agent was refused.
    pub fn session_refused(&self, reason: &'static str) {
        self.inner.sessions_refused.get_or_create(&KindLabel { kind: reason }).inc();
    }

    /// How far our clock is ahead of the API server's.
    pub fn set_clock_ahead(&self, milliseconds: i64) {
        #[allow(clippy::cast_precision_loss)] // A clock difference that needs 53 bits is wrong in any case.
        self.inner.clock_ahead_seconds.set(milliseconds as f64 / 1000.0);
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_what_was_counted() {
        let metrics = Metrics::new();
        metrics.lease_ended("Released");
        metrics.denied("QuotaExceeded");
        metrics.shortened("RemainingQuota");
        metrics.set_queued("gpu-1", "Node", 3);
        metrics.page_write(PageWrite::Written, Duration::from_millis(3));
        metrics.page_write(PageWrite::Conflict, Duration::from_millis(3));
        metrics.set_epoch(7);
        metrics.set_leader(true);
        metrics.api_mutation("update", "gpuaccounts/status");
        let text = metrics.encode().unwrap();
        for line in [
            "spaceport_leases_total{kind=\"Released\"} 1",
            "spaceport_denials_total{kind=\"QuotaExceeded\"} 1",
            "spaceport_leases_shortened_total{kind=\"RemainingQuota\"} 1",
            "spaceport_queued_requests{node=\"gpu-1\",reason=\"Node\"} 3",
            "spaceport_page_writes_total{kind=\"conflict\"} 1",
            "spaceport_page_write_seconds_count 2",
            "spaceport_epoch 7",
            "spaceport_api_mutations_total{verb=\"update\",resource=\"gpuaccounts/status\"} 1",
            "spaceport_write_pressure 0",
            "spaceport_leader 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"), "as the format wants: {text}");
    }

    #[test]
    fn nothing_is_said_of_a_term_that_is_over() {
        let metrics = Metrics::new();
        metrics.set_queued("gpu-1", "Node", 3);
        metrics.set_nodes_without_pool(2);
        metrics.set_leases_in_doubt(1);
        metrics.waited(3, 2);
        metrics.forget_term();
        let text = metrics.encode().unwrap();
        assert!(!text.contains("gpu-1"), "{text}");
        for line in
            ["spaceport_nodes_without_pool 0", "spaceport_leases_in_doubt 0", "spaceport_worst_wait_over_bound 0"]
        {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line} in\n{text}");
        }
    }
}
