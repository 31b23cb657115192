//! Waiting for conditions. The only place of the harness that sleeps.

use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Returns at this moment, for load at a steady pace. To wait for anything to happen, name it.
pub fn pace(next: Instant) {
    std::thread::sleep(next.saturating_duration_since(Instant::now()));
}

/// Asks until the answer is yes; false when it never was before the deadline. Asks at least once.
#[must_use = "a missed deadline is told only by the result"]
pub fn eventually(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    wait_for(deadline, || condition().then_some(())).is_some()
}

/// Asks until there is a value; none when there never was one before the deadline. Asks at least
/// once.
pub fn wait_for<T>(deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    let mut pause = FIRST_PAUSE;
    loop {
        if let Some(value) = probe() {
            return Some(value);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
