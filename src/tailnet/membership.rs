//! Keeps the node on the tailnet: joins, and joins again when the node has lost its place.
//!
//! Invariants: a credential is looked for only when the control server asks for one, so that an enrolled node
//! starts without it. The first join has a deadline, except where a person at a terminal is asked to log in. After
//! it, nothing here ends the process: if an admin has removed the node, an admin can let it in again.
//!
//! Deliberately not here: what is logged about it (see `journal.rs`), and readiness, which follows from the node's
//! state alone.

mod journal;
mod pace;

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

use crate::config;
use crate::support::output;
use crate::support::text::list;
use crate::tailnet::credential::{Credential, Sources};
use crate::tailnet::{JoinError, Node, NodeStatus, Trouble};
use journal::{Journal, Moment};
use pace::{LOOK, Pace};

/// How long reading a credential may take. Only a network file system is slow.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// How long the node's state may take to settle after an attempt to join.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// A node, and the sources of its credential.
#[derive(Debug)]
pub struct Membership {
    /// The started node, enrolled or not.
    pub node: Arc<Node>,
    sources: Arc<Sources>,
    settings: config::Tailnet,
    /// One permit: only one thread reads the sources at a time.
    reading: Arc<Semaphore>,
}

impl Membership {
    /// For a node that is started.
    pub fn new(node: Arc<Node>, sources: Sources, settings: config::Tailnet) -> Membership {
        Membership { node, sources: Arc::new(sources), settings, reading: Arc::new(Semaphore::new(1)) }
    }

    /// Joins the tailnet. An enrolled node tries for as long as it takes; a node that is not enrolled has
    /// `join_timeout`.
    pub async fn join(&self) -> Result<(), JoinError> {
        let mut told = String::new();
        loop {
            match self.try_to_join().await {
                Err(JoinError::TimedOut { after, reason }) if without_numbers(&reason) != told => {
                    warn!(
                        "not on the tailnet after {} s: {reason}; still trying, and clients wait",
                        after.as_secs()
                    );
                    told = without_numbers(&reason);
                }
                Err(JoinError::TimedOut { reason, .. }) => debug!("not on the tailnet yet: {reason}"),
                outcome => return outcome,
            }
        }
    }

    async fn try_to_join(&self) -> Result<(), JoinError> {
        let limit = self.settings.join_timeout;
        let deadline = Instant::now() + limit;
        match self.node.up(limit).await {
            Err(JoinError::NotEnrolled { .. } | JoinError::EnrolmentEnded { .. }) => {}
            outcome => return outcome,
        }
        // The control server has answered, so the node gets a little more time.
        let left = deadline.saturating_duration_since(Instant::now()).max(limit / 5);
        match self.credential().await? {
            Some(credential) => self.enrol(&credential, left).await,
            None if std::io::stderr().is_terminal() => self.log_in_with_browser(left).await,
            None => Err(self.node.not_enrolled()),
        }
    }

    /// Reads the credential that is there now.
    async fn credential(&self) -> Result<Option<Credential>, JoinError> {
        let (sources, reading) = (Arc::clone(&self.sources), Arc::clone(&self.reading));
        let read = async {
            // One thread at a time, since it hangs if the file system does.
            let permit = reading.acquire_owned().await;
            let read = tokio::task::spawn_blocking(move || (sources.read(), permit).0);
            read.await.map_err(|panic| JoinError::Start(panic.to_string()))
        };
        match timeout(READ_LIMIT, read).await {
            Ok(credential) => Ok(credential??),
            Err(_) => {
                Err(JoinError::Start(format!("its credential could not be read within {READ_LIMIT:?}")))
            }
        }
    }

    async fn enrol(&self, credential: &Credential, limit: Duration) -> Result<(), JoinError> {
        if self.node.status().borrow().enrolled {
            warn!(
                "this node's place on the tailnet is gone (removed, logged out, or its key expired); enrolling it again, perhaps with another address"
            );
        }
        info!("enrolling with {credential}");
        self.node.enrol(credential, limit).await
    }

