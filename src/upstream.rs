//! Where a listener's connections go, and how long to try.
//!
//! [`dial`] is the seam to the network: the tailnet in production, anything that makes streams in
//! tests. [`Upstream::connect`] tries each server once, in the order of the configuration, and says
//! of each why it could not be reached; when one was met by silence it finds out what can be known:
//! an access rule that denies a port swallows the SYN, and not every peer says so.
//! [`Upstream::reconnect`] goes on trying for clients that are held.
//!
//! Invariants
//! - A server that its probe calls down, or that has just cost a client its time, is tried last,
//!   not never: it may be well again, and the probe may be wrong.
//! - However many clients wait for a mailbox that cannot be reached, one of them tries; when it
//!   succeeds, the others follow a few at a time.
//! - Nothing is ever sent here, so that trying again repeats nothing.
//!
//! Deliberately not here: how long a client waits (see `connection.rs`), and probing.

pub mod dial;
pub mod health;
pub mod peers;
pub mod probe;

use std::fmt;
use std::io;
use std::mem::Discriminant;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{Mutex, Notify, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

use crate::protocol::header_watch;
use crate::support::repeats::Repeats;
use crate::tailnet::{ConnectError, PingReport};
use crate::upstream::dial::Dial;
use crate::upstream::peers::{Connected, Path, Peer};

/// How long a peer has to answer the ping that follows a silent connect.
const PING_LIMIT: Duration = Duration::from_secs(2);

/// For how long what a ping found out is told to later connections too, so
/// that a flood of them does not become a flood of pings.
const FINDING_LIFE: Duration = Duration::from_secs(10);

/// For how long a server that answered with silence, or left without a word, is tried last: what
/// each client would have to wait for, one finds out.
const DOUBT: Duration = Duration::from_secs(10);

/// For how long a server that has greeted somebody counts as well: longer than probes are apart, which look
/// again at once when a client was left without a word.
const WELL: Duration = Duration::from_secs(60);

/// For how long a server that has greeted a client counts as one that serves clients: on a small machine
/// they are few at night, when scanners are not.
const SERVED: Duration = Duration::from_secs(600);

/// How long an attempt may take before its server is doubted. With another one at hand nobody has to
/// wait for it; a connection over a relay takes less.
const SLOW: Duration = Duration::from_secs(1);

/// How long a SYN may go unanswered before a second attempt is made beside the first, from another
/// port. A userspace stack at the other end (tsnet, a tailscaled without TUN) may keep an old
/// connection from the first one's port and answer nothing.
const SECOND_ATTEMPT: Duration = Duration::from_secs(2);

/// How long whoever tries for the held clients pauses after a failure: twice as long each time, and
/// never so long that a mailbox that is back waits noticeably.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LAST: Duration = Duration::from_secs(2);

/// How long a client that cannot be held waits for the one who tries: a dial to a server that is
/// back takes less.
const TURN_LIMIT: Duration = Duration::from_secs(1);

/// How many held clients dial at once when their mailbox is back: it has just started, and its
/// backlog is short (Postfix asks for 100).
const RETURNING: usize = 64;

/// Between two lines that tell of the same server's distrust.
const DISTRUST_INTERVAL: Duration = Duration::from_secs(600);

/// How often a minute it is told that no server can be reached, for each kind of reason: an upstream
/// may come and go.
const TOLD_PER_MINUTE: u32 = 3;

/// The mailbox's servers as one listener sees them, and how to reach them.
#[derive(Debug)]
pub struct Upstream<D> {
    dialler: Arc<D>,
    servers: Vec<Arc<Server>>,
    connect_timeout: Duration,
    /// Why no server could be reached at the last attempt; none while one can.
    away: watch::Sender<Option<UpstreamError>>,
    /// What was told of that, and how often.
    told: Repeats<Vec<FailureKind>>,
    is_told: AtomicBool,
    /// How often a server was reached: a failure that began before the last success is old news.
    successes: Arc<AtomicU64>,
    /// Held by the one who tries for all that wait.
    turn: Mutex<Turn>,
    returning: Semaphore,
}

/// A server that was reached.
#[derive(Debug)]
pub struct Reached<S> {
    /// The connection.
    pub stream: S,
    /// Where it leads.
    pub server: Arc<Server>,
    /// How long this attempt took, without those before it.
    pub dial: Duration,
}

/// A port of a peer.
#[derive(Debug)]
pub struct Server {
    peer: Arc<Peer>,
    /// The port.
    pub port: u16,
    up: AtomicBool,
    /// When it last cost a client its time, unless it was well since.
    doubted: std::sync::Mutex<Option<Instant>>,
    /// When it last greeted somebody, a client or a probe.
    greeted: std::sync::Mutex<Option<Instant>>,
    /// When it last greeted a client.
    greeted_client: std::sync::Mutex<Option<Instant>>,
    /// Told of each failure to connect, so that the probe need not wait for its next turn.
    suspected: Notify,
    /// The last answer to "why is it silent", and when it was found.
    finding: Mutex<Option<(Instant, Silence)>>,
    /// When it was last told that it does not take the header for what it is.
    distrust_told: std::sync::Mutex<Option<Instant>>,
}

/// When to try again for those who wait.
#[derive(Debug)]
struct Turn {
    next: Instant,
    pause: Duration,
    /// The successes before this outage.
    successes: u64,
}

/// Why no server of an upstream could be reached: each one's failure, in the order of the attempts.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub struct UpstreamError {
    failures: Vec<(String, Failure)>,
}

