//! One client's life: reach the upstream, write the PROXY header, relay, and one
//! line in the ledger.
//!
//! Invariants
//! - The header is the first thing on the upstream's connection, in one write,
//!   before any byte of the client; if it cannot be written, nothing is.
//! - Nothing is read from the client before the upstream is connected and has
//!   its header; so a server that speaks first is heard at once, and a client
//!   that speaks first loses nothing. What it sends meanwhile waits in the
//!   kernel, which takes no more than a first window (64 kB) from it.
//! - A client is never turned away without a word while its protocol has one for
//!   it, and never held longer than `hold`; except by a mailbox that greets others
//!   and not this client.
//! - A session is tried again only when not a byte has moved either way.
//! - An abrupt end on one side becomes one on the other; an orderly end stays
//!   orderly.

pub mod counters;
pub mod end_state;
pub mod ledger;
pub mod limits;
pub mod refusal;
pub mod relay;

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::connection::end_state::EndState;
use crate::connection::ledger::{Ended, Page, Visit};
use crate::connection::refusal::PublicName;
use crate::connection::relay::{End, FirstWords, Outcome, Side, Timeouts, relay};
use crate::protocol::header_watch::HeaderWatch;
use crate::protocol::proxy_header::proxy_header;
use crate::protocol::{Protocol, ProxyProtocol};
use crate::tailnet::ConnectError;
use crate::upstream::dial::Dial;
use crate::upstream::dial::Reset;
use crate::upstream::{Failure, Reached, Server, Upstream, UpstreamError};

/// How long the stack may take to accept the header: a new connection's send
/// buffer is empty, so it is immediate unless the connection has failed.
const HEADER_LIMIT: Duration = Duration::from_secs(5);

/// How long the first attempt may take before the client counts as held.
const HELD_AFTER: Duration = Duration::from_secs(1);

/// How long a client that is held pauses before it tries a server again that has
/// closed its connection without a word: twice as long each time, since every
/// attempt may be a line in the server's log.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_LAST: Duration = Duration::from_secs(8);

/// What every connection of a listener shares.
#[derive(Debug)]
pub struct Service<D> {
    /// The listener's name.
    pub name: String,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// Where its connections go.
    pub upstream: Arc<Upstream<D>>,
    /// The header that they demand.
    pub proxy_protocol: ProxyProtocol,
    /// How long they may be silent.
    pub timeouts: Timeouts,
    /// For how long clients wait for the upstream, and how many.
    pub hold: Hold,
    /// Who the edge is when it answers itself.
    pub public_name: PublicName,
    /// Fires when the edge begins to stop.
    pub drain: CancellationToken,
    /// Where its connections are entered.
    pub page: Arc<Page>,
}

/// For how long clients wait for an upstream that is away, and how many.
#[derive(Debug)]
pub struct Hold {
    /// From the moment the client came; zero does not hold it at all.
    pub limit: Duration,
    /// One permit for each client that may be held, over all listeners.
    pub places: Arc<Semaphore>,
    /// How much longer an attempt may take once the edge is stopping.
    pub last_dial: Duration,
}

/// How a connection ended before it was relayed.
enum Refusal {
    /// The client left while it waited.
    ClientGone {
        /// Whether it was held.
        held: bool,
    },
    /// The upstream cannot be reached, and clients are not held.
    Away(UpstreamError),
    /// Nor could it be for as long as clients are held.
    HoldEnded(Option<UpstreamError>),
    /// As many clients as may be are held already.
    HoldFull(Option<UpstreamError>),
    /// The edge is stopping.
    Stopping,
}

/// Serves one accepted connection to its end. Never fails: whatever happens is
/// in the ledger. Cancellation drops both connections.
pub async fn serve<D: Dial>(service: &Service<D>, client: &mut TcpStream, peer: SocketAddr) {
    let visit = service.page.enter(peer);
    match converse(service, client, &visit).await {
        Ok(ended) => visit.end(&ended),
        Err(refusal) => {
            let is_gone = matches!(refusal, Refusal::ClientGone { .. });
            visit.end(&refusal.ended(&service.upstream));
            if !is_gone {
                Box::pin(refusal::refuse(client, service.protocol, &service.public_name)).await;
            }
        }
    }
}

