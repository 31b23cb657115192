//! Is the mailbox well? A look through the tailnet that leaves no warning in
//! the mailbox's log.
//!
//! Purpose: connect as a client's connection would, with a header that speaks
//! for nobody, hear the greeting, say goodbye, and tell what was wrong in words
//! that name the cause.
//!
//! Invariants
//! - Everything is within the caller's limit, however the mailbox behaves; what
//!   it sends is read up to a few kilobytes.
//! - A probe ends as its protocol wants, QUIT and its kin, answer, end of
//!   stream: a mail server complains in its log of connections that just close.
//! - Text of the mailbox is made harmless before it is in a [`Finding`] or a
//!   [`ProbeError`].
//!
//! Deliberately not here: trust in certificates (the clients have to trust the
//! mailbox, we only look), logging in, STARTTLS, and what follows from a
//! failure. For `http` and `tcp` connecting is all, and the header if one is
//! due, since nothing is known of what follows.

mod greeting;
mod talk;
pub(crate) mod tls;

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};

use crate::protocol::Protocol;
use crate::protocol::greeting::Language;
use crate::protocol::proxy_header::LOCAL;
use crate::support::text::harmless_up_to;
use crate::tailnet::ConnectError;
use crate::upstream::Silence;
use crate::upstream::dial::Dial;
use talk::Talk;

/// How long connecting may take, as for a client's connection by default; what
/// follows may take longer, since some mail servers make strangers wait.
const CONNECT_LIMIT: Duration = Duration::from_secs(8);

/// How long we look for complaints about the header before we say anything, so
/// that they are not taken for an answer. A mailbox that has any makes them at
/// once; this is many round trips.
const LOOK: Duration = Duration::from_millis(300);

/// As much of a text of the mailbox is shown.
const SHOWN: usize = 200;

/// What to probe.
#[derive(Clone, Debug)]
pub struct Target {
    /// The peer's name or address.
    pub host: String,
    /// The port of `upstream_port`.
    pub port: u16,
    /// What should be spoken there.
    pub protocol: Protocol,
    /// Whether a PROXY header is due, which will be v2's LOCAL.
    pub header: bool,
}

/// What a mailbox that is up has shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The first line of the greeting; empty for http and tcp.
    #[serde(default)]
    pub greeting: String,
    /// The certificate, where TLS is spoken from the first byte.
    pub certificate: Option<Certificate>,
    /// How long connecting took.
    #[serde(rename = "connect_ms", with = "millis", default)]
    pub connect: Duration,
    /// How long it took from dialling to the end of the greeting, without what
    /// the probe waits on purpose.
    #[serde(rename = "total_ms", with = "millis", default)]
    pub total: Duration,
}

/// What is of interest in a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The DNS names and IP addresses it is for, or else the subject's common
    /// name.
    #[serde(default)]
    pub names: Vec<String>,
    /// The last moment at which it is valid, past or not.
    pub not_after: Timestamp,
}

/// Why a mailbox is down; the text of each ends with what to do.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProbeError {
    /// The connection could not be made.
    #[error("cannot connect: {0}")]
    Connect(#[from] ConnectError),
    /// Nothing answered.
    #[error(
        "cannot connect: no answer within {limit:?}; check that the mailbox is up, and that the tailnet's policy and the mailbox's firewall let this edge reach the port"
    )]
    ConnectTimedOut {
        /// How long was tried.
        limit: Duration,
    },
    /// Nothing answered, and the peer itself does not answer a ping either.
    #[error("cannot connect: no answer within {limit:?}: {silence}")]
    PeerSilent {
        /// How long was tried.
        limit: Duration,
        /// What the ping found out.
        silence: Silence,
    },
    /// Connected, but the header could not be sent.
    #[error("connected, but cannot send the PROXY header: {0}; check the mail server's log")]
    Header(String),
    /// Accepted, and closed or reset without a byte.
    #[error("the mailbox accepted the connection and closed it without a word; {}", why_closed(.header))]
    ClosedSilently {
        /// Whether a header was sent.
        header: bool,
    },
    /// Accepted, and not a byte in time.
    #[error(
        "the mailbox accepted the connection and then said nothing within {limit:?}; check that the mail server is not stuck, that the port speaks what the listener's protocol says (and TLS only if that does), and that proxy_protocol is not \"off\" for a port that waits for the header"
    )]
    Silent {
        /// The limit of the whole probe.
        limit: Duration,
    },
    /// The header was read as commands or as TLS: the mailbox does not expect
    /// one, or not from us.
    #[error(
        "the mailbox took the PROXY header for something the client said, and answered it with \"{said}\"; make it trust this edge's tailnet addresses for the PROXY protocol on this port, or set proxy_protocol = \"off\" for the listener"
    )]
    HeaderTaken {
        /// The beginning of what it answered to the header.
        said: String,
    },
    /// Something else is spoken there.
    #[error(
        "the port speaks something else than it should, it said \"{found}\"; check the listener's protocol and upstream_port"
    )]
    WrongProtocol {
        /// The beginning of what it said.
        found: String,
    },
    /// The mailbox does not want to serve.
    #[error("the mailbox refuses to serve: \"{greeting}\"; see the mail server's log")]
    Refused {
        /// The line with which it refused.
        greeting: String,
    },
    /// The handshake failed.
    #[error("the TLS handshake failed: {0}; check the certificate and the TLS settings of the mail server")]
    Tls(String),
    /// It broke in the middle.
    #[error("the mailbox began well, and then {0}; check the mail server's log")]
    Cut(String),
}

