//! The node's state, and the troubles that follow from it.
//!
//! [`Trouble`] is the one place where a node's state becomes words for an operator: the log and
//! readiness both show it.

use std::net::IpAddr;

use jiff::Timestamp;
use serde::Deserialize;
use thiserror::Error;

/// The node's state as it last reported it (`tailscale_set_eventfd` in `tailscale.h`).
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct NodeStatus {
    /// Tailscale's own word: `Running`, `NeedsLogin`, `Starting`, …
    pub state: String,
    /// The MagicDNS name, without a final dot.
    pub name: String,
    /// The tailnet addresses, IPv4 first.
    #[serde(deserialize_with = "null_is_empty")]
    pub ips: Vec<IpAddr>,
    /// The tags that the node holds.
    #[serde(deserialize_with = "null_is_empty")]
    pub tags: Vec<String>,
    /// Whether the control server sees this node as online.
    pub in_map_poll: bool,
    /// When the node key expires; the keys of tagged nodes usually do not. `None` also for a date that cannot be
    /// read: the control server decides whether the key has expired.
    #[serde(deserialize_with = "none_if_unreadable")]
    pub key_expiry: Option<Timestamp>,
    /// The URL where a person can log this node in; empty when no login is awaited.
    pub login_url: String,
    /// Tailscale's own health warnings.
    #[serde(deserialize_with = "null_is_empty")]
    pub health: Vec<String>,
    /// Whether it has a node key, valid or not.
    pub enrolled: bool,
    /// Whether the control server no longer knows this node.
    pub removed: bool,
    /// Whether the tailnet has stopped this node because it uploads no logs.
    pub needs_log_upload: bool,
    /// What is wrong with the relays; empty when nothing is.
    pub relay: String,
    /// Major changes of this machine's network since the start.
    pub network_changes: u64,
    /// How often this machine woke from sleep since the start.
    pub wake_ups: u64,
    /// Why the identity could not be saved; empty when it was.
    pub unsaved: String,
    /// The last error with the control server since it was last heard: why it could not be reached, or its answer.
    pub control_error: String,
    /// What to do about that; empty when the cause is not known.
    pub control_advice: String,
    /// The region of the node's home relay (DERP), such as `fra`; empty when it has none.
    pub home_region: String,
    /// The region's number, 0 when there is none.
    pub home_region_id: u32,
    /// The former URL of the same control server (it has the same key); empty if its URL has not changed.
    pub control_moved_from: String,
}

/// A trouble of the node; the text ends with what to do.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It is not running yet, or not running again yet.
    #[error("the tailnet node is not running (state {state}){}", waits_for(.reason))]
    NotRunning {
        /// Tailscale's word for it.
        state: String,
        /// Why the control server is not heard, and what to do; empty if not known.
        reason: String,
    },
    /// An admin let the key expire, or the node has no tag.
    #[error(
        "the node key has expired; extend or disable its expiry in the admin console, or provide a key to enrol with"
    )]
    KeyExpired,
    /// The control server wants a login for another reason.
    #[error("the node was logged out of the tailnet; provide a key to enrol with")]
    LoggedOut,
    /// An admin deleted it.
    #[error("the node was removed from the tailnet; provide a key to enrol with, or remove this edge")]
    Removed,
    /// Not approved, or no longer approved.
    #[error("the node waits for approval by an admin of the tailnet; approve it in the admin console")]
    NeedsApproval,
    /// The tailnet has network flow logs.
    #[error(
        "the tailnet has network flow logs and stops nodes that do not upload Tailscale's logs; set tailnet.log_upload = true, or turn network flow logs off in the admin console"
    )]
    NeedsLogUpload,
    /// No news from the tailnet. Connections go on, and new ones work to peers whose address has not changed.
    #[error("the control server is out of reach: {0}")]
    ControlLost(String),
    /// Peers without a direct path cannot be reached.
    #[error("no relay can be reached: {0}; check that this machine may connect to TCP port 443")]
    RelayLost(String),
    /// The next start would miss a part of the identity.
    #[error(
        "this node's identity cannot be saved: {0}; make room in tailnet.state_dir, and do not stop the edge before"
    )]
    NotSaved(String),
    /// Access rules for the tag do not apply.
    #[error("the node does not hold {0}; give it the tag again in the admin console")]
    TagMissing(String),
}

