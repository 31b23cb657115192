//! The node: start it, ask for its state, connect to peers, close it.
//!
//! Deliberately not here: how it gets onto the tailnet (see `join.rs`).

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::error::{failure, start_error};
use super::lines::{follow, take_in};
use super::{Code, ConnectError, Figures, JoinError, NodeStatus, PingReport, TailnetListener, TailnetStream};
use crate::config;
use crate::ffi::libtailscale::{NodeHandle, Setting};
use crate::support::vital::{Vital, Vitals};

/// A node of the tailnet. Dropping it leaves the node running in the
/// background; [`Node::close`] ends it.
#[derive(Debug)]
pub struct Node {
    pub(super) handle: Arc<NodeHandle>,
    sender: watch::Sender<NodeStatus>,
    status: watch::Receiver<NodeStatus>,
    /// The control server, for messages.
    pub(super) control: String,
    pub(super) state_dir: PathBuf,
    pub(super) tags: Vec<String>,
    /// Whether the node was once found to have all tags; nothing is dialled before that.
    pub(super) tagged: AtomicBool,
    /// The credential that was last offered, in words; `None` while none was needed.
    pub(super) offered: Mutex<Option<String>>,
    /// The tasks that read its log and its state.
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

    /// As [`Node::start`], for a caller that is notified of tasks that ended.
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
            // It was not started, so closing cannot fail.
            let _ = handle.close();
        })?;
        let (tags, tagged, offered) = (settings.tags.clone(), AtomicBool::new(false), Mutex::new(None));
        let state_dir = settings.state_dir.clone();
        Ok(Node { handle, sender, status, control, state_dir, tags, tagged, offered, _readers })
    }

    /// The current state; the last known state if the current one cannot be read.
    pub(super) fn look(&self) -> Result<NodeStatus, JoinError> {
        let line = self.handle.status().map_err(|code| JoinError::Start(failure(&self.handle, code)))?;
        take_in(&line, &self.sender);
        Ok(self.status.borrow().clone())
    }

    /// Whether the node has an identity, valid or not, before it has contacted the control server.
    pub(crate) fn is_enrolled(&self) -> Result<bool, JoinError> {
        Ok(self.look()?.enrolled)
    }

    /// The node's state; changes can be awaited.
    pub fn status(&self) -> watch::Receiver<NodeStatus> {
        self.status.clone()
    }

    /// Connects to a peer by MagicDNS name, by its first label, or by tailnet address. It has no time limit of its
    /// own; dropping the future gives up and frees everything. Fails until [`Node::up`] has found that the node
    /// has all tags.
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

    /// Takes connections from peers to a port of this node's own addresses, until the node is closed, also if it
    /// loses its place on the tailnet. The tailnet's policy decides who may connect. At most `backlog` connections
    /// wait to be accepted; more are refused.
    pub(crate) fn listen(&self, port: u16, backlog: u16) -> Result<TailnetListener, Code> {
        self.handle.listen(port, backlog).map(|listener| TailnetListener { listener })
    }

    /// The resources that the library uses now; takes microseconds. `None` before the start and after the close.
    pub(crate) fn figures(&self) -> Option<Figures> {
        serde_json::from_str(&self.handle.figures().ok()?).ok()
    }

    /// Resets every connection to a peer that is gone and cannot close them itself.
    pub(crate) fn abort_peer(&self, ip: IpAddr) {
        // It fails only if there are no connections.
        let _ = self.handle.abort_peer(ip);
    }

    /// Leaves the tailnet's network, waiting up to two seconds for bytes on their way to be acknowledged. The
    /// identity stays on disk; an ephemeral node has no identity on disk and is removed from the tailnet. False if
    /// that removal was not possible.
    pub async fn close(&self) -> bool {
        let handle = Arc::clone(&self.handle);
        tokio::task::spawn_blocking(move || handle.close().is_ok()).await.unwrap_or(false)
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
