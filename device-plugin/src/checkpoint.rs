//! The checkpoint: what this node has begun and not yet reported for good (N19, L10).
//!
//! It is two files, because two kinds of end ask for different things. An agent that dies leaves its workers running, so
//! the next one needs what was written *before* hardware was touched; a file that was replaced as a whole is there for it
//! without any fsync. A node that dies leaves nothing running; all it must still know are the leases that ended and are
//! not acknowledged. That needs an fsync, which takes milliseconds on a busy disk and must not hold up a grant. So
//! [`Checkpoint::write`] replaces `checkpoint.json` before and after each touch of hardware, and a thread of its own
//! ([`Syncer`]) follows with `checkpoint-synced.json`, at most once in [`SYNC_PAUSE`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::converge::Snapshot;
use crate::epoch::write_durably;

/// Raised with every change of [`Snapshot`] that an older agent would misread.
const VERSION: u32 = 2;

/// Between two syncs. What ended within it before a power failure is voided by the broker, as a lease this node does not
/// know.
const SYNC_PAUSE: Duration = Duration::from_millis(50);

/// Larger than any real one (a lease is about 2 KiB): something else lies there.
const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The first line of a file. The snapshot is the second, as JSON: so it is made once, and its checksum is that of the bytes
/// which are written. A node with many leases writes tens of kilobytes several times a grant.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    version: u32,
    #[serde(rename = "bootID")]
    boot_id: String,
    /// SHA-256 of the second line without its end, hexadecimal.
    checksum: String,
}

/// Why a checkpoint cannot be used. Everything that runs is then stopped.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It cannot be read or written.
    #[error("cannot {operation} the checkpoint {path}")]
    File {
        /// Read or write.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not what an agent wrote.
    #[error("the checkpoint {path} is corrupt: {what}")]
    Corrupt {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// What was found at start.
#[derive(Debug)]
pub enum Found {
    /// No file: a new node, or one whose state was removed.
    Nothing,
    /// Written in this boot: workers may live.
    SameBoot(Snapshot),
    /// Written before a reboot: nothing of it runs.
    OtherBoot(Snapshot),
}

/// The two files.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    synced: PathBuf,
    boot_id: String,
}

impl Checkpoint {
    /// `checkpoint.json` and `checkpoint-synced.json` in the agent's state directory. `boot_id` is the kernel's.
    pub fn new(state_directory: &Path, boot_id: String) -> Self {
        Self {
            path: state_directory.join("checkpoint.json"),
            synced: state_directory.join("checkpoint-synced.json"),
            boot_id,
        }
    }

    /// Reads what an earlier agent left.
    ///
    /// # Errors
    /// If it cannot be read, or its checksum, version or content is wrong.
    pub fn read(&self) -> Result<Found, CheckpointError> {
        match self.read_file(&self.path) {
            Ok(Found::Nothing) => {}
            Err(error) => {
                // The power may have failed before it reached the disk. Within one boot the older file would be a lie.
                return match self.read_file(&self.synced) {
                    Ok(Found::OtherBoot(snapshot)) => Ok(Found::OtherBoot(snapshot)),
                    _ => Err(error),
                };
            }
            found => return found,
        }
        match self.read_file(&self.synced)? {
            Found::SameBoot(_) => {
                Err(CheckpointError::Corrupt { path: self.path.clone(), what: "it was removed".to_owned() })
            }
            found => Ok(found),
        }
    }

    fn read_file(&self, path: &Path) -> Result<Found, CheckpointError> {
        let failed = |source| CheckpointError::File { operation: "read", path: path.to_owned(), source };
        let corrupt = |what: String| CheckpointError::Corrupt { path: path.to_owned(), what };
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(failed(error)),
            Ok(found) if found.len() > BYTES_MAX => return Err(corrupt(format!("{} bytes", found.len()))),
            Ok(_) => {}
        }
        self.parse(&fs::read(path).map_err(failed)?).map_err(corrupt)
    }

    /// What the text of a file says. Pure.
    ///
    /// # Errors
    /// Why no agent of this version can have written it; then nothing of it may be believed.
    pub fn parse(&self, text: &[u8]) -> Result<Found, String> {
        let end_of_head = text.iter().position(|byte| *byte == b'\n').unwrap_or(text.len());
        let (head, content) = text.split_at(end_of_head);
        let head: Head = serde_json::from_slice(head).map_err(|error| error.to_string())?;
        if head.version != VERSION {
            return Err(format!("version {} instead of {VERSION}", head.version));
        }
        let content = content.trim_ascii();
        let checksum = checksum(content);
        if checksum != head.checksum {
            return Err(format!("checksum {checksum} instead of {}", head.checksum));
        }
        let snapshot: Snapshot = serde_json::from_slice(content).map_err(|error| error.to_string())?;
        snapshot.sound().map_err(|problem| problem.to_string())?;
        let same = head.boot_id == self.boot_id;
        Ok(if same { Found::SameBoot(snapshot) } else { Found::OtherBoot(snapshot) })
    }

    /// Replaces the file as a whole: whoever reads it in this boot finds this or what was there before.
    ///
    /// # Errors
    /// If it cannot be written; the one before is then untouched.
    pub fn write(&self, snapshot: &Snapshot) -> Result<(), CheckpointError> {
        let failed = |source| CheckpointError::File { operation: "write", path: self.path.clone(), source };
        let temporary = self.path.with_extension("new");
        fs::write(&temporary, self.text(snapshot).map_err(failed)?)
            .and_then(|()| fs::rename(&temporary, &self.path))
            .map_err(failed)
    }

    /// Writes the other file; it is on the disk when this returns.
    ///
    /// # Errors
    /// If it cannot be written; the one before is then untouched.
    pub fn sync(&self, snapshot: &Snapshot) -> Result<(), CheckpointError> {
        let failed = |source| CheckpointError::File { operation: "sync", path: self.synced.clone(), source };
        let text = self.text(snapshot).map_err(failed)?;
        write_durably(&self.synced, &text).map_err(failed)
    }

    /// The text of a file. Pure.
    ///
    /// # Errors
    /// The snapshot cannot be written as JSON; none of its values causes that.
    pub fn text(&self, snapshot: &Snapshot) -> io::Result<Vec<u8>> {
        Ok(self.sealed(serde_json::to_vec(snapshot)?)?)
    }

    /// A file around a snapshot that is JSON already: one line of it, for compact JSON has no line ends of its own.
    ///
    /// # Errors
    /// As of [`Checkpoint::text`].
    pub fn sealed(&self, content: Vec<u8>) -> serde_json::Result<Vec<u8>> {
        let head = Head { version: VERSION, boot_id: self.boot_id.clone(), checksum: checksum(&content) };
        let mut text = serde_json::to_vec(&head)?;
        text.push(b'\n');
        text.extend(content);
        text.push(b'\n');
        Ok(text)
    }
}

