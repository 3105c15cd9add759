//! `cargo xtask charts`: the charts on the local cluster, by the helm that was built with it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::machine::Machine;
use crate::cluster::{binaries, node, standin};
use crate::command::{command, headline, output, progress, run_long};
use crate::images::{self, Name};
use crate::workspace::{HostSettings, Workspace, write_atomically};

#[derive(Args, Default)]
pub struct ChartsArguments {
    /// More values for the chart `spaceport`, later files win
    #[arg(long, value_name = "FILE")]
    pub values: Vec<PathBuf>,
}

/// The namespace that the charts are installed into.
pub const NAMESPACE: &str = "spaceport-system";

/// The bundle that Debian's `ca-certificates` keeps. A CA of one's own company is usually added to it, while the one
/// in the base image has Debian's contents.
const DEBIAN_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// What a pod that builds needs to get out of this network; kept in `target/local/build-settings.json`.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BuildSettings {
    /// File with this machine's CA certificates.
    pub ca_bundle: Option<PathBuf>,
    /// Package index in place of the public one.
    pub index_url: Option<String>,
    /// More indexes, separated by spaces.
    pub extra_index_url: Option<String>,
    pub https_proxy: Option<String>,
    pub http_proxy: Option<String>,
    pub no_proxy: Option<String>,
}

/// The images that the chart's pods and the pods of Spaces run.
const IMAGES: [Name; 4] = [Name::Operator, Name::DevicePlugin, Name::Python, Name::Tools];

/// Builds what is to run, installs or upgrades both charts and waits until it is ready.
pub fn run(workspace: &Workspace, arguments: &ChartsArguments) -> Result<()> {
    if !workspace.kubeconfig().exists() {
        bail!("no local cluster: run `cargo xtask up` first");
    }
    headline("images");
    let images = images::build(workspace, &IMAGES)?;
    images::import_missing(workspace, &images)?;
    headline("charts");
    let values = write_values(workspace)?;
    install(workspace, "spaceport-crds", &[])?;
    install(workspace, "spaceport", &[&[values], arguments.values.as_slice()].concat())
}

/// helm on the local cluster, keeping its own files below `target/local`.
pub fn helm(workspace: &Workspace) -> Result<Command> {
    let mut helm = Command::new(binaries::helm(workspace)?);
    helm.env("KUBECONFIG", workspace.kubeconfig());
    for (variable, folder) in
        [("HELM_CACHE_HOME", "helm/cache"), ("HELM_CONFIG_HOME", "helm/config"), ("HELM_DATA_HOME", "helm/data")]
    {
        helm.env(variable, workspace.local.join(folder));
    }
    Ok(helm)
}

fn install(workspace: &Workspace, chart: &str, values: &[PathBuf]) -> Result<()> {
    let mut helm = helm(workspace)?;
    helm.args(["upgrade", chart]).arg(workspace.root.join("charts").join(chart));
    helm.args(["--install", "--create-namespace", "--namespace", NAMESPACE, "--wait", "--timeout", "3m"]);
    for file in values {
        helm.arg("--values").arg(file);
    }
    let log = workspace.local.join("logs").join(format!("helm-{chart}.log"));
    run_long(&format!("installing the chart {chart}"), &mut helm, &log)
}

/// Writes what this machine and these images make of the chart's values.
fn write_values(workspace: &Workspace) -> Result<PathBuf> {
    let references = images::references(workspace)?;
    let reference = |name| images::reference(&references, name);
    let settings = BuildSettings::observe(&workspace.host, pip_index());
    write_atomically(&workspace.local.join("build-settings.json"), &serde_json::to_vec_pretty(&settings)?)?;
    let bundle = match &settings.ca_bundle {
        Some(path) => fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => String::new(),
    };
    let has_standin = Machine::read(workspace)?.is_some_and(|machine| !machine.devices.is_empty());
    let agent = if has_standin { standin_values(workspace)? } else { json!({}) };
    let mut values = json!({
        "images": {
            "operator": reference(Name::Operator)?,
            "devicePlugin": reference(Name::DevicePlugin)?,
            "python": reference(Name::Python)?,
            "tools": reference(Name::Tools)?,
        },
        "devicePlugin": agent,
        "build": {
            "caBundle": bundle,
            "indexURL": settings.index_url.unwrap_or_default(),
            "extraIndexURLs": settings.extra_index_url.iter().flat_map(|urls| urls.split_whitespace()).collect::<Vec<_>>(),
            "httpProxy": settings.http_proxy.unwrap_or_default(),
            "httpsProxy": settings.https_proxy.unwrap_or_default(),
            "noProxy": settings.no_proxy.unwrap_or_default(),
        },
    });
    // The stand-in needs no device node, and runc fails on a container that is to have more than this machine has.
    values["devicePlugin"]["privileged"] = json!(!has_standin);
    values["devicePlugin"]["capabilities"] = json!(grantable(workspace, &own_capabilities()?)?);
    values["devicePlugin"]["stateDir"] = Value::String(workspace.short_text("agent"));
    values["devicePlugin"]["kubeletRootDir"] = Value::String(node::kubelet_root(workspace));
    let path = workspace.local.join("values.yaml");
    write_atomically(&path, serde_norway::to_string(&values)?.as_bytes())?;
    Ok(path)
}

