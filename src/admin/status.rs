//! The state of a running edge: what `/status` says, and `tailwart-edge status`, which shows it on
//! one screen.
//!
//! Invariants: it asks the edge and nobody else, changes nothing, and has a deadline. What it prints
//! was made harmless by the edge.
//!
//! Deliberately not here: a judgement for scripts (that is `/readyz`), and looking for causes (see
//! `doctor.rs`).

use std::fmt;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};

use crate::connection::ledger::{ConnectionView, Failure};
use crate::support::http_client::{ask_edge, cannot_ask};
use crate::upstream::health::{Seen, State};

/// The path at which the admin port says it.
pub const PATH: &str = "/status";

/// How long the edge may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Between two questions of who watches.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// What an edge says of itself.
///
/// Who reads it may be of another version: what it does not know it ignores, and what is not there is
/// empty. Only what makes it the answer of an edge has to be there, what names a thing, and times.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// That of the Tailscale in it.
    #[serde(default)]
    pub tailscale: String,
    /// When it was started, by the clock as it is now.
    pub started: Timestamp,
    /// When it said this.
    pub now: Timestamp,
    /// Its node.
    #[serde(default)]
    pub node: NodeView,
    /// Why it is not ready; empty when it is.
    #[serde(default)]
    pub not_ready: Vec<String>,
    /// What is wrong besides.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What it has of the machine's memory.
    #[serde(default)]
    pub memory: MemoryView,
    /// How many clients wait for a mailbox that cannot be reached.
    #[serde(default)]
    pub held: usize,
    /// Its listeners.
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
    /// The connections; of very many the oldest.
    #[serde(default)]
    pub connections: Vec<ConnectionView>,
    /// The last failures, the latest first.
    #[serde(default)]
    pub failures: Vec<Failure>,
}

/// The node of an edge. Its login address is left out: whoever opens it first owns the node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
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
    /// The region of its home relay; empty when it has none.
    pub home_region: String,
}

/// The memory of an edge, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryView {
    /// What it is to stay below.
    pub limit_bytes: u64,
    /// What is in use.
    pub resident_bytes: u64,
    /// What connections hold for bytes in flight, beyond the floor that each has.
    pub in_flight_bytes: u64,
    /// The most that all connections together may have in flight.
    pub in_flight_max_bytes: u64,
}

impl fmt::Display for MemoryView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In the unit of limits.memory_mib.
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(f, "{:.0} of {:.0} MiB, ", mib(self.resident_bytes), mib(self.limit_bytes))?;
        write!(f, "{:.1} of {:.0} MiB in flight", mib(self.in_flight_bytes), mib(self.in_flight_max_bytes))
    }
}

/// A listener.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenerView {
    /// Its name.
    pub name: String,
    /// What is spoken there.
    pub protocol: String,
    /// Where clients come in; nowhere, once it was removed.
    pub addresses: Vec<SocketAddr>,
    /// Whether a reload has removed it: it is here for as long as it has connections.
    #[serde(default)]
    pub removed: bool,
    /// Where its connections go.
    pub upstream: String,
    /// Connections there are.
    pub open: usize,
    /// Connections that have ended since the start.
    pub ended: u64,
    /// Of these, those that our side or the mailbox has failed.
    pub failed: u64,
    /// Bytes to the mailbox.
    pub sent: u64,
    /// Bytes to clients.
    pub received: u64,
}

/// A server as a listener uses it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UpstreamView {
    /// The listener's name.
    pub listener: String,
    /// The server's address.
    pub upstream: String,
    /// What is spoken there.
    pub protocol: String,
    /// The path that packets to it took last: direct or relayed.
    pub path: Option<String>,
    /// The round trip on that path.
    pub latency_ms: Option<f64>,
    /// What its probe has found.
    pub probe: Seen,
}

/// What a client has of the connections.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientView {
    /// An IPv4 address, or the first one of an IPv6 /64.
    pub client: IpAddr,
    /// How many connections it has.
    #[serde(default)]
    pub connections: usize,
    /// Bytes from it.
    #[serde(default)]
    pub sent: u64,
    /// Bytes to it.
    #[serde(default)]
    pub received: u64,
}

