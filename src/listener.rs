//! Binding the public ports and accepting on them.
//!
//! Invariants
//! - A permit is held before `accept`, so the kernel's backlog holds the line
//!   at the connection limit; it goes back when the connection's task ends.
//! - A listener without a client has no permit: however many ports are open, all
//!   permits are for connections.
//! - An error of `accept` never ends a listener: if it is ours to wait out, or
//!   comes again and again, it backs off from 5 ms to 1 s and goes on, so running
//!   out of descriptors costs time, not the port.
//! - Accepting can be ended at any time, by dropping it, and begun again: the
//!   socket stays open, no client is lost, and the permit goes back.
//!
//! `[::]` sockets take IPv6 only, so that v4 and v6 are configured and fail
//! each on their own.

mod bind;
pub mod sockets;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use bind::BACKLOG;
pub use bind::{BindError, ListeningSocket, bind};

use crate::connection::ended::Ended;
use crate::connection::limits::{ClientLimit, ClientLimitReached};
use crate::connection::refusal;
use crate::connection::{self, Service};
use crate::upstream::dial::Dial;

/// How long `accept` pauses after an error: twice as long each time.
const BACKOFF_FIRST: Duration = Duration::from_millis(5);
const BACKOFF_LAST: Duration = Duration::from_secs(1);

