//! The ports and what is connected through them, under the configuration that is in force.
//!
//! Invariants
//! - A configuration is put in force as a whole or not at all: what can fail, binding, comes first.
//! - What has not changed is not touched: sockets stay open, and a listener that means the same keeps
//!   its service, with all that is known of its mailbox and everybody who waits for it.
//! - Connections live by the service that they began with, and count against the limits of the day.
//!
//! Deliberately not here: reading the configuration (see `reload.rs`), and finding sockets (see
//! `sockets.rs`).

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::QUIET;
use super::admin_listener::Admin;
use super::port::{Definition, Port, monitor};
use crate::admin::board::{Board, Listening, Outlook};
use crate::admin::overview::Overview;
use crate::config::{self, Config};
use crate::connection::limits::{ClientLimit, ConnectionLimit, Permits, connection_limit};
use crate::connection::open::Connections;
use crate::connection::refusal::PublicName;
use crate::connection::relay::{Timeouts, set_kept_most};
use crate::connection::{Hold, Service};
use crate::edge::reload::Changes;
use crate::listener::sockets::{Opened, Socket, Sockets};
use crate::listener::{self, Admission, BindError};
use crate::process::log::Logging;
use crate::process::memory::MemoryLimit;
use crate::process::signals::{Drained, Signals};
use crate::process::supervisor::Supervisor;
use crate::support::vital::{Vital, Vitals};
use crate::tailnet::{Node, set_memory};
use crate::upstream::Upstream;
use crate::upstream::health::State;
use crate::upstream::peers::{Peer, Peers};

/// How long those who wait for a tailnet that refuses this edge may take to read the answer.
const TURN_AWAY_LIMIT: Duration = Duration::from_secs(3);

/// What [`Serving`] works with.
pub(super) struct Parts {
    pub node: Arc<Node>,
    pub admin: Admin,
    /// Where it is shown what is known of the mailbox.
    pub board: watch::Sender<Option<Arc<Board>>>,
    pub connections: Arc<Connections>,
    pub logging: Arc<Logging>,
    pub vitals: Vitals,
}

/// The ports, and what is connected through them.
pub(super) struct Serving {
    /// In force; its `[tailnet]` is that of the start.
    config: Config,
    parts: Parts,
    ports: Vec<Port>,
    /// Listeners of configurations before this one, whose connections may be left.
    removed: Vec<Listening>,
    /// Which of them accept.
    opening: Opening,
    sockets: Sockets,
    admission: Admission,
    permits: Permits,
    /// In force.
    memory: MemoryLimit,
    held: Permits,
    peers: Peers<Node>,
    drain: CancellationToken,
    _telling: Vital,
}

/// Which ports accept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    None,
    /// Those whose clients can be held.
    Holding,
    All,
}

impl Serving {
    /// Nothing accepts yet.
    pub fn new(config: Config, sockets: Sockets, opened: Opened, parts: Parts) -> Serving {
        let memory = MemoryLimit::new(config.limits.memory_mib);
        let limit = total_limit(&config, &opened, &memory);
        tell_limit(&config, &limit);
        bound_memory(&memory, &parts.admin.overview);
        let permits = Permits::new(limit.connections);
        let admission = Admission {
            permits: Arc::clone(permits.semaphore()),
            clients: ClientLimit::new(config.limits.max_connections_per_client),
            tasks: TaskTracker::new(),
        };
        let held = Permits::new(config.limits.hold_max);
        let peers = Peers::new(Arc::clone(&parts.node), config.timeouts.dead_peer, parts.vitals.clone());
        let drain = parts.admin.overview.drain.clone();
        let connections = Arc::clone(&parts.connections);
        let telling =
            parts.vitals.spawn("tell repeated lines", async move { connections.keep_telling().await });
        let (ports, removed, opening) = (Vec::new(), Vec::new(), Opening::None);
        let mut serving = Serving {
            config,
            parts,
            ports,
            removed,
            opening,
            sockets,
            admission,
            permits,
            memory,
            held,
            peers,
            drain,
            _telling: telling,
        };
        serving.set_ports(opened.listeners, false);
        serving.parts.admin.serve_tailnet(&serving.parts.node, serving.config.admin_tailnet_port);
        serving.show_board();
        serving
    }

    /// Bounds how long a stop may take, whatever the configuration allows.
    pub fn bound_drain(&mut self, most: Duration) {
        self.config.timeouts.drain = self.config.timeouts.drain.min(most);
    }

