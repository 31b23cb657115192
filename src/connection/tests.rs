use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::*;
use crate::connection::hold::HELD_AFTER;
use crate::connection::open::Connections;
use crate::protocol::Protocol;
use crate::test_support::net::free_addr;
use crate::test_support::{Loopback, service};

/// Serves a connection and closes it.
async fn served(service: &Service<Loopback>, mut accepted: TcpStream, peer: SocketAddr) {
    serve(service, &mut accepted, peer).await;
}

/// A client's socket, and ours with the client's address.
async fn client() -> (TcpStream, TcpStream, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, peer) = listener.accept().await.unwrap();
    (client, accepted, peer)
}

/// What the mailbox receives of a client that sends `hello` and ends.
async fn received(proxy_protocol: ProxyProtocol) -> (String, SocketAddr, SocketAddr) {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = service(Some(mailbox.local_addr().unwrap()), proxy_protocol);
    let (mut client, accepted, peer) = client().await;
    let local = accepted.local_addr().unwrap();
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mail = async {
        let (mut stream, _) = mailbox.accept().await.unwrap();
        let mut got = String::new();
        stream.read_to_string(&mut got).await.unwrap();
        got
    };
    let ((), got) = tokio::join!(served(&service, accepted, peer), mail);
    (got, peer, local)
}

