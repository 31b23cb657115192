//! Lines that repeat each other, held back when they come too often.
//!
//! Invariants: of each kind a number of lines a minute is told, and of all kinds together 6,000 at most;
//! what was held back is counted, for the next line of its kind or for whoever asks when the minute is
//! over; the memory for it is bounded.
//!
//! Deliberately not here: what makes two lines one kind (see `connection/open.rs` and `upstream.rs`).

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);

/// Kinds that are remembered at once: less than a megabyte.
const MAX_KINDS: usize = 4096;

/// Lines a minute after which kinds are no longer told apart, and after which none is told. journald drops
/// what is more than 10,000 in 30 seconds, and with it what is no repeat.
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

/// How many lines were told since.
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

    /// Whether it has had fewer lines than that, or is over and another one has begun.
    fn has_room(&mut self, limit: u32) -> bool {
        if self.is_over() {
            *self = Minute::new();
        }
        self.lines < limit
    }
}

impl<K: Hash + Eq + Clone> Repeats<K> {
    /// Tells so many lines of a kind a minute; 0 for no limit.
    pub fn new(per_minute: u32) -> Repeats<K> {
        let told = AllTold { kinds: HashMap::new(), minute: Minute::new() };
        Repeats { per_minute: AtomicU32::new(per_minute), told: Mutex::new(told) }
    }

    /// Changes the limit for what comes.
    pub fn set_limit(&self, per_minute: u32) {
        self.per_minute.store(per_minute, Ordering::Relaxed);
    }

    /// Whether one more line of this kind is to be told, and then how many were held back before;
    /// `None` holds it back. When too many kinds or lines have come, it counts as `coarse`, which must be
    /// one of few.
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

    /// Forgets the kinds whose minute is over, or all of them, and returns how many lines were held
    /// back of each.
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
