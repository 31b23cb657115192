//! Moves bytes between a client and its upstream until both directions ended.
//!
//! Each direction is read, written and half-closed on its own: an end of stream on one side becomes a FIN on the
//! other, and the other direction goes on. Some clients send everything, shut down
//! writing and then read the reply: they depend on this.
//!
//! Invariants
//! - Nothing is buffered while idle: reads go through one buffer per worker thread. Only bytes that the other side
//!   did not take are kept, at most one buffer per direction, and while they are kept nothing more is read. The
//!   more bytes all connections keep, the less is read at once.
//! - Every wait is bounded: by the idle time-out while both directions are
//!   open, by the half-close time-out after the first ended.
//! - The outcome names the side that ended it.
//!
//! It does not dial, does not know the PROXY header, and closes neither side: the caller owns both streams and
//! decides between FIN and RST. If an upstream has closed its direction and then resets, that is noticed with the
//! next byte sent to it, or by the half-close time-out.

mod direction;
mod timer;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::protocol::header_watch::HeaderWatch;
use direction::{Direction, DirectionState, Fault};
use timer::Timer;

pub use direction::set_kept_most;

/// One of the two parties of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that connected to the edge.
    Client,
    /// The server that the edge has dialled.
    Upstream,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Side::Client => "client",
            Side::Upstream => "upstream",
        })
    }
}

/// How long a connection may make no progress.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// While both directions are open.
    pub idle: Duration,
    /// After one direction has ended.
    pub half_close: Duration,
    /// After draining began, for an idle connection that waits for its client.
    pub quiet: Duration,
}

/// What is expected of the upstream before the client speaks.
#[derive(Debug, Default)]
pub struct FirstWords {
    /// Whether the upstream has to speak first.
    pub due: bool,
    /// Notices an upstream that takes the PROXY header for a command.
    pub watch: Option<Box<HeaderWatch>>,
}

/// What a relay did, and why it ended.
#[derive(Debug)]
pub struct Outcome {
    /// When the first byte from the upstream arrived.
    pub first_byte: Option<Instant>,
    /// Whether one side sent bytes or an end of stream that the other has not received.
    pub unfinished: bool,
    /// Whether the upstream took the PROXY header for a command.
    pub header_taken: bool,
    /// Why it ended.
    pub end: End,
}

/// Why a relay ended.
#[derive(Debug)]
pub enum End {
    /// The upstream had to speak first, but closed or failed before any byte moved in either direction. The client
    /// does not know of this.
    Wordless,
    /// Both directions ended in order.
    Closed {
        /// Whose end of stream came first.
        first: Side,
    },
    /// A side failed, most often by a reset.
    Failed {
        /// Whose connection failed.
        side: Side,
        /// What the system or the tailnet said.
        error: io::Error,
    },
    /// No byte either way for the idle time-out.
    Idle,
    /// After `first` had ended, the other made no progress for the half-close
    /// time-out.
    HalfClosed {
        /// Whose end of stream had come.
        first: Side,
    },
    /// The edge is stopping, and the connection was waiting for its client.
    Drained,
}

/// Relays until both directions ended, one side failed, or a time-out. `moved` is called with the bytes that have
/// moved since its last call, to the upstream and to the client. `drain` completes when the edge begins to stop,
/// `client_gone` when the client has reset its connection: a read does not show that while the upstream takes
/// nothing, nor after the client's end of stream.
///
/// Cancellation drops bytes that were read but not yet written.
pub async fn relay<C, U>(
    client: &mut C,
    upstream: &mut U,
    timeouts: Timeouts,
    first_words: FirstWords,
    moved: impl Fn(u64, u64),
    drain: impl Future<Output = ()>,
    client_gone: impl Future<Output = io::Error>,
) -> Outcome
where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let mut relay = Relay { first_words_due: first_words.due, ..Relay::default() };
    relay.received.watch = first_words.watch;
    let mut timer = pin!(Timer::start(timeouts.idle));
    let mut drain = pin!(drain);
    let mut client_gone = pin!(client_gone);
    let mut draining = false;
    poll_fn(|cx| {
        let before = relay.progress();
        let both = relay.poll(cx, client, upstream);
        if relay.progress() != before {
            timer.as_mut().progressed();
            moved(relay.sent.bytes - before.0, relay.received.bytes - before.1);
            relay.awaits_reply = relay.sent.bytes != before.0;
        }
        if let Poll::Ready(end) = both {
            return Poll::Ready(end);
        }
        if let Poll::Ready(error) = client_gone.as_mut().poll(cx) {
            return Poll::Ready(End::failed(Side::Client, error));
        }
        draining = draining || drain.as_mut().poll(cx).is_ready();
        let (limit, end) = match relay.first {
            _ if draining && relay.is_quiet() => (timeouts.quiet, End::Drained),
            Some(first) => (timeouts.half_close, End::HalfClosed { first }),
            None => (timeouts.idle, End::Idle),
        };
        timer.as_mut().poll(cx, limit).map(|()| end)
    })
    .await
    .into_outcome(relay)
}

