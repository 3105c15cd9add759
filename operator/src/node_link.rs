//! The link to node agents: a gRPC server with TLS whose clients prove by a pod-bound service-account token which node
//! they are on. One live session a node; what agents say goes to the broker, in order, as [`NodeEvent`]s.
//!
//! A replica that does not lead answers `Standby` and keeps the stream, so that the agents are there already when it
//! comes to lead (L17). It learns of leading from a watch; the broker then sends `Welcome`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::authentication::v1::TokenReviewStatus;
use spaceport_core::ids::{Epoch, NodeName};
use spaceport_core::queue::EPOCH_MAX;
use spaceport_proto::nodelink::node_link_server::{NodeLink, NodeLinkServer};
use spaceport_proto::nodelink::{BrokerMessage, Hello, NodeMessage, Standby, broker_message, node_message};
use spaceport_shell::error_chain;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use crate::args::ServiceAccountName;
use crate::credentials::ServerCertificate;
use crate::kubeapi::KubeApi;
use crate::metrics::Metrics;

/// Audience of the agents' tokens.
pub const AUDIENCE: &str = "spaceport-nodelink";

/// Largest message of an agent, bytes: the inventory of 16 cards with 64 leases is below 64 KiB.
const MESSAGE_MAX: usize = 256 * 1024;
/// Messages to one agent that may wait. One step of the broker may answer everybody who waits for a node, 1000 by default,
/// before the stream is looked at again; who does not read twice as many is gone. A message is a few hundred bytes.
const OUTBOUND_QUEUE: usize = 2048;
/// An agent says Hello at once.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// A peer that does not answer a ping this long is gone; the broker then counts by L9.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// A token is reviewed again after this long: a deleted agent pod, or an ended token, loses its session.
const REVIEW_AGAIN: Duration = Duration::from_secs(300);
/// A session whose token could not be reviewed for this many rounds (an hour) ends, so that it is bounded.
const REVIEWS_MISSED_MAX: u32 = 12;
/// Token reviews at the same time: strangers who connect must not load the API server.
const REVIEWS_AT_ONCE: usize = 32;
/// An agent opens one stream; a second is the one that replaces it.
const STREAMS_PER_CONNECTION: u32 = 4;

/// The highest term of which a node is believed that it was begun although nobody here knows of it, as after the API server
/// was restored from a backup. Were more believed, one broken node could use up all terms. So as many as this are left, and
/// no node can take any of them.
pub const BELIEVED_MAX: Epoch = Epoch(EPOCH_MAX / 2);

/// One session's number, never used twice by a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// What happens on the link, in order for each session. A session is over for the broker when a newer one of the same
/// node is connected, whatever order their events come in.
#[derive(Debug)]
pub enum NodeEvent {
    /// An agent is there and waits for `Welcome`.
    Connected {
        /// Its session.
        session: SessionId,
        /// The node, as proved by its token.
        node: NodeName,
        /// How the agent introduced itself.
        hello: Hello,
        /// The node's boot-time stamp of that message, milliseconds (L8).
        boottime_ms: u64,
        /// The way back.
        outbound: Outbound,
    },
    /// The agent said something.
    Message {
        /// Its session.
        session: SessionId,
        /// Its node.
        node: NodeName,
        /// What it said; never `Hello`.
        message: NodeMessage,
    },
    /// The session is over. The leases of the node are not (L9).
    Disconnected {
        /// The session.
        session: SessionId,
        /// Its node.
        node: NodeName,
    },
}

/// The way to one agent.
#[derive(Clone, Debug)]
pub struct Outbound {
    sender: mpsc::Sender<Result<BrokerMessage, Status>>,
    session_end: CancellationToken,
}

/// The agent is not there any more, or does not read. Its session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the agent's session is over")]
pub struct SessionOver;

/// How the link is served.
#[derive(Clone, Debug)]
pub struct NodeLinkSettings {
    /// Service account that agents must have.
    pub agent: ServiceAccountName,
}

