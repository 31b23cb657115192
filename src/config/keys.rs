//! Every key of the file, for whoever writes one: what it takes, what it is without, what it is for.
//!
//! Invariants, which the tests hold: these are exactly the keys that the reader asks for; what a key
//! takes is what its error message expects; a key that is set to its default is as good as one that
//! is left out.
//!
//! The reference page of the book is made from it (`make reference`).
//!
//! Deliberately not here: how values are read (see `sections`, `listeners`, `values`).

use super::values;

/// A key.
#[derive(Debug)]
pub struct Key {
    /// Its table and its name, `timeouts.hold`; `listener` stands for each `[[listener]]`.
    pub path: &'static str,
    /// What it takes, as its error message says it.
    pub takes: &'static str,
    /// What it is when it is left out.
    pub default: DefaultValue,
    /// What it is for.
    pub about: &'static str,
}

/// What a key is when it is left out.
#[derive(Debug)]
pub enum DefaultValue {
    /// It must not be.
    Required,
    /// This, as the file would say it.
    Toml(&'static str),
    /// What these words say.
    Words(&'static str),
}

use DefaultValue::{Required, Toml, Words};

const fn key(path: &'static str, takes: &'static str, default: DefaultValue, about: &'static str) -> Key {
    Key { path, takes, default, about }
}

const SWITCH: &str = "true or false";

/// All of them, by table.
pub const KEYS: &[Key] = &[
    key(
        "hostname",
        values::PUBLIC_NAME.expected,
        Words("this machine's name if that is a full one, else its address"),
        "The name by which the world knows this machine, its MX name. It stands in the answers that the edge gives itself.",
    ),
    key(
        "tailnet.hostname",
        values::HOSTNAME.expected,
        Toml(r#""tailwart-edge""#),
        "The node's name on the tailnet.",
    ),
    key(
        "tailnet.tags",
        values::TAG.expected,
        Toml(r#"["tag:reverse-proxy"]"#),
        "An array of the tags that the node asks for. The edge does not serve unless it holds them all.",
    ),
    key(
        "tailnet.state_dir",
        values::PATH.expected,
        Toml(r#""/var/lib/tailwart-edge""#),
        "Keeps the node's identity. It is made with mode 0700; one that other users can read is refused.",
    ),
    key(
        "tailnet.control_url",
        values::CONTROL_URL.expected,
        Words("`TS_CONTROL_URL`, else Tailscale's own"),
        "The control server, for Headscale.",
    ),
    key(
        "tailnet.auth_key_file",
        values::KEY_FILE.expected,
        Words("none"),
        "A file that holds the auth key. `TS_AUTHKEY` and `TS_AUTHKEY_FILE` go before it. It is read only when the node has to enrol.",
    ),
    key(
        "tailnet.join_timeout",
        values::DURATION.expected,
        Toml(r#""15s""#),
        "A start that leads nowhere ends after it. A person who logs in with a browser may take longer.",
    ),
    key(
        "tailnet.ephemeral",
        SWITCH,
        Toml("false"),
        "Keeps no identity on disk: the node leaves the tailnet when it stops, and has another address at the next start.",
    ),
    key(
        "tailnet.preauthorized",
        SWITCH,
        Toml("false"),
        "Lets keys that are made for an OAuth client or a workload identity go past device approval.",
    ),
    key(
        "tailnet.log_upload",
        SWITCH,
        Toml("false"),
        "Uploads Tailscale's own logs to Tailscale. A tailnet with network flow logs demands it.",
    ),
    key(
        "upstream.host",
        values::HOST.expected,
        Words("none: it is required, unless `--upstream` is given or every listener names its own"),
        "The mailbox, or an array of several, tried in their order. `--upstream` overrides it.",
    ),
    key(
        "upstream.proxy_protocol",
        values::PROXY_PROTOCOL.expected,
        Toml(r#""v2""#),
        "The PROXY header that tells the mailbox who the client is. With `off` the mailbox takes the edge for every client, which breaks spam filters, bans and logs.",
    ),
    key(
        "listener.name",
        values::NAME.expected,
        Words("the protocol's name"),
        "The name in the log and in metrics, unique.",
    ),
    key(
        "listener.protocol",
        values::PROTOCOL.expected,
        Required,
        "What is spoken on the port. The table below says what follows from it.",
    ),
    key(
        "listener.listen",
        values::ADDRESS.expected,
        Words("`0.0.0.0` and `[::]` at the protocol's port; required for http and tcp"),
        "An array of the addresses to bind. `[::]` takes IPv6 only. An address that is named here must bind; a default `[::]` is given up with a warning on a machine without IPv6.",
    ),
    key(
        "listener.upstream_port",
        "a port from 1 to 65535",
        Words("the protocol's port; required for http and tcp"),
        "The mailbox's port.",
    ),
    key(
        "listener.upstream",
        values::HOST.expected,
        Words("`upstream.host`"),
        "This listener's own mailbox, or an array of several, tried in their order.",
    ),
    key(
        "listener.proxy_protocol",
        values::PROXY_PROTOCOL.expected,
        Words("`upstream.proxy_protocol`"),
        "This listener's own header.",
    ),
    key(
        "listener.idle_timeout",
        values::DURATION.expected,
        Words("by protocol"),
        "How long a connection may stay without a byte in either direction.",
    ),
    key(
        "listener.hold",
        values::DURATION_OR_ZERO.expected,
        Words("`timeouts.hold`; `\"0s\"` for http and tcp"),
        "How long a client of this listener is held while the mailbox cannot be reached.",
    ),
    key(
        "timeouts.connect",
        values::DURATION.expected,
        Toml(r#""8s""#),
        "One attempt to reach one server. WireGuard repeats a lost handshake after five seconds.",
    ),
    key(
        "timeouts.half_close",
        values::DURATION.expected,
        Toml(r#""60s""#),
        "How long a connection of which one side has finished sending may go without progress.",
    ),
    key(
        "timeouts.hold",
        values::DURATION_OR_ZERO.expected,
        Toml(r#""45s""#),
        "How long a client of a mail port is held while the mailbox cannot be reached. `\"0s\"` turns it away at once.",
    ),
    key(
        "timeouts.dead_peer",
        values::DEAD_PEER.expected,
        Toml(r#""50s""#),
        "How long a mailbox that went away without a word may go unnoticed, before its connections are closed.",
    ),
    key(
        "timeouts.drain",
        values::DURATION_OR_ZERO.expected,
        Toml(r#""30s""#),
        "How long an edge that stops waits for its connections. `\"0s\"` cuts them at once.",
    ),
    key(
        "limits.max_connections",
        "a number of connections from 1 to 1000000",
        Words("from the limit on open files and from `memory_mib`, at most 20000"),
        "Connections open at once, over all listeners. At the limit clients wait in the kernel's backlog.",
    ),
    key(
        "limits.max_connections_per_client",
        "a number of connections (0 for no limit) from 0 to 1000000",
        Toml("100"),
        "Connections open at once from one client: an IPv4 address, or an IPv6 /64.",
    ),
    key(
        "limits.hold_max",
        "a number of connections (0 to hold none) from 0 to 1000000",
        Toml("2500"),
        "Clients held at once while a mailbox cannot be reached; the rest is turned away.",
    ),
    key(
        "limits.memory_mib",
        "a number of MiB from 64 to 1048576",
        Words("half of what the machine or the control group has, from 64 to 256"),
        "The memory that the edge aims to stay below. A sixteenth of it is for bytes in flight that all connections share.",
    ),
    key(
        "probe.interval",
        values::PROBE_INTERVAL.expected,
        Toml(r#""30s""#),
        "Between two probes of one port of one server.",
    ),
    key(
        "probe.rise",
        "a number of probes in a row from 1 to 100",
        Toml("2"),
        "How many must succeed before a server that was down counts as up.",
    ),
    key(
        "probe.fall",
        "a number of probes in a row from 1 to 100",
        Toml("3"),
        "How many must fail before a server counts as down.",
    ),
    key(
        "log.format",
        values::LOG_FORMAT.expected,
        Toml(r#""text""#),
        "How a line is written: for people, or as one JSON object.",
    ),
    key(
        "log.level",
        values::LOG_LEVEL.expected,
        Toml(r#""info""#),
        "How much is logged, unless `RUST_LOG` says otherwise. `debug` adds Tailscale's own lines.",
    ),
    key(
        "log.repeats",
        "a number of lines a minute (0 for no limit) from 0 to 1000000",
        Toml("10"),
        "Of connections that came to nothing, how many lines a minute are logged of one client, or for one reason; of a client's sessions, ten times as many. The rest is counted.",
    ),
    key(
        "admin.listen",
        values::ADMIN.expected,
        Toml(r#""127.0.0.1:9464""#),
        "Where health, state and metrics are served. Whoever can reach it can read the state of the edge, so keep it on loopback. Where another program has the default, the edge runs without.",
    ),
    key(
        "admin.tailnet_port",
        "a port from 1 to 65535",
        Words("none"),
        "The port of the node's tailnet addresses where peers are told the same, but for `/doctor`. The tailnet's policy decides who may ask.",
    ),
];

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
    fn what_one_takes_is_what_its_error_says() {
        for key in KEYS {
            let (with, _) = files(key.path, "1.5");
            let told = mistakes(&with).join("\n");
            assert!(told.contains(key.takes), "{}: {:?} is not in\n{told}", key.path, key.takes);
        }
    }

    #[test]
    fn one_that_is_set_to_its_default_is_as_good_as_none() {
        let mut seen = 0;
        for key in KEYS {
            let Toml(value) = key.default else { continue };
            let (with, without) = files(key.path, value);
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
