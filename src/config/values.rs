//! What single values may be: addresses, durations, names and so on, and the replacing of
//! `${VARIABLES}`.
//!
//! Invariants:
//! - A parser sees values with variables replaced, which may be secrets, and so answers with fixed texts
//!   (`&'static str`) only; the caller adds the value as the file has it.
//! - Variables are replaced inside strings, after the TOML is parsed, so a variable's value cannot add
//!   keys or tables. `${NAME}` stands for the variable, `$$` for a single `$`; a `$` before anything else
//!   stands for itself.
//!
//! Deliberately not here: where a value stands and what it means next to others.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::{Env, LogFormat};
use crate::protocol::{Protocol, ProxyProtocol};
use crate::support::secret::looks_like_key;

/// The longest duration taken: no time-out of this program makes sense beyond a week, and sums with
/// the clock cannot overflow.
const MAX_DURATION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A kind of value.
pub(super) struct Kind<T> {
    /// What is allowed, for after "expected".
    pub expected: &'static str,
    /// Understands a value, or says what it is instead: "is not an address".
    pub parse: fn(&str) -> Result<T, &'static str>,
}

pub(super) const ADDRESS: Kind<SocketAddr> =
    Kind { expected: "IP:PORT such as 0.0.0.0:25 or [::]:25", parse: address };

/// The admin address, `None` for "off".
pub(super) const ADMIN: Kind<Option<SocketAddr>> = Kind {
    expected: r#"IP:PORT such as 127.0.0.1:9464, or "off""#,
    parse: |text| {
        if text == "off" { Ok(None) } else { address(text).map(Some) }
    },
};

pub(super) const DURATION: Kind<Duration> = Kind {
    expected: r#"a number with a unit (ms, s, m, h) such as "500ms", "30s", "35m" or "1h""#,
    parse: |text| duration(text).and_then(|d| if d.is_zero() { Err("is no time at all") } else { Ok(d) }),
};

pub(super) const DURATION_OR_ZERO: Kind<Duration> =
    Kind { expected: r#"a number with a unit (ms, s, m, h) such as "30s", or "0s""#, parse: duration };

/// Less than a few pings take would close the connections of a mailbox that is well.
pub(super) const DEAD_PEER: Kind<Duration> = Kind {
    expected: r#"a duration of at least "15s""#,
    parse: |text| duration(text).and_then(|d| if d.as_secs() < 15 { Err("is too short") } else { Ok(d) }),
};

/// More often than that would be an attack on the mailbox.
pub(super) const PROBE_INTERVAL: Kind<Duration> = Kind {
    expected: r#"a duration of at least "100ms", or "0s" for no probes"#,
    parse: |text| {
        let interval = duration(text)?;
        let is_short = !interval.is_zero() && interval < Duration::from_millis(100);
        if is_short { Err("is too short") } else { Ok(interval) }
    },
};

pub(super) const HOST: Kind<String> =
    Kind { expected: "one host without a port: a short name, a MagicDNS name or a tailnet IP", parse: host };

pub(super) const HOSTNAME: Kind<String> = Kind {
    expected: "1 to 63 letters, digits and hyphens, no hyphen first or last",
    parse: |text| {
        if is_label(text) { Ok(text.to_owned()) } else { Err("is not a DNS label") }
    },
};

pub(super) const PUBLIC_NAME: Kind<String> = Kind {
    expected: "a full DNS name such as mx.example.org",
    parse: |text| {
        let labels: Vec<&str> = text.split('.').collect();
        let good = text.len() <= 253 && labels.len() > 1 && labels.iter().all(|label| is_label(label));
        if good { Ok(text.to_owned()) } else { Err("is not a full DNS name") }
    },
};

pub(super) const TAG: Kind<String> = Kind {
    expected: "tag: and letters, digits and hyphens, a letter first, such as tag:reverse-proxy",
    parse: tag,
};

pub(super) const PATH: Kind<PathBuf> = Kind { expected: "the path of a directory", parse: path };

pub(super) const KEY_FILE: Kind<PathBuf> = Kind {
    expected: "the path of a file that holds the key",
    parse: |text| {
        // A file may well be named for what it holds; a key has no slash.
        let is_key = looks_like_key(text) && !text.contains('/');
        if is_key { Err("is an auth key itself") } else { path(text) }
    },
};

pub(super) const CONTROL_URL: Kind<String> = Kind {
    expected: "http:// or https:// and a host, such as https://headscale.example.com",
    parse: control_url,
};

/// The admin listener's name, in the log and among socket units.
const ADMIN_NAME: &str = super::ADMIN;

pub(super) const NAME: Kind<String> = Kind {
    expected: "1 to 63 letters, digits, hyphens, underscores and dots",
    parse: |text| {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let fits = (1..=63).contains(&text.len()) && text.chars().all(good);
        match text {
            ADMIN_NAME => Err("is the admin listener's name"),
            _ if fits => Ok(text.to_owned()),
            _ => Err("is not a name"),
        }
    },
};

pub(super) const PROTOCOL: Kind<Protocol> = Kind {
    expected: "one of smtp, submission, submissions, imap, imaps, pop3, pop3s, sieve, http, tcp",
    parse: |text| {
        let find = |is: fn(&str, &str) -> bool| Protocol::ALL.into_iter().find(|p| is(p.name(), text));
        find(|name, text| name == text).ok_or_else(|| match find(str::eq_ignore_ascii_case) {
            Some(_) => "is not a protocol, whose names are in small letters",
            None => "is not a protocol",
        })
    },
};

pub(super) const PROXY_PROTOCOL: Kind<ProxyProtocol> = Kind {
    expected: "one of v1, v2, off",
    parse: |text| match text {
        "v1" => Ok(ProxyProtocol::V1),
        "v2" => Ok(ProxyProtocol::V2),
        "off" => Ok(ProxyProtocol::Off),
        _ => Err("is not a PROXY protocol version"),
    },
};

pub(super) const LOG_FORMAT: Kind<LogFormat> = Kind {
    expected: "one of text, json",
    parse: |text| match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("is not a log format"),
    },
};

