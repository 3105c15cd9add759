//! One connection: one request, one answer or one queue stream.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::RecvFlags;
use spaceport_core::protocol::{
    self as wire, AllowRefusal, Answer, CallerClass, Denial, Event, HeadFault, QueueOf, Released, Request,
    ScheduleQuery, chunk, last_chunk, sse_head,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::{MissedTickBehavior, interval_at, timeout};

use super::head::{self, NoRequest};
use super::unread::{PeerSockets, Reading};
use super::{Denied, Granted, Limits, PodBackend, Queued, ScheduleOutcome, Server};

/// Bytes after a head that are thrown away before the peer is taken for broken. Calls have no body.
const SURPLUS_MAX: usize = 64 * 1024;

/// Serves one connection to its end.
pub(super) async fn run<B: PodBackend>(server: &Server<B>, mut stream: TcpStream) {
    // Without it the kernel may hold an event back until the one before it is acknowledged.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "A connection to the device API was gone before it began");
        return;
    }
    let (reader, writer) = stream.split();
    let mut connection = Connection { peer: Peer { reader, surplus: 0 }, writer, limits: &server.limits };
    match connection.serve(server).await {
        Ok(()) => connection.close().await,
        Err(cut @ Cut::Unread { .. }) => {
            server.metrics.left_unseen();
            tracing::info!(%cut, "A caller left the queue without closing its connection; its place is given up");
        }
        Err(error) => tracing::debug!(%error, "A connection to the device API was cut"),
    }
}

struct Connection<'stream> {
    peer: Peer<'stream>,
    writer: WriteHalf<'stream>,
    limits: &'stream Limits,
}

/// The reading side. After the head it has one use: to see the peer leave.
struct Peer<'stream> {
    reader: ReadHalf<'stream>,
    surplus: usize,
}

/// Why a connection ends without the whole answer.
#[derive(Debug, thiserror::Error)]
enum Cut {
    /// The peer closed or the connection broke while it waited.
    #[error("the peer has gone")]
    PeerGone,
    /// The connection is open, and nobody reads it any more.
    #[error("{pings} pings in a row were not read")]
    Unread { pings: NonZeroU32 },
    /// The peer does not read.
    #[error("a write took too long")]
    SlowPeer,
    /// Half an event would be worse than none: the client does not reassemble.
    #[error("{written} of {length} bytes could be written at once")]
    Partial { written: usize, length: usize },
    /// The write failed.
    #[error("the write failed")]
    Write(#[source] io::Error),
    /// The server stops; the client asks again by itself.
    #[error("the server stops")]
    Stopping,
}

impl Connection<'_> {
    async fn serve<B: PodBackend>(&mut self, server: &Server<B>) -> Result<(), Cut> {
        // Not cut by a stop: what has come this far may be the `/release` of a finished result.
        let request = match timeout(self.limits.head, head::read(&mut self.peer.reader)).await {
            Ok(Ok(request)) => request,
            Ok(Err(NoRequest::Gone)) => return Err(Cut::PeerGone),
            Ok(Err(NoRequest::Fault(fault))) => return self.answer(&wire::malformed_head(fault)).await,
            Ok(Err(NoRequest::Bad(bad))) => {
                tracing::debug!(error = %bad, "A call of the device API is malformed");
                return self.answer(&wire::refuse(&bad)).await;
            }
            Err(_) => return self.answer(&wire::malformed_head(HeadFault::TooSlow)).await,
        };
        let answer = match request {
            Request::Schedule(query) => return self.schedule(server, query).await,
            Request::Allow { allow_token, pid } => {
                match timeout(self.limits.answer, server.backend.allow(allow_token, pid)).await {
                    Ok(Ok(())) => wire::allowed(),
                    Ok(Err(refusal)) => wire::not_allowed(refusal),
                    Err(_) => wire::not_allowed(AllowRefusal::DeviceUnavailable),
                }
            }
            Request::Release { allow_token, failed } => {
                let released = timeout(self.limits.answer, server.backend.release(allow_token, failed)).await;
                // The report is with the backend, which ends the lease; a result that is finished must not suffer.
                wire::released(released.unwrap_or(Released::Ended))
            }
            Request::StartupReport => wire::startup_reported(),
            Request::QueueSize => wire::queue_size(server.backend.queue_size()),
        };
        self.answer(&answer).await
    }

    async fn schedule<B: PodBackend>(&mut self, server: &Server<B>, query: ScheduleQuery) -> Result<(), Cut> {
        let Ok(_place) = server.schedules.try_acquire() else {
            let bound = u64::try_from(self.limits.schedules.get()).unwrap_or(u64::MAX);
            let full = Denial::QueueFull { bound, of: QueueOf::Pod };
            return self.answer(&wire::wire(&full, CallerClass::Guest)).await;
        };
        // In this order: for a peer that has gone nothing is worth granting.
        let outcome = tokio::select! {
            biased;
            cut = self.peer.gone() => return Err(cut),
            () = server.stop.cancelled() => None,
            outcome = timeout(self.limits.answer, server.backend.schedule(query)) => outcome.ok(),
        };
        match outcome {
            // Nothing was granted: the future was dropped, which withdraws the request.
            None => self.answer(&wire::wire(&Denial::BrokerUnavailable, CallerClass::Guest)).await,
            Some(ScheduleOutcome::Answer(Err(Denied { denial, caller }))) => {
                self.answer(&wire::wire(&denial, caller)).await
            }
            Some(ScheduleOutcome::Answer(Ok(granted))) => {
                let bytes = wire::scheduled(&granted.response, granted.caller).encode();
                self.deliver(granted, &bytes).await
            }
            Some(ScheduleOutcome::Queued(queued)) => self.queue(server, queued).await,
        }
    }

