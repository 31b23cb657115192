//! A single GET request: to a running edge, by `status`, `healthcheck` and the doctor, and to the control server,
//! for the time.
//!
//! Invariant: an answer has bounded length, and an error text is safe to print. The caller sets the deadline,
//! except for [`ask_edge`].
//!
//! Deliberately not here: what the answers mean, TLS, redirects.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::text::harmless;

/// More than any answer that is expected.
const ANSWER_BYTES: usize = 1 << 20;

/// GETs a path of the edge that has this admin address, within `limit`. The error says what to check.
pub async fn ask_edge(admin: SocketAddr, path: &str, limit: Duration) -> Result<Response<Bytes>, String> {
    let asked = timeout(limit, get_from(admin, path)).await;
    let asked = asked.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")));
    asked.map_err(|reason| cannot_ask(admin, &reason))
}

/// Why the edge at this admin address cannot be asked, and what to check.
pub fn cannot_ask(admin: SocketAddr, reason: &str) -> String {
    format!(
        "cannot ask the edge at {admin}: {reason}; check that the edge runs, and that admin.listen is the address it was started with"
    )
}

/// GETs a path over a connection of its own.
pub async fn get_from(server: SocketAddr, path: &str) -> Result<Response<Bytes>, String> {
    let stream = TcpStream::connect(server).await.map_err(|error| error.to_string())?;
    get(stream, &server.to_string(), path).await
}

/// GETs a path; `host` is the authority to name.
pub async fn get<S>(stream: S, host: &str, path: &str) -> Result<Response<Bytes>, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let words = |error: hyper::Error| harmless(&error.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(words)?;
    // A separate task moves the bytes; it ends when this set is dropped.
    let mut driving = JoinSet::new();
    driving.spawn(connection);
    let request = Request::get(path).header(HOST, host).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| harmless(&error.to_string()))?;
    let (parts, body) = sender.send_request(request).await.map_err(words)?.into_parts();
    let body = Limited::new(body, ANSWER_BYTES).collect().await;
    let body = body.map_err(|error| harmless(&error.to_string()))?.to_bytes();
    Ok(Response::from_parts(parts, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn an_edge_that_is_away_is_told_with_what_to_check() {
        let unused = crate::test_support::net::free_addr();
        let error = ask_edge(unused, "/livez", LIMIT).await.unwrap_err();
        assert!(
            error.starts_with(&format!("cannot ask the edge at {unused}: Connection refused")),
            "{error}"
        );
        assert!(error.contains("; check that the edge runs"), "{error}");
    }

    #[tokio::test]
    async fn an_edge_that_says_nothing_is_not_awaited_for_ever() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = silent.local_addr().unwrap();
        tokio::time::pause();
        let error = ask_edge(admin, "/livez", LIMIT).await.unwrap_err();
        assert!(error.contains(": no answer within 5s; check that"), "{error}");
    }
}
