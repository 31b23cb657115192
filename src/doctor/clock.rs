//! Whether this machine's clock is right, compared with the control server's clock.
//!
//! A wrong clock makes certificates look expired and log lines useless. The control server is asked because
//! the edge depends on this server anyway.

use std::time::Duration;

use hyper::Uri;
use hyper::header::DATE;
use jiff::{SignedDuration, Timestamp};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::report::Check;
use super::resolver::{Resolver, connect};
use crate::support::http_client;
use crate::support::text::harmless;
use crate::support::wall_clock;
use crate::upstream::probe::tls;

const NAME: &str = "clock";

/// Tailscale's own control server.
const CONTROL_SERVER: &str = "https://controlplane.tailscale.com";
/// The control server's public key, which needs no log-in.
const PATH: &str = "/key?v=1";

/// The limit on look-up, connection and answer together.
const LIMIT: Duration = Duration::from_secs(10);

/// A difference from which the doctor warns. `Date` has whole seconds.
const WARN_FROM: SignedDuration = SignedDuration::from_secs(60);

/// A difference from which the check fails: certificates that were just issued look not yet valid.
const FAIL_FROM: SignedDuration = SignedDuration::from_mins(10);

/// Compares the local clock with the control server's.
pub async fn check(control_url: Option<&str>, resolver: &Result<Resolver, String>) -> Check {
    let server = control_url.unwrap_or(CONTROL_SERVER);
    let asked = match timeout(LIMIT, ask(server, resolver)).await {
        Ok(asked) => asked,
        Err(_) => Err(format!("no answer within {LIMIT:?}")),
    };
    match asked {
        Ok(theirs) => judge(server, theirs, wall_clock::now()),
        Err(reason) => Check::warn(
            NAME,
            format!("cannot ask the control server {server} for the time: {reason}"),
            "check the network and DNS of this machine, and tailnet.control_url",
        ),
    }
}

fn judge(server: &str, theirs: Timestamp, ours: Timestamp) -> Check {
    const REMEDY: &str = "set the clock of this machine (timedatectl set-ntp true)";
    let fast = ours.duration_since(theirs);
    let direction = if fast.is_negative() { "slow" } else { "fast" };
    let finding = format!("{} s {direction}, compared with the clock of {server}", fast.abs().as_secs());
    if fast.abs() >= FAIL_FROM {
        Check::fail(NAME, finding, REMEDY)
    } else if fast.abs() >= WARN_FROM {
        Check::warn(NAME, finding, REMEDY)
    } else {
        Check::pass(NAME, format!("within {} s of the clock of {server}", WARN_FROM.as_secs()))
    }
}

/// The server's time.
async fn ask(server: &str, resolver: &Result<Resolver, String>) -> Result<Timestamp, String> {
    let uri: Uri = server.parse().map_err(|error| format!("it is not a URL: {error}"))?;
    let (encrypted, default_port) = match uri.scheme_str() {
        Some("https") => (true, 443),
        _ => (false, 80),
    };
    let host = uri.host().ok_or("its URL has no host")?.trim_matches(['[', ']']);
    let resolver = resolver.as_ref().map_err(Clone::clone)?;
    let addresses = resolver.addresses(host).await.map_err(|error| error.to_string())?;
    let port = uri.port_u16().unwrap_or(default_port);
    let stream = connect(&addresses, port, LIMIT / 3).await?;
    if !encrypted {
        return date(stream, &uri).await;
    }
    // The certificate is not verified: with a wrong clock, which this check looks for, none would be valid.
    // Only the date is read, and nothing secret is sent.
    let (name, connector) = (tls::server_name(host), TlsConnector::from(tls::config()));
    date(connector.connect(name, stream).await.map_err(|error| format!("TLS: {error}"))?, &uri).await
}

