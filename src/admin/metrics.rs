//! The metrics, in Prometheus's classic text format.
//!
//! [`Counters`](crate::connection::counters::Counters) count from the start of the process; everything else is
//! looked up at the moment of the scrape. Names follow Prometheus's conventions: base units, and `_total` for
//! counters.
//!
//! Invariants: no label value comes from a client, so the number of series is bounded by the
//! configurations that were in force. Series are in the same order in each scrape.
//!
//! Deliberately not here: serving it (see [`crate::admin`]).

mod family;
mod process;

use std::collections::BTreeMap;
use std::sync::Weak;

use prometheus::TextEncoder;
use prometheus::proto::MetricFamily;

use crate::admin::board::{Board, Listening};
use crate::connection::open::{Connections, Open, STAGES};
use crate::tailnet::{Figures, NodeStatus, Route, linked_version};
use crate::upstream::health::State;
use family::{counter, gauge, gauges};

/// For the header `Content-Type`:
/// <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The sources that a scrape reads.
#[derive(Debug)]
pub struct Scrape<'a> {
    /// The node's state.
    pub node: &'a NodeStatus,
    /// What is known of the mailbox; `None` before the first look.
    pub board: Option<&'a Board>,
    /// The connections.
    pub connections: &'a Connections,
    /// Whether the edge is ready, as `/readyz` says.
    pub is_ready: bool,
    /// The resources that the tailnet library uses, once there is a node.
    pub figures: Option<Figures>,
    /// The limit on memory; zero before it is known.
    pub memory_limit_bytes: u64,
    /// Log lines that were lost because nobody read them.
    pub lost_lines: u64,
}

/// The metrics of this moment.
pub fn text(sources: &Scrape) -> String {
    let listeners = sources.board.map_or(&[][..], |board| &board.listeners);
    let mut families = sources.connections.counters.registry.gather();
    families.extend(edge_metrics(sources));
    families.extend(node_metrics(sources.node));
    families.extend(connection_metrics(listeners, &sources.connections.open()));
    families.extend(sources.board.into_iter().flat_map(mailbox_metrics));
    families.extend(sources.board.into_iter().flat_map(path_metrics));
    families.extend(sources.figures.iter().flat_map(library_metrics));
    families.extend(process::metrics());
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder.encode_to_string(&families).expect("each family has a name and a value")
}

fn edge_metrics(sources: &Scrape) -> [MetricFamily; 4] {
    let build = [env!("CARGO_PKG_VERSION"), linked_version()];
    let (limit, lost) = (sources.memory_limit_bytes as f64, sources.lost_lines as f64);
    let lost_help = "Log lines that were lost because nobody read them.";
    [
        gauges(
            "tailwart_edge_build_info",
            "The version of the edge and of Tailscale.",
            ["version", "tailscale"],
            [(build, 1.0)],
        ),
        gauge(
            "tailwart_edge_ready",
            "Whether the edge is ready, as /readyz says.",
            f64::from(sources.is_ready),
        ),
        counter("tailwart_edge_log_lines_lost_total", lost_help, lost),
        gauge("tailwart_edge_memory_limit_bytes", "The memory that the edge aims to stay below.", limit),
    ]
}

fn node_metrics(node: &NodeStatus) -> [MetricFamily; 4] {
    let home = Some(node.home_region.as_str()).filter(|region| !region.is_empty());
    [
        gauge(
            "tailwart_edge_node_running",
            "Whether the node is on the tailnet.",
            f64::from(node.is_running()),
        ),
        gauge(
            "tailwart_edge_node_in_map_poll",
            "Whether the control server sees the node.",
            f64::from(node.in_map_poll),
        ),
        gauges(
            "tailwart_edge_node_home_relay",
            "The node's home relay (DERP region): 1 for the current one.",
            ["region"],
            home.map(|region| ([region], 1.0)),
        ),
        // Left out for a key that does not expire: zero would mean 1970.
        gauge(
            "tailwart_edge_node_key_expiry_timestamp_seconds",
            "When the node key expires (Unix time).",
            node.key_expiry.map(|expiry| expiry.as_second() as f64),
        ),
    ]
}

fn connection_metrics(listeners: &[Listening], connections: &[Open]) -> [MetricFamily; 2] {
    let mut open: BTreeMap<[&str; 2], f64> = BTreeMap::new();
    // A listener without connections is shown with 0.
    for listener in listeners {
        open.extend(STAGES.map(|stage| ([&*listener.name, stage], 0.0)));
    }
    for connection in connections {
        *open.entry([connection.listener(), connection.stage()]).or_default() += 1.0;
    }
    let held = connections.iter().filter(|connection| connection.is_held()).count();
    [
        gauge(
            "tailwart_edge_held_connections",
            "Clients that are held while the mailbox cannot be reached.",
            held as f64,
        ),
        gauges("tailwart_edge_open_connections", "Open connections, by stage.", ["listener", "stage"], open),
    ]
}

