//! The gate: no process of any pod opens an NVIDIA device unless it is in the cgroup of a running lease on that card
//! (invariant 9, N8-N10).
//!
//! One device program on the pods' cgroup, its two maps and its link are pinned in bpffs, so the gate stays shut while
//! the agent restarts. A grant or revocation is a handful of map writes keyed by the lease's cgroup id.

pub mod bpf;
pub mod hierarchy;
pub mod lease_cgroup;
pub mod program;

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

/// Entries of the allow map: 64 leases (more than any node has slots) of up to 64 device nodes each.
const ALLOW_ENTRIES_MAX: u32 = 4096;
/// Entries of the exempt map: pods with dedicated cards and pods of exempt namespaces on one node. Kubelet's own limit is
/// 110 pods, large nodes set up to 500.
const EXEMPT_ENTRIES_MAX: u32 = 1024;

/// The allow map of the former layout, which had a plain counter as value.
const FORMER_ALLOW: &str = "allow-1";

const BPFFS_MAGIC: rustix::fs::FsWord = 0xcafe_4a11;

/// A character device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Device {
    /// Driver number.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Door {
    cgroup: u64,
    major: u32,
    minor: u32,
}

// SAFETY: three integers that fill 16 bytes without padding; every bit pattern is a value.
unsafe impl bpf::Plain for Door {}

/// What the program writes behind a door.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Passages {
    opens: u64,
    /// BOOTTIME; 0 if not known.
    first_ns: u64,
}

// SAFETY: two integers that fill 16 bytes without padding; every bit pattern is a value.
unsafe impl bpf::Plain for Passages {}

/// How often a cgroup's processes were let through since the gate was opened for it (opens, and access(2) checks).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opens {
    /// Over all its devices.
    pub count: u64,
    /// The first of them; `None` if there was none, or its time was not kept.
    pub first: Option<FirstOpen>,
}

/// The first open of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstOpen {
    /// BOOTTIME.
    pub at_ms: u64,
    /// What was opened.
    pub device: Device,
}

impl Opens {
    fn add(&mut self, door: &Door, passages: Passages) {
        self.count = self.count.saturating_add(passages.opens);
        if passages.opens > 0 && passages.first_ns > 0 {
            let device = Device { major: door.major, minor: door.minor };
            let here = FirstOpen { at_ms: passages.first_ns / 1_000_000, device };
            self.first = Some(self.first.filter(|first| first.at_ms <= here.at_ms).unwrap_or(here));
        }
    }
}

/// The gate could not be set up or moved.
#[derive(Debug, thiserror::Error)]
#[error("the GPU gate: cannot {operation} ({at})")]
pub struct GateError {
    /// What was tried.
    pub operation: &'static str,
    /// On what.
    pub at: PathBuf,
    /// What the kernel answered.
    pub source: io::Error,
}

fn failed(operation: &'static str, at: &Path) -> impl FnOnce(io::Error) -> GateError {
    let at = at.to_owned();
    move |source| GateError { operation, at, source }
}

/// What the gate needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateSettings {
    /// Where program link and maps are pinned, in bpffs.
    pub pin_directory: PathBuf,
    /// Cgroup above all pods.
    pub pods_cgroup: PathBuf,
    /// Majors that are shut: nvidia, nvidia-uvm, nvidia-caps.
    pub majors: BTreeSet<u32>,
}

/// The attached gate. Dropping it changes nothing on the node: it stays shut.
#[derive(Debug)]
pub struct Gate {
    pin_directory: PathBuf,
    pods_cgroup: PathBuf,
    allow: bpf::HashMap<Door, Passages>,
    exempt: bpf::HashMap<u64, u64>,
    /// A std mutex: attaching takes microseconds.
    attached: Mutex<Attached>,
}

#[derive(Debug)]
struct Attached {
    link: OwnedFd,
    majors: BTreeSet<u32>,
}

impl Gate {
    /// Attaches the gate, or takes over the one that an earlier agent pinned and puts this version's program behind it
    /// without a moment in between.
    ///
    /// # Errors
    /// What failed: bpffs, maps, program or attachment.
    pub fn establish(settings: GateSettings) -> Result<Self, GateError> {
        let directory = &settings.pin_directory;
        ensure_bpffs(directory)?;
        // The layout number is part of the name: a later layout gets maps of its own instead of misreading these.
        let allow = pinned_map(&directory.join("allow-2"), "sp_allow", ALLOW_ENTRIES_MAX)?;
        carry_over(directory, &allow)?;
        let exempt = pinned_map(&directory.join("exempt-1"), "sp_exempt", EXEMPT_ENTRIES_MAX)?;
        let GateSettings { pin_directory, pods_cgroup, majors } = settings;
        let link = attach(&pin_directory, &pods_cgroup, &majors, &allow, &exempt)?;
        // Last, so that an establishment that fails half-way is repeated from the same start.
        remove_pin(&pin_directory.join(FORMER_ALLOW)).map_err(failed("unpin the former map", &pin_directory))?;
        let attached = Mutex::new(Attached { link, majors });
        Ok(Self { pin_directory, pods_cgroup, allow, exempt, attached })
    }

