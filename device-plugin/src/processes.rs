//! Processes of a pod, as the host sees them: from a pid in a container to a process held by pidfd, and who holds devices.
//! Nothing a container says about its pids is believed (N15). The agent runs in the host's pid namespace.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use spaceport_core::protocol::AllowRefusal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::gate::Device;
use crate::gate::lease_cgroup::PREFIX;

/// Directories looked at in one container's cgroup. Apps make none; a container with an init system makes dozens.
const CGROUPS_MAX: usize = 1024;

/// Why a process cannot be held.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Not a process that may be allowed.
    #[error("{0}")]
    Refused(AllowRefusal),
    /// `/proc` or the cgroup could not be read.
    #[error("cannot look at {path}")]
    Unreadable {
        /// What was looked at.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A process held so that its pid cannot come to mean another.
#[derive(Debug)]
pub struct Held {
    /// Host pid.
    pub pid: u32,
    /// Start time in clock ticks.
    pub start_ticks: u64,
    descriptor: OwnedFd,
}

impl Held {
    /// Opens a pidfd. `None` if there is no such process (any more).
    pub fn open(pid: u32) -> Option<Self> {
        let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let descriptor = pidfd_open(raw, PidfdFlags::NONBLOCK).ok()?;
        let start_ticks = start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let held = Self { pid, start_ticks, descriptor };
        // Alive after the read: the start time is this process's.
        held.is_alive().then_some(held)
    }

    /// It has not ended.
    pub fn is_alive(&self) -> bool {
        let mut watched = [PollFd::from_borrowed_fd(self.descriptor.as_fd(), PollFlags::IN)];
        // A pidfd is readable from the end of its process on.
        matches!(poll(&mut watched, Some(&Timespec::default())), Ok(0))
    }

    /// SIGKILL; fine if it has ended.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.descriptor, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// If the pidfd cannot be watched.
    pub async fn ended(self) -> io::Result<()> {
        // SAFETY: an owned descriptor stays open and the same for as long as the AsyncFd owns it.
        let watched = unsafe { AsyncFd::register_with_interest(self.descriptor, Interest::READABLE) };
        watched.map_err(io::Error::from)?.readable().await.map(drop)
    }
}

/// Finds the process that its container calls `pid`: in the container's cgroup, in the pid namespace of the container's
/// first process, not in a lease already.
///
/// # Errors
/// [`ProcessError::Refused`] with the reason that the client's log gets.
pub fn in_container(container: &Path, pid: u32) -> Result<Held, ProcessError> {
    if pid == 1 {
        return Err(ProcessError::Refused(AllowRefusal::InitProcess));
    }
    let foreign = || ProcessError::Refused(AllowRefusal::ForeignProcess);
    let members = members(container)?;
    let namespace =
        members.iter().find_map(|host| (in_namespaces(*host)?.last() == Some(&1)).then(|| namespace(*host))?);
    let namespace = namespace.ok_or_else(foreign)?;
    let is_it = |host: u32| {
        in_namespaces(host).is_some_and(|pids| pids.last() == Some(&pid)) && self::namespace(host) == Some(namespace)
    };
    let host = members.into_iter().find(|host| is_it(*host)).ok_or_else(foreign)?;
    let held = Held::open(host).ok_or_else(foreign)?;
    // Between the look and the pidfd the pid may have passed to another process; now it cannot any more.
    if is_it(host) && self::members(container)?.contains(&host) && held.is_alive() { Ok(held) } else { Err(foreign()) }
}

/// Host pids in a cgroup and below it, lease cgroups left out.
///
/// # Errors
/// If the cgroup itself cannot be read.
pub fn members(cgroup: &Path) -> Result<BTreeSet<u32>, ProcessError> {
    let mut pids = BTreeSet::new();
    let mut open = vec![cgroup.to_owned()];
    for _ in 0..CGROUPS_MAX {
        let Some(directory) = open.pop() else { break };
        let procs = directory.join("cgroup.procs");
        match fs::read_to_string(&procs) {
            Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
            Err(source) if directory == cgroup => return Err(ProcessError::Unreadable { path: procs, source }),
            Err(_) => continue,
        }
        let children = fs::read_dir(&directory).into_iter().flatten().flatten();
        open.extend(
            children
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .filter(|entry| !entry.file_name().to_string_lossy().starts_with(PREFIX))
                .map(|entry| entry.path()),
        );
    }
    Ok(pids)
}

/// A process that has one of the gated devices open or mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Host pid.
    pub pid: u32,
    /// What it holds.
    pub device: Device,
}

