//! Finds peers that are gone without closing their connections, and the path to the others.
//!
//! A mailbox whose machine loses power under an idle connection (IMAP IDLE) sends no FIN, and its clients would
//! wait for mail that never comes. TCP keepalive notices that too, but only where no bytes are in flight, and a
//! user time-out would also cut a live mailbox that is slow to accept a message. So each peer that has connections
//! is pinged inside WireGuard again and again (a look), and only its silence there counts.
//!
//! A lost packet is no silence: a ping without an answer is soon repeated within the same look, and bytes from the
//! peer are a sign of life too. If one packet in ten is lost in each direction, a ping (question and answer) fails
//! with probability 1 - 0.9^2 = 0.19. Even if it failed with 0.34, as if the search for the path had to
//! succeed too, all four pings of a look would fail with 0.014, and five looks in a row with 5e-10: with a
//! look every 8 seconds, once in 500 years.
//!
//! The same pings tell which path packets take. A peer that gets a connection after a quiet time is
//! pinged at once, so that the path of a short session is known before it ends.
//!
//! Invariants: a peer without connections is not pinged. A ping without an answer does not
//! count if this edge is off the tailnet or has no network. If the peer's name has changed and its address answers,
//! the peer is not silent. There is only one ping to a peer at a time, and the looks are at least a second apart.
//!
//! Deliberately not here: whether the mail server on it works (see `probe.rs`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::warn;

use crate::support::vital::{Vital, Vitals};
use crate::tailnet::{ConnectError, PingReport, Route};
use crate::upstream::dial::Dial;

/// How many looks in a row without a sign of life make a peer count as gone.
const LOOKS: u32 = 5;

/// This many looks without an answer are enough even if bytes still come: a slow client may only now read bytes
/// that arrived before the silence.
const LOOKS_BESIDE_BYTES: u32 = 3 * LOOKS;

/// How many pings a look has, and how long each may take, except the last: it gets the time that is left, for a
/// slow path.
const PINGS: u32 = 4;
const FIRST_PINGS_LIMIT: Duration = Duration::from_secs(1);

/// How long libtailscale checks, after a ping without an answer, whether this edge itself has a network.
const OWN_NETWORK_LIMIT: Duration = Duration::from_secs(2);

/// The shortest limit of a look: a few round trips over a relay.
const MIN_LOOK_LIMIT: Duration = Duration::from_secs(1);

/// How long after the reset the end of a connection may be noticed.
const GIVEN_UP: Duration = Duration::from_secs(2);

/// The least time between the beginnings of two looks.
const LEAST_PAUSE: Duration = Duration::from_secs(1);

/// The path to a peer, as of its last answer to a ping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Direct or over a relay.
    pub route: Route,
    /// The round trip.
    pub latency: Duration,
    /// When the answer came.
    pub seen: Instant,
}

/// A peer that connections go to.
#[derive(Debug)]
pub struct Peer {
    /// As the configuration names it.
    pub host: String,
    connections: AtomicUsize,
    /// When its connections were last reset.
    given_up: Mutex<Option<Instant>>,
    path: Mutex<Option<Path>>,
    made: Instant,
    /// When bytes last came from it, in milliseconds since it was made; 0 before the first.
    heard: AtomicU64,
    /// Notified when a first connection is made.
    awake: Notify,
}

/// A connection to a peer; it counts until it is dropped.
#[derive(Debug)]
pub struct Connected<'a>(&'a Peer);

impl Peer {
    /// A peer, by its name in the configuration.
    pub fn new(host: String) -> Peer {
        Peer {
            host,
            connections: AtomicUsize::new(0),
            given_up: Mutex::new(None),
            path: Mutex::new(None),
            made: Instant::now(),
            heard: AtomicU64::new(0),
            awake: Notify::new(),
        }
    }

