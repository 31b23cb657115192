//! Real mail servers behind the edge, Postfix and Dovecot, and the clients people use.
//!
//! Both servers demand a PROXY header on every port. What counts is what they log and store: it is
//! by that that an operator judges a sender, and that a spam filter or a ban list acts. All tests
//! share one mailbox and one edge, since their clients differ in address and port.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use crate::common::cert::Certificate;
use crate::common::client::LineClient;
use crate::common::edge::Listener;
use crate::common::mail::{DOMAIN, MailServer, PASSWORD};
use crate::common::net::{client_from, connect, free_port};
use crate::common::tools::{curl, openssl_s_client, run, swaks};
use crate::setup::{LIMIT, Setup, start};

/// A client that is not the address which the edge or the mailbox node has on loopback, so that it
/// cannot be in a log by accident.
const CLIENT: &str = "127.0.0.77";
const CLIENT_V6: &str = "::1";

/// SASL's PLAIN for alice: base64 of NUL, her name, NUL, [`PASSWORD`].
const ALICE_PLAIN: &str = r#"AUTHENTICATE "PLAIN" "AGFsaWNlAHNlY3JldA==""#;

struct Mail {
    setup: Setup,
    server: MailServer,
}

impl Mail {
    fn addr(&self, listener: &str) -> SocketAddr {
        self.setup.edge.addr(listener)
    }

    fn certificate(&self) -> &Certificate {
        self.server.home.certificate()
    }
}

