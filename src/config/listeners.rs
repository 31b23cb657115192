//! The `[[listener]]` tables: defaults by protocol, unique names, and a warning where mail goes without a PROXY
//! header.
//!
//! Invariant: a table is read to its end, also after a mistake. A listener is returned only if nothing is missing.
//!
//! Deliberately not here: clashes between addresses, which concern the admin address too (see
//! `clashes`).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::clashes::Claim;
use super::keys::{self, Key};
use super::mistakes::{At, Mistakes, Place};
use super::reader::{Found, Table};
use super::{Listener, Upstream, values};
use crate::protocol::{Protocol, ProxyProtocol};

/// What `[upstream]` and `--upstream` give to listeners that name nothing of their own.
pub(super) struct Shared {
    pub hosts: Option<Vec<String>>,
    /// Whether a host was given at all, good or bad.
    pub host_given: bool,
    pub host_place: Place,
    pub proxy_protocol: ProxyProtocol,
    pub proxy_place: Place,
    /// `timeouts.hold`, for the mail protocols.
    pub hold: Duration,
}

/// The listeners of the file, or the five default ones, and the addresses they claim.
pub(super) fn listeners(
    tables: Option<Vec<Table>>,
    shared: &Shared,
    mistakes: &mut Mistakes,
) -> (Vec<Listener>, Vec<Claim>) {
    let drafts: Vec<Draft> = match tables {
        Some(tables) => tables.into_iter().map(|table| Draft::read(table, mistakes)).collect(),
        None => Protocol::DEFAULT.into_iter().map(Draft::by_default).collect(),
    };
    report_missing_host(&drafts, shared, mistakes);
    report_same_names(&drafts, mistakes);
    warn_without_header(&drafts, shared, mistakes);
    let claims = drafts.iter().flat_map(|draft| draft.claims.iter().cloned()).collect();
    (drafts.into_iter().filter_map(|draft| draft.finish(shared)).collect(), claims)
}

/// An upstream's host, or several in an array; `None` if there is none.
pub(super) fn hosts(table: &mut Table, key: &Key<String>, mistakes: &mut Mistakes) -> Option<Vec<String>> {
    let found = table.list(key, mistakes)?;
    let mut hosts: Vec<String> = Vec::new();
    for host in found {
        warn_of_elsewhere(&host.value, &host.shown, &host.place, mistakes);
        if hosts.contains(&host.value) {
            let problem = format!("{} is named twice; expected each host once", host.shown);
            mistakes.add(&host.place, &problem);
        }
        hosts.push(host.value);
    }
    (!hosts.is_empty()).then_some(hosts)
}

/// Warns of an address that no node of a tailnet has; `shown` is the host as it was given.
pub(super) fn warn_of_elsewhere(host: &str, shown: &str, place: &Place, mistakes: &mut Mistakes) {
    const PROBLEM: &str = "is not a tailnet address (100.64.0.0/10, fd7a:115c:a1e0::/48), so the edge cannot reach it, \
                           not even through a subnet router; name the mailbox's own node";
    if values::is_elsewhere(host) {
        mistakes.warn(place, &format!("{shown} {PROBLEM}"));
    }
}

/// A listener, as its table has it. A field is `None` if its key is left out, or is wrong and was reported.
struct Draft {
    /// Its key path, `listener[2]`.
    owner: String,
    name: Option<Found<String>>,
    protocol: Option<Protocol>,
    claims: Vec<Claim>,
    configured: bool,
    hosts: Hosts,
    port: Option<u16>,
    proxy_protocol: Option<Found<ProxyProtocol>>,
    idle_timeout: Option<Duration>,
    hold: Option<Duration>,
}

enum Hosts {
    Shared,
    /// The listener's own; `None` if they are wrong.
    Own(Option<Vec<String>>),
}

impl Draft {
    fn by_default(protocol: Protocol) -> Draft {
        let owner = format!("the default listener {protocol}");
        let place = Place { at: At::File, key: owner.clone() };
        Draft {
            name: Some(default_name(protocol, place.clone())),
            protocol: Some(protocol),
            claims: default_claims(protocol, &place, &owner),
            configured: false,
            hosts: Hosts::Shared,
            port: protocol.default_port(),
            proxy_protocol: None,
            idle_timeout: None,
            hold: None,
            owner,
        }
    }

    fn read(mut table: Table, mistakes: &mut Mistakes) -> Draft {
        let owner = table.path().to_owned();
        let name = table.find(&keys::LISTENER_NAME, mistakes);
        let protocol = protocol(&mut table, mistakes);
        let name = match (table.has(&keys::LISTENER_NAME), protocol) {
            (false, Some(protocol)) => Some(default_name(protocol, table.place(&keys::LISTENER_NAME))),
            _ => name,
        };
        let configured = table.has(&keys::LISTENER_LISTEN);
        let claims = claims(&mut table, protocol, &owner, mistakes);
        let port = upstream_port(&mut table, protocol, mistakes);
        let hosts = match table.has(&keys::LISTENER_UPSTREAM) {
            true => Hosts::Own(hosts(&mut table, &keys::LISTENER_UPSTREAM, mistakes)),
            false => Hosts::Shared,
        };
        let proxy_protocol = table.find(&keys::LISTENER_PROXY_PROTOCOL, mistakes);
        let idle_timeout = table.find(&keys::LISTENER_IDLE_TIMEOUT, mistakes).map(Found::value);
        let hold = table.find(&keys::LISTENER_HOLD, mistakes).map(Found::value);
        table.finish(mistakes);
        Draft { owner, name, protocol, claims, configured, hosts, port, proxy_protocol, idle_timeout, hold }
    }

