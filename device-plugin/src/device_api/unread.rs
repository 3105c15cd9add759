//! Sees that the peer of a queue stream has stopped reading (device API A4).
//!
//! A client leaves by closing its socket. But a worker that was forked while its call waited holds a copy of that socket's
//! descriptor, which nobody reads: the connection stays open and the place in the queue stays taken until that worker
//! ends. What shows is that the events pile up unread. The kernel acknowledges them all the same, so our own socket does
//! not know; the peer's socket does. It can be asked because both ends are in the pod's network namespace (N14).

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

// Names and layout: linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// Where `inet_diag_msg.idiag_rqueue` ends, from the start of the message.
const RECEIVE_QUEUE_END: usize = HEADER_BYTES + 60;
/// A reply has 72 bytes and a few short attributes.
const REPLY_BYTES: usize = 1024;
/// Answers taken at most for one question. It has one; an older one would be left by a question that failed half-way.
const REPLIES_MAX: u32 = 4;

/// The TCP sockets of one network namespace, for questions about one of them at a time. A question costs the kernel one
/// look into a hash table, however many sockets the pod has, and is answered before the call returns.
#[derive(Debug)]
pub struct PeerSockets {
    /// A std mutex: never held across an await. One question at a time, so that each gets its own answer.
    netlink: Mutex<OwnedFd>,
}

impl PeerSockets {
    /// Of the network namespace that this thread is in, wherever it is asked from later.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
        Ok(Self { netlink: Mutex::new(socket) })
    }

    /// Bytes that have arrived at the end `of` a connection, from the end `to`, and were not read there. `None` if there is
    /// no such end in this namespace (any more).
    ///
    /// # Errors
    /// If the kernel does not tell, for example because it was built without `CONFIG_INET_DIAG`.
    pub fn unread(&self, of: SocketAddr, to: SocketAddr) -> io::Result<Option<u32>> {
        let (SocketAddr::V4(of), SocketAddr::V4(to)) = (of, to) else {
            return Ok(None); // The device API is on IPv4 only.
        };
        let netlink = self.netlink.lock().unwrap_or_else(PoisonError::into_inner);
        // Ports tell two questions apart; the kernel returns the number with the answer.
        let sequence = u32::from(of.port());
        rustix::net::send(&*netlink, &question(of, to, sequence), SendFlags::empty())?;
        let mut bytes = [0; REPLY_BYTES];
        for _ in 0..REPLIES_MAX {
            let (_, length) = rustix::net::recv(&*netlink, &mut bytes, RecvFlags::DONTWAIT)?;
            match answer(&bytes[..length.min(REPLY_BYTES)], sequence) {
                Answer::Unread(bytes) => return Ok(Some(bytes)),
                Answer::NoSuchSocket => return Ok(None),
                Answer::Refused(error) => return Err(error.into()),
                Answer::Other => {}
            }
        }
        Err(io::Error::other("the kernel answered another question"))
    }
}

/// Asks for one socket by its two addresses, its own first.
fn question(of: SocketAddrV4, to: SocketAddrV4, sequence: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let mut at = 0;
    let mut put = |field: &[u8]| {
        bytes[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    };
    let rest_of_address = [0; 12];
    // nlmsghdr
    put(&(REQUEST_BYTES as u32).to_ne_bytes());
    put(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(&NLM_F_REQUEST.to_ne_bytes());
    put(&sequence.to_ne_bytes());
    put(&0_u32.to_ne_bytes());
    // inet_diag_req_v2: family, protocol, no extensions, padding, any state
    put(&[libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    put(&u32::MAX.to_ne_bytes());
    // inet_diag_sockid: ports and addresses as on the wire, any interface, no cookie
    put(&of.port().to_be_bytes());
    put(&to.port().to_be_bytes());
    put(&of.ip().octets());
    put(&rest_of_address);
    put(&to.ip().octets());
    put(&rest_of_address);
    put(&0_u32.to_ne_bytes());
    put(&u64::MAX.to_ne_bytes());
    bytes
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Unread(u32),
    NoSuchSocket,
    Refused(rustix::io::Errno),
    /// To another question, or none that we understand.
    Other,
}

fn answer(bytes: &[u8], sequence: u32) -> Answer {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes);
    let kind = bytes.get(4..6).and_then(|half| half.try_into().ok()).map(u16::from_ne_bytes);
    if word(8) != Some(sequence) {
        return Answer::Other;
    }
    if kind == Some(libc::NLMSG_ERROR as u16) {
        // A negated error number.
        let error = word(HEADER_BYTES).map(u32::cast_signed).and_then(i32::checked_neg);
        return match error.map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::NOENT) => Answer::NoSuchSocket,
            Some(error) => Answer::Refused(error),
            None => Answer::Other,
        };
    }
    match (kind, word(RECEIVE_QUEUE_END - 4)) {
        (Some(SOCK_DIAG_BY_FAMILY), Some(unread)) => Answer::Unread(unread),
        _ => Answer::Other,
    }
}

/// Whether somebody reads a stream, from looks at what lies unread at its other end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    consumed: u64,
    still: u32,
}

