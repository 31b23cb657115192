//! Why a node cannot join, and why a peer cannot be reached; every text ends with what to do.

use std::time::Duration;

use thiserror::Error;

use super::Code;
use crate::ffi::libtailscale::NodeHandle;
use crate::tailnet::credential::CredentialError;

/// Why the node could not start or join; the text of each ends with what to do.
#[derive(Debug, Error)]
pub enum JoinError {
    /// Not enrolled, and no credential.
    #[error(
        "this node is not enrolled on the tailnet and there is no auth key; set TS_AUTHKEY, TS_AUTHKEY_FILE or tailnet.auth_key_file to a key that may use {tags}, or TS_CLIENT_SECRET to the secret of an OAuth client that may use them too, or run this once on a terminal to log in with a browser"
    )]
    NotEnrolled {
        /// The configured tags.
        tags: String,
    },
    /// As [`JoinError::NotEnrolled`], for a node that was enrolled before.
    #[error(
        "this node's place on the tailnet is gone (it was removed or logged out, or its key has expired) and there is no auth key to enrol it again; set TS_AUTHKEY, TS_AUTHKEY_FILE or tailnet.auth_key_file to a key that may use {tags}, or TS_CLIENT_SECRET to the secret of an OAuth client that may use them too"
    )]
    EnrolmentEnded {
        /// The configured tags.
        tags: String,
    },
    /// There is a credential, but it is not usable.
    #[error("this node has to enrol on the tailnet: {0}")]
    Credential(#[from] CredentialError),
    /// The control server or its API refused; the reason is in its own words.
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
        /// The error of the library or the API.
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
    /// The key expired on a Headscale, where no credential renews a tagged node's key.
    #[error(
        "the control server {control} does not renew this node's expired key, so no auth key was used; run `headscale nodes expire --identifier N --disable` there, or delete the node there and start again"
    )]
    KeyExpired {
        /// The control server.
        control: String,
    },
    /// An admin has to approve the node.
    #[error(
        "this node waits for approval by an admin of the tailnet; approve it in the admin console, or use a pre-approved auth key (tailnet.preauthorized = true for an OAuth client)"
    )]
    NeedsApproval,
    /// The tailnet has network flow logs.
    #[error(
        "this tailnet has network flow logs and admits only nodes that upload Tailscale's logs; set tailnet.log_upload = true, or turn network flow logs off in the admin console"
    )]
    NeedsLogUpload,
    /// Never enrolled, and TLS fails because this machine's clock is wrong.
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
    /// On the tailnet, but without all configured tags.
    #[error("this node has {held} and lacks {missing}; {remedy}")]
    WrongTags {
        /// The node's tags, in words.
        held: String,
        /// The configured tags it lacks.
        missing: String,
        /// What to do, which depends on how it was enrolled.
        remedy: String,
    },
    /// The identity on disk is damaged.
    #[error(
        "cannot use this node's identity: {0}; restore the file, set another tailnet.state_dir, or remove the file to enrol as a new node with another tailnet address"
    )]
    BadStateFile(String),
    /// The identity on disk belongs to another control server.
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
    /// The tailnet's map has no peer of that name or address.
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
    /// Too many connections to that peer and port, those in TIME_WAIT included.
    #[error(
        "every local port for connections to that peer and port is in use; spread the load or lower max_connections"
    )]
    NoPorts,
    /// The two nodes share no address family, or the stack has no route.
    #[error(
        "there is no route to the peer's address; check that both nodes have an IPv4 tailnet address, or both an IPv6 one"
    )]
    Unreachable,
    /// The peer says that the tailnet's policy denies the port.
    #[error("the tailnet's policy does not let this edge reach that port; allow it in the policy's grants")]
    Denied,
    /// The peer says that it takes no connections at all.
    #[error("the peer accepts no connections (shields up); run `tailscale set --shields-up=false` on it")]
    ShieldsUp,
    /// A bug in the edge or in the network stack.
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

/// Why a call on the node failed. The text of a panic is only on standard error.
pub(super) fn failure(handle: &NodeHandle, code: Code) -> String {
    match code {
        Code::Panic => "the tailnet library panicked; please report this with the lines before".to_owned(),
        _ => handle.error_message(),
    }
}

/// Why the node could not start, or why it does not join for a reason that has nothing to do with a credential.
pub(super) fn start_error(control: &str, code: Code, reason: String) -> JoinError {
    match code {
        Code::BadStateFile => JoinError::BadStateFile(reason),
        Code::OtherControl => JoinError::OtherControl(reason),
        Code::ControlUnreachable => JoinError::ControlUnreachable { control: control.to_owned(), reason },
        _ => JoinError::Start(reason),
    }
}
