use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::tailnet::PingReport;
use crate::upstream::dial::Reset;

/// Long enough for a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

/// For mailboxes that never do what is waited for.
const SHORT: Duration = Duration::from_secs(1);

/// Dials a port of this machine, or answers at once, or never.
enum Dialler {
    Loopback(SocketAddr),
    Fails(ConnectError),
    Never,
}

impl Dial for Dialler {
    type Stream = TcpStream;

    async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
        match self {
            Dialler::Loopback(address) => {
                TcpStream::connect(address).await.map_err(|_| ConnectError::Refused)
            }
            Dialler::Fails(error) => Err(*error),
            Dialler::Never => std::future::pending().await,
        }
    }

    async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
        Err(ConnectError::NoSuchPeer)
    }
}

fn target(protocol: Protocol, header: bool) -> Target {
    Target { host: "mailbox".into(), port: 25, protocol, header }
}

type Outcome = Result<Finding, ProbeError>;

/// Probes a mailbox that does `serve` on its one connection.
async fn probed<T, F: Future<Output = T>>(
    protocol: Protocol,
    header: bool,
    limit: Duration,
    serve: impl FnOnce(TcpStream) -> F,
) -> (Outcome, T) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialler = Dialler::Loopback(listener.local_addr().unwrap());
    let target = target(protocol, header);
    let mailbox = async { serve(listener.accept().await.unwrap().0).await };
    tokio::time::timeout(2 * LIMIT, async { tokio::join!(probe(&dialler, &target, limit), mailbox) })
        .await
        .expect("the probe or the mailbox hangs")
}

/// A mailbox that says a greeting, answers the goodbye, and ends; what it got.
async fn well(mut stream: TcpStream, greeting: &str, goodbye: &str, answer: &str) -> Vec<u8> {
    stream.write_all(greeting.as_bytes()).await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(goodbye.as_bytes()) {
        assert_ne!(stream.read_buf(&mut got).await.unwrap(), 0, "{}", got.escape_ascii());
    }
    stream.write_all(answer.as_bytes()).await.unwrap();
    // Our end of the stream, in order; nothing after it.
    stream.read_to_end(&mut got).await.expect("the probe ended in order");
    got
}

