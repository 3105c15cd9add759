//! Puts the agent together: gate first, then what an earlier agent left behind, then everything that grants. A task that
//! dies ends the process; the gate stays shut meanwhile, and leases run on under the checkpoint.

mod report_only;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use anyhow::Context as _;
use backon::{ExponentialBuilder, Retryable as _};
use spaceport_crds::GPUAccount;
use spaceport_crds::conditions::{ConditionStatus, GPUNodeCondition, GPUNodeReason};
use spaceport_crds::names::TERM_PAGE;
use spaceport_shell::admin::{self, AdminArgs};
use spaceport_shell::readiness::{Condition, Readiness};
use spaceport_shell::signal::StopSignals;
use spaceport_shell::tasks::Tasks;
use spaceport_shell::{error_chain, log};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::args::{Args, CardArgs, GateArgs, KubeletArgs, NodeLinkArgs, PlaceArgs};
use crate::cards;
use crate::cdi::{CdiFile, DriverRoot};
use crate::checkpoint::Checkpoint;
use crate::clock::boottime_ms;
use crate::converge::{Machine, View};
use crate::epoch::EpochFile;
use crate::gate::hierarchy::Tree;
use crate::gate::{self, Gate, GateSettings};
use crate::hardware::{Hardware, Sensors};
use crate::inventory::{self, DeviceNodes, LibraryState, NodeSensors, NvmlHandle, NvmlSettings};
use crate::kubelet::{self, KubeletSettings, KubeletView};
use crate::majors;
use crate::metrics::Metrics;
use crate::node_actor::{Input, NodeActor, NodeHandle, Records};
use crate::node_link::{self, LinkSettings};
use crate::node_status::{self, Finding, NodeIdentity};
use crate::pod_events::{self, PodEvents};
use crate::pods::{self, PodSettings};
use crate::policy::{self, Policy};
use crate::recovery;
use crate::sandbox;

