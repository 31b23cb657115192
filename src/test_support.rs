//! Helpers for the unit tests of several modules. They are not part of the program.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admin::board::Board;
use crate::admin::overview::Overview;
use crate::connection::end_state::EndState;
use crate::connection::ended::Ended;
use crate::connection::open::{Connection, Connections};
use crate::connection::refusal::PublicName;
use crate::connection::relay::Timeouts;
use crate::connection::{Hold, Service};
use crate::protocol::{Protocol, ProxyProtocol};
use crate::tailnet::{ConnectError, NodeStatus, PingReport};
use crate::upstream::Upstream;
use crate::upstream::dial::Dial;
use crate::upstream::peers::Peer;

/// Free addresses, found as in the integration tests.
#[path = "../tests/common/net.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
pub mod net;

/// Dials a port of this machine, or nothing at all.
pub struct Loopback(Mutex<Option<SocketAddr>>);

impl Loopback {
    /// Dials this address from now on, or nothing.
    pub fn lead_to(&self, address: Option<SocketAddr>) {
        *self.0.lock().unwrap() = address;
    }
}

impl Dial for Loopback {
    type Stream = TcpStream;

    async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
        let address = *self.0.lock().unwrap();
        match address {
            Some(address) => TcpStream::connect(address).await.map_err(|_| ConnectError::Refused),
            None => std::future::pending().await,
        }
    }

    async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
        Err(ConnectError::NoSuchPeer)
    }
}

/// A service that turns clients away at once when the mailbox is away, and the address it dials.
pub fn service(address: Option<SocketAddr>, proxy_protocol: ProxyProtocol) -> Service<Loopback> {
    service_to(Loopback(Mutex::new(address)), proxy_protocol)
}

pub fn service_to<D: Dial>(dialler: D, proxy_protocol: ProxyProtocol) -> Service<D> {
    let minute = Duration::from_secs(60);
    let peer = Arc::new(Peer::new("mailbox".into()));
    Service {
        name: "smtp".into(),
        protocol: Protocol::Tcp,
        upstream: Arc::new(Upstream::new(Arc::new(dialler), vec![peer], 25, minute)),
        proxy_protocol,
        timeouts: Timeouts { idle: minute, half_close: minute, quiet: minute },
        hold: Hold { limit: Duration::ZERO, places: Arc::new(Semaphore::new(10)), last_dial: Duration::ZERO },
        public_name: PublicName::new(Some("mx.example.org".into())),
        drain: CancellationToken::new(),
        connections: Connections::new(0).of_listener("smtp", "mailbox:25".into()),
    }
}

/// A client's connection to the listener "smtp".
pub fn connection(connections: &Arc<Connections>, client: &str) -> Connection {
    connections.of_listener("smtp", "stalwart:25".into()).enter(client.parse().unwrap())
}

/// An end in this state.
pub fn ended(state: EndState) -> Ended {
    Ended { state, why: "so it was".into() }
}

/// The overview of an edge in this state.
pub fn overview(node: Option<NodeStatus>, draining: bool, board: Option<Board>) -> Overview {
    let drain = CancellationToken::new();
    if draining {
        drain.cancel();
    }
    let node = node.map(|status| watch::channel(status).1);
    Overview {
        started: Instant::now(),
        node: watch::channel(node).1,
        library: OnceLock::new(),
        memory_limit: AtomicU64::new(0),
        tags: vec!["tag:reverse-proxy".into()],
        board: watch::channel(board.map(Arc::new)).1,
        connections: Connections::new(0),
        lost_lines: None,
        drain,
    }
}

/// What `/status` answers.
pub const STATUS: &str = r#"{
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
         "client": "192.0.2.9:25", "end": "sQ", "why": "held for the whole hold time"}
    ]
}"#;
