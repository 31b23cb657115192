//! Watching over real mail servers through the edge: they do not notice, the operator does when one
//! is away, and one that does not trust the edge's header is named with what to set, to whom.

use std::net::SocketAddr;

use serde_json::Value;

use crate::common::cert::{Certificate, HOST_NAME};
use crate::common::client::LineClient;
use crate::common::dovecot::Dovecot;
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::http;
use crate::common::log::Log;
use crate::common::mail::{MailHome, MailServer};
use crate::common::net::{connect, free_addr};
use crate::common::postfix::Postfix;
use crate::common::stub::{self, Stub};
use crate::common::tools::run;
use crate::common::wait::eventually;
use crate::setup::{
    AT_ONCE, EDGE, LIMIT, Setup, hears, hears_last, metric, no_crash, start_with, stops, tells, warnings,
    without_probe,
};

const PORTS: [(&str, u16); 8] = [
    ("smtp", 25),
    ("submission", 587),
    ("submissions", 465),
    ("imap", 143),
    ("imaps", 993),
    ("pop3", 110),
    ("pop3s", 995),
    ("sieve", 4190),
];

/// What a log must not say of a probe.
const COMPLAINTS: [&str; 8] = [
    "warning",
    "error",
    "fatal",
    "panic",
    "lost connection",
    "timeout",
    "non-smtp command",
    "unknown command",
];

