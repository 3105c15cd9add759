//! etcd, the API server, the controllers and the scheduler.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::network::{BRIDGE_ADDRESS, PODS, SERVICES};
use super::processes::{Component, check_alive, end, ensure_running};
use super::{binaries, certificates};
use crate::command::{command, output, progress};
use crate::workspace::Workspace;
use crate::{kubectl, wait};

/// The API server's port on the bridge's address.
pub const API_PORT: u16 = 6443;
/// The port of the API server for tests.
const TEST_API_PORT: u16 = 6444;
/// Its component, and the name of its kubeconfig.
const TEST_API_SERVER: &str = "kube-apiserver-tests";
/// Where it keeps everything in etcd; the cluster's own is `/registry`.
const TEST_ETCD_PREFIX: &str = "/tests";
const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;

/// Starts what is missing and waits until the API server answers.
pub fn ensure(workspace: &Workspace) -> Result<()> {
    for (name, _, _) in certificates::CLIENTS {
        write_kubeconfig(workspace, name)?;
    }
    let kubernetes = binaries::kubernetes(workspace)?;
    let component = |name: &'static str, arguments: Vec<String>| Component {
        name,
        program: kubernetes.clone(),
        arguments: [vec![name.to_owned()], arguments].concat(),
        environment: Vec::new(),
        reads: Vec::new(),
    };
    let etcd = component("etcd", etcd_arguments(workspace));
    if check_alive(workspace, etcd.name).is_err() {
        require_free(ETCD_PORT)?;
        require_free(ETCD_PEER_PORT)?;
    }
    ensure_running(workspace, &etcd)?;
    let api_server = component("kube-apiserver", api_server_arguments(workspace, API_PORT, "/registry"));
    if check_alive(workspace, api_server.name).is_err() {
        require_free(API_PORT)?;
    }
    if ensure_running(workspace, &api_server)? {
        progress("waiting for the API server (about 10 s)");
    }
    // 12 s on two idle cores (docs/rules.md); a cold disk and a busy machine take a multiple.
    wait::until("the API server is not ready", Duration::from_secs(180), || {
        check_alive(workspace, "etcd")?;
        check_alive(workspace, "kube-apiserver")?;
        let ready = output(kubectl::command(workspace)?.args(["get", "--raw", "/readyz"]));
        Ok(ready.is_ok_and(|text| text == "ok").then_some(()))
    })?;
    ensure_running(workspace, &component("kube-controller-manager", controller_arguments(workspace)))?;
    ensure_running(workspace, &component("kube-scheduler", scheduler_arguments(workspace)))?;
    Ok(())
}

/// Starts a second API server on the cluster's etcd and gives the administrator's kubeconfig for it. It has a prefix of its
/// own there, and no controller, no operator and no policy works on it: tests may begin terms and elect leaders.
pub fn ensure_for_tests(workspace: &Workspace) -> Result<PathBuf> {
    let arguments = api_server_arguments(workspace, TEST_API_PORT, TEST_ETCD_PREFIX);
    let component = Component {
        name: TEST_API_SERVER,
        program: binaries::kubernetes(workspace)?,
        arguments: [vec!["kube-apiserver".to_owned()], arguments].concat(),
        environment: Vec::new(),
        reads: Vec::new(),
    };
    if check_alive(workspace, component.name).is_err() {
        require_free(TEST_API_PORT)?;
    }
    if ensure_running(workspace, &component)? {
        progress("waiting for the API server of the tests (about 10 s)");
    }
    let kubeconfig = kubeconfig_path(workspace, TEST_API_SERVER);
    write_private(&kubeconfig, &kubeconfig_of(workspace, "admin", TEST_API_PORT)?)?;
    wait::until("the API server of the tests is not ready", Duration::from_secs(180), || {
        check_alive(workspace, TEST_API_SERVER)?;
        let mut ask = command(&binaries::kubernetes(workspace)?, &["kubectl", "get", "--raw", "/readyz"]);
        let ready = output(ask.env("KUBECONFIG", &kubeconfig));
        Ok(ready.is_ok_and(|text| text == "ok").then_some(()))
    })?;
    Ok(kubeconfig)
}

/// Ends it; what it kept stays in etcd until the cluster goes down.
pub fn end_for_tests(workspace: &Workspace) -> Result<()> {
    end(workspace, TEST_API_SERVER)
}

/// Where the kubeconfig of a client lies; the administrator's is the one for people.
pub fn kubeconfig_path(workspace: &Workspace, client: &str) -> PathBuf {
    if client == "admin" { workspace.kubeconfig() } else { workspace.local.join(format!("{client}.kubeconfig")) }
}

fn etcd_arguments(workspace: &Workspace) -> Vec<String> {
    let pki = |name: &str| workspace.short_text(&format!("pki/{name}"));
    let client = format!("https://{BRIDGE_ADDRESS}:{ETCD_PORT}");
    let peer = format!("https://{BRIDGE_ADDRESS}:{ETCD_PEER_PORT}");
    flags(&[
        ("name", "local"),
        ("data-dir", &workspace.short_text("etcd")),
        ("listen-client-urls", &client),
        ("advertise-client-urls", &client),
        ("listen-peer-urls", &peer),
        ("initial-advertise-peer-urls", &peer),
        ("initial-cluster", &format!("local={peer}")),
        ("client-cert-auth", "true"),
        ("trusted-ca-file", &pki("etcd-ca.crt")),
        ("cert-file", &pki("etcd.crt")),
        ("key-file", &pki("etcd.key")),
        ("peer-client-cert-auth", "true"),
        ("peer-trusted-ca-file", &pki("etcd-ca.crt")),
        ("peer-cert-file", &pki("etcd.crt")),
        ("peer-key-file", &pki("etcd.key")),
        ("log-outputs", "stderr"),
    ])
}

