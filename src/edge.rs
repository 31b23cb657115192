//! Joins the parts: bind, join the tailnet, accept, and stop in order.
//!
//! The order of the start is a promise. Ports are bound first, so that a
//! mistake there does not use up an auth key. A node that is enrolled accepts at
//! once, and holds its clients until it is on the tailnet. One that is not may
//! never be, and some listeners hold nobody: there, clients wait in the kernel's
//! backlog until then.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::admin::{self, Readiness};
use crate::answer::PublicName;
use crate::config::{self, Config};
use crate::connection::{Hold, Service};
use crate::credential::Sources;
use crate::doctor::Examiner;
use crate::drain::StopSignals;
use crate::health::{self, Board, Monitor, Outlook};
use crate::limits::{ClientLimit, connection_limit};
use crate::listener::{self, Admission, BindError};
use crate::membership::Membership;
use crate::peers::Peers;
use crate::relay::Timeouts;
use crate::state_dir::{self, StateDirError};
use crate::tailnet::{JoinError, Node, linked_version};
use crate::upstream::Upstream;

/// While draining, a connection that waits for its client this long is closed;
/// the others have until the drain time-out.
const QUIET: Duration = Duration::from_secs(1);

/// How long the node may take to close: two seconds for the peers, the rest for
/// Tailscale itself.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// How long the first contact with the upstreams may hold up the first client:
/// enough for WireGuard to repeat a handshake, after 5 to 5.4 seconds. A silent one
/// takes up to two more.
const GREETING_LIMIT: Duration = Duration::from_secs(7);

/// How long those who wait for a tailnet that refuses this edge may take to read the answer.
const TURN_AWAY_LIMIT: Duration = Duration::from_secs(3);

/// Why the edge could not run; [`RunError::exit_code`] tells scripts.
#[derive(Debug, Error)]
pub enum RunError {
    /// A port could not be opened.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The identity's directory cannot be used.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The tailnet could not be joined.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Signal handlers could not be installed.
    #[error("cannot install signal handlers: {0}")]
    Signals(#[source] std::io::Error),
}

impl RunError {
    /// The process's exit code: 3 tailnet, 4 cannot bind, 1 anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Join(JoinError::Start(_) | JoinError::BadStateFile(_))
            | RunError::StateDir(_)
            | RunError::Signals(_) => 1,
            RunError::Join(_) => 3,
            RunError::Bind(_) => 4,
        }
    }
}

/// A listener and its open sockets.
struct Bound<'a> {
    listener: &'a config::Listener,
    sockets: Vec<TcpListener>,
}

/// Runs the edge until a signal stops it. `Ok` is an orderly stop, also when
/// the drain time-out cut connections. `sources` are asked if the node has to
/// enrol.
pub async fn run(config: Config, sources: Sources) -> Result<(), RunError> {
    let mut signals = StopSignals::install().map_err(RunError::Signals)?;
    info!(version = env!("CARGO_PKG_VERSION"), tailscale = linked_version(), "tailwart-edge starts");
    let drain = CancellationToken::new();
    let bound = bind_all(&config.listeners)?;
    let admin = config.admin.map(|address| listener::bind("admin", address)).transpose()?;
    let settings = &config.tailnet;
    // An ephemeral node has no identity that two could share.
    let _state_dir = (!settings.ephemeral).then(|| state_dir::lock(&settings.state_dir)).transpose()?;

    let (node_sender, node_receiver) = watch::channel(None);
    let board = Arc::new(OnceLock::new());
    let examiner = Arc::new(Examiner::new(config.clone()));
    let (tags, drain_begun) = (settings.tags.clone(), drain.clone());
    let readiness =
        Arc::new(Readiness { node: node_receiver, tags, board: Arc::clone(&board), drain: drain_begun });
    if let Some(admin) = admin {
        announce("admin", &admin);
        tokio::spawn(admin::serve(admin, Arc::clone(&readiness), Arc::clone(&examiner)));
    }
    let node = Arc::new(Node::start(settings)?);
    if let Some(port) = config.admin_tailnet_port {
        tokio::spawn(admin::serve_tailnet(Arc::clone(&node), port, readiness));
    }
    node_sender.send_replace(Some(node.status()));
    examiner.set_node(Arc::clone(&node));
    let membership = Membership::new(Arc::clone(&node), sources, settings.clone());

    let outcome = serve(&config, bound, membership, &board, drain, &mut signals).await;
    close(&node, &mut signals).await;
    outcome.map_err(RunError::Join)
}

/// Closes the node, within a limit and unless a signal says at once: whatever
/// holds it up, the process has to end.
async fn close(node: &Node, signals: &mut StopSignals) {
    tokio::select! {
        gone = node.close() => if !gone {
            warn!("this ephemeral node could not be taken off the tailnet; the control server drops it later by itself, or remove it in the admin console");
        },
        () = tokio::time::sleep(CLOSE_LIMIT) => warn!("the tailnet node did not close within {CLOSE_LIMIT:?}"),
        signal = signals.stop() => warn!(signal, "stopping at once: the tailnet node is not closed"),
    }
}

