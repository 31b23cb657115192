//! What a client is told when no mailbox can serve it: the refusal of its protocol, and then a close that leaves
//! the client time to read it.
//!
//! A mail client that gets a temporary refusal comes back later; a client whose connection is reset shows its user
//! an error.
//!
//! Invariants
//! - The text is all that the client gets.
//! - No RST overtakes the text. Unread bytes of the client would make the kernel send a RST, and the client would
//!   then lose the text. So the client's bytes are read and thrown away.
//! - It ends within ten seconds, whatever the client does.
//!
//! Deliberately not here: when to refuse (see `connection.rs`). On a port whose protocol has no refusal (http,
//! tcp) nothing is sent.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, sink};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::protocol::Protocol;

/// How long the client may take to accept the text. The text fits into any window.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// How long the client may take to close its side after the text.
const LINGER_LIMIT: Duration = Duration::from_secs(5);

/// How many bytes of the client are read meanwhile: more than its first window, but a flood is cut.
const LINGER_BYTES: u64 = 256 * 1024;

/// A fatal TLS alert, internal_error (RFC 8446 section 6.2), in a record of the version that every client accepts
/// before a version is agreed on (section 5.1). Clients show it as a failure of the server, not as an attack, and
/// try again.
const TLS_ALERT: [u8; 7] = [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x50];

/// The name of the edge in its own replies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicName(Option<String>);

impl PublicName {
    /// The configured name, else the system's host name if it is fully qualified. There is no DNS look-up: a name
    /// that needs one is not the public name of this machine.
    pub fn new(configured: Option<String>) -> PublicName {
        let system = rustix::system::uname().nodename().to_string_lossy().into_owned();
        PublicName(configured.or_else(|| is_public(&system).then_some(system)))
    }

    /// The name, or the address literal of RFC 5321 section 4.1.3.
    fn of(&self, local: Option<SocketAddr>) -> String {
        match (&self.0, local.map(|local| local.ip().to_canonical())) {
            (Some(name), _) => name.clone(),
            (None, Some(IpAddr::V4(ip))) => format!("[{ip}]"),
            (None, Some(IpAddr::V6(ip))) => format!("[IPv6:{ip}]"),
            (None, None) => "localhost".to_owned(),
        }
    }
}

/// Whether a name can be public: fully qualified, and not under a suffix for local networks.
fn is_public(name: &str) -> bool {
    const HOME: [&str; 7] = ["localdomain", "local", "internal", "lan", "home", "arpa", "localhost"];
    let last = name.rsplit_once('.').map(|(_, last)| last);
    last.is_some_and(|last| !last.is_empty() && !HOME.contains(&last))
}

/// Tells the client that the service is not available now, and closes the connection in order. Errors are ignored.
/// The caller then drops the connection.
pub async fn refuse(client: &mut TcpStream, protocol: Protocol, name: &PublicName) {
    let text = refusal(protocol, &name.of(client.local_addr().ok()));
    let told = async {
        client.write_all(&text).await?;
        client.shutdown().await
    };
    if let Ok(Ok(())) = timeout(WRITE_LIMIT, told).await {
        let rest = &mut client.take(LINGER_BYTES);
        let _ = timeout(LINGER_LIMIT, copy(rest, &mut sink())).await;
    }
}

/// As [`refuse`], but without waiting: only what the kernel accepts at once is sent, and a client that is sending
/// may lose even that.
pub fn refuse_at_once(client: &TcpStream, protocol: Protocol, name: &PublicName) {
    // Directly to the kernel: the runtime does not know yet that the socket is writable.
    let _ = SockRef::from(client).send(&refusal(protocol, &name.of(client.local_addr().ok())));
}

