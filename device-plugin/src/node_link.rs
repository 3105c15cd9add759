//! The agent's end of nodelink: a stream to every operator replica (L17). The replica that announces the highest
//! epoch leads; the others are kept, so that a fail-over costs one message.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures::StreamExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt as _, watcher};
use spaceport_proto::nodelink::node_link_client::NodeLinkClient;
use spaceport_proto::nodelink::{BrokerMessage, Heartbeat, Hello, NodeMessage, broker_message, node_message::Message};
use spaceport_shell::error_chain;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use crate::clock::boottime_ms;
use crate::converge::TICKETS_MAX;
use crate::node_actor::Input;

/// Reports that wait: two for each lease of a node that is not acknowledged, and what happens meanwhile.
const REPORTS_MAX: usize = 1024;
/// Messages to one replica that may wait. A new leader is told of everything at once: the node's leases, every request that
/// waits, and each report again. A replica that does not read this many is gone, and the session ends.
pub const OUTBOUND_QUEUE: usize = TICKETS_MAX + REPORTS_MAX;
/// The broker counts a node as silent by L9; its heartbeat also carries the stamp that orders echo (L8).
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Dialing a replica of the same cluster.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// A peer that answers no ping this long is gone.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// First pause between dials, and the longest: a restarted replica is back within seconds, and a dial is cheap.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A session that lived this long was no failed dial: the next pause is the shortest again.
const SETTLED: Duration = Duration::from_secs(5);

/// One stream, never numbered twice by a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session(pub u64);

/// What happens on the link.
#[derive(Debug)]
pub enum LinkEvent {
    /// A replica says it leads this term.
    Welcome {
        /// Its stream.
        session: Session,
        /// Its term.
        epoch: u64,
        /// The way to it.
        outbound: Outbound,
    },
    /// A replica says it does not lead.
    Standby {
        /// Its stream.
        session: Session,
    },
    /// Anything else a replica says.
    Message {
        /// Its stream.
        session: Session,
        /// What.
        message: broker_message::Message,
    },
    /// The stream ended.
    Closed {
        /// Which.
        session: Session,
    },
}

/// The way to a replica. What it does not take ends its session, and the next one begins with everything again: a session
/// that went on without a message would leave the broker believing what is not so.
#[derive(Clone, Debug)]
pub struct Outbound {
    queue: mpsc::Sender<Message>,
    stuck: CancellationToken,
}

/// How the operator is reached.
#[derive(Clone, Debug)]
pub struct LinkSettings {
    /// Name of this node.
    pub node: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Fresh at every start.
    pub agent_instance: String,
    /// Namespace of the operator.
    pub namespace: String,
    /// Its headless Service.
    pub service: String,
    /// Fixed addresses instead of the Service's; for tests and unusual networks.
    pub endpoints: Vec<SocketAddr>,
    /// File with the authority of the operator's certificate, read anew at each dial.
    pub ca_file: PathBuf,
    /// File with the pod-bound token, read anew at each dial: kubelet rotates it.
    pub token_file: PathBuf,
}

// === impl Outbound ===

impl Outbound {
    /// A way to a replica, what comes out of it, and what is cancelled when that is too slow.
    pub fn new() -> (Self, mpsc::Receiver<Message>, CancellationToken) {
        let (queue, messages) = mpsc::channel(OUTBOUND_QUEUE);
        let stuck = CancellationToken::new();
        (Self { queue, stuck: stuck.clone() }, messages, stuck)
    }

    /// False if the session is over, or is from now on.
    #[must_use]
    pub fn send(&self, message: Message) -> bool {
        let sent = self.queue.try_send(message).is_ok();
        if !sent {
            self.stuck.cancel();
        }
        sent
    }
}

impl LinkSettings {
    fn server_name(&self) -> String {
        format!("spaceport-operator.{}.svc", self.namespace)
    }
}

