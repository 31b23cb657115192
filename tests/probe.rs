//! The probe on real mail servers: it finds them well without a trace of a complaint in their logs,
//! and names what is wrong with one that takes no PROXY header from us.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::cert::HOST_NAME;
use common::dovecot::Dovecot;
use common::log::Log;
use common::mail::{MailHome, MailServer};
use common::postfix::Postfix;
use common::wait::eventually;
use tailwart_edge::protocol::Protocol;
use tailwart_edge::tailnet::{ConnectError, PingReport};
use tailwart_edge::upstream::dial::Dial;
use tailwart_edge::upstream::probe::{Finding, ProbeError, Target, probe};
use tokio::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(20);

/// What a log must not say of a probe.
const COMPLAINTS: [&str; 7] =
    ["warning", "error", "fatal", "panic", "lost connection", "timeout", "non-smtp command"];

/// Dials this machine.
struct Loopback;

impl Dial for Loopback {
    type Stream = TcpStream;

    async fn dial(&self, host: &str, port: u16) -> Result<TcpStream, ConnectError> {
        TcpStream::connect((host, port)).await.map_err(|_| ConnectError::Refused)
    }

    async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
        Err(ConnectError::NoSuchPeer)
    }
}

fn probed(protocol: Protocol, addr: SocketAddr, header: bool) -> Result<Finding, ProbeError> {
    let target = Target { host: addr.ip().to_string(), port: addr.port(), protocol, header };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.expect("a runtime can be made").block_on(probe(&Loopback, &target, LIMIT));
    println!("{protocol}, header {header}: {outcome:?}");
    outcome
}

#[track_caller]
fn assert_no_complaint(log: &Log) {
    let text = log.text();
    let line = text.lines().find(|line| COMPLAINTS.iter().any(|word| line.to_lowercase().contains(word)));
    assert_eq!(line, None, "the whole log:\n{text}");
}

#[test]
fn a_mailbox_that_is_well_is_found_so_and_has_nothing_to_complain_of() {
    let MailServer { home: _home, postfix, dovecot } = MailServer::start();
    let ports = [
        (Protocol::Smtp, postfix.smtp, "220 mail.example.test ESMTP"),
        (Protocol::Submission, postfix.submission, "220 mail.example.test ESMTP"),
        (Protocol::Submissions, postfix.submissions, "220 mail.example.test ESMTP"),
        (Protocol::Imap, dovecot.imap, "* OK [CAPABILITY"),
        (Protocol::Imaps, dovecot.imaps, "* OK [CAPABILITY"),
        (Protocol::Pop3, dovecot.pop3, "+OK Dovecot"),
        (Protocol::Pop3s, dovecot.pop3s, "+OK Dovecot"),
        (Protocol::Sieve, dovecot.sieve, "\"IMPLEMENTATION\" \"Dovecot"),
    ];
    for (protocol, addr, greeting) in ports {
        let finding = probed(protocol, addr, true).unwrap_or_else(|error| panic!("{protocol}: {error}"));
        assert!(finding.greeting.starts_with(greeting), "{finding:?}");
        let names = finding.certificate.map(|certificate| certificate.names);
        let has_tls = protocol.name().ends_with('s') && protocol != Protocol::Http;
        let expected = [HOST_NAME, "localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
        assert_eq!(names, has_tls.then_some(expected), "{protocol}");
    }
    // Both have logged the last of it.
    for service in ["postfix/smtpd", "postfix/submission/smtpd", "postfix/submissions/smtpd"] {
        let wanted = |line: &str| line.contains(service) && line.contains("disconnect from");
        let line = postfix.log().wait_line(&format!("{service}'s disconnect"), LIMIT, wanted);
        assert!(line.contains("quit=1 commands=1"), "{line}");
    }
    for (service, times) in [("imap-login", 2), ("pop3-login", 2), ("managesieve-login", 1)] {
        let logged = || dovecot.log().text().lines().filter(|line| line.contains(service)).count();
        assert!(eventually(LIMIT, || logged() >= times), "{service}: {}", dovecot.log().tail());
    }
    println!("{}\n{}", postfix.log().text(), dovecot.log().text());
    assert_no_complaint(postfix.log());
    assert_no_complaint(dovecot.log());
}

#[test]
fn a_postfix_that_expects_no_header_is_named_so() {
    let postfix = Postfix::start_with(&MailHome::create(), "smtpd_upstream_proxy_protocol =");
    for (protocol, addr) in [(Protocol::Smtp, postfix.smtp), (Protocol::Submission, postfix.submission)] {
        let outcome = probed(protocol, addr, true);
        assert!(matches!(outcome, Err(ProbeError::HeaderTaken { .. })), "{outcome:?}");
        probed(protocol, addr, false).unwrap();
    }
    // OpenSSL does not answer what is no TLS.
    let outcome = probed(Protocol::Submissions, postfix.submissions, true);
    assert_eq!(outcome, Err(ProbeError::ClosedSilently { header: true }));
    probed(Protocol::Submissions, postfix.submissions, false).unwrap();
}

#[test]
fn a_dovecot_that_does_not_trust_us_or_expects_no_header_is_named_so() {
    let home = MailHome::create();
    let distrusts = Dovecot::start_with(&home, "haproxy_trusted_networks = 192.0.2.0/24");
    for (protocol, addr) in [(Protocol::Imap, distrusts.imap), (Protocol::Imaps, distrusts.imaps)] {
        let outcome = probed(protocol, addr, true);
        assert_eq!(outcome, Err(ProbeError::ClosedSilently { header: true }), "{protocol}");
    }
    let off = |service: &str, listener: &str| {
        format!("service {service}-login {{\n inet_listener {listener} {{\n haproxy = no\n }}\n}}\n")
    };
    let all =
        [("imap", "imap"), ("imap", "imaps"), ("pop3", "pop3"), ("pop3", "pop3s"), ("managesieve", "sieve")];
    let plain = Dovecot::start_with(&home, &all.map(|(service, listener)| off(service, listener)).concat());
    for (protocol, addr) in
        [(Protocol::Imap, plain.imap), (Protocol::Pop3, plain.pop3), (Protocol::Sieve, plain.sieve)]
    {
        let outcome = probed(protocol, addr, true);
        assert!(matches!(outcome, Err(ProbeError::HeaderTaken { .. })), "{protocol}: {outcome:?}");
        probed(protocol, addr, false).unwrap();
    }
    let outcome = probed(Protocol::Imaps, plain.imaps, true);
    assert_eq!(outcome, Err(ProbeError::ClosedSilently { header: true }));
    probed(Protocol::Imaps, plain.imaps, false).unwrap();
}
