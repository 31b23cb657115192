//! The tables of the file other than the listeners, and the whole configuration made of them.
//!
//! Invariant: every table is read to its end even after mistakes, so that one run reports all of them. A wrong
//! value is replaced by a default meanwhile, but no such configuration is returned: `Mistakes::finish` fails then.
//!
//! Deliberately not here: the listeners (see `listeners`), and how single values are parsed (see `values`).

use std::net::SocketAddr;
use std::time::Duration;

use toml::de::DeTable;

use super::clashes::{Claim, report_clashes};
use super::listeners::{self, Shared};
use super::mistakes::{At, Mistakes, Place, quoted};
use super::reader::{Found, Table};
use super::{ADMIN, Config, ConfigError, Limits, Listener, Log, Probe, Tailnet, Timeouts, keys, syntax};

/// Everything in the file; `upstream` is the value of `--upstream`.
pub(super) fn config(mut mistakes: Mistakes, upstream: Option<&str>) -> Result<Config, ConfigError> {
    let (document, errors) = DeTable::parse_recoverable(mistakes.text);
    if !errors.is_empty() {
        syntax::report(&errors, &mut mistakes);
        return Err(mistakes.refusal());
    }
    let mut root = Table::root(document.get_ref());
    let hostname = root.find(&keys::HOSTNAME, &mut mistakes).map(Found::value);
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

/// The admin address only; the rest of the file is ignored.
pub(super) fn admin_alone(mut mistakes: Mistakes) -> Result<Option<SocketAddr>, ConfigError> {
    let (document, errors) = DeTable::parse_recoverable(mistakes.text);
    let mut table = Table::root(document.get_ref()).table("admin", &mut mistakes);
    let claim = admin_address(&mut table, &mut mistakes);
    // The key may be on a line that is not TOML.
    if !errors.is_empty() && (!table.has(&keys::ADMIN_LISTEN) || mistakes.forget()) {
        syntax::report(&errors, &mut mistakes);
    }
    mistakes.finish().map(|_| claim.map(|claim| claim.address))
}

fn tailnet(mut table: Table, mistakes: &mut Mistakes) -> Tailnet {
    let hostname = table.get(&keys::TAILNET_HOSTNAME, mistakes);
    let tags = match table.list(&keys::TAILNET_TAGS, mistakes) {
        Some(tags) => tags.into_iter().map(Found::value).collect(),
        None => vec![keys::TAILNET_TAGS.default()],
    };
    let state_dir = table.find(&keys::TAILNET_STATE_DIR, mistakes);
    let control_url = match table.has(&keys::TAILNET_CONTROL_URL) {
        true => table.find(&keys::TAILNET_CONTROL_URL, mistakes).map(Found::value),
        false => control_url_variable(mistakes),
    };
    let auth_key_file = table.find(&keys::TAILNET_AUTH_KEY_FILE, mistakes).map(Found::value);
    let join_timeout = table.get(&keys::TAILNET_JOIN_TIMEOUT, mistakes);
    let ephemeral = table.get(&keys::TAILNET_EPHEMERAL, mistakes);
    let preauthorized = table.get(&keys::TAILNET_PREAUTHORIZED, mistakes);
    let log_upload = table.get(&keys::TAILNET_LOG_UPLOAD, mistakes);
    table.finish(mistakes);
    if let Some(unused) = state_dir.as_ref().filter(|_| ephemeral) {
        mistakes.warn(&unused.place, "not used: an ephemeral node keeps no identity on disk");
    }
    let state_dir = state_dir.map_or_else(|| keys::TAILNET_STATE_DIR.default(), Found::value);
    Tailnet {
        hostname,
        tags,
        state_dir,
        control_url,
        auth_key_file,
        join_timeout,
        ephemeral,
        preauthorized,
        log_upload,
    }
}

/// `TS_CONTROL_URL`, the usual variable of programs with Tailscale inside.
fn control_url_variable(mistakes: &mut Mistakes) -> Option<String> {
    let text = (mistakes.env)("TS_CONTROL_URL").filter(|text| !text.is_empty())?;
    let understood = keys::TAILNET_CONTROL_URL.understand(&text);
    if let Err(problem) = &understood {
        let place = Place { at: At::Flag, key: "TS_CONTROL_URL".to_owned() };
        mistakes.add(&place, &format!("{} {problem}", quoted(&text)));
    }
    understood.ok()
}

/// `[upstream]`: the values for listeners that have none of their own.
fn shared(mut table: Table, flag: Option<&str>, hold: Duration, mistakes: &mut Mistakes) -> Shared {
    let host_place = table.place(&keys::UPSTREAM_HOST);
    let host_given = table.has(&keys::UPSTREAM_HOST) || flag.is_some();
    let hosts = match flag {
        Some(flag) => host_flag(flag, mistakes).map(|host| vec![host]),
        None => listeners::hosts(&mut table, &keys::UPSTREAM_HOST, mistakes),
    };
    let key = keys::UPSTREAM_PROXY_PROTOCOL;
    let (proxy_protocol, proxy_place) = match table.find(&key, mistakes) {
        Some(found) => (found.value, found.place),
        None => (key.default(), table.place(&key)),
    };
    table.finish(mistakes);
    Shared { hosts, host_given, host_place, proxy_protocol, proxy_place, hold }
}

fn host_flag(flag: &str, mistakes: &mut Mistakes) -> Option<String> {
    let (place, shown) = (Place { at: At::Flag, key: "--upstream".to_owned() }, quoted(flag));
    let understood = keys::UPSTREAM_HOST.understand(flag);
    match &understood {
        Ok(host) => listeners::warn_of_elsewhere(host, &shown, &place, mistakes),
        Err(problem) => mistakes.add(&place, &format!("{shown} {problem}")),
    }
    understood.ok()
}

fn timeouts(mut table: Table, mistakes: &mut Mistakes) -> Timeouts {
    let timeouts = Timeouts {
        connect: table.get(&keys::TIMEOUTS_CONNECT, mistakes),
        half_close: table.get(&keys::TIMEOUTS_HALF_CLOSE, mistakes),
        hold: table.get(&keys::TIMEOUTS_HOLD, mistakes),
        dead_peer: table.get(&keys::TIMEOUTS_DEAD_PEER, mistakes),
        drain: table.get(&keys::TIMEOUTS_DRAIN, mistakes),
    };
    table.finish(mistakes);
    timeouts
}

/// How long it may take, after a failed attempt, to find out why a server is silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(4);

/// Warns if clients may be turned away before a second server is tried.
fn warn_of_short_hold(listeners: &[Listener], timeouts: &Timeouts, mistakes: &mut Mistakes) {
    let tries_one = |listener: &&Listener| {
        listener.upstream.hosts.len() > 1
            && !listener.hold.is_zero()
            && listener.hold <= timeouts.connect + SILENCE_LIMIT
    };
    if let Some(listener) = listeners.iter().find(tries_one) {
        let place = Place { at: At::File, key: keys::TIMEOUTS_CONNECT.description.path.to_owned() };
        let name = &listener.name;
        mistakes.warn(
            &place,
            &format!("too long for the hold of {name}: a client may be turned away before the second server is tried"),
        );
    }
}

fn limits(mut table: Table, mistakes: &mut Mistakes) -> Limits {
    let limits = Limits {
        max_connections: table.find(&keys::LIMITS_MAX_CONNECTIONS, mistakes).map(Found::value),
        max_connections_per_client: table.get(&keys::LIMITS_MAX_CONNECTIONS_PER_CLIENT, mistakes),
        hold_max: table.get(&keys::LIMITS_HOLD_MAX, mistakes),
        memory_mib: table.find(&keys::LIMITS_MEMORY_MIB, mistakes).map(Found::value),
    };
    table.finish(mistakes);
    limits
}

fn probe(mut table: Table, mistakes: &mut Mistakes) -> Probe {
    let probe = Probe {
        interval: table.get(&keys::PROBE_INTERVAL, mistakes),
        rise: table.get(&keys::PROBE_RISE, mistakes),
        fall: table.get(&keys::PROBE_FALL, mistakes),
    };
    table.finish(mistakes);
    probe
}

fn log(mut table: Table, mistakes: &mut Mistakes) -> Log {
    let log = Log {
        format: table.get(&keys::LOG_FORMAT, mistakes),
        level: table.get(&keys::LOG_LEVEL, mistakes),
        repeats: table.get(&keys::LOG_REPEATS, mistakes),
    };
    table.finish(mistakes);
    log
}

/// The admin address as a claim, since it must not clash with a listener's; `None` for "off". And the port on
/// the tailnet, which cannot clash, since nothing else listens there.
fn admin(mut table: Table, mistakes: &mut Mistakes) -> (Option<Claim>, Option<u16>) {
    let claim = admin_address(&mut table, mistakes);
    let tailnet_port = table.find(&keys::ADMIN_TAILNET_PORT, mistakes).map(Found::value);
    table.finish(mistakes);
    (claim, tailnet_port)
}

fn admin_address(table: &mut Table, mistakes: &mut Mistakes) -> Option<Claim> {
    let key = keys::ADMIN_LISTEN;
    let owner = ADMIN.to_owned();
    let Some(Found { value, place, shown }) = table.find(&key, mistakes) else {
        return key.default().map(|address| Claim::by_default(address, table.place(&key), owner));
    };
    let address = value?;
    if !address.ip().is_loopback() {
        let text = "not a loopback address: whoever can reach it can read the state of the edge";
        mistakes.warn(&place, &format!("{shown} is {text}"));
    }
    Some(Claim { address, shown, place, owner })
}
