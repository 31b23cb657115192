//! Watches the mailbox's servers: probes each port again and again, and logs when one goes down or comes back.
//!
//! Invariants
//! - A change of state takes `rise` or `fall` probes in a row, and gives one log line. While the state is not
//!   settled, probes come fast.
//! - A connection that fails is a reason to probe at once, but no proof.
//! - If this edge is off the tailnet or has no network, the server is not to blame: such a probe does not count.
//!
//! Deliberately not here: what a probe does (see `probe.rs`), what clients get meanwhile (see `upstream.rs`: a
//! server that is down is tried last), and whether the edge is ready (see `admin/board.rs`).

use std::mem::Discriminant;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use crate::config;
use crate::protocol::advice;
use crate::support::wall_clock;
use crate::tailnet::ConnectError;
use crate::upstream::dial::Dial;
use crate::upstream::probe::{Certificate, Finding, ProbeError, Target, probe};
use crate::upstream::{Server, Silence, Upstream};

/// How long one probe may take. Some mail servers delay their greeting for unknown clients, by up to 20 seconds.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// How long the peer has to answer the ping after a probe that got no answer.
const PING_LIMIT: Duration = Duration::from_secs(2);

/// Between probes while it is not settled whether a server is up or down.
const FAST: Duration = Duration::from_secs(2);

/// Whether a server is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is not probed.
    Unprobed,
    /// It greets as it should.
    Up,
    /// It cannot be reached, or does not greet as it should.
    Down,
    /// Not enough is known yet; or an edge of another version reports a state that this version does not know.
    #[serde(other)]
    Unknown,
}

/// One port of one server, as a listener uses it.
#[derive(Debug)]
pub struct Monitor {
    /// The listener's name.
    pub listener: String,
    /// The server's address, as it is shown.
    pub upstream: String,
    /// What its probes connect to, and expect there.
    pub target: Target,
    seen: Mutex<Seen>,
}

/// What the last probes have found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Whether it is up.
    pub state: State,
    /// Since when it is in that state.
    pub since: Timestamp,
    /// When the last probe ended.
    pub probed: Option<Timestamp>,
    /// What the last probe that succeeded found.
    pub finding: Option<Finding>,
    /// Why the last probe failed, if it did.
    pub problem: Option<String>,
    /// Probes in a row that contradict `state`, or the reason that was logged for it.
    #[serde(skip)]
    against: u32,
    /// What those probes have in common.
    #[serde(skip)]
    counted: Option<(State, Option<Discriminant<ProbeError>>)>,
    /// The kind of problem that was logged.
    #[serde(skip)]
    told: Option<Discriminant<ProbeError>>,
    /// Whether the end of the certificate was logged.
    #[serde(skip)]
    end_told: bool,
}

impl Default for Seen {
    /// The state of a server that was never probed.
    fn default() -> Seen {
        Seen {
            state: State::Unprobed,
            since: wall_clock::now(),
            probed: None,
            finding: None,
            problem: None,
            against: 0,
            counted: None,
            told: None,
            end_told: false,
        }
    }
}

impl Monitor {
    /// A monitor for a server of this listener. Probes begin with [`Monitor::begin`].
    pub fn new(listener: &str, target: Target, server: &Server) -> Monitor {
        let (listener, upstream) = (listener.to_owned(), server.to_string());
        Monitor { listener, upstream, target, seen: Mutex::default() }
    }

    /// A monitor that has found this state and problem, for tests.
    #[cfg(test)]
    pub(crate) fn in_state(state: State, problem: Option<&str>) -> Monitor {
        let target = Target {
            host: "stalwart".into(),
            port: 993,
            protocol: crate::protocol::Protocol::Imaps,
            header: true,
        };
        let seen = Mutex::new(Seen { state, problem: problem.map(str::to_owned), ..Seen::default() });
        Monitor { listener: "imaps".into(), upstream: "stalwart:993".into(), target, seen }
    }

    /// Notes that the server is probed from now on.
    pub fn begin(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.state == State::Unprobed {
            seen.state = State::Unknown;
        }
    }

