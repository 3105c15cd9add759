//! The fence: the highest epoch this node has accepted, in a file of its own that survives reboots (L6), and the
//! test that every order passes (invariant 7, L8).

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Why an order is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stale {
    /// From an earlier term.
    #[error("epoch {order} is below {highest}, the highest this node has seen")]
    Epoch {
        /// Of the order.
        order: u64,
        /// Of the node.
        highest: u64,
    },
    /// It stalled on the way.
    #[error("the order is {age_ms} ms old, more than {ttl_ms} ms")]
    Age {
        /// Milliseconds since the stamp it echoes.
        age_ms: u64,
        /// `order_ttl`.
        ttl_ms: u64,
    },
    /// It echoes a stamp that this boot has not reached: from before a reboot.
    #[error("the order echoes a stamp {ahead_ms} ms ahead of this boot's clock")]
    OtherBoot {
        /// Milliseconds.
        ahead_ms: u64,
    },
}

/// Takes or refuses an order. `stamp_ms` is the node's own BOOTTIME as the order echoes it.
///
/// # Errors
/// Why it is refused.
pub fn admit(highest: u64, order: u64, now_ms: u64, stamp_ms: u64, ttl_ms: u64) -> Result<(), Stale> {
    if order < highest {
        return Err(Stale::Epoch { order, highest });
    }
    if stamp_ms > now_ms {
        return Err(Stale::OtherBoot { ahead_ms: stamp_ms - now_ms });
    }
    let age_ms = now_ms - stamp_ms;
    if age_ms > ttl_ms { Err(Stale::Age { age_ms, ttl_ms }) } else { Ok(()) }
}

/// The file.
#[derive(Clone, Debug)]
pub struct EpochFile {
    path: PathBuf,
}

impl EpochFile {
    /// `epoch` in the agent's state directory.
    pub fn new(state_directory: &Path) -> Self {
        Self { path: state_directory.join("epoch") }
    }

    /// The recorded epoch; `None` if there is no file or it holds no number: then the term page must be read before any
    /// order is taken.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub fn read(&self) -> io::Result<Option<u64>> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(text.trim().parse().ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Records an epoch; it is on the disk when this returns.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, epoch: u64) -> io::Result<()> {
        write_durably(&self.path, format!("{epoch}\n").as_bytes())
    }
}

/// Replaces a file as a whole, on the disk when this returns: a crash leaves the old or the new text.
///
/// # Errors
/// If a step fails; the old file is then untouched.
pub fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    // The new name is durable once its directory is.
    match path.parent() {
        Some(directory) => fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_of_an_earlier_term_are_refused_and_of_a_later_one_taken() {
        assert_eq!(admit(5, 4, 100, 100, 5_000), Err(Stale::Epoch { order: 4, highest: 5 }));
        assert_eq!(admit(5, 5, 100, 100, 5_000), Ok(()));
        assert_eq!(admit(5, 6, 100, 100, 5_000), Ok(()));
    }

    #[test]
    fn an_order_is_taken_up_to_its_limit_and_not_a_millisecond_later() {
        assert_eq!(admit(1, 1, 6_000, 1_000, 5_000), Ok(()));
        assert_eq!(admit(1, 1, 6_001, 1_000, 5_000), Err(Stale::Age { age_ms: 5_001, ttl_ms: 5_000 }));
    }

    #[test]
    fn a_stamp_from_before_a_reboot_is_refused() {
        assert_eq!(admit(1, 1, 10, 9_000, 5_000), Err(Stale::OtherBoot { ahead_ms: 8_990 }));
    }

    #[test]
    fn the_epoch_survives_and_a_torn_file_reads_as_none() {
        let directory = std::env::temp_dir().join(format!("spaceport-epoch-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = EpochFile::new(&directory);
        assert_eq!(file.read().unwrap(), None);
        file.write(41).unwrap();
        file.write(42).unwrap();
        assert_eq!(file.read().unwrap(), Some(42));
        fs::write(directory.join("epoch"), "4\u{0}x").unwrap();
        assert_eq!(file.read().unwrap(), None);
        fs::remove_dir_all(&directory).unwrap();
    }
}
