//! What the DNS says about the domain: whether mail for it comes to this machine, over every
//! address that is published, and what mail programs look for.
//!
//! Invariants: a server that does not answer is one failed check, and no further question is asked, since each
//! would wait for nothing. A question that the server cannot answer is a failed check of its own. Host names
//! from the DNS are shown only through [`crate::support::text::harmless`].

mod records;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use hickory_resolver::proto::rr::{Name, Record, RecordType};
use tokio::time::timeout;

use super::local::Addresses;
use super::report::Check;
use super::resolver::{Resolver, Unanswered};
use crate::config::Config;
use crate::protocol::Protocol;
use records::{mail_exchange, plain, pointer, text};

/// The limit on all questions together. Each question has a limit of its own.
const LIMIT: Duration = Duration::from_secs(60);

/// How many mail hosts of a domain are checked at most.
const HOSTS: usize = 10;

/// How many addresses of this machine are checked at most.
const OWN_ADDRESSES: usize = 8;

/// The mail domain, and what its records are compared with.
#[derive(Debug)]
struct Domain<'a> {
    name: &'a str,
    resolver: &'a Resolver,
    own: &'a Addresses,
    config: &'a Config,
}

/// A mail host of the domain and its addresses.
#[derive(Debug)]
struct Host {
    name: String,
    addresses: Vec<IpAddr>,
}

/// Checks a domain whose mail should come to this machine.
pub async fn check(domain: &str, own: &Addresses, config: &Config, resolver: &Resolver) -> Vec<Check> {
    let mut checks = Vec::new();
    let domain = Domain { name: domain.trim_end_matches('.'), resolver, own, config };
    match timeout(LIMIT, domain.examine(&mut checks)).await {
        Ok(Ok(())) => {}
        Ok(Err(unanswered)) => checks.push(Check::fail(
            "dns-server",
            unanswered.to_string(),
            "check /etc/resolv.conf and the network of this machine, or name another server with --dns-server; the other questions were not asked",
        )),
        Err(_) => checks.push(Check::fail(
            "dns-server",
            format!("not all questions were answered within {LIMIT:?}"),
            "name a faster server with --dns-server",
        )),
    }
    checks
}

