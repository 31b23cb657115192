//! More than one mailbox node: the first that is well is used, what was half said is said to nobody
//! else, and a node that vanishes takes only its own connections along, and those in time.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::client::LineClient;
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::net::{connect, free_addr};
use crate::common::sink::{Taken, takes_mail, takes_mail_while};
use crate::common::stub::{self, Conn, Stub};
use crate::common::wait::eventually;
use crate::setup::{
    AT_ONCE, LIMIT, MAILBOX, Setup, edge_on, hears, holds, metric, no_crash, tailnet_with, tells,
    without_probe,
};

/// The second mailbox node.
const SECOND: &str = "stalwart-b";

const FIRST_GREETING: &[u8] = b"220 first\r\n";
const SECOND_GREETING: &[u8] = b"220 second\r\n";

fn smtp(name: &str) -> Listener {
    Listener::new(name, "smtp", 25)
}

/// An edge with two mailbox nodes, the first of which is [`MAILBOX`].
fn two_nodes(
    first: SocketAddr,
    second: SocketAddr,
    listeners: &[Listener],
    configure: impl FnOnce(Builder) -> Builder,
) -> Setup {
    let tailnet = tailnet_with(&[(25, first)]);
    tailnet.add_node(SECOND, &["tag:stalwart"], &[(25, second)]);
    let edge = edge_on(&tailnet).set("upstream", "host", &format!("[{MAILBOX:?}, {SECOND:?}]"));
    let edge = configure(listeners.iter().cloned().fold(edge, Builder::listener)).spawn();
    edge.wait_ready(LIMIT);
    Setup { edge, tailnet }
}

/// A new client is greeted so.
#[track_caller]
fn is_greeted(edge: &Edge, listener: &str, greeting: &[u8]) -> TcpStream {
    let mut client = connect(edge.addr(listener));
    hears(&mut client, greeting);
    client
}

#[test]
fn the_first_node_that_can_be_reached_is_used_and_clients_are_held_when_none_can() {
    let (first, second) = (free_addr(), free_addr());
    let other_way = smtp("other-way").set("upstream", &format!("[{SECOND:?}, {MAILBOX:?}]"));
    let setup = two_nodes(first, second, &[smtp("smtp"), other_way], without_probe);
    let edge = &setup.edge;
    let start_first = || Stub::start_at(first, stub::greet("220 first\r\n"));
    let start_second = || Stub::start_at(second, stub::greet("220 second\r\n"));

    let mut waiting = [connect(edge.addr("smtp")), connect(edge.addr("other-way"))];
    holds(edge, 2);
    let line = edge.wait_log("cannot be reached", LIMIT);
    tells(&line, &["stalwart:25: the peer refused", "stalwart-b:25: the peer refused"]);
    let second_up = start_second();
    waiting.iter_mut().for_each(|client| hears(client, SECOND_GREETING));
    is_greeted(edge, "smtp", SECOND_GREETING);
    let first_up = start_first();
    is_greeted(edge, "smtp", FIRST_GREETING);
    is_greeted(edge, "other-way", SECOND_GREETING);
    drop(second_up);
    is_greeted(edge, "other-way", FIRST_GREETING);
    drop(first_up);
    let mut waiting = connect(edge.addr("smtp"));
    holds(edge, 1);
    let _first_up = start_first();
    hears(&mut waiting, FIRST_GREETING);
    holds(edge, 0);
    no_crash(edge.log());
}

