//! A TCP server that does exactly what a test says, and remembers every byte it was sent.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::SockRef;

use super::net::free_addr;
use super::wait::{eventually, wait_for};
use super::{START_LIMIT, proxy_header};

/// One mebibyte, the unit in which tests send much.
pub const MIB: usize = 1 << 20;

const CHUNK_BYTES: usize = 65536;
const HELD_AT_MOST: Duration = Duration::from_secs(3600);

/// Runs a script, a function on a thread of its own, for each connection. Dropping it closes all of
/// them.
pub struct Stub {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    stopping: AtomicBool,
    connections: Mutex<Vec<Connection>>,
}

/// The stub's own view of a connection. The stream is there only to be closed with the stub.
struct Connection {
    stream: Option<TcpStream>,
    record: Arc<Mutex<Record>>,
}

/// What a connection's client has sent.
#[derive(Clone, Default)]
pub struct Record {
    /// The PROXY header included.
    pub bytes: Vec<u8>,
    /// How reading ended: nothing yet, the client's end of stream, or an error such as a reset.
    pub end: Option<Result<(), io::ErrorKind>>,
    /// The script has ended, and with it the connection.
    pub finished: bool,
}

impl Record {
    /// What came after the PROXY header, which is one of version 2 with addresses of IPv4.
    #[track_caller]
    pub fn payload(&self) -> &[u8] {
        const HEADER: usize = 28;
        self.bytes.get(HEADER..).unwrap_or_else(|| panic!("no whole header: {self:?}"))
    }
}

impl Stub {
    /// Listens on a port of 127.0.0.1, which nobody else gets afterwards.
    pub fn start(script: impl Fn(Conn) + Send + Sync + 'static) -> Stub {
        Stub::start_at(free_addr(), script)
    }

    /// Listens on this address, so that a server can be stopped and started again; see
    /// [`free_addr`](super::net::free_addr).
    pub fn start_at(addr: SocketAddr, script: impl Fn(Conn) + Send + Sync + 'static) -> Stub {
        let listener = listen(addr);
        let addr = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared { stopping: AtomicBool::new(false), connections: Mutex::default() });
        let acceptor = std::thread::spawn({
            let (shared, script) = (Arc::clone(&shared), Arc::new(script));
            move || accept_all(&listener, &shared, &script)
        });
        Stub { addr, shared, acceptor: Some(acceptor) }
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> usize {
        lock(&self.shared.connections).len()
    }

    /// What the client of the `index`th connection (from 0) has sent so far; none when there is no
    /// such connection.
    pub fn record(&self, index: usize) -> Option<Record> {
        let connections = lock(&self.shared.connections);
        connections.get(index).map(|connection| lock(&connection.record).clone())
    }

    /// The record of a connection whose bytes begin with this PROXY header, as soon as `wanted` holds for
    /// it; panics at the deadline. There may be several: the kernel gives a client's port to another one
    /// when it is free again.
    #[track_caller]
    pub fn wait_client(&self, header: &[u8], deadline: Duration, wanted: impl Fn(&Record) -> bool) -> Record {
        // Looks without copying: a record may be many megabytes.
        let find = |wanted: &dyn Fn(&Record) -> bool| {
            let connections = lock(&self.shared.connections);
            connections.iter().position(|connection| {
                let record = lock(&connection.record);
                record.bytes.starts_with(header) && wanted(&record)
            })
        };
        let found = wait_for(deadline, || find(&wanted));
        found.and_then(|index| self.record(index)).unwrap_or_else(|| {
            panic!(
                "of the stub's {} connections, none that begins with {} has come that far within {deadline:?}; the first: {:?}",
                self.accepted(),
                header.escape_ascii(),
                find(&|_| true).and_then(|index| self.record(index)),
            )
        })
    }

