//! `cargo xtask down`: ends the cluster and puts the machine back, from what it finds and not from what should be.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::cluster::machine::{self, BPFFS, DEVICE_PLUGINS, Machine, cgroup_folders};
use crate::cluster::processes::CGROUP;
use crate::cluster::{network, standin};
use crate::command::{command, headline, output, progress, run, succeeds};
use crate::prerequisites;
use crate::wait;
use crate::workspace::Workspace;

/// Where the agent pins its programs and maps.
const BPF_PINS: &str = "/sys/fs/bpf/spaceport";

/// The nft tables of the cluster.
const TABLES: &[(&str, &str)] = &[("ip", network::TABLE), ("ip", "kube-proxy"), ("ip6", "kube-proxy")];

/// Does nothing on a machine where nothing is up, and says so.
pub fn down(workspace: &Workspace) -> Result<()> {
    if !prerequisites::is_root() {
        bail!("`down` needs root, as `up` did");
    }
    headline("ending the local cluster");
    let machine = Machine::read(workspace).unwrap_or_else(|error| {
        progress(&format!("the note of `up` cannot be used, working from what is found: {error:#}"));
        Some(Machine::default())
    });
    // Everything below that has a common name (kubepods, kube-proxy) was not there when `up` began; without a trace
    // of ours it is somebody else's.
    let is_ours = machine.is_some() || !cgroup_folders(CGROUP).is_empty() || has_bridge();
    let machine = machine.unwrap_or_default();
    if is_ours {
        end_processes(workspace)?;
        let mounts = unmount_below(&workspace.local)?;
        report("mounts", mounts);
        remove_network()?;
        remove_cgroups()?;
        remove_bpf(&machine)?;
        for (path, device) in &machine.devices {
            if standin::remove_node(path, *device)? {
                progress(&format!("removed {}", path.display()));
            }
        }
        restore_sysctls(&machine)?;
    }
    remove_files(workspace, &machine, is_ours)?;
    remove_state(workspace)?;
    let left = left_over(workspace, &machine, is_ours)?;
    if !left.is_empty() {
        bail!("still there:\n  {}", left.join("\n  "));
    }
    eprintln!("==> nothing of the local cluster is left");
    Ok(())
}

/// Ends what is left of other checkouts' clusters that nobody can want: none of their components runs any more (they
/// were killed from outside), or the checkout is gone and took the state and its own `down` with it.
pub fn end_abandoned(workspace: &Workspace) -> Result<()> {
    if Machine::read(workspace)?.is_some_and(|note| !note.sysctls.is_empty()) {
        // The cluster of this machine is ours.
        return Ok(());
    }
    for other in workspace.others()? {
        // Only one cluster can run on a machine, so its components are the other's.
        let runs = is_populated(CGROUP);
        if runs && other.root.join("Cargo.toml").exists() {
            // Not ours to end; whoever needs the machine is told to.
            continue;
        }
        let why = if runs { "its checkout is gone" } else { "none of its components runs" };
        progress(&format!("the cluster of {} is abandoned: {why}", other.root.display()));
        down(&other)?;
    }
    Ok(())
}

fn report(what: &str, count: usize) {
    if count > 0 {
        progress(&format!("removed {count} {what}"));
    }
}

/// Kills the components first, so that nobody starts anything again, then the pods.
///
/// Nothing is asked to end by itself: all state is thrown away, and a frozen or hanging process ends like any other.
fn end_processes(workspace: &Workspace) -> Result<()> {
    for (what, name) in [("processes of the components", CGROUP), ("processes of pods", "kubepods")] {
        let mut ended: BTreeSet<i32> = BTreeSet::new();
        // A killed process is gone at once unless it is in the kernel with a disk or a device.
        wait::until(what, Duration::from_secs(30), || {
            let pids = members(name);
            ended.extend(&pids);
            if pids.is_empty() {
                return Ok(Some(()));
            }
            kill_members(name, &pids);
            Ok(None)
        })?;
        report(what, ended.len());
    }
    let strays = strays(workspace);
    strays.iter().for_each(|pid| kill(*pid));
    wait::until("processes outside of their cgroup", Duration::from_secs(10), || {
        Ok(self::strays(workspace).is_empty().then_some(()))
    })?;
    report("processes outside of their cgroup", strays.len());
    Ok(())
}

/// Processes in the cgroups of that name and below, in every hierarchy.
fn members(name: &str) -> BTreeSet<i32> {
    let mut pids = BTreeSet::new();
    for root in cgroup_folders(name) {
        for folder in folders_below(&root) {
            let list = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            // A 0 is a process that our pid namespace does not show.
            pids.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
        }
    }
    pids
}

/// Somebody is in them, also somebody of another pid namespace.
fn is_populated(name: &str) -> bool {
    cgroup_folders(name)
        .iter()
        .flat_map(|root| folders_below(root))
        .any(|folder| fs::read_to_string(folder.join("cgroup.procs")).is_ok_and(|list| !list.trim().is_empty()))
}

