//! The kubelet side (N4, N5): what this node offers as extended resources, served and registered for as long as the
//! agent runs, whatever kubelet does to its sockets meanwhile.
//!
//! [`offer`] decides, purely, what is offered. [`run`] keeps the CDI spec in step, and a plugin for each resource
//! ([`plugin`]) with its server ([`serve`]), its registration ([`register`]) and its eyes on the sockets ([`sock_watch`]).

mod backoff;
pub mod offer;
pub mod plugin;
pub mod pod_resources;
pub mod register;
pub mod serve;
pub mod sock_watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use spaceport_crds::names::{LARGE_RESOURCE, SEAT_RESOURCE, XLARGE_RESOURCE};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cdi::{self, CdiFile, DriverRoot};
use crate::converge::View;
use crate::inventory::{DeviceNodes, NodeInventory};
use crate::policy::Policy;
use offer::Offer;
use plugin::{PluginSettings, PluginState};
use pod_resources::Holding;
use spaceport_shell::error_chain;

/// Where kubelet has its device plugins' sockets. Kubelet has this path built in, whatever its root directory.
pub const DEFAULT_DEVICE_PLUGIN_DIRECTORY: &str = "/var/lib/kubelet/device-plugins";

/// How often what the offer depends on is looked at without being told: pod-resources, device nodes, libraries.
const LOOK: Duration = Duration::from_secs(10);

/// A resource that we advertise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// The right to run a time-shared Space pod.
    Seat,
    /// A dedicated card, asked for as `large`.
    Large,
    /// A dedicated card, asked for as `xlarge`.
    Xlarge,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Seat, Self::Large, Self::Xlarge];

    /// Name in a pod's resources.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Seat => SEAT_RESOURCE,
            Self::Large => LARGE_RESOURCE,
            Self::Xlarge => XLARGE_RESOURCE,
        }
    }

    /// File name of its socket in the device-plugin directory.
    pub const fn socket(self) -> &'static str {
        match self {
            Self::Seat => "spaceport-seat.sock",
            Self::Large => "spaceport-large.sock",
            Self::Xlarge => "spaceport-xlarge.sock",
        }
    }

    /// The resource of this name, if it is ours.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|resource| resource.name() == name)
    }
}

/// One device of a resource, as kubelet counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginDevice {
    /// Its id: `seat-3`, `card-1`.
    pub id: String,
    /// Kubelet may give it out.
    pub healthy: bool,
    /// CDI device that a container gets with it.
    pub cdi_device: String,
}

/// Where things are on this node.
#[derive(Clone, Debug)]
pub struct KubeletSettings {
    /// Kubelet's device-plugin directory, with `kubelet.sock`.
    pub device_plugin_directory: PathBuf,
    /// Socket of kubelet's pod-resources interface.
    pub pod_resources_socket: PathBuf,
    /// Our CDI spec.
    pub cdi: CdiFile,
    /// The host's `/dev`.
    pub nodes: DeviceNodes,
    /// Where the driver's libraries are.
    pub driver: DriverRoot,
}

impl KubeletSettings {
    /// `pod-resources/kubelet.sock` in kubelet's root directory.
    pub fn pod_resources_socket(kubelet_root: &Path) -> PathBuf {
        kubelet_root.join("pod-resources").join("kubelet.sock")
    }
}

/// How it stands between us and kubelet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KubeletView {
    /// What is offered.
    pub offer: Offer,
    /// How each resource's registration is.
    pub plugins: BTreeMap<Resource, PluginState>,
    /// Which pods hold our devices; `None` until kubelet has told.
    pub holdings: Option<Vec<Holding>>,
    /// Why the CDI spec is not as it should be.
    pub cdi_problem: Option<String>,
}

impl KubeletView {
    /// Seats that are offered.
    pub fn seats(&self) -> usize {
        self.offer.devices.get(&Resource::Seat).map_or(0, Vec::len)
    }

    /// Seats that pods hold.
    pub fn seats_used(&self) -> usize {
        let holdings = self.holdings.iter().flatten().filter(|holding| holding.resource == Resource::Seat);
        holdings.map(|holding| holding.devices.len()).sum()
    }

    /// What keeps kubelet from using our devices; `None` if nothing does.
    pub fn problem(&self) -> Option<String> {
        let plugin = self.plugins.iter().find_map(|(resource, state)| match state {
            PluginState::Waiting { reason } => Some(format!("{}: {reason}", resource.name())),
            PluginState::Idle | PluginState::Registered => None,
        });
        plugin.or_else(|| self.cdi_problem.clone())
    }
}

/// What the offer depends on.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// The cards.
    pub inventory: watch::Receiver<Arc<NodeInventory>>,
    /// What they are for.
    pub policy: watch::Receiver<Policy>,
    /// Who has leases on them.
    pub leases: watch::Receiver<View>,
}

