//! The pods of this node: which belong to Spaces and get a device API, and which the gate does not concern (N8,
//! N14). The labels that tell are protected by the chart's admission policies (N6).

use std::collections::{BTreeMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use spaceport_core::ids::Revision;
use spaceport_crds::names::{LARGE_RESOURCE, SPACE_LABEL, XLARGE_RESOURCE};
use spaceport_shell::error_chain;
use spaceport_shell::readiness::Condition;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::converge::{Event, SpacePod};
use crate::device_api::listen::{self, Bound};
use crate::device_api::{self, Limits};
use crate::fault::{self, Fault};
use crate::gate::{self, Gate};
use crate::metrics::Metrics;
use crate::node_actor::{Input, NodeHandle};
use crate::sandbox::{self, Sandbox};
use crate::space_backend::{AppContainer, SpaceBackend};

/// Label with the uid of the Space; the operator's Space controller sets it.
const SPACE_UID_LABEL: &str = "spaceport.dev/space-uid";
/// Annotation with the revision of the app, from the pod template; nothing but what is learned of the Space depends on it.
const REVISION_ANNOTATION: &str = "spaceport.dev/revision";
/// Name of the container that runs the app in a Space's pod, as the operator names it.
const APP_CONTAINER: &str = "app";

/// Between two looks for the sandbox of a new pod: our init container waits for the listener, so this adds to every start.
const SANDBOX_LOOK: Duration = Duration::from_millis(20);
/// After this many looks (a minute) the pod is stuck in something that takes long anyway, as an image or a volume.
const QUICK_LOOKS: u32 = 3_000;
/// Between looks then, and after a failed bind.
const SLOW_LOOK: Duration = Duration::from_millis(500);
/// How often exemptions are derived again: a dedicated pod's cgroup appears after the pod is seen here and a good while
/// before its container, whose image may be there but whose sandbox is not.
const EXEMPTIONS_LOOK: Duration = Duration::from_millis(100);

/// What pods are watched for.
#[derive(Clone, Debug)]
pub struct PodSettings {
    /// Name of this node.
    pub node: String,
    /// Cgroup above all pods.
    pub pods_cgroup: PathBuf,
    /// Port of the device API on each pod's loopback; the operator has the same default.
    pub port: u16,
    /// Namespaces whose pods the gate does not concern.
    pub exempt_namespaces: Vec<String>,
    /// uid of the agent's own pod, which reads cards through NVML.
    pub own_pod_uid: Option<String>,
}

/// What matters of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    uid: String,
    role: Role,
    ending: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Role {
    /// Gets a device API.
    Space { pod: SpacePod, app_container: String },
    /// The gate lets it through.
    Exempt,
    /// Any other pod.
    Other,
}

/// A Space's pod that is being served.
struct Served {
    container: AppContainer,
    stop: CancellationToken,
}

/// Follows the node's pods until `stop`.
pub async fn run(
    client: kube::Client,
    settings: PodSettings,
    gate: Arc<Gate>,
    node: NodeHandle,
    metrics: Metrics,
    read: Condition,
    stop: CancellationToken,
) {
    let mut pods = Pods {
        settings: Arc::new(settings),
        gate,
        node,
        metrics,
        seen: BTreeMap::new(),
        served: BTreeMap::new(),
        servers: JoinSet::new(),
        exempt: HashSet::new(),
        stop: stop.clone(),
    };
    let api: kube::Api<Pod> = kube::Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", pods.settings.node));
    let mut events = pin!(watcher(api, config).default_backoff());
    let mut exemptions = tokio::time::interval(EXEMPTIONS_LOOK);
    exemptions.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut listed: BTreeMap<String, Seen> = BTreeMap::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = exemptions.tick() => pods.derive_exemptions(),
            Some(ended) = pods.servers.join_next(), if !pods.servers.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "A device API ended by itself");
                }
            }
            event = events.next() => match event {
                None => break,
                Some(Ok(watcher::Event::Init)) => listed.clear(),
                Some(Ok(watcher::Event::InitApply(pod))) => {
                    let seen = look(&pod, &pods.settings);
                    listed.insert(seen.uid.clone(), seen.clone());
                    pods.apply(seen);
                }
                Some(Ok(watcher::Event::InitDone)) => {
                    pods.keep_only(&listed);
                    read.set(true);
                }
                Some(Ok(watcher::Event::Apply(pod))) => pods.apply(look(&pod, &pods.settings)),
                Some(Ok(watcher::Event::Delete(pod))) => pods.remove(&pod.metadata.uid.unwrap_or_default()),
                Some(Err(error)) => tracing::warn!(error = %error_chain(&error), "The node's pods cannot be watched"),
            },
        }
    }
    // Each ends by `stop`; calls in flight are answered first, bounded by the limits of the device API.
    while pods.servers.join_next().await.is_some() {}
}