/// How often the gate is looked after: kubelet may make its cgroup anew, the driver may be loaded later.
const GATE_LOOK: Duration = Duration::from_secs(2);
/// How long the start waits for the first inventory and policy, so that the first `Joined` is complete. Without them the
/// node joins with no cards and tells of them later.
const FIRST_LOOK_LIMIT: Duration = Duration::from_secs(10);
/// Tries to read the term page on a node without a fence; then the process ends and is started again.
const TERM_PAGE_TRIES: usize = 20;
/// How long tasks may take to stop. Kubelet's own patience is 30 s.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Runs the agent until a signal or a failure.
///
/// # Errors
/// Whatever keeps the agent from its work.
pub fn run(args: Args) -> anyhow::Result<()> {
    log::start(&args.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    let result = runtime.block_on(agent(args));
    // Threads that wait for a slot to clear are left; the next agent goes on by the checkpoint.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn agent(args: Args) -> anyhow::Result<()> {
    let Args {
        place,
        log: _,
        gate: gate_args,
        cards: card_args,
        kubelet: kubelet_args,
        node_link: link_args,
        device_api_port,
        admin: AdminArgs { admin_listen },
        #[cfg(feature = "faults")]
        fault,
    } = args;
    #[cfg(feature = "faults")]
    crate::fault::choose(fault);
    let stop = CancellationToken::new();
    let mut tasks = Tasks::new(stop.clone());
    let metrics = Metrics::new();
    let readiness = Readiness::new(|condition, met| tracing::info!(condition, met, "Readiness changed"));
    let [gate_attached, pods_read, recovered] = ["gate", "pods", "recovered"].map(|name| readiness.condition(name));
    start_admin(admin_listen, metrics.clone(), readiness, &mut tasks);

    let nodes = DeviceNodes::new(card_args.device_directory.clone());
    let (gate, tree) = match establish_gate(&gate_args, &nodes) {
        Ok(established) => established,
        Err(error) => {
            let reporter = report_only::Reporter { place: &place, cards: &card_args, nodes: &nodes };
            return reporter.run(error, tasks).await;
        }
    };
    tracing::info!(majors = ?gate.majors(), tree, "The gate is shut");
    exempt_ourselves(&gate, place.pod_uid.as_deref());
    gate_attached.set(true);

    let (sensors, nvml) = start_inventory(&card_args, &nodes, &mut tasks);
    let client = client(&place).await?;
    let (policy_sender, policy) = watch::channel(Policy::default());
    let (policy_client, node_name, end) = (client.clone(), place.node.clone(), stop.clone());
    tasks.spawn("policy", async move { policy::run(policy_client, &node_name, policy_sender, end).await });
    first_look(&nvml, policy.clone()).await;

    let identity = NodeIdentity { node: place.node.clone(), agent_instance: new_instance(), boot_id: read_boot_id()? };
    let (pod_events, to_write) = PodEvents::channel();
    tasks.spawn("pod events", pod_events::run(client.clone(), place.node.clone(), to_write, stop.clone()));
    let parts = ActorParts { gate: &gate, sensors: &sensors, metrics: &metrics, events: pod_events };
    let started = start_actor(&place, &client, parts, &identity, &mut tasks).await?;
    recovered.set(true);
    let Started { node, inputs, epoch } = started;

    let pod_settings = PodSettings {
        node: place.node.clone(),
        pods_cgroup: gate.pods_cgroup().to_owned(),
        port: device_api_port,
        exempt_namespaces: gate_args.exempt_namespaces.clone(),
        own_pod_uid: place.pod_uid.clone(),
    };
    let pods =
        pods::run(client.clone(), pod_settings, Arc::clone(&gate), node.clone(), metrics, pods_read, stop.clone());
    tasks.spawn("pods", pods);
    tasks.spawn("memory", cards::watch_memory(nvml.clone(), node.clone(), stop.clone()));
    let link = link_settings(&place, link_args, &identity);
    tasks.spawn("node link", node_link::run(Some(client.clone()), link, epoch.clone(), inputs, stop.clone()));

    let (found, findings) = watch::channel(Vec::new());
    let keeper = GateKeeper {
        gate,
        nodes: nodes.clone(),
        settings: gate_args.gated_majors,
        ready: gate_attached,
        found,
        view: node.view(),
    };
    tasks.spawn("gate", keeper.run(stop.clone()));
    let (offered, kubelet_view) = watch::channel(KubeletView::default());
    let follow = cards::follow(nvml.inventory(), policy.clone(), kubelet_view.clone(), node.clone(), stop.clone());
    tasks.spawn("cards", follow);
    let inputs = kubelet::Inputs { inventory: nvml.inventory(), policy: policy.clone(), leases: node.view() };
    let settings = kubelet_settings(kubelet_args, &card_args, nodes);
    tasks.spawn("kubelet", kubelet::run(settings, inputs, offered, stop.clone()));
    let sources = node_status::Sources {
        inventory: nvml.inventory(),
        policy,
        kubelet: kubelet_view,
        leases: node.view(),
        epoch,
        findings,
    };
    tasks.spawn("node status", node_status::run(client, identity, sources, stop));
    wait_and_stop(tasks, Some(&node)).await
}

/// Waits for a signal or for a task to end, then stops everything; the actor, if there is one, last.
async fn wait_and_stop(mut tasks: Tasks, node: Option<&NodeHandle>) -> anyhow::Result<()> {
    let stop_actor = || node.map(|node| node.send(Input::Stop));
    let mut signals = StopSignals::listen()?;
    let result = tokio::select! {
        _ = signals.next() => Ok(()),
        ended = tasks.next() => ended.unwrap_or(Ok(())),
    };
    tracing::info!("Stopping; the gate stays shut and leases run on under the checkpoint");
    tasks.stop_token().cancel();
    // The device API answers its calls in flight first; they need the actor.
    let drained = tokio::time::timeout(STOP_LIMIT, async {
        let mut actor_told = false;
        while !tasks.is_empty() {
            // All but the actor's own task are over, or it is over itself.
            if tasks.len() <= 1 && !actor_told {
                actor_told = true;
                stop_actor();
            }
            // A failure has been logged, and what began the stop is the result.
            let _ = tasks.next().await;
        }
    })
    .await;
    if drained.is_err() {
        stop_actor();
        tracing::warn!(limit_s = STOP_LIMIT.as_secs(), "Some tasks did not stop in time");
    }
    Ok(result?)
}

fn start_admin(address: SocketAddr, metrics: Metrics, readiness: Readiness, tasks: &mut Tasks) {
    let stop = tasks.stop_token().clone();
    tasks.spawn_fallible("admin endpoint", async move {
        // Bound in here: an address that is taken ends the agent, but only once the gate is shut.
        let listener = admin::bind(address).await?;
        admin::serve(listener, move || metrics.encode(), readiness, crate::fault::routes(), stop).await
    });
}

fn establish_gate(args: &GateArgs, nodes: &DeviceNodes) -> anyhow::Result<(Arc<Gate>, &'static str)> {
    let tree = Tree::find(&args.cgroup_root).context("no cgroup v2 tree")?;
    let pods_cgroup = tree.pods_cgroup(&args.pods_cgroup).context("no pods' cgroup")?;
    let settings = GateSettings {
        pin_directory: args.bpf_directory.clone(),
        pods_cgroup,
        majors: majors::gated(&majors::proc_devices(), nodes, &args.gated_majors),
    };
    let gate = Gate::establish(settings).context("the GPU gate cannot be shut; nothing is advertised without it")?;
    Ok((Arc::new(gate), if tree.is_hybrid() { "hybrid" } else { "v2" }))
}

/// Before NVML is opened, which opens the devices that the gate has just been shut for. Where the pod's cgroup is not found
/// the exemptions that follow from the pods (`pods.rs`) come a few seconds later, and so do the cards.
fn exempt_ourselves(gate: &Gate, pod_uid: Option<&str>) {
    let Some(cgroup) = pod_uid.and_then(|uid| sandbox::pod_cgroup(gate.pods_cgroup(), uid)) else { return };
    let exempted = gate::cgroup_id(&cgroup).map_err(|error| error.to_string());
    let exempted = exempted.and_then(|id| gate.exempt_also(id).map_err(|error| error_chain(&error)));
    if let Err(error) = exempted {
        tracing::warn!(error, cgroup = %cgroup.display(), "The agent itself is not exempt from the gate yet");
    }
}

fn start_inventory(args: &CardArgs, nodes: &DeviceNodes, tasks: &mut Tasks) -> (Arc<dyn Sensors>, NvmlHandle) {
    let settings =
        NvmlSettings { library: args.nvml_library.clone(), driver: Some(driver_root(args)), ..NvmlSettings::default() };
    let (nvml, supervisor) = inventory::nvml(settings);
    tasks.spawn_fallible("inventory", supervisor.run(tasks.stop_token().clone()));
    (Arc::new(NodeSensors::new(nvml.clone(), nodes.clone())), nvml)
}

fn kubelet_settings(args: KubeletArgs, cards: &CardArgs, nodes: DeviceNodes) -> KubeletSettings {
    KubeletSettings {
        device_plugin_directory: args.device_plugin_directory,
        pod_resources_socket: KubeletSettings::pod_resources_socket(&args.kubelet_root),
        cdi: CdiFile::new(&args.cdi_directory),
        nodes,
        driver: driver_root(cards),
    }
}

fn driver_root(cards: &CardArgs) -> DriverRoot {
    DriverRoot { on_host: cards.driver_root.clone(), here: cards.driver_root_here.clone() }
}

async fn client(place: &PlaceArgs) -> anyhow::Result<kube::Client> {
    let config = match &place.kubeconfig {
        None => kube::Config::infer().await.context("no way to the API server")?,
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(path).context("the kubeconfig cannot be read")?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?
        }
    };
    kube::Client::try_from(config).context("no client for the API server")
}

