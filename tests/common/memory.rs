//! Situations in which the edge's memory is measured: by the bench, and at coarser bounds by a test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256};

use super::edge::{Builder, Edge, Listener};
use super::http;
use super::tailnet::TestTailnet;

pub const LIMIT: Duration = Duration::from_secs(60);
const MAILBOX: &str = "stalwart";
const GREETING: &[u8] = b"* OK IMAP4rev1 ready\r\n";

/// What the mailbox does with a connection.
#[derive(Clone, Copy)]
pub enum Manner {
    /// Says this, and then reads and says nothing.
    Says(&'static [u8]),
    /// Serves it in a thread of its own.
    Serves(fn(TcpStream)),
}

/// The mailbox's ports.
pub const PORTS: [(&str, u16, Manner); 5] = [
    ("swallows", 2501, Manner::Serves(swallow)),
    ("pours", 2502, Manner::Serves(pour)),
    ("stalls", 2503, Manner::Says(b"")),
    ("greets", 2504, Manner::Says(GREETING)),
    ("hashes", 2505, Manner::Serves(hash)),
];

/// An edge before a mailbox with these ports.
pub struct Setup {
    // Dropped in this order.
    pub edge: Edge,
    _tailnet: TestTailnet,
}

impl Setup {
    /// `mailbox` is where [`serve`] serves the ports, seen from the tailnet's program.
    pub fn start(tailnet: TestTailnet, mailbox: &[SocketAddr], edge: Builder) -> Setup {
        let forwards: Vec<_> =
            PORTS.iter().zip(mailbox).map(|((_, port, _), address)| (*port, *address)).collect();
        tailnet.add_node(MAILBOX, &["tag:stalwart"], &forwards);
        let builder = edge
            .control_url(tailnet.control_url())
            .auth_key("tskey-auth-test")
            .upstream(MAILBOX)
            .set("limits", "max_connections_per_client", "0");
        let builder = PORTS.iter().fold(builder, |builder: Builder, (name, port, _)| {
            builder.listener(Listener::new(name, "tcp", *port).set("listen", r#"["127.0.0.1:0"]"#))
        });
        let edge = builder.spawn();
        edge.wait_ready(LIMIT);
        Setup { edge, _tailnet: tailnet }
    }

    pub fn connect(&self, port: &str) -> TcpStream {
        let client = TcpStream::connect(self.edge.addr(port)).expect("the edge listens");
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.set_write_timeout(Some(LIMIT)).unwrap();
        client
    }

    /// So many streams at full speed; how many bytes have moved in this time once they have gone on for a
    /// while.
    pub fn stream(&self, port: &str, streams: usize, warm_up: Duration, lasting: Duration) -> u64 {
        let moved = Arc::new(AtomicU64::new(0));
        let run = if port == "pours" { take } else { give };
        let threads = (0..streams).map(|_| {
            let (client, moved) = (self.connect(port), Arc::clone(&moved));
            spawn(move || run(client, warm_up + lasting, &moved))
        });
        let threads = threads.collect();
        sleep(warm_up);
        let before = moved.load(Ordering::Relaxed);
        sleep(lasting);
        let after = moved.load(Ordering::Relaxed);
        join(threads);
        after - before
    }

    /// So many clients that do not read what the mailbox pours, and so many whose mailbox takes nothing, once
    /// nothing moves any more.
    pub fn stall(&self, each_way: usize) -> Vec<TcpStream> {
        let mut open: Vec<_> = (0..each_way).map(|_| self.connect("pours")).collect();
        let pushing: Vec<_> = (0..each_way)
            .map(|_| {
                let mut client = self.connect("stalls");
                open.push(client.try_clone().unwrap());
                spawn(move || {
                    client.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
                    while client.write_all(&[7; 64 << 10]).is_ok() {}
                })
            })
            .collect();
        join(pushing);
        open
    }

    /// What connections hold is no more than they may, by the edge's own account.
    pub fn bytes_in_flight_are_bounded(&self) {
        let (held, most) = (self.metric("in_flight_bytes "), self.metric("in_flight_max_bytes "));
        assert!(held > 0 && held <= most, "{held} bytes of {most}");
    }

    /// The value of a metric, by what its line begins with.
    fn metric(&self, name: &str) -> u64 {
        let metrics = http::get(self.edge.addr("admin"), "/metrics").body;
        let name = format!("tailwart_edge_{name}");
        metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).expect("it is measured")
    }

    /// So many clients that were greeted and say nothing.
    pub fn idle(&self, count: usize) -> Vec<TcpStream> {
        const THREADS: usize = 8;
        let address = self.edge.addr("greets");
        let some = move || -> Vec<TcpStream> {
            let client = || greeted(TcpStream::connect(address).expect("the edge listens"));
            (0..count / THREADS).map(|_| client()).collect()
        };
        let threads: Vec<_> = (0..THREADS).map(|_| spawn(some)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("all are greeted")).collect()
    }

    pub fn cpu_seconds(&self) -> f64 {
        let stat = procfs::process::Process::new(self.edge.pid() as i32).and_then(|process| process.stat());
        let stat = stat.expect("the edge runs");
        (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64
    }

    /// Go's heap as far as the system has not got it back.
    pub fn go_heap_bytes(&self) -> u64 {
        let in_state = |state: &str| self.metric(&format!("go_heap_bytes{{state=\"{state}\"}} "));
        in_state("in_use") + in_state("idle")
    }
}

/// Once the mailbox has greeted it.
pub fn greeted(mut client: TcpStream) -> TcpStream {
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut greeting = [0; GREETING.len()];
    client.read_exact(&mut greeting).expect("the mailbox greets");
    client
}

fn give(mut client: TcpStream, lasting: Duration, moved: &AtomicU64) {
    let (began, bytes) = (Instant::now(), vec![7; 64 << 10]);
    while began.elapsed() < lasting {
        client.write_all(&bytes).expect("the mailbox reads");
        moved.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
}

fn take(mut client: TcpStream, lasting: Duration, moved: &AtomicU64) {
    let (began, mut bytes) = (Instant::now(), vec![0; 64 << 10]);
    while began.elapsed() < lasting {
        let read = client.read(&mut bytes).expect("the mailbox pours");
        moved.fetch_add(read as u64, Ordering::Relaxed);
    }
}

pub fn join(threads: Vec<JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().expect("it does not fail"));
}

/// Serves the ports for as long as the process lives; where they are.
pub fn serve() -> Vec<SocketAddr> {
    let ports = PORTS.map(|(_, _, manner)| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        spawn(move || {
            let mut kept = Vec::new(); // thousands: no thread each
            for mut stream in listener.incoming().flatten() {
                match manner {
                    Manner::Says(words) => {
                        let _ = stream.write_all(words);
                        kept.push(stream);
                    }
                    Manner::Serves(serve) => drop(spawn(move || serve(stream))),
                }
            }
        });
        address
    });
    ports.into()
}

fn swallow(mut stream: TcpStream) {
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

fn pour(mut stream: TcpStream) {
    while stream.write_all(&[7; 64 << 10]).is_ok() {}
}

/// Answers with the hash of what follows the PROXY header.
fn hash(mut stream: TcpStream) {
    let mut header = [0; 16];
    stream.read_exact(&mut header).expect("a header comes first");
    let rest = u16::from_be_bytes([header[14], header[15]]);
    stream.read_exact(&mut vec![0; rest.into()]).expect("its addresses follow");
    let (mut hash, mut part) = (Context::new(&SHA256), vec![0; 64 << 10]);
    while let Ok(read @ 1..) = stream.read(&mut part) {
        hash.update(&part[..read]);
    }
    let _ = stream.write_all(hash.finish().as_ref());
}
