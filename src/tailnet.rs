//! A tailnet node inside this process, and streams to its peers.
//!
//! [`Node`] joins the tailnet with no help from the host: no `tailscaled`, no
//! TUN, no root. [`TailnetStream`] is a TCP connection on the node's own stack
//! as tokio's `AsyncRead + AsyncWrite`; while idle it costs no descriptor, no
//! thread and no buffer.
//!
//! Nothing here falls back to the host's resolver or network: a name that the
//! tailnet's map does not hold is an error.

mod ffi;
mod status;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::config;
use crate::credential::{Credential, CredentialError, Kind, Proof};
use crate::relay::Reset;
use ffi::{Conn, LineSink, NodeHandle, Setting};

pub use ffi::{
    Code, forget_environment, linked_version, open_connections, run_on_alternate_stack, set_log_upload,
};
pub use status::{NodeStatus, Trouble};

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
    #[error(
        "the control server {control} refused this node: {reason}; if that is about the key, create a new one that may use {tags} and set TS_AUTHKEY"
    )]
    Refused {
        /// The control server.
        control: String,
        /// What it answered.
        reason: String,
        /// The configured tags.
        tags: String,
    },
    /// The tailnet's policy does not let this node have its tags.
    #[error(
        "the control server {control} refused this node its tags: {reason}; name an owner for {tags} in the policy's tagOwners, and use a key (or an OAuth client) that carries them all"
    )]
    TagsRefused {
        /// The control server.
        control: String,
        /// What it answered.
        reason: String,
        /// The configured tags.
        tags: String,
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
    #[error(
        "cannot reach the control server {control}: {reason}; set the clock of this machine (timedatectl set-ntp true)"
    )]
    ClockWrong {
        /// The control server.
        control: String,
        /// Both times.
        reason: String,
    },
    /// Never enrolled, and the control server does not answer.
    #[error(
        "cannot reach the control server {control}: {reason}; check the network and DNS of this machine, and control_url"
    )]
    ControlUnreachable {
        /// The control server.
        control: String,
        /// The failed step.
        reason: String,
    },
    /// Enrolled, but the tailnet is out of reach; the node goes on trying.
    #[error("not on the tailnet after {} s: {reason}", .after.as_secs())]
    TimedOut {
        /// How long it was tried.
        after: Duration,
        /// What the node is waiting for.
        reason: String,
    },
    /// On the tailnet, but not as what the configuration promises.
    #[error(
        "this node holds {held} instead of {missing}; the tailnet's policy must name an owner for it, and the auth key must carry it (a node keeps the tags it was enrolled with: to change them, remove it from the tailnet and its state directory)"
    )]
    WrongTags {
        /// What the node has, in words.
        held: String,
        /// The configured tags it lacks.
        missing: String,
    },
    /// The identity on disk is damaged.
    #[error(
        "cannot read this node's identity: {0}; restore the file, or remove it to enrol as a new node with another tailnet address"
    )]
    BadStateFile(String),
    /// Tailscale could not start, for example because of its state directory.
    #[error("cannot start the tailnet node: {0}")]
    Start(String),
}

/// Why a peer could not be reached.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
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
            other => ConnectError::Internal(other),
        }
    }
}

/// What a ping beneath TCP found out about a peer.
#[derive(Clone, Debug, Deserialize)]
pub struct PingReport {
    /// The peer's address.
    pub ip: std::net::IpAddr,
    /// Whether the peer answered.
    pub answered: bool,
    /// Round-trip time in milliseconds.
    pub latency_ms: f64,
    /// The peer's UDP address when the path is direct, else empty.
    pub direct: String,
    /// The relay in use otherwise, else empty.
    pub relay: String,
    /// Whether the control server sees the peer.
    pub online: bool,
    /// When it last saw an offline peer (RFC 3339), else empty.
    pub last_seen: String,
}

impl PingReport {
    /// The path in words: `direct 192.0.2.7:41641` or `relayed via fra`.
    pub fn path(&self) -> String {
        if self.direct.is_empty() {
            format!("relayed via {}", self.relay)
        } else {
            format!("direct {}", self.direct)
        }
    }
}

/// A node of the tailnet. Dropping it leaves the node running in the
/// background; [`Node::close`] ends it.
#[derive(Debug)]
pub struct Node {
    handle: Arc<NodeHandle>,
    status: watch::Receiver<NodeStatus>,
    /// For messages.
    control: String,
    tags: Vec<String>,
}