/// Binds every address. A default `[::]` on a machine without IPv6 is only
/// worth a warning.
fn bind_all(listeners: &[config::Listener]) -> Result<Vec<Bound<'_>>, BindError> {
    let mut bound = Vec::new();
    for listener in listeners {
        let mut sockets = Vec::new();
        for &address in &listener.listen {
            match listener::bind(&listener.name, address) {
                Ok(socket) => sockets.push(socket),
                Err(error) if may_be_missing(listener, address, &error) => {
                    warn!("{error}; serving IPv4 only")
                }
                Err(error) => return Err(error),
            }
        }
        bound.push(Bound { listener, sockets });
    }
    Ok(bound)
}

fn may_be_missing(listener: &config::Listener, address: SocketAddr, error: &BindError) -> bool {
    use std::io::ErrorKind::{AddrNotAvailable, Unsupported};
    !listener.configured && address.is_ipv6() && matches!(error.kind, AddrNotAvailable | Unsupported)
}

fn announce(listener: &str, socket: &TcpListener) {
    if let Ok(address) = socket.local_addr() {
        info!(listener, %address, "listening");
    }
}

/// Joins the tailnet and makes contact with the upstreams, unless a signal comes
/// first, which is returned.
///
/// The contact comes before the first connection, because the first packets to a
/// peer may be lost: it may not have heard of this node yet, and WireGuard asks
/// again only after five seconds.
async fn reach_tailnet(
    membership: &Membership,
    config: &Config,
    signals: &mut StopSignals,
) -> Result<Option<&'static str>, JoinError> {
    let joined = async {
        membership.join().await?;
        let hosts: BTreeSet<&str> = config
            .listeners
            .iter()
            .flat_map(|listener| &listener.upstream.hosts)
            .map(String::as_str)
            .collect();
        let mut greetings = JoinSet::new();
        for host in hosts {
            greetings.spawn(greet_upstream(Arc::clone(&membership.node), host.to_owned()));
        }
        greetings.join_all().await;
        Ok(None)
    };
    tokio::select! {
        joined = joined => joined,
        signal = signals.stop() => Ok(Some(signal)),
    }
}

/// Joins the tailnet and accepts until a signal, then drains.
async fn serve(
    config: &Config,
    bound: Vec<Bound<'_>>,
    membership: Membership,
    board: &OnceLock<Board>,
    drain: CancellationToken,
    signals: &mut StopSignals,
) -> Result<(), JoinError> {
    let node = Arc::clone(&membership.node);
    let start = || Serving::start(config, bound, &node, board, drain);
    let limit = config.timeouts.drain;
    let mut serving = if node.is_enrolled()? {
        let serving = start();
        match reach_tailnet(&membership, config, signals).await {
            Ok(None) => serving,
            Ok(Some(signal)) => {
                serving.stop(signal, limit, signals).await;
                return Ok(());
            }
            Err(refused) => {
                serving.turn_away().await;
                return Err(refused);
            }
        }
    } else {
        match reach_tailnet(&membership, config, signals).await? {
            None => start(),
            Some(signal) => {
                info!(signal, "stopping before anything was served");
                return Ok(());
            }
        }
    };
    serving.open(|_| true);
    membership.announce();
    let keeping = tokio::spawn(async move { membership.keep().await });
    let signal = signals.stop().await;
    keeping.abort();
    serving.stop(signal, limit, signals).await;
    Ok(())
}

/// The ports, and what is connected through them.
struct Serving {
    /// Those that do not accept yet.
    closed: Vec<Port>,
    accepting: JoinSet<()>,
    watching: JoinSet<()>,
    admission: Admission,
    drain: CancellationToken,
}

/// A listener's sockets, and what is done for who comes there.
struct Port {
    sockets: Vec<TcpListener>,
    service: Arc<Service<Node>>,
}

impl Serving {
    /// Opens the ports whose clients can be held.
    fn start(
        config: &Config,
        bound: Vec<Bound<'_>>,
        node: &Arc<Node>,
        board: &OnceLock<Board>,
        drain: CancellationToken,
    ) -> Serving {
        let sockets = bound.iter().map(|b| b.sockets.len()).sum();
        let limit = connection_limit(config.limits.max_connections, sockets);
        let per_client = config.limits.max_connections_per_client;
        info!(max_connections = limit.connections, per_client, "{}", limit.reason);
        let admission = Admission {
            permits: Arc::new(Semaphore::new(limit.connections)),
            clients: ClientLimit::new(per_client),
            tasks: TaskTracker::new(),
        };
        let shared = Shared {
            node: Arc::clone(node),
            held: Arc::new(Semaphore::new(config.limits.hold_max)),
            public_name: PublicName::new(config.hostname.clone()),
            drain: drain.clone(),
        };
        let mut peers = Peers::default();
        let closed: Vec<Port> = bound
            .into_iter()
            .map(|Bound { listener, sockets }| Port {
                sockets,
                service: Arc::new(shared.service(config, listener, &mut peers)),
            })
            .collect();
        let mut watching = JoinSet::new();
        let monitors = probe_all(&mut watching, &closed, node, config.probe);
        let probed = if config.probe.interval.is_zero() { &[][..] } else { &monitors[..] };
        let outlooks = closed.iter().map(|port| Outlook::new(&port.service, probed)).collect();
        let hold_max = config.limits.hold_max;
        let _ = board.set(Board { monitors, outlooks, places: shared.held, hold_max });
        let (node, dead_peer) = (Arc::clone(node), config.timeouts.dead_peer);
        watching.spawn(async move { peers.watch(&node, dead_peer).await });
        let mut serving = Serving { closed, accepting: JoinSet::new(), watching, admission, drain };
        serving.open(|service| !service.hold.limit.is_zero());
        serving
    }

