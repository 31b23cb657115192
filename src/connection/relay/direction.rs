//! One direction of a relay: bytes go from a source to a sink, and then the end of stream.
//!
//! Invariant: bytes that the sink does not take are kept, and nothing more is read meanwhile. All directions
//! together keep about as much as [`set_kept_most`] allows.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::protocol::header_watch::{HeaderWatch, Verdict};

/// Bytes moved per read. A wake of the network stack brings about 60 kB, which 64 KiB take in one read; a smaller
/// buffer needs several calls into Go.
const BUFFER_BYTES: usize = 64 * 1024;

/// Reads per direction before other tasks of the worker get their turn: 1 MiB.
const READS_PER_TURN: usize = 16;

/// What all connections together may keep before reads become short; see [`set_kept_most`].
static KEPT_MOST: AtomicUsize = AtomicUsize::new(8 * 1024 * 1024);

/// A read is never shorter than this. Each of thousands of stalled connections may keep this much.
const READ_LEAST: usize = 1024;

/// What all connections keep at this moment.
static KEPT_BYTES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into_boxed_slice());
}

/// Which end of a direction failed.
pub(super) enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

/// One direction: bytes go from a source to a sink.
#[derive(Default)]
pub(super) struct Direction {
    /// What the sink took.
    pub(super) bytes: u64,
    pub(super) first_byte: Option<Instant>,
    pub(super) kept: Kept,
    pub(super) state: DirectionState,
    /// Whether an end of stream counts as a failure of the source and is not passed on.
    pub(super) keeps_its_end: bool,
    /// Checks the bytes, until it has decided or the other direction has begun.
    pub(super) watch: Option<Box<HeaderWatch>>,
    pub(super) header_taken: bool,
}

#[derive(Default, PartialEq, Eq)]
pub(super) enum DirectionState {
    #[default]
    Open,
    /// The source has ended; its last bytes or the FIN still have to be passed on.
    Ending,
    Ended,
}

impl Direction {
    pub(super) fn ended(&self) -> bool {
        self.state == DirectionState::Ended
    }

    /// Whether the sink has all that the source gave.
    pub(super) fn is_settled(&self) -> bool {
        self.kept.rest().is_empty() && self.state != DirectionState::Ending
    }

    /// Moves what can be moved. Ready once the sink has everything, including the FIN.
    pub(super) fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
    ) -> Poll<Result<(), Fault>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..READS_PER_TURN {
            ready!(self.poll_flush(cx, sink)).map_err(Fault::Sink)?;
            match self.state {
                DirectionState::Open => {}
                DirectionState::Ending => {
                    ready!(Pin::new(&mut *sink).poll_shutdown(cx)).map_err(Fault::Sink)?;
                    self.state = DirectionState::Ended;
                    return Poll::Ready(Ok(()));
                }
                DirectionState::Ended => return Poll::Ready(Ok(())),
            }
            ready!(self.poll_pass(cx, source, sink))?;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what was kept and gives its memory back.
    fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<io::Result<()>> {
        while !self.kept.rest().is_empty() {
            let written = ready!(poll_write(cx, sink, self.kept.rest()))?;
            self.bytes += written as u64;
            self.kept.from += written;
        }
        if !self.kept.bytes.is_empty() {
            self.kept = Kept::default();
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once and writes that; what the sink does not take is kept.
    fn poll_pass<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
    ) -> Poll<Result<(), Fault>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(&mut buffer[..read_bytes()]);
            ready!(Pin::new(source).poll_read(cx, &mut read)).map_err(Fault::Source)?;
            let mut rest = read.filled();
            if rest.is_empty() {
                if self.keeps_its_end && self.first_byte.is_none() {
                    return Poll::Ready(Err(Fault::Source(io::ErrorKind::UnexpectedEof.into())));
                }
                self.state = DirectionState::Ending;
                return Poll::Ready(Ok(()));
            }
            self.first_byte.get_or_insert_with(Instant::now);
            if let Some(verdict) = self.watch.as_mut().map(|watch| watch.server_said(rest))
                && verdict != Verdict::Undecided
            {
                self.header_taken = verdict == Verdict::Taken;
                self.watch = None;
            }
            while !rest.is_empty() {
                match poll_write(cx, sink, rest) {
                    Poll::Ready(written) => {
                        let written = written.map_err(Fault::Sink)?;
                        self.bytes += written as u64;
                        rest = &rest[written..];
                    }
                    Poll::Pending => {
                        self.kept = Kept::of(rest);
                        return Poll::Pending;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
    }
}

/// Sets how many bytes all connections together may keep that their sinks do not take.
pub fn set_kept_most(bytes: usize) {
    KEPT_MOST.store(bytes, Ordering::Relaxed);
}

/// How much is read at once.
fn read_bytes() -> usize {
    let left = KEPT_MOST.load(Ordering::Relaxed).saturating_sub(KEPT_BYTES.load(Ordering::Relaxed));
    (left / 8).clamp(READ_LEAST, BUFFER_BYTES)
}

/// Bytes read that the sink would not take yet, counted among those of all connections.
#[derive(Default)]
pub(super) struct Kept {
    pub(super) bytes: Vec<u8>,
    from: usize,
}

impl Kept {
    fn of(bytes: &[u8]) -> Kept {
        KEPT_BYTES.fetch_add(bytes.len(), Ordering::Relaxed);
        Kept { bytes: bytes.to_vec(), from: 0 }
    }

    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.from..]
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            KEPT_BYTES.fetch_sub(self.bytes.len(), Ordering::Relaxed);
        }
    }
}

fn poll_write<W: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    sink: &mut W,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(sink).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}
