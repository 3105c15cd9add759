//! The admin endpoint: `/metrics`, `/readyz` with a line per gate, `/livez`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Named conditions that must all be met before this replica is ready. A standby is ready: it answers agents.
#[derive(Clone, Default)]
pub struct Readiness {
    /// A std mutex: it is never held across an await.
    gates: Arc<Mutex<BTreeMap<&'static str, bool>>>,
}

/// One condition, to be opened by the part that knows.
#[derive(Clone)]
pub struct Gate {
    readiness: Readiness,
    name: &'static str,
}

/// Why the admin endpoint is not there.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address cannot be used.
    #[error("cannot listen on {address} for the admin endpoint")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What is wrong with it.
        #[source]
        source: std::io::Error,
    },
    /// Serving ended.
    #[error("the admin endpoint failed")]
    Serve(#[source] std::io::Error),
}

// === impl Readiness ===

impl Readiness {
    /// Adds a gate, closed.
    pub fn gate(&self, name: &'static str) -> Gate {
        self.set(name, false);
        Gate { readiness: self.clone(), name }
    }

    fn set(&self, name: &'static str, open: bool) {
        let previous = self.gates.lock().unwrap_or_else(PoisonError::into_inner).insert(name, open);
        if previous.is_some() && previous != Some(open) {
            tracing::info!(gate = name, open, "Readiness changed");
        }
    }

    /// Whether all gates are open, and a line for each.
    pub fn report(&self) -> (bool, String) {
        let gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        for (name, open) in gates.iter() {
            let (mark, state) = if *open { ('+', "ok") } else { ('-', "not yet") };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "[{mark}]{name} {state}");
        }
        (gates.values().all(|open| *open), text)
    }
}

// === impl Gate ===

impl Gate {
    /// The condition is met.
    pub fn open(&self) {
        self.readiness.set(self.name, true);
    }

    /// The condition is no longer met.
    pub fn close(&self) {
        self.readiness.set(self.name, false);
    }
}

/// Binds the address, so that a wrong one is an error at start.
///
/// # Errors
/// [`AdminError::Bind`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, AdminError> {
    TcpListener::bind(address).await.map_err(|source| AdminError::Bind { address, source })
}

/// Serves until `stop`.
///
/// # Errors
/// [`AdminError::Serve`].
pub async fn serve(
    listener: TcpListener,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
) -> Result<(), AdminError> {
    axum::serve(listener, router(metrics, readiness))
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
        .map_err(AdminError::Serve)
}

fn router(metrics: Metrics, readiness: Readiness) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text).with_state(metrics))
        .route("/readyz", get(readyz).with_state(readiness))
        // That it answers is the answer: a dead task ends the process (runtime.rs).
        .route("/livez", get(|| async { "ok\n" }))
}

async fn metrics_text(
    State(metrics): State<Metrics>,
) -> Result<([(&'static str, &'static str); 1], String), StatusCode> {
    let text = metrics.encode().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}

async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, String) {
    let (ready, text) = readiness.report();
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    async fn ask(path: &str, readiness: &Readiness) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let answer = router(Metrics::new(), readiness.clone()).oneshot(request).await.unwrap();
        let status = answer.status();
        let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn ready_when_every_gate_is_open() {
        let readiness = Readiness::default();
        let (watches, link) = (readiness.gate("watches"), readiness.gate("node-link"));
        watches.open();
        assert_eq!(
            ask("/readyz", &readiness).await,
            (StatusCode::SERVICE_UNAVAILABLE, "[-]node-link not yet\n[+]watches ok\n".to_owned())
        );
        link.open();
        assert_eq!(ask("/readyz", &readiness).await.0, StatusCode::OK);
        watches.close();
        assert_eq!(ask("/readyz", &readiness).await.0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(ask("/livez", &readiness).await, (StatusCode::OK, "ok\n".to_owned()));
    }

    #[tokio::test]
    async fn metrics_end_as_the_format_wants() {
        let (status, text) = ask("/metrics", &Readiness::default()).await;
        assert_eq!(status, StatusCode::OK);
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
