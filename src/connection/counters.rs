//! The counters behind `/metrics`, from the start of the process.
//!
//! Invariant: a counter only grows. If a reload removes a listener, its counters stay, and they go on if the
//! listener comes back.

use prometheus::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, Registry, histogram_opts,
    register_histogram_vec_with_registry, register_int_counter_vec_with_registry,
};

use crate::connection::end_state::EndState;

/// A dial inside the tailnet takes a round trip, or five seconds and more when WireGuard has to repeat
/// a handshake.
const DIAL_BUCKETS_SECONDS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 6.0, 15.0];

/// From accept to the mailbox's first byte: the hold, the dial, and the greeting (postscreen waits for six
/// seconds).
const FIRST_BYTE_BUCKETS_SECONDS: [f64; 11] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 7.5, 25.0, 60.0];

/// All counters, from the start of the process.
///
/// The library confuses two series if their label values, joined, are the same text. A listener may have any name,
/// so no end state and no reason may end with the text of another one.
#[derive(Debug)]
pub struct Counters {
    /// The source of `/metrics`.
    pub(crate) registry: Registry,
    ended: IntCounterVec,
    refused: IntCounterVec,
    sent: IntCounterVec,
    received: IntCounterVec,
    dial: HistogramVec,
    first_byte: HistogramVec,
}

/// The counters of one listener that are needed often.
#[derive(Debug)]
pub struct ListenerCounters {
    /// Bytes to the mailbox.
    pub sent: IntCounter,
    /// Bytes to clients.
    pub received: IntCounter,
    /// Seconds that each successful dial took.
    pub dial: Histogram,
    /// Seconds from accept to the mailbox's first byte.
    pub first_byte: Histogram,
}

/// How a listener's connections have ended since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections that have ended.
    pub ended: u64,
    /// Of these, the ones that failed because of our side or the mailbox.
    pub failed: u64,
    /// Bytes to the mailbox.
    pub sent: u64,
    /// Bytes to clients.
    pub received: u64,
}

impl Default for Counters {
    fn default() -> Counters {
        Counters::registered().expect("each name is valid and is there once")
    }
}

impl Counters {
    fn registered() -> prometheus::Result<Counters> {
        let registry = Registry::new();
        let dial = histogram_opts!(
            "tailwart_edge_dial_seconds",
            "How long connecting to the mailbox took; failed attempts are not counted.",
            DIAL_BUCKETS_SECONDS.to_vec()
        );
        let first_byte = histogram_opts!(
            "tailwart_edge_first_byte_seconds",
            "From the client's connection to the mailbox's first byte, including the time the client was held.",
            FIRST_BYTE_BUCKETS_SECONDS.to_vec()
        );
        Ok(Counters {
            ended: register_int_counter_vec_with_registry!(
                "tailwart_edge_connections_total",
                "Connections that have ended, by end state.",
                &["listener", "end"],
                registry
            )?,
            refused: register_int_counter_vec_with_registry!(
                "tailwart_edge_refused_connections_total",
                "Clients that were refused, or just closed where their protocol has no refusal.",
                &["listener", "reason"],
                registry
            )?,
            sent: register_int_counter_vec_with_registry!(
                "tailwart_edge_sent_bytes_total",
                "Bytes sent to the mailbox.",
                &["listener"],
                registry
            )?,
            received: register_int_counter_vec_with_registry!(
                "tailwart_edge_received_bytes_total",
                "Bytes sent to clients.",
                &["listener"],
                registry
            )?,
            dial: register_histogram_vec_with_registry!(dial, &["listener"], registry)?,
            first_byte: register_histogram_vec_with_registry!(first_byte, &["listener"], registry)?,
            registry,
        })
    }

    /// The counters of a listener; from now on all of them are shown, starting at zero.
    pub fn listener(&self, listener: &str) -> ListenerCounters {
        for state in EndState::ALL {
            self.of_end(listener, state);
            self.of_refusal(listener, state);
        }
        ListenerCounters {
            sent: self.sent.with_label_values(&[listener]),
            received: self.received.with_label_values(&[listener]),
            dial: self.dial.with_label_values(&[listener]),
            first_byte: self.first_byte.with_label_values(&[listener]),
        }
    }

    /// Counts a connection that has ended.
    pub fn ended(&self, listener: &str, state: EndState) {
        self.of_end(listener, state).inc();
        self.of_refusal(listener, state).inspect(|refused| {
            refused.inc();
        });
    }

    /// How a listener's connections have ended so far.
    pub fn totals(&self, listener: &str) -> Totals {
        let ended = |wanted: fn(EndState) -> bool| {
            let states = EndState::ALL.into_iter().filter(|state| wanted(*state));
            states.map(|state| self.count(listener, state)).sum()
        };
        Totals {
            ended: ended(|_| true),
            failed: ended(EndState::is_failure),
            sent: self.sent.with_label_values(&[listener]).get(),
            received: self.received.with_label_values(&[listener]).get(),
        }
    }

    /// How many connections of a listener have ended in this state.
    pub fn count(&self, listener: &str, state: EndState) -> u64 {
        self.of_end(listener, state).get()
    }

    fn of_end(&self, listener: &str, state: EndState) -> IntCounter {
        self.ended.with_label_values(&[listener, state.code()])
    }

    fn of_refusal(&self, listener: &str, state: EndState) -> Option<IntCounter> {
        Some(self.refused.with_label_values(&[listener, state.refusal()?]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_series_are_taken_for_one() {
        let ends = EndState::ALL.map(EndState::code);
        let reasons: Vec<&str> = EndState::ALL.into_iter().filter_map(EndState::refusal).collect();
        for values in [&ends[..], &reasons] {
            for (one, other) in values.iter().flat_map(|one| values.iter().map(move |other| (one, other))) {
                assert!(one == other || !one.ends_with(other), "{one} {other}");
            }
        }
    }
}
