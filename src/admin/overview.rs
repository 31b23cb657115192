//! Everything that is known of the running edge, collected when somebody asks: whether it is ready, its state,
//! its metrics.
//!
//! An edge is ready when mail can be accepted: the node is running, the control server sees the node, a relay
//! can be reached, the node holds its tags, the mailbox answers, and the edge is not stopping.
//!
//! The probe decides whether the mailbox answers; the edge is not ready before the first probe has ended. If
//! probing is off, the last attempt of a client decides. Then an edge that was not ready becomes ready only
//! after a client has reached the mailbox: with a load balancer in front, probing is needed. A listener that no
//! client has tried yet does not count: if there is no other, the edge is ready; if another has failed, it is
//! not. A reload keeps what is known as long as the servers stay the same.
//!
//! One listener with a working server is enough; what is wrong with the others is a warning. A load balancer
//! takes out the whole machine, and would take away port 993 because of port 4190. Listeners for mail count;
//! other listeners count only if there is no listener for mail.
//!
//! Deliberately not here: serving the answers (see `admin.rs`).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing_appender::non_blocking::ErrorCounter;

use crate::admin::board::{Board, Judgement, Listening, NOT_REACHED_YET};
use crate::admin::metrics;
use crate::admin::status::{ClientView, ListenerView, MemoryView, NodeView, Status, UpstreamView};
use crate::connection::limits::network_of;
use crate::connection::open::{Connections, Open};
use crate::process::memory;
use crate::support::wall_clock;
use crate::tailnet::{Figures, Node, NodeStatus, linked_version};
use crate::upstream::health::Monitor;

/// How many connections are listed, the oldest ones.
const CONNECTIONS: usize = 200;
/// How many clients are listed.
const CLIENTS: usize = 10;

/// Everything that the admin listener shows is read from here.
#[derive(Debug)]
pub struct Overview {
    /// When the edge was started.
    pub started: Instant,
    /// The node's state; `None` before there is a node.
    pub node: watch::Receiver<Option<watch::Receiver<NodeStatus>>>,
    /// The node itself, for the resources that its library uses; empty before there is a node.
    pub library: OnceLock<Arc<Node>>,
    /// The limit on memory, in bytes; zero before it is known.
    pub memory_limit: AtomicU64,
    /// `tailnet.tags`: what the node must hold to be ready.
    pub tags: Vec<String>,
    /// What is known of the mailbox; `None` before the first look.
    pub board: watch::Receiver<Option<Arc<Board>>>,
    /// The open connections, and the failures that are kept.
    pub connections: Arc<Connections>,
    /// How many log lines were lost.
    pub lost_lines: Option<ErrorCounter>,
    /// Fires when the edge begins to stop.
    pub drain: CancellationToken,
}

impl Overview {
    /// All reasons why mail cannot be accepted now, and what else is wrong.
    pub fn judge(&self) -> Judgement {
        let mut judgement = match &*self.board.borrow() {
            Some(board) => board.judge(),
            None => Judgement { reasons: vec![NOT_REACHED_YET.to_owned()], warnings: Vec::new() },
        };
        judgement.reasons.splice(0..0, self.own_reasons());
        judgement.warnings.extend(self.node_status().warnings());
        judgement
    }

