//! How connections end, and what becomes of the bytes on their way.
//!
//! Each direction ends on its own, an abrupt end stays abrupt, nothing that was sent before an
//! orderly end is lost, and the log says whose end it was. All but the tests that measure memory
//! share one edge; each takes a listener of its own, so that its stub sees its connections only.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::common::edge::{Edge, Listener};
use crate::common::net::{connect, reset};
use crate::common::stub::{
    Conn, MIB, Record, Stub, answer_after_half_close, close_after_header, echo_after_header, pattern, record,
    send_then_half_close,
};
use crate::common::wait::eventually;
use crate::setup::{LIMIT, MAILBOX, Setup, start};

/// More than any buffer on the way holds by itself, so that a relay that ends too early loses some.
const LARGE: usize = 8 * MIB;

// One direction ends, the other goes on.

#[test]
fn a_reply_after_the_clients_half_close_arrives_complete() {
    let relay = Relayed::start(answer_after_half_close(LARGE));
    let client = relay.client();
    send(&client, &pattern(LARGE));
    client.shutdown(Shutdown::Write).expect("it is connected");
    assert_same(&read_to_end(&client), &pattern(LARGE), "the reply");
    assert_same(relay.ended_record().payload(), &pattern(LARGE), "the request");
    relay.assert_logged(&client, "client closed", LARGE, LARGE);
}

#[test]
fn a_request_after_the_servers_half_close_arrives_complete() {
    let relay = Relayed::start(send_then_half_close(LARGE));
    let client = relay.client();
    assert_same(&read_to_end(&client), &pattern(LARGE), "the server's bytes");
    send(&client, &pattern(LARGE));
    client.shutdown(Shutdown::Write).expect("it is connected");
    assert_same(relay.ended_record().payload(), &pattern(LARGE), "the client's bytes");
    relay.assert_logged(&client, "upstream closed", LARGE, LARGE);
}

#[test]
fn what_a_server_sent_before_closing_arrives_complete() {
    let relay = Relayed::start(|mut conn| {
        conn.read_proxy_header();
        conn.send(&pattern(LARGE));
    });
    let client = relay.client();
    assert_same(&read_to_end(&client), &pattern(LARGE), "the server's bytes");
    let local = local_addr(&client);
    drop(client);
    assert_eq!(relay.end_of(local), "upstream closed");
}

#[test]
fn what_a_client_sent_before_closing_arrives_complete() {
    let relay = Relayed::start(record);
    let client = relay.client();
    let local = local_addr(&client);
    send(&client, &pattern(LARGE));
    drop(client);
    assert_same(relay.ended_record().payload(), &pattern(LARGE), "the client's bytes");
    assert_eq!(relay.end_of(local), "client closed");
}

#[test]
fn both_sides_may_end_at_once() {
    const ROUNDS: usize = 20;
    let together = Arc::new(Barrier::new(2));
    let server = Arc::clone(&together);
    let relay = Relayed::start(move |mut conn| {
        conn.read_proxy_header();
        conn.send(&pattern(MIB));
        server.wait();
        conn.half_close();
        conn.read_to_end();
    });
    for index in 0..ROUNDS {
        let client = relay.client();
        send(&client, &pattern(MIB / 2));
        // The script runs, so it will come to the barrier too.
        relay.stub.wait_record(index, LIMIT, |record| !record.bytes.is_empty());
        together.wait();
        client.shutdown(Shutdown::Write).expect("it is connected");
        assert_same(&read_to_end(&client), &pattern(MIB), "the server's bytes");
        let record = relay.stub.wait_record(index, LIMIT, |record| record.end.is_some());
        assert_eq!(record.end, Some(Ok(())));
        assert_same(record.payload(), &pattern(MIB / 2), "the client's bytes");
        let end = relay.end_of(local_addr(&client));
        assert!(["client closed", "upstream closed"].contains(&&*end), "{end}");
    }
}

#[test]
fn a_client_that_closes_at_once_is_closed_at_the_server() {
    const CLIENTS: usize = 50;
    let relay = Relayed::start(record);
    let clients: Vec<SocketAddr> = (0..CLIENTS).map(|_| local_addr(&relay.client())).collect();
    for index in 0..CLIENTS {
        let record = relay.stub.wait_record(index, LIMIT, |record| record.end.is_some());
        assert_eq!((record.payload(), record.end), (&[][..], Some(Ok(()))));
    }
    clients.iter().for_each(|client| assert_eq!(relay.end_of(*client), "client closed"));
}

