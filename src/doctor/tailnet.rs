//! What can be seen from the tailnet: the node's own state, the way to each upstream, and its ports.
//!
//! A node is one process: two processes with one identity push each other off the tailnet. So if an edge runs,
//! the doctor asks it over its admin port to make these checks. If no edge runs, this process becomes the node
//! until the checks are done.
//!
//! Deliberately not here: enrolling. That needs a credential, which may be valid only once, and `run` should use
//! it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use hyper::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::task::JoinQueue;

use super::local::{Running, StateDirUse, is_enrolled};
use super::mailbox::{self, Visit};
use super::report::{Check, Grade};
use crate::config::{self, Config};
use crate::support::http_client::get_from;
use crate::support::wall_clock;
use crate::tailnet::{ConnectError, JoinError, Node, NodeStatus, PingReport, Trouble};
use crate::upstream::Silence;

/// The path on the admin port at which a running edge makes these checks.
pub const PATH: &str = "/doctor";

/// The limit on all checks through a started node, whatever time-outs are configured.
const EXAMINE_LIMIT: Duration = Duration::from_secs(80);

/// The same when a running edge makes them, with the time for question and answer.
const ADMIN_LIMIT: Duration = Duration::from_secs(90);

/// How long the running edge may take to answer at all.
const LIVE_LIMIT: Duration = Duration::from_secs(3);

/// How long a node that has just joined may take to find a relay.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// The same limit that the edge gives a peer at its start.
const PING_LIMIT: Duration = Duration::from_secs(7);

/// How often a peer is pinged that is not reached directly, and the pause between the pings.
const PINGS: usize = 3;
const BETWEEN_PINGS: Duration = Duration::from_secs(1);

/// How long the node may take to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// The remedy for Tailscale's own health warnings.
const HEALTH_REMEDY: &str = "look at this node in the admin console (Headscale: headscale nodes list), and at the network of this machine";

/// The remedy if the edge cannot be asked.
const NO_ANSWER: &str = "check that admin.listen has not changed since the edge started, and see its log; restart the edge if it hangs";

/// Makes the checks of [`PATH`] for the admin port, once there is a node.
#[derive(Debug)]
pub struct Examiner {
    node: OnceLock<Arc<Node>>,
    config: Mutex<Arc<Config>>,
    /// One permit: the checks are work for the mailbox too.
    turn: Semaphore,
}

/// Why no checks were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoLook {
    /// Other checks are running.
    Busy,
    /// There is no node yet.
    NoNode,
}

impl Examiner {
    /// The examiner of an edge with this configuration.
    pub fn new(config: Config) -> Examiner {
        Examiner { node: OnceLock::new(), config: Mutex::new(Arc::new(config)), turn: Semaphore::new(1) }
    }

    /// Uses another configuration from now on.
    pub fn set_config(&self, config: Config) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    /// Sets the node, when it is started.
    pub fn set_node(&self, node: Arc<Node>) {
        let _ = self.node.set(node); // there is only one in the life of an edge
    }

    /// Makes the checks, unless others are running.
    pub async fn examine(&self) -> Result<Vec<Check>, NoLook> {
        let _turn = self.turn.try_acquire().map_err(|_| NoLook::Busy)?;
        let node = self.node.get().ok_or(NoLook::NoNode)?;
        let config = Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(examine(node, &config).await)
    }
}

/// All checks through a started node, within 80 seconds.
pub async fn examine(node: &Arc<Node>, config: &Config) -> Vec<Check> {
    let mut checks = Vec::new();
    if timeout(EXAMINE_LIMIT, look_around(node, config, &mut checks)).await.is_err() {
        checks.push(Check::fail(
            "tailnet",
            format!("not finished within {} s", EXAMINE_LIMIT.as_secs()),
            "lower timeouts.connect, or check one upstream at a time",
        ));
    }
    checks
}

async fn look_around(node: &Arc<Node>, config: &Config, checks: &mut Vec<Check>) {
    let status = node.status().borrow().clone();
    checks.extend(node_checks(&status, &config.tailnet.tags, wall_clock::now()));
    if !status.is_running() {
        return; // every peer would fail for the same reason
    }
    let hosts: BTreeSet<String> = targets(config).map(|(_, host, _)| host.to_owned()).collect();
    let pings = in_order(hosts.into_iter().map(|host| ping(Arc::clone(node), host))).await;
    checks.extend(pings.iter().map(|(host, ping)| peer(host, ping)));
    let is_known = |host: &str| pings.iter().any(|(known, ping)| known == host && ping.is_ok());
    let visits = targets(config).filter(|(_, host, _)| is_known(host)).map(|(listener, host, port)| {
        mailbox::visit(Arc::clone(node), Visit::new(listener, host, port, config.timeouts.connect))
    });
    checks.extend(in_order(visits).await.into_iter().flatten());
}

