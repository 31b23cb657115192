//! What the rest of the crate is told: the settings, checked and complete.
//!
//! Deliberately not here: how a setting is written in the file (see `keys`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::protocol::{Protocol, ProxyProtocol};
use crate::support::text::host_port;

/// The admin listener's name, in the log and among socket units.
pub const ADMIN: &str = "admin";

/// Where health is served unless the configuration says otherwise.
pub const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);

/// Everything the program is told, checked and with defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `hostname`: the name by which the world knows this box, its MX name, for the answers that the
    /// edge gives itself. Default: `None`, the system's if that is a full one.
    pub hostname: Option<String>,
    /// `[tailnet]`: the node this process becomes.
    pub tailnet: Tailnet,
    /// `[[listener]]`: the public ports. Default: smtp 25, submissions 465, submission 587, imaps
    /// 993, sieve 4190.
    pub listeners: Vec<Listener>,
    /// `[timeouts]`: how long things may take, except what belongs to one listener or to joining
    /// the tailnet.
    pub timeouts: Timeouts,
    /// `[limits]`: how many connections are taken.
    pub limits: Limits,
    /// `[probe]`: how the mailboxes are watched.
    pub probe: Probe,
    /// `[log]`: what is logged, and how.
    pub log: Log,
    /// `[admin] listen`: where health is served; `None` for `"off"`. Default:
    /// `127.0.0.1:9464`.
    pub admin: Option<SocketAddr>,
    /// `[admin] tailnet_port`: the port of the node's tailnet addresses where peers are told the same,
    /// if the tailnet's policy lets them. Default: `None`, not at all.
    pub admin_tailnet_port: Option<u16>,
    /// What is allowed but probably not meant, one sentence each, to be logged at start and printed
    /// by `check`.
    pub warnings: Vec<String>,
}

/// `[tailnet]`: how this process joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tailnet {
    /// The node's name on the tailnet, one DNS label. Default: `tailwart-edge`.
    pub hostname: String,
    /// The tags the node asks for, at least one. Default: `tag:reverse-proxy`.
    pub tags: Vec<String>,
    /// The directory that keeps the node's identity. Default: `/var/lib/tailwart-edge`.
    pub state_dir: PathBuf,
    /// The control server, for Headscale. Default: `TS_CONTROL_URL`, else `None`, Tailscale's own.
    pub control_url: Option<String>,
    /// A file holding the auth key; the environment overrides it, see
    /// [`crate::tailnet::credential::Sources::read`]. Default: `None`.
    pub auth_key_file: Option<PathBuf>,
    /// How long joining may take before the start fails. Default: 15 seconds.
    pub join_timeout: Duration,
    /// Whether the node keeps no identity on disk and leaves the tailnet when it stops. Default:
    /// false.
    pub ephemeral: bool,
    /// Whether keys made for an OAuth client or a workload identity go past device approval.
    /// Default: false, as Tailscale's own.
    pub preauthorized: bool,
    /// Whether Tailscale's own logs go to Tailscale. Default: false.
    pub log_upload: bool,
}

/// One `[[listener]]`: some public addresses and where their connections go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The name used in the log, unique. Default: the protocol's name.
    pub name: String,
    /// What is spoken on the port. Required.
    pub protocol: Protocol,
    /// The addresses to bind; `[::]` takes IPv6 only. Default: `0.0.0.0` and `[::]` at the
    /// protocol's port.
    pub listen: Vec<SocketAddr>,
    /// Whether `listen` was written in the file: then every address must bind, while a default
    /// `[::]` is given up with a warning on a box without IPv6.
    pub configured: bool,
    /// Where its connections go. Default: `upstream.host` at the protocol's port.
    pub upstream: Upstream,
    /// The header sent ahead of the client's bytes. Default: `upstream.proxy_protocol`.
    pub proxy_protocol: ProxyProtocol,
    /// How long a connection may stay without a byte in either direction. Default: by protocol.
    pub idle_timeout: Duration,
    /// How long a client is held while the mailbox cannot be reached; zero turns it away at once.
    /// Default: `timeouts.hold`, and zero for http and tcp.
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
    /// `connect`: one attempt to reach the upstream. Default: 8 seconds, in which WireGuard can
    /// repeat a handshake whose first packet was lost (after 5 s).
    pub connect: Duration,
    /// `half_close`: how long a connection closed in one direction may go without progress.
    /// Default: 60 seconds.
    pub half_close: Duration,
    /// `hold`: how long a client of a mail port is held while the mailbox cannot be reached; zero
    /// turns it away at once. Default: 45 seconds, which every sender waits: RFC 5321 section
    /// 4.5.3.2.1 demands five minutes, and the least patient known gives 60 seconds.
    pub hold: Duration,
    /// `dead_peer`: how long a mailbox that went away without a word may go unnoticed before its
    /// connections are closed, at least 15 seconds. Default: 50 seconds.
    pub dead_peer: Duration,
    /// `drain`: how long a stopping process waits for connections; zero cuts them at once. Default:
    /// 30 seconds.
    pub drain: Duration,
}

/// `[limits]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at once over all listeners. Default: `None`, derived from the descriptor
    /// limit.
    pub max_connections: Option<usize>,
    /// Connections open at once from one client (an IPv4 address or an IPv6 /64); 0 for no limit.
    /// Default: 100, enough for an office of mail readers behind one address and for a large
    /// sender, while one address alone cannot take all descriptors.
    pub max_connections_per_client: usize,
    /// Clients held at once while a mailbox cannot be reached; the rest is turned away. Default:
    /// 2,500, which is 50 sessions a second for as long as one is held.
    pub hold_max: usize,
    /// What the process aims to stay below, in MiB. Default: `None`, derived from the machine.
    pub memory_mib: Option<u32>,
}

/// `[probe]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// `interval`: between two probes of one mailbox port; zero for none, else at least 100
    /// milliseconds. Default: 30 seconds.
    pub interval: Duration,
    /// `rise`: probes that must succeed before a mailbox counts as up. Default: 2.
    pub rise: u32,
    /// `fall`: probes that must fail before it counts as down. Default: 3.
    pub fall: u32,
}

/// `[log]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Log {
    /// `format`. Default: text.
    pub format: LogFormat,
    /// `level`: how much is logged, unless `RUST_LOG` is set. Default: info.
    pub level: tracing::Level,
    /// `repeats`: of connections that came to nothing, how many lines of one client, or of one reason,
    /// are logged a minute before the rest is only counted; of a client's sessions ten times as many; 0
    /// for no limit. Default: 10.
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
