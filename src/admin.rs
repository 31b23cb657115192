//! The admin listener: `/livez`, `/readyz`, `/status` and `/metrics` over
//! HTTP/1.1, for supervisors, load balancers, people and Prometheus, and
//! `/doctor` for our own `doctor`.
//!
//! `/livez` is 200 while the process runs. `/readyz` is 200 when mail can be
//! accepted: the node is running, the control server sees it, a relay can be
//! reached, it holds its tags, the mailbox answers, and the edge is not stopping;
//! otherwise 503 with all the reasons as JSON.
//!
//! Whether the mailbox answers is for the probe to say, and nobody is ready before
//! the first one has ended. Where probing is off, the last attempt of a client
//! says it, so that an edge that was away is ready again only when somebody has
//! come through: a load balancer in front wants the probe. With several listeners
//! one that has a server is enough, and what is wrong with the others is named in
//! `warnings`: a load balancer takes the whole machine out, and would take away
//! port 993 because of port 4190. Listeners for mail count, others only where there
//! is none.
//!
//! `/status` is what is known of the node and of each
//! server of the mailbox, as JSON. `/metrics` is what [`crate::metrics`] has.
//! `/doctor` looks at the tailnet through the running node, which may take a
//! minute and makes connections to the mailbox: one look at a time, 429 for
//! whoever comes meanwhile.
//!
//! It is meant for loopback and has no authentication; it shows no secret and
//! changes nothing. Peers of the tailnet can be told the same at a port of the node,
//! except for `/doctor`: who may ask there is a matter of the tailnet's policy. They
//! have places of their own, so that they cannot take those of this machine.
//!
//! Deadlines and places are such that whoever sends half a request, as often as he
//! likes, makes others wait for a moment: when half of the places are taken, the
//! rest is for those who ask at once.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use crate::doctor::{self, Examiner, NoLook};
use crate::health::{Board, Judgement, Monitor, NOT_REACHED_YET};
use crate::ledger::Ledger;
use crate::metrics::{self, Format};
use crate::status::{self, NodeView, Status, UpstreamView};
use crate::tailnet::{Node, NodeStatus};

/// Admin connections at once; more wait in the backlog.
const PLACES: usize = 64;
/// The same for peers of the tailnet, and how many of them may wait; more are refused.
const PEER_PLACES: usize = 32;
const PEER_BACKLOG: u16 = 32;
/// How long a request's head may take while there is room, and when half of the places are taken. A
/// client that waited in the backlog has sent its own long since.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
const CROWDED_HEAD_LIMIT: Duration = Duration::from_millis(100);
/// The latter for peers: a few round trips over a relay.
const CROWDED_PEER_HEAD_LIMIT: Duration = Duration::from_secs(1);
/// How long an admin connection may last: longer than a look of the doctor.
const CONNECTION_LIMIT: Duration = Duration::from_secs(90);
/// The same of a peer, for which nobody looks.
const PEER_CONNECTION_LIMIT: Duration = Duration::from_secs(10);

/// What readiness is judged by.
#[derive(Debug)]
pub struct Readiness {
    /// The node's state; `None` before there is a node.
    pub node: watch::Receiver<Option<watch::Receiver<NodeStatus>>>,
    /// The tags it must hold.
    pub tags: Vec<String>,
    /// What is known of the mailbox; `None` before it is looked for.
    pub board: watch::Receiver<Option<Arc<Board>>>,
    /// Who is connected.
    pub ledger: Arc<Ledger>,
    /// Fires when the edge begins to stop.
    pub drain: CancellationToken,
}

impl Readiness {
    /// Why mail cannot be accepted now, all reasons at once, and what is wrong besides.
    fn judge(&self) -> Judgement {
        let mut judgement = match &*self.board.borrow() {
            Some(board) => board.judge(),
            None => Judgement { reasons: vec![NOT_REACHED_YET.to_owned()], warnings: Vec::new() },
        };
        judgement.reasons.splice(0..0, self.own_reasons());
        judgement
    }

    /// What is wrong with the edge itself.
    fn own_reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.drain.is_cancelled() {
            reasons.push("the edge is stopping".to_owned());
        }
        match &*self.node.borrow() {
            None => reasons.push("the tailnet node is not started".to_owned()),
            Some(node) => {
                let troubles = node.borrow().troubles(&self.tags, Timestamp::now());
                reasons.extend(troubles.iter().map(ToString::to_string));
            }
        }
        reasons
    }

    fn metrics(&self, format: Format) -> String {
        let node = self.node.borrow().as_ref().map(|node| node.borrow().clone()).unwrap_or_default();
        let (board, ledger) = (self.board.borrow().clone(), &*self.ledger);
        let is_ready = self.judge().reasons.is_empty();
        metrics::text(&metrics::Sources { node: &node, board: board.as_deref(), ledger, is_ready }, format)
    }

    /// What is known, for people and scripts.
    fn status(&self) -> Status {
        let node = self.node.borrow().as_ref().map(|node| node.borrow().clone()).unwrap_or_default();
        let NodeStatus { name, ips, tags, state, key_expiry, .. } = node;
        let board = self.board.borrow().clone();
        let monitors = board.iter().flat_map(|board| &board.monitors);
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: NodeView { name, ips, tags, state, key_expiry },
            not_ready: self.judge().reasons,
            held: board.as_ref().map_or(0, |board| board.held()),
            upstreams: monitors.map(|monitor| upstream_view(monitor)).collect(),
        }
    }
}

