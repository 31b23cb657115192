//! A stop: who is served to the end, who is sent away, and what is told of it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::common::client::LineClient;
use crate::common::edge::{Builder, Listener};
use crate::common::net::{backlog, connect, echoes};
use crate::common::sink::{Taken, takes_mail_after};
use crate::common::stub::{self, Conn, MIB, Stub, pattern};
use crate::common::wait::eventually;
use crate::setup::{LIMIT, start_with, stops, tells};

/// What a large message has.
const LARGE: usize = 25 * MIB;

fn listener(protocol: &str) -> Listener {
    Listener::new("mail", protocol, 2525).set("listen", "[\"127.0.0.1:0\"]")
}

fn drain(limit: &str) -> impl FnOnce(Builder) -> Builder {
    let limit = format!("{limit:?}");
    move |edge| edge.set("timeouts", "drain", &limit)
}

/// Takes everything while it sends as much. The two must not wait for each other, as in an echo: with both
/// windows full, gVisor's receiver takes no acknowledgement from beyond the window it advertised last, which
/// may be 255 bytes smaller than one before (`receiver.acceptable` in its `tcp/rcv.go`), and nothing moves
/// any more.
fn sends_and_takes(mut conn: Conn) {
    conn.read_proxy_header();
    let mut writer = conn.stream().try_clone().expect("a descriptor is free");
    let writing = std::thread::spawn(move || {
        writer.write_all(&pattern(LARGE)).expect("the edge takes everything");
        writer.shutdown(Shutdown::Write).expect("it is connected");
    });
    conn.read_to_end();
    writing.join().expect("the writer does not panic");
}

/// Sends all of it and hears as much, slowly until `go_on`: it moves all the time, so that it is not
/// taken for quiet, and does not end. Returns what it heard.
fn exchange(edge: SocketAddr, begun: Sender<()>, go_on: Arc<AtomicBool>) -> JoinHandle<Vec<u8>> {
    // All of it would take a minute.
    const PIECE: usize = LARGE / 6000;
    const PAUSE: Duration = Duration::from_millis(10);
    std::thread::spawn(move || {
        let mut client = connect(edge);
        let mut writer = client.try_clone().expect("a descriptor is free");
        let writing = std::thread::spawn(move || {
            writer.write_all(&pattern(LARGE)).expect("the edge takes everything");
            writer.shutdown(Shutdown::Write).expect("it is connected");
        });
        let mut received = Vec::new();
        while !eventually(PAUSE, || go_on.load(Ordering::SeqCst)) {
            let mut piece = [0; PIECE];
            client.read_exact(&mut piece).expect("a part comes");
            received.extend(piece);
            let _ = begun.send(()); // the first is waited for
        }
        client.read_to_end(&mut received).expect("the rest comes");
        writing.join().expect("the writer does not panic");
        received
    })
}

#[test]
fn a_large_transfer_each_way_is_not_cut_short() {
    let mailbox = Stub::start(sends_and_takes);
    let mut setup = start_with(&[(2525, mailbox.addr)], &[listener("tcp")], drain("10m"));
    let (begun, has_begun) = channel();
    let go_on = Arc::new(AtomicBool::new(false));
    let client = exchange(setup.edge.addr("mail"), begun, Arc::clone(&go_on));
    has_begun.recv_timeout(LIMIT).expect("the transfer begins");
    setup.edge.signal("TERM");
    setup.edge.wait_log(" stopping ", LIMIT);
    assert!(!client.is_finished(), "the stop comes in the middle");
    go_on.store(true, Ordering::SeqCst);
    let received = client.join().expect("a good client");
    assert!(received == pattern(LARGE), "{} other bytes received", received.len());
    let record = mailbox.wait_record(0, LIMIT, |record| record.end.is_some());
    assert!(record.payload() == pattern(LARGE), "{} other bytes sent", record.payload().len());
    stops(&mut setup.edge, LIMIT);
    let told = setup.edge.wait_log(" stopped: ", LIMIT);
    tells(&told, &["connections ended by themselves: 1, closed while idle: 0, cut: 0, in "]);
}

