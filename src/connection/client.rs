//! The client's socket: notices when the client has left, and reads and writes through a shared reference.

use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Completes when a held client has left: it has reset the connection, or has closed it before it sent anything. A
/// client that sent something and then closed its side may still wait for the reply.
pub(super) async fn left(client: &TcpStream) {
    let ended = async {
        match client.peek(&mut [0]).await {
            Ok(0) | Err(_) => {}
            Ok(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ended => {}
        _ = reset(client) => {}
    }
}

/// Completes when the client has reset the connection. A FIN is no reason to give up: the client may have sent
/// everything and still wait for the reply.
pub(super) async fn reset(client: &TcpStream) -> io::Error {
    loop {
        if client.ready(Interest::ERROR).await.is_err() {
            return std::future::pending().await; // the runtime is going away
        }
        if let Ok(Some(error)) = client.take_error() {
            return error;
        }
        // No error, or a read took it first: wait for the next event.
        let _ = client.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
}

/// A socket that is read and written through a shared reference, so that another future can watch it for a reset
/// at the same time.
pub(super) struct SharedTcp<'a>(pub(super) &'a TcpStream);

impl AsyncRead for SharedTcp<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {} // readiness was stale
                read => return Poll::Ready(read.map(|count| buf.advance(count))),
            }
        }
    }
}

impl AsyncWrite for SharedTcp<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {} // readiness was stale
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // the kernel sends at once
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(self.0).shutdown(Shutdown::Write))
    }
}
