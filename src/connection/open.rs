//! The open connections, and what became of those that ended.
//!
//! Every accepted connection begins with [`ListenerConnections::enter`] and ends with its [`EndState`], which
//! is one log line and one count in the metrics. In between anybody may look.
//!
//! Invariants
//! - A connection is told and counted once, however it ends: one whose task is dropped, too.
//! - Log lines that repeat each other are held back and then counted: soon about connections that came
//!   to nothing, and late about sessions in which the mailbox has heard the client.
//! - Nothing here grows without bound: failures of a kind are one, and the last few kinds are kept.
//!
//! Deliberately not here: deciding how a connection ended (see `connection.rs`), and showing any of it
//! (see `admin.rs`).

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::info;

use crate::connection::counters::{Counters, ListenerCounters};
use crate::connection::end_state::EndState;
use crate::connection::limits::network_of;
use crate::support::repeats::Repeats;
use crate::support::wall_clock;
use crate::upstream::Server;

/// Kinds of failures that are kept to be shown.
const FAILURES: usize = 30;

/// How many times as many lines a minute a client's sessions have as what came to nothing: who has a
/// session has cost the mailbox something too, and is worth a line; but one byte must not be enough to
/// fill the log.
const OF_SESSIONS: u32 = 10;

/// Between two looks for lines that were held back.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

/// Every connection of this edge.
#[derive(Debug)]
pub struct Connections {
    ids: AtomicU64,
    open: Mutex<BTreeMap<u64, Open>>,
    failures: Mutex<VecDeque<Failure>>,
    dismissed: AtomicUsize,
    /// Counts since the start of the process, of every listener.
    pub counters: Counters,
    /// What is held back of the log: of connections that came to nothing, and of sessions, in which the
    /// mailbox has heard the client. The one cannot use up the other's lines.
    repeats: Repeats<Kind>,
    session_repeats: Repeats<Kind>,
}

/// A connection that is open.
#[derive(Clone, Debug)]
pub struct Open(Arc<Entry>);

/// The connections of one listener.
#[derive(Debug)]
pub struct ListenerConnections {
    all: Arc<Connections>,
    listener: Arc<str>,
    /// All its servers, for those who have met none.
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

/// How far a connection can have come, in words.
pub const STAGES: [&str; 3] = ["connecting", "held", "relaying"];

/// How far a connection has come.
#[derive(Clone, Debug)]
enum Stage {
    Connecting,
    Held,
    Relaying { server: Arc<Server>, connected: Duration },
}

/// A connection as long as it lasts. When it is dropped without an end, it was cut.
#[derive(Debug)]
pub struct Connection {
    entry: Arc<Entry>,
}

/// How a connection ended.
#[derive(Debug)]
pub struct Ended {
    /// In two letters.
    pub state: EndState,
    /// In words, without what to do about it.
    pub why: String,
}

impl Ended {
    /// Of a client that has as many connections as it may.
    pub fn client_limit() -> Ended {
        let why = "refused: this client has as many connections as max_connections_per_client allows";
        Ended { state: EndState::ClientLimit, why: why.to_owned() }
    }
}

/// What log lines have in common that repeat each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    listener: Arc<str>,
    state: EndState,
    /// Whose they are, unless many have the same reason.
    client: Option<IpAddr>,
}

/// A connection to be shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionView {
    /// Its number in the log.
    pub id: u64,
    /// The listener's name.
    pub listener: String,
    /// Who connected.
    pub client: SocketAddr,
    /// `connecting`, `held` or `relaying`.
    #[serde(default)]
    pub stage: String,
    /// The server it goes to, once that is known.
    pub upstream: Option<String>,
    /// The path that its packets take inside the tailnet, once that is known.
    pub path: Option<String>,
    /// Bytes to the mailbox.
    #[serde(default)]
    pub sent: u64,
    /// Bytes to the client.
    #[serde(default)]
    pub received: u64,
    /// How long it has lasted.
    #[serde(default)]
    pub seconds: u64,
}

/// Failures of a kind, to be shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// When the last one was.
    pub last: Timestamp,
    /// How many there were in a row.
    #[serde(default)]
    pub count: u64,
    /// The listener's name.
    #[serde(default)]
    pub listener: String,
    /// Where the client was to go.
    #[serde(default)]
    pub upstream: String,
    /// The last one's client.
    pub client: SocketAddr,
    /// In two letters.
    #[serde(default)]
    pub end: String,
    /// In words.
    #[serde(default)]
    pub why: String,
}

impl Connections {
    /// An empty one, which tells so many lines of a kind a minute; 0 for no limit.
    pub fn new(repeats_per_minute: u32) -> Arc<Connections> {
        Arc::new(Connections {
            ids: AtomicU64::new(1),
            open: Mutex::default(),
            failures: Mutex::default(),
            dismissed: AtomicUsize::new(0),
            counters: Counters::default(),
            repeats: Repeats::new(repeats_per_minute),
            session_repeats: Repeats::new(repeats_per_minute.saturating_mul(OF_SESSIONS)),
        })
    }