/// Offers and serves until `stop`; then kubelet is told that there is nothing any more, and the CDI spec is removed. Must be
/// started only when the gate is attached (N8).
pub async fn run(
    settings: KubeletSettings,
    mut inputs: Inputs,
    publish: watch::Sender<KubeletView>,
    stop: CancellationToken,
) {
    // A token of our own: when an input ends, the plugins end here, and whoever runs us decides about the rest.
    let stop = stop.child_token();
    let mut plugins = JoinSet::new();
    let mut states = BTreeMap::new();
    let mut devices = BTreeMap::new();
    for resource in Resource::ALL {
        let (list, listed) = watch::channel(Vec::new());
        let (state, seen) = watch::channel(PluginState::Idle);
        let plugin = PluginSettings::new(&settings.device_plugin_directory, resource);
        plugins.spawn(plugin::run(plugin, listed, state, stop.clone()));
        states.insert(resource, seen);
        devices.insert(resource, list);
    }
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut view = KubeletView::default();
    let mut due = true;
    loop {
        if due {
            match pod_resources::list(&settings.pod_resources_socket).await {
                Ok(listed) => view.holdings = Some(listed),
                // What was known stays: a pod does not lose its card because kubelet restarts.
                Err(error) => {
                    tracing::warn!(error = %error_chain(&error), "Kubelet does not tell which pods hold devices")
                }
            }
        }
        let leased = leased(&inputs.leases.borrow_and_update());
        let offer = {
            let (inventory, policy) = (inputs.inventory.borrow_and_update(), inputs.policy.borrow_and_update());
            offer::offer(&inventory, &policy, view.holdings.as_deref(), &leased)
        };
        // Device nodes and libraries may come and go without a word, so they are looked at when it is due.
        if due || offer != view.offer || view.cdi_problem.is_some() {
            let problem = keep_cdi(&settings, &offer).err();
            if let Some(problem) = problem.as_ref().filter(|problem| view.cdi_problem.as_ref() != Some(*problem)) {
                tracing::error!(%problem, "The CDI spec is not up to date");
            }
            view.cdi_problem = problem;
        }
        view.offer = offer;
        // Kubelet hears of devices only when containers can be given them.
        if view.cdi_problem.is_none() {
            for (resource, list) in &devices {
                let wanted = view.offer.devices.get(resource).cloned().unwrap_or_default();
                list.send_if_modified(|present| std::mem::replace(present, wanted.clone()) != wanted);
            }
        }
        view.plugins =
            states.iter_mut().map(|(resource, state)| (*resource, state.borrow_and_update().clone())).collect();
        publish.send_if_modified(|present| std::mem::replace(present, view.clone()) != view);
        due = tokio::select! {
            () = stop.cancelled() => break,
            _ = look.tick() => true,
            () = any_changed(&mut states) => false,
            changed = inputs.inventory.changed() => if changed.is_ok() { false } else { break },
            changed = inputs.policy.changed() => if changed.is_ok() { false } else { break },
            alive = others_leased(&mut inputs.leases, &leased) => if alive { false } else { break },
        };
    }
    stop.cancel();
    while let Some(ended) = plugins.join_next().await {
        if let Err(error) = ended {
            tracing::error!(error = %error_chain(&error), "A plugin ended badly");
        }
    }
    if let Err(error) = settings.cdi.remove() {
        tracing::warn!(error = %error_chain(&error), "The CDI spec stays behind");
    }
}

/// Waits until other cards have leases than these; leases come and go far more often than that. False if the source ended.
async fn others_leased(leases: &mut watch::Receiver<View>, known: &BTreeSet<u32>) -> bool {
    leases.wait_for(|view| leased(view) != *known).await.is_ok()
}

/// Cards with a lease or a kept worker.
fn leased(view: &View) -> BTreeSet<u32> {
    view.owned.keys().chain(view.idle.keys()).chain(view.quarantined.keys()).map(|slot| slot.card).collect()
}

/// Brings the CDI spec in step with the offer; the error is for people.
fn keep_cdi(settings: &KubeletSettings, offer: &Offer) -> Result<(), String> {
    if offer.is_empty() {
        // Nothing is known yet, or there is no pool: what an earlier agent wrote serves containers that restart.
        return Ok(());
    }
    let libraries = settings.driver.libraries().map_err(|error| format!("the driver's libraries: {error}"))?;
    let spec = cdi::spec(&offer.cdi, &settings.nodes, &libraries).map_err(|error| format!("device nodes: {error}"))?;
    match settings.cdi.write(&spec) {
        Ok(true) => {
            tracing::info!(path = %settings.cdi.path().display(), libraries = libraries.len(), "CDI spec written");
            Ok(())
        }
        Ok(false) => Ok(()),
        Err(error) => Err(error_chain(&error)),
    }
}

/// Waits until a plugin's state changes. Never if all have ended.
async fn any_changed(states: &mut BTreeMap<Resource, watch::Receiver<PluginState>>) {
    let changes = states.values_mut().map(|state| {
        Box::pin(async {
            if state.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    });
    futures::future::select_all(changes).await;
}
