//! The cgroup of one lease: `lease-<ulid>` inside the container's cgroup in the v2 tree (N9, N11).
//!
//! On a pure v2 host a cgroup that holds processes may have children only while it hands no controllers down to them. We
//! enable none: the child exists to name a set of processes, their memory and CPU stay accounted to the container.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::pread;

/// Prefix of the directory name; the rest is the lease id.
pub const PREFIX: &str = "lease-";

/// Longest sleep between two looks. The kernel tells of changes at most every 10 ms, so that one which follows closely on
/// another comes late; hand-over of a slot waits for it, and a look costs microseconds.
const LOOK: Duration = Duration::from_millis(1);
/// `cgroup.events` is two short lines.
const EVENTS_BYTES: usize = 256;

/// A cgroup operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path}")]
pub struct CgroupError {
    /// What was tried.
    pub operation: &'static str,
    /// On which file or directory.
    pub path: PathBuf,
    /// What the kernel answered.
    pub source: io::Error,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError { operation, path, source }
}

/// The directory of one lease's processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseCgroup {
    path: PathBuf,
    id: u64,
}

impl LeaseCgroup {
    /// Makes the child of the container's cgroup; fails if it exists, as a lease id is used once.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn create(container: &Path, lease: &str) -> Result<Self, CgroupError> {
        let path = container.join(format!("{PREFIX}{lease}"));
        fs::create_dir(&path).map_err(failed("make", &path))?;
        Self::open(&path)
    }

    /// Takes an existing one, after a restart of the agent.
    ///
    /// # Errors
    /// If it is not there.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        // On 64-bit kernels the inode number is the cgroup id that BPF programs see.
        let id = fs::metadata(path).map_err(failed("look at", path))?.ino();
        Ok(Self { path: path.to_owned(), id })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its cgroup id, the key of the gate.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Moves a process, with all its threads, into it. Children forked later are born here.
    ///
    /// # Errors
    /// What the kernel answers; `ESRCH` if the process is gone.
    pub fn take_in(&self, pid: u32) -> Result<(), CgroupError> {
        self.write("cgroup.procs", &pid.to_string(), "move a process into")
    }

    /// Host pids of the processes in it.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Asks the kernel to stop every process in it; returns at once, see [`Self::wait_frozen`].
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "1", "freeze")
    }

    /// Lets them run on.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "0", "thaw")
    }

    /// SIGKILL to every process in it, frozen or forking (kernel 5.14).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1", "kill")
    }

    /// Waits until no live process is left in it; true if that came within `limit`. Blocks its thread.
    ///
    /// # Errors
    /// What the kernel answers; a directory that is gone counts as empty.
    pub fn wait_empty(&self, limit: Duration) -> Result<bool, CgroupError> {
        self.wait_event("populated 0", limit)
    }

    /// Waits until every process in it is stopped; true if that came within `limit`. Blocks its thread.
    ///
    /// # Errors
    /// What the kernel answers; a directory that is gone counts as frozen.
    pub fn wait_frozen(&self, limit: Duration) -> Result<bool, CgroupError> {
        self.wait_event("frozen 1", limit)
    }

    /// Removes the directory; fine if it is gone already, as the runtime removes a container's children with it.
    ///
    /// # Errors
    /// What the kernel answers; `EBUSY` while a process lives in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &self.path)(error)),
            _ => Ok(()),
        }
    }

    fn write(&self, file: &str, value: &str, operation: &'static str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        // Opened without O_CREAT: a kernel without this file must give an error, not a new file.
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .map_err(failed(operation, &path))
    }

    fn wait_event(&self, wanted: &str, limit: Duration) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.events");
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            other => other.map_err(failed("open", &path))?,
        };
        let end = monotonic() + limit;
        // Each turn waits for an event of the kernel or for LOOK, until `limit` is over.
        loop {
            let mut text = [0_u8; EVENTS_BYTES];
            let length = match pread(&file, &mut text, 0) {
                Ok(length) => length,
                // The directory was removed while we held the file.
                Err(rustix::io::Errno::NODEV) => return Ok(true),
                Err(error) => return Err(failed("read", &path)(error.into())),
            };
            if text[..length].split(|byte| *byte == b'\n').any(|line| line == wanted.as_bytes()) {
                return Ok(true);
            }
            let left = end.saturating_sub(monotonic());
            if left.is_zero() {
                return Ok(false);
            }
            let mut watched = [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::PRI)];
            let left = left.min(LOOK);
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut watched, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed("watch", &path)(error.into())),
            }
        }
    }
}

/// Every `lease-*` directory below `pods`, to find what an earlier agent left behind. Lease cgroups lie in container
/// cgroups, which lie at most a few levels deep, so the walk is bounded by the number of the node's cgroups.
///
/// # Errors
/// If `pods` itself cannot be read; directories that vanish meanwhile are passed over.
pub fn find_all(pods: &Path) -> Result<Vec<LeaseCgroup>, CgroupError> {
    let mut found = Vec::new();
    let mut open = vec![pods.to_owned()];
    let mut first = true;
    while let Some(directory) = open.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if first => return Err(failed("read", &directory)(error)),
            Err(_) => continue,
            Ok(entries) => entries,
        };
        first = false;
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                found.extend(LeaseCgroup::open(&entry.path()).ok());
            } else {
                open.push(entry.path());
            }
        }
    }
    Ok(found)
}

fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}