/// Why the node link is not there.
#[derive(Debug, thiserror::Error)]
pub enum NodeLinkError {
    /// The address cannot be used.
    #[error("cannot listen on {address} for node agents")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What is wrong with it.
        #[source]
        source: std::io::Error,
    },
    /// The certificate cannot be used.
    #[error("cannot use the certificate of the node link")]
    Tls(#[source] tonic::transport::Error),
    /// Serving ended.
    #[error("the node link failed")]
    Serve(#[source] tonic::transport::Error),
}

struct Service<I> {
    shared: Arc<Shared<I>>,
}

struct Shared<I> {
    api: KubeApi,
    settings: NodeLinkSettings,
    metrics: Metrics,
    leading: watch::Receiver<bool>,
    events: mpsc::Sender<I>,
    stop: CancellationToken,
    reviews: Semaphore,
    /// Owns the sessions' tasks.
    tasks: TaskTracker,
    next_session: AtomicU64,
    /// The live session of each node. A std mutex: it is never held across an await.
    sessions: Mutex<HashMap<NodeName, (SessionId, CancellationToken)>>,
}

/// One agent's stream after its Hello.
struct Session {
    id: SessionId,
    node: NodeName,
    token: String,
    outbound: Outbound,
    inbound: Streaming<NodeMessage>,
}

// === impl Outbound ===

impl Outbound {
    /// Sends, without waiting.
    ///
    /// # Errors
    /// [`SessionOver`] if the agent is gone or does not read; the session is ended then, and the agent connects anew.
    pub fn send(&self, message: broker_message::Message) -> Result<(), SessionOver> {
        if self.session_end.is_cancelled() {
            return Err(SessionOver);
        }
        self.sender.try_send(Ok(BrokerMessage { message: Some(message) })).map_err(|_| {
            self.session_end.cancel();
            SessionOver
        })
    }

    /// Ends the session; the agent connects anew.
    pub fn close(&self) {
        self.session_end.cancel();
    }

    /// A way to nowhere but the returned receiver, for tests of the broker.
    pub fn channel(capacity: usize) -> (Self, mpsc::Receiver<Result<BrokerMessage, Status>>) {
        let (sender, receiver) = mpsc::channel(capacity);
        (Self { sender, session_end: CancellationToken::new() }, receiver)
    }
}

/// Binds the address, so that a wrong one is an error at start.
///
/// # Errors
/// [`NodeLinkError::Bind`].
pub fn bind(address: SocketAddr) -> Result<TcpIncoming, NodeLinkError> {
    let incoming = TcpIncoming::bind(address).map_err(|source| NodeLinkError::Bind { address, source })?;
    Ok(incoming.with_nodelay(Some(true)))
}

/// What [`serve`] needs besides the listener.
pub struct NodeLinkParts<I> {
    /// Settings.
    pub settings: NodeLinkSettings,
    /// Our certificate.
    pub certificate: ServerCertificate,
    /// For token reviews.
    pub api: KubeApi,
    /// Counts sessions.
    pub metrics: Metrics,
    /// Whether this replica leads.
    pub leading: watch::Receiver<bool>,
    /// Where events go: the broker's bounded input. When it is full, agents wait (HTTP/2 flow control).
    pub events: mpsc::Sender<I>,
}

/// Serves agents until `stop`.
///
/// # Errors
/// See [`NodeLinkError`].
pub async fn serve<I>(
    incoming: TcpIncoming,
    parts: NodeLinkParts<I>,
    stop: CancellationToken,
) -> Result<(), NodeLinkError>
where
    I: From<NodeEvent> + Send + 'static,
{
    let NodeLinkParts { settings, certificate, api, metrics, leading, events } = parts;
    let identity = Identity::from_pem(certificate.certificate, certificate.key);
    let tasks = TaskTracker::new();
    let service = Service {
        shared: Arc::new(Shared {
            api,
            settings,
            metrics,
            leading,
            events,
            stop: stop.clone(),
            reviews: Semaphore::new(REVIEWS_AT_ONCE),
            tasks: tasks.clone(),
            next_session: AtomicU64::new(1),
            sessions: Mutex::new(HashMap::new()),
        }),
    };
    Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .map_err(NodeLinkError::Tls)?
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .add_service(NodeLinkServer::new(service).max_decoding_message_size(MESSAGE_MAX))
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
        .map_err(NodeLinkError::Serve)?;
    tasks.close();
    tasks.wait().await;
    Ok(())
}

// === impl Service ===

#[tonic::async_trait]
impl<I> NodeLink for Service<I>
where
    I: From<NodeEvent> + Send + 'static,
{
    type SessionStream = Pin<Box<dyn Stream<Item = Result<BrokerMessage, Status>> + Send>>;

    async fn session(&self, request: Request<Streaming<NodeMessage>>) -> Result<Response<Self::SessionStream>, Status> {
        let shared = Arc::clone(&self.shared);
        let peer = request.remote_addr();
        let token = bearer(&request).ok_or_else(|| {
            shared.metrics.session_refused("NoToken");
            Status::unauthenticated("a bearer token for the audience spaceport-nodelink is needed")
        })?;
        let proved = shared.review(&token).await.inspect_err(|status| {
            tracing::warn!(?peer, reason = status.message(), "An agent's session is refused");
        })?;
        let (sender, receiver) = mpsc::channel(OUTBOUND_QUEUE);
        let outbound = Outbound { sender, session_end: shared.stop.child_token() };
        let end = outbound.session_end.clone();
        let session = Arc::clone(&shared).run(proved, token, outbound, request.into_inner());
        shared.tasks.spawn(session);
        let messages = ReceiverStream::new(receiver).take_until(end.cancelled_owned());
        Ok(Response::new(Box::pin(messages)))
    }
}

fn bearer<T>(request: &Request<T>) -> Option<String> {
    let value = request.metadata().get("authorization")?.to_str().ok()?;
    value.strip_prefix("Bearer ").filter(|token| !token.is_empty()).map(str::to_owned)
}

impl<I> Shared<I>
where
    I: From<NodeEvent> + Send + 'static,
{
    /// The node that the token proves.
    async fn review(&self, token: &str) -> Result<NodeName, Status> {
        let _permit = self.reviews.try_acquire().map_err(|_| {
            self.metrics.session_refused("TooManyAtOnce");
            Status::resource_exhausted("too many sessions begin at once; try again")
        })?;
        let status = self.api.review_token(token, AUDIENCE).await.map_err(|error| {
            tracing::warn!(error = %error_chain(&error), "Cannot review an agent's token");
            Status::unavailable("the token cannot be reviewed at the moment; try again")
        })?;
        node_of(&status, &self.settings.agent).map_err(|reason| {
            self.metrics.session_refused(reason.kind());
            Status::unauthenticated(reason.to_string())
        })
    }

    /// One session from Hello to its end.
    async fn run(
        self: Arc<Self>,
        proved: NodeName,
        token: String,
        outbound: Outbound,
        mut inbound: Streaming<NodeMessage>,
    ) {
        let end = outbound.session_end.clone();
        // Whatever way this ends, the answer stream ends with it.
        let ends_stream = end.clone().drop_guard();
        let (hello, boottime_ms) = match self.hello(&proved, &mut inbound, &end).await {
            Ok(Some(hello)) => hello,
            Ok(None) => return,
            Err(refused) => {
                tracing::warn!(node = %proved, reason = %refused, "An agent's session is refused");
                self.metrics.session_refused(refused.kind());
                // The queue is empty: there is room for this one. It is read, and then the stream ends with its sender.
                let _ = outbound.sender.try_send(Err(Status::new(refused.code(), refused.to_string())));
                ends_stream.disarm();
                return;
            }
        };
        let id = SessionId(self.next_session.fetch_add(1, Ordering::Relaxed));
        tracing::info!(node = %proved, session = id.0, agent = hello.agent_instance, "An agent has connected");
        self.register(&proved, id, &end);
        let mut session = Session { id, node: proved, token, outbound, inbound };
        if self.stand_by(&mut session).await {
            self.forward(&mut session, hello, boottime_ms).await;
        }
        self.unregister(&session);
        tracing::info!(node = %session.node, session = id.0, "An agent's session is over");
    }

    /// The first message, which must be a Hello of the proved node. None if the agent is gone.
    async fn hello(
        &self,
        proved: &NodeName,
        inbound: &mut Streaming<NodeMessage>,
        end: &CancellationToken,
    ) -> Result<Option<(Hello, u64)>, HelloRefused> {
        let first = tokio::select! {
            first = tokio::time::timeout(HELLO_LIMIT, inbound.message()) => first,
            () = end.cancelled() => return Ok(None),
        };
        let first = first.map_err(|_| HelloRefused::Late)?;
        let Ok(Some(first)) = first else { return Ok(None) };
        let boottime_ms = first.boottime_ms;
        hello_of(first.message, proved).map(|hello| Some((hello, boottime_ms)))
    }

    /// Makes this the node's session; an older one ends.
    fn register(&self, node: &NodeName, id: SessionId, end: &CancellationToken) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((older, older_end)) = sessions.insert(node.clone(), (id, end.clone())) {
            tracing::info!(%node, session = id.0, replaced = older.0, "A newer session replaces an agent's older one");
            older_end.cancel();
        }
        self.metrics.set_nodes_connected(sessions.len());
    }

    fn unregister(&self, session: &Session) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.get(&session.node).is_some_and(|(id, _)| *id == session.id) {
            sessions.remove(&session.node);
        }
        self.metrics.set_nodes_connected(sessions.len());
    }

    /// Until this replica leads. False if the session ended before.
    async fn stand_by(&self, session: &mut Session) -> bool {
        let mut leading = self.leading.clone();
        if *leading.borrow_and_update() {
            return true;
        }
        if session.outbound.send(broker_message::Message::Standby(Standby {})).is_err() {
            return false;
        }
        loop {
            tokio::select! {
                changed = leading.changed() => match changed {
                    Ok(()) if *leading.borrow_and_update() => return true,
                    Ok(()) => {}
                    Err(_) => return false,
                },
                // Heartbeats go on meanwhile; nothing that an agent says before Welcome concerns a standby.
                message = session.inbound.message() => if !matches!(message, Ok(Some(_))) { return false },
                () = session.outbound.session_end.cancelled() => return false,
            }
        }
    }

    /// Gives everything to the broker until the session ends.
    async fn forward(&self, session: &mut Session, hello: Hello, boottime_ms: u64) {
        let (id, node) = (session.id, session.node.clone());
        let outbound = session.outbound.clone();
        let connected = NodeEvent::Connected { session: id, node: node.clone(), hello, boottime_ms, outbound };
        if self.events.send(connected.into()).await.is_err() {
            return;
        }
        self.forward_messages(session).await;
        // If the broker is gone, the process ends; nobody needs to know.
        let _ = self.events.send(NodeEvent::Disconnected { session: id, node }.into()).await;
    }

    async fn forward_messages(&self, session: &mut Session) {
        let mut leading = self.leading.clone();
        let mut token_ends = std::pin::pin!(self.token_ends(session.token.clone(), session.node.clone()));
        loop {
            let message = tokio::select! {
                message = session.inbound.message() => message,
                () = session.outbound.session_end.cancelled() => return,
                () = &mut token_ends => return,
                // Not leading any more: the agent connects anew and is told so. A session never outlives the term that it
                // was given to, so nothing said in one term reaches another.
                _ = leading.wait_for(|leads| !*leads) => return,
            };
            let message = match message {
                Ok(Some(NodeMessage { message: Some(node_message::Message::Hello(_)) | None, .. })) => {
                    tracing::warn!(node = %session.node, "An agent sent an empty message or a second Hello");
                    return;
                }
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(status) => {
                    let (code, reason) = (status.code(), status.message());
                    tracing::info!(node = %session.node, ?code, reason, "An agent's stream was cut");
                    return;
                }
            };
            let event = NodeEvent::Message { session: session.id, node: session.node.clone(), message };
            if self.events.send(event.into()).await.is_err() {
                return;
            }
        }
    }

    /// Reviews the token again and again; returns when it is no longer good, or could not be reviewed for an hour.
    async fn token_ends(&self, token: String, node: NodeName) {
        let mut missed = 0;
        while missed < REVIEWS_MISSED_MAX {
            tokio::time::sleep(REVIEW_AGAIN).await;
            match self.review(&token).await {
                Ok(same) if same == node => missed = 0,
                // The API server's trouble says nothing about the token.
                Err(status) if status.code() != tonic::Code::Unauthenticated => missed += 1,
                _ => break,
            }
        }
        tracing::info!(%node, missed, "An agent's token is no longer good");
    }
}