impl Domain<'_> {
    /// Makes one check after the other; ends early if the server is silent.
    async fn examine(&self, checks: &mut Vec<Check>) -> Result<(), Unanswered> {
        let names = self.mail_hosts(checks).await?;
        let mut hosts = Vec::new();
        for name in names {
            hosts.extend(self.host(name, checks).await?);
        }
        if !hosts.is_empty() {
            checks.push(self.leads_here(&hosts));
            checks.extend(self.family_checks(&hosts));
        }
        for &address in self.own.public.iter().take(OWN_ADDRESSES) {
            self.reverse(address, checks).await?;
        }
        self.mta_sts(checks).await?;
        self.autoconfig(checks).await
    }

    /// Asks. If the server cannot answer, adds a failed check and returns `None`.
    async fn ask(
        &self,
        name: &str,
        kind: RecordType,
        check: &str,
        checks: &mut Vec<Check>,
    ) -> Result<Option<Vec<Record>>, Unanswered> {
        match self.resolver.lookup(name, kind).await {
            Ok(records) => Ok(Some(records)),
            Err(silent @ Unanswered::Silent { .. }) => Err(silent),
            Err(failed @ Unanswered::Failed { .. }) => {
                let remedy = "check the name, and that the domain's own DNS servers are up";
                checks.push(Check::fail(check, failed.to_string(), remedy));
                Ok(None)
            }
        }
    }

    /// The names of the mail hosts, best first.
    async fn mail_hosts(&self, checks: &mut Vec<Check>) -> Result<Vec<String>, Unanswered> {
        const NAME: &str = "mx";
        let domain = self.name;
        let Some(records) = self.ask(domain, RecordType::MX, NAME, checks).await? else {
            return Ok(Vec::new());
        };
        let mut found: Vec<(u16, &Name)> = records.iter().filter_map(mail_exchange).collect();
        found.sort();
        found.truncate(HOSTS);
        if found.is_empty() {
            checks.push(Check::warn(
                NAME,
                format!("{domain} has no MX record; mail goes to its own address instead (RFC 5321, 5.1)"),
                format!("publish an MX record of {domain} that names this machine"),
            ));
            return Ok(vec![domain.to_owned()]);
        }
        if found.iter().any(|(_, name)| name.is_root()) {
            checks.push(Check::fail(
                NAME,
                format!("the MX record of {domain} says that it takes no mail (null MX, RFC 7505)"),
                "replace it with one that names this machine",
            ));
        }
        let hosts: Vec<String> =
            found.iter().filter(|(_, name)| !name.is_root()).map(|(_, name)| plain(name)).collect();
        if !hosts.is_empty() {
            checks.push(Check::pass(NAME, format!("mail for {domain} goes to {}", hosts.join(", "))));
        }
        Ok(hosts)
    }

    /// A mail host with its addresses; `None` if it has none.
    async fn host(&self, name: String, checks: &mut Vec<Check>) -> Result<Option<Host>, Unanswered> {
        let check = format!("mx-address {name}");
        if name.parse::<IpAddr>().is_ok() {
            let finding = format!("an MX record of {} names the address {name}, not a host", self.name);
            let remedy = "give the address a name (an A or AAAA record), and name that in the MX record";
            checks.push(Check::fail(check, finding, remedy));
            return Ok(None);
        }
        let mut records = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            match self.ask(&name, kind, &check, checks).await? {
                Some(found) => records.extend(found),
                None => return Ok(None),
            }
        }
        let addresses: Vec<IpAddr> = records.iter().filter_map(super::resolver::address_of).collect();
        if addresses.is_empty() {
            let finding = format!("{name} has no address, so mail cannot be delivered to it");
            checks.push(Check::fail(
                check,
                finding,
                "publish an A record of that name with this machine's address",
            ));
            return Ok(None);
        }
        // A domain without an MX record may itself be an alias. The host in an MX record may not.
        let alias = records.iter().any(|record| record.record_type() == RecordType::CNAME);
        checks.push(match alias && name != self.name {
            true => Check::warn(
                check,
                format!("{name} is an alias (CNAME), which an MX record must not name (RFC 2181, 10.3); some senders refuse it"),
                "publish A and AAAA records of that name instead",
            ),
            false => Check::pass(check, listed(&addresses)),
        });
        Ok(Some(Host { name, addresses }))
    }

    fn is_own(&self, address: &IpAddr) -> bool {
        self.own.public.contains(address)
    }

    /// Checks that at least one mail host is this machine.
    fn leads_here(&self, hosts: &[Host]) -> Check {
        const NAME: &str = "mx-here";
        let here: Vec<&str> = hosts
            .iter()
            .filter(|host| host.addresses.iter().any(|address| self.is_own(address)))
            .map(|host| &*host.name)
            .collect();
        if !here.is_empty() {
            return Check::pass(NAME, format!("{} is this machine", here.join(", ")));
        }
        if self.own.public.is_empty() {
            return Check::warn(
                NAME,
                "this machine has no public address of its own, so the doctor cannot tell whether mail comes here",
                "if it is behind NAT, pass its public addresses with --address",
            );
        }
        let named: Vec<&str> = hosts.iter().map(|host| &*host.name).collect();
        Check::fail(
            NAME,
            format!(
                "no mail host of {} ({}) is this machine ({})",
                self.name,
                named.join(", "),
                listed(&self.own.public)
            ),
            "publish this machine's address for the mail host; if this machine is behind NAT, pass its public addresses with --address",
        )
    }

    /// Checks every published address of the hosts that are this machine: each must be served, since senders
    /// may use any of them, IPv6 first.
    fn family_checks(&self, hosts: &[Host]) -> Vec<Check> {
        let here = |host: &&Host| host.addresses.iter().any(|address| self.is_own(address));
        let published: BTreeSet<(&str, IpAddr)> = hosts
            .iter()
            .filter(here)
            .flat_map(|host| host.addresses.iter().map(|&address| (&*host.name, address)))
            .collect();
        published.into_iter().filter_map(|(host, address)| self.served(host, address)).collect()
    }

    /// What is wrong with a published address, if anything.
    fn served(&self, host: &str, address: IpAddr) -> Option<Check> {
        let name = format!("mx-served {address}");
        let (record, family) = match address {
            IpAddr::V4(_) => ("A", "IPv4 (0.0.0.0:25)"),
            IpAddr::V6(_) => ("AAAA", "IPv6 ([::]:25)"),
        };
        if !self.is_own(&address) {
            return Some(Check::warn(
                name,
                format!("an {record} record of {host} is {address}, which is not an address of this machine"),
                format!("remove that {record} record, unless another machine serves it"),
            ));
        }
        if takes(self.config, address) {
            return None;
        }
        Some(Check::fail(
            name,
            format!("{host} is published as {address}, but no mail listener accepts connections there"),
            format!(
                "remove that {record} record, or let the smtp listener listen on {family} too: senders prefer IPv6, and try IPv4 late or never"
            ),
        ))
    }

    /// Checks that an address has a name, and that this name has that address.
    async fn reverse(&self, address: IpAddr, checks: &mut Vec<Check>) -> Result<(), Unanswered> {
        const REMEDY: &str = "ask the provider of this machine to set it to the name of the mail host; it matters only if the mailbox sends through this machine";
        let check = format!("reverse-dns {address}");
        let reversed = Name::from(address).to_utf8();
        let Some(records) = self.ask(&reversed, RecordType::PTR, &check, checks).await? else {
            return Ok(());
        };
        let names: Vec<String> = records.iter().filter_map(pointer).take(HOSTS).collect();
        if names.is_empty() {
            checks.push(Check::warn(check, format!("{address} has no name (PTR record)"), REMEDY));
            return Ok(());
        }
        for name in &names {
            match self.resolver.addresses(name).await {
                Ok(addresses) if addresses.contains(&address) => {
                    checks.push(Check::pass(
                        check,
                        format!("{address} is named {name}, and that name has this address"),
                    ));
                    return Ok(());
                }
                Err(silent @ Unanswered::Silent { .. }) => return Err(silent),
                Ok(_) | Err(Unanswered::Failed { .. }) => {}
            }
        }
        let finding =
            format!("{address} is named {}, but that name does not have this address", names.join(", "));
        checks.push(Check::warn(check, finding, REMEDY));
        Ok(())
    }

    /// Checks that an announced MTA-STS policy is where senders look for it.
    async fn mta_sts(&self, checks: &mut Vec<Check>) -> Result<(), Unanswered> {
        const NAME: &str = "mta-sts";
        let host = format!("mta-sts.{}", self.name);
        let announced = format!("_mta-sts.{}", self.name);
        let Some(records) = self.ask(&announced, RecordType::TXT, NAME, checks).await? else {
            return Ok(());
        };
        let policies: Vec<String> =
            records.iter().filter_map(text).filter(|text| text.starts_with("v=STSv1")).collect();
        let [policy] = &policies[..] else {
            checks.push(match policies.is_empty() {
                true => Check::pass(NAME, format!("not used (no TXT record of {announced})")),
                false => Check::warn(
                    NAME,
                    format!(
                        "{announced} has {} policies, so senders use none (RFC 8461, 3.1)",
                        policies.len()
                    ),
                    "keep only one of them",
                ),
            });
            return Ok(());
        };
        let Some(found) = self.addresses(&host, NAME, checks).await? else { return Ok(()) };
        checks.push(if found.is_empty() {
            Check::fail(
                NAME,
                format!("a policy is announced, but {host}, where it should be, has no address"),
                format!("publish {host} and serve the policy there, or remove the TXT record of {announced}"),
            )
        } else if !policy.split(';').any(|field| field.trim().starts_with("id=")) {
            Check::warn(
                NAME,
                format!("the TXT record of {announced} has no id"),
                "write v=STSv1; id=1; and use a new id for each change",
            )
        } else {
            Check::pass(NAME, format!("announced, and its host {host} has an address ({})", listed(&found)))
        });
        Ok(())
    }

    /// Checks the names at which mail programs look for their settings.
    async fn autoconfig(&self, checks: &mut Vec<Check>) -> Result<(), Unanswered> {
        const NAME: &str = "autoconfig";
        let mut there = Vec::new();
        for service in ["autoconfig", "autodiscover"] {
            let host = format!("{service}.{}", self.name);
            let Some(found) = self.addresses(&host, NAME, checks).await? else { return Ok(()) };
            if !found.is_empty() {
                there.push(host);
            }
        }
        checks.push(match there.is_empty() {
            false => Check::pass(NAME, format!("published: {}", there.join(", "))),
            true => Check::warn(
                NAME,
                format!("neither autoconfig.{0} nor autodiscover.{0} is published, so mail programs ask their users for the settings", self.name),
                "publish them if the mailbox serves them; otherwise there is nothing to do",
            ),
        });
        Ok(())
    }

    /// As [`Resolver::addresses`], but if the server cannot answer, adds a failed check and returns `None`.
    async fn addresses(
        &self,
        host: &str,
        check: &str,
        checks: &mut Vec<Check>,
    ) -> Result<Option<Vec<IpAddr>>, Unanswered> {
        let mut found = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            match self.ask(host, kind, check, checks).await? {
                Some(records) => found.extend(records.iter().filter_map(super::resolver::address_of)),
                None => return Ok(None),
            }
        }
        Ok(Some(found))
    }
}

/// Whether a listener for mail from other servers accepts connections to an address. Only the address family is
/// compared: behind NAT the edge listens on another address, and perhaps on another port.
fn takes(config: &Config, address: IpAddr) -> bool {
    let incoming = config
        .listeners
        .iter()
        .filter(|l| l.protocol == Protocol::Smtp || l.listen.iter().any(|listen| listen.port() == 25));
    incoming.flat_map(|listener| &listener.listen).any(|listen| listen.is_ipv4() == address.is_ipv4())
}

fn listed(addresses: &[IpAddr]) -> String {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    addresses.join(", ")
}

#[cfg(test)]
mod tests;
