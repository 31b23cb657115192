//! It answers: what happens to one client, from accept to the end. The edge reaches the upstream and writes the
//! PROXY header (`hold.rs`), relays (`relay.rs`), or refuses the client (`refusal.rs`), and then writes one log
//! line (`ended.rs`).
//!
//! Deliberately not here: accepting clients (`listener/`), and which server is tried when (`upstream/`).
//!
//! Invariants
//! - The header is the first thing on the upstream's connection, in one write, before any byte of the client. If
//!   the header cannot be written, nothing else is written.
//! - Nothing is read from the client before the upstream is connected and has its header. What the client sends
//!   before that waits in the kernel, which takes at most a first window (64 kB) of it, and is not lost.
//! - A client is never refused without the reply that its protocol has for this, and never held longer than
//!   `hold`. The exception is a mailbox that greets others but not this client: the client is then closed without
//!   a reply.
//! - A session is tried again only if no byte has moved in either direction.
//! - A reset on one side becomes a reset on the other side; an orderly end stays orderly.

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

/// Serves one accepted connection to its end. Never fails: whatever happens is in the connection's log line.
/// Cancellation drops both connections.
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

/// Reaches the upstream, writes the header and relays. If a server that has to speak first closes before it sent
/// anything, tries again for as long as the client may be held.
async fn converse<D: Dial>(
    service: &Service<D>,
    client: &mut TcpStream,
    connection: &Connection,
) -> Result<Ended, Refusal> {
    // Asked now, since a socket no longer knows its address after a reset.
    let local = client.local_addr().map_err(|_| Refusal::ClientGone { held: false })?;
    let header = proxy_header(service.proxy_protocol, connection.client(), local);
    let mut failed = None;
    let mut tries = 0;
    let mut first_wordless = None;
    loop {
        let waiting = Waiting { service, client, connection };
        // In a box: otherwise each idle connection would keep the memory for this future.
        let opening = Box::pin(waiting.open(header.as_deref(), failed.take(), &mut tries));
        let (mut upstream, server) = opening.await?;
        let outcome = pass_on(service, client, connection, &mut upstream, &server).await;
        // If the server has greeted others since, it does not want this client. Where clients are not held, those
        // that it greeted earlier count instead.
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

/// Relays. If one side was reset, resets the other.
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
        // Passed by reference: otherwise each idle connection would hold both futures twice, as an argument and as
        // the future being polled.
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
        // The client does not know of this, and gets another upstream.
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
    /// The end state and the reason for the log line.
    fn ended(&self, server: &Server) -> Ended {
        let (state, why) = match &self.end {
            End::Failed { side: Side::Upstream, .. } if server.is_given_up() => {
                (EndState::ServerVanished, "the mailbox's node no longer answers".to_owned())
            }
            End::Wordless => (
                EndState::ServerWordless,
                "upstream closed the connection before it sent anything".to_owned(),
            ),
            End::Closed { first } => (self.closed_by(*first), format!("{first} closed")),
            End::Failed { side, error } => (self.failed_by(*side), format!("{side} failed: {error}")),
            End::Idle => (EndState::Idle, "idle time-out".to_owned()),
            End::HalfClosed { first } => {
                let state = match first {
                    Side::Client => EndState::ServerStalled,
                    Side::Upstream => EndState::ClientStalled,
                };
                (state, format!("no progress for timeouts.half_close after {first} closed"))
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
