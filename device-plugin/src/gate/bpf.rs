//! The few bpf(2) commands that the gate needs, typed.
//!
//! Written against the kernel's own interface (`include/uapi/linux/bpf.h`), as container runtimes do, because one device
//! program and two hash maps do not justify a loader library.

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// What the verifier may write when it refuses a program; its complaint is at the end, and the program is short.
const VERIFIER_LOG_BYTES: usize = 64 * 1024;

/// Plain fixed-size data that the kernel copies byte by byte.
///
/// # Safety
/// The type must have no padding and every bit pattern must be a value of it.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: integers have no padding and take every bit pattern.
unsafe impl Plain for u64 {}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct MapElement {
    map_fd: u32,
    padding: u32,
    key: u64,
    value_or_next_key: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct ObjectPath {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ObjectInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// `struct bpf_link_info` as far as a cgroup link fills it.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    padding: u32,
    cgroup_id: u64,
    attach_type: u32,
    tail: u32,
}

/// `struct bpf_map_info` up to the fields that are compared.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is a live, exclusively borrowed `repr(C)` prefix of `union bpf_attr` of exactly the size that is
    // passed; pointers inside it are made by the callers below from buffers that outlive this call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn bpf_fd<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let raw = bpf(command, attributes)?;
    let raw = i32::try_from(raw).map_err(io::Error::other)?;
    // SAFETY: these commands return a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd().unsigned_abs()
}

fn name16(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    // The last byte stays zero: the kernel wants a terminated string.
    for (to, from) in out[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    out
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Pins an object in bpffs, where it outlives this process.
///
/// # Errors
/// What the kernel answers; `EPERM` if the directory is not in bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attributes =
        ObjectPath { pathname: path.as_ptr().expose_provenance() as u64, bpf_fd: number(object), file_flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attributes).map(drop)
}

/// Opens a pinned object; `None` if nothing is pinned there.
///
/// # Errors
/// What the kernel answers, except "no such file".
pub fn open_pinned(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    let mut attributes = ObjectPath { pathname: path.as_ptr().expose_provenance() as u64, ..ObjectPath::default() };
    match bpf_fd(BPF_OBJ_GET, &mut attributes) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A hash map shared with the program.
#[derive(Debug)]
pub struct HashMap<K, V> {
    fd: OwnedFd,
    entries_max: u32,
    types: PhantomData<(K, V)>,
}

impl<K: Plain, V: Plain> HashMap<K, V> {
    /// Makes a map for at most `entries_max` entries.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn create(name: &str, entries_max: u32) -> io::Result<Self> {
        let mut attributes = MapCreate {
            map_type: BPF_MAP_TYPE_HASH,
            key_size: size_of::<K>() as u32,
            value_size: size_of::<V>() as u32,
            max_entries: entries_max,
            map_name: name16(name),
            ..MapCreate::default()
        };
        let fd = bpf_fd(BPF_MAP_CREATE, &mut attributes)?;
        Ok(Self { fd, entries_max, types: PhantomData })
    }

    /// Takes an opened map if it has this key and value size and bound.
    ///
    /// # Errors
    /// What the kernel answers; `InvalidData` if it is another kind of map.
    pub fn adopt(fd: OwnedFd, entries_max: u32) -> io::Result<Self> {
        let mut info = MapInfo::default();
        object_info(fd.as_fd(), &mut info)?;
        if info.map_type != BPF_MAP_TYPE_HASH
            || info.key_size as usize != size_of::<K>()
            || info.value_size as usize != size_of::<V>()
            || info.max_entries != entries_max
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the pinned map has another layout"));
        }
        Ok(Self { fd, entries_max, types: PhantomData })
    }

    /// The map's descriptor, for pinning and for the program text.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sets an entry, new or not.
    ///
    /// # Errors
    /// What the kernel answers; `E2BIG` if the map is full.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attributes = self.element(key, std::ptr::from_ref(value).expose_provenance() as u64);
        bpf(BPF_MAP_UPDATE_ELEM, &mut attributes).map(drop)
    }

    /// Reads an entry.
    ///
    /// # Errors
    /// What the kernel answers, except "no such entry".
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::default();
        let mut attributes = self.element(key, std::ptr::from_mut(&mut value).expose_provenance() as u64);
        found(bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes)).map(|there| there.then_some(value))
    }

    /// Removes an entry; true if it was there.
    ///
    /// # Errors
    /// What the kernel answers, except "no such entry".
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        let mut attributes = self.element(key, 0);
        found(bpf(BPF_MAP_DELETE_ELEM, &mut attributes))
    }

    /// All keys. Only this process writes the map, so nothing moves while it is walked.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys = Vec::new();
        let mut last: Option<K> = None;
        // One more than the map can hold: a walk that does not end is a kernel fault, not ours to follow.
        for _ in 0..=self.entries_max {
            let mut next = K::default();
            let key = last.as_ref().map_or(0, |key| std::ptr::from_ref(key).expose_provenance() as u64);
            let mut attributes = MapElement {
                map_fd: number(self.fd.as_fd()),
                key,
                value_or_next_key: std::ptr::from_mut(&mut next).expose_provenance() as u64,
                ..MapElement::default()
            };
            if !found(bpf(BPF_MAP_GET_NEXT_KEY, &mut attributes))? {
                break;
            }
            keys.push(next);
            last = Some(next);
        }
        Ok(keys)
    }

    fn element(&self, key: &K, value: u64) -> MapElement {
        MapElement {
            map_fd: number(self.fd.as_fd()),
            key: std::ptr::from_ref(key).expose_provenance() as u64,
            value_or_next_key: value,
            ..MapElement::default()
        }
    }
}

