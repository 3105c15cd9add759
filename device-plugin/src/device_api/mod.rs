//! The device API that a Space's pod sees on its own loopback (N14, docs/rules.md).
//!
//! `spaceport_core::protocol` knows the words; here they go over sockets. [`serve`] runs one pod's listener, [`listen`]
//! makes it inside the pod's network namespace, and [`PodBackend`] is what the calls mean to the lease machinery.

mod connection;
pub mod head;
pub mod listen;
pub mod unread;

use std::io;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use spaceport_core::protocol::{
    AllowRefusal, CallerClass, Denial, QueuingReason, Released, ScheduleQuery, ScheduleResponse, Secret,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::unread::PeerSockets;
use crate::metrics::Metrics;

/// What the device API asks of the lease machinery. One per pod: which pod it is stands in the implementation, never
/// in an argument, because the socket on which a call came in is the identity (N14).
///
/// Each future must answer within [`Limits::answer`]; after that, or when the peer has gone, it is **dropped**. So the
/// work itself belongs to a task of the implementation, and the future only waits for its answer:
/// - dropping `schedule` withdraws the request;
/// - dropping `allow` or `release` takes nothing back.
pub trait PodBackend: Send + Sync + 'static {
    /// A function wants a GPU: answered at once, or queued.
    fn schedule(&self, query: ScheduleQuery) -> impl Future<Output = ScheduleOutcome> + Send;

    /// The worker `pid` (as its container counts, untrusted) is about to touch the device. Ready once that pid can
    /// really open it.
    fn allow(&self, allow_token: Secret, pid: i32) -> impl Future<Output = Result<(), AllowRefusal>> + Send;

    /// The call is over; ready once that is taken note of, not when it is settled.
    fn release(&self, allow_token: Secret, failed: bool) -> impl Future<Output = Released> + Send;

    /// Requests of this pod that wait.
    fn queue_size(&self) -> u32;
}

/// How a request ended: exactly one of both for each.
pub type Verdict = Result<Granted, Denied>;

/// The first answer to a request.
#[derive(Debug)]
pub enum ScheduleOutcome {
    /// Decided at once.
    Answer(Verdict),
    /// Waiting; the verdict follows.
    Queued(Queued),
}

/// A request's place in the queue, held for as long as the client keeps its connection.
#[derive(Debug)]
pub struct Queued {
    /// Chooses the client's toast.
    pub reason: QueuingReason,
    /// Words the client's messages.
    pub caller: CallerClass,
    /// If its sender is dropped without a verdict, the client is told `failed`.
    pub verdict: oneshot::Receiver<Verdict>,
    /// Acts (gives up the place) if the wait ends in any other way than with the verdict. The verdict may be on its
    /// way then: a grant in it acts by its own guard.
    pub place: OnDrop,
}

/// A grant on its way to the client.
#[derive(Debug)]
pub struct Granted {
    /// What the client gets.
    pub response: ScheduleResponse,
    /// Words the client's messages.
    pub caller: CallerClass,
    /// Acts (the lease ends as undelivered, at no charge) unless the grant was written to a peer that was there.
    /// A grant that is dropped anywhere on its way, also inside a channel, acts too.
    pub undelivered: OnDrop,
}

/// A refusal on its way to the client.
#[derive(Clone, Debug)]
pub struct Denied {
    /// Why.
    pub denial: Denial,
    /// Words the client's messages.
    pub caller: CallerClass,
}

/// Something that happens on drop unless it was disarmed. It must not block: it runs wherever a connection ends.
pub struct OnDrop(Option<Box<dyn FnOnce() + Send>>);

