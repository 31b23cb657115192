//! One port of a peer, and what is known of it: whether it is up, and whether it has lately greeted clients.
//!
//! Deliberately not here: probing it (see `health.rs`), and in which order servers are tried (see `upstream.rs`).

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::Instant;

use crate::support::text::host_port;
use crate::tailnet::{ConnectError, PingReport};
use crate::upstream::peers::{Connected, Path, Peer};
use crate::upstream::{Failure, Silence};

/// How long the result of a ping is used for later connections too, so that many connections do not cause many
/// pings.
pub(super) const FINDING_LIFE: Duration = Duration::from_secs(10);

/// How long a server that did not answer, or closed before it sent anything, is tried last: one client has found
/// that out, and the others need not wait for it again.
pub(super) const DOUBT: Duration = Duration::from_secs(10);

/// How long a server counts as working after it has greeted a client or a probe. This is longer than the time
/// between probes; a probe comes at once if a server closes before it sent anything.
const WELL: Duration = Duration::from_secs(60);

/// How long a server counts as one that serves clients after it has greeted one. Small servers get few clients at
/// night, but many scanners.
const SERVED: Duration = Duration::from_secs(600);

/// How long an attempt may take before its server is doubted and tried last. A connection over a relay takes less.
const SLOW: Duration = Duration::from_secs(1);

/// The least time between two log lines that say that the same server does not trust the header.
const DISTRUST_INTERVAL: Duration = Duration::from_secs(600);

/// A port of a peer.
#[derive(Debug)]
pub struct Server {
    peer: Arc<Peer>,
    /// The port of `upstream_port`, 1 to 65535.
    pub port: u16,
    record: Mutex<Record>,
    /// Notified of each failed connection, so that the next probe comes at once.
    suspected: Notify,
    /// The last answer to "why is it silent", and when it was found.
    finding: AsyncMutex<Option<(Instant, Silence)>>,
}

/// What is known of a server.
#[derive(Debug)]
struct Record {
    up: bool,
    /// When it last made a client wait for nothing, unless it has worked since.
    doubted: Option<Instant>,
    /// When it last greeted a client or a probe.
    greeted: Option<Instant>,
    /// When it last greeted a client.
    greeted_client: Option<Instant>,
    /// When its distrust of the header was last logged.
    distrust_told: Option<Instant>,
}

fn is_within(at: Option<Instant>, span: Duration) -> bool {
    at.is_some_and(|at| at.elapsed() < span)
}

impl Server {
    pub(super) fn new(peer: Arc<Peer>, port: u16) -> Server {
        let record =
            Record { up: true, doubted: None, greeted: None, greeted_client: None, distrust_told: None };
        let (suspected, finding) = (Notify::new(), AsyncMutex::new(None));
        Server { peer, port, record: Mutex::new(record), suspected, finding }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer, as the configuration names it.
    pub fn host(&self) -> &str {
        &self.peer.host
    }

    /// Whether other servers are tried before it.
    pub(super) fn comes_last(&self) -> bool {
        let record = self.record();
        !record.up || is_within(record.doubted, DOUBT)
    }

    /// Whether it has lately made a client wait for nothing.
    #[cfg(test)]
    pub fn is_doubted(&self) -> bool {
        self.comes_last()
    }

    /// Notes whether the probe calls it up.
    pub(super) fn set_up(&self, up: bool) {
        self.record().up = up;
    }

    /// Notes a failure, for the probe and for the order of the next attempts.
    pub(super) fn failed(&self, failure: &Failure) {
        self.suspected.notify_one();
        // If it refuses one client, that is no reason to send other clients elsewhere.
        let is_ill = matches!(failure, Failure::Header(_))
            || (matches!(failure, Failure::Wordless) && !self.greeted_lately());
        if is_ill {
            self.doubt();
        }
    }

    fn doubt(&self) {
        self.record().doubted = Some(Instant::now());
    }

    /// Notes that it took the PROXY header for a command; true if that should be logged now, which is not so for
    /// every connection.
    pub(super) fn distrusts(&self) -> bool {
        self.suspected.notify_one();
        let mut record = self.record();
        let is_due = !is_within(record.distrust_told, DISTRUST_INTERVAL);
        if is_due {
            record.distrust_told = Some(Instant::now());
        }
        is_due
    }

    /// Notes that it greeted a client or a probe at `then`, perhaps a while ago, and so was working.
    pub fn greeted(&self, then: Instant) {
        let mut record = self.record();
        record.greeted = record.greeted.max(Some(then));
        record.doubted = record.doubted.filter(|doubted| *doubted > then);
    }

    /// Whether it has greeted a client or a probe since `then`.
    pub fn greeted_since(&self, then: Instant) -> bool {
        self.record().greeted > Some(then)
    }

    /// Notes that it greets a client at this moment.
    pub fn greets_client(&self) {
        let now = Instant::now();
        self.greeted(now);
        self.record().greeted_client = Some(now);
    }

    /// Whether it has lately greeted clients: if it does not greet one client then, the server has not failed but
    /// refused.
    pub fn serves_clients(&self) -> bool {
        is_within(self.record().greeted_client, SERVED)
    }

    /// Whether it has greeted a client or a probe so recently that it must be working.
    pub fn greeted_lately(&self) -> bool {
        is_within(self.record().greeted, WELL)
    }

    /// Counts a connection, so that the peer is watched while it lasts.
    pub fn connected(&self) -> Connected<'_> {
        self.peer.connected()
    }

    #[cfg(test)]
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Notes that bytes come from its peer at this moment.
    pub fn speaks(&self) {
        self.peer.speaks();
    }

    /// Whether its connections were reset a moment ago because the peer no longer answers.
    pub fn is_given_up(&self) -> bool {
        self.peer.is_given_up()
    }

    /// The last known path to the peer.
    pub fn path(&self) -> Option<Path> {
        self.peer.path()
    }

    /// Completes when a connection to it has failed since the last time.
    pub async fn suspected(&self) {
        self.suspected.notified().await;
    }

    /// Why it does not answer: from a ping a moment ago, or from a new one; one ping at a time.
    pub(super) async fn silence<P>(&self, ping: impl FnOnce() -> P) -> Silence
    where
        P: Future<Output = Result<PingReport, ConnectError>>,
    {
        let mut finding = self.finding.lock().await;
        if let Some((found, silence)) = &*finding
            && found.elapsed() < FINDING_LIFE
        {
            return silence.clone();
        }
        let silence = match ping().await {
            Ok(report) => Silence::of(&report),
            // Nothing was found out, so nothing is kept for others.
            Err(reason) => return Silence::Unknown(reason),
        };
        *finding = Some((Instant::now(), silence.clone()));
        silence
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&host_port(self.host(), self.port))
    }
}

/// An attempt to connect. When it ends, also because the client has left, a slow server is doubted.
pub(super) struct Attempt<'a> {
    pub(super) server: &'a Server,
    pub(super) began: Instant,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.began.elapsed() >= SLOW {
            self.server.doubt();
        }
    }
}
