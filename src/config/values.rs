//! Parses single values: addresses, durations, names and so on. Replaces `${VARIABLES}`.
//!
//! Invariants:
//! - A parser gets values with variables replaced, which may be secrets. So its errors are fixed texts
//!   (`&'static str`); the caller adds the value as written in the file.
//! - Variables are replaced inside strings, after the TOML is parsed, so a variable's value cannot add
//!   keys or tables. `${NAME}` is the variable's value, and `$$` is a single `$`; any other `$` stays as it is.
//!
//! Deliberately not here: the line of a value, and how it fits with other values.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use hyper::Uri;

use super::{ADMIN, Env, LogFormat};
use crate::protocol::{Protocol, ProxyProtocol};
use crate::support::secret::looks_like_key;

/// The longest duration allowed. No time-out of this program makes sense beyond a week, and with this limit
/// additions to the clock cannot overflow.
const MAX_DURATION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Which values a key takes. Error messages and the book print this.
#[derive(Debug)]
pub enum Takes {
    /// A string; the words describe it.
    String(&'static str),
    /// An array of such strings.
    Strings(&'static str),
    /// A whole number: what it counts, the least and the greatest.
    Number(&'static str, u32, u32),
    /// `true` or `false`.
    Switch,
}

impl fmt::Display for Takes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Takes::String(words) | Takes::Strings(words) => f.write_str(words),
            Takes::Number(what, from, to) => write!(f, "{what} from {from} to {to}"),
            Takes::Switch => f.write_str("true or false"),
        }
    }
}

/// A kind of value: what may be written, and its parser.
pub(super) struct Kind<T> {
    pub takes: Takes,
    /// Parses a value. The error says what is wrong, such as "is not an address".
    pub parse: fn(&str) -> Result<T, &'static str>,
}

const fn string<T>(words: &'static str, parse: fn(&str) -> Result<T, &'static str>) -> Kind<T> {
    Kind { takes: Takes::String(words), parse }
}

const fn strings<T>(words: &'static str, parse: fn(&str) -> Result<T, &'static str>) -> Kind<T> {
    Kind { takes: Takes::Strings(words), parse }
}

const fn number<T: FromStr>(what: &'static str, from: u32, to: u32) -> Kind<T> {
    Kind { takes: Takes::Number(what, from, to), parse: |text| text.parse().map_err(|_| "is out of range") }
}

pub(super) const SWITCH: Kind<bool> =
    Kind { takes: Takes::Switch, parse: |text| text.parse().map_err(|_| "is neither true nor false") };

pub(super) const PORT: Kind<u16> = number("a port", 1, 65535);

/// More connections than one machine can hold. A larger number is a typing mistake.
const MAX_CONNECTIONS: u32 = 1_000_000;

pub(super) const CONNECTIONS: Kind<usize> = number("a number of connections", 1, MAX_CONNECTIONS);

pub(super) const CONNECTIONS_OR_NO_LIMIT: Kind<usize> =
    number("a number of connections (0 for no limit)", 0, MAX_CONNECTIONS);

pub(super) const CONNECTIONS_OR_NONE: Kind<usize> =
    number("a number of connections (0 to hold none)", 0, MAX_CONNECTIONS);

/// The program itself needs the least value. More than a terabyte is a typing mistake.
pub(super) const MEMORY: Kind<u32> = number("a number of MiB", 64, 1024 * 1024);

/// More in a row is a typing mistake: at the usual interval, 100 probes take almost an hour.
pub(super) const PROBES: Kind<u32> = number("a number of probes in a row", 1, 100);

/// Nobody reads more lines than that.
pub(super) const LINES: Kind<u32> = number("a number of lines a minute (0 for no limit)", 0, 1_000_000);

pub(super) const ADDRESSES: Kind<SocketAddr> = strings("IP:PORT such as 0.0.0.0:25 or [::]:25", address);

/// The admin address, `None` for "off".
pub(super) const ADMIN_ADDRESS: Kind<Option<SocketAddr>> =
    string(r#"IP:PORT such as 127.0.0.1:9464, or "off""#, |text| {
        if text == "off" { Ok(None) } else { address(text).map(Some) }
    });

pub(super) const DURATION: Kind<Duration> =
    string(r#"a number with a unit (ms, s, m, h) such as "500ms", "30s", "35m" or "1h""#, |text| {
        duration(text).and_then(|d| if d.is_zero() { Err("is zero") } else { Ok(d) })
    });

pub(super) const DURATION_OR_ZERO: Kind<Duration> =
    string(r#"a number with a unit (ms, s, m, h) such as "30s", or "0s""#, duration);

/// A shorter time than a few pings take would close the connections of a mailbox that is up.
pub(super) const DEAD_PEER: Kind<Duration> = string(r#"a duration of at least "15s""#, |text| {
    duration(text).and_then(|d| if d.as_secs() < 15 { Err("is too short") } else { Ok(d) })
});

/// A shorter interval would overload the mailbox.
pub(super) const PROBE_INTERVAL: Kind<Duration> =
    string(r#"a duration of at least "100ms", or "0s" for no probes"#, |text| {
        let interval = duration(text)?;
        let is_short = !interval.is_zero() && interval < Duration::from_millis(100);
        if is_short { Err("is too short") } else { Ok(interval) }
    });

pub(super) const HOST: Kind<String> =
    string("one host without a port: a short name, a MagicDNS name or a tailnet IP", host);

pub(super) const NODE_NAME: Kind<String> =
    string("1 to 63 letters, digits and hyphens, no hyphen first or last", |text| match text {
        _ if looks_like_key(text) => Err("looks like a key"),
        _ if is_label(text) => Ok(text.to_owned()),
        _ => Err("is not a DNS label"),
    });

