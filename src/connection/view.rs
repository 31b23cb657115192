//! Open connections as they are shown, in `/status` and on the page.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::open::Open;

/// A connection to be shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionView {
    /// Its number in the log.
    pub id: u64,
    /// The listener's name.
    pub listener: String,
    /// Who connected.
    pub client: SocketAddr,
    /// `connecting`, `held` or `relaying`.
    #[serde(default)]
    pub stage: String,
    /// The server it goes to, once that is known.
    pub upstream: Option<String>,
    /// The path that its packets take inside the tailnet, once that is known.
    pub path: Option<String>,
    /// Bytes to the mailbox.
    #[serde(default)]
    pub sent: u64,
    /// Bytes to the client.
    #[serde(default)]
    pub received: u64,
    /// Seconds since it was accepted.
    #[serde(default)]
    pub seconds: u64,
}

impl Open {
    /// This connection, as it is shown.
    pub fn view(&self) -> ConnectionView {
        let (server, (sent, received)) = (self.server(), self.bytes());
        ConnectionView {
            id: self.id(),
            listener: self.listener().to_owned(),
            client: self.client(),
            stage: self.stage().to_owned(),
            path: server.as_ref().and_then(|server| server.path()).map(|path| path.route.to_string()),
            upstream: server.map(|server| server.to_string()),
            sent,
            received,
            seconds: self.age().as_secs(),
        }
    }
}