/// Every upstream server of every listener.
fn targets(config: &Config) -> impl Iterator<Item = (&config::Listener, &str, u16)> {
    config.listeners.iter().flat_map(|listener| {
        let config::Upstream { hosts, port } = &listener.upstream;
        hosts.iter().map(move |host| (listener, host.as_str(), *port))
    })
}

/// Runs all at once; the results are in the order of the futures.
async fn in_order<T: Send + 'static>(
    futures: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let mut running = JoinQueue::new();
    for future in futures {
        running.spawn(future);
    }
    running.join_all().await
}

/// The checks of the node's own state.
fn node_checks(status: &NodeStatus, tags: &[String], now: Timestamp) -> Vec<Check> {
    let mut checks = Vec::new();
    let troubles = status.troubles(tags, now);
    let (missing, troubles): (Vec<Trouble>, Vec<Trouble>) =
        troubles.into_iter().partition(|trouble| matches!(trouble, Trouble::TagMissing(_)));
    checks.extend(troubles.iter().map(|trouble| Check::told("node", Grade::Fail, trouble)));
    if troubles.is_empty() {
        let ips: Vec<String> = status.ips.iter().map(ToString::to_string).collect();
        checks.push(Check::pass("node", format!("on the tailnet as {} ({})", status.name, ips.join(", "))));
    }
    checks.extend(status.warnings().map(|text| Check::warn("node", text, HEALTH_REMEDY)));
    if !status.is_running() {
        return checks; // tags and key expiry are not known
    }
    checks.extend(missing.iter().map(|trouble| Check::told("tag", Grade::Fail, trouble)));
    if missing.is_empty() {
        checks.push(Check::pass("tag", format!("it holds {}", status.tags.join(", "))));
    }
    checks.push(key_expiry(status.key_expiry, now));
    checks
}

fn key_expiry(expiry: Option<Timestamp>, now: Timestamp) -> Check {
    const NAME: &str = "key-expiry";
    match expiry {
        None => Check::pass(NAME, "the node key does not expire"),
        Some(at) if at.duration_since(now) < wall_clock::ENDS_SOON => Check::warn(
            NAME,
            format!("the node key expires at {at}, and then no mail gets through"),
            "disable its expiry in the admin console; the keys of tagged nodes do not expire by themselves",
        ),
        Some(at) => Check::pass(NAME, format!("the node key expires at {at}")),
    }
}

/// Pings a few times, until there is an answer over a direct path. A node that has just joined reaches every peer
/// over a relay first. Its first packets may be lost, and WireGuard repeats a lost handshake only after five
/// seconds.
async fn ping(node: Arc<Node>, host: String) -> (String, Result<PingReport, ConnectError>) {
    let mut report = node.ping(&host, PING_LIMIT).await;
    for _ in 1..PINGS {
        match &report {
            Ok(report) if report.online && (!report.answered || report.direct.is_empty()) => {}
            _ => break,
        }
        sleep(BETWEEN_PINGS).await;
        report = node.ping(&host, PING_LIMIT).await;
    }
    (host, report)
}

/// The check of the path to a peer.
fn peer(host: &str, ping: &Result<PingReport, ConnectError>) -> Check {
    let name = format!("peer {host}");
    let report = match ping {
        Ok(report) => report,
        Err(error) => return Check::told(name, Grade::Fail, error),
    };
    let ip = report.ip;
    if report.answered {
        let found = format!("{ip}, {}, {:.1} ms", report.route(), report.latency_ms);
        return match report.direct.is_empty() {
            false => Check::pass(name, found),
            true => Check::warn(
                name,
                found,
                "it works, but slowly; for a direct path, allow UDP out of both machines, and into one of them (port 41641 by default)",
            ),
        };
    }
    let silence = Silence::Peer { online: report.online, last_seen: report.last_seen.clone() };
    let mut check = Check::told(name, Grade::Fail, &silence);
    check.finding = match report.online {
        true => format!("{ip} does not answer a ping, although the control server sees it"),
        false => format!("{ip}: {}", check.finding),
    };
    check
}

