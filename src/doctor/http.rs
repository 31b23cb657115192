//! One GET, for what the doctor and `status` ask a control server and a running edge.
//!
//! It has no time limit of its own; the callers have.

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;

use super::report::harmless;

/// More than any answer that is expected.
const ANSWER_BYTES: usize = 1 << 20;

/// GETs a path; `host` is the authority to name.
pub async fn get<S>(stream: S, host: &str, path: &str) -> Result<Response<Bytes>, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let words = |error: hyper::Error| harmless(&error.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(words)?;
    // A task of its own moves the bytes, and ends with this set.
    let mut driving = JoinSet::new();
    driving.spawn(connection);
    let request = Request::get(path).header(HOST, host).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| harmless(&error.to_string()))?;
    let (parts, body) = sender.send_request(request).await.map_err(words)?.into_parts();
    let body = Limited::new(body, ANSWER_BYTES).collect().await;
    let body = body.map_err(|error| harmless(&error.to_string()))?.to_bytes();
    Ok(Response::from_parts(parts, body))
}
