//! The admin listener: what peers of the tailnet are told and who of them, that nobody can keep others
//! from being answered, and that it says "ready" exactly while the mailbox can be reached.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::common::edge::{Builder, Edge, Listener};
use crate::common::net::{connect, free_addr};
use crate::common::stub::{self, Conn, Stub};
use crate::common::tailnet::TestTailnet;
use crate::common::wait::{eventually, wait_for};
use crate::common::{http, private_dir};
use crate::setup::{
    AT_ONCE, EDGE, LIMIT, MAILBOX, Setup, becomes, edge_on, hears, metric, no_crash, node, start_with, stops,
    tailnet_with, tcp, without_probe,
};

/// The port on the tailnet.
const PORT: u16 = 9464;

/// The peer that looks at the edge.
const PROMETHEUS: &str = "prometheus";

const HALF_A_REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX-Slow: ";

/// An edge with a port on the tailnet, and a peer.
fn tailnet_with_peer(configure: impl FnOnce(Builder) -> Builder) -> (TestTailnet, Edge) {
    let tailnet = tailnet_with(&[]);
    tailnet.add_node(PROMETHEUS, &["tag:prometheus"], &[]);
    let edge = edge_on(&tailnet).listener(tcp("mail")).set("admin", "tailnet_port", &PORT.to_string());
    let edge = configure(edge).spawn();
    edge.wait_ready(LIMIT);
    (tailnet, edge)
}

/// Where the peer finds the edge's admin port, for each address of the edge.
fn seen_by_peer(tailnet: &TestTailnet) -> Vec<SocketAddr> {
    let node = node(tailnet);
    let ips = node["ips"].as_array().into_iter().flatten().filter_map(|ip| ip.as_str()?.parse().ok());
    let ips: Vec<IpAddr> = ips.collect();
    assert_eq!(ips.len(), 2, "{node}");
    ips.iter().map(|ip| tailnet.reach(PROMETHEUS, SocketAddr::new(*ip, PORT))).collect()
}

/// What is answered to a GET before the connection ends or the time is over.
fn try_get(server: SocketAddr, path: &str, limit: Duration) -> String {
    let mut stream = connect(server);
    stream.set_read_timeout(Some(limit)).expect("the deadline is not zero");
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut text = String::new();
    // Whatever ends it early, there is no answer then.
    let _ = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(&mut text));
    text
}

/// Waits until a peer is answered there, on a way that may have to be found first.
#[track_caller]
fn answers_peer(server: SocketAddr, edge: &Edge) {
    let answered =
        eventually(LIMIT, || try_get(server, "/livez", Duration::from_secs(5)).starts_with("HTTP/1.1 200"));
    assert!(answered, "{}", edge.log().tail());
}

