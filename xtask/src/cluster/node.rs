//! containerd, kubelet and kube-proxy: the node.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::NODE;
use super::binaries;
use super::network::{BRIDGE_ADDRESS, PODS};
use super::processes::{Component, check_alive, ensure_running};
use crate::command::{output, progress};
use crate::images::containerd as image_store;
use crate::workspace::{Workspace, write_atomically};
use crate::{kubectl, wait};

/// Starts containerd and waits until it answers. `pause` is the reference of the image that holds a pod's namespaces.
pub fn ensure_containerd(workspace: &Workspace, pause: &str) -> Result<()> {
    let folder = binaries::containerd(workspace)?;
    let config = containerd_config(workspace, pause)?;
    write_atomically(&workspace.local.join("containerd.toml"), config.as_bytes())?;
    let component = Component {
        name: "containerd",
        program: folder.join("containerd"),
        arguments: vec![
            "--config".into(),
            workspace.short_text("containerd.toml"),
            "--log-level".into(),
            "info".into(),
        ],
        environment: Vec::new(),
        reads: vec![config],
    };
    ensure_running(workspace, &component)?;
    // It opens its database and answers within a second.
    wait::until("containerd does not answer", Duration::from_secs(60), || {
        check_alive(workspace, "containerd")?;
        let answer = output(image_store::ctr(workspace)?.args(["plugins", "list", "--quiet"]));
        Ok(answer.is_ok().then_some(()))
    })
}

/// Starts kubelet and kube-proxy and waits until the node is Ready and the first service account exists.
pub fn ensure(workspace: &Workspace) -> Result<()> {
    let kubernetes = binaries::kubernetes(workspace)?;
    let kubelet_config = serde_json::to_string_pretty(&kubelet_config(workspace))?;
    write_atomically(&workspace.local.join("kubelet.yaml"), kubelet_config.as_bytes())?;
    let kubelet = Component {
        name: "kubelet",
        program: kubernetes.clone(),
        arguments: vec![
            "kubelet".into(),
            format!("--config={}", workspace.short_text("kubelet.yaml")),
            format!("--kubeconfig={}", workspace.short_text("kubelet.kubeconfig")),
            format!("--root-dir={}", kubelet_root(workspace)),
            format!("--cert-dir={}", workspace.short_text("kubelet-pki")),
            format!("--hostname-override={NODE}"),
            format!("--node-ip={BRIDGE_ADDRESS}"),
            "--v=2".into(),
        ],
        environment: Vec::new(),
        reads: vec![kubelet_config],
    };
    ensure_running(workspace, &kubelet)?;
    let proxy_config = serde_json::to_string_pretty(&proxy_config(workspace))?;
    write_atomically(&workspace.local.join("kube-proxy.yaml"), proxy_config.as_bytes())?;
    let proxy = Component {
        name: "kube-proxy",
        program: kubernetes,
        arguments: vec!["kube-proxy".into(), format!("--config={}", workspace.short_text("kube-proxy.yaml"))],
        environment: Vec::new(),
        reads: vec![proxy_config],
    };
    ensure_running(workspace, &proxy)?;
    progress("waiting for the node");
    let ready = r#"-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
    // Registration, the first status and the network configuration: 5 s on two idle cores.
    wait::until("the node is not Ready", Duration::from_secs(120), || {
        for name in ["containerd", "kubelet", "kube-proxy", "kube-controller-manager", "kube-scheduler"] {
            check_alive(workspace, name)?;
        }
        let status = output(kubectl::command(workspace)?.args(["get", "node", NODE, ready]));
        // Pods are refused until the controllers have made the default service account.
        let account = output(kubectl::command(workspace)?.args(["get", "serviceaccount", "default", "-o=name"]));
        Ok((status.is_ok_and(|status| status == "True") && account.is_ok()).then_some(()))
    })
}