    /// Counts a connection. It is reset when the peer is silent for too long.
    pub fn connected(&self) -> Connected<'_> {
        if self.connections.fetch_add(1, Ordering::Relaxed) == 0 {
            self.awake.notify_one();
        }
        Connected(self)
    }

    /// Notes that bytes come from it at this moment.
    pub fn speaks(&self) {
        let now = self.millis(Instant::now());
        // Written once a millisecond at most: many connections share it.
        if self.heard.load(Ordering::Relaxed) != now {
            self.heard.store(now, Ordering::Relaxed);
        }
    }

    /// Whether bytes came from it since then.
    pub fn has_spoken_since(&self, then: Instant) -> bool {
        let heard = self.heard.load(Ordering::Relaxed);
        heard > 0 && heard >= self.millis(then)
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.duration_since(self.made).as_millis()).map_or(u64::MAX, |millis| millis + 1)
    }

    /// Whether its connections were reset a moment ago because it is gone.
    pub fn is_given_up(&self) -> bool {
        let at = *self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        at.is_some_and(|at| at.elapsed() < GIVEN_UP)
    }

    /// The last known path to it; `None` before an answer to a ping.
    pub fn path(&self) -> Option<Path> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the path from an answer to a ping.
    pub fn answered(&self, report: &PingReport) {
        if report.answered && !(report.direct.is_empty() && report.relay.is_empty()) {
            let latency = Duration::try_from_secs_f64(report.latency_ms / 1e3).unwrap_or_default();
            let path = Path { route: report.route(), latency, seen: Instant::now() };
            *self.path.lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
        }
    }

    /// Returns when the next ping is due: at `turn` (false), or earlier (true) if a first connection is made and
    /// the peer gave no sign of life for `quiet`.
    async fn is_woken_before(&self, turn: Instant, quiet: Duration) -> bool {
        while timeout_at(turn, self.awake.notified()).await.is_ok() {
            if self.path().is_none_or(|path| path.seen.elapsed() > quiet) {
                return true;
            }
        }
        false
    }

    /// How many connections to it there are.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Every peer that is in use, each once, however many listeners name it. They are watched until this is dropped:
/// connections to a peer are reset within the limit after its last sign of life.
#[derive(Debug)]
pub struct Peers<D> {
    dialler: Arc<D>,
    limit: watch::Sender<Duration>,
    known: BTreeMap<String, Weak<Peer>>,
    vitals: Vitals,
    /// A task for each peer; it ends when the peer is no longer referenced.
    watching: Vec<Vital>,
}

impl<D: Dial> Peers<D> {
    /// No peers yet; `limit` is `timeouts.dead_peer`.
    pub fn new(dialler: Arc<D>, limit: Duration, vitals: Vitals) -> Peers<D> {
        let (known, watching) = (BTreeMap::new(), Vec::new());
        Peers { dialler, limit: watch::Sender::new(limit), known, vitals, watching }
    }

    /// The peer of that name, which is watched for as long as it is referenced. Must be called within a tokio
    /// runtime.
    pub fn get(&mut self, host: &str) -> Arc<Peer> {
        if let Some(peer) = self.known.get(host).and_then(Weak::upgrade) {
            return peer;
        }
        let peer = Arc::new(Peer::new(host.to_owned()));
        self.known.retain(|_, peer| peer.strong_count() > 0);
        self.known.insert(host.to_owned(), Arc::downgrade(&peer));
        self.watching.retain(|task| !task.is_finished());
        let watch = keep_watch(Arc::clone(&self.dialler), Arc::downgrade(&peer), self.limit.subscribe());
        self.watching.push(self.vitals.spawn_finite(format!("watch peer {host}"), watch));
        peer
    }

    /// The peers that are still referenced.
    pub fn known(&self) -> Vec<Weak<Peer>> {
        self.known.values().filter(|peer| peer.strong_count() > 0).cloned().collect()
    }

    /// Changes the limit, from each peer's next ping on.
    pub fn set_limit(&self, limit: Duration) {
        self.limit.send_replace(limit);
    }
}

/// Watches a peer until it is no longer referenced.
async fn keep_watch<D: Dial>(dialler: Arc<D>, peer: Weak<Peer>, limit: watch::Receiver<Duration>) {
    let mut unheard = Unheard::default();
    // Remembered, since a peer that is removed or has another name has no address by its name any more.
    let mut address = None;
    while let Some(peer) = peer.upgrade() {
        let began = Instant::now();
        let limit = *limit.borrow();
        let interval = limit / (LOOKS + 1); // the first look may come up to an interval late
        let look_limit = interval.saturating_sub(OWN_NETWORK_LIMIT).max(MIN_LOOK_LIMIT);
        if peer.connections() > 0 && is_silent(&*dialler, &peer, look_limit, &mut address).await {
            unheard.goes_on(&peer, began);
        } else {
            unheard = Unheard::default();
        }
        if let (true, Some(address)) = (unheard.is_long(), address) {
            let (upstream, connections) = (&peer.host, peer.connections());
            warn!(
                upstream,
                connections,
                "the mailbox's node has not answered for {limit:?}: closing its connections; check that it runs and has a network"
            );
            *peer.given_up.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            dialler.abort(address);
            unheard = Unheard::default();
        }
        if peer.is_woken_before(began + interval, interval).await {
            unheard = Unheard::default(); // a peer that has just accepted a connection is there
            sleep_until(began + LEAST_PAUSE).await;
        }
    }
}