async fn first_look(nvml: &NvmlHandle, mut policy: watch::Receiver<Policy>) {
    let mut inventory = nvml.inventory();
    let looked = tokio::time::timeout(FIRST_LOOK_LIMIT, async {
        // Errors mean that the task is over, which the caller learns of by itself.
        let _ = inventory.wait_for(|found| found.library != LibraryState::Starting).await;
        let _ = policy.changed().await;
    })
    .await;
    if looked.is_err() {
        tracing::warn!(limit_s = FIRST_LOOK_LIMIT.as_secs(), "Starting without a full look at cards and pools");
    }
}

/// What the rest of the agent needs of the actor.
struct Started {
    node: NodeHandle,
    inputs: blocking::Sender<Input>,
    epoch: watch::Receiver<u64>,
}

/// What the actor needs of the rest of the agent.
struct ActorParts<'a> {
    gate: &'a Arc<Gate>,
    sensors: &'a Arc<dyn Sensors>,
    metrics: &'a Metrics,
    events: PodEvents,
}

async fn start_actor(
    place: &PlaceArgs,
    client: &kube::Client,
    ActorParts { gate, sensors, metrics, events }: ActorParts<'_>,
    identity: &NodeIdentity,
    tasks: &mut Tasks,
) -> anyhow::Result<Started> {
    std::fs::create_dir_all(&place.state_directory)
        .with_context(|| format!("cannot make {}", place.state_directory.display()))?;
    let epoch_file = EpochFile::new(&place.state_directory);
    let highest = highest_epoch(&epoch_file, client).await?;
    let checkpoint = Checkpoint::new(&place.state_directory, identity.boot_id.clone());
    let mut machine = Machine::new(identity.agent_instance.clone(), highest);
    tokio::task::block_in_place(|| {
        let devices = |card| sensors.devices(card);
        recovery::recover(&mut machine, &checkpoint, gate, gate.pods_cgroup(), boottime_ms(), devices)
    })
    .context("what an earlier agent left behind cannot be put in order")?;
    let (inputs, from_all) = blocking::channel();
    let (epoch_sender, epoch) = watch::channel(highest);
    let hardware = Hardware {
        pods_cgroup: gate.pods_cgroup().to_owned(),
        gate: Arc::clone(gate),
        sensors: Arc::clone(sensors),
        inputs: inputs.clone(),
        events,
        looks: Arc::default(),
        tasks: TaskTracker::new(),
        runtime: tokio::runtime::Handle::current(),
    };
    let records = Records { checkpoint, epoch_file, epoch: epoch_sender };
    let (actor, node) = NodeActor::new(machine, hardware, records, metrics.clone(), from_all)
        .context("no thread for the checkpoint")?;
    tasks.spawn_blocking("node actor", move || actor.run());
    Ok(Started { node, inputs, epoch })
}

