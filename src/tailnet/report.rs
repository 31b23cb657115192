//! The library's answers: about a peer, and about the resources that the library itself uses.

use std::fmt;

use serde::Deserialize;

/// What a ping beneath TCP found out about a peer.
#[derive(Clone, Debug, Deserialize)]
pub struct PingReport {
    /// The peer's address.
    pub ip: std::net::IpAddr,
    /// Whether the peer answered.
    pub answered: bool,
    /// Round-trip time in milliseconds.
    pub latency_ms: f64,
    /// The peer's UDP address when the path is direct, else empty.
    pub direct: String,
    /// The relay in use otherwise, else empty.
    pub relay: String,
    /// Whether the control server sees the peer.
    pub online: bool,
    /// Whether this node has a network: it reaches the peer or the control server. Without that, a peer's silence
    /// means nothing.
    pub network: bool,
    /// When the control server last saw an offline peer (RFC 3339), else empty.
    pub last_seen: String,
}

/// The path that packets to a peer take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Straight to this UDP address.
    Direct(String),
    /// Through a relay: the region's code, or a peer relay's address.
    Relay(String),
}

impl PingReport {
    /// The path that the answer took.
    pub fn route(&self) -> Route {
        if self.direct.is_empty() {
            Route::Relay(self.relay.clone())
        } else {
            Route::Direct(self.direct.clone())
        }
    }
}

impl fmt::Display for Route {
    /// In words: `direct 192.0.2.7:41641` or `relayed via fra`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Route::Direct(address) => write!(f, "direct {address}"),
            Route::Relay(relay) => write!(f, "relayed via {relay}"),
        }
    }
}

/// The resources that the library's Go half uses (`tailscale_figures` in `tailscale.h`).
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub(crate) struct Figures {
    /// Goroutines of the process.
    pub goroutines: u64,
    /// Heap in spans that hold objects.
    pub heap_in_use_bytes: u64,
    /// Heap in spans without objects, including those that were returned to the system.
    pub heap_idle_bytes: u64,
    /// The part of the idle heap that was returned to the system.
    pub heap_released_bytes: u64,
    /// Garbage collections since the start of the process.
    pub gc_count: u64,
    /// How long the collections have stopped Go's threads, in total.
    pub gc_pause_seconds: f64,
    /// How many threads may run Go code at once.
    pub gomaxprocs: u64,
    /// TCP endpoints of the node's stack, in whatever state.
    pub endpoints: u64,
    /// Connection handles that are not closed.
    pub handles: u64,
    /// How much all connections together may hold now, beyond their floors.
    pub in_flight_bytes: u64,
    /// The most that all connections together may have in flight.
    pub in_flight_max_bytes: u64,
}
