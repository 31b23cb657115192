//! Where does a listening socket come from, and which client is accepted?
//!
//! It promises
//! - A permit is taken before `accept`, and given back when the connection's task ends. So at the connection
//!   limit, clients wait in the kernel's backlog.
//! - A listener without a client holds no permit: however many ports are open, all permits are for connections.
//! - An error of `accept` never ends a listener. If descriptors or memory are short, or if the error repeats, the
//!   listener pauses for 5 ms to 1 s and tries again.
//! - Accepting can be stopped at any time, by dropping the future, and started again: the socket stays open, no
//!   client is lost, and the permit is given back.
//!
//! It deliberately does not know what an accepted connection does (see `connection`).

mod bind;
mod inherited;
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

/// How long accepting pauses after the first error, and at most. The pause doubles each time.
const BACKOFF_FIRST: Duration = Duration::from_millis(5);
const BACKOFF_LAST: Duration = Duration::from_secs(1);

/// How many clients in a row may be lost before they were accepted. After that the socket itself
/// is at fault: the supervisor has it too, and may have shut it down.
const LOST_IN_A_ROW: u32 = 100;

/// How long `accept` must work before its errors count as over.
const CALM: Duration = Duration::from_secs(5);

/// After two silent minutes a client gets keepalive probes, and a minute later it is given up.
/// Most NATs forget a connection after five minutes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(120))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

/// What all listeners share.
#[derive(Clone, Debug)]
pub struct Admission {
    /// One permit for each connection that may exist.
    pub permits: Arc<Semaphore>,
    /// The limit for one client.
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
        // The client may be gone, or another process may have accepted it: then the permit is given back.
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

/// Accepts the clients that wait in the kernel's backlog, as far as the limits allow. The kernel would reset
/// them when the socket is closed.
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

/// Whether accept(2) failed because descriptors or memory are short. Then the edge has to wait. Other errors
/// concern only the one connection that would have been accepted; the next may be good.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// The errors of one listener. One log line says when they begin, and one when they are over, however many
/// there are. At the descriptor limit, successes and errors alternate: every connection that ends lets another
/// one in, and the next `accept` fails again.
struct AcceptErrors {
    backoff: Duration,
    last: Option<Instant>,
    /// Clients lost in a row.
    lost: u32,
}

impl AcceptErrors {
    /// Notes an error; returns how long to pause.
    fn with(&mut self, listener: &str, error: &io::Error) -> Duration {
        if self.last.replace(Instant::now()).is_none() {
            let remedy = if is_shortage(error) {
                "raise the descriptor limit (LimitNOFILE) or lower max_connections"
            } else {
                "if this goes on, restart the edge, and its socket unit if it has one"
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

/// How many unsent bytes the kernel may keep for a client. Without this limit it would keep up to 4 MiB. This is
/// enough for the time until more is written.
const UNSENT_BYTES: u32 = 128 * 1024;

/// Serves a connection, unless its client has reached its limit.
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
        drop(client); // closed before the permits are free for another client
        drop((permit, place));
    });
}

/// Sets the socket options: keepalive; no delay (TCP_NODELAY), since mail protocols exchange short lines and the
/// sender has already gathered what is relayed; and a limit on what the kernel keeps for a client that does not
/// read.
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

    /// A client whose connection the kernel has accepted.
    async fn client(socket: &ListeningSocket) -> TcpStream {
        TcpStream::connect(socket.local_addr().unwrap()).await.unwrap()
    }

    /// A client that has only closed its side may still wait for the reply.
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
        // One more client on each port: the kernel has them, and none is served before another client leaves.
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

    /// Panics when it is dialled, as a bug in the edge could.
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