/// The thread that follows the checkpoint to the disk. Ends, with everything on the disk, when it is dropped.
#[derive(Debug)]
pub struct Syncer {
    /// Drained as a whole in each round, so it holds what happened within one.
    snapshots: Option<mpsc::Sender<Snapshot>>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    /// Starts it; `failed` is told of each failure.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start(checkpoint: Checkpoint, failed: impl Fn(&CheckpointError) + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel::<Snapshot>();
        let thread = std::thread::Builder::new().name("checkpoint-sync".to_owned()).spawn(move || {
            // Until the sender is dropped; each round takes at least SYNC_PAUSE.
            while let Ok(mut newest) = receiver.recv() {
                std::thread::sleep(SYNC_PAUSE);
                while let Ok(newer) = receiver.try_recv() {
                    newest = newer;
                }
                if let Err(error) = checkpoint.sync(&newest) {
                    failed(&error);
                }
            }
        })?;
        Ok(Self { snapshots: Some(sender), thread: Some(thread) })
    }

    /// Hands over the newest state.
    pub fn follow(&self, snapshot: Snapshot) {
        if let Some(snapshots) = &self.snapshots
            && snapshots.send(snapshot).is_err()
        {
            tracing::error!("The thread that syncs the checkpoint has ended");
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.snapshots = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("The thread that syncs the checkpoint panicked");
        }
    }
}

fn checksum(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::converge::Book;
    use crate::slots::{Place, Slot};

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("spaceport-checkpoint-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn snapshot() -> Snapshot {
        let slot = Slot { card: 3, place: Place::Part(1) };
        let book = Book { quarantined: BTreeMap::from([(slot, "01abc".to_owned())]), ..Book::default() };
        Snapshot { leases: Vec::new(), book }
    }

    #[test]
    fn what_was_written_is_read_and_another_boot_is_told_apart() {
        let directory = Directory::new("boots");
        let checkpoint = Checkpoint::new(&directory.0, "boot-1".to_owned());
        assert!(matches!(checkpoint.read().unwrap(), Found::Nothing));
        checkpoint.write(&snapshot()).unwrap();
        assert!(matches!(checkpoint.read().unwrap(), Found::SameBoot(found) if found == snapshot()));
        let later = Checkpoint::new(&directory.0, "boot-2".to_owned());
        assert!(matches!(later.read().unwrap(), Found::OtherBoot(found) if found == snapshot()));
    }

    #[test]
    fn a_changed_torn_or_foreign_file_is_corrupt_and_never_half_believed() {
        let directory = Directory::new("corrupt");
        let checkpoint = Checkpoint::new(&directory.0, "boot-1".to_owned());
        checkpoint.write(&snapshot()).unwrap();
        let good = fs::read_to_string(&checkpoint.path).unwrap();
        let bad = [
            good.replace("01abc", "01abd"),
            good[..good.len() / 2].to_owned(),
            good.replace("\"version\":2", "\"version\":1"),
            good.lines().next().unwrap_or_default().to_owned(),
            String::new(),
        ];
        for text in bad {
            fs::write(&checkpoint.path, &text).unwrap();
            assert!(matches!(checkpoint.read(), Err(CheckpointError::Corrupt { .. })), "{text}");
        }
    }

    #[test]
    fn the_synced_file_serves_after_a_power_failure_and_never_within_one_boot() {
        let directory = Directory::new("synced");
        let checkpoint = Checkpoint::new(&directory.0, "boot-1".to_owned());
        let syncer = Syncer::start(checkpoint.clone(), |error| panic!("{error}")).unwrap();
        syncer.follow(Snapshot::default());
        syncer.follow(snapshot());
        drop(syncer);
        let later = Checkpoint::new(&directory.0, "boot-2".to_owned());
        assert!(matches!(later.read().unwrap(), Found::OtherBoot(found) if found == snapshot()));
        fs::write(&checkpoint.path, "").unwrap();
        assert!(matches!(later.read().unwrap(), Found::OtherBoot(found) if found == snapshot()));
        assert!(checkpoint.read().is_err(), "it may be older than what runs");
        fs::remove_file(&checkpoint.path).unwrap();
        assert!(checkpoint.read().is_err());
    }
}
