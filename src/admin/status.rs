//! The state of a running edge: what `/status` answers, and how `tailwart-edge status` prints it.
//!
//! Invariant: the edge has made all text harmless for a terminal before it sends it.
//!
//! Deliberately not here: one answer for scripts (that is `/readyz`), looking for causes (see `doctor.rs`), and
//! asking a running edge (see `cli/status.rs`).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::connection::ended::FailureView;
use crate::connection::view::ConnectionView;
use crate::support::text::{bytes, lasting, table};
use crate::upstream::health::{Seen, State};

/// The path on the admin listener.
pub const PATH: &str = "/status";

/// The state of an edge.
///
/// The reader may be of another version: it ignores fields that it does not know, and a missing field is
/// empty. Only a few fields are required: the ones that show that an edge answered, names, and times.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The version of tailwart-edge.
    pub version: String,
    /// The version of the Tailscale that is linked in.
    #[serde(default)]
    pub tailscale: String,
    /// When the edge was started, computed from the clock of now.
    pub started: Timestamp,
    /// When the edge answered, by its own clock.
    pub now: Timestamp,
    /// Its node on the tailnet.
    #[serde(default)]
    pub node: NodeView,
    /// Why it is not ready; empty when it is.
    #[serde(default)]
    pub not_ready: Vec<String>,
    /// What an operator should know, although the edge is ready.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Its memory.
    #[serde(default)]
    pub memory: MemoryView,
    /// How many clients wait for a mailbox that cannot be reached.
    #[serde(default)]
    pub held: usize,
    /// Its listeners, and those that a reload has removed.
    #[serde(default)]
    pub listeners: Vec<ListenerView>,
    /// Each server, as each listener uses it.
    #[serde(default)]
    pub upstreams: Vec<UpstreamView>,
    /// How many connections there are.
    #[serde(default)]
    pub open: usize,
    /// The clients with the most connections.
    #[serde(default)]
    pub clients: Vec<ClientView>,
    /// The connections; if there are very many, only the oldest.
    #[serde(default)]
    pub connections: Vec<ConnectionView>,
    /// The last failures, the latest first.
    #[serde(default)]
    pub failures: Vec<FailureView>,
}

/// The node of an edge. Its login address is left out: whoever opens it first owns the node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeView {
    /// Its MagicDNS name.
    pub name: String,
    /// Its tailnet addresses.
    pub ips: Vec<IpAddr>,
    /// The tags it holds, which the control server gave it.
    pub tags: Vec<String>,
    /// Tailscale's word for its state, such as `Running`.
    pub state: String,
    /// When its key expires, if it does.
    pub key_expiry: Option<Timestamp>,
    /// The region of its home relay; empty when it has none.
    pub home_region: String,
}

/// The memory of an edge, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryView {
    /// The limit that it aims to stay below.
    pub limit_bytes: u64,
    /// The resident memory of the process.
    pub resident_bytes: u64,
    /// Bytes that connections may have in flight now, beyond the minimum that each has.
    pub in_flight_bytes: u64,
    /// The most that all connections together may have in flight.
    pub in_flight_max_bytes: u64,
}

impl fmt::Display for MemoryView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // MiB, as in limits.memory_mib.
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(f, "{:.0} of {:.0} MiB, ", mib(self.resident_bytes), mib(self.limit_bytes))?;
        write!(f, "{:.1} of {:.0} MiB in flight", mib(self.in_flight_bytes), mib(self.in_flight_max_bytes))
    }
}

/// A listener, with counts since the start of the process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenerView {
    /// Its name in the configuration.
    pub name: String,
    /// The protocol of its clients.
    pub protocol: String,
    /// The addresses it listens on; empty once it was removed.
    pub addresses: Vec<SocketAddr>,
    /// Whether a reload has removed it. It is listed for as long as it has connections.
    #[serde(default)]
    pub removed: bool,
    /// The servers it forwards to.
    pub upstream: String,
    /// Connections that are open.
    pub open: usize,
    /// Connections that have ended.
    pub ended: u64,
    /// How many of these failed because of the edge or the mailbox.
    pub failed: u64,
    /// Bytes passed to the mailbox, including open connections.
    pub sent: u64,
    /// Bytes passed to clients, including open connections.
    pub received: u64,
}

/// A server as a listener uses it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UpstreamView {
    /// The listener's name.
    pub listener: String,
    /// The server, as `HOST:PORT`.
    pub upstream: String,
    /// The protocol of the listener.
    pub protocol: String,
    /// The path that packets to it took last: direct or relayed.
    pub path: Option<String>,
    /// The round trip on that path.
    pub latency_ms: Option<f64>,
    /// What its probe has found.
    pub probe: Seen,
}

/// A client's share of the connections.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientView {
    /// An IPv4 address, or the first one of an IPv6 /64.
    pub client: IpAddr,
    /// How many connections it has.
    #[serde(default)]
    pub connections: usize,
    /// Bytes from it on its open connections.
    #[serde(default)]
    pub sent: u64,
    /// Bytes to it on its open connections.
    #[serde(default)]
    pub received: u64,
}

