//! Nothing of a connection ever goes out on the host's own network: what the
//! tailnet does not know is refused, and neither looked up nor dialled
//! elsewhere.

use std::net::SocketAddr;

use crate::common::edge::{Edge, Listener};
use crate::common::netns::Namespace;
use crate::common::process::Daemon;
use crate::common::stub::{self, Stub};
use crate::common::tailnet::{Options, TestTailnet};
use crate::common::tools::run;
use crate::common::wait::eventually;
use crate::setup::{LIMIT, MAILBOX, edge_on, no_crash, tells};

/// What must not be seen on the cable: packets to or from a tailnet address that
/// are not inside WireGuard, packets to the address of an upstream that is no
/// peer (192.0.2.77), and questions to a name server.
const FORBIDDEN: &str = "net 100.64.0.0/10 or ip6 net fd7a:115c:a1e0::/48 or net 192.0.2.76/30 or port 53";

/// One attempt for each of these, and how it looks in the capture. Nobody is
/// there to answer.
const PLANTED: [(&str, &str); 4] = [
    (": > /dev/tcp/100.64.0.99/25", "> 100.64.0.99.25: Flags [S]"),
    (": > /dev/tcp/fd7a:115c:a1e0::99/25", "> fd7a:115c:a1e0::99.25: Flags [S]"),
    (": > /dev/tcp/192.0.2.78/25", "> 192.0.2.78.25: Flags [S]"),
    ("getent hosts planted.example", "planted.example."),
];

/// A second client comes when the first was turned away: the look-up of a name
/// seen before takes another path.
const CLIENTS: usize = 2;

/// What a client inside hears from a listener; nothing if it is turned away.
fn heard(host: &Namespace, listener: SocketAddr) -> String {
    // Speaks first, since that is what would leak.
    let script =
        format!("exec 3<>/dev/tcp/{}/{} && echo secret >&3; head -n 1 <&3", listener.ip(), listener.port());
    let finished = run(host.command("bash").args(["-c", &script]), b"", LIMIT);
    assert!(finished.status.is_some(), "the client was left hanging");
    finished.stdout()
}

/// Clients of the listener are turned away with these words in the log.
#[track_caller]
fn turned_away(host: &Namespace, edge: &Edge, listener: &str, words: &[&str]) {
    let before = refusals(edge, listener).len();
    for _ in 0..CLIENTS {
        assert_eq!(heard(host, edge.addr(listener)), "", "{listener}");
    }
    let told = eventually(LIMIT, || refusals(edge, listener).len() == before + CLIENTS);
    assert!(told, "{}", edge.log().tail());
    refusals(edge, listener)[before..].iter().for_each(|line| tells(line, words));
}

fn refusals(edge: &Edge, listener: &str) -> Vec<String> {
    let ours = format!("listener={listener:?}");
    let text = edge.log().text();
    let lines = text.lines().filter(|line| line.contains("cannot reach") && line.contains(&ours));
    lines.map(str::to_owned).collect()
}

/// What went out that must not. Our own packets, which come last, show that the
/// capture has seen everything until then and would have seen a leak.
#[track_caller]
fn leaked(host: &Namespace, capture: &Daemon) -> Vec<String> {
    for (attempt, seen) in PLANTED {
        let attempt = Daemon::spawn("the planted packet", host.command("bash").args(["-c", attempt]));
        capture.output().wait(seen, LIMIT);
        drop(attempt);
    }
    let text = capture.output().text();
    let packets = text.lines().filter(|line| line.contains(" IP ") || line.contains(" IP6 "));
    packets.filter(|line| !PLANTED.iter().any(|(_, own)| line.contains(own))).map(str::to_owned).collect()
}

/// A listener with an upstream of its own.
fn to(name: &str, upstream: &str) -> Listener {
    let listener = Listener::new(name, "tcp", 2525).set("listen", r#"["127.0.0.1:0"]"#);
    listener.set("upstream", &format!("{upstream:?}"))
}

#[test]
fn nothing_ever_goes_out_on_the_hosts_network() {
    let stub = Stub::start(stub::echo_after_header);
    let host = Namespace::create();
    let capture = host.capture(FORBIDDEN);
    let tailnet = TestTailnet::start_with(&Options { host: Some(host.outside.into()), ..Options::default() });
    let mailbox = tailnet.add_node(MAILBOX, &["tag:stalwart"], &[(2525, stub.addr)]);
    let [v4, v6] = [mailbox.ips[0].to_string(), mailbox.ips[1].to_string()];
    let edge = edge_on(&tailnet)
        .wrapped(&host.wrapper())
        .set("timeouts", "connect", r#""2s""#)
        .listener(to("short", MAILBOX))
        .listener(to("full", &mailbox.dns_name))
        .listener(to("v4", &v4))
        .listener(to("v6", &v6))
        .listener(to("internet", "mail.example.com"))
        .listener(to("outside", "192.0.2.77"))
        .listener(to("unused", "100.100.100.100"))
        .spawn();
    edge.wait_ready(LIMIT);
    let known = ["short", "full", "v4", "v6"];
    for listener in known {
        assert_eq!(heard(&host, edge.addr(listener)), "secret\n", "{listener}\n{}", edge.log().tail());
    }
    let unknown = "no peer of that name";
    for listener in ["internet", "outside", "unused"] {
        turned_away(&host, &edge, listener, &[unknown]);
    }

    tailnet.hide_node(MAILBOX);
    known.iter().for_each(|listener| turned_away(&host, &edge, listener, &[unknown]));
    tailnet.show_node(MAILBOX);
    known.iter().for_each(|listener| assert_eq!(heard(&host, edge.addr(listener)), "secret\n"));
    // Nor once the tailnet has dropped us, for good.
    tailnet.set_auth_keys(Some(&["another"]));
    tailnet.remove_node("tailwart-edge");
    for listener in ["short", "v4"] {
        assert_eq!(heard(&host, edge.addr(listener)), "", "{listener}");
    }

    no_crash(edge.log());
    assert_eq!(leaked(&host, &capture), [""; 0], "went out on the host's network");
}

#[test]
fn a_leak_would_be_found() {
    let host = Namespace::create();
    let capture = host.capture(FORBIDDEN);
    for (leak, packet) in [
        (": > /dev/tcp/100.64.0.1/25", "> 100.64.0.1.25: Flags [S]"),
        ("getent hosts stalwart.tail-test.ts.net", "stalwart.tail-test.ts.net."),
    ] {
        let leak = Daemon::spawn("the leak", host.command("bash").args(["-c", leak]));
        capture.output().wait(packet, LIMIT);
        drop(leak);
        let found = leaked(&host, &capture);
        assert!(found.iter().any(|line| line.contains(packet)), "{packet} was overlooked: {found:?}");
    }
}