/// The ways to be closed on differ by whether there was a header.
fn why_closed(header: &bool) -> &'static str {
    match header {
        true => {
            "so does a Dovecot that does not trust this edge for the PROXY protocol, and other servers that expect no header on a TLS port: make it trust this edge's tailnet addresses, or look in its log for a limit or a ban"
        }
        false => {
            "so does a server that demands a PROXY header, and none was sent: set proxy_protocol for the listener, or look in the mail server's log for a limit or a ban"
        }
    }
}

/// As the text that people read.
impl Serialize for ProbeError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Looks whether the mailbox is up, within `limit`. Dropping the future gives
/// up and closes.
pub async fn probe<D: Dial>(dialler: &D, target: &Target, limit: Duration) -> Result<Finding, ProbeError> {
    let started = Instant::now();
    let clock = Clock { deadline: started + limit, limit };
    let connect_limit = limit.min(CONNECT_LIMIT);
    let mut stream = match timeout(connect_limit, dialler.dial(&target.host, target.port)).await {
        Ok(Err(ConnectError::TimedOut)) | Err(_) => {
            return Err(ProbeError::ConnectTimedOut { limit: connect_limit });
        }
        Ok(outcome) => outcome?,
    };
    let connect = started.elapsed();
    if target.header {
        let written = timeout_at(clock.deadline, stream.write_all(&LOCAL)).await;
        let written = written.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        written.map_err(|error| ProbeError::Header(error.to_string()))?;
    }
    let Some(language) = Language::of(target.protocol) else {
        let _ = timeout_at(clock.deadline, stream.shutdown()).await; // what matters is that it connected
        return Ok(Finding { greeting: String::new(), certificate: None, connect, total: connect });
    };
    let (certificate, heard) = if target.protocol.is_tls() {
        let (stream, certificate) = tls::handshake(stream, target, clock).await?;
        // With TLS around it, nobody took the header for what is spoken inside.
        (Some(certificate), converse(stream, language, false, clock).await.map_err(after_handshake)?)
    } else {
        (None, converse(stream, language, target.header, clock).await?)
    };
    let waited = if target.header && certificate.is_some() { LOOK } else { Duration::ZERO };
    let total = (heard.at - started).saturating_sub(waited);
    Ok(Finding { greeting: heard.greeting, certificate, connect, total })
}

/// A mailbox that has shaken hands has had its header, if one was due.
fn after_handshake(error: ProbeError) -> ProbeError {
    match error {
        ProbeError::ClosedSilently { .. } => {
            ProbeError::Cut("closed the connection after the TLS handshake, without a greeting".to_owned())
        }
        ProbeError::Silent { limit } => {
            ProbeError::Cut(format!("said nothing after the TLS handshake, within {limit:?} of dialling"))
        }
        other => other,
    }
}

/// When a probe has to be done.
#[derive(Clone, Copy, Debug)]
struct Clock {
    deadline: Instant,
    /// The time from the start to then, for texts.
    limit: Duration,
}

/// The greeting, and when it was complete.
struct Heard {
    greeting: String,
    at: Instant,
}

/// Greeting, goodbye, end. `header`: whether one stands before what is spoken.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    language: Language,
    header: bool,
    clock: Clock,
) -> Result<Heard, ProbeError> {
    let mut talk = Talk::new(stream);
    let greeting = greeting::hear(&mut talk, language, header, clock).await?;
    let at = Instant::now();
    if header {
        greeting::look_for_complaints(&mut talk, language, clock).await?;
    }
    greeting::say_goodbye(&mut talk, language, header, clock).await?;
    Ok(Heard { greeting, at })
}

/// Text of the mailbox, fit to be shown, and not much of it.
fn harmless(text: &[u8]) -> String {
    harmless_up_to(SHOWN, &String::from_utf8_lossy(text))
}

/// A text of a library, which may hold text of the mailbox.
fn harmless_error(error: &dyn fmt::Display) -> String {
    harmless_up_to(SHOWN, &error.to_string())
}

/// Durations as whole milliseconds.
mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(duration.as_millis().try_into().unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests;