pub(super) const LOG_LEVEL: Kind<tracing::Level> = Kind {
    expected: "one of error, warn, info, debug, trace",
    parse: |text| match text {
        "error" => Ok(tracing::Level::ERROR),
        "warn" => Ok(tracing::Level::WARN),
        "info" => Ok(tracing::Level::INFO),
        "debug" => Ok(tracing::Level::DEBUG),
        "trace" => Ok(tracing::Level::TRACE),
        _ => Err("is not a log level"),
    },
};

/// Replaces `${NAME}` by the variable's value and `$$` by `$`, or tells every reason why that
/// cannot be done, each to be put after the value as written.
pub(super) fn substitute<'t>(written: &'t str, env: Env) -> Result<Cow<'t, str>, Vec<String>> {
    let mut text = String::new();
    let mut problems = Vec::new();
    let mut rest = written;
    while let Some(dollar) = rest.find('$') {
        text.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(after) = rest.strip_prefix('{') {
            let Some((name, after)) = after.split_once('}') else {
                problems.push("has ${ without a closing }; write $$ for a plain $".to_owned());
                return Err(problems);
            };
            rest = after;
            match variable(name, env) {
                Ok(value) => text.push_str(&value),
                Err(problem) => problems.push(problem),
            }
        } else {
            text.push('$');
            rest = rest.strip_prefix('$').unwrap_or(rest);
        }
    }
    match (problems.is_empty(), text.is_empty()) {
        (false, _) => Err(problems),
        (true, true) => Ok(Cow::Borrowed(rest)),
        (true, false) => Ok(Cow::Owned(text + rest)),
    }
}

/// A set but empty variable is a mistake too: what it leaves behind would only be told in terms of
/// what it broke.
fn variable(name: &str, env: Env) -> Result<String, String> {
    let mut chars = name.chars();
    let starts_well = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !chars.all(|c| c.is_ascii_alphanumeric() || c == '_') {
        let problem = "has a ${...} that holds no variable name; \
                       expected letters, digits and underscores only, or $$ for a plain $";
        return Err(problem.to_owned());
    }
    match env(name) {
        None => Err(format!("needs the environment variable {name}, which is not set")),
        Some(value) if value.is_empty() => {
            Err(format!("needs the environment variable {name}, which is empty"))
        }
        Some(value) => Ok(value),
    }
}

/// Whether a host is an IP address that no tailnet gives to a node (tailscale.com/net/tsaddr).
pub(super) fn is_elsewhere(host: &str) -> bool {
    match host.parse() {
        Ok(IpAddr::V4(v4)) => v4.octets()[0] != 100 || v4.octets()[1] & 0xC0 != 64,
        Ok(IpAddr::V6(v6)) => v6.segments()[..3] != [0xfd7a, 0x115c, 0xa1e0],
        Err(_) => false,
    }
}

fn address(text: &str) -> Result<SocketAddr, &'static str> {
    let address: SocketAddr = text.parse().map_err(|_| "is not an address")?;
    match address.ip() {
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Err("is an IPv4 address written as IPv6"),
        ip if ip.is_multicast() => Err("is a multicast address"),
        _ => Ok(address),
    }
}

fn duration(text: &str) -> Result<Duration, &'static str> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or("is not a duration")?;
    let (number, unit) = text.split_at(unit_at);
    let milliseconds: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        _ => return Err("is not a duration"),
    };
    if number.is_empty() {
        return Err("is not a duration");
    }
    // Digits only, so the one thing that can fail is the size.
    let total = number.parse::<u64>().ok().and_then(|number| number.checked_mul(milliseconds));
    match total.map(Duration::from_millis) {
        Some(duration) if duration <= MAX_DURATION => Ok(duration),
        _ => Err("is longer than 168h (a week)"),
    }
}

fn host(text: &str) -> Result<String, &'static str> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return if ip.is_unspecified() { Err("is no host's address") } else { Ok(ip.to_string()) };
    }
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.len() > 253 || !name.split('.').all(is_label) {
        return Err("is not a host");
    }
    // Such as 100.64.0.300: no top-level name is a number, so an address was meant.
    if name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit())) {
        return Err("is neither a name nor a whole IP address");
    }
    Ok(name)
}

fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn tag(text: &str) -> Result<String, &'static str> {
    let name = text.strip_prefix("tag:").unwrap_or_default();
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if good { Ok(text.to_owned()) } else { Err("is not a tag") }
}

fn path(text: &str) -> Result<PathBuf, &'static str> {
    match text {
        "" => Err("is empty"),
        text if text.contains('\0') => Err("holds a NUL character"),
        text => Ok(PathBuf::from(text)),
    }
}

fn control_url(text: &str) -> Result<String, &'static str> {
    const WRONG: &str = "is not the URL of a control server";
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).ok_or(WRONG)?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.contains('@') {
        return Err("has a user name or password in it");
    }
    if !path.bytes().all(|b| b.is_ascii_graphic() && !b"?#".contains(&b)) {
        return Err(WRONG);
    }
    // What follows the last colon is the port, unless the colon is within the brackets of an IPv6
    // address.
    let (host_text, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    if port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port > 0)) {
        return Err(WRONG);
    }
    let v6 = host_text.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let good = match v6 {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => host(host_text).is_ok() && !host_text.contains(':'),
    };
    if good { Ok(text.to_owned()) } else { Err(WRONG) }
}
