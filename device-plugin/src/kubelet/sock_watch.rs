//! Notices that a socket was deleted or made anew (N5). inotify tells at once; a slow poll behind it makes up for
//! what inotify misses: a directory that was itself replaced, a full queue, no watches left.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::time::{Interval, MissedTickBehavior};

/// How often is looked without being told.
pub const DEFAULT_POLL: Duration = Duration::from_secs(10);

/// Room for events of one read. A reader that is behind reads again.
const BUFFER_BYTES: usize = 4096;

/// Which file a path names. The inode number alone would not do: a file system gives the number of a deleted socket to the
/// next one at once. Touching the file's attributes changes it too, which costs one needless registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    changed_s: i64,
    changed_ns: i64,
}

/// The identity of the file at `path`; `None` if there is none.
///
/// # Errors
/// If it cannot be looked at.
pub fn identity(path: &Path) -> io::Result<Option<Identity>> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(Identity {
            device: found.dev(),
            inode: found.ino(),
            changed_s: found.ctime(),
            changed_ns: found.ctime_nsec(),
        })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Which directory is watched: device and inode.
type Place = (u64, u64);

struct Watched {
    events: EventStream<Vec<u8>>,
    place: Place,
}

/// Watches one directory.
pub struct SocketWatch {
    directory: PathBuf,
    watched: Option<Watched>,
    poll: Interval,
    complained: bool,
}

impl SocketWatch {
    /// Watches `directory`, which need not exist yet.
    pub fn new(directory: &Path, poll: Duration) -> Self {
        let mut poll = tokio::time::interval(poll);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch = Self { directory: directory.to_owned(), watched: None, poll, complained: false };
        watch.attach();
        watch
    }

    /// Returns when something in the directory may have changed, at the latest after one poll. May be dropped and called
    /// again without missing anything.
    pub async fn changed(&mut self) {
        let Some(watched) = &mut self.watched else {
            self.poll.tick().await;
            self.attach();
            return;
        };
        let event = tokio::select! {
            event = watched.events.next() => Some(event),
            _ = self.poll.tick() => None,
        };
        let gone = EventMask::IGNORED | EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT;
        match event {
            Some(Some(Ok(event))) if !event.mask.intersects(gone) => {}
            Some(_) => self.watched = None,
            None => {
                if self.watched.as_ref().map(|watched| watched.place) != place(&self.directory) {
                    self.watched = None;
                }
            }
        }
        self.attach();
    }

    /// Puts the watch on the directory if there is none.
    fn attach(&mut self) {
        if self.watched.is_some() {
            return;
        }
        match watched(&self.directory) {
            Ok(watched) => {
                self.watched = Some(watched);
                self.complained = false;
            }
            Err(error) if !self.complained => {
                self.complained = true;
                let directory = self.directory.display();
                tracing::warn!(%directory, %error, "The directory cannot be watched; it is looked at now and then");
            }
            Err(_) => {}
        }
    }
}

fn watched(directory: &Path) -> io::Result<Watched> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    inotify.watches().add(directory, mask)?;
    // Looked at after the watch is on: if the directory is replaced in between, the next poll sees another place.
    let place = place(directory).ok_or(io::ErrorKind::NotFound)?;
    Ok(Watched { events: inotify.into_event_stream(vec![0; BUFFER_BYTES])?, place })
}

/// Which directory a path names.
fn place(directory: &Path) -> Option<Place> {
    std::fs::metadata(directory).ok().map(|found| (found.dev(), found.ino()))
}
