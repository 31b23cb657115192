use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpStream;

use super::*;
use crate::tailnet::PingReport;
use crate::upstream::dial::Reset;
use crate::upstream::server::{DOUBT, FINDING_LIFE};

/// Never connects; answers a ping with what it is given, after a second.
struct Silent {
    ping: Result<PingReport, ConnectError>,
    pings: AtomicUsize,
}

impl Dial for Silent {
    type Stream = TcpStream;

    async fn dial(&self, _: &str, _: u16) -> Result<TcpStream, ConnectError> {
        pending().await
    }

    async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
        self.pings.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.ping.clone()
    }
}

fn report(answered: bool, online: bool, last_seen: &str) -> PingReport {
    let (direct, relay, last_seen) = (String::new(), String::new(), last_seen.to_owned());
    PingReport {
        ip: [100, 64, 0, 1].into(),
        answered,
        latency_ms: 1.0,
        direct,
        relay,
        online,
        network: true,
        last_seen,
    }
}

fn silent(ping: Result<PingReport, ConnectError>) -> (Arc<Silent>, Upstream<Silent>) {
    let dialler = Arc::new(Silent { ping, pings: AtomicUsize::new(0) });
    let upstream = upstream(Arc::clone(&dialler), &["stalwart"], Duration::from_secs(5));
    (dialler, upstream)
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_began_before_a_success_is_old_news() {
    let (dialler, upstream) = switched(&["a"]);
    dialler.set("a", Answer::Silence);
    let slow = tokio::spawn({
        let upstream = Arc::clone(&upstream);
        async move { upstream.connect().await.is_err() }
    });
    sleep(Duration::from_secs(1)).await;
    dialler.set("a", Answer::Connect);
    assert_eq!(connected_host(&upstream).await, "a");
    dialler.set("a", Answer::Silence);
    assert!(slow.await.unwrap_or(true));
    assert!(!upstream.is_away());
}

fn upstream<D: Dial>(dialler: Arc<D>, hosts: &[&str], limit: Duration) -> Upstream<D> {
    let peers = hosts.iter().map(|host| Arc::new(Peer::new((*host).to_owned()))).collect();
    Upstream::new(dialler, peers, 25, limit)
}

async fn message(ping: Result<PingReport, ConnectError>) -> String {
    silent(ping).1.connect().await.unwrap_err().to_string()
}

#[tokio::test(start_paused = true)]
async fn a_silent_port_is_told_from_a_silent_peer() {
    let port = message(Ok(report(true, true, ""))).await;
    assert!(
        port.starts_with("no answer within 5s: the peer itself answers a ping, so an access rule"),
        "{port}"
    );
    let peer = message(Ok(report(false, true, ""))).await;
    assert!(peer.contains("although the control server sees it"), "{peer}");
    let offline = message(Ok(report(false, false, "2026-01-02T03:04:05Z"))).await;
    assert!(offline.contains("the peer is offline, last seen 2026-01-02T03:04:05Z;"), "{offline}");
    let never_seen = message(Ok(report(false, false, ""))).await;
    assert!(never_seen.contains("the peer is offline; start it"), "{never_seen}");
    let gone = message(Err(ConnectError::NoSuchPeer)).await;
    assert!(gone.contains("and the peer cannot be pinged: the tailnet shows this edge no peer"), "{gone}");
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_connections_is_one_ping_and_each_waits_its_limit() {
    let (dialler, upstream) = silent(Ok(report(false, false, "")));
    let upstream = Arc::new(upstream);
    let started = Instant::now();
    let mut flood = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let upstream = Arc::clone(&upstream);
        flood.spawn(async move { upstream.connect().await.is_err() });
    }
    assert!(flood.join_all().await.into_iter().all(|failed| failed));
    assert_eq!(started.elapsed().as_secs(), 6, "5 s to connect and 1 s for the ping");
    assert_eq!(dialler.pings.load(Ordering::Relaxed), 1);
    tokio::time::advance(FINDING_LIFE).await;
    upstream.connect().await.unwrap_err();
    assert_eq!(dialler.pings.load(Ordering::Relaxed), 2, "an old finding is not told");
}

/// Each host refuses, connects, or is silent, as the test says; every dial is noted.
#[derive(Default)]
struct Switched {
    hosts: std::sync::Mutex<std::collections::HashMap<String, Answer>>,
    dials: std::sync::Mutex<Vec<String>>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
}

#[derive(Clone, Copy, PartialEq)]
enum Answer {
    Refuse,
    Connect,
    Silence,
}

impl Switched {
    fn set(&self, host: &str, answer: Answer) {
        self.hosts.lock().unwrap().insert(host.to_owned(), answer);
    }

    fn dials(&self) -> Vec<String> {
        std::mem::take(&mut *self.dials.lock().unwrap())
    }
}

impl Dial for Switched {
    type Stream = tokio::io::DuplexStream;

    async fn dial(&self, host: &str, _: u16) -> Result<Self::Stream, ConnectError> {
        self.dials.lock().unwrap().push(host.to_owned());
        let at_once = 1 + self.at_once.fetch_add(1, Ordering::Relaxed);
        self.most_at_once.fetch_max(at_once, Ordering::Relaxed);
        sleep(Duration::from_millis(1)).await;
        self.at_once.fetch_sub(1, Ordering::Relaxed);
        let answer = self.hosts.lock().unwrap().get(host).copied();
        match answer.unwrap_or(Answer::Refuse) {
            Answer::Refuse => Err(ConnectError::Refused),
            Answer::Connect => Ok(tokio::io::duplex(1).0),
            Answer::Silence => pending().await,
        }
    }

    async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
        Ok(report(true, true, ""))
    }
}