/// This many clients in a row may be lost before they were accepted. After that the
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
pub async fn accept<D: Dial>(listener: Arc<ListeningSocket>, service: Arc<Service<D>>, admission: Admission) {
    let mut trouble = AcceptErrors { backoff: BACKOFF_FIRST, last: None, lost: 0 };
    loop {
        let Ok(mut somebody) = listener.somebody().await else { return }; // only without a runtime
        let Ok(permit) = Arc::clone(&admission.permits).acquire_owned().await else { return }; // never closed
        // Whoever was there may be gone, or another process may have taken them: then the permit goes back.
        let Ok(accepted) = somebody.try_io(|_| listener.accept_now()) else { continue };
        match accepted {
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
pub fn accept_backlog<D: Dial>(listener: &ListeningSocket, service: &Arc<Service<D>>, admission: &Admission) {
    for _ in 0..BACKLOG {
        let Ok(permit) = Arc::clone(&admission.permits).try_acquire_owned() else { return };
        match listener.accept_now() {
            Ok((client, peer)) => admit(service, admission, permit, client, peer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_shortage(&error) => return,
            Err(_) => {} // lost before it was accepted
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
struct AcceptErrors {
    backoff: Duration,
    last: Option<Instant>,
    /// Clients that were lost one after the other.
    lost: u32,
}

impl AcceptErrors {
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

/// How much may wait in the kernel beside what is on its way to the client, of which the kernel would
/// otherwise let 4 MiB gather. Enough for the time that it takes to write more.
const UNSENT_BYTES: u32 = 128 * 1024;

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
            refusal::refuse_at_once(&client, service.protocol, &service.public_name);
            return service.connections.enter(peer).end(&Ended::client_limit());
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

/// Keepalive; no delay, since mail protocols are conversations of short lines, and what is relayed was
/// already gathered by the sender; and a bound on what the kernel keeps for a client that does not read.
fn prepare(client: &TcpStream) {
    let socket = SockRef::from(client);
    let prepared = socket
        .set_tcp_keepalive(&KEEPALIVE)
        .and_then(|()| socket.set_tcp_nodelay(true))
        .and_then(|()| socket.set_tcp_notsent_lowat(UNSENT_BYTES));
    if let Err(e) = prepared {
        debug!("cannot set socket options: {e}"); // the client is gone already
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::task::JoinSet;
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::protocol::ProxyProtocol;
    use crate::tailnet::{ConnectError, PingReport};
    use crate::test_support::{Loopback, service, service_to};
    use crate::upstream::dial::Reset;

    fn admission(connections: usize) -> Admission {
        let permits = Arc::new(Semaphore::new(connections));
        Admission { permits, clients: ClientLimit::new(0), tasks: TaskTracker::new() }
    }

    async fn until(condition: impl Fn() -> bool) {
        let polled = async {
            while !condition() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), polled).await.expect("it never happens");
    }

    fn socket() -> Arc<ListeningSocket> {
        Arc::new(bind("smtp", "127.0.0.1:0".parse().unwrap()).unwrap())
    }

    /// A client that has got through to the kernel.
    async fn client(socket: &ListeningSocket) -> TcpStream {
        TcpStream::connect(socket.local_addr().unwrap()).await.unwrap()
    }

    /// A client that only ends its side may wait for the reply.
    fn leave(mut client: TcpStream) {
        client.reset();
    }

    /// Clients that are served wait for a mailbox that does not answer.
    fn silent() -> Arc<Service<Loopback>> {
        Arc::new(service(None, ProxyProtocol::V2))
    }

    #[tokio::test]
    async fn all_permits_are_for_clients_however_many_ports_are_open() {
        let (service, admission) = (silent(), admission(12));
        let sockets: Vec<_> = (0..10).map(|_| socket()).collect();
        let mut accepting = JoinSet::new();
        for socket in &sockets {
            accepting.spawn(accept(Arc::clone(socket), Arc::clone(&service), admission.clone()));
        }
        let mut clients = Vec::new();
        for _ in 0..12 {
            clients.push(client(&sockets[0]).await);
        }
        let open = || service.connections.all().open();
        until(|| open().len() == 12).await;
        // One more on each port: the kernel has them, and nobody is served before another one leaves.
        let mut waiting = Vec::new();
        for socket in &sockets {
            waiting.push(client(socket).await);
        }
        sleep(Duration::from_millis(50)).await;
        assert_eq!((open().len(), admission.permits.available_permits()), (12, 0));
        leave(clients.swap_remove(0));
        let addresses: Vec<_> = waiting.iter().map(|client| client.local_addr().unwrap()).collect();
        until(|| open().iter().any(|connection| addresses.contains(&connection.client()))).await;
        assert_eq!(open().len(), 12);
        accepting.shutdown().await;
        clients.into_iter().chain(waiting).for_each(leave);
        until(|| admission.permits.available_permits() == 12).await;
    }

    #[tokio::test]
    async fn accepting_that_ends_while_it_waits_for_a_permit_takes_none_and_loses_nobody() {
        let (service, admission, socket) = (silent(), admission(1), socket());
        let taken = Arc::clone(&admission.permits).try_acquire_owned().unwrap();
        let begin = || accept(Arc::clone(&socket), Arc::clone(&service), admission.clone());
        let _client = client(&socket).await;
        timeout(Duration::from_millis(50), begin()).await.expect_err("it accepts for as long as it may");
        drop(taken);
        assert_eq!(admission.permits.available_permits(), 1);
        let _again = tokio::spawn(begin());
        until(|| service.connections.all().open().len() == 1).await;
        assert_eq!(admission.permits.available_permits(), 0);
    }

    #[tokio::test]
    async fn whoever_waits_in_the_backlog_is_taken_in_as_far_as_there_are_permits() {
        let (service, admission, socket) = (silent(), admission(2), socket());
        let _clients = [client(&socket).await, client(&socket).await, client(&socket).await];
        accept_backlog(&socket, &service, &admission);
        assert_eq!((admission.tasks.len(), admission.permits.available_permits()), (2, 0));
    }

    /// A mistake of ours.
    struct Broken;

    impl Dial for Broken {
        type Stream = TcpStream;

        async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
            panic!("as this test wants it")
        }

        async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
            Err(ConnectError::NoSuchPeer)
        }
    }

    #[tokio::test]
    async fn a_panic_costs_its_client_alone() {
        let (service, socket) = (Arc::new(service_to(Broken, ProxyProtocol::V2)), socket());
        let admission = Admission { clients: ClientLimit::new(1), ..admission(1) };
        let accepting = tokio::spawn(accept(Arc::clone(&socket), Arc::clone(&service), admission.clone()));
        for ended in 1..=3 {
            let mut client = client(&socket).await;
            assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0, "it is closed");
            let counters = &service.connections.all().counters;
            until(|| counters.count("smtp", crate::connection::end_state::EndState::Internal) == ended).await;
            until(|| admission.permits.available_permits() == 1).await;
        }
        assert!(!accepting.is_finished());
    }
}