fn api_server_arguments(workspace: &Workspace, port: u16, etcd_prefix: &str) -> Vec<String> {
    let pki = |name: &str| workspace.short_text(&format!("pki/{name}"));
    let address = BRIDGE_ADDRESS.to_string();
    flags(&[
        // The address must be one that it listens on, or `kubernetes.default` does not answer in pods.
        ("advertise-address", &address),
        ("bind-address", &address),
        ("secure-port", &port.to_string()),
        ("service-cluster-ip-range", SERVICES),
        ("etcd-servers", &format!("https://{BRIDGE_ADDRESS}:{ETCD_PORT}")),
        ("etcd-prefix", etcd_prefix),
        ("etcd-cafile", &pki("etcd-ca.crt")),
        ("etcd-certfile", &pki("etcd-client.crt")),
        ("etcd-keyfile", &pki("etcd-client.key")),
        ("client-ca-file", &pki("ca.crt")),
        ("tls-cert-file", &pki("kube-apiserver.crt")),
        ("tls-private-key-file", &pki("kube-apiserver.key")),
        ("kubelet-certificate-authority", &pki("ca.crt")),
        ("kubelet-client-certificate", &pki("kubelet-client.crt")),
        ("kubelet-client-key", &pki("kubelet-client.key")),
        ("kubelet-preferred-address-types", "InternalIP"),
        ("service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        ("service-account-key-file", &pki("service-accounts.pub")),
        ("service-account-signing-key-file", &pki("service-accounts.key")),
        ("authorization-mode", "Node,RBAC"),
        ("enable-admission-plugins", "NodeRestriction"),
        ("anonymous-auth", "false"),
        ("allow-privileged", "true"),
        ("profiling", "false"),
    ])
}

fn controller_arguments(workspace: &Workspace) -> Vec<String> {
    let pki = |name: &str| workspace.short_text(&format!("pki/{name}"));
    flags(&[
        ("kubeconfig", &workspace.short_text("kube-controller-manager.kubeconfig")),
        ("service-account-private-key-file", &pki("service-accounts.key")),
        ("root-ca-file", &pki("ca.crt")),
        ("cluster-signing-cert-file", &pki("ca.crt")),
        ("cluster-signing-key-file", &pki("ca.key")),
        ("use-service-account-credentials", "true"),
        ("cluster-cidr", PODS),
        ("allocate-node-cidrs", "false"),
        ("leader-elect", "false"),
        // It would make /usr/libexec/kubernetes.
        ("flex-volume-plugin-dir", &workspace.short_text("kubelet-volume-plugins")),
        // Nobody scrapes it here, and port 10257 may be somebody's.
        ("secure-port", "0"),
    ])
}

fn scheduler_arguments(workspace: &Workspace) -> Vec<String> {
    flags(&[
        ("kubeconfig", &workspace.short_text("kube-scheduler.kubeconfig")),
        ("leader-elect", "false"),
        ("secure-port", "0"),
    ])
}

fn flags(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

/// Fails with the port's name where the component itself would only die.
fn require_free(port: u16) -> Result<()> {
    match TcpListener::bind((BRIDGE_ADDRESS, port)) {
        Ok(_) => Ok(()),
        Err(error) => bail!("port {port} on {BRIDGE_ADDRESS} cannot be used: {error}"),
    }
}

fn write_kubeconfig(workspace: &Workspace, client: &str) -> Result<()> {
    write_private(&kubeconfig_path(workspace, client), &kubeconfig_of(workspace, client, API_PORT)?)
}

fn kubeconfig_of(workspace: &Workspace, client: &str, port: u16) -> Result<Vec<u8>> {
    let folder = certificates::folder(workspace);
    let encoded = |name: String| -> Result<Value> {
        let path = folder.join(name);
        let pem = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Value::String(BASE64_STANDARD.encode(pem)))
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "spaceport-local", "cluster": {
            "server": format!("https://{BRIDGE_ADDRESS}:{port}"),
            "certificate-authority-data": encoded("ca.crt".to_owned())?,
        }}],
        "users": [{ "name": client, "user": {
            "client-certificate-data": encoded(format!("{client}.crt"))?,
            "client-key-data": encoded(format!("{client}.key"))?,
        }}],
        "contexts": [{ "name": "spaceport-local", "context": { "cluster": "spaceport-local", "user": client }}],
        "current-context": "spaceport-local",
    });
    Ok(serde_norway::to_string(&config)?.into_bytes())
}

/// Writes a file that holds a key: only its owner may read it, from its first byte on.
fn write_private(path: &Path, contents: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(contents))
        .with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("cannot put {} in place", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::network::API_SERVICE;
    use super::*;

    #[test]
    fn the_api_service_and_the_bridge_are_the_first_addresses_of_their_ranges() {
        assert_eq!(SERVICES, format!("{}/20", to_network(API_SERVICE.to_bits())));
        assert_eq!(PODS, format!("{}/20", to_network(BRIDGE_ADDRESS.to_bits())));
    }

    fn to_network(address: u32) -> std::net::Ipv4Addr {
        std::net::Ipv4Addr::from_bits(address - 1)
    }
}
