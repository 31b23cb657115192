//! Connections and failures as they are shown, in `/status` and on the page.

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::open::{Open, Stage};

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

/// Failures of a kind, to be shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailureView {
    /// When the last one was.
    pub last: Timestamp,
    /// How many there were since this kind is in the list.
    #[serde(default)]
    pub count: u64,
    /// The listener's name.
    #[serde(default)]
    pub listener: String,
    /// The server that the client was meant for.
    #[serde(default)]
    pub upstream: String,
    /// The last one's client.
    pub client: SocketAddr,
    /// The end state, in two letters.
    #[serde(default)]
    pub end: String,
    /// The reason, in words.
    #[serde(default)]
    pub why: String,
}

impl Open {
    /// This connection, as it is shown.
    pub fn view(&self) -> ConnectionView {
        let (stage, (sent, received)) = (self.0.stage(), self.bytes());
        let name = stage.name().to_owned();
        let server = match stage {
            Stage::Relaying { server, .. } => Some(server),
            Stage::Connecting | Stage::Held => None,
        };
        ConnectionView {
            id: self.0.id,
            listener: self.listener().to_owned(),
            client: self.client(),
            stage: name,
            path: server.as_ref().and_then(|server| server.path()).map(|path| path.route.to_string()),
            upstream: server.map(|server| server.to_string()),
            sent,
            received,
            seconds: self.0.accepted.elapsed().as_secs(),
        }
    }
}