    /// `None` if something is missing or wrong, which has been reported.
    fn finish(self, shared: &Shared) -> Option<Listener> {
        let protocol = self.protocol?;
        let hosts = match self.hosts {
            Hosts::Own(hosts) => hosts,
            Hosts::Shared => shared.hosts.clone(),
        };
        let hold = if protocol.is_mail() { shared.hold } else { Duration::ZERO };
        Some(Listener {
            name: self.name?.value,
            protocol,
            listen: self.claims.iter().map(|claim| claim.address).collect(),
            configured: self.configured,
            upstream: Upstream { hosts: hosts?, port: self.port? },
            proxy_protocol: self.proxy_protocol.map_or(shared.proxy_protocol, Found::value),
            idle_timeout: self.idle_timeout.unwrap_or(protocol.default_idle_timeout()),
            hold: self.hold.unwrap_or(hold),
        })
    }
}

fn default_name(protocol: Protocol, place: Place) -> Found<String> {
    Found { value: protocol.name().to_owned(), shown: format!("the default name {protocol}"), place }
}

fn default_claims(protocol: Protocol, place: &Place, owner: &str) -> Vec<Claim> {
    let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let addresses = protocol.default_port().into_iter().flat_map(|port| any.map(|ip| (ip, port).into()));
    addresses.map(|address| Claim::by_default(address, place.clone(), owner.to_owned())).collect()
}

fn protocol(table: &mut Table, mistakes: &mut Mistakes) -> Option<Protocol> {
    let key = keys::LISTENER_PROTOCOL;
    if !table.has(&key) {
        mistakes.add(&table.place(&key), &format!("missing; expected {}", key.description.takes));
    }
    table.find(&key, mistakes).map(Found::value)
}

/// The addresses to bind, empty if they are wrong.
fn claims(table: &mut Table, protocol: Option<Protocol>, owner: &str, mistakes: &mut Mistakes) -> Vec<Claim> {
    if table.has(&keys::LISTENER_LISTEN) {
        let found = table.list(&keys::LISTENER_LISTEN, mistakes).unwrap_or_default();
        let claim = |found: Found<_>| Claim {
            address: found.value,
            shown: found.shown,
            place: found.place,
            owner: owner.to_owned(),
        };
        return found.into_iter().map(claim).collect();
    }
    let Some(protocol) = protocol else {
        return Vec::new();
    };
    let claims = default_claims(protocol, &table.place(&keys::LISTENER_LISTEN), owner);
    if claims.is_empty() {
        let problem =
            format!("missing, and {protocol} has no default port; expected an array of addresses such as");
        mistakes.add(&table.place(&keys::LISTENER_LISTEN), &format!("{problem} [\"127.0.0.1:8080\"]"));
    }
    claims
}

fn upstream_port(table: &mut Table, protocol: Option<Protocol>, mistakes: &mut Mistakes) -> Option<u16> {
    let key = keys::LISTENER_UPSTREAM_PORT;
    if table.has(&key) {
        return table.find(&key, mistakes).map(Found::value);
    }
    let protocol = protocol?;
    if protocol.default_port().is_none() {
        let problem = format!("missing, and {protocol} has no default port; expected the mailbox's port");
        mistakes.add(&table.place(&key), &problem);
    }
    protocol.default_port()
}

fn report_missing_host(drafts: &[Draft], shared: &Shared, mistakes: &mut Mistakes) {
    if !shared.host_given && drafts.iter().any(|draft| matches!(draft.hosts, Hosts::Shared)) {
        let problem = "missing; set it to the mailbox's name on the tailnet, or pass --upstream HOST";
        mistakes.add(&shared.host_place, problem);
    }
}

fn report_same_names(drafts: &[Draft], mistakes: &mut Mistakes) {
    let mut seen: HashMap<&str, (&str, &Place)> = HashMap::new();
    for (draft, name) in drafts.iter().filter_map(|draft| Some((draft, draft.name.as_ref()?))) {
        match seen.entry(&name.value) {
            Entry::Vacant(vacant) => {
                vacant.insert((&draft.owner, &name.place));
            }
            Entry::Occupied(earlier) => {
                let (shown, (owner, place)) = (&name.shown, earlier.get());
                let line = place.at.on_line();
                let expected = "expected a name of its own for each listener";
                let problem = format!("{shown} is taken by {owner}{line}; {expected}");
                mistakes.add(&name.place, &problem);
            }
        }
    }
}

/// Warns where the mailbox would not see the client's address: once for `[upstream]`, with the listeners that
/// use it, and once for each listener that has its own `off`.
fn warn_without_header(drafts: &[Draft], shared: &Shared, mistakes: &mut Mistakes) {
    const WHY: &str = "the mailbox will see the edge as the client of every connection, \
                       which breaks its spam filter, its bans and its logs";
    let mut by_default = Vec::new();
    for (draft, protocol) in drafts.iter().filter_map(|draft| Some((draft, draft.protocol?))) {
        match &draft.proxy_protocol {
            _ if !protocol.is_mail() => {}
            Some(own) if own.value == ProxyProtocol::Off => {
                mistakes.warn(&own.place, &format!("off for {protocol}: {WHY}"));
            }
            None if shared.proxy_protocol == ProxyProtocol::Off => by_default.push(protocol.name()),
            _ => {}
        }
    }
    if !by_default.is_empty() {
        mistakes.warn(&shared.proxy_place, &format!("off for {}: {WHY}", by_default.join(", ")));
    }
}
