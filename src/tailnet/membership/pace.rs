//! When a node that has lost its place may try to get one again.
//!
//! A refused credential is not offered every minute: each try costs the control server a request, and makes a key
//! if it is an OAuth client. A credential that has changed is offered at the next look, since an admin is probably
//! fixing it.

use std::time::Duration;

use tokio::time::Instant;

/// How often to check whether joining may work now, which costs nothing: a credential may have been added, or the
/// tailnet's rules may have changed.
pub(super) const LOOK: Duration = Duration::from_secs(60);

/// The longest wait before a credential that was refused is offered again, and the wait after a new enrolment of a
/// node that was removed: if an admin removes it twice, that is on purpose.
pub(super) const HOUR: Duration = Duration::from_secs(60 * 60);

/// What is remembered of earlier tries.
#[derive(Debug)]
pub(super) struct Pace {
    next: Option<Instant>,
    wait: Duration,
    /// The fingerprint of the credential that was used last.
    fingerprint: Option<u64>,
    /// Whether the wait follows a success.
    resting: bool,
}

impl Pace {
    pub fn new() -> Pace {
        Pace { next: None, wait: LOOK, fingerprint: None, resting: false }
    }

    /// Whether to try now, with the credential of this fingerprint or with none.
    pub fn may_try(&self, now: Instant, fingerprint: Option<u64>) -> bool {
        self.next.is_none_or(|next| now >= next)
            || fingerprint.is_some_and(|new| self.fingerprint != Some(new))
    }

    /// Notes that a try with this credential, or with none, failed.
    pub fn failed(&mut self, now: Instant, fingerprint: Option<u64>) {
        let again = fingerprint.is_some() && fingerprint == self.fingerprint;
        self.wait = if again { HOUR.min(self.wait * 2) } else { LOOK };
        self.fingerprint = fingerprint;
        self.next = Some(now + self.wait);
        self.resting = false;
    }

    /// Notes that a try succeeded; `removed`: the node had been removed before.
    pub fn succeeded(&mut self, now: Instant, fingerprint: Option<u64>, removed: bool) {
        let rest = if removed { HOUR } else { LOOK };
        *self = Pace { next: Some(now + rest), wait: LOOK, fingerprint, resting: removed };
    }

    /// Whether it waits because a node that was removed has been enrolled again.
    pub fn is_resting(&self) -> bool {
        self.resting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Option<u64> = Some(1);
    const OTHER: Option<u64> = Some(2);

    #[test]
    fn a_refused_credential_is_offered_less_and_less_often() {
        let (mut pace, start) = (Pace::new(), Instant::now());
        assert!(pace.may_try(start, KEY));
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..8 {
            pace.failed(now, KEY);
            let next = pace.next.expect("it waits");
            assert!(!pace.may_try(next - Duration::from_millis(1), KEY) && pace.may_try(next, KEY));
            waits.push((next - now).as_secs() / 60);
            now = next;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn another_credential_is_tried_at_once() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        pace.failed(now, KEY);
        pace.failed(now + LOOK, KEY);
        assert!(pace.may_try(now + LOOK, OTHER));
        pace.failed(now + LOOK, OTHER);
        assert!(!pace.may_try(now + LOOK, OTHER) && pace.may_try(now + 2 * LOOK, OTHER));
    }

    #[test]
    fn without_a_credential_it_looks_every_minute() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        for minute in 0..100 {
            pace.failed(now + minute * LOOK, None);
            assert!(pace.may_try(now + (minute + 1) * LOOK, None));
        }
        assert!(pace.may_try(now, KEY));
    }

    #[test]
    fn a_node_that_is_removed_twice_waits_for_an_hour() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        pace.succeeded(now, KEY, true);
        assert!(!pace.may_try(now + LOOK, KEY) && pace.may_try(now + HOUR, KEY));
        assert!(pace.may_try(now + LOOK, OTHER));
        assert!(pace.is_resting());
        pace.succeeded(now, KEY, false);
        assert!(!pace.is_resting() && !pace.may_try(now, KEY) && pace.may_try(now + LOOK, KEY));
    }
}
