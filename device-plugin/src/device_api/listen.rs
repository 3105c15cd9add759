//! A listening socket inside another network namespace (N14).

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::thread::LinkNameSpaceType;

use super::unread::PeerSockets;

/// Connections that wait while nobody accepts, for example while the agent restarts: each holds one call of the app,
/// and a refused one costs a finished result. The kernel lowers it to `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// Why there is no socket in the namespace.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// No thread could be started for it, or it died.
    #[error("the thread that enters the network namespace did not finish")]
    Thread(#[source] io::Error),
    /// `setns` was refused: no `CAP_SYS_ADMIN`, or the namespace is no network namespace.
    #[error("entering the network namespace failed")]
    Enter(#[source] io::Error),
    /// Socket, bind or listen failed: another process of the pod has the port, or its loopback is down.
    #[error("listening on {address} in the network namespace failed")]
    Bind {
        /// The address that was asked for.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A listening socket and a view of all sockets of its namespace.
#[derive(Debug)]
pub struct Bound {
    /// Non-blocking, as `tokio::net::TcpListener::from_std` needs it.
    pub listener: TcpListener,
    /// For questions about the peers of its connections; an error where the kernel has no such service.
    pub sockets: io::Result<PeerSockets>,
}

/// Listens on `address` inside the network namespace `netns` (an open `/proc/<pid>/ns/net`).
///
/// A socket belongs to the namespace it was made in, wherever it is used from. A thread of its own enters, makes the
/// socket and ends: a thread that went back to a pool would do other work in the wrong network. Blocks for that short
/// time.
///
/// # Errors
/// [`ListenError`].
pub fn bind_in_netns(netns: BorrowedFd<'_>, address: SocketAddr) -> Result<Bound, ListenError> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("netns-bind".to_owned())
            .spawn_scoped(scope, move || {
                rustix::thread::move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))
                    .map_err(|error| ListenError::Enter(error.into()))?;
                let socket = listen(address).map_err(|error| ListenError::Bind { address, source: error.into() })?;
                Ok(Bound { listener: TcpListener::from(socket), sockets: PeerSockets::open() })
            })
            .map_err(ListenError::Thread)?;
        worker.join().map_err(|_| ListenError::Thread(io::Error::other("it panicked")))?
    })
}

fn listen(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Connections of an agent that has just ended may still be closing on this port.
    sockopt::set_socket_reuseaddr(socket.as_fd(), true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpStream};

    use super::*;

    fn own_netns() -> File {
        File::open("/proc/thread-self/ns/net").unwrap()
    }

    /// Brings up loopback in the namespace of this thread, as the pod's network does before a container starts.
    fn loopback_up() {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
        // SAFETY: all zeroes is a valid ifreq; the name is set and shorter than its field.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name[0] = b'l'.cast_signed() as libc::c_char;
        request.ifr_name[1] = b'o'.cast_signed() as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
        let result = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn the_socket_is_in_the_other_namespace_and_only_there() {
        let foreign = thread::spawn(|| {
            // SAFETY: only this thread, which ends here, changes its network.
            if unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.is_err() {
                return None;
            }
            loopback_up();
            Some(own_netns())
        })
        .join()
        .unwrap();
        let Some(foreign) = foreign else {
            println!("not tried: making a network namespace needs CAP_SYS_ADMIN");
            return;
        };
        // Any free port of the other side; the port is learned from the socket.
        let Bound { listener, sockets } = bind_in_netns(foreign.as_fd(), (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(false).unwrap();

        // The same port is still free here: this side has another loopback, and this thread has not moved.
        assert!(TcpStream::connect(address).is_err());

        let inside = thread::spawn(move || {
            rustix::thread::move_into_link_name_space(foreign.as_fd(), None).unwrap();
            assert!(matches!(
                bind_in_netns(foreign.as_fd(), address),
                Err(ListenError::Bind { source, .. }) if source.kind() == io::ErrorKind::AddrInUse
            ));
            let mut client = TcpStream::connect(address).unwrap();
            client.write_all(b"x").unwrap();
            assert_eq!(client.read(&mut [0]).unwrap(), 1);
        });
        let (mut server, client) = listener.accept().unwrap();
        // Asked from here, about a connection over there.
        let sockets = sockets.unwrap();
        assert!(sockets.unread(client, address).unwrap().is_some());
        assert_eq!(PeerSockets::open().unwrap().unread(client, address).unwrap(), None);
        server.write_all(b"y").unwrap();
        let mut bytes = Vec::new();
        server.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"x");
        inside.join().unwrap();
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        let other = File::open("/dev/null").unwrap();
        let refused = bind_in_netns(other.as_fd(), (Ipv4Addr::LOCALHOST, 0).into());
        assert!(matches!(refused, Err(ListenError::Enter(_))), "{refused:?}");
    }
}