fn containerd_config(workspace: &Workspace, pause: &str) -> Result<String> {
    let shim = binaries::containerd(workspace)?.join("containerd-shim-runc-v2");
    let runc = binaries::runc(workspace)?;
    let cni = binaries::cni(workspace)?;
    let path = |below: &str| quoted(&workspace.short(below));
    Ok(format!(
        "version = 3
root = {root}
state = {state}

[grpc]
address = {socket}

[plugins.'io.containerd.internal.v1.opt']
path = {opt}

# Its socket and folders would lie at fixed paths of the machine; nothing here needs it yet.
[plugins.'io.containerd.nri.v1.nri']
disable = true

[plugins.'io.containerd.cri.v1.images']
snapshotter = 'overlayfs'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{pause}'

[plugins.'io.containerd.cri.v1.runtime']
enable_cdi = true
cdi_spec_dirs = ['/etc/cdi', '/var/run/cdi']
# A process without CAP_SYS_RESOURCE may not lower its oom_score_adj, and runc fails instead of leaving it.
restrict_oom_score_adj = {restrict}
# So that `down` finds the network namespaces of the pods among our own mounts.
netns_mounts_under_state_dir = true

[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = 'runc'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
runtime_path = {shim}

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = {runc}
Root = {runc_root}
SystemdCgroup = false

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = [{cni}]
conf_dir = {cni_conf}
# Otherwise a plugin does it, whose results carry no name of ours in /var/lib/cni.
use_internal_loopback = true
",
        root = path("containerd/root"),
        state = path("containerd/state"),
        socket = path(image_store::SOCKET),
        opt = path("containerd/opt"),
        restrict = !has_cap_sys_resource()?,
        shim = quoted(&shim),
        runc = quoted(&runc),
        runc_root = path("containerd/runc"),
        cni = quoted(&cni),
        cni_conf = path("cni/net.d"),
    ))
}

/// A TOML basic string: a path of a checkout may contain anything.
fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}

/// Capability 24 in our effective set.
fn has_cap_sys_resource() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read our own status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff in our own status")?;
    let mask = u64::from_str_radix(mask.trim(), 16).context("CapEff is not hexadecimal")?;
    Ok(mask & (1 << 24) != 0)
}

fn kubelet_config(workspace: &Workspace) -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": BRIDGE_ADDRESS.to_string(),
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": workspace.short_text("pki/ca.crt") },
        },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": workspace.short_text("pki/kubelet-server.crt"),
        "tlsPrivateKeyFile": workspace.short_text("pki/kubelet-server.key"),
        "readOnlyPort": 0,
        "healthzBindAddress": BRIDGE_ADDRESS.to_string(),
        "containerRuntimeEndpoint": format!("unix://{}", workspace.short_text(image_store::SOCKET)),
        "cgroupDriver": "cgroupfs",
        "failSwapOn": false,
        // No DNS of the cluster in here: pods resolve as the machine does.
        "resolvConf": resolv_conf(),
        // A developer's disk is often nearly full; evicting at the usual 10 % free would empty the node.
        "evictionHard": { "memory.available": "50Mi", "nodefs.available": "500Mi", "imagefs.available": "500Mi" },
        // There is no registry to pull a collected image from again.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "maxPods": 64,
        "serializeImagePulls": true,
        "makeIPTablesUtilChains": false,
        // These two would lie at fixed paths of the machine.
        "podLogsDir": workspace.short_text("pod-logs"),
        "volumePluginDir": workspace.short_text("kubelet-volume-plugins"),
    })
}

/// systemd-resolved's stub listens on a loopback address that is another one inside of a pod: then its list of
/// upstream servers.
fn resolv_conf() -> &'static str {
    const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";
    let usual = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let is_stub = usual.lines().any(|line| line.trim_start().starts_with("nameserver 127."));
    if is_stub && Path::new(UPSTREAM).exists() { UPSTREAM } else { "/etc/resolv.conf" }
}

fn proxy_config(workspace: &Workspace) -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": { "kubeconfig": workspace.short_text("kube-proxy.kubeconfig") },
        // The iptables mode fails beside an nft-based iptables.
        "mode": "nftables",
        // All pods hang on one bridge: the answer of a Service's pod would reach the caller directly, untranslated,
        // if the caller's address were left as it is.
        "nftables": { "masqueradeAll": true },
        "clusterCIDR": PODS,
        "hostnameOverride": NODE,
        "bindAddress": BRIDGE_ADDRESS.to_string(),
        "healthzBindAddress": format!("{BRIDGE_ADDRESS}:10256"),
        "metricsBindAddress": format!("{BRIDGE_ADDRESS}:10249"),
        "nodePortAddresses": ["primary"],
        // Zero leaves the machine's own limits as they are.
        "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
    })
}

/// Longest path of kubelet's root folder, bytes: a socket's path has 107, and kubelet adds 40.
const KUBELET_ROOT_MAX: usize = 64;

/// kubelet's root folder, which its sockets lie in: its real path where that is short enough. kubelet looks for the folder in the
/// mount table, where no link is; through a link it would mount the folder upon itself at each start, and so double every
/// mount below it.
pub fn kubelet_root(workspace: &Workspace) -> String {
    let real = workspace.local.join("kubelet").display().to_string();
    if real.len() <= KUBELET_ROOT_MAX { real } else { workspace.short_text("kubelet") }
}
