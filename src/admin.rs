//! What is an operator shown? HTTP/1.1 at `admin.listen`, and at a port of the node on the tailnet if configured.
//!
//! `/livez` is 200 while the process runs. `/readyz` is 200 when mail can be accepted (see `admin/overview.rs`),
//! otherwise 503 with all reasons as JSON. `/status` has the state of the node and of each server of the mailbox
//! as JSON, `/` the same as a page for browsers. `/metrics` is for Prometheus (see `admin/metrics.rs`). `/doctor`
//! checks the tailnet through the running node, for the `doctor` command. That may take a minute and connects to
//! the mailbox, so one check runs at a time, and others get 429.
//!
//! It promises to show no secret and to change nothing. A web page cannot read it through a browser: a request is
//! refused if it names another host than this one (DNS rebinding), or if a page of another site makes it. Clients
//! that send half a request can only delay others for a moment: when half of the slots are taken, the other half
//! is for clients that send their request at once. Peers on the tailnet have slots of their own, so that they
//! cannot take the slots of this machine.
//!
//! It deliberately has no authentication: it is meant for loopback, and on the tailnet the tailnet's policy decides
//! who may ask. Peers on the tailnet cannot use `/doctor`.

pub(crate) mod board;
pub(crate) mod metrics;
pub(crate) mod overview;
mod page;
pub mod status;

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::uri::Authority;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info};

use crate::admin::board::Judgement;
use crate::admin::overview::Overview;
use crate::doctor::{self, Examiner, NoLook};
use crate::listener::ListeningSocket;
use crate::tailnet::{Code, Node};
use crate::upstream::dial::Reset;

/// Admin connections at once; more wait in the backlog.
const SLOTS: usize = 64;
/// The same for peers on the tailnet.
const PEER_SLOTS: usize = 32;
/// How many peers may wait to be accepted; more are refused.
const PEER_BACKLOG: u16 = 32;
/// The time between two attempts to listen at the node's port.
const LISTEN_PAUSE: Duration = Duration::from_secs(5);
/// How many peers may be waited for at once, until they have read their answer.
const PEER_LEAVING: usize = 128;
/// How long a request's head may take.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// The same when half of the slots are taken. A client that waited in the backlog has sent its head already.
const CROWDED_HEAD_LIMIT: Duration = Duration::from_millis(100);
/// The same for peers: a few round trips over a relay.
const CROWDED_PEER_HEAD_LIMIT: Duration = Duration::from_secs(1);
/// How long an admin connection may last: longer than a check of the doctor.
const CONNECTION_LIMIT: Duration = Duration::from_secs(90);
/// The same for a peer, which cannot use the doctor.
const PEER_CONNECTION_LIMIT: Duration = Duration::from_secs(10);

