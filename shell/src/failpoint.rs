//! Places where a build for tests can be made to stand still, so that somebody can be killed exactly there (`cargo xtask test
//! crash`). Which places there are, and that only builds with the feature `faults` have them, is said by the crate that has
//! them. A process stands at one place at a time; its other threads and tasks go on.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::routing::{get, put};
use tokio::runtime::{Handle, RuntimeFlavor};

/// Whoever forgets to let a process go on loses the test, not the machine.
const STANDS_AT_MOST: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
struct State {
    wanted: Option<&'static str>,
    stands: bool,
}

static STATE: Mutex<State> = Mutex::new(State { wanted: None, stands: false });
static CHANGED: Condvar = Condvar::new();

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place is reached: stands still here if somebody wants that. Blocks the thread, as the end of the process would.
pub fn reached(place: &'static str) {
    if state().wanted != Some(place) {
        return;
    }
    let multi = Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    // The other tasks of this thread of the runtime go on elsewhere.
    if multi { tokio::task::block_in_place(|| stand(place)) } else { stand(place) }
}

fn stand(place: &'static str) {
    tracing::error!(place, "Standing still on purpose: this is a build for tests");
    let mut found = state();
    found.stands = true;
    let waited = CHANGED.wait_timeout_while(found, STANDS_AT_MOST, |state| state.wanted == Some(place));
    let (mut found, waited) = waited.unwrap_or_else(PoisonError::into_inner);
    if waited.timed_out() {
        tracing::error!(place, limit = ?STANDS_AT_MOST, "Nobody let this process go on");
        *found = State { wanted: None, stands: false };
    }
}

/// `GET /failpoint` says what is wanted and whether the process stands there, `PUT /failpoint/NAME` wants one of `places`,
/// `DELETE /failpoint` lets the process go on.
pub fn routes(places: &'static [&'static str]) -> Router {
    let asked = async move |Path(name): Path<String>| match places.iter().find(|place| **place == name) {
        Some(place) => (StatusCode::OK, want(Some(place))),
        None => (StatusCode::NOT_FOUND, format!("{name:?} is no place of this program, which has {places:?}\n")),
    };
    Router::new()
        .route("/failpoint", get(async || told()).delete(async || want(None)))
        .route("/failpoint/{name}", put(asked))
}

fn want(place: Option<&'static str>) -> String {
    *state() = State { wanted: place, stands: false };
    CHANGED.notify_all();
    told()
}

fn told() -> String {
    match *state() {
        State { wanted: None, .. } => "none\n".to_owned(),
        State { wanted: Some(place), stands: true } => format!("stands at {place}\n"),
        State { wanted: Some(place), stands: false } => format!("waits for {place}\n"),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    async fn ask(method: &str, path: &str) -> StatusCode {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        routes(&["hold-written", "end-received"]).oneshot(request).await.unwrap().status()
    }

    #[tokio::test]
    async fn a_process_stands_where_it_is_wanted_and_goes_on_when_it_is_let() {
        assert_eq!(ask("PUT", "/failpoint/elsewhere").await, StatusCode::NOT_FOUND);
        assert_eq!(ask("PUT", "/failpoint/hold-written").await, StatusCode::OK);
        reached("end-received");
        assert_eq!(told(), "waits for hold-written\n", "it has passed another place");
        let standing = std::thread::spawn(|| reached("hold-written"));
        while told() != "stands at hold-written\n" {
            std::thread::yield_now();
        }
        assert_eq!(ask("DELETE", "/failpoint").await, StatusCode::OK);
        standing.join().unwrap();
        assert_eq!(told(), "none\n");
    }
}
