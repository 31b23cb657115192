//! The open connections. Each begins with [`ListenerConnections::enter`] and ends with [`Connection::end`] or when
//! it is dropped; in between it can be listed.
//!
//! Deliberately not here: how an end is logged (see `ended.rs`), and how a connection is shown (see `view.rs`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::connection::counters::{Counters, ListenerCounters};
use crate::connection::end_state::EndState;
use crate::connection::ended::{End, Ended, FailureView, Failures, Lines, cut};
use crate::upstream::Server;

/// How often lines that were held back are looked for.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

/// Every connection of this edge.
#[derive(Debug)]
pub struct Connections {
    ids: AtomicU64,
    open: Mutex<BTreeMap<u64, Open>>,
    failures: Failures,
    dismissed: AtomicUsize,
    /// Counts since the start of the process, of every listener.
    pub counters: Counters,
    lines: Lines,
}

/// An open connection, to be listed.
#[derive(Clone, Debug)]
pub struct Open(Arc<Entry>);

/// The connections of one listener.
#[derive(Debug)]
pub struct ListenerConnections {
    all: Arc<Connections>,
    listener: Arc<str>,
    /// All its servers, in words; shown for connections that have no server yet.
    upstream: String,
    counters: ListenerCounters,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    of_listener: Arc<ListenerConnections>,
    client: SocketAddr,
    accepted: Instant,
    /// Bytes to the mailbox.
    sent: AtomicU64,
    /// Bytes to the client.
    received: AtomicU64,
    stage: Mutex<Stage>,
    /// When the mailbox's first byte came.
    first_byte: OnceLock<Instant>,
    ended: AtomicBool,
}

/// How far a connection has come, in words.
pub const STAGES: [&str; 3] = ["connecting", "held", "relaying"];

/// How far a connection has come.
#[derive(Clone, Debug)]
enum Stage {
    Connecting,
    Held,
    Relaying { server: Arc<Server>, connected: Duration },
}

/// The owner's handle of an open connection. If it is dropped without an end, the connection was cut.
#[derive(Debug)]
pub struct Connection {
    entry: Arc<Entry>,
}

impl Connections {
    /// No connections yet; at most this many similar log lines a minute, 0 for no limit.
    pub fn new(repeats_per_minute: u32) -> Arc<Connections> {
        Arc::new(Connections {
            ids: AtomicU64::new(1),
            open: Mutex::default(),
            failures: Failures::default(),
            dismissed: AtomicUsize::new(0),
            counters: Counters::default(),
            lines: Lines::new(repeats_per_minute),
        })
    }

    /// Changes the limit on similar log lines.
    pub fn set_repeats(&self, per_minute: u32) {
        self.lines.set_limit(per_minute);
    }

    /// The connections of one listener; `upstream` names its servers, in words.
    pub fn of_listener(self: &Arc<Self>, listener: &str, upstream: String) -> Arc<ListenerConnections> {
        let counters = self.counters.listener(listener);
        Arc::new(ListenerConnections { all: Arc::clone(self), listener: listener.into(), upstream, counters })
    }

    /// The connections there are now, the oldest first. The list is a copy, so connections can begin and end
    /// meanwhile.
    pub fn open(&self) -> Vec<Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// How many connections have ended because the edge is stopping, and were not cut.
    pub fn dismissed(&self) -> usize {
        self.dismissed.load(Ordering::Relaxed)
    }

    /// The last failures, the latest first.
    pub fn failures(&self) -> Vec<FailureView> {
        self.failures.list()
    }

    /// Logs, again and again, how many lines were held back. Runs until it is dropped.
    pub async fn keep_telling(&self) {
        loop {
            sleep(TELL_INTERVAL).await;
            self.lines.log_held_back(false);
        }
    }

    /// Ends every open connection as cut, since the drain time is over, and logs how many lines were held back;
    /// returns how many connections there were.
    pub fn cut(&self) -> usize {
        let open = self.open();
        for Open(entry) in &open {
            entry.of_listener.end(entry, &cut());
        }
        self.lines.log_held_back(true);
        open.len()
    }
}

impl ListenerConnections {
    /// The connections of all listeners.
    pub fn all(&self) -> &Arc<Connections> {
        &self.all
    }

    /// Enters a connection that was just accepted.
    pub fn enter(self: &Arc<Self>, client: SocketAddr) -> Connection {
        let entry = Arc::new(Entry {
            id: self.all.ids.fetch_add(1, Ordering::Relaxed),
            of_listener: Arc::clone(self),
            client,
            accepted: Instant::now(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            stage: Mutex::new(Stage::Connecting),
            first_byte: OnceLock::new(),
            ended: AtomicBool::new(false),
        });
        let mut open = self.all.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(entry.id, Open(Arc::clone(&entry)));
        Connection { entry }
    }

    fn end(&self, entry: &Entry, ended: &Ended) {
        if entry.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let all = &self.all;
        all.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&entry.id);
        if matches!(ended.state, EndState::StoppedQuiet | EndState::StoppedWaiting) {
            all.dismissed.fetch_add(1, Ordering::Relaxed);
        }
        let end = self.end_of(entry, ended);
        all.counters.ended(&self.listener, ended.state);
        end.first_byte.inspect(|after| self.counters.first_byte.observe(after.as_secs_f64()));
        all.failures.note(&end);
        all.lines.log(&end);
    }

