//! The mailbox's ports: whether they accept connections, greet, show a certificate, and trust the PROXY header.
//!
//! Invariant: each question gets one connection, which begins and ends as the protocol wants. Otherwise the mail
//! server would complain in its log.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::report::{Check, Grade};
use crate::config;
use crate::protocol::advice;
use crate::protocol::{Protocol, ProxyProtocol};
use crate::support::text::host_port;
use crate::support::wall_clock;
use crate::tailnet::{ConnectError, Node, PingReport, TailnetStream};
use crate::upstream::dial::Dial;
use crate::upstream::peers::Peer;
use crate::upstream::probe::{Certificate, Finding, ProbeError, Target, probe};
use crate::upstream::{Failure, Silence, Upstream, UpstreamError};

/// How long a mailbox may take to greet and to say goodbye, once connected.
const TALK_LIMIT: Duration = Duration::from_secs(15);

/// How long to wait for a greeting without a header. A mailbox that does not demand the header greets at once.
const WITHOUT_HEADER_LIMIT: Duration = Duration::from_millis(1500);

/// A port to check.
#[derive(Clone, Debug)]
pub struct Visit {
    listener: String,
    target: Target,
    connect_timeout: Duration,
}

impl Visit {
    /// One server of a listener's upstream.
    pub fn new(listener: &config::Listener, host: &str, port: u16, connect_timeout: Duration) -> Visit {
        let header = listener.proxy_protocol != ProxyProtocol::Off;
        let target = Target { host: host.to_owned(), port, protocol: listener.protocol, header };
        Visit { listener: listener.name.clone(), target, connect_timeout }
    }

    /// The name of a check of this port.
    fn check(&self, what: &str) -> String {
        format!("{what} {} {}", self.listener, host_port(&self.target.host, self.target.port))
    }
}

/// Checks a port: once as the edge connects, and once without the PROXY header if the edge sends one.
pub async fn visit(node: Arc<Node>, visit: Visit) -> Vec<Check> {
    let own = node.status().borrow().ips.clone();
    let peer = Arc::new(Peer::new(visit.target.host.clone()));
    let upstream = Upstream::new(node, vec![peer], visit.target.port, visit.connect_timeout);
    let found = match look(&upstream, &visit.target, TALK_LIMIT).await {
        Ok(found) => found,
        Err(failure) => {
            return vec![Check::told(visit.check("upstream"), Grade::Fail, &in_words(&failure))];
        }
    };
    let mut checks = vec![Check::pass(visit.check("upstream"), "accepts connections")];
    if matches!(visit.target.protocol, Protocol::Http | Protocol::Tcp) && found.is_ok() {
        return checks; // the protocol of that port is not known
    }
    checks.extend(greeting(&visit, &found, &own, wall_clock::now()));
    if visit.target.header && found.is_ok() {
        let target = Target { header: false, ..visit.target.clone() };
        if let Ok(without) = look(&upstream, &target, WITHOUT_HEADER_LIMIT).await {
            checks.push(demand(&visit, &without, &own));
        }
    }
    checks
}

/// Connects as the edge does for a client, and probes that connection for up to `limit`. The outer error says
/// why it could not connect.
async fn look(
    upstream: &Upstream<Node>,
    target: &Target,
    limit: Duration,
) -> Result<Result<Finding, ProbeError>, UpstreamError> {
    let began = Instant::now();
    let stream = upstream.connect().await?.stream;
    let connect = began.elapsed();
    let found = probe(&OpenedStream(Mutex::new(Some(stream))), target, limit).await;
    Ok(found.map(|found| Finding { connect, total: connect + found.total, ..found }))
}

/// Gives a probe, which dials, a connection that is open already.
struct OpenedStream(Mutex<Option<TailnetStream>>);

impl Dial for OpenedStream {
    type Stream = TailnetStream;

    async fn dial(&self, _: &str, _: u16) -> Result<TailnetStream, ConnectError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(ConnectError::TimedOut)
    }

    async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
        Err(ConnectError::TimedOut) // a probe never pings
    }
}

/// The error, with its kind in a word before it.
fn in_words(error: &UpstreamError) -> String {
    let kind = match error.failures().next() {
        Some(Failure::Connect(ConnectError::Refused)) => "refused",
        Some(Failure::Connect(ConnectError::Denied | ConnectError::ShieldsUp)) => "denied",
        Some(Failure::Silent { silence: Silence::Port, .. }) => "denied or dropped",
        Some(Failure::Silent { silence: Silence::Peer { .. }, .. }) => "peer out of reach",
        _ => return error.to_string(),
    };
    format!("{kind}: {error}")
}

/// Checks the mailbox's greeting and certificate.
fn greeting(
    visit: &Visit,
    found: &Result<Finding, ProbeError>,
    own: &[IpAddr],
    now: Timestamp,
) -> Vec<Check> {
    let name = visit.check("greeting");
    match found {
        Ok(Finding { greeting, certificate, total, .. }) => {
            let said = format!("\"{greeting}\" in {} ms", total.as_millis());
            let shown = certificate.as_ref().map(|shown| certificate_check(visit, shown, now));
            [Some(Check::pass(name, said)), shown].into_iter().flatten().collect()
        }
        // A mailbox that does not trust this edge does one of these two.
        Err(error @ (ProbeError::HeaderTaken { .. } | ProbeError::ClosedSilently { header: true })) => {
            let text = error.to_string();
            let finding = text.split("; ").next().unwrap_or_default();
            vec![Check::fail(visit.check("proxy"), finding, advice(own))]
        }
        Err(error) => vec![Check::told(name, Grade::Fail, error)],
    }
}

