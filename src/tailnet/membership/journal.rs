//! Decides what is logged when the node's state changes: each trouble once when it begins, and once when it is
//! over. A trouble that is over within seconds is not logged at all.

use std::net::IpAddr;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::support::text::list;
use crate::support::wall_clock;
use crate::tailnet::{NodeStatus, Trouble};

/// Days before the expiry of a key at which a warning is logged.
const EXPIRY_WARNINGS: [i64; 3] = [1, 7, 30];

/// A trouble that may pass by itself is logged after it has lasted this long.
const PATIENCE: Duration = Duration::from_secs(5);

/// The least time between two lines about the machine's network: where containers come and go, it changes all the
/// time.
const MOVES_APART: Duration = Duration::from_secs(60);

/// A moment by both clocks: a key expires at a date, but durations must not be taken from dates, since the date
/// may be corrected meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    pub date: Timestamp,
    pub instant: Instant,
}

impl Moment {
    pub fn now() -> Moment {
        Moment { date: wall_clock::now(), instant: Instant::now() }
    }
}

/// What was logged last.
pub(super) struct Journal {
    tags: Vec<String>,
    /// The troubles of the last state, since when they last, and whether they were logged.
    troubles: Vec<(Trouble, Instant, bool)>,
    /// Whether a trouble was logged, and not yet that all is well again.
    is_told: bool,
    ips: Vec<IpAddr>,
    network_changes: u64,
    /// When the last change was logged.
    move_told: Option<Instant>,
    wake_ups: u64,
    /// The expiry and the number of days of the last warning.
    expiry: Option<(Timestamp, i64)>,
}

/// A log line with its level.
#[derive(Debug, PartialEq, Eq)]
enum JournalLine {
    Info(String),
    Warn(String),
    Error(String),
}

impl Journal {
    /// For a node that has joined the tailnet.
    pub fn new(tags: &[String], status: &NodeStatus) -> Journal {
        Journal {
            tags: tags.to_vec(),
            troubles: Vec::new(),
            is_told: false,
            ips: status.ips.clone(),
            network_changes: status.network_changes,
            move_told: None,
            wake_ups: status.wake_ups,
            expiry: None,
        }
    }

    /// Logs what is new in `status`.
    pub fn write(&mut self, status: &NodeStatus, now: Moment) {
        for line in self.lines(status, now) {
            match line {
                JournalLine::Info(text) => info!("{text}"),
                JournalLine::Warn(text) => warn!(tailscale = list(&status.health), "{text}"),
                JournalLine::Error(text) => error!(tailscale = list(&status.health), "{text}"),
            }
        }
    }

    /// How long until something of the last state has to be logged although the state does not change.
    pub fn due(&self, now: Moment) -> Option<Duration> {
        let waiting = self.troubles.iter().filter(|(.., told)| !told);
        waiting.map(|(_, since, _)| PATIENCE.saturating_sub(now.instant - *since)).min()
    }

    fn lines(&mut self, status: &NodeStatus, now: Moment) -> Vec<JournalLine> {
        let mut lines: Vec<JournalLine> = self.machine(status, now.instant).into_iter().collect();
        lines.extend(self.troubles(status, now));
        lines.extend(self.address(status));
        lines.extend(self.expiry(status.key_expiry, now.date));
        lines
    }

    /// Sleep and a network change are no trouble, but they explain the lines that follow.
    fn machine(&mut self, status: &NodeStatus, now: Instant) -> Option<JournalLine> {
        let woke = status.wake_ups > self.wake_ups;
        let is_due = self.move_told.is_none_or(|at| now - at >= MOVES_APART);
        let moved = status.network_changes > self.network_changes && is_due;
        self.wake_ups = status.wake_ups;
        let what = match (woke, moved) {
            (true, _) => "this machine woke from sleep",
            (false, true) => "the network of this machine has changed",
            (false, false) => return None,
        };
        (self.network_changes, self.move_told) = (status.network_changes, Some(now));
        Some(JournalLine::Info(format!("{what}; looking for new paths on the tailnet")))
    }

    fn troubles(&mut self, status: &NodeStatus, now: Moment) -> Vec<JournalLine> {
        let before = std::mem::take(&mut self.troubles);
        let mut lines = Vec::new();
        for trouble in status.troubles(&self.tags, now.date) {
            let known = before.iter().find(|(old, ..)| old.is_like(&trouble));
            let (since, told) = known.map_or((now.instant, false), |(_, since, told)| (*since, *told));
            let lasting = !trouble.may_pass() || now.instant - since >= PATIENCE;
            if lasting && !told {
                let line = format!("trouble on the tailnet: {trouble}");
                lines.push(if trouble.may_pass() {
                    JournalLine::Warn(line)
                } else {
                    JournalLine::Error(line)
                });
            }
            self.troubles.push((trouble, since, told || lasting));
        }
        let is_over = |old: &Trouble| !self.troubles.iter().any(|(now, ..)| now.is_like(old));
        let over: Vec<&Trouble> =
            before.iter().filter(|(old, _, told)| *told && is_over(old)).map(|(old, ..)| old).collect();
        self.is_told |= self.troubles.iter().any(|(_, _, told)| *told) || !over.is_empty();
        if self.troubles.is_empty() {
            if !std::mem::take(&mut self.is_told) {
                return lines;
            }
            lines.push(JournalLine::Info(format!(
                "on the tailnet again, as {} {:?}",
                status.name, status.ips
            )));
        } else {
            lines.extend(
                over.iter().map(|trouble| JournalLine::Info(format!("resolved: {}", trouble.what()))),
            );
        }
        lines
    }