pub(super) const PUBLIC_NAME: Kind<String> = string("a full DNS name such as mx.example.org", |text| {
    let labels: Vec<&str> = text.split('.').collect();
    let good = text.len() <= 253 && labels.len() > 1 && labels.iter().all(|label| is_label(label));
    if good { Ok(text.to_owned()) } else { Err("is not a full DNS name") }
});

pub(super) const TAGS: Kind<String> =
    strings("tag: and letters, digits and hyphens, a letter first, such as tag:reverse-proxy", tag);

pub(super) const DIRECTORY: Kind<PathBuf> = string("the path of a directory", path);

pub(super) const KEY_FILE: Kind<PathBuf> = string("the path of a file that holds the key", |text| {
    // A file's name may look like a key; but a key has no slash.
    let is_key = looks_like_key(text) && !text.contains('/');
    if is_key { Err("is an auth key itself") } else { path(text) }
});

pub(super) const CONTROL_URL: Kind<String> =
    string("http:// or https:// and a host, such as https://headscale.example.com", control_url);

pub(super) const LISTENER_NAME: Kind<String> =
    string("1 to 63 letters, digits, hyphens, underscores and dots", |text| {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let fits = (1..=63).contains(&text.len()) && text.chars().all(good);
        match text {
            ADMIN => Err("is the admin listener's name"),
            _ if fits => Ok(text.to_owned()),
            _ => Err("is not a name"),
        }
    });

pub(super) const PROTOCOL: Kind<Protocol> =
    string("one of smtp, submission, submissions, imap, imaps, pop3, pop3s, sieve, http, tcp", |text| {
        let find = |is: fn(&str, &str) -> bool| Protocol::ALL.into_iter().find(|p| is(p.name(), text));
        find(|name, text| name == text).ok_or_else(|| match find(str::eq_ignore_ascii_case) {
            Some(_) => "is not in lower case",
            None => "is not a protocol",
        })
    });

pub(super) const PROXY_PROTOCOL: Kind<ProxyProtocol> = string("one of v1, v2, off", |text| match text {
    "v1" => Ok(ProxyProtocol::V1),
    "v2" => Ok(ProxyProtocol::V2),
    "off" => Ok(ProxyProtocol::Off),
    _ => Err("is not a PROXY protocol version"),
});

pub(super) const LOG_FORMAT: Kind<LogFormat> = string("one of text, json", |text| match text {
    "text" => Ok(LogFormat::Text),
    "json" => Ok(LogFormat::Json),
    _ => Err("is not a log format"),
});

pub(super) const LOG_LEVEL: Kind<tracing::Level> =
    string("one of error, warn, info, debug, trace", |text| match text {
        "error" => Ok(tracing::Level::ERROR),
        "warn" => Ok(tracing::Level::WARN),
        "info" => Ok(tracing::Level::INFO),
        "debug" => Ok(tracing::Level::DEBUG),
        "trace" => Ok(tracing::Level::TRACE),
        _ => Err("is not a log level"),
    });

/// Replaces `${NAME}` by the variable's value and `$$` by `$`. The errors are all reasons why that failed; each is
/// a text that follows the value as written.
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

/// The variable's value. An empty variable is a mistake too: otherwise the message would be about the value that is
/// left, and not name the variable.
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
    // There are only digits, so parsing can fail only if the number is too large.
    let total = number.parse::<u64>().ok().and_then(|number| number.checked_mul(milliseconds));
    match total.map(Duration::from_millis) {
        Some(duration) if duration <= MAX_DURATION => Ok(duration),
        _ => Err("is longer than 168h (a week)"),
    }
}

fn host(text: &str) -> Result<String, &'static str> {
    if looks_like_key(text) {
        return Err("looks like a key");
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return if ip.is_unspecified() { Err("is not the address of a host") } else { Ok(ip.to_string()) };
    }
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.len() > 253 || !name.split('.').all(is_label) {
        return Err("is not a host");
    }
    // No top-level domain is a number, so an address was meant, such as 100.64.0.300.
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
    let url: Uri = text.parse().map_err(|_| WRONG)?;
    let authority = url.authority().ok_or(WRONG)?;
    if authority.as_str().contains('@') {
        return Err("has a user name or password in it");
    }
    let is_web = matches!(url.scheme_str(), Some("http" | "https"));
    // `Uri` drops a fragment, and accepts any UTF-8 in a path.
    let is_plain = text.is_ascii() && url.query().is_none() && !text.contains('#');
    // `Uri` checks neither the IPv6 address in brackets nor the port.
    let is_host = match authority.host().strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => host(authority.host()).is_ok(),
    };
    let has_sign = authority.as_str().contains(":+");
    let has_good_port = authority.as_str() == authority.host()
        || authority.port_u16().is_some_and(|port| port > 0 && !has_sign);
    if is_web && is_plain && is_host && has_good_port { Ok(text.to_owned()) } else { Err(WRONG) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `Uri` alone would let through.
    #[test]
    fn a_control_url_is_only_what_a_control_server_may_have() {
        for wrong in [
            "headscale.example.com",
            "/",
            "https://[fd00::zz]",
            "https://[example.com]",
            "https://-.example.com",
            "https://100.64.0.300",
            "https://example.com/\u{e9}",
            "https://example.com/#f",
            "https://example.com:+443",
        ] {
            assert_eq!(control_url(wrong), Err("is not the URL of a control server"), "{wrong}");
        }
        let with_user = control_url("https://joe:secret@example.com:443/");
        assert_eq!(with_user, Err("has a user name or password in it"));
        assert_eq!(control_url("https://[fd00::1]:8443/a").as_deref(), Ok("https://[fd00::1]:8443/a"));
    }
}
