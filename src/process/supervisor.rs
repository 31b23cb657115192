//! The supervisor, usually systemd: the descriptors that it hands over at the start, and the messages that it gets
//! (sd_notify(3)).
//!
//! Invariants
//! - Without `NOTIFY_SOCKET` no message is sent. A message that cannot be sent is no reason to stop.
//! - If the supervisor's queue is full (10 messages by the kernel's default), an important message waits for up to
//!   a second. Status and signs of life do not wait, since they are repeated anyway.
//! - The watchdog gets a sign of life only if this runtime runs and a call into the Go side returns.
//! - Sending a message opens no descriptor. So an edge that has run out of descriptors still gives signs of life.
//!
//! Deliberately not here: which sockets are used for what (see `sockets.rs`).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, sendmsg_addr, socket_with,
};
use rustix::process::{Resource, getpid, getrlimit};
use rustix::time::{ClockId, clock_gettime};
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, warn};

use crate::config::Env;
use crate::ffi::libtailscale::open_connections;
use crate::ffi::process::take_inherited_sockets;

/// The least time between two status lines.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// While the edge joins, it asks the supervisor for this much more time, at this interval.
const EXTENSION: Duration = Duration::from_secs(30);
const EXTENSION_INTERVAL: Duration = Duration::from_secs(10);

/// How long a stop may take after the drain time-out: for closing the node, and for a busy machine.
const AFTER_DRAIN: Duration = Duration::from_secs(20);

/// How long an important message waits if the supervisor does not read.
const PATIENCE: Duration = Duration::from_secs(1);

/// The least time between two signs of life, whatever the watchdog asks for: more would only waste CPU time.
const WATCHDOG_FASTEST: Duration = Duration::from_millis(10);

/// The most descriptors that are looked at, so that a wrong number does not cost many system calls.
const HANDED_MAX: usize = 4096;

/// The name of a descriptor that was given none (sd_listen_fds_with_names(3)).
const NAMELESS: &str = "unknown";

/// A descriptor that this process was started with.
#[derive(Debug)]
pub struct Handed {
    /// What the supervisor calls it.
    pub name: String,
    /// Its number at the start.
    pub number: usize,
    /// The descriptor, if it is a socket.
    pub socket: Option<OwnedFd>,
}

/// The supervisor, as far as there is one.
#[derive(Debug, Default)]
pub struct Supervisor {
    /// The socket that sends messages, and their address.
    channel: Option<(OwnedFd, SocketAddrUnix)>,
    /// How long the supervisor waits for a sign of life.
    watchdog: Option<Duration>,
}