fn upstream_view(monitor: &Monitor) -> UpstreamView {
    UpstreamView {
        listener: monitor.listener.clone(),
        upstream: monitor.upstream.clone(),
        protocol: monitor.target.protocol.name().to_owned(),
        probe: monitor.seen(),
    }
}

/// Answers requests for as long as the edge lives.
pub async fn serve(listener: Arc<TcpListener>, readiness: Arc<Readiness>, examiner: Arc<Examiner>) {
    let places = Places::new(PLACES, CROWDED_HEAD_LIMIT);
    loop {
        let place = places.take().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let (readiness, examiner) = (Arc::clone(&readiness), Arc::clone(&examiner));
                tokio::spawn(async move {
                    let served = connection(stream, place, &readiness, Some(&examiner));
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

/// Answers peers of the tailnet at a port of the node until it is closed.
pub async fn serve_tailnet(node: Arc<Node>, port: u16, readiness: Arc<Readiness>) {
    let mut listener = match node.listen(port, PEER_BACKLOG) {
        Ok(listener) => listener,
        Err(code) => return error!(port, "cannot serve the tailnet: {code:?}; check admin.tailnet_port"),
    };
    info!(port, "the admin listener serves the tailnet");
    let places = Places::new(PEER_PLACES, CROWDED_PEER_HEAD_LIMIT);
    loop {
        let place = places.take().await;
        let Some(stream) = listener.accept().await else { return };
        let readiness = Arc::clone(&readiness);
        tokio::spawn(async move {
            let served = connection(stream, place, &readiness, None);
            let _ = timeout(PEER_CONNECTION_LIMIT, served).await;
        });
    }
}

/// The places of one listener, for a connection each.
struct Places {
    free: Arc<Semaphore>,
    all: usize,
    crowded_head_limit: Duration,
}

/// A place that is taken until it is dropped, and how long its request's head may take.
struct Place {
    _permit: Option<OwnedSemaphorePermit>,
    head_limit: Duration,
}

impl Places {
    fn new(all: usize, crowded_head_limit: Duration) -> Places {
        Places { free: Arc::new(Semaphore::new(all)), all, crowded_head_limit }
    }

    async fn take(&self) -> Place {
        let permit = Arc::clone(&self.free).acquire_owned().await.ok(); // never closed
        let is_crowded = self.free.available_permits() < self.all / 2;
        let head_limit = if is_crowded { self.crowded_head_limit } else { HEAD_LIMIT };
        Place { _permit: permit, head_limit }
    }
}

/// Answers one request, and then gives its place back; without an examiner nobody may have the doctor look.
async fn connection<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    place: Place,
    readiness: &Readiness,
    examiner: Option<&Examiner>,
) {
    let service = service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(match request.uri().path() {
            doctor::PATH if *request.method() == Method::GET => examined(examiner).await,
            _ => answer(&request, readiness),
        })
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false) // or whoever leaves connections open takes all the places
        .header_read_timeout(place.head_limit)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        debug!("admin connection: {error}");
    }
}

fn answer(request: &Request<Incoming>, readiness: &Readiness) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return only("GET, HEAD");
    }
    match request.uri().path() {
        "/livez" => json(StatusCode::OK, &serde_json::json!({"live": true})),
        "/readyz" => {
            let Judgement { reasons, warnings } = readiness.judge();
            let ready = reasons.is_empty();
            let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(code, &serde_json::json!({"ready": ready, "reasons": reasons, "warnings": warnings}))
        }
        status::PATH => json(StatusCode::OK, &serde_json::json!(readiness.status())),
        "/metrics" => {
            let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
            let format = Format::asked_for(accept.unwrap_or_default());
            body(StatusCode::OK, format.content_type(), readiness.metrics(format))
        }
        // Whoever asks for the head alone does not want the work done.
        doctor::PATH => only("GET"),
        _ => json(
            StatusCode::NOT_FOUND,
            &serde_json::json!({"error": "there is /livez, /readyz, /status, /metrics and /doctor"}),
        ),
    }
}

