//! Questions to the DNS, with a deadline each, and connections to the addresses in the answers.
//!
//! Invariants: no name is completed with a search domain, and no hosts file is read. "There is no such record"
//! is an answer; a server that gives no answer is an error.
//!
//! The C library's resolver is not used, since it does not work reliably in a program that is linked statically
//! with glibc.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::text::harmless;

/// How long an answer may take, repetitions included.
const QUESTION_LIMIT: Duration = Duration::from_secs(5);

/// After this time without an answer a question is repeated.
const REPEAT_AFTER: Duration = Duration::from_secs(2);

/// How many addresses of a name are used at most.
const ADDRESSES: usize = 32;

/// How many of these addresses are tried at most.
const CONNECTIONS: usize = 4;

/// Why a question has no answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Unanswered {
    /// The server is out of reach or does not answer. It would not answer the next question either.
    #[error("the DNS server {server} does not answer ({reason})")]
    Silent {
        /// The server, or all of them.
        server: String,
        /// The error, or the time that was waited.
        reason: String,
    },
    /// The server has no answer to this question.
    #[error("the DNS server {server} cannot answer: {reason}")]
    Failed {
        /// The server, or all of them.
        server: String,
        /// The answer that stands for "no answer", such as SERVFAIL.
        reason: String,
    },
}

/// A DNS server to ask.
#[derive(Debug)]
pub struct Resolver {
    resolver: TokioResolver,
    servers: String,
}

impl Resolver {
    /// One that asks `server`, else those of the system's `/etc/resolv.conf`.
    pub fn new(server: Option<SocketAddr>) -> Result<Resolver, String> {
        let config = match server {
            Some(server) => only(server),
            None => {
                read_system_conf()
                    .map_err(|error| format!("cannot read the DNS servers from /etc/resolv.conf: {error}"))?
                    .0
            }
        };
        let servers: Vec<String> = match server {
            Some(server) => vec![server.to_string()],
            None => config.name_servers().iter().map(|server| server.ip.to_string()).collect(),
        };
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        let options = builder.options_mut();
        options.timeout = REPEAT_AFTER;
        options.attempts = 1;
        options.use_hosts_file = ResolveHosts::Never;
        let resolver = builder.build().map_err(|error| format!("cannot start a resolver: {error}"))?;
        Ok(Resolver { resolver, servers: servers.join(", ") })
    }

    /// All records of a name and type, including aliases on the way; empty if there are none.
    pub async fn lookup(&self, name: &str, kind: RecordType) -> Result<Vec<Record>, Unanswered> {
        let (silent, failed) = (
            |reason| Unanswered::Silent { server: self.servers.clone(), reason },
            |reason| Unanswered::Failed { server: self.servers.clone(), reason },
        );
        let mut fully = Name::from_utf8(name)
            .map_err(|error| failed(format!("{} is not a DNS name: {error}", harmless(name))))?;
        fully.set_fqdn(true);
        match timeout(QUESTION_LIMIT, self.resolver.lookup(fully, kind)).await {
            Ok(Ok(answer)) => Ok(answer.answers().to_vec()),
            Ok(Err(NetError::Dns(DnsError::NoRecordsFound(_)))) => Ok(Vec::new()),
            Ok(Err(NetError::Dns(error))) => Err(failed(format!("{error} to {kind} of {name}"))),
            Ok(Err(error)) => Err(silent(error.to_string())),
            Err(_) => Err(silent(format!("no answer within {QUESTION_LIMIT:?}"))),
        }
    }

    /// The addresses of a name, IPv4 first; empty if it has none. An IP address is returned as it is.
    pub async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, Unanswered> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let mut found: Vec<IpAddr> = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            found.extend(self.lookup(host, kind).await?.iter().filter_map(address_of));
        }
        found.truncate(ADDRESSES);
        Ok(found)
    }
}

/// The address in a record, if it has one.
pub fn address_of(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(v4) => Some(v4.0.into()),
        RData::AAAA(v6) => Some(v6.0.into()),
        _ => None,
    }
}

/// Connects to the first address that accepts within `share`. Each address has its own share, so that an IPv4
/// address that does not answer leaves time for IPv6.
pub async fn connect(addresses: &[IpAddr], port: u16, share: Duration) -> Result<TcpStream, String> {
    let mut reasons = Vec::new();
    for &address in addresses.iter().take(CONNECTIONS) {
        let address = SocketAddr::new(address, port);
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => reasons.push(format!("cannot connect to {address}: {error}")),
            Err(_) => reasons.push(format!("{address} does not answer")),
        }
    }
    Err(if reasons.is_empty() { "its name has no address".to_owned() } else { reasons.join(", ") })
}

fn only(server: SocketAddr) -> ResolverConfig {
    let mut config = NameServerConfig::udp_and_tcp(server.ip());
    for connection in &mut config.connections {
        connection.port = server.port();
    }
    ResolverConfig::from_name_servers(vec![config])
}
