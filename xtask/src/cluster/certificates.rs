//! The keys and certificates of the local cluster, made once per cluster and thrown away with it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

use super::NODE;
use super::network::{API_SERVICE, BRIDGE_ADDRESS};
use crate::workspace::Workspace;

/// Who a component says it is to the API server: file name, user, group.
pub const CLIENTS: &[(&str, &str, Option<&str>)] = &[
    ("admin", "kubernetes-admin", Some("system:masters")),
    ("kube-controller-manager", "system:kube-controller-manager", None),
    ("kube-scheduler", "system:kube-scheduler", None),
    ("kube-proxy", "system:kube-proxy", None),
    ("kubelet", NODE_USER, Some("system:nodes")),
    // The API server as a client of kubelet (logs, exec).
    ("kubelet-client", "kube-apiserver-kubelet-client", Some("system:masters")),
];

/// The Node authorizer knows a kubelet by this prefix and the name of its node.
const NODE_USER: &str = "system:node:spaceport-local";

/// The folder with all of it.
pub fn folder(workspace: &Workspace) -> PathBuf {
    workspace.local.join("pki")
}

/// Makes everything, unless it is there from an earlier `up` of the same cluster.
pub fn ensure(workspace: &Workspace) -> Result<()> {
    let folder = folder(workspace);
    if folder.exists() {
        return Ok(());
    }
    // Made under another name and renamed: a crash in between leaves nothing that looks complete.
    let temporary = folder.with_extension("new");
    if temporary.exists() {
        fs::remove_dir_all(&temporary).with_context(|| format!("cannot remove {}", temporary.display()))?;
    }
    fs::create_dir_all(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
    make(&temporary).context("cannot make the certificates")?;
    fs::rename(&temporary, &folder).with_context(|| format!("cannot put {} in place", folder.display()))
}

fn make(folder: &Path) -> Result<()> {
    let cluster = authority(folder, "ca", "spaceport-local")?;
    for (file, user, group) in CLIENTS {
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, *user);
        if let Some(group) = group {
            name.push(DnType::OrganizationName, *group);
        }
        leaf(folder, file, &cluster, name, &[], &[ExtendedKeyUsagePurpose::ClientAuth])?;
    }
    let bridge = BRIDGE_ADDRESS.to_string();
    let service = API_SERVICE.to_string();
    let api_names = [
        "localhost",
        "127.0.0.1",
        &bridge,
        &service,
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    let server = &[ExtendedKeyUsagePurpose::ServerAuth];
    leaf(folder, "kube-apiserver", &cluster, common_name("kube-apiserver"), &api_names, server)?;
    leaf(folder, "kubelet-server", &cluster, common_name(NODE), &[NODE, &bridge, "127.0.0.1"], server)?;
    // etcd trusts an authority of its own: whoever holds a certificate of the cluster is not its administrator.
    let etcd = authority(folder, "etcd-ca", "spaceport-local-etcd")?;
    let both = &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    leaf(folder, "etcd", &etcd, common_name("etcd"), &[&bridge], both)?;
    leaf(folder, "etcd-client", &etcd, common_name("kube-apiserver"), &[], &[ExtendedKeyUsagePurpose::ClientAuth])?;
    let service_accounts = KeyPair::generate().context("no randomness")?;
    write(folder, "service-accounts.key", &service_accounts.serialize_pem())?;
    write(folder, "service-accounts.pub", &service_accounts.public_key_pem())
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// A self-signed authority, kept as `<file>.crt` and `<file>.key`.
fn authority(folder: &Path, file: &str, name: &str) -> Result<Issuer<'static, KeyPair>> {
    let key = KeyPair::generate().context("no randomness")?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = common_name(name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let certificate = parameters.self_signed(&key)?;
    store(folder, file, &certificate, &key)?;
    Ok(Issuer::new(parameters, key))
}

/// A certificate of an authority. Its lifetime is rcgen's (to the year 4096): the keys end with the cluster, and a
/// clock that is wrong must not break a test.
fn leaf(
    folder: &Path,
    file: &str,
    issuer: &Issuer<'_, KeyPair>,
    subject: DistinguishedName,
    names: &[&str],
    usages: &[ExtendedKeyUsagePurpose],
) -> Result<()> {
    let key = KeyPair::generate().context("no randomness")?;
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut parameters = CertificateParams::new(names)?;
    parameters.distinguished_name = subject;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = usages.to_vec();
    parameters.use_authority_key_identifier_extension = true;
    let certificate = parameters.signed_by(&key, issuer)?;
    store(folder, file, &certificate, &key)
}

fn store(folder: &Path, file: &str, certificate: &Certificate, key: &KeyPair) -> Result<()> {
    write(folder, &format!("{file}.crt"), &certificate.pem())?;
    write(folder, &format!("{file}.key"), &key.serialize_pem())
}

fn write(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_user_is_the_node_authorizers_name_for_the_node() {
        assert!(CLIENTS.iter().any(|(_, user, _)| *user == format!("system:node:{NODE}")));
    }
}
