//! Which pods hold our devices, by kubelet's own book (N4, N5: there is no Deallocate).

use std::path::{Path, PathBuf};
use std::time::Duration;

use spaceport_proto::kubelet::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use spaceport_proto::kubelet::pod_resources::{ListPodResourcesRequest, ListPodResourcesResponse};
use tonic::transport::Endpoint;

use super::Resource;

/// Kubelet's own limit for this answer.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// The answer comes from memory; a kubelet that needs longer is not well.
const LIMIT: Duration = Duration::from_secs(5);

/// Devices of one resource that one container holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Namespace of the pod.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// The container.
    pub container: String,
    /// Which resource.
    pub resource: Resource,
    /// Device ids.
    pub devices: Vec<String>,
}

/// Kubelet did not tell.
#[derive(Debug, thiserror::Error)]
pub enum PodResourcesError {
    /// Nobody listens.
    #[error("kubelet's pod-resources interface does not answer at {}", socket.display())]
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// It answered with an error.
    #[error("kubelet's pod-resources interface refuses")]
    Refused {
        /// Its words.
        source: Box<tonic::Status>,
    },
    /// No answer.
    #[error("kubelet's pod-resources interface did not answer within {} s", LIMIT.as_secs())]
    TimedOut,
}

/// Everything of ours that pods hold, sorted.
///
/// # Errors
/// [`PodResourcesError`]; then nothing is known.
pub async fn list(socket: &Path) -> Result<Vec<Holding>, PodResourcesError> {
    let ask = async {
        let unreachable = |source| PodResourcesError::Unreachable { socket: socket.to_owned(), source };
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display())).map_err(unreachable)?;
        let channel = channel.connect().await.map_err(unreachable)?;
        let mut client = PodResourcesListerClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        let answer = client.list(ListPodResourcesRequest {}).await;
        answer.map_err(|source| PodResourcesError::Refused { source: Box::new(source) })
    };
    let answer = tokio::time::timeout(LIMIT, ask).await.unwrap_or(Err(PodResourcesError::TimedOut))?;
    Ok(ours(answer.into_inner()))
}

fn ours(answer: ListPodResourcesResponse) -> Vec<Holding> {
    let mut holdings = Vec::new();
    for pod in answer.pod_resources {
        for container in pod.containers {
            for held in container.devices {
                let Some(resource) = Resource::named(&held.resource_name) else { continue };
                let mut devices = held.device_ids;
                devices.sort();
                holdings.push(Holding {
                    namespace: pod.namespace.clone(),
                    pod: pod.name.clone(),
                    container: container.name.clone(),
                    resource,
                    devices,
                });
            }
        }
    }
    // Kubelet walks a map: the order says nothing, and must not make two equal answers differ.
    holdings.sort_by(|a, b| {
        let key = |holding: &Holding| (holding.namespace.clone(), holding.pod.clone(), holding.container.clone());
        (key(a), a.resource, &a.devices).cmp(&(key(b), b.resource, &b.devices))
    });
    holdings
}
