use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, Interest, SimplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{advance, sleep};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::protocol::Protocol;
use crate::upstream::dial::Reset;

const TIMEOUTS: Timeouts = Timeouts {
    idle: Duration::from_secs(35 * 60),
    half_close: Duration::from_secs(60),
    quiet: Duration::from_secs(1),
};

/// What a pipe holds before its writer has to wait.
const PIPE_BYTES: usize = 1000;

/// A relay between two in-memory pipes: the client's end, the upstream's end,
/// and the relay itself.
fn start(
    drain: impl Future<Output = ()> + Send + 'static,
) -> (DuplexStream, DuplexStream, JoinHandle<Outcome>) {
    start_counting(drain, &Moved::default())
}

/// How many bytes a relay says have moved: to the upstream, and to the client.
#[derive(Clone, Default)]
struct Moved(Arc<(AtomicU64, AtomicU64)>);

impl Moved {
    fn bytes(&self) -> (u64, u64) {
        (self.0.0.load(Ordering::Relaxed), self.0.1.load(Ordering::Relaxed))
    }
}

fn start_counting(
    drain: impl Future<Output = ()> + Send + 'static,
    moved: &Moved,
) -> (DuplexStream, DuplexStream, JoinHandle<Outcome>) {
    let moved = moved.clone();
    let count = move |sent, received| {
        moved.0.0.fetch_add(sent, Ordering::Relaxed);
        moved.0.1.fetch_add(received, Ordering::Relaxed);
    };
    let (client, mut near_client) = duplex(PIPE_BYTES);
    let (upstream, mut near_upstream) = duplex(PIPE_BYTES);
    let relayed = async move {
        relay(&mut near_client, &mut near_upstream, TIMEOUTS, FirstWords::default(), count, drain, pending())
            .await
    };
    (client, upstream, tokio::spawn(relayed))
}

/// Bytes that differ from place to place.
fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i % 251) as u8).collect()
}

async fn read_exactly(stream: &mut DuplexStream, expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(got, expected);
}

#[tokio::test]
async fn a_client_that_has_finished_sending_gets_the_whole_reply() {
    let moved = Moved::default();
    let (mut client, mut upstream, relay) = start_counting(pending(), &moved);
    let (request, reply) = (pattern(300_000), pattern(400_000));
    let server = {
        let (request, reply) = (request.clone(), reply.clone());
        tokio::spawn(async move {
            let mut got = Vec::new();
            upstream.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, request);
            upstream.write_all(&reply).await.unwrap();
        })
    };
    client.write_all(&request).await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, reply);
    server.await.unwrap();
    let outcome = relay.await.unwrap();
    assert!(matches!(outcome.end, End::Closed { first: Side::Client }), "{outcome:?}");
    assert_eq!(moved.bytes(), (300_000, 400_000));
}

#[tokio::test]
async fn an_upstream_that_has_finished_sending_gets_the_rest_too() {
    let moved = Moved::default();
    let (mut client, mut upstream, relay) = start_counting(pending(), &moved);
    upstream.write_all(b"220 hello\r\n").await.unwrap();
    upstream.shutdown().await.unwrap();
    read_exactly(&mut client, b"220 hello\r\n").await;
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    client.write_all(b"QUIT\r\n").await.unwrap();
    client.shutdown().await.unwrap();
    read_exactly(&mut upstream, b"QUIT\r\n").await;
    let outcome = relay.await.unwrap();
    assert!(matches!(outcome.end, End::Closed { first: Side::Upstream }), "{outcome:?}");
    assert_eq!(moved.bytes(), (6, 11));
    assert!(outcome.first_byte.is_some());
}

