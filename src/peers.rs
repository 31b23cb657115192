//! Peers that go away without a word.
//!
//! A mailbox whose machine loses power under an idle connection (IMAP IDLE) sends no FIN, and its
//! clients would wait for mail that never comes. TCP keepalive notices it too, but only where nothing
//! is on its way, and a user time-out would also cut a live mailbox that takes its time to accept a
//! message. So each peer that has connections is pinged inside WireGuard, and only its silence there
//! counts.
//!
//! Invariants: a peer without connections is left in peace; what is not the peer's fault (this edge
//! is off the tailnet) does not count as its silence.
//!
//! Deliberately not here: whether the mail server on it is well (see `probe.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use crate::tailnet::ConnectError;
use crate::upstream::Dial;

/// How many pings in a row a peer must leave unanswered.
const PINGS: u32 = 5;

/// A peer that connections go to. Cheap to share.
#[derive(Debug)]
pub struct Peer {
    /// As the configuration names it.
    pub host: String,
    lost: Notify,
    /// Those who wait for that.
    connections: AtomicUsize,
}

/// Counts as a connection until it is dropped.
struct Connection<'a>(&'a Peer);

impl Peer {
    /// A peer by its name in the configuration.
    pub fn new(host: String) -> Peer {
        Peer { host, lost: Notify::new(), connections: AtomicUsize::new(0) }
    }

    /// Completes when the peer has gone silent. It counts as connected for as long as this is waited
    /// for.
    pub async fn lost(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        let _connection = Connection(self);
        self.lost.notified().await;
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Every peer of a configuration, each once, however many listeners name it.
#[derive(Debug, Default)]
pub struct Peers(BTreeMap<String, Arc<Peer>>);

impl Peers {
    /// The peer of that name.
    pub fn get(&mut self, host: &str) -> Arc<Peer> {
        let new = || Arc::new(Peer::new(host.to_owned()));
        Arc::clone(self.0.entry(host.to_owned()).or_insert_with(new))
    }

    /// Watches over all of them until it is dropped: whoever waits in [`Peer::lost`] is told within
    /// `limit` of a peer's last sign of life.
    pub async fn watch<D: Dial>(&self, dialler: &Arc<D>, limit: Duration) {
        let mut watching = JoinSet::new();
        for peer in self.0.values() {
            watching.spawn(watch(Arc::clone(dialler), Arc::clone(peer), limit));
        }
        while watching.join_next().await.is_some() {}
    }
}

async fn watch<D: Dial>(dialler: Arc<D>, peer: Arc<Peer>, limit: Duration) {
    let interval = limit / (PINGS + 1); // the first one comes up to an interval late
    let mut unanswered = 0;
    loop {
        let began = Instant::now();
        if peer.connections() == 0 {
            unanswered = 0;
        } else if is_silent(&*dialler, &peer.host, interval).await {
            unanswered += 1;
            if unanswered == PINGS {
                let connections = peer.connections();
                warn!(
                    upstream = peer.host,
                    connections,
                    "the mailbox's node has not answered for {limit:?}: closing its connections; check that it runs and has a network"
                );
                peer.lost.notify_waiters();
                unanswered = 0;
            }
        } else {
            unanswered = 0;
        }
        sleep_until(began + interval).await;
    }
}

async fn is_silent<D: Dial>(dialler: &D, host: &str, limit: Duration) -> bool {
    match dialler.ping(host, limit).await {
        Ok(report) => !report.answered,
        // It was removed, or the policy hides it: its connections are as dead.
        Err(ConnectError::NoSuchPeer) => true,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::net::TcpStream;
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::tailnet::PingReport;

    const LIMIT: Duration = Duration::from_secs(50);

    /// Answers a ping at once, or not at all.
    struct Pinged {
        answer: Mutex<Result<bool, ConnectError>>,
        pings: AtomicUsize,
    }

    impl Dial for Pinged {
        type Stream = TcpStream;

        async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
            Err(ConnectError::Refused)
        }

        async fn ping(&self, _: &str, limit: Duration) -> Result<PingReport, ConnectError> {
            self.pings.fetch_add(1, Ordering::Relaxed);
            let answered = (*self.answer.lock().unwrap())?;
            if !answered {
                sleep(limit).await;
            }
            let (direct, relay, last_seen) = (String::new(), String::new(), String::new());
            Ok(PingReport {
                ip: [100, 64, 0, 1].into(),
                answered,
                latency_ms: 1.0,
                direct,
                relay,
                online: true,
                last_seen,
            })
        }
    }

    fn start(answer: Result<bool, ConnectError>) -> (Arc<Pinged>, Arc<Peer>, JoinSet<()>) {
        let dialler = Arc::new(Pinged { answer: Mutex::new(answer), pings: AtomicUsize::new(0) });
        let mut peers = Peers::default();
        let peer = peers.get("stalwart");
        assert!(Arc::ptr_eq(&peer, &peers.get("stalwart")), "one for all listeners");
        let mut task = JoinSet::new();
        let watched = Arc::clone(&dialler);
        task.spawn(async move { peers.watch(&watched, LIMIT).await });
        (dialler, peer, task)
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_goes_silent_is_lost_in_time() {
        let (dialler, peer, _task) = start(Ok(true));
        let lost = peer.lost();
        tokio::pin!(lost);
        assert!(timeout(Duration::from_secs(35 * 60), &mut lost).await.is_err(), "it answers");
        let began = Instant::now();
        *dialler.answer.lock().unwrap() = Ok(false);
        lost.await;
        let took = began.elapsed();
        assert!((LIMIT * 4 / 6..=LIMIT).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_is_removed_is_lost_too() {
        let (_, peer, _task) = start(Err(ConnectError::NoSuchPeer));
        timeout(LIMIT, peer.lost()).await.expect("it is lost");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_that_ends_in_time_is_forgotten() {
        let (dialler, peer, _task) = start(Ok(true));
        let lost = peer.lost();
        tokio::pin!(lost);
        for _ in 0..10 {
            *dialler.answer.lock().unwrap() = Ok(false);
            assert!(timeout(LIMIT / 2, &mut lost).await.is_err());
            *dialler.answer.lock().unwrap() = Ok(true);
            assert!(timeout(Duration::from_secs(15), &mut lost).await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_absence_is_not_the_peers_silence() {
        let (_, peer, _task) = start(Err(ConnectError::NotRunning));
        assert!(timeout(Duration::from_secs(3600), peer.lost()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_without_connections_is_left_in_peace() {
        let (dialler, peer, _task) = start(Ok(false));
        sleep(Duration::from_secs(600)).await;
        assert_eq!(dialler.pings.load(Ordering::Relaxed), 0);
        // Nor does the time without any count against it.
        assert!(timeout(LIMIT / 2, peer.lost()).await.is_err());
    }
}
