//! A listening socket that the supervisor has handed over.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::{FdFlags, fcntl_setfd};
use socket2::{Domain, SockRef, Type};

use super::ListeningSocket;

/// A socket that was handed over.
#[derive(Debug)]
pub(super) struct Inherited {
    pub(super) name: String,
    pub(super) local: SocketAddr,
    /// Whether it takes IPv4 too.
    pub(super) is_dual_stack: bool,
    pub(super) listener: Arc<ListeningSocket>,
}

impl Inherited {
    /// Accepts a listening TCP socket that was not seen before. The error says what else it is.
    pub(super) fn check(
        name: &str,
        socket: OwnedFd,
        seen: &mut BTreeSet<(u64, u64)>,
    ) -> Result<Inherited, String> {
        let view = SockRef::from(&socket);
        let is_inet = matches!(view.domain(), Ok(Domain::IPV4 | Domain::IPV6));
        if !is_inet || !matches!(view.r#type(), Ok(Type::STREAM)) {
            return Err("it is not a TCP socket".to_owned());
        }
        if !view.is_listener().unwrap_or(false) {
            return Err("it does not listen".to_owned());
        }
        let local = view.local_addr().ok().and_then(|local| local.as_socket());
        let local = local.ok_or("its address is not known")?;
        let identity = rustix::fs::fstat(&socket).map_err(|error| error.to_string())?;
        if !seen.insert((identity.st_dev, identity.st_ino)) {
            return Err("the same socket was handed over under another number already".to_owned());
        }
        let is_dual_stack = local.is_ipv6() && !view.only_v6().unwrap_or(true);
        let listener = view.set_nonblocking(true).and_then(|()| {
            fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
            ListeningSocket::new(socket.into())
        });
        let listener = Arc::new(listener.map_err(|error| error.to_string())?);
        Ok(Inherited { name: name.to_owned(), local, is_dual_stack, listener })
    }

    /// Whether it is bound to exactly this address, or is a dual-stack `[::]` socket that covers it.
    pub(super) fn is_for(&self, address: SocketAddr) -> bool {
        let is_any = address.ip().is_unspecified() && self.local.ip().is_unspecified();
        let covers = self.is_dual_stack && is_any && address.is_ipv4() && address.port() == self.local.port();
        self.local == address || covers
    }
}

impl fmt::Display for Inherited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name, self.local)
    }
}