    /// How long a stop may take.
    pub fn drain_limit(&self) -> Duration {
        self.config.timeouts.drain
    }

    /// The mailbox's nodes.
    pub fn peers(&self) -> Vec<Arc<Peer>> {
        self.peers.known().iter().filter_map(Weak::upgrade).collect()
    }

    /// What is known of the mailbox, in each configuration that is in force.
    pub fn watch_board(&self) -> watch::Receiver<Option<Arc<Board>>> {
        self.parts.board.subscribe()
    }

    /// Whether every port accepts, as it does once the edge has been on the tailnet.
    pub fn is_open(&self) -> bool {
        self.opening == Opening::All
    }

    /// Accepts where clients can be held.
    pub fn open_holding(&mut self) {
        self.open(Opening::Holding, &[]);
    }

    /// Accepts everywhere.
    pub fn open_all(&mut self) {
        self.open(Opening::All, &[]);
    }

    /// Tells of each socket that begins to accept, but for the `known` ones of a listener.
    fn open(&mut self, opening: Opening, known: &[(String, Socket)]) {
        self.opening = opening;
        for port in self.ports.iter_mut().filter(|port| port.accepting.is_empty()) {
            if opening.includes(&port.service) {
                port.accept(&self.admission, &self.parts.vitals, known);
            }
        }
    }

    /// Has the supervisor keep the sockets that are open.
    pub fn store(&mut self, supervisor: &Supervisor) {
        let opened = self.opened();
        self.sockets.store(supervisor, &opened);
    }

    /// Puts another configuration in force, and says what has changed with it. If an address cannot be
    /// bound nothing has.
    pub async fn change(&mut self, new: Config) -> Result<Changes, BindError> {
        let changes = Changes::between(&self.config, &new);
        // Its default address may have been taken, and be free now.
        let is_admin_missing = new.admin.is_some() && self.parts.admin.running.is_none();
        if changes.is_empty() && !is_admin_missing {
            return Ok(changes);
        }
        // What is new is bound first: nothing after this can fail.
        let opened = self.sockets.open(&new, &self.opened())?;
        new.warnings.iter().for_each(|warning| warn!("{warning}"));
        self.sockets.warn_of_idle_units(&opened);
        let is_probed_anew = self.config.probe != new.probe;
        let memory = MemoryLimit::new(new.limits.memory_mib);
        let limit = total_limit(&new, &opened, &memory);
        let per_client = self.config.limits.max_connections_per_client;
        let is_total_same = limit.connections == self.permits.size();
        let is_limit_told = is_total_same && per_client == new.limits.max_connections_per_client;
        self.config = Config { tailnet: self.config.tailnet.clone(), ..new };
        let stays = |port: &Port| is_total_same && port.stays(&self.config, &opened.listeners);
        // Where accepting ends, clients wait in the backlog for this moment, and the permits come back.
        let mut known = Vec::new();
        for port in self.ports.iter_mut().filter(|port| !port.accepting.is_empty() && !stays(port)) {
            port.stop_accepting().await;
            known.extend(port.sockets.iter().map(|socket| (port.service.name.clone(), socket.clone())));
        }
        if !is_limit_told {
            tell_limit(&self.config, &limit);
        }
        self.permits.resize(limit.connections).await;
        if memory != self.memory {
            bound_memory(&memory, &self.parts.admin.overview);
            self.memory = memory;
        }
        self.held.resize(self.config.limits.hold_max).await;
        self.admission.clients.set_max(self.config.limits.max_connections_per_client);
        self.peers.set_limit(self.config.timeouts.dead_peer);
        self.parts.logging.change(self.config.log);
        self.parts.connections.set_repeats(self.config.log.repeats);
        self.parts.admin.serve(opened.admin);
        self.parts.admin.serve_tailnet(&self.parts.node, self.config.admin_tailnet_port);
        self.parts.admin.examiner.set_config(self.config.clone());
        self.remember_removed();
        self.set_ports(opened.listeners, is_probed_anew);
        self.open(self.opening, &known);
        self.show_board();
        Ok(changes)
    }

    /// Keeps in mind the listeners that the configuration has no more, for as long as they have connections.
    fn remember_removed(&mut self) {
        let open = self.parts.connections.open();
        self.removed.retain(|removed| open.iter().any(|connection| connection.listener() == removed.name));
        let gone = self.ports.iter().map(Port::listening);
        self.removed.extend(gone.map(|gone| Listening { addresses: Vec::new(), removed: true, ..gone }));
        let is_there = |name: &str| self.config.listeners.iter().any(|listener| listener.name == name);
        self.removed.retain(|removed| !is_there(&removed.name));
    }