/// Answers requests for as long as the edge lives.
pub async fn serve(listener: Arc<ListeningSocket>, overview: Arc<Overview>, examiner: Arc<Examiner>) {
    let slots = Slots::new(SLOTS, CROWDED_HEAD_LIMIT);
    loop {
        let slot = slots.take().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let (overview, examiner) = (Arc::clone(&overview), Arc::clone(&examiner));
                tokio::spawn(async move {
                    let served = connection(stream, slot, &overview, Some(&examiner));
                    let _ = timeout(CONNECTION_LIMIT, served).await;
                });
            }
            Err(error) => {
                debug!("cannot accept an admin connection: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Answers peers on the tailnet, at a port of the node, for as long as the edge lives.
pub async fn serve_tailnet(node: Arc<Node>, port: u16, overview: Arc<Overview>) {
    let mut listener = listen(port, || node.listen(port, PEER_BACKLOG)).await;
    info!(port, "the admin listener serves the tailnet");
    let slots = Slots::new(PEER_SLOTS, CROWDED_PEER_HEAD_LIMIT);
    let leaving = Arc::new(Semaphore::new(PEER_LEAVING));
    loop {
        let slot = slots.take().await;
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            // The node is closed, since the edge stops.
            Err(Code::NotRunning) => return std::future::pending().await,
            Err(code) => return error!(port, "cannot accept from the tailnet: {code:?}; please report this"),
        };
        let (overview, leaving) = (Arc::clone(&overview), Arc::clone(&leaving));
        tokio::spawn(async move { serve_peer(stream, slot, &overview, &leaving).await });
    }
}

/// Listens as soon as that is possible: a reload may have closed the port a moment ago.
async fn listen<L>(port: u16, try_to: impl Fn() -> Result<L, Code>) -> L {
    let mut is_told = false;
    loop {
        match try_to() {
            Ok(listener) => return listener,
            Err(code) if !is_told => {
                error!(port, "cannot serve the tailnet: {code:?}; trying again; check admin.tailnet_port");
                is_told = true;
            }
            Err(_) => {}
        }
        sleep(LISTEN_PAUSE).await;
    }
}

/// Answers a peer, and waits until the peer has read the answer and has closed. `leaving` limits how many peers
/// are waited for. A peer that does not close, or for which `leaving` has no room, is reset: if the connection
/// were only closed, the network stack would keep the unread answer for as long as that peer lives.
async fn serve_peer<S>(mut stream: S, slot: Slot, overview: &Overview, leaving: &Semaphore)
where
    S: AsyncRead + AsyncWrite + Reset + Unpin,
{
    let served = async {
        if !connection(&mut stream, slot, overview, None).await {
            return true; // no answer, or a few bytes of an error
        }
        let Ok(_room) = leaving.try_acquire() else { return false };
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.is_ok()
    };
    if !timeout(PEER_CONNECTION_LIMIT, served).await.unwrap_or(false) {
        stream.reset();
    }
}

/// The slots of one listener, one for each connection.
struct Slots {
    free: Arc<Semaphore>,
    all: usize,
    crowded_head_limit: Duration,
}

/// A taken slot, free again when it is dropped, and how long the request's head may take.
struct Slot {
    _permit: Option<OwnedSemaphorePermit>,
    head_limit: Duration,
}

impl Slots {
    fn new(all: usize, crowded_head_limit: Duration) -> Slots {
        Slots { free: Arc::new(Semaphore::new(all)), all, crowded_head_limit }
    }

    async fn take(&self) -> Slot {
        let permit = Arc::clone(&self.free).acquire_owned().await.ok(); // never closed
        let is_crowded = self.free.available_permits() < self.all / 2;
        let head_limit = if is_crowded { self.crowded_head_limit } else { HEAD_LIMIT };
        Slot { _permit: permit, head_limit }
    }
}

/// Answers one request, and then gives the slot back. Without an examiner `/doctor` is forbidden. Returns whether
/// the request was answered and our side is closed.
async fn connection<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    slot: Slot,
    overview: &Overview,
    examiner: Option<&Examiner>,
) -> bool {
    let service = service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(match request.uri().path() {
            _ if !is_for_us(&request, &overview.node_name()) => misdirected(),
            doctor::PATH if *request.method() == Method::GET => examined(examiner).await,
            _ => answer(&request, overview),
        })
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false) // or clients that leave connections open would take all slots
        .header_read_timeout(slot.head_limit)
        .serve_connection(TokioIo::new(stream), service);
    served.await.inspect_err(|error| debug!("admin connection: {error}")).is_ok()
}

/// Whether a request was meant for this edge: its host is an IP address, this machine or the node, and no
/// page of another site has made it. A request without these headers does not come from a browser.
fn is_for_us<B>(request: &Request<B>, node: &str) -> bool {
    let header = |name: &HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
    if header(&HeaderName::from_static("sec-fetch-site")) == Some("cross-site") {
        return false;
    }
    // At a plain http address a browser sends only this. Behind a proxy that adds TLS the scheme is another.
    if let Some(origin) = header(&ORIGIN)
        && origin.split_once("://").map(|(_, host)| host) != header(&HOST)
    {
        return false;
    }
    let Some(host) = request.uri().host().or(header(&HOST)) else { return true };
    let Ok(host) = host.parse::<Authority>() else { return false };
    let name = host.host().trim_end_matches('.');
    let is_address = name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    let label = node.split('.').next().unwrap_or_default();
    is_address || ["localhost", node, label].iter().any(|own| name.eq_ignore_ascii_case(own))
}

