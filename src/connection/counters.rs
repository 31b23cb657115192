//! What is counted while the edge runs, for as long as the process lives.
//!
//! Invariant: what a listener has counted stays when a reload takes it away, and goes on when it comes
//! back: a counter only grows.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::connection::end_state::EndState;

/// What the names of all metrics begin with.
pub(crate) const PREFIX: &str = "tailwart_edge";

/// A dial inside the tailnet takes a round trip, or five seconds and more when WireGuard has to repeat
/// a handshake.
const DIAL_BUCKETS_SECONDS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 6.0, 15.0];

/// Until the client hears the mailbox: the dial, the greeting (postscreen waits for six seconds), the
/// hold.
const FIRST_BYTE_BUCKETS_SECONDS: [f64; 11] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 7.5, 25.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfListener {
    listener: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfEnd {
    listener: String,
    end: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRefusal {
    listener: String,
    reason: &'static str,
}

/// What is counted from the start of the process.
#[derive(Debug)]
pub struct Counters {
    /// For who shows them.
    pub(crate) registry: Registry,
    ended: Family<OfEnd, Counter>,
    refused: Family<OfRefusal, Counter>,
    sent: Family<OfListener, Counter>,
    received: Family<OfListener, Counter>,
    dial: Family<OfListener, Histogram, fn() -> Histogram>,
    first_byte: Family<OfListener, Histogram, fn() -> Histogram>,
}

/// Those of one listener that are needed often.
#[derive(Debug)]
pub struct ListenerCounters {
    /// Bytes to the mailbox.
    pub sent: Counter,
    /// Bytes to clients.
    pub received: Counter,
    /// Seconds that a dial took which succeeded.
    pub dial: Histogram,
    /// Seconds from a client's coming to the mailbox's first byte.
    pub first_byte: Histogram,
}

/// What the connections of a listener have come to since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Those that have ended.
    pub ended: u64,
    /// Of these, those that our side or the mailbox has failed.
    pub failed: u64,
    /// Bytes to the mailbox.
    pub sent: u64,
    /// Bytes to clients.
    pub received: u64,
}

impl Default for Counters {
    fn default() -> Counters {
        let mut counters = Counters {
            registry: Registry::with_prefix(PREFIX),
            ended: Family::default(),
            refused: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            dial: Family::new_with_constructor(|| Histogram::new(DIAL_BUCKETS_SECONDS)),
            first_byte: Family::new_with_constructor(|| Histogram::new(FIRST_BYTE_BUCKETS_SECONDS)),
        };
        counters.register();
        counters
    }
}

impl Counters {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("connections", "Connections that have ended, by end state", self.ended.clone());
        registry.register(
            "refused_connections",
            "Clients that were turned away, or closed where their protocol has no word for it",
            self.refused.clone(),
        );
        registry.register_with_unit("sent", "Bytes to the mailbox", Unit::Bytes, self.sent.clone());
        registry.register_with_unit("received", "Bytes to clients", Unit::Bytes, self.received.clone());
        registry.register_with_unit(
            "dial",
            "How long it took to connect to the mailbox, when it succeeded",
            Unit::Seconds,
            self.dial.clone(),
        );
        registry.register_with_unit(
            "first_byte",
            "From a client's coming to the mailbox's first byte, the hold included",
            Unit::Seconds,
            self.first_byte.clone(),
        );
    }

    /// Those of a listener; all of them are there from now on, at zero.
    pub fn listener(&self, listener: &str) -> ListenerCounters {
        let labels = OfListener { listener: listener.to_owned() };
        for state in EndState::ALL {
            self.of_end(listener, state);
            self.of_refusal(listener, state);
        }
        ListenerCounters {
            sent: self.sent.get_or_create(&labels).clone(),
            received: self.received.get_or_create(&labels).clone(),
            dial: self.dial.get_or_create(&labels).clone(),
            first_byte: self.first_byte.get_or_create(&labels).clone(),
        }
    }

    /// Counts a connection that has ended.
    pub fn ended(&self, listener: &str, state: EndState) {
        self.of_end(listener, state).inc();
        self.of_refusal(listener, state).inspect(|refused| {
            refused.inc();
        });
    }

    /// What a listener's connections have come to.
    pub fn totals(&self, listener: &str) -> Totals {
        let labels = OfListener { listener: listener.to_owned() };
        let ended = |wanted: fn(EndState) -> bool| {
            let states = EndState::ALL.into_iter().filter(|state| wanted(*state));
            states.map(|state| self.count(listener, state)).sum()
        };
        Totals {
            ended: ended(|_| true),
            failed: ended(EndState::is_failure),
            sent: self.sent.get_or_create(&labels).get(),
            received: self.received.get_or_create(&labels).get(),
        }
    }

    /// How many connections of a listener have ended so.
    pub fn count(&self, listener: &str, state: EndState) -> u64 {
        self.of_end(listener, state).get()
    }

    fn of_end(&self, listener: &str, state: EndState) -> Counter {
        let labels = OfEnd { listener: listener.to_owned(), end: state.code() };
        self.ended.get_or_create(&labels).clone()
    }

    fn of_refusal(&self, listener: &str, state: EndState) -> Option<Counter> {
        let reason = state.refusal()?;
        let labels = OfRefusal { listener: listener.to_owned(), reason };
        Some(self.refused.get_or_create(&labels).clone())
    }
}
