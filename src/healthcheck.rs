//! Whether a running edge is well, as an exit code: for `HEALTHCHECK` in an image without a shell,
//! and for Kubernetes' exec probes, so that the admin port can stay on loopback.
//!
//! Invariant: it asks the edge and nobody else, and ends by itself within a few seconds.
//!
//! Deliberately not here: any judgement of its own; `/readyz` and `/livez` judge (see `admin.rs`).

use std::net::SocketAddr;
use std::time::Duration;

use hyper::Response;
use hyper::body::Bytes;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::doctor::http;

/// How long the edge may take to answer.
const LIMIT: Duration = Duration::from_secs(3);

/// What `/readyz` says.
#[derive(Deserialize)]
struct Readiness {
    reasons: Vec<String>,
}

/// Asks the edge that has this admin address: whether it is ready, or only whether it is `live`.
/// Says why not.
pub async fn ask(admin: SocketAddr, live: bool) -> Result<(), String> {
    let path = if live { "/livez" } else { "/readyz" };
    let asked = async {
        let stream = TcpStream::connect(admin).await.map_err(|error| error.to_string())?;
        http::get(stream, &admin.to_string(), path).await
    };
    let remedy = "check that the edge runs, and that admin.listen is what it was started with";
    match timeout(LIMIT, asked).await {
        Ok(Ok(answer)) => judge(&answer),
        Ok(Err(reason)) => Err(format!("cannot ask the edge at {admin}: {reason}; {remedy}")),
        Err(_) => Err(format!("cannot ask the edge at {admin}: no answer within {LIMIT:?}; {remedy}")),
    }
}

fn judge(answer: &Response<Bytes>) -> Result<(), String> {
    if answer.status().is_success() {
        return Ok(());
    }
    match serde_json::from_slice::<Readiness>(answer.body()) {
        Ok(Readiness { reasons }) => Err(format!("not ready: {}", reasons.join("; "))),
        Err(_) => Err(format!("what answers is not an edge ({})", answer.status())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, body: &'static str) -> Response<Bytes> {
        Response::builder().status(code).body(Bytes::from(body)).unwrap()
    }

    #[test]
    fn the_edge_s_own_reasons_are_told() {
        assert_eq!(judge(&answer(200, r#"{"ready": true, "reasons": []}"#)), Ok(()));
        let not_ready = answer(503, r#"{"ready": false, "reasons": ["the edge is stopping", "and more"]}"#);
        assert_eq!(judge(&not_ready), Err("not ready: the edge is stopping; and more".to_owned()));
        assert_eq!(
            judge(&answer(404, "<html>")),
            Err("what answers is not an edge (404 Not Found)".to_owned())
        );
    }

    #[tokio::test]
    async fn an_edge_that_does_not_answer_is_not_well() {
        let unused = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = ask(unused, true).await.unwrap_err();
        assert!(error.contains(&unused.to_string()) && error.contains("check that the edge runs"), "{error}");
    }
}