/// Reaches the upstream, gives it the header and relays; again if a server that
/// was to speak first leaves without a word, for as long as the client may be
/// held.
async fn converse<D: Dial>(
    service: &Service<D>,
    client: &mut TcpStream,
    visit: &Visit,
) -> Result<Ended, Refusal> {
    // Asked now: a socket that was reset meanwhile no longer knows it.
    let local = client.local_addr().map_err(|_| Refusal::ClientGone { held: false })?;
    let mut failed = None;
    let mut tries = 0;
    let mut first_wordless = None;
    loop {
        // In a box, since an idle connection would otherwise keep the room for it.
        let opening = Box::pin(open(service, client, visit, local, failed.take(), &mut tries));
        let (mut upstream, server) = opening.await?;
        let outcome = pass_on(service, client, visit, &mut upstream, &server).await;
        // A server that has greeted others since, and again not this client, has its reasons; where
        // nobody is held, others before it must do.
        let is_unwanted = match first_wordless {
            Some(at) => server.greeted_since(at),
            None => service.hold.limit.is_zero() && server.greeted_lately(),
        };
        if !matches!(outcome.end, End::Wordless) || is_unwanted {
            return Ok(outcome.ended(&server));
        }
        if service.drain.is_cancelled() {
            return Err(Refusal::Stopping);
        }
        first_wordless.get_or_insert(Instant::now());
        failed = Some(service.upstream.suspect(&server, Failure::Wordless));
    }
}

/// Reaches the upstream and gives it the header, holding the client until that
/// has succeeded. `failed` is what came of the attempt before, and `tries` how
/// often there was one: after each round of all servers there is a pause.
async fn open<D: Dial>(
    service: &Service<D>,
    client: &TcpStream,
    visit: &Visit,
    local: SocketAddr,
    mut failed: Option<UpstreamError>,
    tries: &mut usize,
) -> Result<(D::Stream, Arc<Server>), Refusal> {
    let header = proxy_header(service.proxy_protocol, visit.client(), local);
    loop {
        if let Some(why) = failed {
            *tries += 1;
            let servers = service.upstream.servers().len();
            let is_round = tries.is_multiple_of(servers);
            if is_round && service.hold.limit.is_zero() {
                return Err(Refusal::Away(why));
            }
            if is_round {
                let pause = sleep(pause_after(*tries / servers));
                hold(service, client, visit, &|| Some(why.clone()), pause).await?;
            }
        }
        let Reached { mut stream, server, dial } = reach(service, client, visit).await?;
        match write_header(&mut stream, header.as_deref()).await {
            Ok(()) => {
                visit.relaying(&server, dial);
                return Ok((stream, server));
            }
            Err(error) => failed = Some(service.upstream.suspect(&server, Failure::Header(error.kind()))),
        }
    }
}

/// How long a client pauses after so many rounds of all servers.
fn pause_after(round: usize) -> Duration {
    let doublings = u32::try_from(round.saturating_sub(1)).unwrap_or(u32::MAX).min(8);
    (PAUSE_FIRST * 2_u32.pow(doublings)).min(PAUSE_LAST)
}

/// Connects to the upstream, holding the client while it cannot be reached.
async fn reach<D: Dial>(
    service: &Service<D>,
    client: &TcpStream,
    visit: &Visit,
) -> Result<Reached<D::Stream>, Refusal> {
    let upstream = &service.upstream;
    let why = || upstream.away();
    visit.connecting();
    let holds = !service.hold.limit.is_zero();
    if holds && upstream.is_away() {
        // While others wait for it already there is no use in trying too, unless
        // those who have the places may wait for something else.
        return match service.hold.places.available_permits() {
            0 => {
                let attempt = upstream.connect_in_turn();
                wait(service, client, visit, &why, false, attempt).await?.map_err(Refusal::HoldFull)
            }
            _ => hold(service, client, visit, &why, upstream.reconnect()).await,
        };
    }
    let mut first = pin!(upstream.connect());
    let unanswered = tokio::select! {
        connected = &mut first => match connected {
            Err(error) if holds && error.may_pass() => None,
            connected => return connected.map_err(Refusal::Away),
        },
        _ = reset(client) => return Err(Refusal::ClientGone { held: false }),
        () = sleep(HELD_AFTER), if holds => Some(first),
    };
    let attempt = async {
        if let Some(first) = unanswered {
            match first.await {
                Err(error) if error.may_pass() => {}
                connected => return connected,
            }
        }
        Ok(upstream.reconnect().await)
    };
    hold(service, client, visit, &why, attempt).await?.map_err(Refusal::Away)
}

