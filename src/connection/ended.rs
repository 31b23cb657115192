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

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::info;

use super::end_state::EndState;
use super::limits::network_of;
use super::open::{Connections, Entry, ListenerConnections, Stage};
use super::view::FailureView;
use crate::support::wall_clock;

/// How many kinds of failures are kept to be shown.
pub(super) const FAILURES: usize = 30;

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
pub struct LineKind {
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

impl Connections {
    pub(super) fn tell_repeats(&self, all: bool) {
        let of_sessions = self.session_repeats.take_over(all);
        for (kind, repeats) in self.repeats.take_over(all).into_iter().chain(of_sessions) {
            let LineKind { listener, state: end, client } = kind;
            let client = client.map(tracing::field::display);
            info!(listener = &*listener, client, %end, repeats, "similar connections not logged: {}", end.meaning());
        }
    }

    fn note_failure(&self, failure: FailureView) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let is_like = |old: &FailureView| {
            (&old.listener, &old.end, &old.why) == (&failure.listener, &failure.end, &failure.why)
        };
        let before = failures.iter().position(is_like).and_then(|at| failures.remove(at));
        let count = failure.count + before.map_or(0, |before| before.count);
        failures.push_front(FailureView { count, ..failure });
        failures.truncate(FAILURES);
    }
}

impl ListenerConnections {
    pub(super) fn end(&self, entry: &Entry, ended: &Ended) {
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
            all.note_failure(FailureView {
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

    /// Whether this end is logged, and how many similar lines were held back before; `None` holds it back.
    pub(super) fn may_tell(&self, entry: &Entry, state: EndState) -> Option<u64> {
        let of_many = LineKind { listener: Arc::clone(&self.listener), state, client: None };
        let of_client = || LineKind { client: Some(network_of(entry.client.ip())), ..of_many.clone() };
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

/// Milliseconds with three digits, for people.
fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
