//! What is worth a line in the log when one state of the node follows another: each thing once when
//! it begins, and once when it has passed.

use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};
use tracing::{error, info, warn};

use crate::tailnet::{NodeStatus, Trouble};

/// A key that expires is warned about when it has this many days left, and again at the next.
const EXPIRY_WARNINGS: [i64; 3] = [1, 7, 30];

/// What was told last.
pub(super) struct Journal {
    tags: Vec<String>,
    troubles: Vec<Trouble>,
    ips: Vec<IpAddr>,
    network_changes: u64,
    wake_ups: u64,
    /// The expiry and the number of days that the last warning was about.
    expiry: Option<(Timestamp, i64)>,
}

/// A line and how much it matters.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Info(String),
    Warn(String),
    Error(String),
}

impl Journal {
    /// Begins with a node that is on the tailnet as it should be.
    pub fn new(tags: &[String], status: &NodeStatus) -> Journal {
        Journal {
            tags: tags.to_vec(),
            troubles: Vec::new(),
            ips: status.ips.clone(),
            network_changes: status.network_changes,
            wake_ups: status.wake_ups,
            expiry: None,
        }
    }

    /// Logs what is new in `status`.
    pub fn write(&mut self, status: &NodeStatus, now: Timestamp) {
        for line in self.lines(status, now) {
            match line {
                Line::Info(text) => info!("{text}"),
                Line::Warn(text) => warn!(tailscale = ?status.health, "{text}"),
                Line::Error(text) => error!(tailscale = ?status.health, "{text}"),
            }
        }
    }

    fn lines(&mut self, status: &NodeStatus, now: Timestamp) -> Vec<Line> {
        let lines = [
            self.machine(status),
            self.troubles(status, now),
            self.address(status),
            self.expiry(status.key_expiry, now),
        ];
        lines.into_iter().flatten().collect()
    }

    /// Sleep and another network are no trouble by themselves, and explain what follows.
    fn machine(&mut self, status: &NodeStatus) -> Option<Line> {
        let woke = status.wake_ups > self.wake_ups;
        let moved = status.network_changes > self.network_changes;
        (self.wake_ups, self.network_changes) = (status.wake_ups, status.network_changes);
        let what = match (woke, moved) {
            (true, _) => "this machine woke from sleep",
            (false, true) => "the network of this machine has changed",
            (false, false) => return None,
        };
        Some(Line::Info(format!("{what}; looking for paths on the tailnet anew")))
    }

    fn troubles(&mut self, status: &NodeStatus, now: Timestamp) -> Option<Line> {
        let troubles = status.troubles(&self.tags, now);
        if troubles == self.troubles {
            return None;
        }
        self.troubles = troubles;
        if self.troubles.is_empty() {
            return Some(Line::Info(format!("on the tailnet again, as {} {:?}", status.name, status.ips)));
        }
        let words: Vec<String> = self.troubles.iter().map(Trouble::to_string).collect();
        let line = format!("trouble on the tailnet: {}", words.join("; "));
        let passes =
            |t: &Trouble| matches!(t, Trouble::NotRunning(_) | Trouble::ControlLost | Trouble::RelayLost(_));
        Some(if self.troubles.iter().all(passes) { Line::Warn(line) } else { Line::Error(line) })
    }

    fn address(&mut self, status: &NodeStatus) -> Option<Line> {
        if status.ips.is_empty() || status.ips == self.ips {
            return None;
        }
        let before = std::mem::replace(&mut self.ips, status.ips.clone());
        (!before.is_empty()).then(|| {
            Line::Warn(format!(
                "this node's tailnet address was {before:?} and is {:?}; mail servers that trust the old one must trust the new one",
                self.ips
            ))
        })
    }

    fn expiry(&mut self, expiry: Option<Timestamp>, now: Timestamp) -> Option<Line> {
        let Some(at) = expiry else {
            self.expiry = None;
            return None;
        };
        let left = at.duration_since(now);
        let days = EXPIRY_WARNINGS.into_iter().find(|days| left <= SignedDuration::from_hours(24 * days))?;
        if left <= SignedDuration::ZERO || self.expiry == Some((at, days)) {
            return None; // an expired key is a trouble
        }
        self.expiry = Some((at, days));
        let unit = if days == 1 { "day" } else { "days" };
        Some(Line::Warn(format!(
            "this node's key expires within {days} {unit}, at {at}, and with it every connection; disable its expiry in the admin console, or enrol the node with a tag, whose keys do not expire"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

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
        NOW.checked_add(SignedDuration::from_hours(hours)).unwrap()
    }

    #[test]
    fn a_trouble_is_told_once_and_so_is_its_end() {
        let mut journal = Journal::new(&[], &running());
        assert_eq!(journal.lines(&running(), NOW), []);
        let lost = NodeStatus { in_map_poll: false, ..running() };
        let lines = journal.lines(&lost, NOW);
        let told = format!("trouble on the tailnet: {}", Trouble::ControlLost);
        assert_eq!(lines, [Line::Warn(told)]);
        assert_eq!(journal.lines(&lost, NOW), []);
        let removed = NodeStatus { removed: true, ..lost };
        let told = format!("trouble on the tailnet: {}", Trouble::Removed);
        assert_eq!(journal.lines(&removed, NOW), [Line::Error(told)]);
        let again = r#"on the tailnet again, as edge.example.ts.net [100.64.0.1]"#;
        assert_eq!(journal.lines(&running(), NOW), [Line::Info(again.into())]);
    }

    #[test]
    fn another_address_is_told_when_it_is_there() {
        let mut journal = Journal::new(&[], &running());
        let away = NodeStatus { ips: vec![], ..running() };
        assert_eq!(journal.lines(&away, NOW), []);
        let moved = NodeStatus { ips: vec!["100.64.0.9".parse().unwrap()], ..running() };
        match &journal.lines(&moved, NOW)[..] {
            [Line::Warn(line)] => assert!(line.contains("was [100.64.0.1] and is [100.64.0.9]"), "{line}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(journal.lines(&moved, NOW), []);
    }

    #[test]
    fn sleep_and_other_networks_are_told_as_they_come() {
        let mut journal = Journal::new(&[], &NodeStatus { network_changes: 3, ..running() });
        let news = |journal: &mut Journal, network_changes, wake_ups| {
            journal.lines(&NodeStatus { network_changes, wake_ups, ..running() }, NOW).pop()
        };
        assert_eq!(news(&mut journal, 3, 0), None);
        let moved = "the network of this machine has changed; looking for paths on the tailnet anew";
        assert_eq!(news(&mut journal, 5, 0), Some(Line::Info(moved.into())));
        let woke = "this machine woke from sleep; looking for paths on the tailnet anew";
        assert_eq!(news(&mut journal, 6, 1), Some(Line::Info(woke.into())));
        assert_eq!(news(&mut journal, 6, 1), None);
    }

    #[test]
    fn an_expiring_key_is_told_at_thirty_seven_and_one_day() {
        let mut journal = Journal::new(&[], &running());
        let mut days = |hours, expiry: Option<Timestamp>| {
            let status = NodeStatus { key_expiry: expiry, ..running() };
            let at = in_hours(hours);
            match &journal.lines(&status, at)[..] {
                [] => None,
                [Line::Warn(line)] => Some(line.split("within ").nth(1)?.split(", at").next()?.to_owned()),
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
        let expired = NodeStatus { state: "NeedsLogin".into(), key_expiry: Some(NOW), ..running() };
        let told = format!("trouble on the tailnet: {}", Trouble::KeyExpired);
        assert_eq!(journal.lines(&expired, NOW), [Line::Error(told)]);
    }
}
