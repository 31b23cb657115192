//! The node's place on the tailnet: how it gets one, and keeps it for years.
//!
//! Invariants: a credential is looked for only when the control server has asked for one, so that an
//! enrolled node starts without; joining has a deadline, except where a person at a terminal is
//! asked to log in; after that nothing here ends the process, since what an admin has taken away an
//! admin can give back.
//!
//! Deliberately not here: what is said about it (see [`journal`]), and readiness, which follows the
//! node's state by itself.

mod journal;

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::{Instant, sleep};
use tracing::{debug, error, info, warn};

use crate::config;
use crate::credential::Sources;
use crate::tailnet::{JoinError, Node, Trouble};
use journal::Journal;

/// How often time alone can make news: that the key expires soon, that a credential has been put
/// where it is looked for.
const LOOK: Duration = Duration::from_secs(60);

/// Between one new enrolment and the next: an admin who removes this node twice means it.
const ENROL_AGAIN: Duration = Duration::from_secs(60 * 60);

/// A node and what it may enrol with.
#[derive(Debug)]
pub struct Membership {
    /// The node.
    pub node: Arc<Node>,
    /// Where a credential may come from.
    pub sources: Sources,
    /// How it is to join.
    pub settings: config::Tailnet,
}

impl Membership {
    /// Joins the tailnet. An enrolled node goes on trying for as long as it takes; one that is not
    /// gets `join_timeout`.
    pub async fn join(&self) -> Result<(), JoinError> {
        let mut told = String::new();
        loop {
            match self.try_to_join(std::io::stderr().is_terminal()).await {
                Err(JoinError::TimedOut { after, reason }) if reason != told => {
                    warn!(
                        "not on the tailnet after {} s: {reason}; trying on, clients wait",
                        after.as_secs()
                    );
                    told = reason;
                }
                Err(JoinError::TimedOut { reason, .. }) => debug!("not on the tailnet yet: {reason}"),
                outcome => return outcome,
            }
        }
    }

    async fn try_to_join(&self, may_ask: bool) -> Result<(), JoinError> {
        let deadline = Instant::now() + self.settings.join_timeout;
        match self.node.up(self.settings.join_timeout).await {
            Err(JoinError::NotEnrolled { .. } | JoinError::EnrolmentEnded { .. }) => {}
            outcome => return outcome,
        }
        let Some(credential) = self.sources.read()? else {
            return if may_ask { self.log_in_with_browser().await } else { Err(self.node.not_enrolled()) };
        };
        if self.node.status().borrow().enrolled {
            warn!(
                "this node's place on the tailnet is gone (removed, logged out, or its key expired); enrolling it again, perhaps with another address"
            );
        }
        info!("enrolling with {credential}");
        self.node.enrol(&credential, deadline.saturating_duration_since(Instant::now())).await
    }

    /// Shows the login URL and waits for the person, however long that takes.
    async fn log_in_with_browser(&self) -> Result<(), JoinError> {
        let mut status = self.node.status();
        let mut shown = String::new();
        loop {
            let now = status.borrow_and_update().clone();
            if !now.login_url.is_empty() && now.login_url != shown {
                // For a person, not for the log, whose level may hide it.
                eprintln!("\nTo enrol this edge, open this address in a browser:\n\n\t{}\n", now.login_url);
                shown = now.login_url;
            }
            if matches!(&*now.state, "Running" | "Starting" | "NeedsMachineAuth") {
                return self.node.up(self.settings.join_timeout).await;
            }
            if status.changed().await.is_err() {
                return Err(JoinError::Start("the node was closed".into()));
            }
        }
    }

    /// Says that the node is there, and as what.
    pub fn announce(&self) {
        let status = self.node.status().borrow().clone();
        info!(name = status.name, ips = ?status.ips, tags = ?status.tags, "ready");
        let wanted = &self.settings.hostname;
        let name = status.name.split('.').next().unwrap_or_default();
        if !name.eq_ignore_ascii_case(wanted) {
            warn!(
                "the tailnet calls this node {name} and not {wanted}, which is taken; remove the other node, or set tailnet.hostname"
            );
        }
    }

    /// Follows the node's life: tells what happens to it, and gets it back on the tailnet when it
    /// has lost its place. Runs until it is dropped.
    pub async fn keep(&self) {
        let mut status = self.node.status();
        let mut journal = Journal::new(&self.settings.tags, &status.borrow_and_update());
        let mut next_try = Instant::now();
        let mut told = String::new();
        loop {
            let (now, at) = (status.borrow_and_update().clone(), Timestamp::now());
            journal.write(&now, at);
            let lost = now.troubles(&self.settings.tags, at).iter().any(Trouble::wants_joining);
            if lost && Instant::now() >= next_try {
                next_try = Instant::now() + self.join_again(&mut told).await;
                continue;
            }
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                () = sleep(LOOK) => {}
            }
        }
    }

    /// One try; returns when the next may be. `told` is the reason that the last one failed for.
    async fn join_again(&self, told: &mut String) -> Duration {
        match self.try_to_join(false).await {
            Ok(()) => {
                let ips = self.node.status().borrow().ips.clone();
                warn!(?ips, "this node is on the tailnet again; mail servers have to trust this address");
                told.clear();
                return ENROL_AGAIN;
            }
            // The journal has told the trouble, and what could be done.
            Err(
                JoinError::EnrolmentEnded { .. } | JoinError::NotEnrolled { .. } | JoinError::NeedsLogUpload,
            ) => {}
            Err(reason) => {
                let reason = reason.to_string();
                if reason != *told {
                    error!("cannot join the tailnet again: {reason}; trying on");
                }
                *told = reason;
            }
        }
        LOOK
    }
}
