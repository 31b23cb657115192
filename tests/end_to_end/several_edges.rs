//! Several edges in front of one mailbox, as the MX hosts of one domain: one dies, and no message with it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::client::LineClient;
use crate::common::dovecot::Dovecot;
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::http;
use crate::common::mail::{DOMAIN, MailHome, MailServer, PASSWORD};
use crate::common::net::{client_from, connect, echoes, free_port, hears_itself};
use crate::common::postfix::Sender;
use crate::common::private_dir;
use crate::common::stub::{self, Stub};
use crate::common::tailnet::{AuthKey, TestTailnet};
use crate::common::wait::{eventually, pace};
use crate::setup::{EDGE, LIMIT, MAILBOX, edge_on, hears_last, no_crash, stops, tailnet_with, tcp, tells};

/// What the edge says of itself.
#[track_caller]
fn status(edge: &Edge) -> Value {
    let answer = http::get(edge.addr("admin"), "/status");
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

/// The tailnet addresses by the nodes' names.
fn addresses(tailnet: &TestTailnet) -> BTreeMap<String, Value> {
    let nodes = tailnet.nodes().into_iter();
    nodes.map(|node| (node["name"].as_str().unwrap_or_default().to_owned(), node["ips"].clone())).collect()
}

/// An MX host of the domain: an edge with an address and an identity of its own.
struct Mx {
    address: SocketAddr,
    builder: Builder,
    edge: Edge,
    _state: TempDir,
}

impl Mx {
    fn start(tailnet: &TestTailnet, name: &str, address: Ipv4Addr) -> Mx {
        let address = SocketAddr::from((address, free_port()));
        let smtp = Listener::new("smtp", "smtp", 25).set("listen", &format!("[\"{address}\"]"));
        let state = private_dir("state");
        let builder = edge_on(tailnet).listener(smtp).state_dir(state.path());
        let builder = builder.set("tailnet", "hostname", &format!("{name:?}"));
        let edge = builder.spawn();
        edge.wait_ready(LIMIT);
        Mx { address, builder, edge, _state: state }
    }

    /// How many sessions it has had since its start.
    fn sessions(&self) -> u64 {
        status(&self.edge)["listeners"][0]["ended"].as_u64().expect("a number")
    }
}

/// Somebody's mail server, with its address and the MX hosts in the order in which it tries them.
struct Origin {
    address: Ipv4Addr,
    postfix: Sender,
}

impl Origin {
    fn start(address: Ipv4Addr, hosts: [&Mx; 2]) -> Origin {
        Origin { address, postfix: Sender::start_from(address, &hosts.map(|mx| mx.address)) }
    }

    /// Gives it a message for the mailbox, large enough for a connection to break in the middle.
    fn submit(&self, id: usize) {
        const LINES: usize = 3000;
        let filler = "All work and no play makes Jack a dull boy.\n".repeat(LINES);
        let message = format!("Subject: {}\n\n{filler}", subject(id));
        let mut client = LineClient::new(connect(self.postfix.smtp()));
        client.send_mail("sender@example.net", &format!("alice@{DOMAIN}"), &message);
    }

    /// Whether it has delivered all; tries again what it has not, as it would by itself some time later.
    fn is_done(&self) -> bool {
        let done = self.postfix.queue().is_empty();
        if !done {
            self.postfix.flush();
        }
        done
    }
}

/// Gives a sender messages until one of them is just under way through this host: a session may begin and
/// end between two looks.
fn meets_a_session(origin: &Origin, mx: &Mx) -> bool {
    // Even numbers are the first sender's; the first of these is looked for later.
    (0..20).any(|number| {
        let before = mx.sessions();
        origin.submit(MESSAGES + if number == 0 { 0 } else { 2 + 2 * number });
        let seen = || status(&mx.edge)["open"] != 0;
        eventually(LIMIT, || seen() || mx.sessions() > before) && seen()
    })
}

fn subject(id: usize) -> String {
    format!("message {id:04} of several")
}

const MESSAGES: usize = 160;
const INTERVAL: Duration = Duration::from_millis(50);
/// The first MX host dies at this message, and is started again at that one.
const DEATH: usize = 60;
const RETURN: usize = 110;
/// A sender that finds nobody at one address tries the next at once.
const DETOUR_LIMIT: Duration = Duration::from_secs(10);

#[test]
fn no_message_is_lost_when_one_of_two_edges_dies_under_load() {
    let mail = MailServer::start();
    let tailnet = tailnet_with(&[(25, mail.postfix.smtp)]);
    let mut first = Mx::start(&tailnet, "edge-a", Ipv4Addr::new(127, 0, 0, 2));
    let second = Mx::start(&tailnet, "edge-b", Ipv4Addr::new(127, 0, 0, 3));
    let before = addresses(&tailnet);
    assert_eq!(before.keys().collect::<Vec<_>>(), ["edge-a", "edge-b", MAILBOX]);
    // Of hosts of one preference half of the world tries the one first, and half the other.
    let origins = [
        Origin::start(Ipv4Addr::new(127, 0, 0, 77), [&first, &second]),
        Origin::start(Ipv4Addr::new(127, 0, 0, 78), [&second, &first]),
    ];

    let mut next = Instant::now();
    for id in 0..MESSAGES {
        if id == DEATH {
            let both = eventually(LIMIT, || first.sessions() > 0 && second.sessions() > 0);
            assert!(both, "both take mail\n{}", first.edge.log().tail());
            let is_busy = meets_a_session(&origins[0], &first);
            assert!(is_busy, "nothing is under way\n{}", first.edge.log().tail());
            first.edge.signal("KILL");
            first.edge.wait_exit(LIMIT);
        }
        if id == RETURN {
            // The identity is all that it needs.
            first.edge = first.builder.clone().without_auth_key().spawn();
        }
        pace(next);
        next += INTERVAL;
        origins[id % 2].submit(id);
        // One that was sent to the dead host first.
        if id == DEATH + 2 {
            mail.home.wait_message("alice", &subject(DEATH), DETOUR_LIMIT);
            next = Instant::now();
        }
    }
    let delivered = eventually(LIMIT, || origins.iter().all(Origin::is_done));
    assert!(delivered, "{}\n{}", origins[0].postfix.log().tail(), origins[1].postfix.log().tail());
    arrived_as_sent(&mail, &origins);

    first.edge.wait_ready(LIMIT);
    assert_eq!(addresses(&tailnet), before, "it is the same node as before");
    let sessions = first.sessions();
    origins[0].submit(MESSAGES + 2);
    mail.home.wait_message("alice", &subject(MESSAGES + 2), LIMIT);
    assert!(eventually(LIMIT, || first.sessions() > sessions), "{}", first.edge.log().tail());
    for mx in [&first, &second] {
        no_crash(mx.edge.log());
    }
}

/// Every message is there, with its sender's address; twice only where the connection broke between the
/// end of the message and the answer to it, which SMTP cannot tell apart from a loss.
#[track_caller]
fn arrived_as_sent(mail: &MailServer, origins: &[Origin; 2]) {
    let messages = mail.home.messages("alice");
    let mut twice = 0;
    for id in 0..=MESSAGES {
        let line = format!("Subject: {}\n", subject(id));
        let copies: Vec<&String> = messages.iter().filter(|text| text.contains(&line)).collect();
        assert!((1..=2).contains(&copies.len()), "{} copies of message {id}", copies.len());
        twice += copies.len() - 1;
        let from = format!("[{}]", origins[id % 2].address);
        for copy in copies {
            // The first one is the mailbox's own.
            let received = copy.split("Received: ").nth(1).unwrap_or_default();
            assert!(received.contains(&from), "message {id} is not from {from}: {received}");
        }
    }
    let broken: usize = origins.iter().map(|origin| origin.postfix.log().count("lost connection")).sum();
    eprintln!("{} messages: {broken} sessions broke, {twice} messages came twice", MESSAGES + 1);
    assert!(twice <= broken, "{twice} messages came twice, and {broken} sessions broke");
    for origin in origins {
        assert_eq!(origin.postfix.log().count("status=bounced"), 0, "{}", origin.postfix.log().tail());
    }
}

#[test]
fn a_mailbox_trusts_the_edges_that_it_is_told_and_no_other() {
    const CLIENT: &str = "127.0.0.77";
    let tailnet = tailnet_with(&[]);
    tailnet.show_peers(MAILBOX);
    let edges = ["edge-a", "edge-b", "edge-c"].map(|name| {
        let builder = edge_on(&tailnet).listener(Listener::new("imap", "imap", 143));
        let builder = builder.set("timeouts", "hold", r#""1s""#);
        let edge = builder.set("tailnet", "hostname", &format!("{name:?}")).spawn();
        edge.wait_ready(LIMIT);
        edge
    });
    // As the mailbox sees them, who has 127 for 100.
    let nodes = addresses(&tailnet);
    let network = |name: &str| {
        let ip = nodes[name][0].as_str().and_then(|ip| ip.strip_prefix("100.")).expect("an IPv4 address");
        format!("127.{ip}/32")
    };
    let trust = format!("haproxy_trusted_networks = {} {}", network("edge-a"), network("edge-b"));
    let dovecot = Dovecot::start_with(&MailHome::create(), &trust);
    tailnet.forward(MAILBOX, 143, dovecot.imap);
    let [first, second, stranger] = &edges;
    for edge in [first, second] {
        let mut client = LineClient::new(client_from(CLIENT, edge.addr("imap")));
        let port = client.stream().local_addr().expect("it is connected").port();
        client.imap_login("alice", PASSWORD);
        let login = dovecot.wait_log(&format!("rport={port},"), LIMIT);
        tells(&login, &["Login: user=<alice>", &format!("rip={CLIENT},")]);
    }
    let refusal = b"* BYE [UNAVAILABLE] Service not available, please try again later\r\n";
    hears_last(&mut client_from(CLIENT, stranger.addr("imap")), refusal);
    stranger.wait_log("it may not trust this edge's PROXY header", LIMIT);
    let network = network("edge-c");
    let peer = network.trim_end_matches("/32");
    dovecot
        .log()
        .wait_line("who is not trusted", LIMIT, |line| line.contains("haproxy") && line.contains(peer));
}

#[test]
fn ephemeral_edges_share_a_key_and_serve_side_by_side() {
    let mailbox = Stub::start(stub::echo_after_header);
    let tailnet = tailnet_with(&[(2525, mailbox.addr)]);
    tailnet.set_auth_key_table(&[AuthKey {
        key: "tskey-auth-shared",
        ephemeral: true,
        ..AuthKey::default()
    }]);
    let builder = edge_on(&tailnet).listener(tcp("mail")).auth_key("tskey-auth-shared");
    let builder = builder.set("tailnet", "ephemeral", "true");
    let names = || addresses(&tailnet).into_keys().collect::<Vec<_>>();
    let mut first = builder.spawn();
    first.wait_ready(LIMIT);
    let second = builder.spawn();
    second.wait_ready(LIMIT);
    let other = format!("{EDGE}-1");
    tells(&second.wait_log("which is taken", LIMIT), &[" WARN ", &other]);
    assert_eq!(names(), [MAILBOX, EDGE, &other]);
    drop(echoes(first.addr("mail")));
    let mut client = echoes(second.addr("mail"));

    // One is taken away, as when a deployment shrinks, and its node with it; and comes back.
    first.signal("TERM");
    stops(&mut first, LIMIT);
    assert_eq!(names(), [MAILBOX, &other]);
    hears_itself(&mut client);
    let third = builder.spawn();
    third.wait_ready(LIMIT);
    drop(echoes(third.addr("mail")));
    hears_itself(&mut client);
    assert_eq!(names().len(), 3);
    for edge in [&first, &second, &third] {
        no_crash(edge.log());
    }
}
