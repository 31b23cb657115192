//! It answers: where a listener's connections go, which server is tried when, and why none can be reached.
//!
//! [`dial`] is the interface to the network: the tailnet in production, anything that makes streams in tests.
//! [`Upstream::connect`] tries each server once, in the order of the configuration, and gives the reason for each
//! that could not be reached. If a server does not answer at all, it pings the peer to find the cause: an access
//! rule that denies a port drops the SYN, and not every peer reports that. [`Upstream::reconnect`] goes on trying
//! for clients that are held.
//!
//! Invariants
//! - A server is tried last if its probe calls it down, or if an attempt to reach it has just been slow. It is still
//!   tried: it may be up again, and the probe may be wrong.
//! - However many clients wait for a mailbox that cannot be reached, only one of them tries. When it succeeds, the
//!   others follow, a limited number at a time.
//! - Nothing is sent to a server here, so another attempt repeats nothing.
//!
//! Deliberately not here: how long a client waits and what it is told (see `connection.rs`). What decides whether
//! a server is up is in `health.rs` and `probe.rs`.

pub mod dial;
mod failure;
pub(crate) mod health;
pub(crate) mod peers;
pub mod probe;
mod server;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

use crate::protocol::advice;
use crate::support::repeats::Repeats;
use crate::tailnet::ConnectError;
use crate::upstream::dial::Dial;
use crate::upstream::peers::Peer;
use failure::FailureKind;
use server::Attempt;

pub use failure::{Failure, Silence, UpstreamError};
pub use server::Server;

/// How long a peer has to answer the ping that follows a silent connect.
const PING_LIMIT: Duration = Duration::from_secs(2);

/// How long a SYN may go unanswered before a second attempt is made beside the first, from another local port. A
/// userspace stack of the peer (tsnet, a tailscaled without TUN) may still have an old connection from the first
/// port, and then does not answer.
const SECOND_ATTEMPT: Duration = Duration::from_secs(2);

/// The first pause after a failed attempt for the held clients. Each further pause is twice as long, up to a limit
/// that clients hardly notice when the mailbox is back.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LAST: Duration = Duration::from_secs(2);

/// How long a client that cannot be held waits for the client that tries for all. A dial to a server that is back
/// takes less.
const TURN_LIMIT: Duration = Duration::from_secs(1);

/// How many held clients dial at once when their mailbox is back: it has just started, and its backlog is short
/// (100 in Postfix).
const RETURNING: usize = 64;

/// How many lines a minute say that no server can be reached, for each kind of reason: an upstream may come and
/// go.
const TOLD_PER_MINUTE: u32 = 3;

/// The mailbox's servers as one listener sees them, and how to reach them.
#[derive(Debug)]
pub struct Upstream<D> {
    dialler: Arc<D>,
    servers: Vec<Arc<Server>>,
    connect_timeout: Duration,
    /// Why no server could be reached at the last attempt; `None` while one can be reached.
    away: watch::Sender<Option<UpstreamError>>,
    /// What was logged about that, and how often.
    told: Repeats<Vec<FailureKind>>,
    is_told: AtomicBool,
    /// How often a server was reached: an attempt that began before the last success says nothing if it fails.
    successes: Arc<AtomicU64>,
    /// Held by the client that tries for all that wait.
    turn: Mutex<Turn>,
    returning: Semaphore,
}

/// A server that was reached.
#[derive(Debug)]
pub struct Reached<S> {
    /// The connection, to which nothing was written yet.
    pub stream: S,
    /// The server that took the connection.
    pub server: Arc<Server>,
    /// How long the successful attempt took, without the attempts before it.
    pub dial: Duration,
}

/// When to try again for the clients that wait.
#[derive(Debug)]
struct Turn {
    next: Instant,
    pause: Duration,
    /// The number of successes before this outage.
    successes: u64,
}

impl<D: Dial> Upstream<D> {
    /// The same port of one peer or several, in the order they are tried; nothing is dialled or looked up before
    /// the first connection.
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