    /// What was found out so far.
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes a probe's result; true if it has changed the state, or the reason for it.
    fn note(&self, result: &Result<Finding, ProbeError>, settings: &config::Probe) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.probed = Some(wall_clock::now());
        let kind = result.as_ref().err().map(std::mem::discriminant);
        let (found, needed) = match result {
            Ok(finding) => {
                seen.finding = Some(finding.clone());
                seen.problem = None;
                // A server that was never down is up with its first good probe.
                (State::Up, if seen.state == State::Unknown { 1 } else { settings.rise })
            }
            Err(problem) => {
                seen.problem = Some(problem.to_string());
                (State::Down, settings.fall)
            }
        };
        if found == seen.state && kind == seen.told {
            (seen.against, seen.counted) = (0, None);
            return false;
        }
        // For a change of state it does not matter which failure it is.
        let counted = Some((found, if found == seen.state { kind } else { None }));
        seen.against = if seen.counted == counted { seen.against + 1 } else { 1 };
        seen.counted = counted;
        if seen.against < needed {
            return false;
        }
        if found != seen.state {
            (seen.state, seen.since) = (found, wall_clock::now());
        }
        (seen.told, seen.against, seen.counted) = (kind, 0, None);
        true
    }

    fn is_settled(&self) -> bool {
        let seen = self.seen();
        seen.against == 0 && seen.state != State::Unknown
    }

    /// Logs, once, that a certificate is about to expire or has expired.
    fn look_at_end(&self, certificate: &Certificate) {
        let left = certificate.not_after.duration_since(wall_clock::now());
        let due = left < wall_clock::ENDS_SOON;
        let told =
            std::mem::replace(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner).end_told, due);
        if !due || told {
            return;
        }
        let (listener, upstream, not_after) = (&self.listener, &self.upstream, certificate.not_after);
        let when = if left.is_negative() { "has expired" } else { "expires within two weeks" };
        warn!(listener, %upstream, %not_after, "the mailbox's certificate {when}; check its renewal on the mailbox");
    }
}

/// Probes one server for as long as it is not dropped.
pub async fn keep_probing<D: Dial>(
    monitor: Arc<Monitor>,
    upstream: Arc<Upstream<D>>,
    server: Arc<Server>,
    dialler: Arc<D>,
    settings: config::Probe,
) {
    loop {
        let began = Instant::now();
        let result = probe(&*dialler, &monitor.target, PROBE_LIMIT).await;
        if let Some(result) = explained(&*dialler, &monitor.target.host, result).await {
            take_in(&monitor, &upstream, &server, &*dialler, &settings, &result);
        }
        let pause = if monitor.is_settled() { settings.interval } else { settings.interval.min(FAST) };
        tokio::select! {
            () = sleep(pause) => {}
            // Thousands of clients may report a failure at once, so a pause is kept here too.
            () = server.suspected() => sleep_until(began + FAST.min(settings.interval)).await,
        }
    }
}

/// Adds the cause to a result if nothing answered; `None` if the probe failed because this edge has no tailnet or
/// no network.
async fn explained<D: Dial>(
    dialler: &D,
    host: &str,
    result: Result<Finding, ProbeError>,
) -> Option<Result<Finding, ProbeError>> {
    let problem = match result {
        Err(ProbeError::Connect(ConnectError::NotRunning)) => return None,
        Err(problem @ (ProbeError::ConnectTimedOut { .. } | ProbeError::Silent { .. })) => problem,
        other => return Some(other),
    };
    let report = match dialler.ping(host, PING_LIMIT).await {
        Ok(report) if report.network => report,
        Ok(_) | Err(ConnectError::NotRunning) => return None,
        Err(_) => return Some(Err(problem)),
    };
    Some(Err(match problem {
        ProbeError::ConnectTimedOut { limit } if !report.answered => {
            ProbeError::PeerSilent { limit, silence: Silence::of(&report) }
        }
        other => other,
    }))
}

