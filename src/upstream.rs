//! Where a listener's connections go, and how long to try.
//!
//! [`Dial`] is the seam to the network: the tailnet in production, anything
//! that makes streams in tests. [`Upstream::connect`] bounds an attempt and,
//! when it was met by silence, finds out what can be known: an access rule
//! that denies a port has no error on a tailnet, it swallows the SYN.
//!
//! One attempt is made; there is no retry, no failover and no health check
//! here.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::relay::Reset;
use crate::tailnet::{ConnectError, Node, PingReport, TailnetStream};

/// How long a peer has to answer the ping that follows a silent connect.
const PING_LIMIT: Duration = Duration::from_secs(2);

/// For how long what a ping found out is told to later connections too, so
/// that a flood of them does not become a flood of pings.
const FINDING_LIFE: Duration = Duration::from_secs(10);

/// Makes connections to peers.
pub trait Dial: Send + Sync + 'static {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Reset + Unpin + Send;

    /// Connects to a port of a peer. Dropping the future gives up and frees
    /// everything; it has no time limit of its own.
    fn dial(&self, host: &str, port: u16) -> impl Future<Output = Result<Self::Stream, ConnectError>> + Send;

    /// Looks for a sign of life of a peer for up to `limit`.
    fn ping(
        &self,
        host: &str,
        limit: Duration,
    ) -> impl Future<Output = Result<PingReport, ConnectError>> + Send;
}

impl Dial for Node {
    type Stream = TailnetStream;

    async fn dial(&self, host: &str, port: u16) -> Result<TailnetStream, ConnectError> {
        self.connect(host, port).await
    }

    async fn ping(&self, host: &str, limit: Duration) -> Result<PingReport, ConnectError> {
        Node::ping(self, host, limit).await
    }
}

/// A port of a peer, and how to reach it.
#[derive(Debug)]
pub struct Upstream<D> {
    dialler: Arc<D>,
    host: String,
    port: u16,
    connect_timeout: Duration,
    /// The last answer to "why is it silent", and when it was found.
    finding: Mutex<Option<(Instant, Silence)>>,
}

/// Why an upstream could not be reached.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum UpstreamError {
    /// The attempt ended with an answer.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The attempt was met by silence.
    #[error("no answer within {limit:?}: {silence}")]
    Silent {
        /// The connect time-out.
        limit: Duration,
        /// What a ping found out afterwards.
        silence: Silence,
    },
}

/// What is behind a silent port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The peer answers a ping: something between drops the port.
    Port,
    /// The peer does not answer either.
    Peer {
        /// Whether the control server sees it.
        online: bool,
        /// When it last did, if it does not (RFC 3339), else empty.
        last_seen: String,
    },
    /// The peer could not even be asked.
    Unknown(ConnectError),
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Silence::Port => f.write_str(
                "the peer itself answers a ping, so an access rule of the tailnet or a firewall on the peer drops this port; \
                 allow it in the policy's grants",
            ),
            Silence::Peer { online: true, .. } => {
                f.write_str("nor does the peer answer a ping, although the control server sees it; check its network")
            }
            Silence::Peer { online: false, last_seen } if last_seen.is_empty() => {
                f.write_str("the peer is offline; start it or its Tailscale")
            }
            Silence::Peer { online: false, last_seen } => {
                write!(f, "the peer is offline, last seen {last_seen}; start it or its Tailscale")
            }
            Silence::Unknown(reason) => write!(f, "and now the peer cannot be asked: {reason}"),
        }
    }
}

impl<D: Dial> Upstream<D> {
    /// A port of a peer; nothing is dialled or looked up yet.
    pub fn new(dialler: Arc<D>, host: String, port: u16, connect_timeout: Duration) -> Upstream<D> {
        Upstream { dialler, host, port, connect_timeout, finding: Mutex::new(None) }
    }

    /// Connects, or says why not, within the connect time-out and, after a
    /// silence, two seconds more. Dropping the future gives up.
    pub async fn connect(&self) -> Result<D::Stream, UpstreamError> {
        match timeout(self.connect_timeout, self.dialler.dial(&self.host, self.port)).await {
            Ok(Err(ConnectError::TimedOut)) | Err(_) => {
                Err(UpstreamError::Silent { limit: self.connect_timeout, silence: self.silence().await })
            }
            Ok(outcome) => outcome.map_err(UpstreamError::Connect),
        }
    }

