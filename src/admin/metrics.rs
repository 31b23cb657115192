//! What is measured, in Prometheus's text formats.
//!
//! [`Counters`](crate::connection::counters::Counters) count from the start of the process; everything else is looked up at the moment of the
//! scrape. Names follow Prometheus's conventions: base units, `_total` for what only grows.
//!
//! Invariants: no label's values come from clients, so the number of series is bounded by the
//! configurations that were in force; series are in the same order in each scrape.
//!
//! Deliberately not here: serving it (see [`crate::admin`]).

mod classic;
mod order;
mod process;

use std::collections::HashMap;
use std::sync::Weak;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::admin::board::{Board, Listening};
use crate::connection::open::{Connections, Open, STAGES};
use crate::tailnet::{Figures, NodeStatus, Route, linked_version};
use crate::upstream::health::{Monitor, State};
use classic::classic;
use order::ordered;

use crate::connection::counters::PREFIX;

/// The formats there are: Prometheus asks for OpenMetrics, `curl` and `promtool` for the classic one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>
    Classic,
    /// <https://prometheus.io/docs/specs/om/open_metrics_spec/>
    OpenMetrics,
}

impl Format {
    /// What the header `Accept` asks for.
    pub fn asked_for(accept: &str) -> Format {
        match accept.contains("application/openmetrics-text") {
            true => Format::OpenMetrics,
            false => Format::Classic,
        }
    }