/// Bounds of one pod's device API.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time; more wait in the kernel's backlog.
    pub connections: NonZeroUsize,
    /// Of those, how many may be `/schedule` calls. The rest is kept back: a waiting queue must never keep a running
    /// call from its `/release`.
    pub schedules: NonZeroUsize,
    /// How long a request's head may take.
    pub head: Duration,
    /// How long the backend may take for an answer. Below the 60 s after which the client gives up by itself.
    pub answer: Duration,
    /// Longest wait on a queue stream: a backstop, the broker ends waits long before.
    pub queue: Duration,
    /// Time between pings. The client gives up after 60 s without one, and sees only then that its visitor has left.
    pub ping: Duration,
    /// After so many pings in a row of which nothing was read, a caller that waits has left, though its connection is open
    /// (see [`unread`]). This many times [`Self::ping`] is how long its place may stay taken.
    pub unread_pings: NonZeroU32,
    /// How long one write may take. Nothing that is sent here is larger than a socket's buffer.
    pub write: Duration,
    /// How long an answered peer may take to close, so that it reads its answer before the socket is gone.
    pub linger: Duration,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        const CONNECTIONS: NonZeroUsize = NonZeroUsize::new(256).unwrap();
        const SCHEDULES: NonZeroUsize = NonZeroUsize::new(192).unwrap();
        const UNREAD_PINGS: NonZeroU32 = NonZeroU32::new(5).unwrap();
        Self {
            connections: CONNECTIONS,
            schedules: SCHEDULES,
            head: Duration::from_secs(10),
            answer: Duration::from_secs(45),
            queue: Duration::from_secs(2 * 3600),
            ping: Duration::from_secs(5),
            // 30 s at most, as the first may be written just after the caller left. Half of the 60 s after which the
            // client itself gives up a silent stream, and far longer than an app that is alive stands still: one that
            // did (stopped by a debugger, starved of CPU) asks again by itself, once.
            unread_pings: UNREAD_PINGS,
            write: Duration::from_secs(10),
            linger: Duration::from_secs(2),
        }
    }
}

// === impl OnDrop ===

impl OnDrop {
    /// Runs `action` when this is dropped.
    pub fn new(action: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(action)))
    }

    /// Nothing will happen.
    pub fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        if let Some(action) = self.0.take() {
            action();
        }
    }
}

impl std::fmt::Debug for OnDrop {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(if self.0.is_some() { "OnDrop(armed)" } else { "OnDrop(disarmed)" })
    }
}

/// Pause after a failed `accept` (descriptors exhausted, most likely), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves one pod until `stop`. Then nothing more is accepted, calls in flight are answered (each bounded by
/// [`Limits`]), and waiting queue streams are cut: the client asks again, once, by itself. `sockets` are those of the
/// listener's network namespace; without them, a caller that left a copy of its connection behind is not noticed.
pub async fn serve<B: PodBackend>(
    listener: TcpListener,
    sockets: Option<PeerSockets>,
    backend: Arc<B>,
    limits: Limits,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let connections = Arc::new(Semaphore::new(limits.connections.get()));
    let schedules = Semaphore::new(limits.schedules.get());
    let server = Arc::new(Server { backend, schedules, limits, sockets, metrics, stop: stop.clone() });
    // Bounded by the semaphore; owned here, so that no connection outlives its server.
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &connections) => match accepted {
                Ok((stream, permit)) => {
                    let server = Arc::clone(&server);
                    tasks.spawn(async move {
                        connection::run(&server, stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "A connection to the device API could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = tasks.join_next() => report(ended),
        }
    }
    drop(listener);
    while let Some(ended) = tasks.join_next().await {
        report(ended);
    }
}

/// What the connections of one pod share.
struct Server<B> {
    backend: Arc<B>,
    schedules: Semaphore,
    limits: Limits,
    sockets: Option<PeerSockets>,
    metrics: Metrics,
    stop: CancellationToken,
}

/// Takes a place first and a connection second: what there is no place for waits in the backlog, not in here.
async fn accept(listener: &TcpListener, connections: &Arc<Semaphore>) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(connections).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "A connection to the device API ended without an answer");
    }
}

#[cfg(test)]
mod tests;
