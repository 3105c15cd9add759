//! Keeps one resource served and registered (N5). Kubelet forgets its plugins when it restarts, deletes every socket
//! in its directory, and says nothing about either; so what counts is looked at: is our socket still ours, is kubelet's
//! socket the one we registered at, and does kubelet listen to us.

use std::path::{Path, PathBuf};
use std::time::Duration;

use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoff;
use super::register::{KUBELET_SOCKET, register};
use super::serve::{Ending, Served};
use super::sock_watch::{DEFAULT_POLL, Identity, SocketWatch, identity};
use super::{PluginDevice, Resource};

/// Before a socket that was taken from us is served again. Kubelet sweeps its directory when it starts; the pause lets it
/// finish, and keeps two agents on one node, which must not be, from filling the disk with logs.
const REBIND_PAUSE: Duration = Duration::from_millis(200);

/// How long after a registration kubelet may take to open its stream, or to open it again, before it is told anew.
pub const DEFAULT_STREAM_LIMIT: Duration = Duration::from_secs(5);

/// How a resource's registration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PluginState {
    /// There is nothing to offer.
    Idle,
    /// Kubelet does not have it yet.
    Waiting {
        /// Why.
        reason: String,
    },
    /// Kubelet has it.
    Registered,
}

/// One resource's settings.
#[derive(Clone, Debug)]
pub struct PluginSettings {
    /// Kubelet's device-plugin directory.
    pub directory: PathBuf,
    /// What is served.
    pub resource: Resource,
    /// How often sockets are looked at without being told.
    pub poll: Duration,
    /// How long kubelet may be registered without a stream.
    pub stream_limit: Duration,
}

impl PluginSettings {
    /// With the usual times.
    pub fn new(directory: &Path, resource: Resource) -> Self {
        Self { directory: directory.to_owned(), resource, poll: DEFAULT_POLL, stream_limit: DEFAULT_STREAM_LIMIT }
    }
}

/// Serves and registers from the first device on until `stop`; then kubelet gets an empty list. A list that becomes empty
/// later is served as it is: kubelet must know that there is nothing.
pub async fn run(
    settings: PluginSettings,
    mut devices: watch::Receiver<Vec<PluginDevice>>,
    state: watch::Sender<PluginState>,
    stop: CancellationToken,
) {
    tokio::select! {
        () = stop.cancelled() => return,
        some = devices.wait_for(|devices| !devices.is_empty()) => if some.is_err() { return },
    }
    let mut plugin = Plugin { watch: SocketWatch::new(&settings.directory, settings.poll), settings, state };
    let mut backoff = Backoff::new();
    // Goes on for as long as the agent runs; each turn waits for a change or a pause.
    while !stop.is_cancelled() {
        let pause = match Served::bind(&plugin.settings.directory, plugin.settings.resource, devices.clone()) {
            Ok(served) => {
                backoff = Backoff::new();
                plugin.keep(served, &stop).await;
                REBIND_PAUSE
            }
            Err(error) => {
                plugin.waits(error_chain(&error));
                backoff.pause()
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
    plugin.enter(PluginState::Idle);
}

struct Plugin {
    settings: PluginSettings,
    watch: SocketWatch,
    state: watch::Sender<PluginState>,
}

/// A registration that kubelet took.
struct Registration {
    /// Kubelet's socket at that time.
    kubelet: Identity,
    /// Since when kubelet has no stream open; `None` while it has.
    unheard_since: Option<Instant>,
}

impl Plugin {
    /// Keeps a bound server registered until its socket is lost or `stop`.
    async fn keep(&mut self, mut served: Served, stop: &CancellationToken) {
        let mut backoff = Backoff::new();
        let mut registration: Option<Registration> = None;
        let mut retry: Option<Instant> = None;
        loop {
            if stop.is_cancelled() {
                served.end(Ending::Emptied).await;
                return;
            }
            if served.is_finished() || !served.is_at_its_path() {
                self.waits("our socket was taken away".to_owned());
                // Streams end before the next registration: kubelet ties the end of a stream to whoever is registered then.
                served.end(Ending::Replaced).await;
                return;
            }
            let kubelet = identity(&self.settings.directory.join(KUBELET_SOCKET)).ok().flatten();
            registration = registration.and_then(|known| self.still_good(known, kubelet, &served));
            match kubelet {
                None => self.waits(format!("{KUBELET_SOCKET} does not exist")),
                Some(_) if registration.is_some() || retry.is_some_and(|at| at > Instant::now()) => {}
                Some(kubelet) => {
                    let outcome = tokio::select! {
                        () = stop.cancelled() => continue,
                        outcome = register(&self.settings.directory, self.settings.resource) => outcome,
                    };
                    match outcome {
                        Ok(()) => {
                            self.enter(PluginState::Registered);
                            registration = Some(Registration { kubelet, unheard_since: Some(Instant::now()) });
                            backoff = Backoff::new();
                            retry = None;
                        }
                        Err(error) => {
                            self.waits(error_chain(&error));
                            retry = Some(Instant::now() + backoff.pause());
                        }
                    }
                }
            }
            // Without a pause to wait for, the poll behind the watch is the longest wait.
            let unheard = registration.as_ref().and_then(|known| known.unheard_since);
            let until = retry.into_iter().chain(unheard.map(|since| since + self.settings.stream_limit)).min();
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.watch.changed() => {}
                () = served.streams_changed() => {}
                () = until_or_never(until) => retry = retry.filter(|at| *at > Instant::now()),
            }
        }
    }

    /// The registration if it still holds: kubelet's socket is the same, and kubelet listens or may still begin to.
    fn still_good(&self, known: Registration, kubelet: Option<Identity>, served: &Served) -> Option<Registration> {
        let resource = self.settings.resource.name();
        if kubelet != Some(known.kubelet) {
            tracing::info!(resource, "Kubelet restarted");
            return None;
        }
        if served.streams() > 0 {
            return Some(Registration { unheard_since: None, ..known });
        }
        let since = known.unheard_since.unwrap_or_else(Instant::now);
        if since.elapsed() >= self.settings.stream_limit {
            tracing::warn!(resource, "Kubelet does not listen to us; it is told again");
            return None;
        }
        Some(Registration { unheard_since: Some(since), ..known })
    }

    fn waits(&self, reason: String) {
        self.enter(PluginState::Waiting { reason });
    }

    /// Publishes the state; only a change is worth a line in the log.
    fn enter(&self, state: PluginState) {
        let resource = self.settings.resource.name();
        self.state.send_if_modified(|present| {
            if *present == state {
                return false;
            }
            match &state {
                PluginState::Idle => tracing::info!(resource, "No longer served"),
                PluginState::Waiting { reason } => tracing::warn!(resource, %reason, "Not registered with kubelet"),
                PluginState::Registered => tracing::info!(resource, "Registered with kubelet"),
            }
            *present = state;
            true
        });
    }
}

async fn until_or_never(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