/// Why a token does not prove a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum TokenRefused {
    #[error("the API server does not accept the token")]
    NotAuthenticated,
    #[error("the token is not for the audience {AUDIENCE}")]
    WrongAudience,
    #[error("the token is of {user}, but agents are {expected}")]
    WrongAccount { user: String, expected: String },
    #[error("the token is not bound to a pod on a node")]
    NotBound,
}

impl TokenRefused {
    fn kind(&self) -> &'static str {
        match self {
            Self::NotAuthenticated => "NotAuthenticated",
            Self::WrongAudience => "WrongAudience",
            Self::WrongAccount { .. } => "WrongAccount",
            Self::NotBound => "NotBound",
        }
    }
}

/// The node whose agent the reviewed token belongs to. Pure.
fn node_of(status: &TokenReviewStatus, agent: &ServiceAccountName) -> Result<NodeName, TokenRefused> {
    if status.authenticated != Some(true) {
        return Err(TokenRefused::NotAuthenticated);
    }
    // An authenticator that does not know audiences answers none: such a token could be anyone's.
    if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {
        return Err(TokenRefused::WrongAudience);
    }
    let user = status.user.clone().unwrap_or_default();
    let name = user.username.unwrap_or_default();
    if name != agent.user_name() {
        return Err(TokenRefused::WrongAccount { user: name, expected: agent.user_name() });
    }
    let extra = user.extra.unwrap_or_default();
    match extra.get("authentication.kubernetes.io/node-name").map(Vec::as_slice) {
        Some([node]) if !node.is_empty() => Ok(NodeName::new(node)),
        _ => Err(TokenRefused::NotBound),
    }
}

