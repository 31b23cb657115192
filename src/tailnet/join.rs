//! Gets the node onto the tailnet, with its identity on disk or with a credential.
//!
//! Invariants: a node serves only after it was found to have every configured tag; a credential that was offered
//! is withdrawn after the attempt; every error says what to do.
//!
//! Deliberately not here: when to try, and when to try again (see `membership.rs`).

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::credential::{Credential, CredentialKind};
use super::error::{failure, start_error};
use super::{Code, JoinError, Node};
use crate::ffi::libtailscale::Setting;

impl Node {
    /// Joins the tailnet within `limit`, with the identity on disk, and checks that the node has every configured
    /// tag. After [`JoinError::TimedOut`] the node goes on trying and this may be called again; after
    /// [`JoinError::NotEnrolled`] and [`JoinError::EnrolmentEnded`], [`Node::enrol`] may help; other errors need a
    /// person.
    ///
    /// If the future is cancelled, the attempt still goes on until `limit`.
    pub async fn up(&self, limit: Duration) -> Result<(), JoinError> {
        let handle = Arc::clone(&self.handle);
        let joined =
            tokio::task::spawn_blocking(move || handle.up(limit).map_err(|c| (c, failure(&handle, c))));
        match joined.await {
            Ok(Ok(())) => self.check_tags(),
            Ok(Err((code, reason))) => Err(self.join_error(code, reason, limit)),
            Err(panic) => Err(JoinError::Start(panic.to_string())),
        }
    }

    /// As [`Node::up`], and enrols with the credential if the control server asks for one. A refused credential is
    /// forgotten; an accepted one stays in Tailscale's control client until the next login.
    pub async fn enrol(&self, credential: &Credential, limit: Duration) -> Result<(), JoinError> {
        let offered = self.offer(Some(&credential.kind));
        // Kept for a later attempt to join too: it may find the node enrolled by this attempt.
        *self.offered.lock().unwrap_or_else(PoisonError::into_inner) = Some(credential.to_string());
        let outcome = match offered {
            Ok(()) => self.up(limit).await,
            refused => refused,
        };
        let taken_back = self.offer(None);
        match outcome {
            Err(JoinError::Refused { control, reason, .. }) => {
                Err(JoinError::Refused { control, reason, remedy: self.remedy(credential) })
            }
            Err(JoinError::TagsRefused { control, reason, .. }) => {
                Err(JoinError::TagsRefused { control, reason, remedy: self.tags_remedy(Some(credential)) })
            }
            Err(JoinError::Unusable { reason, .. }) => {
                Err(JoinError::Unusable { reason, remedy: self.remedy(credential) })
            }
            outcome => outcome.and(taken_back),
        }
    }

    /// What to do about a credential that was refused.
    fn remedy(&self, credential: &Credential) -> String {
        let tags = self.tags.join(", ");
        match credential.kind {
            CredentialKind::AuthKey(_) => {
                format!(
                    "if the key is the problem, create a new one that carries {tags}, to replace {credential}"
                )
            }
            CredentialKind::OAuthClient { .. } => format!(
                "check {credential}: it needs the scope Auth Keys: Write and all of {tags}, and the secret has to be complete"
            ),
            CredentialKind::FederatedIdentity { .. } => format!(
                "check {credential}: its id, its issuer, subject and audience, the scope Auth Keys: Write, and all of {tags}"
            ),
        }
    }

    /// What to do where the tags were refused. No credential means that a person has logged in.
    fn tags_remedy(&self, credential: Option<&Credential>) -> String {
        let tags = self.tags.join(", ");
        let owned = |owner: &str| format!("name {owner} as an owner of {tags} in the policy's tagOwners");
        match credential {
            None => owned("the person who logs in"),
            Some(Credential { kind: CredentialKind::AuthKey(_), .. }) => {
                format!("{}, and use a key that carries {tags}", owned("whoever creates the key"))
            }
            Some(credential) => {
                format!("{}, and add {tags} to {credential}", owned(&format!("the tags of {credential}")))
            }
        }
    }