    #[cfg(test)]
    pub(crate) fn dialler(&self) -> &D {
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

    /// As [`Upstream::away`], to be watched by code that does not know the dialler's type.
    pub fn watch_away(&self) -> watch::Receiver<Option<UpstreamError>> {
        self.away.subscribe()
    }

    /// How often a server was reached, for the same code.
    pub fn watch_successes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.successes)
    }

    /// Takes over the result of the last attempt to reach the same servers.
    pub fn continues(&self, before: &Upstream<D>) {
        self.successes.store(before.successes.load(Ordering::Relaxed), Ordering::Relaxed);
        self.away.send_replace(before.away());
        self.is_told.store(before.is_told.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Completes when no server could be reached at the last attempt.
    pub async fn until_away(&self) {
        // It fails only without a sender, and `self` holds the sender.
        let _ = self.away.subscribe().wait_for(Option::is_some).await;
    }

    /// Forgets what a probe has found: without probes all servers count as equal.
    pub fn unprobed(&self, server: &Server) {
        server.set_up(true);
    }

    /// Notes what a probe has found: a server that is down is tried last; if one is up, the clients that wait try
    /// at once.
    pub fn found(&self, server: &Server, up: bool) {
        server.set_up(up);
        if up {
            self.is_back();
        }
    }

    /// Connects to the first server that can be reached, or says why none can. Each server takes at most the
    /// connect time-out and, if it did not answer at all, up to four seconds more. Dropping the future gives up.
    pub async fn connect(&self) -> Result<Reached<D::Stream>, UpstreamError> {
        let successes = self.successes.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        let mut servers: Vec<&Arc<Server>> = self.servers.iter().collect();
        servers.sort_by_cached_key(|server| server.comes_last()); // stable sort: keeps the configured order
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
        let error = UpstreamError::new(failures);
        if self.successes.load(Ordering::Relaxed) == successes {
            self.is_gone(&error);
        }
        Err(error)
    }

    /// Notes that a server took the PROXY header for a command, and logs that with a remedy, but not for every
    /// connection.
    pub fn distrusted(&self, listener: &str, server: &Server) {
        if !server.distrusts() {
            return;
        }
        let advice = advice(&self.dialler.addresses());
        warn!(listener, upstream = %server, "the mailbox takes the PROXY header for a command, so mail cannot pass: {advice}");
    }

    /// Notes that a connection to a server failed after it was made.
    pub fn suspect(&self, server: &Server, failure: Failure) -> UpstreamError {
        server.failed(&failure);
        let is_unwanted = failure == Failure::Wordless && server.greeted_lately();
        let error = UpstreamError::new(vec![(server.to_string(), failure)]);
        if !is_unwanted {
            self.tell("connected, but unusable", &error);
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
            false // waiting clients are not woken just because the reason has changed
        });
    }

    /// Logs a warning, unless that was done too often; then false.
    fn tell(&self, what: &str, error: &UpstreamError) -> bool {
        let kinds = error.kinds(); // there are few kinds
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

    /// Connects as soon as a server can be reached. Of all clients that wait, only one tries, again and again with
    /// growing pauses; when it or a probe succeeds, the others try too. There is no time limit; dropping the
    /// future gives up, and then another client tries.
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
                        continue; // the mailbox went away again while this client waited
                    }
                    if let Ok(connected) = self.connect().await {
                        return connected;
                    }
                }
            }
        }
    }

    /// As [`Upstream::connect`]. If another client is trying for all, waits shortly for its success. The error is
    /// why no server could be reached.
    pub async fn connect_in_turn(&self) -> Result<Reached<D::Stream>, Option<UpstreamError>> {
        let Ok(mut turn) = timeout(TURN_LIMIT, self.turn.lock()).await else { return Err(self.away()) };
        let connected = self.connect().await;
        turn.took(connected.is_ok());
        connected.map_err(Some)
    }

    /// Completes when the last attempt was a success.
    async fn back(&self) {
        // The result holds a lock and must not outlive this line.
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

    /// Finds out why a port does not answer; one ping at a time.
    async fn silence(&self, server: &Server) -> Silence {
        server.silence(|| self.dialler.ping(server.host(), PING_LIMIT)).await
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