/// Why a session has no good beginning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum HelloRefused {
    #[error("no Hello within {} s", HELLO_LIMIT.as_secs())]
    Late,
    #[error("the first message must be Hello")]
    NotHello,
    #[error("the token is of a pod on node {proved}, which may not speak for node {said:?}")]
    OtherNode { proved: NodeName, said: String },
    #[error("the node has accepted term {said}, and there is none after {EPOCH_MAX}: the record of it there is broken")]
    EpochTooHigh { said: u64 },
}

impl HelloRefused {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Late | Self::NotHello | Self::OtherNode { .. } => "BadHello",
            Self::EpochTooHigh { .. } => "EpochTooHigh",
        }
    }

    const fn code(&self) -> tonic::Code {
        match self {
            Self::Late => tonic::Code::DeadlineExceeded,
            Self::NotHello => tonic::Code::FailedPrecondition,
            Self::OtherNode { .. } => tonic::Code::PermissionDenied,
            Self::EpochTooHigh { .. } => tonic::Code::InvalidArgument,
        }
    }
}

/// The Hello of the proved node. Pure.
fn hello_of(first: Option<node_message::Message>, proved: &NodeName) -> Result<Hello, HelloRefused> {
    let Some(node_message::Message::Hello(hello)) = first else { return Err(HelloRefused::NotHello) };
    if hello.node != proved.as_str() {
        return Err(HelloRefused::OtherNode { proved: proved.clone(), said: hello.node });
    }
    if hello.highest_epoch > EPOCH_MAX {
        return Err(HelloRefused::EpochTooHigh { said: hello.highest_epoch });
    }
    Ok(hello)
}

#[cfg(test)]
mod tests;
