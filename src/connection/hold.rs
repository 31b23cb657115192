//! A client that has no server yet: reaches the upstream, and holds the client while the upstream cannot be
//! reached.
//!
//! Deliberately not here: which server is tried when (see `upstream.rs`), and what the client is told at the end
//! (see `refusal.rs`).

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, sleep_until, timeout};

use crate::connection::Service;
use crate::connection::client::{left, reset};
use crate::connection::end_state::EndState;
use crate::connection::ended::Ended;
use crate::connection::open::Connection;
use crate::tailnet::ConnectError;
use crate::upstream::dial::Dial;
use crate::upstream::{Failure, Reached, Server, Upstream, UpstreamError};

/// How long the stack may take to accept the header: the send buffer of a new connection is empty, so only a
/// failed connection takes any time.
const HEADER_LIMIT: Duration = Duration::from_secs(5);

/// How long the first attempt may take before the client counts as held.
pub(super) const HELD_AFTER: Duration = Duration::from_secs(1);

/// The first pause before a held client tries again, after a server closed before it sent anything. Each further
/// pause is twice as long, since each attempt may be a line in the server's log.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_LAST: Duration = Duration::from_secs(8);

/// How a connection ended before it was relayed.
pub(super) enum Refusal {
    /// The client left while it waited.
    ClientGone {
        /// Whether the client was held.
        held: bool,
    },
    /// The upstream cannot be reached, and clients are not held.
    Away(UpstreamError),
    /// The upstream could not be reached within the hold time.
    HoldEnded(Option<UpstreamError>),
    /// `hold_max` clients are held already.
    HoldFull(Option<UpstreamError>),
    /// The edge is stopping.
    Stopping,
}

/// A client that has no server yet.
pub(super) struct Waiting<'a, D> {
    pub(super) service: &'a Service<D>,
    pub(super) client: &'a TcpStream,
    pub(super) connection: &'a Connection,
}

/// Asks why the client still has to wait; `None` if that is not known.
type Why<'a> = &'a (dyn Fn() -> Option<UpstreamError> + Sync);

impl<D: Dial> Waiting<'_, D> {
    /// Reaches the upstream and gives it the header, holding the client until that has succeeded. `failed` is the
    /// error of the attempt before; `tries` counts the attempts: after each round of all servers there is a pause.
    pub(super) async fn open(
        &self,
        header: Option<&[u8]>,
        mut failed: Option<UpstreamError>,
        tries: &mut usize,
    ) -> Result<(D::Stream, Arc<Server>), Refusal> {
        let upstream = &self.service.upstream;
        loop {
            if let Some(why) = failed {
                *tries += 1;
                let servers = upstream.servers().len();
                let is_round = tries.is_multiple_of(servers);
                if is_round && self.service.hold.limit.is_zero() {
                    return Err(Refusal::Away(why));
                }
                if is_round {
                    self.hold(&|| Some(why.clone()), sleep(pause_after(*tries / servers))).await?;
                }
            }
            let Reached { mut stream, server, dial } = self.reach().await?;
            match write_header(&mut stream, header).await {
                Ok(()) => {
                    self.connection.relaying(&server, dial);
                    return Ok((stream, server));
                }
                Err(error) => failed = Some(upstream.suspect(&server, Failure::Header(error.kind()))),
            }
        }
    }

    /// Connects to the upstream, holding the client while it cannot be reached.
    async fn reach(&self) -> Result<Reached<D::Stream>, Refusal> {
        let upstream = &self.service.upstream;
        let why = || upstream.away();
        self.connection.connecting();
        let holds = !self.service.hold.limit.is_zero();
        if holds && upstream.is_away() {
            // A client that can be held waits for the attempts of those who are held already. If no place is free,
            // the client makes one attempt itself, since the places may be taken by clients of other upstreams.
            return match self.service.hold.places.available_permits() {
                0 => self.wait(&why, upstream.connect_in_turn()).await?.map_err(Refusal::HoldFull),
                _ => self.hold(&why, upstream.reconnect()).await,
            };
        }
        let mut first = pin!(upstream.connect());
        let unanswered = tokio::select! {
            connected = &mut first => match connected {
                Err(error) if holds && error.may_pass() => None,
                connected => return connected.map_err(Refusal::Away),
            },
            _ = reset(self.client) => return Err(Refusal::ClientGone { held: false }),
            () = sleep(HELD_AFTER), if holds => Some(first),
        };
        let attempt = async {
            if let Some(first) = unanswered {
                match first.await {
                    Err(error) if error.may_pass() => {}
                    connected => return connected,
                }
            }
            Ok(upstream.reconnect().await)
        };
        self.hold(&why, attempt).await?.map_err(Refusal::Away)
    }

    /// Keeps the client waiting while `attempt` goes on, for as long as it may be held.
    async fn hold<T>(&self, why: Why<'_>, attempt: impl Future<Output = T>) -> Result<T, Refusal> {
        let Ok(_place) = self.service.hold.places.try_acquire() else {
            return Err(Refusal::HoldFull(why()));
        };
        self.connection.held();
        self.wait(why, attempt).await
    }

    /// Waits for `attempt` until the client leaves, its time is over, or the edge stops.
    async fn wait<T>(&self, why: Why<'_>, attempt: impl Future<Output = T>) -> Result<T, Refusal> {
        let end = self.connection.accepted() + self.service.hold.limit;
        tokio::select! {
            done = attempt => Ok(done),
            () = left(self.client) => Err(Refusal::ClientGone { held: self.connection.is_held() }),
            () = sleep_until(end) => Err(Refusal::HoldEnded(why())),
            () = self.dismissed() => Err(Refusal::Stopping),
        }
    }

    /// Completes when the edge is stopping and the mailbox is away, or does not answer in time. Until then a
    /// client whose connection is being made is still served.
    async fn dismissed(&self) {
        self.service.drain.cancelled().await;
        let _ = timeout(self.service.hold.last_dial, self.service.upstream.until_away()).await;
    }
}

