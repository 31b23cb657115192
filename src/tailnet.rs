//! A tailnet node inside this process, and streams to its peers.
//!
//! [`Node`] joins the tailnet with no help from the host: no `tailscaled`, no
//! TUN, no root. [`TailnetStream`] is a TCP connection on the node's own stack
//! as tokio's `AsyncRead + AsyncWrite`; while idle it costs no descriptor, no
//! thread and no buffer.
//!
//! Nothing here falls back to the host's resolver or network: a name that the
//! tailnet's map does not hold is an error.

pub mod credential;
mod error;
pub(crate) mod membership;
pub(crate) mod state_dir;
mod status;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::config;
use crate::ffi::libtailscale::{Conn, LineSink, Listener, NodeHandle, Setting};
use crate::support::text::harmless;
use crate::support::vital::{Vital, Vitals};
use crate::tailnet::credential::{Credential, Kind};

pub use crate::ffi::libtailscale::forget_environment;
pub(crate) use crate::ffi::libtailscale::{Code, linked_version, set_log_upload, set_memory};
pub use error::{ConnectError, JoinError};
pub use status::NodeStatus;
pub(crate) use status::Trouble;

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
    /// Whether this node reaches anybody: the peer, or else the control server. A peer's silence
    /// means nothing without.
    pub network: bool,
    /// When it last saw an offline peer (RFC 3339), else empty.
    pub last_seen: String,
}

/// The way that packets to a peer take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Straight to this UDP address.
    Direct(String),
    /// Through a relay: the region's code, or a peer relay's address.
    Relay(String),
}

impl PingReport {
    /// The way that the answer took.
    pub fn route(&self) -> Route {
        if self.direct.is_empty() {
            Route::Relay(self.relay.clone())
        } else {
            Route::Direct(self.direct.clone())
        }
    }
}

impl fmt::Display for Route {
    /// In words: `direct 192.0.2.7:41641` or `relayed via fra`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Route::Direct(address) => write!(f, "direct {address}"),
            Route::Relay(relay) => write!(f, "relayed via {relay}"),
        }
    }
}

/// What the library's Go half costs (`tailscale_figures` in `tailscale.h`).
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub(crate) struct Figures {
    /// Goroutines of the process.
    pub goroutines: u64,
    /// Heap in spans that hold objects.
    pub heap_in_use_bytes: u64,
    /// Heap in spans that hold none, those given back included.
    pub heap_idle_bytes: u64,
    /// Of the idle heap, what was given back to the system.
    pub heap_released_bytes: u64,
    /// Garbage collections since the start of the process.
    pub gc_count: u64,
    /// For how long they have stopped Go's threads, in all.
    pub gc_pause_seconds: f64,
    /// How many threads may run Go code at once.
    pub gomaxprocs: u64,
    /// TCP endpoints of the node's stack, in whatever state.
    pub endpoints: u64,
    /// Connection handles that are not closed.
    pub handles: u64,
    /// What connections may hold beyond their floor at this moment.
    pub in_flight_bytes: u64,
    /// The most that all connections together may have in flight.
    pub in_flight_max_bytes: u64,
}

/// A node of the tailnet. Dropping it leaves the node running in the
/// background; [`Node::close`] ends it.
#[derive(Debug)]
pub struct Node {
    handle: Arc<NodeHandle>,
    sender: watch::Sender<NodeStatus>,
    status: watch::Receiver<NodeStatus>,
    /// The control server, for messages.
    control: String,
    state_dir: PathBuf,
    tags: Vec<String>,
    /// Whether the tags were once found right; before that nothing is dialled.
    tagged: AtomicBool,
    /// What this node was last offered to enrol with, in words; none while its state was enough.
    offered: Mutex<Option<String>>,
    /// Those who read its log and its state.
    _readers: [Vital; 2],
}

