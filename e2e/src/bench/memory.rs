//! Resident memory of our programs, as the kernel of this machine counts it.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

/// Where containers of pods are, in every cgroup layout of kubelet.
const PODS: &str = "kubepods";

/// Memory of one process, MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Resident {
    /// What it has now.
    pub(super) now_mib: f64,
    /// The most that it ever had.
    pub(super) most_mib: f64,
}

/// Resident memory of a process.
pub(super) fn resident(pid: u32) -> Result<Resident> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mib = |field| Some(kib(&status, field)? as f64 / 1024.0);
    let found = mib("VmRSS:").zip(mib("VmHWM:"));
    let (now_mib, most_mib) = found.with_context(|| format!("no VmRSS and VmHWM in {path}"))?;
    Ok(Resident { now_mib, most_mib })
}

/// Resident memory of the only container process with this program name, MiB.
pub(super) fn resident_mib(program: &str) -> Result<f64> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        let folder = entry.context("cannot list /proc")?.path();
        // Not a process, or one that has just ended: neither is the one we look for.
        let (Ok(words), Ok(cgroup)) = (fs::read(folder.join("cmdline")), fs::read_to_string(folder.join("cgroup")))
        else {
            continue;
        };
        if is_program(&words, program) && cgroup.contains(PODS) {
            let status = fs::read_to_string(folder.join("status"))
                .with_context(|| format!("{program} ended while its memory was read"))?;
            found.push(kib(&status, "VmRSS:").with_context(|| format!("no VmRSS in {}", folder.display()))?);
        }
    }
    let [kib] = found[..] else {
        bail!("expected one container with the program {program} on this machine, found {}", found.len());
    };
    // Far below what an f64 counts exactly.
    Ok(kib as f64 / 1024.0)
}

/// Whether the first word of a command line, which ends with a zero byte, is this program at any path.
fn is_program(command_line: &[u8], program: &str) -> bool {
    let word = command_line.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(word).is_ok_and(|word| Path::new(word).file_name().is_some_and(|name| name == program))
}

/// A field of `/proc/<pid>/status`, KiB.
fn kib(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_the_name_of_their_file() {
        assert!(is_program(b"/usr/local/bin/spaceport-operator\0--flag\0", "spaceport-operator"));
        assert!(is_program(b"/spaceport-operator\0", "spaceport-operator"));
        assert!(!is_program(b"/bin/sh\0spaceport-operator\0", "spaceport-operator"));
        assert!(!is_program(b"/usr/local/bin/spaceport-operator-old\0", "spaceport-operator"));
        assert!(!is_program(b"", "spaceport-operator"));
    }

    #[test]
    fn the_kernels_own_line_is_read() {
        assert_eq!(kib("Name:\tx\nVmRSS:\t   20480 kB\nThreads:\t3\n", "VmRSS:"), Some(20480));
        assert_eq!(kib("Name:\tkthreadd\n", "VmRSS:"), None);
        let own = resident(std::process::id()).unwrap();
        assert!(own.now_mib > 0.0 && own.most_mib >= own.now_mib, "{own:?}");
    }
}
