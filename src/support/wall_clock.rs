//! The time of day: for people, and for what has a date, such as certificates and keys.
//!
//! Invariant: nothing waits by it. It jumps, by years on a machine without a battery for its clock, so
//! every duration and every deadline is of an `Instant`; `clippy.toml` keeps other calls out.

use jiff::{SignedDuration, Timestamp};

/// A certificate or a key that ends within this is warned about: there is time to act, and it has not been
/// renewed when it should have been, for Let's Encrypt's clients renew 30 days before the end.
pub const ENDS_SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// The time now, as the system has it.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn now() -> Timestamp {
    Timestamp::now()
}