/// A mailbox that says something when it has the header, and ends in order when
/// the probe does; for probes that fail.
async fn says(mut stream: TcpStream, text: &[u8]) {
    let mut header = [0; LOCAL.len()];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(header, LOCAL);
    stream.write_all(text).await.unwrap();
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

async fn failure(protocol: Protocol, said: &'static [u8]) -> ProbeError {
    let (outcome, ()) = probed(protocol, true, LIMIT, |stream| says(stream, said)).await;
    outcome.unwrap_err()
}

fn taken(said: &str) -> ProbeError {
    ProbeError::HeaderTaken { said: said.into() }
}

const SIEVE: &str = "\"IMPLEMENTATION\" \"Dovecot Pigeonhole\"\r\n\"SIEVE\" \"fileinto\"\r\nOK \"ready\"\r\n";

#[tokio::test]
async fn each_protocol_gets_the_header_and_its_goodbye_and_not_a_byte_more() {
    let cases = [
        (Protocol::Smtp, "220 mail ESMTP\r\n", "QUIT\r\n", "221 2.0.0 Bye\r\n", "220 mail ESMTP"),
        (Protocol::Submission, "220-mail\r\n220-more\r\n220 end\r\n", "QUIT\r\n", "221 Bye\r\n", "220-mail"),
        (
            Protocol::Imap,
            "* OK [CAPABILITY IMAP4rev1] ready\r\n",
            "a LOGOUT\r\n",
            "* BYE Logging out\r\na OK Logout completed.\r\n",
            "* OK [CAPABILITY IMAP4rev1] ready",
        ),
        (Protocol::Imap, "* PREAUTH you\r\n", "a LOGOUT\r\n", "* BYE\r\na ok\r\n", "* PREAUTH you"),
        (Protocol::Pop3, "+OK ready\r\n", "QUIT\r\n", "+OK Logging out\r\n", "+OK ready"),
        (
            Protocol::Sieve,
            SIEVE,
            "LOGOUT\r\n",
            "OK \"Logout completed.\"\r\n",
            "\"IMPLEMENTATION\" \"Dovecot Pigeonhole\"",
        ),
    ];
    for (protocol, greeting, goodbye, answer, shown) in cases {
        for header in [true, false] {
            let mailbox = |stream| well(stream, greeting, goodbye, answer);
            let (outcome, got) = probed(protocol, header, LIMIT, mailbox).await;
            let finding = outcome.unwrap_or_else(|error| panic!("{protocol}: {error}"));
            assert_eq!((&finding.greeting[..], &finding.certificate), (shown, &None));
            assert!(finding.connect <= finding.total && finding.total < LIMIT, "{finding:?}");
            let expected = [if header { &LOCAL[..] } else { b"" }, goodbye.as_bytes()].concat();
            assert_eq!(got, expected, "{protocol}: {}", got.escape_ascii());
        }
    }
}

#[tokio::test]
async fn of_http_and_tcp_connecting_and_the_header_are_all() {
    for protocol in [Protocol::Http, Protocol::Tcp] {
        for header in [true, false] {
            let (outcome, got) = probed(protocol, header, LIMIT, async |mut stream| {
                let mut got = Vec::new();
                stream.read_to_end(&mut got).await.map(|_| got)
            })
            .await;
            assert_eq!(outcome.unwrap().greeting, "");
            assert_eq!(got.unwrap(), if header { &LOCAL[..] } else { b"" });
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_mailbox_that_cannot_be_reached() {
    let target = target(Protocol::Smtp, true);
    let refused = Dialler::Fails(ConnectError::Refused);
    assert_eq!(probe(&refused, &target, LIMIT).await, Err(ProbeError::Connect(ConnectError::Refused)));
    let timed_out = Err(ProbeError::ConnectTimedOut { limit: CONNECT_LIMIT });
    assert_eq!(probe(&Dialler::Fails(ConnectError::TimedOut), &target, LIMIT).await, timed_out);
    let started = Instant::now();
    assert_eq!(probe(&Dialler::Never, &target, LIMIT).await, timed_out);
    assert_eq!(started.elapsed(), CONNECT_LIMIT);
}

#[tokio::test]
async fn a_mailbox_that_cannot_take_the_header() {
    /// Dials what is closed already on our side.
    struct Closed(SocketAddr);
    impl Dial for Closed {
        type Stream = TcpStream;
        async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
            let mut stream = TcpStream::connect(self.0).await.unwrap();
            stream.shutdown().await.unwrap();
            Ok(stream)
        }
        async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
            Err(ConnectError::NoSuchPeer)
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialler = Closed(listener.local_addr().unwrap());
    let error = probe(&dialler, &target(Protocol::Smtp, true), LIMIT).await.unwrap_err();
    assert!(matches!(error, ProbeError::Header(_)), "{error}");
}

#[tokio::test]
async fn a_mailbox_that_closes_without_a_word() {
    // Once it has heard of us, so that the connection has been made.
    for (protocol, header) in [(Protocol::Smtp, true), (Protocol::Imaps, true), (Protocol::Imaps, false)] {
        for reset in [true, false] {
            let (outcome, ()) = probed(protocol, header, LIMIT, async |mut stream| {
                stream.read_exact(&mut [0]).await.unwrap();
                if reset {
                    stream.reset();
                }
            })
            .await;
            assert_eq!(outcome, Err(ProbeError::ClosedSilently { header }), "{protocol} {reset}");
        }
    }
    let (outcome, ()) = probed(Protocol::Smtp, false, LIMIT, async |_| ()).await;
    assert_eq!(outcome, Err(ProbeError::ClosedSilently { header: false }));
    let text = ProbeError::ClosedSilently { header: true }.to_string();
    assert!(text.contains("does not trust this edge"), "{text}");
    let text = ProbeError::ClosedSilently { header: false }.to_string();
    assert!(text.contains("demands a PROXY header"), "{text}");
}

#[tokio::test]
async fn a_mailbox_that_says_nothing() {
    for protocol in [Protocol::Smtp, Protocol::Imaps] {
        let (outcome, ()) = probed(protocol, false, SHORT, async |mut stream| {
            let _ = stream.read_to_end(&mut Vec::new()).await;
        })
        .await;
        assert_eq!(outcome, Err(ProbeError::Silent { limit: SHORT }), "{protocol}");
    }
}

#[tokio::test]
async fn a_header_taken_for_commands() {
    let stalwart = b"220 mail Stalwart ESMTP at your service\r\n500 5.5.1 Invalid command.\r\n500 5.5.1 Invalid command.\r\n500 5.5.1 Invalid command.\r\n221 2.0.0 Bye.\r\n";
    assert_eq!(failure(Protocol::Smtp, stalwart).await, taken("500 5.5.1 Invalid command."));
    let postfix = b"220 mail ESMTP Postfix\r\n502 5.5.2 Error: command not recognized\r\n";
    assert_eq!(failure(Protocol::Smtp, postfix).await, taken("502 5.5.2 Error: command not recognized"));
    let postscreen = b"220-mail ESMTP\r\n521 5.5.1 Protocol error\r\n";
    assert_eq!(failure(Protocol::Smtp, postscreen).await, taken("521 5.5.1 Protocol error"));
    let dovecot = b"* OK ready\r\n* BAD Error in IMAP command\r\n";
    assert_eq!(failure(Protocol::Imap, dovecot).await, taken("* BAD Error in IMAP command"));
    let pop3 = b"+OK ready\r\n-ERR Unknown command.\r\n+OK Logging out\r\n";
    assert_eq!(failure(Protocol::Pop3, pop3).await, taken("-ERR Unknown command."));
    let sieve = b"OK \"ready\"\r\nNO \"Error in MANAGESIEVE command\"\r\n";
    assert_eq!(failure(Protocol::Sieve, sieve).await, taken("NO \"Error in MANAGESIEVE command\""));
}

#[tokio::test]
async fn a_complaint_that_comes_late_is_not_the_answer_to_our_goodbye() {
    let (outcome, ()) = probed(Protocol::Smtp, true, LIMIT, async |mut stream| {
        stream.write_all(b"220 mail\r\n").await.unwrap();
        let mut got = vec![0; LOCAL.len() + 6];
        stream.read_exact(&mut got).await.unwrap();
        stream.write_all(b"500 5.5.2 bad syntax\r\n221 Bye\r\n").await.unwrap();
    })
    .await;
    assert_eq!(outcome, Err(taken("500 5.5.2 bad syntax")));
}

#[tokio::test]
async fn a_header_taken_for_tls() {
    // Stalwart, before we have said anything.
    assert_eq!(
        failure(Protocol::Imaps, &[0x15, 3, 3, 0, 2, 2, 0x32]).await,
        taken("TLS alert 50 (DecodeError)")
    );
    // One that waits for a whole record and says so in answer to our hello.
    for (alert, name) in [(10, "UnexpectedMessage"), (22, "RecordOverflow"), (50, "DecodeError")] {
        let (outcome, ()) = probed(Protocol::Imaps, true, LIMIT, async |mut stream| {
            stream.read_exact(&mut [0; LOCAL.len() + 5]).await.unwrap();
            stream.write_all(&[0x15, 3, 3, 0, 2, 2, alert]).await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        })
        .await;
        assert_eq!(outcome, Err(taken(&format!("TLS alert {alert} ({name})"))));
    }
    let junk = failure(Protocol::Imaps, &[0xff, 0xfe, 0, 1, 2, 3, 4, 5, 6, 7]).await;
    assert!(matches!(junk, ProbeError::HeaderTaken { .. }), "{junk}");
}

#[tokio::test]
async fn the_same_alert_without_a_header_is_a_matter_of_tls() {
    for alert in [50, 40] {
        let (outcome, ()) = probed(Protocol::Imaps, false, LIMIT, async |mut stream| {
            stream.read_exact(&mut [0; 5]).await.unwrap();
            stream.write_all(&[0x15, 3, 3, 0, 2, 2, alert]).await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        })
        .await;
        assert!(matches!(outcome, Err(ProbeError::Tls(_))), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_mailbox_that_refuses() {
    let cases = [
        (Protocol::Smtp, "421 4.3.2 Too many connections"),
        (Protocol::Smtp, "554 5.7.1 mail blocks you"),
        (Protocol::Imap, "* BYE [UNAVAILABLE] later"),
        (Protocol::Pop3, "-ERR [SYS/TEMP] later"),
        (Protocol::Sieve, "BYE (TRYLATER) \"later\""),
        (Protocol::Sieve, "NO \"never\""),
    ];
    for (protocol, greeting) in cases {
        let mailbox = async |stream: TcpStream| says(stream, format!("{greeting}\r\n").as_bytes()).await;
        let (outcome, ()) = probed(protocol, true, LIMIT, mailbox).await;
        assert_eq!(outcome, Err(ProbeError::Refused { greeting: greeting.into() }), "{protocol}");
    }
    let after_the_greeting = failure(Protocol::Smtp, b"220 mail\r\n421 4.3.2 shutting down\r\n").await;
    assert_eq!(after_the_greeting, ProbeError::Refused { greeting: "421 4.3.2 shutting down".into() });
}

#[tokio::test]
async fn a_mailbox_that_speaks_something_else() {
    let cases: [(Protocol, &'static [u8], &str); 6] = [
        (Protocol::Smtp, b"* OK Dovecot ready.\r\n", "* OK Dovecot ready."),
        (Protocol::Imap, b"220 mail ESMTP\r\n", "220 mail ESMTP"),
        (Protocol::Pop3, b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n", "HTTP/1.1 400 Bad Request"),
        (Protocol::Sieve, b"SSH-2.0-\x1b[31m\r\n", "SSH-2.0-?[31m"),
        // Plain text where TLS should be.
        (Protocol::Submissions, b"220 mail ESMTP\r\n", "220 mail ESMTP"),
        (Protocol::Imaps, b"* OK Dovecot ready.\r\n", "* OK Dovecot ready."),
    ];
    for (protocol, said, shown) in cases {
        let found = ProbeError::WrongProtocol { found: shown.into() };
        assert_eq!(failure(protocol, said).await, found, "{protocol}");
    }
}

#[tokio::test]
async fn tls_where_plain_text_should_be() {
    // Not a line, so it is judged when it has ended.
    let (outcome, ()) = probed(Protocol::Smtp, true, LIMIT, async |mut stream| {
        stream.read_exact(&mut [0; LOCAL.len()]).await.unwrap();
        stream.write_all(&[0x15, 3, 3, 0, 2, 2, 0x32]).await.unwrap();
    })
    .await;
    assert_eq!(outcome, Err(ProbeError::WrongProtocol { found: "(TLS)".into() }));
}

#[tokio::test]
async fn a_greeting_without_an_end_is_bounded() {
    for piece in ["220-and so on\r\n", "220 and on"] {
        let (outcome, sent) = probed(Protocol::Smtp, false, LIMIT, async |mut stream| {
            let mut sent = 0;
            while stream.write_all(piece.as_bytes()).await.is_ok() {
                sent += piece.len();
            }
            sent
        })
        .await;
        assert_eq!(outcome, Err(ProbeError::Cut("did not end its greeting".into())), "{sent} bytes");
    }
    let (outcome, _) = probed(Protocol::Smtp, false, SHORT, async |mut stream| {
        stream.write_all(b"220-mail\r\n").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    assert_eq!(outcome, Err(ProbeError::Cut("did not end its greeting within 1s".into())));
}

#[tokio::test]
async fn a_mailbox_that_breaks_off() {
    for (said, expected) in [
        (&b"220-mail\r\n220"[..], "closed the connection in the middle of its greeting"),
        (b"220 mail\r\n", "closed the connection after its greeting"),
    ] {
        let (outcome, ()) = probed(Protocol::Smtp, true, LIMIT, async |mut stream| {
            stream.read_exact(&mut [0; LOCAL.len()]).await.unwrap();
            stream.write_all(said).await.unwrap();
        })
        .await;
        assert_eq!(outcome, Err(ProbeError::Cut(expected.into())));
    }
}

#[tokio::test]
async fn a_mailbox_that_does_not_answer_goodbye_is_not_waited_for_long() {
    let started = Instant::now();
    let (outcome, ()) = probed(Protocol::Smtp, false, LIMIT, async |mut stream| {
        stream.write_all(b"220 mail\r\n").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    assert_eq!(outcome, Err(ProbeError::Cut("said nothing in answer to QUIT".into())));
    assert!(started.elapsed() < LIMIT / 2);
}

#[tokio::test]
async fn a_mailbox_that_answers_goodbye_and_stays_is_well() {
    let (outcome, _) = probed(Protocol::Smtp, false, LIMIT, async |mut stream| {
        stream.write_all(b"220 mail\r\n").await.unwrap();
        stream.read_exact(&mut [0; 6]).await.unwrap();
        stream.write_all(b"221 Bye\r\n").await.unwrap();
        // Held until the probe is gone.
        stream.read_to_end(&mut Vec::new()).await.unwrap();
        stream
    })
    .await;
    outcome.unwrap();
}

/// A TLS server with a certificate that has expired.
fn acceptor() -> TlsAcceptor {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(["mail.example.test".to_owned()]).unwrap();
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let certificate = params.self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()));
    TlsAcceptor::from(Arc::new(config.unwrap()))
}

#[tokio::test]
async fn on_tls_ports_the_certificate_is_noted_and_the_same_goodbye_said() {
    let cases = [
        (Protocol::Submissions, "220 mail\r\n", "QUIT\r\n", "221 Bye\r\n"),
        (Protocol::Imaps, "* OK ready\r\n", "a LOGOUT\r\n", "* BYE\r\na OK\r\n"),
        (Protocol::Pop3s, "+OK ready\r\n", "QUIT\r\n", "+OK\r\n"),
    ];
    for (protocol, greeting, goodbye, answer) in cases {
        for header in [true, false] {
            let (outcome, (got, name)) = probed(protocol, header, LIMIT, async |mut stream| {
                if header {
                    let mut got = LOCAL.map(|_| 0);
                    stream.read_exact(&mut got).await.unwrap();
                    assert_eq!(got, LOCAL);
                }
                let mut tls = acceptor().accept(stream).await.unwrap();
                tls.write_all(greeting.as_bytes()).await.unwrap();
                let mut got = vec![0; goodbye.len()];
                tls.read_exact(&mut got).await.unwrap();
                tls.write_all(answer.as_bytes()).await.unwrap();
                // An end without close_notify would be an error.
                assert_eq!(tls.read_to_end(&mut got).await.unwrap(), 0);
                (got, tls.get_ref().1.server_name().map(ToOwned::to_owned))
            })
            .await;
            let finding = outcome.unwrap_or_else(|error| panic!("{protocol}: {error}"));
            assert_eq!(finding.greeting, greeting.trim_end());
            let certificate = finding.certificate.unwrap();
            assert_eq!(certificate.names, ["mail.example.test"]);
            assert_eq!(certificate.not_after.to_string(), "2021-01-01T00:00:00Z");
            assert_eq!((got, name.as_deref()), (goodbye.into(), Some("mailbox")));
        }
    }
}

#[tokio::test]
async fn a_tls_server_that_reads_the_header_as_tls() {
    let (outcome, ()) = probed(Protocol::Imaps, true, LIMIT, async |stream| {
        acceptor().accept(stream).await.unwrap_err();
    })
    .await;
    assert!(matches!(outcome, Err(ProbeError::HeaderTaken { .. })), "{outcome:?}");
}

#[tokio::test]
async fn silence_after_the_handshake_has_a_text_of_its_own() {
    for close in [true, false] {
        let (outcome, ()) = probed(Protocol::Imaps, false, Duration::from_secs(2), async |stream| {
            let mut tls = acceptor().accept(stream).await.unwrap();
            if !close {
                let _ = tls.read_to_end(&mut Vec::new()).await;
            }
        })
        .await;
        let Err(ProbeError::Cut(text)) = outcome else { panic!("{outcome:?}") };
        assert!(text.contains("after the TLS handshake"), "{text}");
    }
}

#[test]
fn text_of_the_mailbox_is_made_harmless() {
    assert_eq!(harmless(b"  220 \x1b[2J\0\xff\ttext\r\n"), "220 ?[2J?? text");
    assert_eq!(harmless(&[b'x'; 9000]).len(), SHOWN + 3);
    assert_eq!(harmless(b""), "");
}

#[test]
fn a_finding_is_numbers_of_milliseconds_in_json_and_an_error_its_text() {
    let finding = Finding {
        greeting: "220 mail".into(),
        certificate: Some(Certificate { names: vec!["a.test".into()], not_after: Timestamp::UNIX_EPOCH }),
        connect: Duration::from_millis(12),
        total: Duration::from_millis(34),
    };
    let json = serde_json::to_string(&finding).unwrap();
    assert_eq!(
        json,
        r#"{"greeting":"220 mail","certificate":{"names":["a.test"],"not_after":"1970-01-01T00:00:00Z"},"connect_ms":12,"total_ms":34}"#
    );
    assert_eq!(serde_json::from_str::<Finding>(&json).unwrap(), finding);
    let error = ProbeError::Connect(ConnectError::Refused);
    assert_eq!(serde_json::to_value(&error).unwrap(), error.to_string());
}

#[test]
fn every_text_says_what_to_do_and_has_no_full_stop() {
    let errors = [
        ProbeError::ConnectTimedOut { limit: LIMIT },
        ProbeError::Header("x".into()),
        ProbeError::ClosedSilently { header: true },
        ProbeError::ClosedSilently { header: false },
        ProbeError::Silent { limit: LIMIT },
        taken("x"),
        ProbeError::WrongProtocol { found: "x".into() },
        ProbeError::Refused { greeting: "x".into() },
        ProbeError::Tls("x".into()),
        ProbeError::Cut("x".into()),
    ];
    for text in errors.map(|error| error.to_string()) {
        assert!(
            text.contains("; ") && !text.ends_with('.') && !text.starts_with(char::is_uppercase),
            "{text}"
        );
    }
}

#[test]
fn a_probe_can_be_spawned() {
    fn send(_: &impl Send) {}
    let (dialler, target) = (Dialler::Never, target(Protocol::Imaps, true));
    send(&probe(&dialler, &target, LIMIT));
}