    /// Keeps the stream alive until the verdict; leaving in any other way gives up the place.
    async fn queue<B: PodBackend>(&mut self, server: &Server<B>, queued: Queued) -> Result<(), Cut> {
        let Queued { reason, caller, mut verdict, place } = queued;
        let (head, event) = (sse_head(reason, caller), chunk(Event::Ping));
        let (mut written, mut reading) = (head.len() as u64, Reading::default());
        self.write(&head).await?;
        let (ping, deadline) = (self.limits.ping, tokio::time::sleep(self.limits.queue));
        tokio::pin!(deadline);
        let mut pings = interval_at(tokio::time::Instant::now() + ping, ping);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Bounded by the deadline.
        let verdict = loop {
            tokio::select! {
                biased;
                cut = self.peer.gone() => return Err(cut),
                // Before the stop: a verdict that is here is delivered.
                verdict = &mut verdict => {
                    place.disarm();
                    break verdict.ok();
                }
                () = server.stop.cancelled() => return Err(Cut::Stopping),
                () = &mut deadline => break None,
                _ = pings.tick() => {
                    // Before the next one: a client that is there has read all of them by now.
                    self.still_read(server.sockets.as_ref(), written, &mut reading)?;
                    self.write(&event).await?;
                    written += event.len() as u64;
                }
            }
        };
        match verdict {
            Some(Ok(granted)) => {
                let bytes = chunk(Event::Succeeded(&granted.response));
                self.deliver(granted, &bytes).await?;
            }
            // After the head there is no word for the reason; it stands on the lease (L18).
            Some(Err(_)) | None => self.write(&chunk(Event::Failed)).await?,
        }
        // The client closes after the verdict and may be gone already: then nobody misses the end.
        let _ended = self.write(last_chunk()).await;
        Ok(())
    }

    /// Fails when the peer has stopped reading. Where the kernel does not tell, the stream's end and its longest wait
    /// have to do.
    fn still_read(&self, sockets: Option<&PeerSockets>, written: u64, reading: &mut Reading) -> Result<(), Cut> {
        let pings = self.limits.unread_pings;
        let stream: &TcpStream = self.writer.as_ref();
        let look = |sockets: &PeerSockets| sockets.unread(stream.peer_addr()?, stream.local_addr()?);
        match sockets.map(look) {
            Some(Ok(Some(unread))) if reading.has_stopped(written, unread, pings) => Err(Cut::Unread { pings }),
            Some(Err(error)) => {
                tracing::debug!(%error, "What a waiting caller has not read is not known");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Writes a grant. It counts as delivered when the peer was there and the kernel took all of it; what the client
    /// makes of it shows in `/allow`.
    async fn deliver(&mut self, granted: Granted, bytes: &[u8]) -> Result<(), Cut> {
        if self.peer.has_closed() {
            return Err(Cut::PeerGone);
        }
        self.write(bytes).await?;
        granted.undelivered.disarm();
        Ok(())
    }

    async fn answer(&mut self, answer: &Answer) -> Result<(), Cut> {
        self.write(&answer.encode()).await
    }

    /// One buffer, one `write`, all or nothing.
    async fn write(&mut self, bytes: &[u8]) -> Result<(), Cut> {
        match timeout(self.limits.write, self.writer.write(bytes)).await {
            Ok(Ok(written)) if written == bytes.len() => Ok(()),
            Ok(Ok(written)) => Err(Cut::Partial { written, length: bytes.len() }),
            Ok(Err(error)) => Err(Cut::Write(error)),
            Err(_) => Err(Cut::SlowPeer),
        }
    }

    /// Ends the connection after its answer. Closing a socket with unread bytes resets it, and a reset can overtake the
    /// answer; so the peer goes first, within bounds.
    async fn close(mut self) {
        if self.writer.shutdown().await.is_ok() {
            // Whether it closed or the time is over, the socket is closed now.
            let _closed = timeout(self.limits.linger, self.peer.gone()).await;
        }
    }
}

impl Peer<'_> {
    /// Ready when the peer has closed its side, broken the connection, or sent more than it may. May be dropped and
    /// called again.
    async fn gone(&mut self) -> Cut {
        let mut bytes = [0; 1024];
        // Bounded by SURPLUS_MAX.
        loop {
            match self.reader.read(&mut bytes).await {
                Ok(0) | Err(_) => return Cut::PeerGone,
                Ok(read) => self.surplus += read,
            }
            if self.surplus > SURPLUS_MAX {
                return Cut::PeerGone;
            }
        }
    }

    /// Asks the kernel directly: the runtime may not have heard yet of a close that has arrived.
    fn has_closed(&self) -> bool {
        let stream: &TcpStream = self.reader.as_ref();
        has_closed(stream.as_fd())
    }
}

fn has_closed(socket: BorrowedFd<'_>) -> bool {
    let mut byte = [0];
    match rustix::net::recv(socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, length)) => length == 0,
        Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::INTR,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_close_is_seen_without_the_runtime() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert!(!has_closed(server.as_fd()));
        drop(client);
        // Returns once the close has arrived.
        assert_eq!(server.peek(&mut [0]).unwrap(), 0);
        assert!(has_closed(server.as_fd()));
    }
}
