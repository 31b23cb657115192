//! One client's life: dial the upstream, write the PROXY header, relay, one
//! log line.
//!
//! Invariants
//! - The header is the first thing on the upstream's connection, in one write,
//!   before any byte of the client; if it cannot be written, nothing is.
//! - Nothing is read from the client before the upstream is connected and has
//!   its header; so a server that speaks first is heard at once, and a client
//!   that speaks first loses nothing.
//! - An abrupt end on one side becomes one on the other; an orderly end stays
//!   orderly.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::ProxyProtocol;
use crate::proxy_header::proxy_header;
use crate::relay::{End, Outcome, Reset, Side, Timeouts, relay};
use crate::upstream::{Dial, Upstream, UpstreamError};

/// How long the stack may take to accept the header: a new connection's send
/// buffer is empty, so it is immediate unless the connection has failed.
const HEADER_LIMIT: Duration = Duration::from_secs(5);

/// What every connection of a listener shares.
#[derive(Debug)]
pub struct Service<D> {
    /// The listener's name.
    pub name: String,
    /// Where its connections go.
    pub upstream: Upstream<D>,
    /// The header that they demand.
    pub proxy_protocol: ProxyProtocol,
    /// How long they may be silent.
    pub timeouts: Timeouts,
    /// Fires when the edge begins to stop.
    pub drain: CancellationToken,
}

/// How a connection ended before it was relayed.
enum Refusal {
    /// The client left while we were dialling.
    ClientGone,
    /// The upstream could not be reached.
    Upstream(UpstreamError),
    /// The upstream failed before it had the header.
    Header(io::Error),
}

/// Serves one accepted connection to its end. Never fails: whatever happens is
/// in the log line. Cancellation drops both connections.
pub async fn serve<D: Dial>(service: &Service<D>, mut client: TcpStream, peer: SocketAddr) {
    static CONNECTIONS: AtomicU64 = AtomicU64::new(1);
    let id = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
    let accepted = Instant::now();
    let mut upstream = match open(service, &client, peer).await {
        Ok(upstream) => upstream,
        Err(refusal) => return log_refusal(service, id, peer, accepted, &refusal),
    };
    let connected = accepted.elapsed();
    let outcome = {
        // By reference, since an idle connection would otherwise hold each
        // twice: as an argument and as what is polled.
        let (drain, client_gone) = (pin!(service.drain.cancelled()), pin!(reset(&client)));
        relay(&mut SharedTcp(&client), &mut upstream, service.timeouts, drain, client_gone).await
    };
    match outcome.end {
        End::Failed { side: Side::Client, .. } => upstream.reset(),
        End::Failed { side: Side::Upstream, .. } => client.reset(),
        // A cut stream must not look like a finished one.
        _ if outcome.unfinished => {
            client.reset();
            upstream.reset();
        }
        _ => {}
    }
    log_outcome(service, id, peer, accepted, connected, &outcome);
}