    /// Accepts for those listeners that do not accept yet.
    fn open(&mut self, wanted: impl Fn(&Service<Node>) -> bool) {
        let (open, closed) =
            std::mem::take(&mut self.closed).into_iter().partition(|port: &Port| wanted(&port.service));
        self.closed = closed;
        for Port { sockets, service } in open as Vec<Port> {
            for socket in sockets {
                announce(&service.name, &socket);
                let (service, admission) = (Arc::clone(&service), self.admission.clone());
                self.accepting.spawn(listener::accept(socket, service, admission));
            }
        }
    }

    /// Closes the ports and waits for the connections within `limit`; another signal ends the wait.
    async fn stop(mut self, signal: &str, limit: Duration, signals: &mut StopSignals) {
        info!(signal, connections = self.admission.tasks.len(), "stopping");
        self.close_ports().await;
        let tasks = &self.admission.tasks;
        tasks.close();
        tokio::select! {
            () = tasks.wait() => {}
            () = tokio::time::sleep(limit) => {
                warn!(connections = tasks.len(), "drain time-out of {limit:?} passed: connections were cut");
            }
            again = signals.stop() => warn!(signal = again, connections = tasks.len(), "stopping at once: connections were cut"),
        }
        info!("stopped");
    }

    /// Closes the ports and turns away those who wait, who are all there are without a tailnet.
    async fn turn_away(mut self) {
        self.close_ports().await;
        self.admission.tasks.close();
        let _ = timeout(TURN_AWAY_LIMIT, self.admission.tasks.wait()).await;
    }

    async fn close_ports(&mut self) {
        self.drain.cancel();
        self.closed.clear();
        self.watching.abort_all();
        while self.accepting.join_next().await.is_some() {}
    }
}

/// Begins to probe every server of every port, unless probing is off.
fn probe_all(
    watching: &mut JoinSet<()>,
    ports: &[Port],
    node: &Arc<Node>,
    settings: config::Probe,
) -> Vec<Arc<Monitor>> {
    let mut monitors = Vec::new();
    for service in ports.iter().map(|port| &port.service) {
        for server in service.upstream.servers() {
            let monitor = Arc::new(Monitor::new(service, server));
            monitors.push(Arc::clone(&monitor));
            if !settings.interval.is_zero() {
                let (service, server, node) = (Arc::clone(service), Arc::clone(server), Arc::clone(node));
                watching.spawn(health::keep_probing(monitor, service, server, node, settings));
            }
        }
    }
    monitors
}

/// What all listeners share.
struct Shared {
    node: Arc<Node>,
    /// One permit for each client that may be held.
    held: Arc<Semaphore>,
    public_name: PublicName,
    drain: CancellationToken,
}

impl Shared {
    fn service(&self, config: &Config, listener: &config::Listener, peers: &mut Peers) -> Service<Node> {
        let config::Upstream { hosts, port } = &listener.upstream;
        let servers = hosts.iter().map(|host| peers.get(host)).collect();
        // Without a place for anybody nobody is held.
        let limit = if config.limits.hold_max == 0 { Duration::ZERO } else { listener.hold };
        Service {
            name: listener.name.clone(),
            protocol: listener.protocol,
            upstream: Upstream::new(Arc::clone(&self.node), servers, *port, config.timeouts.connect),
            proxy_protocol: listener.proxy_protocol,
            timeouts: Timeouts {
                idle: listener.idle_timeout,
                half_close: config.timeouts.half_close,
                quiet: QUIET,
            },
            hold: Hold { limit, places: Arc::clone(&self.held) },
            public_name: self.public_name.clone(),
            drain: self.drain.clone(),
        }
    }
}

/// Looks at an upstream once, so that a wrong name shows at start and not with
/// the first mail.
async fn greet_upstream(node: Arc<Node>, host: String) {
    match node.ping(&host, GREETING_LIMIT).await {
        Ok(report) if report.answered => {
            let latency_ms = (report.latency_ms * 1e3).round() / 1e3;
            info!(upstream = host, ip = %report.ip, path = report.route().to_string(), latency_ms, "upstream reached");
        }
        Ok(report) => {
            warn!(upstream = host, ip = %report.ip, online = report.online, "upstream does not answer a ping; check that it is running");
        }
        Err(reason) => warn!(upstream = host, "upstream cannot be reached: {reason}"),
    }
}

/// Writes the one line that ends a failed run.
pub fn report(failure: &RunError) {
    error!("{failure}");
}