    /// The program is still attached to the cgroup that pods run under (kubelet may have made that anew).
    pub fn is_attached(&self) -> bool {
        guards(&self.lock().link, &self.pods_cgroup)
    }

    /// Attaches it again if it is not, and covers these majors if they are others than before: dynamic majors appear when
    /// the driver is loaded. Returns whether anything had to be done.
    ///
    /// # Errors
    /// As [`Self::establish`]; the old program then stays.
    pub fn maintain(&self, majors: &BTreeSet<u32>) -> Result<bool, GateError> {
        let mut attached = self.lock();
        if attached.majors == *majors && guards(&attached.link, &self.pods_cgroup) {
            return Ok(false);
        }
        attached.link = attach(&self.pin_directory, &self.pods_cgroup, majors, &self.allow, &self.exempt)?;
        attached.majors.clone_from(majors);
        Ok(true)
    }

    /// The cgroup above all pods.
    pub fn pods_cgroup(&self) -> &Path {
        &self.pods_cgroup
    }

    /// The majors that are shut.
    pub fn majors(&self) -> BTreeSet<u32> {
        self.lock().majors.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Attached> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the processes of one cgroup open these devices; counting starts at zero.
    ///
    /// # Errors
    /// What the kernel answers. Devices opened before the failing one are shut again.
    pub fn open(&self, cgroup: u64, devices: &[Device]) -> Result<(), GateError> {
        for device in devices {
            let door = Door { cgroup, major: device.major, minor: device.minor };
            if let Err(error) = self.allow.insert(&door, &Passages::default()) {
                self.close(cgroup)?;
                return Err(failed("open for a lease", &self.pin_directory)(error));
            }
        }
        Ok(())
    }

    /// Anything is open for this cgroup.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn is_open(&self, cgroup: u64) -> Result<bool, GateError> {
        Ok(self.doors()?.iter().any(|door| door.cgroup == cgroup))
    }

    /// How often the cgroup's processes were let through, and when first.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn opens(&self, cgroup: u64) -> Result<Opens, GateError> {
        let mut opens = Opens::default();
        for door in self.doors()?.into_iter().filter(|door| door.cgroup == cgroup) {
            let there = self.allow.get(&door).map_err(failed("read a counter", &self.pin_directory))?;
            opens.add(&door, there.unwrap_or_default());
        }
        Ok(opens)
    }

    /// Shuts everything that was open for a cgroup; returns how often it was let through and when first. Repeating it is
    /// harmless.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn close(&self, cgroup: u64) -> Result<Opens, GateError> {
        let mut opens = Opens::default();
        for door in self.doors()?.into_iter().filter(|door| door.cgroup == cgroup) {
            let there = self.allow.get(&door).map_err(failed("read a counter", &self.pin_directory))?;
            self.allow.remove(&door).map_err(failed("close", &self.pin_directory))?;
            opens.add(&door, there.unwrap_or_default());
        }
        Ok(opens)
    }

    /// Shuts the gate for every cgroup that is not in `known`; returns how many cgroups that were.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn close_all_but(&self, known: &HashSet<u64>) -> Result<usize, GateError> {
        let strangers: HashSet<u64> =
            self.doors()?.into_iter().map(|door| door.cgroup).filter(|cgroup| !known.contains(cgroup)).collect();
        for cgroup in &strangers {
            self.close(*cgroup)?;
        }
        Ok(strangers.len())
    }

    /// Replaces the set of exempt cgroups: pods with dedicated cards, pods of exempt namespaces, the agent itself. Their
    /// descendants are exempt with them.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn set_exempt(&self, cgroups: &HashSet<u64>) -> Result<(), GateError> {
        let at = &self.pin_directory;
        for old in self.exempt.keys().map_err(failed("read the exemptions", at))? {
            if !cgroups.contains(&old) {
                self.exempt.remove(&old).map_err(failed("end an exemption", at))?;
            }
        }
        for cgroup in cgroups {
            self.exempt.insert(cgroup, &1).map_err(failed("exempt a pod", at))?;
        }
        Ok(())
    }

    /// Exempts one cgroup more, as the agent's own: the rest of the set is derived from pods that are not seen yet.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn exempt_also(&self, cgroup: u64) -> Result<(), GateError> {
        self.exempt.insert(&cgroup, &1).map_err(failed("exempt a pod", &self.pin_directory))
    }

    fn doors(&self) -> Result<Vec<Door>, GateError> {
        self.allow.keys().map_err(failed("read the map", &self.pin_directory))
    }
}

