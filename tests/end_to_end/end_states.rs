//! Every way in which a connection can end is brought about, and is then what its line, the metrics and
//! the list of failures say. `I-`, an error inside the edge, has a unit test alone.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};

use tailwart_edge::connection::end_state::EndState;

use crate::common::edge::{Builder, Edge, Listener};
use crate::common::http;
use crate::common::net::{client_from, connect, reset};
use crate::common::stub::{self, Conn, Stub};
use crate::common::wait::eventually;
use crate::setup::{LIMIT, MAILBOX, edge_on, hears, holds, line_of, metric, no_crash, tailnet_with, tells};

/// A node that can vanish while the mailbox stays.
const OTHER: &str = "other";

const GREETING: &str = "220 ready\r\n";

/// Where clients that come to their own limit come from; it must be theirs alone.
const GREEDY: &str = "127.0.0.66";

/// The limit on connections of one client.
const SHARE: usize = 8;

/// Greets, and resets when it is spoken to.
fn greet_then_reset(mut conn: Conn) {
    conn.read_proxy_header();
    conn.send(GREETING.as_bytes());
    let _ = conn.read(&mut [0]);
    conn.reset();
}

/// Greets, and does nothing more whatever its client does.
fn greet_then_stall(mut conn: Conn) {
    conn.read_proxy_header();
    conn.send(GREETING.as_bytes());
    conn.hold();
}

/// Where a client comes from that the mailbox has banned.
const BANNED: [u8; 4] = [127, 0, 0, 67];

/// Greets everybody else.
fn ban(mut conn: Conn) {
    let header = conn.read_proxy_header().unwrap_or_default();
    if !header.windows(BANNED.len()).any(|bytes| bytes == BANNED) {
        conn.send(GREETING.as_bytes());
        conn.read_to_end();
    }
}