fn found(result: io::Result<libc::c_long>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attributes = ObjectInfo {
        bpf_fd: number(object),
        info_len: size_of::<T>() as u32,
        info: std::ptr::from_mut(info).expose_provenance() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes).map(drop)
}

/// Loads a device program. `code` is the instruction stream in the kernel's encoding.
///
/// # Errors
/// What the kernel answers, with the verifier's last words if it refused.
pub fn load_device_program(name: &str, code: &[u64]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut log = vec![0_u8; VERIFIER_LOG_BYTES];
    let mut attributes = ProgramLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(code.len()).map_err(io::Error::other)?,
        insns: code.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        log_level: 1,
        log_size: VERIFIER_LOG_BYTES as u32,
        log_buf: log.as_mut_ptr().expose_provenance() as u64,
        prog_name: name16(name),
        expected_attach_type: BPF_CGROUP_DEVICE,
        ..ProgramLoad::default()
    };
    bpf_fd(BPF_PROG_LOAD, &mut attributes).map_err(|error| {
        let text = String::from_utf8_lossy(&log);
        let words = text.trim_end_matches('\0').trim();
        if words.is_empty() { error } else { io::Error::new(error.kind(), format!("{error}; verifier: {words}")) }
    })
}

/// Attaches a device program to a cgroup as a link, beside whatever else is attached there (link attachment is always
/// "multi": all programs must allow).
///
/// # Errors
/// What the kernel answers; kernels before 5.7 know no cgroup links (`EINVAL`).
pub fn link_device_program(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes =
        LinkCreate { prog_fd: number(program), target_fd: number(cgroup), attach_type: BPF_CGROUP_DEVICE, flags: 0 };
    bpf_fd(BPF_LINK_CREATE, &mut attributes)
}

/// Puts another program behind a link in one step, so that there is no moment without a gate.
///
/// # Errors
/// What the kernel answers; `ENOLINK` if the link's cgroup is gone.
pub fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkUpdate { link_fd: number(link), new_prog_fd: number(program), ..LinkUpdate::default() };
    bpf(BPF_LINK_UPDATE, &mut attributes).map(drop)
}

/// Id of the cgroup that a link is attached to; 0 if that cgroup is gone.
///
/// # Errors
/// What the kernel answers.
pub fn linked_cgroup(link: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = LinkInfo::default();
    object_info(link, &mut info)?;
    Ok(info.cgroup_id)
}
