//! Is the mailbox up? A probe through the tailnet that leaves no warning in the mailbox's log.
//!
//! Purpose: connect as for a client, with a header that stands for no client, read the greeting, say goodbye, and
//! report what was wrong in words that name the cause.
//!
//! Invariants
//! - The probe ends within the caller's limit, however the mailbox behaves, and reads at most a few kilobytes.
//! - A probe ends as its protocol demands: QUIT or the like, its answer, end of stream. Mail servers log a warning
//!   about connections that just close.
//! - Text from the mailbox is made harmless before it is put into a [`Finding`] or a [`ProbeError`].
//!
//! Deliberately not here: trust in certificates (the clients have to trust the mailbox; the probe only reads the
//! certificate), logging in, STARTTLS, and what follows from a failure. For `http` and `tcp` a probe only connects
//! and sends the header if one is due, since the rest of the protocol is not known.

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

/// How long connecting may take: the default for clients. The greeting may take longer, since some mail servers
/// delay it for unknown clients.
const CONNECT_LIMIT: Duration = Duration::from_secs(8);

/// How long the probe waits for complaints about the header before it sends anything, so that a complaint is not
/// taken for an answer. A mailbox that complains does so at once; this is many round trips.
const LOOK: Duration = Duration::from_millis(300);

/// How many characters of the mailbox's text are shown.
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
    /// Whether a PROXY header is due; the probe sends a LOCAL header of version 2.
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
    /// Time from dialling to the end of the greeting, without the pauses that the probe makes on purpose.
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
    /// The last moment at which it is valid; may be in the past.
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
    /// Accepted, and then closed or reset before a byte came.
    #[error("the mailbox accepted the connection and closed it before it sent anything; {}", why_closed(.header))]
    ClosedSilently {
        /// Whether a header was sent.
        header: bool,
    },
    /// Accepted, but no byte came in time.
    #[error(
        "the mailbox accepted the connection, but sent nothing within {limit:?}; check that the mail server is not stuck, that the port speaks the listener's protocol (and TLS only if that protocol has it), and that proxy_protocol is not \"off\" for a port that waits for the header"
    )]
    Silent {
        /// The limit of the whole probe.
        limit: Duration,
    },
    /// The mailbox read the header as commands or as TLS: it expects no header, or none from us.
    #[error(
        "the mailbox took the PROXY header for data from the client, and answered it with \"{said}\"; make it trust this edge's tailnet addresses for the PROXY protocol on this port, or set proxy_protocol = \"off\" for the listener"
    )]
    HeaderTaken {
        /// The beginning of what it answered to the header.
        said: String,
    },
    /// The port speaks another protocol.
    #[error(
        "the port does not speak the listener's protocol, it sent \"{found}\"; check the listener's protocol and upstream_port"
    )]
    WrongProtocol {
        /// The beginning of what it said.
        found: String,
    },
    /// The mailbox refuses service.
    #[error("the mailbox refuses service: \"{greeting}\"; see the mail server's log")]
    Refused {
        /// The line with which it refused.
        greeting: String,
    },
    /// The handshake failed.
    #[error("the TLS handshake failed: {0}; check the certificate and the TLS settings of the mail server")]
    Tls(String),
    /// The conversation broke off.
    #[error("the mailbox answered at first, and then {0}; check the mail server's log")]
    Cut(String),
}

/// Why the mailbox may have closed; the causes differ with and without a header.
fn why_closed(header: &bool) -> &'static str {
    match header {
        true => {
            "a Dovecot that does not trust this edge for the PROXY protocol does this, and so do other servers that expect no header on a TLS port: make the server trust this edge's tailnet addresses, or look in its log for a limit or a ban"
        }
        false => {
            "a server that demands a PROXY header does this, since none was sent: set proxy_protocol for the listener, or look in the mail server's log for a limit or a ban"
        }
    }
}

/// Serialised as the text that people read.
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
        let _ = timeout_at(clock.deadline, stream.shutdown()).await; // connecting is all that counts here
        return Ok(Finding { greeting: String::new(), certificate: None, connect, total: connect });
    };
    let (certificate, heard) = if target.protocol.is_tls() {
        let (stream, certificate) = tls::handshake(stream, target, clock).await?;
        // Inside TLS a complaint cannot be about the header.
        (Some(certificate), converse(stream, language, false, clock).await.map_err(after_handshake)?)
    } else {
        (None, converse(stream, language, target.header, clock).await?)
    };
    let waited = if target.header && certificate.is_some() { LOOK } else { Duration::ZERO };
    let total = (heard.at - started).saturating_sub(waited);
    Ok(Finding { greeting: heard.greeting, certificate, connect, total })
}

/// After a TLS handshake the header cannot be the cause, so the error says so.
fn after_handshake(error: ProbeError) -> ProbeError {
    match error {
        ProbeError::ClosedSilently { .. } => {
            ProbeError::Cut("closed the connection after the TLS handshake, without a greeting".to_owned())
        }
        ProbeError::Silent { limit } => {
            ProbeError::Cut(format!("sent nothing after the TLS handshake; the probe waits {limit:?} in all"))
        }
        other => other,
    }
}

/// When a probe has to end.
#[derive(Clone, Copy, Debug)]
struct Clock {
    deadline: Instant,
    /// The time from the start to then, for texts.
    limit: Duration,
}

/// The greeting's first line, and when the greeting was complete.
struct Heard {
    greeting: String,
    at: Instant,
}

/// Greeting, goodbye, end. `header`: whether a header was sent just before.
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

/// Text from the mailbox, fit to be shown and cut short.
fn harmless(text: &[u8]) -> String {
    harmless_up_to(SHOWN, &String::from_utf8_lossy(text))
}

/// An error text of a library, which may contain text from the mailbox.
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
