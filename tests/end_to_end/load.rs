//! Many connections: what each costs, and what happens when there are too many.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::common::edge::{Builder, Edge, Listener};
use crate::common::net::{backlog, connect, echoes};
use crate::common::stub::{self, Stub};
use crate::common::tools::run;
use crate::common::wait::eventually;
use crate::setup::{LIMIT, MAILBOX, Setup, no_crash, start_with};

/// A listener on one address.
fn listener(name: &str) -> Listener {
    Listener::new(name, "tcp", 2525).set("listen", r#"["127.0.0.1:0"]"#)
}

/// All clients are one here.
fn unlimited(edge: Builder) -> Builder {
    edge.set("limits", "max_connections_per_client", "0")
}

#[test]
fn running_out_of_descriptors_costs_no_listener_and_few_words() {
    const FREE: usize = 40;
    let stub = Stub::start(stub::echo_after_header);
    let setup = start_with(&[(2525, stub.addr)], &[listener("first"), listener("second")], unlimited);
    let addresses = [setup.edge.addr("first"), setup.edge.addr("second")];
    addresses.into_iter().for_each(|address| drop(echoes(address)));
    // Lowered while it runs: at start it would only lower the connection limit.
    let limit = format!("--nofile={}:", setup.edge.fds() + FREE);
    let pid = setup.edge.pid().to_string();
    run(Command::new("prlimit").args(["--pid", &pid, &limit]), b"", LIMIT).expect_success();

    let flood: Vec<TcpStream> = (0..4 * FREE).flat_map(|_| addresses).map(connect).collect();
    for name in ["first", "second"] {
        let trouble =
            |line: &str| line.contains("cannot accept") && line.contains(&format!("listener={name:?}"));
        let line = setup.edge.log().wait_line("that it cannot accept", LIMIT, trouble);
        assert!(line.contains("descriptor limit") && line.contains("Too many open files"), "{line}");
    }
    drop(flood);
    addresses.into_iter().for_each(|address| drop(echoes(address)));
    // Clients come and go at the limit: each that leaves lets another in, and the next is one too
    // many again.
    let mut clients: VecDeque<TcpStream> = VecDeque::new();
    for address in addresses.into_iter().cycle().take(400) {
        clients.push_back(connect(address));
        if clients.len() > 2 * FREE {
            clients.pop_front();
        }
    }
    drop(clients);
    let over = eventually(LIMIT, || {
        addresses.into_iter().for_each(|address| drop(echoes(address)));
        setup.edge.log().count("accepting again") == 2
    });
    assert!(over, "{}", setup.edge.log().tail());
    assert_eq!(setup.edge.log().count("cannot accept"), 2, "{}", setup.edge.log().tail());
    no_crash(setup.edge.log());
}

#[test]
fn the_connection_limit_keeps_descriptors_for_everything_else() {
    const CLIENTS: usize = 150;
    let stub = Stub::start(stub::echo_after_header);
    let few = |edge: Builder| unlimited(edge).wrapped(&["prlimit", "--nofile=200:200"]);
    let setup = start_with(&[(2525, stub.addr)], &[listener("mail")], few);
    let mail = setup.edge.addr("mail");
    let line = setup.edge.wait_log("descriptor limit of 200", LIMIT);
    let limit = line.split("max_connections=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    let limit: usize = limit.unwrap_or_else(|| panic!("no limit in: {line}"));
    assert!((50..100).contains(&limit), "{line}");

    // One after the other: a mailbox on tsnet takes in few at a time and lets others wait for seconds.
    let mut flood = Vec::new();
    while flood.len() < limit {
        flood.push(connect(mail));
        let served = eventually(LIMIT, || stub.accepted() == flood.len());
        assert!(served, "{} of {}\n{}", stub.accepted(), flood.len(), setup.edge.log().tail());
    }
    flood.extend((limit..CLIENTS).map(|_| connect(mail)));
    let left = u32::try_from(CLIENTS - limit).expect("some wait");
    assert!(eventually(LIMIT, || backlog(mail) == left), "{} wait", backlog(mail));
    assert_eq!(stub.accepted(), limit);
    drop(flood);
    echoes(mail);
    assert_eq!(setup.edge.log().count("cannot accept"), 0, "{}", setup.edge.log().tail());
    no_crash(setup.edge.log());
}

const GREETING: &[u8] = b"* OK IMAP4rev1 ready\r\n";

/// A mailbox that greets and then holds its connections, thousands of them on
/// one thread.
struct Holder {
    addr: SocketAddr,
    held: Arc<Mutex<Vec<TcpStream>>>,
    ending: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Holder {
    fn start() -> Holder {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
        let addr = listener.local_addr().expect("it is bound");
        let (held, ending) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (holds, ends) = (Arc::clone(&held), Arc::clone(&ending));
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream: TcpStream = stream.expect("there are descriptors enough");
                if ends.load(Ordering::SeqCst) {
                    return;
                }
                let _ = stream.write_all(GREETING);
                holds.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
            }
        });
        Holder { addr, held, ending, acceptor: Some(acceptor) }
    }

    /// Closes them all.
    fn release(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.addr);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// So many more clients, each greeted by the mailbox.
fn greeted_clients(edge: SocketAddr, count: usize) -> Vec<TcpStream> {
    const THREADS: usize = 8;
    let some = move || -> Vec<TcpStream> { (0..count / THREADS).map(|_| greeted(edge)).collect() };
    let threads: Vec<_> = (0..THREADS).map(|_| std::thread::spawn(some)).collect();
    threads.into_iter().flat_map(|thread| thread.join().expect("every client is greeted")).collect()
}

fn greeted(edge: SocketAddr) -> TcpStream {
    let mut client = connect(edge);
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut greeting = [0; GREETING.len()];
    client.read_exact(&mut greeting).expect("the mailbox greets");
    assert_eq!(&greeting, GREETING);
    client
}

/// What the edge uses at rest.
#[derive(Debug)]
struct Use {
    descriptors: usize,
    threads: u64,
    rss_kb: u64,
}

/// Garbage of the connecting is not the idle connections' cost.
fn at_rest(edge: &Edge) -> Use {
    let rss_kb = edge.settled_rss_kb(LIMIT);
    Use { descriptors: edge.fds(), threads: edge.threads(), rss_kb }
}

/// This process holds both ends of every connection.
fn raise_own_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
        .expect("up to the hard limit anybody may");
}