fn misdirected() -> Response<Full<Bytes>> {
    let error = "use the address, localhost or the node's name in the URL";
    json(StatusCode::MISDIRECTED_REQUEST, &serde_json::json!({ "error": error }))
}

fn answer(request: &Request<Incoming>, overview: &Overview) -> Response<Full<Bytes>> {
    match request.uri().path() {
        // HEAD is refused: it would do all the work for no answer.
        doctor::PATH => only("GET"),
        _ if !matches!(*request.method(), Method::GET | Method::HEAD) => only("GET, HEAD"),
        "/livez" => json(StatusCode::OK, &serde_json::json!({"live": true})),
        "/readyz" => {
            let Judgement { reasons, warnings } = overview.judge();
            let ready = reasons.is_empty();
            let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(code, &serde_json::json!({"ready": ready, "reasons": reasons, "warnings": warnings}))
        }
        "/" => page::response(&overview.status()),
        status::PATH => json(StatusCode::OK, &serde_json::json!(overview.status())),
        "/metrics" => body(StatusCode::OK, metrics::CONTENT_TYPE, overview.metrics()),
        _ => json(
            StatusCode::NOT_FOUND,
            &serde_json::json!({"error": "no such page; there are /, /livez, /readyz, /status, /metrics and /doctor"}),
        ),
    }
}

/// Has the doctor check the tailnet through the node.
async fn examined(examiner: Option<&Examiner>) -> Response<Full<Bytes>> {
    let Some(examiner) = examiner else {
        let sentence =
            "only this machine may run the doctor, at admin.listen, since it connects to the mailbox";
        return json(StatusCode::FORBIDDEN, &serde_json::json!({ "error": sentence }));
    };
    match examiner.examine().await {
        Ok(checks) => json(StatusCode::OK, &serde_json::json!({ "checks": checks })),
        Err(NoLook::Busy) => {
            let error =
                serde_json::json!({"error": "another doctor run is not finished; try again in a minute"});
            json(StatusCode::TOO_MANY_REQUESTS, &error)
        }
        Err(NoLook::NoNode) => {
            let error = serde_json::json!({"error": "the tailnet node is not started"});
            json(StatusCode::SERVICE_UNAVAILABLE, &error)
        }
    }
}

fn only(methods: &'static str) -> Response<Full<Bytes>> {
    let mut response =
        json(StatusCode::METHOD_NOT_ALLOWED, &serde_json::json!({"error": format!("only {methods}")}));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    response
}

fn json(code: StatusCode, value: &serde_json::Value) -> Response<Full<Bytes>> {
    body(code, "application/json", format!("{value}\n"))
}

