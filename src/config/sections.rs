//! The tables of the file other than the listeners, and the whole put together.
//!
//! Invariant: every table is read to its end even after mistakes, so that one run tells them all;
//! values standing in for bad ones never leave, because `Mistakes::finish` has the last word.
//!
//! Deliberately not here: the listeners (see `listeners`) and how single values are understood (see
//! `values`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeTable;

use super::clashes::{Claim, report_clashes};
use super::listeners::{self, Shared};
use super::mistakes::{At, Mistakes, Place, quoted};
use super::reader::{Found, Table};
use super::{
    Config, ConfigError, DEFAULT_ADMIN, Limits, Listener, Log, LogFormat, Probe, Tailnet, Timeouts, syntax,
    values,
};
use crate::protocol::ProxyProtocol;

/// Everything in the file; `upstream` is the value of `--upstream`.
pub(super) fn config(mut mistakes: Mistakes, upstream: Option<&str>) -> Result<Config, ConfigError> {
    let (document, errors) = DeTable::parse_recoverable(mistakes.text);
    if !errors.is_empty() {
        syntax::report(&errors, &mut mistakes);
        return Err(mistakes.refusal());
    }
    let mut root = Table::root(document.get_ref());
    let hostname = root.get("hostname", &values::PUBLIC_NAME, &mut mistakes).map(value);
    let tailnet = tailnet(root.table("tailnet", &mut mistakes), &mut mistakes);
    let timeouts = timeouts(root.table("timeouts", &mut mistakes), &mut mistakes);
    let shared = shared(root.table("upstream", &mut mistakes), upstream, timeouts.hold, &mut mistakes);
    let tables = root.tables("listener", &mut mistakes);
    let (listeners, mut claims) = listeners::listeners(tables, &shared, &mut mistakes);
    warn_of_short_hold(&listeners, &timeouts, &mut mistakes);
    let limits = limits(root.table("limits", &mut mistakes), &mut mistakes);
    let probe = probe(root.table("probe", &mut mistakes), &mut mistakes);
    let log = log(root.table("log", &mut mistakes), &mut mistakes);
    let (admin, admin_tailnet_port) = admin(root.table("admin", &mut mistakes), &mut mistakes);
    root.finish(&mut mistakes);
    claims.extend(admin.clone());
    report_clashes(&claims, &mut mistakes);
    let warnings = mistakes.finish()?;
    let admin = admin.map(|claim| claim.address);
    Ok(Config {
        hostname,
        tailnet,
        listeners,
        timeouts,
        limits,
        probe,
        log,
        admin,
        admin_tailnet_port,
        warnings,
    })
}

/// The admin address without a look at the rest of the file.
pub(super) fn admin_alone(mut mistakes: Mistakes) -> Result<Option<SocketAddr>, ConfigError> {
    let (document, errors) = DeTable::parse_recoverable(mistakes.text);
    let mut table = Table::root(document.get_ref()).table("admin", &mut mistakes);
    let claim = admin_address(&mut table, &mut mistakes);
    // It may be on a line that is not TOML.
    if !errors.is_empty() && (!table.has("listen") || mistakes.forget()) {
        syntax::report(&errors, &mut mistakes);
    }
    mistakes.finish().map(|_| claim.map(|claim| claim.address))
}

fn tailnet(mut table: Table, mistakes: &mut Mistakes) -> Tailnet {
    let hostname = table.get("hostname", &values::HOSTNAME, mistakes).map(value);
    let tags = table.list("tags", &values::TAG, mistakes);
    let state_dir = table.get("state_dir", &values::PATH, mistakes);
    let configured_url = table.has("control_url");
    let control_url = table.get("control_url", &values::CONTROL_URL, mistakes).map(value);
    let auth_key_file = table.get("auth_key_file", &values::KEY_FILE, mistakes).map(value);
    let join_timeout = table.get("join_timeout", &values::DURATION, mistakes).map(value);
    let ephemeral = table.switch("ephemeral", mistakes).unwrap_or(false);
    let preauthorized = table.switch("preauthorized", mistakes).unwrap_or(false);
    let log_upload = table.switch("log_upload", mistakes).unwrap_or(false);
    if let Some(unused) = state_dir.as_ref().filter(|_| ephemeral) {
        mistakes.warn(&unused.place, "not used: an ephemeral node keeps no identity on disk");
    }
    table.finish(mistakes);
    Tailnet {
        hostname: hostname.unwrap_or_else(|| "tailwart-edge".to_owned()),
        tags: tags.map_or_else(
            || vec!["tag:reverse-proxy".to_owned()],
            |tags| tags.into_iter().map(value).collect(),
        ),
        state_dir: state_dir.map_or_else(|| PathBuf::from("/var/lib/tailwart-edge"), value),
        control_url: if configured_url { control_url } else { control_url_variable(mistakes) },
        auth_key_file,
        join_timeout: join_timeout.unwrap_or(Duration::from_secs(15)),
        ephemeral,
        preauthorized,
        log_upload,
    }
}

