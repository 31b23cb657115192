//! In which order does the edge start, reload and stop?
//!
//! It promises an order. Ports are bound first, so that a mistake there does not use up an auth key. An edge
//! whose node is enrolled accepts at once, and holds its clients until the node is on the tailnet. An edge whose
//! node is not enrolled may never get onto the tailnet, so its clients wait in the kernel's backlog until it does. So
//! do the clients of listeners that hold nobody. If control_url was changed, the node starts only after the new
//! server has shown, within 5 s, that it is the server of this identity. A reload works at any time after the
//! node has started, also while it joins.
//!
//! It deliberately does not serve a connection, join the tailnet or read the file itself: `connection`, `tailnet`
//! and `config` do.

mod admin_listener;
mod plan;
mod port;
pub mod reload;
mod serving;

use std::pin::pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::admin::board::Board;
use crate::admin::overview::Overview;
use crate::config::Config;
use crate::connection::open::Connections;
use crate::doctor::Examiner;
use crate::edge::reload::{ReloadError, Source};
use crate::listener::BindError;
use crate::listener::sockets::{Opened, Sockets};
use crate::process::log::Logging;
use crate::process::signals::{Request, Signals};
use crate::process::supervisor::{Handed, Supervisor};
use crate::support::vital::{UnexpectedEnd, UnexpectedEnds, Vital, Vitals};
use crate::tailnet::credential::Sources;
use crate::tailnet::membership::Membership;
use crate::tailnet::state_dir::{self, StateDirError};
use crate::tailnet::{JoinError, Node, linked_version};
use crate::upstream::peers::Peer;
use admin_listener::Admin;
use serving::{Parts, Serving};

/// While draining, a connection that has waited for its client this long is closed;
/// the other connections have until the drain time-out.
const QUIET: Duration = Duration::from_secs(1);

/// How long the node may take to close: two seconds for the peers, the rest for
/// Tailscale itself.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// How long the first contact with the upstreams may delay the first client:
/// enough for WireGuard to repeat a handshake, after 5 to 5.4 seconds. A silent
/// upstream takes up to two seconds more.
const GREETING_LIMIT: Duration = Duration::from_secs(7);

/// How long the edge may drain after one of its tasks has failed: no new client is served meanwhile.
const BROKEN_DRAIN: Duration = Duration::from_secs(30);

/// The least time between two reloads: many signals at once become a few reloads.
const RELOAD_INTERVAL: Duration = Duration::from_millis(100);

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
    /// A task that must run as long as the edge has ended.
    #[error(transparent)]
    TaskEnded(#[from] UnexpectedEnd),
}

impl RunError {
    /// The process's exit code: 3 tailnet, 4 cannot bind, 1 anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Join(JoinError::Start(_) | JoinError::BadStateFile(_) | JoinError::OtherControl(_))
            | RunError::StateDir(_)
            | RunError::Signals(_)
            | RunError::TaskEnded(_) => 1,
            RunError::Join(_) => 3,
            RunError::Bind(_) => 4,
        }
    }
}

/// What a run begins with.
#[derive(Debug)]
pub struct Start {
    /// The configuration.
    pub config: Config,
    /// Where it is read from again.
    pub source: Source,
    /// What the node may enrol with.
    pub credentials: Sources,
    /// The supervisor that has started this process, if any.
    pub supervisor: Supervisor,
    /// The descriptors that it has handed over.
    pub handed: Vec<Handed>,
    /// Where its log lines go.
    pub logging: Arc<Logging>,
}

/// Runs the edge until a signal stops it. `Ok` is an orderly stop, also when
/// the drain time-out cut connections.
pub async fn run(start: Start) -> Result<(), RunError> {
    run_with(start, Vitals::new()).await
}

