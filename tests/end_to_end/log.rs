//! The log: what a line says, which lines there are, and that neither a storm of clients nor a reader
//! that hangs makes it a burden.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;

use crate::common::client::LineClient;
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::log::Log;
use crate::common::net::{client_from, connect, echoes, free_addr, hears_itself, reset};
use crate::common::sink::{Taken, takes_mail_after};
use crate::common::stub::{self, Stub};
use crate::common::tools::run;
use crate::common::wait::eventually;
use crate::common::{http, private_dir};
use crate::setup::{
    LIMIT, MAILBOX, Setup, edge_on, hears_last, holds, metric, no_crash, start_with, stops, tailnet_with,
    tcp, tells, warnings,
};

/// How long the mailbox below thinks before it greets.
const THINKS: Duration = Duration::from_millis(400);

fn log(edge: Builder, key: &str, value: &str) -> Builder {
    edge.set("log", key, value)
}

/// Every line as the object that it must be.
#[track_caller]
fn objects(log: &Log) -> Vec<Value> {
    let parse = |line: &String| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    log.lines().iter().map(parse).collect()
}

/// The object about the connection of a client.
#[track_caller]
fn connection(edge: &Edge, client: SocketAddr) -> Value {
    let address = client.to_string();
    let is_its = |line: &str| line.contains(r#""message":"connection""#) && line.contains(&address);
    edge.log().wait_line("the end of the connection", LIMIT, is_its);
    let of_client = |line: &Value| line["message"] == "connection" && line["client"] == client.to_string();
    let found: Vec<Value> = objects(edge.log()).into_iter().filter(of_client).collect();
    assert_eq!(found.len(), 1, "{found:?}\n{}", edge.log().tail());
    found[0].clone()
}

fn address(client: &TcpStream) -> SocketAddr {
    client.local_addr().expect("it is connected")
}

#[test]
fn as_json_every_line_of_a_whole_life_is_an_object_and_connections_are_told_as_they_were() {
    let taken = Taken::default();
    let mailbox = Stub::start(takes_mail_after(THINKS, "mailbox", &taken));
    let state = private_dir("json-log");
    let tailnet = tailnet_with(&[(25, mailbox.addr)]);
    let builder = edge_on(&tailnet)
        .listener(Listener::new("smtp", "smtp", 25))
        .listener(Listener::new("gone", "smtp", 26).set("hold", r#""1s""#))
        .state_dir(state.path())
        .set("log", "format", r#""json""#)
        .set("log", "level", r#""debug""#);
    let mut edge = builder.spawn();
    edge.wait_ready(LIMIT);
    // A first connection, which finds the path to the mailbox's node.
    let first = connect(edge.addr("smtp"));
    let latency = r#"tailwart_edge_upstream_latency_seconds{upstream="stalwart"}"#;
    assert!(eventually(LIMIT, || metric(&edge, latency).is_some()), "{}", edge.log().tail());
    drop(first);
    let stream = connect(edge.addr("smtp"));
    let (client, came) = (address(&stream), Instant::now());
    let mut session = LineClient::new(stream);
    session.send_mail("a@example.net", "b@example.org", "Subject: \"quoted\"\n\nhello\n");
    assert_eq!(session.line(), None);
    drop(session);
    let lasted = came.elapsed();
    has_what_happened(&connection(&edge, client), client, lasted);

    let mut refused = connect(edge.addr("gone"));
    let client = address(&refused);
    refused.read_to_end(&mut Vec::new()).expect("an orderly end");
    let line = connection(&edge, client);
    assert_eq!(line["end"], "sQ", "{line}");
    assert_eq!(line["upstream"], "stalwart:26", "{line}");
    assert_eq!((&line["sent"], &line["received"]), (&0.into(), &0.into()), "{line}");
    for absent in ["connect_ms", "first_byte_ms", "path", "repeats"] {
        assert!(line.get(absent).is_none(), "{absent}: {line}");
    }
    edge.replace_config(&builder.clone().set("log", "repeats", "5").config());
    edge.signal("HUP");
    edge.wait_log("configuration reloaded", LIMIT);
    edge.signal("TERM");
    assert_eq!(edge.wait_exit(LIMIT).code(), Some(0), "{}", edge.log().tail());
    is_well_formed(&objects(edge.log()));
}

/// A whole session of one message, whose mailbox thought for a while.
#[track_caller]
fn has_what_happened(line: &Value, client: SocketAddr, lasted: Duration) {
    let sent = "EHLO client.example.net\r\nMAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n\
        Subject: \"quoted\"\r\n\r\nhello\r\n.\r\nQUIT\r\n";
    let received = "220 mailbox\r\n250 2.0.0 ok\r\n250 2.0.0 ok\r\n250 2.0.0 ok\r\n354 go on\r\n\
        250 2.0.0 taken\r\n221 2.0.0 bye\r\n";
    let expected = serde_json::json!({
        "level": "INFO", "message": "connection", "id": 2, "listener": "smtp", "client": client.to_string(),
        "upstream": "stalwart:25", "sent": sent.len(), "received": received.len(),
        "end": "S-", "why": "upstream closed",
    });
    for (key, value) in expected.as_object().expect("an object") {
        assert_eq!(&line[key], value, "{key}: {line}");
    }
    let path = line["path"].as_str().unwrap_or_default();
    assert!(path.starts_with("direct ") || path.starts_with("relay "), "{line}");
    let millis = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("no {key}: {line}"));
    let [connect, first_byte, total] = ["connect_ms", "first_byte_ms", "total_ms"].map(millis);
    let thinks = THINKS.as_secs_f64() * 1e3;
    assert!(0.0 < connect && connect < first_byte && first_byte <= total, "{line}");
    assert!(first_byte >= thinks, "{line}");
    assert!(total <= lasted.as_secs_f64() * 1e3 + 1e3, "{line}, {lasted:?}");
}

/// Each has a time that does not run backwards, a level and a message, and the life is whole.
#[track_caller]
fn is_well_formed(lines: &[Value]) {
    let mut last = Timestamp::UNIX_EPOCH;
    for line in lines {
        let time: Timestamp =
            line["timestamp"].as_str().and_then(|time| time.parse().ok()).unwrap_or_else(|| panic!("{line}"));
        // Lines of two threads may change places.
        assert!(time.duration_since(last).as_secs_f64() > -1.0, "{line}");
        last = time;
        let level = line["level"].as_str().unwrap_or_default();
        assert!(["DEBUG", "INFO", "WARN", "ERROR"].contains(&level), "{line}");
        assert!(line["message"].is_string(), "{line}");
    }
    for message in ["listening", "ready", "connection", "configuration reloaded", "stopping"] {
        assert!(lines.iter().any(|line| line["message"] == message), "{message} is missing: {lines:#?}");
    }
}

/// An edge that says nothing of its ports, found at addresses that were chosen for it.
fn quiet_edge(configure: impl FnOnce(Builder) -> Builder) -> (Setup, SocketAddr, SocketAddr, Stub) {
    let stub = Stub::start(stub::echo_after_header);
    let tailnet = tailnet_with(&[(2525, stub.addr)]);
    let (mail, admin) = (free_addr(), free_addr());
    let edge = edge_on(&tailnet).listener(tcp("mail").set("listen", &format!("[\"{mail}\"]"))).set(
        "admin",
        "listen",
        &format!("\"{admin}\""),
    );
    let edge = configure(edge).spawn();
    let is_ready = || TcpStream::connect(admin).is_ok() && http::get(admin, "/readyz").code == 200;
    assert!(eventually(LIMIT, is_ready), "{}", edge.log().tail());
    (Setup { edge, tailnet }, mail, admin, stub)
}

/// The whole life of such an edge with one connection, as it was told.
fn life(configure: impl FnOnce(Builder) -> Builder) -> String {
    let (mut setup, mail, admin, _stub) = quiet_edge(configure);
    drop(echoes(mail));
    let counted = r#"tailwart_edge_connections_total{end="C-",listener="mail"} 1"#;
    assert!(eventually(LIMIT, || http::get(admin, "/metrics").body.contains(counted)));
    setup.edge.signal("TERM");
    stops(&mut setup.edge, LIMIT);
    setup.edge.log().text()
}

#[test]
fn the_level_decides_what_is_told_and_rust_log_goes_before_it() {
    let level = |level: &'static str| move |edge| log(edge, "level", level);
    let warn = life(level(r#""warn""#));
    assert!(!warn.contains(" INFO ") && !warn.contains(" DEBUG "), "{warn}");
    let info = life(level(r#""info""#));
    assert!(info.contains(" end=C- ") && !info.contains(" DEBUG "), "{info}");
    let debug = life(level(r#""debug""#));
    // Only Tailscale speaks of this.
    assert!(debug.contains(" DEBUG ") && debug.contains("magicsock"), "{debug}");
    assert!(!info.contains("magicsock"), "{info}");

    let more = life(|edge| log(edge, "level", r#""error""#).env("RUST_LOG", "info"));
    assert!(more.contains(" end=C- "), "{more}");
    let less = life(|edge| log(edge, "level", r#""debug""#).env("RUST_LOG", "error"));
    assert_eq!(less, "");
    let only = life(|edge| edge.env("RUST_LOG", "off,tailscale=debug"));
    assert!(only.contains("magicsock") && only.lines().all(|line| line.contains(" DEBUG ")), "{only}");
    let mistyped = life(|edge| log(edge, "level", r#""info""#).env("RUST_LOG", "verbose"));
    assert!(mistyped.contains(" end=C- ") && !mistyped.contains(" DEBUG "), "{mistyped}");
    for text in [warn, info, debug, more, only, mistyped] {
        assert!(!text.contains('\x1b'), "no terminal, no colours: {text:?}");
    }
}

/// A client's connections, each as far as the mailbox.
#[track_caller]
fn relayed(edge: &Edge, source: &str, count: usize) -> Vec<TcpStream> {
    let name = r#"tailwart_edge_open_connections{listener="mail",stage="relaying"}"#;
    assert!(eventually(LIMIT, || metric(edge, name) == Some(0.0)), "{:?} are left", metric(edge, name));
    let clients: Vec<TcpStream> = (0..count).map(|_| client_from(source, edge.addr("mail"))).collect();
    let there = eventually(LIMIT, || metric(edge, name) == Some(count as f64));
    assert!(there, "{:?} of {count}\n{}", metric(edge, name), edge.log().tail());
    clients
}

/// How many connections have ended so.
fn ended(edge: &Edge, end: &str) -> f64 {
    metric(edge, &format!("tailwart_edge_connections_total{{end={end:?},listener=\"mail\"}}")).unwrap_or(0.0)
}

#[test]
fn a_storm_of_one_client_is_a_few_lines_and_a_count_and_hides_nobody() {
    const STORM: usize = 200;
    let mailbox = Stub::start(stub::record);
    let mut setup = start_with(&[(2525, mailbox.addr)], &[tcp("mail")], |edge| {
        log(edge, "repeats", "10").set("limits", "max_connections_per_client", "0")
    });
    let edge = &setup.edge;
    relayed(edge, "127.0.0.7", STORM).into_iter().for_each(reset);
    assert!(eventually(LIMIT, || ended(edge, "CH") == STORM as f64), "{}", ended(edge, "CH"));
    relayed(edge, "127.0.0.8", 3).into_iter().for_each(reset);
    // Sessions of the same client, which look the same but for what they have said.
    for mut client in relayed(edge, "127.0.0.7", 15) {
        client.write_all(b"hello").expect("it is connected");
        let header = crate::setup::header_of(&client);
        mailbox.wait_client(&header, LIMIT, |record| record.bytes.ends_with(b"hello"));
        reset(client);
    }
    assert!(eventually(LIMIT, || ended(edge, "CH") == (STORM + 3 + 15) as f64), "{}", ended(edge, "CH"));
    setup.edge.signal("TERM");
    stops(&mut setup.edge, LIMIT);

    let text = setup.edge.log().text();
    let lines = |source: &str, what: &str| {
        let of = |line: &&str| line.contains(source) && line.contains(what);
        text.lines().filter(of).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(lines("client=127.0.0.7:", " sent=0 ").len(), 10);
    assert_eq!(lines("client=127.0.0.7:", " sent=5 ").len(), 15);
    assert_eq!(lines("client=127.0.0.8:", " end=CH ").len(), 3);
    let rest = lines("client=127.0.0.7 ", "similar connections not logged");
    assert_eq!(rest.len(), 1, "{text}");
    tells(&rest[0], &[" INFO ", "listener=\"mail\"", "end=CH", "repeats=190"]);
}

#[test]
fn an_outage_is_one_warning_with_a_remedy_and_each_client_a_line() {
    const CLIENTS: usize = 8;
    let listener = Listener::new("mail", "smtp", 2525).set("hold", r#""3s""#);
    let Setup { edge, tailnet: _tailnet } = start_with(&[], &[listener], |edge| edge);
    let mut clients: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(edge.addr("mail"))).collect();
    let addresses: Vec<SocketAddr> = clients.iter().map(address).collect();
    for client in &mut clients {
        client.read_to_end(&mut Vec::new()).expect("an orderly end");
    }
    for client in addresses {
        let line = edge.wait_log(&format!("client={client}"), LIMIT);
        tells(
            &line,
            &[" INFO ", " end=sQ ", "why=\"held for the whole hold time: cannot reach stalwart:2525"],
        );
    }
    assert_eq!(warnings(&edge), 1, "{}", edge.log().tail());
    let warning = edge.wait_log("cannot be reached", LIMIT);
    tells(
        &warning,
        &[" WARN ", "upstream=stalwart:2525", "the peer refused", "check that the mail server runs"],
    );
}

#[test]
fn an_upstream_that_comes_and_goes_is_told_a_few_times_and_then_counted() {
    const FLAPS: usize = 12;
    let mailbox = Stub::start(stub::greet("220 ready\r\n"));
    let listener = Listener::new("mail", "smtp", 2525);
    let Setup { edge, tailnet } = start_with(&[(2525, mailbox.addr)], &[listener], |edge| edge);
    for _ in 0..FLAPS {
        tailnet.unforward(MAILBOX, 2525);
        let mut client = connect(edge.addr("mail"));
        holds(&edge, 1);
        tailnet.forward(MAILBOX, 2525, mailbox.addr);
        crate::setup::hears(&mut client, b"220 ready\r\n");
        client.shutdown(Shutdown::Write).expect("it is connected");
        hears_last(&mut client, b"");
    }
    let all = eventually(LIMIT, || edge.log().count(" connection id=") == FLAPS);
    assert!(all, "sessions are told all\n{}", edge.log().tail());
    let warnings = edge.log().count("cannot be reached");
    assert_eq!(warnings, 3, "{}", edge.log().tail());
    // What was told has its end, and what was not has none.
    assert_eq!(edge.log().count("reached again"), 3, "{}", edge.log().tail());
    no_crash(edge.log());
}

#[test]
fn a_reader_that_hangs_stops_no_mail_and_what_it_misses_is_counted() {
    // More than the queue and the pipe hold together.
    const LINES: usize = 45_000;
    const AT_ONCE: usize = 20;
    let mailbox = Stub::start(stub::echo_after_header);
    let tailnet = tailnet_with(&[(2525, mailbox.addr)]);
    let (mail, admin) = (free_addr(), free_addr());
    let dir = private_dir("log");
    let pipe = dir.path().join("pipe");
    run(Command::new("mkfifo").arg(&pipe), b"", LIMIT).expect_success();
    let into_pipe = format!("exec \"$@\" 2>{}", pipe.display());
    let edge = edge_on(&tailnet)
        .listener(tcp("mail").set("listen", &format!("[\"{mail}\"]")))
        .set("admin", "listen", &format!("\"{admin}\""))
        .set("limits", "max_connections_per_client", "0")
        .set("log", "level", r#""debug""#)
        .wrapped(&["sh", "-c", &into_pipe, "sh"])
        .spawn();
    // Opened, or the shell would wait, and not read.
    let reader = File::open(&pipe).expect("it is there");
    let lost = || {
        let metrics = http::get(admin, "/metrics").body;
        let value = metrics.lines().find_map(|line| line.strip_prefix("tailwart_edge_log_lines_lost_total "));
        value.and_then(|value| value.parse::<f64>().ok()).expect("it is measured")
    };
    let is_ready = || TcpStream::connect(admin).is_ok() && http::get(admin, "/readyz").code == 200;
    assert!(eventually(LIMIT, is_ready), "it is not ready");
    assert_eq!(lost(), 0.0);
    // Each request that cannot be understood is a line at this level.
    let nonsense = || {
        for _ in 0..LINES / AT_ONCE {
            let mut stream = connect(admin);
            let _ = stream.write_all(b"nonsense\r\n\r\n").and_then(|()| stream.read_to_end(&mut Vec::new()));
        }
    };
    std::thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(nonsense))));
    assert!(eventually(LIMIT, || lost() > 0.0), "nothing was lost");
    let came = Instant::now();
    let mut client = echoes(mail);
    assert!(came.elapsed() < crate::setup::AT_ONCE, "mail waited for {:?}", came.elapsed());

    // It wakes up, and gets what was kept, and what comes.
    let log = Log::memory("the edge's standard error");
    let reading = log.collect(reader);
    hears_itself(&mut client);
    let address = address(&client);
    drop(client);
    log.wait(&format!("client={address}"), LIMIT);
    edge.signal("TERM");
    reading.join().expect("it does not panic");
    log.wait(" stopped: ", LIMIT);
    let told = log.text().lines().count();
    assert!(told > 8192, "only {told} lines were kept");
    no_crash(&log);
}