    /// The record of a connection as soon as `wanted` holds for it; panics at the deadline.
    #[track_caller]
    pub fn wait_record(&self, index: usize, deadline: Duration, wanted: impl Fn(&Record) -> bool) -> Record {
        // Looks without copying: a record may be many megabytes.
        let reached = eventually(deadline, || {
            lock(&self.shared.connections)
                .get(index)
                .is_some_and(|connection| wanted(&lock(&connection.record)))
        });
        match self.record(index) {
            Some(record) if reached => record,
            Some(record) => {
                panic!("the stub's connection {index} has not come that far within {deadline:?}: {record:?}")
            }
            None => {
                panic!("the stub got {} connections, not {}, within {deadline:?}", self.accepted(), index + 1)
            }
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = self.bytes[..self.bytes.len().min(200)].escape_ascii();
        write!(f, "{} bytes, ended {:?}, finished {}", self.bytes.len(), self.end, self.finished)?;
        write!(f, ", beginning with {start}")
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the acceptor, which looks at the flag after each connection.
        let _ = TcpStream::connect(self.addr);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for connection in lock(&self.shared.connections).iter() {
            if let Some(stream) = &connection.stream {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}

/// Another thread may just be starting a program: until it has, its copy of this process has all descriptors,
/// and so a listener that was here before.
fn listen(addr: SocketAddr) -> TcpListener {
    let mut last = None;
    let listener = wait_for(START_LIMIT, || match TcpListener::bind(addr) {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            last = Some(error);
            None
        }
        Err(error) => panic!("listen on {addr}: {error}"),
    });
    listener.unwrap_or_else(|| panic!("listen on {addr}: {last:?}"))
}

fn accept_all<F: Fn(Conn) + Send + Sync + 'static>(
    listener: &TcpListener,
    shared: &Arc<Shared>,
    script: &Arc<F>,
) {
    for stream in listener.incoming() {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let record = Arc::default();
        let index = {
            let mut connections = lock(&shared.connections);
            connections.push(Connection { stream: stream.try_clone().ok(), record: Arc::clone(&record) });
            connections.len() - 1
        };
        let conn = Conn { stream, record, index, shared: Arc::clone(shared) };
        let script = Arc::clone(script);
        std::thread::spawn(move || script(conn));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A script that panicked has spoiled nothing but its own connection.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A script's connection. Reading records; the connection is closed when this is dropped.
pub struct Conn {
    stream: TcpStream,
    record: Arc<Mutex<Record>>,
    index: usize,
    shared: Arc<Shared>,
}

impl Conn {
    /// Takes the PROXY header off the front (it is recorded); none when the client sent none or
    /// went away.
    pub fn read_proxy_header(&mut self) -> Option<Vec<u8>> {
        proxy_header::read(self).ok()
    }

    /// Sends everything. A client that has gone is no mistake of the stub's; the record tells.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Reads, and records, up to the client's end of stream or an error.
    pub fn read_to_end(&mut self) {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(1..) = self.read(&mut chunk) {}
    }

    /// Ends our direction only.
    pub fn half_close(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Closes with a reset instead of an orderly end.
    pub fn reset(self) {
        let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        // The last handle's close, in our drop, sends it.
    }

    /// Does nothing until the connection is reset or the stub is dropped.
    pub fn hold(&self) {
        let _ = eventually(HELD_AT_MOST, || {
            let reset = matches!(self.stream.take_error(), Ok(Some(_)) | Err(_));
            reset || self.shared.stopping.load(Ordering::SeqCst)
        });
    }

    /// The socket itself, for what has no method here. What is read past [`Conn`] is not recorded.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        // The stub's handle goes too, or the client would not see the connection end; a script that
        // panics comes here as well.
        lock(&self.shared.connections)[self.index].stream = None;
        lock(&self.record).finished = true;
    }
}

impl Read for Conn {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.stream.read(buffer);
        let mut record = lock(&self.record);
        match &result {
            Ok(0) if !buffer.is_empty() => record.end = Some(Ok(())),
            Ok(count) => record.bytes.extend_from_slice(&buffer[..*count]),
            Err(error) => record.end = Some(Err(error.kind())),
        }
        result
    }
}

// The scripts that many tests want. Each is a value for `Stub::start`.

/// Says nothing; reads everything to the end.
pub fn record(mut conn: Conn) {
    conn.read_to_end();
}

/// Greets at once, as a mail server does, then only reads.
pub fn greet(greeting: &'static str) -> impl Fn(Conn) + Send + Sync {
    move |mut conn| {
        conn.send(greeting.as_bytes());
        conn.read_to_end();
    }
}

/// Sends back what follows the PROXY header, and ends when the client has ended.
pub fn echo_after_header(mut conn: Conn) {
    if conn.read_proxy_header().is_some() {
        echo(conn);
    }
}

/// Sends back everything, and ends when the client has ended.
pub fn echo(mut conn: Conn) {
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(count @ 1..) = conn.read(&mut chunk) {
        conn.send(&chunk[..count]);
    }
}

/// Takes the PROXY header and closes without a byte.
pub fn close_after_header(mut conn: Conn) {
    conn.read_proxy_header();
}

/// Closes at once, header or not; the kernel makes it a reset when something was sent.
pub fn close_at_once(conn: Conn) {
    drop(conn);
}

/// Takes the PROXY header and resets.
pub fn reset_after_header(mut conn: Conn) {
    conn.read_proxy_header();
    conn.reset();
}

/// Neither speaks nor reads: the kernel takes what fits into its buffer, as with a stalled server.
pub fn silent(conn: Conn) {
    conn.hold();
}

/// Takes the PROXY header, sends `count` bytes of [`pattern`], ends its own direction, then reads
/// to the end.
pub fn send_then_half_close(count: usize) -> impl Fn(Conn) + Send + Sync {
    move |mut conn| {
        conn.read_proxy_header();
        conn.send(&pattern(count));
        conn.half_close();
        conn.read_to_end();
    }
}

/// Takes the PROXY header, reads to the client's end of stream, and only then answers with `count`
/// bytes of [`pattern`]: what a relay loses that takes a half-close for a close.
pub fn answer_after_half_close(count: usize) -> impl Fn(Conn) + Send + Sync {
    move |mut conn| {
        conn.read_proxy_header();
        conn.read_to_end();
        conn.send(&pattern(count));
    }
}

/// Bytes in which a lost, doubled or moved piece shows: the little-endian numbers from 0 up.
pub fn pattern(count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count + size_of::<u32>());
    for number in 0_u32.. {
        if bytes.len() >= count {
            break;
        }
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