/// Looks in a row without an answer.
#[derive(Default)]
struct Unheard {
    looks: u32,
    /// The looks among them that began after the peer's last byte.
    looks_since_byte: u32,
    /// When the last look began.
    began: Option<Instant>,
}

impl Unheard {
    /// Counts another look.
    fn goes_on(&mut self, peer: &Peer, began: Instant) {
        self.looks += 1;
        self.looks_since_byte = match self.began {
            _ if peer.has_spoken_since(began) => 0,
            Some(before) if peer.has_spoken_since(before) => 1,
            _ => self.looks_since_byte + 1,
        };
        self.began = Some(began);
    }

    fn is_long(&self) -> bool {
        self.looks_since_byte >= LOOKS || self.looks >= LOOKS_BESIDE_BYTES
    }
}

/// One look: whether the peer is silent. False also if the silence is not the peer's fault.
async fn is_silent<D: Dial>(dialler: &D, peer: &Peer, limit: Duration, address: &mut Option<IpAddr>) -> bool {
    let (until, share) = (Instant::now() + limit, FIRST_PINGS_LIMIT.min(limit / PINGS));
    for ping in 1.. {
        let left = until.saturating_duration_since(Instant::now());
        let is_last = ping == PINGS || left <= share;
        match ping_wherever(dialler, peer, if is_last { left.max(share) } else { share }, *address).await {
            Ok(report) => {
                peer.answered(&report);
                *address = Some(report.ip);
                if report.answered || !report.network {
                    return false;
                }
            }
            // It was removed, or the policy hides it: its connections are dead too.
            Err(ConnectError::NoSuchPeer) => return true,
            Err(_) => return false,
        }
        if is_last {
            break;
        }
    }
    true
}