/// Asks the edge that has this admin address, or says why that cannot be done.
pub async fn ask(admin: SocketAddr) -> Result<Status, String> {
    let answer = ask_edge(admin, PATH, LIMIT).await?;
    serde_json::from_slice(answer.body()).map_err(|_| cannot_ask(admin, "its answer is not that of an edge"))
}

/// Shows what the edge says, again and again, each time on a screen that was cleared if `clears`;
/// an edge that cannot be asked is told and asked on. Returns when `screen` takes nothing more.
pub async fn watch(admin: SocketAddr, json: bool, clears: bool, screen: &mut impl Write) {
    const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";
    let mut ticks = interval(WATCH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let text = match ask(admin).await {
            Ok(status) => status.shown(json),
            Err(problem) if json => serde_json::json!({ "error": problem }).to_string() + "\n",
            Err(problem) => problem + "\n",
        };
        let before = if clears { CLEAR } else { "" };
        if write!(screen, "{before}{text}").and_then(|()| screen.flush()).is_err() {
            return;
        }
    }
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
            vec![listener.clone(), upstream.clone(), path, Line(probe).to_string()]
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
            let Failure { last, count, listener, client, end, why, .. } = failure;
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

/// Columns under their heads, after an empty line; nothing without rows.
fn table(f: &mut fmt::Formatter<'_>, heads: &[&str], rows: impl Iterator<Item = Vec<String>>) -> fmt::Result {
    let heads = heads.iter().map(|&head| head.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(heads).chain(rows).collect();
    if rows.len() == 1 {
        return Ok(());
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    writeln!(f)?;
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// A number of bytes for people.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1e3;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while value >= 999.95 && units.len() > 0 {
        value /= 1e3;
        unit = units.next();
    }
    format!("{value:.1} {}", unit.unwrap_or(&"PB"))
}

/// A time span for people.
pub fn lasting(seconds: i64) -> String {
    match seconds {
        ..60 => format!("{} s", seconds.max(0)),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// What a probe has found, in a line.
pub struct Line<'a>(pub &'a Seen);

impl fmt::Display for Line<'_> {
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

/// The rest of that line, from its colon.
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
pub(crate) mod tests {
    use serde_json::{Map, Value};

    use super::*;

    /// As `/status` has it.
    pub const ANSWER: &str = r#"{
        "version": "0.1.0", "tailscale": "1.2.3",
        "started": "2026-01-01T00:00:00Z", "now": "2026-01-03T04:05:06Z",
        "node": {"name": "edge.ts.net", "ips": ["100.64.0.2"], "tags": ["tag:reverse-proxy"],
                 "state": "Running", "key_expiry": null, "home_region": "fra"},
        "not_ready": [], "warnings": ["listener web: no upstream answers"],
        "memory": {"limit_bytes": 268435456, "resident_bytes": 41200000,
                   "in_flight_bytes": 131072, "in_flight_max_bytes": 16777216},
        "held": 3, "open": 1,
        "listeners": [
            {"name": "smtp", "protocol": "smtp", "addresses": ["0.0.0.0:25", "[::]:25"],
             "upstream": "stalwart:25", "open": 1, "ended": 1234, "failed": 5, "sent": 999, "received": 12345678},
            {"name": "imaps", "protocol": "imaps", "addresses": ["0.0.0.0:993"],
             "upstream": "stalwart:993", "open": 0, "ended": 0, "failed": 0, "sent": 0, "received": 0},
            {"name": "old", "protocol": "imap", "addresses": [], "removed": true,
             "upstream": "stalwart:143", "open": 1, "ended": 2, "failed": 0, "sent": 3, "received": 4}
        ],
        "upstreams": [
            {"listener": "smtp", "upstream": "stalwart:25", "protocol": "smtp", "path": "direct 192.0.2.1:41641",
             "latency_ms": 12.345, "probe":
                {"state": "down", "since": "2026-01-02T03:04:05.678Z", "probed": null, "finding": null,
                 "problem": "cannot connect: refused"}},
            {"listener": "imaps", "upstream": "stalwart:993", "protocol": "imaps", "path": null,
             "latency_ms": null, "probe":
                {"state": "up", "since": "2026-01-02T03:04:05Z", "probed": null, "problem": null, "finding":
                    {"greeting": "* OK ready", "connect_ms": 1, "total_ms": 2, "certificate":
                        {"names": ["mx.example.org"], "not_after": "2026-03-04T05:06:07Z"}}}}
        ],
        "clients": [{"client": "192.0.2.7", "connections": 1, "sent": 10, "received": 2000}],
        "connections": [
            {"id": 7, "listener": "smtp", "client": "192.0.2.7:4711", "stage": "relaying", "upstream": "stalwart:25",
             "path": "direct 192.0.2.1:41641", "sent": 10, "received": 2000, "seconds": 61}
        ],
        "failures": [
            {"last": "2026-01-03T04:00:00Z", "count": 12, "listener": "smtp", "upstream": "stalwart:25",
             "client": "192.0.2.9:25", "end": "sQ", "why": "held until its time was over"}
        ]
    }"#;

    #[test]
    fn one_screen_says_whether_mail_flows() {
        let mut status: Status = serde_json::from_str(ANSWER).unwrap();
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
2026-01-03T04:00:00Z  12     smtp      192.0.2.9    sQ   held until its time was over
";
        assert_eq!(status.to_string(), expected);
        status.not_ready = vec!["the tailnet node is not started".into(), "the edge is stopping".into()];
        let first =
            "tailwart-edge 0.1.0 is NOT READY: the tailnet node is not started; the edge is stopping\n";
        assert!(status.to_string().starts_with(first));
    }

    /// Each field of a value, in whatever depth, as a path.
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

    /// Without which there is nothing to show; of lists, in each of their items.
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
        let answer: Value = serde_json::from_str(ANSWER).unwrap();
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
            Line(&serde_json::from_value(seen).unwrap()).to_string()
        };
        assert_eq!([seen("unprobed"), seen("unknown")], ["not probed", "not known yet"]);
    }

    #[test]
    fn numbers_are_for_people() {
        let texts = [0, 999, 1000, 999_949, 999_950, 12_345_678_901, u64::MAX].map(bytes);
        assert_eq!(texts, ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "12.3 GB", "18446.7 PB"]);
        let texts = [-5, 59, 60, 3599, 3600, 86_399, 90_000].map(lasting);
        assert_eq!(texts, ["0 s", "59 s", "1 min", "59 min", "1 h 0 min", "23 h 59 min", "1 d 1 h"]);
    }

    /// Takes so many bytes and no more.
    struct Screen(Vec<u8>, usize);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0.len() + bytes.len() > self.1 {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn who_watches_sees_it_again_and_again_until_he_leaves() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let edge = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = edge.local_addr().unwrap();
        let answers = tokio::spawn(async move {
            // Away at first, and back.
            drop(edge.accept().await.unwrap());
            let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length";
            loop {
                let (mut stream, _) = edge.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await;
                let answer = format!("{head}: {}\r\n\r\n{ANSWER}", ANSWER.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        tokio::time::pause();
        let mut screen = Screen(Vec::new(), 4000);
        watch(admin, false, true, &mut screen).await;
        answers.abort();
        let text = String::from_utf8(screen.0).unwrap();
        let screens: Vec<&str> = text.split("\x1b[H\x1b[2J\x1b[3J").collect();
        assert!(screens.len() >= 3 && screens[1].contains("cannot ask the edge"), "{text}");
        assert!(screens[2].starts_with("tailwart-edge 0.1.0 is ready"), "{text}");
    }

    #[tokio::test]
    async fn another_server_is_not_taken_for_an_edge() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = other.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = other.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await;
        });
        let error = ask(admin).await.unwrap_err();
        let expected =
            format!("cannot ask the edge at {admin}: its answer is not that of an edge; check that");
        assert!(error.starts_with(&expected), "{error}");
    }
}