/// Has the doctor look through the node.
async fn examined(examiner: Option<&Examiner>) -> Response<Full<Bytes>> {
    let Some(examiner) = examiner else {
        let sentence = "the doctor makes connections to the mailbox, so it looks for this machine alone: ask at admin.listen";
        return json(StatusCode::FORBIDDEN, &serde_json::json!({ "error": sentence }));
    };
    match examiner.examine().await {
        Ok(checks) => json(StatusCode::OK, &serde_json::json!({ "checks": checks })),
        Err(NoLook::Busy) => {
            let error = serde_json::json!({"error": "another look is going on; try again in a minute"});
            json(StatusCode::TOO_MANY_REQUESTS, &error)
        }
        Err(NoLook::NoNode) => {
            let error = serde_json::json!({"error": "the tailnet node is not started"});
            json(StatusCode::SERVICE_UNAVAILABLE, &error)
        }
    }
}

fn only(methods: &'static str) -> Response<Full<Bytes>> {
    let mut response = json(StatusCode::METHOD_NOT_ALLOWED, &serde_json::json!({"error": "only GET"}));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    response
}

fn json(code: StatusCode, value: &serde_json::Value) -> Response<Full<Bytes>> {
    body(code, "application/json", format!("{value}\n"))
}

fn body(code: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::sleep;

    use super::*;
    use crate::tailnet::Trouble;

    fn ready_node() -> NodeStatus {
        NodeStatus {
            state: "Running".into(),
            in_map_poll: true,
            tags: vec!["tag:reverse-proxy".into()],
            ..NodeStatus::default()
        }
    }

    /// Of an edge without listeners, once it serves.
    fn reasons(node: Option<NodeStatus>, draining: bool) -> Vec<String> {
        let (monitors, outlooks, places) = (Vec::new(), Vec::new(), Arc::new(Semaphore::new(0)));
        let board = Board { monitors, outlooks, places, hold_max: 0 };
        judge(node, draining, Some(board))
    }

    fn judge(node: Option<NodeStatus>, draining: bool, board: Option<Board>) -> Vec<String> {
        readiness(node, draining, board).judge().reasons
    }

    fn readiness(node: Option<NodeStatus>, draining: bool, board: Option<Board>) -> Readiness {
        let drain = CancellationToken::new();
        if draining {
            drain.cancel();
        }
        let node = node.map(|status| watch::channel(status).1);
        let (tags, ledger) = (vec!["tag:reverse-proxy".into()], Ledger::new(0));
        let board = watch::channel(board.map(Arc::new)).1;
        Readiness { node: watch::channel(node).1, tags, board, ledger, drain }
    }

    #[test]
    fn a_running_tagged_node_is_ready() {
        assert_eq!(reasons(Some(ready_node()), false), Vec::<String>::new());
    }

    #[test]
    fn every_reason_is_told() {
        assert_eq!(reasons(None, false), ["the tailnet node is not started"]);
        assert_eq!(reasons(Some(ready_node()), true), ["the edge is stopping"]);
        let node = NodeStatus { in_map_poll: false, tags: vec![], ..ready_node() };
        let troubles = [Trouble::ControlLost(String::new()), Trouble::TagMissing("tag:reverse-proxy".into())];
        assert_eq!(reasons(Some(node), false), troubles.map(|trouble| trouble.to_string()));
    }

    #[test]
    fn an_edge_that_has_not_begun_to_serve_is_not_ready() {
        let reasons = judge(None, false, None);
        assert_eq!(reasons, ["the tailnet node is not started", NOT_REACHED_YET]);
    }

    #[tokio::test]
    async fn when_half_of_the_places_are_taken_the_rest_is_for_those_who_ask_at_once() {
        let places = Places::new(4, CROWDED_HEAD_LIMIT);
        let mut taken = Vec::new();
        for limit in [HEAD_LIMIT, HEAD_LIMIT, CROWDED_HEAD_LIMIT, CROWDED_HEAD_LIMIT] {
            taken.push(places.take().await);
            assert_eq!(taken.last().map(|place| place.head_limit), Some(limit));
        }
        assert!(timeout(Duration::ZERO, places.take()).await.is_err());
        taken.truncate(1);
        assert_eq!(places.take().await.head_limit, HEAD_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_request_has_its_place_until_its_time_is_over() {
        let places = Places::new(1, CROWDED_HEAD_LIMIT);
        let (mut client, stream) = tokio::io::duplex(1024);
        client.write_all(b"GET /livez HTTP/1.1\r\nHost:").await.unwrap();
        let place = places.take().await;
        let limit = place.head_limit;
        let readiness = readiness(None, false, None);
        tokio::spawn(async move { connection(stream, place, &readiness, None).await });
        sleep(limit - Duration::from_millis(1)).await;
        assert_eq!(places.free.available_permits(), 0);
        sleep(Duration::from_millis(2)).await;
        assert_eq!(places.free.available_permits(), 1);
    }

    #[tokio::test]
    async fn a_peer_may_not_have_the_doctor_look() {
        let (mut client, stream) = tokio::io::duplex(1024);
        client.write_all(b"GET /doctor HTTP/1.1\r\nHost: edge\r\n\r\n").await.unwrap();
        let place = Places::new(1, CROWDED_HEAD_LIMIT).take().await;
        connection(stream, place, &readiness(None, false, None), None).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("ask at admin.listen"), "{answer}");
    }
}