    /// The ports of the configuration, with what means the same as before.
    fn set_ports(&mut self, opened: Vec<(String, Vec<Socket>)>, is_probed_anew: bool) {
        let mut before = std::mem::take(&mut self.ports);
        for port in before.iter().filter(|port| self.opening.includes(&port.service)) {
            let is_gone =
                |socket: &&Socket| !opened.iter().flat_map(|(_, new)| new).any(|new| new.is(socket));
            for socket in port.sockets.iter().filter(is_gone) {
                listener::accept_backlog(&socket.listener, &port.service, &self.admission);
            }
        }
        let config = self.config.clone();
        let services: Vec<Arc<Service<Node>>> = before.iter().map(|old| Arc::clone(&old.service)).collect();
        for (listener, (_, sockets)) in config.listeners.iter().zip(opened) {
            let definition = Definition::of(&config, listener);
            let same = before.iter().position(|old| old.definition == definition);
            let (mut port, is_new) = match same.map(|index| before.swap_remove(index)) {
                Some(old) => (Port { sockets, ..old }, false),
                None => (self.new_port(definition, sockets), true),
            };
            let goes_there = |old: &&Arc<Service<Node>>| old.upstream.is_like(&port.service.upstream);
            let known = services.iter().filter(goes_there).max_by_key(|old| old.name == listener.name);
            if let Some(old) = known.filter(|_| is_new) {
                port.service.upstream.continues(&old.upstream);
            }
            if is_new || is_probed_anew {
                port.probe(&self.parts.node, &self.parts.vitals, config.probe);
            }
            self.ports.push(port);
        }
    }

    fn new_port(&mut self, definition: Definition, sockets: Vec<Socket>) -> Port {
        let listener = &definition.listener;
        let config::Upstream { hosts, port } = &listener.upstream;
        let servers = hosts.iter().map(|host| self.peers.get(host)).collect();
        // Without a place for anybody nobody is held.
        let limit = if definition.holds { listener.hold } else { Duration::ZERO };
        let service = Arc::new(Service {
            name: listener.name.clone(),
            protocol: listener.protocol,
            upstream: Arc::new(Upstream::new(
                Arc::clone(&self.parts.node),
                servers,
                *port,
                definition.connect,
            )),
            proxy_protocol: listener.proxy_protocol,
            timeouts: Timeouts {
                idle: listener.idle_timeout,
                half_close: definition.half_close,
                quiet: QUIET,
            },
            hold: Hold { limit, places: Arc::clone(self.held.semaphore()), last_dial: definition.last_dial },
            public_name: PublicName::new(definition.hostname.clone()),
            drain: self.drain.clone(),
            connections: self.parts.connections.of_listener(&listener.name, listener.upstream.to_string()),
        });
        let servers = service.upstream.servers().iter();
        let monitors = servers.map(|server| Arc::new(monitor(&service, server))).collect();
        let (accepting, probing) = (Vec::new(), Vec::new());
        Port { definition, service, sockets, accepting, monitors, probing }
    }

    fn show_board(&self) {
        let monitors: Vec<_> = self.ports.iter().flat_map(|port| port.monitors.clone()).collect();
        let probed = if self.config.probe.interval.is_zero() { &[][..] } else { &monitors[..] };
        let outlooks = self.ports.iter().map(|port| Outlook::new(&port.service, probed)).collect();
        let listeners = self.ports.iter().map(Port::listening).chain(self.removed.iter().cloned()).collect();
        let board = Board { monitors, listeners, outlooks, peers: self.peers.known() };
        self.parts.board.send_replace(Some(Arc::new(board)));
    }

    fn opened(&self) -> Opened {
        let sockets = |port: &Port| (port.service.name.clone(), port.sockets.clone());
        let admin = self.parts.admin.running.as_ref().map(|(socket, _)| socket.clone());
        Opened { listeners: self.ports.iter().map(sockets).collect(), admin }
    }

    /// What goes on, in one line, whenever it is asked.
    pub fn summary(&self) -> impl Fn() -> String + use<> {
        let (board, tasks) = (self.parts.board.subscribe(), self.admission.tasks.clone());
        move || summary(board.borrow().as_deref(), tasks.len())
    }

