//! The node link with real pod-bound tokens.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Container, Node, Pod, PodSpec, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use spaceport_operator::args::ServiceAccountName;
use spaceport_operator::clock;
use spaceport_operator::credentials::node_link_certificate;
use spaceport_operator::kubeapi::KubeApi;
use spaceport_operator::metrics::Metrics;
use spaceport_operator::node_link::{self, AUDIENCE, NodeEvent, NodeLinkParts, NodeLinkSettings};
use spaceport_proto::nodelink::node_link_client::NodeLinkClient;
use spaceport_proto::nodelink::{BrokerMessage, Heartbeat, Hello, NodeMessage, Welcome, broker_message, node_message};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic::{Request, Status, Streaming};

use super::{SOON, client, connect, fresh, namespace, next};

/// A token of a pod of the service account on the node, as kubelet would put it into the pod.
async fn bound_token(api: &KubeApi, namespace: &str, account: &str, node: &str, audience: &str) -> String {
    let metadata = |name: &str| ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    // Both may be there from an earlier token of the same test.
    let _ = api.cluster::<Node>().create(&Node { metadata: metadata(node), ..Node::default() }).await;
    let accounts = api.namespace::<ServiceAccount>(namespace);
    let _ = accounts.create(&ServiceAccount { metadata: metadata(account), ..ServiceAccount::default() }).await;
    let container = Container { name: "agent".to_owned(), image: Some("none".to_owned()), ..Container::default() };
    let spec = PodSpec {
        node_name: Some(node.to_owned()),
        service_account_name: Some(account.to_owned()),
        containers: vec![container],
        ..PodSpec::default()
    };
    let pod = Pod { metadata: metadata(&fresh("agent")), spec: Some(spec), ..Pod::default() };
    let pod = api.namespace::<Pod>(namespace).create(&pod).await.unwrap();
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![audience.to_owned()],
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: pod.metadata.name,
                uid: pod.metadata.uid,
            }),
            expiration_seconds: Some(3600),
        },
        ..TokenRequest::default()
    };
    let api: kube::Api<ServiceAccount> = kube::Api::namespaced(client().await, namespace);
    api.create_token_request(account, &Default::default(), &request).await.unwrap().status.unwrap().token
}

struct Link {
    namespace: String,
    address: SocketAddr,
    authority: String,
    leading: watch::Sender<bool>,
    events: mpsc::Receiver<NodeEvent>,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<Result<(), node_link::NodeLinkError>>,
}

async fn serve(api: &KubeApi) -> Link {
    let namespace = namespace(api).await;
    let names = ["spaceport-operator".to_owned()];
    let certificate = node_link_certificate(api, &namespace, &names, clock::wall()).await.unwrap();
    let authority = certificate.authority.clone();
    let incoming = node_link::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let (leading, leads) = watch::channel(false);
    let (sender, events) = mpsc::channel(16);
    let stop = CancellationToken::new();
    let parts = NodeLinkParts {
        settings: NodeLinkSettings {
            agent: ServiceAccountName { namespace: namespace.clone(), name: "agent".to_owned() },
        },
        certificate,
        api: api.clone(),
        metrics: Metrics::new(),
        leading: leads,
        events: sender,
    };
    let serving = tokio::spawn(node_link::serve(incoming, parts, stop.clone()));
    Link { namespace, address, authority, leading, events, stop, serving }
}

struct Agent {
    say: mpsc::Sender<NodeMessage>,
    hear: Streaming<BrokerMessage>,
}

impl Link {
    async fn channel(&self) -> Channel {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.authority))
            .domain_name("spaceport-operator");
        let endpoint = Channel::from_shared(format!("https://{}", self.address)).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.unwrap()
    }

    async fn session(&self, token: Option<&str>, node: &str) -> Result<Agent, Status> {
        let (say, said) = mpsc::channel(16);
        say.send(message(node_message::Message::Hello(hello(node)))).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(said));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let answer = NodeLinkClient::new(self.channel().await).session(request).await?;
        Ok(Agent { say, hear: answer.into_inner() })
    }
}

