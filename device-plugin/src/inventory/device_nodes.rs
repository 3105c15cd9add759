//! The driver's character devices as they are on the host: what is there, with the numbers the kernel gave them. The major
//! of nvidia-uvm is dynamic, so nothing is assumed about numbers (N7, N8).

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use crate::gate::Device;

/// Devices that every process with a GPU opens, whichever card it uses.
const SHARED: [&str; 3] = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"];

/// One device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// File name in `/dev`.
    pub name: String,
    /// Its numbers.
    pub device: Device,
}

/// The host's `/dev`.
#[derive(Clone, Debug)]
pub struct DeviceNodes {
    directory: PathBuf,
}

impl DeviceNodes {
    /// `directory` is where this process sees the host's `/dev`.
    pub const fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Those that all cards share.
    ///
    /// # Errors
    /// If a node is there and cannot be looked at.
    pub fn shared(&self) -> io::Result<Vec<DeviceNode>> {
        SHARED.into_iter().filter_map(|name| self.look(name.to_owned()).transpose()).collect()
    }

    /// The card's own; `None` if the host has none.
    ///
    /// # Errors
    /// If it is there and cannot be looked at.
    pub fn card(&self, minor: u32) -> io::Result<Option<DeviceNode>> {
        self.look(format!("nvidia{minor}"))
    }

    fn look(&self, name: String) -> io::Result<Option<DeviceNode>> {
        match std::fs::metadata(self.directory.join(&name)) {
            Ok(found) if found.file_type().is_char_device() => {
                let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
                Ok(Some(DeviceNode { name, device: Device { major, minor } }))
            }
            // A plain file of that name, as a failed mount leaves it, is no device.
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_there_is_listed() {
        let nodes = DeviceNodes::new("/nonexistent".into());
        assert_eq!(nodes.shared().unwrap(), []);
        assert_eq!(nodes.card(0).unwrap(), None);
        // A character device that every machine has, by way of the same look.
        let null = DeviceNodes::new("/dev".into()).look("null".to_owned()).unwrap().unwrap();
        assert_eq!(null.device, Device { major: 1, minor: 3 });
        assert_eq!(DeviceNodes::new("/etc".into()).look("passwd".to_owned()).unwrap(), None);
    }
}