/// Notes and logs what a probe has found.
fn take_in<D: Dial>(
    monitor: &Monitor,
    upstream: &Upstream<D>,
    server: &Server,
    dialler: &D,
    settings: &config::Probe,
    result: &Result<Finding, ProbeError>,
) {
    let changed = monitor.note(result, settings);
    let (listener, name) = (&monitor.listener, &monitor.upstream);
    match result {
        Ok(finding) => {
            server.greeted(Instant::now());
            upstream.found(server, monitor.seen().state == State::Up);
            if changed {
                let (greeting, connect_ms) = (&finding.greeting, finding.connect.as_millis() as u64);
                info!(listener, upstream = %name, greeting, connect_ms, "the mailbox is up");
            }
            if let Some(certificate) = &finding.certificate {
                monitor.look_at_end(certificate);
            }
        }
        Err(problem) if changed => {
            upstream.found(server, false);
            let advice = match problem {
                ProbeError::HeaderTaken { .. } | ProbeError::ClosedSilently { header: true } => {
                    format!(": {}", advice(&dialler.addresses()))
                }
                _ => String::new(),
            };
            warn!(listener, upstream = %name, "the mailbox is down: {problem}{advice}");
        }
        Err(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::protocol::Protocol;

    const SETTINGS: config::Probe = config::Probe { interval: Duration::from_secs(30), rise: 2, fall: 3 };

    fn monitor() -> Monitor {
        let target = Target { host: "stalwart".into(), port: 993, protocol: Protocol::Imaps, header: true };
        let seen = Mutex::default();
        let monitor = Monitor { listener: "imaps".into(), upstream: "stalwart:993".into(), target, seen };
        monitor.begin();
        monitor
    }

    fn well() -> Result<Finding, ProbeError> {
        let (connect, total) = (Duration::from_millis(1), Duration::from_millis(2));
        Ok(Finding { greeting: "* OK ready".into(), certificate: None, connect, total })
    }

    fn ill() -> Result<Finding, ProbeError> {
        Err(ProbeError::Connect(ConnectError::Refused))
    }

    #[test]
    fn a_change_takes_as_many_probes_in_a_row_as_configured() {
        let monitor = monitor();
        let step = |result: &Result<Finding, ProbeError>| {
            (monitor.note(result, &SETTINGS), monitor.seen().state, monitor.is_settled())
        };
        assert!(!monitor.is_settled(), "nothing is known at first");
        assert_eq!(step(&well()), (true, State::Up, true), "what was never down need not prove itself");
        assert_eq!(step(&ill()), (false, State::Up, false));
        assert_eq!(step(&ill()), (false, State::Up, false));
        assert_eq!(step(&well()), (false, State::Up, true), "in a row");
        assert_eq!(step(&ill()), (false, State::Up, false));
        assert_eq!(step(&ill()), (false, State::Up, false));
        assert_eq!(step(&ill()), (true, State::Down, true));
        assert_eq!(step(&well()), (false, State::Down, false));
        assert_eq!(step(&ill()), (false, State::Down, true));
        let cut = Err(ProbeError::Cut("broke".into()));
        for result in [well(), cut.clone(), well(), cut] {
            assert_eq!(step(&result), (false, State::Down, false), "one well, one of another kind");
        }
        assert_eq!(step(&well()), (false, State::Down, false));
        assert_eq!(step(&well()), (true, State::Up, true));
    }

    #[test]
    fn what_a_probe_has_found_is_kept_when_its_settings_change() {
        let monitor = Monitor { seen: Mutex::default(), ..monitor() };
        assert_eq!(monitor.seen().state, State::Unprobed);
        monitor.begin();
        assert_eq!(monitor.seen().state, State::Unknown);
        monitor.note(&well(), &SETTINGS);
        monitor.begin();
        assert_eq!(monitor.seen().state, State::Up);
    }

    #[test]
    fn another_reason_is_told_when_it_has_stood_as_long() {
        let monitor = monitor();
        let told = |result: &Result<Finding, ProbeError>| monitor.note(result, &SETTINGS);
        let distrusted = Err(ProbeError::HeaderTaken { said: "500".into() });
        assert_eq!([told(&ill()), told(&ill()), told(&ill()), told(&ill())], [false, false, true, false]);
        assert_eq!([told(&distrusted), told(&ill())], [false, false], "in a row");
        assert_eq!([told(&distrusted), told(&distrusted), told(&distrusted)], [false, false, true]);
        assert!(!told(&distrusted), "once");
    }

    #[test]
    fn what_is_known_says_what_was_found_and_what_is_wrong() {
        let monitor = monitor();
        monitor.note(&well(), &SETTINGS);
        monitor.note(&ill(), &SETTINGS);
        let seen = monitor.seen();
        assert_eq!(seen.finding.map(|finding| finding.greeting).as_deref(), Some("* OK ready"));
        assert!(seen.problem.is_some_and(|problem| problem.contains("refused the connection")));
        monitor.note(&well(), &SETTINGS);
        assert_eq!(monitor.seen().problem, None);
    }

    #[test]
    fn the_end_of_a_certificate_is_told_once_until_it_is_renewed() {
        let monitor = monitor();
        let certificate = |hours| Certificate {
            names: vec![],
            not_after: wall_clock::now() + SignedDuration::from_hours(hours),
        };
        let told = |hours| {
            monitor.look_at_end(&certificate(hours));
            monitor.seen().end_told
        };
        assert!(!told(15 * 24));
        assert!(told(13 * 24) && told(-1));
        assert!(!told(89 * 24));
    }
}
