//! Why a node cannot join, and why a peer cannot be reached; every text ends with what to do.

use std::time::Duration;

use thiserror::Error;

use super::Code;
use crate::tailnet::credential::CredentialError;

/// Why the node could not start or join; the text of each ends with what to do.
#[derive(Debug, Error)]
pub enum JoinError {
    /// Not enrolled, and nothing to enrol with.
    #[error(
        "this node is not enrolled on the tailnet and there is no auth key; set TS_AUTHKEY, TS_AUTHKEY_FILE or tailnet.auth_key_file to a key that may use {tags}, or TS_CLIENT_SECRET to an OAuth client that may, or run this once on a terminal to log in with a browser"
    )]
    NotEnrolled {
        /// The configured tags.
        tags: String,
    },
    /// As [`JoinError::NotEnrolled`], of a node that has been.
    #[error(
        "this node's place on the tailnet is gone (it was removed or logged out, or its key has expired) and there is no auth key to enrol it again; set TS_AUTHKEY, TS_AUTHKEY_FILE or tailnet.auth_key_file to a key that may use {tags}, or TS_CLIENT_SECRET to an OAuth client that may"
    )]
    EnrolmentEnded {
        /// The configured tags.
        tags: String,
    },
    /// There should be something to enrol with, and it is no good.
    #[error("this node has to enrol on the tailnet: {0}")]
    Credential(#[from] CredentialError),
    /// The control server or its API said no; the reason is in its own words.
    #[error("the control server {control} refused this node: {reason}; {remedy}")]
    Refused {
        /// The control server.
        control: String,
        /// What it answered.
        reason: String,
        /// What to do, which depends on the credential.
        remedy: String,
    },
    /// The credential cannot become an auth key.
    #[error("this node has to enrol on the tailnet, and its credential cannot be used: {reason}; {remedy}")]
    Unusable {
        /// What the library or the API said of it.
        reason: String,
        /// What to do, which depends on the credential.
        remedy: String,
    },
    /// The tailnet's policy does not let this node have its tags.
    #[error("the control server {control} refused this node its tags: {reason}; {remedy}")]
    TagsRefused {
        /// The control server.
        control: String,
        /// What it answered.
        reason: String,
        /// What to do, which depends on the credential.
        remedy: String,
    },
    /// Expired on a Headscale, where no credential brings a tagged node back.
    #[error(
        "the control server {control} keeps this node's key expired, so no auth key was used; run `headscale nodes expire --identifier N --disable` there, or delete the node there and start again"
    )]
    KeyExpired {
        /// The control server.
        control: String,
    },
    /// Waiting for a person.
    #[error(
        "this node waits for approval by an admin of the tailnet; approve it in the admin console, or use a pre-approved auth key (tailnet.preauthorized = true for an OAuth client)"
    )]
    NeedsApproval,
    /// The tailnet has network flow logs.
    #[error(
        "this tailnet has network flow logs and admits only nodes that upload Tailscale's logs; set tailnet.log_upload = true, or turn network flow logs off in the admin console"
    )]
    NeedsLogUpload,
    /// Never enrolled, and this machine's clock makes TLS impossible.
    #[error("cannot reach the control server {control}: {reason}")]
    ClockWrong {
        /// The control server.
        control: String,
        /// Both times, and what to do.
        reason: String,
    },
    /// Never enrolled, and a proxy in front of the control server stops its protocol.
    #[error("cannot talk to the control server {control}: {reason}")]
    UpgradeBlocked {
        /// The control server.
        control: String,
        /// What was answered, and what to do.
        reason: String,
    },
    /// Never enrolled, and the control server does not answer.
    #[error(
        "cannot reach the control server {control}: {reason}; check the network and DNS of this machine, and control_url"
    )]
    ControlUnreachable {
        /// The control server.
        control: String,
        /// The step that failed, and its error.
        reason: String,
    },
    /// Enrolled, but the tailnet is out of reach; the node goes on trying.
    #[error("not on the tailnet after {} s: {reason}", .after.as_secs())]
    TimedOut {
        /// The time that this attempt was given.
        after: Duration,
        /// What the node is waiting for.
        reason: String,
    },
    /// On the tailnet, but not as what the configuration promises.
    #[error("this node holds {held} instead of {missing}; {remedy}")]
    WrongTags {
        /// What the node has, in words.
        held: String,
        /// The configured tags it lacks.
        missing: String,
        /// What to do, which depends on how it was enrolled.
        remedy: String,
    },
    /// The identity on disk is damaged.
    #[error(
        "cannot use this node's identity: {0}; restore the file, name another tailnet.state_dir, or remove the file to enrol as a new node with another tailnet address"
    )]
    BadStateFile(String),
    /// The identity on disk is of another control server.
    #[error(
        "cannot use this node's identity here: {0}; to join the new server as a new node, with another tailnet address, set another tailnet.state_dir"
    )]
    OtherControl(String),
    /// Tailscale could not start, for example because of its state directory.
    #[error("cannot start the tailnet node: {0}")]
    Start(String),
}

/// Why a peer could not be reached.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum ConnectError {
    /// This node has no place on the tailnet at the moment.
    #[error("this edge is not on the tailnet at the moment; /readyz and the log say why")]
    NotRunning,
    /// Nothing of that name or address in the tailnet's map.
    #[error(
        "the tailnet shows this edge no peer of that name; check the upstream's name and that the tailnet's policy lets this edge reach it"
    )]
    NoSuchPeer,
    /// The name is our own.
    #[error("that is this edge itself; name the mailbox's node as upstream")]
    IsSelf,
    /// A RST in answer to our SYN.
    #[error(
        "the peer refused the connection; check that the mail server runs there and listens on that port"
    )]
    Refused,
    /// No answer to our SYNs.
    #[error("no answer")]
    TimedOut,
    /// A RST right after the connection was made.
    #[error("the peer reset the connection at once; check the mail server's log")]
    Reset,
    /// Too many connections to that peer and port, or in its TIME_WAIT.
    #[error("every local port towards that peer and port is taken; spread the load or lower max_connections")]
    NoPorts,
    /// The two nodes share no address family, or the stack has no route.
    #[error(
        "there is no way to the peer's address; check that both nodes have a tailnet address of one family"
    )]
    Unreachable,
    /// The peer says that the tailnet's policy denies the port.
    #[error("the tailnet's policy does not let this edge reach that port; allow it in the policy's grants")]
    Denied,
    /// The peer says that it takes no connections at all.
    #[error("the peer takes no connections (shields up); run `tailscale set --shields-up=false` on it")]
    ShieldsUp,
    /// A bug of ours or of the network stack.
    #[error("the tailnet library failed ({0:?}); please report this")]
    Internal(Code),
}

impl From<Code> for ConnectError {
    fn from(code: Code) -> ConnectError {
        match code {
            Code::NotRunning | Code::BadHandle => ConnectError::NotRunning,
            Code::NoSuchPeer => ConnectError::NoSuchPeer,
            Code::IsSelf => ConnectError::IsSelf,
            Code::Refused => ConnectError::Refused,
            Code::TimedOut => ConnectError::TimedOut,
            Code::Reset => ConnectError::Reset,
            Code::NoPorts => ConnectError::NoPorts,
            Code::Unreachable => ConnectError::Unreachable,
            Code::Denied => ConnectError::Denied,
            Code::ShieldsUp => ConnectError::ShieldsUp,
            other => ConnectError::Internal(other),
        }
    }
}
