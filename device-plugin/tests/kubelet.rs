//! The kubelet side against a kubelet that is played here: its sockets, its sweeping of the directory, its calls.

// The lint's exception for tests covers test functions only, and here even the helpers are test code.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use spaceport_crds::{CardSelection, DedicatedCards, GpuSize, LargeShare, SlicingMode};
use spaceport_device_plugin::cdi::{CdiFile, DriverRoot};
use spaceport_device_plugin::converge::View;
use spaceport_device_plugin::inventory::{Card, DeviceNodes, Health, LibraryState, NodeInventory};
use spaceport_device_plugin::kubelet::plugin::{self, PluginSettings, PluginState};
use spaceport_device_plugin::kubelet::{self, Inputs, KubeletSettings, KubeletView, PluginDevice, Resource};
use spaceport_device_plugin::policy::{Policy, PoolPolicy};
use spaceport_proto::kubelet::device_plugin as api;
use spaceport_proto::kubelet::device_plugin::device_plugin_client::DevicePluginClient;
use spaceport_proto::kubelet::device_plugin::registration_server::{Registration, RegistrationServer};
use spaceport_proto::kubelet::pod_resources as pods;
use spaceport_proto::kubelet::pod_resources::pod_resources_lister_server::{
    PodResourcesLister, PodResourcesListerServer,
};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// What does happen takes milliseconds; this is for a machine that is busy with builds.
const PATIENCE: Duration = Duration::from_secs(30);

async fn soon<T>(what: &str, coming: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, coming).await.unwrap_or_else(|_| panic!("it never came to: {what}"))
}

struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("sp-{test}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

struct Register(mpsc::Sender<api::RegisterRequest>, bool);

#[tonic::async_trait]
impl Registration for Register {
    async fn register(&self, request: Request<api::RegisterRequest>) -> Result<Response<api::Empty>, Status> {
        self.0.send(request.into_inner()).await.unwrap();
        if self.1 { Err(Status::unknown("not today")) } else { Ok(Response::new(api::Empty {})) }
    }
}

/// A kubelet that takes registrations until it is dropped.
struct Kubelet {
    registrations: mpsc::Receiver<api::RegisterRequest>,
    server: JoinHandle<()>,
}

impl Kubelet {
    /// As kubelet does it: sweep the directory, then listen.
    fn start(directory: &Path, refuses: bool) -> Self {
        for entry in fs::read_dir(directory).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        Self::start_beside(directory, refuses)
    }

    fn start_beside(directory: &Path, refuses: bool) -> Self {
        let (sender, registrations) = mpsc::channel(16);
        let listener = UnixListener::bind(directory.join("kubelet.sock")).unwrap();
        let server = Server::builder().add_service(RegistrationServer::new(Register(sender, refuses)));
        let serve = server.serve_with_incoming(UnixListenerStream::new(listener));
        Self { registrations, server: tokio::spawn(async move { serve.await.unwrap() }) }
    }

    async fn registered(&mut self) -> api::RegisterRequest {
        soon("a registration", self.registrations.recv()).await.unwrap()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn dial(directory: &Path, resource: Resource) -> DevicePluginClient<Channel> {
    let socket = directory.join(resource.socket());
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    DevicePluginClient::new(endpoint.connect().await.unwrap())
}

async fn lists(directory: &Path, resource: Resource) -> Streaming<api::ListAndWatchResponse> {
    dial(directory, resource).await.list_and_watch(api::Empty {}).await.unwrap().into_inner()
}

/// The next list as (id, healthy), or `None` at the end of the stream.
async fn next(lists: &mut Streaming<api::ListAndWatchResponse>) -> Option<Vec<(String, bool)>> {
    let list = soon("a list of devices", lists.message()).await.unwrap()?;
    Some(list.devices.into_iter().map(|device| (device.id, device.health == api::HEALTHY)).collect())
}

fn seats(count: u32) -> Vec<PluginDevice> {
    let seat = |number| PluginDevice {
        id: format!("seat-{number}"),
        healthy: true,
        cdi_device: "spaceport.dev/gpu=seat".to_owned(),
    };
    (0..count).map(seat).collect()
}

struct Plugin {
    devices: watch::Sender<Vec<PluginDevice>>,
    state: watch::Receiver<PluginState>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Plugin {
    fn start(directory: &Path) -> Self {
        // A poll that never comes: what is seen is seen by inotify.
        let settings = PluginSettings { poll: 10 * PATIENCE, ..PluginSettings::new(directory, Resource::Seat) };
        Self::start_with(settings)
    }

    fn start_with(settings: PluginSettings) -> Self {
        let (devices, listed) = watch::channel(seats(3));
        let (publish, state) = watch::channel(PluginState::Idle);
        let stop = CancellationToken::new();
        let task = tokio::spawn(plugin::run(settings, listed, publish, stop.clone()));
        Self { devices, state, stop, task }
    }

    async fn until(&mut self, what: &str, holds: impl FnMut(&PluginState) -> bool) {
        drop(soon(what, self.state.wait_for(holds)).await.unwrap());
    }
}

#[tokio::test]
async fn it_registers_by_its_names_and_again_when_kubelet_restarts() {
    let directory = Directory::new("restart");
    let mut plugin = Plugin::start(&directory.0);
    plugin.until("waiting for kubelet", |state| matches!(state, PluginState::Waiting { .. })).await;
    let mut kubelet = Kubelet::start_beside(&directory.0, false);
    let request = kubelet.registered().await;
    assert_eq!((request.version.as_str(), request.endpoint.as_str()), ("v1beta1", "spaceport-seat.sock"));
    assert_eq!(request.resource_name, "spaceport.dev/seat");
    assert!(request.options.unwrap().get_preferred_allocation_available);
    plugin.until("registered", |state| *state == PluginState::Registered).await;
    // Twice: a restarted kubelet has swept the directory, our socket included.
    for _ in 0..2 {
        drop(kubelet);
        kubelet = Kubelet::start(&directory.0, false);
        assert_eq!(kubelet.registered().await, request);
        let mut lists = soon("our socket", served_again(&directory.0)).await;
        assert_eq!(next(&mut lists).await.unwrap().len(), 3);
    }
}

/// Dials until it answers: between a sweep and the next bind nobody listens.
async fn served_again(directory: &Path) -> Streaming<api::ListAndWatchResponse> {
    loop {
        let socket = directory.join(Resource::Seat.socket());
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        if let Ok(channel) = endpoint.connect().await
            && let Ok(lists) = DevicePluginClient::new(channel).list_and_watch(api::Empty {}).await
        {
            return lists.into_inner();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn it_serves_and_registers_again_when_its_own_socket_is_deleted_or_replaced() {
    let directory = Directory::new("own-socket");
    let mut kubelet = Kubelet::start(&directory.0, false);
    let _plugin = Plugin::start(&directory.0);
    kubelet.registered().await;
    let mut before = lists(&directory.0, Resource::Seat).await;
    assert_eq!(next(&mut before).await.unwrap().len(), 3);
    let socket = directory.0.join("spaceport-seat.sock");
    fs::remove_file(&socket).unwrap();
    kubelet.registered().await;
    // The old stream ends without an empty list: kubelet would take our pods' seats away.
    assert_eq!(next(&mut before).await, None);
    assert_eq!(next(&mut lists(&directory.0, Resource::Seat).await).await.unwrap().len(), 3);
    // Another file in its place is not our socket either.
    fs::write(directory.0.join("other"), "").unwrap();
    fs::rename(directory.0.join("other"), &socket).unwrap();
    kubelet.registered().await;
    assert_eq!(next(&mut lists(&directory.0, Resource::Seat).await).await.unwrap().len(), 3);
}

#[tokio::test]
async fn the_poll_alone_finds_what_inotify_misses_and_a_new_directory_is_watched() {
    let directory = Directory::new("poll");
    let inner = directory.0.join("device-plugins");
    let poll = Duration::from_millis(50);
    let mut plugin = Plugin::start_with(PluginSettings { poll, ..PluginSettings::new(&inner, Resource::Seat) });
    // The directory does not exist yet.
    plugin.until("no directory", |state| matches!(state, PluginState::Waiting { .. })).await;
    fs::create_dir(&inner).unwrap();
    let mut kubelet = Kubelet::start_beside(&inner, false);
    kubelet.registered().await;
    // The whole directory is replaced by another.
    fs::rename(&inner, directory.0.join("old")).unwrap();
    fs::create_dir(&inner).unwrap();
    let mut kubelet = Kubelet::start_beside(&inner, false);
    kubelet.registered().await;
}

#[tokio::test]
async fn a_refusal_is_tried_again_and_its_words_are_kept() {
    let directory = Directory::new("refusal");
    let mut kubelet = Kubelet::start(&directory.0, true);
    let mut plugin = Plugin::start(&directory.0);
    for _ in 0..3 {
        kubelet.registered().await;
    }
    let refused =
        |state: &PluginState| matches!(state, PluginState::Waiting { reason } if reason.contains("not today"));
    plugin.until("the refusal's words", refused).await;
}

#[tokio::test]
async fn a_kubelet_that_does_not_listen_is_told_again() {
    let directory = Directory::new("deaf");
    let mut kubelet = Kubelet::start(&directory.0, false);
    let stream_limit = Duration::from_millis(200);
    let settings = PluginSettings { stream_limit, ..PluginSettings::new(&directory.0, Resource::Seat) };
    let _plugin = Plugin::start_with(settings);
    kubelet.registered().await;
    kubelet.registered().await;
    // With a stream open it is content; when the stream ends it tells again.
    let mut lists = lists(&directory.0, Resource::Seat).await;
    assert_eq!(next(&mut lists).await.unwrap().len(), 3);
    while kubelet.registrations.try_recv().is_ok() {}
    drop(lists);
    kubelet.registered().await;
}

#[tokio::test]
async fn every_stream_gets_every_list_in_full_and_an_empty_one_at_a_deliberate_stop() {
    let directory = Directory::new("streams");
    let mut kubelet = Kubelet::start(&directory.0, false);
    let plugin = Plugin::start(&directory.0);
    kubelet.registered().await;
    let mut both = [lists(&directory.0, Resource::Seat).await, lists(&directory.0, Resource::Seat).await];
    for lists in &mut both {
        assert_eq!(next(lists).await.unwrap().len(), 3);
    }
    plugin.devices.send_modify(|devices| devices[1].healthy = false);
    let expected =
        [("seat-0", true), ("seat-1", false), ("seat-2", true)].map(|(id, healthy)| (id.to_owned(), healthy));
    for lists in &mut both {
        assert_eq!(next(lists).await.unwrap(), expected);
    }
    // All devices may go without the plugin going.
    plugin.devices.send_replace(Vec::new());
    plugin.devices.send_replace(seats(1));
    for lists in &mut both {
        while next(lists).await.unwrap().len() != 1 {}
    }
    plugin.stop.cancel();
    for lists in &mut both {
        assert_eq!(next(lists).await.unwrap(), []);
        assert_eq!(next(lists).await, None);
    }
    soon("the end", plugin.task).await.unwrap();
    assert!(!directory.0.join("spaceport-seat.sock").exists());
    assert_eq!(*plugin.state.borrow(), PluginState::Idle);
}

fn asked(containers: &[&[&str]]) -> api::AllocateRequest {
    let container =
        |ids: &&[&str]| api::ContainerAllocateRequest { devices_ids: ids.iter().map(|id| (*id).to_owned()).collect() };
    api::AllocateRequest { container_requests: containers.iter().map(container).collect() }
}

#[tokio::test]
async fn the_same_allocation_has_the_same_answer_however_often_and_for_how_many_containers() {
    let directory = Directory::new("allocate");
    let mut kubelet = Kubelet::start(&directory.0, false);
    let _plugin = Plugin::start(&directory.0);
    kubelet.registered().await;
    let mut client = dial(&directory.0, Resource::Seat).await;
    let seat = api::ContainerAllocateResponse {
        cdi_devices: vec![api::CdiDevice { name: "spaceport.dev/gpu=seat".to_owned() }],
        ..api::ContainerAllocateResponse::default()
    };
    for _ in 0..2 {
        let one = client.allocate(asked(&[&["seat-1"]])).await.unwrap().into_inner();
        assert_eq!(one.container_responses, std::slice::from_ref(&seat));
    }
    // Two seats of one container are the same device twice; the same seat in two calls is none of our business.
    let several = client.allocate(asked(&[&["seat-0", "seat-2"], &["seat-1"], &[]])).await.unwrap().into_inner();
    let nothing = api::ContainerAllocateResponse::default();
    assert_eq!(several.container_responses, [seat.clone(), seat, nothing]);
    let refused = client.allocate(asked(&[&["seat-1"], &["seat-9"]])).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound);
    assert_eq!(refused.message(), "\"seat-9\" is none of the 3 devices of spaceport.dev/seat on this node");
}

#[tokio::test]
async fn the_preferred_allocation_is_packed_and_never_refused() {
    let directory = Directory::new("preferred");
    let mut kubelet = Kubelet::start(&directory.0, false);
    let _plugin = Plugin::start(&directory.0);
    kubelet.registered().await;
    let mut client = dial(&directory.0, Resource::Seat).await;
    let wish = |available: &[&str], must: &[&str], allocation_size| api::ContainerPreferredAllocationRequest {
        available_device_i_ds: available.iter().map(|id| (*id).to_owned()).collect(),
        must_include_device_i_ds: must.iter().map(|id| (*id).to_owned()).collect(),
        allocation_size,
    };
    let container_requests =
        vec![wish(&["seat-2", "seat-0", "seat-1"], &["seat-2"], 2), wish(&["nonsense"], &[], 5), wish(&[], &[], -3)];
    let answer = client.get_preferred_allocation(api::PreferredAllocationRequest { container_requests }).await.unwrap();
    let chosen: Vec<Vec<String>> =
        answer.into_inner().container_responses.into_iter().map(|container| container.device_i_ds).collect();
    assert_eq!(chosen, [vec!["seat-2".to_owned(), "seat-0".to_owned()], vec!["nonsense".to_owned()], vec![]]);
}

struct Pods(watch::Receiver<Vec<pods::PodResources>>);

#[tonic::async_trait]
impl PodResourcesLister for Pods {
    async fn list(
        &self,
        _: Request<pods::ListPodResourcesRequest>,
    ) -> Result<Response<pods::ListPodResourcesResponse>, Status> {
        Ok(Response::new(pods::ListPodResourcesResponse { pod_resources: self.0.borrow().clone() }))
    }
}

fn card(index: u32) -> Card {
    Card {
        index,
        nvml_index: index,
        minor: index,
        uuid: format!("GPU-{index}"),
        model: "NVIDIA H200".to_owned(),
        memory_total_bytes: 1 << 37,
        compute_capability: None,
        mig_enabled: false,
        health: Health::Healthy,
    }
}

fn policy(dedicated: Vec<DedicatedCards>) -> Policy {
    let pool = PoolPolicy {
        name: "default".to_owned(),
        mode: SlicingMode::Shared,
        large: LargeShare::Half,
        cards: CardSelection { dedicated, ..CardSelection::default() },
        seats: 2,
        min_memory: None,
    };
    Policy { pool: Some(pool), ..Policy::default() }
}

#[tokio::test]
async fn the_whole_side_offers_by_pool_keeps_a_held_card_and_leaves_nothing_behind() {
    let directory = Directory::new("whole");
    let (plugins, pod_resources) = (directory.0.join("device-plugins"), directory.0.join("pod-resources"));
    fs::create_dir_all(&plugins).unwrap();
    fs::create_dir_all(&pod_resources).unwrap();
    let mut kubelet = Kubelet::start(&plugins, false);
    let held = pods::PodResources {
        name: "job".to_owned(),
        namespace: "alice".to_owned(),
        containers: vec![pods::ContainerResources {
            name: "app".to_owned(),
            devices: vec![
                pods::ContainerDevices {
                    resource_name: "spaceport.dev/xlarge".to_owned(),
                    device_ids: vec!["card-1".to_owned()],
                },
                pods::ContainerDevices {
                    resource_name: "example.com/other".to_owned(),
                    device_ids: vec!["x".to_owned()],
                },
            ],
        }],
    };
    let (_held, listed) = watch::channel(vec![held]);
    let listener = UnixListener::bind(pod_resources.join("kubelet.sock")).unwrap();
    let lister = Server::builder().add_service(PodResourcesListerServer::new(Pods(listed)));
    let lister = tokio::spawn(lister.serve_with_incoming(UnixListenerStream::new(listener)));

    let cdi = CdiFile::new(&directory.0.join("cdi"));
    let settings = KubeletSettings {
        device_plugin_directory: plugins.clone(),
        pod_resources_socket: KubeletSettings::pod_resources_socket(&directory.0),
        cdi: cdi.clone(),
        nodes: DeviceNodes::new("/nonexistent".into()),
        driver: DriverRoot { on_host: "/".into(), here: "/nonexistent".into() },
    };
    let cards = vec![card(0), card(1)];
    let (inventory, inventory_seen) = watch::channel(Arc::new(NodeInventory::default()));
    let (policies, policy_seen) = watch::channel(Policy::default());
    let (_leases, leases) = watch::channel(View::default());
    let (publish, mut view) = watch::channel(KubeletView::default());
    let stop = CancellationToken::new();
    let inputs = Inputs { inventory: inventory_seen, policy: policy_seen, leases };
    let whole = tokio::spawn(kubelet::run(settings, inputs, publish, stop.clone()));

    // Nothing is known, so nothing is offered; then a pool that dedicates card 1 is.
    policies.send_replace(policy(vec![DedicatedCards { size: GpuSize::Xlarge, indexes: vec![1] }]));
    let loaded = NodeInventory { library: LibraryState::Loaded, cards, ..NodeInventory::default() };
    inventory.send_replace(Arc::new(loaded));
    let mut endpoints = [kubelet.registered().await, kubelet.registered().await].map(|request| request.endpoint);
    endpoints.sort();
    assert_eq!(endpoints, ["spaceport-seat.sock", "spaceport-xlarge.sock"]);
    let spec: serde_json::Value = serde_json::from_slice(&fs::read(cdi.path()).unwrap()).unwrap();
    assert_eq!(
        (spec["kind"].as_str(), spec["devices"][1]["name"].as_str()),
        (Some("spaceport.dev/gpu"), Some("card-1"))
    );
    let mut xlarge = lists(&plugins, Resource::Xlarge).await;
    assert_eq!(next(&mut xlarge).await.unwrap(), [("card-1".to_owned(), true)]);

    // The pool gives card 1 to leases, but a pod still holds it.
    policies.send_replace(policy(Vec::new()));
    let pending = |view: &KubeletView| view.offer.pending.iter().any(|change| change.held_by == "pod alice/job");
    drop(soon("a change that waits", view.wait_for(pending)).await.unwrap());
    assert_eq!((view.borrow().seats(), view.borrow().seats_used()), (2, 0));
    let registered = BTreeMap::from([
        (Resource::Seat, PluginState::Registered),
        (Resource::Large, PluginState::Idle),
        (Resource::Xlarge, PluginState::Registered),
    ]);
    assert_eq!(view.borrow().plugins, registered);
    assert_eq!(view.borrow().problem(), None);

    stop.cancel();
    assert_eq!(next(&mut xlarge).await.unwrap(), []);
    soon("the end", whole).await.unwrap();
    assert!(!cdi.path().exists());
    assert_eq!(fs::read_dir(&plugins).unwrap().count(), 1, "only kubelet's own socket is left");
    lister.abort();
}