    fn end_of<'a>(&'a self, entry: &Entry, ended: &'a Ended) -> End<'a> {
        let (server, connected) = match entry.stage() {
            Stage::Relaying { server, connected } => (Some(server), Some(connected)),
            Stage::Connecting | Stage::Held => (None, None),
        };
        End {
            id: entry.id,
            listener: &self.listener,
            client: entry.client,
            upstream: server.as_ref().map_or_else(|| self.upstream.clone(), |server| server.to_string()),
            path: server.and_then(|server| server.path()).map(|path| path.route.to_string()),
            sent: entry.sent.load(Ordering::Relaxed),
            received: entry.received.load(Ordering::Relaxed),
            connected,
            first_byte: entry.first_byte.get().map(|at| *at - entry.accepted),
            total: entry.accepted.elapsed(),
            ended,
        }
    }
}

impl Connection {
    /// Who connected.
    pub fn client(&self) -> SocketAddr {
        self.entry.client
    }

    /// When it was accepted. Its times are counted from here.
    pub fn accepted(&self) -> Instant {
        self.entry.accepted
    }

    /// Notes that it has no server, or no longer has one.
    pub fn connecting(&self) {
        self.entry.set_stage(Stage::Connecting);
    }

    /// Notes that the client waits for a mailbox that cannot be reached.
    pub fn held(&self) {
        self.entry.set_stage(Stage::Held);
    }

    /// Whether the client is held.
    pub fn is_held(&self) -> bool {
        matches!(self.entry.stage(), Stage::Held)
    }

    /// Notes that this server has the header, and how long the dial took.
    pub fn relaying(&self, server: &Arc<Server>, dial: Duration) {
        let connected = self.entry.accepted.elapsed();
        self.entry.of_listener.counters.dial.observe(dial.as_secs_f64());
        self.entry.set_stage(Stage::Relaying { server: Arc::clone(server), connected });
    }

    /// Notes bytes that have moved, to the mailbox and to the client. True if they hold the mailbox's first byte.
    pub fn moved(&self, sent: u64, received: u64) -> bool {
        let (entry, of_listener) = (&self.entry, &self.entry.of_listener);
        // Usually only one of the two has moved. The listener's counters are shared by all of its connections, so
        // they are left alone if nothing has changed.
        if sent > 0 {
            entry.sent.fetch_add(sent, Ordering::Relaxed);
            of_listener.counters.sent.inc_by(sent);
        }
        if received > 0 {
            entry.received.fetch_add(received, Ordering::Relaxed);
            of_listener.counters.received.inc_by(received);
        }
        received > 0 && entry.first_byte.get().is_none() && entry.first_byte.set(Instant::now()).is_ok()
    }

    /// Ends the connection: logs and counts it.
    pub fn end(self, ended: &Ended) {
        self.entry.of_listener.end(&self.entry, ended);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.entry.ended.load(Ordering::Relaxed) {
            self.entry.of_listener.end(&self.entry, &cut());
        }
    }
}

impl Entry {
    fn stage(&self) -> Stage {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_stage(&self, stage: Stage) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }
}

impl Stage {
    fn name(&self) -> &'static str {
        let [connecting, held, relaying] = STAGES;
        match self {
            Stage::Connecting => connecting,
            Stage::Held => held,
            Stage::Relaying { .. } => relaying,
        }
    }
}

impl Open {
    /// Its number in the log.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// How long it has lasted.
    pub fn age(&self) -> Duration {
        self.0.accepted.elapsed()
    }

    /// The server it goes to, once that has the header.
    pub fn server(&self) -> Option<Arc<Server>> {
        match self.0.stage() {
            Stage::Relaying { server, .. } => Some(server),
            Stage::Connecting | Stage::Held => None,
        }
    }

    /// The listener's name.
    pub fn listener(&self) -> &str {
        &self.0.of_listener.listener
    }

    /// Who connected.
    pub fn client(&self) -> SocketAddr {
        self.0.client
    }

    /// One of [`STAGES`].
    pub fn stage(&self) -> &'static str {
        self.0.stage().name()
    }

    /// Whether its client is held.
    pub fn is_held(&self) -> bool {
        matches!(self.0.stage(), Stage::Held)
    }

    /// Bytes to the mailbox, and to the client.
    pub fn bytes(&self) -> (u64, u64) {
        (self.0.sent.load(Ordering::Relaxed), self.0.received.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{connection, ended};

    #[tokio::test]
    async fn a_connection_shows_until_it_ends_and_is_counted_once() {
        let connections = Connections::new(0);
        let connection = connection(&connections, "192.0.2.7:4711");
        connection.moved(7, 0);
        connection.moved(0, 300);
        connection.held();
        let open = connections.open();
        let view = open.first().expect("one").view();
        assert_eq!((view.sent, view.received, &*view.stage, open.len()), (7, 300, "held", 1));
        connection.end(&ended(EndState::HoldEnded));
        assert_eq!(connections.open().len(), 0);
        assert_eq!(connections.counters.count("smtp", EndState::HoldEnded), 1);
        assert_eq!(
            connections.counters.count("smtp", EndState::StoppedCut),
            0,
            "not when it is dropped, too"
        );
    }

    #[tokio::test]
    async fn what_is_dropped_or_cut_is_counted_too() {
        let connections = Connections::new(0);
        drop(connection(&connections, "192.0.2.7:4711"));
        let left = connection(&connections, "192.0.2.7:4712");
        assert_eq!(connections.cut(), 1);
        drop(left);
        assert_eq!(connections.counters.count("smtp", EndState::StoppedCut), 2);
    }

    #[tokio::test]
    async fn what_ends_with_a_panic_is_an_error_of_ours() {
        let connections = Connections::new(0);
        let connection = connection(&connections, "192.0.2.7:4711");
        let task = tokio::spawn(async move {
            let _open = connection;
            panic!("as this test wants it");
        });
        assert!(task.await.is_err());
        assert_eq!(connections.counters.count("smtp", EndState::Internal), 1);
        assert_eq!(connections.failures()[0].why, "error inside the edge");
    }
}