/// Who below `pod` holds a device of these majors outside every lease cgroup (N10). Closing the gate does not take away
/// descriptors that are open, nor mappings.
///
/// # Errors
/// If the pod's cgroup cannot be read. Processes that end meanwhile hold nothing.
pub fn holders(pod: &Path, majors: &BTreeSet<u32>) -> Result<Vec<Holder>, ProcessError> {
    let mut found = Vec::new();
    for pid in members(pod)? {
        let held = open_files(pid).chain(mapped_files(pid)).find_map(|path| gated_device(&path, majors));
        found.extend(held.map(|device| Holder { pid, device }));
    }
    Ok(found)
}

fn open_files(pid: u32) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

/// One `/proc/<pid>/map_files` entry for each file that is mapped; a device has a mapping of its own.
fn mapped_files(pid: u32) -> impl Iterator<Item = PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut seen = BTreeSet::new();
    let ranges: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (range, _, _, device, inode) =
                (words.next()?, words.next(), words.next(), words.next()?, words.next()?);
            (inode != "0" && seen.insert((device.to_owned(), inode.to_owned()))).then(|| range.to_owned())
        })
        .collect();
    ranges.into_iter().map(move |range| PathBuf::from(format!("/proc/{pid}/map_files/{range}")))
}

fn gated_device(path: &Path, majors: &BTreeSet<u32>) -> Option<Device> {
    // Follows the kernel's own link to the open file; this is a stat, so it opens nothing.
    let found = fs::metadata(path).ok()?;
    let device = Device { major: rustix::fs::major(found.rdev()), minor: rustix::fs::minor(found.rdev()) };
    (found.file_type().is_char_device() && majors.contains(&device.major)).then_some(device)
}

/// The pids of a process from the host's namespace inwards.
fn in_namespaces(host_pid: u32) -> Option<Vec<u32>> {
    parse_namespace_pids(&fs::read_to_string(format!("/proc/{host_pid}/status")).ok()?)
}

fn namespace(host_pid: u32) -> Option<u64> {
    fs::metadata(format!("/proc/{host_pid}/ns/pid")).ok().map(|found| found.ino())
}

fn parse_namespace_pids(status: &str) -> Option<Vec<u32>> {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let pids: Vec<u32> = line.split_ascii_whitespace().map_while(|pid| pid.parse().ok()).collect();
    (!pids.is_empty()).then_some(pids)
}

/// Field 22 of `/proc/<pid>/stat`. The name in field 2 may hold spaces and brackets, so counting starts after the last one.
pub fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_in_nested_namespaces_are_read_from_the_host_inwards() {
        assert_eq!(parse_namespace_pids("Name:\tx\nNSpid:\t4711\t12\n"), Some(vec![4711, 12]));
        assert_eq!(parse_namespace_pids("Name:\tNSpid: 3\nNSpid:\t9\n"), Some(vec![9]));
        assert_eq!(parse_namespace_pids("NSpid:\n"), None);
        assert_eq!(parse_namespace_pids(""), None);
    }

    #[test]
    fn a_name_with_brackets_does_not_shift_the_start_time() {
        let fields = "S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 987654 0";
        assert_eq!(start_ticks(&format!("42 (a) b (c) {fields}")), Some(987_654));
        assert_eq!(start_ticks("42 (a"), None);
    }

    #[test]
    fn this_process_is_held_and_one_that_never_was_is_not() {
        let held = Held::open(std::process::id()).unwrap();
        assert!(held.is_alive() && held.start_ticks > 0);
        assert!(Held::open(u32::MAX).is_none());
    }

    #[test]
    fn a_device_is_known_by_its_number_and_not_by_its_name() {
        // /dev/null and /dev/zero have major 1.
        assert_eq!(gated_device(Path::new("/dev/null"), &BTreeSet::from([1])), Some(Device { major: 1, minor: 3 }));
        assert_eq!(gated_device(Path::new("/dev/null"), &BTreeSet::from([195])), None);
        assert_eq!(gated_device(Path::new("/proc/self/status"), &BTreeSet::from([0])), None);
    }

    #[test]
    fn pid_1_is_refused_before_anything_is_looked_at() {
        let refused = in_container(Path::new("/nowhere"), 1);
        assert!(matches!(refused, Err(ProcessError::Refused(AllowRefusal::InitProcess))));
    }
}
