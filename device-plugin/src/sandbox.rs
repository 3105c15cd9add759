//! Where a pod lies on this node: its cgroup, its containers' cgroups, and its network namespace once its sandbox runs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::processes::{self, Held};

/// The cgroup of a pod below the pods' cgroup, whichever driver and quality-of-service class it has; `None` before kubelet
/// made it.
pub fn pod_cgroup(pods: &Path, pod_uid: &str) -> Option<PathBuf> {
    candidates(pods, pod_uid).into_iter().find(|path| path.is_dir())
}

fn candidates(pods: &Path, pod_uid: &str) -> Vec<PathBuf> {
    const CLASSES: [&str; 3] = ["", "burstable", "besteffort"];
    let name = pods.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match name.strip_suffix(".slice") {
        // cgroupfs: kubepods/burstable/pod<uid>
        None => CLASSES.iter().map(|class| pods.join(class).join(format!("pod{pod_uid}"))).collect(),
        // systemd: kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid, "-" as "_">.slice
        Some(stem) => {
            let uid = pod_uid.replace('-', "_");
            let class = |class: &str| match class {
                "" => pods.join(format!("{stem}-pod{uid}.slice")),
                class => pods.join(format!("{stem}-{class}.slice")).join(format!("{stem}-{class}-pod{uid}.slice")),
            };
            CLASSES.iter().map(|name| class(name)).collect()
        }
    }
}

/// The cgroups of a pod's containers, the sandbox's among them.
pub fn container_cgroups(pod_cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(pod_cgroup).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// True if this cgroup is that container's: runtimes name it by the id, some with a prefix and `.scope`.
pub fn is_container(cgroup: &Path, container_id: &str) -> bool {
    !container_id.is_empty() && cgroup.file_name().is_some_and(|name| name.to_string_lossy().contains(container_id))
}

/// The id in a pod status's `containerID`: `containerd://<id>`.
pub fn container_id(status: &str) -> &str {
    status.split_once("://").map_or(status, |(_, id)| id)
}

/// A pod's running sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// The sandbox's process; when it ends, the namespace is gone for good.
    pub process: Held,
    /// The pod's network namespace.
    pub network: File,
}

/// The sandbox of a pod, once there is one: the oldest process of the pod, because the sandbox is started first and lives
/// as long as the pod. `None` while it is not there or is still being set up in the host's network.
///
/// # Errors
/// If the host's own namespace cannot be looked at, so that the two cannot be told apart.
pub fn sandbox(pod_cgroup: &Path) -> io::Result<Option<Sandbox>> {
    let host = host_network()?;
    let members = processes::members(pod_cgroup).unwrap_or_default();
    let oldest = members.into_iter().filter_map(Held::open).min_by_key(|held| (held.start_ticks, held.pid));
    let Some(process) = oldest else { return Ok(None) };
    let Ok(network) = File::open(format!("/proc/{}/ns/net", process.pid)) else { return Ok(None) };
    // A runtime's helper enters the cgroup before it enters the namespace; a pod on the host's network never leaves it.
    // Neither may get a listener: it would be on the host's loopback.
    let foreign = network.metadata()?.ino() != host;
    Ok((foreign && process.is_alive()).then_some(Sandbox { process, network }))
}

/// The host's network namespace: that of its first process, or, where a security policy hides that one, of the kernel's own
/// first thread.
fn host_network() -> io::Result<u64> {
    let of = |pid: u32| fs::metadata(format!("/proc/{pid}/ns/net")).map(|found| found.ino());
    let kernel_thread = || fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd");
    match of(1) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && kernel_thread() => of(2),
        found => found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "1a04e738-a433-46ad-932c-d66bee44c284";

    #[test]
    fn pods_of_every_class_and_driver_are_found() {
        let names = |pods: &str| -> Vec<String> {
            candidates(Path::new(pods), UID).iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(
            names("/c/kubepods"),
            [
                format!("/c/kubepods/pod{UID}"),
                format!("/c/kubepods/burstable/pod{UID}"),
                format!("/c/kubepods/besteffort/pod{UID}"),
            ]
        );
        let uid = UID.replace('-', "_");
        assert_eq!(
            names("/c/kubepods.slice"),
            [
                format!("/c/kubepods.slice/kubepods-pod{uid}.slice"),
                format!("/c/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice"),
                format!("/c/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice"),
            ]
        );
        assert!(
            names("/c/kubelet.slice/kubelet-kubepods.slice")[1]
                .ends_with(&format!("kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{uid}.slice"))
        );
    }

    #[test]
    fn a_container_is_known_by_its_id_in_any_runtimes_spelling() {
        let id = container_id("containerd://954c66d1");
        assert!(is_container(Path::new("/p/954c66d1"), id));
        assert!(is_container(Path::new("/p/cri-containerd-954c66d1.scope"), id));
        assert!(!is_container(Path::new("/p/49782e78"), id));
        assert!(!is_container(Path::new("/p/49782e78"), ""));
    }
}