impl End {
    fn failed(side: Side, error: io::Error) -> End {
        End::Failed { side, error: cause(error) }
    }

    fn into_outcome(self, relay: Relay) -> Outcome {
        Outcome {
            first_byte: relay.received.first_byte,
            header_taken: relay.received.header_taken,
            unfinished: !relay.sent.is_settled() || !relay.received.is_settled(),
            end: self,
        }
    }
}

/// Both directions of one connection.
#[derive(Default)]
struct Relay {
    sent: Direction,
    received: Direction,
    first_words_due: bool,
    /// Whose end of stream came first.
    first: Option<Side>,
    /// Whether the client's bytes were the last to move: then the upstream may be working on them. Closing between
    /// the end of a message and its reply would make the client send it again.
    awaits_reply: bool,
}

impl Relay {
    /// A value that changes whenever anything moved.
    fn progress(&self) -> (u64, u64, Option<Side>) {
        (self.sent.bytes, self.received.bytes, self.first)
    }

    /// Whether the connection only waits for its client, for example in IMAP IDLE or between two commands.
    fn is_quiet(&self) -> bool {
        !self.awaits_reply
            && !self.awaits_first_word()
            && self.sent.is_settled()
            && self.received.is_settled()
    }

    /// Whether nothing has moved yet, and the upstream has to speak first.
    fn awaits_first_word(&self) -> bool {
        let silent = self.sent.first_byte.is_none() && self.received.first_byte.is_none();
        self.first_words_due && self.first.is_none() && silent
    }

    fn poll<C, U>(&mut self, cx: &mut Context<'_>, client: &mut C, upstream: &mut U) -> Poll<End>
    where
        C: AsyncRead + AsyncWrite + Unpin,
        U: AsyncRead + AsyncWrite + Unpin,
    {
        self.received.keeps_its_end = self.awaits_first_word();
        if self.sent.first_byte.is_some() || self.sent.state != DirectionState::Open {
            self.received.watch = None; // what comes now may be the answer to it
        }
        // The upstream first: then its bytes of this turn are no answer to the client's bytes of this turn, and it
        // is clear whose bytes were the last to move.
        let received = self.received.poll(cx, upstream, client);
        if matches!(received, Poll::Ready(Err(Fault::Source(_)))) && self.awaits_first_word() {
            return Poll::Ready(End::Wordless); // nothing was taken from the client
        }
        if self.first.is_none() && self.received.ended() {
            self.first = Some(Side::Upstream);
        }
        let sent = self.sent.poll(cx, client, upstream);
        if self.first.is_none() && self.sent.ended() {
            self.first = Some(Side::Client);
        }
        match (sent, received) {
            (Poll::Ready(Err(Fault::Source(error))), _) | (_, Poll::Ready(Err(Fault::Sink(error)))) => {
                Poll::Ready(End::failed(Side::Client, error))
            }
            (Poll::Ready(Err(Fault::Sink(error))), _) | (_, Poll::Ready(Err(Fault::Source(error)))) => {
                Poll::Ready(End::failed(Side::Upstream, error))
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => {
                // Both ended, so one was noted first.
                Poll::Ready(End::Closed { first: self.first.unwrap_or(Side::Client) })
            }
            _ => Poll::Pending,
        }
    }
}

/// Makes a reset of errors that only follow from one. The kernel reports a reset once. If that report was missed,
/// a later write or half-close fails with another error. Neither is tried after we have closed a direction
/// ourselves.
fn cause(error: io::Error) -> io::Error {
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::NotConnected | io::ErrorKind::BrokenPipe, Some(_)) => {
            io::Error::from_raw_os_error(libc::ECONNRESET)
        }
        (io::ErrorKind::NotConnected | io::ErrorKind::BrokenPipe, None) => {
            io::ErrorKind::ConnectionReset.into()
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests;