    fn address(&mut self, status: &NodeStatus) -> Option<JournalLine> {
        if status.ips.is_empty() || status.ips == self.ips {
            return None;
        }
        let before = std::mem::replace(&mut self.ips, status.ips.clone());
        (!before.is_empty()).then(|| {
            JournalLine::Warn(format!(
                "this node's tailnet address changed from {before:?} to {:?}; make the mail servers trust the new one instead of the old one",
                self.ips
            ))
        })
    }

    fn expiry(&mut self, expiry: Option<Timestamp>, now: Timestamp) -> Option<JournalLine> {
        let Some(at) = expiry else {
            self.expiry = None;
            return None;
        };
        let left = at.duration_since(now);
        let days = EXPIRY_WARNINGS.into_iter().find(|days| left <= SignedDuration::from_hours(24 * days))?;
        if left <= SignedDuration::ZERO || self.expiry == Some((at, days)) {
            return None; // an expired key is logged as a trouble
        }
        self.expiry = Some((at, days));
        let unit = if days == 1 { "day" } else { "days" };
        Some(JournalLine::Warn(format!(
            "this node's key expires within {days} {unit}, at {at}, and then every connection ends; disable the key's expiry in the admin console, or enrol the node with a tag (keys of tagged nodes do not expire)"
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    const DATE: Timestamp = Timestamp::UNIX_EPOCH;

    /// This long after the first moment.
    fn after(seconds: u64) -> Moment {
        static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
        let date = DATE.checked_add(SignedDuration::from_secs(seconds as i64)).unwrap();
        Moment { date, instant: *FIRST + Duration::from_secs(seconds) }
    }

    fn running() -> NodeStatus {
        NodeStatus {
            state: "Running".into(),
            name: "edge.example.ts.net".into(),
            in_map_poll: true,
            enrolled: true,
            ips: vec!["100.64.0.1".parse().unwrap()],
            ..NodeStatus::default()
        }
    }

    fn in_hours(hours: i64) -> Timestamp {
        DATE.checked_add(SignedDuration::from_hours(hours)).unwrap()
    }

    #[test]
    fn a_trouble_is_told_once_and_so_is_its_end() {
        let mut journal = Journal::new(&[], &running());
        assert_eq!(journal.lines(&running(), after(0)), []);
        let removed = NodeStatus { removed: true, in_map_poll: false, ..running() };
        let told = format!("trouble on the tailnet: {}", Trouble::Removed);
        assert_eq!(journal.lines(&removed, after(0)), [JournalLine::Error(told)]);
        assert_eq!(journal.lines(&removed, after(0)), []);
        let again = r#"on the tailnet again, as edge.example.ts.net [100.64.0.1]"#;
        assert_eq!(journal.lines(&running(), after(0)), [JournalLine::Info(again.into())]);
    }

    #[test]
    fn that_all_is_well_is_told_also_after_a_moment_of_another_trouble() {
        let mut journal = Journal::new(&[], &running());
        let state = |state: &str| NodeStatus { state: state.into(), ..running() };
        assert_eq!(journal.lines(&state("NeedsMachineAuth"), after(0)).len(), 1);
        let over = format!("resolved: {}", Trouble::NeedsApproval.what());
        assert_eq!(journal.lines(&state("Starting"), after(0)), [JournalLine::Info(over)]);
        let again = r#"on the tailnet again, as edge.example.ts.net [100.64.0.1]"#;
        assert_eq!(journal.lines(&running(), after(0)), [JournalLine::Info(again.into())]);
        assert_eq!(journal.lines(&running(), after(0)), []);
    }

    #[test]
    fn what_passes_in_a_moment_is_not_told() {
        let mut journal = Journal::new(&[], &running());
        let lost = NodeStatus { in_map_poll: false, ..running() };
        assert_eq!(journal.lines(&lost, after(0)), []);
        assert_eq!(journal.due(after(2)), Some(Duration::from_secs(3)));
        assert_eq!(journal.lines(&running(), after(2)), []);
        assert_eq!(journal.due(after(2)), None);

        assert_eq!(journal.lines(&lost, after(10)), []);
        assert_eq!(journal.lines(&lost, after(14)), []);
        let told = format!("trouble on the tailnet: {}", lost.troubles(&[], DATE)[0]);
        assert_eq!(journal.lines(&lost, after(15)), [JournalLine::Warn(told)]);
        assert_eq!((journal.lines(&lost, after(16)), journal.due(after(16))), (vec![], None));
    }

    #[test]
    fn a_clock_that_jumps_makes_nothing_last_longer() {
        let lost = NodeStatus { in_map_poll: false, ..running() };
        for years in [10, -10] {
            let mut journal = Journal::new(&[], &running());
            assert_eq!(journal.lines(&lost, after(0)), []);
            let at = |seconds| Moment { date: in_hours(years * 365 * 24), ..after(seconds) };
            assert_eq!(
                (journal.lines(&lost, at(4)), journal.due(at(4))),
                (vec![], Some(Duration::from_secs(1)))
            );
            assert_eq!(journal.lines(&lost, at(5)).len(), 1);
        }
    }

    #[test]
    fn each_of_several_troubles_is_told_by_itself() {
        let mut journal = Journal::new(&["tag:a".into()], &running());
        let untagged = NodeStatus { relay: "relay server timed out".into(), ..running() };
        assert_eq!(journal.lines(&untagged, after(0)).len(), 1);
        let another_text = NodeStatus { relay: "network down".into(), ..running() };
        let told = format!("trouble on the tailnet: {}", Trouble::RelayLost("network down".into()));
        assert_eq!(journal.lines(&another_text, after(5)), [JournalLine::Warn(told)]);
        assert_eq!(journal.lines(&untagged, after(6)), []);
        let over = "resolved: no relay can be reached: relay server timed out";
        assert_eq!(journal.lines(&running(), after(7)), [JournalLine::Info(over.into())]);
    }

    #[test]
    fn another_address_is_told_when_it_is_there() {
        let mut journal = Journal::new(&[], &running());
        let away = NodeStatus { ips: vec![], ..running() };
        assert_eq!(journal.lines(&away, after(0)), []);
        let moved = NodeStatus { ips: vec!["100.64.0.9".parse().unwrap()], ..running() };
        match &journal.lines(&moved, after(0))[..] {
            [JournalLine::Warn(line)] => {
                assert!(line.contains("changed from [100.64.0.1] to [100.64.0.9]"), "{line}")
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(journal.lines(&moved, after(0)), []);
    }

    #[test]
    fn sleep_and_other_networks_are_told_as_they_come() {
        let mut journal = Journal::new(&[], &NodeStatus { network_changes: 3, ..running() });
        let news = |journal: &mut Journal, network_changes, wake_ups| {
            journal.lines(&NodeStatus { network_changes, wake_ups, ..running() }, after(0)).pop()
        };
        assert_eq!(news(&mut journal, 3, 0), None);
        let moved = "the network of this machine has changed; looking for new paths on the tailnet";
        assert_eq!(news(&mut journal, 5, 0), Some(JournalLine::Info(moved.into())));
        let woke = "this machine woke from sleep; looking for new paths on the tailnet";
        assert_eq!(news(&mut journal, 6, 1), Some(JournalLine::Info(woke.into())));
        assert_eq!(news(&mut journal, 6, 1), None);
    }

    #[test]
    fn a_network_that_keeps_changing_is_told_once_a_minute() {
        let mut journal = Journal::new(&[], &running());
        let told = (0..180_u64).filter(|second| {
            let status = NodeStatus { network_changes: second + 1, ..running() };
            !journal.lines(&status, after(*second)).is_empty()
        });
        assert_eq!(told.collect::<Vec<_>>(), [0, 60, 120]);
    }

    #[test]
    fn an_expiring_key_is_told_at_thirty_seven_and_one_day() {
        let mut journal = Journal::new(&[], &running());
        let mut days = |hours, expiry: Option<Timestamp>| {
            let status = NodeStatus { key_expiry: expiry, ..running() };
            let at = Moment { date: in_hours(hours), ..after(0) };
            match &journal.lines(&status, at)[..] {
                [] => None,
                [JournalLine::Warn(line)] => {
                    Some(line.split("within ").nth(1)?.split(", at").next()?.to_owned())
                }
                other => panic!("{other:?}"),
            }
        };
        let expiry = Some(in_hours(40 * 24));
        assert_eq!(days(9 * 24, expiry), None);
        assert_eq!(days(10 * 24, expiry), Some("30 days".into()));
        assert_eq!(days(10 * 24 + 1, expiry), None);
        assert_eq!(days(33 * 24, expiry), Some("7 days".into()));
        assert_eq!(days(39 * 24 - 1, expiry), None);
        assert_eq!(days(39 * 24 + 1, expiry), Some("1 day".into()));
        assert_eq!(days(40 * 24 - 1, expiry), None);
        // Renewed, and then turned off.
        assert_eq!(days(40 * 24 - 1, Some(in_hours(45 * 24))), Some("7 days".into()));
        assert_eq!(days(40 * 24 - 1, None), None);
        assert_eq!(days(40 * 24 - 1, Some(in_hours(41 * 24))), Some("7 days".into()));
    }

    #[test]
    fn a_key_that_has_expired_is_a_trouble_and_no_warning() {
        let mut journal = Journal::new(&[], &running());
        let expired = NodeStatus { state: "NeedsLogin".into(), key_expiry: Some(DATE), ..running() };
        let told = format!("trouble on the tailnet: {}", Trouble::KeyExpired);
        assert_eq!(journal.lines(&expired, after(0)), [JournalLine::Error(told)]);
    }
}
