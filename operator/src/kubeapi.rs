//! The only caller of kube's client: every request has a time limit, a typed error that says whether it may have been
//! carried out, and no hidden retry.
//!
//! kube 5 retries 429, 503 and 504 up to fifteen times unless told otherwise (`Config::default_retry`). A page write must
//! not be retried inside the client (L2), so it is switched off here for everything.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures::Stream;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::{DeleteParams, ListParams, PartialObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::NamespaceResourceScope;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher;
use kube::{Api, Client, Config, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::clock::{self, ClockDifference};
use crate::metrics::Metrics;

/// Name under which our fields are managed.
pub const FIELD_MANAGER: &str = "spaceport-operator";

/// Reads and ordinary writes: as long as etcd needs to elect a leader and answer, twice over.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Objects per page of a list: large lists do not have to be in memory as one answer.
const LIST_PAGE: u32 = 500;
/// Pages of a list that are read at most; 500 000 objects are more than this system is made for.
const LIST_PAGES_MAX: usize = 1000;

/// What was asked of the API server, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// `get`, `create`, `replace`, …
    pub verb: &'static str,
    /// Kind of the object.
    pub kind: String,
    /// Its name; empty for lists.
    pub name: String,
}

/// Why a request did not succeed. The variants differ in what is known about its effect.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// There is no such object; nothing was done.
    #[error("cannot {call}: there is none")]
    NotFound {
        /// What was asked.
        call: Call,
    },
    /// The object changed since it was read, or is another with the same name; nothing was done.
    #[error("cannot {call}: it has changed meanwhile")]
    Conflict {
        /// What was asked.
        call: Call,
    },
    /// An object of that name exists; nothing was done.
    #[error("cannot {call}: it exists already")]
    Exists {
        /// What was asked.
        call: Call,
    },
    /// The API server said no; nothing was done.
    #[error("cannot {call}: the API server answers {code} {reason}: {message}")]
    Refused {
        /// What was asked.
        call: Call,
        /// HTTP status.
        code: u16,
        /// Reason in the answer.
        reason: String,
        /// Message in the answer.
        message: String,
    },
    /// No answer in time; it may have been carried out.
    #[error("cannot tell whether {call} was done: no answer within {} ms", .limit.as_millis())]
    TimedOut {
        /// What was asked.
        call: Call,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The connection or the server failed; it may have been carried out.
    #[error("cannot tell whether {call} was done")]
    Unknown {
        /// What was asked.
        call: Call,
        /// What failed.
        #[source]
        source: Box<kube::Error>,
    },
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig file is missing or wrong.
    #[error("cannot use the kubeconfig file {path}")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong.
        #[source]
        source: Box<kube::config::KubeconfigError>,
    },
    /// Neither KUBECONFIG nor a service account was found.
    #[error("found neither a kubeconfig nor a service account; give --kubeconfig or run in a pod")]
    Infer(#[source] Box<kube::config::InferConfigError>),
    /// The configuration cannot be used.
    #[error("cannot build a client from the configuration")]
    Client(#[source] Box<kube::Error>),
}

/// A handle on the cluster.
#[derive(Clone)]
pub struct KubeApi {
    client: Client,
    /// Counts what changes something; none where nobody reads it.
    metrics: Option<Metrics>,
}

/// Pauses between tries to watch: at most 3 s, because a leader grants nothing before its own watch has shown its term, and
/// random, because every replica and agent tries again when an API server comes back.
struct WatchBackoff(backon::ExponentialBackoff);

impl WatchBackoff {
    fn new() -> Self {
        let builder = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(3))
            .with_jitter()
            .without_max_times();
        Self(builder.build())
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next()
    }
}

impl Backoff for WatchBackoff {
    fn reset(&mut self) {
        *self = Self::new();
    }
}

/// The objects of one kind, in one namespace or in the cluster.
#[derive(Clone)]
pub struct Objects<K> {
    api: Api<K>,
    /// The same objects, of which only the metadata is read from answers.
    metadata: Api<PartialObjectMeta<K>>,
    metrics: Option<Metrics>,
}