/// Keeps the client waiting while `attempt` goes on, for as long as it may be
/// held. `why` tells what it is waiting for.
async fn hold<D: Dial, T>(
    service: &Service<D>,
    client: &TcpStream,
    visit: &Visit,
    why: &(dyn Fn() -> Option<UpstreamError> + Sync),
    attempt: impl Future<Output = T>,
) -> Result<T, Refusal> {
    let Ok(_place) = service.hold.places.try_acquire() else {
        return Err(Refusal::HoldFull(why()));
    };
    visit.held();
    wait(service, client, visit, why, true, attempt).await
}

/// Waits for `attempt` until the client leaves, its time is over, or the edge
/// stops. `held` is whether the client has a place.
async fn wait<D: Dial, T>(
    service: &Service<D>,
    client: &TcpStream,
    visit: &Visit,
    why: &(dyn Fn() -> Option<UpstreamError> + Sync),
    held: bool,
    attempt: impl Future<Output = T>,
) -> Result<T, Refusal> {
    tokio::select! {
        done = attempt => Ok(done),
        () = left(client) => Err(Refusal::ClientGone { held }),
        () = sleep_until(visit.accepted() + service.hold.limit) => Err(Refusal::HoldEnded(why())),
        () = dismissed(service) => Err(Refusal::Stopping),
    }
}

/// Completes when the edge is stopping and the mailbox is away, or does not answer in time. Before
/// that, whoever is being connected is served.
async fn dismissed<D: Dial>(service: &Service<D>) {
    service.drain.cancelled().await;
    let _ = timeout(service.hold.last_dial, service.upstream.until_away()).await;
}

async fn write_header<S: AsyncWrite + Unpin>(upstream: &mut S, header: Option<&[u8]>) -> io::Result<()> {
    let Some(header) = header else { return Ok(()) };
    timeout(HEADER_LIMIT, upstream.write_all(header)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

/// Relays, and ends on one side what was cut on the other.
async fn pass_on<D: Dial>(
    service: &Service<D>,
    client: &mut TcpStream,
    visit: &Visit,
    upstream: &mut D::Stream,
    server: &Server,
) -> Outcome {
    let _connected = server.connected();
    let moved = |sent, received| {
        if received > 0 {
            server.speaks();
        }
        if visit.moved(sent, received) {
            server.greets_client();
        }
    };
    let outcome = {
        // By reference, since an idle connection would otherwise hold each
        // twice: as an argument and as what is polled.
        let (drain, client_gone) = (pin!(service.drain.cancelled()), pin!(reset(client)));
        let has_header = service.proxy_protocol != ProxyProtocol::Off;
        let watch = has_header.then(|| HeaderWatch::new(service.protocol)).flatten().map(Box::new);
        let first_words = FirstWords { due: service.protocol.greets(), watch };
        relay(&mut SharedTcp(client), upstream, service.timeouts, first_words, moved, drain, client_gone)
            .await
    };
    if outcome.header_taken {
        service.upstream.distrusted(&service.name, server);
    }
    match outcome.end {
        // The client has not been told, and goes on with another upstream.
        End::Wordless => {}
        End::Failed { side: Side::Client, .. } => upstream.reset(),
        End::Failed { side: Side::Upstream, .. } => client.reset(),
        // A cut stream must not look like a finished one.
        _ if outcome.unfinished => {
            client.reset();
            upstream.reset();
        }
        _ => {}
    }
    outcome
}

/// Completes when a client that is held has left: it has reset the connection,
/// or ended it without having said a word. One that has said something may wait
/// for the reply.
async fn left(client: &TcpStream) {
    let ended = async {
        match client.peek(&mut [0]).await {
            Ok(0) | Err(_) => {}
            Ok(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ended => {}
        _ = reset(client) => {}
    }
}

/// Completes when the client has reset the connection. A FIN is no reason to
/// give up: a client may have said all it wanted and wait for the reply.
async fn reset(client: &TcpStream) -> io::Error {
    loop {
        if client.ready(Interest::ERROR).await.is_err() {
            return std::future::pending().await; // the runtime is going away
        }
        if let Ok(Some(error)) = client.take_error() {
            return error;
        }
        // Nothing to it, or reading has found it first: wait for the next.
        let _ = client.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
}

/// A socket that is read and written through a shared reference, so that it can
/// be watched for a reset meanwhile.
struct SharedTcp<'a>(&'a TcpStream);

impl AsyncRead for SharedTcp<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {} // readiness was stale
                read => return Poll::Ready(read.map(|count| buf.advance(count))),
            }
        }
    }
}