/// Why one server could not be reached.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Failure {
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
    /// The connection failed before the server had the header.
    #[error("cannot send it the PROXY header: {0}; check the mail server's log")]
    Header(io::ErrorKind),
    /// The server took the connection and ended it before either side had said a word.
    #[error(
        "the mail server closes the connection without a word; it may be starting, or it may not trust this edge's PROXY header: look into its log"
    )]
    Wordless,
}

/// What makes a failure another one: not its details.
type FailureKind = (Discriminant<Failure>, Option<ConnectError>);

impl Failure {
    fn kind(&self) -> FailureKind {
        let connect = match self {
            Failure::Connect(error) => Some(*error),
            Failure::Silent { .. } | Failure::Header(_) | Failure::Wordless => None,
        };
        (std::mem::discriminant(self), connect)
    }
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
    /// This edge reaches nobody, so that the silence says nothing.
    OwnNetwork,
    /// The peer could not even be asked.
    Unknown(ConnectError),
}

impl Silence {
    /// What a ping has found out.
    pub fn of(report: &PingReport) -> Silence {
        match (report.answered, report.network) {
            (true, _) => Silence::Port,
            (false, true) => Silence::Peer { online: report.online, last_seen: report.last_seen.clone() },
            (false, false) => Silence::OwnNetwork,
        }
    }
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
            Silence::OwnNetwork => {
                f.write_str("this edge does not even reach its control server; check the network of this machine")
            }
            Silence::Unknown(reason) => write!(f, "and now the peer cannot be asked: {reason}"),
        }
    }
}

impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(_, only)] = &self.failures[..] {
            return only.fmt(f);
        }
        for (index, (server, failure)) in self.failures.iter().enumerate() {
            write!(f, "{}{server}: {failure}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl UpstreamError {
    /// Of one server, for tests.
    #[cfg(test)]
    pub fn of(server: &str, failure: Failure) -> UpstreamError {
        UpstreamError { failures: vec![(server.to_owned(), failure)] }
    }

    /// Each server's failure, in the order of the attempts.
    pub fn failures(&self) -> impl Iterator<Item = &Failure> {
        self.failures.iter().map(|(_, failure)| failure)
    }

    /// Of what kind each failure is.
    fn kinds(&self) -> Vec<FailureKind> {
        self.failures().map(Failure::kind).collect()
    }

    /// What happened, without what to do about it.
    pub fn what(&self) -> String {
        let what = |failure: &Failure| failure.to_string().split(';').next().unwrap_or_default().to_owned();
        if let [(_, only)] = &self.failures[..] {
            return what(only);
        }
        let each: Vec<_> =
            self.failures.iter().map(|(server, failure)| format!("{server}: {}", what(failure))).collect();
        each.join(", ")
    }

    /// Whether the tailnet's policy denies every server's port.
    pub fn is_denied(&self) -> bool {
        self.failures().all(|failure| *failure == Failure::Connect(ConnectError::Denied))
    }

    /// Whether a server is to blame, and not this edge alone, which had no tailnet or no network.
    pub fn blames_a_server(&self) -> bool {
        self.failures().any(|failure| {
            !matches!(
                failure,
                Failure::Connect(ConnectError::NotRunning)
                    | Failure::Silent {
                        silence: Silence::OwnNetwork | Silence::Unknown(ConnectError::NotRunning),
                        ..
                    }
            )
        })
    }

    /// Whether waiting may help. A name that is our own is a mistake in the configuration.
    pub fn may_pass(&self) -> bool {
        self.failures.iter().any(|(_, failure)| *failure != Failure::Connect(ConnectError::IsSelf))
    }
}

impl Server {
    fn new(peer: Arc<Peer>, port: u16) -> Server {
        Server {
            peer,
            port,
            up: AtomicBool::new(true),
            doubted: std::sync::Mutex::new(None),
            greeted: std::sync::Mutex::new(None),
            greeted_client: std::sync::Mutex::new(None),
            suspected: Notify::new(),
            finding: Mutex::new(None),
            distrust_told: std::sync::Mutex::new(None),
        }
    }

    /// The peer, as the configuration names it.
    pub fn host(&self) -> &str {
        &self.peer.host
    }

    /// Whether others are to be tried before it.
    fn comes_last(&self) -> bool {
        let doubted = *self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
        !self.up.load(Ordering::Relaxed) || doubted.is_some_and(|at| at.elapsed() < DOUBT)
    }

    /// Whether it has lately cost a client its time.
    #[cfg(test)]
    pub fn is_doubted(&self) -> bool {
        self.comes_last()
    }

    /// Notes a failure, for the probe and for the order of the next attempts.
    fn failed(&self, failure: &Failure) {
        self.suspected.notify_one();
        // One client that it does not want is no reason to spare it others.
        let is_ill = matches!(failure, Failure::Header(_))
            || (matches!(failure, Failure::Wordless) && !self.greeted_lately());
        if is_ill {
            self.doubt();
        }
    }

    fn doubt(&self) {
        *self.doubted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Notes that it has greeted a client or a probe then, perhaps a while ago, and so was well.
    pub fn greeted(&self, then: Instant) {
        let mut greeted = self.greeted.lock().unwrap_or_else(PoisonError::into_inner);
        *greeted = Some(greeted.map_or(then, |last| last.max(then)));
        let mut doubted = self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
        *doubted = doubted.filter(|doubted| *doubted > then);
    }

    /// Whether it has greeted somebody, a client or a probe, since then.
    pub fn greeted_since(&self, then: Instant) -> bool {
        let greeted = *self.greeted.lock().unwrap_or_else(PoisonError::into_inner);
        greeted.is_some_and(|at| at > then)
    }

    /// Notes that it greets a client at this moment.
    pub fn greets_client(&self) {
        let now = Instant::now();
        self.greeted(now);
        *self.greeted_client.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Whether it serves clients, as far as can be known: one that it does not greet is not its failure then.
    pub fn serves_clients(&self) -> bool {
        let greeted = *self.greeted_client.lock().unwrap_or_else(PoisonError::into_inner);
        greeted.is_some_and(|at| at.elapsed() < SERVED)
    }

    /// Whether it has greeted somebody so short a while ago that it must be well.
    pub fn greeted_lately(&self) -> bool {
        let greeted = *self.greeted.lock().unwrap_or_else(PoisonError::into_inner);
        greeted.is_some_and(|at| at.elapsed() < WELL)
    }

    /// Has the peer watched while there is this connection to it.
    pub fn connected(&self) -> Connected<'_> {
        self.peer.connected()
    }

    /// The peer.
    #[cfg(test)]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Notes that bytes come from its peer at this moment.
    pub fn speaks(&self) {
        self.peer.speaks();
    }

    /// Whether its peer vanished a moment ago, so that its connections were reset.
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
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host().parse::<std::net::Ipv6Addr>() {
            Ok(v6) => write!(f, "[{v6}]:{}", self.port),
            Err(_) => write!(f, "{}:{}", self.host(), self.port),
        }
    }
}

impl<D: Dial> Upstream<D> {
    /// The same port of one peer or several, in the order they are tried; nothing is dialled or
    /// looked up yet.
    pub fn new(dialler: Arc<D>, peers: Vec<Arc<Peer>>, port: u16, connect_timeout: Duration) -> Upstream<D> {
        Upstream {
            dialler,
            servers: peers.into_iter().map(|peer| Arc::new(Server::new(peer, port))).collect(),
            connect_timeout,
            away: watch::Sender::new(None),
            told: Repeats::new(TOLD_PER_MINUTE),
            is_told: AtomicBool::new(false),
            successes: Arc::default(),
            turn: Mutex::new(Turn::new(0)),
            returning: Semaphore::new(RETURNING),
        }
    }

    /// What it dials with.
    #[cfg(test)]
    pub fn dialler(&self) -> &D {
        &self.dialler
    }

    /// Its servers, in their order.
    pub fn servers(&self) -> &[Arc<Server>] {
        &self.servers
    }

    /// Whether no server could be reached at the last attempt.
    pub fn is_away(&self) -> bool {
        self.away.borrow().is_some()
    }

    /// Why no server could be reached at the last attempt; `None` while one can.
    pub fn away(&self) -> Option<UpstreamError> {
        self.away.borrow().clone()
    }

    /// As [`Upstream::away`], for somebody who does not know how it is dialled.
    pub fn watch_away(&self) -> watch::Receiver<Option<UpstreamError>> {
        self.away.subscribe()
    }

    /// How often a server was reached, for the same.
    pub fn watch_successes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.successes)
    }

    /// Takes over what came of the last attempt to reach the same servers.
    pub fn continues(&self, before: &Upstream<D>) {
        self.successes.store(before.successes.load(Ordering::Relaxed), Ordering::Relaxed);
        self.away.send_replace(before.away());
        self.is_told.store(before.is_told.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Whether the other one has the same servers.
    pub fn is_like(&self, other: &Upstream<D>) -> bool {
        let servers = |upstream: &Upstream<D>| -> Vec<(String, u16)> {
            upstream.servers.iter().map(|server| (server.host().to_owned(), server.port)).collect()
        };
        servers(self) == servers(other)
    }

    /// Completes when no server could be reached at the last attempt.
    pub async fn until_away(&self) {
        // It fails only when there is no sender, which is here.
        let _ = self.away.subscribe().wait_for(Option::is_some).await;
    }

    /// Forgets what a probe has found: without probes every server is as good as another.
    pub fn unprobed(&self, server: &Server) {
        server.up.store(true, Ordering::Relaxed);
    }

    /// Notes what a probe has found: a server that is down is tried last, and one that is up is
    /// worth an attempt by those who wait.
    pub fn found(&self, server: &Server, up: bool) {
        server.up.store(up, Ordering::Relaxed);
        if up {
            self.is_back();
        }
    }

    /// Connects to the first server that can be reached, or says why none can: for each server
    /// within the connect time-out and, after a silence, up to four seconds more. Dropping the future
    /// gives up.
    pub async fn connect(&self) -> Result<Reached<D::Stream>, UpstreamError> {
        let successes = self.successes.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        let mut servers: Vec<&Arc<Server>> = self.servers.iter().collect();
        servers.sort_by_cached_key(|server| server.comes_last()); // keeps their order
        for server in servers {
            let began = Instant::now();
            match self.connect_to(server).await {
                Ok(stream) => {
                    self.is_back();
                    return Ok(Reached { stream, server: Arc::clone(server), dial: began.elapsed() });
                }
                Err(failure) => {
                    server.failed(&failure);
                    failures.push((server.to_string(), failure));
                }
            }
        }
        let error = UpstreamError { failures };
        if self.successes.load(Ordering::Relaxed) == successes {
            self.is_gone(&error);
        }
        Err(error)
    }

    /// Notes that a server took the PROXY header for a command, and says so with what to do about
    /// it; not with every connection.
    pub fn distrusted(&self, listener: &str, server: &Server) {
        server.suspected.notify_one();
        let mut told = server.distrust_told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_some_and(|at| at.elapsed() < DISTRUST_INTERVAL) {
            return;
        }
        *told = Some(Instant::now());
        let advice = header_watch::advice(&self.dialler.addresses());
        warn!(listener, upstream = %server, "the mailbox takes the PROXY header for a command, so mail cannot pass: {advice}");
    }

    /// Notes that a connection to a server failed after it was made.
    pub fn suspect(&self, server: &Server, failure: Failure) -> UpstreamError {
        server.failed(&failure);
        let is_unwanted = failure == Failure::Wordless && server.greeted_lately();
        let error = UpstreamError { failures: vec![(server.to_string(), failure)] };
        if !is_unwanted {
            self.tell("was reached, but is of no use", &error);
        }
        error
    }

    fn is_gone(&self, error: &UpstreamError) {
        self.away.send_if_modified(|away| {
            if away.as_ref().is_none_or(|before| before.kinds() != error.kinds())
                && self.tell("cannot be reached", error)
            {
                self.is_told.store(true, Ordering::Relaxed);
            }
            *away = Some(error.clone());
            false // those who wait are not woken for another reason to wait
        });
    }

    /// Warns, unless that was done often enough; false then.
    fn tell(&self, what: &str, error: &UpstreamError) -> bool {
        let kinds = error.kinds(); // of which there are few
        let Some(repeats) = self.told.may_tell(kinds.clone(), kinds) else { return false };
        warn!(upstream = %self, repeats = (repeats > 0).then_some(repeats), "{what}: {error}");
        true
    }

    fn is_back(&self) {
        self.successes.fetch_add(1, Ordering::Relaxed);
        let was_away = self.away.send_if_modified(|away| away.take().is_some());
        if was_away && self.is_told.swap(false, Ordering::Relaxed) {
            info!(upstream = %self, "reached again");
        }
    }

    /// Connects as soon as a server can be reached. Of all who wait, one tries, again and again with
    /// growing pauses; when it succeeds, or a probe does, the others try too. It has no time limit;
    /// dropping the future gives up, and another one tries on.
    pub async fn reconnect(&self) -> Reached<D::Stream> {
        loop {
            tokio::select! {
                mut turn = self.turn.lock() => {
                    turn.begin(self.successes.load(Ordering::Relaxed));
                    let _ = timeout_at(turn.next, self.back()).await;
                    let connected = self.connect().await;
                    turn.took(connected.is_ok());
                    if let Ok(connected) = connected {
                        return connected;
                    }
                }
                () = self.back() => {
                    let _few = self.returning.acquire().await;
                    if self.is_away() {
                        continue; // again, while this one waited
                    }
                    if let Ok(connected) = self.connect().await {
                        return connected;
                    }
                }
            }
        }
    }

    /// As [`Upstream::connect`], unless another one is trying for those who wait and has no success
    /// soon: then, or if it fails, the reason why no server could be reached.
    pub async fn connect_in_turn(&self) -> Result<Reached<D::Stream>, Option<UpstreamError>> {
        let Ok(mut turn) = timeout(TURN_LIMIT, self.turn.lock()).await else { return Err(self.away()) };
        let connected = self.connect().await;
        turn.took(connected.is_ok());
        connected.map_err(Some)
    }

    /// Completes when the last attempt was a success.
    async fn back(&self) {
        // What it returns is a lock, and must not outlive this line.
        let _ = self.away.subscribe().wait_for(Option::is_none).await;
    }

    async fn connect_to(&self, server: &Server) -> Result<D::Stream, Failure> {
        let attempt = Attempt { server, began: Instant::now() };
        let dialled = timeout(self.connect_timeout, self.dial_twice(server)).await;
        drop(attempt);
        match dialled {
            Ok(Err(ConnectError::TimedOut)) | Err(_) => {
                Err(Failure::Silent { limit: self.connect_timeout, silence: self.silence(server).await })
            }
            Ok(outcome) => outcome.map_err(Failure::Connect),
        }
    }

    async fn dial_twice(&self, server: &Server) -> Result<D::Stream, ConnectError> {
        let mut first = std::pin::pin!(self.dialler.dial(server.host(), server.port));
        tokio::select! {
            answer = &mut first => return answer,
            () = sleep(SECOND_ATTEMPT) => {}
        }
        tokio::select! {
            answer = &mut first => answer,
            answer = self.dialler.dial(server.host(), server.port) => answer,
        }
    }

    /// Finds out what is behind a silent port; one ping at a time.
    async fn silence(&self, server: &Server) -> Silence {
        let mut finding = server.finding.lock().await;
        if let Some((found, silence)) = &*finding
            && found.elapsed() < FINDING_LIFE
        {
            return silence.clone();
        }
        let silence = match self.dialler.ping(server.host(), PING_LIMIT).await {
            Ok(report) => Silence::of(&report),
            // Nothing was found out, so there is nothing to tell others.
            Err(reason) => return Silence::Unknown(reason),
        };
        *finding = Some((Instant::now(), silence.clone()));
        silence
    }
}

/// An attempt to connect. When it ends, also because a client has lost its patience, a server that
/// took its time is doubted.
struct Attempt<'a> {
    server: &'a Server,
    began: Instant,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.began.elapsed() >= SLOW {
            self.server.doubt();
        }
    }
}

impl Turn {
    fn new(successes: u64) -> Turn {
        Turn { next: Instant::now(), pause: PAUSE_FIRST, successes }
    }

    /// Forgets the pauses of an earlier outage.
    fn begin(&mut self, successes: u64) {
        if self.successes != successes {
            *self = Turn::new(successes);
        }
    }

    /// Notes an attempt that just ended.
    fn took(&mut self, success: bool) {
        if success {
            *self = Turn::new(self.successes);
        } else {
            self.next = Instant::now() + self.pause;
            self.pause = (self.pause * 2).min(PAUSE_LAST);
        }
    }
}

impl<D> fmt::Display for Upstream<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, server) in self.servers.iter().enumerate() {
            write!(f, "{}{server}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