async fn run_with(start: Start, (vitals, mut ends): (Vitals, UnexpectedEnds)) -> Result<(), RunError> {
    let Start { config, source, credentials, supervisor, handed, logging } = start;
    let mut signals = Signals::install(source.has_file()).map_err(RunError::Signals)?;
    info!(version = env!("CARGO_PKG_VERSION"), tailscale = linked_version(), "tailwart-edge starts");
    let mut sockets = Sockets::new(handed);
    let opened = sockets.open(&config, &Opened::default())?;
    sockets.close_unused(&opened);
    let settings = config.tailnet.clone();
    // An ephemeral node has no identity that two could share.
    let _state_dir = (!settings.ephemeral).then(|| state_dir::lock(&settings.state_dir)).transpose()?;

    let (node_sender, node_receiver) = watch::channel(None);
    let (board_sender, board) = watch::channel(None);
    let examiner = Arc::new(Examiner::new(config.clone()));
    let drain = CancellationToken::new();
    let connections = Connections::new(config.log.repeats);
    let overview = Arc::new(Overview {
        started: Instant::now(),
        node: node_receiver,
        library: OnceLock::new(),
        memory_limit: AtomicU64::new(0),
        tags: settings.tags.clone(),
        board,
        connections: Arc::clone(&connections),
        lost_lines: Some(logging.lost()),
        drain,
    });
    let mut admin = Admin::new(Arc::clone(&overview), Arc::clone(&examiner), vitals.clone());
    admin.serve(opened.admin.clone());
    let node = Arc::new(Node::start_with(&settings, &vitals)?);
    node_sender.send_replace(Some(node.status()));
    let _ = overview.library.set(Arc::clone(&node));
    examiner.set_node(Arc::clone(&node));
    let membership = Arc::new(Membership::new(Arc::clone(&node), credentials, settings));

    let parts = Parts {
        node: Arc::clone(&node),
        admin,
        board: board_sender,
        connections,
        logging,
        vitals: vitals.clone(),
    };
    let serving = Serving::new(config, sockets, opened, parts);
    let (supervisor, next_reload) = (Arc::new(supervisor), Instant::now());
    let mut edge = Edge { serving, source, supervisor, membership, vitals, next_reload };
    let outcome = edge.serve(&mut signals, &mut ends).await;
    close(&node, &mut signals).await;
    outcome
}

/// Closes the node, but not longer than the limit, and not after a second signal: whatever
/// delays the node, the process has to end.
async fn close(node: &Node, signals: &mut Signals) {
    tokio::select! {
        gone = node.close() => if !gone {
            warn!("this ephemeral node could not be removed from the tailnet; the control server removes it later, or remove it in the admin console");
        },
        () = tokio::time::sleep(CLOSE_LIMIT) => warn!("the tailnet node did not close within {CLOSE_LIMIT:?}"),
        signal = signals.stop() => warn!(signal, "stopping at once: the tailnet node is not closed"),
    }
}

/// Why a running edge stops.
enum Stop {
    Signal(&'static str),
    TaskEnded(UnexpectedEnd),
}

impl Stop {
    /// Waits for a reason. SIGHUP is not one.
    async fn next(signals: &mut Signals, ends: &mut UnexpectedEnds) -> Stop {
        tokio::select! {
            signal = signals.stop() => Stop::Signal(signal),
            end = ends.next() => Stop::TaskEnded(end),
        }
    }
}

/// A running edge.
struct Edge {
    serving: Serving,
    source: Source,
    supervisor: Arc<Supervisor>,
    membership: Arc<Membership>,
    vitals: Vitals,
    /// A reload waits until this moment.
    next_reload: Instant,
}

impl Edge {
    /// Joins the tailnet and serves, until a signal comes or a task fails. Then drains.
    async fn serve(&mut self, signals: &mut Signals, ends: &mut UnexpectedEnds) -> Result<(), RunError> {
        self.serving.store(&self.supervisor);
        if self.membership.node.is_enrolled()? {
            self.serving.open_holding();
        }
        let membership = Arc::clone(&self.membership);
        let supervisor = Arc::clone(&self.supervisor);
        let mut joining = pin!(reach_tailnet(&membership, self.serving.watch_board()));
        let mut extending = pin!(supervisor.extend_start());
        let mut companions = Vec::new();
        let stop = loop {
            let is_joining = !self.serving.is_open();
            let stop = tokio::select! {
                joined = &mut joining, if is_joining => match joined {
                    Ok(()) => {
                        companions = self.begin();
                        None
                    }
                    Err(refused) => {
                        self.serving.turn_away().await;
                        return Err(refused.into());
                    }
                },
                () = &mut extending, if is_joining => None,
                request = signals.next() => match request {
                    Request::Stop(signal) => Some(Stop::Signal(signal)),
                    Request::Reload => self.reload(signals, ends).await,
                },
                end = ends.next() => Some(Stop::TaskEnded(end)),
            };
            if let Some(stop) = stop {
                break stop;
            }
        };
        if matches!(stop, Stop::TaskEnded(_)) {
            self.serving.bound_drain(BROKEN_DRAIN);
        }
        self.supervisor.stopping(self.serving.drain_limit());
        drop(companions);
        let (signal, ended) = match stop {
            Stop::Signal(signal) => (Some(signal), None),
            Stop::TaskEnded(end) => (None, Some(end)),
        };
        self.serving.stop(signal, signals).await;
        ended.or_else(|| ends.take()).map_or(Ok(()), |end| Err(end.into()))
    }