fn mailbox_metrics(board: &Board) -> [MetricFamily; 3] {
    let (mut up, mut expiry, mut probe) = (Vec::new(), Vec::new(), Vec::new());
    for monitor in &board.monitors {
        // The labels: which listener, and which server.
        let port = [&*monitor.listener, &*monitor.upstream];
        let seen = monitor.seen();
        if matches!(seen.state, State::Up | State::Down) {
            up.push((port, f64::from(seen.state == State::Up)));
        }
        let Some(finding) = seen.finding else { continue };
        probe.push((port, finding.total.as_secs_f64()));
        expiry.extend(finding.certificate.map(|shown| (port, shown.not_after.as_second() as f64)));
    }
    let labels = ["listener", "upstream"];
    [
        gauges(
            "tailwart_edge_upstream_up",
            "Whether the probe finds the mailbox up; absent until that is known.",
            labels,
            up,
        ),
        gauges(
            "tailwart_edge_upstream_certificate_expiry_timestamp_seconds",
            "When the mailbox's certificate expires (Unix time).",
            labels,
            expiry,
        ),
        gauges(
            "tailwart_edge_upstream_probe_duration_seconds",
            "Duration of the last successful probe.",
            labels,
            probe,
        ),
    ]
}

fn path_metrics(board: &Board) -> [MetricFamily; 3] {
    let (mut connections, mut paths, mut latency) = (Vec::new(), Vec::new(), Vec::new());
    for peer in board.peers.iter().filter_map(Weak::upgrade) {
        connections.push(([peer.host.clone()], peer.connections() as f64));
        let Some(path) = peer.path() else { continue };
        latency.push(([peer.host.clone()], path.latency.as_secs_f64()));
        let (kind, relay) = match path.route {
            Route::Direct(_) => ("direct", String::new()),
            Route::Relay(relay) => ("relay", relay),
        };
        paths.push(([peer.host.clone(), kind.to_owned(), relay], 1.0));
    }
    [
        gauges(
            "tailwart_edge_upstream_connections",
            "Connections to the mailbox's node.",
            ["upstream"],
            connections,
        ),
        gauges(
            "tailwart_edge_upstream_path",
            "The path of packets to the mailbox's node: 1 for the current one.",
            ["upstream", "path", "relay"],
            paths,
        ),
        gauges(
            "tailwart_edge_upstream_latency_seconds",
            "Round trip to the mailbox's node inside the tailnet, as last seen.",
            ["upstream"],
            latency,
        ),
    ]
}

