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
    /// The header that they demand.
    pub proxy_protocol: ProxyProtocol,
    /// How long they may be silent.
    pub timeouts: Timeouts,
    /// For how long clients wait for the upstream, and how many.
    pub hold: Hold,
    /// Who the edge is when it answers itself.
    pub public_name: PublicName,
    /// Fires when the edge begins to stop.
    pub drain: CancellationToken,
    /// Where its connections are entered.
    pub connections: Arc<ListenerConnections>,
}

/// For how long clients wait for an upstream that is away, and how many.
#[derive(Debug)]
pub struct Hold {
    /// From the moment the client came; zero does not hold it at all.
    pub limit: Duration,
    /// One permit for each client that may be held, over all listeners.
    pub places: Arc<Semaphore>,
    /// How much longer an attempt may take once the edge is stopping.
    pub last_dial: Duration,
}
