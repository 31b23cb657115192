//! A connection that cannot be served is one clear line in the log and a client
//! closed in time; everybody else is served on. And nothing of a client ever
//! reaches the mailbox without its header.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::edge::{Builder, Edge, Listener};
use crate::common::net::{backlog, client_from, connect, echoes, hears_itself, reset, try_client_from};
use crate::common::proxy_header;
use crate::common::stub::{self, Record, Stub};
use crate::common::wait::eventually;
use crate::setup::{
    LIMIT, MAILBOX, Setup, edge_on, line_of, no_crash, start_with, stops, tailnet_with, tells, warnings,
};

/// Beside the mailbox, so that one can fail while the other goes on.
const OTHER: &str = "other";

const CONNECT: Duration = Duration::from_secs(2);

/// What may pass before a client is closed: the connect time-out, two seconds to
/// find out why, and room for a busy machine, but less than with the default time-out.
const CLOSED_WITHIN: Duration = Duration::from_secs(2 + 2 + 5);

/// The port behind which the echo is.
const ECHO: u16 = 2525;

fn tcp(name: &str, port: u16) -> Listener {
    Listener::new(name, "tcp", port)
}

/// An edge with a listener `good`, which leads to an echo on another node, and a
/// listener `bad`.
struct Faulty {
    setup: Setup,
    builder: Builder,
    stub: Stub,
}

impl Faulty {
    fn start(bad: Listener) -> Faulty {
        let stub = Stub::start(stub::echo_after_header);
        let tailnet = tailnet_with(&[(ECHO, stub.addr)]);
        tailnet.add_node(OTHER, &["tag:stalwart"], &[(ECHO, stub.addr)]);
        let good = tcp("good", ECHO).set("upstream", &format!("{OTHER:?}"));
        let builder = edge_on(&tailnet).listener(good).listener(bad);
        let builder = builder.set("timeouts", "connect", &format!("\"{}s\"", CONNECT.as_secs()));
        let edge = builder.spawn();
        edge.wait_ready(LIMIT);
        Faulty { setup: Setup { edge, tailnet }, builder, stub }
    }

    /// Another edge takes the place of the present one.
    #[track_caller]
    fn start_anew(&mut self) {
        self.setup.edge = self.builder.spawn();
        self.setup.edge.wait_ready(LIMIT);
    }

    /// Clients of `bad` are turned away, in time and with one warning each that
    /// says so much; clients of `good` are served on.
    #[track_caller]
    fn turns_away(&self, words: &[&str]) {
        let edge = &self.setup.edge;
        for _ in 0..2 {
            let client = connect(edge.addr("bad"));
            let address = client.local_addr().expect("it is connected");
            let began = Instant::now();
            closed_without_a_byte(client, edge);
            assert!(began.elapsed() < CLOSED_WITHIN, "closed after {:?}", began.elapsed());
            let line = edge.wait_log(&line_of("bad", address), LIMIT);
            tells(&line, &[" INFO ", " connection ", "why=\"cannot reach "]);
            // The client's line has the reason, the warning also what to do.
            tells(&(line + &last_warning(edge)), words);
            assert_eq!(edge.log().count(&line_of("bad", address)), 1, "{}", edge.log().tail());
            echoes(edge.addr("good"));
        }
        no_crash(edge.log());
    }
}

/// The last one about an upstream.
fn last_warning(edge: &Edge) -> String {
    let text = edge.log().text();
    let is_warning = |line: &&str| line.contains(" WARN ") && line.contains("cannot be reached");
    text.lines().rfind(is_warning).unwrap_or_default().to_owned()
}

/// The edge ends the connection.
#[track_caller]
fn closed_without_a_byte(mut client: TcpStream, edge: &Edge) {
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut answer = Vec::new();
    match client.read_to_end(&mut answer) {
        Ok(_) => assert_eq!(answer, b""),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the client was not closed: {error}\n{}", edge.log().tail()),
    }
}

