//! Joins the parts: bind, join the tailnet, accept, and stop in order.
//!
//! The order of the start is a promise. Ports are bound first, so that a
//! mistake there does not use up an auth key; nothing is accepted before the
//! node is on the tailnet, so that until then clients wait in the kernel's
//! backlog instead of being turned away.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::admin::{self, Readiness};
use crate::config::{self, Config};
use crate::connection::Service;
use crate::credential::Sources;
use crate::doctor::Examiner;
use crate::drain::StopSignals;
use crate::limits::{ClientLimit, connection_limit};
use crate::listener::{self, Admission, BindError};
use crate::membership::Membership;
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
/// enough for WireGuard to repeat a handshake, after 5 to 5.4 seconds.
const GREETING_LIMIT: Duration = Duration::from_secs(7);

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
    let examiner = Arc::new(Examiner::new(config.clone()));
    if let Some(admin) = admin {
        announce("admin", &admin);
        let readiness = Readiness { node: node_receiver, tags: settings.tags.clone(), drain: drain.clone() };
        tokio::spawn(admin::serve(admin, Arc::new(readiness), Arc::clone(&examiner)));
    }
    let node = Arc::new(Node::start(settings)?);
    node_sender.send_replace(Some(node.status()));
    examiner.set_node(Arc::clone(&node));
    let membership = Membership::new(Arc::clone(&node), sources, settings.clone());

    let joined = tokio::select! {
        joined = reach_tailnet(&membership, &config) => Some(joined),
        signal = signals.stop() => {
            info!(signal, "stopping before anything was served");
            None
        }
    };
    let outcome = match joined {
        Some(Ok(())) => {
            serve(&config, bound, membership, drain, &mut signals).await;
            Ok(())
        }
        Some(Err(refused)) => Err(RunError::Join(refused)),
        None => Ok(()),
    };
    close(&node, &mut signals).await;
    outcome
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

/// Joins the tailnet and makes contact with the upstreams.
///
/// The contact comes before the first client, because the first packets to a
/// peer may be lost: it may not have heard of this node yet, and WireGuard asks
/// again only after five seconds.
async fn reach_tailnet(membership: &Membership, config: &Config) -> Result<(), JoinError> {
    membership.join().await?;
    let hosts: BTreeSet<&str> =
        config.listeners.iter().map(|listener| listener.upstream.host.as_str()).collect();
    let mut greetings = tokio::task::JoinSet::new();
    for host in hosts {
        greetings.spawn(greet_upstream(Arc::clone(&membership.node), host.to_owned()));
    }
    greetings.join_all().await;
    Ok(())
}

/// Accepts until a signal, then drains.
async fn serve(
    config: &Config,
    bound: Vec<Bound<'_>>,
    membership: Membership,
    drain: CancellationToken,
    signals: &mut StopSignals,
) {
    let sockets = bound.iter().map(|b| b.sockets.len()).sum();
    let limit = connection_limit(config.limits.max_connections, sockets);
    info!(
        max_connections = limit.connections,
        per_client = config.limits.max_connections_per_client,
        "{}",
        limit.reason
    );
    let admission = Admission {
        permits: Arc::new(Semaphore::new(limit.connections)),
        clients: ClientLimit::new(config.limits.max_connections_per_client),
        tasks: TaskTracker::new(),
    };
    let mut accepting = tokio::task::JoinSet::new();
    for Bound { listener, sockets } in bound {
        let service = Arc::new(service(config, listener, &membership.node, &drain));
        for socket in sockets {
            announce(&listener.name, &socket);
            accepting.spawn(listener::accept(socket, Arc::clone(&service), admission.clone()));
        }
    }
    membership.announce();
    let keeping = tokio::spawn(async move { membership.keep().await });

    let signal = signals.stop().await;
    keeping.abort();
    drain.cancel();
    while accepting.join_next().await.is_some() {} // the ports are closed
    stop(&admission.tasks, signal, config.timeouts.drain, signals).await;
}

fn service(
    config: &Config,
    listener: &config::Listener,
    node: &Arc<Node>,
    drain: &CancellationToken,
) -> Service<Node> {
    let config::Upstream { host, port } = listener.upstream.clone();
    Service {
        name: listener.name.clone(),
        upstream: Upstream::new(Arc::clone(node), host, port, config.timeouts.connect),
        proxy_protocol: listener.proxy_protocol,
        timeouts: Timeouts {
            idle: listener.idle_timeout,
            half_close: config.timeouts.half_close,
            quiet: QUIET,
        },
        drain: drain.clone(),
    }
}

/// Looks at an upstream once, so that a wrong name shows at start and not with
/// the first mail.
async fn greet_upstream(node: Arc<Node>, host: String) {
    match node.ping(&host, GREETING_LIMIT).await {
        Ok(report) if report.answered => {
            let latency_ms = (report.latency_ms * 1e3).round() / 1e3;
            info!(upstream = host, ip = %report.ip, path = report.path(), latency_ms, "upstream reached");
        }
        Ok(report) => {
            warn!(upstream = host, ip = %report.ip, online = report.online, "upstream does not answer a ping; check that it is running");
        }
        Err(reason) => warn!(upstream = host, "upstream cannot be reached: {reason}"),
    }
}

/// Waits for the connections within `limit`; another signal ends the wait.
async fn stop(tasks: &TaskTracker, signal: &str, limit: Duration, signals: &mut StopSignals) {
    info!(signal, connections = tasks.len(), "stopping");
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

/// Writes the one line that ends a failed run.
pub fn report(failure: &RunError) {
    error!("{failure}");
}
