//! The keys of the file: for each its values, its default and its purpose.
//!
//! This is the only place that describes them. The reader (`reader`) takes the default and the range from here,
//! its messages use the same words, and the reference page of the book is made from [`KEYS`] (`make reference`).
//!
//! Invariant, which a test checks: every key that is listed here is read.
//!
//! Deliberately not here: how the text of a value is parsed (see `values`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use DefaultValue::{Is, Required, Words};

use super::LogFormat;
use super::values::{self, Kind, Takes};
use crate::protocol::{Protocol, ProxyProtocol};

/// The description of a key, for messages and for the book.
#[derive(Debug)]
pub struct Description {
    /// Its table and its name, `timeouts.hold`; `listener` stands for each `[[listener]]`.
    pub path: &'static str,
    /// Which values are allowed.
    pub takes: Takes,
    /// Its value when it is left out.
    pub default: DefaultValue,
    /// Its purpose.
    pub about: &'static str,
}

/// The value of a key that is left out.
#[derive(Debug)]
pub enum DefaultValue {
    /// The key must not be left out.
    Required,
    /// This value. A string is without its quotes; for an array it is the only item.
    Is(&'static str),
    /// These words describe it.
    Words(&'static str),
}

impl Description {
    /// Its default as it would be written in the file; `None` if the default is not a value.
    pub fn default_in_toml(&self) -> Option<String> {
        let Is(value) = self.default else { return None };
        Some(match self.takes {
            Takes::String(_) => format!("{value:?}"),
            Takes::Strings(_) => format!("[{value:?}]"),
            Takes::Number(..) | Takes::Switch => value.to_owned(),
        })
    }
}

/// A key, and the parser of its value. If the key takes an array, `T` is one item.
pub(super) struct Key<T> {
    pub description: Description,
    parse: fn(&str) -> Result<T, &'static str>,
}

impl<T> Key<T> {
    const fn new(path: &'static str, kind: Kind<T>, default: DefaultValue, about: &'static str) -> Key<T> {
        let Kind { takes, parse } = kind;
        Key { description: Description { path, takes, default, about }, parse }
    }

    /// Its name within its table.
    pub fn name(&self) -> &'static str {
        self.description.path.rsplit('.').next().unwrap_or_default()
    }

    /// Parses a value. The error says what is wrong and what was expected.
    pub fn understand(&self, text: &str) -> Result<T, String> {
        (self.parse)(text).map_err(|problem| format!("{problem}; expected {}", self.description.takes))
    }

    /// Its value when it is left out. Panics unless the default [`Is`] a value.
    pub fn default(&self) -> T {
        let Description { path, default, .. } = &self.description;
        let Is(value) = default else { panic!("{path} has no default value") };
        self.understand(value).unwrap_or_else(|problem| panic!("the default of {path} {problem}"))
    }
}

/// Makes a constant for each key, and the list of all. A line has the constant's name, the value's type, the
/// key's path, kind, default and purpose.
macro_rules! keys {
    ($($(#[$reason:meta])* $name:ident: $value:ty = $path:literal, $kind:ident, $default:expr, $about:literal;)*) => {
        $($(#[$reason])* pub(super) const $name: Key<$value> = Key::new($path, values::$kind, $default, $about);)*

        /// All keys, by table.
        pub const KEYS: &[&Description] = &[$(&$name.description),*];
    };
}

keys! {
    HOSTNAME: String = "hostname", PUBLIC_NAME, Words("this machine's name if that is a full one, else its address"),
        "The name by which the world knows this machine, its MX name. The edge uses it in its own answers to clients.";

    TAILNET_HOSTNAME: String = "tailnet.hostname", NODE_NAME, Is("tailwart-edge"),
        "The node's name on the tailnet.";
    TAILNET_TAGS: String = "tailnet.tags", TAGS, Is("tag:reverse-proxy"),
        "An array of the tags that the node asks for. The edge does not serve unless it holds them all.";
    TAILNET_STATE_DIR: PathBuf = "tailnet.state_dir", DIRECTORY, Is("/var/lib/tailwart-edge"),
        "The directory with the node's identity. The edge makes it with mode 0700, and refuses one that other users can read.";
    TAILNET_CONTROL_URL: String = "tailnet.control_url", CONTROL_URL, Words("`TS_CONTROL_URL`, else Tailscale's own"),
        "The control server, for Headscale.";
    TAILNET_AUTH_KEY_FILE: PathBuf = "tailnet.auth_key_file", KEY_FILE, Words("none"),
        "A file that holds the auth key. `TS_AUTHKEY` and `TS_AUTHKEY_FILE` override it. It is read only when the node has to enrol.";
    TAILNET_JOIN_TIMEOUT: Duration = "tailnet.join_timeout", DURATION, Is("15s"),
        "A start that cannot join the tailnet ends after this time. A person who logs in with a browser may take longer.";
    TAILNET_EPHEMERAL: bool = "tailnet.ephemeral", SWITCH, Is("false"),
        "Keeps no identity on disk: the node leaves the tailnet when it stops, and has another address at the next start.";
    TAILNET_PREAUTHORIZED: bool = "tailnet.preauthorized", SWITCH, Is("false"),
        "If true, the keys that the edge makes with an OAuth client or a workload identity need no device approval.";
    TAILNET_LOG_UPLOAD: bool = "tailnet.log_upload", SWITCH, Is("false"),
        "Uploads Tailscale's own logs to Tailscale. A tailnet with network flow logs requires it.";

    UPSTREAM_HOST: String = "upstream.host", HOST, Words("none: it is required, unless `--upstream` is given or every listener names its own"),
        "The mailbox, or an array of several, tried in their order. `--upstream` overrides it.";
    UPSTREAM_PROXY_PROTOCOL: ProxyProtocol = "upstream.proxy_protocol", PROXY_PROTOCOL, Is("v2"),
        "The PROXY header that tells the mailbox who the client is. With `off` the mailbox sees the edge as the client of every connection, which breaks spam filters, bans and logs.";

    LISTENER_NAME: String = "listener.name", LISTENER_NAME, Words("the protocol's name"),
        "The listener's name in the log and in metrics. It must be unique.";
    LISTENER_PROTOCOL: Protocol = "listener.protocol", PROTOCOL, Required,
        "The protocol on the port. The table below shows the defaults that follow from it.";
    LISTENER_LISTEN: SocketAddr = "listener.listen", ADDRESSES, Words("`0.0.0.0` and `[::]` at the protocol's port; required for http and tcp"),
        "An array of the addresses to bind. `[::]` takes IPv6 only. If an address that is named here cannot be bound, that is an error. The default `[::]` is left out with a warning on a machine without IPv6.";
    LISTENER_UPSTREAM_PORT: u16 = "listener.upstream_port", PORT, Words("the protocol's port; required for http and tcp"),
        "The mailbox's port.";
    LISTENER_UPSTREAM: String = "listener.upstream", HOST, Words("`upstream.host`"),
        "This listener's own mailbox, or an array of several, tried in their order.";
    LISTENER_PROXY_PROTOCOL: ProxyProtocol = "listener.proxy_protocol", PROXY_PROTOCOL, Words("`upstream.proxy_protocol`"),
        "The PROXY header of this listener.";
    LISTENER_IDLE_TIMEOUT: Duration = "listener.idle_timeout", DURATION, Words("by protocol"),
        "How long a connection may be idle: no byte in either direction.";
    LISTENER_HOLD: Duration = "listener.hold", DURATION_OR_ZERO, Words("`timeouts.hold`; `\"0s\"` for http and tcp"),
        "How long a client of this listener is held while the mailbox cannot be reached.";

    TIMEOUTS_CONNECT: Duration = "timeouts.connect", DURATION, Is("8s"),
        "How long one attempt to reach one server may take. WireGuard repeats a lost handshake after five seconds.";
    TIMEOUTS_HALF_CLOSE: Duration = "timeouts.half_close", DURATION, Is("60s"),
        "How long a connection may go without progress after one side has finished sending.";
    /// Every sender waits that long: RFC 5321 section 4.5.3.2.1 demands five minutes, and the least patient
    /// known gives 60 seconds.
    TIMEOUTS_HOLD: Duration = "timeouts.hold", DURATION_OR_ZERO, Is("45s"),
        "How long a client of a mail port is held while the mailbox cannot be reached. `\"0s\"` turns it away at once.";
    TIMEOUTS_DEAD_PEER: Duration = "timeouts.dead_peer", DEAD_PEER, Is("50s"),
        "How long it may take to notice that a mailbox has vanished without a word, and to close its connections.";
    TIMEOUTS_DRAIN: Duration = "timeouts.drain", DURATION_OR_ZERO, Is("30s"),
        "How long the edge waits for its connections when it stops. `\"0s\"` cuts them at once.";

    LIMITS_MAX_CONNECTIONS: usize = "limits.max_connections", CONNECTIONS, Words("from the limit on open files and from `memory_mib`, at most 20000"),
        "Connections open at once, over all listeners. At the limit clients wait in the kernel's backlog.";
    /// Enough for an office of mail readers behind one address and for a large sender, while one address
    /// alone cannot take all descriptors.
    LIMITS_MAX_CONNECTIONS_PER_CLIENT: usize = "limits.max_connections_per_client", CONNECTIONS_OR_NO_LIMIT, Is("100"),
        "Connections open at once from one client: an IPv4 address, or an IPv6 /64.";
    /// Enough for about 50 new clients a second, each held for 45 seconds.
    LIMITS_HOLD_MAX: usize = "limits.hold_max", CONNECTIONS_OR_NONE, Is("2500"),
        "Clients held at once while a mailbox cannot be reached; more clients are turned away.";
    LIMITS_MEMORY_MIB: u32 = "limits.memory_mib", MEMORY, Words("half of what the machine or the control group has, from 64 to 256"),
        "The memory that the edge aims to stay below. All connections together may have a sixteenth of it in flight.";

    PROBE_INTERVAL: Duration = "probe.interval", PROBE_INTERVAL, Is("30s"),
        "The time between two probes of one port of one server.";
    PROBE_RISE: u32 = "probe.rise", PROBES, Is("2"),
        "How many probes must succeed before a server that was down counts as up.";
    PROBE_FALL: u32 = "probe.fall", PROBES, Is("3"),
        "How many probes must fail before a server counts as down.";

    LOG_FORMAT: LogFormat = "log.format", LOG_FORMAT, Is("text"),
        "How a line is written: for people, or as one JSON object.";
    LOG_LEVEL: tracing::Level = "log.level", LOG_LEVEL, Is("info"),
        "How much is logged, unless `RUST_LOG` says otherwise. `debug` adds Tailscale's own lines.";
    LOG_REPEATS: u32 = "log.repeats", LINES, Is("10"),
        "How many lines a minute each client or reason has in the log, for connections that came to nothing. For sessions each client has ten times as many. The rest is counted.";

    ADMIN_LISTEN: Option<SocketAddr> = "admin.listen", ADMIN_ADDRESS, Is("127.0.0.1:9464"),
        "Where health, state and metrics are served. Whoever can reach it can read the state of the edge, so keep it on loopback. If another program has the default address, the edge runs without its admin listener.";
    ADMIN_TAILNET_PORT: u16 = "admin.tailnet_port", PORT, Words("none"),
        "A port of the node's tailnet addresses. Peers get the same there, except `/doctor`. The tailnet's policy decides who may ask.";
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Env};
    use super::*;

    const NO_ENV: Env = &|_| None;

    /// A file with this key, which is good but for it; and the same without it.
    fn files(path: &str, value: &str) -> (String, String) {
        let host = if path == "upstream.host" { "" } else { "upstream.host = \"stalwart\"\n" };
        match path.strip_prefix("listener.") {
            Some(name) => {
                let required = if name == "protocol" { "" } else { "protocol = \"smtp\"\n" };
                let rest = format!("{host}[[listener]]\n{required}");
                (format!("{rest}{name} = {value}\n"), rest)
            }
            None => (format!("{host}{path} = {value}\n"), host.to_owned()),
        }
    }

    fn mistakes(text: &str) -> Vec<String> {
        Config::parse(text, None, NO_ENV).expect_err(text).mistakes().to_vec()
    }

    /// What the reader asks for in a table, by what it says of a key that it does not know.
    fn asked_for(table: &str) -> Vec<String> {
        let text = match table {
            "" => "nothing = 1\n".to_owned(),
            "listener" => "[[listener]]\nnothing = 1\n".to_owned(),
            table => format!("[{table}]\nnothing = 1\n"),
        };
        let told = mistakes(&text);
        let told = told.iter().find(|mistake| mistake.contains("nothing: unknown key"));
        let (_, keys) = told.and_then(|told| told.split_once("allowed here: ")).expect("a list of keys");
        keys.split(", ").map(str::to_owned).collect()
    }

    #[test]
    fn they_are_what_the_reader_asks_for() {
        let is_key = |name: &String| KEYS.iter().any(|key| key.path == name);
        let (keys, tables): (Vec<String>, Vec<String>) = asked_for("").into_iter().partition(is_key);
        assert!(tables.len() >= 6, "{tables:?}");
        let in_table = |table: &String| {
            let mut keys = asked_for(table);
            keys.iter_mut().for_each(|key| *key = format!("{table}.{key}"));
            keys
        };
        let mut asked: Vec<String> = keys.into_iter().chain(tables.iter().flat_map(in_table)).collect();
        let mut documented: Vec<String> = KEYS.iter().map(|key| key.path.to_owned()).collect();
        asked.sort();
        documented.sort();
        assert_eq!(asked, documented);
    }

    #[test]
    fn one_that_is_set_to_its_default_is_as_good_as_none() {
        let mut seen = 0;
        for key in KEYS {
            let Some(value) = key.default_in_toml() else { continue };
            let (with, without) = files(key.path, &value);
            let parsed =
                |text: &str| Config::parse(text, None, NO_ENV).unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert_eq!(parsed(&with), parsed(&without), "{}", key.path);
            seen += 1;
        }
        assert!(seen >= 15, "only {seen} keys have a default");
    }

    #[test]
    fn what_is_required_is_missed() {
        for key in KEYS.iter().filter(|key| matches!(key.default, Required)) {
            let (_, without) = files(key.path, "");
            let expected = format!("{}: missing", key.path.replace("listener.", "listener[1]."));
            let told = mistakes(&without);
            assert!(told.iter().any(|mistake| mistake.contains(&expected)), "{told:?}");
        }
    }
}