    /// Changes the limit on lines of a kind.
    pub fn set_repeats(&self, per_minute: u32) {
        self.repeats.set_limit(per_minute);
        self.session_repeats.set_limit(per_minute.saturating_mul(OF_SESSIONS));
    }

    /// Those of one listener; `upstream` is where it leads, in words.
    pub fn of_listener(self: &Arc<Self>, listener: &str, upstream: String) -> Arc<ListenerConnections> {
        let counters = self.counters.listener(listener);
        Arc::new(ListenerConnections { all: Arc::clone(self), listener: listener.into(), upstream, counters })
    }

    /// The connections there are now, the oldest first. Whatever is done with them, it does not keep
    /// others from coming and going.
    pub fn open(&self) -> Vec<Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// How many connections have ended because the edge is stopping, and were not cut.
    pub fn dismissed(&self) -> usize {
        self.dismissed.load(Ordering::Relaxed)
    }

    /// The last failures, the latest first.
    pub fn failures(&self) -> Vec<Failure> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Tells, for as long as it is not dropped, how many lines were held back.
    pub async fn keep_telling(&self) {
        loop {
            sleep(TELL_INTERVAL).await;
            self.tell_repeats(false);
        }
    }

    /// Strikes out every connection there is, for want of time, and tells what is left to tell;
    /// returns how many there were.
    pub fn cut(&self) -> usize {
        let open = self.open();
        for Open(entry) in &open {
            entry.of_listener.end(entry, &cut());
        }
        self.tell_repeats(true);
        open.len()
    }

    fn tell_repeats(&self, all: bool) {
        let of_sessions = self.session_repeats.take_over(all);
        for (kind, repeats) in self.repeats.take_over(all).into_iter().chain(of_sessions) {
            let Kind { listener, state: end, client } = kind;
            let client = client.map(tracing::field::display);
            info!(listener = &*listener, client, %end, repeats, "similar connections not logged: {}", end.meaning());
        }
    }

    fn note_failure(&self, failure: Failure) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let is_like = |old: &Failure| {
            (&old.listener, &old.end, &old.why) == (&failure.listener, &failure.end, &failure.why)
        };
        let before = failures.iter().position(is_like).and_then(|at| failures.remove(at));
        let count = failure.count + before.map_or(0, |before| before.count);
        failures.push_front(Failure { count, ..failure });
        failures.truncate(FAILURES);
    }
}

fn cut() -> Ended {
    let (state, why) = match std::thread::panicking() {
        true => (EndState::Internal, "error inside the edge"),
        false => (EndState::StoppedCut, "cut because the edge is stopping"),
    };
    Ended { state, why: why.to_owned() }
}

impl ListenerConnections {
    /// Those of all listeners.
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
        let first_byte = entry.first_byte.get().map(|at| *at - entry.accepted);
        all.counters.ended(&self.listener, ended.state);
        first_byte.inspect(|after| self.counters.first_byte.observe(after.as_secs_f64()));
        let (stage, upstream) = (entry.stage(), self.upstream_of(entry));
        if ended.state.is_failure() {
            all.note_failure(Failure {
                last: wall_clock::now(),
                count: 1,
                listener: self.listener.to_string(),
                upstream: upstream.clone(),
                client: entry.client,
                end: ended.state.to_string(),
                why: ended.why.clone(),
            });
        }
        let Some(repeats) = self.may_tell(entry, ended.state) else { return };
        let (connected, path) = match stage {
            Stage::Relaying { connected, server } => (Some(connected), server.path()),
            Stage::Connecting | Stage::Held => (None, None),
        };
        info!(
            id = entry.id,
            listener = &*self.listener,
            client = %entry.client,
            %upstream,
            path = path.map(|path| path.route.to_string()),
            sent = entry.sent.load(Ordering::Relaxed),
            received = entry.received.load(Ordering::Relaxed),
            connect_ms = connected.map(millis),
            first_byte_ms = first_byte.map(millis),
            total_ms = millis(entry.accepted.elapsed()),
            end = %ended.state,
            why = ended.why,
            repeats = (repeats > 0).then_some(repeats),
            "connection"
        );
    }

    /// Not when it repeats others. How many were held back before is told with it.
    fn may_tell(&self, entry: &Entry, state: EndState) -> Option<u64> {
        let of_many = Kind { listener: Arc::clone(&self.listener), state, client: None };
        let of_client = || Kind { client: Some(network_of(entry.client.ip())), ..of_many.clone() };
        if entry.sent.load(Ordering::Relaxed) > 0 {
            return self.all.session_repeats.may_tell(of_client(), of_many);
        }
        let kind = if state.is_failure() { of_many.clone() } else { of_client() };
        self.all.repeats.may_tell(kind, of_many)
    }

    fn upstream_of(&self, entry: &Entry) -> String {
        match entry.stage() {
            Stage::Relaying { server, .. } => server.to_string(),
            Stage::Connecting | Stage::Held => self.upstream.clone(),
        }
    }
}