#[tokio::test]
async fn the_header_goes_before_what_the_client_sent_early() {
    let (got, client, local) = received(ProxyProtocol::V1).await;
    assert_eq!(got, format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\nhello", client.port(), local.port()));
}

#[tokio::test]
async fn off_forwards_the_clients_bytes_alone() {
    assert_eq!(received(ProxyProtocol::Off).await.0, "hello");
}

#[tokio::test]
async fn a_client_that_resets_while_we_dial_ends_the_dial() {
    let (mut client, accepted, peer) = client().await;
    let service = service(None, ProxyProtocol::V2);
    client.reset();
    drop(client);
    timeout(Duration::from_secs(20), served(&service, accepted, peer)).await.expect("the dial goes on");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_only_ends_its_side_is_waited_for() {
    let (mut client, accepted, peer) = client().await;
    let service = service(None, ProxyProtocol::V2);
    client.shutdown().await.unwrap();
    let started = Instant::now();
    served(&service, accepted, peer).await;
    assert_eq!(started.elapsed().as_secs(), 60, "the whole connect time-out");
}

#[tokio::test]
async fn a_reset_is_noticed_while_the_mailbox_takes_nothing() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = service(Some(mailbox.local_addr().unwrap()), ProxyProtocol::V2);
    let (mut client, accepted, peer) = client().await;
    let serving = tokio::spawn(async move { served(&service, accepted, peer).await });
    let (mut stalled, _) = mailbox.accept().await.unwrap();
    // Until every buffer on the way is full.
    while timeout(Duration::from_millis(200), client.write_all(&[0; 65536])).await.is_ok() {}
    client.reset();
    drop(client);
    timeout(Duration::from_secs(20), serving).await.expect("the reset goes unnoticed").unwrap();
    let mut rest = Vec::new();
    let end = stalled.read_to_end(&mut rest).await.map_err(|error| error.kind());
    assert_eq!(end, Err(io::ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_reset_after_the_clients_end_of_stream_is_noticed() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = service(Some(mailbox.local_addr().unwrap()), ProxyProtocol::Off);
    let (mut client, accepted, peer) = client().await;
    let serving = tokio::spawn(async move { served(&service, accepted, peer).await });
    let (mut waiting, _) = mailbox.accept().await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(waiting.read(&mut [0]).await.unwrap(), 0);
    client.reset();
    drop(client);
    timeout(Duration::from_secs(20), serving).await.expect("the reset goes unnoticed").unwrap();
}

#[tokio::test]
async fn an_upstream_that_refuses_closes_the_client_in_order() {
    let (mut client, accepted, peer) = client().await;
    served(&service(Some(free_addr()), ProxyProtocol::V2), accepted, peer).await;
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
}

/// A service on smtp that holds its clients, and has nothing to connect to.
async fn holding(limit: Duration, places: usize) -> Service<Loopback> {
    let mut service = service(Some(free_addr()), ProxyProtocol::V1);
    service.protocol = Protocol::Smtp;
    service.hold = Hold { limit, places: Arc::new(Semaphore::new(places)), last_dial: Duration::ZERO };
    service
}

async fn until(condition: impl Fn() -> bool) {
    let polled = async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), polled).await.expect("it never happens");
}

/// Serves a client in the background.
fn spawn(
    service: &Arc<Service<Loopback>>,
    accepted: TcpStream,
    peer: SocketAddr,
) -> tokio::task::JoinHandle<()> {
    let service = Arc::clone(service);
    tokio::spawn(async move { served(&service, accepted, peer).await })
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn a_held_client_reaches_a_mailbox_that_comes_back_with_all_it_said() {
    let service = Arc::new(holding(LONG, 1).await);
    let (mut client, accepted, peer) = client().await;
    let local = accepted.local_addr().unwrap();
    let serving = spawn(&service, accepted, peer);
    client.write_all(b"early ").await.unwrap();
    until(|| service.hold.places.available_permits() == 0).await;
    client.write_all(b"bird").await.unwrap();
    client.shutdown().await.unwrap(); // it said something, so it may wait for the reply
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let (mut stream, _) = mailbox.accept().await.unwrap();
    let mut got = String::new();
    stream.read_to_string(&mut got).await.unwrap();
    let (from, to) = (peer.port(), local.port());
    assert_eq!(got, format!("PROXY TCP4 127.0.0.1 127.0.0.1 {from} {to}\r\nearly bird"));
    assert_eq!(service.hold.places.available_permits(), 1, "it is not held any more");
    stream.write_all(b"220 reply").await.unwrap();
    drop(stream);
    let mut reply = String::new();
    client.read_to_string(&mut reply).await.unwrap();
    assert_eq!(reply, "220 reply");
    serving.await.unwrap();
}

#[tokio::test]
async fn a_hold_that_ends_is_answered() {
    let service = holding(Duration::from_millis(300), 1).await;
    let (mut client, accepted, peer) = client().await;
    let began = Instant::now();
    let told = async {
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        drop(client);
        text
    };
    let ((), text) = tokio::join!(served(&service, accepted, peer), told);
    assert!(text.starts_with("421 4.3.2 mx.example.org "), "{text}");
    assert!(began.elapsed() >= Duration::from_millis(300));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_meets_silence_is_held_no_longer_and_left_no_later() {
    for leaves in [false, true] {
        let mut service = service(None, ProxyProtocol::V2);
        service.hold.limit = Duration::from_secs(2);
        let (mut client, accepted, peer) = client().await;
        if leaves {
            client.shutdown().await.unwrap();
        }
        let began = Instant::now();
        served(&service, accepted, peer).await;
        let limit = if leaves { HELD_AFTER } else { service.hold.limit };
        assert!(began.elapsed() >= limit && began.elapsed() < limit + Duration::from_secs(6));
        drop(client);
    }
}

#[tokio::test]
async fn a_client_too_many_is_answered_at_once() {
    let service = Arc::new(holding(LONG, 1).await);
    let (first, accepted, peer) = client().await;
    let holding = spawn(&service, accepted, peer);
    until(|| service.hold.places.available_permits() == 0).await;
    let (mut second, accepted, peer) = client().await;
    let refused = spawn(&service, accepted, peer);
    let mut text = String::new();
    second.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("421 "), "{text}");
    drop((first, second));
    refused.await.unwrap();
    holding.await.unwrap();
}

#[tokio::test]
async fn a_full_table_does_not_keep_a_listener_from_trying() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = Arc::new(holding(LONG, 1).await);
    assert!(service.upstream.connect().await.is_err());
    // Clients of other listeners have taken every place meanwhile, and the mailbox is back.
    let _place = service.hold.places.acquire().await.unwrap();
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let (client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    mailbox.accept().await.unwrap();
    drop(client);
    serving.await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_while_held_frees_its_place_at_once() {
    let service = Arc::new(holding(LONG, 1).await);
    for abruptly in [false, true] {
        let (mut client, accepted, peer) = client().await;
        let serving = spawn(&service, accepted, peer);
        until(|| service.hold.places.available_permits() == 0).await;
        if abruptly {
            client.write_all(b"a word").await.unwrap();
            client.reset();
        }
        drop(client);
        timeout(Duration::from_secs(20), serving).await.expect("it is held for nobody").unwrap();
        assert_eq!(service.hold.places.available_permits(), 1);
    }
}

#[tokio::test]
async fn held_clients_are_turned_away_when_the_edge_stops() {
    let service = Arc::new(holding(LONG, 1).await);
    let (mut client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    until(|| service.hold.places.available_permits() == 0).await;
    service.drain.cancel();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("421 "), "{text}");
    drop(client);
    serving.await.unwrap();
}

#[tokio::test]
async fn a_mailbox_that_closes_without_a_word_is_tried_again() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = Arc::new(holding(LONG, 1).await);
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let (mut client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    drop(mailbox.accept().await.unwrap()); // unread, the header makes it a reset
    let (mut starting, _) = mailbox.accept().await.unwrap();
    starting.read_exact(&mut [0; 12]).await.unwrap();
    while starting.try_read(&mut [0; 99]).is_ok_and(|read| read > 0) {}
    drop(starting); // in order
    let (mut stream, _) = mailbox.accept().await.unwrap();
    stream.write_all(b"220 here\r\n").await.unwrap();
    let mut greeting = [0; 10];
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 here\r\n");
    drop((client, stream));
    serving.await.unwrap();
}

#[tokio::test]
async fn a_session_that_was_tried_again_ends_in_order() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = Arc::new(holding(LONG, 1).await);
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let (mut client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    for abruptly in [true, false] {
        let (mut wordless, _) = mailbox.accept().await.unwrap();
        wordless.read_exact(&mut [0; 12]).await.unwrap();
        if abruptly {
            wordless.reset();
        }
    }
    let (mut stream, _) = mailbox.accept().await.unwrap();
    stream.write_all(b"220 here\r\n").await.unwrap();
    drop(stream);
    let mut told = String::new();
    client.read_to_string(&mut told).await.expect("no reset");
    assert_eq!(told, "220 here\r\n");
    drop(client);
    serving.await.unwrap();
}

#[tokio::test]
async fn a_client_that_the_mailbox_does_not_want_is_not_held() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = Arc::new(holding(LONG, 1).await);
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let (mut client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    drop(mailbox.accept().await.unwrap());
    until(|| service.hold.places.available_permits() == 0).await;
    service.upstream.servers()[0].greeted(Instant::now()); // as if its probe had reported it
    drop(mailbox.accept().await.unwrap());
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "as the mailbox does: not a word");
    timeout(Duration::from_secs(20), serving).await.expect("it is held").unwrap();
}

#[tokio::test]
async fn a_session_of_which_a_byte_was_sent_is_never_tried_again() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = Arc::new(holding(LONG, 1).await);
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let (mut client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    let (mut stream, _) = mailbox.accept().await.unwrap();
    client.write_all(b"EHLO early\r\n").await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"early\r\n") {
        stream.read_buf(&mut got).await.unwrap();
    }
    drop(stream);
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "the end is passed on");
    drop(client);
    serving.await.unwrap();
}