fn look(pod: &Pod, settings: &PodSettings) -> Seen {
    let meta = &pod.metadata;
    let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name)).cloned();
    let revision = meta.annotations.as_ref().and_then(|annotations| annotations.get(REVISION_ANNOTATION));
    let spec = pod.spec.as_ref();
    let uid = meta.uid.clone().unwrap_or_default();
    let namespace = meta.namespace.clone().unwrap_or_default();
    let dedicated = spec.is_some_and(|spec| {
        let limits = spec.containers.iter().filter_map(|container| container.resources.as_ref()?.limits.as_ref());
        limits.flatten().any(|(name, _)| name == LARGE_RESOURCE || name == XLARGE_RESOURCE)
    });
    let on_host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
    let role = if settings.own_pod_uid.as_deref() == Some(uid.as_str())
        || dedicated
        || settings.exempt_namespaces.contains(&namespace)
    {
        Role::Exempt
    } else {
        match (label(SPACE_UID_LABEL), label(SPACE_LABEL)) {
            (Some(space_uid), Some(space)) if !on_host_network => Role::Space {
                pod: SpacePod {
                    namespace,
                    name: meta.name.clone().unwrap_or_default(),
                    space,
                    space_uid,
                    pod_uid: uid.clone(),
                    revision: revision.map(|text| Revision::of(text)).unwrap_or_default(),
                },
                app_container: app_container(pod).unwrap_or_default(),
            },
            _ => Role::Other,
        }
    };
    Seen { uid, role, ending: meta.deletion_timestamp.is_some() }
}

fn app_container(pod: &Pod) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let status = statuses.iter().find(|status| status.name == APP_CONTAINER)?;
    Some(sandbox::container_id(status.container_id.as_deref()?).to_owned())
}

struct Pods {
    settings: Arc<PodSettings>,
    gate: Arc<Gate>,
    node: NodeHandle,
    metrics: Metrics,
    seen: BTreeMap<String, Seen>,
    served: BTreeMap<String, Served>,
    /// At most one for each pod of the node.
    servers: JoinSet<()>,
    exempt: HashSet<u64>,
    stop: CancellationToken,
}

impl Pods {
    fn apply(&mut self, seen: Seen) {
        if let Role::Space { pod, app_container } = &seen.role {
            let served = self.served.entry(seen.uid.clone()).or_insert_with(|| {
                let served = Served { container: AppContainer::default(), stop: self.stop.child_token() };
                let server = PodServer {
                    settings: Arc::clone(&self.settings),
                    pod: pod.clone(),
                    backend: Arc::new(SpaceBackend::new(pod.clone(), Arc::clone(&served.container), self.node.clone())),
                    metrics: self.metrics.clone(),
                    stop: served.stop.clone(),
                };
                self.servers.spawn(server.run());
                served
            });
            served.container.write().unwrap_or_else(PoisonError::into_inner).clone_from(app_container);
            if seen.ending {
                // A frozen worker would not hear its parent's SIGTERM and hold up the pod's end.
                self.node.send(Input::Event(Event::PodEnding { pod_uid: seen.uid.clone() }));
            }
        }
        self.seen.insert(seen.uid.clone(), seen);
    }

    fn remove(&mut self, uid: &str) {
        self.seen.remove(uid);
        if let Some(served) = self.served.remove(uid) {
            served.stop.cancel();
            let pod_uid = uid.to_owned();
            self.node.send(Input::Event(Event::PodEnding { pod_uid }));
        }
    }

    fn keep_only(&mut self, listed: &BTreeMap<String, Seen>) {
        let gone: Vec<String> = self.seen.keys().filter(|uid| !listed.contains_key(*uid)).cloned().collect();
        for uid in gone {
            self.remove(&uid);
        }
    }

    /// Level-triggered: what is exempt follows from the pods that are seen and the cgroups that exist.
    fn derive_exemptions(&mut self) {
        let own = self.settings.own_pod_uid.iter();
        let exempt = self.seen.values().filter(|seen| seen.role == Role::Exempt).map(|seen| &seen.uid).chain(own);
        let mut cgroups: HashSet<u64> = exempt
            .filter_map(|uid| gate::cgroup_id(&sandbox::pod_cgroup(&self.settings.pods_cgroup, uid)?).ok())
            .collect();
        if fault::is(Fault::GateOpenToAll) {
            cgroups.extend(gate::cgroup_id(&self.settings.pods_cgroup));
        }
        if cgroups != self.exempt {
            match self.gate.set_exempt(&cgroups) {
                Ok(()) => self.exempt = cgroups,
                Err(error) => tracing::error!(error = %error_chain(&error), "The gate's exemptions cannot be set"),
            }
        }
    }
}

/// Serves one Space's pod for as long as the pod is.
struct PodServer {
    settings: Arc<PodSettings>,
    pod: SpacePod,
    backend: Arc<SpaceBackend>,
    metrics: Metrics,
    stop: CancellationToken,
}

impl PodServer {
    async fn run(self) {
        // One round for each sandbox; a pod gets a new one if the old one died.
        while let Some(found) = self.sandbox().await {
            let served = self.serve(found).await;
            if let Err(error) = served {
                tracing::error!(error = %error_chain(&error), pod = self.pod.name, "The device API cannot be served");
                tokio::select! {
                    () = self.stop.cancelled() => return,
                    () = tokio::time::sleep(SLOW_LOOK) => {}
                }
            }
        }
    }