    /// What is wrong with the edge itself.
    fn own_reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.drain.is_cancelled() {
            reasons.push("the edge is stopping".to_owned());
        }
        match &*self.node.borrow() {
            None => reasons.push("the tailnet node is not started".to_owned()),
            Some(node) => {
                let troubles = node.borrow().troubles(&self.tags, wall_clock::now());
                reasons.extend(troubles.iter().map(ToString::to_string));
            }
        }
        reasons
    }

    /// The metrics of this moment.
    pub fn metrics(&self) -> String {
        let board = self.board.borrow().clone();
        let sources = metrics::Scrape {
            node: &self.node_status(),
            board: board.as_deref(),
            connections: &self.connections,
            is_ready: self.judge().reasons.is_empty(),
            figures: self.figures(),
            memory_limit_bytes: self.memory_limit.load(Ordering::Relaxed),
            lost_lines: self.lost_lines.as_ref().map_or(0, |lost| lost.dropped_lines() as u64),
        };
        metrics::text(&sources)
    }

    fn figures(&self) -> Option<Figures> {
        self.library.get().and_then(|node| node.figures())
    }

    fn memory(&self) -> MemoryView {
        let figures = self.figures().unwrap_or_default();
        MemoryView {
            limit_bytes: self.memory_limit.load(Ordering::Relaxed),
            resident_bytes: memory::resident_bytes().unwrap_or_default(),
            in_flight_bytes: figures.in_flight_bytes,
            in_flight_max_bytes: figures.in_flight_max_bytes,
        }
    }

    /// The state, for people and scripts.
    pub fn status(&self) -> Status {
        let now = wall_clock::now();
        let Judgement { reasons: not_ready, warnings } = self.judge();
        let NodeStatus { name, ips, tags, state, key_expiry, home_region, .. } = self.node_status();
        let board = self.board.borrow().clone();
        let open = self.connections.open();
        let mut by_listener: HashMap<&str, usize> = HashMap::new();
        open.iter().for_each(|connection| *by_listener.entry(connection.listener()).or_default() += 1);
        let here = |name: &str| by_listener.get(name).copied().unwrap_or(0);
        let is_there = |listening: &&Listening| !listening.removed || here(&listening.name) > 0;
        let listening = board.iter().flat_map(|board| &board.listeners).filter(is_there);
        let listeners = listening.map(|listening| self.listener(listening, here(&listening.name))).collect();
        let monitors = board.iter().flat_map(|board| &board.monitors);
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            tailscale: linked_version().to_owned(),
            started: now.saturating_sub(self.started.elapsed()).unwrap_or(Timestamp::MIN),
            now,
            node: NodeView { name, ips, tags, state, key_expiry, home_region },
            not_ready,
            warnings,
            memory: self.memory(),
            held: open.iter().filter(|connection| connection.is_held()).count(),
            listeners,
            upstreams: monitors.map(|monitor| upstream(monitor, board.as_deref())).collect(),
            open: open.len(),
            clients: clients(&open),
            connections: open.iter().take(CONNECTIONS).map(Open::view).collect(),
            failures: self.connections.failures(),
        }
    }

    /// The node's MagicDNS name; empty before it has one.
    pub fn node_name(&self) -> String {
        self.node.borrow().as_ref().map(|node| node.borrow().name.clone()).unwrap_or_default()
    }

    fn node_status(&self) -> NodeStatus {
        self.node.borrow().as_ref().map(|node| node.borrow().clone()).unwrap_or_default()
    }

    fn listener(&self, listening: &Listening, open: usize) -> ListenerView {
        let totals = self.connections.counters.totals(&listening.name);
        ListenerView {
            name: listening.name.clone(),
            protocol: listening.protocol.name().to_owned(),
            addresses: listening.addresses.clone(),
            removed: listening.removed,
            upstream: listening.upstream.clone(),
            open,
            ended: totals.ended,
            failed: totals.failed,
            sent: totals.sent,
            received: totals.received,
        }
    }
}

fn upstream(monitor: &Monitor, board: Option<&Board>) -> UpstreamView {
    let peers = board.map_or(&[][..], |board| &board.peers);
    let path = peers
        .iter()
        .filter_map(Weak::upgrade)
        .find(|peer| peer.host == monitor.target.host)
        .and_then(|peer| peer.path());
    UpstreamView {
        listener: monitor.listener.clone(),
        upstream: monitor.upstream.clone(),
        protocol: monitor.target.protocol.name().to_owned(),
        path: path.as_ref().map(|path| path.route.to_string()),
        latency_ms: path.map(|path| (path.latency.as_secs_f64() * 1e6).round() / 1e3),
        probe: monitor.seen(),
    }
}