    /// Finds out what is behind a silent port; one ping at a time.
    async fn silence(&self) -> Silence {
        let mut finding = self.finding.lock().await;
        if let Some((found, silence)) = &*finding
            && found.elapsed() < FINDING_LIFE
        {
            return silence.clone();
        }
        let silence = match self.dialler.ping(&self.host, PING_LIMIT).await {
            Ok(report) if report.answered => Silence::Port,
            Ok(report) => Silence::Peer { online: report.online, last_seen: report.last_seen },
            // Nothing was found out, so there is nothing to tell others.
            Err(reason) => return Silence::Unknown(reason),
        };
        *finding = Some((Instant::now(), silence.clone()));
        silence
    }
}

impl<D> fmt::Display for Upstream<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.parse::<std::net::Ipv6Addr>() {
            Ok(v6) => write!(f, "[{v6}]:{}", self.port),
            Err(_) => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::TcpStream;

    use super::*;

    /// Never connects; answers a ping with what it is given, after a second.
    struct Silent {
        ping: Result<PingReport, ConnectError>,
        pings: AtomicUsize,
    }

    impl Dial for Silent {
        type Stream = TcpStream;

        async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
            pending().await
        }

        async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
            self.pings.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.ping.clone()
        }
    }

    fn report(answered: bool, online: bool, last_seen: &str) -> PingReport {
        let (direct, relay, last_seen) = (String::new(), String::new(), last_seen.to_owned());
        PingReport { ip: [100, 64, 0, 1].into(), answered, latency_ms: 1.0, direct, relay, online, last_seen }
    }

    fn silent(ping: Result<PingReport, ConnectError>) -> (Arc<Silent>, Upstream<Silent>) {
        let dialler = Arc::new(Silent { ping, pings: AtomicUsize::new(0) });
        let upstream = Upstream::new(Arc::clone(&dialler), "stalwart".into(), 25, Duration::from_secs(5));
        (dialler, upstream)
    }

    async fn message(ping: Result<PingReport, ConnectError>) -> String {
        silent(ping).1.connect().await.unwrap_err().to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_port_is_told_from_a_silent_peer() {
        let port = message(Ok(report(true, true, ""))).await;
        assert!(
            port.starts_with("no answer within 5s: the peer itself answers a ping, so an access rule"),
            "{port}"
        );
        let peer = message(Ok(report(false, true, ""))).await;
        assert!(peer.contains("although the control server sees it"), "{peer}");
        let offline = message(Ok(report(false, false, "2026-01-02T03:04:05Z"))).await;
        assert!(offline.contains("the peer is offline, last seen 2026-01-02T03:04:05Z;"), "{offline}");
        let never_seen = message(Ok(report(false, false, ""))).await;
        assert!(never_seen.contains("the peer is offline; start it"), "{never_seen}");
        let gone = message(Err(ConnectError::NoSuchPeer)).await;
        assert!(
            gone.contains("and now the peer cannot be asked: the tailnet shows this edge no peer"),
            "{gone}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_connections_is_one_ping_and_each_waits_its_limit() {
        let (dialler, upstream) = silent(Ok(report(false, false, "")));
        let upstream = Arc::new(upstream);
        let started = Instant::now();
        let mut flood = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let upstream = Arc::clone(&upstream);
            flood.spawn(async move { upstream.connect().await.is_err() });
        }
        assert!(flood.join_all().await.into_iter().all(|failed| failed));
        assert_eq!(started.elapsed().as_secs(), 6, "5 s to connect and 1 s for the ping");
        assert_eq!(dialler.pings.load(Ordering::Relaxed), 1);
        tokio::time::advance(FINDING_LIFE).await;
        upstream.connect().await.unwrap_err();
        assert_eq!(dialler.pings.load(Ordering::Relaxed), 2, "an old finding is not told");
    }

    #[test]
    fn an_upstream_is_written_as_people_write_it() {
        for (host, expected) in
            [("stalwart", "stalwart:25"), ("100.64.0.1", "100.64.0.1:25"), ("fd7a::1", "[fd7a::1]:25")]
        {
            let (dialler, _) = silent(Err(ConnectError::NoSuchPeer));
            let upstream = Upstream::new(dialler, host.into(), 25, Duration::from_secs(5));
            assert_eq!(upstream.to_string(), expected);
        }
    }
}