    /// Waits for the sandbox; `None` when the pod is gone. Looks for as long as the pod exists.
    async fn sandbox(&self) -> Option<Sandbox> {
        let mut looks = 0_u32;
        loop {
            let cgroup = sandbox::pod_cgroup(&self.settings.pods_cgroup, &self.pod.pod_uid);
            looks = looks.saturating_add(1);
            let mut pause = if looks < QUICK_LOOKS { SANDBOX_LOOK } else { SLOW_LOOK };
            match cgroup.map_or(Ok(None), |cgroup| sandbox::sandbox(&cgroup)) {
                Ok(None) => {}
                Ok(found) => return found,
                Err(error) => {
                    tracing::error!(%error, pod = self.pod.name, "The host's network namespace cannot be looked at");
                    pause = SLOW_LOOK;
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return None,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn serve(&self, found: Sandbox) -> Result<(), ServeError> {
        let Sandbox { process, network } = found;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.settings.port));
        let Bound { listener, sockets } =
            tokio::task::spawn_blocking(move || listen::bind_in_netns(network.as_fd(), address))
                .await
                .map_err(std::io::Error::other)??;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        if let Err(error) = &sockets {
            tracing::warn!(%error, pod = self.pod.name, "Callers that leave a copy of their connection are not noticed");
        }
        tracing::info!(pod = self.pod.name, namespace = self.pod.namespace, %address, "The device API is open");
        self.metrics.pod_served(true);
        let end = self.stop.child_token();
        let (backend, metrics) = (Arc::clone(&self.backend), self.metrics.clone());
        let serving = device_api::serve(listener, sockets.ok(), backend, Limits::default(), metrics, end.clone());
        tokio::pin!(serving);
        let watched = tokio::select! {
            () = &mut serving => Ok(()),
            ended = process.ended() => {
                tracing::info!(pod = self.pod.name, "The pod's sandbox ended");
                end.cancel();
                serving.await;
                ended
            }
        };
        self.metrics.pod_served(false);
        Ok(watched?)
    }
}

#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("cannot listen in the pod's network namespace")]
    Listen(#[from] listen::ListenError),
    #[error("cannot watch the pod's sandbox or its socket")]
    Io(#[from] std::io::Error),
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings() -> PodSettings {
        PodSettings {
            node: "n".to_owned(),
            pods_cgroup: PathBuf::new(),
            port: 7999,
            exempt_namespaces: vec!["monitoring".to_owned()],
            own_pod_uid: Some("own".to_owned()),
        }
    }

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    fn space_pod() -> serde_json::Value {
        json!({
            "metadata": {
                "name": "hello-1", "namespace": "demo", "uid": "u1",
                "labels": {"spaceport.dev/space": "hello", "spaceport.dev/space-uid": "s1"},
                "annotations": {"spaceport.dev/revision": "00c4f2a19b7e55d3"},
            },
            "spec": {"containers": [{"name": "app"}]},
            "status": {"containerStatuses": [
                {"name": "app", "containerID": "containerd://c1", "image": "", "imageID": "", "ready": true, "restartCount": 0},
            ]},
        })
    }

    #[test]
    fn a_pod_of_a_space_is_known_by_its_labels_and_its_app_container_by_its_name() {
        let Role::Space { pod, app_container } = look(&pod(space_pod()), &settings()).role else { panic!() };
        assert_eq!((pod.space.as_str(), pod.space_uid.as_str(), pod.pod_uid.as_str()), ("hello", "s1", "u1"));
        assert_eq!(app_container, "c1");
        assert_eq!(pod.revision, Revision::of("00c4f2a19b7e55d3"));
    }

    #[test]
    fn a_pod_without_a_revision_that_can_be_read_is_served_all_the_same() {
        for annotations in [json!({}), json!({"spaceport.dev/revision": "newest"})] {
            let mut value = space_pod();
            value["metadata"]["annotations"] = annotations;
            let Role::Space { pod, .. } = look(&pod(value), &settings()).role else { panic!() };
            assert_eq!(pod.revision, Revision::default());
        }
    }

    #[test]
    fn a_space_on_the_hosts_network_is_never_served() {
        let mut value = space_pod();
        value["spec"]["hostNetwork"] = json!(true);
        assert_eq!(look(&pod(value), &settings()).role, Role::Other);
    }

    #[test]
    fn dedicated_pods_exempt_namespaces_and_the_agent_itself_pass_the_gate() {
        let mut dedicated = space_pod();
        dedicated["spec"]["containers"][0]["resources"] = json!({"limits": {"spaceport.dev/xlarge": "1"}});
        let mut monitoring = space_pod();
        monitoring["metadata"]["namespace"] = json!("monitoring");
        let mut own = space_pod();
        own["metadata"]["uid"] = json!("own");
        for value in [dedicated, monitoring, own] {
            assert_eq!(look(&pod(value), &settings()).role, Role::Exempt);
        }
        let mut seat = space_pod();
        seat["spec"]["containers"][0]["resources"] = json!({"limits": {"spaceport.dev/seat": "1"}});
        assert!(matches!(look(&pod(seat), &settings()).role, Role::Space { .. }));
    }
}
