//! What is measured, in Prometheus's text format.
//!
//! Deliberately not here: serving it (see [`crate::admin`]).

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::health::{Board, Monitor, State};
use crate::tailnet::NodeStatus;

/// The format of [`text`], for the header of that name.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Which server, as which listener uses it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Port {
    listener: String,
    upstream: String,
}

/// The metrics of the node in this state, and of the mailbox once it is looked for.
pub fn text(node: &NodeStatus, board: Option<&Board>) -> String {
    let mut registry = Registry::with_prefix("tailwart_edge");
    node_metrics(&mut registry, node);
    if let Some(board) = board {
        mailbox_metrics(&mut registry, board);
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, &registry);
    text
}

fn mailbox_metrics(registry: &mut Registry, board: &Board) {
    let held: Gauge = Gauge::default();
    held.set(i64::try_from(board.held()).unwrap_or(i64::MAX));
    registry.register("held_connections", "Clients that wait for a mailbox that cannot be reached", held);
    let up = Family::<Port, Gauge>::default();
    let expiry = Family::<Port, Gauge<f64, AtomicU64>>::default();
    for monitor in &board.monitors {
        note(monitor, &up, &expiry);
    }
    registry.register("upstream_up", "Whether the probe finds the mailbox well; absent until it knows", up);
    registry.register_with_unit(
        "upstream_certificate_expiry_timestamp",
        "When the mailbox's certificate expires (Unix time)",
        Unit::Seconds,
        expiry,
    );
}

fn note(monitor: &Monitor, up: &Family<Port, Gauge>, expiry: &Family<Port, Gauge<f64, AtomicU64>>) {
    let port = Port { listener: monitor.listener.clone(), upstream: monitor.upstream.clone() };
    let seen = monitor.seen();
    if seen.state != State::Unknown {
        up.get_or_create(&port).set((seen.state == State::Up).into());
    }
    if let Some(certificate) = seen.finding.and_then(|finding| finding.certificate) {
        expiry.get_or_create(&port).set(certificate.not_after.as_second() as f64);
    }
}

fn node_metrics(registry: &mut Registry, node: &NodeStatus) {
    let running: Gauge = Gauge::default();
    running.set(node.is_running().into());
    registry.register("node_running", "Whether the node has a place on the tailnet", running);
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

    #[test]
    fn the_expiry_is_there_when_there_is_one() {
        let without = text(&NodeStatus::default(), None);
        assert!(without.contains("tailwart_edge_node_running 0\n"), "{without}");
        assert!(!without.contains("expiry"), "{without}");
        let expiry = Some("2027-01-01T00:00:00Z".parse().unwrap());
        let node = NodeStatus { state: "Running".into(), key_expiry: expiry, ..NodeStatus::default() };
        let with = text(&node, None);
        assert!(with.contains("tailwart_edge_node_running 1\n"), "{with}");
        assert!(with.contains("tailwart_edge_node_key_expiry_timestamp_seconds 1798761600.0\n"), "{with}");
    }
}