#[test]
fn a_node_whose_probe_fails_is_passed_over_until_it_passes() {
    let well = Arc::new(AtomicBool::new(true));
    let first = Stub::start(takes_mail_while(&well, "first"));
    let second = Stub::start(takes_mail("second", &Taken::default()));
    let setup = two_nodes(first.addr, second.addr, &[smtp("smtp")], |edge| {
        edge.set("probe", "interval", r#""200ms""#).set("probe", "fall", "2")
    });
    let edge = &setup.edge;
    let probed = |state: f64| {
        let name = r#"tailwart_edge_upstream_up{listener="smtp",upstream="stalwart:25"}"#;
        let reached = eventually(LIMIT, || metric(edge, name) == Some(state));
        assert!(reached, "{:?}, not {state}\n{}", metric(edge, name), edge.log().tail());
    };
    probed(1.0);
    is_greeted(edge, "smtp", FIRST_GREETING);
    for _ in 0..2 {
        // It can be reached all the time: only its probe tells.
        well.store(false, Ordering::SeqCst);
        probed(0.0);
        for _ in 0..5 {
            is_greeted(edge, "smtp", SECOND_GREETING);
        }
        well.store(true, Ordering::SeqCst);
        probed(1.0);
        is_greeted(edge, "smtp", FIRST_GREETING);
    }
    assert_eq!(edge.log().count("the mailbox is down"), 2, "{}", edge.log().tail());
    no_crash(edge.log());
}

#[test]
fn a_node_whose_probe_fails_is_still_tried_when_it_is_the_only_one_left() {
    let well = Arc::new(AtomicBool::new(true));
    let (first, second) = (Stub::start(takes_mail_while(&well, "first")), free_addr());
    let setup = two_nodes(first.addr, second, &[smtp("smtp")], |edge| {
        edge.set("probe", "interval", r#""200ms""#).set("probe", "fall", "1")
    });
    well.store(false, Ordering::SeqCst);
    let is_first = |line: &str| line.contains("the mailbox is down") && line.contains("upstream=stalwart:25");
    setup.edge.log().wait_line("that the first is down", LIMIT, is_first);
    is_greeted(&setup.edge, "smtp", b"421 4.3.2 too busy\r\n");
}

#[test]
fn a_node_that_closes_without_a_word_is_passed_over() {
    for interval in ["30s", "0s"] {
        let first = Stub::start(stub::close_after_header);
        let second = Stub::start(takes_mail("second", &Taken::default()));
        let setup = two_nodes(first.addr, second.addr, &[smtp("smtp")], |edge| {
            edge.set("probe", "interval", &format!("{interval:?}")).set("timeouts", "hold", r#""15s""#)
        });
        let came = Instant::now();
        is_greeted(&setup.edge, "smtp", SECOND_GREETING);
        eprintln!("interval {interval}: passed over after {:?}", came.elapsed());
    }
}

/// Takes mail up to the middle of a message, and dies.
fn dies_in_the_middle(mut conn: Conn) {
    let mut chunk = [0; 4096];
    let mut heard = Vec::new();
    conn.read_proxy_header();
    conn.send(b"220 first\r\n");
    loop {
        match conn.read(&mut chunk) {
            Ok(count @ 1..) => heard.extend_from_slice(&chunk[..count]),
            _ => return,
        }
        if heard.windows(6).any(|words| words == b"middle") {
            return conn.reset();
        }
        let answer: &[u8] = if heard.ends_with(b"DATA\r\n") { b"354 go on\r\n" } else { b"250 ok\r\n" };
        conn.send(answer);
    }
}

#[test]
fn a_session_that_was_begun_is_not_repeated_on_another_node() {
    let first = Stub::start(dies_in_the_middle);
    let taken = Taken::default();
    let second = Stub::start(takes_mail("second", &taken));
    let setup = two_nodes(first.addr, second.addr, &[smtp("smtp")], without_probe);
    let mut client = LineClient::new(connect(setup.edge.addr("smtp")));
    client.expect("220 first");
    client.ask("EHLO client.example.net", "250");
    client.ask("MAIL FROM:<sender@example.net>", "250");
    client.ask("RCPT TO:<alice@example.test>", "250");
    client.ask("DATA", "354");
    client.send("Subject: half\r\n\r\nin the middle");
    let (rest, end) = client.read_to_end();
    assert_eq!((rest, end.map_err(|error| error.kind())), (Vec::new(), Err(ErrorKind::ConnectionReset)));
    let line = setup.edge.wait_log("why=\"upstream failed", LIMIT);
    tells(&line, &["upstream=stalwart:25"]);
    assert_eq!((first.accepted(), second.accepted(), taken.count()), (1, 0, 0));
    // The second one would have been used.
    drop(first);
    is_greeted(&setup.edge, "smtp", SECOND_GREETING);
}

#[test]
fn connections_to_a_node_that_vanishes_are_closed_in_time_and_no_others() {
    const DEAD_PEER: Duration = Duration::from_secs(15);
    const IDLE: usize = 3;
    let greeting = "* OK ready\r\n";
    let (first, second) = (Stub::start(stub::greet(greeting)), Stub::start(stub::greet(greeting)));
    let imap = |name: &str, host: &str| Listener::new(name, "imap", 25).set("upstream", &format!("{host:?}"));
    let listeners = [imap("imap", MAILBOX), imap("imap-b", SECOND)];
    let setup = two_nodes(first.addr, second.addr, &listeners, |edge| {
        without_probe(edge).set("timeouts", "dead_peer", r#""15s""#)
    });
    let edge = &setup.edge;
    let idle = |listener: &str| [(); IDLE].map(|()| is_greeted(edge, listener, greeting.as_bytes()));
    let (dead, live) = (idle("imap"), idle("imap-b"));

    setup.tailnet.isolate_node(MAILBOX);
    let gone = Instant::now();
    for mut client in dead {
        // Neither an answer nor silence for ever.
        let end = client.read(&mut [0]).map_err(|error| error.kind());
        assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{end:?}");
    }
    let after = gone.elapsed();
    eprintln!("the connections of a dead node were closed after {after:?}");
    assert!((DEAD_PEER / 2..DEAD_PEER + AT_ONCE).contains(&after), "after {after:?}");
    let line = edge.wait_log("has not answered for", LIMIT);
    tells(
        &line,
        &[" WARN ", "upstream=\"stalwart\"", "connections=3", "has not answered for 15s", "closing"],
    );
    let ended =
        eventually(LIMIT, || edge.log().count("end=DD why=\"the mailbox's node no longer answers\"") == IDLE);
    assert!(ended, "{}", edge.log().tail());

    // Those to the live one have been as idle, and for longer.
    live[0].set_read_timeout(Some(DEAD_PEER / 3)).expect("the deadline is not zero");
    let nothing = (&live[0]).read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(nothing, Err(ErrorKind::WouldBlock));
    assert_eq!(edge.log().count("has not answered for"), 1, "{}", edge.log().tail());
    setup.tailnet.rejoin_node(MAILBOX);
    is_greeted(edge, "imap", greeting.as_bytes());
    no_crash(edge.log());
}
