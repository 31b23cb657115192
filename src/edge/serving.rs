//! The ports and what is connected through them, under the configuration that is in force.
//!
//! Invariants
//! - A configuration is put in force as a whole or not at all: binding comes first, since only binding can fail.
//! - What has not changed is not touched: sockets stay open, and a listener whose definition stays the same
//!   keeps its service, with what is known of its mailbox and with the clients that wait for it.
//! - A connection keeps the service that it began with, and counts against the limits now in force.
//!
//! Deliberately not here: reading the configuration (see `reload.rs`), and finding sockets (see
//! `sockets.rs`).

mod stop;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::QUIET;
use super::admin_listener::Admin;
use super::plan::{InForce, Keeps, Plan, PlannedPort, PortInForce};
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
use crate::process::supervisor::Supervisor;
use crate::support::vital::{Vital, Vitals};
use crate::tailnet::{Node, set_memory};
use crate::upstream::Upstream;
use crate::upstream::peers::{Peer, Peers};

/// What [`Serving`] works with.
pub(super) struct Parts {
    pub node: Arc<Node>,
    pub admin: Admin,
    /// Shows the admin listener what is known of the mailbox.
    pub board: watch::Sender<Option<Arc<Board>>>,
    pub connections: Arc<Connections>,
    pub logging: Arc<Logging>,
    pub vitals: Vitals,
}

/// The ports, and what is connected through them.
pub(super) struct Serving {
    /// The configuration in force. Its `[tailnet]` is the one of the start.
    config: Config,
    parts: Parts,
    ports: Vec<Port>,
    /// Listeners of earlier configurations that may still have connections.
    removed: Vec<Listening>,
    /// Which of the ports accept.
    opening: Opening,
    sockets: Sockets,
    admission: Admission,
    permits: Permits,
    /// A reload may change it.
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
    /// The ports whose clients can be held.
    Holding,
    All,
}

