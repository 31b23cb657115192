//! The end of a connection: one log line, one count in the metrics, and, for a failure, an entry in the list of
//! last failures.
//!
//! Invariants
//! - A connection is logged and counted once, however it ends, also if its task is dropped.
//! - Similar log lines are held back and counted. The limit is low for connections that came to nothing, and
//!   higher for sessions in which the mailbox received something from the client.
//! - Memory is bounded: failures of one kind share one entry, and only the last kinds are kept.
//!
//! Deliberately not here: deciding how a connection ended (see `connection.rs`).

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tracing::info;

use super::end_state::EndState;
use super::limits::network_of;
use crate::support::repeats::Repeats;
use crate::support::wall_clock;

/// How many kinds of failures are kept to be shown.
const FAILURES: usize = 30;

/// Log lines a minute for a client's sessions, as a multiple of those for connections that came to nothing. A
/// session is worth a line, since it used the mailbox; but sending one byte must not be enough to fill the log.
const OF_SESSIONS: u32 = 10;

/// How a connection ended.
#[derive(Debug)]
pub struct Ended {
    /// The end state, shown as two letters.
    pub state: EndState,
    /// The reason in words, without a remedy.
    pub why: String,
}

impl Ended {
    /// For a client at `max_connections_per_client`.
    pub fn client_limit() -> Ended {
        let why = "refused: this client has as many connections as max_connections_per_client allows";
        Ended { state: EndState::ClientLimit, why: why.to_owned() }
    }
}

/// What similar log lines have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct LineKind {
    listener: Arc<str>,
    state: EndState,
    /// The client; none where many clients share the reason.
    client: Option<IpAddr>,
}

/// For a connection whose task was dropped.
pub(super) fn cut() -> Ended {
    let (state, why) = match std::thread::panicking() {
        true => (EndState::Internal, "error inside the edge"),
        false => (EndState::StoppedCut, "cut because the edge is stopping"),
    };
    Ended { state, why: why.to_owned() }
}

/// A connection that has ended, and how.
pub(super) struct End<'a> {
    pub id: u64,
    pub listener: &'a Arc<str>,
    pub client: SocketAddr,
    pub upstream: String,
    /// The path that its packets took inside the tailnet, in words.
    pub path: Option<String>,
    /// Bytes to the mailbox.
    pub sent: u64,
    /// Bytes to the client.
    pub received: u64,
    /// From accept to the header.
    pub connected: Option<Duration>,
    /// From accept to the mailbox's first byte.
    pub first_byte: Option<Duration>,
    /// From accept to the end.
    pub total: Duration,
    pub ended: &'a Ended,
}

/// Failures of a kind, to be shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailureView {
    /// When the last one was.
    pub last: Timestamp,
    /// How many there were since this kind is in the list.
    #[serde(default)]
    pub count: u64,
    /// The listener's name.
    #[serde(default)]
    pub listener: String,
    /// The server that the client was meant for.
    #[serde(default)]
    pub upstream: String,
    /// The last one's client.
    pub client: SocketAddr,
    /// The end state, in two letters.
    #[serde(default)]
    pub end: String,
    /// The reason, in words.
    #[serde(default)]
    pub why: String,
}

/// The last failures.
#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<VecDeque<FailureView>>);

impl Failures {
    /// Notes an end that is a failure, with those before it of the same kind.
    pub fn note(&self, end: &End) {
        let Ended { state, why } = end.ended;
        if !state.is_failure() {
            return;
        }
        let (listener, state) = (end.listener.to_string(), state.to_string());
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_like = |old: &FailureView| (&old.listener, &old.end, &old.why) == (&listener, &state, why);
        let before = failures.iter().position(is_like).and_then(|at| failures.remove(at));
        failures.push_front(FailureView {
            last: wall_clock::now(),
            count: 1 + before.map_or(0, |before| before.count),
            listener,
            upstream: end.upstream.clone(),
            client: end.client,
            end: state,
            why: why.clone(),
        });
        failures.truncate(FAILURES);
    }

    /// The latest first.
    pub fn list(&self) -> Vec<FailureView> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// The log lines of connections. Those that came to nothing and sessions, in which the mailbox received something,
/// have limits of their own.
#[derive(Debug)]
pub(super) struct Lines {
    to_nothing: Repeats<LineKind>,
    sessions: Repeats<LineKind>,
}

impl Lines {
    /// With so many similar lines a minute; 0 for no limit.
    pub fn new(per_minute: u32) -> Lines {
        let sessions = per_minute.saturating_mul(OF_SESSIONS);
        Lines { to_nothing: Repeats::new(per_minute), sessions: Repeats::new(sessions) }
    }

    /// Changes the limit.
    pub fn set_limit(&self, per_minute: u32) {
        self.to_nothing.set_limit(per_minute);
        self.sessions.set_limit(per_minute.saturating_mul(OF_SESSIONS));
    }

    /// Logs the end of a connection, unless it is one similar line too many.
    pub fn log(&self, end: &End) {
        let Some(repeats) = self.may_log(end) else { return };
        info!(
            id = end.id,
            listener = &**end.listener,
            client = %end.client,
            upstream = %end.upstream,
            path = end.path,
            sent = end.sent,
            received = end.received,
            connect_ms = end.connected.map(millis),
            first_byte_ms = end.first_byte.map(millis),
            total_ms = millis(end.total),
            end = %end.ended.state,
            why = end.ended.why,
            repeats = (repeats > 0).then_some(repeats),
            "connection"
        );
    }

    /// Whether this end is logged, and how many similar lines were held back before; `None` holds it back.
    fn may_log(&self, end: &End) -> Option<u64> {
        let state = end.ended.state;
        let of_many = LineKind { listener: Arc::clone(end.listener), state, client: None };
        let of_client = || LineKind { client: Some(network_of(end.client.ip())), ..of_many.clone() };
        if end.sent > 0 {
            return self.sessions.may_tell(of_client(), of_many);
        }
        let kind = if state.is_failure() { of_many.clone() } else { of_client() };
        self.to_nothing.may_tell(kind, of_many)
    }

    /// Logs how many lines were held back: of kinds that are over, or of `all`.
    pub fn log_held_back(&self, all: bool) {
        let of_sessions = self.sessions.take_over(all);
        for (kind, repeats) in self.to_nothing.take_over(all).into_iter().chain(of_sessions) {
            let LineKind { listener, state: end, client } = kind;
            let client = client.map(tracing::field::display);
            info!(listener = &*listener, client, %end, repeats, "similar connections not logged: {}", end.meaning());
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
    use crate::connection::open::Connections;
    use crate::test_support::{connection, ended};

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
        let (lines, listener) = (Lines::new(3), Arc::from("smtp"));
        let told = |client: &str, sent, state| {
            let ended = ended(state);
            let end = End {
                id: 1,
                listener: &listener,
                client: client.parse().unwrap(),
                upstream: "stalwart:25".into(),
                path: None,
                sent,
                received: 0,
                connected: None,
                first_byte: None,
                total: Duration::ZERO,
                ended: &ended,
            };
            lines.may_log(&end).is_some()
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