/// How many of a service's connections have ended so.
fn ended(service: &Service<Loopback>, state: EndState) -> u64 {
    service.connections.all().counters.count("smtp", state)
}

#[tokio::test]
async fn a_mailbox_that_leaves_without_a_word_is_told_from_one_that_cannot_be_reached() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut service = holding(Duration::ZERO, 1).await;
    let (client, accepted, peer) = client().await;
    served(&service, accepted, peer).await;
    assert_eq!(ended(&service, EndState::ServerUnreachable), 1);
    drop(client);
    service.connections = Connections::new(0).of_listener("smtp", "mailbox:25".into());
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let leaving = tokio::spawn(async move { drop(mailbox.accept().await.unwrap()) });
    let (client, accepted, peer) = self::client().await;
    served(&service, accepted, peer).await;
    assert_eq!(ended(&service, EndState::ServerWordless), 1);
    leaving.await.unwrap();
    drop(client);
}

#[tokio::test]
async fn a_ban_is_no_failure_where_nobody_is_held() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = holding(Duration::ZERO, 1).await;
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let banning = tokio::spawn(async move {
        loop {
            drop(mailbox.accept().await.unwrap());
        }
    });
    let server = &service.upstream.servers()[0];
    // A probe alone is no client.
    server.greeted(Instant::now());
    for state in [EndState::ServerWordless, EndState::ServerRefused] {
        let (client, accepted, peer) = client().await;
        served(&service, accepted, peer).await;
        assert_eq!(ended(&service, state), 1, "{state}");
        drop(client);
        server.greets_client();
    }
    banning.abort();
}