#[test]
fn a_server_that_closes_at_once_is_closed_at_the_client() {
    let relay = Relayed::start(close_after_header);
    let client = relay.client();
    assert_eq!(read_to_end(&client), b"");
    let local = local_addr(&client);
    drop(client);
    assert_eq!(relay.end_of(local), "upstream closed");
}

// An abrupt end stays one.

#[test]
fn a_reset_by_the_client_reaches_the_server() {
    let relay = Relayed::start(greet_then_record);
    let client = relay.client();
    read_greeting(&client);
    let local = local_addr(&client);
    reset(client);
    let record = relay.stub.wait_record(0, LIMIT, |record| record.end.is_some());
    assert_eq!(record.end, Some(Err(ErrorKind::ConnectionReset)));
    let end = relay.end_of(local);
    assert!(end.starts_with("client failed: Connection reset"), "{end}");
}

#[test]
fn a_reset_by_the_server_reaches_the_client() {
    let relay = Relayed::start(|mut conn| {
        conn.read_proxy_header();
        // Or the reset might be there before the client has noticed that it is connected.
        let _ = conn.read(&mut [0]);
        conn.reset();
    });
    let client = relay.client();
    send(&client, b"?");
    assert_reset(&client);
    let end = relay.end_of(local_addr(&client));
    assert!(end.starts_with("upstream failed: connection reset"), "{end}");
}

#[test]
fn a_reset_by_the_server_after_the_clients_half_close_reaches_the_client() {
    let relay = Relayed::start(|mut conn| {
        conn.read_to_end();
        conn.reset();
    });
    let client = relay.client();
    client.shutdown(Shutdown::Write).expect("it is connected");
    assert_reset(&client);
    let end = relay.end_of(local_addr(&client));
    assert!(end.starts_with("upstream failed: connection reset"), "{end}");
}

#[test]
fn a_reset_by_the_client_after_the_servers_half_close_reaches_the_server() {
    let relay = Relayed::start(send_then_half_close(1));
    let client = relay.client();
    assert_eq!(read_to_end(&client), pattern(1));
    let local = local_addr(&client);
    reset(client);
    let record = relay.stub.wait_record(0, LIMIT, |record| record.end.is_some());
    assert_eq!(record.end, Some(Err(ErrorKind::ConnectionReset)));
    let end = relay.end_of(local);
    assert!(end.starts_with("client failed: Connection reset"), "{end}");
}

// Small pieces.

#[test]
fn writes_of_one_byte_come_back_exactly() {
    const COUNT: usize = 4096;
    let relay = Relayed::start(echo_byte_by_byte);
    let client = relay.client();
    client.set_nodelay(true).expect("a TCP option");
    let bytes = pattern(COUNT);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bytes.chunks(1).for_each(|byte| send(&client, byte));
            client.shutdown(Shutdown::Write).expect("it is connected");
        });
        assert_same(&read_to_end(&client), &bytes, "the echo");
    });
    relay.assert_logged(&client, "client closed", COUNT, COUNT);
}

/// Sends each byte back in a write, and with no delay mostly in a packet, of its own.
fn echo_byte_by_byte(mut conn: Conn) {
    conn.stream().set_nodelay(true).expect("a TCP option");
    conn.read_proxy_header();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = conn.read(&mut chunk) {
        chunk[..count].chunks(1).for_each(|byte| conn.send(byte));
    }
}

// Sides that do not read.

/// What a side sends that the other does not read: more than all buffers on the way take together.
const FLOOD: usize = 64 * MIB;

fn flood() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| pattern(FLOOD))
}

#[test]
fn a_client_that_does_not_read_loses_nothing_and_costs_others_nothing() {
    let written = Arc::new(AtomicUsize::new(0));
    let progress = Arc::clone(&written);
    let relay = Measured::start(move |mut conn| {
        conn.read_proxy_header();
        write_counted(conn.stream(), flood(), &progress);
        conn.half_close();
        conn.read_to_end();
    });
    let before = relay.edge().rss_kb();
    let client = relay.slow_client();
    wait_stalled(&written);
    relay.assert_memory_bounded(before);
    relay.assert_others_are_served();
    assert_same(&read_to_end(&client), flood(), "the server's bytes");
}