impl Reading {
    /// One look: of `written` bytes so far, `unread` have not been read. True when this is the `limit`th look in a row at
    /// which something lay unread and nothing had been read since the look before. One byte read in between is progress:
    /// a client that is only slow is never taken for one that has left.
    pub(super) fn has_stopped(&mut self, written: u64, unread: u32, limit: NonZeroU32) -> bool {
        let consumed = written.saturating_sub(u64::from(unread));
        let progress = unread == 0 || consumed > self.consumed;
        self.consumed = consumed;
        self.still = if progress { 0 } else { self.still.saturating_add(1) };
        self.still >= limit.get()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const THREE: NonZeroU32 = NonZeroU32::new(3).unwrap();
    const PING: u64 = 20;

    /// At which of these looks the stream counts as left; a look tells the events left unread, one is written after each.
    fn stops_at(unread: &[u32]) -> Option<usize> {
        let mut reading = Reading::default();
        let mut written = 100;
        unread.iter().position(|events| {
            let stopped = reading.has_stopped(written, events * PING as u32, THREE);
            written += PING;
            stopped
        })
    }

    #[test]
    fn a_stream_is_left_when_nothing_is_read_between_three_looks() {
        assert_eq!(stops_at(&[0, 0, 0, 0, 0, 0]), None, "read as it comes");
        assert_eq!(stops_at(&[0, 0, 1, 2, 3, 4]), Some(4));
        assert_eq!(stops_at(&[4, 5, 6, 7]), Some(3), "what was read before the first look counts as read");
        assert_eq!(stops_at(&[5, 6, 7, 8]), Some(2), "not even the head was read");
    }

    #[test]
    fn a_slow_reader_is_not_taken_for_one_that_has_left() {
        assert_eq!(stops_at(&[0, 1, 2, 2, 3, 4, 4, 5, 6, 6]), None, "one event of three");
        assert_eq!(stops_at(&[0, 1, 2, 0, 1, 2, 0]), None, "all at once, now and then");
        assert_eq!(stops_at(&[0, 1, 2, 2, 3, 4, 5]), Some(6), "until it stops");
    }

    #[test]
    fn only_the_answer_to_the_question_counts() {
        let message = |kind: u16, sequence: u32, body: &[u8]| {
            let mut bytes = Vec::new();
            bytes.extend((HEADER_BYTES as u32 + body.len() as u32).to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 2]);
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(body);
            bytes
        };
        let mut body = vec![0_u8; 72];
        body[56..60].copy_from_slice(&37_u32.to_ne_bytes());
        assert_eq!(answer(&message(SOCK_DIAG_BY_FAMILY, 7, &body), 7), Answer::Unread(37));
        assert_eq!(answer(&message(SOCK_DIAG_BY_FAMILY, 6, &body), 7), Answer::Other);
        assert_eq!(answer(&message(SOCK_DIAG_BY_FAMILY, 7, &body[..40]), 7), Answer::Other, "cut short");
        let error = |number: i32| answer(&message(libc::NLMSG_ERROR as u16, 7, &(-number).to_ne_bytes()), 7);
        assert_eq!(error(libc::ENOENT), Answer::NoSuchSocket);
        assert_eq!(error(libc::EINVAL), Answer::Refused(rustix::io::Errno::INVAL));
        assert_eq!(answer(&[], 7), Answer::Other);
    }

    #[tokio::test]
    async fn the_kernel_counts_what_the_other_end_has_not_read() {
        let sockets = PeerSockets::open().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let (own, peer) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
        assert_eq!(sockets.unread(peer, own).unwrap(), Some(0));
        server.write_all(b"seventeen bytes..").await.unwrap();
        assert_eq!(sockets.unread(peer, own).unwrap(), Some(17));
        client.read_exact(&mut [0; 7]).await.unwrap();
        assert_eq!(sockets.unread(peer, own).unwrap(), Some(10));
        assert_eq!(sockets.unread(own, peer).unwrap(), Some(0), "the other way round");
        // Closed with bytes unread: reset, and gone from the kernel's table.
        drop(client);
        assert_eq!(sockets.unread(peer, own).unwrap(), None);
    }
}