fn probing(edge: Builder) -> Builder {
    edge.set("probe", "interval", r#""300ms""#).set("probe", "fall", "2")
}

/// An edge with one listener for each of these ports.
fn start(forwards: &[(u16, SocketAddr)], ports: &[(&str, u16)], configure: fn(Builder) -> Builder) -> Setup {
    let listeners: Vec<Listener> =
        ports.iter().map(|(name, port)| Listener::new(name, name, *port)).collect();
    start_with(forwards, &listeners, configure)
}

fn is_up(edge: &Edge, (listener, port): (&str, u16)) -> Option<f64> {
    metric(edge, &format!("tailwart_edge_upstream_up{{listener={listener:?},upstream=\"stalwart:{port}\"}}"))
}

/// What `/status` says of a listener's mailbox.
#[track_caller]
fn status(edge: &Edge, listener: &str) -> Value {
    let answer = http::get(edge.addr("admin"), "/status");
    let status: Value =
        serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {answer:?}"));
    let mut upstreams = status["upstreams"].as_array().into_iter().flatten();
    let found = upstreams.find(|upstream| upstream["listener"] == listener);
    found.unwrap_or_else(|| panic!("there is no {listener}: {status}")).clone()
}

/// Every port of these is up, or down.
#[track_caller]
fn are(edge: &Edge, ports: &[(&str, u16)], state: f64) {
    for port in ports {
        let reached = eventually(LIMIT, || is_up(edge, *port) == Some(state));
        assert!(reached, "{port:?} is {:?}\n{}", is_up(edge, *port), edge.log().tail());
    }
}

/// How often the edge said this of a listener, as a line of this level.
fn said(edge: &Edge, level: &str, listener: &str, words: &str) -> usize {
    let listener = format!("listener={listener:?}");
    let text = edge.log().text();
    text.lines()
        .filter(|line| line.contains(words) && line.contains(level) && line.contains(&listener))
        .count()
}

#[track_caller]
fn complains_of_nothing(log: &Log) {
    let text = log.text();
    let line = text.lines().find(|line| COMPLAINTS.iter().any(|word| line.to_lowercase().contains(word)));
    assert_eq!(line, None, "the whole log:\n{text}");
}

/// When a certificate ends, as openssl reads it.
#[track_caller]
fn end_of(certificate: &Certificate) -> f64 {
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(["x509", "-noout", "-enddate", "-dateopt", "iso_8601", "-in"]).arg(&certificate.cert);
    let shown = run(&mut openssl, b"", LIMIT).expect_success().stdout();
    let end = shown.trim().strip_prefix("notAfter=").map(|end| end.replace(' ', "T"));
    let end: Option<jiff::Timestamp> = end.and_then(|end| end.parse().ok());
    end.unwrap_or_else(|| panic!("no end: {shown}")).as_second() as f64
}

/// `tailwart-edge status` of an edge whose mailbox is well.
#[track_caller]
fn shows_on_one_screen(edge: &Edge) {
    let mut status = std::process::Command::new(env!("CARGO_BIN_EXE_tailwart-edge"));
    status.args(["status", "--admin", &edge.addr("admin").to_string()]);
    let screen = run(&mut status, b"", LIMIT).expect_success().stdout();
    assert!(screen.contains(" is ready; started ") && screen.contains("no client waits"), "{screen}");
    for (listener, port) in PORTS {
        let server = format!(" stalwart:{port} ");
        let is_its = |line: &&str| line.starts_with(&format!("{listener} ")) && line.contains(&server);
        let line = screen.lines().find(is_its).unwrap_or_else(|| panic!("no {listener}:\n{screen}"));
        assert!(line.contains("  up since "), "{line}");
    }
}

#[test]
fn mail_servers_do_not_notice_the_probe_and_the_operator_notices_when_they_are_away() {
    let mail = MailServer::start();
    let setup = start(&mail.forwards(), &PORTS, probing);
    let MailServer { home, postfix, mut dovecot } = mail;
    let edge = &setup.edge;
    are(edge, &PORTS, 1.0);
    // Twenty probes of each port and more.
    let sessions = || {
        let smtp = postfix.log().count("disconnect from");
        (smtp, dovecot.log().count("-login: Info:"))
    };
    assert!(eventually(LIMIT, || sessions().0 >= 3 * 20 && sessions().1 >= 5 * 20), "{:?}", sessions());
    shows_on_one_screen(edge);
    complains_of_nothing(postfix.log());
    complains_of_nothing(dovecot.log());
    for (name, port) in PORTS {
        let expiry = metric(
            edge,
            &format!(
                "tailwart_edge_upstream_certificate_expiry_timestamp_seconds{{listener={name:?},upstream=\"stalwart:{port}\"}}"
            ),
        );
        let has_tls = ["submissions", "imaps", "pop3s"].contains(&name);
        assert_eq!(expiry, has_tls.then(|| end_of(home.certificate())), "{name}");
        let status = status(edge, name);
        let probe = &status["probe"];
        assert_eq!((&probe["state"], &probe["problem"]), (&"up".into(), &Value::Null), "{status}");
        assert!(
            probe["finding"]["greeting"].as_str().is_some_and(|greeting| !greeting.is_empty()),
            "{status}"
        );
        assert_eq!(probe["finding"]["certificate"].is_null(), !has_tls, "{status}");
        assert_eq!(said(edge, " INFO ", name, "the mailbox is up"), 1, "{}", edge.log().tail());
    }
    assert_eq!(warnings(edge), 0, "{}", edge.log().tail());

    dovecot.kill();
    let (smtp, reading) = PORTS.split_at(3);
    are(edge, reading, 0.0);
    are(edge, smtp, 1.0);
    for (name, _) in reading {
        let status = status(edge, name);
        assert_eq!(status["probe"]["state"], "down", "{status}");
        let problem = status["probe"]["problem"].as_str().unwrap_or_default();
        tells(problem, &["cannot connect", "the peer refused the connection"]);
    }
    dovecot.restart();
    are(edge, &PORTS, 1.0);
    for (name, _) in reading {
        assert_eq!(said(edge, " WARN ", name, "the mailbox is down: cannot connect"), 1);
        let again = eventually(LIMIT, || said(edge, " INFO ", name, "the mailbox is up") == 2);
        assert!(again, "{name}\n{}", edge.log().tail());
        assert_eq!(status(edge, name)["probe"]["problem"], Value::Null);
    }
    assert_eq!(edge.log().count("the mailbox is down"), reading.len(), "{}", edge.log().tail());
    complains_of_nothing(postfix.log());
    no_crash(edge.log());
}

/// The line about the edge's own addresses, in every dialect, and nobody else's.
#[track_caller]
fn names_the_edge(setup: &Setup, line: &str) {
    let nodes = setup.tailnet.nodes();
    let edge = nodes.iter().find(|node| node["name"] == EDGE).expect("it is on the tailnet");
    let networks: Vec<String> = edge["ips"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(|ip| format!("{ip}/{}", if ip.contains(':') { 128 } else { 32 }))
        .collect();
    let [v4, v6] = &networks[..] else { panic!("not two addresses: {edge}") };
    tells(
        line,
        &[
            &format!("from {v4} and {v6};"),
            &format!("server.listener.<id>.proxy.trusted-networks = [\"{v4}\", \"{v6}\"]"),
            "overrideProxyTrustedNetworks",
            "smtpd_upstream_proxy_protocol=haproxy",
            &format!("haproxy_trusted_networks = {v4} {v6}"),
        ],
    );
}

#[test]
fn a_postfix_that_takes_the_header_for_a_command_is_told_once_with_the_edges_addresses() {
    let postfix = Postfix::start_with(&MailHome::create(), "smtpd_upstream_proxy_protocol =");
    let setup = start(&[(25, postfix.smtp)], &[("smtp", 25)], without_probe);
    for _ in 0..4 {
        // What the mailbox says is passed on as it is.
        let mut client = LineClient::new(connect(setup.edge.addr("smtp")));
        client.expect("220 mail.example.test");
        client.expect("5");
        client.finish();
    }
    let line = setup.edge.wait_log("takes the PROXY header for a command", LIMIT);
    tells(&line, &[" WARN ", "listener=\"smtp\"", "upstream=stalwart:25"]);
    names_the_edge(&setup, &line);
    let told = eventually(LIMIT, || setup.edge.log().count(" connection id=") == 4);
    assert!(told, "{}", setup.edge.log().tail());
    assert_eq!(setup.edge.log().count("takes the PROXY header"), 1, "{}", setup.edge.log().tail());
}

#[test]
fn the_probe_names_a_postfix_that_takes_the_header_for_a_command() {
    let postfix = Postfix::start_with(&MailHome::create(), "smtpd_upstream_proxy_protocol =");
    let setup = start(&[(25, postfix.smtp)], &[("smtp", 25)], probing);
    let line = setup.edge.wait_log("the mailbox is down", LIMIT);
    tells(&line, &[" WARN ", "listener=\"smtp\"", "upstream=stalwart:25", "took the PROXY header for"]);
    names_the_edge(&setup, &line);
}

#[test]
fn a_dovecot_that_does_not_trust_the_edge_holds_its_clients_and_is_named() {
    let home = MailHome::create();
    let dovecot = Dovecot::start_with(&home, "haproxy_trusted_networks = 192.0.2.0/24");
    let ports = [("imap", 143), ("imaps", 993)];
    let setup = start(&[(143, dovecot.imap), (993, dovecot.imaps)], &ports, |edge| {
        probing(edge).set("timeouts", "hold", r#""2s""#)
    });
    for port @ (name, _) in ports {
        let is_warning =
            |line: &str| line.contains("the mailbox is down") && line.contains(&format!("listener={name:?}"));
        let line = setup.edge.log().wait_line(&format!("that {name} is not well"), LIMIT, is_warning);
        tells(&line, &[" WARN ", "closed it before it sent anything", "haproxy_trusted_networks"]);
        names_the_edge(&setup, &line);
        are(&setup.edge, &[port], 0.0);
        assert_eq!(status(&setup.edge, name)["probe"]["state"], "down");
    }
    let refusal = b"* BYE [UNAVAILABLE] Service not available, please try again later\r\n";
    hears_last(&mut connect(setup.edge.addr("imap")), refusal);
    let line = setup.edge.wait_log("held for the whole hold time", LIMIT);
    tells(&line, &["end=sQ", "closes the connection before it sends anything"]);
    let warning = setup.edge.wait_log("connected, but unusable", LIMIT);
    tells(&warning, &[" WARN ", "closes the connection before it sends anything", "PROXY header", "log"]);
}

#[test]
fn a_certificate_that_has_expired_is_told_once_and_measured() {
    let home = MailHome::create();
    let expired = Certificate::create_expired_for(home.path(), HOST_NAME);
    let dovecot = Dovecot::start(&home);
    let setup = start(&[(993, dovecot.imaps)], &[("imaps", 993)], probing);
    let line = setup.edge.wait_log("the mailbox's certificate has expired", LIMIT);
    tells(&line, &[" WARN ", "listener=\"imaps\"", "upstream=stalwart:993", "not_after=", "renewal"]);
    // It is well all the same: whom to trust is the clients' business.
    are(&setup.edge, &[("imaps", 993)], 1.0);
    assert!(eventually(LIMIT, || dovecot.log().count("-login: Info:") >= 5), "{}", dovecot.log().tail());
    assert_eq!(setup.edge.log().count("has expired"), 1, "{}", setup.edge.log().tail());
    let metric = metric(
        &setup.edge,
        r#"tailwart_edge_upstream_certificate_expiry_timestamp_seconds{listener="imaps",upstream="stalwart:993"}"#,
    );
    assert_eq!(metric, Some(end_of(&expired)));
}

#[test]
fn without_an_interval_nothing_is_probed() {
    let stub = Stub::start(stub::greet("220 ready\r\n"));
    let setup = start(&[(25, stub.addr)], &[("smtp", 25)], without_probe);
    hears(&mut connect(setup.edge.addr("smtp")), b"220 ready\r\n");
    assert_eq!(stub.accepted(), 1);
    assert_eq!(
        (is_up(&setup.edge, ("smtp", 25)), &status(&setup.edge, "smtp")["probe"]["state"]),
        (None, &"unprobed".into())
    );
}

#[test]
fn an_edge_that_stops_does_not_wait_for_its_probes() {
    let stuck = Stub::start(stub::silent);
    let to = [(25, stuck.addr), (587, free_addr()), (465, stuck.addr)];
    let mut setup = start(&to, &PORTS[..3], probing);
    stuck.wait_record(1, LIMIT, |_| true);
    setup.edge.signal("TERM");
    stops(&mut setup.edge, AT_ONCE);
}