#[test]
fn a_server_that_does_not_read_loses_nothing_and_costs_others_nothing() {
    let (go, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let relay = Measured::start(move |mut conn| {
        conn.read_proxy_header();
        let _ = wait.lock().expect("one connection").recv();
        conn.read_to_end();
    });
    let before = relay.edge().rss_kb();
    let client = relay.slow_client();
    let written = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            write_counted(&client, flood(), &written);
            client.shutdown(Shutdown::Write).expect("it is connected");
        });
        wait_stalled(&written);
        relay.assert_memory_bounded(before);
        relay.assert_others_are_served();
        go.send(()).expect("the script waits");
    });
    let record = relay.stub.wait_record(0, LIMIT, |record| record.end.is_some());
    assert_same(record.payload(), flood(), "the client's bytes");
}

/// Writes, and counts what the kernel took.
fn write_counted(mut stream: &TcpStream, bytes: &[u8], count: &AtomicUsize) {
    for chunk in bytes.chunks(64 * 1024) {
        if stream.write_all(chunk).is_err() {
            return; // the test tells what is missing
        }
        count.fetch_add(chunk.len(), Ordering::SeqCst);
    }
}

/// Waits until a writer has got nowhere for a while: every buffer on the way is full.
#[track_caller]
fn wait_stalled(written: &AtomicUsize) {
    const WHILE: Duration = Duration::from_millis(500);
    let (mut last, mut since) = (0, Instant::now());
    let stalled = eventually(LIMIT, || {
        let now = written.load(Ordering::SeqCst);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        now > 0 && since.elapsed() >= WHILE
    });
    assert!(stalled && last < FLOOD, "the writer was not stopped: {last} of {FLOOD} bytes are gone");
}

/// An edge of its own, whose memory nobody else uses: a relay to a stub, and one to an echo.
struct Measured {
    setup: Setup,
    stub: Stub,
    _echo: Stub,
}

impl Measured {
    fn start(script: impl Fn(Conn) + Send + Sync + 'static) -> Measured {
        let (stub, echo) = (Stub::start(script), Stub::start(echo_after_header));
        let listeners = [Listener::new("slow", "tcp", 1), Listener::new("echo", "tcp", 2)];
        let setup = start(&[(1, stub.addr), (2, echo.addr)], &listeners);
        Measured { setup, stub, _echo: echo }
    }

    fn edge(&self) -> &Edge {
        &self.setup.edge
    }

    /// A client whose connection has got to the stub: what stalls from here on is the data.
    #[track_caller]
    fn slow_client(&self) -> TcpStream {
        let client = client_of(self.edge().addr("slow"));
        self.stub.wait_record(0, LIMIT, |record| !record.bytes.is_empty());
        client
    }

    /// Of what is stuck, the edge holds one netstack buffer (8 MiB received, or 6 MiB to send) and the
    /// relay's own 64 KiB, whatever the sender still has; the collector doubles that, and the pooled
    /// buffers of the packets come on top. Measured: 17 to 27 MB.
    #[track_caller]
    fn assert_memory_bounded(&self, before_kb: u64) {
        const BOUND_KB: u64 = 40_000;
        let grown = self.edge().peak_rss_kb().saturating_sub(before_kb);
        assert!(grown < BOUND_KB, "a stalled connection costs {grown} kB");
    }

    /// Questions on another connection are answered, about a millisecond each: if they waited for the
    /// stalled connection, the first would have no answer before that is read.
    #[track_caller]
    fn assert_others_are_served(&self) {
        const QUESTIONS: u32 = 100;
        let mut client = client_of(self.edge().addr("echo"));
        let began = Instant::now();
        for question in 0..QUESTIONS {
            let mut answer = [0; 4];
            send(&client, &question.to_le_bytes());
            client.read_exact(&mut answer).expect("another connection is answered");
            assert_eq!(u32::from_le_bytes(answer), question);
        }
        // On a busy machine each may take as long as others use the processor.
        assert!(began.elapsed() < LIMIT, "{QUESTIONS} answers took {:?}", began.elapsed());
    }
}

// What the tests above have in common.

/// One listener of the shared edge, in front of a stub.
struct Relayed {
    edge: &'static Edge,
    listener: String,
    stub: Stub,
}