impl Reset for tokio::io::DuplexStream {
    fn reset(&mut self) {}
}

const LIMIT: Duration = Duration::from_secs(8);

fn switched(hosts: &[&str]) -> (Arc<Switched>, Arc<Upstream<Switched>>) {
    let dialler = Arc::new(Switched::default());
    (Arc::clone(&dialler), Arc::new(upstream(dialler, hosts, LIMIT)))
}

async fn connected_host(upstream: &Upstream<Switched>) -> String {
    upstream.connect().await.expect("one can be reached").server.host().to_owned()
}

#[tokio::test(start_paused = true)]
async fn servers_are_tried_in_their_order() {
    let (dialler, upstream) = switched(&["a", "b", "c"]);
    dialler.set("b", Answer::Connect);
    dialler.set("c", Answer::Connect);
    assert_eq!(connected_host(&upstream).await, "b");
    assert_eq!(dialler.dials(), ["a", "b"]);
    dialler.set("a", Answer::Connect);
    assert_eq!(connected_host(&upstream).await, "a", "the first one, as soon as it is there");
}

#[tokio::test(start_paused = true)]
async fn a_server_whose_probe_fails_is_tried_last_until_it_passes() {
    let (dialler, upstream) = switched(&["a", "b"]);
    dialler.set("a", Answer::Silence);
    dialler.set("b", Answer::Connect);
    upstream.found(&upstream.servers()[0], false);
    assert_eq!(connected_host(&upstream).await, "b");
    assert_eq!(dialler.dials(), ["b"], "nobody waits for the first one");
    dialler.set("a", Answer::Connect);
    dialler.set("b", Answer::Refuse);
    assert_eq!(connected_host(&upstream).await, "a", "the probe may be wrong");
    upstream.found(&upstream.servers()[0], true);
    dialler.set("b", Answer::Connect);
    assert_eq!(connected_host(&upstream).await, "a");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_costs_time_is_tried_last_for_a_while() {
    let (dialler, upstream) = switched(&["a", "b"]);
    dialler.set("a", Answer::Silence);
    dialler.set("b", Answer::Connect);
    assert_eq!(connected_host(&upstream).await, "b");
    dialler.dials();
    assert_eq!(connected_host(&upstream).await, "b");
    assert_eq!(dialler.dials(), ["b"], "nobody waits for the first one again");
    dialler.set("a", Answer::Connect);
    tokio::time::advance(DOUBT).await;
    assert_eq!(connected_host(&upstream).await, "a");
    upstream.suspect(&upstream.servers()[0], Failure::Wordless);
    assert_eq!(connected_host(&upstream).await, "b");
    upstream.servers()[0].greeted(Instant::now() - Duration::from_secs(1));
    assert_eq!(connected_host(&upstream).await, "b", "that was before");
    upstream.servers()[0].greeted(Instant::now());
    assert_eq!(connected_host(&upstream).await, "a", "its probe knows better");
}

#[tokio::test(start_paused = true)]
async fn every_failure_is_told() {
    let (dialler, upstream) = switched(&["a", "fd7a::1"]);
    dialler.set("fd7a::1", Answer::Silence);
    let error = upstream.connect().await.expect_err("neither can be reached");
    let text = error.to_string();
    assert!(text.starts_with("a:25: the peer refused the connection; check"), "{text}");
    assert!(text.contains("; [fd7a::1]:25: no answer within 8s: the peer itself answers a ping"), "{text}");
    assert_eq!(upstream.away(), Some(error));
}

#[tokio::test(start_paused = true)]
async fn a_lost_first_attempt_is_made_good_by_a_second() {
    struct SecondWins(AtomicUsize);
    impl Dial for SecondWins {
        type Stream = tokio::io::DuplexStream;
        async fn dial(&self, _: &str, _: u16) -> Result<Self::Stream, ConnectError> {
            match self.0.fetch_add(1, Ordering::Relaxed) {
                0 => pending().await,
                _ => Ok(tokio::io::duplex(1).0),
            }
        }
        async fn ping(&self, _: &str, _: Duration) -> Result<PingReport, ConnectError> {
            Err(ConnectError::NoSuchPeer)
        }
    }
    let upstream = upstream(Arc::new(SecondWins(AtomicUsize::new(0))), &["a"], LIMIT);
    let began = Instant::now();
    upstream.connect().await.expect("the second one connects");
    assert_eq!(began.elapsed(), SECOND_ATTEMPT);
}

#[tokio::test(start_paused = true)]
async fn of_all_who_wait_one_tries_and_all_follow() {
    let (dialler, upstream) = switched(&["a"]);
    assert!(upstream.connect().await.is_err());
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..1000 {
        let upstream = Arc::clone(&upstream);
        waiting.spawn(async move { upstream.reconnect().await });
    }
    dialler.dials();
    sleep(Duration::from_secs(30)).await;
    // After 0, 0.1, 0.3, 0.7, 1.5 and 3.1 s, and then every two seconds.
    assert!((15..=20).contains(&dialler.dials().len()), "one at a time, with pauses");
    dialler.most_at_once.store(0, Ordering::Relaxed);
    dialler.set("a", Answer::Connect);
    let came_back = Instant::now();
    while waiting.join_next().await.is_some() {}
    assert!(came_back.elapsed() < PAUSE_LAST + Duration::from_millis(100), "{:?}", came_back.elapsed());
    assert!(dialler.most_at_once.load(Ordering::Relaxed) <= RETURNING + 1, "not all at once");
    assert_eq!(dialler.dials().len(), 1000);
    assert_eq!(upstream.away(), None);
}

#[tokio::test(start_paused = true)]
async fn when_the_one_who_tries_leaves_another_one_does() {
    let (dialler, upstream) = switched(&["a"]);
    assert!(upstream.connect().await.is_err());
    let mut first = Box::pin(upstream.reconnect());
    assert!(timeout(Duration::from_secs(3), &mut first).await.is_err());
    let mut second = Box::pin(upstream.reconnect());
    assert!(timeout(Duration::from_secs(3), &mut second).await.is_err());
    drop(first);
    dialler.set("a", Answer::Connect);
    timeout(PAUSE_LAST * 2, second).await.expect("it tries");
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_passes_brings_those_who_wait_back() {
    let (dialler, upstream) = switched(&["a"]);
    assert!(upstream.connect().await.is_err());
    let turn = upstream.turn.lock().await; // nobody tries
    let mut waiting = Box::pin(upstream.reconnect());
    assert!(timeout(Duration::from_secs(60), &mut waiting).await.is_err());
    dialler.set("a", Answer::Connect);
    upstream.found(&upstream.servers()[0], true);
    timeout(Duration::from_millis(100), waiting).await.expect("it tries at once");
    drop(turn);
}

#[test]
fn an_upstream_is_written_as_people_write_it() {
    for (host, expected) in
        [("stalwart", "stalwart:25"), ("100.64.0.1", "100.64.0.1:25"), ("fd7a::1", "[fd7a::1]:25")]
    {
        let (dialler, _) = silent(Err(ConnectError::NoSuchPeer));
        let upstream = upstream(dialler, &[host], Duration::from_secs(5));
        assert_eq!(upstream.to_string(), expected);
    }
}