/// `TS_CONTROL_URL`, which every program with Tailscale inside knows.
fn control_url_variable(mistakes: &mut Mistakes) -> Option<String> {
    let text = (mistakes.env)("TS_CONTROL_URL").filter(|text| !text.is_empty())?;
    let parsed = (values::CONTROL_URL.parse)(&text);
    if let Err(problem) = parsed {
        let place = Place { at: At::Flag, key: "TS_CONTROL_URL".to_owned() };
        mistakes
            .add(&place, &format!("{} {problem}; expected {}", quoted(&text), values::CONTROL_URL.expected));
    }
    parsed.ok()
}

/// `[upstream]`: what listeners use that name nothing of their own.
fn shared(mut table: Table, flag: Option<&str>, hold: Duration, mistakes: &mut Mistakes) -> Shared {
    let host_place = table.place("host");
    let host_given = table.has("host") || flag.is_some();
    let hosts = match flag {
        Some(flag) => host_flag(flag, mistakes).map(|host| vec![host]),
        None => listeners::hosts(&mut table, "host", mistakes),
    };
    let proxy_place = table.place("proxy_protocol");
    let proxy = table.get("proxy_protocol", &values::PROXY_PROTOCOL, mistakes);
    table.finish(mistakes);
    let (proxy_protocol, proxy_place) =
        proxy.map_or((ProxyProtocol::V2, proxy_place), |proxy| (proxy.value, proxy.place));
    Shared { hosts, host_given, host_place, proxy_protocol, proxy_place, hold }
}

fn host_flag(flag: &str, mistakes: &mut Mistakes) -> Option<String> {
    let (place, shown) = (Place { at: At::Flag, key: "--upstream".to_owned() }, quoted(flag));
    let parsed = (values::HOST.parse)(flag);
    match &parsed {
        Ok(host) => listeners::warn_of_elsewhere(host, &shown, &place, mistakes),
        Err(problem) => {
            mistakes.add(&place, &format!("{shown} {problem}; expected {}", values::HOST.expected))
        }
    }
    parsed.ok()
}

fn timeouts(mut table: Table, mistakes: &mut Mistakes) -> Timeouts {
    let connect = table.get("connect", &values::DURATION, mistakes).map(value);
    let half_close = table.get("half_close", &values::DURATION, mistakes).map(value);
    let hold = table.get("hold", &values::DURATION_OR_ZERO, mistakes).map(value);
    let dead_peer = table.get("dead_peer", &values::DEAD_PEER, mistakes).map(value);
    let drain = table.get("drain", &values::DURATION_OR_ZERO, mistakes).map(value);
    table.finish(mistakes);
    Timeouts {
        connect: connect.unwrap_or(Duration::from_secs(8)),
        half_close: half_close.unwrap_or(Duration::from_secs(60)),
        hold: hold.unwrap_or(Duration::from_secs(45)),
        dead_peer: dead_peer.unwrap_or(Duration::from_secs(50)),
        drain: drain.unwrap_or(Duration::from_secs(30)),
    }
}

/// What finding out about a silence may take after it.
const SILENCE_LIMIT: Duration = Duration::from_secs(4);

/// A second server is of no use to a client that is turned away before it is tried.
fn warn_of_short_hold(listeners: &[Listener], timeouts: &Timeouts, mistakes: &mut Mistakes) {
    let tries_one = |listener: &&Listener| {
        listener.upstream.hosts.len() > 1
            && !listener.hold.is_zero()
            && listener.hold <= timeouts.connect + SILENCE_LIMIT
    };
    if let Some(listener) = listeners.iter().find(tries_one) {
        let place = Place { at: At::File, key: "timeouts.connect".to_owned() };
        let name = &listener.name;
        mistakes.warn(
            &place,
            &format!("not shorter than what {name} holds its clients for, so that its second server may come too late"),
        );
    }
}