// === impl Call ===

impl fmt::Display for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.verb, self.kind)?;
        if self.name.is_empty() { Ok(()) } else { write!(formatter, " {}", self.name) }
    }
}

// === impl ApiError ===

impl ApiError {
    /// True if the request certainly had no effect.
    pub fn is_without_effect(&self) -> bool {
        match self {
            Self::NotFound { .. } | Self::Conflict { .. } | Self::Exists { .. } | Self::Refused { .. } => true,
            Self::TimedOut { .. } | Self::Unknown { .. } => false,
        }
    }

    /// True if the API server has too much to do: it sent the request away, or did not answer, or gave up.
    pub fn is_overload(&self) -> bool {
        match self {
            Self::Refused { code, .. } => *code == 429,
            Self::TimedOut { .. } | Self::Unknown { .. } => true,
            Self::NotFound { .. } | Self::Conflict { .. } | Self::Exists { .. } => false,
        }
    }

    fn from_kube(call: Call, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => match (status.code, status.reason.as_str()) {
                (404, _) => Self::NotFound { call },
                (409, "AlreadyExists") => Self::Exists { call },
                (409, _) => Self::Conflict { call },
                // Every other 4xx is an answer given before anything is stored.
                (400..=499, _) => {
                    Self::Refused { call, code: status.code, reason: status.reason, message: status.message }
                }
                // 5xx: the server may have given up waiting for a write that etcd carries out.
                _ => Self::Unknown { call, source: Box::new(kube::Error::Api(status)) },
            },
            // The request could not be built: it never left.
            kube::Error::BuildRequest(error) => Self::Refused {
                call,
                code: 0,
                reason: "NotSent".to_owned(),
                message: format!("the request cannot be built: {error}"),
            },
            other => Self::Unknown { call, source: Box::new(other) },
        }
    }
}

// === impl KubeApi ===

impl KubeApi {
    /// Connects by the given kubeconfig file, else by what kube finds (KUBECONFIG, then the pod's service account).
    ///
    /// # Errors
    /// See [`ConnectError`]. The cluster itself is not asked anything yet.
    pub async fn connect(kubeconfig: Option<&Path>) -> Result<Self, ConnectError> {
        let mut config = match kubeconfig {
            Some(path) => {
                let wrong =
                    |source| ConnectError::Kubeconfig { path: path.display().to_string(), source: Box::new(source) };
                let file = Kubeconfig::read_from(path).map_err(wrong)?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)?
            }
            None => Config::infer().await.map_err(|error| ConnectError::Infer(Box::new(error)))?,
        };
        config.default_retry = false;
        let client = Client::try_from(config).map_err(|error| ConnectError::Client(Box::new(error)))?;
        Ok(Self::from_client(client))
    }

    /// Wraps a client that was made elsewhere. It must have been made with `default_retry: false` (L2).
    pub fn from_client(client: Client) -> Self {
        Self { client, metrics: None }
    }

    /// The same, and each request that may change something is counted, however it ends.
    #[must_use]
    pub fn counted_by(self, metrics: Metrics) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// The objects of a kind in the whole cluster.
    pub fn cluster<K>(&self) -> Objects<K>
    where
        K: Resource,
        K::DynamicType: Default,
    {
        Objects {
            api: Api::all(self.client.clone()),
            metadata: Api::all(self.client.clone()),
            metrics: self.metrics.clone(),
        }
    }

    /// The objects of a kind in one namespace.
    pub fn namespace<K>(&self, namespace: &str) -> Objects<K>
    where
        K: Resource<Scope = NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Objects {
            api: Api::namespaced(self.client.clone(), namespace),
            metadata: Api::namespaced(self.client.clone(), namespace),
            metrics: self.metrics.clone(),
        }
    }

    /// Asks the API server whose token this is, for one audience.
    ///
    /// # Errors
    /// The review could not be made; says nothing about the token.
    pub async fn review_token(&self, token: &str, audience: &str) -> Result<TokenReviewStatus, ApiError> {
        let call = Call { verb: "create", kind: "TokenReview".to_owned(), name: String::new() };
        let review = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![audience.to_owned()]) },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        if let Some(metrics) = &self.metrics {
            metrics.api_mutation("create", "tokenreviews");
        }
        let reviewed = limited(call, REQUEST_TIMEOUT, api.create(&PostParams::default(), &review)).await?;
        Ok(reviewed.status.unwrap_or_default())
    }

    /// How far our wall clock is from the API server's, from the `Date` header of a small answer (L20).
    ///
    /// # Errors
    /// The request failed, or the answer has no readable `Date`.
    pub async fn clock_difference(&self) -> Result<ClockDifference, ApiError> {
        let call = Call { verb: "get", kind: "/version".to_owned(), name: String::new() };
        let request = axum::http::Request::get("/version")
            .body(kube::client::Body::empty())
            .map_err(|error| ApiError::from_kube(call.clone(), kube::Error::HttpError(error)))?;
        let sent = clock::wall();
        let answer = limited(call.clone(), REQUEST_TIMEOUT, self.client.send(request)).await?;
        let received = clock::wall();
        let date = answer.headers().get(axum::http::header::DATE).and_then(|value| value.to_str().ok());
        date.and_then(|date| ClockDifference::measure(sent, received, date)).ok_or_else(|| ApiError::Refused {
            call,
            code: answer.status().as_u16(),
            reason: "NoDate".to_owned(),
            message: format!("the answer's Date header cannot be read: {date:?}"),
        })
    }
}

