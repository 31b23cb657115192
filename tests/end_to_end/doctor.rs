//! The doctor finds nothing wrong with what is well, and names what is not: each check is shown
//! failing, with the program itself, on a real tailnet.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::common::cert::Certificate;
use crate::common::dns::Zone;
use crate::common::edge::{Builder, Listener};
use crate::common::net::{connect, free_addr, is_listening};
use crate::common::process::Daemon;
use crate::common::stub::{self, Conn, Stub};
use crate::common::tailnet::TestTailnet;
use crate::common::tools::{self, Finished};
use crate::common::wait::{eventually, wait_for};
use crate::common::{private_dir, temp_dir};
use crate::setup::{
    AT_ONCE, EDGE, LIMIT, MAILBOX, closed_tailnet, edge_on, enrol, fails, stops, tailnet_with,
};

/// The port of the mailbox's node.
const PORT: u16 = 2525;

/// An edge that has been enrolled and is not running, its mailbox, and the way between.
struct Patient {
    tailnet: TestTailnet,
    edge: Builder,
    _state: TempDir,
}

/// One with a single listener for SMTP, and this mailbox.
fn patient(mailbox: &Stub) -> Patient {
    let tailnet = tailnet_with(&[(PORT, mailbox.addr)]);
    let state = private_dir("doctor");
    let edge = edge_on(&tailnet)
        .state_dir(state.path())
        .set("admin", "listen", &format!("\"{}\"", free_addr()))
        .set("timeouts", "connect", r#""3s""#)
        .listener(smtp("127.0.0.1:0"));
    enrol(&edge);
    Patient { tailnet, edge: edge.without_auth_key(), _state: state }
}

fn smtp(listen: &str) -> Listener {
    Listener::new("mail", "smtp", PORT).set("listen", &format!("[{listen:?}]"))
}

/// Speaks SMTP to whoever shows a header first, as a mailbox does that trusts this edge.
fn demanding(mut conn: Conn) {
    if conn.read_proxy_header().is_some() {
        speak(conn);
    }
}

/// Greets, and waits for QUIT; says nothing to what it does not understand.
fn speak(mut conn: Conn) {
    conn.send(b"220 mail.example.com ESMTP\r\n");
    let mut lines = BufReader::new(&mut conn).split(b'\n');
    // Before it may stand a header without a line end.
    if lines.any(|line| line.is_ok_and(|line| line.ends_with(b"QUIT\r"))) {
        conn.send(b"221 Bye\r\n");
    }
}

/// What the doctor said of this edge.
struct Report {
    finished: Finished,
    checks: Vec<Value>,
}

/// Runs the doctor, with its JSON. It reaches nothing beyond loopback: the outbound connection goes
/// to `mail_server`, and no DNS server answers unless one is given.
#[track_caller]
fn doctor_with(edge: &Builder, mail_server: SocketAddr, arguments: &[&str]) -> Report {
    let finished = run(edge, mail_server, &[arguments, &["--json"]].concat());
    let json: Value = serde_json::from_slice(&finished.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}\n{}", finished.stdout(), finished.stderr));
    let checks = json["checks"].as_array().expect("a list of checks").clone();
    let counted = |outcome: &str| checks.iter().filter(|check| check["outcome"] == outcome).count();
    for (field, outcome) in [("passed", "pass"), ("warned", "warn"), ("failed", "fail")] {
        assert_eq!(json[field], counted(outcome), "{json}");
    }
    let code = i32::from(counted("fail") > 0);
    assert_eq!(finished.status.and_then(|status| status.code()), Some(code), "{json}");
    Report { finished, checks }
}

fn run(edge: &Builder, mail_server: SocketAddr, arguments: &[&str]) -> Finished {
    let dir = temp_dir("doctor");
    let config = dir.path().join("config.toml");
    std::fs::write(&config, edge.config()).expect("the configuration can be written");
    let mut command = edge.program_alone();
    command.arg("doctor").arg("--config").arg(&config).arg("--smtp-check").arg(mail_server.to_string());
    if !arguments.contains(&"--dns-server") {
        command.args(["--dns-server", "127.0.0.1:1"]);
    }
    tools::run(command.args(arguments), b"", 3 * LIMIT)
}

#[track_caller]
fn doctor(edge: &Builder) -> Report {
    let mail_server = Stub::start(stub::greet("220 mx.example.com ESMTP\r\n"));
    doctor_with(edge, mail_server.addr, &[])
}

impl Report {
    fn named(&self, name: &str) -> &Value {
        let mut named = self.checks.iter().filter(|check| check["name"] == name);
        match (named.next(), named.next()) {
            (Some(one), None) => one,
            _ => panic!("not one {name}: {:#?}", self.checks),
        }
    }

    /// That check has this outcome, and says all of these.
    #[track_caller]
    fn says(&self, name: &str, outcome: &str, words: &[&str]) -> &Report {
        let check = self.named(name);
        assert_eq!(check["outcome"], outcome, "{check}");
        for word in words {
            let texts = ["finding", "remedy"].map(|field| check[field].as_str().unwrap_or_default());
            assert!(texts.iter().any(|text| text.contains(word)), "{word:?} is missing from {check}");
        }
        self
    }

    /// The names of the checks that did not pass.
    fn not_passed(&self) -> Vec<&str> {
        let bad = self.checks.iter().filter(|check| check["outcome"] != "pass");
        bad.map(|check| check["name"].as_str().expect("a name")).collect()
    }
}

#[test]
fn nothing_is_wrong_with_a_healthy_edge_whether_it_runs_or_not() {
    let mailbox = Stub::start(demanding);
    let patient = patient(&mailbox);
    let stopped = doctor(&patient.edge);
    assert_eq!(stopped.not_passed(), [""; 0], "{:#?}", stopped.checks);
    stopped
        .says("port mail 127.0.0.1:0", "pass", &["free"])
        .says("credential", "pass", &["the node has its identity"])
        .says("node", "pass", &["on the tailnet as tailwart-edge"])
        .says("tag", "pass", &["tag:reverse-proxy"])
        .says("peer stalwart", "pass", &["direct ", " ms"])
        .says("upstream mail stalwart:2525", "pass", &["accepts connections"])
        .says("greeting mail stalwart:2525", "pass", &["220 mail.example.com ESMTP"])
        .says("proxy mail stalwart:2525", "pass", &["demands it"])
        .says("outbound-25", "pass", &["220 mx.example.com"])
        .says("clock", "pass", &[patient.tailnet.control_url()])
        .says("dns", "pass", &["--domain"]);

    // It has done no harm: the same node comes up again.
    let address = free_addr();
    let listens_there = Patient { edge: with_listener(&patient, &address.to_string()), ..patient };
    let mut edge = listens_there.edge.spawn();
    edge.wait_ready(LIMIT);
    let running = doctor(&listens_there.edge);
    assert_eq!(running.not_passed(), [""; 0], "{:#?}", running.checks);
    running
        .says(&format!("port mail {address}"), "pass", &["in use by the running edge"])
        .says("state", "pass", &["in use by the running edge"])
        .says("node", "pass", &["on the tailnet as tailwart-edge"])
        .says("proxy mail stalwart:2525", "pass", &["demands it"]);
    // A port that it should listen on and does not.
    let other = free_addr();
    let changed = doctor(&with_listener(&listens_there, &other.to_string()));
    changed.says(&format!("port mail {other}"), "warn", &["free, although the edge runs", "restart"]);
    edge.signal("TERM");
    stops(&mut edge, LIMIT);
}

/// The same edge with its one listener elsewhere.
fn with_listener(patient: &Patient, listen: &str) -> Builder {
    patient.edge.clone().without_listeners().listener(smtp(listen))
}

#[test]
fn an_edge_that_was_started_in_vain_is_not_enrolled() {
    let (_tailnet, edge) = closed_tailnet();
    let state = private_dir("state");
    let edge = edge.state_dir(state.path());
    fails(edge.spawn(), 3, AT_ONCE);
    assert!(state.path().join("tailscaled.state").metadata().is_ok_and(|file| file.len() > 2));
    let report = doctor(&edge);
    report.says("credential", "fail", &["not enrolled", "set TS_AUTHKEY"]);
    report.says("tailnet", "warn", &["not enrolled"]);
}

#[test]
fn a_running_edge_looks_once_at_a_time() {
    let mailbox = Stub::start(stub::silent);
    let patient = patient(&mailbox);
    let edge = patient.edge.spawn();
    edge.wait_ready(LIMIT);
    let admin = edge.addr("admin");
    // Whichever is the first.
    let both = [ask(admin, "GET"), ask(admin, "GET")];
    let answered = wait_for(LIMIT, || (0..2).find_map(|which| Some((which, status(&both[which])?))));
    let (second, refusal) = answered.expect("one of them is refused");
    assert_eq!(refusal, "HTTP/1.1 429 Too Many Requests\r\n");
    assert_eq!(status(&both[1 - second]), None, "the first goes on looking");
    let report = doctor(&patient.edge);
    report.says("tailnet", "warn", &["another doctor run is not finished", "in a moment"]);
    let head = ask(admin, "HEAD");
    let told = wait_for(LIMIT, || status(&head));
    assert_eq!(told.as_deref(), Some("HTTP/1.1 405 Method Not Allowed\r\n"));
    // Who goes away leaves the turn to others.
    drop(both);
    assert!(eventually(LIMIT, || status(&ask(admin, "GET")).is_none()), "nobody else may look");
}

/// Has a running edge look.
fn ask(admin: SocketAddr, method: &str) -> TcpStream {
    let mut stream = connect(admin);
    let request = format!("{method} /doctor HTTP/1.1\r\nHost: {admin}\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it takes the request");
    stream
}

/// The first line of the answer; none while it looks, at a mailbox that never answers.
fn status(stream: &TcpStream) -> Option<String> {
    stream.set_read_timeout(Some(Duration::from_secs(1))).expect("the deadline is not zero");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).ok().map(|_| line)
}

