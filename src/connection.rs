//! One client's life: reach the upstream, write the PROXY header (`hold.rs`), relay (`relay.rs`), and one
//! line of the log (`open.rs`).
//!
//! Invariants
//! - The header is the first thing on the upstream's connection, in one write,
//!   before any byte of the client; if it cannot be written, nothing is.
//! - Nothing is read from the client before the upstream is connected and has
//!   its header; so a server that speaks first is heard at once, and a client
//!   that speaks first loses nothing. What it sends meanwhile waits in the
//!   kernel, which takes no more than a first window (64 kB) from it.
//! - A client is never turned away without a word while its protocol has one for
//!   it, and never held longer than `hold`; except by a mailbox that greets others
//!   and not this client.
//! - A session is tried again only when not a byte has moved either way.
//! - An abrupt end on one side becomes one on the other; an orderly end stays
//!   orderly.

mod client;
pub(crate) mod counters;
pub mod end_state;
pub(crate) mod ended;
mod hold;
pub(crate) mod limits;
pub(crate) mod open;
pub(crate) mod refusal;
pub(crate) mod relay;
mod service;
pub(crate) mod view;

use std::net::SocketAddr;
use std::pin::pin;

use tokio::net::TcpStream;
use tokio::time::Instant;

use client::{SharedTcp, reset};
use hold::{Refusal, Waiting};

pub use service::{Hold, Service};

use crate::connection::end_state::EndState;
use crate::connection::ended::Ended;
use crate::connection::open::Connection;
use crate::connection::relay::{End, FirstWords, Outcome, Side, relay};
use crate::protocol::ProxyProtocol;
use crate::protocol::header_watch::HeaderWatch;
use crate::protocol::proxy_header::proxy_header;
use crate::upstream::dial::{Dial, Reset};
use crate::upstream::{Failure, Server};

/// Serves one accepted connection to its end. Never fails: whatever happens is
/// in its line of the log. Cancellation drops both connections.
pub async fn serve<D: Dial>(service: &Service<D>, client: &mut TcpStream, peer: SocketAddr) {
    let connection = service.connections.enter(peer);
    match converse(service, client, &connection).await {
        Ok(ended) => connection.end(&ended),
        Err(refusal) => {
            let is_gone = matches!(refusal, Refusal::ClientGone { .. });
            connection.end(&refusal.ended(&service.upstream));
            if !is_gone {
                Box::pin(refusal::refuse(client, service.protocol, &service.public_name)).await;
            }
        }
    }
}

/// Reaches the upstream, gives it the header and relays; again if a server that
/// was to speak first leaves without a word, for as long as the client may be
/// held.
async fn converse<D: Dial>(
    service: &Service<D>,
    client: &mut TcpStream,
    connection: &Connection,
) -> Result<Ended, Refusal> {
    // Asked now: a socket that was reset meanwhile no longer knows it.
    let local = client.local_addr().map_err(|_| Refusal::ClientGone { held: false })?;
    let header = proxy_header(service.proxy_protocol, connection.client(), local);
    let mut failed = None;
    let mut tries = 0;
    let mut first_wordless = None;
    loop {
        let waiting = Waiting { service, client, connection };
        // In a box, since an idle connection would otherwise keep the room for it.
        let opening = Box::pin(waiting.open(header.as_deref(), failed.take(), &mut tries));
        let (mut upstream, server) = opening.await?;
        let outcome = pass_on(service, client, connection, &mut upstream, &server).await;
        // A server that has greeted others since, and again not this client, has its reasons; where
        // nobody is held, others before it must do.
        let is_unwanted = match first_wordless {
            Some(at) => server.greeted_since(at),
            None => service.hold.limit.is_zero() && server.greeted_lately(),
        };
        if !matches!(outcome.end, End::Wordless) || is_unwanted {
            return Ok(outcome.ended(&server));
        }
        if service.drain.is_cancelled() {
            return Err(Refusal::Stopping);
        }
        first_wordless.get_or_insert(Instant::now());
        failed = Some(service.upstream.suspect(&server, Failure::Wordless));
    }
}

/// Relays, and ends on one side what was cut on the other.
async fn pass_on<D: Dial>(
    service: &Service<D>,
    client: &mut TcpStream,
    connection: &Connection,
    upstream: &mut D::Stream,
    server: &Server,
) -> Outcome {
    let _connected = server.connected();
    let moved = |sent, received| {
        if received > 0 {
            server.speaks();
        }
        if connection.moved(sent, received) {
            server.greets_client();
        }
    };
    let outcome = {
        // By reference, since an idle connection would otherwise hold each
        // twice: as an argument and as what is polled.
        let (drain, client_gone) = (pin!(service.drain.cancelled()), pin!(reset(client)));
        let has_header = service.proxy_protocol != ProxyProtocol::Off;
        let watch = has_header.then(|| HeaderWatch::new(service.protocol)).flatten().map(Box::new);
        let first_words = FirstWords { due: service.protocol.greets(), watch };
        relay(&mut SharedTcp(client), upstream, service.timeouts, first_words, moved, drain, client_gone)
            .await
    };
    if outcome.header_taken {
        service.upstream.distrusted(&service.name, server);
    }
    match outcome.end {
        // The client has not been told, and goes on with another upstream.
        End::Wordless => {}
        End::Failed { side: Side::Client, .. } => upstream.reset(),
        End::Failed { side: Side::Upstream, .. } => client.reset(),
        // A cut stream must not look like a finished one.
        _ if outcome.unfinished => {
            client.reset();
            upstream.reset();
        }
        _ => {}
    }
    outcome
}

impl Outcome {
    /// What its line of the log is to say.
    fn ended(&self, server: &Server) -> Ended {
        let (state, why) = match &self.end {
            End::Failed { side: Side::Upstream, .. } if server.is_given_up() => {
                (EndState::ServerVanished, "the mailbox's node vanished".to_owned())
            }
            End::Wordless => (EndState::ServerWordless, "upstream closed without a word".to_owned()),
            End::Closed { first } => (self.closed_by(*first), format!("{first} closed")),
            End::Failed { side, error } => (self.failed_by(*side), format!("{side} failed: {error}")),
            End::Idle => (EndState::Idle, "idle time-out".to_owned()),
            End::HalfClosed { first } => {
                let state = match first {
                    Side::Client => EndState::ServerStalled,
                    Side::Upstream => EndState::ClientStalled,
                };
                (state, format!("half-close time-out after {first} closed"))
            }
            End::Drained => (EndState::StoppedQuiet, "closed because the edge is stopping".to_owned()),
        };
        let is_refused = state == EndState::ServerWordless && server.serves_clients();
        Ended { state: if is_refused { EndState::ServerRefused } else { state }, why }
    }

    fn closed_by(&self, first: Side) -> EndState {
        match (first, self.first_byte) {
            (Side::Client, None) => EndState::ClientLeftUngreeted,
            (Side::Client, Some(_)) => EndState::ClientClosed,
            (Side::Upstream, None) => EndState::ServerWordless,
            (Side::Upstream, Some(_)) => EndState::ServerClosed,
        }
    }

    fn failed_by(&self, side: Side) -> EndState {
        match (side, self.first_byte) {
            (Side::Client, None) => EndState::ClientLeftUngreeted,
            (Side::Client, Some(_)) => EndState::ClientFailed,
            (Side::Upstream, None) => EndState::ServerWordless,
            (Side::Upstream, Some(_)) => EndState::ServerFailed,
        }
    }
}

#[cfg(test)]
mod tests;