impl Agent {
    async fn hears(&mut self) -> Result<Option<broker_message::Message>, Status> {
        let heard = tokio::time::timeout(SOON, self.hear.message()).await.expect("an answer or an end")?;
        Ok(heard.and_then(|message| message.message))
    }
}

fn hello(node: &str) -> Hello {
    Hello { node: node.to_owned(), boot_id: "b".to_owned(), agent_instance: fresh("i"), highest_epoch: 7 }
}

fn message(message: node_message::Message) -> NodeMessage {
    NodeMessage { boottime_ms: 42, message: Some(message) }
}

#[tokio::test]
async fn an_agent_stands_by_until_this_replica_leads_and_a_newer_session_replaces_the_older() {
    let api = connect().await;
    let mut link = serve(&api).await;
    let node = fresh("gpu");
    let token = bound_token(&api, &link.namespace, "agent", &node, AUDIENCE).await;
    let mut agent = link.session(Some(&token), &node).await.unwrap();
    assert!(matches!(agent.hears().await, Ok(Some(broker_message::Message::Standby(_)))));
    agent.say.send(message(node_message::Message::Heartbeat(Heartbeat::default()))).await.unwrap();

    link.leading.send_replace(true);
    let (session, outbound) = next("the agent", &mut link.events, |event| match event {
        NodeEvent::Connected { session, node: connected, hello, boottime_ms, outbound } => {
            assert_eq!((connected.as_str(), hello.highest_epoch, boottime_ms), (node.as_str(), 7, 42));
            Some((session, outbound))
        }
        _ => None,
    })
    .await;
    outbound.send(broker_message::Message::Welcome(Welcome { epoch: 8 })).unwrap();
    assert!(matches!(agent.hears().await, Ok(Some(broker_message::Message::Welcome(Welcome { epoch: 8 })))));
    agent.say.send(message(node_message::Message::Heartbeat(Heartbeat::default()))).await.unwrap();
    next("the heartbeat", &mut link.events, |event| matches!(event, NodeEvent::Message { .. }).then_some(())).await;

    let _newer = link.session(Some(&token), &node).await.unwrap();
    let mut ends = BTreeMap::new();
    next("one session's end and the other's begin", &mut link.events, |event| {
        match event {
            NodeEvent::Connected { session, .. } => ends.insert("connected", session),
            NodeEvent::Disconnected { session, .. } => ends.insert("disconnected", session),
            NodeEvent::Message { .. } => None,
        };
        (ends.len() == 2).then_some(())
    })
    .await;
    assert_eq!(ends["disconnected"], session);
    assert!(ends["connected"] > session);
    assert!(matches!(agent.hears().await, Ok(None)), "the older stream ends");
    assert!(outbound.send(broker_message::Message::Welcome(Welcome { epoch: 8 })).is_err());
    link.stop.cancel();
    tokio::time::timeout(SOON, link.serving).await.expect("open streams do not keep it").unwrap().unwrap();
}

#[tokio::test]
async fn nobody_speaks_for_a_node_without_a_token_bound_to_a_pod_on_it() {
    let api = connect().await;
    let link = serve(&api).await;
    let (node, other) = (fresh("gpu"), fresh("gpu"));
    let code = |result: Result<Agent, Status>| result.map(|_| ()).map_err(|status| status.code());
    let refused = Err(tonic::Code::Unauthenticated);
    assert_eq!(code(link.session(None, &node).await), refused, "no token");
    assert_eq!(code(link.session(Some("made-up"), &node).await), refused, "no token of this cluster");
    let stranger = bound_token(&api, &link.namespace, "stranger", &node, AUDIENCE).await;
    assert_eq!(code(link.session(Some(&stranger), &node).await), refused, "another service account");
    let elsewhere = bound_token(&api, &link.namespace, "agent", &node, "https://test.local").await;
    assert_eq!(code(link.session(Some(&elsewhere), &node).await), refused, "another audience");

    let token = bound_token(&api, &link.namespace, "agent", &node, AUDIENCE).await;
    let mut impostor = link.session(Some(&token), &other).await.unwrap();
    assert_eq!(impostor.hears().await.unwrap_err().code(), tonic::Code::PermissionDenied, "another node");
    link.stop.cancel();
    link.serving.await.unwrap().unwrap();
}