impl Node {
    /// Starts a node in `settings.state_dir`, or in memory if it is ephemeral, without waiting for
    /// the tailnet.
    ///
    /// Must be called within a tokio runtime, which then carries the node's
    /// log lines (target `tailscale`, at debug) and its state.
    pub fn start(settings: &config::Tailnet) -> Result<Node, JoinError> {
        let handle = Arc::new(NodeHandle::new());
        let (sender, status) = watch::channel(NodeStatus::default());
        let started = configure(&handle, settings)
            .and_then(|()| follow(&handle, sender))
            .map_err(JoinError::Start)
            .and_then(|()| handle.start().map_err(|code| start_error(code, failure(&handle, code))));
        if let Err(error) = started {
            // Not started, so there is nothing that it could fail to do.
            let _ = handle.close();
            return Err(error);
        }
        let control = settings.control_url.clone().unwrap_or_else(|| "controlplane.tailscale.com".into());
        Ok(Node { handle, status, control, tags: settings.tags.clone() })
    }

    /// Joins the tailnet within `limit`, with what the node has on disk, and checks that every
    /// configured tag is held. After [`JoinError::TimedOut`] the node goes on trying and this may be
    /// called again; after [`JoinError::NotEnrolled`] and [`JoinError::EnrolmentEnded`],
    /// [`Node::enrol`] may help; other errors need a person.
    ///
    /// Cancelling the future leaves the attempt going on until `limit`.
    pub async fn up(&self, limit: Duration) -> Result<(), JoinError> {
        let handle = Arc::clone(&self.handle);
        let joined =
            tokio::task::spawn_blocking(move || handle.up(limit).map_err(|c| (c, failure(&handle, c))));
        match joined.await {
            Ok(Ok(())) => self.check_tags(limit).await,
            Ok(Err((code, reason))) => Err(self.join_error(code, reason, limit)),
            Err(panic) => Err(JoinError::Start(panic.to_string())),
        }
    }

    /// As [`Node::up`], and enrols with the credential if the control server asks for one. The
    /// library has forgotten the credential when this returns.
    pub async fn enrol(&self, credential: &Credential, limit: Duration) -> Result<(), JoinError> {
        self.offer(Some(&credential.kind))?;
        let outcome = self.up(limit).await;
        self.offer(None)?;
        outcome
    }

    /// Sets all that makes a credential, so that nothing is left of an earlier one.
    fn offer(&self, kind: Option<&Kind>) -> Result<(), JoinError> {
        let (mut key, mut id, mut secret, mut token, mut cloud) = ("", "", "", "", "");
        match kind {
            None => {}
            Some(Kind::AuthKey(auth_key)) => key = auth_key.expose(),
            Some(Kind::OAuthClient { id: client, secret: s }) => {
                (id, secret) = (client.as_deref().unwrap_or_default(), s.expose());
            }
            Some(Kind::FederatedIdentity { client_id, proof }) => {
                id = client_id;
                match proof {
                    Proof::Token(id_token) => token = id_token.expose(),
                    Proof::Audience(audience) => cloud = audience,
                }
            }
        }
        let settings = [
            (Setting::AuthKey, key),
            (Setting::ClientId, id),
            (Setting::ClientSecret, secret),
            (Setting::IdToken, token),
            (Setting::Audience, cloud),
        ];
        for (setting, value) in settings {
            self.handle.set(setting, value).map_err(|code| JoinError::Start(failure(&self.handle, code)))?;
        }
        Ok(())
    }

    /// What a node without a credential is told, be it new or not any more on the tailnet.
    pub fn not_enrolled(&self) -> JoinError {
        let tags = self.tags.join(", ");
        match self.status.borrow().enrolled {
            true => JoinError::EnrolmentEnded { tags },
            false => JoinError::NotEnrolled { tags },
        }
    }

    fn join_error(&self, code: Code, reason: String, after: Duration) -> JoinError {
        let control = self.control.clone();
        let tags = self.tags.join(", ");
        match code {
            Code::NeedsLogin => self.not_enrolled(),
            Code::AuthRefused => JoinError::Refused { control, reason, tags },
            Code::TagsRefused => JoinError::TagsRefused { control, reason, tags },
            Code::NeedsApproval => JoinError::NeedsApproval,
            Code::NeedsLogUpload => JoinError::NeedsLogUpload,
            Code::ClockWrong => JoinError::ClockWrong { control, reason },
            Code::ControlUnreachable => JoinError::ControlUnreachable { control, reason },
            Code::UpTimedOut => JoinError::TimedOut { after, reason },
            code => start_error(code, reason),
        }
    }

    /// The tag is a promise: access rules and the node's key expiry depend on
    /// it.
    async fn check_tags(&self, limit: Duration) -> Result<(), JoinError> {
        let mut status = self.status.clone();
        // The report follows the join at once, unless the node has left again.
        let status = match timeout(limit, status.wait_for(NodeStatus::is_running)).await {
            Ok(Ok(status)) => status.clone(),
            Ok(Err(_)) => return Err(JoinError::Start("the node was closed".into())),
            Err(_) => {
                let reason = "the node joined and left again".to_owned();
                return Err(JoinError::TimedOut { after: limit, reason });
            }
        };
        let missing: Vec<&str> =
            self.tags.iter().filter(|tag| !status.tags.contains(tag)).map(String::as_str).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let held = if status.tags.is_empty() { "no tag".to_owned() } else { status.tags.join(", ") };
        Err(JoinError::WrongTags { held, missing: missing.join(", ") })
    }

