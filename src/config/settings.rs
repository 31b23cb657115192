//! The settings as the rest of the program gets them: checked and complete.
//!
//! Deliberately not here: how a setting is written in the file, its range and its default (see `keys`).

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::keys;
use crate::protocol::{Protocol, ProxyProtocol};
use crate::support::text::host_port;

/// The admin listener's name, in the log and among socket units.
pub const ADMIN: &str = "admin";

/// Where health is served unless the configuration says otherwise.
pub fn default_admin() -> Option<SocketAddr> {
    keys::ADMIN_LISTEN.default()
}

/// The whole configuration, checked and with defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The public name of this machine; `None` for the system's name, if that is a full one.
    pub hostname: Option<String>,
    /// The node this process becomes.
    pub tailnet: Tailnet,
    /// The public ports, at least one.
    pub listeners: Vec<Listener>,
    /// How long things may take, except what belongs to one listener or to joining the tailnet.
    pub timeouts: Timeouts,
    /// How many connections are taken.
    pub limits: Limits,
    /// How the mailboxes are watched.
    pub probe: Probe,
    /// What is logged, and how.
    pub log: Log,
    /// `admin.listen`: where health is served; `None` for `"off"`.
    pub admin: Option<SocketAddr>,
    /// `admin.tailnet_port`; `None` to serve nothing on the tailnet.
    pub admin_tailnet_port: Option<u16>,
    /// What is allowed but probably not meant, one sentence each, to be logged at start and printed
    /// by `check`.
    pub warnings: Vec<String>,
}

/// `[tailnet]`: how this process joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tailnet {
    /// The node's name on the tailnet, one DNS label.
    pub hostname: String,
    /// The tags the node asks for, at least one.
    pub tags: Vec<String>,
    /// The directory that keeps the node's identity.
    pub state_dir: PathBuf,
    /// The control server; `None` for Tailscale's own.
    pub control_url: Option<String>,
    /// A file holding the auth key; the environment overrides it, see
    /// [`crate::tailnet::credential::Sources::read`].
    pub auth_key_file: Option<PathBuf>,
    /// How long joining may take before the start fails.
    pub join_timeout: Duration,
    /// Whether the node keeps no identity on disk and leaves the tailnet when it stops.
    pub ephemeral: bool,
    /// Whether keys made for an OAuth client or a workload identity skip device approval.
    pub preauthorized: bool,
    /// Whether Tailscale's own logs go to Tailscale.
    pub log_upload: bool,
}

/// One `[[listener]]`: some public addresses and where their connections go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The name used in the log, unique.
    pub name: String,
    /// What is spoken on the port.
    pub protocol: Protocol,
    /// The addresses to bind; `[::]` takes IPv6 only.
    pub listen: Vec<SocketAddr>,
    /// Whether `listen` was written in the file: then every address must bind. A default `[::]` may fail on a
    /// machine without IPv6, with a warning.
    pub configured: bool,
    /// Where its connections go.
    pub upstream: Upstream,
    /// The header sent ahead of the client's bytes.
    pub proxy_protocol: ProxyProtocol,
    /// How long a connection may stay without a byte in either direction.
    pub idle_timeout: Duration,
    /// How long a client is held while the mailbox cannot be reached; zero turns it away at once.
    pub hold: Duration,
}

/// A mailbox's addresses on the tailnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// At least one, in the order they are tried: short names, MagicDNS names (lower case, no
    /// trailing dot) or IP addresses.
    pub hosts: Vec<String>,
    /// The TCP port, never 0.
    pub port: u16,
}

/// `[timeouts]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// One attempt to reach the upstream.
    pub connect: Duration,
    /// How long a connection may make no progress after one side has finished sending.
    pub half_close: Duration,
    /// How long a client of a mail port is held while the mailbox cannot be reached, where the listener
    /// does not say; zero turns it away at once.
    pub hold: Duration,
    /// How long it may take to notice a mailbox that has gone without closing its connections. The edge then closes
    /// them.
    pub dead_peer: Duration,
    /// How long a stopping process waits for connections; zero cuts them at once.
    pub drain: Duration,
}

/// `[limits]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at once over all listeners; `None` derives it from the descriptor limit.
    pub max_connections: Option<usize>,
    /// Connections open at once from one client (an IPv4 address or an IPv6 /64); 0 for no limit.
    pub max_connections_per_client: usize,
    /// Clients held at once while a mailbox cannot be reached; more clients are turned away.
    pub hold_max: usize,
    /// The memory that the process aims to stay below, in MiB; `None` derives it from the machine.
    pub memory_mib: Option<u32>,
}

/// `[probe]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// The time between two probes of one mailbox port; zero for no probes.
    pub interval: Duration,
    /// Probes that must succeed in a row before a mailbox counts as up.
    pub rise: u32,
    /// Probes that must fail in a row before it counts as down.
    pub fall: u32,
}

/// `[log]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Log {
    /// How a line is written.
    pub format: LogFormat,
    /// How much is logged, unless `RUST_LOG` is set.
    pub level: tracing::Level,
    /// How many lines a minute are logged for connections that came to nothing, for each client and for each
    /// reason; for a client's sessions ten times as many. Further lines are only counted. 0 for no limit.
    pub repeats: u32,
}

/// How a log line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl fmt::Display for Upstream {
    /// As people write it: `stalwart:25, stalwart-b:25`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<String> = self.hosts.iter().map(|host| host_port(host, self.port)).collect();
        f.write_str(&servers.join(", "))
    }
}