impl Serving {
    /// Sets up the ports; none accepts yet.
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
        let plan = Plan::between(&serving.in_force(), &serving.config, opened.listeners, limit.connections);
        serving.set_ports(plan);
        serving.parts.admin.serve_tailnet(&serving.parts.node, serving.config.admin_tailnet_port);
        serving.show_board();
        serving
    }

    /// Limits how long a stop may take, also where the configuration allows more.
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

    /// What is known of the mailbox. Changes with each reload.
    pub fn watch_board(&self) -> watch::Receiver<Option<Arc<Board>>> {
        self.parts.board.subscribe()
    }

    /// Whether every port accepts: the edge has been on the tailnet.
    pub fn is_open(&self) -> bool {
        self.opening == Opening::All
    }

    /// Accepts where clients can be held.
    pub fn open_holding(&mut self) {
        self.open(Opening::Holding);
    }

    /// Accepts everywhere.
    pub fn open_all(&mut self) {
        self.open(Opening::All);
    }

    fn open(&mut self, opening: Opening) {
        self.opening = opening;
        for port in self.ports.iter_mut().filter(|port| port.accepting.is_empty()) {
            if opening.includes(&port.service) {
                port.accept(&self.admission, &self.parts.vitals);
            } else {
                port.announced.clear(); // it does not listen any more
            }
        }
    }

    /// Has the supervisor keep the sockets that are open.
    pub fn store(&mut self, supervisor: &Supervisor) {
        let opened = self.opened();
        self.sockets.store(supervisor, &opened);
    }

    /// Puts another configuration in force, and returns what has changed. If an address cannot be bound,
    /// nothing has changed.
    pub async fn change(&mut self, new: Config) -> Result<Changes, BindError> {
        let changes = Changes::between(&self.config, &new);
        // Another program may have had the default address, and have given it up.
        let is_admin_missing = new.admin.is_some() && self.parts.admin.running.is_none();
        if changes.is_empty() && !is_admin_missing {
            return Ok(changes);
        }
        // New addresses are bound first: nothing after this can fail.
        let opened = self.sockets.open(&new, &self.opened())?;
        new.warnings.iter().for_each(|warning| warn!("{warning}"));
        self.sockets.warn_of_idle_units(&opened);
        let memory = MemoryLimit::new(new.limits.memory_mib);
        let limit = total_limit(&new, &opened, &memory);
        let plan = Plan::between(&self.in_force(), &new, opened.listeners, limit.connections);
        self.config = Config { tailnet: self.config.tailnet.clone(), ..new };
        for &place in &plan.paused {
            self.ports[place].stop_accepting().await;
        }
        if plan.tells_limit {
            tell_limit(&self.config, &limit);
        }
        if memory != self.memory {
            bound_memory(&memory, &self.parts.admin.overview);
            self.memory = memory;
        }
        self.change_limits(limit.connections).await;
        self.change_parts(opened.admin);
        self.remember_removed();
        self.set_ports(plan);
        self.open(self.opening);
        self.show_board();
        Ok(changes)
    }

    /// Puts the configuration's limits in force, with `connections` as the limit on all connections.
    async fn change_limits(&mut self, connections: usize) {
        self.permits.resize(connections).await;
        self.held.resize(self.config.limits.hold_max).await;
        self.admission.clients.set_max(self.config.limits.max_connections_per_client);
        self.peers.set_limit(self.config.timeouts.dead_peer);
    }

    /// Gives the parts beside the ports their new settings.
    fn change_parts(&mut self, admin: Option<Socket>) {
        let Parts { logging, connections, admin: admin_listener, node, .. } = &mut self.parts;
        logging.change(self.config.log);
        connections.set_repeats(self.config.log.repeats);
        admin_listener.serve(admin);
        admin_listener.serve_tailnet(node, self.config.admin_tailnet_port);
        admin_listener.examiner.set_config(self.config.clone());
    }

    fn in_force(&self) -> InForce<'_, Socket> {
        let ports = self.ports.iter();
        let ports = ports.map(|port| PortInForce { definition: &port.definition, sockets: &port.sockets });
        InForce { config: &self.config, connections: self.permits.size(), ports: ports.collect() }
    }

    /// Remembers listeners that are no longer in the configuration, as long as they have connections.
    fn remember_removed(&mut self) {
        let open = self.parts.connections.open();
        self.removed.retain(|removed| open.iter().any(|connection| connection.listener() == removed.name));
        let gone = self.ports.iter().map(Port::listening);
        self.removed.extend(gone.map(|gone| Listening { addresses: Vec::new(), removed: true, ..gone }));
        let is_there = |name: &str| self.config.listeners.iter().any(|listener| listener.name == name);
        self.removed.retain(|removed| !is_there(&removed.name));
    }

    /// Makes the ports of the plan. A port that stays the same goes on.
    fn set_ports(&mut self, plan: Plan<Socket>) {
        for (place, socket) in plan.closing {
            let service = &self.ports[place].service;
            if self.opening.includes(service) {
                listener::accept_backlog(&socket.listener, service, &self.admission);
            }
        }
        let before = std::mem::take(&mut self.ports);
        // All of them to the end: they keep their peers, with what is known of these, for the new services.
        let upstreams: Vec<_> = before.iter().map(|port| Arc::clone(&port.service.upstream)).collect();
        let mut before: Vec<Option<Port>> = before.into_iter().map(Some).collect();
        for PlannedPort { definition, sockets, before: place, keeps } in plan.ports {
            let mut port = match (keeps, place.and_then(|place| before[place].take())) {
                (Keeps::Service, Some(old)) => Port { sockets, ..old },
                (Keeps::Mailbox, Some(old)) => {
                    let service = self.new_service(&definition, Arc::clone(&old.service.upstream));
                    Port { definition, service, sockets, ..old }
                }
                (_, old) => {
                    let announced = old.map(|old| old.announced).unwrap_or_default();
                    self.new_port(definition, sockets, announced)
                }
            };
            if let Keeps::Knowledge(place) = keeps {
                port.service.upstream.continues(&upstreams[place]);
            }
            if !matches!(keeps, Keeps::Service | Keeps::Mailbox) || plan.probes_anew {
                port.probe(&self.parts.node, &self.parts.vitals, self.config.probe);
            }
            self.ports.push(port);
        }
    }

    fn new_port(&mut self, definition: Definition, sockets: Vec<Socket>, announced: Vec<Socket>) -> Port {
        let config::Upstream { hosts, port } = &definition.listener.upstream;
        let servers = hosts.iter().map(|host| self.peers.get(host)).collect();
        let upstream = Upstream::new(Arc::clone(&self.parts.node), servers, *port, definition.connect);
        let service = self.new_service(&definition, Arc::new(upstream));
        let servers = service.upstream.servers().iter();
        let monitors = servers.map(|server| Arc::new(monitor(&service, server))).collect();
        let (accepting, probing) = (Vec::new(), Vec::new());
        Port { definition, service, sockets, announced, accepting, monitors, probing }
    }

    fn new_service(&self, definition: &Definition, upstream: Arc<Upstream<Node>>) -> Arc<Service<Node>> {
        let listener = &definition.listener;
        // With `hold_max` at 0 nobody is held.
        let limit = if definition.holds { listener.hold } else { Duration::ZERO };
        Arc::new(Service {
            name: listener.name.clone(),
            protocol: listener.protocol,
            upstream,
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
        })
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

    /// A function that gives the state in one line, for the supervisor.
    pub fn summary(&self) -> impl Fn() -> String + use<> {
        let (board, tasks) = (self.parts.board.subscribe(), self.admission.tasks.clone());
        move || board.borrow().as_deref().map(|board| board.summary(tasks.len())).unwrap_or_default()
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

/// Puts the limit on memory in force, and logs it.
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
