//! The admin endpoint: `/metrics`, `/readyz` with a line per condition, `/livez`.

use std::fmt;
use std::future::ready;
use std::net::SocketAddr;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::readiness::Readiness;

/// Where the admin endpoint is.
#[derive(Debug, Args)]
pub struct AdminArgs {
    /// Address of the admin endpoint: /metrics, /readyz, /livez.
    #[arg(long, env = "SPACEPORT_ADMIN_LISTEN", default_value = "0.0.0.0:8080")]
    pub admin_listen: SocketAddr,
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

/// Further routes of the endpoint.
pub type Routes = Router;

type MetricsAnswer = Result<([(&'static str, &'static str); 1], String), StatusCode>;

/// Binds the address, so that a wrong one is an error before anything is served.
///
/// # Errors
/// [`AdminError::Bind`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, AdminError> {
    TcpListener::bind(address).await.map_err(|source| AdminError::Bind { address, source })
}

/// Serves until `stop`. `metrics` renders what the process counts, as OpenMetrics text, at each request. `further` are the
/// routes of builds for tests; no other build has any.
///
/// # Errors
/// [`AdminError::Serve`].
pub async fn serve(
    listener: TcpListener,
    metrics: impl Fn() -> Result<String, fmt::Error> + Clone + Send + Sync + 'static,
    readiness: Readiness,
    further: Routes,
    stop: CancellationToken,
) -> Result<(), AdminError> {
    axum::serve(listener, router(metrics, readiness).merge(further))
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
        .map_err(AdminError::Serve)
}

fn router(
    metrics: impl Fn() -> Result<String, fmt::Error> + Clone + Send + Sync + 'static,
    readiness: Readiness,
) -> Router {
    Router::new()
        .route("/metrics", get(move || ready(metrics_answer(metrics()))))
        .route("/readyz", get(move || ready(readyz(&readiness))))
        // That it answers is the answer: a dead task ends the process (tasks.rs).
        .route("/livez", get(|| ready("ok\n")))
}

fn metrics_answer(rendered: Result<String, fmt::Error>) -> MetricsAnswer {
    let text = rendered.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}

fn readyz(readiness: &Readiness) -> (StatusCode, String) {
    let (ready, text) = readiness.report();
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use axum::http::header::CONTENT_TYPE;
    use clap::Command;
    use tower::ServiceExt as _;

    use super::*;

    fn readiness() -> Readiness {
        Readiness::new(|_, _| {})
    }

    async fn ask(router: Router, path: &str) -> (StatusCode, String, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let answer = router.oneshot(request).await.unwrap();
        let status = answer.status();
        let content_type = answer.headers().get(CONTENT_TYPE).map_or("", |value| value.to_str().unwrap()).to_owned();
        let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        (status, content_type, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn ready_and_alive_are_two_questions() {
        let readiness = readiness();
        let (watches, link) = (readiness.condition("watches"), readiness.condition("node-link"));
        let router = || router(|| Ok(String::new()), readiness.clone());
        watches.set(true);
        let (status, _, text) = ask(router(), "/readyz").await;
        assert_eq!((status, text.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "[-]node-link not yet\n[+]watches ok\n"));
        let (status, _, text) = ask(router(), "/livez").await;
        assert_eq!((status, text.as_str()), (StatusCode::OK, "ok\n"));
        link.set(true);
        assert_eq!(ask(router(), "/readyz").await.0, StatusCode::OK);
        watches.set(false);
        assert_eq!(ask(router(), "/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test]
    async fn metrics_are_rendered_at_each_request() {
        let (status, content_type, text) = ask(router(|| Ok("# EOF\n".to_owned()), readiness()), "/metrics").await;
        assert_eq!((status, text.as_str()), (StatusCode::OK, "# EOF\n"));
        assert_eq!(content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
        let broken = ask(router(|| Err(fmt::Error), readiness()), "/metrics").await;
        assert_eq!(broken.0, StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn its_flag_keeps_its_name_its_environment_twin_and_its_port() {
        let command = AdminArgs::augment_args(Command::new("test"));
        let flag = command.get_arguments().find(|argument| argument.get_long() == Some("admin-listen")).unwrap();
        assert_eq!(flag.get_env().unwrap(), "SPACEPORT_ADMIN_LISTEN");
        assert_eq!(flag.get_default_values(), ["0.0.0.0:8080"]);
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let taken = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind(address).await.unwrap_err();
        assert_eq!(error.to_string(), format!("cannot listen on {address} for the admin endpoint"));
    }
}