/// L6: the node's own record, or the term page where there is none; without either nothing may be accepted.
async fn highest_epoch(file: &EpochFile, client: &kube::Client) -> anyhow::Result<u64> {
    if let Some(epoch) = file.read().context("the fence cannot be read")? {
        return Ok(epoch);
    }
    let pages: kube::Api<GPUAccount> = kube::Api::all(client.clone());
    let read = || async { pages.get_opt(TERM_PAGE).await };
    let page = read
        .retry(ExponentialBuilder::new().with_max_delay(Duration::from_secs(5)).with_max_times(TERM_PAGE_TRIES))
        .notify(|error, _| tracing::warn!(error = %error_chain(error), "The term page cannot be read yet"))
        .await
        .context("this node has no record of the term and cannot read the term page")?;
    let epoch = page.and_then(|page| page.status).map_or(0, |status| u64::try_from(status.epoch).unwrap_or(0));
    tracing::info!(epoch, "This node had no record of the term; the term page was read");
    file.write(epoch).context("the fence cannot be recorded")?;
    Ok(epoch)
}

fn link_settings(place: &PlaceArgs, args: NodeLinkArgs, identity: &NodeIdentity) -> LinkSettings {
    LinkSettings {
        node: place.node.clone(),
        boot_id: identity.boot_id.clone(),
        agent_instance: identity.agent_instance.clone(),
        namespace: place.namespace.clone(),
        service: args.nodelink_service,
        endpoints: args.operator_endpoints,
        ca_file: args.nodelink_ca,
        token_file: args.nodelink_token,
    }
}

/// Keeps the gate on the pods' cgroup and over all majors of the driver, and says how it is.
struct GateKeeper {
    gate: Arc<Gate>,
    nodes: DeviceNodes,
    settings: Vec<u32>,
    ready: Condition,
    found: watch::Sender<Vec<Finding>>,
    view: watch::Receiver<View>,
}

impl GateKeeper {
    async fn run(mut self, stop: CancellationToken) {
        let mut look = tokio::time::interval(GATE_LOOK);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {}
            }
            // A major that disappears with the driver stays covered: closed is the safe side.
            let mut wanted = self.gate.majors();
            wanted.extend(majors::gated(&majors::proc_devices(), &self.nodes, &self.settings));
            let problem = match self.gate.maintain(&wanted) {
                Ok(anew) => {
                    if anew {
                        tracing::warn!(majors = ?wanted, "The gate was attached anew");
                    }
                    None
                }
                Err(error) => {
                    tracing::error!(error = %error_chain(&error), "The gate is not in order");
                    Some(error_chain(&error))
                }
            };
            let attached = self.gate.is_attached();
            self.ready.set(attached);
            let findings = vec![gate_finding(attached, problem), reconciled(self.view.borrow_and_update().linked)];
            self.found.send_if_modified(|old| std::mem::replace(old, findings.clone()) != findings);
        }
    }
}

fn gate_finding(attached: bool, problem: Option<String>) -> Finding {
    let message = problem.unwrap_or_else(|| {
        let state = if attached { "is attached" } else { "is not attached" };
        format!("the device program {state} to the pods' cgroup")
    });
    Finding {
        condition: GPUNodeCondition::GateAttached,
        holds: if attached { ConditionStatus::True } else { ConditionStatus::False },
        reason: if attached { GPUNodeReason::AsExpected } else { GPUNodeReason::AttachRefused },
        message,
        blocks: !attached,
    }
}

fn reconciled(linked: bool) -> Finding {
    let message = if linked {
        "the node has joined the broker's term with its cards and leases"
    } else {
        "no lease broker is connected; see the operator's logs and its Service spaceport-operator-nodelink"
    };
    Finding {
        condition: GPUNodeCondition::Reconciled,
        holds: if linked { ConditionStatus::True } else { ConditionStatus::False },
        reason: if linked { GPUNodeReason::AsExpected } else { GPUNodeReason::BrokerUnreachable },
        message: message.to_owned(),
        blocks: !linked,
    }
}

fn read_boot_id() -> anyhow::Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    Ok(std::fs::read_to_string(path).context("no boot id")?.trim().to_owned())
}

/// A name for this start of the agent.
fn new_instance() -> String {
    ulid::Ulid::generate().to_string().to_lowercase()
}