fn kill_members(name: &str, pids: &BTreeSet<i32>) {
    for root in cgroup_folders(name) {
        // One write ends a whole v2 tree, frozen or not. Where the file is missing, the signals below do it; a
        // failure is seen by whoever waits for the members to be gone.
        let _ = fs::write(root.join("cgroup.kill"), "1");
        for folder in folders_below(&root) {
            let freezer = folder.join("freezer.state");
            if freezer.exists() {
                // A process frozen by the v1 freezer does not see its SIGKILL.
                let _ = fs::write(freezer, "THAWED");
            }
        }
    }
    pids.iter().for_each(|pid| kill(*pid));
}

fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        // Gone already is what we want; anything else is seen by whoever waits for it.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Our own binaries that work on this cluster and left their cgroup, for example a shim somebody started by hand.
fn strays(workspace: &Workspace) -> Vec<i32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let run = workspace.run.display().to_string();
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let folder = PathBuf::from(format!("/proc/{pid}"));
            let is_built_by_us = fs::read_link(folder.join("exe")).is_ok_and(|exe| exe.starts_with(&workspace.cache));
            let line = fs::read(folder.join("cmdline")).unwrap_or_default();
            is_built_by_us && String::from_utf8_lossy(&line).contains(&run)
        })
        .collect()
}

/// A folder and all folders below it, the deepest first.
fn folders_below(root: &Path) -> Vec<PathBuf> {
    let mut folders = vec![root.to_owned()];
    let mut next = 0;
    while let Some(folder) = folders.get(next).cloned() {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.extend(entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
        next += 1;
    }
    folders.reverse();
    folders
}

/// Detaches everything mounted below a folder; how many.
pub fn unmount_below(folder: &Path) -> Result<usize> {
    let mounts = mounts_below(folder)?;
    for mount in mounts.iter().rev() {
        // Detached: what is still open in it ends with the process that has it open.
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("cannot unmount {}", mount.display()))?;
    }
    Ok(mounts.len())
}

fn mounts_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    // In the order in which they were mounted: the last one first is always free to go.
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    Ok(targets.filter(|target| target.starts_with(folder)).collect())
}

/// mountinfo writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                plain.push(byte);
                at += 4;
            }
            _ => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(plain))
}

fn has_bridge() -> bool {
    Path::new("/sys/class/net").join(network::BRIDGE).exists()
}

fn remove_network() -> Result<()> {
    // The pods' ends went with their namespaces, which the kernel takes down a little later.
    if has_bridge() {
        for port in bridge_ports() {
            // Gone in between is what we want; one that stays is seen below.
            let _ = run(&mut command("ip", &["link", "delete", &port]));
        }
        run(&mut command("ip", &["link", "delete", network::BRIDGE]))?;
        progress(&format!("removed the bridge {} and its routes", network::BRIDGE));
    }
    for (family, table) in TABLES {
        if has_table(family, table) {
            run(&mut command("nft", &["delete", "table", family, table]))?;
            progress(&format!("removed the nft table {family} {table}"));
        }
    }
    report("iptables rules", network::withdraw_forwarding()?.len());
    Ok(())
}