#[test]
fn an_upstream_that_the_tailnet_does_not_know_is_told() {
    let faulty = Faulty::start(tcp("bad", ECHO).set("upstream", r#""stalward""#));
    // Told at start already, before any mail came.
    let line = faulty.setup.edge.wait_log("upstream cannot be reached", LIMIT);
    tells(&line, &["stalward", "no peer of that name"]);
    faulty.turns_away(&["stalward:2525", "no peer of that name", "check the upstream's name", "policy"]);
    // Nor is an address that belongs to nobody tried elsewhere.
    let faulty = Faulty::start(tcp("bad", ECHO).set("upstream", r#""192.0.2.1""#));
    faulty.turns_away(&["192.0.2.1:2525", "no peer of that name"]);
}

#[test]
fn an_upstream_that_is_offline_is_told_until_it_is_back() {
    let mut faulty = Faulty::start(tcp("bad", ECHO));
    faulty.setup.tailnet.stop_node(MAILBOX);
    faulty.turns_away(&["stalwart:2525", "no answer within 2s", "the peer is offline", "start it"]);
    // Since when is told to nodes that come later; a node that is told of the change itself drops it
    // (tailscale.com/control/controlclient/map.go, peerChangeDiff, "LastSeen").
    faulty.start_anew();
    faulty.turns_away(&["stalwart:2525", "the peer is offline, last seen 20", "start it"]);
    faulty.setup.tailnet.start_node(MAILBOX);
    echoes(faulty.setup.edge.addr("bad"));
}

#[test]
fn an_upstream_that_has_died_silently_is_told() {
    let faulty = Faulty::start(tcp("bad", ECHO));
    faulty.setup.tailnet.isolate_node(MAILBOX);
    let why = "the peer does not answer a ping either, although the control server sees it";
    faulty.turns_away(&["stalwart:2525", "no answer within 2s", why]);
    faulty.setup.tailnet.rejoin_node(MAILBOX);
    echoes(faulty.setup.edge.addr("bad"));
}

#[test]
fn an_upstream_port_without_a_server_is_told_until_it_has_one() {
    let faulty = Faulty::start(tcp("bad", 2526));
    faulty.turns_away(&[
        "stalwart:2526",
        "the peer refused the connection",
        "check that the mail server runs",
    ]);
    faulty.setup.tailnet.forward(MAILBOX, 2526, faulty.stub.addr);
    echoes(faulty.setup.edge.addr("bad"));
}

#[test]
fn an_upstream_port_denied_by_an_access_rule_is_told_until_it_is_allowed() {
    let faulty = Faulty::start(tcp("bad", ECHO));
    faulty.setup.tailnet.deny_port(MAILBOX, ECHO);
    faulty.turns_away(&[
        "stalwart:2525",
        "the tailnet's policy does not let this edge reach that port",
        "grants",
    ]);
    faulty.setup.tailnet.allow_port(MAILBOX, ECHO);
    echoes(faulty.setup.edge.addr("bad"));
}

#[test]
fn an_upstream_port_dropped_by_a_firewall_is_told_until_it_is_passed() {
    let faulty = Faulty::start(tcp("bad", ECHO));
    faulty.setup.tailnet.drop_port(MAILBOX, ECHO);
    let why = "an access rule of the tailnet or a firewall on the peer drops this port";
    faulty.turns_away(&[
        "stalwart:2525",
        "no answer within 2s",
        "the peer itself answers a ping",
        why,
        "grants",
    ]);
    faulty.setup.tailnet.pass_port(MAILBOX, ECHO);
    echoes(faulty.setup.edge.addr("bad"));
}

#[test]
fn an_upstream_that_is_the_edge_itself_is_told() {
    for name in ["tailwart-edge", "tailwart-edge.tail-test.ts.net"] {
        let faulty = Faulty::start(tcp("bad", ECHO).set("upstream", &format!("{name:?}")));
        faulty.turns_away(&[name, "that is this edge itself", "name the mailbox's node"]);
    }
}

/// One listener on one address, to the echo or another server.
fn one_listener(stub: &Stub, configure: impl FnOnce(Builder) -> Builder) -> Setup {
    let listener = tcp("mail", ECHO).set("listen", r#"["127.0.0.1:0"]"#);
    start_with(&[(ECHO, stub.addr)], &[listener], configure)
}

/// The node opens and closes a few descriptors of its own; far fewer than the
/// tests here would leak.
const OWN_DESCRIPTORS: usize = 3;

/// Nothing is left of any connection, on neither side of the tailnet.
#[track_caller]
fn nothing_is_left(setup: &Setup, fds_before: usize, within: Duration) {
    let freed = eventually(within, || {
        setup.edge.fds() <= fds_before + OWN_DESCRIPTORS && setup.tailnet.stats(MAILBOX).open == 0
    });
    let (fds, open) = (setup.edge.fds(), setup.tailnet.stats(MAILBOX).open);
    assert!(freed, "{fds} descriptors, {fds_before} before; the mailbox has {open} connections");
}

#[test]
fn clients_that_leave_at_once_leave_nothing_behind() {
    const CLIENTS: usize = 50;
    let stub = Stub::start(stub::record);
    let setup = one_listener(&stub, |edge| edge);
    let before = setup.edge.fds();
    let left: Vec<SocketAddr> = (0..CLIENTS)
        .map(|_| connect(setup.edge.addr("mail")).local_addr().expect("it is connected"))
        .collect();
    for index in 0..CLIENTS {
        stub.wait_record(index, LIMIT, |record| record.end == Some(Ok(())));
    }
    for client in left {
        let line = setup.edge.wait_log(&format!("client={client}"), LIMIT);
        tells(&line, &[" INFO ", "sent=0 received=0", "end=CH why=\"client closed\""]);
    }
    nothing_is_left(&setup, before, LIMIT);
    no_crash(setup.edge.log());
}

#[test]
fn a_client_that_says_nothing_is_announced_to_the_mailbox_and_kept() {
    let stub = Stub::start(stub::echo_after_header);
    let setup = one_listener(&stub, |edge| edge);
    let mut client = connect(setup.edge.addr("mail"));
    let header = proxy_header::v2(client.local_addr().unwrap(), setup.edge.addr("mail"));
    stub.wait_record(0, LIMIT, |record| record.bytes == header);
    // Others come and go meanwhile.
    (0..20).for_each(|_| drop(echoes(setup.edge.addr("mail"))));
    hears_itself(&mut client);
}

#[test]
fn a_client_that_resets_while_its_upstream_is_dialled_ends_the_dial_at_once() {
    const CLIENTS: usize = 50;
    let stub = Stub::start(stub::record);
    let mut setup = one_listener(&stub, |edge| {
        // Far longer than this test may take.
        edge.set("timeouts", "connect", r#""10m""#).env("RUST_LOG", "tailwart_edge=debug")
    });
    setup.tailnet.drop_port(MAILBOX, ECHO);
    let before = setup.edge.fds();
    let clients: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(setup.edge.addr("mail"))).collect();
    assert!(
        eventually(LIMIT, || setup.edge.fds() >= before + CLIENTS - OWN_DESCRIPTORS),
        "{} descriptors",
        setup.edge.fds()
    );
    clients.into_iter().for_each(reset);
    nothing_is_left(&setup, before, LIMIT);
    let told = || setup.edge.log().count("client left while connecting");
    assert!(eventually(LIMIT, || told() == CLIENTS), "{} lines tell it", told());
    assert_eq!(warnings(&setup.edge), 0, "{}", setup.edge.log().tail());
    assert_eq!(stub.accepted(), 0);
    // A dial still going on would hold the end up until the drain time-out.
    setup.edge.signal("TERM");
    stops(&mut setup.edge, Duration::from_secs(8));
}

/// What a client does in the test below.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Close,
    Reset,
    EarlyDataThenClose,
    EarlyDataThenReset,
    EarlyDataThenHalfClose,
    Pieces,
}

impl Manner {
    const ALL: [Manner; 6] = [
        Manner::Close,
        Manner::Reset,
        Manner::EarlyDataThenClose,
        Manner::EarlyDataThenReset,
        Manner::EarlyDataThenHalfClose,
        Manner::Pieces,
    ];

    fn resets(self) -> bool {
        matches!(self, Manner::Reset | Manner::EarlyDataThenReset)
    }

    /// What client `number` sends: its own words, of many lengths.
    fn words(self, number: usize) -> Vec<u8> {
        match self {
            Manner::Close | Manner::Reset => Vec::new(),
            _ => format!("this is client {number}; ").repeat(1 + number * number % 997).into_bytes(),
        }
    }

    fn act(self, mut client: TcpStream, words: &[u8]) {
        // A write may fail only once the edge has closed, which it has no reason to: what it did not
        // take shows at the stub.
        match self {
            Manner::Close => {}
            Manner::Reset => reset(client),
            Manner::EarlyDataThenClose => drop(client.write_all(words)),
            Manner::EarlyDataThenReset => {
                let _ = client.write_all(words);
                reset(client);
            }
            Manner::EarlyDataThenHalfClose => {
                let _ = client.write_all(words);
                waits_for_the_mailbox(client);
            }
            Manner::Pieces => {
                client.set_nodelay(true).expect("a TCP option");
                words.chunks(words.len() / 7 + 1).for_each(|piece| drop(client.write_all(piece)));
                waits_for_the_mailbox(client);
            }
        }
    }
}

fn waits_for_the_mailbox(mut client: TcpStream) {
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    client.shutdown(Shutdown::Write).expect("it is connected");
    let _ = client.read_to_end(&mut Vec::new()); // whether it came shows at the stub
}

/// Every client by its address, with its manner and words.
type Clients = HashMap<SocketAddr, (Manner, Vec<u8>)>;

/// Lets client after client in, `step` apart, so that several threads share
/// them.
fn visit(edge: [SocketAddr; 2], first: usize, step: usize, count: usize) -> Clients {
    let visitors = (first..count).step_by(step).map(|number| {
        let manner = Manner::ALL[number % Manner::ALL.len()];
        let words = manner.words(number);
        // IPv6 has one loopback address only; there the ports tell clients apart.
        let client = match number % 5 {
            0 => connect(edge[1]),
            _ => {
                let [.., high, low] = u32::try_from(number).expect("few clients").to_be_bytes();
                let source = IpAddr::from(Ipv4Addr::new(127, 1, high, low));
                try_client_from(source, edge[0]).expect("the edge listens")
            }
        };
        let address = client.local_addr().expect("it is connected");
        manner.act(client, &words);
        (address, (manner, words))
    });
    visitors.collect()
}

/// What came over one connection begins with the header of one of the clients,
/// and goes on with nothing but the same client's words. Returns the client.
#[track_caller]
fn belongs_to_its_header(record: &Record, clients: &Clients, edge: [SocketAddr; 2]) -> SocketAddr {
    let mut rest = record.bytes.as_slice();
    let header = proxy_header::read(&mut rest).unwrap_or_else(|error| panic!("{error}: {record:?}"));
    let seen = proxy_header::decode(&header).unwrap_or_else(|| panic!("no addresses in {record:?}"));
    assert!(edge.contains(&seen.destination), "{seen:?}");
    let (manner, words) = clients.get(&seen.source).unwrap_or_else(|| panic!("{seen:?} is no client"));
    assert!(words.starts_with(rest), "the words of somebody else: {record:?}");
    assert!(manner.resets() || rest.len() == words.len(), "{} of {} bytes came", rest.len(), words.len());
    seen.source
}

#[test]
fn nothing_of_a_client_reaches_the_mailbox_without_its_header() {
    const THREADS: usize = 8;
    const COUNT: usize = 600;
    let stub = Stub::start(stub::record);
    let limits = |edge: Builder| edge.set("limits", "max_connections_per_client", "0");
    let setup = start_with(&[(ECHO, stub.addr)], &[tcp("mail", ECHO)], limits);
    let before = setup.edge.fds();
    let edge = [setup.edge.addr("mail"), setup.edge.addr_v6("mail")];
    let visits = [0; THREADS].into_iter().enumerate();
    let visits = visits.map(|(first, _)| std::thread::spawn(move || visit(edge, first, THREADS, COUNT)));
    let visits: Vec<_> = visits.collect();
    let clients: Clients = visits.into_iter().flat_map(|visit| visit.join().expect("a good visit")).collect();
    assert_eq!(clients.len(), COUNT);
    // Some may still wait to be accepted; each has one line in the end.
    let over = || setup.edge.log().count(" connection id=") == COUNT;
    assert!(eventually(LIMIT, over), "some clients have no line\n{}", setup.edge.log().tail());
    nothing_is_left(&setup, before, LIMIT);

    let records: Vec<Record> = (0..stub.accepted()).filter_map(|index| stub.record(index)).collect();
    // A dial that was given up may show as a connection on which nothing came.
    let spoken = records.iter().filter(|record| !record.bytes.is_empty());
    let mut served: Vec<SocketAddr> =
        spoken.map(|record| belongs_to_its_header(record, &clients, edge)).collect();
    let all = served.len();
    served.sort();
    served.dedup();
    assert_eq!(served.len(), all, "a client was forwarded twice");
    // What must hold for every client is above: nothing comes without its header.
    // That everything comes is the business of half_close.rs. Here, on a busy
    // machine, a few connections were relayed by the edge and never seen by the
    // stub; the mailbox node's stack, which is gVisor too, is suspected of losing
    // one whose bytes and end come while it is being accepted. That is not proven.
    let lost = clients
        .iter()
        .filter(|(client, (manner, _))| !manner.resets() && served.binary_search(client).is_err());
    let lost = lost.count();
    assert!(lost * 50 < COUNT, "{lost} of {COUNT} never came\n{}", setup.edge.log().tail());
    no_crash(setup.edge.log());
}

#[test]
fn at_the_connection_limit_clients_wait_and_are_served_once_others_leave() {
    let stub = Stub::start(stub::echo_after_header);
    let setup = one_listener(&stub, |edge| edge.set("limits", "max_connections", "2"));
    let mail = setup.edge.addr("mail");
    let (first, _second) = (echoes(mail), echoes(mail));
    let mut late: Vec<TcpStream> = (0..3).map(|_| connect(mail)).collect();
    assert!(eventually(LIMIT, || backlog(mail) == 3), "{} wait", backlog(mail));
    assert_eq!(stub.accepted(), 2);
    drop(first);
    for client in &mut late {
        hears_itself(client);
        // Each leaves room for the next.
        client.shutdown(Shutdown::Both).expect("it is connected");
    }
    assert_eq!((backlog(mail), stub.accepted()), (0, 5));
    no_crash(setup.edge.log());
}

#[test]
fn a_client_at_its_own_limit_is_closed_and_others_are_not() {
    let stub = Stub::start(stub::echo_after_header);
    let setup = one_listener(&stub, |edge| edge.set("limits", "max_connections_per_client", "2"));
    let mail = setup.edge.addr("mail");
    let mut admitted = [client_from("127.0.0.7", mail), client_from("127.0.0.7", mail)];
    admitted.iter_mut().for_each(hears_itself);
    let third = client_from("127.0.0.7", mail);
    let address = third.local_addr().expect("it is connected");
    closed_without_a_byte(third, &setup.edge);
    let line = setup.edge.wait_log(&format!("client={address}"), LIMIT);
    tells(&line, &[" INFO ", "end=PC", "refused", "max_connections_per_client"]);
    hears_itself(&mut client_from("127.0.0.8", mail));
    closed_without_a_byte(client_from("127.0.0.7", mail), &setup.edge);
    assert!(eventually(LIMIT, || setup.edge.log().count("end=PC") == 2), "a line each");
    admitted.iter_mut().for_each(hears_itself);

    let [leaving, _staying] = admitted;
    drop(leaving);
    let again = eventually(LIMIT, || {
        let mut client = client_from("127.0.0.7", mail);
        client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
        let _ = client.write_all(b"x");
        matches!(client.read(&mut [0]), Ok(1))
    });
    assert!(again, "the place was not given back\n{}", setup.edge.log().tail());
}