    /// Shows the login URL and waits for the person, however long that takes.
    async fn log_in_with_browser(&self, limit: Duration) -> Result<(), JoinError> {
        let show = async {
            let mut status = self.node.status();
            let mut shown = String::new();
            loop {
                let url = status.borrow_and_update().login_url.clone();
                if !url.is_empty() && url != shown {
                    // For a person, not for the log, whose level may hide it.
                    output::complain(format_args!(
                        "\nTo enrol this edge, open this address in a browser:\n\n\t{url}\n"
                    ));
                    shown = url;
                }
                if status.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            outcome = self.node.up_with_person(limit) => outcome,
            () = show => Err(JoinError::Start("the node was closed".into())),
        }
    }

    /// Logs that the node has joined, with its name and addresses.
    pub fn announce(&self) {
        let status = self.node.status().borrow().clone();
        info!(name = status.name, ips = list(&status.ips), tags = list(&status.tags), "ready");
        if !status.control_moved_from.is_empty() {
            let control = self.settings.control_url.as_deref().unwrap_or("Tailscale's own URL");
            info!(
                "the control server moved from {} to {control}: it has the same key, so this node keeps its identity",
                status.control_moved_from
            );
        }
        let wanted = &self.settings.hostname;
        let name = status.name.split('.').next().unwrap_or_default();
        if is_numbered(name, wanted) {
            warn!(
                "the tailnet calls this node {name} and not {wanted}, which is taken; remove the other node, or set tailnet.hostname"
            );
        } else if !name.is_empty() && !name.eq_ignore_ascii_case(wanted) {
            warn!(
                "the tailnet calls this node {name} and not {wanted}: it was renamed, or tailnet.hostname was changed; rename it in the admin console, or set tailnet.hostname"
            );
        }
    }

    /// Follows the node's state: logs what happens, and joins again when the node has lost its place. Runs until
    /// it is dropped.
    pub async fn keep(&self) {
        let mut status = self.node.status();
        let mut journal = Journal::new(&self.settings.tags, &status.borrow_and_update());
        let mut attempts = Attempts::new();
        loop {
            let (now, at) = (status.borrow_and_update().clone(), Moment::now());
            journal.write(&now, at);
            let lost = now.troubles(&self.settings.tags, at.date).into_iter().find(Trouble::wants_joining);
            if let Some(lost) = lost
                && self.join_again(&lost, &mut attempts).await
            {
                // Intermediate states are not logged.
                let _ = timeout(SETTLE_LIMIT, status.wait_for(NodeStatus::is_settled)).await;
                continue;
            }
            let pause = journal.due(at).map_or(LOOK, |due| due.min(LOOK));
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                () = sleep(pause) => {}
            }
        }
    }

    /// Tries to join again if an attempt is due; false if none is due.
    async fn join_again(&self, lost: &Trouble, attempts: &mut Attempts) -> bool {
        if *lost == Trouble::NeedsLogUpload {
            return self.look_for_flow_logs(&mut attempts.flow_logs).await;
        }
        if !self.is_still_out(attempts).await {
            return false;
        }
        let credential = self.credential().await;
        let fingerprint = match &credential {
            Ok(Some(credential)) => Some(credential.fingerprint()),
            _ => None,
        };
        if !attempts.place.may_try(Instant::now(), fingerprint) {
            if attempts.place.is_resting() && attempts.told.is_empty() {
                attempts.told = "resting".to_owned();
                warn!("this node was enrolled again less than an hour ago; restart the edge to do so now");
            }
            return false;
        }
        let limit = self.settings.join_timeout;
        let outcome = match credential {
            Ok(Some(credential)) => self.enrol(&credential, limit).await,
            Ok(None) => self.node.up(limit).await,
            Err(unreadable) => Err(unreadable),
        };
        match outcome {
            // The node has joined, and the journal logs that a tag is missing.
            Ok(()) | Err(JoinError::WrongTags { .. }) => {
                attempts.told.clear();
                attempts.place.succeeded(Instant::now(), fingerprint, *lost == Trouble::Removed);
            }
            Err(reason) => {
                attempts.tell(&reason);
                attempts.place.failed(Instant::now(), fingerprint);
            }
        }
        true
    }