/// Why a session ended or never began.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot read {path}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("cannot connect")]
    Connect(#[source] tonic::transport::Error),
    #[error("the stream failed")]
    Stream(#[source] tonic::Status),
    #[error("the replica closed the stream")]
    Closed,
    #[error("the replica does not read: {OUTBOUND_QUEUE} messages wait")]
    Stuck,
}

/// What the sessions share.
#[derive(Clone)]
struct Link {
    settings: Arc<LinkSettings>,
    epoch: watch::Receiver<u64>,
    inputs: blocking::Sender<Input>,
    sessions: Arc<AtomicU64>,
}

/// Keeps a stream to every address of the operator's Service until `stop`. `epoch` is the highest that the node accepted.
pub async fn run(
    client: Option<kube::Client>,
    settings: LinkSettings,
    epoch: watch::Receiver<u64>,
    inputs: blocking::Sender<Input>,
    stop: CancellationToken,
) {
    let link = Link { settings: Arc::new(settings), epoch, inputs, sessions: Arc::default() };
    let (sender, mut addresses) = watch::channel(link.settings.endpoints.iter().copied().collect::<BTreeSet<_>>());
    // One task for the watch and one for each replica; all end with this function.
    let mut tasks = JoinSet::new();
    if let Some(client) = client.filter(|_| link.settings.endpoints.is_empty()) {
        let settings = Arc::clone(&link.settings);
        tasks.spawn(async move { watch_endpoints(client, &settings, sender).await });
    }
    let mut running: BTreeMap<SocketAddr, CancellationToken> = BTreeMap::new();
    loop {
        let wanted = addresses.borrow_and_update().clone();
        running.retain(|address, session| {
            let keep = wanted.contains(address);
            if !keep {
                session.cancel();
            }
            keep
        });
        for address in wanted {
            running.entry(address).or_insert_with(|| {
                let end = stop.child_token();
                let (link, token) = (link.clone(), end.clone());
                tasks.spawn(async move { link.keep(address, token).await });
                end
            });
        }
        tokio::select! {
            () = stop.cancelled() => break,
            changed = addresses.changed() => if changed.is_err() {
                // Fixed addresses: nothing will change.
                stop.cancelled().await;
                break;
            },
        }
    }
    tasks.shutdown().await;
}

/// Follows the Service's EndpointSlices. The watch resumes by itself, with the library's bounded backoff.
async fn watch_endpoints(client: kube::Client, settings: &LinkSettings, sender: watch::Sender<BTreeSet<SocketAddr>>) {
    let slices: kube::Api<EndpointSlice> = kube::Api::namespaced(client, &settings.namespace);
    let config = watcher::Config::default().labels(&format!("kubernetes.io/service-name={}", settings.service));
    let mut events = pin!(watcher(slices, config).default_backoff());
    let mut known: BTreeMap<String, BTreeSet<SocketAddr>> = BTreeMap::new();
    let mut listing = true;
    while let Some(event) = events.next().await {
        let name = |slice: &EndpointSlice| slice.metadata.name.clone().unwrap_or_default();
        match event {
            Ok(watcher::Event::Init) => {
                listing = true;
                known.clear();
            }
            Ok(watcher::Event::Apply(slice) | watcher::Event::InitApply(slice)) => {
                known.insert(name(&slice), addresses_of(&slice));
            }
            Ok(watcher::Event::Delete(slice)) => {
                known.remove(&name(&slice));
            }
            Ok(watcher::Event::InitDone) => listing = false,
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "The operator's endpoints cannot be watched");
                continue;
            }
        }
        // During a fresh list the set is half full: the old one holds until the list is complete.
        if !listing {
            let all: BTreeSet<SocketAddr> = known.values().flatten().copied().collect();
            sender.send_if_modified(|old| std::mem::replace(old, all.clone()) != all);
        }
    }
}

fn addresses_of(slice: &EndpointSlice) -> BTreeSet<SocketAddr> {
    let ports = slice.ports.iter().flatten().filter_map(|port| u16::try_from(port.port?).ok());
    let hosts = || {
        let endpoints = slice.endpoints.iter();
        endpoints.flat_map(|endpoint| &endpoint.addresses).filter_map(|address| address.parse::<IpAddr>().ok())
    };
    ports.flat_map(|port| hosts().map(move |host| SocketAddr::new(host, port))).collect()
}

