//! The PROXY header: exact to the byte, and read by programs that are not ours.
//!
//! The client's own view of its connection is the truth: its address and port are the header's
//! source, and the address it connected to, a listener of the edge, is the destination.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::OnceLock;

use crate::common::edge::Listener;
use crate::common::haproxy::Haproxy;
use crate::common::net::client_from;
use crate::common::nginx::Nginx;
use crate::common::proxy_header::{Seen, v1, v2};
use crate::common::stub::{Record, Stub, pattern, record};
use crate::setup::{LIMIT, MAILBOX, Setup, start};

/// Another address than any listener's, so that source and destination cannot be mistaken for each
/// other. IPv6 has only one address on loopback; there the ports differ.
const CLIENT: &str = "127.0.0.77";
const CLIENT_V6: &str = "::1";

const GREETING: &[u8] = b"EHLO client.example.net\r\n";

const HAPROXY_PORT: u16 = 1001;
const NGINX_PORT: u16 = 1002;
/// Ports without a server until a test puts a stub there. One test each.
const EXACT_V1: (&str, u16) = ("exact-v1", 1003);
const EXACT_V2: (&str, u16) = ("exact-v2", 1004);
const EAGER_V1: (&str, u16) = ("eager-v1", 1005);
const EAGER_V2: (&str, u16) = ("eager-v2", 1006);
const OFF: (&str, u16) = ("off", 1007);

struct Oracles {
    setup: Setup,
    haproxy: Haproxy,
    // Only kept alive: it answers on the connection.
    _nginx: Nginx,
    _backend: Stub,
}

fn oracles() -> &'static Oracles {
    static ORACLES: OnceLock<Oracles> = OnceLock::new();
    ORACLES.get_or_init(|| {
        let backend = Stub::start(record);
        let (haproxy, nginx) = (Haproxy::start(backend.addr), Nginx::start());
        let forwards = [(HAPROXY_PORT, haproxy.addr), (NGINX_PORT, nginx.addr)];
        let listener = |(name, port): (&str, u16), version: &str| {
            Listener::new(name, "tcp", port).set("proxy_protocol", &format!("{version:?}"))
        };
        let listeners = [
            listener(("haproxy-v1", HAPROXY_PORT), "v1"),
            listener(("haproxy-v2", HAPROXY_PORT), "v2"),
            listener(("nginx-v1", NGINX_PORT), "v1"),
            listener(("nginx-v2", NGINX_PORT), "v2"),
            listener(EXACT_V1, "v1"),
            listener(EXACT_V2, "v2"),
            listener(EAGER_V1, "v1"),
            listener(EAGER_V2, "v2"),
            listener(OFF, "off"),
        ];
        let setup = start(&forwards, &listeners);
        Oracles { setup, haproxy, _nginx: nginx, _backend: backend }
    })
}

/// A client on IPv4, from [`CLIENT`].
fn v4(listener: &str) -> TcpStream {
    client_from(CLIENT, oracles().setup.edge.addr(listener))
}

/// A client on IPv6.
fn v6(listener: &str) -> TcpStream {
    client_from(CLIENT_V6, oracles().setup.edge.addr_v6(listener))
}

/// The connection's two ends as the client has them.
fn ends(client: &TcpStream) -> Seen {
    let source = client.local_addr().expect("it is connected");
    Seen { source, destination: client.peer_addr().expect("it is connected") }
}

#[test]
fn haproxy_reads_the_clients_ends_from_v1_over_ipv4() {
    assert_haproxy_agrees(&v4("haproxy-v1"));
}

#[test]
fn haproxy_reads_the_clients_ends_from_v1_over_ipv6() {
    assert_haproxy_agrees(&v6("haproxy-v1"));
}

#[test]
fn haproxy_reads_the_clients_ends_from_v2_over_ipv4() {
    assert_haproxy_agrees(&v4("haproxy-v2"));
}

#[test]
fn haproxy_reads_the_clients_ends_from_v2_over_ipv6() {
    assert_haproxy_agrees(&v6("haproxy-v2"));
}

/// The client sends nothing: HAProxy gets the header all the same.
#[track_caller]
fn assert_haproxy_agrees(client: &TcpStream) {
    let expected = ends(client);
    assert_eq!(oracles().haproxy.wait_seen(expected.source, LIMIT), expected);
}

#[test]
fn nginx_reads_the_clients_ends_from_v1_over_ipv4() {
    assert_nginx_agrees(&v4("nginx-v1"));
}

