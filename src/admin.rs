//! The admin listener: `/livez`, `/readyz`, `/status` and `/metrics` over
//! HTTP/1.1, for supervisors, load balancers, people and Prometheus, and
//! `/doctor` for our own `doctor`.
//!
//! `/livez` is 200 while the process runs. `/readyz` is 200 when mail can be
//! accepted: the node is running, the control server sees it, a relay can be
//! reached, it holds its tags, and the edge is not stopping; otherwise 503 with
//! the reasons as JSON. `/status` is what is known of the node and of each
//! server of the mailbox, as JSON. `/metrics` is what [`crate::metrics`] has.
//! `/doctor` looks at the tailnet through the running node, which may take a
//! minute and makes connections to the mailbox: one look at a time, 429 for
//! whoever comes meanwhile.
//!
//! It is meant for loopback and has no authentication; it shows no secret and
//! changes nothing.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::doctor::{self, Examiner, NoLook};
use crate::health::{Board, Monitor};
use crate::metrics;
use crate::status::{self, NodeView, Status, UpstreamView};
use crate::tailnet::NodeStatus;

/// Admin connections at once; more wait in the backlog.
const CONNECTIONS: usize = 32;
/// How long a request's head may take.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// How long an admin connection may last: longer than a look of the doctor.
const CONNECTION_LIMIT: Duration = Duration::from_secs(90);

/// What readiness is judged by.
#[derive(Debug)]
pub struct Readiness {
    /// The node's state; `None` before there is a node.
    pub node: watch::Receiver<Option<watch::Receiver<NodeStatus>>>,
    /// The tags it must hold.
    pub tags: Vec<String>,
    /// What is known of the mailbox; `None` before it is looked for.
    pub board: watch::Receiver<Option<Arc<Board>>>,
    /// Fires when the edge begins to stop.
    pub drain: CancellationToken,
}

impl Readiness {
    /// Why mail cannot be accepted now; empty when it can.
    fn reasons(&self) -> Vec<String> {
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

    /// What is known, for people and scripts.
    fn status(&self) -> Status {
        let node = self.node.borrow().as_ref().map(|node| node.borrow().clone()).unwrap_or_default();
        let NodeStatus { name, ips, tags, state, key_expiry, .. } = node;
        let board = self.board.borrow().clone();
        let monitors = board.iter().flat_map(|board| &board.monitors);
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: NodeView { name, ips, tags, state, key_expiry },
            not_ready: self.reasons(),
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
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return }; // never closed
        match listener.accept().await {
            Ok((stream, _)) => {
                let (readiness, examiner) = (Arc::clone(&readiness), Arc::clone(&examiner));
                tokio::spawn(async move {
                    connection(stream, &readiness, &examiner).await;
                    drop(permit);
                });
            }
            Err(error) => {
                debug!("cannot accept an admin connection: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, readiness: &Readiness, examiner: &Examiner) {
    let service = service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(match request.uri().path() {
            doctor::PATH if *request.method() == Method::GET => examined(examiner).await,
            _ => answer(&request, readiness),
        })
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false) // or whoever leaves connections open takes all the places
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = timeout(CONNECTION_LIMIT, served).await {
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
            let reasons = readiness.reasons();
            let code = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(code, &serde_json::json!({"ready": reasons.is_empty(), "reasons": reasons}))
        }
        status::PATH => json(StatusCode::OK, &serde_json::json!(readiness.status())),
        "/metrics" => {
            let node = readiness.node.borrow().as_ref().map(|node| node.borrow().clone());
            let text = metrics::text(&node.unwrap_or_default(), readiness.board.borrow().as_deref());
            body(StatusCode::OK, metrics::CONTENT_TYPE, text)
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
async fn examined(examiner: &Examiner) -> Response<Full<Bytes>> {
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

    fn reasons(node: Option<NodeStatus>, draining: bool) -> Vec<String> {
        let drain = CancellationToken::new();
        if draining {
            drain.cancel();
        }
        let node = node.map(|status| watch::channel(status).1);
        let (tags, board) = (vec!["tag:reverse-proxy".into()], watch::channel(None).1);
        Readiness { node: watch::channel(node).1, tags, board, drain }.reasons()
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
        let troubles = [Trouble::ControlLost, Trouble::TagMissing("tag:reverse-proxy".into())];
        assert_eq!(reasons(Some(node), false), troubles.map(|trouble| trouble.to_string()));
    }
}