impl Link {
    /// Keeps one replica's stream up.
    async fn keep(self, address: SocketAddr, end: CancellationToken) {
        let pauses = || {
            ExponentialBuilder::new()
                .with_min_delay(PAUSE_MIN)
                .with_max_delay(PAUSE_MAX)
                .with_jitter()
                .without_max_times()
                .build()
        };
        let mut pause = pauses();
        // As long as the Service names the address; each round ends with a pause of at least PAUSE_MIN.
        loop {
            let session = Session(self.sessions.fetch_add(1, Ordering::Relaxed));
            let began_ms = boottime_ms();
            let result = tokio::select! {
                () = end.cancelled() => None,
                result = self.session(address, session) => Some(result),
            };
            if self.inputs.send(Input::Link(LinkEvent::Closed { session })).is_err() {
                return;
            }
            match result {
                None => return,
                Some(error) => tracing::info!(%address, error = %error_chain(&error), "A nodelink session ended"),
            }
            if boottime_ms().saturating_sub(began_ms) > SETTLED.as_millis() as u64 {
                pause = pauses();
            }
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(pause.next().unwrap_or(PAUSE_MAX)) => {}
            }
        }
    }

    /// One stream, from dial to end.
    async fn session(&self, address: SocketAddr, session: Session) -> SessionError {
        match self.try_session(address, session).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_session(
        &self,
        address: SocketAddr,
        session: Session,
    ) -> Result<std::convert::Infallible, SessionError> {
        let mut client = NodeLinkClient::new(self.dial(address).await?);
        let (sender, receiver) = mpsc::channel(OUTBOUND_QUEUE);
        let hello = Hello {
            node: self.settings.node.clone(),
            boot_id: self.settings.boot_id.clone(),
            agent_instance: self.settings.agent_instance.clone(),
            highest_epoch: *self.epoch.borrow(),
        };
        put(&sender, Message::Hello(hello))?;
        let mut request = tonic::Request::new(ReceiverStream::new(receiver));
        let token = self.read(&self.settings.token_file).await?;
        let bearer = format!("Bearer {}", token.trim()).parse().map_err(|_| SessionError::File {
            path: self.settings.token_file.clone(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, "it holds no bearer token"),
        })?;
        request.metadata_mut().insert("authorization", bearer);
        let mut inbound = client.session(request).await.map_err(SessionError::Stream)?.into_inner();
        tracing::info!(%address, "A nodelink session is open");

        let (outbound, mut from_actor, stuck) = Outbound::new();
        let mut welcomed = false;
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = inbound.message() => {
                    let message = message.map_err(SessionError::Stream)?.ok_or(SessionError::Closed)?;
                    welcomed |= matches!(message.message, Some(broker_message::Message::Welcome(_)));
                    self.pass_on(session, message, &outbound)?;
                }
                Some(message) = from_actor.recv() => put(&sender, message)?,
                () = stuck.cancelled() => return Err(SessionError::Stuck),
                // Nothing but Hello is expected before the term is joined.
                _ = heartbeat.tick(), if welcomed => {
                    put(&sender, Message::Heartbeat(Heartbeat::default()))?;
                }
            }
        }
    }

    fn pass_on(&self, session: Session, message: BrokerMessage, outbound: &Outbound) -> Result<(), SessionError> {
        let Some(message) = message.message else { return Ok(()) };
        let event = match message {
            broker_message::Message::Welcome(welcome) => {
                LinkEvent::Welcome { session, epoch: welcome.epoch, outbound: outbound.clone() }
            }
            broker_message::Message::Standby(_) => LinkEvent::Standby { session },
            message => LinkEvent::Message { session, message },
        };
        self.inputs.send(Input::Link(event)).map_err(|_| SessionError::Closed)
    }

    async fn dial(&self, address: SocketAddr) -> Result<tonic::transport::Channel, SessionError> {
        let authority = self.read(&self.settings.ca_file).await?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(authority))
            .domain_name(self.settings.server_name());
        Endpoint::from_shared(format!("https://{address}"))
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(SessionError::Connect)?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(SessionError::Connect)
    }

    async fn read(&self, path: &std::path::Path) -> Result<String, SessionError> {
        tokio::fs::read_to_string(path).await.map_err(|source| SessionError::File { path: path.to_owned(), source })
    }
}

/// Stamps a message and queues it; the stamp is what orders echo (L8).
fn put(sender: &mpsc::Sender<NodeMessage>, message: Message) -> Result<(), SessionError> {
    let message = NodeMessage { boottime_ms: boottime_ms(), message: Some(message) };
    sender.try_send(message).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => SessionError::Stuck,
        mpsc::error::TrySendError::Closed(_) => SessionError::Closed,
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointPort};

    use super::*;

    #[test]
    fn a_session_that_lost_a_message_is_over() {
        let (outbound, mut messages, stuck) = Outbound::new();
        let heartbeat = || Message::Heartbeat(Heartbeat::default());
        let everything = (0..OUTBOUND_QUEUE).all(|_| outbound.send(heartbeat()));
        assert!(everything && !stuck.is_cancelled(), "all that a new leader is told fits");
        assert!(!outbound.send(heartbeat()));
        assert!(stuck.is_cancelled(), "the broker must not go on without it");
        messages.close();
        assert!(!outbound.send(heartbeat()));
    }

    #[test]
    fn every_address_of_a_slice_is_dialed_at_every_port() {
        let endpoint =
            |address: &str| SliceEndpoint { addresses: vec![address.to_owned()], ..SliceEndpoint::default() };
        let slice = EndpointSlice {
            address_type: "IPv4".to_owned(),
            endpoints: vec![endpoint("10.0.0.1"), endpoint("10.0.0.2"), endpoint("not-an-address")],
            ports: Some(vec![EndpointPort { port: Some(7443), ..EndpointPort::default() }]),
            ..EndpointSlice::default()
        };
        let found: Vec<String> = addresses_of(&slice).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.1:7443", "10.0.0.2:7443"]);
    }
}
