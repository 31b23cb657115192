//! An edge on a tailnet with a mailbox node: what most tests start with.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::common::cert::Certificate;
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::log::Log;
use crate::common::net::is_listening_beside;
use crate::common::netns::Namespace;
use crate::common::process::Daemon;
use crate::common::tailnet::{AuthKey, Options, TestTailnet};
use crate::common::wait::eventually;
use crate::common::{http, proxy_header};

/// The name of the mailbox's node.
pub const MAILBOX: &str = "stalwart";

/// Bounds whatever a test waits for; a busy machine needs some of it.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Our program's own name on the tailnet.
pub const EDGE: &str = "tailwart-edge";

/// A failure that nothing has to be waited for. Most of it is room for a busy
/// machine; it is well below the default join time-out.
pub const AT_ONCE: Duration = Duration::from_secs(8);

/// Beyond a join time-out: two seconds to find out why, and room for a busy
/// machine.
pub const AFTER_JOIN: Duration = Duration::from_secs(2 + 5);

/// A tailnet with one mailbox node and one edge on it.
pub struct Setup {
    // Dropped in this order: the edge first.
    pub edge: Edge,
    pub tailnet: TestTailnet,
}

/// A tailnet whose mailbox node forwards the given ports to real servers on
/// loopback.
pub fn tailnet_with(forwards: &[(u16, SocketAddr)]) -> TestTailnet {
    let tailnet = TestTailnet::start();
    tailnet.add_node(MAILBOX, &["tag:stalwart"], forwards);
    tailnet
}

/// The binary under test, configured for the tailnet but without listeners.
pub fn edge_on(tailnet: &TestTailnet) -> Builder {
    Edge::builder(env!("CARGO_BIN_EXE_tailwart-edge"))
        .control_url(tailnet.control_url())
        .auth_key("tskey-auth-test")
        .upstream(MAILBOX)
}

/// An edge that serves the listeners, once it is ready, for tests of what
/// happens on connections.
pub fn start(forwards: &[(u16, SocketAddr)], listeners: &[Listener]) -> Setup {
    start_with(forwards, listeners, |builder| builder)
}

/// The same with settings of one's own, and all others at their default.
pub fn start_with(
    forwards: &[(u16, SocketAddr)],
    listeners: &[Listener],
    configure: impl FnOnce(Builder) -> Builder,
) -> Setup {
    let tailnet = tailnet_with(forwards);
    let builder = listeners.iter().cloned().fold(edge_on(&tailnet), Builder::listener);
    let edge = configure(builder).spawn();
    edge.wait_ready(LIMIT);
    Setup { edge, tailnet }
}

/// Whether what takes too long for every day is tested too: `make soak`.
pub fn is_soak() -> bool {
    std::env::var_os("TAILWART_SOAK").is_some()
}

/// What holds or probes is tested without the other of the two: a probe is a connection too.
pub fn without_probe(edge: Builder) -> Builder {
    edge.set("probe", "interval", r#""0s""#)
}

/// The value of a metric, given as its line begins, with labels; none when there is no such line.
#[track_caller]
pub fn metric(edge: &Edge, name: &str) -> Option<f64> {
    let metrics = http::get(edge.addr("admin"), "/metrics").body;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is no number: {value}")))
}

/// How many clients are held.
#[track_caller]
pub fn held(edge: &Edge) -> usize {
    let value = metric(edge, "tailwart_edge_held_connections");
    value.unwrap_or_else(|| panic!("it is not measured\n{}", edge.log().tail())) as usize
}

/// Waits until so many clients are held.
#[track_caller]
pub fn holds(edge: &Edge, count: usize) {
    let reached = eventually(LIMIT, || held(edge) == count);
    assert!(reached, "{} are held, not {count}\n{}", held(edge), edge.log().tail());
}

/// How the line of a connection begins that has ended. The client's address alone may be that of an earlier
/// connection, to another listener.
pub fn line_of(listener: &str, client: SocketAddr) -> String {
    format!(" listener={listener:?} client={client} ")
}

/// The PROXY header of a client's connection.
#[track_caller]
pub fn header_of(client: &TcpStream) -> Vec<u8> {
    let ends = (client.local_addr(), client.peer_addr());
    let (Ok(source), Ok(destination)) = ends else { panic!("it is not connected: {ends:?}") };
    proxy_header::v2(source, destination)
}

/// Reads exactly this.
#[track_caller]
pub fn hears(client: &mut TcpStream, expected: &[u8]) {
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut bytes = vec![0; expected.len()];
    client.read_exact(&mut bytes).unwrap_or_else(|error| panic!("not {}: {error}", expected.escape_ascii()));
    assert_eq!(bytes.escape_ascii().to_string(), expected.escape_ascii().to_string());
}

/// Reads exactly this and an orderly end: no reset, nothing lost, nothing more.
#[track_caller]
pub fn hears_last(client: &mut TcpStream, expected: &[u8]) {
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut bytes = Vec::new();
    let end = client.read_to_end(&mut bytes).map_err(|error| error.kind());
    assert_eq!(
        (bytes.escape_ascii().to_string(), end),
        (expected.escape_ascii().to_string(), Ok(expected.len()))
    );
}

pub fn tcp(name: &str) -> Listener {
    Listener::new(name, "tcp", 2525)
}

/// The control servers that an edge may meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    Tailscale,
    Headscale,
}

