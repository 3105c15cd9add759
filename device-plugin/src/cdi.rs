//! The CDI spec: which devices and libraries a container gets with a seat or a dedicated card (N7).
//!
//! The agent names devices to kubelet, kubelet names them to containerd, and containerd reads this file. A seat carries
//! every time-shared card, because nodes cannot be added to a running container; the gate decides who may open one. The
//! file is replaced as a whole, written anew when cards, device nodes or driver change, and removed on a deliberate stop.
//!
//! There are no hooks. Libraries appear under their SONAMEs in directories that the container's loader searches without
//! a cache, so no `ldconfig` has to run in the container.

mod driver_libraries;

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use driver_libraries::{DriverRoot, Library};

use crate::epoch::write_durably;
use crate::inventory::{Card, DeviceNode, DeviceNodes};

/// Vendor and class of our devices.
pub const KIND: &str = "spaceport.dev/gpu";

/// Where runtimes look for specs made at run time.
pub const DEFAULT_DIRECTORY: &str = "/var/run/cdi";

/// The oldest version of the format that has all we use; containerd since 1.7 and CRI-O since 1.23 read it.
const CDI_VERSION: &str = "0.6.0";

const FILE_NAME: &str = "spaceport.dev-gpu.json";

/// Where a container's loader looks without a cache: the first is built into Debian's, the second into Red Hat's.
const CONTAINER_LIBRARY_DIRECTORIES: [&str; 2] = [driver_libraries::MULTIARCH_DIRECTORY, "/usr/lib64"];

/// Fully qualified name of the device of a seat.
pub fn seat_device() -> String {
    format!("{KIND}=seat")
}

/// Fully qualified name of a dedicated card.
pub fn card_device(card: u32) -> String {
    format!("{KIND}=card-{card}")
}

/// The spec, field by field as the format names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    cdi_version: &'static str,
    kind: &'static str,
    devices: Vec<Device>,
    container_edits: Edits,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    container_edits: Edits,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Edits {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    env: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    device_nodes: Vec<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<Mount>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    path: String,
    #[serde(rename = "type")]
    kind: &'static str,
    major: u32,
    minor: u32,
    permissions: &'static str,
}

impl Node {
    fn of(node: &DeviceNode) -> Self {
        Self {
            path: format!("/dev/{}", node.name),
            kind: "c",
            major: node.device.major,
            minor: node.device.minor,
            // Opened and used; a container makes no device nodes of its own.
            permissions: "rw",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: PathBuf,
    container_path: String,
    options: [&'static str; 4],
}

/// The cards a spec is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CdiCards {
    /// Every seat carries these.
    pub time_shared: Vec<Card>,
    /// A device each.
    pub dedicated: Vec<Card>,
}

/// The spec of these cards. Nodes and libraries that the host lacks are left out.
///
/// # Errors
/// If a device node is there and cannot be looked at.
pub fn spec(cards: &CdiCards, nodes: &DeviceNodes, libraries: &[Library]) -> io::Result<Spec> {
    let shared: Vec<Node> = nodes.shared()?.iter().map(Node::of).collect();
    let with_cards = |cards: &[Card]| -> io::Result<Edits> {
        let mut device_nodes = shared.clone();
        for card in cards {
            device_nodes.extend(nodes.card(card.minor)?.as_ref().map(Node::of));
        }
        // Not for the container: an older hook of NVIDIA's runtime, if the host has it, reads this from the image and
        // would add every card. "void" means: you are not asked.
        Ok(Edits { env: vec!["NVIDIA_VISIBLE_DEVICES=void".to_owned()], device_nodes, mounts: Vec::new() })
    };
    let mut devices = vec![Device { name: "seat".to_owned(), container_edits: with_cards(&cards.time_shared)? }];
    for card in &cards.dedicated {
        let edits = with_cards(std::slice::from_ref(card))?;
        devices.push(Device { name: format!("card-{}", card.index), container_edits: edits });
    }
    Ok(Spec { cdi_version: CDI_VERSION, kind: KIND, devices, container_edits: library_edits(libraries) })
}

fn library_edits(libraries: &[Library]) -> Edits {
    let mut edits = Edits::default();
    for directory in CONTAINER_LIBRARY_DIRECTORIES {
        edits.mounts.extend(libraries.iter().map(|library| Mount {
            host_path: library.host_path.clone(),
            container_path: format!("{directory}/{}", library.soname),
            options: ["ro", "nosuid", "nodev", "bind"],
        }));
    }
    if libraries.iter().any(|library| library.soname == "libcuda.so.1") {
        // Triton looks for libcuda in the loader's cache, which knows nothing of mounts, unless this says where it is.
        edits.env.push(format!("TRITON_LIBCUDA_PATH={}", CONTAINER_LIBRARY_DIRECTORIES[0]));
    }
    edits
}

/// The spec could not be put where runtimes find it.
#[derive(Debug, thiserror::Error)]
#[error("the CDI spec {} cannot {action}", path.display())]
pub struct CdiError {
    /// The file.
    pub path: PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// Why not.
    pub source: io::Error,
}

/// Our file in the CDI directory.
#[derive(Clone, Debug)]
pub struct CdiFile {
    path: PathBuf,
}

impl CdiFile {
    /// The file in this directory.
    pub fn new(directory: &Path) -> Self {
        Self { path: directory.join(FILE_NAME) }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file hold this spec; true if it did not.
    ///
    /// # Errors
    /// If it cannot be written; the old file is then untouched.
    pub fn write(&self, spec: &Spec) -> Result<bool, CdiError> {
        let failed = |action| move |source| CdiError { path: self.path.clone(), action, source };
        let mut text = serde_json::to_vec_pretty(spec).map_err(io::Error::from).map_err(failed("be put into JSON"))?;
        text.push(b'\n');
        if std::fs::read(&self.path).is_ok_and(|present| present == text) {
            return Ok(false);
        }
        if let Some(directory) = self.path.parent() {
            std::fs::create_dir_all(directory).map_err(failed("be given a directory"))?;
        }
        // The temporary name has no suffix that a runtime would read.
        write_durably(&self.path, &text).map_err(failed("be written"))?;
        Ok(true)
    }

    /// Takes the file away; no error if there is none.
    ///
    /// # Errors
    /// If it is there and cannot be removed.
    pub fn remove(&self) -> Result<(), CdiError> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CdiError { path: self.path.clone(), action: "be removed", source: error })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