#[test]
fn each_connection_is_counted_as_what_became_of_it() {
    let mailbox = Stub::start(|mut conn| {
        conn.read_proxy_header();
        let mut first = [0];
        let _ = conn.read(&mut first);
        match first[0] {
            // Takes what comes and never ends.
            b'u' => conn.read_to_end(),
            _ => {
                conn.send(&first);
                conn.read_to_end();
            }
        }
    });
    let mut setup = start_with(&[(2525, mailbox.addr)], &[listener("tcp")], drain("2s"));
    let mail = setup.edge.addr("mail");
    let open = |word: u8| {
        let mut client = connect(mail);
        client.write_all(&[word]).expect("the edge takes it");
        client
    };
    let mut quiet: Vec<TcpStream> = (0..3).map(|_| open(b'q')).collect();
    for client in &mut quiet {
        client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
        client.read_exact(&mut [0]).expect("the mailbox answers");
    }
    let busy = open(b'u'); // waits for an answer that never comes
    assert!(eventually(LIMIT, || (0..4).filter_map(|i| mailbox.record(i)).count() == 4));
    mailbox.wait_record(3, LIMIT, |record| record.bytes.ends_with(b"u"));
    let began = Instant::now();
    setup.edge.signal("TERM");
    for client in &mut quiet {
        assert_eq!(client.read(&mut [0]).expect("an orderly end"), 0);
    }
    stops(&mut setup.edge, LIMIT);
    let took = began.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(2 + 7)).contains(&took), "took {took:?}");
    let told = setup.edge.wait_log(" stopped: ", LIMIT);
    tells(&told, &["connections ended by themselves: 0, closed while idle: 3, cut: 1, in "]);
    drop(busy);
}

#[test]
fn whoever_came_before_the_stop_is_served() {
    const WAITING: u32 = 20;
    let taken = Taken::default();
    // Longer than what makes a connection quiet.
    let slow = takes_mail_after(Duration::from_secs(3), "mailbox", &taken);
    let mailbox = Stub::start(slow);
    let mut setup = start_with(&[(2525, mailbox.addr)], &[listener("smtp")], drain("1m"));
    let mail = setup.edge.addr("mail");
    let dialled = connect(mail);
    assert!(eventually(LIMIT, || mailbox.accepted() == 1));
    // The kernel has accepted them, and the edge has not heard of it when the signal comes.
    setup.edge.pause();
    let waiting: Vec<TcpStream> = (0..WAITING).map(|_| connect(mail)).collect();
    // The last part of a handshake is the kernel's own, and may come a moment later.
    assert!(eventually(LIMIT, || backlog(mail) == WAITING), "{} of {WAITING} wait", backlog(mail));
    setup.edge.signal("TERM");
    setup.edge.resume();
    let clients: Vec<JoinHandle<()>> = waiting
        .into_iter()
        .chain([dialled])
        .enumerate()
        .map(|(number, client)| {
            let message = format!("Subject: message-{number}\n\nhello\n");
            std::thread::spawn(move || {
                let mut client = LineClient::new(client);
                client.send_mail("a@example.net", "b@example.org", &message);
                assert_eq!(client.line(), None, "an orderly end");
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("it is served"));
    stops(&mut setup.edge, LIMIT);
    assert_eq!(taken.count(), WAITING as usize + 1);
    let told = setup.edge.wait_log(" stopped: ", LIMIT);
    tells(&told, &["connections ended by themselves: 21, closed while idle: 0, cut: 0"]);
}

#[test]
fn a_client_that_never_closes_does_not_hold_the_exit_up() {
    let mailbox = Stub::start(stub::echo_after_header);
    let mut setup = start_with(&[(2525, mailbox.addr)], &[listener("tcp")], drain("2s"));
    let _stays = echoes(setup.edge.addr("mail"));
    let began = Instant::now();
    setup.edge.signal("TERM");
    stops(&mut setup.edge, LIMIT);
    assert!(began.elapsed() < Duration::from_secs(2 + 7), "took {:?}", began.elapsed());
    tells(&setup.edge.wait_log(" stopped: ", LIMIT), &["closed while idle: 1, cut: 0"]);
}