#[test]
fn nginx_reads_the_clients_ends_from_v1_over_ipv6() {
    assert_nginx_agrees(&v6("nginx-v1"));
}

#[test]
fn nginx_reads_the_clients_ends_from_v2_over_ipv4() {
    assert_nginx_agrees(&v4("nginx-v2"));
}

#[test]
fn nginx_reads_the_clients_ends_from_v2_over_ipv6() {
    assert_nginx_agrees(&v6("nginx-v2"));
}

/// nginx answers with what it has read, on the client's own connection.
#[track_caller]
fn assert_nginx_agrees(client: &TcpStream) {
    assert_eq!(Nginx::read_answer(client, LIMIT), ends(client));
}

#[test]
fn the_v1_header_is_exact_and_comes_although_the_client_is_silent() {
    assert_exact_and_unprompted(EXACT_V1, v1);
}

#[test]
fn the_v2_header_is_exact_and_comes_although_the_client_is_silent() {
    assert_exact_and_unprompted(EXACT_V2, v2);
}

/// What makes a header of source and destination, by the harness' own reading of the specification.
type Encoder = fn(SocketAddr, SocketAddr) -> Vec<u8>;

const CLIENTS: [fn(&str) -> TcpStream; 2] = [v4, v6];

/// The header is there before the client's first byte, and that byte follows right behind it.
#[track_caller]
fn assert_exact_and_unprompted((name, port): (&str, u16), encode: Encoder) {
    let stub = stub_at(port);
    for (index, connect) in CLIENTS.iter().enumerate() {
        let client = connect(name);
        let Seen { source, destination } = ends(&client);
        let header = encode(source, destination);
        let first = stub.wait_record(index, LIMIT, |record| record.bytes.len() >= header.len());
        assert_bytes(&first, &header);
        say_and_finish(&client, GREETING);
        let all = stub.wait_record(index, LIMIT, |record| record.end.is_some());
        assert_bytes(&all, &[&header, GREETING].concat());
    }
}

#[test]
fn the_v1_header_is_in_front_of_what_a_client_sends_at_once() {
    assert_in_front_of_eager_bytes(EAGER_V1, v1);
}

#[test]
fn the_v2_header_is_in_front_of_what_a_client_sends_at_once() {
    assert_in_front_of_eager_bytes(EAGER_V2, v2);
}

/// The client's bytes, a header of its own making and then some, are on their way while the edge
/// still dials. They come unchanged, after the edge's header.
#[track_caller]
fn assert_in_front_of_eager_bytes((name, port): (&str, u16), encode: Encoder) {
    let stub = stub_at(port);
    let forged = encode(([192, 0, 2, 1], 1).into(), ([192, 0, 2, 2], 25).into());
    let eager = [forged, pattern(64 * 1024)].concat();
    for (index, connect) in CLIENTS.iter().enumerate() {
        let client = connect(name);
        let Seen { source, destination } = ends(&client);
        say_and_finish(&client, &eager);
        let record = stub.wait_record(index, LIMIT, |record| record.end.is_some());
        assert_bytes(&record, &[encode(source, destination), eager.clone()].concat());
    }
}

#[test]
fn a_listener_with_the_header_off_sends_only_the_clients_bytes() {
    let (name, port) = OFF;
    let stub = stub_at(port);
    for (index, connect) in CLIENTS.iter().enumerate() {
        say_and_finish(&connect(name), GREETING);
        assert_bytes(&stub.wait_record(index, LIMIT, |record| record.end.is_some()), GREETING);
    }
}

/// A server that records, on this port of the mailbox node.
fn stub_at(port: u16) -> Stub {
    let stub = Stub::start(record);
    oracles().setup.tailnet.forward(MAILBOX, port, stub.addr);
    stub
}

#[track_caller]
fn say_and_finish(mut client: &TcpStream, bytes: &[u8]) {
    client.write_all(bytes).expect("the edge takes it");
    client.shutdown(Shutdown::Write).expect("it is connected");
}

/// Not assert_eq: a record may be long, and a header is not readable as a list of numbers.
#[track_caller]
fn assert_bytes(record: &Record, expected: &[u8]) {
    let beginning = expected[..expected.len().min(200)].escape_ascii();
    assert!(record.bytes == expected, "got {record:?}; not {} bytes, {beginning}", expected.len());
}