/// Dials the upstream and gives it the header, unless the client leaves first.
async fn open<D: Dial>(
    service: &Service<D>,
    client: &TcpStream,
    peer: SocketAddr,
) -> Result<D::Stream, Refusal> {
    // Asked now: a socket that was reset meanwhile no longer knows it.
    let local = client.local_addr().map_err(|_| Refusal::ClientGone)?;
    let header = proxy_header(service.proxy_protocol, peer, local);
    let mut upstream = tokio::select! {
        upstream = service.upstream.connect() => upstream.map_err(Refusal::Upstream)?,
        _ = reset(client) => return Err(Refusal::ClientGone),
    };
    if let Some(header) = header {
        let written = timeout(HEADER_LIMIT, upstream.write_all(&header)).await;
        written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(Refusal::Header)?;
    }
    Ok(upstream)
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

fn log_refusal<D: Dial>(
    service: &Service<D>,
    id: u64,
    client: SocketAddr,
    accepted: Instant,
    refusal: &Refusal,
) {
    let (listener, upstream) = (&service.name, &service.upstream);
    let total_ms = millis(accepted.elapsed());
    match refusal {
        Refusal::ClientGone => {
            info!(id, listener, %client, %upstream, total_ms, end = "client reset while connecting", "connection");
        }
        Refusal::Upstream(error) => {
            warn!(id, listener, %client, %upstream, total_ms, "connection closed: cannot reach {upstream}: {error}");
        }
        Refusal::Header(error) => {
            warn!(id, listener, %client, %upstream, total_ms, "connection closed: cannot send the PROXY header to {upstream}: {error}; check the mail server's log");
        }
    }
}

fn log_outcome<D: Dial>(
    service: &Service<D>,
    id: u64,
    client: SocketAddr,
    accepted: Instant,
    connected: Duration,
    outcome: &Outcome,
) {
    let end = match &outcome.end {
        End::Closed { first } => format!("{first} closed"),
        End::Failed { side, error } => format!("{side} failed: {error}"),
        End::Idle => "idle time-out".to_owned(),
        End::HalfClosed { first } => format!("half-close time-out after {first} closed"),
        End::Drained => "closed because the edge is stopping".to_owned(),
    };
    info!(
        id,
        listener = service.name,
        %client,
        upstream = %service.upstream,
        sent = outcome.sent,
        received = outcome.received,
        connect_ms = millis(connected),
        first_byte_ms = outcome.first_byte.map(|at| millis(at - accepted)),
        total_ms = millis(accepted.elapsed()),
        end,
        "connection"
    );
}

/// Milliseconds with three digits, for people.
fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::tailnet::{ConnectError, PingReport};

    /// Dials a port of this machine, or nothing at all.
    struct Loopback(Option<SocketAddr>);

    impl Dial for Loopback {
        type Stream = TcpStream;

        async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
            match self.0 {
                Some(address) => TcpStream::connect(address).await.map_err(|_| ConnectError::Refused),
                None => std::future::pending().await,
            }
        }

        async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
            Err(ConnectError::NoSuchPeer)
        }
    }

    fn service(dialler: Loopback, proxy_protocol: ProxyProtocol) -> Service<Loopback> {
        let second = Duration::from_secs(60);
        Service {
            name: "smtp".into(),
            upstream: Upstream::new(Arc::new(dialler), "mailbox".into(), 25, second),
            proxy_protocol,
            timeouts: Timeouts { idle: second, half_close: second, quiet: second },
            drain: CancellationToken::new(),
        }
    }

    /// A client's socket, and ours with the client's address.
    async fn client() -> (TcpStream, TcpStream, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, peer) = listener.accept().await.unwrap();
        (client, accepted, peer)
    }

    /// What the mailbox receives of a client that sends `hello` and ends.
    async fn received(proxy_protocol: ProxyProtocol) -> (String, SocketAddr, SocketAddr) {
        let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = service(Loopback(Some(mailbox.local_addr().unwrap())), proxy_protocol);
        let (mut client, accepted, peer) = client().await;
        let local = accepted.local_addr().unwrap();
        client.write_all(b"hello").await.unwrap();
        client.shutdown().await.unwrap();
        let mail = async {
            let (mut stream, _) = mailbox.accept().await.unwrap();
            let mut got = String::new();
            stream.read_to_string(&mut got).await.unwrap();
            got
        };
        let ((), got) = tokio::join!(serve(&service, accepted, peer), mail);
        (got, peer, local)
    }

    #[tokio::test]
    async fn the_header_goes_before_what_the_client_sent_early() {
        let (got, client, local) = received(ProxyProtocol::V1).await;
        assert_eq!(
            got,
            format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\nhello", client.port(), local.port())
        );
    }

    #[tokio::test]
    async fn off_forwards_the_clients_bytes_alone() {
        assert_eq!(received(ProxyProtocol::Off).await.0, "hello");
    }

    #[tokio::test]
    async fn a_client_that_resets_while_we_dial_ends_the_dial() {
        let (mut client, accepted, peer) = client().await;
        let service = service(Loopback(None), ProxyProtocol::V2);
        client.reset();
        drop(client);
        timeout(Duration::from_secs(20), serve(&service, accepted, peer)).await.expect("the dial goes on");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_only_ends_its_side_is_waited_for() {
        let (mut client, accepted, peer) = client().await;
        let service = service(Loopback(None), ProxyProtocol::V2);
        client.shutdown().await.unwrap();
        let started = Instant::now();
        serve(&service, accepted, peer).await;
        assert_eq!(started.elapsed().as_secs(), 60, "the whole connect time-out");
    }

    #[tokio::test]
    async fn a_reset_is_noticed_while_the_mailbox_takes_nothing() {
        let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = service(Loopback(Some(mailbox.local_addr().unwrap())), ProxyProtocol::V2);
        let (mut client, accepted, peer) = client().await;
        let serving = tokio::spawn(async move { serve(&service, accepted, peer).await });
        let (mut stalled, _) = mailbox.accept().await.unwrap();
        // Until every buffer on the way is full.
        while timeout(Duration::from_millis(200), client.write_all(&[0; 65536])).await.is_ok() {}
        client.reset();
        drop(client);
        timeout(Duration::from_secs(20), serving).await.expect("the reset goes unnoticed").unwrap();
        let mut rest = Vec::new();
        let end = stalled.read_to_end(&mut rest).await.map_err(|error| error.kind());
        assert_eq!(end, Err(io::ErrorKind::ConnectionReset));
    }

    #[tokio::test]
    async fn a_reset_after_the_clients_end_of_stream_is_noticed() {
        let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = service(Loopback(Some(mailbox.local_addr().unwrap())), ProxyProtocol::Off);
        let (mut client, accepted, peer) = client().await;
        let serving = tokio::spawn(async move { serve(&service, accepted, peer).await });
        let (mut waiting, _) = mailbox.accept().await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(waiting.read(&mut [0]).await.unwrap(), 0);
        client.reset();
        drop(client);
        timeout(Duration::from_secs(20), serving).await.expect("the reset goes unnoticed").unwrap();
    }

    #[tokio::test]
    async fn an_upstream_that_refuses_closes_the_client_in_order() {
        let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (mut client, accepted, peer) = client().await;
        serve(&service(Loopback(Some(unused)), ProxyProtocol::V2), accepted, peer).await;
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