    /// The node's state; changes can be awaited.
    pub fn status(&self) -> watch::Receiver<NodeStatus> {
        self.status.clone()
    }

    /// Connects to a peer by MagicDNS name, by its first label, or by tailnet
    /// address. It has no time limit of its own; dropping the future gives
    /// the attempt up and frees everything.
    pub async fn connect(&self, host: &str, port: u16) -> Result<TailnetStream, ConnectError> {
        let mut conn = self.handle.open(host, port)?;
        std::future::poll_fn(|cx| conn.poll_connected(cx)).await?;
        Ok(TailnetStream { conn })
    }

    /// Pings a peer beneath TCP for up to `limit`.
    pub async fn ping(&self, host: &str, limit: Duration) -> Result<PingReport, ConnectError> {
        let handle = Arc::clone(&self.handle);
        let host = host.to_owned();
        let report = tokio::task::spawn_blocking(move || handle.ping(&host, limit))
            .await
            .map_err(|_| ConnectError::Internal(Code::Panic))??;
        serde_json::from_str(&report).map_err(|_| ConnectError::Internal(Code::Error))
    }

    /// Leaves the tailnet's network, waiting up to two seconds for bytes on their way to be
    /// acknowledged. The identity stays on disk; an ephemeral node has none and is taken off the
    /// tailnet. False if that was not possible.
    pub async fn close(&self) -> bool {
        let handle = Arc::clone(&self.handle);
        tokio::task::spawn_blocking(move || handle.close().is_ok()).await.unwrap_or(false)
    }
}

fn start_error(code: Code, reason: String) -> JoinError {
    match code {
        Code::BadStateFile => JoinError::BadStateFile(reason),
        _ => JoinError::Start(reason),
    }
}

/// Why a call on the node failed. A panic leaves no text behind but what it
/// wrote to standard error.
fn failure(handle: &NodeHandle, code: Code) -> String {
    match code {
        Code::Panic => "the tailnet library panicked; please report this with the lines before".to_owned(),
        _ => handle.error_message(),
    }
}

fn configure(handle: &NodeHandle, settings: &config::Tailnet) -> Result<(), String> {
    let state_dir = settings.state_dir.to_str().ok_or("the path of state_dir is not UTF-8")?;
    let texts = [
        (Setting::Dir, Some(state_dir)),
        (Setting::Hostname, Some(settings.hostname.as_str())),
        (Setting::Tags, Some(&*settings.tags.join(","))),
        (Setting::ControlUrl, settings.control_url.as_deref()),
    ]
    .map(|(setting, value)| value.map_or(Ok(()), |value| handle.set(setting, value)));
    let switches =
        [handle.set_ephemeral(settings.ephemeral), handle.set_preauthorized(settings.preauthorized)];
    match texts.into_iter().chain(switches).find_map(Result::err) {
        Some(_) => Err(handle.error_message()),
        None => Ok(()),
    }
}

/// Reads the node's log and state lines for as long as it lives.
fn follow(handle: &NodeHandle, status: watch::Sender<NodeStatus>) -> Result<(), String> {
    let log = sink(handle, LineSink::Log).map_err(|e| format!("cannot make a pipe for the log: {e}"))?;
    let events = sink(handle, LineSink::Events).map_err(|e| format!("cannot make a pipe for events: {e}"))?;
    tokio::spawn(async move {
        // A line that was cut in the middle of a character is a line too.
        let mut lines = BufReader::new(log).split(b'\n');
        while let Ok(Some(line)) = lines.next_segment().await {
            tracing::debug!(target: "tailscale", "{}", String::from_utf8_lossy(&line));
        }
    });
    tokio::spawn(async move {
        let mut lines = BufReader::new(events).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str(&line) {
                Ok(current) => drop(status.send_replace(current)),
                Err(e) => tracing::error!("cannot read the node's state {line:?}: {e}"),
            }
        }
    });
    Ok(())
}

fn sink(handle: &NodeHandle, sink: LineSink) -> io::Result<pipe::Receiver> {
    let (reader, writer) = io::pipe()?;
    let reader = pipe::Receiver::from_owned_fd(reader.into())?;
    handle.set_sink(sink, writer.into())?;
    Ok(reader)
}

/// A TCP connection to a peer. Dropping it closes it in good order: what was
/// written is delivered and followed by a FIN.
#[derive(Debug)]
pub struct TailnetStream {
    conn: Conn,
}

impl AsyncRead for TailnetStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(self.conn.poll_read(cx, buf.initialize_unfilled()))?;
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TailnetStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.conn.poll_write(cx, bytes).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // the stack sends at once
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.conn.shutdown().map_err(io::Error::from))
    }
}

impl Reset for TailnetStream {
    fn reset(&mut self) {
        self.conn.abort();
    }
}