/// The listeners of the shared edge; each test takes one, so there must be as many as tests.
const SLOTS: u16 = 24;

impl Relayed {
    #[track_caller]
    fn start(script: impl Fn(Conn) + Send + Sync + 'static) -> Relayed {
        static SETUP: OnceLock<Setup> = OnceLock::new();
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let listeners: Vec<Listener> =
            (1..=SLOTS).map(|slot| Listener::new(&format!("slot-{slot}"), "tcp", slot)).collect();
        let setup = SETUP.get_or_init(|| start(&[], &listeners));
        let slot = NEXT.fetch_add(1, Ordering::SeqCst);
        assert!(slot <= SLOTS, "a listener is left: raise SLOTS");
        let stub = Stub::start(script);
        setup.tailnet.forward(MAILBOX, slot, stub.addr);
        Relayed { edge: &setup.edge, listener: format!("slot-{slot}"), stub }
    }

    #[track_caller]
    fn client(&self) -> TcpStream {
        client_of(self.edge.addr(&self.listener))
    }

    /// What the only connection's client has sent, once it has ended in order.
    #[track_caller]
    fn ended_record(&self) -> Record {
        let record = self.stub.wait_record(0, LIMIT, |record| record.end.is_some());
        assert_eq!(record.end, Some(Ok(())));
        record
    }

    /// The log line about a connection that has ended.
    #[track_caller]
    fn log_line(&self, client: SocketAddr) -> String {
        // The listener too: another test's client may have had the same port.
        let connection = format!(" listener={:?} client={client} ", self.listener);
        let what = format!("the end of{connection}");
        let is_end = |line: &str| line.contains(&connection) && line.contains(" why=\"");
        self.edge.log().wait_line(&what, LIMIT, is_end)
    }

    /// How a connection ended, in the log's words.
    #[track_caller]
    fn end_of(&self, client: SocketAddr) -> String {
        let line = self.log_line(client);
        let end = line.split(" why=\"").nth(1).and_then(|rest| rest.split('"').next());
        end.unwrap_or_else(|| panic!("no end in: {line}")).to_owned()
    }

    /// How a connection ended, and that its bytes were counted without the header.
    #[track_caller]
    fn assert_logged(&self, client: &TcpStream, end: &str, sent: usize, received: usize) {
        let local = local_addr(client);
        assert_eq!(self.end_of(local), end);
        let (line, counts) = (self.log_line(local), format!(" sent={sent} received={received} "));
        assert!(line.contains(&counts), "no{counts}in: {line}");
    }
}

/// A client that gives up waiting at [`LIMIT`].
#[track_caller]
fn client_of(addr: SocketAddr) -> TcpStream {
    let client = connect(addr);
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    client.set_write_timeout(Some(LIMIT)).expect("the deadline is not zero");
    client
}

fn local_addr(client: &TcpStream) -> SocketAddr {
    client.local_addr().expect("it was connected")
}

#[track_caller]
fn send(mut client: &TcpStream, bytes: &[u8]) {
    client.write_all(bytes).expect("the edge takes what is sent");
}

/// Everything up to the server's end, which has to be an orderly one.
#[track_caller]
fn read_to_end(mut client: &TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = client.read_to_end(&mut bytes);
    read.unwrap_or_else(|error| panic!("no orderly end: {error} after {} bytes", bytes.len()));
    bytes
}

/// The connection ends by a reset, without a byte before it.
#[track_caller]
fn assert_reset(mut client: &TcpStream) {
    let read = client.read(&mut [0; 16]);
    assert_eq!(read.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
}

const GREETING: &[u8] = b"220 ready\r\n";

/// So that a client knows that its connection has got to the server.
fn greet_then_record(mut conn: Conn) {
    conn.send(GREETING);
    conn.read_to_end();
}

#[track_caller]
fn read_greeting(mut client: &TcpStream) {
    let mut greeting = [0; GREETING.len()];
    client.read_exact(&mut greeting).expect("the server greets");
    assert_eq!(greeting, GREETING);
}

/// Not assert_eq, which would print megabytes.
#[track_caller]
fn assert_same(got: &[u8], expected: &[u8], what: &str) {
    if got != expected {
        let same = got.iter().zip(expected).take_while(|(a, b)| a == b).count();
        panic!("{what}: {} of {} bytes, the same up to {same}", got.len(), expected.len());
    }
}