impl Connection {
    /// Who connected.
    pub fn client(&self) -> SocketAddr {
        self.entry.client
    }

    /// When it was accepted, from which its times are counted.
    pub fn accepted(&self) -> Instant {
        self.entry.accepted
    }

    /// Notes that no server has it, or not any more.
    pub fn connecting(&self) {
        self.entry.set_stage(Stage::Connecting);
    }

    /// Notes that the client waits for a mailbox that cannot be reached.
    pub fn held(&self) {
        self.entry.set_stage(Stage::Held);
    }

    /// Whether the client waits so.
    pub fn is_held(&self) -> bool {
        matches!(self.entry.stage(), Stage::Held)
    }

    /// Notes that this server has the header; the dial that led there took so long.
    pub fn relaying(&self, server: &Arc<Server>, dial: Duration) {
        let connected = self.entry.accepted.elapsed();
        self.entry.of_listener.counters.dial.observe(dial.as_secs_f64());
        self.entry.set_stage(Stage::Relaying { server: Arc::clone(server), connected });
    }

    /// Notes bytes that have moved, to the mailbox and to the client. True when with them the
    /// mailbox has said its first word.
    pub fn moved(&self, sent: u64, received: u64) -> bool {
        let (entry, of_listener) = (&self.entry, &self.entry.of_listener);
        // Mostly it is one of them, and the listener's counters are shared by all of its connections.
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

    /// Strikes it out.
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

    /// As it is to be shown.
    pub fn view(&self) -> ConnectionView {
        let (stage, (sent, received)) = (self.0.stage(), self.bytes());
        let name = stage.name().to_owned();
        let server = match stage {
            Stage::Relaying { server, .. } => Some(server),
            Stage::Connecting | Stage::Held => None,
        };
        ConnectionView {
            id: self.0.id,
            listener: self.listener().to_owned(),
            client: self.client(),
            stage: name,
            path: server.as_ref().and_then(|server| server.path()).map(|path| path.route.to_string()),
            upstream: server.map(|server| server.to_string()),
            sent,
            received,
            seconds: self.0.accepted.elapsed().as_secs(),
        }
    }
}

/// Milliseconds with three digits, for people.
fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(connections: &Arc<Connections>, client: &str) -> Connection {
        connections.of_listener("smtp", "stalwart:25".into()).enter(client.parse().unwrap())
    }

    fn ended(state: EndState) -> Ended {
        Ended { state, why: "so it was".into() }
    }

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
            let _visit = connection;
            panic!("as this test wants it");
        });
        assert!(task.await.is_err());
        assert_eq!(connections.counters.count("smtp", EndState::Internal), 1);
        assert_eq!(connections.failures()[0].why, "error inside the edge");
    }

    #[tokio::test]
    async fn failures_of_a_kind_are_one_and_the_latest_comes_first() {
        let connections = Connections::new(0);
        for client in 1..=5 {
            connection(&connections, &format!("192.0.2.{client}:25")).end(&ended(EndState::HoldEnded));
        }
        connection(&connections, "192.0.2.9:25").end(&ended(EndState::ServerFailed));
        connection(&connections, "192.0.2.9:25").end(&ended(EndState::ClientClosed));
        connection(&connections, "192.0.2.6:25").end(&ended(EndState::HoldEnded));
        let told: Vec<_> =
            connections.failures().iter().map(|f| (f.end.clone(), f.count, f.client.to_string())).collect();
        let expected = [("sQ".into(), 6, "192.0.2.6:25".into()), ("SD".into(), 1, "192.0.2.9:25".into())];
        assert_eq!(told, expected);
        for kind in 0..100 {
            let why = format!("reason {kind}");
            connection(&connections, "192.0.2.6:25").end(&Ended { why, ..ended(EndState::ServerFailed) });
        }
        assert_eq!(connections.failures().len(), FAILURES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_one_client_leaves_the_lines_of_others() {
        let connections = Connections::new(3);
        let of_listener = connections.of_listener("smtp", "stalwart:25".into());
        let told = |client: &str, sent, state| {
            let connection = of_listener.enter(client.parse().unwrap());
            connection.moved(sent, 0);
            of_listener.may_tell(&connection.entry, state).is_some()
        };
        let flood = (0..100).filter(|_| told("[2001:db8::1]:25", 0, EndState::ClientFailed)).count();
        assert_eq!(flood, 3);
        assert!(!told("[2001:db8::2]:25", 0, EndState::ClientFailed), "of the same /64");
        assert!(told("[2001:db8::1]:25", 0, EndState::ClientClosed), "another kind");
        assert!(told("192.0.2.7:25", 0, EndState::ClientFailed), "another client");
        let sessions = (0..100).filter(|_| told("[2001:db8::1]:25", 1, EndState::ClientFailed)).count();
        assert_eq!(sessions, 30, "they have more lines, and an end");
        let outage = (1..100).filter(|n| told(&format!("192.0.2.{n}:25"), 0, EndState::HoldEnded)).count();
        assert_eq!(outage, 3, "one reason for all");
    }
}
