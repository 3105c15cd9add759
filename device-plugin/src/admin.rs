//! The admin endpoint: `/metrics`, `/readyz` with a line per condition, `/livez`.

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

/// Named conditions that must all be met before the agent is ready. A std mutex: it is never held across an await.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, bool>>>);

impl Readiness {
    /// Declares conditions, not met yet.
    pub fn expect(&self, names: &[&'static str]) {
        for name in names {
            self.set(name, false);
        }
    }

    /// Says how a condition is.
    pub fn set(&self, name: &'static str, met: bool) {
        let before = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name, met);
        if before.is_some() && before != Some(met) {
            tracing::info!(condition = name, met, "Readiness changed");
        }
    }

    fn report(&self) -> (bool, String) {
        let conditions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        for (name, met) in conditions.iter() {
            let (mark, state) = if *met { ('+', "ok") } else { ('-', "not yet") };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "[{mark}]{name} {state}");
        }
        (conditions.values().all(|met| *met), text)
    }
}

/// The admin endpoint is not there.
#[derive(Debug, thiserror::Error)]
#[error("the admin endpoint at {address} failed")]
pub struct AdminError {
    /// Its address.
    pub address: SocketAddr,
    /// Why.
    pub source: std::io::Error,
}

/// Serves until `stop`.
///
/// # Errors
/// If the address cannot be used or serving ends.
pub async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
) -> Result<(), AdminError> {
    let failed = |source| AdminError { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    axum::serve(listener, router(metrics, readiness))
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
        .map_err(failed)
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

    #[tokio::test]
    async fn it_is_ready_when_every_condition_is_met() {
        let readiness = Readiness::default();
        readiness.expect(&["gate", "pods"]);
        readiness.set("gate", true);
        let ask = async |path: &str| {
            let request = Request::get(path).body(Body::empty()).unwrap();
            let answer = router(Metrics::new(), readiness.clone()).oneshot(request).await.unwrap();
            let status = answer.status();
            let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
            (status, String::from_utf8(body.to_vec()).unwrap())
        };
        assert_eq!(ask("/readyz").await, (StatusCode::SERVICE_UNAVAILABLE, "[+]gate ok\n[-]pods not yet\n".to_owned()));
        readiness.set("pods", true);
        assert_eq!(ask("/readyz").await.0, StatusCode::OK);
        assert!(ask("/metrics").await.1.ends_with("# EOF\n"));
    }
}
