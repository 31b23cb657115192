//! Lines that repeat each other, held back when they come too often.
//!
//! Invariants: of each kind a number of lines a minute is told; what was held back is counted, for the
//! next line of its kind or for whoever asks when the minute is over; the memory for it is bounded.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);

/// Kinds that are remembered at once: about 400 kB.
const MAX_KINDS: usize = 4096;

/// Counts lines by their kind.
#[derive(Debug)]
pub struct Repeats<K> {
    /// 0 for no limit.
    per_minute: AtomicU32,
    told: Mutex<HashMap<K, Told>>,
}

#[derive(Debug)]
struct Told {
    since: Instant,
    lines: u32,
    held_back: u64,
}

impl<K: Hash + Eq + Clone> Repeats<K> {
    /// Tells so many lines of a kind a minute; 0 for no limit.
    pub fn new(per_minute: u32) -> Repeats<K> {
        Repeats { per_minute: AtomicU32::new(per_minute), told: Mutex::default() }
    }

    /// Changes the limit for what comes.
    pub fn set_limit(&self, per_minute: u32) {
        self.per_minute.store(per_minute, Ordering::Relaxed);
    }

    /// Whether one more line of this kind is to be told, and then how many were held back before;
    /// `None` holds it back. When too many kinds are remembered, a new one counts as `coarse`, which
    /// must be one of few.
    pub fn may_tell(&self, kind: K, coarse: K) -> Option<u64> {
        let per_minute = self.per_minute.load(Ordering::Relaxed);
        if per_minute == 0 {
            return Some(0);
        }
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = if all.len() < MAX_KINDS || all.contains_key(&kind) { kind } else { coarse };
        let told = all.entry(kind).or_insert_with(|| Told { since: Instant::now(), lines: 0, held_back: 0 });
        if told.since.elapsed() >= MINUTE {
            (told.since, told.lines) = (Instant::now(), 0);
        }
        if told.lines < per_minute {
            told.lines += 1;
            return Some(std::mem::take(&mut told.held_back));
        }
        told.held_back += 1;
        None
    }

    /// Forgets the kinds whose minute is over, or all of them, and returns how many lines were held
    /// back of each.
    pub fn take_over(&self, all_of_them: bool) -> Vec<(K, u64)> {
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held_back = Vec::new();
        all.retain(|kind, told| {
            let stays = !all_of_them && told.since.elapsed() < MINUTE;
            if !stays && told.held_back > 0 {
                held_back.push((kind.clone(), told.held_back));
            }
            stays
        });
        held_back
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_minute_has_so_many_lines_of_a_kind() {
        let repeats = Repeats::new(2);
        let told = |kind| repeats.may_tell(kind, "rest");
        assert_eq!([told("a"), told("a"), told("a"), told("b")], [Some(0), Some(0), None, Some(0)]);
        assert_eq!(repeats.take_over(false), [], "the minute is not over");
        advance(MINUTE).await;
        assert_eq!([told("a"), told("a"), told("a")], [Some(1), Some(0), None], "the next one tells it");
        advance(MINUTE).await;
        assert_eq!(repeats.take_over(false), [("a", 1)], "or who asks");
        assert_eq!([told("a"), told("a"), told("a")], [Some(0), Some(0), None]);
        assert_eq!(repeats.take_over(true), [("a", 1)], "at the end what there is");
    }

    #[tokio::test(start_paused = true)]
    async fn no_limit_holds_nothing_back() {
        let repeats = Repeats::new(1);
        repeats.set_limit(0);
        assert!((0..100).all(|_| repeats.may_tell((), ()) == Some(0)));
        assert_eq!(repeats.take_over(true), []);
    }

    #[tokio::test(start_paused = true)]
    async fn kinds_without_end_become_one() {
        let repeats = Repeats::new(1);
        let told = (1..=2 * MAX_KINDS).filter(|kind| repeats.may_tell(*kind, 0).is_some()).count();
        assert_eq!(told, MAX_KINDS + 1);
        assert_eq!(repeats.take_over(true), [(0, MAX_KINDS as u64 - 1)]);
    }
}