/// Unpins a gate: the program detaches when the last holder of its link is gone. For uninstalling and for tests; a
/// stopping agent leaves the gate shut.
///
/// # Errors
/// If a file cannot be removed.
pub fn unpin(directory: &Path) -> io::Result<()> {
    for name in ["link", FORMER_ALLOW, "allow-2", "exempt-1"] {
        remove_pin(&directory.join(name))?;
    }
    std::fs::remove_dir(directory)
}

fn remove_pin(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes the doors and counters of the former layout over, before the new program goes behind the link in one step: the
/// gate is never open, and leases that run keep their cards. When such a lease first opened is not known, and opens in the
/// microseconds between copy and exchange are not counted.
fn carry_over(directory: &Path, allow: &bpf::HashMap<Door, Passages>) -> Result<(), GateError> {
    let path = directory.join(FORMER_ALLOW);
    let Some(fd) = bpf::open_pinned(&path).map_err(failed("open the former map", &path))? else { return Ok(()) };
    let former: bpf::HashMap<Door, u64> =
        bpf::HashMap::adopt(fd, ALLOW_ENTRIES_MAX).map_err(failed("take over the former map", &path))?;
    for door in former.keys().map_err(failed("read the former map", &path))? {
        if let Some(opens) = former.get(&door).map_err(failed("read a counter", &path))? {
            allow.insert(&door, &Passages { opens, first_ns: 0 }).map_err(failed("carry a door over", &path))?;
        }
    }
    Ok(())
}

/// The id of a cgroup, as programs see it.
///
/// # Errors
/// If the directory cannot be looked at.
pub fn cgroup_id(directory: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(directory)?.ino())
}

fn guards(link: &OwnedFd, pods_cgroup: &Path) -> bool {
    let linked = bpf::linked_cgroup(link.as_fd()).unwrap_or(0);
    linked != 0 && cgroup_id(pods_cgroup).is_ok_and(|id| id == linked)
}

fn attach(
    pin_directory: &Path,
    pods_cgroup: &Path,
    majors: &BTreeSet<u32>,
    allow: &bpf::HashMap<Door, Passages>,
    exempt: &bpf::HashMap<u64, u64>,
) -> Result<OwnedFd, GateError> {
    let code = program::assemble(majors, allow.fd(), exempt.fd());
    let program = bpf::load_device_program("sp_gate", &code).map_err(failed("load the program", pin_directory))?;
    let path = pin_directory.join("link");
    let wanted = cgroup_id(pods_cgroup).map_err(failed("look at the pods' cgroup", pods_cgroup))?;
    if let Some(link) = bpf::open_pinned(&path).map_err(failed("open the pinned link", &path))? {
        let linked = bpf::linked_cgroup(link.as_fd()).map_err(failed("look at the pinned link", &path))?;
        if linked == wanted {
            bpf::replace_program(link.as_fd(), program.as_fd()).map_err(failed("replace the program", &path))?;
            return Ok(link);
        }
        // Kubelet made its cgroup anew: the old link guards nothing.
        std::fs::remove_file(&path).map_err(failed("remove the stale link", &path))?;
    }
    let cgroup = File::open(pods_cgroup).map_err(failed("open the pods' cgroup", pods_cgroup))?;
    let link = bpf::link_device_program(program.as_fd(), cgroup.as_fd())
        .map_err(failed("attach (kernel 5.14 or later is needed)", pods_cgroup))?;
    bpf::pin(link.as_fd(), &path).map_err(failed("pin the link", &path))?;
    Ok(link)
}

fn pinned_map<K: bpf::Plain, V: bpf::Plain>(
    path: &Path,
    name: &str,
    entries_max: u32,
) -> Result<bpf::HashMap<K, V>, GateError> {
    match bpf::open_pinned(path).map_err(failed("open a pinned map", path))? {
        Some(fd) => bpf::HashMap::adopt(fd, entries_max).map_err(failed("take over a pinned map", path)),
        None => {
            let map = bpf::HashMap::create(name, entries_max).map_err(failed("make a map", path))?;
            bpf::pin(map.fd(), path).map_err(failed("pin a map", path))?;
            Ok(map)
        }
    }
}

/// Makes the pin directory, mounting bpffs on its parent if the host has none there. In a pod that mount reaches the host
/// only with bidirectional propagation, which the chart sets.
fn ensure_bpffs(directory: &Path) -> Result<(), GateError> {
    let is_bpffs = |path: &Path| rustix::fs::statfs(path).is_ok_and(|found| found.f_type == BPFFS_MAGIC);
    let parent = directory.parent().unwrap_or(directory);
    if !is_bpffs(directory) && !is_bpffs(parent) {
        std::fs::create_dir_all(parent).map_err(failed("make", parent))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("bpf", parent, "bpf", flags, Some(c"mode=0700"))
            .map_err(io::Error::from)
            .map_err(failed("mount bpffs at", parent))?;
    }
    std::fs::create_dir_all(directory).map_err(failed("make", directory))
}