/// Checks the tailnet: through the running edge if there is one, else as the node itself if it is enrolled.
pub async fn look(place: StateDirUse, running: Running, can_enrol: bool, config: &Config) -> Vec<Check> {
    const NAME: &str = "tailnet";
    match (place, running) {
        (StateDirUse::Free(held), _) if is_enrolled(&config.tailnet) => {
            let checks = as_the_node(config, can_enrol).await;
            drop(held);
            checks
        }
        (_, Running::Yes) => match config.admin {
            Some(admin) => through_the_edge(admin).await,
            None => vec![Check::warn(
                NAME,
                "not checked: the edge runs, but admin.listen is off, so it cannot be asked",
                "set admin.listen to a loopback address, or stop the edge while the doctor runs",
            )],
        },
        (_, Running::Unwell) => vec![Check::fail(
            NAME,
            "not checked: an edge uses the state directory, but does not answer on the admin address",
            NO_ANSWER,
        )],
        _ if config.tailnet.ephemeral => vec![Check::warn(
            NAME,
            "not checked: an ephemeral node has no identity while it does not run",
            "start `tailwart-edge run`; the doctor then asks it",
        )],
        _ => vec![not_enrolled()],
    }
}

fn not_enrolled() -> Check {
    Check::warn(
        "tailnet",
        "not checked: this node is not enrolled, and the doctor does not enrol it",
        "start `tailwart-edge run` first; the doctor then asks it",
    )
}

/// Joins with the identity on disk, makes the checks, and closes the node.
async fn as_the_node(config: &Config, can_enrol: bool) -> Vec<Check> {
    let failed = |error: &JoinError| vec![Check::told("node", Grade::Fail, error)];
    let node = match Node::start(&config.tailnet) {
        Ok(node) => Arc::new(node),
        Err(error) => return failed(&error),
    };
    let checks = match node.up(config.tailnet.join_timeout).await {
        // Without its tag the node is on the tailnet too, and the checks say what is missing.
        Ok(()) | Err(JoinError::WrongTags { .. }) => {
            // The node has just joined, and may not have a relay yet.
            let settled =
                |status: &NodeStatus| !status.troubles(&[], wall_clock::now()).iter().any(Trouble::may_pass);
            let _ = timeout(SETTLE_LIMIT, node.status().wait_for(settled)).await;
            examine(&node, config).await
        }
        Err(JoinError::NotEnrolled { .. }) if can_enrol => vec![not_enrolled()],
        Err(error) => failed(&error),
    };
    let _ = timeout(CLOSE_LIMIT, node.close()).await; // the process ends soon
    checks
}

/// Whether an edge answers on this admin address.
pub async fn is_live(admin: SocketAddr) -> bool {
    let Ok(Ok(answer)) = timeout(LIVE_LIMIT, get_from(admin, "/livez")).await else { return false };
    answer.status() == StatusCode::OK && answer.body().trim_ascii() == br#"{"live":true}"#
}

#[derive(Deserialize)]
struct EdgeReport {
    checks: Vec<Check>,
}