impl AsyncWrite for SharedTcp<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {} // readiness was stale
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // the kernel sends at once
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(self.0).shutdown(Shutdown::Write))
    }
}

impl Refusal {
    /// What the ledger is to say of it.
    fn ended<D>(&self, upstream: &Upstream<D>) -> Ended {
        let cannot = |before: &str, error: &Option<UpstreamError>| {
            let what = error.as_ref().map_or_else(|| "no answer so far".to_owned(), UpstreamError::what);
            format!("{before}cannot reach {upstream}: {what}")
        };
        let (state, why) = match self {
            Refusal::ClientGone { held: false } => {
                (EndState::ClientLeftConnecting, "client left while connecting".to_owned())
            }
            Refusal::ClientGone { held: true } => {
                (EndState::ClientLeftHeld, "client left while it was held".to_owned())
            }
            Refusal::Away(error) => (away(error), format!("cannot reach {upstream}: {}", error.what())),
            Refusal::HoldEnded(error) => {
                let is_denied = error.as_ref().is_some_and(UpstreamError::is_denied);
                let state = if is_denied { EndState::PolicyDenied } else { EndState::HoldEnded };
                (state, cannot("held until its time was over: ", error))
            }
            Refusal::HoldFull(error) => {
                (EndState::HoldFull, cannot("as many clients are held as hold_max allows: ", error))
            }
            Refusal::Stopping => {
                (EndState::StoppedWaiting, "turned away because the edge is stopping".to_owned())
            }
        };
        Ended { state, why }
    }
}

/// How a connection ends whose upstream cannot be reached.
fn away(error: &UpstreamError) -> EndState {
    let all = |kind: fn(&Failure) -> bool| error.failures().all(kind);
    if all(|failure| *failure == Failure::Connect(ConnectError::NotRunning)) {
        EndState::NoTailnet
    } else if error.is_denied() {
        EndState::PolicyDenied
    } else if all(|failure| matches!(failure, Failure::Silent { .. })) {
        EndState::ServerSilent
    } else if all(|failure| matches!(failure, Failure::Wordless | Failure::Header(_))) {
        EndState::ServerWordless
    } else {
        EndState::ServerUnreachable
    }
}

impl Outcome {
    /// What the ledger is to say of it.
    fn ended(&self, server: &Server) -> Ended {
        let (state, why) = match &self.end {
            End::Failed { side: Side::Upstream, .. } if server.is_given_up() => {
                (EndState::ServerVanished, "the mailbox's node vanished".to_owned())
            }
            End::Wordless => (EndState::ServerWordless, "upstream closed without a word".to_owned()),
            End::Closed { first } => (self.closed_by(*first), format!("{first} closed")),
            End::Failed { side, error } => (self.failed_by(*side), format!("{side} failed: {error}")),
            End::Idle => (EndState::Idle, "idle time-out".to_owned()),
            End::HalfClosed { first } => {
                let state = match first {
                    Side::Client => EndState::ServerStalled,
                    Side::Upstream => EndState::ClientStalled,
                };
                (state, format!("half-close time-out after {first} closed"))
            }
            End::Drained => (EndState::StoppedQuiet, "closed because the edge is stopping".to_owned()),
        };
        let is_refused = state == EndState::ServerWordless && server.serves_clients();
        Ended { state: if is_refused { EndState::ServerRefused } else { state }, why }
    }

    fn closed_by(&self, first: Side) -> EndState {
        match (first, self.first_byte) {
            (Side::Client, None) => EndState::ClientLeftUngreeted,
            (Side::Client, Some(_)) => EndState::ClientClosed,
            (Side::Upstream, None) => EndState::ServerWordless,
            (Side::Upstream, Some(_)) => EndState::ServerClosed,
        }
    }

    fn failed_by(&self, side: Side) -> EndState {
        match (side, self.first_byte) {
            (Side::Client, None) => EndState::ClientLeftUngreeted,
            (Side::Client, Some(_)) => EndState::ClientFailed,
            (Side::Upstream, None) => EndState::ServerWordless,
            (Side::Upstream, Some(_)) => EndState::ServerFailed,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