    /// For the header `Content-Type`.
    pub const fn content_type(self) -> &'static str {
        match self {
            Format::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStage {
    listener: String,
    stage: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPeer {
    upstream: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPath {
    upstream: String,
    path: &'static str,
    relay: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRegion {
    region: String,
}

/// Which server, as which listener uses it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Port {
    listener: String,
    upstream: String,
}

/// What is looked at when the metrics are asked for.
#[derive(Debug)]
pub struct Sources<'a> {
    /// The node's state.
    pub node: &'a NodeStatus,
    /// What is known of the mailbox, once it is looked for.
    pub board: Option<&'a Board>,
    /// The connections.
    pub connections: &'a Connections,
    /// Whether the edge is ready, as `/readyz` has it.
    pub is_ready: bool,
    /// What the library costs, once there is a node.
    pub figures: Option<Figures>,
    /// What memory is to stay below; zero before that is known.
    pub memory_limit_bytes: u64,
    /// Log lines that were lost because nobody read them.
    pub lost_lines: u64,
}

/// The metrics of this moment.
pub fn text(sources: &Sources, format: Format) -> String {
    let mut registry = Registry::with_prefix(PREFIX);
    let build =
        [("version", env!("CARGO_PKG_VERSION").to_owned()), ("tailscale", linked_version().to_owned())];
    registry.register("build", "Which version this is", Info::new(build));
    registry.register("ready", "Whether /readyz says so", whole(sources.is_ready));
    node_metrics(&mut registry, sources.node);
    let lost = Counter::<u64>::default();
    lost.inc_by(sources.lost_lines);
    registry.register("log_lines_lost", "Log lines that were lost because nobody read them", lost);
    let listeners = sources.board.map_or(&[][..], |board| &board.listeners);
    connection_metrics(&mut registry, listeners, &sources.connections.open());
    if let Some(board) = sources.board {
        mailbox_metrics(&mut registry, board);
        path_metrics(&mut registry, board);
    }
    let limit = whole(i64::try_from(sources.memory_limit_bytes).unwrap_or(i64::MAX));
    registry.register_with_unit("memory_limit", "What memory in use is to stay below", Unit::Bytes, limit);
    if let Some(figures) = &sources.figures {
        library_metrics(&mut registry, figures);
    }
    let mut unprefixed = Registry::default();
    process::register(&mut unprefixed);
    let mut text = String::new();
    // Writing to a string cannot fail.
    for registry in [&sources.connections.counters.registry, &registry, &unprefixed] {
        let _ = encode_registry(&mut text, registry);
    }
    let _ = encode_eof(&mut text);
    let text = ordered(&text);
    match format {
        Format::OpenMetrics => text,
        Format::Classic => classic(&text),
    }
}

/// A label's value as the text formats want it, of a text that others choose; the library writes it as it is.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

fn whole(value: impl Into<i64>) -> Gauge {
    let gauge = Gauge::default();
    gauge.set(value.into());
    gauge
}

fn connection_metrics(registry: &mut Registry, listeners: &[Listening], connections: &[Open]) {
    let mut counts: HashMap<(&str, &'static str), i64> = HashMap::new();
    // What there is none of is 0, too.
    for listener in listeners {
        STAGES.iter().for_each(|stage| _ = counts.insert((&listener.name, *stage), 0));
    }
    for connection in connections {
        *counts.entry((connection.listener(), connection.stage())).or_default() += 1;
    }
    let open = Family::<OfStage, Gauge>::default();
    for ((listener, stage), count) in counts {
        open.get_or_create(&OfStage { listener: listener.to_owned(), stage }).set(count);
    }
    let held = connections.iter().filter(|connection| connection.is_held()).count();
    let held = whole(i64::try_from(held).unwrap_or(i64::MAX));
    registry.register("held_connections", "Clients that wait for a mailbox that cannot be reached", held);
    registry.register("open_connections", "Connections there are, by how far they have come", open);
}

fn mailbox_metrics(registry: &mut Registry, board: &Board) {
    let up = Family::<Port, Gauge>::default();
    let expiry = Family::<Port, Gauge<f64, AtomicU64>>::default();
    let probe = Family::<Port, Gauge<f64, AtomicU64>>::default();
    for monitor in &board.monitors {
        note(monitor, &up, &expiry, &probe);
    }
    registry.register("upstream_up", "Whether the probe finds the mailbox well; absent until it knows", up);
    registry.register_with_unit(
        "upstream_certificate_expiry_timestamp",
        "When the mailbox's certificate expires (Unix time)",
        Unit::Seconds,
        expiry,
    );
    registry.register_with_unit(
        "upstream_probe_duration",
        "How long the last probe took that succeeded",
        Unit::Seconds,
        probe,
    );
}

fn path_metrics(registry: &mut Registry, board: &Board) {
    let paths = Family::<OfPath, Gauge>::default();
    let latency = Family::<OfPeer, Gauge<f64, AtomicU64>>::default();
    let connections = Family::<OfPeer, Gauge>::default();
    for peer in board.peers.iter().filter_map(Weak::upgrade) {
        let upstream = peer.host.clone();
        let of_peer = OfPeer { upstream: upstream.clone() };
        connections.get_or_create(&of_peer).set(i64::try_from(peer.connections()).unwrap_or(i64::MAX));
        let Some(path) = peer.path() else { continue };
        latency.get_or_create(&of_peer).set(path.latency.as_secs_f64());
        let (path, relay) = match path.route {
            Route::Direct(_) => ("direct", String::new()),
            Route::Relay(relay) => ("relay", escaped(&relay)),
        };
        paths.get_or_create(&OfPath { upstream, path, relay }).set(1);
    }
    registry.register("upstream_connections", "Connections to the mailbox's node", connections);
    registry.register(
        "upstream_path",
        "Which way packets to the mailbox's node take: 1 for the present one",
        paths,
    );
    registry.register_with_unit(
        "upstream_latency",
        "Round trip to the mailbox's node inside the tailnet, as last seen",
        Unit::Seconds,
        latency,
    );
}

fn library_metrics(registry: &mut Registry, figures: &Figures) {
    let whole = |value: u64| whole(i64::try_from(value).unwrap_or(i64::MAX));
    let goroutines = whole(figures.goroutines);
    registry.register("go_goroutines", "Goroutines of the tailnet library", goroutines);
    let heap = Family::<[(&str, &str); 1], Gauge>::default();
    let in_state = |state| heap.get_or_create_owned(&[("state", state)]);
    let idle = figures.heap_idle_bytes.saturating_sub(figures.heap_released_bytes);
    in_state("in_use").set(i64::try_from(figures.heap_in_use_bytes).unwrap_or(i64::MAX));
    in_state("idle").set(i64::try_from(idle).unwrap_or(i64::MAX));
    in_state("released").set(i64::try_from(figures.heap_released_bytes).unwrap_or(i64::MAX));
    registry.register_with_unit("go_heap", "Heap of the tailnet library", Unit::Bytes, heap);
    let (collections, pause) = (Counter::<u64>::default(), Counter::<f64, AtomicU64>::default());
    collections.inc_by(figures.gc_count);
    pause.inc_by(figures.gc_pause_seconds);
    registry.register("go_gc_cycles", "Garbage collections of the tailnet library", collections);
    registry.register_with_unit("go_gc_pause", "How long they have stopped it", Unit::Seconds, pause);
    let in_flight = whole(figures.in_flight_bytes);
    let help = "What connections hold for bytes in flight beyond their floor";
    registry.register_with_unit("in_flight", help, Unit::Bytes, in_flight);
    let max = whole(figures.in_flight_max_bytes);
    registry.register_with_unit(
        "in_flight_max",
        "The most that all connections together may have in flight",
        Unit::Bytes,
        max,
    );
    let endpoints = whole(figures.endpoints);
    registry.register("stack_endpoints", "TCP endpoints of the node, in whatever state", endpoints);
    let handles = whole(figures.handles);
    registry.register("stack_handles", "Connections of the node that are open on our side", handles);
}

fn note(
    monitor: &Monitor,
    up: &Family<Port, Gauge>,
    expiry: &Family<Port, Gauge<f64, AtomicU64>>,
    probe: &Family<Port, Gauge<f64, AtomicU64>>,
) {
    let port = Port { listener: monitor.listener.clone(), upstream: monitor.upstream.clone() };
    let seen = monitor.seen();
    if matches!(seen.state, State::Up | State::Down) {
        up.get_or_create(&port).set((seen.state == State::Up).into());
    }
    let Some(finding) = seen.finding else { return };
    probe.get_or_create(&port).set(finding.total.as_secs_f64());
    if let Some(certificate) = finding.certificate {
        expiry.get_or_create(&port).set(certificate.not_after.as_second() as f64);
    }
}

fn node_metrics(registry: &mut Registry, node: &NodeStatus) {
    let running = whole(node.is_running());
    registry.register("node_running", "Whether the node has a place on the tailnet", running);
    registry.register(
        "node_in_map_poll",
        "Whether the control server sees the node",
        whole(node.in_map_poll),
    );
    if !node.home_region.is_empty() {
        let home = Family::<OfRegion, Gauge>::default();
        home.get_or_create(&OfRegion { region: escaped(&node.home_region) }).set(1);
        registry.register(
            "node_home_relay",
            "The node's home relay (DERP region): 1 for the present one",
            home,
        );
    }
    if let Some(expiry) = node.key_expiry {
        // Absent for a key that does not expire: zero would read as long ago.
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(expiry.as_second() as f64);
        registry.register_with_unit(
            "node_key_expiry_timestamp",
            "When the node key expires (Unix time)",
            Unit::Seconds,
            gauge,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::end_state::EndState;

    fn text_of(node: &NodeStatus, connections: &Connections, format: Format) -> String {
        let sources = Sources {
            node,
            board: None,
            connections,
            is_ready: false,
            figures: None,
            memory_limit_bytes: 0,
            lost_lines: 0,
        };
        text(&sources, format)
    }

    #[test]
    fn the_expiry_is_there_when_there_is_one() {
        let connections = Connections::new(0);
        let without = text_of(&NodeStatus::default(), &connections, Format::OpenMetrics);
        assert!(without.contains("tailwart_edge_node_running 0\n"), "{without}");
        assert!(!without.contains("expiry"), "{without}");
        let expiry = Some("2027-01-01T00:00:00Z".parse().unwrap());
        let node = NodeStatus { state: "Running".into(), key_expiry: expiry, ..NodeStatus::default() };
        let with = text_of(&node, &connections, Format::OpenMetrics);
        assert!(with.contains("tailwart_edge_node_running 1\n"), "{with}");
        assert!(with.contains("tailwart_edge_node_key_expiry_timestamp_seconds 1798761600.0\n"), "{with}");
    }

    #[test]
    fn a_listener_has_all_its_counters_from_the_start() {
        let connections = Connections::new(0);
        let _page = connections.of_listener("smtp", "stalwart:25".into());
        connections.counters.ended("smtp", EndState::HoldEnded);
        let text = text_of(&NodeStatus::default(), &connections, Format::Classic);
        for line in [
            "# TYPE tailwart_edge_connections_total counter",
            "tailwart_edge_connections_total{listener=\"smtp\",end=\"sQ\"} 1",
            "tailwart_edge_connections_total{listener=\"smtp\",end=\"S-\"} 0",
            "tailwart_edge_refused_connections_total{listener=\"smtp\",reason=\"hold_ended\"} 1",
            "tailwart_edge_refused_connections_total{listener=\"smtp\",reason=\"client_limit\"} 0",
            "tailwart_edge_sent_bytes_total{listener=\"smtp\"} 0",
            "tailwart_edge_dial_seconds_count{listener=\"smtp\"} 0",
            "# TYPE tailwart_edge_build_info gauge",
        ] {
            assert!(text.lines().any(|there| there == line), "{line}\n{text}");
        }
        assert!(!text.contains("# UNIT") && !text.contains("# EOF"), "{text}");
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
        let sources = Sources {
            node: &node,
            board,
            connections: &connections,
            is_ready: false,
            figures: None,
            memory_limit_bytes: 0,
            lost_lines: 0,
        };
        let text = text(&sources, Format::Classic);
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
            let _pages = listeners.map(|listener| connections.of_listener(listener, "stalwart:25".into()));
            let text = text_of(&NodeStatus::default(), &connections, Format::OpenMetrics);
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
        let text = text_of(&node, &Connections::new(0), Format::Classic);
        assert!(text.contains(r#"tailwart_edge_node_home_relay{region="a\"b\\c\nd"} 1"#), "{text}");
    }

    #[test]
    fn the_process_is_described() {
        let text = text_of(&NodeStatus::default(), &Connections::new(0), Format::Classic);
        for name in
            ["cpu_seconds_total", "resident_memory_bytes", "threads", "start_time_seconds", "open_fds"]
        {
            let value = text.lines().find_map(|line| line.strip_prefix(&format!("process_{name} ")));
            let value: f64 = value.unwrap_or_else(|| panic!("{name}: {text}")).parse().expect("a number");
            assert!(value > 0.0 || name.starts_with("cpu"), "{name} {value}");
        }
    }
}
