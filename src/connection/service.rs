//! What every connection of a listener shares.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::connection::open::ListenerConnections;
use crate::connection::refusal::PublicName;
use crate::connection::relay::Timeouts;
use crate::protocol::{Protocol, ProxyProtocol};
use crate::upstream::Upstream;

/// What every connection of a listener shares.
#[derive(Debug)]
pub struct Service<D> {
    /// The listener's name.
    pub name: String,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// Where its connections go.
    pub upstream: Arc<Upstream<D>>,
    /// The PROXY header that its servers expect.
    pub proxy_protocol: ProxyProtocol,
    /// How long its connections may make no progress.
    pub timeouts: Timeouts,
    /// For how long clients wait for the upstream, and how many.
    pub hold: Hold,
    /// The name of the edge in its own replies.
    pub public_name: PublicName,
    /// Fires when the edge begins to stop.
    pub drain: CancellationToken,
    /// The list of its open connections.
    pub connections: Arc<ListenerConnections>,
}

/// For how long clients wait for an upstream that is away, and how many.
#[derive(Debug)]
pub struct Hold {
    /// Counted from accept; zero: clients are not held.
    pub limit: Duration,
    /// One permit for each client that may be held, over all listeners.
    pub places: Arc<Semaphore>,
    /// How much longer an attempt may take once the edge is stopping.
    pub last_dial: Duration,
}
