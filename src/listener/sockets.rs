//! The listening sockets of a configuration. They are sockets that are open already, sockets that the supervisor
//! has handed over, and new ones.
//!
//! The supervisor hands over the sockets of socket units, and the kept sockets: those that an earlier process of the
//! edge has put into the supervisor's store, under the name `kept.` and the listener's name, so that the port stays
//! open over a restart.
//!
//! Invariants
//! - Everything is bound before anything is closed, and a socket whose address stays is not touched.
//! - If a socket unit's socket has a listener's name, it is that listener's socket, whatever address the file has.
//!   If it has another name, it is used where the file has exactly its address. It is never closed, since it could
//!   not be bound again: the supervisor keeps it open for as long as the unit is there.
//! - A kept socket is used only where the configuration still has exactly its address.
//! - Another program that uses the admin listener's default address cannot prevent the start: any user can bind
//!   that address, so the edge then runs without the admin listener.
//! - A handed over descriptor cannot prevent the start: if it is not a listening TCP socket, a warning is logged
//!   and it is left out.
//!
//! Deliberately not here: accepting, and socket options (see `listener.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use tracing::{info, warn};

use super::inherited::Inherited;
use crate::config::{ADMIN, Config, Listener, default_admin};
use crate::listener::{BindError, ListeningSocket, bind};
use crate::process::supervisor::{Handed, Supervisor};
use crate::support::text::list;

/// What the names of our own sockets in the supervisor's store begin with.
const KEPT: &str = "kept.";

/// How many sockets the packaged unit lets the supervisor keep. The supervisor does not report when it drops more.
const STORE_MAX: usize = 64;

/// An open socket, for an address of the configuration.
#[derive(Clone, Debug)]
pub struct Socket {
    /// The configuration's address, whose port may be 0.
    address: SocketAddr,
    /// Shared with the task that accepts on it; closed when the last owner drops it.
    pub listener: Arc<ListeningSocket>,
    /// Whether it belongs to a socket unit, and not to us.
    is_units: bool,
}

/// The sockets of each listener, in the order of the configuration, and the admin listener's.
#[derive(Clone, Debug, Default)]
pub struct Opened {
    /// Each listener's name, and its sockets in the order of its addresses.
    pub listeners: Vec<(String, Vec<Socket>)>,
    /// `None` where `admin.listen` is off.
    pub admin: Option<Socket>,
}

/// What was handed over at the start, and what is in the supervisor's store.
#[derive(Debug, Default)]
pub struct Sockets {
    units: Vec<Inherited>,
    /// The edge's own sockets from the store; empty after the start.
    kept: Vec<Inherited>,
    /// The local addresses of the sockets in the store, by name.
    stored: BTreeMap<String, BTreeSet<SocketAddr>>,
}