fn bridge_ports() -> Vec<String> {
    let ports = Path::new("/sys/class/net").join(network::BRIDGE).join("brif");
    let entries = fs::read_dir(ports).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn has_table(family: &str, table: &str) -> bool {
    succeeds(&mut command("nft", &["list", "table", family, table]))
}

fn remove_cgroups() -> Result<()> {
    let mut removed = 0;
    for name in [CGROUP, "kubepods"] {
        // A cgroup is busy until the kernel has buried its last process.
        wait::until(&format!("cannot remove the cgroups {name}"), Duration::from_secs(10), || {
            for folder in cgroup_folders(name).iter().flat_map(|root| folders_below(root)) {
                if fs::remove_dir(&folder).is_ok() {
                    removed += 1;
                }
            }
            Ok(cgroup_folders(name).is_empty().then_some(()))
        })?;
    }
    report("cgroups", removed);
    Ok(())
}

fn remove_bpf(machine: &Machine) -> Result<()> {
    if Path::new(BPF_PINS).exists() {
        fs::remove_dir_all(BPF_PINS).with_context(|| format!("cannot remove {BPF_PINS}"))?;
        progress(&format!("removed {BPF_PINS}"));
    }
    if machine.mounted_bpffs && machine::is_mounted(BPFFS, "bpf") {
        unmount(BPFFS, UnmountFlags::DETACH).with_context(|| format!("cannot unmount {BPFFS}"))?;
        progress(&format!("unmounted {BPFFS}"));
    }
    Ok(())
}

fn restore_sysctls(machine: &Machine) -> Result<()> {
    let mut restored = 0;
    for (name, value) in &machine.sysctls {
        if machine::read_sysctl(name).as_ref() != Some(value) {
            machine::write_sysctl(name, value)?;
            restored += 1;
        }
    }
    if restored > 0 {
        progress(&format!("restored {restored} kernel settings"));
    }
    Ok(())
}

/// What components left at paths outside of `target/local`.
fn remove_files(workspace: &Workspace, machine: &Machine, is_ours: bool) -> Result<()> {
    let foreign = foreign_files(workspace, machine, is_ours);
    for path in &foreign {
        let removed =
            if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    report("files of components elsewhere", foreign.len());
    for folder in machine.absent.iter().rev() {
        match fs::remove_dir(folder) {
            Ok(()) => progress(&format!("removed {}", folder.display())),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot remove {}", folder.display())),
        }
    }
    Ok(())
}

fn foreign_files(workspace: &Workspace, machine: &Machine, is_ours: bool) -> Vec<PathBuf> {
    let list = |folder: &str| -> Vec<PathBuf> {
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let starts_with =
        |path: &Path, prefix: &str| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let mut files = Vec::new();
    if is_ours {
        files.extend(list(DEVICE_PLUGINS));
    }
    // kubelet links the log of every container there.
    let is_our_log = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|to| to.starts_with(&workspace.run) || to.starts_with(&workspace.local))
    };
    files.extend(list("/var/log/containers").into_iter().filter(is_our_log));
    let result = format!("{}-", network::CNI_NETWORK);
    files.extend(list("/var/lib/cni/results").into_iter().filter(|path| starts_with(path, &result)));
    files.extend(list("/run/cdi").into_iter().filter(|path| starts_with(path, "spaceport")));
    // A killed shim leaves its socket. One that nobody listens on is of no use to anybody else either.
    let is_dead =
        |path: &PathBuf| UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    files.extend(list("/run/containerd/s").into_iter().filter(is_dead));
    // The pipes of containers' output. Only where the folder is ours: another containerd has its own in there.
    let fifo = "/run/containerd/fifo";
    if machine.absent.iter().any(|folder| folder == Path::new(fifo)) {
        files.extend(list(fifo));
    }
    files
}

/// Removes `target/local` but for the logs, which explain what went wrong, and the folder in `/run`.
fn remove_state(workspace: &Workspace) -> Result<()> {
    match fs::read_dir(&workspace.local) {
        Ok(entries) => {
            for path in entries.flatten().map(|entry| entry.path()).filter(|path| !path.ends_with("logs")) {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", workspace.local.display())),
    }
    match fs::remove_dir_all(&workspace.run) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", workspace.run.display()))
        }
        _ => Ok(()),
    }
}

/// Looks at everything once more; what is left.
fn left_over(workspace: &Workspace, machine: &Machine, is_ours: bool) -> Result<Vec<String>> {
    let mut left: Vec<String> = strays(workspace).iter().map(|pid| format!("process {pid}")).collect();
    left.extend(mounts_below(&workspace.local)?.iter().map(|mount| format!("mount {}", mount.display())));
    left.extend(foreign_files(workspace, machine, is_ours).iter().map(|path| path.display().to_string()));
    if has_bridge() {
        left.push(format!("interface {}", network::BRIDGE));
    }
    let routes = output(&mut command("ip", &["-4", "route", "show", "root", network::RANGE]))?;
    left.extend(routes.lines().map(|route| format!("route {route}")));
    if is_ours {
        let tables = TABLES.iter().filter(|(family, table)| has_table(family, table));
        left.extend(tables.map(|(family, table)| format!("nft table {family} {table}")));
        let cgroups = [CGROUP, "kubepods"].iter().flat_map(|name| cgroup_folders(name));
        left.extend(cgroups.map(|folder| format!("cgroup {}", folder.display())));
    }
    let nodes = machine.devices.keys().filter(|path| path.exists());
    left.extend(nodes.map(|path| format!("device node {}", path.display())));
    let settings = machine.sysctls.iter().filter(|(name, value)| machine::read_sysctl(name).as_ref() != Some(value));
    left.extend(settings.map(|(name, value)| format!("kernel setting {name} is not {value}")));
    if machine.mounted_bpffs && machine::is_mounted(BPFFS, "bpf") {
        left.push(format!("mount {BPFFS}"));
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_mountinfo_are_undone() {
        assert_eq!(unescape("/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape("/plain"), Path::new("/plain"));
        assert_eq!(unescape("/end\\"), Path::new("/end\\"));
    }

    #[test]
    fn folders_come_deepest_first() {
        let root = std::env::temp_dir().join(format!("spaceport-down-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        assert_eq!(folders_below(&root), [root.join("a/b"), root.join("a"), root.clone()]);
        fs::remove_dir_all(&root).unwrap();
    }
}
