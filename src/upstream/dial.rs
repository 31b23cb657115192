//! The interface to the network: how a connection is made, and how it is reset. The tailnet in production,
//! anything that makes streams in tests.

use std::future::Future;
use std::net::IpAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::tailnet::{ConnectError, Node, PingReport, TailnetStream};

/// A stream that can be ended abruptly.
pub trait Reset {
    /// Ends the connection with a RST, now or when it is dropped.
    fn reset(&mut self);
}

impl Reset for tokio::net::TcpStream {
    fn reset(&mut self) {
        // With zero linger the close sends RST. A socket that is already gone
        // needs none.
        let _ = self.set_zero_linger();
    }
}

impl Reset for TailnetStream {
    fn reset(&mut self) {
        TailnetStream::reset(self);
    }
}

/// Makes connections to peers.
pub trait Dial: Send + Sync + 'static {
    /// What a successful dial gives.
    type Stream: AsyncRead + AsyncWrite + Reset + Unpin + Send;

    /// Connects to a port of a peer. Dropping the future gives up and frees
    /// everything; it has no time limit of its own.
    fn dial(&self, host: &str, port: u16) -> impl Future<Output = Result<Self::Stream, ConnectError>> + Send;

    /// Pings a peer, for up to `limit`.
    fn ping(
        &self,
        host: &str,
        limit: Duration,
    ) -> impl Future<Output = Result<PingReport, ConnectError>> + Send;

    /// Resets every connection to a peer's address.
    fn abort(&self, _: IpAddr) {}

    /// Our addresses, as peers see them; empty while they are not known.
    fn addresses(&self) -> Vec<IpAddr> {
        Vec::new()
    }
}

impl Dial for Node {
    type Stream = TailnetStream;

    async fn dial(&self, host: &str, port: u16) -> Result<TailnetStream, ConnectError> {
        self.connect(host, port).await
    }

    async fn ping(&self, host: &str, limit: Duration) -> Result<PingReport, ConnectError> {
        Node::ping(self, host, limit).await
    }

    fn abort(&self, peer: IpAddr) {
        self.abort_peer(peer);
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.status().borrow().ips.clone()
    }
}
