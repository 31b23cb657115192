//! TCP connections to and from peers, as tokio streams.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Code;
use crate::ffi::libtailscale::{Conn, Listener};

/// Connections from peers to a port of the node. Dropping it closes the port.
#[derive(Debug)]
pub(crate) struct TailnetListener {
    pub(super) listener: Listener,
}

impl TailnetListener {
    /// The next connection; [`Code::NotRunning`] once the node is closed, any other code is a fault.
    pub(crate) async fn accept(&mut self) -> Result<TailnetStream, Code> {
        let conn = std::future::poll_fn(|cx| self.listener.poll_accept(cx)).await?;
        Ok(TailnetStream { conn })
    }
}

/// A TCP connection to or from a peer. Dropping it closes it in order: what was written is delivered and followed
/// by a FIN.
#[derive(Debug)]
pub struct TailnetStream {
    pub(super) conn: Conn,
}

impl TailnetStream {
    /// Ends the connection with a RST.
    pub(crate) fn reset(&mut self) {
        self.conn.abort();
    }
}

impl AsyncRead for TailnetStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(self.conn.poll_read(cx, buf.initialize_unfilled()))?;
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TailnetStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.conn.poll_write(cx, bytes).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // the stack sends at once
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.conn.shutdown().map_err(io::Error::from))
    }
}
