//! The state of a running edge: what `/status` says, and `tailwart-edge status`, which shows it on
//! one screen.
//!
//! Invariants: it asks the edge and nobody else, changes nothing, and has a deadline. What it prints
//! was made harmless by the edge.
//!
//! Deliberately not here: a judgement for scripts (that is `/readyz`), and looking for causes (see
//! `doctor.rs`).

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::doctor::http;
use crate::health::{Seen, State};

/// The path at which the admin port says it.
pub const PATH: &str = "/status";

/// How long the edge may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// What an edge says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// Its node.
    pub node: NodeView,
    /// Why it is not ready; empty when it is.
    pub not_ready: Vec<String>,
    /// How many clients wait for a mailbox that cannot be reached.
    pub held: usize,
    /// Each server, as each listener uses it.
    pub upstreams: Vec<UpstreamView>,
}

/// The node of an edge. Its login address is left out: whoever opens it first owns the node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeView {
    /// Its MagicDNS name.
    pub name: String,
    /// Its tailnet addresses.
    pub ips: Vec<IpAddr>,
    /// The tags it holds.
    pub tags: Vec<String>,
    /// Tailscale's word for its state.
    pub state: String,
    /// When its key expires, if it does.
    pub key_expiry: Option<Timestamp>,
}

/// A server as a listener uses it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpstreamView {
    /// The listener's name.
    pub listener: String,
    /// The server's address.
    pub upstream: String,
    /// What is spoken there.
    pub protocol: String,
    /// What its probe has found.
    pub probe: Seen,
}

/// Asks the edge that has this admin address, or says why that cannot be done.
pub async fn ask(admin: SocketAddr) -> Result<Status, String> {
    let asked = async {
        let stream = TcpStream::connect(admin).await.map_err(|error| error.to_string())?;
        let answer = http::get(stream, &admin.to_string(), PATH).await?;
        serde_json::from_slice(answer.body()).map_err(|_| "its answer is not that of an edge".to_owned())
    };
    let remedy = "check that the edge runs, and that admin.listen is what it was started with";
    match timeout(LIMIT, asked).await {
        Ok(outcome) => {
            outcome.map_err(|reason| format!("cannot ask the edge at {admin}: {reason}; {remedy}"))
        }
        Err(_) => Err(format!("cannot ask the edge at {admin}: no answer within {LIMIT:?}; {remedy}")),
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NodeView { name, ips, tags, state, .. } = &self.node;
        match &self.not_ready[..] {
            [] => writeln!(f, "tailwart-edge {} is ready", self.version)?,
            reasons => writeln!(f, "tailwart-edge {} is not ready: {}", self.version, reasons.join("; "))?,
        }
        let ips: Vec<String> = ips.iter().map(ToString::to_string).collect();
        writeln!(f, "node {name} ({state}), {}, {}", ips.join(", "), tags.join(", "))?;
        match self.held {
            0 => writeln!(f, "no client waits for the mailbox")?,
            held => writeln!(f, "{held} clients wait for the mailbox")?,
        }
        let width = |text: fn(&UpstreamView) -> &str| self.upstreams.iter().map(|u| text(u).len()).max();
        let listeners = width(|upstream| &upstream.listener).unwrap_or(0);
        let servers = width(|upstream| &upstream.upstream).unwrap_or(0);
        for UpstreamView { listener, upstream, probe, .. } in &self.upstreams {
            writeln!(f, "{listener:listeners$}  {upstream:servers$}  {}", Line(probe))?;
        }
        Ok(())
    }
}

/// What a probe has found, in a line.
struct Line<'a>(&'a Seen);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Seen { state, since, finding, problem, .. } = self.0;
        match state {
            State::Unknown => return write!(f, "not known yet"),
            State::Up => write!(f, "up since {since:.0}")?,
            State::Down => write!(f, "DOWN since {since:.0}")?,
        }
        if let Some(problem) = problem {
            return write!(f, ": {problem}");
        }
        let Some(finding) = finding else { return Ok(()) };
        write!(f, ": {}", finding.greeting)?;
        match &finding.certificate {
            Some(certificate) => write!(f, "; certificate until {:.0}", certificate.not_after),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `/status` has it.
    const ANSWER: &str = r#"{
        "version": "0.1.0",
        "node": {"name": "edge.ts.net", "ips": ["100.64.0.2"], "tags": ["tag:reverse-proxy"],
                 "state": "Running", "key_expiry": null},
        "not_ready": [],
        "held": 3,
        "upstreams": [
            {"listener": "smtp", "upstream": "stalwart:25", "protocol": "smtp", "probe":
                {"state": "down", "since": "2026-01-02T03:04:05.678Z", "probed": null, "finding": null,
                 "problem": "cannot connect: refused"}},
            {"listener": "imaps", "upstream": "stalwart:993", "protocol": "imaps", "probe":
                {"state": "up", "since": "2026-01-02T03:04:05Z", "probed": null, "problem": null, "finding":
                    {"greeting": "* OK ready", "connect_ms": 1, "total_ms": 2, "certificate":
                        {"names": ["mx.example.org"], "not_after": "2026-03-04T05:06:07Z"}}}},
            {"listener": "web", "upstream": "stalwart:80", "protocol": "http", "probe":
                {"state": "unknown", "since": "2026-01-02T03:04:05Z", "probed": null, "finding": null,
                 "problem": null}}
        ]}"#;

    #[test]
    fn one_screen_says_whether_mail_flows() {
        let mut status: Status = serde_json::from_str(ANSWER).unwrap();
        let expected = "\
tailwart-edge 0.1.0 is ready
node edge.ts.net (Running), 100.64.0.2, tag:reverse-proxy
3 clients wait for the mailbox
smtp   stalwart:25   DOWN since 2026-01-02T03:04:05Z: cannot connect: refused
imaps  stalwart:993  up since 2026-01-02T03:04:05Z: * OK ready; certificate until 2026-03-04T05:06:07Z
web    stalwart:80   not known yet
";
        assert_eq!(status.to_string(), expected);
        status.not_ready = vec!["the tailnet node is not started".into(), "the edge is stopping".into()];
        let first =
            "tailwart-edge 0.1.0 is not ready: the tailnet node is not started; the edge is stopping\n";
        assert!(status.to_string().starts_with(first));
    }

    #[tokio::test]
    async fn an_edge_that_cannot_be_asked_is_told() {
        let unused = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = ask(unused).await.unwrap_err();
        assert!(error.contains(&unused.to_string()) && error.contains("check that the edge runs"), "{error}");
    }
}