fn body(code: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;

    use super::*;
    use crate::test_support::overview;

    #[tokio::test]
    async fn when_half_of_the_places_are_taken_the_rest_is_for_those_who_ask_at_once() {
        let slots = Slots::new(4, CROWDED_HEAD_LIMIT);
        let mut taken = Vec::new();
        for limit in [HEAD_LIMIT, HEAD_LIMIT, CROWDED_HEAD_LIMIT, CROWDED_HEAD_LIMIT] {
            taken.push(slots.take().await);
            assert_eq!(taken.last().map(|slot| slot.head_limit), Some(limit));
        }
        assert!(timeout(Duration::ZERO, slots.take()).await.is_err());
        taken.truncate(1);
        assert_eq!(slots.take().await.head_limit, HEAD_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_request_has_its_place_until_its_time_is_over() {
        let slots = Slots::new(1, CROWDED_HEAD_LIMIT);
        let (mut client, stream) = tokio::io::duplex(1024);
        client.write_all(b"GET /livez HTTP/1.1\r\nHost:").await.unwrap();
        let slot = slots.take().await;
        let limit = slot.head_limit;
        let idle = overview(None, false, None);
        tokio::spawn(async move { connection(stream, slot, &idle, None).await });
        sleep(limit - Duration::from_millis(1)).await;
        assert_eq!(slots.free.available_permits(), 0);
        sleep(Duration::from_millis(2)).await;
        assert_eq!(slots.free.available_permits(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_of_the_node_that_is_taken_is_tried_again() {
        let began = Instant::now();
        let try_to = || if began.elapsed() < LISTEN_PAUSE * 2 { Err(Code::Error) } else { Ok(()) };
        timeout(LISTEN_PAUSE * 3, listen(9464, try_to)).await.expect("it was given up");
        assert_eq!(began.elapsed(), LISTEN_PAUSE * 2);
    }

    #[test]
    fn a_browser_is_not_led_here_by_another_name_or_site() {
        let node = "edge.tail1234.ts.net";
        let asks =
            |host: &str| is_for_us(&Request::get("/status").header(HOST, host).body(()).unwrap(), node);
        for own in
            ["127.0.0.1:9464", "[::1]:9464", "localhost:9464", "LOCALHOST", "edge:9464", node, "100.64.0.1"]
        {
            assert!(asks(own), "{own}");
        }
        for other in ["rebound.example.net:9464", "localhost.example.net", "edge.example.net", "", "a b"] {
            assert!(!asks(other), "{other}");
        }
        let from = |site| {
            let request = Request::get("/doctor").header(HOST, "localhost").header("Sec-Fetch-Site", site);
            is_for_us(&request.body(()).unwrap(), node)
        };
        assert!(!from("cross-site") && from("same-origin") && from("none"));
        let of = |origin| {
            let request = Request::get("/status").header(HOST, "edge:9464").header(ORIGIN, origin);
            is_for_us(&request.body(()).unwrap(), node)
        };
        assert!(of("http://edge:9464") && of("https://edge:9464"));
        assert!(!of("http://evil.example.net") && !of("null"));
        assert!(is_for_us(&Request::get("/livez").body(()).unwrap(), node), "HTTP/1.0");
        let whole = Request::get("http://rebound.example.net/status").header(HOST, "localhost");
        assert!(!is_for_us(&whole.body(()).unwrap(), node));
    }

    /// The answer to a peer.
    async fn answer_to(request: &str) -> String {
        let (mut client, stream) = tokio::io::duplex(4096);
        client.write_all(format!("{request}\r\nHost: localhost\r\n\r\n").as_bytes()).await.unwrap();
        let slot = Slots::new(1, CROWDED_HEAD_LIMIT).take().await;
        connection(stream, slot, &overview(None, false, None), None).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_method_that_is_not_served_is_told_those_that_are() {
        for (request, methods) in [
            ("POST /livez HTTP/1.1", "GET, HEAD"),
            ("DELETE / HTTP/1.1", "GET, HEAD"),
            ("POST /doctor HTTP/1.1", "GET"),
        ] {
            let answer = answer_to(request).await;
            assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
            assert!(answer.contains(&format!("\r\nallow: {methods}\r\n")), "{answer}");
            assert!(answer.ends_with(&format!("{{\"error\":\"only {methods}\"}}\n")), "{answer}");
        }
        let head = answer_to("HEAD /doctor HTTP/1.1").await;
        assert!(head.starts_with("HTTP/1.1 405 ") && head.contains("\r\nallow: GET\r\n"), "{head}");
    }

    #[tokio::test]
    async fn a_peer_may_not_have_the_doctor_look() {
        let answer = answer_to("GET /doctor HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("at admin.listen"), "{answer}");
    }
}