/// The clients with the most connections. A client is what `limits.max_connections_per_client` counts as one.
fn clients(connections: &[Open]) -> Vec<ClientView> {
    let mut shares: HashMap<IpAddr, ClientView> = HashMap::new();
    for connection in connections {
        let (client, (sent, received)) = (network_of(connection.client().ip()), connection.bytes());
        let share =
            shares.entry(client).or_insert(ClientView { client, connections: 0, sent: 0, received: 0 });
        share.connections += 1;
        share.sent += sent;
        share.received += received;
    }
    let mut clients: Vec<ClientView> = shares.into_values().collect();
    clients.sort_by_key(|share| (std::cmp::Reverse(share.connections), share.client));
    clients.truncate(CLIENTS);
    clients
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::end_state::EndState;
    use crate::connection::ended::Ended;
    use crate::tailnet::Trouble;
    use crate::test_support::overview;

    fn ready_node() -> NodeStatus {
        NodeStatus {
            state: "Running".into(),
            in_map_poll: true,
            tags: vec!["tag:reverse-proxy".into()],
            ..NodeStatus::default()
        }
    }

    /// The overview of an edge without listeners, once it serves.
    fn reasons(node: Option<NodeStatus>, draining: bool) -> Vec<String> {
        overview(node, draining, Some(Board::empty())).judge().reasons
    }

    #[test]
    fn a_running_tagged_node_is_ready() {
        assert_eq!(reasons(Some(ready_node()), false), Vec::<String>::new());
    }

    #[test]
    fn every_reason_is_told() {
        assert_eq!(reasons(None, false), ["the tailnet node is not started"]);
        assert_eq!(reasons(Some(ready_node()), true), ["the edge is stopping"]);
        let node = NodeStatus { in_map_poll: false, tags: vec![], ..ready_node() };
        let control = "the control server is out of reach: the reason is not known yet; check the network and DNS of this machine";
        let tag = Trouble::TagMissing("tag:reverse-proxy".into()).to_string();
        assert_eq!(reasons(Some(node), false), [control.to_owned(), tag]);
    }

    #[test]
    fn what_tailscale_says_is_a_warning() {
        let node = NodeStatus { health: vec!["this node is locked out".into()], ..ready_node() };
        let judgement = overview(Some(node), false, Some(Board::empty())).judge();
        assert_eq!(
            (judgement.reasons.len(), &*judgement.warnings[0]),
            (0, "Tailscale says: this node is locked out")
        );
    }

    #[test]
    fn an_edge_that_has_not_begun_to_serve_is_not_ready() {
        let reasons = overview(None, false, None).judge().reasons;
        assert_eq!(reasons, ["the tailnet node is not started", NOT_REACHED_YET]);
    }

    #[tokio::test]
    async fn the_state_has_who_is_connected_and_what_became_of_others() {
        let listeners = vec![Listening {
            name: "smtp".into(),
            protocol: crate::protocol::Protocol::Smtp,
            addresses: vec!["0.0.0.0:25".parse().unwrap()],
            upstream: "stalwart:25".into(),
            removed: false,
        }];
        let gone = ["left", "empty"].map(|name| Listening {
            name: name.into(),
            addresses: Vec::new(),
            removed: true,
            ..listeners[0].clone()
        });
        let listeners = [listeners, gone.into()].concat();
        let overview = overview(Some(ready_node()), false, Some(Board { listeners, ..Board::empty() }));
        let listener = overview.connections.of_listener("smtp", "stalwart:25".into());
        let enter = |client: &str| listener.enter(client.parse().unwrap());
        let _one = enter("192.0.2.7:1");
        let two = [enter("[2001:db8::1]:1"), enter("[2001:db8::2]:1")];
        two[0].moved(10, 200);
        let why = "held for the whole hold time".to_owned();
        enter("192.0.2.9:1").end(&Ended { state: EndState::HoldEnded, why });
        let left = overview
            .connections
            .of_listener("left", "stalwart:25".into())
            .enter("192.0.2.8:1".parse().unwrap());
        let [listener, gone] = &overview.status().listeners[..] else { panic!("{:?}", overview.status()) };
        assert_eq!((&*listener.name, listener.removed), ("smtp", false));
        assert_eq!((&*gone.name, gone.removed, gone.open), ("left", true, 1));
        drop(left);
        let status = overview.status();
        let [listener] = &status.listeners[..] else { panic!("{status:?}") };
        assert_eq!((listener.open, listener.ended, listener.failed), (3, 1, 1));
        assert_eq!((listener.sent, listener.received, status.open), (10, 200, 3));
        let clients: Vec<_> =
            status.clients.iter().map(|share| (share.client.to_string(), share.connections)).collect();
        assert_eq!(clients, [("2001:db8::".to_owned(), 2), ("192.0.2.7".to_owned(), 1)]);
        assert_eq!(status.failures.len(), 2, "{:?}", status.failures);
    }
}
