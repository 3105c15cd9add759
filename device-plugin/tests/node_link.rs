//! The agent's end of nodelink against a server with TLS: what an operator replica sees of it.
#![allow(clippy::unwrap_used, clippy::panic)] // Also helpers are tests; clippy only knows the test functions.
#![allow(missing_docs)] // Nobody reads docs of a test binary.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Mutex, mpsc as blocking};
use std::time::Duration;

use futures::Stream;
use spaceport_device_plugin::node_actor::Input;
use spaceport_device_plugin::node_link::{self, LinkEvent, LinkSettings};
use spaceport_proto::nodelink::node_link_server::{NodeLink, NodeLinkServer};
use spaceport_proto::nodelink::{
    BrokerMessage, Dequeue, NodeMessage, Standby, Welcome, broker_message, node_message::Message,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A replica that says what it is told to, one list a session, and passes on what it hears.
struct Replica {
    says: Mutex<VecDeque<Vec<broker_message::Message>>>,
    heard: mpsc::UnboundedSender<(String, NodeMessage)>,
}

#[tonic::async_trait]
impl NodeLink for Replica {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<BrokerMessage, Status>> + Send>>;

    async fn session(&self, request: Request<Streaming<NodeMessage>>) -> Result<Response<Self::SessionStream>, Status> {
        let bearer = request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned();
        let says = self.says.lock().unwrap().pop_front().ok_or_else(|| Status::unavailable("no more sessions"))?;
        let keep = says.iter().any(|message| matches!(message, broker_message::Message::Welcome(_)));
        let (sender, receiver) = mpsc::channel(16);
        let mut inbound = request.into_inner();
        let heard = self.heard.clone();
        tokio::spawn(async move {
            for message in says {
                sender.send(Ok(BrokerMessage { message: Some(message) })).await.unwrap();
            }
            while let Ok(Some(message)) = inbound.message().await {
                let _ = heard.send((bearer.clone(), message));
                if !keep {
                    break; // The session ends here.
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

struct Fixture {
    directory: PathBuf,
    address: SocketAddr,
    heard: mpsc::UnboundedReceiver<(String, NodeMessage)>,
    inputs: blocking::Receiver<Input>,
    stop: CancellationToken,
}

impl Fixture {
    async fn start(name: &str, certificate_for: &str, sessions: Vec<Vec<broker_message::Message>>) -> Self {
        let directory = std::env::temp_dir().join(format!("spaceport-link-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let names = vec![certificate_for.to_owned()];
        let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap().pem();
        std::fs::write(directory.join("ca.crt"), &certificate).unwrap();
        std::fs::write(directory.join("token"), "pod-token\n").unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, heard) = mpsc::unbounded_channel();
        let replica = Replica { says: Mutex::new(sessions.into()), heard: sender };
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key.serialize_pem()));
        let server = Server::builder().tls_config(tls).unwrap().add_service(NodeLinkServer::new(replica));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

        let (to_actor, inputs) = blocking::channel();
        let (epoch, seen) = watch::channel(7);
        let stop = CancellationToken::new();
        let settings = LinkSettings {
            node: "gpu-1".to_owned(),
            boot_id: "boot".to_owned(),
            agent_instance: "agent".to_owned(),
            namespace: "system".to_owned(),
            service: String::new(),
            endpoints: vec![address],
            ca_file: directory.join("ca.crt"),
            token_file: directory.join("token"),
        };
        let end = stop.clone();
        tokio::spawn(async move {
            node_link::run(None, settings, seen, to_actor, end).await;
            drop(epoch);
        });
        Self { directory, address, heard, inputs, stop }
    }

    async fn hears(&mut self) -> (String, NodeMessage) {
        tokio::time::timeout(PATIENCE, self.heard.recv()).await.expect("nothing is said").unwrap()
    }

    /// The next event of the link; the actor's queue is a blocking one.
    fn event(&self) -> LinkEvent {
        tokio::task::block_in_place(|| match self.inputs.recv_timeout(PATIENCE).expect("no event") {
            Input::Link(event) => event,
            other => panic!("{other:?}"),
        })
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn welcome(epoch: u64) -> broker_message::Message {
    broker_message::Message::Welcome(Welcome { epoch })
}

const NAME: &str = "spaceport-operator.system.svc";

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_introduces_itself_with_its_token_and_speaks_when_it_is_welcome() {
    let mut link = Fixture::start("hello", NAME, vec![vec![welcome(9)]]).await;
    let (bearer, first) = link.hears().await;
    assert_eq!(bearer, "Bearer pod-token");
    assert!(first.boottime_ms > 0);
    let Some(Message::Hello(hello)) = first.message else { panic!("{first:?}") };
    assert_eq!((hello.node.as_str(), hello.agent_instance.as_str(), hello.highest_epoch), ("gpu-1", "agent", 7));
    let LinkEvent::Welcome { epoch: 9, outbound, .. } = link.event() else { panic!("no welcome") };
    assert!(outbound.send(Message::Dequeue(Dequeue { ticket: 5 })));
    let mut found = (false, false);
    while found != (true, true) {
        match link.hears().await.1.message {
            Some(Message::Dequeue(dequeue)) => found.0 = dequeue.ticket == 5,
            Some(Message::Heartbeat(_)) => found.1 = true,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_ends_is_said_and_dialed_again_with_the_token_of_that_time() {
    let standby = vec![broker_message::Message::Standby(Standby {})];
    let mut link = Fixture::start("again", NAME, vec![standby, vec![welcome(9)]]).await;
    assert!(matches!(link.hears().await.1.message, Some(Message::Hello(_))));
    std::fs::write(link.directory.join("token"), "rotated\n").unwrap();
    assert!(matches!(link.event(), LinkEvent::Standby { .. }));
    assert!(matches!(link.event(), LinkEvent::Closed { .. }));
    let mut event = link.event();
    // Rounds that found no session in between end as Closed; each is a dial of its own.
    while matches!(event, LinkEvent::Closed { .. }) {
        event = link.event();
    }
    assert!(matches!(event, LinkEvent::Welcome { epoch: 9, .. }), "{event:?}");
    assert_eq!(link.hears().await.0, "Bearer rotated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_another_name_in_its_certificate_gets_no_token() {
    let mut link = Fixture::start("name", "someone-else.system.svc", vec![vec![welcome(9)]]).await;
    for _ in 0..3 {
        assert!(matches!(link.event(), LinkEvent::Closed { .. }), "{}", link.address);
    }
    assert!(link.heard.try_recv().is_err());
}