    /// Starts to serve, now that the tailnet is there. The returned tasks run beside that until they are dropped.
    fn begin(&mut self) -> Vec<Vital> {
        self.serving.open_all();
        self.membership.announce();
        self.supervisor.ready();
        let membership = Arc::clone(&self.membership);
        let mut companions =
            vec![self.vitals.spawn("keep the tailnet", async move { membership.keep().await })];
        if self.supervisor.is_there() {
            let (supervisor, summary) = (Arc::clone(&self.supervisor), self.serving.summary());
            let informing = async move { supervisor.keep_informed(summary).await };
            companions.push(self.vitals.spawn("inform the supervisor", informing));
        }
        companions
    }

    /// Reads the configuration again and puts it in force, or logs why not. Returns a reason to stop that
    /// came meanwhile.
    async fn reload(&mut self, signals: &mut Signals, ends: &mut UnexpectedEnds) -> Option<Stop> {
        // While the edge joins, the supervisor hears READY=1 only when that is done.
        let is_ready = self.serving.is_open();
        if is_ready {
            self.supervisor.reloading();
        }
        let load = async {
            sleep_until(self.next_reload).await;
            self.source.load_again().await
        };
        let loaded = tokio::select! {
            loaded = load => loaded,
            stop = Stop::next(signals, ends) => return Some(stop),
        };
        self.next_reload = Instant::now() + RELOAD_INTERVAL;
        match self.put_in_force(loaded).await {
            Ok(()) => self.serving.store(&self.supervisor),
            Err(problem) => {
                error!("the configuration was not reloaded, the old one stays in force: {problem}")
            }
        }
        if is_ready {
            self.supervisor.ready();
        }
        None
    }