#[test]
fn an_edge_that_hangs_is_noticed() {
    let mailbox = Stub::start(demanding);
    let patient = patient(&mailbox);
    let edge = patient.edge.spawn();
    edge.wait_ready(LIMIT);
    edge.pause();
    let report = doctor(&patient.edge);
    report.says("tailnet", "fail", &["does not answer on the admin address", "restart the edge if it hangs"]);
    edge.resume();
    let off = patient.edge.clone().set("admin", "listen", r#""off""#);
    doctor(&off).says("tailnet", "warn", &["admin.listen is off"]);
}

#[test]
fn a_port_of_another_program_is_named() {
    let mailbox = Stub::start(demanding);
    let patient = patient(&mailbox);
    let other = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let address = other.local_addr().expect("it is bound").to_string();
    let report = doctor(&with_listener(&patient, &address));
    let name = format!("port mail {address}");
    report.says(&name, "fail", &["in use", "another program listens there", "ss -ltnp"]);
    assert_eq!(report.not_passed(), [name]);
    let foreign = doctor(&with_listener(&patient, "192.0.2.77:2525"));
    foreign.says("port mail 192.0.2.77:2525", "fail", &["no such address"]);
}

#[test]
fn the_way_to_the_mailbox_is_told_apart() {
    let mailbox = Stub::start(demanding);
    let patient = patient(&mailbox);
    let (edge, tailnet) = (&patient.edge, &patient.tailnet);
    let upstream = "upstream mail stalwart:2525";

    tailnet.deny_port(MAILBOX, PORT);
    doctor(edge).says(upstream, "fail", &["denied: the tailnet's policy", "allow it in the policy's grants"]);
    tailnet.allow_port(MAILBOX, PORT);

    tailnet.drop_port(MAILBOX, PORT);
    // Also where connecting may take longer than a probe gives it.
    let patiently = edge.clone().set("timeouts", "connect", r#""9s""#);
    doctor(&patiently).says(upstream, "fail", &["denied or dropped", "a firewall on the peer"]);
    tailnet.pass_port(MAILBOX, PORT);

    tailnet.unforward(MAILBOX, PORT);
    doctor(edge).says(upstream, "fail", &["refused", "listens on that port"]);
    tailnet.forward(MAILBOX, PORT, mailbox.addr);

    let nobody = doctor(&edge.clone().upstream("nobody"));
    nobody.says("peer nobody", "fail", &["no peer of that name", "check the upstream's name"]);
    assert_eq!(nobody.not_passed(), ["peer nobody"]);

    tailnet.derp_only(true);
    let relayed = doctor(edge);
    relayed.says("peer stalwart", "warn", &["relayed via", "allow UDP out"]);
    relayed.says(upstream, "pass", &[]);
    tailnet.derp_only(false);

    tailnet.stop_node(MAILBOX);
    let gone = doctor(edge);
    assert_eq!(gone.named("peer stalwart")["outcome"], "fail");
    assert_eq!(gone.named(upstream)["outcome"], "fail");
}

#[test]
fn the_nodes_own_troubles_are_told() {
    let mailbox = Stub::start(demanding);
    let patient = patient(&mailbox);
    let (edge, tailnet) = (&patient.edge, &patient.tailnet);
    tailnet.set_key_expiry(EDGE, "48h");
    doctor(edge).says("key-expiry", "warn", &["expires at", "disable its expiry"]);
    tailnet.set_tags(EDGE, &["tag:other"]);
    doctor(edge).says("tag", "fail", &["does not hold tag:reverse-proxy", "admin console"]);
    tailnet.stop_control();
    let alone = doctor(edge);
    assert_eq!(alone.named("node")["outcome"], "fail", "{:#?}", alone.checks);
    alone.says("clock", "warn", &["cannot ask the control server", "cannot connect"]);
}

#[test]
fn trust_in_the_header_is_tried() {
    // Takes the header for commands, as Stalwart does.
    let distrusting = Stub::start(|mut conn: Conn| {
        conn.send(b"220 mail.example.com ESMTP\r\n500 5.5.1 Invalid command.\r\n");
        conn.read_to_end();
    });
    let patient = patient(&distrusting);
    let proxy = "proxy mail stalwart:2525";
    let own_address = "/32"; // the advice has the edge's own tailnet addresses
    doctor(&patient.edge).says(proxy, "fail", &["took the PROXY header", "trusted-networks", own_address]);

    let anybodys = Stub::start(speak);
    patient.tailnet.forward(MAILBOX, PORT, anybodys.addr);
    doctor(&patient.edge).says(proxy, "warn", &["with a PROXY header and without one"]);

    let mute = Stub::start(stub::close_after_header);
    patient.tailnet.forward(MAILBOX, PORT, mute.addr);
    doctor(&patient.edge).says(proxy, "fail", &["closed it before it sent anything"]);

    let refusing = Stub::start(|mut conn: Conn| {
        conn.read_proxy_header();
        conn.send(b"421 too busy\r\n");
    });
    patient.tailnet.forward(MAILBOX, PORT, refusing.addr);
    doctor(&patient.edge).says("greeting mail stalwart:2525", "fail", &["421 too busy"]);
}

#[test]
fn who_is_not_enrolled_is_told_how_to_be() {
    let (_tailnet, edge) = closed_tailnet();
    let state = private_dir("doctor");
    let edge = edge.state_dir(state.path());
    let without = doctor(&edge);
    without.says("credential", "fail", &["no credential to enrol with", "TS_AUTHKEY", "tag:reverse-proxy"]);
    without.says("tailnet", "warn", &["not enrolled", "tailwart-edge run"]);
    let with = doctor(&edge.clone().env("TS_AUTHKEY", "tskey-auth-good-1"));
    with.says("credential", "pass", &["the auth key from TS_AUTHKEY is there"]);
    with.says("tailnet", "warn", &["the doctor does not enrol it"]);
    let said = [with.finished.stdout(), with.finished.stderr.clone()].concat();
    assert!(!said.contains("good-1"), "the key is shown: {said}");
    // Nothing has been made but the lock that any look takes.
    let files: Vec<_> = std::fs::read_dir(state.path()).expect("it is there").flatten().collect();
    assert!(files.iter().all(|file| file.file_name() == "edge.lock"), "{files:?}");
}

#[test]
fn a_wrong_configuration_is_a_failed_check_for_each_mistake() {
    let (_tailnet, edge) = closed_tailnet();
    let edge = edge.set("tailnet", "hostnam", r#""x""#).set("limits", "max_connections", r#""many""#);
    let report = doctor(&edge);
    assert_eq!(report.not_passed(), ["config", "config"], "{:#?}", report.checks);
    let mail_server = Stub::start(stub::silent);
    let table = run(&edge, mail_server.addr, &[]);
    assert_eq!(table.status.and_then(|status| status.code()), Some(1));
    let text = table.stdout();
    for words in ["FAIL  config  ", "hostnam", "max_connections", "      ", "0 ok, 0 warned, 2 failed"] {
        assert!(text.contains(words), "{words:?} is missing from:\n{text}");
    }
    let usage = run(&edge, mail_server.addr, &["--address", "nonsense"]);
    assert_eq!(usage.status.and_then(|status| status.code()), Some(2), "{}", usage.stderr);
}

#[test]
fn the_domain_is_looked_up() {
    let (_tailnet, edge) = closed_tailnet();
    let mail_server = Stub::start(stub::greet("554 no\r\n"));
    let look = |zone: &[(&str, &str, &str)]| {
        let server = Zone::new(zone).serve();
        let dns = server.address().to_string();
        let arguments = ["--domain", "example.com", "--address", "203.0.113.7", "--dns-server", &dns];
        let edge = edge.clone().without_listeners().listener(smtp("127.0.0.1:0"));
        doctor_with(&edge, mail_server.addr, &arguments)
    };
    let good = look(&[
        ("example.com", "MX", "10 mx.example.com"),
        ("mx.example.com", "A", "203.0.113.7"),
        ("7.113.0.203.in-addr.arpa", "PTR", "mx.example.com"),
    ]);
    good.says("mx-here", "pass", &["mx.example.com is this machine"])
        .says("reverse-dns 203.0.113.7", "pass", &["mx.example.com"])
        .says("mta-sts", "pass", &["not used"])
        .says("autoconfig", "warn", &["autodiscover.example.com"])
        .says("outbound-25", "warn", &["does not greet as a mail server"]);
    let bad = look(&[
        ("example.com", "MX", "10 mx.example.com"),
        ("mx.example.com", "A", "203.0.113.8"),
        ("_mta-sts.example.com", "TXT", "v=STSv1; id=1"),
    ]);
    bad.says("mx-here", "fail", &["203.0.113.7", "--address"])
        .says("reverse-dns 203.0.113.7", "warn", &["ask the provider"])
        .says("mta-sts", "fail", &["mta-sts.example.com"]);
    let silent = look(&[("example.com", "SILENT", "")]);
    silent.says("dns-server", "fail", &["does not answer", "--dns-server"]);
    assert!(!silent.checks.iter().any(|check| check["name"] == "mx"), "{:#?}", silent.checks);
}

#[test]
fn a_certificate_on_a_tls_port_is_looked_at() {
    let plain = Stub::start(speak);
    let patient = patient(&plain);
    let submissions = Listener::new("mail", "submissions", PORT).set("listen", r#"["127.0.0.1:0"]"#);
    let edge = patient.edge.clone().without_listeners().listener(submissions);
    let (good, expired) = (temp_dir("doctor"), temp_dir("doctor"));
    let name = "certificate mail stalwart:2525";
    for (certificate, outcome, words) in [
        (Certificate::create_for(good.path(), "mail.example.com"), "pass", "mail.example.com"),
        (Certificate::create_expired_for(expired.path(), "mail.example.com"), "warn", "expired at"),
    ] {
        let (address, _terminator) = tls_in_front_of(plain.addr, &certificate);
        patient.tailnet.forward(MAILBOX, PORT, address);
        let report = doctor(&edge);
        report.says("greeting mail stalwart:2525", "pass", &["220 mail.example.com ESMTP"]);
        report.says("proxy mail stalwart:2525", "pass", &["demands it"]);
        report.says(name, outcome, &[words]);
    }
}

/// An HAProxy that demands a PROXY header, then speaks TLS.
fn tls_in_front_of(plain: SocketAddr, certificate: &Certificate) -> (SocketAddr, Daemon) {
    let address = free_addr();
    let settings = format!(
        "listen mail\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n bind {address} accept-proxy ssl crt {}\n server plain {plain}\n",
        certificate.together().display()
    );
    let config = certificate.cert.with_file_name("haproxy.cfg");
    std::fs::write(&config, settings).expect("its directory takes files");
    let daemon = Daemon::spawn("haproxy", Command::new("haproxy").arg("-db").arg("-f").arg(config));
    daemon.wait_ready(LIMIT, None, || is_listening(address));
    (address, daemon)
}