    /// Asks the control server every minute whether this node still has no place: a server that was restored from
    /// a backup may know the node again, or an admin may have extended its key; then no credential is needed.
    /// Between two questions, returns the last answer.
    async fn is_still_out(&self, attempts: &mut Attempts) -> bool {
        if let Some((asked, answer)) = attempts.asked
            && asked.elapsed() < LOOK
        {
            return answer;
        }
        let answer = self.ask_anew(attempts).await;
        attempts.asked = Some((Instant::now(), answer));
        answer
    }

    async fn ask_anew(&self, attempts: &mut Attempts) -> bool {
        match self.node.up(self.settings.join_timeout).await {
            Err(JoinError::NotEnrolled { .. } | JoinError::EnrolmentEnded { .. }) => true,
            Ok(()) | Err(JoinError::WrongTags { .. }) => {
                attempts.told.clear();
                false
            }
            Err(reason) => {
                attempts.tell(&reason);
                false
            }
        }
    }

    /// Joins again, since only that shows whether the tailnet still has flow logs.
    async fn look_for_flow_logs(&self, pace: &mut Pace) -> bool {
        const NO_MATTER_OF_CREDENTIALS: Option<u64> = Some(0);
        if !pace.may_try(Instant::now(), NO_MATTER_OF_CREDENTIALS) {
            return false;
        }
        match self.node.up(self.settings.join_timeout).await {
            Ok(()) => *pace = Pace::new(),
            Err(_) => pace.failed(Instant::now(), NO_MATTER_OF_CREDENTIALS),
        }
        true
    }
}

/// What is remembered of attempts to join again.
struct Attempts {
    place: Pace,
    flow_logs: Pace,
    /// When the control server was last asked whether the node still has no place, and its answer.
    asked: Option<(Instant, bool)>,
    /// The last failure that was logged.
    told: String,
}

impl Attempts {
    fn new() -> Attempts {
        Attempts { place: Pace::new(), flow_logs: Pace::new(), asked: None, told: String::new() }
    }

    fn tell(&mut self, reason: &JoinError) {
        if matches!(reason, JoinError::EnrolmentEnded { .. } | JoinError::NotEnrolled { .. }) {
            return; // the journal has logged the trouble and its remedy
        }
        let reason = reason.to_string();
        if without_numbers(&reason) != self.told {
            error!("cannot join the tailnet again: {reason}; the edge tries again at least every hour");
            self.told = without_numbers(&reason);
        }
    }
}

/// A reason without numbers, to compare two: ports and times in it do not count.
fn without_numbers(reason: &str) -> String {
    reason.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// Whether a name is the wanted one with -1, -2, … appended, as a control server does when a name is taken.
fn is_numbered(name: &str, wanted: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let number = name.strip_prefix(&wanted.to_ascii_lowercase()).and_then(|rest| rest.strip_prefix('-'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_was_taken_is_told_from_one_that_was_changed() {
        assert!(is_numbered("edge-1", "Edge") && is_numbered("edge-12", "edge"));
        for name in ["edge", "edge-", "edge-b", "edge1", "other-1", ""] {
            assert!(!is_numbered(name, "edge"), "{name}");
        }
    }

    #[test]
    fn ports_do_not_make_another_reason() {
        let reason = |port: u16| without_numbers(&format!("read tcp 127.0.0.1:{port}: connection reset"));
        assert_eq!(reason(59032), reason(40001));
        assert_ne!(reason(59032), without_numbers("connection refused"));
    }
}
