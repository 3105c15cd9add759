//! What the machine was like before `up`, written down before anything is changed, so that `down` can put it back.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::network;
use crate::command::{command, output, progress, run, succeeds};
use crate::workspace::{Workspace, write_atomically};

/// Kernel settings that we or kubelet set.
const SYSCTLS: &[&str] = &[
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/ip_forward",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];

/// Folders outside of `target/local` that a component makes at a path no setting can change, parents first.
pub const FOLDERS: &[&str] = &[
    "/var/lib/kubelet",
    "/var/lib/kubelet/device-plugins",
    "/var/log/containers",
    "/var/lib/cni",
    "/var/lib/cni/results",
    "/run/containerd",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/cdi",
];

/// The device-plugin folder of every kubelet, whatever its `--root-dir` is.
pub const DEVICE_PLUGINS: &str = "/var/lib/kubelet/device-plugins";
/// Where pinned BPF programs live.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Locked by the `up` at work: every checkout's note is in there, and a folder that is there anyway is nothing that
/// `down` would have to leave behind.
const LOCK: &str = "/run";

/// The note. It lies in `/run`, where no cleaning of the checkout reaches it, and a copy in `target/local`, which a
/// reboot leaves.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Machine {
    /// The boot it speaks of: settings, mounts and device nodes end with it, folders do not.
    pub boot: String,
    /// Kernel settings as they were, by their path below `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
    /// Those of [`FOLDERS`] that did not exist.
    pub absent: Vec<PathBuf>,
    /// Whether `/sys/fs/bpf` had no bpffs, so that we mounted one.
    pub mounted_bpffs: bool,
    /// Device nodes that we are about to make or have made: path and device number.
    pub devices: BTreeMap<PathBuf, u64>,
}

impl Machine {
    /// The note of the running (or crashed) cluster of this checkout.
    pub fn read(workspace: &Workspace) -> Result<Option<Self>> {
        for path in paths(workspace) {
            match fs::read(&path) {
                Ok(bytes) => {
                    let note: Self =
                        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
                    return Ok(Some(note.in_this_boot()?));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
            }
        }
        Ok(None)
    }

    /// Writes the note.
    pub fn write(&self, workspace: &Workspace) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self)?;
        paths(workspace).iter().try_for_each(|path| write_atomically(path, &bytes))
    }

    /// What of a note still holds: of another boot, only the folders.
    fn in_this_boot(self) -> Result<Self> {
        let boot = boot_id()?;
        if self.boot == boot { Ok(self) } else { Ok(Self { boot, absent: self.absent, ..Self::default() }) }
    }

    fn observe() -> Result<Self> {
        Ok(Self {
            boot: boot_id()?,
            sysctls: SYSCTLS.iter().filter_map(|name| Some(((*name).to_owned(), read_sysctl(name)?))).collect(),
            absent: FOLDERS.iter().map(PathBuf::from).filter(|path| !path.exists()).collect(),
            mounted_bpffs: !is_mounted(BPFFS, "bpf"),
            devices: BTreeMap::new(),
        })
    }
}

/// The right to change this machine, until it is dropped or its process ends: another checkout's `up` has noted the
/// machine a while before its first component runs, and must not be taken for one that was abandoned.
pub fn alone() -> Result<File> {
    let file = File::open(LOCK).with_context(|| format!("cannot open {LOCK}"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another `cargo xtask up` or `down` is at work on this machine: let it end")
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {LOCK}")),
    }
}

/// Makes sure that nothing else on this machine is in the way, notes its state and makes the folders we work in.
pub fn claim(workspace: &Workspace) -> Result<Machine> {
    let machine = match Machine::read(workspace)? {
        Some(note) if !note.sysctls.is_empty() => note,
        earlier => {
            refuse_conflicts(workspace, earlier.is_some())?;
            let mut machine = Machine::observe()?;
            // What we made before a reboot is still ours to remove.
            machine.absent.extend(earlier.into_iter().flat_map(|note| note.absent));
            machine.absent.sort();
            machine.absent.dedup();
            machine.write(workspace)?;
            machine
        }
    };
    let link = workspace.run.join("local");
    if fs::read_link(&link).ok().as_deref() != Some(workspace.local.as_path()) {
        if link.is_symlink() {
            fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
        }
        std::os::unix::fs::symlink(&workspace.local, &link)
            .with_context(|| format!("cannot create {}", link.display()))?;
    }
    if machine.mounted_bpffs && !is_mounted(BPFFS, "bpf") {
        run(&mut command("mount", &["-t", "bpf", "bpf", BPFFS]))
            .context("the gate needs a bpffs to pin its program")?;
        progress(&format!("mounted a bpffs on {BPFFS}"));
    }
    Ok(machine)
}

/// The kernel's name for this boot.
pub fn boot_id() -> Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("the kernel has no boot id")?;
    Ok(text.trim().to_owned())
}