fn mail() -> &'static Mail {
    static MAIL: OnceLock<Mail> = OnceLock::new();
    MAIL.get_or_init(|| {
        let server = MailServer::start();
        let listeners = [
            Listener::new("smtp", "smtp", 25),
            Listener::new("smtp-v1", "smtp", 25).set("proxy_protocol", r#""v1""#),
            Listener::new("submission", "submission", 587),
            Listener::new("submissions", "submissions", 465),
            Listener::new("imap", "imap", 143),
            Listener::new("imap-v1", "imap", 143).set("proxy_protocol", r#""v1""#),
            Listener::new("imaps", "imaps", 993),
            Listener::new("sieve", "sieve", 4190),
        ];
        let setup = start(&server.forwards(), &listeners);
        Mail { setup, server }
    })
}

// The client's own address and port.

#[test]
fn postfix_logs_the_clients_own_ipv4_address_and_port_with_v1() {
    let client = send_with_swaks(mail().addr("smtp-v1"), "attributed by v1 from IPv4", &[]);
    assert_taken_from(client, "attributed by v1 from IPv4");
}

#[test]
fn postfix_logs_the_clients_own_ipv4_address_and_port_with_v2() {
    let client = send_with_swaks(mail().addr("smtp"), "attributed by v2 from IPv4", &[]);
    assert_taken_from(client, "attributed by v2 from IPv4");
}

// Our swaks cannot do IPv6 (it wants IO::Socket::INET6), so the others are curl's.

#[test]
fn postfix_logs_the_clients_own_ipv6_address_and_port_with_v1() {
    let server = mail().setup.edge.addr_v6("smtp-v1");
    let client = send_with_curl(CLIENT_V6, &format!("smtp://{server}"), "attributed by v1 from IPv6", &[]);
    assert_taken_from(client, "attributed by v1 from IPv6");
}

#[test]
fn postfix_logs_the_clients_own_ipv6_address_and_port_with_v2() {
    let server = mail().setup.edge.addr_v6("smtp");
    let client = send_with_curl(CLIENT_V6, &format!("smtp://{server}"), "attributed by v2 from IPv6", &[]);
    assert_taken_from(client, "attributed by v2 from IPv6");
}

/// Sends alice a message from [`CLIENT`], on a port chosen here, as swaks does not tell its own.
#[track_caller]
fn send_with_swaks(server: SocketAddr, subject: &str, arguments: &[&str]) -> SocketAddr {
    let client = SocketAddr::new(CLIENT.parse().expect("an address"), free_port());
    let (port, to, header) =
        (client.port().to_string(), format!("alice@{DOMAIN}"), format!("Subject: {subject}"));
    let ca = mail().certificate().cert.display().to_string();
    let ours = ["--local-port", &port, "--to", &to, "--from", "sender@example.net", "--header", &header];
    let verified = ["--tls-verify", "--tls-ca-path", &ca];
    let arguments = [&ours[..], &verified, arguments].concat();
    swaks(CLIENT, server, &arguments, LIMIT).expect_success();
    client
}

/// Sends alice a message; the client's end of the connection, by curl's own account.
#[track_caller]
fn send_with_curl(source: &str, url: &str, subject: &str, arguments: &[&str]) -> SocketAddr {
    let to = format!("alice@{DOMAIN}");
    let message = format!("From: <sender@example.net>\r\nTo: <{to}>\r\nSubject: {subject}\r\n\r\nHello.\r\n");
    let ours = ["--mail-from", "sender@example.net", "--mail-rcpt", &to, "--upload-file", "-", url];
    curl_from(source, &[&ours, arguments].concat(), message.as_bytes()).1
}

/// What curl prints, and its own end of the connection.
#[track_caller]
fn curl_from(source: &str, arguments: &[&str], input: &[u8]) -> (Vec<u8>, SocketAddr) {
    let ours = ["--interface", source, "--write-out", "%{stderr}%{local_ip} %{local_port}"];
    let done = curl(&mail().certificate().cert, &[&ours, arguments].concat(), input, LIMIT).expect_success();
    let (ip, port) = done.stderr.split_once(' ').expect("curl writes what it was told to");
    let client = SocketAddr::new(ip.parse().expect("an address"), port.trim().parse().expect("a port"));
    assert_eq!(client.ip().to_string(), source, "curl connects from where it was told to");
    (done.stdout, client)
}

/// The message has reached alice, and Postfix took this very message, by its queue id, from this
/// very address and port. The header that goes out with it names the address too.
#[track_caller]
fn assert_taken_from(client: SocketAddr, subject: &str) {
    let server = &mail().server;
    let message = server.home.wait_message("alice", subject, LIMIT);
    let shown =
        if client.is_ipv6() { format!("[IPv6:{}]", client.ip()) } else { format!("[{}]", client.ip()) };
    let received = message.split("Received: ").nth(1).expect("Postfix adds a Received header");
    assert!(received.contains(&shown), "no {shown} in: {received}");
    let queue_id = received.split(" id ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let queue_id = queue_id.unwrap_or_else(|| panic!("no queue id in: {received}"));
    let line = server.postfix.wait_log(&format!("{queue_id}: client="), LIMIT);
    let expected = format!("client=unknown[{}]:{}", client.ip(), client.port());
    assert!(line.ends_with(&expected), "no {expected} in: {line}");
}

// Dovecot's account of who logged in.

#[test]
fn dovecot_logs_the_clients_own_address_on_imap_with_v2() {
    let stream = client_from(CLIENT, mail().addr("imap"));
    assert_imap_login_logged(stream);
}

#[test]
fn dovecot_logs_the_clients_own_address_on_imap_with_v1() {
    let stream = client_from(CLIENT, mail().addr("imap-v1"));
    assert_imap_login_logged(stream);
}

#[test]
fn dovecot_logs_the_clients_own_ipv6_address_on_imap() {
    let stream = client_from(CLIENT_V6, mail().setup.edge.addr_v6("imap"));
    assert_imap_login_logged(stream);
}

#[track_caller]
fn assert_imap_login_logged(stream: std::net::TcpStream) {
    let client = stream.local_addr().expect("it is connected");
    LineClient::new(stream).imap_login("alice", PASSWORD);
    assert_logged_in("imap-login", client);
}

#[test]
fn dovecot_logs_the_clients_own_address_on_imaps() {
    let url = format!("imaps://{}", mail().addr("imaps"));
    let (_, client) = curl_from(CLIENT, &["--user", &format!("alice:{PASSWORD}"), &url], b"");
    assert_logged_in("imap-login", client);
}

#[test]
fn dovecot_logs_the_clients_own_address_on_sieve() {
    let stream = client_from(CLIENT, mail().addr("sieve"));
    let client = stream.local_addr().expect("it is connected");
    let mut sieve = LineClient::new(stream);
    sieve.expect_until("OK ");
    sieve.ask(ALICE_PLAIN, "OK");
    assert_logged_in("managesieve-login", client);
}

/// Dovecot's line about the log-in of alice from this address and port.
#[track_caller]
fn assert_logged_in(service: &str, client: SocketAddr) -> String {
    let login = format!("{service}: Info: Login: user=<alice>,");
    let origin = format!(" rip={}, rport={},", client.ip(), client.port());
    // One line with both: another test's client may have had the same port on another service.
    let is_login = |line: &str| line.contains(&login) && line.contains(&origin);
    mail().server.dovecot.log().wait_line(&format!("{login}{origin}"), LIMIT, is_login)
}

// TLS is the server's, all the way.

#[test]
fn starttls_on_smtp_is_the_servers_own_and_carries_a_mail() {
    let server = mail().addr("smtp");
    assert_own_certificate(server, &["-starttls", "smtp"]);
    let client =
        send_with_curl(CLIENT, &format!("smtp://{server}"), "within STARTTLS on smtp", &["--ssl-reqd"]);
    assert_sent_within_tls(client, "postfix/smtpd", "within STARTTLS on smtp");
}

#[test]
fn starttls_on_submission_is_the_servers_own_and_carries_a_mail() {
    let server = mail().addr("submission");
    assert_own_certificate(server, &["-starttls", "smtp"]);
    let client = send_with_swaks(server, "within STARTTLS on submission", &["--tls"]);
    assert_sent_within_tls(client, "postfix/submission/smtpd", "within STARTTLS on submission");
}

#[test]
fn tls_on_submissions_is_the_servers_own_and_carries_a_mail() {
    let server = mail().addr("submissions");
    assert_own_certificate(server, &[]);
    let client = send_with_swaks(server, "within TLS on submissions", &["--tls-on-connect"]);
    assert_sent_within_tls(client, "postfix/submissions/smtpd", "within TLS on submissions");
}

#[track_caller]
fn assert_sent_within_tls(client: SocketAddr, service: &str, subject: &str) {
    assert_taken_from(client, subject);
    let by = format!("TLS connection established from unknown[{}]:{}:", client.ip(), client.port());
    mail().server.postfix.log().wait_line(&format!("{service}: {by}"), LIMIT, |line| {
        line.contains(&format!(" {service}[")) && line.contains(&by)
    });
}

#[test]
fn starttls_on_imap_is_the_servers_own_and_carries_a_login() {
    assert_own_certificate(mail().addr("imap"), &["-starttls", "imap"]);
    let url = format!("imap://{}", mail().addr("imap"));
    assert_login_within_tls(&["--ssl-reqd", &url]);
}

#[test]
fn tls_on_imaps_is_the_servers_own_and_carries_a_login() {
    assert_own_certificate(mail().addr("imaps"), &[]);
    let url = format!("imaps://{}", mail().addr("imaps"));
    assert_login_within_tls(&[&url]);
}

/// curl lists the folders, having verified the certificate.
#[track_caller]
fn assert_login_within_tls(arguments: &[&str]) {
    let user = format!("alice:{PASSWORD}");
    let (folders, client) = curl_from(CLIENT, &[&["--user", &user], arguments].concat(), b"");
    let folders = String::from_utf8_lossy(&folders);
    assert!(folders.contains("INBOX"), "no list of folders: {folders}");
    let line = assert_logged_in("imap-login", client);
    assert!(line.contains(", TLS,"), "not within TLS: {line}");
}

#[test]
fn starttls_on_sieve_is_the_servers_own() {
    assert_own_certificate(mail().addr("sieve"), &["-starttls", "sieve"]);
}

/// The certificate that a client sees is the mail server's, bit for bit.
#[track_caller]
fn assert_own_certificate(server: SocketAddr, starttls: &[&str]) {
    let own = std::fs::read(&mail().certificate().cert).expect("the certificate is there");
    let mut openssl = Command::new("openssl");
    openssl.args(["s_client", "-showcerts", "-verify_return_error", "-connect", &server.to_string()]);
    openssl.arg("-CAfile").arg(&mail().certificate().cert).args(starttls);
    let seen = run(&mut openssl, b"", LIMIT).expect_success();
    assert_eq!(fingerprint(&seen.stdout), fingerprint(&own));
}

/// The fingerprint of the first certificate in a text.
#[track_caller]
fn fingerprint(text: &[u8]) -> String {
    let mut openssl = Command::new("openssl");
    openssl.args(["x509", "-noout", "-fingerprint", "-sha256"]);
    run(&mut openssl, text, LIMIT).expect_success().stdout()
}

#[test]
fn a_sieve_script_is_uploaded_within_starttls() {
    let mail = mail();
    let script =
        "require \"fileinto\";\r\nif header :contains \"subject\" \"[list]\" { fileinto \"Lists\"; }\r\n";
    let size = script.len();
    let session =
        format!("{ALICE_PLAIN}\r\nPUTSCRIPT \"lists\" {{{size}+}}\r\n{script}\r\nLISTSCRIPTS\r\nLOGOUT\r\n");
    let starttls = ["-starttls", "sieve"];
    let certificate = &mail.certificate().cert;
    let done = openssl_s_client(certificate, mail.addr("sieve"), &starttls, session.as_bytes(), LIMIT);
    let answers = done.expect_success().stdout();
    assert!(answers.lines().any(|line| line == "\"lists\""), "the script is not listed: {answers}");
    let stored = mail.server.home.path().join("alice/sieve/lists.sieve");
    assert_eq!(read_to_string(&stored), script);
}

fn read_to_string(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

// Servers that speak first, and servers that speak later.

#[test]
fn the_smtp_banner_reaches_a_silent_client() {
    LineClient::new(connect(mail().addr("smtp"))).expect("220 mail.example.test");
}

#[test]
fn the_imap_banner_reaches_a_silent_client() {
    LineClient::new(connect(mail().addr("imap"))).expect("* OK ");
}

#[test]
fn the_sieve_banner_reaches_a_silent_client() {
    let banner = LineClient::new(connect(mail().addr("sieve"))).expect_until("OK ");
    assert!(banner.contains("\"IMPLEMENTATION\" \"Dovecot"), "{banner}");
}

#[test]
fn an_imap_idle_push_arrives() {
    let mail = mail();
    let mut reader = LineClient::new(connect(mail.addr("imap")));
    // Nobody else sends to bob.
    reader.imap_login("bob", PASSWORD);
    reader.imap_idle();
    let message = "Subject: pushed\n\nHello.\n";
    let mut sender = LineClient::new(connect(mail.addr("smtp")));
    sender.send_mail("sender@example.net", &format!("bob@{DOMAIN}"), message);
    assert_eq!(reader.expect("* "), "* 1 EXISTS");
    reader.imap_done();
    assert!(reader.imap("FETCH 1 BODY[HEADER.FIELDS (SUBJECT)]").contains("Subject: pushed"));
}

#[test]
fn a_message_of_25_mb_arrives_unchanged() {
    let mail = mail();
    let body = numbered_lines(25_000_000);
    let (to, smtp) = (format!("carol@{DOMAIN}"), format!("smtp://{}", mail.addr("smtp")));
    let message = [b"Subject: large\r\n\r\n", &body[..]].concat();
    let send = ["--mail-from", "sender@example.net", "--mail-rcpt", &to, "--upload-file", "-", &smtp];
    curl_from(CLIENT, &send, &message);
    // Nobody else sends to carol. Delivery is what the wait is for; reading goes through the edge.
    mail.server.home.wait_message("carol", "Subject: large", LIMIT);
    let url = format!("imap://{}/INBOX;MAILINDEX=1;SECTION=TEXT", mail.addr("imap"));
    let (fetched, _) = curl_from(CLIENT, &["--user", &format!("carol:{PASSWORD}"), &url], b"");
    assert_eq!((fetched.len(), sha256(&fetched)), (body.len(), sha256(&body)));
}

#[track_caller]
fn sha256(bytes: &[u8]) -> String {
    run(&mut Command::new("sha256sum"), bytes, LIMIT).expect_success().stdout()
}

/// At least `size` bytes of text in which a lost or moved piece shows: numbered lines with the line
/// ends of the wire, every eleventh with a dot in front, which SMTP has to escape.
fn numbered_lines(size: usize) -> Vec<u8> {
    let mut text = String::with_capacity(size + 100);
    for number in 0.. {
        if text.len() >= size {
            break;
        }
        let dot = if number % 11 == 0 { "." } else { "" };
        text.push_str(&format!("{dot}{number:075}\r\n"));
    }
    text.into_bytes()
}