#[tokio::test]
async fn a_mailbox_without_a_word_is_not_tried_again_when_the_edge_stops() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = Arc::new(holding(LONG, 1).await);
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let (mut client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    let (stream, _) = mailbox.accept().await.unwrap();
    service.drain.cancel();
    drop(stream);
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("421 "), "{text}");
    drop(client);
    serving.await.unwrap();
    assert_eq!(ended(&service, EndState::StoppedWaiting), 1);
}

#[tokio::test]
async fn a_client_that_leaves_without_a_place_was_not_held() {
    let service = Arc::new(holding(LONG, 1).await);
    assert!(service.upstream.connect().await.is_err());
    let _place = service.hold.places.acquire().await.unwrap();
    service.upstream.dialler().lead_to(None); // it is silent now
    let (client, accepted, peer) = client().await;
    let serving = spawn(&service, accepted, peer);
    drop(client);
    timeout(Duration::from_secs(20), serving).await.expect("it has left").unwrap();
    assert_eq!(ended(&service, EndState::ClientLeftConnecting), 1);
}

#[tokio::test]
async fn that_nothing_is_probed_any_more_does_not_bring_a_mailbox_back() {
    let service = holding(LONG, 1).await;
    assert!(service.upstream.connect().await.is_err());
    service.upstream.unprobed(&service.upstream.servers()[0]);
    assert!(service.upstream.is_away());
}

#[tokio::test]
async fn a_client_that_the_mailbox_does_not_want_sends_nobody_elsewhere() {
    let mailbox = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = Arc::new(holding(LONG, 10).await);
    service.upstream.dialler().lead_to(mailbox.local_addr().ok());
    let server = Arc::clone(&service.upstream.servers()[0]);
    let began = Instant::now();
    let (mut welcome, accepted, peer) = client().await;
    let session = spawn(&service, accepted, peer);
    let (mut stream, _) = mailbox.accept().await.unwrap();
    stream.write_all(b"220 here\r\n").await.unwrap();
    welcome.read_exact(&mut [0; 10]).await.unwrap();
    until(|| server.greeted_since(began)).await; // while the session goes on
    assert!(server.peer().has_spoken_since(began));
    let (unwanted, accepted, peer) = client().await;
    let knocking = spawn(&service, accepted, peer);
    drop(mailbox.accept().await.unwrap());
    until(|| service.hold.places.available_permits() == 9).await;
    assert!(!server.is_doubted());
    drop((unwanted, welcome, stream));
    knocking.await.unwrap();
    session.await.unwrap();
}
