//! Binding the public ports and accepting on them.
//!
//! Invariants
//! - A permit is held before `accept`, so the kernel's backlog holds the line
//!   at the connection limit; it goes back when the connection's task ends.
//! - An error of `accept` never ends a listener: if it is ours to wait out, or
//!   comes again and again, it backs off from 5 ms to 1 s and goes on, so running
//!   out of descriptors costs time, not the port.
//! - Accepting can be ended at any time, by dropping it, and begun again: the
//!   socket stays open, no client is lost, and the permit goes back.
//!
//! `[::]` sockets take IPv6 only, so that v4 and v6 are configured and fail
//! each on their own.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::answer;
use crate::connection::{self, Service};
use crate::ledger::Ended;
use crate::limits::{ClientLimit, ClientLimitReached};
use crate::upstream::Dial;

/// Connections that wait for a permit in the kernel; capped by
/// net.core.somaxconn (4096 by default).
const BACKLOG: i32 = 4096;

/// How long `accept` pauses after an error: twice as long each time.
const BACKOFF_FIRST: Duration = Duration::from_millis(5);
const BACKOFF_LAST: Duration = Duration::from_secs(1);

/// So many clients in a row may be lost before they were accepted. After that the
/// fault is the socket's: a supervisor has it too, and may have shut it down.
const LOST_IN_A_ROW: u32 = 100;

/// How long `accept` must have gone well before its errors count as over.
const CALM: Duration = Duration::from_secs(5);

/// A silent client is asked for a sign of life after two minutes, and given up
/// a minute later; most NATs forget a connection after five.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(120))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

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

/// Opens a listening socket. Must be called within a tokio runtime.
pub fn bind(name: &str, address: SocketAddr) -> Result<TcpListener, BindError> {
    open(address).map_err(|error| BindError {
        name: name.to_owned(),
        address,
        reason: explain(&error, address),
        kind: kind_of(&error),
    })
}

/// A kernel started without IPv6 has no socket of that family to give; the
/// standard library has no kind for its answer.
fn kind_of(error: &io::Error) -> io::ErrorKind {
    match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => io::ErrorKind::Unsupported,
        _ => error.kind(),
    }
}

fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?; // restart while old connections are in TIME_WAIT
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
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

/// What all listeners share.
#[derive(Clone, Debug)]
pub struct Admission {
    /// One permit for each connection that may exist.
    pub permits: Arc<Semaphore>,
    /// The share of one client.
    pub clients: Arc<ClientLimit>,
    /// Every connection's task, for draining.
    pub tasks: TaskTracker,
}

/// Accepts connections for as long as it is not dropped, each served in a task
/// of its own.
pub async fn accept<D: Dial>(listener: Arc<TcpListener>, service: Arc<Service<D>>, admission: Admission) {
    let mut trouble = Trouble { backoff: BACKOFF_FIRST, last: None, lost: 0 };
    loop {
        let Ok(permit) = Arc::clone(&admission.permits).acquire_owned().await else { return }; // never closed
        match listener.accept().await {
            Ok((client, peer)) => {
                trouble.over(&service.name);
                admit(&service, &admission, permit, client, peer);
            }
            Err(error) if !is_shortage(&error) && trouble.lost < LOST_IN_A_ROW => {
                trouble.lost += 1;
                debug!(listener = service.name, "a client was lost before it was accepted: {error}");
            }
            Err(error) => {
                drop(permit);
                tokio::time::sleep(trouble.with(&service.name, &error)).await;
            }
        }
    }
}

/// Takes in those who wait in the kernel's backlog, which would reset them when
/// the socket is closed, as far as the limits allow.
pub fn accept_backlog<D: Dial>(listener: &TcpListener, service: &Arc<Service<D>>, admission: &Admission) {
    for _ in 0..BACKLOG {
        let Ok(permit) = Arc::clone(&admission.permits).try_acquire_owned() else { return };
        // Past tokio, which may not have heard yet that there is somebody.
        let Ok((client, peer)) = SockRef::from(listener).accept() else { return };
        let accepted = client.set_nonblocking(true).and_then(|()| TcpStream::from_std(client.into()));
        if let (Ok(client), Some(peer)) = (accepted, peer.as_socket()) {
            admit(service, admission, permit, client, peer);
        }
    }
}

/// Whether accept(2) failed for want of descriptors or memory, which is ours to
/// wait out. Its other errors are of the one connection that it would have
/// returned, and the next may be good.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// The errors of one listener. One line tells when they begin and one when they
/// are over, however many come: at the descriptor limit every connection that
/// ends lets another one in, and the next is an error again.
struct Trouble {
    backoff: Duration,
    last: Option<Instant>,
    /// Clients that were lost one after the other.
    lost: u32,
}

impl Trouble {
    /// Notes an error; returns how long to pause.
    fn with(&mut self, listener: &str, error: &io::Error) -> Duration {
        if self.last.replace(Instant::now()).is_none() {
            let remedy = if is_shortage(error) {
                "raise the descriptor limit (LimitNOFILE) or lower max_connections"
            } else {
                "if it stays so, restart the edge, and the socket unit if it has one"
            };
            warn!(listener, "cannot accept: {error}; trying again; {remedy}");
        }
        let pause = self.backoff;
        self.backoff = (pause * 2).min(BACKOFF_LAST);
        pause
    }

    /// Notes a connection.
    fn over(&mut self, listener: &str) {
        (self.backoff, self.lost) = (BACKOFF_FIRST, 0);
        if self.last.is_some_and(|last| last.elapsed() >= CALM) {
            self.last = None;
            info!(listener, "accepting again");
        }
    }
}

/// Serves a connection, unless its client has as many as it may.
fn admit<D: Dial>(
    service: &Arc<Service<D>>,
    admission: &Admission,
    permit: tokio::sync::OwnedSemaphorePermit,
    mut client: TcpStream,
    peer: SocketAddr,
) {
    let place = match admission.clients.admit(peer.ip()) {
        Ok(place) => place,
        Err(ClientLimitReached) => {
            answer::refuse_at_once(&client, service.protocol, &service.public_name);
            return service.page.enter(peer).end(&Ended::client_limit());
        }
    };
    prepare(&client);
    let service = Arc::clone(service);
    admission.tasks.spawn(async move {
        connection::serve(&*service, &mut client, peer).await;
        drop(client); // before others may take its place
        drop((permit, place));
    });
}

/// Keepalive, and no delay: mail protocols are conversations of short lines,
/// and what is relayed was already gathered by the sender.
fn prepare(client: &TcpStream) {
    let socket = SockRef::from(client);
    if let Err(e) = socket.set_tcp_keepalive(&KEEPALIVE).and_then(|()| socket.set_tcp_nodelay(true)) {
        debug!("cannot set socket options: {e}"); // the client is gone already
    }
}