/// One local cluster a machine, and none beside a real kubelet: they would share kubepods and the plugin folder.
fn refuse_conflicts(workspace: &Workspace, was_here: bool) -> Result<()> {
    if let Some(other) = workspace.others()?.first() {
        bail!("the local cluster of another checkout is up: run `cargo xtask down` in {}", other.root.display());
    }
    if command("ip", &["link", "show", network::BRIDGE]).output().is_ok_and(|output| output.status.success()) {
        bail!("there is an interface {} from an earlier cluster: run `cargo xtask down`", network::BRIDGE);
    }
    if succeeds(&mut command("nft", &["list", "table", "ip", "kube-proxy"]))
        // Our own socket outlives a reboot.
        || (!was_here && Path::new(DEVICE_PLUGINS).join("kubelet.sock").exists())
        || !cgroup_folders("kubepods").is_empty()
    {
        bail!(
            "this machine runs a kubelet already, or `cargo xtask down` did not end an earlier cluster: \
             found one of the nft table kube-proxy, {DEVICE_PLUGINS}/kubelet.sock, a kubepods cgroup"
        );
    }
    let routes = output(&mut command("ip", &["-4", "route", "show", "root", network::RANGE]))?;
    if let Some(route) = routes.lines().next() {
        bail!("the range {} of the local cluster is in use on this machine: {route}", network::RANGE);
    }
    Ok(())
}

/// Folders of that name right below the root of each cgroup hierarchy.
pub fn cgroup_folders(name: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (folder, kind) = (words.next()?, words.next()?);
            (kind == "cgroup" || kind == "cgroup2").then(|| Path::new(folder).join(name))
        })
        .filter(|folder| folder.is_dir())
        .collect()
}

/// Whether a file system of that type is mounted exactly there.
pub fn is_mounted(target: &str, kind: &str) -> bool {
    fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .any(|line| line.split(' ').skip(1).take(2).eq([target, kind]))
}

/// The value of a kernel setting.
pub fn read_sysctl(name: &str) -> Option<String> {
    fs::read_to_string(Path::new("/proc/sys").join(name)).ok().map(|value| value.trim().to_owned())
}

/// Sets a kernel setting.
pub fn write_sysctl(name: &str, value: &str) -> Result<()> {
    fs::write(Path::new("/proc/sys").join(name), value).with_context(|| format!("cannot set {name} to {value}"))
}

fn paths(workspace: &Workspace) -> [PathBuf; 2] {
    [&workspace.run, &workspace.local].map(|folder| folder.join("machine.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_of_another_boot_keeps_only_its_folders() {
        let note = |boot: String| Machine {
            boot,
            sysctls: BTreeMap::from([("vm/panic_on_oom".to_owned(), "0".to_owned())]),
            absent: vec!["/var/lib/cni".into()],
            mounted_bpffs: true,
            devices: BTreeMap::from([("/dev/nvidia0".into(), 1)]),
        };
        let of_this_boot = note(boot_id().unwrap());
        assert_eq!(of_this_boot.clone().in_this_boot().unwrap(), of_this_boot);
        let kept = note("another".to_owned()).in_this_boot().unwrap();
        assert_eq!(kept.absent, of_this_boot.absent);
        assert!(kept.sysctls.is_empty() && kept.devices.is_empty() && !kept.mounted_bpffs);
    }
}