    /// Closes the ports and waits for the connections within the drain time-out; another signal ends
    /// the wait. `signal` is the one that asked for it, if one did.
    pub async fn stop(&mut self, signal: Option<&str>, signals: &mut Signals) {
        if self.opening == Opening::None {
            return info!(signal, "stopping before anything was served");
        }
        let (began, limit) = (Instant::now(), self.config.timeouts.drain);
        let tasks = self.admission.tasks.clone();
        self.close_ports().await;
        let connections = tasks.len();
        info!(signal, connections, "stopping");
        // A task may be done with its connection, and wait for its client to have read the answer.
        let open = || self.parts.connections.open().len();
        self.drain.cancel();
        tokio::select! {
            () = tasks.wait() => {}
            () = tokio::time::sleep(limit) => if open() > 0 {
                warn!(connections = open(), "drain time-out of {limit:?} passed: connections were cut");
            },
            again = signals.stop() => warn!(signal = again, connections = open(), "stopping at once: connections were cut"),
        }
        let (cut, dismissed) = (self.parts.connections.cut(), self.parts.connections.dismissed());
        let drained = Drained { connections, dismissed, cut, took: began.elapsed() };
        info!("stopped: {drained}");
        let lost_lines = self.parts.logging.lost().dropped_lines();
        if lost_lines > 0 {
            warn!(lost_lines, "log lines were lost because nobody read them");
        }
    }

    /// Closes the ports and turns away those who wait, who are all there are without a tailnet.
    pub async fn turn_away(&mut self) {
        self.close_ports().await;
        self.drain.cancel();
        let _ = timeout(TURN_AWAY_LIMIT, self.admission.tasks.wait()).await;
    }

    /// Takes in those who have got through to a port already, and closes it. A socket that a supervisor
    /// has too stays open there, and queues clients for the next start.
    async fn close_ports(&mut self) {
        for mut port in std::mem::take(&mut self.ports) {
            port.stop_accepting().await;
            if self.opening.includes(&port.service) {
                let take_in = |socket: &Socket| {
                    listener::accept_backlog(&socket.listener, &port.service, &self.admission);
                };
                port.sockets.iter().for_each(take_in);
            }
        }
        self.admission.tasks.close();
    }
}

impl Opening {
    pub(super) fn includes(self, service: &Service<Node>) -> bool {
        match self {
            Opening::None => false,
            Opening::Holding => !service.hold.limit.is_zero(),
            Opening::All => true,
        }
    }
}

fn total_limit(config: &Config, opened: &Opened, memory: &MemoryLimit) -> ConnectionLimit {
    let sockets = opened.listeners.iter().map(|(_, sockets)| sockets.len()).sum();
    connection_limit(config.limits.max_connections, sockets, memory)
}

fn tell_limit(config: &Config, limit: &ConnectionLimit) {
    let per_client = config.limits.max_connections_per_client;
    info!(max_connections = limit.connections, per_client, "limit on connections: {}", limit.reason);
}

/// Puts the limit on memory in force, and says what it is.
fn bound_memory(limit: &MemoryLimit, overview: &Overview) {
    set_memory(limit.in_flight_bytes(), limit.heap_bytes());
    set_kept_most(limit.kept_bytes() as usize);
    overview.memory_limit.store(limit.bytes(), Ordering::Relaxed);
    let in_flight_bytes = limit.in_flight_bytes();
    info!(memory_mib = limit.mib, in_flight_bytes, "limit on memory: {}", limit.reason);
    if let Some(warning) = &limit.warning {
        warn!("{warning}");
    }
}

fn summary(board: Option<&Board>, connections: usize) -> String {
    let monitors = board.map_or(&[][..], |board| &board.monitors);
    let listeners: BTreeSet<&str> = monitors.iter().map(|monitor| monitor.listener.as_str()).collect();
    let in_state = |state| monitors.iter().filter(move |monitor| monitor.seen().state == state);
    let down: BTreeSet<&str> = in_state(State::Down).map(|monitor| monitor.listener.as_str()).collect();
    let mailbox = if !down.is_empty() {
        format!("mailbox down on {}", down.into_iter().collect::<Vec<_>>().join(", "))
    } else if in_state(State::Up).next().is_some() {
        "mailbox up".to_owned()
    } else if in_state(State::Unprobed).next().is_some() {
        "mailbox not probed".to_owned()
    } else {
        "mailbox not known yet".to_owned()
    };
    format!("listeners: {}, connections: {connections}, {mailbox}", listeners.len())
}
