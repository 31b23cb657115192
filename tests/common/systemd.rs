//! Plays systemd for one service: owns the sockets of its socket units and its descriptor store,
//! hears what it says on its notification socket, and starts it with all of that.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use super::edge::{Builder, Edge};
use super::temp_dir;
use super::wait::wait_for;

/// How long the listener for messages waits before it looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(100);

/// As `Backlog=` of systemd.socket(5) has it.
const BACKLOG: i32 = 4096;

/// systemd as one service sees it.
pub struct Systemd {
    /// The sockets of its units, by their `FileDescriptorName=`.
    units: Vec<(String, OwnedFd)>,
    shared: Arc<Shared>,
    path: String,
    receiver: Option<JoinHandle<()>>,
    _dir: TempDir,
}

#[derive(Default)]
struct Shared {
    store: Mutex<Vec<(String, OwnedFd)>>,
    messages: Mutex<Vec<String>>,
    ending: AtomicBool,
}

impl Systemd {
    pub fn start() -> Systemd {
        let dir = temp_dir("systemd");
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("a socket in a directory of our own");
        socket.set_read_timeout(Some(TICK)).expect("the deadline is not zero");
        let shared = Arc::new(Shared::default());
        let receiver = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || receive(&socket, &shared)
        });
        let path = path.display().to_string();
        Systemd { units: Vec::new(), shared, path, receiver: Some(receiver), _dir: dir }
    }

    /// A socket unit with one address; as systemd's default is, an IPv6 one takes IPv4 too.
    pub fn listen(&mut self, name: &str, address: SocketAddr) -> SocketAddr {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("a socket option");
        if address.is_ipv6() {
            socket.set_only_v6(false).expect("a socket option");
        }
        socket.bind(&address.into()).unwrap_or_else(|error| panic!("bind {address}: {error}"));
        socket.listen(BACKLOG).expect("it is bound");
        let listener = TcpListener::from(socket);
        let local = listener.local_addr().expect("it is bound");
        self.hand(name, listener.into());
        local
    }

    /// Any descriptor, as if a unit had it.
    pub fn hand(&mut self, name: &str, descriptor: OwnedFd) {
        self.units.push((name.to_owned(), descriptor));
    }

    /// Any descriptor, as if it had been stored.
    pub fn put_in_store(&self, name: &str, descriptor: OwnedFd) {
        lock(&self.shared.store).push((name.to_owned(), descriptor));
    }

    /// The names in the store, sorted.
    pub fn stored(&self) -> Vec<String> {
        let mut names: Vec<String> = lock(&self.shared.store).iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// Starts the service.
    pub fn spawn(&self, edge: &Builder) -> Edge {
        self.spawn_with(edge, |count, names| (count, names))
    }

    /// The same with a last word on `LISTEN_FDS` and `LISTEN_FDNAMES`.
    pub fn spawn_with(
        &self,
        edge: &Builder,
        announce: impl FnOnce(usize, Vec<String>) -> (usize, Vec<String>),
    ) -> Edge {
        const FIRST: i32 = 3;
        let store = lock(&self.shared.store);
        let handed = || self.units.iter().chain(store.iter());
        let copy = |descriptor: &OwnedFd| descriptor.try_clone().expect("a descriptor is free");
        let descriptors = handed().map(|(_, descriptor)| copy(descriptor)).zip(FIRST..);
        let mappings = descriptors.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
        let (count, names) = announce(handed().count(), handed().map(|(name, _)| name.clone()).collect());
        let mut edge = edge.clone().env("NOTIFY_SOCKET", &self.path);
        if count > 0 {
            edge = edge.env("LISTEN_FDS", &count.to_string()).env("LISTEN_FDNAMES", &names.join(":"));
        }
        // Only the process itself knows its number before the program runs.
        let edge = edge.wrapped(&["sh", "-c", "LISTEN_PID=$$ WATCHDOG_PID=$$ exec \"$@\"", "sh"]);
        edge.spawn_prepared(|command| {
            command.fd_mappings(mappings).expect("each number once");
        })
    }

    /// What the service has said so far, a message each.
    pub fn messages(&self) -> Vec<String> {
        lock(&self.shared.messages).clone()
    }

    /// How many messages have this line.
    pub fn count(&self, line: &str) -> usize {
        self.messages().iter().filter(|message| message.lines().any(|l| l == line)).count()
    }

    /// The first message from the `from`th on with this in it; panics at the deadline.
    #[track_caller]
    pub fn wait(&self, from: usize, words: &str, deadline: Duration) -> (usize, String) {
        let found = wait_for(deadline, || {
            let mut messages = self.messages().into_iter().enumerate().skip(from);
            messages.find(|(_, message)| message.contains(words))
        });
        found.unwrap_or_else(|| panic!("no {words:?} from message {from} on: {:#?}", self.messages()))
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        if let Some(receiver) = self.receiver.take() {
            let _ = receiver.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn receive(socket: &UnixDatagram, shared: &Shared) {
    while !shared.ending.load(Ordering::SeqCst) {
        let mut text = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, flags);
        let Ok(received) = received else { continue }; // nothing came
        let message = String::from_utf8_lossy(&text[..received.bytes]).into_owned();
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        obey(&message, rights.flatten().collect(), shared);
        lock(&shared.messages).push(message);
    }
}

fn obey(message: &str, descriptors: Vec<OwnedFd>, shared: &Shared) {
    let field = |name: &str| message.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let name = field("FDNAME").unwrap_or("stored").to_owned();
    let mut store = lock(&shared.store);
    if field("FDSTOREREMOVE") == Some("1") {
        store.retain(|(stored, _)| *stored != name);
    } else if field("FDSTORE") == Some("1") {
        for descriptor in descriptors {
            // A second number for the same file is dropped.
            if !store.iter().any(|(_, stored)| identity(stored) == identity(&descriptor)) {
                store.push((name.clone(), descriptor));
            }
        }
    }
}

fn identity(descriptor: &impl AsFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(descriptor).expect("it is open");
    (stat.st_dev, stat.st_ino)
}
