//! What the machine must have, installed by us where we may, named exactly where we may not.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::{command, output, progress, run_long, succeeds};
use crate::workspace::Workspace;

/// How to see that a Debian package is not needed any more.
enum Probe {
    /// A program on the path.
    Program(&'static str),
    /// A file that the package brings.
    File(&'static str),
    /// A command that succeeds.
    Succeeds(&'static str, &'static [&'static str]),
}

/// Debian packages, what shows that they are there, and what for.
const PACKAGES: &[(&str, Probe, &str)] = &[
    ("ca-certificates", Probe::File("/etc/ssl/certs/ca-certificates.crt"), "downloads over TLS"),
    ("debian-archive-keyring", Probe::File("/usr/share/keyrings/debian-archive-keyring.gpg"), "checks the base image"),
    ("debootstrap", Probe::Program("debootstrap"), "the base image"),
    ("g++", Probe::Program("c++"), "libFuzzer"),
    ("gcc", Probe::Program("cc"), "runc and the pause program"),
    ("git", Probe::Program("git"), "Go modules, sources of Spaces"),
    ("iproute2", Probe::Program("ip"), "the pod bridge"),
    ("libc6-dev", Probe::Succeeds("sh", &["-c", "test -e \"$(cc -print-file-name=libc.a)\""]), "static binaries"),
    ("libseccomp-dev", Probe::Succeeds("pkg-config", &["--exists", "libseccomp"]), "runc"),
    ("mount", Probe::Program("mount"), "kubelet"),
    ("nftables", Probe::Program("nft"), "network of pods"),
    ("pkg-config", Probe::Program("pkg-config"), "runc"),
    ("python3", Probe::Program("python3"), "the Python environment of the images and tests"),
    ("python3-venv", Probe::Succeeds("python3", &["-c", "import venv, ensurepip"]), "the same"),
    ("util-linux", Probe::Program("setsid"), "starting the components"),
];

/// Programs that no Debian release has new enough.
const TOOLCHAINS: &[(&str, &[&str], &str)] = &[
    ("cargo", &["--version"], "https://rustup.rs"),
    // An older Go from 1.21 on fetches the one that e2e/cluster/*/go.mod asks for by itself.
    ("go", &["version"], "https://go.dev/dl (1.21 or later)"),
];

/// Checks everything that building needs; as root on Debian installs what is missing.
pub fn building(workspace: &Workspace) -> Result<()> {
    let mut missing_toolchains = Vec::new();
    for (program, arguments, source) in TOOLCHAINS {
        let program = if *program == "cargo" { workspace.host.cargo.as_os_str() } else { program.as_ref() };
        if !succeeds(&mut command(program, arguments)) {
            missing_toolchains.push(format!("{}: {source}", program.to_string_lossy()));
        }
    }
    if !missing_toolchains.is_empty() {
        bail!("missing, please install:\n  {}", missing_toolchains.join("\n  "));
    }
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<&str> = missing.iter().map(|(package, _)| *package).collect();
    let advice = format!("apt-get update && apt-get install --no-install-recommends {}", list.join(" "));
    if !is_root() || !on_path("apt-get") {
        let reasons: Vec<String> =
            missing.iter().map(|(package, what_for)| format!("{package} ({what_for})")).collect();
        bail!("missing: {}\nOn Debian, as root: {advice}", reasons.join(", "));
    }
    install(workspace, &list)?;
    let still: Vec<&str> = missing_packages().iter().map(|(package, _)| *package).collect();
    if !still.is_empty() {
        bail!("installed, and still not usable: {}. By hand: {advice}", still.join(", "));
    }
    Ok(())
}

/// Checks what running a cluster needs beside that: root and the kernel.
pub fn running() -> Result<()> {
    if !is_root() {
        bail!("the local cluster needs root: kubelet mounts, makes cgroups and network namespaces");
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let unified = unified_cgroup(&mounts);
    if unified.is_none() {
        bail!(
            "no cgroup v2 tree at /sys/fs/cgroup or /sys/fs/cgroup/unified: Spaceport's device gate needs one \
             (N8). Boot with systemd.unified_cgroup_hierarchy=1, or on a hybrid host: \
             mkdir /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
        );
    }
    let file_systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has_overlay = file_systems.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay");
    if !has_overlay && !succeeds(&mut command("modprobe", &["overlay"])) {
        bail!("this kernel has no overlayfs (CONFIG_OVERLAY_FS), which containers are unpacked into");
    }
    output(&mut command("nft", &["list", "tables"]))
        .map(drop)
        .map_err(|error| error.context("this kernel has no nftables (CONFIG_NF_TABLES), which kube-proxy needs"))
}

/// The mount point of the cgroup v2 tree.
pub fn unified_cgroup(mounts: &str) -> Option<&'static Path> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter().map(Path::new).find(|path| {
        mounts.lines().any(|line| {
            let mut words = line.split(' ').skip(1);
            words.next().map(Path::new) == Some(path) && words.next() == Some("cgroup2")
        })
    })
}

/// Whether we are root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn missing_packages() -> Vec<(&'static str, &'static str)> {
    PACKAGES
        .iter()
        .filter(|(_, probe, _)| match probe {
            Probe::Program(program) => !on_path(program),
            Probe::File(path) => !Path::new(path).exists(),
            Probe::Succeeds(program, arguments) => !succeeds(&mut command(program, arguments)),
        })
        .map(|(package, _, what_for)| (*package, *what_for))
        .collect()
}

fn on_path(program: &str) -> bool {
    succeeds(&mut command("sh", &["-c", "command -v \"$0\"", program]))
}

fn install(workspace: &Workspace, packages: &[&str]) -> Result<()> {
    progress(&format!("installing Debian packages: {}", packages.join(" ")));
    let log = workspace.cache.join("apt.log");
    let apt = |arguments: &[&str]| -> Command {
        let mut apt = command("apt-get", arguments);
        apt.env("DEBIAN_FRONTEND", "noninteractive");
        apt
    };
    run_long("apt-get update", &mut apt(&["update"]), &log)?;
    let mut install = apt(&["install", "--yes", "--no-install-recommends"]);
    install.args(packages);
    run_long("apt-get install", &mut install, &log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_tree_is_found_on_pure_and_hybrid_hosts_and_missed_on_pure_v1() {
        let pure = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let v1 = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n";
        assert_eq!(unified_cgroup(pure), Some(Path::new("/sys/fs/cgroup")));
        assert_eq!(unified_cgroup(hybrid), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(unified_cgroup(v1), None);
    }
}
