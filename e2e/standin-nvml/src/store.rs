//! Reading and writing the state file.
//!
//! Writers replace the file in one rename, so a reader never sees half of it, and change it only under a lock on a
//! file beside it, so two of them do not lose each other's changes.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use crate::State;

/// Where the state file is if [`STATE_PATH_VARIABLE`] does not say so.
pub const DEFAULT_STATE_PATH: &str = "/run/spaceport-standin/state.json";
/// The environment variable that names the state file.
pub const STATE_PATH_VARIABLE: &str = "SPACEPORT_STANDIN_NVML_STATE";

/// A writer holds the lock for one read and one rename, some milliseconds; five seconds is a writer in a debugger.
const LOCK_TRIES_MAX: u32 = 500;
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Why the state file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file is not the JSON of a [`State`].
    #[error("{path} is not a state file")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The file's cards contradict each other.
    #[error("{path} is no possible machine: {fault}")]
    Fault {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        fault: String,
    },
    /// Another writer held the lock for five seconds.
    #[error("another writer holds the lock on {path}")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
}

impl StoreError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}

impl State {
    /// Reads the state file; where there is none, the default, one H200.
    ///
    /// # Errors
    /// When the file cannot be read, is not JSON of this type, or contradicts itself.
    pub fn load(path: &Path) -> Result<Self, StoreError> {
        match fs::read(path) {
            Ok(bytes) => Self::parse(path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(StoreError::io("read", path)(error)),
        }
    }

    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, StoreError> {
        let state: Self =
            serde_json::from_slice(bytes).map_err(|source| StoreError::Syntax { path: path.to_owned(), source })?;
        match state.fault() {
            None => Ok(state),
            Some(fault) => Err(StoreError::Fault { path: path.to_owned(), fault }),
        }
    }

    /// Puts this state in the place of the file, whatever it held, in one rename.
    ///
    /// # Errors
    /// When the directory or the file cannot be written, or another writer holds the lock.
    pub fn save(&self, path: &Path) -> Result<(), StoreError> {
        let _lock = lock(path)?;
        self.replace(path)
    }

    /// Reads the file, lets `change` change it and writes it back, with no other writer in between.
    ///
    /// # Errors
    /// As [`State::load`] and [`State::save`].
    pub fn update<T>(path: &Path, change: impl FnOnce(&mut Self) -> T) -> Result<T, StoreError> {
        let _lock = lock(path)?;
        let mut state = Self::load(path)?;
        let answer = change(&mut state);
        state.replace(path)?;
        Ok(answer)
    }

    /// The caller holds the lock.
    fn replace(&self, path: &Path) -> Result<(), StoreError> {
        if let Some(fault) = self.fault() {
            return Err(StoreError::Fault { path: path.to_owned(), fault });
        }
        let json =
            serde_json::to_vec_pretty(self).map_err(|source| StoreError::Syntax { path: path.to_owned(), source })?;
        replace_file(path, &json).map_err(StoreError::io("write", path))
    }
}

/// Puts `bytes` in the place of `path` in one rename, by way of a hidden file beside it.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let next = beside(path, "next");
    fs::write(&next, bytes)?;
    fs::rename(&next, path)
}

/// The lock is let go when the file is dropped, or by the kernel when its holder dies.
fn lock(path: &Path) -> Result<File, StoreError> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(StoreError::io("create", directory))?;
    }
    let lock_path = beside(path, "lock");
    let file = File::create(&lock_path).map_err(StoreError::io("create", &lock_path))?;
    for _ in 0..LOCK_TRIES_MAX {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
            Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", &lock_path)(error)),
        }
    }
    Err(StoreError::Locked { path: lock_path })
}

/// `.state.json.lock` for `state.json`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{suffix}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_do_not_lose_each_others_changes() {
        let directory = std::env::temp_dir().join(format!("standin-nvml-store-{}", std::process::id()));
        let path = directory.join("state.json");
        State::h200(1).save(&path).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10).for_each(|_| State::update(&path, |s| s.cards[0].push_xid(31)).unwrap()));
            }
        });
        assert_eq!(State::load(&path).unwrap().cards[0].events.len(), 40);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_missing_file_is_the_default() {
        assert_eq!(State::load(Path::new("/nonexistent/state.json")).unwrap(), State::h200(1));
    }
}
