//! What is known of all listeners and of the servers that they need, and whether that makes the edge ready.
//!
//! Deliberately not here: probing the servers (see `upstream/health.rs`), and serving the answer (see `admin.rs`).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use tokio::sync::watch;

use crate::connection::Service;
use crate::protocol::Protocol;
use crate::upstream::UpstreamError;
use crate::upstream::dial::Dial;
use crate::upstream::health::{Monitor, Seen, State};
use crate::upstream::peers::Peer;

/// The reason that is shown before the first probe has ended.
pub const NOT_REACHED_YET: &str = "the mailbox was not reached yet";

/// A listener and what is known of the servers that it needs.
#[derive(Debug)]
pub struct Outlook {
    listener: String,
    is_mail: bool,
    /// One for each server; empty when nothing is probed.
    monitors: Vec<Arc<Monitor>>,
    /// Why no server could be reached at the last attempt.
    away: watch::Receiver<Option<UpstreamError>>,
    /// How often a server was reached.
    successes: Arc<AtomicU64>,
}

/// Whether a listener can serve its clients.
#[derive(Debug, PartialEq, Eq)]
enum CanServe {
    Yes,
    /// No client has tried, and nothing is probed.
    Untried,
    /// No server is known to be up, and not all are known to be down.
    NotYetKnown,
    /// It cannot. The text is the reason for `/readyz`.
    No(String),
}

impl Outlook {
    /// The outlook of a listener's service. `probed` are the monitors of all listeners.
    pub fn new<D: Dial>(service: &Service<D>, probed: &[Arc<Monitor>]) -> Outlook {
        let monitors = probed.iter().filter(|monitor| monitor.listener == service.name);
        Outlook {
            listener: service.name.clone(),
            is_mail: service.protocol.is_mail(),
            monitors: monitors.cloned().collect(),
            away: service.upstream.watch_away(),
            successes: service.upstream.watch_successes(),
        }
    }

    fn can_serve(&self) -> CanServe {
        if self.monitors.is_empty() {
            return match &*self.away.borrow() {
                Some(error) if error.blames_a_server() => CanServe::No(error.to_string()),
                None if self.successes.load(Ordering::Relaxed) > 0 => CanServe::Yes,
                _ => CanServe::Untried,
            };
        }
        let seen: Vec<(&Monitor, Seen)> =
            self.monitors.iter().map(|monitor| (&**monitor, monitor.seen())).collect();
        let is_any = |state| seen.iter().any(|(_, seen)| seen.state == state);
        if is_any(State::Up) {
            return CanServe::Yes;
        }
        if is_any(State::Unknown) {
            return CanServe::NotYetKnown;
        }
        let problems = seen.iter().map(|(monitor, seen)| {
            let problem = seen.problem.as_deref().unwrap_or("recovering: its last probe passed");
            format!("{}: {problem}", monitor.upstream)
        });
        CanServe::No(problems.collect::<Vec<_>>().join("; "))
    }
}

/// Why clients should not be sent here, and what else is wrong.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Why no client should be sent; empty when clients can be served.
    pub reasons: Vec<String>,
    /// What an operator should know, although clients are served.
    pub warnings: Vec<String>,
}

/// A listener as it is served.
#[derive(Clone, Debug)]
pub struct Listening {
    /// Its name in the configuration.
    pub name: String,
    /// The protocol of its clients.
    pub protocol: Protocol,
    /// The addresses it listens on. Where the configuration says port 0, this is the port that the system chose.
    pub addresses: Vec<SocketAddr>,
    /// Where its connections go.
    pub upstream: String,
    /// Whether a reload has removed it; it may still have connections.
    pub removed: bool,
}

/// Every server that is probed, and how many clients wait for one.
#[derive(Debug)]
pub struct Board {
    /// One for each listener and server.
    pub monitors: Vec<Arc<Monitor>>,
    /// The listeners that are served, and after them the removed ones.
    pub listeners: Vec<Listening>,
    /// In the order of the configuration, one for each listener.
    pub outlooks: Vec<Outlook>,
    /// The mailbox's nodes that are still in use.
    pub peers: Vec<Weak<Peer>>,
}

impl Board {
    /// The board of an edge that serves nothing.
    #[cfg(test)]
    pub fn empty() -> Board {
        Board { monitors: Vec::new(), listeners: Vec::new(), outlooks: Vec::new(), peers: Vec::new() }
    }

    /// The state in one line, with the number of connections.
    pub fn summary(&self, connections: usize) -> String {
        let listener = |monitor: &Arc<Monitor>| monitor.listener.clone();
        let listeners: BTreeSet<String> = self.monitors.iter().map(listener).collect();
        let in_state = |state| self.monitors.iter().filter(move |monitor| monitor.seen().state == state);
        let down: BTreeSet<String> = in_state(State::Down).map(listener).collect();
        let mailbox = if !down.is_empty() {
            format!("mailbox down on {}", down.into_iter().collect::<Vec<_>>().join(", "))
        } else if in_state(State::Up).next().is_some() {
            "mailbox up".to_owned()
        } else if in_state(State::Unprobed).next().is_some() {
            "mailbox not probed".to_owned()
        } else {
            "mailbox not known yet".to_owned()
        };
        format!("listeners: {}, connections: {connections}, {mailbox}", listeners.len())
    }