/// The pause after this many rounds of all servers.
fn pause_after(round: usize) -> Duration {
    let doublings = u32::try_from(round.saturating_sub(1)).unwrap_or(u32::MAX).min(8);
    (PAUSE_FIRST * 2_u32.pow(doublings)).min(PAUSE_LAST)
}

async fn write_header<S: AsyncWrite + Unpin>(upstream: &mut S, header: Option<&[u8]>) -> io::Result<()> {
    let Some(header) = header else { return Ok(()) };
    timeout(HEADER_LIMIT, upstream.write_all(header)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

impl Refusal {
    /// The end state and the reason for the log line.
    pub(super) fn ended<D>(&self, upstream: &Upstream<D>) -> Ended {
        let cannot = |before: &str, error: &Option<UpstreamError>| {
            let what = error.as_ref().map_or_else(|| "no answer so far".to_owned(), UpstreamError::what);
            format!("{before}cannot reach {upstream}: {what}")
        };
        let (state, why) = match self {
            Refusal::ClientGone { held: false } => {
                (EndState::ClientLeftConnecting, "client left while connecting".to_owned())
            }
            Refusal::ClientGone { held: true } => {
                (EndState::ClientLeftHeld, "client left while it was held".to_owned())
            }
            Refusal::Away(error) => (away(error), format!("cannot reach {upstream}: {}", error.what())),
            Refusal::HoldEnded(error) => {
                let is_denied = error.as_ref().is_some_and(UpstreamError::is_denied);
                let state = if is_denied { EndState::PolicyDenied } else { EndState::HoldEnded };
                (state, cannot("held for the whole hold time: ", error))
            }
            Refusal::HoldFull(error) => {
                (EndState::HoldFull, cannot("not held, since hold_max clients are held already: ", error))
            }
            Refusal::Stopping => {
                (EndState::StoppedWaiting, "turned away because the edge is stopping".to_owned())
            }
        };
        Ended { state, why }
    }
}

/// The end state of a connection whose upstream cannot be reached.
fn away(error: &UpstreamError) -> EndState {
    let all = |kind: fn(&Failure) -> bool| error.failures().all(kind);
    if all(|failure| *failure == Failure::Connect(ConnectError::NotRunning)) {
        EndState::NoTailnet
    } else if error.is_denied() {
        EndState::PolicyDenied
    } else if all(|failure| matches!(failure, Failure::Silent { .. })) {
        EndState::ServerSilent
    } else if all(|failure| matches!(failure, Failure::Wordless | Failure::Header(_))) {
        EndState::ServerWordless
    } else {
        EndState::ServerUnreachable
    }
}