#[test]
fn a_peer_is_told_as_much_as_the_policy_lets_it() {
    let (tailnet, mut edge) = tailnet_with_peer(|edge| edge.set("admin", "listen", r#""off""#));
    let addresses = seen_by_peer(&tailnet);
    for address in &addresses {
        answers_peer(*address, &edge);
        let ready =
            wait_for(LIMIT, || Some(http::get(*address, "/readyz")).filter(|ready| ready.code == 200));
        assert!(ready.is_some_and(|ready| ready.body.contains(r#""ready":true"#)), "{}", edge.log().tail());
        let metrics = http::get(*address, "/metrics");
        assert!(metrics.body.contains("\ntailwart_edge_node_running 1\n"), "{metrics:?}");
        let doctor = http::get(*address, "/doctor");
        assert!(doctor.code == 403 && doctor.body.contains("at admin.listen"), "{doctor:?}");
    }
    let address = addresses[0];
    tailnet.deny_port(EDGE, PORT);
    // The edge hears of it a moment later.
    let denied = eventually(LIMIT, || try_get(address, "/readyz", Duration::from_secs(3)).is_empty());
    assert!(denied, "{}", edge.log().tail());
    tailnet.allow_port(EDGE, PORT);
    answers_peer(address, &edge);
    assert_eq!(edge.log().count("listening listener=admin"), 0, "{}", edge.log().tail());
    edge.signal("TERM");
    stops(&mut edge, LIMIT);
}

#[test]
fn the_port_on_the_tailnet_outlives_the_place_there_and_a_restart() {
    let state = private_dir("admin-state");
    let (tailnet, mut edge) = tailnet_with_peer(|edge| edge.state_dir(state.path()));
    let before = node(&tailnet)["ips"].clone();
    tailnet.remove_node(EDGE);
    edge.wait_log("on the tailnet again", LIMIT);
    assert_ne!(node(&tailnet)["ips"], before);
    answers_peer(seen_by_peer(&tailnet)[0], &edge);
    edge.signal("TERM");
    assert_eq!(edge.wait_exit(LIMIT).code(), Some(0), "{}", edge.log().tail());

    let again = edge_on(&tailnet).without_auth_key().listener(tcp("mail")).state_dir(state.path());
    let again = again.set("admin", "tailnet_port", &PORT.to_string()).spawn();
    again.wait_ready(LIMIT);
    answers_peer(seen_by_peer(&tailnet)[0], &again);
    no_crash(again.log());
}

/// So many connections that send half a request and nothing more.
fn half_requests(server: SocketAddr, count: usize) -> Vec<TcpStream> {
    let half = |_| {
        let mut stream = connect(server);
        stream.write_all(HALF_A_REQUEST).expect("the kernel takes it");
        stream
    };
    (0..count).map(half).collect()
}

#[test]
fn half_requests_of_peers_take_no_place_of_this_machine() {
    let (tailnet, edge) = tailnet_with_peer(|edge| edge);
    let peer = seen_by_peer(&tailnet)[0];
    answers_peer(peer, &edge);
    let slow = half_requests(peer, 150);
    for _ in 0..20 {
        assert_eq!(http::get(edge.addr("admin"), "/livez").code, 200);
    }
    answers_peer(peer, &edge);
    drop(slow);
    no_crash(edge.log());
}

#[test]
fn a_peer_that_does_not_take_its_answer_leaves_nothing_with_the_stack() {
    /// What is left of a connection that was only closed stays for a minute, or for as long as the peer.
    const SOONER: Duration = Duration::from_secs(30);
    let (tailnet, edge) = tailnet_with_peer(|edge| edge);
    let peer = seen_by_peer(&tailnet)[0];
    answers_peer(peer, &edge);
    let endpoints = || metric(&edge, "tailwart_edge_stack_endpoints").expect("it is measured");
    let handles = || metric(&edge, "tailwart_edge_stack_handles").expect("it is measured");
    let nothing_is_left = || (endpoints(), handles()) == (0.0, 0.0);
    assert!(eventually(SOONER, nothing_is_left), "{} {}", endpoints(), handles());
    let deaf: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut stream = connect(peer);
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
                .expect("the kernel takes it");
            stream
        })
        .collect();
    assert!(eventually(LIMIT, || endpoints() == 20.0), "{}", endpoints());
    answers_peer(peer, &edge);
    assert!(eventually(SOONER, nothing_is_left), "{} {}", endpoints(), handles());
    // Reset, and not only closed: nothing that a peer does ends its side.
    for mut stream in deaf {
        stream.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
        let end = stream.read_to_end(&mut Vec::new()).map_err(|error| error.kind());
        assert!(!matches!(end, Err(ErrorKind::WouldBlock)), "{end:?}");
    }
    no_crash(edge.log());
}

#[test]
fn half_requests_keep_nobody_from_being_answered() {
    let tailnet = tailnet_with(&[]);
    let edge = edge_on(&tailnet).listener(tcp("mail")).spawn();
    edge.wait_ready(LIMIT);
    let admin = edge.addr("admin");
    let slow = half_requests(admin, 600);
    let scrapes: Vec<_> =
        (0..100).map(|_| std::thread::spawn(move || try_get(admin, "/metrics", AT_ONCE))).collect();
    for scrape in scrapes {
        let answer = scrape.join().expect("it does not panic");
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains("\ntailwart_edge_ready "),
            "{answer:?}"
        );
    }
    assert_eq!(http::get(admin, "/livez").code, 200);
    drop(slow);
    no_crash(edge.log());
}

fn probing(edge: Builder) -> Builder {
    edge.set("probe", "interval", r#""300ms""#).set("probe", "fall", "2")
}

fn listeners(of: &[(&str, u16)]) -> Vec<Listener> {
    of.iter().map(|(name, port)| Listener::new(name, name, *port)).collect()
}

/// A mail server, as far as a probe goes.
fn greet_and_say_goodbye(mut conn: Conn) {
    conn.read_proxy_header();
    conn.send(b"220 mail.example.test ready\r\n");
    if let Ok(1..) = conn.read(&mut [0; 64]) {
        conn.send(b"221 Bye\r\n");
    }
}

#[test]
fn it_is_ready_while_a_mail_listener_has_a_mailbox() {
    let stub = Stub::start(greet_and_say_goodbye);
    let gone = free_addr();
    let forwards = [(25, gone), (4190, gone)];
    let Setup { edge, tailnet } =
        start_with(&forwards, &listeners(&[("smtp", 25), ("sieve", 4190)]), probing);
    becomes(&edge, 503, "listener smtp: no upstream answers: stalwart:25: cannot connect");
    becomes(&edge, 503, "listener sieve: no upstream answers");
    tailnet.forward(MAILBOX, 25, stub.addr);
    becomes(&edge, 200, r#""reasons":[],"warnings":["listener sieve: no upstream answers: stalwart:4190: "#);
    tailnet.unforward(MAILBOX, 25);
    becomes(&edge, 503, r#""warnings":[]"#);

    tailnet.set_tags(EDGE, &["tag:other"]);
    becomes(&edge, 503, "the node does not hold tag:reverse-proxy");
    becomes(&edge, 503, "listener smtp: no upstream answers");
}

#[test]
fn it_is_not_ready_before_the_first_probe_has_ended() {
    let silent = Stub::start(stub::silent);
    let Setup { edge, tailnet: _tailnet } =
        start_with(&[(25, silent.addr)], &listeners(&[("smtp", 25)]), probing);
    becomes(&edge, 503, r#""reasons":["the mailbox was not reached yet"]"#);
}

#[test]
fn without_a_probe_the_last_client_tells_whether_it_is_ready() {
    let stub = Stub::start(stub::greet("220 mail.example.test ready\r\n"));
    let edge = |edge| without_probe(edge).set("timeouts", "hold", r#""0s""#);
    let Setup { edge, tailnet } = start_with(&[(25, stub.addr)], &listeners(&[("smtp", 25)]), edge);
    becomes(&edge, 200, r#""ready":true"#);
    tailnet.unforward(MAILBOX, 25);
    hears(&mut connect(edge.addr("smtp")), b"421 ");
    becomes(&edge, 503, "listener smtp: no upstream answers: the peer refused the connection");
    tailnet.forward(MAILBOX, 25, stub.addr);
    hears(&mut connect(edge.addr("smtp")), b"220 ");
    becomes(&edge, 200, r#""ready":true"#);
}