// === impl Objects ===

impl<K> Objects<K>
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug,
    K::DynamicType: Default,
{
    fn call(&self, verb: &'static str, name: &str) -> Call {
        Call { verb, kind: K::kind(&K::DynamicType::default()).into_owned(), name: name.to_owned() }
    }

    /// Counts a request that may change something, by the verb and resource that authorization knows it by.
    fn changes(&self, verb: &'static str, subresource: &str) {
        if let Some(metrics) = &self.metrics {
            metrics.api_mutation(verb, &format!("{}{subresource}", K::plural(&K::DynamicType::default())));
        }
    }

    /// The object as it is now (a quorum read), or none.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn get(&self, name: &str) -> Result<Option<K>, ApiError> {
        limited(self.call("get", name), REQUEST_TIMEOUT, self.api.get_opt(name)).await
    }

    /// All objects, or those with the given labels.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn list(&self, labels: Option<&str>) -> Result<Vec<K>, ApiError> {
        let mut parameters = ListParams::default().limit(LIST_PAGE);
        parameters.label_selector = labels.map(str::to_owned);
        let mut all = Vec::new();
        for _ in 0..LIST_PAGES_MAX {
            let page = limited(self.call("list", ""), REQUEST_TIMEOUT, self.api.list(&parameters)).await?;
            all.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters.continue_token = Some(token),
                None => return Ok(all),
            }
        }
        Err(ApiError::Refused {
            call: self.call("list", ""),
            code: 0,
            reason: "TooMany".to_owned(),
            message: format!("there are more than {} objects", u64::from(LIST_PAGE) * LIST_PAGES_MAX as u64),
        })
    }

    /// Watches for ever: lists first, then every change; errors are reported and followed by a new try with back-off.
    pub fn watch(
        &self,
        config: watcher::Config,
    ) -> impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + use<K>
    where
        K: Send + 'static,
        K::DynamicType: Send,
    {
        use kube::runtime::WatchStreamExt as _;
        watcher(self.api.clone(), config).backoff(WatchBackoff::new())
    }

    /// Creates an object.
    ///
    /// # Errors
    /// See [`ApiError`]; [`ApiError::Exists`] if there is one.
    pub async fn create(&self, object: &K) -> Result<K, ApiError>
    where
        K: Serialize,
    {
        let name = object.meta().name.clone().unwrap_or_default();
        self.changes("create", "");
        limited(self.call("create", &name), REQUEST_TIMEOUT, self.api.create(&post_parameters(), object)).await
    }

    /// Replaces an object; with a resourceVersion in it, only that version.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn replace(&self, object: &K, limit: Duration) -> Result<K, ApiError>
    where
        K: Serialize,
    {
        let name = object.meta().name.clone().unwrap_or_default();
        self.changes("update", "");
        limited(self.call("replace", &name), limit, self.api.replace(&name, &post_parameters(), object)).await
    }

    /// Writes the status of an object by PUT. `body` carries apiVersion, kind, metadata (name, uid, resourceVersion: the
    /// compare of the compare-and-swap) and status; the API server takes nothing else from it.
    ///
    /// # Errors
    /// See [`ApiError`]; [`ApiError::Conflict`] if uid or resourceVersion is another.
    pub async fn put_status(
        &self,
        name: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<PartialObjectMeta<K>, ApiError> {
        let parameters = post_parameters();
        self.changes("update", "/status");
        let write = self.metadata.replace_subresource("status", name, &parameters, body);
        limited(self.call("replace the status of", name), limit, write).await
    }

    /// Writes fields of an object's metadata by a merge patch; with a resourceVersion among them, only of that version.
    ///
    /// # Errors
    /// See [`ApiError`]; [`ApiError::Conflict`] if the resourceVersion is another.
    pub async fn patch_metadata(
        &self,
        name: &str,
        metadata: &impl Serialize,
    ) -> Result<PartialObjectMeta<K>, ApiError> {
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(serde_json::json!({ "metadata": metadata }));
        self.changes("patch", "");
        let write = self.api.patch_metadata(name, &parameters, &patch);
        limited(self.call("patch the metadata of", name), REQUEST_TIMEOUT, write).await
    }

    /// Writes by server-side apply, taking over fields that others set.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn apply(&self, object: &K) -> Result<K, ApiError>
    where
        K: Serialize,
    {
        let name = object.meta().name.clone().unwrap_or_default();
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(object);
        self.changes("patch", "");
        let write = self.api.patch(&name, &parameters, &patch);
        limited(self.call("apply", &name), REQUEST_TIMEOUT, write).await
    }

    /// Deletes an object, if it still is the one with this uid. It is no error if it is gone already.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn delete(&self, name: &str, uid: &str) -> Result<(), ApiError> {
        let parameters = DeleteParams {
            preconditions: Some(Preconditions { uid: Some(uid.to_owned()), resource_version: None }),
            ..DeleteParams::background()
        };
        self.changes("delete", "");
        match limited(self.call("delete", name), REQUEST_TIMEOUT, self.api.delete(name, &parameters)).await {
            Ok(_) | Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes, in one request, the objects of the namespace whose `label` has one of `values`; says how many there were.
    /// Without a value nothing is asked: an empty selector would mean all objects.
    ///
    /// # Errors
    /// See [`ApiError`]; some of them may be gone then.
    pub async fn delete_labelled(&self, label: &str, values: &[&str]) -> Result<usize, ApiError> {
        if values.is_empty() {
            return Ok(0);
        }
        let selected = ListParams::default().labels(&format!("{label} in ({})", values.join(",")));
        self.changes("deletecollection", "");
        let parameters = DeleteParams::background();
        let deletion = self.api.delete_collection(&parameters, &selected);
        // The answer lists them, or only says that it was done.
        let deleted = limited(self.call("delete a collection of", ""), REQUEST_TIMEOUT, deletion).await?;
        Ok(deleted.left().map_or(values.len(), |deleted| deleted.items.len()))
    }
}

fn post_parameters() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

async fn limited<T>(
    call: Call,
    limit: Duration,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(limit, request).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(ApiError::from_kube(call, error)),
        Err(_) => Err(ApiError::TimedOut { call, limit }),
    }
}

