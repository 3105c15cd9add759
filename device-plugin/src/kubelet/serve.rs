//! The device-plugin server of one resource. It knows no pods and keeps no state: what it answers follows from the list of
//! devices alone (N5).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, stream};
use spaceport_proto::kubelet::device_plugin as api;
use spaceport_proto::kubelet::device_plugin::device_plugin_server::{DevicePlugin, DevicePluginServer};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::register::options;
use super::sock_watch::{Identity, identity};
use super::{PluginDevice, Resource};

/// How long a server that ends waits for kubelet to take the last list. Kubelet reads at once; a longer wait would hold up
/// the agent's own end.
const END_LIMIT: Duration = Duration::from_secs(2);

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It does not.
    Running,
    /// On purpose: kubelet is told that there is nothing any more.
    Emptied,
    /// To be replaced at once: streams end, kubelet keeps what it knows.
    Replaced,
}

/// The socket could not be served.
#[derive(Debug, thiserror::Error)]
#[error("the socket {} cannot be {action}", path.display())]
pub struct ServeError {
    /// The socket.
    pub path: PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// Why not.
    pub source: io::Error,
}

/// A server that listens. Dropping it ends it without a word to kubelet.
#[derive(Debug)]
pub struct Served {
    path: PathBuf,
    identity: Identity,
    ending: watch::Sender<Ending>,
    streams: watch::Receiver<usize>,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Served {
    /// Listens at the resource's socket in `directory`, in place of whatever socket is there.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(
        directory: &Path,
        resource: Resource,
        devices: watch::Receiver<Vec<PluginDevice>>,
    ) -> Result<Self, ServeError> {
        let path = directory.join(resource.socket());
        let failed = |action| {
            let path = path.clone();
            move |source| ServeError { path, action, source }
        };
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("replaced")(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed("bound"))?;
        let bound = identity(&path).map_err(failed("looked at"))?;
        let identity = bound.ok_or_else(|| failed("found again")(io::ErrorKind::NotFound.into()))?;
        let (ending, mut end) = watch::channel(Ending::Running);
        let (streams_sender, streams) = watch::channel(0);
        let service = Service { resource, devices, ending: ending.subscribe(), streams: streams_sender };
        let server = tonic::transport::Server::builder()
            .add_service(DevicePluginServer::new(service))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
                // An error means that the sender is gone: this server is to end too.
                drop(end.wait_for(|ending| *ending != Ending::Running).await);
            });
        Ok(Self { path, identity, ending, streams, task: tokio::spawn(server) })
    }

    /// True while the path still names the socket that this server listens on.
    pub fn is_at_its_path(&self) -> bool {
        // A path that cannot be looked at is as good as lost.
        identity(&self.path).is_ok_and(|present| present == Some(self.identity))
    }

    /// True if the server has ended by itself.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    /// Open ListAndWatch streams.
    pub fn streams(&self) -> usize {
        *self.streams.borrow()
    }

    /// Waits until the number of streams changes; never once the server has ended.
    pub async fn streams_changed(&mut self) {
        if self.streams.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Ends the server within two seconds.
    pub async fn end(mut self, how: Ending) {
        self.ending.send_replace(how);
        if tokio::time::timeout(END_LIMIT, &mut self.task).await.is_err() {
            tracing::warn!(socket = %self.path.display(), "Kubelet kept its stream open; it is cut");
        }
        if how == Ending::Emptied && self.is_at_its_path() {
            // Best effort: a socket nobody listens on is refused when dialled.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Service {
    resource: Resource,
    devices: watch::Receiver<Vec<PluginDevice>>,
    ending: watch::Receiver<Ending>,
    streams: watch::Sender<usize>,
}

/// Counts a stream for as long as it lives.
struct Counted(watch::Sender<usize>);

impl Counted {
    fn new(streams: &watch::Sender<usize>) -> Self {
        streams.send_modify(|count| *count += 1);
        Self(streams.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

struct Following {
    devices: watch::Receiver<Vec<PluginDevice>>,
    ending: watch::Receiver<Ending>,
    first: bool,
    over: bool,
    _counted: Counted,
}

impl Following {
    /// The next full list; `None` at the end of the stream.
    async fn next(&mut self) -> Option<api::ListAndWatchResponse> {
        if self.over {
            return None;
        }
        if !std::mem::take(&mut self.first) {
            tokio::select! {
                biased;
                how = self.ending.wait_for(|ending| *ending != Ending::Running) => {
                    self.over = true;
                    // No sender: the server was dropped, which is no word to kubelet either.
                    return how.is_ok_and(|how| *how == Ending::Emptied).then(api::ListAndWatchResponse::default);
                }
                changed = self.devices.changed() => changed.ok()?,
            }
        }
        Some(full_list(&self.devices.borrow_and_update()))
    }
}

fn full_list(devices: &[PluginDevice]) -> api::ListAndWatchResponse {
    let listed = |device: &PluginDevice| api::Device {
        id: device.id.clone(),
        health: if device.healthy { api::HEALTHY } else { api::UNHEALTHY }.to_owned(),
        topology: None,
    };
    api::ListAndWatchResponse { devices: devices.iter().map(listed).collect() }
}

#[tonic::async_trait]
impl DevicePlugin for Service {
    async fn get_device_plugin_options(
        &self,
        _: Request<api::Empty>,
    ) -> Result<Response<api::DevicePluginOptions>, Status> {
        Ok(Response::new(options()))
    }

    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<api::ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(&self, _: Request<api::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let following = Following {
            devices: self.devices.clone(),
            ending: self.ending.clone(),
            first: true,
            over: false,
            _counted: Counted::new(&self.streams),
        };
        let lists = stream::unfold(following, |mut following| async move {
            let list = following.next().await?;
            Some((Ok(list), following))
        });
        Ok(Response::new(Box::pin(lists)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<api::PreferredAllocationRequest>,
    ) -> Result<Response<api::PreferredAllocationResponse>, Status> {
        let container_responses = request.into_inner().container_requests.into_iter().map(preferred).collect();
        Ok(Response::new(api::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(
        &self,
        request: Request<api::AllocateRequest>,
    ) -> Result<Response<api::AllocateResponse>, Status> {
        let known = self.devices.borrow().clone();
        let containers = request.into_inner().container_requests.into_iter();
        let container_responses =
            containers.map(|container| allocated(self.resource, &known, &container)).collect::<Result<_, _>>()?;
        Ok(Response::new(api::AllocateResponse { container_responses }))
    }

    async fn pre_start_container(
        &self,
        _: Request<api::PreStartContainerRequest>,
    ) -> Result<Response<api::PreStartContainerResponse>, Status> {
        // Not asked for in the options; an answer does no harm.
        Ok(Response::new(api::PreStartContainerResponse {}))
    }
}

/// What a container with these devices gets: their CDI devices, each once, and nothing else.
fn allocated(
    resource: Resource,
    known: &[PluginDevice],
    request: &api::ContainerAllocateRequest,
) -> Result<api::ContainerAllocateResponse, Status> {
    let by_id: BTreeMap<&str, &PluginDevice> = known.iter().map(|device| (device.id.as_str(), device)).collect();
    let mut names = BTreeSet::new();
    for id in &request.devices_ids {
        let device = by_id.get(id.as_str()).ok_or_else(|| {
            let (name, count) = (resource.name(), known.len());
            Status::not_found(format!("{id:?} is none of the {count} devices of {name} on this node"))
        })?;
        names.insert(device.cdi_device.clone());
    }
    let cdi_devices = names.into_iter().map(|name| api::CdiDevice { name }).collect();
    Ok(api::ContainerAllocateResponse { cdi_devices, ..api::ContainerAllocateResponse::default() })
}

/// Which devices to take: those that must be, then the lowest numbers, so that the same ones are used again and again and
/// the highest cards stay free. Never an error: kubelet would fail the pod for what is only a wish.
fn preferred(request: api::ContainerPreferredAllocationRequest) -> api::ContainerPreferredAllocationResponse {
    let size = usize::try_from(request.allocation_size).unwrap_or(0);
    let mut available = request.available_device_i_ds;
    available.sort_by(|a, b| natural(a).cmp(&natural(b)));
    let mut must_include = request.must_include_device_i_ds;
    must_include.sort_by(|a, b| natural(a).cmp(&natural(b)));
    let mut taken: Vec<String> = Vec::new();
    for id in must_include.into_iter().chain(available) {
        if taken.len() < size && !taken.contains(&id) {
            taken.push(id);
        }
    }
    api::ContainerPreferredAllocationResponse { device_i_ds: taken }
}

/// Orders `seat-9` before `seat-10`.
fn natural(id: &str) -> (&str, u64, &str) {
    let digits = id.len() - id.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (prefix, number) = id.split_at(id.len() - digits);
    (prefix, number.parse().unwrap_or(u64::MAX), number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_preferred_devices_are_the_lowest_numbers_behind_those_that_must_be() {
        let asked = |available: &[&str], must: &[&str], allocation_size| {
            preferred(api::ContainerPreferredAllocationRequest {
                available_device_i_ds: ids(available),
                must_include_device_i_ds: ids(must),
                allocation_size,
            })
            .device_i_ds
        };
        assert_eq!(asked(&["seat-10", "seat-9", "seat-2"], &[], 2), ["seat-2", "seat-9"]);
        assert_eq!(asked(&["seat-2", "seat-10", "seat-9"], &["seat-10"], 2), ["seat-10", "seat-2"]);
        // Wishes that cannot be met are met as far as they go.
        assert_eq!(asked(&["seat-1"], &[], 3), ["seat-1"]);
        assert_eq!(asked(&["seat-1"], &[], -1), ids(&[]));
        assert_eq!(asked(&["b", "a", "99999999999999999999999"], &[], 3), ["99999999999999999999999", "a", "b"]);
    }
}