    async fn put_in_force(&mut self, loaded: Result<Config, ReloadError>) -> Result<(), ReloadError> {
        let known = self.serving.peers();
        self.serving.change(loaded?).await?.tell();
        if self.serving.is_open() {
            let is_new = |peer: &Arc<Peer>| !known.iter().any(|old| Arc::ptr_eq(old, peer));
            for peer in self.serving.peers().into_iter().filter(is_new) {
                tokio::spawn(greet_upstream(Arc::clone(&self.membership.node), peer));
            }
        }
        Ok(())
    }
}

/// Joins the tailnet and makes contact with the upstreams.
///
/// The contact comes before the first connection, because the first packets to a
/// peer may be lost: the peer may not know this node yet, and WireGuard repeats
/// its handshake only after five seconds.
async fn reach_tailnet(
    membership: &Membership,
    board: watch::Receiver<Option<Arc<Board>>>,
) -> Result<(), JoinError> {
    membership.join().await?;
    greet_all(&board, |peer| greet_upstream(Arc::clone(&membership.node), peer)).await;
    Ok(())
}

/// Greets every upstream, also the ones that a reload adds meanwhile.
async fn greet_all<G>(board: &watch::Receiver<Option<Arc<Board>>>, greet: impl Fn(Arc<Peer>) -> G)
where
    G: Future<Output = ()> + Send + 'static,
{
    let mut greeted: Vec<Arc<Peer>> = Vec::new();
    loop {
        let known = board.borrow().as_ref().map(|board| board.peers.clone()).unwrap_or_default();
        let is_new = |peer: &Arc<Peer>| !greeted.iter().any(|old| Arc::ptr_eq(old, peer));
        let new: Vec<_> = known.iter().filter_map(Weak::upgrade).filter(is_new).collect();
        if new.is_empty() {
            return;
        }
        let mut greetings: JoinSet<()> = new.iter().cloned().map(&greet).collect();
        while greetings.join_next().await.is_some() {}
        greeted.extend(new);
    }
}

/// Pings an upstream once, so that a wrong name is logged at the start and not with
/// the first mail.
async fn greet_upstream(node: Arc<Node>, peer: Arc<Peer>) {
    let host = &peer.host;
    match node.ping(host, GREETING_LIMIT).await {
        Ok(report) if report.answered => {
            peer.answered(&report);
            let latency_ms = (report.latency_ms * 1e3).round() / 1e3;
            info!(upstream = host, ip = %report.ip, path = report.route().to_string(), latency_ms, "upstream reached");
        }
        Ok(report) => {
            warn!(upstream = host, ip = %report.ip, online = report.online, "upstream does not answer a ping; check that it is running");
        }
        Err(reason) => warn!(upstream = host, "upstream cannot be reached: {reason}"),
    }
}

/// Logs why a run has failed. The end of a task was logged when it happened.
pub fn report(failure: &RunError) {
    if !matches!(failure, RunError::TaskEnded(_)) {
        error!("{failure}");
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::process::log::{self, tests::log_of};

    /// An edge that cannot join, since there is no control server. It is not enrolled.
    fn start(dir: &std::path::Path) -> Start {
        let text = format!(
            "[tailnet]\nstate_dir = '{}/state'\ncontrol_url = 'http://127.0.0.1:1'\n[admin]\nlisten = 'off'\n\
             [[listener]]\nprotocol = 'smtp'\nlisten = ['127.0.0.1:0']\n",
            dir.display()
        );
        let config = Config::parse(&text, Some("stalwart"), &|_| None).unwrap();
        Start {
            source: Source::capture(None, None, [].into_iter()),
            credentials: Sources::capture(&|_| None, None),
            supervisor: Supervisor::default(),
            handed: Vec::new(),
            logging: Arc::new(log::start(config.log, &|_| None)),
            config,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "run in a process of its own by a_vital_task_that_panics_ends_the_edge"]
    async fn runs_with_a_task_that_panics() {
        let dir = tempfile::tempdir().unwrap();
        let start = start(dir.path());
        let (_logging, (vitals, ends)) = (Arc::clone(&start.logging), Vitals::new());
        let _broken = vitals.spawn("accept smtp 0.0.0.0:25", async { panic!("as this test wants it") });
        let outcome = timeout(Duration::from_secs(30), run_with(start, (vitals, ends))).await;
        let failure = outcome.expect("it goes on").unwrap_err();
        assert!(matches!(failure, RunError::TaskEnded(_)), "{failure}");
        assert_eq!(failure.exit_code(), 1);
        report(&failure);
    }

    #[tokio::test(start_paused = true)]
    async fn upstreams_that_come_while_others_are_greeted_are_greeted_too() {
        let peers = ["old", "added"].map(|host| Arc::new(Peer::new(host.to_owned())));
        let board = |peers: &[Arc<Peer>]| {
            Some(Arc::new(Board { peers: peers.iter().map(Arc::downgrade).collect(), ..Board::empty() }))
        };
        let (sender, receiver) = watch::channel(board(&peers[..1]));
        let (greeted, mut hosts) = tokio::sync::mpsc::unbounded_channel();
        let greet = |peer: Arc<Peer>| {
            greeted.send(peer.host.clone()).unwrap();
            tokio::time::sleep(GREETING_LIMIT)
        };
        let reload = async {
            assert_eq!(hosts.recv().await.as_deref(), Some("old"));
            sender.send_replace(board(&peers));
            assert_eq!(hosts.recv().await.as_deref(), Some("added"));
        };
        let both = async { tokio::join!(greet_all(&receiver, greet), reload) };
        timeout(GREETING_LIMIT * 3, both).await.expect("the other one is not greeted");
        assert!(hosts.try_recv().is_err(), "each once");
    }

    #[test]
    fn a_vital_task_that_panics_ends_the_edge() {
        let (log, succeeds) = log_of("edge::tests::runs_with_a_task_that_panics");
        assert!(succeeds, "{log}");
        let told = "ERROR task \"accept smtp 0.0.0.0:25\" ended unexpectedly: it panicked: as this test wants it; \
                    the edge stops so that its supervisor starts it anew\n";
        assert_eq!(log.matches(told).count(), 1, "{log}");
    }
}