impl Node {
    /// Starts a node in `settings.state_dir`, or in memory if it is ephemeral, without waiting for
    /// the tailnet.
    ///
    /// Must be called within a tokio runtime, which then carries the node's
    /// log lines (target `tailscale`, at debug) and its state, as vital tasks.
    pub fn start(settings: &config::Tailnet) -> Result<Node, JoinError> {
        Node::start_with(settings, &Vitals::new().0)
    }

    /// The same for somebody who hears of tasks that have ended.
    pub(crate) fn start_with(settings: &config::Tailnet, vitals: &Vitals) -> Result<Node, JoinError> {
        let handle = Arc::new(NodeHandle::new());
        let (sender, status) = watch::channel(NodeStatus::default());
        let control = settings.control_url.clone().unwrap_or_else(|| "controlplane.tailscale.com".into());
        let started = configure(&handle, settings)
            .and_then(|()| follow(&handle, sender.clone(), vitals))
            .map_err(JoinError::Start)
            .and_then(|readers| match handle.start() {
                Ok(()) => Ok(readers),
                Err(code) => Err(start_error(&control, code, failure(&handle, code))),
            });
        let _readers = started.inspect_err(|_| {
            // Not started, so there is nothing that it could fail to do.
            let _ = handle.close();
        })?;
        let (tags, tagged, offered) = (settings.tags.clone(), AtomicBool::new(false), Mutex::new(None));
        let state_dir = settings.state_dir.clone();
        Ok(Node { handle, sender, status, control, state_dir, tags, tagged, offered, _readers })
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
            Ok(Ok(())) => self.check_tags(),
            Ok(Err((code, reason))) => Err(self.join_error(code, reason, limit)),
            Err(panic) => Err(JoinError::Start(panic.to_string())),
        }
    }

    /// As [`Node::up`], and enrols with the credential if the control server asks for one. A
    /// credential that was refused is forgotten; one that was good stays with Tailscale's control
    /// client until the next login.
    pub async fn enrol(&self, credential: &Credential, limit: Duration) -> Result<(), JoinError> {
        let offered = self.offer(Some(&credential.kind));
        // Also for a later attempt to join, which may find the node enrolled by this one.
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
            Kind::AuthKey(_) => {
                format!(
                    "if that is about the key, create a new one that carries {tags}, in place of {credential}"
                )
            }
            Kind::OAuthClient { .. } => format!(
                "check {credential}: it needs the scope Auth Keys: Write and all of {tags}, and its secret as it was shown once"
            ),
            Kind::FederatedIdentity { .. } => format!(
                "check {credential}: its id, its issuer, subject and audience, the scope Auth Keys: Write, and all of {tags}"
            ),
        }
    }

    /// What to do where the tags were refused. Without a credential a person has logged in.
    fn tags_remedy(&self, credential: Option<&Credential>) -> String {
        let tags = self.tags.join(", ");
        let owned = |owner: &str| format!("name {owner} as an owner of {tags} in the policy's tagOwners");
        match credential {
            None => owned("the person who logs in"),
            Some(Credential { kind: Kind::AuthKey(_), .. }) => {
                format!("{}, and use a key that carries {tags}", owned("whoever creates the key"))
            }
            Some(credential) => {
                format!("{}, and give {credential} {tags}", owned(&format!("the tags of {credential}")))
            }
        }
    }

    /// As [`Node::up`], and waits for a person to visit the login URL of [`NodeStatus`] if the
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

    /// Sets all that makes a credential, so that nothing is left of an earlier one.
    fn offer(&self, kind: Option<&Kind>) -> Result<(), JoinError> {
        let [key, id, secret, token] = match kind {
            None => ["", "", "", ""],
            Some(Kind::AuthKey(key)) => [key.expose(), "", "", ""],
            Some(Kind::OAuthClient { id, secret }) => {
                ["", id.as_deref().unwrap_or_default(), secret.expose(), ""]
            }
            Some(Kind::FederatedIdentity { client_id, token }) => ["", client_id, "", token.expose()],
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
                "a node gets the tags of its key, so {credential} does not carry them all: create one that does, remove the files in {} (they are of a node without these tags) and the node from the tailnet, and start again; or give the node the tag (Headscale: headscale nodes tag; Tailscale: edit ACL tags in the admin console)",
                self.state_dir.display()
            ),
            None => "a node keeps the tags it was enrolled with: give it the tag (Tailscale: edit ACL tags in the admin console; Headscale: headscale nodes tag)".to_owned(),
        }
    }

    /// The tag is a promise: access rules and the node's key expiry depend on
    /// it. The state is asked for anew, since the last line of it may be older
    /// than the join.
    fn check_tags(&self) -> Result<(), JoinError> {
        let status = self.look()?;
        if !status.is_running() {
            let reason =
                "it is not running any more, or the library said so in a way that cannot be read".to_owned();
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

    /// The state as it is now; as it was last, if that cannot be read.
    fn look(&self) -> Result<NodeStatus, JoinError> {
        let line = self.handle.status().map_err(|code| JoinError::Start(failure(&self.handle, code)))?;
        take_in(&line, &self.sender);
        Ok(self.status.borrow().clone())
    }

    /// Whether the node has an identity, good or not, before it has said a word to the control server.
    pub(crate) fn is_enrolled(&self) -> Result<bool, JoinError> {
        Ok(self.look()?.enrolled)
    }

    /// The node's state; changes can be awaited.
    pub fn status(&self) -> watch::Receiver<NodeStatus> {
        self.status.clone()
    }

    /// Connects to a peer by MagicDNS name, by its first label, or by tailnet
    /// address. It has no time limit of its own; dropping the future gives
    /// the attempt up and frees everything. Until [`Node::up`] has found the tags right there are no
    /// connections.
    pub async fn connect(&self, host: &str, port: u16) -> Result<TailnetStream, ConnectError> {
        if !self.tagged.load(Ordering::Relaxed) {
            return Err(ConnectError::NotRunning);
        }
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

    /// Takes connections from peers to a port of this node's own addresses, for as long as the
    /// node is not closed, whatever becomes of its place on the tailnet; who may connect is up to the
    /// tailnet's policy. At most `backlog` of them wait to be accepted, and more are refused.
    pub(crate) fn listen(&self, port: u16, backlog: u16) -> Result<TailnetListener, Code> {
        self.handle.listen(port, backlog).map(|listener| TailnetListener { listener })
    }

    /// What the library costs now, at the price of microseconds; `None` before the start and after
    /// the close.
    pub(crate) fn figures(&self) -> Option<Figures> {
        serde_json::from_str(&self.handle.figures().ok()?).ok()
    }

    /// Resets every connection to a peer that is gone and will not end them itself.
    pub(crate) fn abort_peer(&self, ip: IpAddr) {
        // It fails only where there are no connections.
        let _ = self.handle.abort_peer(ip);
    }

    /// Leaves the tailnet's network, waiting up to two seconds for bytes on their way to be
    /// acknowledged. The identity stays on disk; an ephemeral node has none and is taken off the
    /// tailnet. False if that was not possible.
    pub async fn close(&self) -> bool {
        let handle = Arc::clone(&self.handle);
        tokio::task::spawn_blocking(move || handle.close().is_ok()).await.unwrap_or(false)
    }
}

fn start_error(control: &str, code: Code, reason: String) -> JoinError {
    match code {
        Code::BadStateFile => JoinError::BadStateFile(reason),
        Code::OtherControl => JoinError::OtherControl(reason),
        Code::ControlUnreachable => JoinError::ControlUnreachable { control: control.to_owned(), reason },
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
fn follow(
    handle: &NodeHandle,
    status: watch::Sender<NodeStatus>,
    vitals: &Vitals,
) -> Result<[Vital; 2], String> {
    let log = sink(handle, LineSink::Log).map_err(|e| format!("cannot make a pipe for the log: {e}"))?;
    let events = sink(handle, LineSink::Events).map_err(|e| format!("cannot make a pipe for events: {e}"))?;
    let tell = |line: &str| tracing::debug!(target: "tailscale", "{}", harmless(line));
    let log = read_lines(log, tell);
    let events = read_lines(events, move |line: &str| take_in(line, &status));
    Ok([vitals.spawn("read the node's log", log), vitals.spawn("read the node's state", events)])
}

/// Reads lines, and then waits: the pipe ends with the node. What is not UTF-8, such as a line that was
/// cut in the middle of a character, is a line too. Returns only if the pipe fails.
async fn read_lines(pipe: pipe::Receiver, mut take: impl FnMut(&str)) {
    let mut lines = BufReader::new(pipe).split(b'\n');
    loop {
        match lines.next_segment().await {
            Ok(Some(line)) => take(&String::from_utf8_lossy(&line)),
            Ok(None) => std::future::pending().await,
            Err(error) => return tracing::error!("cannot read from the tailnet library: {error}"),
        }
    }
}

/// Makes a line of the library the node's state. One that cannot be read is no more than an error in the
/// log.
fn take_in(line: &str, status: &watch::Sender<NodeStatus>) {
    match serde_json::from_str(line) {
        Ok(current) => drop(status.send_replace(current)),
        Err(error) => tracing::error!("cannot read the node's state {line:?}: {error}; please report this"),
    }
}

fn sink(handle: &NodeHandle, sink: LineSink) -> io::Result<pipe::Receiver> {
    let (reader, writer) = io::pipe()?;
    let reader = pipe::Receiver::from_owned_fd(reader.into())?;
    handle.set_sink(sink, writer.into())?;
    Ok(reader)
}

/// Connections from peers to a port of the node. Dropping it closes the port.
#[derive(Debug)]
pub(crate) struct TailnetListener {
    listener: Listener,
}

impl TailnetListener {
    /// The next connection; [`Code::NotRunning`] once the node is closed, any other is a fault.
    pub(crate) async fn accept(&mut self) -> Result<TailnetStream, Code> {
        let conn = std::future::poll_fn(|cx| self.listener.poll_accept(cx)).await?;
        Ok(TailnetStream { conn })
    }
}

/// A TCP connection to or from a peer. Dropping it closes it in good order: what was
/// written is delivered and followed by a FIN.
#[derive(Debug)]
pub struct TailnetStream {
    conn: Conn,
}

impl TailnetStream {
    /// Ends the connection with a RST.
    pub(crate) fn reset(&mut self) {
        self.conn.abort();
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_cannot_be_read_leaves_the_one_before() {
        let (sender, status) = watch::channel(NodeStatus::default());
        take_in(r#"{"state":"Running","tags":["tag:a"]}"#, &sender);
        let before = status.borrow().clone();
        assert!(before.is_running());
        for line in ["", "{", "12", r#"{"state":1}"#, r#"{"ips":["nowhere"]}"#] {
            take_in(line, &sender);
            assert_eq!(*status.borrow(), before, "{line}");
        }
    }

    #[tokio::test]
    async fn a_line_that_is_not_text_is_a_line_too() {
        let (reader, writer) = io::pipe().unwrap();
        let reader = pipe::Receiver::from_owned_fd(reader.into()).unwrap();
        io::Write::write_all(&mut { writer }, b"one\n\xff\xfe\ntwo\n").unwrap(); // and then it is closed
        let mut lines = Vec::new();
        let reading = read_lines(reader, |line: &str| lines.push(line.to_owned()));
        let goes_on = tokio::time::timeout(Duration::from_millis(200), reading).await.is_err();
        assert!(goes_on, "the end of the pipe is no end of the task");
        assert_eq!(lines, ["one", "\u{fffd}\u{fffd}", "two"]);
    }
}
