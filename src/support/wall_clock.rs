//! The time of day: for output, and for things with a date, such as certificates and keys.
//!
//! Invariant: no timer uses it. It jumps, by years on a machine whose clock has no battery, so durations and
//! deadlines use `Instant`; `clippy.toml` forbids other calls.

use jiff::{SignedDuration, Timestamp};

/// A certificate or a key that ends within this time gives a warning. Let's Encrypt's clients renew 30 days before
/// the end, so the renewal is overdue, and there is still time to act.
pub const ENDS_SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// The time now, as the system has it.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn now() -> Timestamp {
    Timestamp::now()
}
