//! The supervisor's side of a service: what it has handed over at the start, and what it is told
//! (sd_notify(3)).
//!
//! Invariants
//! - Without `NOTIFY_SOCKET` nothing is said, and a message that cannot be sent is no reason to stop.
//! - The watchdog is told only what is true: that this runtime runs, and that a call into the Go side
//!   returns.
//! - A message needs no descriptor that is not there yet, so that an edge that has run out of them is
//!   not taken for dead.
//!
//! Deliberately not here: which sockets are used for what (see `sockets.rs`).

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

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
use crate::tailnet::{open_connections, take_inherited_sockets};

/// How often, at most, the one-line status is sent.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// While the edge joins, the supervisor is asked for this much more time, this often.
const EXTENSION: Duration = Duration::from_secs(30);
const EXTENSION_INTERVAL: Duration = Duration::from_secs(10);

/// Beyond the drain time-out: closing the node, and room for a busy machine.
const AFTER_DRAIN: Duration = Duration::from_secs(20);

/// The name of a descriptor that was given none (sd_listen_fds_with_names(3)).
const NAMELESS: &str = "unknown";

/// A descriptor that this process was started with.
#[derive(Debug)]
pub struct Handed {
    /// What the supervisor calls it.
    pub name: String,
    /// Its number at the start.
    pub number: usize,
    /// Itself, if it is a socket.
    pub socket: Option<OwnedFd>,
}

/// What there is of a supervisor.
#[derive(Debug, Default)]
pub struct Supervisor {
    /// Where messages go, and from where.
    channel: Option<(OwnedFd, SocketAddrUnix)>,
    /// How long it waits for a sign of life.
    watchdog: Option<Duration>,
}

impl Supervisor {
    /// The supervisor that the environment tells of.
    pub fn find(env: Env) -> Supervisor {
        let channel = env("NOTIFY_SOCKET").and_then(|path| {
            let address = match path.strip_prefix('@') {
                Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
                None => SocketAddrUnix::new(path.as_str()),
            };
            // Not blocking: whatever the supervisor does, the edge does not wait for it.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
            Some((socket.ok()?, address.ok()?))
        });
        let is_ours = env("WATCHDOG_PID").is_none_or(|pid| is_own_pid(&pid));
        let limit = env("WATCHDOG_USEC").and_then(|limit| limit.parse().ok());
        let watchdog = limit.filter(|&limit| is_ours && limit > 0).map(Duration::from_micros);
        Supervisor { channel, watchdog }
    }

    /// Says that the edge serves, or that it goes on after a reload.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// Says that the configuration is being read again, which a `ready` ends.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// Says that the edge stops, and how long that may take.
    pub fn stopping(&self, drain: Duration) {
        let limit = (drain + AFTER_DRAIN).as_micros();
        self.tell(&format!("STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC={limit}"));
    }

    /// Has a listening socket kept for the next start.
    pub fn store(&self, name: &str, socket: BorrowedFd<'_>) {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), Some(socket));
    }

    /// Has every socket of this name forgotten.
    pub fn forget(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    /// Asks for more time, again and again, until it is dropped: a start may wait for a control
    /// server that is away, or for a person.
    pub async fn extend_start(&self) {
        let mut ticks = interval(EXTENSION_INTERVAL);
        loop {
            ticks.tick().await;
            self.tell(&format!("STATUS=joining the tailnet\nEXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros()));
        }
    }

    /// Keeps the supervisor informed until it is dropped: of the edge in one line, and that it lives.
    pub async fn keep_informed(&self, status: impl Fn() -> String) {
        if self.channel.is_none() {
            return;
        }
        tokio::join!(self.keep_watchdog(), self.keep_status(status));
    }

    async fn keep_watchdog(&self) {
        let Some(half) = self.watchdog.map(|limit| limit / 2) else { return };
        let mut ticks = interval(half.max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // A call that waits for no lock of Tailscale's: its client may hold one for as long as a
            // control server keeps silent, while mail passes.
            match timeout(half, spawn_blocking(open_connections)).await {
                Ok(Ok(_)) => self.tell("WATCHDOG=1"),
                _ => warn!("the tailnet library does not answer; the watchdog is not told that all is well"),
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

    fn tell(&self, message: &str) {
        self.send(message, None);
    }

    fn send(&self, message: &str, descriptor: Option<BorrowedFd<'_>>) {
        let Some((socket, address)) = &self.channel else { return };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // There is room for one.
        control.push(SendAncillaryMessage::ScmRights(descriptor.as_slice()));
        let text = [IoSlice::new(message.as_bytes())];
        if let Err(error) = sendmsg_addr(socket, address, &text, &mut control, SendFlags::NOSIGNAL) {
            debug!("cannot tell the supervisor {:?}: {error}", message.lines().next());
        }
    }
}

/// The descriptors that the environment says this process was started with. To be called once, and
/// before there is anything in this process that they could be confused with.
pub fn handed_over(env: Env) -> Vec<Handed> {
    const FIRST: usize = 3;
    if !env("LISTEN_PID").is_some_and(|pid| is_own_pid(&pid)) {
        return Vec::new();
    }
    let announced: usize = env("LISTEN_FDS").and_then(|count| count.parse().ok()).unwrap_or(0);
    // Above it there can be none, whatever the number says.
    let limit = getrlimit(Resource::Nofile).current.map_or(announced, |limit| limit as usize);
    let names = env("LISTEN_FDNAMES").unwrap_or_default();
    let (named, rest) = (names.split(':').count(), std::iter::repeat(NAMELESS));
    if !names.is_empty() && named != announced {
        warn!(
            "LISTEN_FDNAMES has {named} names for {announced} descriptors; those without are found by their address"
        );
    }
    let names =
        names.split(':').chain(rest).map(|name| if name.is_empty() { NAMELESS } else { name }.to_owned());
    let sockets = take_inherited_sockets(announced.min(limit));
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

    #[test]
    fn nobody_is_told_without_a_supervisor_and_one_that_is_gone_is_no_trouble() {
        for address in ["", "relative", "/nowhere/at/all", "@tailwart-nobody-listens-here"] {
            supervisor(&[("NOTIFY_SOCKET", address)]).ready();
        }
        let none = supervisor(&[]);
        none.ready();
        assert!(none.channel.is_none() && none.watchdog.is_none());
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