#[tokio::test]
async fn one_slow_reader_holds_up_its_own_direction_only() {
    let moved = Moved::default();
    let (mut client, upstream, relay) = start_counting(pending(), &moved);
    let flood = pattern(500_000);
    let (mut from_relay, mut to_relay) = tokio::io::split(upstream);
    let flooding = {
        let flood = flood.clone();
        tokio::spawn(async move {
            to_relay.write_all(&flood).await.unwrap();
            to_relay.shutdown().await.unwrap();
        })
    };
    // The client reads nothing yet, and is still heard.
    for _ in 0..20 {
        client.write_all(&pattern(PIPE_BYTES)).await.unwrap();
        let mut got = vec![0; PIPE_BYTES];
        from_relay.read_exact(&mut got).await.unwrap();
        assert_eq!(got, pattern(PIPE_BYTES));
    }
    assert!(!flooding.is_finished(), "the relay has taken more than it may keep");
    read_exactly(&mut client, &flood).await;
    flooding.await.unwrap();
    drop(client);
    relay.await.unwrap();
    assert_eq!(moved.bytes(), (20_000, 500_000));
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_ends_after_the_idle_time_out() {
    let (_client, _upstream, relay) = start(pending());
    let started = Instant::now();
    let outcome = relay.await.unwrap();
    assert!(matches!(outcome.end, End::Idle), "{outcome:?}");
    assert_eq!(started.elapsed().as_secs(), TIMEOUTS.idle.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_byte_either_way_starts_the_idle_time_out_afresh() {
    let (mut client, mut upstream, relay) = start(pending());
    for _ in 0..5 {
        advance(TIMEOUTS.idle - Duration::from_secs(1)).await;
        client.write_all(b"n").await.unwrap();
        read_exactly(&mut upstream, b"n").await;
        advance(TIMEOUTS.idle - Duration::from_secs(1)).await;
        upstream.write_all(b"*").await.unwrap();
        read_exactly(&mut client, b"*").await;
    }
    assert!(!relay.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_connection_ends_after_the_half_close_time_out_without_progress() {
    let (mut client, mut upstream, relay) = start(pending());
    client.shutdown().await.unwrap();
    assert_eq!(upstream.read(&mut [0]).await.unwrap(), 0);
    let mut last = Instant::now();
    for _ in 0..3 {
        sleep(TIMEOUTS.half_close - Duration::from_secs(1)).await;
        upstream.write_all(b"x").await.unwrap();
        read_exactly(&mut client, b"x").await;
        last = Instant::now();
    }
    let outcome = relay.await.unwrap();
    assert!(matches!(outcome.end, End::HalfClosed { first: Side::Client }), "{outcome:?}");
    assert_eq!(last.elapsed().as_secs(), TIMEOUTS.half_close.as_secs());
}

#[tokio::test(start_paused = true)]
async fn draining_ends_a_connection_that_waits_for_its_client() {
    let drain = CancellationToken::new();
    let (mut client, mut upstream, relay) = start(drain.clone().cancelled_owned());
    upstream.write_all(b"220\r\n").await.unwrap();
    read_exactly(&mut client, b"220\r\n").await;
    drain.cancel();
    for _ in 0..20 {
        sleep(TIMEOUTS.quiet / 2).await;
        client.write_all(b"NOOP\r\n").await.unwrap();
        read_exactly(&mut upstream, b"NOOP\r\n").await;
        upstream.write_all(b"250\r\n").await.unwrap();
        read_exactly(&mut client, b"250\r\n").await;
    }
    let last = Instant::now();
    let outcome = relay.await.unwrap();
    assert!(matches!(outcome.end, End::Drained), "{outcome:?}");
    assert!(!outcome.unfinished);
    assert_eq!(last.elapsed().as_secs(), TIMEOUTS.quiet.as_secs());
}

#[tokio::test(start_paused = true)]
async fn draining_waits_for_the_reply_to_a_message() {
    let drain = CancellationToken::new();
    let (mut client, mut upstream, relay) = start(drain.clone().cancelled_owned());
    client.write_all(b".\r\n").await.unwrap();
    read_exactly(&mut upstream, b".\r\n").await;
    drain.cancel();
    sleep(30 * TIMEOUTS.quiet).await;
    assert!(!relay.is_finished(), "closed although the mailbox is at work");
    upstream.write_all(b"250 queued\r\n").await.unwrap();
    read_exactly(&mut client, b"250 queued\r\n").await;
    let outcome = relay.await.unwrap();
    assert!(matches!(outcome.end, End::Drained), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn draining_knows_a_reply_that_comes_at_once() {
    let (mut client, mut near_client) = duplex(PIPE_BYTES);
    client.write_all(b"NOOP\r\n").await.unwrap();
    let drained = std::future::ready(());
    let mut upstream = SimplexStream::new_unsplit(PIPE_BYTES); // gives what it gets, at once
    let first_words = FirstWords::default();
    let began = Instant::now();
    let outcome =
        relay(&mut near_client, &mut upstream, TIMEOUTS, first_words, |_, _| {}, drained, pending()).await;
    assert!(matches!(outcome.end, End::Drained), "{outcome:?}");
    assert_eq!(began.elapsed().as_secs(), TIMEOUTS.quiet.as_secs());
    read_exactly(&mut client, b"NOOP\r\n").await;
}

#[tokio::test(start_paused = true)]
async fn draining_takes_no_earlier_reply_for_the_one_to_a_message() {
    let drain = CancellationToken::new();
    let (mut client, mut near_client) = duplex(PIPE_BYTES);
    let (mut upstream, mut near_upstream) = duplex(PIPE_BYTES);
    // Both are there before the relay looks.
    upstream.write_all(b"354\r\n").await.unwrap();
    client.write_all(b".\r\n").await.unwrap();
    let drained = drain.clone().cancelled_owned();
    let relay = tokio::spawn(async move {
        let first_words = FirstWords::default();
        relay(&mut near_client, &mut near_upstream, TIMEOUTS, first_words, |_, _| {}, drained, pending())
            .await
    });
    drain.cancel();
    sleep(30 * TIMEOUTS.quiet).await;
    assert!(!relay.is_finished(), "closed although the mailbox is at work");
}

#[tokio::test(start_paused = true)]
async fn a_cut_with_bytes_on_their_way_is_told() {
    let (_client, mut upstream, relay) = start(pending());
    // The client reads nothing; its pipe fills up, and then the relay keeps.
    upstream.write_all(&pattern(2 * PIPE_BYTES)).await.unwrap();
    let outcome = relay.await.unwrap();
    assert!(matches!(outcome.end, End::Idle), "{outcome:?}");
    assert!(outcome.unfinished);
}

/// Two connected sockets.
async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

async fn reset_by(side: Side) -> Outcome {
    let (client, mut near_client) = socket_pair().await;
    let (upstream, mut near_upstream) = socket_pair().await;
    let (mut failing, mut other) = match side {
        Side::Client => (client, upstream),
        Side::Upstream => (upstream, client),
    };
    failing.write_all(b"before").await.unwrap();
    let relay = tokio::spawn(async move {
        relay(
            &mut near_client,
            &mut near_upstream,
            TIMEOUTS,
            FirstWords::default(),
            |_, _| {},
            pending(),
            pending(),
        )
        .await
    });
    let mut got = [0; 6];
    other.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"before");
    failing.reset();
    drop(failing);
    relay.await.unwrap()
}

#[tokio::test]
async fn a_reset_names_its_side() {
    for expected in [Side::Client, Side::Upstream] {
        let outcome = reset_by(expected).await;
        let End::Failed { side, error } = outcome.end else { panic!("{outcome:?}") };
        assert_eq!((side, error.kind()), (expected, io::ErrorKind::ConnectionReset));
    }
}

#[tokio::test]
async fn a_reset_that_was_told_before_is_still_called_one() {
    const TOLD: &str = "Connection reset by peer (os error 104)";
    let (client, mut near_client) = socket_pair().await;
    let (mut upstream, mut near_upstream) = socket_pair().await;
    { client }.reset();
    near_client.ready(Interest::ERROR).await.unwrap();
    assert!(near_client.take_error().unwrap().is_some(), "the kernel tells it once");
    upstream.write_all(b"too late").await.unwrap();
    let first_words = FirstWords::default();
    let outcome =
        relay(&mut near_client, &mut near_upstream, TIMEOUTS, first_words, |_, _| {}, pending(), pending())
            .await;
    let End::Failed { side, error } = outcome.end else { panic!("{outcome:?}") };
    assert_eq!((side, &*error.to_string()), (Side::Client, TOLD));
    // Without a last word it is the half-close that fails.
    assert_eq!(cause(io::Error::from_raw_os_error(libc::ENOTCONN)).to_string(), TOLD);
    assert_eq!(cause(io::ErrorKind::BrokenPipe.into()).to_string(), "connection reset");
    assert_eq!(cause(io::Error::from_raw_os_error(libc::ETIMEDOUT)).kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn an_idle_relay_holds_no_buffer() {
    let (mut client, mut near_client) = duplex(PIPE_BYTES);
    let (mut upstream, mut near_upstream) = duplex(PIPE_BYTES);
    let mut relay = Relay::default();
    let mut cx = Context::from_waker(std::task::Waker::noop());
    client.write_all(&pattern(PIPE_BYTES)).await.unwrap();
    assert!(relay.poll(&mut cx, &mut near_client, &mut near_upstream).is_pending());
    client.write_all(&pattern(PIPE_BYTES)).await.unwrap();
    assert!(relay.poll(&mut cx, &mut near_client, &mut near_upstream).is_pending());
    assert_eq!(relay.sent.kept.rest().len(), PIPE_BYTES, "what the full pipe would not take");
    read_exactly(&mut upstream, &pattern(PIPE_BYTES)).await;
    assert!(relay.poll(&mut cx, &mut near_client, &mut near_upstream).is_pending());
    read_exactly(&mut upstream, &pattern(PIPE_BYTES)).await;
    assert_eq!((relay.sent.kept.bytes.capacity(), relay.received.kept.bytes.capacity()), (0, 0));
}

/// A relay whose upstream is to speak first, in SMTP.
fn start_with_greeting() -> (DuplexStream, DuplexStream, JoinHandle<Outcome>) {
    let (client, mut near_client) = duplex(PIPE_BYTES);
    let (upstream, mut near_upstream) = duplex(PIPE_BYTES);
    let relayed = async move {
        let first_words = FirstWords { due: true, watch: HeaderWatch::new(Protocol::Smtp).map(Box::new) };
        relay(&mut near_client, &mut near_upstream, TIMEOUTS, first_words, |_, _| {}, pending(), pending())
            .await
    };
    (client, upstream, tokio::spawn(relayed))
}

#[tokio::test]
async fn an_upstream_that_leaves_without_the_word_that_is_due_is_no_end_for_the_client() {
    let (client, mut near_client) = duplex(PIPE_BYTES);
    let (upstream, mut near_upstream) = duplex(PIPE_BYTES);
    drop(upstream);
    let first_words = FirstWords { due: true, watch: None };
    let outcome =
        relay(&mut near_client, &mut near_upstream, TIMEOUTS, first_words, |_, _| {}, pending(), pending())
            .await;
    assert!(matches!(outcome.end, End::Wordless), "{:?}", outcome.end);
    near_client.write_all(b"421 later").await.unwrap();
    drop(near_client);
    let mut text = String::new();
    { client }.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "421 later", "it was told nothing before");
}

#[tokio::test]
async fn an_upstream_that_leaves_after_a_word_of_either_has_ended() {
    for word_of_client in [true, false] {
        let (mut client, mut upstream, relay) = start_with_greeting();
        let speaker = if word_of_client { &mut client } else { &mut upstream };
        speaker.write_all(b"word").await.unwrap();
        let listener = if word_of_client { &mut upstream } else { &mut client };
        read_exactly(listener, b"word").await;
        drop(upstream);
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        drop(client);
        let outcome = relay.await.unwrap();
        assert!(!matches!(outcome.end, End::Wordless), "{:?}", outcome.end);
    }
}

#[tokio::test]
async fn an_upstream_that_greets_and_leaves_in_one_breath_has_ended() {
    let (mut client, mut upstream, relay) = start_with_greeting();
    upstream.write_all(b"554 no").await.unwrap();
    drop(upstream);
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "554 no");
    drop(client);
    assert!(matches!(relay.await.unwrap().end, End::Closed { first: Side::Upstream }));
}

#[tokio::test]
async fn a_header_that_was_taken_for_a_command_is_noticed_before_the_client_speaks_and_not_after() {
    for client_spoke in [false, true] {
        let (mut client, mut upstream, relay) = start_with_greeting();
        let said: &[u8] = b"220 mail ESMTP\r\n";
        upstream.write_all(said).await.unwrap();
        read_exactly(&mut client, said).await;
        if client_spoke {
            client.write_all(b"HELP\r\n").await.unwrap();
            read_exactly(&mut upstream, b"HELP\r\n").await;
        }
        let said: &[u8] = b"500 5.5.1 Invalid command.\r\n";
        upstream.write_all(said).await.unwrap();
        read_exactly(&mut client, said).await;
        drop((client, upstream));
        assert_eq!(relay.await.unwrap().header_taken, !client_spoke);
    }
}

#[tokio::test]
async fn what_a_server_says_to_a_client_that_has_left_is_no_alarm() {
    let (mut client, mut upstream, relay) = start_with_greeting();
    upstream.write_all(b"220 mail ESMTP\r\n").await.unwrap();
    client.read_exact(&mut [0; 16]).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(upstream.read(&mut [0]).await.unwrap(), 0);
    upstream.write_all(b"221 2.0.0 Bye\r\n").await.unwrap();
    drop(upstream);
    assert!(!relay.await.unwrap().header_taken);
}