#[test]
fn an_idle_connection_costs_one_descriptor_no_thread_and_about_ten_kilobytes() {
    const FEW: usize = 1000;
    const MANY: usize = 5000;
    // Measured: 9,400 to 10,100, up to 900 of which are garbage of the connecting that the collector has left.
    const BYTES: u64 = 12_000;
    raise_own_descriptor_limit();
    let holder = Holder::start();
    let setup: Setup = start_with(&[(2525, holder.addr)], &[listener("imap")], unlimited);
    let imap = setup.edge.addr("imap");
    let before = at_rest(&setup.edge);
    let mut clients = greeted_clients(imap, FEW);
    let few = at_rest(&setup.edge);
    clients.extend(greeted_clients(imap, MANY - FEW));
    let many = at_rest(&setup.edge);

    let each = (many.rss_kb.saturating_sub(few.rss_kb)) * 1024 / (MANY - FEW) as u64;
    eprintln!("idle connections: 0 {before:?}, {FEW} {few:?}, {MANY} {many:?}: {each} bytes each");
    // The node may gain or lose one or two of its own meanwhile.
    for (wanted, used) in [(FEW, &few), (MANY, &many)] {
        let found = used.descriptors - before.descriptors;
        assert!(found.abs_diff(wanted) <= 2, "{found} descriptors for {wanted} connections");
    }
    assert!(many.threads <= few.threads + 2, "{} threads, then {}", few.threads, many.threads);
    assert!(each <= BYTES, "{each} bytes for each connection");

    holder.release();
    drop(clients);
    let freed = eventually(LIMIT, || {
        setup.edge.fds() <= before.descriptors + 2 && setup.tailnet.stats(MAILBOX).open == 0
    });
    assert!(freed, "{} descriptors, {} before", setup.edge.fds(), before.descriptors);
    drop(greeted(imap));
    no_crash(setup.edge.log());
}