/// A million connections are more than one box holds; the bound is there to catch slips.
const MAX_CONNECTIONS: u32 = 1_000_000;

/// Less than the program itself takes cannot be kept to.
const MIN_MEMORY_MIB: u32 = 64;

/// A terabyte, to catch slips.
const MAX_MEMORY_MIB: u32 = 1024 * 1024;

fn limits(mut table: Table, mistakes: &mut Mistakes) -> Limits {
    let what = "a number of connections";
    let total = table.number("max_connections", 1..=MAX_CONNECTIONS, what, mistakes);
    let what = "a number of connections (0 for no limit)";
    let per_client = table.number("max_connections_per_client", 0..=MAX_CONNECTIONS, what, mistakes);
    let what = "a number of connections (0 to hold none)";
    let hold_max = table.number("hold_max", 0..=MAX_CONNECTIONS, what, mistakes);
    let memory = table.number("memory_mib", MIN_MEMORY_MIB..=MAX_MEMORY_MIB, "a number of MiB", mistakes);
    table.finish(mistakes);
    Limits {
        max_connections: total.map(|number| number as usize),
        max_connections_per_client: per_client.unwrap_or(100) as usize,
        hold_max: hold_max.unwrap_or(2500) as usize,
        memory_mib: memory,
    }
}

/// More in a row than this is a slip: at the usual interval it takes hours.
const MAX_IN_A_ROW: u32 = 100;

fn probe(mut table: Table, mistakes: &mut Mistakes) -> Probe {
    let interval = table.get("interval", &values::PROBE_INTERVAL, mistakes).map(value);
    let what = "a number of probes in a row";
    let rise = table.number("rise", 1..=MAX_IN_A_ROW, what, mistakes);
    let fall = table.number("fall", 1..=MAX_IN_A_ROW, what, mistakes);
    table.finish(mistakes);
    Probe {
        interval: interval.unwrap_or(Duration::from_secs(30)),
        rise: rise.unwrap_or(2),
        fall: fall.unwrap_or(3),
    }
}

/// More lines than this are not read by anybody.
const MAX_REPEATS: u32 = 1_000_000;

fn log(mut table: Table, mistakes: &mut Mistakes) -> Log {
    let format = table.get("format", &values::LOG_FORMAT, mistakes).map(value);
    let level = table.get("level", &values::LOG_LEVEL, mistakes).map(value);
    let what = "a number of lines a minute (0 for no limit)";
    let repeats = table.number("repeats", 0..=MAX_REPEATS, what, mistakes);
    table.finish(mistakes);
    Log {
        format: format.unwrap_or(LogFormat::Text),
        level: level.unwrap_or(tracing::Level::INFO),
        repeats: repeats.unwrap_or(10),
    }
}

/// The admin address as a claim, since it must not clash with a listener's; `None` for "off". And the
/// port on the tailnet, where nothing else listens.
fn admin(mut table: Table, mistakes: &mut Mistakes) -> (Option<Claim>, Option<u16>) {
    let claim = admin_address(&mut table, mistakes);
    let tailnet_port = table.number("tailnet_port", 1..=u32::from(u16::MAX), "a port", mistakes);
    table.finish(mistakes);
    (claim, tailnet_port.and_then(|port| u16::try_from(port).ok()))
}

fn admin_address(table: &mut Table, mistakes: &mut Mistakes) -> Option<Claim> {
    let default_place = table.place("listen");
    let listen = table.get("listen", &values::ADMIN, mistakes);
    let owner = "admin".to_owned();
    let Some(listen) = listen else {
        return Some(Claim::by_default(DEFAULT_ADMIN, default_place, owner));
    };
    let address = listen.value?;
    if !address.ip().is_loopback() {
        let text = "not a loopback address: whoever can reach it can read the state of the edge";
        mistakes.warn(&listen.place, &format!("{} is {text}", listen.shown));
    }
    Some(Claim { address, shown: listen.shown, place: listen.place, owner })
}

fn value<T>(found: Found<T>) -> T {
    found.value
}
