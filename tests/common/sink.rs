//! An SMTP server that takes all mail and remembers what it has said yes to; also one that can be
//! told to be unwell. Enough for a client that pipelines nothing, and for the edge's probe.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::stub::Conn;
use super::wait::pace;

/// What a server says to everybody while it is unwell.
pub const UNWELL: &str = "421 4.3.2 too busy\r\n";

/// Messages that were taken, by their ids. Clones share one list, so that it outlasts the server.
#[derive(Clone, Default)]
pub struct Taken(Arc<Mutex<HashMap<String, usize>>>);

impl Taken {
    /// How often a message with this id was taken.
    pub fn times(&self, id: &str) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).copied().unwrap_or(0)
    }

    /// How many messages were taken.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    fn take(&self, id: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default() += 1;
    }
}

/// A script for a server that greets with its name and takes mail after a PROXY header.
pub fn takes_mail(name: &'static str, taken: &Taken) -> impl Fn(Conn) + Send + Sync + use<> {
    let taken = taken.clone();
    move |mut conn| {
        if conn.read_proxy_header().is_some() {
            converse(name, conn, &taken);
        }
    }
}

/// The same, but it takes so long before it greets, as servers do that look up who comes.
pub fn takes_mail_after(
    delay: Duration,
    name: &'static str,
    taken: &Taken,
) -> impl Fn(Conn) + Send + Sync + use<> {
    let taken = taken.clone();
    move |mut conn| {
        if conn.read_proxy_header().is_some() {
            pace(Instant::now() + delay);
            converse(name, conn, &taken);
        }
    }
}

/// The same, but who comes while it is unwell is sent away.
pub fn takes_mail_while(well: &Arc<AtomicBool>, name: &'static str) -> impl Fn(Conn) + Send + Sync + use<> {
    let well = Arc::clone(well);
    move |mut conn| {
        if conn.read_proxy_header().is_none() {
            return;
        }
        if well.load(Ordering::SeqCst) {
            converse(name, conn, &Taken::default());
        } else {
            conn.send(UNWELL.as_bytes());
        }
    }
}

/// One session, up to QUIT or the end. The id of a message is its subject.
fn converse(name: &str, mut conn: Conn, taken: &Taken) {
    conn.send(format!("220 {name}\r\n").as_bytes());
    let mut conn = BufReader::new(conn);
    let mut subject = None;
    let mut in_message = false;
    loop {
        let mut line = String::new();
        if !matches!(conn.read_line(&mut line), Ok(1..)) {
            return;
        }
        let line = line.trim_end();
        let answer = match line {
            "." if in_message => {
                in_message = false;
                taken.take(subject.take().unwrap_or_default());
                "250 2.0.0 taken"
            }
            _ if in_message => {
                if let Some(value) = line.strip_prefix("Subject: ") {
                    subject = Some(value.to_owned());
                }
                continue;
            }
            "DATA" => {
                in_message = true;
                "354 go on"
            }
            "QUIT" => {
                conn.get_mut().send(b"221 2.0.0 bye\r\n");
                return;
            }
            _ => "250 2.0.0 ok",
        };
        conn.get_mut().send(format!("{answer}\r\n").as_bytes());
    }
}