    /// As [`Node::up`], and waits for a person to visit the login URL of [`NodeStatus`](super::NodeStatus) if the
    /// control server asks for a login. While there is one, `limit` does not run.
    pub(crate) async fn up_with_person(&self, limit: Duration) -> Result<(), JoinError> {
        let interactive = |on| {
            self.handle.set_interactive(on).map_err(|code| JoinError::Start(failure(&self.handle, code)))
        };
        interactive(true)?;
        let outcome = self.up(limit).await;
        let ended = interactive(false);
        outcome.and(ended)
    }

    /// Sets every part of the credential, so that nothing of an earlier one is left.
    fn offer(&self, kind: Option<&CredentialKind>) -> Result<(), JoinError> {
        let [key, id, secret, token] = match kind {
            None => ["", "", "", ""],
            Some(CredentialKind::AuthKey(key)) => [key.expose(), "", "", ""],
            Some(CredentialKind::OAuthClient { id, secret }) => {
                ["", id.as_deref().unwrap_or_default(), secret.expose(), ""]
            }
            Some(CredentialKind::FederatedIdentity { client_id, token }) => {
                ["", client_id, "", token.expose()]
            }
        };
        let settings = [
            (Setting::AuthKey, key),
            (Setting::ClientId, id),
            (Setting::ClientSecret, secret),
            (Setting::IdToken, token),
        ];
        for (setting, value) in settings {
            self.handle.set(setting, value).map_err(|code| JoinError::Start(failure(&self.handle, code)))?;
        }
        Ok(())
    }

    /// The error for a node without a credential: it is new, or no longer on the tailnet.
    pub fn not_enrolled(&self) -> JoinError {
        let tags = self.tags.join(", ");
        match self.status().borrow().enrolled {
            true => JoinError::EnrolmentEnded { tags },
            false => JoinError::NotEnrolled { tags },
        }
    }

    fn join_error(&self, code: Code, reason: String, after: Duration) -> JoinError {
        let control = self.control.clone();
        match code {
            Code::NeedsLogin => self.not_enrolled(),
            Code::AuthRefused => {
                let remedy = "check this node in the admin console".to_owned();
                JoinError::Refused { control, reason, remedy }
            }
            Code::BadCredential => JoinError::Unusable { reason, remedy: String::new() },
            Code::TagsRefused => JoinError::TagsRefused { control, reason, remedy: self.tags_remedy(None) },
            Code::NeedsApproval => JoinError::NeedsApproval,
            Code::NeedsLogUpload => JoinError::NeedsLogUpload,
            Code::ClockWrong => JoinError::ClockWrong { control, reason },
            Code::KeyExpired => JoinError::KeyExpired { control },
            Code::UpgradeBlocked => JoinError::UpgradeBlocked { control, reason },
            Code::UpTimedOut => JoinError::TimedOut { after, reason },
            code => start_error(&control, code, reason),
        }
    }

    /// What to do about tags that the node does not hold.
    fn missing_tags_remedy(&self) -> String {
        match &*self.offered.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(credential) => format!(
                "{credential} does not carry all these tags, and a node gets the tags of its key: create one that carries them, remove the node from the tailnet and the files in {} (its identity), and start again; or give the node the tag (Headscale: headscale nodes tag; Tailscale: edit ACL tags in the admin console)",
                self.state_dir.display()
            ),
            None => "a node keeps the tags it was enrolled with: give it the tag (Tailscale: edit ACL tags in the admin console; Headscale: headscale nodes tag)".to_owned(),
        }
    }

    /// Access rules and the node's key expiry depend on the tags. The state is read again here, since the last
    /// state line may be older than the join.
    fn check_tags(&self) -> Result<(), JoinError> {
        let status = self.look()?;
        if !status.is_running() {
            let reason = "it no longer runs, or its state could not be read".to_owned();
            return Err(JoinError::TimedOut { after: Duration::ZERO, reason });
        }
        let missing: Vec<&str> =
            self.tags.iter().filter(|tag| !status.tags.contains(tag)).map(String::as_str).collect();
        if missing.is_empty() {
            self.tagged.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let held = if status.tags.is_empty() { "no tag".to_owned() } else { status.tags.join(", ") };
        Err(JoinError::WrongTags { held, missing: missing.join(", "), remedy: self.missing_tags_remedy() })
    }
}