impl Sockets {
    /// Takes the descriptors that were handed over, and logs a warning for each that cannot be used. Must be
    /// called within a tokio runtime.
    pub fn new(handed: Vec<Handed>) -> Sockets {
        let mut sockets = Sockets::default();
        let mut seen = BTreeSet::new();
        let mut missing = Vec::new();
        for Handed { name, number, socket } in handed {
            let Some(socket) = socket else {
                missing.push(number);
                continue;
            };
            match Inherited::check(&name, socket, &mut seen) {
                Ok(inherited) if name.starts_with(KEPT) => {
                    sockets.stored.entry(name).or_default().insert(inherited.local);
                    sockets.kept.push(inherited);
                }
                Ok(inherited) => sockets.units.push(inherited),
                Err(problem) => {
                    warn!(
                        "descriptor {number} ({name}), handed over by the supervisor, is not used: {problem}"
                    );
                    // So that it is removed from the store.
                    if name.starts_with(KEPT) {
                        sockets.stored.entry(name).or_default().insert(NOWHERE);
                    }
                }
            }
        }
        if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
            let count = missing.len();
            warn!(
                "{count} of the descriptors that the supervisor has announced, from {first} to {last}, are not sockets and are not used"
            );
        }
        sockets
    }

    /// The sockets for a configuration: `current` ones first, then those handed over, then new ones.
    /// If one cannot be bound, nothing has changed.
    pub fn open(&self, config: &Config, current: &Opened) -> Result<Opened, BindError> {
        let names: BTreeSet<&str> = config.listeners.iter().map(|l| l.name.as_str()).chain([ADMIN]).collect();
        let mut search = Search { sockets: self, current, names, used: BTreeSet::new() };
        let mut opened = Opened::default();
        for listener in &config.listeners {
            opened.listeners.push((listener.name.clone(), search.of_listener(listener)?));
        }
        if let Some(address) = config.admin {
            let units = search.units_named(ADMIN, &[address], true);
            // The admin listener has one socket; `warn_of_idle_units` warns of the others.
            let own = units.iter().find(|unit| unit.address == address).or(units.first()).cloned();
            opened.admin = match own {
                Some(unit) => Some(unit),
                None => match search.of_address(ADMIN, address) {
                    Err(error) if Some(address) == default_admin() && error.kind == ErrorKind::AddrInUse => {
                        warn!(
                            "{error}, with admin.listen; mail is served, but health, status and metrics are not"
                        );
                        None
                    }
                    found => found?,
                },
            };
        }
        Ok(opened)
    }

    /// After the start: closes kept sockets that the configuration does not use.
    pub fn close_unused(&mut self, opened: &Opened) {
        self.warn_of_idle_units(opened);
        let used: BTreeSet<SocketAddr> = opened.all().filter_map(|socket| socket.local()).collect();
        for kept in self.kept.drain(..).filter(|kept| !used.contains(&kept.local)) {
            info!(
                "the socket {kept}, kept over the restart, is closed: the configuration no longer has this address"
            );
        }
    }

    /// Warns of socket units that no listener uses: their port is open, but nobody accepts there.
    pub fn warn_of_idle_units(&self, opened: &Opened) {
        let used: BTreeSet<SocketAddr> = opened.all().filter_map(Socket::local).collect();
        for unit in self.units.iter().filter(|unit| !used.contains(&unit.local)) {
            match opened.admin.as_ref().filter(|_| unit.name == ADMIN).and_then(Socket::local) {
                Some(admin) => warn!(
                    "nobody accepts connections on the socket unit's {unit}: the admin listener uses only one socket, {admin}; give its unit one ListenStream="
                ),
                None => warn!(
                    "nobody accepts connections on the socket unit's {unit}: no listener has its name or its address; see FileDescriptorName= and ListenStream=, or stop the unit"
                ),
            }
        }
    }

    /// Makes the supervisor keep the sockets that are open now, and no others. A socket whose port the kernel has
    /// chosen is not kept: the next start would not know that port.
    pub fn store(&mut self, supervisor: &Supervisor, opened: &Opened) {
        let mut wanted: BTreeMap<String, Vec<&Socket>> = BTreeMap::new();
        for (name, sockets) in &opened.listeners {
            let own = sockets.iter().filter(|socket| socket.is_ours());
            wanted.entry(format!("{KEPT}{name}")).or_default().extend(own);
        }
        let admin = opened.admin.as_ref().filter(|socket| socket.is_ours());
        wanted.entry(format!("{KEPT}{ADMIN}")).or_default().extend(admin);
        let count: usize = wanted.values().map(Vec::len).sum();
        if count > STORE_MAX && supervisor.is_there() {
            warn!(
                "{count} sockets are to be kept over a restart, but the packaged unit keeps only {STORE_MAX}; raise FileDescriptorStoreMax="
            );
        }
        if let Err(error) = self.store_all(supervisor, &wanted) {
            warn!(
                "the supervisor could not be told which sockets to keep: {error}; ports may be closed during the next restart, unless a reload succeeds"
            );
        }
    }

    /// Sends the messages for the store, and stops at the first that fails: each could take a second to fail.
    fn store_all(
        &mut self,
        supervisor: &Supervisor,
        wanted: &BTreeMap<String, Vec<&Socket>>,
    ) -> io::Result<()> {
        let addresses = |sockets: &[&Socket]| sockets.iter().filter_map(|socket| socket.local()).collect();
        let now: BTreeMap<&str, BTreeSet<SocketAddr>> =
            wanted.iter().map(|(name, sockets)| (name.as_str(), addresses(sockets))).collect();
        let is_old = |name: &str, stored: &BTreeSet<_>| {
            !stored.is_empty() && !now.get(name).is_some_and(|now| stored.is_subset(now))
        };
        let stored = self.stored.iter();
        let old: Vec<String> =
            stored.filter(|(name, stored)| is_old(name, stored)).map(|(name, _)| name.clone()).collect();
        for name in old {
            // A message removes all sockets of a name, never only one of them.
            supervisor.forget(&name)?;
            self.stored.remove(&name);
        }
        for (name, sockets) in wanted {
            let stored = self.stored.entry(name.clone()).or_default();
            for (socket, local) in sockets.iter().filter_map(|socket| Some((socket, socket.local()?))) {
                if !stored.contains(&local) {
                    supervisor.store(name, socket.listener.as_fd())?;
                    stored.insert(local);
                }
            }
        }
        Ok(())
    }
}

