//! An API server that answers as a test says, and remembers what it was asked.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;

use super::KubeApi;
use crate::clock;

/// A cheap handle. Without answers left it says 200 and an empty object.
#[derive(Clone, Default)]
pub struct FakeApi {
    asked: Arc<Mutex<Vec<String>>>,
    answers: Arc<Mutex<VecDeque<(u16, Value)>>>,
    takes: Duration,
    silent: bool,
}

impl FakeApi {
    /// One that answers so, in this order.
    pub fn answering(answers: impl IntoIterator<Item = (u16, Value)>) -> Self {
        Self { answers: Arc::new(Mutex::new(answers.into_iter().collect())), ..Self::default() }
    }

    /// The same, and each answer takes so long on the monotonic clock.
    #[must_use]
    pub fn taking(self, takes: Duration) -> Self {
        Self { takes, ..self }
    }

    /// One that never answers.
    pub fn silent() -> Self {
        Self { silent: true, ..Self::default() }
    }

    /// A connection to it.
    pub fn connect(&self) -> KubeApi {
        let fake = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let answer = fake.answer(&request);
            let silent = fake.silent;
            async move {
                if silent {
                    std::future::pending::<()>().await;
                }
                Ok::<_, Infallible>(answer)
            }
        });
        KubeApi::from_client(Client::new(service, "default"))
    }

    fn answer(&self, request: &Request<Body>) -> Response<Body> {
        self.asked.lock().unwrap().push(format!("{} {}", request.method(), request.uri()));
        clock::passed::pass(self.takes);
        let (status, body) = self.answers.lock().unwrap().pop_front().unwrap_or((200, json!({})));
        Response::builder().status(status).body(Body::from(body.to_string().into_bytes())).unwrap()
    }

    /// Method and path of each request.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// An answer that is none.
pub fn failure(code: u16, reason: &str) -> (u16, Value) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "no"});
    (code, status)
}