impl Control {
    pub const ALL: [Control; 2] = [Control::Tailscale, Control::Headscale];

    /// The key that [`Control::closed_tailnet`] lets in.
    pub fn key(self) -> &'static str {
        match self {
            Control::Tailscale => "tskey-auth-good-1",
            Control::Headscale => "hskey-auth-0123456789ab-good",
        }
    }

    /// A tailnet that lets in only one key, and an edge for it that has none.
    pub fn closed_tailnet(self) -> (TestTailnet, Builder) {
        let auth_keys = vec![self.key().to_owned()];
        let headscale = self == Control::Headscale;
        let tailnet = TestTailnet::start_with(&Options { auth_keys, headscale, ..Options::default() });
        tailnet.set_auth_key_table(&[self.auth_key()]);
        let edge = edge_on(&tailnet).without_auth_key().listener(tcp("mail"));
        (tailnet, edge)
    }

    /// The same key with all that control knows of it.
    pub fn auth_key(self) -> AuthKey<'static> {
        AuthKey { key: self.key(), tags: &["tag:reverse-proxy"], ..AuthKey::default() }
    }
}

/// A tailnet of Tailscale's that lets in only this key, and an edge for it that has none.
pub fn closed_tailnet() -> (TestTailnet, Builder) {
    Control::Tailscale.closed_tailnet()
}

/// What control knows about the edge.
pub fn node(tailnet: &TestTailnet) -> Value {
    let nodes: Vec<Value> = tailnet.nodes().into_iter().filter(|node| node["name"] == EDGE).collect();
    match <[Value; 1]>::try_from(nodes) {
        Ok([node]) => node,
        Err(nodes) => panic!("control has {} edges, not one", nodes.len()),
    }
}

/// Starts the edge until it is ready, then stops it.
pub fn enrol(edge: &Builder) {
    let mut edge = edge.spawn();
    edge.wait_ready(LIMIT);
    edge.signal("TERM");
    stops(&mut edge, LIMIT);
}

/// Waits until `/readyz` answers with this code and these words.
#[track_caller]
pub fn becomes(edge: &Edge, code: u16, words: &str) {
    let admin = edge.addr("admin");
    let mut last = None;
    let reached = eventually(LIMIT, || {
        let answer = http::get(admin, "/readyz");
        let reached = answer.code == code && answer.body.contains(words);
        last = Some(answer);
        reached
    });
    assert!(reached, "wanted {code} with {words:?}, got {last:?}\n{}", edge.log().tail());
    assert_eq!(http::get(admin, "/livez").code, 200);
}

/// The edge ends by itself within the limit, with this exit code and exactly
/// one line about why, which is returned.
#[track_caller]
pub fn fails(mut edge: Edge, code: i32, within: Duration) -> String {
    let status = edge.wait_exit(within);
    let log = edge.log();
    assert_eq!(status.code(), Some(code), "{status}\n{}", log.tail());
    no_crash(log);
    let text = log.text();
    let errors: Vec<&str> = text.lines().filter(|line| line.contains(" ERROR ")).collect();
    match errors[..] {
        [one] => one.to_owned(),
        _ => panic!("{} lines tell the error, not one\n{}", errors.len(), log.tail()),
    }
}

/// The edge stops in order within the limit.
#[track_caller]
pub fn stops(edge: &mut Edge, within: Duration) {
    let status = edge.wait_exit(within);
    assert_eq!(status.code(), Some(0), "{status}\n{}", edge.log().tail());
    assert_eq!(edge.log().count(" ERROR "), 0, "{}", edge.log().tail());
    no_crash(edge.log());
}

/// Neither half of the program has crashed or shown its insides.
#[track_caller]
pub fn no_crash(log: &Log) {
    for trace in
        ["panicked at", "panic:", "backtrace", "[running]:", "fatal error:", "SIGSEGV", "stack overflow"]
    {
        assert_eq!(log.count(trace), 0, "a crash: {trace:?}\n{}", log.tail());
    }
}

/// How many warnings there are, without that of a mailbox's node which is slow to answer the first ping: a node
/// that has just joined may still be unknown to it, and that is no test's subject.
pub fn warnings(edge: &Edge) -> usize {
    let is_counted =
        |line: &&String| line.contains(" WARN ") && !line.contains("upstream does not answer a ping");
    edge.log().lines().iter().filter(is_counted).count()
}

/// The line tells all of these.
#[track_caller]
pub fn tells(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "{word:?} is missing from: {line}");
    }
}

/// An HAProxy that takes TLS on port 443 of a host of its own and does what the
/// directives say. Its configuration is beside the certificate.
pub fn tls_server(host: &Namespace, certificate: &Certificate, directives: &str) -> Daemon {
    let settings = format!(
        "listen server\n timeout client 1h\n bind 127.0.0.1:443 ssl crt {}\n {directives}",
        certificate.together().display()
    );
    let config = certificate.cert.with_file_name("haproxy.cfg");
    std::fs::write(&config, settings).expect("its directory takes files");
    let daemon = Daemon::spawn("haproxy", host.command("haproxy").arg("-db").arg("-f").arg(config));
    daemon.wait_ready(LIMIT, None, || is_listening_beside(daemon.pid(), ([127, 0, 0, 1], 443).into()));
    daemon
}
