//! Ports and sockets on loopback.
//!
//! The program's unit tests include this file too, so it uses nothing else of `tests/common`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

/// A SYN that finds a full backlog is sent again after 1, 3, 7 and 15 seconds.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// The edge may have to look for its upstream first.
const ECHO_LIMIT: Duration = Duration::from_secs(30);

/// A port of 127.0.0.1 and ::1 that is nobody else's for the life of this process.
///
/// It is below those that the kernel gives to outgoing connections and to port 0, so that nobody gets it by
/// chance. Both sockets stay bound, without listening, and allow address reuse: other processes see that it is
/// taken, a server (all of them set SO_REUSEADDR) can bind and listen, and connections are refused while there
/// is none. A server that is gone then still has its port: whoever goes on looking for it there does not come to
/// another test's server.
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 22_000; // up to 32,000: Linux gives away those from 32,768 on
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Processes begin at different places, not to try each other's first.
    let offset = std::process::id().wrapping_mul(977);
    for _ in 0..COUNT {
        let next = offset.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + next % COUNT).expect("it is below 65,536");
        let reserved = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]
            .map(|address| reserve(SocketAddr::new(address, port)));
        if let [Ok(v4), Ok(v6)] = reserved {
            keep([v4, v6]);
            return port;
        }
    }
    panic!("no port is free on both 127.0.0.1 and ::1 (is IPv6 enabled on the loopback interface?)");
}

fn keep(sockets: [Socket; 2]) {
    static RESERVED: Mutex<Vec<Socket>> = Mutex::new(Vec::new());
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner).extend(sockets);
}

/// Binds without address reuse, so that a port in use is noticed, and allows reuse only then.
fn reserve(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&addr.into())?;
    socket.set_reuse_address(true)?;
    Ok(socket)
}

/// `127.0.0.1` with a port from [`free_port`].
pub fn free_addr() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

/// Whether anybody listens on this IPv4 address, without connecting: a server behind PROXY would log the
/// bare connection.
#[track_caller]
pub fn is_listening(addr: SocketAddr) -> bool {
    is_listening_beside(std::process::id(), addr)
}

/// The same in the network namespace of that process.
#[track_caller]
pub fn is_listening_beside(pid: u32, addr: SocketAddr) -> bool {
    !receive_queues(pid, addr, "0A").is_empty()
}

/// How many connections of an IPv4 listener wait in the kernel to be accepted.
#[track_caller]
pub fn backlog(listener: SocketAddr) -> u32 {
    // A listener's second queue is its backlog.
    receive_queues(std::process::id(), listener, "0A")
        .first()
        .copied()
        .unwrap_or_else(|| panic!("nobody listens on {listener}"))
}

/// How many bytes wait in the kernel to be read, for each connection that was made to this IPv4
/// address.
#[track_caller]
pub fn unread(listener: SocketAddr) -> Vec<u32> {
    receive_queues(std::process::id(), listener, "01")
}

/// The second queue of each socket with this local address in this state, in the network namespace of that
/// process. A port alone would not tell: those of other addresses of this host have the same numbers.
#[track_caller]
fn receive_queues(pid: u32, local: SocketAddr, state: &str) -> Vec<u32> {
    let IpAddr::V4(ip) = local.ip() else { panic!("{local} is in another table") };
    // The address as a number of this machine's.
    let wanted = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), local.port());
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let queue = |line: &str| {
        // sl, local address, remote address, state, queues
        let fields: Vec<&str> = line.split_whitespace().collect();
        let ours = *fields.get(1)? == wanted && fields.get(3) == Some(&state);
        let (_, queue) = fields.get(4)?.split_once(':').filter(|_| ours)?;
        u32::from_str_radix(queue, 16).ok()
    };
    table.lines().filter_map(queue).collect()
}

/// Connects, with a deadline.
#[track_caller]
pub fn connect(addr: SocketAddr) -> TcpStream {
    TcpStream::connect_timeout(&addr, CONNECT_LIMIT)
        .unwrap_or_else(|error| panic!("connect to {addr}: {error}"))
}

/// Connects from a chosen source address: all of 127.0.0.0/8 is this host, so tests can play many
/// clients.
#[track_caller]
pub fn client_from(source: &str, addr: SocketAddr) -> TcpStream {
    let source: IpAddr = source.parse().unwrap_or_else(|_| panic!("not an address: {source}"));
    try_client_from(source, addr).unwrap_or_else(|error| panic!("connect from {source} to {addr}: {error}"))
}

/// As [`client_from`], for tests that expect to be refused.
pub fn try_client_from(source: IpAddr, addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    socket.connect_timeout(&addr.into(), CONNECT_LIMIT)?;
    Ok(socket.into())
}

/// Sends a word to an echo, and hears it.
#[track_caller]
pub fn echoes(addr: SocketAddr) -> TcpStream {
    let mut client = connect(addr);
    hears_itself(&mut client);
    client
}

/// The same on a connection that is there already.
#[track_caller]
pub fn hears_itself(client: &mut TcpStream) {
    client.set_read_timeout(Some(ECHO_LIMIT)).expect("the deadline is not zero");
    client.write_all(b"hello").expect("the server takes it");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).expect("the server answers");
    assert_eq!(&answer, b"hello");
}

/// Closes with a reset.
pub fn reset(client: TcpStream) {
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("a socket option");
}
