//! What is measured, in Prometheus's text format.
//!
//! Deliberately not here: serving it (see [`crate::admin`]).

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::tailnet::NodeStatus;

/// The format of [`text`], for the header of that name.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of the node in this state.
pub fn text(node: &NodeStatus) -> String {
    let mut registry = Registry::with_prefix("tailwart_edge");
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
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, &registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expiry_is_there_when_there_is_one() {
        let without = text(&NodeStatus::default());
        assert!(without.contains("tailwart_edge_node_running 0\n"), "{without}");
        assert!(!without.contains("expiry"), "{without}");
        let expiry = Some("2027-01-01T00:00:00Z".parse().unwrap());
        let with = text(&NodeStatus { state: "Running".into(), key_expiry: expiry, ..NodeStatus::default() });
        assert!(with.contains("tailwart_edge_node_running 1\n"), "{with}");
        assert!(with.contains("tailwart_edge_node_key_expiry_timestamp_seconds 1798761600.0\n"), "{with}");
    }
}
