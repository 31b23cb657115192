//! Whether this machine may connect to port 25 elsewhere.
//!
//! The edge itself never does that. A mailbox that sends through this machine does, and many providers block
//! the port until somebody asks them to open it.

use std::time::Duration;

use hyper::http::uri::Authority;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::report::Check;
use super::resolver::{Resolver, connect};
use crate::support::text::harmless;

/// A mail server that accepts connections from anywhere.
pub const DEFAULT_SERVER: &str = "gmail-smtp-in.l.google.com:25";

const NAME: &str = "outbound-25";

/// The limit on connecting to one address, and then on the greeting.
const LIMIT: Duration = Duration::from_secs(10);

/// How much of a greeting is read at most.
const GREETING_BYTES: u64 = 512;

/// Connects to `HOST[:PORT]` and waits for a greeting.
pub async fn check(server: &str, resolver: &Result<Resolver, String>) -> Check {
    let (host, port) = split(server, 25);
    let looked_up = match resolver {
        Ok(resolver) => resolver.addresses(&host).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.clone()),
    };
    let addresses = match looked_up {
        Ok(addresses) if addresses.is_empty() => return unknown(format!("{host} has no address")),
        Ok(addresses) => addresses,
        Err(reason) => return unknown(format!("{host} cannot be looked up: {reason}")),
    };
    let mut stream = match connect(&addresses, port, LIMIT).await {
        Ok(stream) => stream,
        Err(reason) => return blocked(format!("{server}: {reason}")),
    };
    match timeout(LIMIT, greeting(&mut stream)).await {
        Ok(Ok(line)) if line.starts_with("220") => Check::pass(NAME, format!("{server} greets: {line}")),
        Ok(Ok(line)) => unknown(format!("{server} does not greet as a mail server: {line:?}")),
        Ok(Err(error)) => blocked(format!("{server}: the connection failed: {error}")),
        Err(_) => blocked(format!("{server} accepts the connection, but sends nothing within {LIMIT:?}")),
    }
}

fn unknown(finding: String) -> Check {
    Check::warn(NAME, finding, "name another mail server with --smtp-check HOST")
}

fn blocked(finding: String) -> Check {
    Check::warn(
        NAME,
        finding,
        "this machine's provider seems to block outbound port 25; it matters only if the mailbox sends through this machine: then ask the provider to open it",
    )
}

async fn greeting(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut line = Vec::new();
    BufReader::new(stream.take(GREETING_BYTES)).read_until(b'\n', &mut line).await?;
    Ok(harmless(&String::from_utf8_lossy(&line)))
}

/// Splits `HOST[:PORT]`. An IPv6 address with a port is in brackets. A text without a valid port is all host.
fn split(server: &str, default_port: u16) -> (String, u16) {
    let authority = server.parse::<Authority>().ok();
    let parts = authority.as_ref().and_then(|authority| Some((authority.host(), authority.port_u16()?)));
    let (host, port) = parts.unwrap_or((server, default_port));
    (host.trim_matches(['[', ']']).to_owned(), port)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{SocketAddr, TcpListener};

    use super::*;
    use crate::doctor::report::Grade;
    use crate::doctor::test_dns::Zone;

    /// Greets one client.
    fn server(greeting: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || listener.accept().unwrap().0.write_all(greeting).unwrap());
        address
    }

    #[tokio::test]
    async fn a_greeting_is_what_counts() {
        let zone = Zone::new(&[("mx.example.com", "A", "127.0.0.1")]).serve();
        let resolver = Resolver::new(Some(zone.address()));
        let port = server(b"220 mx.example.com \x1b[2J ESMTP\r\nmore").port();
        let good = check(&format!("mx.example.com:{port}"), &resolver).await;
        assert_eq!(good.outcome, Grade::Pass, "{good:?}");
        assert!(good.finding.ends_with("greets: 220 mx.example.com ?[2J ESMTP"), "{good:?}");
        for other in [&b"554 no\r\n"[..], b""] {
            let odd = check(&server(other).to_string(), &resolver).await;
            assert!(odd.outcome == Grade::Warn && odd.finding.contains("does not greet"), "{odd:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_looks_like_a_block() {
        let zone = Zone::new(&[]).serve();
        let resolver = Resolver::new(Some(zone.address()));
        let closed = crate::test_support::net::free_addr();
        let refused = check(&closed.to_string(), &resolver).await;
        assert_eq!(refused.outcome, Grade::Warn);
        assert!(refused.remedy.unwrap().contains("block outbound port 25"));
        let nowhere = check("nowhere.example.com", &resolver).await;
        assert!(nowhere.finding.contains("nowhere.example.com has no address"), "{nowhere:?}");
    }

    #[test]
    fn a_port_may_be_left_out() {
        for (text, host, port) in [
            ("mx.example.com", "mx.example.com", 25),
            ("mx.example.com:26", "mx.example.com", 26),
            ("192.0.2.1:26", "192.0.2.1", 26),
            ("192.0.2.1", "192.0.2.1", 25),
            ("2001:db8::1", "2001:db8::1", 25),
            ("[2001:db8::1]", "2001:db8::1", 25),
            ("[2001:db8::1]:26", "2001:db8::1", 26),
            ("mx.example.com:99999", "mx.example.com:99999", 25),
        ] {
            assert_eq!(split(text, 25), (host.to_owned(), port), "{text}");
        }
    }
}