/// Stands for something in the store that has no address.
const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

impl Socket {
    /// Its address, with the port that the system chose for port 0; `None` if the system does not give one.
    pub fn local(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Whether the supervisor is to keep it.
    fn is_ours(&self) -> bool {
        !self.is_units && self.address.port() != 0
    }
}

/// Equal only if both are the same socket; two sockets at one address differ.
impl PartialEq for Socket {
    fn eq(&self, other: &Socket) -> bool {
        Arc::ptr_eq(&self.listener, &other.listener)
    }
}

impl Opened {
    fn all(&self) -> impl Iterator<Item = &Socket> {
        self.listeners.iter().flat_map(|(_, sockets)| sockets).chain(&self.admin)
    }
}

/// Finds a socket for each address of a configuration, each one once.
struct Search<'a> {
    sockets: &'a Sockets,
    current: &'a Opened,
    /// The names of all listeners. A unit's socket with such a name is only for that listener.
    names: BTreeSet<&'a str>,
    /// The local addresses of the sockets found so far.
    used: BTreeSet<SocketAddr>,
}

impl Search<'_> {
    /// The sockets of a listener. If its default `[::]` fails on a machine without IPv6, that is only a warning.
    fn of_listener(&mut self, listener: &Listener) -> Result<Vec<Socket>, BindError> {
        let units = self.units_named(&listener.name, &listener.listen, listener.configured);
        if !units.is_empty() {
            return Ok(units);
        }
        let mut found = Vec::new();
        for &address in &listener.listen {
            match self.of_address(&listener.name, address) {
                Ok(socket) => found.extend(socket),
                Err(error) if may_be_missing(listener, address, &error) => {
                    warn!("{error}; serving IPv4 only");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The sockets of a unit that names this listener; `addresses` are those of the file.
    fn units_named(&mut self, name: &str, addresses: &[SocketAddr], configured: bool) -> Vec<Socket> {
        let units: Vec<&Inherited> = self.sockets.units.iter().filter(|unit| unit.name == name).collect();
        let is_told = |unit: &&Inherited| addresses.iter().any(|&address| unit.is_for(address));
        if configured && !units.is_empty() && !units.iter().all(is_told) {
            let local: Vec<SocketAddr> = units.iter().map(|unit| unit.local).collect();
            let [local, told] = [&local[..], addresses].map(|addresses| list(addresses).unwrap_or_default());
            warn!(listener = name, "its socket unit has {local}, which overrides the file's {told}");
        }
        self.used.extend(units.iter().map(|unit| unit.local));
        units
            .iter()
            .map(|unit| Socket { address: unit.local, listener: Arc::clone(&unit.listener), is_units: true })
            .collect()
    }

    /// The socket of an address; `None` if another socket of this configuration accepts its connections
    /// already.
    fn of_address(&mut self, name: &str, address: SocketAddr) -> Result<Option<Socket>, BindError> {
        if let Some(socket) = self.open_already(name, address) {
            self.used.extend(socket.local());
            return Ok(Some(socket));
        }
        let units = self.sockets.units.iter().filter(|unit| !self.names.contains(unit.name.as_str()));
        let kept = self.sockets.kept.iter().filter(|kept| !kept.is_dual_stack);
        let handed = units.map(|unit| (unit, true)).chain(kept.map(|kept| (kept, false)));
        if let Some((found, is_units)) = handed.into_iter().find(|(found, _)| found.is_for(address)) {
            let is_free = self.used.insert(found.local);
            let listener = Arc::clone(&found.listener);
            return Ok(is_free.then_some(Socket { address, listener, is_units }));
        }
        let bound = bind(name, address).map_err(|error| self.explained(error))?;
        Ok(Some(Socket { address, listener: Arc::new(bound), is_units: false }))
    }

    /// A socket that is open for this address now. If the kernel chose its port, only the same listener may use it.
    fn open_already(&self, name: &str, address: SocketAddr) -> Option<Socket> {
        let admin = self.current.admin.iter().map(|socket| (ADMIN, socket));
        let listeners = self.current.listeners.iter();
        let listeners = listeners.flat_map(|(name, sockets)| sockets.iter().map(move |s| (name.as_str(), s)));
        let is_free = |socket: &Socket| socket.local().is_some_and(|local| !self.used.contains(&local));
        let mut open =
            listeners.chain(admin).filter(|(_, socket)| socket.address == address && is_free(socket));
        open.find(|(owner, _)| address.port() != 0 || *owner == name).map(|(_, socket)| socket.clone())
    }

    /// The error, with a better reason if a socket of this edge itself uses the address.
    fn explained(&self, mut error: BindError) -> BindError {
        let address = error.address;
        let covers = |socket: &&Socket| {
            let is_any = address.ip().is_unspecified() || socket.address.ip().is_unspecified();
            socket.address.port() == address.port() && socket.address.is_ipv6() == address.is_ipv6() && is_any
        };
        if let (ErrorKind::AddrInUse, Some(own)) = (error.kind, self.current.all().find(covers)) {
            let own = own.address;
            error.reason =
                format!("this edge itself listens on {own}, which must be closed first; restart the edge");
        }
        error
    }
}

fn may_be_missing(listener: &Listener, address: SocketAddr, error: &BindError) -> bool {
    let is_absent = matches!(error.kind, ErrorKind::AddrNotAvailable | ErrorKind::Unsupported);
    !listener.configured && address.is_ipv6() && is_absent
}

/// Logs that a listener listens here.
pub fn announce(listener: &str, socket: &Socket) {
    if let Some(address) = socket.local() {
        info!(listener, %address, "listening");
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::os::fd::OwnedFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};

    use socket2::{Domain, Socket as RawSocket, Type};

    use super::*;
    use crate::test_support::net::free_addr;

    fn listening(address: SocketAddr, dual_stack: bool) -> (OwnedFd, SocketAddr) {
        let socket = RawSocket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(!dual_stack).unwrap();
        }
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket.listen(1).unwrap();
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        (socket.into(), local)
    }

    fn local() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    fn handed(sockets: Vec<(&str, OwnedFd)>) -> Sockets {
        let handed = sockets.into_iter().zip(3..);
        Sockets::new(
            handed
                .map(|((name, fd), number)| Handed { name: name.to_owned(), number, socket: Some(fd) })
                .collect(),
        )
    }

    /// Listeners `a`, `b`, … at these addresses.
    fn config(addresses: &[&[SocketAddr]]) -> Config {
        let listener = |(addresses, name): (&&[SocketAddr], char)| {
            let listen: Vec<String> = addresses.iter().map(|address| format!("'{address}'")).collect();
            let listen = listen.join(", ");
            format!(
                "[[listener]]\nname = '{name}'\nprotocol = 'tcp'\nupstream_port = 25\nlisten = [{listen}]\n"
            )
        };
        let listeners: String = addresses.iter().zip('a'..).map(listener).collect();
        Config::parse(&format!("[admin]\nlisten = 'off'\n{listeners}"), Some("mailbox"), &|_| None).unwrap()
    }

    fn locals(opened: &Opened) -> Vec<Vec<SocketAddr>> {
        let of = |(_, sockets): &(String, Vec<Socket>)| sockets.iter().filter_map(Socket::local).collect();
        opened.listeners.iter().map(of).collect()
    }

    #[tokio::test]
    async fn the_default_admin_address_may_be_taken_and_another_one_may_not() {
        let (_other, taken) = listening(local(), false);
        let mut config = config(&[&[local()]]);
        config.admin = Some(taken);
        let error = Sockets::default().open(&config, &Opened::default()).unwrap_err();
        assert_eq!((error.name.as_str(), error.kind), (ADMIN, ErrorKind::AddrInUse));
        // The address is in use now, by this test or by another program.
        let _taken = std::net::TcpListener::bind(default_admin().unwrap());
        config.admin = default_admin();
        let opened = Sockets::default().open(&config, &Opened::default()).unwrap();
        assert!(opened.admin.is_none());
        assert_eq!(opened.listeners[0].1.len(), 1);
    }

    #[tokio::test]
    async fn a_units_name_goes_before_the_file_and_its_address_for_no_other_listener() {
        let (named, at) = listening(local(), false);
        let sockets = handed(vec![("a", named)]);
        let free = free_addr();
        let opened = sockets.open(&config(&[&[free]]), &Opened::default()).unwrap();
        assert_eq!(locals(&opened), [[at]]);
        // `b` wants the address of `a`'s socket, which belongs to `a` as long as there is a listener `a`.
        let error = sockets.open(&config(&[&[free], &[at]]), &Opened::default()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn a_dual_stack_socket_takes_both_families_of_a_listener() {
        let (both, at) = listening((Ipv6Addr::UNSPECIFIED, 0).into(), true);
        let sockets = handed(vec![("edge.socket", both)]);
        let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, at.port()));
        let opened = sockets.open(&config(&[&[v4, at]]), &Opened::default()).unwrap();
        assert_eq!(locals(&opened), [[at]]);
    }

    #[tokio::test]
    async fn a_kept_socket_is_used_for_exactly_its_address() {
        let (same, at) = listening(local(), false);
        let (other, elsewhere) = listening(free_addr(), false);
        let mut sockets = handed(vec![("kept.a", same), ("kept.b", other)]);
        let free = free_addr();
        let opened = sockets.open(&config(&[&[at], &[free]]), &Opened::default()).unwrap();
        assert_eq!(locals(&opened), [[at], [free]]);
        sockets.close_unused(&opened);
        assert!(std::net::TcpListener::bind(elsewhere).is_ok(), "what is not used is closed");
    }

    #[tokio::test]
    async fn the_admin_listener_takes_the_socket_of_its_unit_that_has_its_address() {
        let [(first, _), (second, at)] = [(); 2].map(|()| listening(local(), false));
        let mut sockets = handed(vec![("admin", first), ("admin", second)]);
        for _ in 0..2 {
            let config = Config { admin: Some(at), ..config(&[]) };
            let opened = sockets.open(&config, &Opened::default()).unwrap();
            assert_eq!(opened.admin.as_ref().and_then(Socket::local), Some(at));
            sockets.close_unused(&opened);
            assert_eq!(sockets.units.len(), 2, "a unit's socket stays, since it cannot be bound anew");
        }
    }

    #[tokio::test]
    async fn what_the_supervisor_did_not_hear_is_not_in_the_store() {
        let name = format!("tailwart-test-{}-store", std::process::id());
        let address = UnixAddr::from_abstract_name(name.as_bytes()).unwrap();
        let supervisor =
            Supervisor::find(&|variable| (variable == "NOTIFY_SOCKET").then(|| format!("@{name}")));
        let addresses = [(); 2].map(|()| free_addr());
        let mut sockets = Sockets::default();
        let opened = sockets.open(&config(&[&addresses]), &Opened::default()).unwrap();
        sockets.store(&supervisor, &opened);
        assert!(sockets.stored.values().all(BTreeSet::is_empty), "nobody listens: {:?}", sockets.stored);
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let heard = || std::iter::from_fn(|| listener.recv(&mut [0; 512]).ok()).count();
        sockets.store(&supervisor, &opened);
        assert_eq!(heard(), 2, "the next time both go out");
        sockets.store(&supervisor, &opened);
        assert_eq!(heard(), 0, "and that is known");
        drop(listener);
        let fewer = sockets.open(&config(&[&addresses[..1]]), &opened).unwrap();
        sockets.store(&supervisor, &fewer);
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        sockets.store(&supervisor, &fewer);
        let heard = std::iter::from_fn(|| listener.recv(&mut [0; 512]).ok()).count();
        assert_eq!(heard, 2, "the old ones are taken out, and the one that stays is put in");
    }

    #[tokio::test]
    async fn an_open_socket_stays_whoever_has_its_address() {
        let sockets = Sockets::default();
        let before = config(&[&[local()], &[local()]]);
        let opened = sockets.open(&before, &Opened::default()).unwrap();
        let again = sockets.open(&before, &opened).unwrap();
        assert_eq!(locals(&again), locals(&opened), "also where the kernel has chosen the port");
    }

    #[tokio::test]
    async fn addresses_change_hands_without_being_bound_anew() {
        let sockets = Sockets::default();
        let [a, b] = [(); 2].map(|()| free_addr());
        let opened = sockets.open(&config(&[&[a], &[b]]), &Opened::default()).unwrap();
        let swapped = sockets.open(&config(&[&[b], &[a]]), &opened).unwrap();
        assert_eq!(swapped.listeners[0].1[0], opened.listeners[1].1[0]);
        assert_eq!(swapped.listeners[1].1[0], opened.listeners[0].1[0]);
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, a.port()));
        let error = sockets.open(&config(&[&[any], &[b]]), &opened).unwrap_err();
        assert!(error.reason.contains("this edge itself listens on"), "{error}");
    }
}