/// The bytes that refuse service for now.
fn refusal(protocol: Protocol, name: &str) -> Vec<u8> {
    match protocol {
        // RFC 5321 section 3.8 (421 and close); RFC 3463: 4.3.2, system not accepting network messages.
        Protocol::Smtp | Protocol::Submission => {
            format!("421 4.3.2 {name} Service not available, please try again later\r\n").into_bytes()
        }
        // RFC 9051 section 7.1.5 (BYE as greeting), RFC 5530 section 3 (UNAVAILABLE).
        Protocol::Imap => b"* BYE [UNAVAILABLE] Service not available, please try again later\r\n".to_vec(),
        // RFC 3206 section 4 (SYS/TEMP).
        Protocol::Pop3 => b"-ERR [SYS/TEMP] Service not available, please try again later\r\n".to_vec(),
        // RFC 5804 section 1.3 (BYE, TRYLATER).
        Protocol::Sieve => b"BYE (TRYLATER) \"Service not available, please try again later\"\r\n".to_vec(),
        Protocol::Submissions | Protocol::Imaps | Protocol::Pop3s => TLS_ALERT.to_vec(),
        Protocol::Http | Protocol::Tcp => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::time::Instant;

    use super::*;

    const NAME: &str = "mx.example.org";

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    fn name() -> PublicName {
        PublicName(Some(NAME.to_owned()))
    }

    #[test]
    fn each_protocol_has_its_own_refusal() {
        let expected: [(Protocol, &[u8]); 10] = [
            (Protocol::Smtp, b"421 4.3.2 mx.example.org Service not available, please try again later\r\n"),
            (
                Protocol::Submission,
                b"421 4.3.2 mx.example.org Service not available, please try again later\r\n",
            ),
            (Protocol::Submissions, b"\x15\x03\x03\x00\x02\x02\x50"),
            (Protocol::Imap, b"* BYE [UNAVAILABLE] Service not available, please try again later\r\n"),
            (Protocol::Imaps, b"\x15\x03\x03\x00\x02\x02\x50"),
            (Protocol::Pop3, b"-ERR [SYS/TEMP] Service not available, please try again later\r\n"),
            (Protocol::Pop3s, b"\x15\x03\x03\x00\x02\x02\x50"),
            (Protocol::Sieve, b"BYE (TRYLATER) \"Service not available, please try again later\"\r\n"),
            (Protocol::Http, b""),
            (Protocol::Tcp, b""),
        ];
        assert_eq!(expected.map(|(protocol, _)| protocol), Protocol::ALL, "every protocol is here");
        for (protocol, text) in expected {
            assert_eq!(refusal(protocol, NAME), text, "{protocol}");
        }
    }

    #[test]
    fn without_a_name_it_is_the_address_literal() {
        let nameless = PublicName(None);
        let of = |address: &str| nameless.of(Some(address.parse().unwrap()));
        assert_eq!(of("192.0.2.1:25"), "[192.0.2.1]");
        assert_eq!(of("[2001:db8::1]:25"), "[IPv6:2001:db8::1]");
        assert_eq!(of("[::ffff:192.0.2.1]:25"), "[192.0.2.1]");
        assert_eq!(name().of(None), NAME);
        assert!(is_public(NAME));
        for private in ["mx", "mx.", "mx.localdomain", "box.lan", ""] {
            assert!(!is_public(private), "{private}");
        }
        assert_eq!(PublicName::new(Some(NAME.to_owned())), name(), "the configured one comes first");
    }

    #[tokio::test]
    async fn a_client_that_talks_over_it_still_reads_it_to_its_end() {
        let (mut client, mut server) = pair().await;
        let refused = tokio::spawn(async move { refuse(&mut server, Protocol::Smtp, &name()).await });
        for _ in 0..20 {
            client.write_all(&[b'x'; 4096]).await.unwrap();
        }
        let mut text = String::new();
        client.read_to_string(&mut text).await.expect("an end of stream and no reset");
        assert!(text.starts_with("421 4.3.2 mx.example.org "), "{text}");
        drop(client);
        refused.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_is_not_waited_for_is_told_too() {
        let (mut client, server) = pair().await;
        refuse_at_once(&server, Protocol::Imap, &name());
        drop(server);
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text.as_bytes(), refusal(Protocol::Imap, NAME));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_closes_is_left() {
        let (_client, mut server) = pair().await;
        let began = Instant::now();
        refuse(&mut server, Protocol::Imap, &name()).await;
        assert_eq!(began.elapsed(), LINGER_LIMIT);
    }

    #[tokio::test]
    async fn a_flood_is_cut() {
        let (mut client, mut server) = pair().await;
        let refused = tokio::spawn(async move { refuse(&mut server, Protocol::Pop3, &name()).await });
        let flood = async { while client.write_all(&[b'x'; 65536]).await.is_ok() {} };
        timeout(LINGER_LIMIT, flood).await.expect("it is cut before the time is over");
        refused.await.unwrap();
    }
}