fn certificate_check(visit: &Visit, certificate: &Certificate, now: Timestamp) -> Check {
    const REMEDY: &str = "renew it on the mailbox";
    let name = visit.check("certificate");
    let (names, at) = (certificate.names.join(", "), certificate.not_after);
    if at < now {
        Check::warn(name, format!("for {names}, expired at {at}: clients refuse it"), REMEDY)
    } else if at.duration_since(now) < wall_clock::ENDS_SOON {
        Check::warn(name, format!("for {names}, and expires at {at}"), REMEDY)
    } else {
        Check::pass(name, format!("for {names}, valid until {at}"))
    }
}

/// Checks whether the mailbox demands the header. `without` is what it did without one.
fn demand(visit: &Visit, without: &Result<Finding, ProbeError>, own: &[IpAddr]) -> Check {
    let name = visit.check("proxy");
    // With these two errors the mailbox has spoken too.
    if !matches!(without, Ok(_) | Err(ProbeError::Refused { .. } | ProbeError::Cut(_))) {
        return Check::pass(name, "takes the PROXY header and demands it");
    }
    Check::warn(
        name,
        "greets with a PROXY header and without one: perhaps it does not read the client's address from the header, and any tailnet node that can reach the port can connect as a client",
        format!("make it demand the header: {}", advice(own)),
    )
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    fn listener(protocol: &str) -> Visit {
        let text = format!("[[listener]]\nprotocol = {protocol:?}");
        let config = config::Config::parse(&text, Some("stalwart"), &|_| None).unwrap();
        Visit::new(&config.listeners[0], "stalwart", 25, config.timeouts.connect)
    }

    fn own() -> Vec<IpAddr> {
        vec![[100, 64, 0, 1].into()]
    }

    fn greets(certificate: Option<Certificate>) -> Result<Finding, ProbeError> {
        let (connect, total) = (Duration::from_millis(3), Duration::from_millis(12));
        Ok(Finding { greeting: "220 mail ESMTP".into(), certificate, connect, total })
    }

    #[test]
    fn a_greeting_is_shown() {
        let checks = greeting(&listener("smtp"), &greets(None), &own(), Timestamp::UNIX_EPOCH);
        assert_eq!(checks, [Check::pass("greeting smtp stalwart:25", "\"220 mail ESMTP\" in 12 ms")]);
        let silent = Err(ProbeError::Silent { limit: Duration::from_secs(10) });
        let checks = greeting(&listener("smtp"), &silent, &own(), Timestamp::UNIX_EPOCH);
        assert_eq!((&*checks[0].name, checks[0].outcome), ("greeting smtp stalwart:25", Grade::Fail));
    }

    #[test]
    fn the_address_of_a_mailbox_is_told_from_its_port() {
        let mut visit = listener("smtp");
        visit.target.host = "fd7a:115c:a1e0::1".into();
        assert_eq!(visit.check("greeting"), "greeting smtp [fd7a:115c:a1e0::1]:25");
    }

    #[test]
    fn a_certificate_is_looked_at_in_time() {
        let now = Timestamp::UNIX_EPOCH;
        for (days, outcome) in [(-1, Grade::Warn), (13, Grade::Warn), (15, Grade::Pass)] {
            let not_after = now + SignedDuration::from_hours(24 * days);
            let certificate = Certificate { names: vec!["mail.example.com".into()], not_after };
            let checks = greeting(&listener("imaps"), &greets(Some(certificate)), &own(), now);
            assert_eq!((checks[0].outcome, checks[1].outcome), (Grade::Pass, outcome), "{checks:?}");
            assert!(checks[1].finding.contains("mail.example.com"));
            assert_eq!(checks[1].finding.contains("expired at"), days < 0);
        }
    }

    #[test]
    fn distrust_comes_with_advice() {
        for error in [
            ProbeError::HeaderTaken { said: "500 5.5.1 Invalid command.".into() },
            ProbeError::ClosedSilently { header: true },
        ] {
            let checks = greeting(&listener("smtp"), &Err(error), &own(), Timestamp::UNIX_EPOCH);
            assert_eq!((&*checks[0].name, checks[0].outcome), ("proxy smtp stalwart:25", Grade::Fail));
            assert_eq!(checks[0].remedy.as_deref(), Some(&*advice(&own())), "it is not cut");
        }
        let without = Err(ProbeError::ClosedSilently { header: false });
        let checks = greeting(&listener("smtp"), &without, &own(), Timestamp::UNIX_EPOCH);
        assert_eq!(checks[0].name, "greeting smtp stalwart:25");
    }

    #[test]
    fn a_mailbox_should_demand_what_it_takes() {
        let limit = WITHOUT_HEADER_LIMIT;
        for without in [ProbeError::Silent { limit }, ProbeError::ClosedSilently { header: false }] {
            assert_eq!(demand(&listener("smtp"), &Err(without), &own()).outcome, Grade::Pass);
        }
        let cut = Err(ProbeError::Cut("said nothing".into()));
        for without in [greets(None), cut] {
            let both = demand(&listener("smtp"), &without, &own());
            assert!(both.outcome == Grade::Warn && both.remedy.unwrap().contains("100.64.0.1"));
        }
    }
}