/// The chart's list of the agent's capabilities without those that this machine withholds from us: runc fails on one
/// that it cannot give instead of leaving it out.
fn grantable(workspace: &Workspace, own: &[&str]) -> Result<Vec<String>> {
    let path = workspace.root.join("charts/spaceport/values.yaml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let values: Value = serde_norway::from_str(&text).with_context(|| format!("{} is not YAML", path.display()))?;
    let list = values["devicePlugin"]["capabilities"]
        .as_array()
        .with_context(|| format!("{} lists no devicePlugin.capabilities", path.display()))?;
    let names = list.iter().filter_map(Value::as_str);
    let (granted, withheld): (Vec<&str>, Vec<&str>) = names.partition(|name| own.contains(name));
    if !withheld.is_empty() {
        progress(&format!("this machine withholds from the agent: {}", withheld.join(", ")));
    }
    Ok(granted.into_iter().map(str::to_owned).collect())
}

/// Names of the capabilities in our bounding set, without `CAP_`.
fn own_capabilities() -> Result<Vec<&'static str>> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read our own status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("no CapBnd in our own status")?;
    let mask = u64::from_str_radix(mask.trim(), 16).context("CapBnd is not hexadecimal")?;
    Ok(CAPABILITIES.iter().enumerate().filter(|(bit, _)| mask & (1 << bit) != 0).map(|(_, name)| *name).collect())
}

/// By their number, as in the kernel's `linux/capability.h`.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The agent takes the stand-in for any other NVML: a path to the library, a folder, an environment variable.
fn standin_values(workspace: &Workspace) -> Result<Value> {
    let library = standin::build_library(workspace)?;
    Ok(json!({
        "nvmlLibrary": library.display().to_string(),
        "extraHostPaths": [workspace.short_text(standin::FOLDER)],
        "extraEnv": { "SPACEPORT_STANDIN_NVML_STATE": workspace.short_text(standin::STATE) },
    }))
}

impl BuildSettings {
    fn observe(host: &HostSettings, pip_index: Option<String>) -> Self {
        let told = host.pip_cert.clone().or_else(|| host.ssl_cert_file.clone());
        let bundle = told.or_else(|| Some(PathBuf::from(DEBIAN_BUNDLE)));
        Self {
            ca_bundle: bundle.filter(|path| path.is_file()),
            index_url: host.pip_index_url.clone().or(pip_index),
            extra_index_url: host.pip_extra_index_url.clone(),
            https_proxy: host.https_proxy.clone().filter(|proxy| reaches_pods(proxy)),
            http_proxy: host.http_proxy.clone().filter(|proxy| reaches_pods(proxy)),
            no_proxy: host.no_proxy.clone(),
        }
    }
}

/// False for a proxy on this machine's own loopback, which a pod cannot use.
fn reaches_pods(proxy: &str) -> bool {
    !["//127.", "//localhost", "//[::1]", "@127.", "@localhost", "@[::1]"].iter().any(|own| proxy.contains(own))
}

/// The index of this machine's pip configuration, if it names one.
fn pip_index() -> Option<String> {
    let index = output(&mut command("python3", &["-m", "pip", "config", "get", "global.index-url"])).ok()?;
    Some(index.trim().to_owned()).filter(|index| !index.is_empty())
}
