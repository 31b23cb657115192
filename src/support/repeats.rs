//! Holds back similar log lines when they come too often.
//!
//! Invariants: a limited number of lines of each kind is logged a minute, and at most 6,000 of all kinds together.
//! Lines that were held back are counted; the next line of the kind has the count, or a summary after the minute.
//! Memory is bounded.
//!
//! Deliberately not here: what makes two lines one kind (see `connection/ended.rs` and `upstream.rs`).

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);

/// Kinds that are remembered at once: less than a megabyte.
const MAX_KINDS: usize = 4096;

/// After the first number of lines a minute, kinds are no longer distinguished; after the second, nothing is
/// logged. journald drops lines beyond 10,000 in 30 seconds, important ones included.
const FINE_LINES: u32 = 3000;
const MAX_LINES: u32 = 6000;

/// Counts lines by their kind.
#[derive(Debug)]
pub struct Repeats<K> {
    /// Lines of one kind; 0 for no limit.
    per_minute: AtomicU32,
    told: Mutex<AllTold<K>>,
}

#[derive(Debug)]
struct AllTold<K> {
    kinds: HashMap<K, Told>,
    /// Lines of all kinds together.
    minute: Minute,
}

#[derive(Debug)]
struct Told {
    minute: Minute,
    held_back: u64,
}

/// How many lines were logged since the minute began.
#[derive(Debug)]
struct Minute {
    since: Instant,
    lines: u32,
}

impl Minute {
    fn new() -> Minute {
        Minute { since: Instant::now(), lines: 0 }
    }

    fn is_over(&self) -> bool {
        self.since.elapsed() >= MINUTE
    }

    /// Whether another line fits into the minute. If the minute is over, begins another.
    fn has_room(&mut self, limit: u32) -> bool {
        if self.is_over() {
            *self = Minute::new();
        }
        self.lines < limit
    }
}

impl<K: Hash + Eq + Clone> Repeats<K> {
    /// At most `per_minute` lines of a kind; 0 for no limit.
    pub fn new(per_minute: u32) -> Repeats<K> {
        let told = AllTold { kinds: HashMap::new(), minute: Minute::new() };
        Repeats { per_minute: AtomicU32::new(per_minute), told: Mutex::new(told) }
    }

    /// Changes the limit from now on.
    pub fn set_limit(&self, per_minute: u32) {
        self.per_minute.store(per_minute, Ordering::Relaxed);
    }

    /// Whether one more line of this kind may be logged, and how many were held back before it; `None` holds it
    /// back. When there are too many kinds or lines, the line counts as of the kind `coarse`, of which there must
    /// be few.
    pub fn may_tell(&self, kind: K, coarse: K) -> Option<u64> {
        let per_minute = self.per_minute.load(Ordering::Relaxed);
        if per_minute == 0 {
            return Some(0);
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let AllTold { kinds, minute: all } = &mut *told;
        let is_fine = all.has_room(FINE_LINES) && (kinds.len() < MAX_KINDS || kinds.contains_key(&kind));
        let kind = if is_fine { kind } else { coarse };
        let told = kinds.entry(kind).or_insert_with(|| Told { minute: Minute::new(), held_back: 0 });
        if all.has_room(MAX_LINES) && told.minute.has_room(per_minute) {
            told.minute.lines += 1;
            all.lines += 1;
            return Some(std::mem::take(&mut told.held_back));
        }
        told.held_back += 1;
        None
    }

    /// Forgets the kinds whose minute is over, or all kinds, and returns how many lines of each were held back.
    pub fn take_over(&self, all_of_them: bool) -> Vec<(K, u64)> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held_back = Vec::new();
        told.kinds.retain(|kind, told| {
            let stays = !all_of_them && !told.minute.is_over();
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
        let told =
            |kinds: std::ops::Range<usize>| kinds.filter(|kind| repeats.may_tell(*kind, 0).is_some()).count();
        assert_eq!(told(1..2 * MAX_KINDS), FINE_LINES as usize + 1);
        assert_eq!(repeats.take_over(true), [(0, 2 * MAX_KINDS as u64 - 2 - u64::from(FINE_LINES))]);
        advance(MINUTE).await;
        assert_eq!(told(1..3), 2, "they are told apart again");
        // Kinds that are held back are kinds, too.
        repeats.set_limit(1);
        assert!(repeats.told.lock().unwrap().kinds.len() <= MAX_KINDS);
    }

    #[tokio::test(start_paused = true)]
    async fn lines_without_end_are_held_back() {
        let repeats = Repeats::new(FINE_LINES / 2);
        let told = |count: u32, kind| (0..count).filter(|_| repeats.may_tell(kind, "rest").is_some()).count();
        assert_eq!(told(FINE_LINES, "a"), FINE_LINES as usize / 2);
        assert_eq!(told(2 * FINE_LINES, "b"), FINE_LINES as usize, "half of them as the rest");
        assert_eq!(told(FINE_LINES, "c"), 0);
        repeats.set_limit(u32::MAX);
        assert_eq!(
            told(100_000, "c"),
            (MAX_LINES - FINE_LINES - FINE_LINES / 2) as usize,
            "no more than that"
        );
        advance(MINUTE).await;
        assert_eq!(told(1, "c"), 1);
    }
}
