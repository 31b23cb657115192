//! `tailwart-edge healthcheck`: whether a running edge is ready, or at least alive, as an exit code.
//!
//! It serves `HEALTHCHECK` in an image without a shell, and Kubernetes' exec probes: so the admin port can
//! stay on loopback.
//!
//! Invariant: it asks the edge and nobody else, and ends by itself within a few seconds.
//!
//! Deliberately not here: the decision what "ready" means. `/readyz` and `/livez` decide (see `admin.rs`).

use std::net::SocketAddr;
use std::time::Duration;

use hyper::Response;
use hyper::body::Bytes;
use serde::Deserialize;

use crate::support::http_client::ask_edge;

/// How long the edge may take to answer.
const LIMIT: Duration = Duration::from_secs(3);

/// The answer of `/readyz` or `/livez`. An answer of another form comes from another program at that port.
#[derive(Deserialize)]
#[serde(untagged)]
enum Health {
    Ready { ready: bool, reasons: Vec<String> },
    Live { live: bool },
}

/// Asks the edge at this admin address whether it is ready, or only whether it is `live`. The error says why
/// it is not.
pub async fn ask(admin: SocketAddr, live: bool) -> Result<(), String> {
    let path = if live { "/livez" } else { "/readyz" };
    judge(&ask_edge(admin, path, LIMIT).await?)
}

fn judge(answer: &Response<Bytes>) -> Result<(), String> {
    match serde_json::from_slice(answer.body()) {
        Ok(Health::Ready { ready: true, .. } | Health::Live { live: true }) => Ok(()),
        Ok(Health::Ready { reasons, .. }) => Err(format!("not ready: {}", reasons.join("; "))),
        Ok(Health::Live { live: false }) | Err(_) => {
            Err(format!("what answers at this address is not an edge ({})", answer.status()))
        }
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
        assert_eq!(judge(&answer(200, r#"{"live": true}"#)), Ok(()));
        for foreign in ["<html>", "[]", "null", "{}", r#"{"status": "ok"}"#, r#"{"live": false}"#] {
            let problem = judge(&answer(200, foreign)).unwrap_err();
            assert!(problem.contains("is not an edge"), "{foreign}: {problem}");
        }
        let not_ready = answer(503, r#"{"ready": false, "reasons": ["the edge is stopping", "and more"]}"#);
        assert_eq!(judge(&not_ready), Err("not ready: the edge is stopping; and more".to_owned()));
        assert_eq!(
            judge(&answer(404, "<html>")),
            Err("what answers at this address is not an edge (404 Not Found)".to_owned())
        );
    }
}