impl Trouble {
    /// Whether it may pass by itself in a moment.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Trouble::NotRunning { .. } | Trouble::ControlLost(_) | Trouble::RelayLost(_))
    }

    /// The trouble, without the remedy.
    pub(crate) fn what(&self) -> String {
        self.to_string().split(';').next().unwrap_or_default().to_owned()
    }

    /// Whether two troubles are of the same kind; details do not count.
    pub(crate) fn is_like(&self, other: &Trouble) -> bool {
        match (self, other) {
            (Trouble::TagMissing(one), Trouble::TagMissing(another)) => one == another,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }

    /// Whether joining again, with or without a credential, could end it.
    pub(crate) fn wants_joining(&self) -> bool {
        matches!(self, Trouble::KeyExpired | Trouble::LoggedOut | Trouble::Removed | Trouble::NeedsLogUpload)
    }
}

impl NodeStatus {
    /// Whether connections to peers are possible. A removed node may still believe that it is running.
    pub fn is_running(&self) -> bool {
        self.state == "Running" && !self.removed && !self.needs_log_upload
    }

    /// Whether the state is not just an intermediate one.
    pub(crate) fn is_settled(&self) -> bool {
        self.removed || self.needs_log_upload || !matches!(&*self.state, "" | "NoState" | "Starting")
    }

    /// The node's troubles at the time `now`; empty when all is well.
    pub(crate) fn troubles(&self, tags: &[String], now: Timestamp) -> Vec<Trouble> {
        let unsaved = (!self.unsaved.is_empty()).then(|| Trouble::NotSaved(self.unsaved.clone()));
        if !self.is_running() {
            return unsaved.into_iter().chain([self.why_not_running(now)]).collect();
        }
        let control = (!self.in_map_poll).then(|| Trouble::ControlLost(self.control_problem()));
        let relay = (!self.relay.is_empty()).then(|| Trouble::RelayLost(self.relay.clone()));
        let missing = tags.iter().filter(|tag| !self.tags.contains(tag)).cloned().map(Trouble::TagMissing);
        unsaved.into_iter().chain(control).chain(relay).chain(missing).collect()
    }

    fn why_not_running(&self, now: Timestamp) -> Trouble {
        let expired = self.key_expiry.is_some_and(|at| at <= now);
        match &*self.state {
            _ if self.removed => Trouble::Removed,
            _ if self.needs_log_upload => Trouble::NeedsLogUpload,
            "NeedsLogin" if expired => Trouble::KeyExpired,
            "NeedsLogin" if self.enrolled => Trouble::LoggedOut,
            "NeedsMachineAuth" => Trouble::NeedsApproval,
            "" => self.not_running("starting"),
            state => self.not_running(state),
        }
    }

    fn not_running(&self, state: &str) -> Trouble {
        let is_known = !self.control_error.is_empty();
        let reason = if is_known { self.control_problem() } else { String::new() };
        Trouble::NotRunning { state: state.to_owned(), reason }
    }

    /// Why the control server is not heard, if that is known, and what to do.
    fn control_problem(&self) -> String {
        let or = |text: &'static str, known: &str| {
            if known.is_empty() { text.to_owned() } else { known.to_owned() }
        };
        let why = or("the reason is not known yet", &self.control_error);
        let advice = or("check the network and DNS of this machine", &self.control_advice);
        format!("{why}; {advice}")
    }

    /// Tailscale's own health warnings, for an operator.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        self.health.iter().map(|text| format!("Tailscale says: {text}"))
    }
}

fn waits_for(reason: &str) -> String {
    match reason {
        "" => "; the log says what it waits for".to_owned(),
        _ => format!(": it cannot talk to the control server: {reason}"),
    }
}

/// A date from the control server; `None` also if it cannot be read.
fn none_if_unreadable<'de, D>(deserializer: D) -> Result<Option<Timestamp>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(value.as_str().and_then(|text| text.parse().ok()))
}

