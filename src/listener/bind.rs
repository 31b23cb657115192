//! Binds a port: the result is a listening socket, or the reason why not and what to do.
//!
//! `[::]` sockets accept IPv6 only, so that IPv4 and IPv6 are configured separately and fail separately.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::net::TcpStream;

/// Connections that wait for a permit in the kernel; capped by
/// net.core.somaxconn (4096 by default).
pub(super) const BACKLOG: i32 = 4096;

/// Why a listener could not be opened.
#[derive(Debug, Error)]
#[error("listener {name}: cannot bind {address}: {reason}")]
pub struct BindError {
    /// The listener's name.
    pub name: String,
    /// The address that was asked for.
    pub address: SocketAddr,
    /// The system's answer and what to do about it.
    pub reason: String,
    /// The system's error kind.
    pub kind: io::ErrorKind,
}

/// A listening socket. Unlike tokio's, it can wait for a client without accepting it.
#[derive(Debug)]
pub struct ListeningSocket(AsyncFd<std::net::TcpListener>);

impl ListeningSocket {
    /// Takes a socket that does not block. Must be called within a tokio runtime.
    #[expect(
        deprecated,
        reason = "it is unsound for types that lie about their descriptor, which the standard library's do not; its successor needs `unsafe`"
    )]
    pub fn new(listener: std::net::TcpListener) -> io::Result<ListeningSocket> {
        AsyncFd::with_interest(listener, Interest::READABLE).map(ListeningSocket)
    }

    /// Its address, with the port that the system chose for port 0.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.get_ref().local_addr()
    }

    /// Waits until a client may be there.
    pub(super) async fn somebody(&self) -> io::Result<AsyncFdReadyGuard<'_, std::net::TcpListener>> {
        self.0.readable().await
    }

    /// Accepts a client that is there, also if the runtime does not know of it yet.
    pub(super) fn accept_now(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (client, peer) = acceptfrom_with(self, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
        let peer = peer.ok_or(io::ErrorKind::AddrNotAvailable)?.try_into()?;
        Ok((TcpStream::from_std(client.into())?, peer))
    }

    /// Accepts the next client. Dropping the future loses no client.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        loop {
            let mut somebody = self.somebody().await?;
            if let Ok(accepted) = somebody.try_io(|_| self.accept_now()) {
                return accepted;
            }
        }
    }
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Opens a listening socket. Must be called within a tokio runtime.
pub fn bind(name: &str, address: SocketAddr) -> Result<ListeningSocket, BindError> {
    open(address).map_err(|error| BindError {
        name: name.to_owned(),
        address,
        reason: explain(&error, address),
        kind: kind_of(&error),
    })
}

/// The error's kind. A kernel without IPv6 answers EAFNOSUPPORT, for which the standard library has no kind.
fn kind_of(error: &io::Error) -> io::ErrorKind {
    match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => io::ErrorKind::Unsupported,
        _ => error.kind(),
    }
}

fn open(address: SocketAddr) -> io::Result<ListeningSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?; // restart while old connections are in TIME_WAIT
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    ListeningSocket::new(socket.into())
}

fn explain(error: &io::Error, address: SocketAddr) -> String {
    let remedy = match kind_of(error) {
        io::ErrorKind::PermissionDenied => "grant CAP_NET_BIND_SERVICE or use a port above 1023",
        io::ErrorKind::AddrInUse => {
            return format!(
                "{error}; another program listens there (`ss -ltnp 'sport = :{}'` names it): stop it or choose another address",
                address.port()
            );
        }
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported => {
            "this machine has no such address; listen on one that `ip address` shows"
        }
        _ => return error.to_string(),
    };
    format!("{error}; {remedy}")
}
