//! The fault by which a build for tests breaks its process on purpose. Which faults there are, and that only builds with
//! the feature `faults` know them, is said by the crate that has them.

use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::routing::{get, put};
use clap::ValueEnum;

/// The fault that is chosen now; none in any process that people use. For a static.
#[derive(Debug)]
pub struct Chosen<F>(Mutex<Option<F>>);

impl<F: Copy + Debug + PartialEq> Chosen<F> {
    /// None yet.
    pub const fn none() -> Self {
        Self(Mutex::new(None))
    }

    /// Chooses until the next choice or the end of the process, which says so in its log.
    pub fn choose(&self, fault: Option<F>) {
        if let Some(fault) = fault {
            tracing::error!(?fault, "Broken on purpose: this is a build for tests");
        }
        *self.lock() = fault;
    }

    /// The one that is chosen.
    pub fn get(&self) -> Option<F> {
        *self.lock()
    }

    /// True if this fault is chosen.
    pub fn is(&self, fault: F) -> bool {
        self.get() == Some(fault)
    }

    fn lock(&self) -> MutexGuard<'_, Option<F>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `GET /fault` says which is chosen, `PUT /fault/NAME` chooses one, `DELETE /fault` none: to put a build for tests into a
/// cluster takes many times as long as the story that is told on it.
pub fn routes<F: Copy + Debug + PartialEq + ValueEnum + Send + 'static>(chosen: &'static Chosen<F>) -> Router {
    let choose = move |fault| {
        chosen.choose(fault);
        told(chosen)
    };
    let asked = async move |Path(name): Path<String>| match F::from_str(&name, false) {
        Ok(fault) => (StatusCode::OK, choose(Some(fault))),
        Err(error) => (StatusCode::NOT_FOUND, format!("{name:?} is no fault of this program: {error}\n")),
    };
    Router::new()
        .route("/fault", get(async move || told(chosen)).delete(async move || choose(None)))
        .route("/fault/{name}", put(asked))
}

fn told<F: Copy + Debug + PartialEq + ValueEnum>(chosen: &Chosen<F>) -> String {
    let value = chosen.get().and_then(|fault| fault.to_possible_value());
    value.map_or_else(|| "none\n".to_owned(), |value| format!("{}\n", value.get_name()))
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
    enum Fault {
        ForgetsAll,
        KnowsAll,
    }

    async fn ask(chosen: &'static Chosen<Fault>, method: &str, path: &str) -> (StatusCode, String) {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let answer = routes(chosen).oneshot(request).await.unwrap();
        let status = answer.status();
        let body = to_bytes(answer.into_body(), 1_000).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn only_the_chosen_fault_is_there_until_another_is_chosen() {
        static CHOSEN: Chosen<Fault> = Chosen::none();
        assert_eq!(ask(&CHOSEN, "GET", "/fault").await, (StatusCode::OK, "none\n".to_owned()));
        CHOSEN.choose(Some(Fault::ForgetsAll));
        assert_eq!(ask(&CHOSEN, "GET", "/fault").await.1, "forgets-all\n");
        assert_eq!(ask(&CHOSEN, "PUT", "/fault/knows-all").await, (StatusCode::OK, "knows-all\n".to_owned()));
        assert!(CHOSEN.is(Fault::KnowsAll) && !CHOSEN.is(Fault::ForgetsAll));
        let (status, said) = ask(&CHOSEN, "PUT", "/fault/knows-nothing").await;
        assert!(status == StatusCode::NOT_FOUND && said.contains("knows-nothing"), "{status} {said}");
        assert!(CHOSEN.is(Fault::KnowsAll), "a name that is none changes nothing");
        assert_eq!(ask(&CHOSEN, "DELETE", "/fault").await.1, "none\n");
        assert_eq!(CHOSEN.get(), None);
    }
}