    /// Whether mail can be passed on. As long as one mail listener has a server that answers, what is wrong with
    /// other listeners is a warning. Without a mail listener, all listeners count. A listener that is not probed
    /// and that no client has tried yet does not count.
    pub fn judge(&self) -> Judgement {
        let any_mail = self.outlooks.iter().any(|outlook| outlook.is_mail);
        let (counting, others): (Vec<&Outlook>, Vec<&Outlook>) =
            self.outlooks.iter().partition(|outlook| outlook.is_mail || !any_mail);
        let answers: Vec<CanServe> = counting.iter().map(|outlook| outlook.can_serve()).collect();
        let mut judgement = Judgement { reasons: complaints(&counting), warnings: complaints(&others) };
        if answers.contains(&CanServe::Yes) {
            judgement.warnings.splice(0..0, std::mem::take(&mut judgement.reasons));
        } else if answers.contains(&CanServe::NotYetKnown) {
            judgement.reasons.insert(0, NOT_REACHED_YET.to_owned());
        }
        judgement
    }
}

fn complaints(outlooks: &[&Outlook]) -> Vec<String> {
    let complaint = |outlook: &&Outlook| match outlook.can_serve() {
        CanServe::No(why) => Some(format!("listener {}: no upstream answers: {why}", outlook.listener)),
        _ => None,
    };
    outlooks.iter().filter_map(complaint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tailnet::ConnectError;
    use crate::upstream::Failure;

    /// A listener whose servers are in these states. Without any state it is not probed, and its mailbox is away.
    fn outlook(listener: &str, is_mail: bool, states: &[State]) -> Outlook {
        let in_state = |state: &State| {
            let problem = (*state == State::Down).then_some("it is ill");
            Arc::new(Monitor::in_state(*state, problem))
        };
        Outlook {
            listener: listener.into(),
            is_mail,
            monitors: states.iter().map(in_state).collect(),
            away: away_for(ConnectError::Refused),
            successes: Arc::default(),
        }
    }

    fn away_for(reason: ConnectError) -> watch::Receiver<Option<UpstreamError>> {
        watch::channel(Some(UpstreamError::of("stalwart:993", Failure::Connect(reason)))).1
    }

    fn judge(outlooks: Vec<Outlook>) -> Judgement {
        Board { outlooks, ..Board::empty() }.judge()
    }

    fn judgement(reasons: &[&str], warnings: &[&str]) -> Judgement {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        Judgement { reasons: texts(reasons), warnings: texts(warnings) }
    }

    const SMTP: &str = "listener smtp: no upstream answers: stalwart:993: it is ill";
    const WEB: &str = "listener web: no upstream answers: stalwart:993: it is ill";

    #[test]
    fn one_mail_listener_that_is_served_is_enough() {
        use State::{Down, Unknown, Up};
        assert_eq!(judge(vec![outlook("smtp", true, &[Down, Up])]), judgement(&[], &[]), "failover");
        let imaps = || outlook("imaps", true, &[Up]);
        assert_eq!(judge(vec![outlook("smtp", true, &[Down]), imaps()]), judgement(&[], &[SMTP]));
        assert_eq!(judge(vec![outlook("smtp", true, &[Unknown]), imaps()]), judgement(&[], &[]));
        let web = || outlook("web", false, &[Down]);
        assert_eq!(judge(vec![web(), imaps()]), judgement(&[], &[WEB]));
        assert_eq!(judge(vec![web(), outlook("smtp", true, &[Down])]), judgement(&[SMTP], &[WEB]));
        assert_eq!(
            judge(vec![outlook("web", false, &[Up]), outlook("smtp", true, &[Down])]),
            judgement(&[SMTP], &[])
        );
        assert_eq!(judge(vec![web()]), judgement(&[WEB], &[]), "nothing else is served here");
    }

    #[test]
    fn nobody_is_ready_before_the_first_probe() {
        use State::{Down, Unknown};
        let unknown = outlook("imaps", true, &[Down, Unknown]);
        assert_eq!(
            judge(vec![outlook("smtp", true, &[Down]), unknown]),
            judgement(&[NOT_REACHED_YET, SMTP], &[])
        );
    }

    #[test]
    fn without_a_probe_the_last_attempt_counts() {
        let away = || outlook("smtp", true, &[]);
        let why = format!("listener smtp: no upstream answers: {}", ConnectError::Refused);
        assert_eq!(judge(vec![away()]), judgement(&[&why], &[]));
        // The edge was not on the tailnet then: that is not the mailbox's fault.
        for away_since in [watch::channel(None).1, away_for(ConnectError::NotRunning)] {
            assert_eq!(judge(vec![Outlook { away: away_since.clone(), ..away() }]), judgement(&[], &[]));
            let untried = Outlook { away: away_since, ..outlook("imaps", true, &[]) };
            assert_eq!(
                judge(vec![away(), untried]),
                judgement(&[&why], &[]),
                "it says nothing for the other"
            );
        }
        let reached = Arc::new(AtomicU64::new(1));
        let reached = Outlook { away: watch::channel(None).1, successes: reached, ..away() };
        assert_eq!(judge(vec![away(), reached]), judgement(&[], &[&why]));
    }
}