/// Asks the running edge for the checks.
async fn through_the_edge(admin: SocketAddr) -> Vec<Check> {
    const NAME: &str = "tailnet";
    const RETRY: &str = "run the doctor again in a moment";
    let failed = |finding: String| vec![Check::fail(NAME, finding, NO_ANSWER)];
    let asked = match timeout(ADMIN_LIMIT, get_from(admin, PATH)).await {
        Ok(asked) => asked,
        Err(_) => Err(format!("no answer within {} s", ADMIN_LIMIT.as_secs())),
    };
    let (status, body) = match asked {
        Ok(answer) => (answer.status(), answer.into_body()),
        Err(reason) => return failed(format!("the edge runs, but cannot be asked at {admin}: {reason}")),
    };
    match status {
        StatusCode::OK => match serde_json::from_slice::<EdgeReport>(&body) {
            // Another program may have answered.
            Ok(answer) => answer.checks.into_iter().map(Check::made_harmless).collect(),
            Err(_) => failed(format!("{admin}{PATH} does not answer with checks")),
        },
        StatusCode::TOO_MANY_REQUESTS => {
            vec![Check::warn(NAME, "not checked: another doctor run is not finished", RETRY)]
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            vec![Check::warn(NAME, "not checked: the edge has not started its node yet", RETRY)]
        }
        _ => failed(format!("{admin}{PATH} answers {status}")),
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn running() -> NodeStatus {
        NodeStatus {
            state: "Running".into(),
            name: "edge.example.ts.net".into(),
            ips: vec!["100.64.0.1".parse().unwrap()],
            in_map_poll: true,
            enrolled: true,
            tags: vec!["tag:reverse-proxy".into()],
            ..NodeStatus::default()
        }
    }

    fn outcomes(status: NodeStatus) -> Vec<(String, Grade)> {
        let checks = node_checks(&status, &["tag:reverse-proxy".into()], NOW);
        checks.into_iter().map(|check| (check.name, check.outcome)).collect()
    }

    fn expected(checks: &[(&str, Grade)]) -> Vec<(String, Grade)> {
        checks.iter().map(|&(name, outcome)| (name.to_owned(), outcome)).collect()
    }

    #[test]
    fn the_nodes_own_state_is_told() {
        use Grade::{Fail, Pass, Warn};
        assert_eq!(outcomes(running()), expected(&[("node", Pass), ("tag", Pass), ("key-expiry", Pass)]));
        let untagged = NodeStatus { tags: vec![], ..running() };
        assert_eq!(outcomes(untagged), expected(&[("node", Pass), ("tag", Fail), ("key-expiry", Pass)]));
        let lost = NodeStatus { in_map_poll: false, relay: "gone".into(), ..running() };
        let both = [("node", Fail), ("node", Fail), ("tag", Pass), ("key-expiry", Pass)];
        assert_eq!(outcomes(lost), expected(&both));
        let soon = Some(NOW + SignedDuration::from_hours(24));
        let expiring = NodeStatus { key_expiry: soon, ..running() };
        assert_eq!(outcomes(expiring), expected(&[("node", Pass), ("tag", Pass), ("key-expiry", Warn)]));
        let later = Some(NOW + SignedDuration::from_hours(24 * 60));
        assert_eq!(key_expiry(later, NOW).outcome, Pass);
        let removed = NodeStatus { removed: true, ..running() };
        assert_eq!(outcomes(removed), expected(&[("node", Fail)]));
    }

    fn report(answered: bool, online: bool, direct: &str) -> PingReport {
        let relay = if direct.is_empty() { "fra" } else { "" };
        PingReport {
            network: true,
            ip: [100, 64, 0, 2].into(),
            answered,
            latency_ms: 12.345,
            direct: direct.to_owned(),
            relay: relay.to_owned(),
            online,
            last_seen: String::new(),
        }
    }

    #[test]
    fn the_way_to_a_peer_is_told() {
        let look = |ping| peer("stalwart", &ping);
        let direct = look(Ok(report(true, true, "192.0.2.7:41641")));
        assert_eq!(direct, Check::pass("peer stalwart", "100.64.0.2, direct 192.0.2.7:41641, 12.3 ms"));
        let relayed = look(Ok(report(true, true, "")));
        assert_eq!(relayed.outcome, Grade::Warn);
        assert_eq!(relayed.finding, "100.64.0.2, relayed via fra, 12.3 ms");
        let silent = look(Ok(report(false, true, "")));
        assert_eq!(silent.outcome, Grade::Fail);
        assert!(silent.finding.contains("does not answer a ping"), "{silent:?}");
        let offline = look(Ok(report(false, false, "")));
        assert_eq!(offline.finding, "100.64.0.2: the peer is offline");
        let unknown = look(Err(ConnectError::NoSuchPeer));
        assert!(unknown.outcome == Grade::Fail && unknown.finding.contains("no peer of that name"));
        assert!(unknown.remedy.unwrap().contains("check the upstream's name"));
    }

    #[tokio::test]
    async fn results_come_in_order_whoever_is_first() {
        let (late, early) = tokio::sync::oneshot::channel::<()>();
        let mut late = Some(late);
        let mut early = Some(early);
        let tasks = (0..2).map(|index| {
            let (wait, tell) = if index == 0 { (early.take(), None) } else { (None, late.take()) };
            async move {
                if let Some(wait) = wait {
                    let _ = wait.await;
                }
                drop(tell);
                index
            }
        });
        assert_eq!(in_order(tasks).await, [0, 1]);
    }
}