impl Supervisor {
    /// The supervisor that the environment describes.
    pub fn find(env: Env) -> Supervisor {
        let channel = env("NOTIFY_SOCKET").filter(|path| !path.is_empty()).and_then(|path| {
            let address = match path.strip_prefix('@') {
                Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
                None => SocketAddrUnix::new(path.as_str()),
            };
            let socket =
                socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
            // The kernel waits, since poll(2) sees the queue of a connected peer only.
            set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).ok()?;
            Some((socket, address.ok()?))
        });
        let is_ours = env("WATCHDOG_PID").is_none_or(|pid| is_own_pid(&pid));
        let limit = env("WATCHDOG_USEC").and_then(|limit| limit.parse().ok());
        let watchdog = limit.filter(|&limit| is_ours && limit > 0).map(Duration::from_micros);
        Supervisor { channel, watchdog }
    }

    /// Says that the edge serves, or that it goes on after a reload.
    pub fn ready(&self) {
        self.insist("READY=1");
    }

    /// Says that the configuration is being reloaded. [`Supervisor::ready`] ends that.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        self.insist(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// Says that the edge stops, and how long that may take.
    pub fn stopping(&self, drain: Duration) {
        let limit = (drain + AFTER_DRAIN).as_micros();
        self.insist(&format!("STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC={limit}"));
    }

    /// Whether there is a supervisor.
    pub fn is_there(&self) -> bool {
        self.channel.is_some()
    }

    /// Gives the supervisor a listening socket to keep for the next start.
    pub fn store(&self, name: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), Some(socket), SendFlags::empty())
    }

    /// Removes every socket of this name from the supervisor's store.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None, SendFlags::empty())
    }

    /// Asks for more time, again and again, until this future is dropped: a start may wait for a control
    /// server that is down, or for a person.
    pub async fn extend_start(&self) {
        let mut ticks = interval(EXTENSION_INTERVAL);
        loop {
            ticks.tick().await;
            self.tell(&format!("STATUS=joining the tailnet\nEXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros()));
        }
    }

    /// Sends the status line and the signs of life, until this future is dropped.
    pub async fn keep_informed(&self, status: impl Fn() -> String) {
        if self.channel.is_none() {
            return;
        }
        // This call waits for no lock of Tailscale's. Tailscale's client may hold its lock for as long as a control
        // server does not answer, while mail passes.
        let check = async || spawn_blocking(open_connections).await.is_ok();
        tokio::join!(self.keep_watchdog(check), self.keep_status(status));
    }

    /// Sends a sign of life each time that `check` succeeds in time.
    async fn keep_watchdog(&self, check: impl AsyncFn() -> bool) {
        let Some(half) = self.watchdog.map(|limit| (limit / 2).max(WATCHDOG_FASTEST)) else { return };
        let mut ticks = interval(half);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match timeout(half, check()).await {
                Ok(true) => self.tell("WATCHDOG=1"),
                _ => warn!("the tailnet library does not answer; the watchdog gets no sign of life"),
            }
        }
    }

    async fn keep_status(&self, status: impl Fn() -> String) {
        let mut told = String::new();
        loop {
            let now = status();
            if now != told {
                self.tell(&format!("STATUS={now}"));
                told = now;
            }
            sleep(STATUS_INTERVAL).await;
        }
    }

    /// Sends a message that is repeated soon, so it may be lost.
    fn tell(&self, message: &str) {
        if let Err(error) = self.send(message, None, SendFlags::DONTWAIT) {
            debug!("cannot tell the supervisor {:?}: {error}", message.lines().next());
        }
    }

    /// Sends an important message, and logs a warning if that fails.
    fn insist(&self, message: &str) {
        if let Err(error) = self.send(message, None, SendFlags::empty()) {
            let first = message.lines().next().unwrap_or_default();
            warn!("cannot tell the supervisor {first}: {error}; it may think that this edge hangs");
        }
    }

    fn send(&self, message: &str, descriptor: Option<BorrowedFd<'_>>, flags: SendFlags) -> io::Result<()> {
        let Some((socket, address)) = &self.channel else { return Ok(()) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // `space` has room for one descriptor.
        control.push(SendAncillaryMessage::ScmRights(descriptor.as_slice()));
        let (text, began) = ([IoSlice::new(message.as_bytes())], Instant::now());
        loop {
            match sendmsg_addr(socket, address, &text, &mut control, SendFlags::NOSIGNAL | flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) if began.elapsed() < PATIENCE => {}
                Err(Errno::AGAIN) => return Err(io::Error::other("it does not read its messages")),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The descriptors that this process was started with, as the environment says. Must be called once, and before
/// this process opens sockets that could get their numbers.
pub fn handed_over(env: Env) -> Vec<Handed> {
    const FIRST: usize = 3;
    if !env("LISTEN_PID").is_some_and(|pid| is_own_pid(&pid)) {
        return Vec::new();
    }
    let announced: usize = env("LISTEN_FDS").and_then(|count| count.parse().ok()).unwrap_or(0);
    // No descriptor can be above this limit, whatever the number says.
    let limit = getrlimit(Resource::Nofile).current.map_or(HANDED_MAX, |limit| limit as usize);
    let names = env("LISTEN_FDNAMES").unwrap_or_default();
    let (named, rest) = (names.split(':').count(), std::iter::repeat(NAMELESS));
    if !names.is_empty() && named != announced {
        warn!(
            "LISTEN_FDNAMES has {named} names for {announced} descriptors; a descriptor without a name is found by its address"
        );
    }
    let names =
        names.split(':').chain(rest).map(|name| if name.is_empty() { NAMELESS } else { name }.to_owned());
    let sockets = take_inherited_sockets(announced.min(limit).min(HANDED_MAX));
    let handed = |((socket, name), number)| Handed { name, number, socket };
    sockets.into_iter().zip(names).zip(FIRST..).map(handed).collect()
}

fn is_own_pid(text: &str) -> bool {
    text.parse() == Ok(getpid().as_raw_nonzero().get())
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::*;

    fn supervisor(variables: &[(&str, &str)]) -> Supervisor {
        let find =
            |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Supervisor::find(&find)
    }

    fn heard(socket: &UnixDatagram) -> String {
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut buffer = [0; 512];
        let count = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    }

    #[test]
    fn messages_reach_a_path_and_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("tailwart-test-{}", std::process::id());
        let at_path = UnixDatagram::bind(&path).unwrap();
        let abstracted =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name.as_bytes()).unwrap()).unwrap();
        for (address, socket) in [(path.display().to_string(), at_path), (format!("@{name}"), abstracted)] {
            let supervisor = supervisor(&[("NOTIFY_SOCKET", &address)]);
            supervisor.ready();
            assert_eq!(heard(&socket), "READY=1");
            supervisor.reloading();
            let reloading = heard(&socket);
            let micros = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
            assert!(micros.is_some_and(|micros| micros.parse::<u64>().is_ok()), "{reloading}");
            supervisor.stopping(Duration::from_secs(30));
            assert_eq!(heard(&socket), "STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=50000000");
        }
    }

    /// A supervisor whose queue is full; the last value is how many messages it has room for.
    fn full() -> (Supervisor, UnixDatagram, usize) {
        let name = format!("tailwart-test-{}-{:?}", std::process::id(), std::thread::current().id());
        let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        let supervisor = supervisor(&[("NOTIFY_SOCKET", &format!("@{name}")), ("WATCHDOG_USEC", "2000000")]);
        let fill = || supervisor.send("STATUS=full", None, SendFlags::DONTWAIT);
        let room = (0..100_000).take_while(|_| fill().is_ok()).count();
        (supervisor, socket, room)
    }

    #[test]
    fn what_must_arrive_waits_for_room_and_the_rest_does_not() {
        let (supervisor, socket, room) = full();
        supervisor.tell("STATUS=lost");
        let file = tempfile::tempfile().unwrap();
        std::thread::scope(|scope| {
            let telling = scope.spawn(|| {
                supervisor.ready();
                supervisor.store("kept.mail", std::os::fd::AsFd::as_fd(&file)).unwrap();
                supervisor.forget("kept.mail").unwrap();
            });
            (0..room).for_each(|_| assert_eq!(heard(&socket), "STATUS=full"));
            assert_eq!(heard(&socket), "READY=1");
            assert_eq!(heard(&socket), "FDSTORE=1\nFDNAME=kept.mail");
            assert_eq!(heard(&socket), "FDSTOREREMOVE=1\nFDNAME=kept.mail");
            telling.join().unwrap();
        });
    }

    #[test]
    fn a_supervisor_that_reads_nothing_is_waited_for_with_a_deadline() {
        let (supervisor, _socket, _) = full();
        let began = Instant::now();
        let error = supervisor.forget("kept.mail").unwrap_err();
        assert!(began.elapsed() >= PATIENCE && began.elapsed() < PATIENCE * 10, "{:?}", began.elapsed());
        assert_eq!(error.to_string(), "it does not read its messages");
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_while_the_library_answers_and_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = path.display().to_string();
        let supervisor = supervisor(&[("NOTIFY_SOCKET", &address), ("WATCHDOG_USEC", "2000000")]);
        let hangs = std::cell::Cell::new(false);
        let check = async || {
            if hangs.get() {
                std::future::pending::<()>().await;
            }
            true
        };
        let messages = || std::iter::from_fn(|| socket.recv(&mut [0; 512]).ok()).count();
        let watching = async {
            sleep(Duration::from_millis(3500)).await;
            assert_eq!(messages(), 4, "at once, and twice in the time that it waits");
            hangs.set(true);
            sleep(Duration::from_secs(60)).await;
            assert_eq!(messages(), 0);
            hangs.set(false);
            sleep(Duration::from_secs(4)).await;
            assert!(messages() >= 2);
        };
        tokio::select! {
            () = supervisor.keep_watchdog(check) => panic!("it goes on for as long as it is wanted"),
            () = watching => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watchdog_that_wants_to_be_fed_all_the_time_is_fed_at_a_sane_pace() {
        let supervisor = supervisor(&[("WATCHDOG_USEC", "1")]);
        let checks = std::cell::Cell::new(0);
        let check = async || {
            checks.set(checks.get() + 1);
            sleep(Duration::from_millis(5)).await; // longer than it asks for
            true
        };
        let _ = timeout(Duration::from_secs(1), supervisor.keep_watchdog(check)).await;
        assert!((50..=101).contains(&checks.get()), "{} checks in a second", checks.get());
    }

    #[test]
    fn nobody_is_told_without_a_supervisor_and_one_that_is_gone_is_no_trouble() {
        for address in ["relative", "/nowhere/at/all", "@tailwart-nobody-listens-here"] {
            supervisor(&[("NOTIFY_SOCKET", address)]).ready();
        }
        for unset in [&[][..], &[("NOTIFY_SOCKET", "")]] {
            let none = supervisor(unset);
            none.ready();
            assert!(none.channel.is_none() && none.watchdog.is_none());
        }
    }

    #[test]
    fn the_watchdog_is_for_the_process_that_it_names() {
        let own = std::process::id().to_string();
        let limit =
            |pid: &str, usec: &str| supervisor(&[("WATCHDOG_PID", pid), ("WATCHDOG_USEC", usec)]).watchdog;
        assert_eq!(limit(&own, "2000000"), Some(Duration::from_secs(2)));
        assert_eq!(limit("1", "2000000"), None);
        assert_eq!(limit(&own, "0"), None);
        assert_eq!(limit(&own, "soon"), None);
        assert_eq!(supervisor(&[("WATCHDOG_USEC", "2000000")]).watchdog, Some(Duration::from_secs(2)));
    }
}