/// Go writes an empty list as `null`.
fn null_is_empty<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn running() -> NodeStatus {
        NodeStatus {
            state: "Running".into(),
            in_map_poll: true,
            enrolled: true,
            tags: vec!["tag:reverse-proxy".into()],
            ..NodeStatus::default()
        }
    }

    fn troubles(status: NodeStatus) -> Vec<Trouble> {
        status.troubles(&["tag:reverse-proxy".into()], NOW)
    }

    fn control_lost() -> Trouble {
        let unknown = "the reason is not known yet; check the network and DNS of this machine";
        Trouble::ControlLost(unknown.into())
    }

    fn not_running(state: &str) -> Trouble {
        Trouble::NotRunning { state: state.into(), reason: String::new() }
    }

    #[test]
    fn why_control_is_not_heard_is_told_where_it_is_known() {
        let control_error = "https://control.example: connection refused".to_owned();
        let first = |status| troubles(status)[0].clone();
        let starting =
            first(NodeStatus { state: "Starting".into(), control_error: control_error.clone(), ..running() });
        assert_eq!(
            starting.to_string(),
            "the tailnet node is not running (state Starting): it cannot talk to the control server: https://control.example: connection refused; check the network and DNS of this machine"
        );
        let lost = first(NodeStatus { in_map_poll: false, control_error, ..running() });
        assert_eq!(
            lost.to_string(),
            "the control server is out of reach: https://control.example: connection refused; check the network and DNS of this machine"
        );
        let blocked = first(NodeStatus {
            in_map_poll: false,
            control_error: "no upgrade".into(),
            control_advice: "let it pass".into(),
            ..running()
        });
        assert_eq!(blocked.to_string(), "the control server is out of reach: no upgrade; let it pass");
        assert!(lost.is_like(&Trouble::ControlLost(String::new())), "the reason makes it no other");
        assert!(not_running("Starting").to_string().ends_with("; the log says what it waits for"));
    }

    #[test]
    fn a_running_tagged_node_has_none() {
        assert_eq!(troubles(running()), []);
    }

    #[test]
    fn a_state_that_needs_a_person_is_told_from_one_that_passes() {
        let state = |state: &str| NodeStatus { state: state.into(), ..running() };
        let past = Some(Timestamp::from_second(-1).unwrap());
        assert_eq!(troubles(state("")), [not_running("starting")]);
        assert_eq!(troubles(state("Starting")), [not_running("Starting")]);
        assert_eq!(troubles(state("NeedsMachineAuth")), [Trouble::NeedsApproval]);
        assert_eq!(troubles(state("NeedsLogin")), [Trouble::LoggedOut]);
        assert_eq!(troubles(NodeStatus { key_expiry: past, ..state("NeedsLogin") }), [Trouble::KeyExpired]);
        assert_eq!(
            troubles(NodeStatus { enrolled: false, ..state("NeedsLogin") }),
            [not_running("NeedsLogin")]
        );
    }

    #[test]
    fn a_node_that_was_thrown_out_may_believe_to_be_running() {
        assert_eq!(troubles(NodeStatus { needs_log_upload: true, ..running() }), [Trouble::NeedsLogUpload]);
        assert_eq!(
            troubles(NodeStatus { removed: true, in_map_poll: false, ..running() }),
            [Trouble::Removed]
        );
    }

    #[test]
    fn what_limits_a_running_node_is_told_all_at_once() {
        let status = NodeStatus { in_map_poll: false, relay: "gone".into(), tags: vec![], ..running() };
        assert_eq!(
            troubles(status),
            [
                control_lost(),
                Trouble::RelayLost("gone".into()),
                Trouble::TagMissing("tag:reverse-proxy".into())
            ]
        );
    }

    #[test]
    fn a_line_of_the_library_is_understood() {
        let line = r#"{"state":"Running","name":"edge.example.ts.net","ips":["100.64.0.1"],"tags":null,
            "in_map_poll":true,"key_expiry":"2027-01-01T00:00:00Z","login_url":"","health":[],
            "enrolled":true,"removed":false,"needs_log_upload":false,"relay":"",
            "network_changes":2,"wake_ups":1,"unsaved":"","control_error":"",
            "control_advice":"","home_region":"fra","home_region_id":4,"control_moved_from":"",
            "something_new":{}}"#;
        let status: NodeStatus = serde_json::from_str(line).unwrap();
        assert_eq!(status.key_expiry, Some("2027-01-01T00:00:00Z".parse().unwrap()));
        assert_eq!((status.network_changes, status.wake_ups), (2, 1));
        assert_eq!((&*status.home_region, status.home_region_id), ("fra", 4));
        assert!(status.is_running() && status.in_map_poll && status.enrolled && status.tags.is_empty());
    }

    /// Servers write "never" as the last moment of the year 9999, which is later than jiff's last date.
    #[test]
    fn a_date_that_cannot_be_read_makes_no_line_unreadable() {
        for never in
            ["\"9999-12-31T23:59:59Z\"", "\"0001-01-01T00:00:00Z\"", "\"soon\"", "\"\"", "null", "12", "{}"]
        {
            let line = format!(r#"{{"state":"Running","tags":["tag:a"],"key_expiry":{never}}}"#);
            let status: NodeStatus = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{never}: {e}"));
            assert!(status.is_running() && status.tags == ["tag:a"], "{never}");
            assert!(status.key_expiry.is_none_or(|at| at < NOW), "{never}: {:?}", status.key_expiry);
        }
    }
}