/// The edge's listeners: name, protocol, port of the mailbox, settings.
fn listeners() -> Vec<Listener> {
    let tcp = |name: &str, port: u16| Listener::new(name, "tcp", port);
    vec![
        tcp("greets", 2501),
        tcp("leaves", 2502),
        tcp("mute", 2503),
        tcp("idle", 2501).set("idle_timeout", r#""1s""#),
        tcp("resets", 2504),
        tcp("refuses", 2505),
        tcp("stalls", 2506),
        tcp("bans", 2509),
        tcp("closed", 2507),
        tcp("dropped", 2508),
        tcp("denied", 2510),
        tcp("vanishes", 2501).set("upstream", &format!("{OTHER:?}")),
        Listener::new("briefly", "smtp", 2507).set("hold", r#""2s""#),
        Listener::new("denied-briefly", "smtp", 2510).set("hold", r#""2s""#),
        Listener::new("holds", "smtp", 2507).set("hold", r#""10m""#),
    ]
}

/// A connection's line has this end, and everything else agrees. Returns the line.
#[track_caller]
fn ended(edge: &Edge, listener: &str, client: std::net::SocketAddr, state: EndState) -> String {
    let line = edge.wait_log(&line_of(listener, client), LIMIT);
    tells(&line, &[" connection id=", &format!(" end={state} ")]);
    line
}

/// So many of a listener have ended so, and were refused for that reason if they were; no more.
#[track_caller]
fn counted(edge: &Edge, listener: &str, state: EndState, count: f64) {
    let name = format!("tailwart_edge_connections_total{{end=\"{state}\",listener={listener:?}}}");
    assert_eq!(metric(edge, &name), Some(count), "{name}");
    let Some(reason) = state.refusal() else { return };
    let name = format!("tailwart_edge_refused_connections_total{{listener={listener:?},reason={reason:?}}}");
    assert_eq!(metric(edge, &name), Some(count), "{name}");
}

/// A client comes and does this; it ends so, and is counted once.
#[track_caller]
fn provokes(edge: &Edge, listener: &str, state: EndState, client: impl FnOnce(TcpStream)) -> String {
    let stream = connect(edge.addr(listener));
    stream.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let address = stream.local_addr().expect("it is connected");
    client(stream);
    let line = ended(edge, listener, address, state);
    counted(edge, listener, state, 1.0);
    line
}

fn greeted(mut client: TcpStream) -> TcpStream {
    hears(&mut client, GREETING.as_bytes());
    client
}

/// Reads to whatever end.
fn waits(mut client: TcpStream) {
    let _ = client.read_to_end(&mut Vec::new());
}

/// Waits until so many connections of a listener are in a stage.
#[track_caller]
fn are_in(edge: &Edge, listener: &str, stage: &str, count: f64) {
    let name = format!("tailwart_edge_open_connections{{listener={listener:?},stage={stage:?}}}");
    let reached = eventually(LIMIT, || metric(edge, &name).unwrap_or(0.0) == count);
    assert!(reached, "{name} is {:?}, not {count}\n{}", metric(edge, &name), edge.log().tail());
}

fn settings(edge: Builder) -> Builder {
    let share = SHARE.to_string();
    edge.set("limits", "max_connections_per_client", &share)
        .set("limits", "hold_max", "1")
        .set("timeouts", "connect", r#""2s""#)
        .set("timeouts", "half_close", r#""1s""#)
        .set("timeouts", "dead_peer", r#""15s""#)
        // Meanwhile the edge is asked what it has counted.
        .set("timeouts", "drain", r#""10s""#)
}

#[test]
fn each_end_is_told_and_counted() {
    let greets = Stub::start(stub::greet(GREETING));
    let leaves = Stub::start(stub::send_then_half_close(5));
    let mute = Stub::start(stub::record);
    let resets = Stub::start(greet_then_reset);
    let refuses = Stub::start(stub::reset_after_header);
    let stalls = Stub::start(greet_then_stall);
    let bans = Stub::start(ban);
    let forwards = [
        (2501, greets.addr),
        (2502, leaves.addr),
        (2503, mute.addr),
        (2504, resets.addr),
        (2505, refuses.addr),
        (2506, stalls.addr),
        (2508, greets.addr),
        (2509, bans.addr),
    ];
    let tailnet = tailnet_with(&forwards);
    tailnet.add_node(OTHER, &["tag:stalwart"], &[(2501, greets.addr)]);
    let mut edge = settings(listeners().into_iter().fold(edge_on(&tailnet), Builder::listener)).spawn();
    edge.wait_ready(LIMIT);
    tailnet.drop_port(MAILBOX, 2508);
    tailnet.deny_port(MAILBOX, 2510);

    // This one takes a while: it goes on beside the others.
    let vanishing = greeted(connect(edge.addr("vanishes")));
    tailnet.isolate_node(OTHER);
    in_order_and_not(&edge);
    banned(&edge);
    unreachable(&edge);
    of_limits(&edge);
    let address = vanishing.local_addr().expect("it is connected");
    waits(vanishing);
    let line = ended(&edge, "vanishes", address, EndState::ServerVanished);
    tells(&line, &["upstream=other:2501", "the mailbox's node no longer answers"]);
    counted(&edge, "vanishes", EndState::ServerVanished, 1.0);
    failures_are_listed(&edge);

    // Its place is taken away, and it has no say in it.
    tailnet.revoke_approval(crate::setup::EDGE);
    edge.wait_log("waits for approval", LIMIT);
    let line = provokes(&edge, "greets", EndState::NoTailnet, waits);
    tells(&line, &["upstream=stalwart:2501"]);
    tailnet.approve(crate::setup::EDGE);
    let again = eventually(LIMIT, || metric(&edge, "tailwart_edge_node_running") == Some(1.0));
    assert!(again, "{}", edge.log().tail());
    of_a_stop(&mut edge);
}

/// Ends that client and mailbox bring about by themselves.
fn in_order_and_not(edge: &Edge) {
    provokes(edge, "greets", EndState::ClientClosed, |client| drop(greeted(client)));
    provokes(edge, "leaves", EndState::ServerClosed, waits);
    provokes(edge, "mute", EndState::ClientLeftUngreeted, drop);
    provokes(edge, "greets", EndState::ClientFailed, |client| reset(greeted(client)));
    provokes(edge, "leaves", EndState::ClientStalled, |mut client| {
        // It has read the end, and does not end its own side.
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).expect("an orderly end");
        let stalled = eventually(LIMIT, || edge.log().count("end=cL") == 1);
        assert!(stalled, "{}", edge.log().tail());
    });
    provokes(edge, "idle", EndState::Idle, |client| waits(greeted(client)));
    provokes(edge, "refuses", EndState::ServerWordless, waits);
    provokes(edge, "resets", EndState::ServerFailed, |client| {
        let mut client = greeted(client);
        client.write_all(b"NOOP\r\n").expect("it is connected");
        waits(client);
    });
    provokes(edge, "stalls", EndState::ServerStalled, |client| {
        let client = greeted(client);
        client.shutdown(Shutdown::Write).expect("it is connected");
        waits(client);
    });
}

/// A ban is no failure, as long as others are greeted.
fn banned(edge: &Edge) {
    let welcome = greeted(connect(edge.addr("bans")));
    let client = client_from(&Ipv4Addr::from(BANNED).to_string(), edge.addr("bans"));
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let address = client.local_addr().expect("it is connected");
    waits(client);
    let line = ended(edge, "bans", address, EndState::ServerRefused);
    tells(&line, &["upstream=stalwart:2509", "upstream closed"]);
    counted(edge, "bans", EndState::ServerRefused, 1.0);
    drop(welcome);
}

/// Ends of those who never reach the mailbox.
fn unreachable(edge: &Edge) {
    let line = provokes(edge, "closed", EndState::ServerUnreachable, waits);
    tells(&line, &["upstream=stalwart:2507", "refused the connection"]);
    assert!(!line.contains("connect_ms=") && !line.contains("first_byte_ms="), "{line}");
    let line = provokes(edge, "denied", EndState::PolicyDenied, waits);
    tells(&line, &["upstream=stalwart:2510", "the tailnet's policy does not let this edge reach that port"]);
    let line = provokes(edge, "denied-briefly", EndState::PolicyDenied, waits);
    tells(&line, &["held for the whole hold time", "the tailnet's policy"]);
    let line = provokes(edge, "dropped", EndState::ServerSilent, waits);
    tells(&line, &["no answer within 2s"]);
    provokes(edge, "dropped", EndState::ClientLeftConnecting, |client| {
        are_in(edge, "dropped", "connecting", 1.0);
        reset(client);
    });
    provokes(edge, "briefly", EndState::HoldEnded, waits);
    provokes(edge, "holds", EndState::ClientLeftHeld, |client| {
        are_in(edge, "holds", "held", 1.0);
        drop(client);
    });
}

/// Ends of those who find no room.
fn of_limits(edge: &Edge) {
    let admitted: Vec<TcpStream> =
        (0..SHARE).map(|_| greeted(client_from(GREEDY, edge.addr("greets")))).collect();
    let late = client_from(GREEDY, edge.addr("greets"));
    let address = late.local_addr().expect("it is connected");
    waits(late);
    ended(edge, "greets", address, EndState::ClientLimit);
    counted(edge, "greets", EndState::ClientLimit, 1.0);
    drop(admitted);

    let held = connect(edge.addr("holds"));
    holds(edge, 1);
    provokes(edge, "holds", EndState::HoldFull, waits);
    let address = held.local_addr().expect("it is connected");
    drop(held);
    ended(edge, "holds", address, EndState::ClientLeftHeld);
}

/// What failed somebody is in the list of failures, and nothing else.
fn failures_are_listed(edge: &Edge) {
    let status = http::get(edge.addr("admin"), "/status").body;
    let status: tailwart_edge::admin::status::Status = serde_json::from_str(&status).expect("it is JSON");
    let mut listed: Vec<&str> = status.failures.iter().map(|failure| &*failure.end).collect();
    listed.sort_unstable();
    assert_eq!(listed, ["AC", "AC", "DD", "PQ", "SC", "SD", "SH", "sC", "sL", "sQ"]);
    for failure in &status.failures {
        assert_eq!(failure.count, 1, "{failure:?}");
    }
}

/// Ends that the edge brings about.
fn of_a_stop(edge: &mut Edge) {
    let quiet = greeted(connect(edge.addr("greets")));
    let held = connect(edge.addr("holds"));
    let mut busy = greeted(connect(edge.addr("stalls")));
    busy.write_all(b"DATA\r\n").expect("it is connected");
    are_in(edge, "greets", "relaying", 1.0);
    are_in(edge, "stalls", "relaying", 1.0);
    holds(edge, 1);
    let address = |client: &TcpStream| client.local_addr().expect("it is connected");
    let addresses = [&quiet, &held, &busy].map(address);
    edge.signal("TERM");
    [quiet, held].into_iter().for_each(waits);
    ended(edge, "greets", addresses[0], EndState::StoppedQuiet);
    ended(edge, "holds", addresses[1], EndState::StoppedWaiting);
    // The one that is cut keeps the edge from ending, so it can still be asked.
    counted(edge, "greets", EndState::StoppedQuiet, 1.0);
    counted(edge, "holds", EndState::StoppedWaiting, 1.0);
    let status = edge.wait_exit(LIMIT);
    assert_eq!(status.code(), Some(0), "{status}");
    ended(edge, "stalls", addresses[2], EndState::StoppedCut);
    no_crash(edge.log());
    let text = edge.log().text();
    for state in EndState::ALL.into_iter().filter(|state| *state != EndState::Internal) {
        assert!(text.contains(&format!(" end={state} ")), "{state} was not brought about");
    }
}