/// The `Date` of the answer to a GET.
async fn date(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    uri: &Uri,
) -> Result<Timestamp, String> {
    let host = uri.authority().map_or("", |authority| authority.as_str());
    let answer = http_client::get(stream, host, PATH).await?;
    let date = answer.headers().get(DATE).and_then(|date| date.to_str().ok());
    let date = date.ok_or("its answer has no Date")?;
    jiff::fmt::rfc2822::DateTimeParser::new()
        .parse_timestamp(date)
        .map_err(|_| format!("its answer has no valid Date: {}", harmless(date)))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener};
    use std::sync::Arc;

    use super::*;
    use crate::doctor::report::Grade;
    use crate::doctor::test_dns::Zone;

    /// Answers one request with this `Date`, over TLS if there is a certificate.
    fn server(date: &'static str, tls: Option<rustls::ServerConfig>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let answer = format!("HTTP/1.1 200 OK\r\n{date}\r\nContent-Length: 0\r\n\r\n");
            let mut request = [0; 1024];
            match tls {
                None => {
                    let _ = stream.read(&mut request);
                    stream.write_all(answer.as_bytes()).unwrap();
                }
                Some(config) => {
                    let connection = rustls::ServerConnection::new(Arc::new(config)).unwrap();
                    let mut stream = rustls::StreamOwned::new(connection, stream);
                    let _ = stream.read(&mut request);
                    stream.write_all(answer.as_bytes()).unwrap();
                }
            }
        });
        address
    }

    async fn look(url: &str) -> Check {
        let zone = Zone::new(&[("control.example.com", "A", "127.0.0.1")]).serve();
        check(Some(url), &Resolver::new(Some(zone.address()))).await
    }

    #[tokio::test]
    async fn the_date_of_the_answer_is_what_counts() {
        let old = "Date: Sun, 06 Nov 1994 08:49:37 GMT";
        let port = server(old, None).port();
        let check = look(&format!("http://control.example.com:{port}")).await;
        assert_eq!(check.outcome, Grade::Fail, "{check:?}");
        assert!(
            check.finding.contains(" s fast, compared with the clock of http://control.example.com"),
            "{check:?}"
        );
    }

    #[tokio::test]
    async fn a_certificate_of_anybody_will_do() {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(vec!["else.example.com".into()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let now = jiff::fmt::rfc2822::DateTimePrinter::new()
            .timestamp_to_rfc9110_string(&wall_clock::now())
            .unwrap();
        let date: &'static str = format!("Date: {now}").leak();
        let check = look(&format!("https://{}", server(date, Some(tls)))).await;
        assert_eq!(check.outcome, Grade::Pass, "{check:?}");
    }

    #[tokio::test]
    async fn no_date_is_worth_a_warning() {
        let closed = crate::test_support::net::free_addr();
        for (url, words) in [
            (format!("http://{closed}"), "cannot connect to"),
            ("http://gone.example.com".to_owned(), "has no address"),
            (format!("http://{}", server("X: y", None)), "no Date"),
            (format!("http://{}", server("Date: soon", None)), "no valid Date: soon"),
        ] {
            let check = look(&url).await;
            assert_eq!(check.outcome, Grade::Warn, "{check:?}");
            assert!(check.finding.contains(words), "{words} is missing from {check:?}");
        }
    }

    #[test]
    fn a_small_difference_is_none() {
        let now = wall_clock::now();
        for (seconds, outcome) in [
            (0, Grade::Pass),
            (59, Grade::Pass),
            (-59, Grade::Pass),
            (61, Grade::Warn),
            (-61, Grade::Warn),
            (601, Grade::Fail),
            (-601, Grade::Fail),
        ] {
            let check = judge("x", now - SignedDuration::from_secs(seconds), now);
            assert_eq!(check.outcome, outcome, "{check:?}");
            let direction = if seconds < 0 { "slow" } else { "fast" };
            assert!(outcome == Grade::Pass || check.finding.contains(direction), "{check:?}");
        }
    }
}