fn library_metrics(figures: &Figures) -> [MetricFamily; 8] {
    let whole = |name, help, value: u64| gauge(name, help, value as f64);
    let idle = figures.heap_idle_bytes.saturating_sub(figures.heap_released_bytes);
    let heap =
        [("idle", idle), ("in_use", figures.heap_in_use_bytes), ("released", figures.heap_released_bytes)];
    let heap = heap.map(|(state, bytes)| ([state], bytes as f64));
    [
        whole("tailwart_edge_go_goroutines", "Goroutines of the tailnet library.", figures.goroutines),
        gauges("tailwart_edge_go_heap_bytes", "Heap of the tailnet library.", ["state"], heap),
        counter(
            "tailwart_edge_go_gc_cycles_total",
            "Garbage collections of the tailnet library.",
            figures.gc_count as f64,
        ),
        counter(
            "tailwart_edge_go_gc_pause_seconds_total",
            "How long garbage collections have stopped the tailnet library.",
            figures.gc_pause_seconds,
        ),
        whole(
            "tailwart_edge_in_flight_bytes",
            "Bytes that connections may have in flight now, beyond the minimum that each has.",
            figures.in_flight_bytes,
        ),
        whole(
            "tailwart_edge_in_flight_max_bytes",
            "The most that all connections together may have in flight.",
            figures.in_flight_max_bytes,
        ),
        whole("tailwart_edge_stack_endpoints", "TCP endpoints of the node, in any state.", figures.endpoints),
        whole(
            "tailwart_edge_stack_handles",
            "Connections of the node that the edge has open.",
            figures.handles,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::end_state::EndState;

    fn text_of(node: &NodeStatus, connections: &Connections) -> String {
        let sources = Scrape {
            node,
            board: None,
            connections,
            is_ready: false,
            figures: None,
            memory_limit_bytes: 0,
            lost_lines: 0,
        };
        text(&sources)
    }

    #[test]
    fn the_expiry_is_there_when_there_is_one() {
        let connections = Connections::new(0);
        let without = text_of(&NodeStatus::default(), &connections);
        assert!(without.contains("tailwart_edge_node_running 0\n"), "{without}");
        assert!(!without.contains("expiry"), "{without}");
        let expiry = Some("2027-01-01T00:00:00Z".parse().unwrap());
        let node = NodeStatus { state: "Running".into(), key_expiry: expiry, ..NodeStatus::default() };
        let with = text_of(&node, &connections);
        assert!(with.contains("tailwart_edge_node_running 1\n"), "{with}");
        assert!(with.contains("tailwart_edge_node_key_expiry_timestamp_seconds 1798761600\n"), "{with}");
    }

    #[test]
    fn a_listener_has_all_its_counters_from_the_start() {
        let connections = Connections::new(0);
        let _listener = connections.of_listener("smtp", "stalwart:25".into());
        connections.counters.ended("smtp", EndState::HoldEnded);
        let text = text_of(&NodeStatus::default(), &connections);
        for line in [
            "# TYPE tailwart_edge_connections_total counter",
            "tailwart_edge_connections_total{end=\"sQ\",listener=\"smtp\"} 1",
            "tailwart_edge_connections_total{end=\"S-\",listener=\"smtp\"} 0",
            "tailwart_edge_refused_connections_total{listener=\"smtp\",reason=\"hold_ended\"} 1",
            "tailwart_edge_refused_connections_total{listener=\"smtp\",reason=\"client_limit\"} 0",
            "tailwart_edge_sent_bytes_total{listener=\"smtp\"} 0",
            "tailwart_edge_dial_seconds_count{listener=\"smtp\"} 0",
            "# TYPE tailwart_edge_build_info gauge",
        ] {
            assert!(text.lines().any(|there| there == line), "{line}\n{text}");
        }
    }

    #[test]
    fn what_a_listener_has_none_of_is_zero() {
        let listener = Listening {
            removed: false,
            name: "smtp".into(),
            protocol: crate::protocol::Protocol::Smtp,
            addresses: vec![],
            upstream: "stalwart:25".into(),
        };
        let board = Board { listeners: vec![listener], ..Board::empty() };
        let (node, connections) = (NodeStatus::default(), Connections::new(0));
        let connection =
            connections.of_listener("smtp", "stalwart:25".into()).enter("192.0.2.7:1".parse().unwrap());
        connection.held();
        let board = Some(&board);
        let sources = Scrape {
            node: &node,
            board,
            connections: &connections,
            is_ready: false,
            figures: None,
            memory_limit_bytes: 0,
            lost_lines: 0,
        };
        let text = text(&sources);
        for (stage, count) in [("connecting", 0), ("held", 1), ("relaying", 0)] {
            let line =
                format!("tailwart_edge_open_connections{{listener=\"smtp\",stage=\"{stage}\"}} {count}\n");
            assert!(text.contains(&line), "{line}{text}");
        }
        assert!(text.contains("tailwart_edge_held_connections 1\n"), "{text}");
    }

    #[test]
    fn scrapes_can_be_compared_line_by_line() {
        let scrape = |listeners: [&str; 3]| {
            let connections = Connections::new(0);
            let _listeners =
                listeners.map(|listener| connections.of_listener(listener, "stalwart:25".into()));
            let text = text_of(&NodeStatus::default(), &connections);
            let lines = text.lines().filter(|line| !line.starts_with("process_"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let lines = scrape(["smtp", "imaps", "submissions"]);
        let of_ends = lines.iter().filter(|line| line.starts_with("tailwart_edge_connections_total{"));
        assert!(of_ends.clone().count() >= 3 * 10 && of_ends.is_sorted(), "{lines:#?}");
        assert_eq!(scrape(["submissions", "smtp", "imaps"]), lines);
    }

    #[test]
    fn a_name_that_others_choose_cannot_break_a_line() {
        let node = NodeStatus { home_region: "a\"b\\c\nd".into(), ..NodeStatus::default() };
        let text = text_of(&node, &Connections::new(0));
        assert!(text.contains(r#"tailwart_edge_node_home_relay{region="a\"b\\c\nd"} 1"#), "{text}");
    }

    #[test]
    fn the_process_is_described() {
        let text = text_of(&NodeStatus::default(), &Connections::new(0));
        for name in
            ["cpu_seconds_total", "resident_memory_bytes", "threads", "start_time_seconds", "open_fds"]
        {
            let value = text.lines().find_map(|line| line.strip_prefix(&format!("process_{name} ")));
            let value: f64 = value.unwrap_or_else(|| panic!("{name}: {text}")).parse().expect("a number");
            assert!(value > 0.0 || name.starts_with("cpu"), "{name} {value}");
        }
    }
}
