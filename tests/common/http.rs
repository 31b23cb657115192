//! One HTTP request by hand: what a supervisor's probe sends.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use super::net::connect;

/// An answer takes milliseconds; a busy machine gets the rest.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub head: String,
    pub body: String,
}

/// GETs a path; panics when there is no whole answer.
#[track_caller]
pub fn get(server: SocketAddr, path: &str) -> Answer {
    get_with(server, path, "")
}

/// The same with more header lines, each with its end.
#[track_caller]
pub fn get_with(server: SocketAddr, path: &str, headers: &str) -> Answer {
    let mut stream = connect(server);
    stream.set_read_timeout(Some(ANSWER_LIMIT)).expect("the deadline is not zero");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).expect("the server takes the request");
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap_or_else(|error| panic!("GET {path}: {error} after {text:?}"));
    let code = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    match (code, text.split_once("\r\n\r\n")) {
        (Some(code), Some((head, body))) => Answer { code, head: head.to_owned(), body: body.to_owned() },
        _ => panic!("GET {path}: no HTTP: {text:?}"),
    }
}
