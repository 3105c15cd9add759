//! Settings. Every flag has an environment twin, so that a chart can set either; nothing else reads the environment
//! (`kube` itself looks at KUBECONFIG and at the service-account files of its pod).

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args as ArgGroup, Parser};
use spaceport_shell::admin::AdminArgs;
use spaceport_shell::log::LogArgs;

/// The node agent of Spaceport.
#[derive(Debug, Parser)]
#[command(name = "spaceport-device-plugin", version, about)]
pub struct Args {
    /// Where it runs.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
    /// The gate and the cgroups.
    #[command(flatten)]
    pub gate: GateArgs,
    /// Cards.
    #[command(flatten)]
    pub cards: CardArgs,
    /// Kubelet's places.
    #[command(flatten)]
    pub kubelet: KubeletArgs,
    /// The link to the operator.
    #[command(flatten)]
    pub node_link: NodeLinkArgs,
    /// Port of the device API on each Space pod's own loopback (N14); the operator has the same default.
    #[arg(long, env = "SPACEPORT_DEVICE_API_PORT", default_value_t = 7999)]
    pub device_api_port: u16,
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: AdminArgs,
    /// Breaks this on purpose; only builds for tests know it.
    #[cfg(feature = "faults")]
    #[arg(long, env = "SPACEPORT_FAULT", value_enum)]
    pub fault: Option<crate::fault::Fault>,
}

/// Where the agent runs.
#[derive(Debug, ArgGroup)]
pub struct PlaceArgs {
    /// Kubeconfig file; without it, KUBECONFIG or the pod's own service account.
    #[arg(long, env = "SPACEPORT_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Name of this node; the chart passes the pod's `spec.nodeName`.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Namespace of the agent and the operator.
    #[arg(long, env = "POD_NAMESPACE", default_value = "spaceport-system")]
    pub namespace: String,
    /// uid of the agent's own pod, which the gate lets through.
    #[arg(long, env = "POD_UID")]
    pub pod_uid: Option<String>,
    /// Directory of the checkpoint and the fence, on a disk of the host.
    #[arg(long, env = "SPACEPORT_STATE_DIRECTORY", default_value = "/var/lib/spaceport")]
    pub state_directory: PathBuf,
}

/// The gate and the cgroups.
#[derive(Debug, ArgGroup)]
pub struct GateArgs {
    /// Where the host's cgroup trees are mounted.
    #[arg(long, env = "SPACEPORT_CGROUP_ROOT", default_value = "/sys/fs/cgroup")]
    pub cgroup_root: PathBuf,
    /// Cgroup above all pods, relative to the v2 tree; empty: `kubepods` or `kubepods.slice`, also below `kubelet`.
    #[arg(long, env = "SPACEPORT_PODS_CGROUP", default_value = "")]
    pub pods_cgroup: String,
    /// Directory in bpffs where the gate is pinned.
    #[arg(long, env = "SPACEPORT_BPF_DIRECTORY", default_value = "/sys/fs/bpf/spaceport")]
    pub bpf_directory: PathBuf,
    /// Further device majors that the gate covers, besides those that /proc/devices and /dev show.
    #[arg(long, env = "SPACEPORT_GATED_MAJORS", value_delimiter = ',')]
    pub gated_majors: Vec<u32>,
    /// Namespaces whose pods the gate does not concern, for example of a GPU monitor.
    #[arg(long, env = "SPACEPORT_EXEMPT_NAMESPACES", value_delimiter = ',')]
    pub exempt_namespaces: Vec<String>,
}

/// Cards.
#[derive(Debug, ArgGroup)]
pub struct CardArgs {
    /// The NVML library: a path, or a name, which is looked for in the driver's file system and then by the loader (N21).
    #[arg(long, env = "SPACEPORT_NVML_LIBRARY", default_value = crate::inventory::DEFAULT_LIBRARY)]
    pub nvml_library: PathBuf,
    /// Where the agent sees the host's /dev.
    #[arg(long, env = "SPACEPORT_DEVICE_DIRECTORY", default_value = "/dev")]
    pub device_directory: PathBuf,
    /// The file system that holds the driver, on the host: `/`, or `/run/nvidia/driver` where a container installs it.
    #[arg(long, env = "SPACEPORT_DRIVER_ROOT", default_value = "/")]
    pub driver_root: PathBuf,
    /// Where the agent sees it.
    #[arg(long, env = "SPACEPORT_DRIVER_ROOT_HERE", default_value = "/host")]
    pub driver_root_here: PathBuf,
}

/// Kubelet's places.
#[derive(Debug, ArgGroup)]
pub struct KubeletArgs {
    /// Kubelet's device-plugin directory; kubelet has it built in.
    #[arg(
        long,
        env = "SPACEPORT_DEVICE_PLUGIN_DIRECTORY",
        default_value = crate::kubelet::DEFAULT_DEVICE_PLUGIN_DIRECTORY
    )]
    pub device_plugin_directory: PathBuf,
    /// Kubelet's root directory, for its pod-resources socket.
    #[arg(long, env = "SPACEPORT_KUBELET_ROOT", default_value = "/var/lib/kubelet")]
    pub kubelet_root: PathBuf,
    /// Where the runtime reads CDI specs.
    #[arg(long, env = "SPACEPORT_CDI_DIRECTORY", default_value = crate::cdi::DEFAULT_DIRECTORY)]
    pub cdi_directory: PathBuf,
}

/// The link to the operator.
#[derive(Debug, ArgGroup)]
pub struct NodeLinkArgs {
    /// Headless Service of the operator's replicas.
    #[arg(long, env = "SPACEPORT_NODELINK_SERVICE", default_value = "spaceport-operator-nodelink")]
    pub nodelink_service: String,
    /// Fixed addresses of the operator instead of the Service's.
    #[arg(long, env = "SPACEPORT_OPERATOR_ENDPOINTS", value_delimiter = ',')]
    pub operator_endpoints: Vec<SocketAddr>,
    /// Authority of the operator's certificate, PEM.
    #[arg(long, env = "SPACEPORT_NODELINK_CA", default_value = "/etc/spaceport/nodelink-ca/ca.crt")]
    pub nodelink_ca: PathBuf,
    /// The pod-bound service-account token with audience `spaceport-nodelink`.
    #[arg(long, env = "SPACEPORT_NODELINK_TOKEN", default_value = "/var/run/secrets/spaceport/nodelink/token")]
    pub nodelink_token: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