/// Pings a peer by its name, and if no peer has that name any more, at its last address.
async fn ping_wherever<D: Dial>(
    dialler: &D,
    peer: &Peer,
    limit: Duration,
    address: Option<IpAddr>,
) -> Result<PingReport, ConnectError> {
    match (dialler.ping(&peer.host, limit).await, address) {
        (Err(ConnectError::NoSuchPeer), Some(address)) => dialler.ping(&address.to_string(), limit).await,
        (asked, _) => asked,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use tokio::net::TcpStream;
    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(50);
    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(100, 64, 0, 1));

    /// Answers a ping at once, or not at all; notes when connections are reset.
    struct Pinged {
        answer: Mutex<Result<bool, ConnectError>>,
        /// How long an answer takes.
        delay: Mutex<Duration>,
        /// The pings in progress.
        asked: AtomicUsize,
        pings: Mutex<Vec<Instant>>,
        aborted: Mutex<Vec<Instant>>,
        /// Whether nobody has its name any more.
        renamed: AtomicBool,
        /// The share of pings that are lost, of 1000, and what decides which.
        lost: AtomicU64,
        dice: AtomicU64,
    }

    impl Pinged {
        /// Whether the next ping is lost (xorshift).
        fn is_lost(&self) -> bool {
            let mut x = self.dice.load(Ordering::Relaxed);
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            self.dice.store(x, Ordering::Relaxed);
            x % 1000 < self.lost.load(Ordering::Relaxed)
        }

        fn answers(&self, answer: Result<bool, ConnectError>) {
            *self.answer.lock().unwrap() = answer;
        }

        /// How long after `began` connections were reset for the first time.
        fn aborted_after(&self, began: Instant) -> Option<Duration> {
            self.aborted.lock().unwrap().first().map(|at| *at - began)
        }
    }

    impl Dial for Pinged {
        type Stream = TcpStream;

        async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
            Err(ConnectError::Refused)
        }

        async fn ping(&self, host: &str, limit: Duration) -> Result<PingReport, ConnectError> {
            if self.renamed.load(Ordering::Relaxed) && host != ADDRESS.to_string() {
                return Err(ConnectError::NoSuchPeer);
            }
            assert_eq!(self.asked.fetch_add(1, Ordering::Relaxed), 0, "one at a time");
            self.pings.lock().unwrap().push(Instant::now());
            let delay = *self.delay.lock().unwrap();
            sleep(delay).await;
            self.asked.fetch_sub(1, Ordering::Relaxed);
            let answer = *self.answer.lock().unwrap();
            let answered = answer? && !self.is_lost();
            if !answered {
                sleep(limit).await;
            }
            let (direct, relay, last_seen) = ("192.0.2.7:41641".to_owned(), String::new(), String::new());
            Ok(PingReport {
                ip: ADDRESS,
                answered,
                latency_ms: 1.0,
                direct,
                relay,
                online: true,
                network: true,
                last_seen,
            })
        }

        fn abort(&self, peer: IpAddr) {
            assert_eq!(peer, ADDRESS);
            self.aborted.lock().unwrap().push(Instant::now());
        }
    }

    fn start() -> (Arc<Pinged>, Arc<Peer>, Peers<Pinged>) {
        let dialler = Arc::new(Pinged {
            answer: Mutex::new(Ok(true)),
            delay: Mutex::default(),
            asked: AtomicUsize::new(0),
            pings: Mutex::default(),
            aborted: Mutex::default(),
            renamed: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            dice: AtomicU64::new(0x9E37_79B9_7F4A_7C15),
        });
        let mut peers = Peers::new(Arc::clone(&dialler), LIMIT, Vitals::new().0);
        let peer = peers.get("stalwart");
        assert!(Arc::ptr_eq(&peer, &peers.get("stalwart")), "one for all listeners");
        (dialler, peer, peers)
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_goes_silent_or_is_removed_loses_its_connections_in_time() {
        for gone in [Ok(false), Err(ConnectError::NoSuchPeer)] {
            let (dialler, peer, _peers) = start();
            let _connected = peer.connected();
            sleep(Duration::from_secs(35 * 60)).await;
            assert_eq!(dialler.aborted_after(Instant::now()), None, "it answers");
            let began = Instant::now();
            dialler.answers(gone);
            sleep(LIMIT).await;
            let took = dialler.aborted_after(began).expect("its connections are reset");
            assert!((LIMIT / 2..=LIMIT).contains(&took), "{took:?}");
        }
    }

    /// With one ping a look it does, within the same time.
    #[tokio::test(start_paused = true)]
    async fn a_path_that_loses_every_tenth_packet_costs_no_connection() {
        let (dialler, peer, _peers) = start();
        let _connected = peer.connected();
        dialler.lost.store(344, Ordering::Relaxed); // 1 - 0.9^4
        sleep(Duration::from_secs(7 * 24 * 3600)).await;
        assert_eq!(dialler.aborted_after(Instant::now()), None);
        let began = Instant::now();
        dialler.answers(Ok(false));
        sleep(LIMIT).await;
        let took = dialler.aborted_after(began).expect("a dead one is found all the same");
        assert!((LIMIT / 2..=LIMIT).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_are_a_sign_of_life_for_some_time() {
        let (dialler, peer, _peers) = start();
        let _connected = peer.connected();
        sleep(LIMIT).await;
        dialler.answers(Ok(false));
        for _ in 0..12 {
            sleep(LIMIT / 10).await;
            peer.speaks();
        }
        assert_eq!(dialler.aborted_after(Instant::now()), None);
        let last = Instant::now();
        sleep(LIMIT).await;
        let took = dialler.aborted_after(last).expect("its connections are reset");
        assert!((LIMIT / 2..=LIMIT).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_alone_do_not_keep_a_peer_alive_for_ever() {
        let (dialler, peer, _peers) = start();
        let _connected = peer.connected();
        sleep(LIMIT).await;
        let began = Instant::now();
        dialler.answers(Ok(false));
        while dialler.aborted_after(began).is_none() {
            peer.speaks();
            sleep(Duration::from_secs(1)).await;
            assert!(began.elapsed() < LIMIT * 3, "a slow client has it look alive");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_with_another_name_keeps_its_connections_while_its_address_answers() {
        let (dialler, peer, _peers) = start();
        let _connected = peer.connected();
        sleep(LIMIT).await;
        dialler.renamed.store(true, Ordering::Relaxed);
        sleep(LIMIT * 10).await;
        assert_eq!(dialler.aborted_after(Instant::now()), None);
        let began = Instant::now();
        dialler.answers(Ok(false));
        sleep(LIMIT).await;
        assert!(dialler.aborted_after(began).is_some(), "until that is silent, too");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_that_ends_in_time_is_forgotten() {
        let (dialler, peer, _peers) = start();
        let _connected = peer.connected();
        for _ in 0..10 {
            dialler.answers(Ok(false));
            sleep(LIMIT / 2).await;
            dialler.answers(Ok(true));
            sleep(Duration::from_secs(15)).await;
        }
        assert_eq!(dialler.aborted_after(Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_absence_is_not_the_peers_silence() {
        let (dialler, peer, _peers) = start();
        let _connected = peer.connected();
        sleep(LIMIT).await;
        dialler.answers(Err(ConnectError::NotRunning));
        sleep(Duration::from_secs(3600)).await;
        assert_eq!(dialler.aborted_after(Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn another_limit_holds_for_peers_that_are_known() {
        let (dialler, peer, peers) = start();
        let _connected = peer.connected();
        sleep(LIMIT).await;
        peers.set_limit(LIMIT * 4);
        sleep(LIMIT).await; // the last ping of the old pace is over
        let began = Instant::now();
        dialler.answers(Ok(false));
        sleep(LIMIT * 4).await;
        let took = dialler.aborted_after(began).expect("its connections are reset");
        assert!((LIMIT * 2..=LIMIT * 4).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_nobody_has_any_more_is_not_watched() {
        let (_dialler, peer, mut peers) = start();
        let known = peers.known();
        drop(peer);
        sleep(LIMIT).await;
        assert!(known[0].upgrade().is_none() && peers.known().is_empty(), "nor shown");
        assert!(peers.watching[0].is_finished());
        let again = peers.get("stalwart");
        assert_eq!((again.connections(), peers.known.len()), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_without_connections_is_left_in_peace() {
        let (dialler, peer, _peers) = start();
        dialler.answers(Ok(false));
        sleep(Duration::from_secs(600)).await;
        assert_eq!(dialler.pings.lock().unwrap()[..], []);
        // Nor does the time without any count against it.
        let _connected = peer.connected();
        sleep(LIMIT / 2).await;
        assert_eq!(dialler.aborted_after(Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_path_is_known_soon_after_a_quiet_time() {
        let (dialler, peer, _task) = start();
        sleep(LIMIT * 3 + Duration::from_millis(10)).await;
        assert_eq!(peer.path(), None);
        let began = Instant::now();
        drop(peer.connected()); // gone before its ping
        let _connected = peer.connected();
        sleep(Duration::from_millis(1)).await;
        let path = peer.path().expect("it has answered");
        assert_eq!(
            (path.route.to_string(), path.latency, path.seen),
            ("direct 192.0.2.7:41641".to_owned(), Duration::from_millis(1), began)
        );
        assert_eq!(dialler.pings.lock().unwrap()[..], [began]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_short_sessions_is_no_flood_of_pings() {
        let (dialler, peer, _task) = start();
        *dialler.delay.lock().unwrap() = Duration::from_millis(300);
        for answer in [Ok(true), Err(ConnectError::Internal(crate::tailnet::Code::Error))] {
            dialler.answers(answer);
            for _ in 0..1000 {
                let _connected = peer.connected();
                sleep(Duration::from_millis(100)).await;
            }
        }
        let pings = dialler.pings.lock().unwrap();
        let apart = |pings: &[Instant]| pings.windows(2).map(|two| two[1] - two[0]).min();
        let (answered, failed) = pings.split_at(13); // of 100 seconds each
        assert!(apart(answered) >= Some(LIMIT / (LOOKS + 1)), "{:?}", apart(answered));
        assert!(apart(failed) >= Some(LEAST_PAUSE) && failed.len() > 50, "{:?}", failed.len());
    }
}