/// How many clients and failures are shown on one screen.
const SHOWN: usize = 5;

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let up = lasting(self.now.duration_since(self.started).as_secs());
        match &self.not_ready[..] {
            [] => writeln!(f, "tailwart-edge {} is ready; started {up} ago", self.version)?,
            reasons => writeln!(f, "tailwart-edge {} is NOT READY: {}", self.version, reasons.join("; "))?,
        }
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))?;
        writeln!(f, "node {}", self.node)?;
        let held = if self.held == 0 { "no client waits".to_owned() } else { format!("{} WAIT", self.held) };
        writeln!(f, "connections: {}; {held} for the mailbox", self.open)?;
        writeln!(f, "memory: {}", self.memory)?;
        self.listeners(f)?;
        self.upstreams(f)?;
        self.clients(f)?;
        self.failures(f)
    }
}

impl Status {
    /// As text, or as one line of JSON.
    pub fn shown(&self, json: bool) -> String {
        if json { serde_json::json!(self).to_string() + "\n" } else { self.to_string() }
    }

    fn listeners(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heads = ["LISTENER", "ADDRESSES", "OPEN", "ENDED", "FAILED", "FROM CLIENTS", "TO CLIENTS"];
        let rows = self.listeners.iter().map(|listener| {
            let addresses: Vec<String> = listener.addresses.iter().map(ToString::to_string).collect();
            vec![
                listener.name.clone(),
                if listener.removed { "removed".to_owned() } else { addresses.join(" ") },
                listener.open.to_string(),
                listener.ended.to_string(),
                listener.failed.to_string(),
                bytes(listener.sent),
                bytes(listener.received),
            ]
        });
        table(f, &heads, rows)
    }

    fn upstreams(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.upstreams.iter().map(|upstream| {
            let UpstreamView { listener, upstream, path, latency_ms, probe, .. } = upstream;
            let latency = latency_ms.map(|ms| format!(", {ms:.1} ms")).unwrap_or_default();
            let path = path.as_ref().map_or_else(|| "-".to_owned(), |path| format!("{path}{latency}"));
            vec![listener.clone(), upstream.clone(), path, ProbeLine(probe).to_string()]
        });
        table(f, &["LISTENER", "UPSTREAM", "PATH", "PROBE"], rows)
    }

    fn clients(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.clients.iter().take(SHOWN).map(|share| {
            let ClientView { client, connections, sent, received } = share;
            vec![client.to_string(), connections.to_string(), bytes(*sent), bytes(*received)]
        });
        table(f, &["CLIENT", "OPEN", "FROM IT", "TO IT"], rows)
    }

    fn failures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.failures.iter().take(SHOWN).map(|failure| {
            let FailureView { last, count, listener, client, end, why, .. } = failure;
            vec![
                format!("{last:.0}"),
                count.to_string(),
                listener.clone(),
                client.ip().to_string(),
                end.clone(),
                why.clone(),
            ]
        });
        table(f, &["LAST FAILURES", "TIMES", "LISTENER", "LAST CLIENT", "END", "WHY"], rows)
    }
}

impl fmt::Display for NodeView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NodeView { name, ips, tags, state, key_expiry, home_region } = self;
        let ips: Vec<String> = ips.iter().map(ToString::to_string).collect();
        write!(f, "{name} ({state}), {}, {}", ips.join(", "), tags.join(", "))?;
        if !home_region.is_empty() {
            write!(f, ", home relay {home_region}")?;
        }
        key_expiry.map_or(Ok(()), |expiry| write!(f, ", key until {expiry:.0}"))
    }
}

/// What a probe has found, in a line.
pub struct ProbeLine<'a>(pub &'a Seen);

impl fmt::Display for ProbeLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.since;
        match self.0.state {
            State::Unprobed => write!(f, "not probed"),
            State::Unknown => write!(f, "not known yet"),
            State::Up => write!(f, "up since {since:.0}{}", Details(self.0)),
            State::Down => write!(f, "DOWN since {since:.0}{}", Details(self.0)),
        }
    }
}

/// The end of that line, after the time: the problem, or the greeting and the certificate.
pub struct Details<'a>(pub &'a Seen);