/// Waits, or returns false at once when it is time to stop.
pub async fn pause(time: Duration, stop: &CancellationToken) -> bool {
    tokio::select! {
        () = tokio::time::sleep(time) => true,
        () = stop.cancelled() => false,
    }
}

#[cfg(test)]
pub mod fake;

#[cfg(test)]
mod tests {
    use kube::core::Status;
    use serde_json::json;
    use spaceport_crds::{GPULease, GPULeaseSpec};

    use super::fake::{FakeApi, failure};
    use super::*;

    fn classified(code: u16, reason: &str) -> ApiError {
        let call = Call { verb: "get", kind: "Lease".to_owned(), name: "x".to_owned() };
        let status = Status::failure("why", reason).with_code(code);
        ApiError::from_kube(call, kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn answers_say_what_is_known_about_the_effect() {
        assert!(matches!(classified(404, "NotFound"), ApiError::NotFound { .. }));
        assert!(matches!(classified(409, "Conflict"), ApiError::Conflict { .. }));
        assert!(matches!(classified(409, "AlreadyExists"), ApiError::Exists { .. }));
        assert!(matches!(classified(422, "Invalid"), ApiError::Refused { code: 422, .. }));
        assert!(matches!(classified(429, "TooManyRequests"), ApiError::Refused { code: 429, .. }));
        for code in [500, 503, 504] {
            assert!(!classified(code, "Timeout").is_without_effect(), "{code} proves nothing");
        }
    }

    #[tokio::test]
    async fn requests_that_may_change_something_are_counted_however_they_end() {
        let fake = FakeApi::answering([failure(409, "AlreadyExists"), failure(404, "NotFound"), failure(429, "Busy")]);
        let metrics = Metrics::new();
        let receipts = fake.connect().counted_by(metrics.clone()).namespace::<GPULease>("demo");
        assert!(receipts.create(&GPULease::new("a", GPULeaseSpec::default())).await.is_err());
        assert_eq!(receipts.get("a").await.unwrap(), None);
        let sent_away = receipts.put_status("a", &json!({}), REQUEST_TIMEOUT).await.unwrap_err();
        assert!(sent_away.is_overload() && sent_away.is_without_effect());
        let text = metrics.encode().unwrap();
        let counted: Vec<&str> =
            text.lines().filter(|line| line.starts_with("spaceport_api_mutations_total")).collect();
        let mut expected = [
            "spaceport_api_mutations_total{verb=\"create\",resource=\"gpuleases\"} 1",
            "spaceport_api_mutations_total{verb=\"update\",resource=\"gpuleases/status\"} 1",
        ];
        expected.sort_by_key(|line| counted.iter().position(|found| found == line));
        assert_eq!(counted, expected, "and the read is not");
    }

    #[tokio::test]
    async fn many_receipts_are_deleted_by_one_request_and_none_by_none() {
        let deleted =
            json!({"apiVersion": "spaceport.dev/v1alpha1", "kind": "GPULeaseList", "metadata": {}, "items": []});
        let fake = FakeApi::answering([(200, deleted)]);
        let receipts = fake.connect().namespace::<GPULease>("demo");
        assert_eq!(receipts.delete_labelled("spaceport.dev/lease", &[]).await.unwrap(), 0);
        assert_eq!(fake.asked(), [""; 0], "an empty selector would mean all of them");
        assert_eq!(receipts.delete_labelled("spaceport.dev/lease", &["01a", "01b"]).await.unwrap(), 0);
        let asked = fake.asked();
        assert_eq!(asked.len(), 1);
        let path = "DELETE /apis/spaceport.dev/v1alpha1/namespaces/demo/gpuleases?";
        let selector = "labelSelector=spaceport.dev%2Flease+in+%2801a%2C01b%29";
        assert!(asked[0].starts_with(path) && asked[0].contains(selector), "{asked:?}");
    }

    #[test]
    fn messages_name_the_object_but_not_the_source() {
        assert_eq!(classified(409, "Conflict").to_string(), "cannot get Lease x: it has changed meanwhile");
        assert_eq!(classified(503, "Unavailable").to_string(), "cannot tell whether get Lease x was done");
    }
}