impl fmt::Display for Details<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Seen { finding, problem, .. } = self.0;
        if let Some(problem) = problem {
            return write!(f, ": {problem}");
        }
        let Some(finding) = finding else { return Ok(()) };
        // A port where the client speaks first has no greeting.
        if !finding.greeting.is_empty() {
            write!(f, ": {}", finding.greeting)?;
        }
        match &finding.certificate {
            Some(certificate) => write!(f, "; certificate until {:.0}", certificate.not_after),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value};

    use super::*;
    use crate::test_support::STATUS;

    #[test]
    fn one_screen_says_whether_mail_flows() {
        let mut status: Status = serde_json::from_str(STATUS).unwrap();
        let expected = "\
tailwart-edge 0.1.0 is ready; started 2 d 4 h ago
warning: listener web: no upstream answers
node edge.ts.net (Running), 100.64.0.2, tag:reverse-proxy, home relay fra
connections: 1; 3 WAIT for the mailbox
memory: 39 of 256 MiB, 0.1 of 16 MiB in flight

LISTENER  ADDRESSES           OPEN  ENDED  FAILED  FROM CLIENTS  TO CLIENTS
smtp      0.0.0.0:25 [::]:25  1     1234   5       999 B         12.3 MB
imaps     0.0.0.0:993         0     0      0       0 B           0 B
old       removed             1     2      0       3 B           4 B

LISTENER  UPSTREAM      PATH                             PROBE
smtp      stalwart:25   direct 192.0.2.1:41641, 12.3 ms  DOWN since 2026-01-02T03:04:05Z: cannot connect: refused
imaps     stalwart:993  -                                up since 2026-01-02T03:04:05Z: * OK ready; certificate until 2026-03-04T05:06:07Z

CLIENT     OPEN  FROM IT  TO IT
192.0.2.7  1     10 B     2.0 kB

LAST FAILURES         TIMES  LISTENER  LAST CLIENT  END  WHY
2026-01-03T04:00:00Z  12     smtp      192.0.2.9    sQ   held for the whole hold time
";
        assert_eq!(status.to_string(), expected);
        status.not_ready = vec!["the tailnet node is not started".into(), "the edge is stopping".into()];
        let first =
            "tailwart-edge 0.1.0 is NOT READY: the tailnet node is not started; the edge is stopping\n";
        assert!(status.to_string().starts_with(first));
    }

    /// The path of each field of a value, at any depth.
    fn fields(value: &Value, path: &str) -> Vec<String> {
        let below: Vec<(String, &Value)> = match value {
            Value::Object(object) => object.iter().map(|(name, value)| (name.clone(), value)).collect(),
            Value::Array(list) => {
                list.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
            }
            _ => Vec::new(),
        };
        let paths = below.iter().flat_map(|(name, value)| {
            let path = format!("{path}/{name}");
            let deeper = fields(value, &path);
            (!is_index(name)).then_some(path).into_iter().chain(deeper)
        });
        paths.collect()
    }

    fn is_index(name: &str) -> bool {
        name.parse::<usize>().is_ok()
    }

    fn parent<'a>(answer: &'a mut Value, path: &'a str) -> (&'a mut Map<String, Value>, &'a str) {
        let (parent, name) = path.rsplit_once('/').unwrap();
        (answer.pointer_mut(parent).and_then(Value::as_object_mut).unwrap(), name)
    }

    /// The fields that are required. In a list, each item needs them.
    const REQUIRED: [&str; 12] = [
        "/version",
        "/started",
        "/now",
        "/upstreams/probe/state",
        "/upstreams/probe/since",
        "/upstreams/probe/finding/certificate/not_after",
        "/clients/client",
        "/connections/id",
        "/connections/listener",
        "/connections/client",
        "/failures/last",
        "/failures/client",
    ];

    fn is_required(path: &str) -> bool {
        let names: Vec<&str> = path.split('/').filter(|name| !is_index(name)).collect();
        REQUIRED.contains(&&*names.join("/"))
    }

    #[test]
    fn an_edge_of_another_version_can_be_asked() {
        let answer: Value = serde_json::from_str(STATUS).unwrap();
        let known = fields(&answer, "");
        assert!(known.len() > 60 && known.iter().filter(|path| is_required(path)).count() >= REQUIRED.len());
        for path in &known {
            let mut older = answer.clone();
            let (object, name) = parent(&mut older, path);
            object.remove(name);
            let told = serde_json::from_value::<Status>(older).map(|status| status.to_string());
            assert_eq!(told.is_err(), is_required(path), "{path}: {told:?}");

            let mut newer = answer.clone();
            let (object, _) = parent(&mut newer, path);
            object.insert("news".into(), serde_json::json!({"of": [1, "kind"]}));
            let told = serde_json::from_value::<Status>(newer).map(|status| status.to_string());
            assert!(told.is_ok(), "{path}: {told:?}");
        }
        let word = answer.to_string().replace(r#""state":"down""#, r#""state":"asleep""#);
        let status: Status = serde_json::from_str(&word).unwrap();
        assert_eq!(status.upstreams[0].probe.state, State::Unknown);
    }

    #[test]
    fn what_is_not_probed_is_not_awaited() {
        let seen = |state: &str| {
            let since = "2026-01-02T03:04:05Z";
            let seen = serde_json::json!({"state": state, "since": since, "probed": null});
            ProbeLine(&serde_json::from_value(seen).unwrap()).to_string()
        };
        assert_eq!([seen("unprobed"), seen("unknown")], ["not probed", "not known yet"]);
    }
}
