//! Why a server, or all of them, could not be reached, in words that say what to do.
//!
//! Deliberately not here: which end state follows from that (see `connection.rs`).

use std::fmt;
use std::io;
use std::mem::Discriminant;
use std::time::Duration;

use thiserror::Error;

use crate::tailnet::{ConnectError, PingReport};

/// Why no server of an upstream could be reached: each one's failure, in the order of the attempts.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub struct UpstreamError {
    failures: Vec<(String, Failure)>,
}

/// Why one server could not be reached.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Failure {
    /// The attempt failed with an answer.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Nothing answered.
    #[error("no answer within {limit:?}: {silence}")]
    Silent {
        /// `timeouts.connect`.
        limit: Duration,
        /// What a ping found out afterwards.
        silence: Silence,
    },
    /// The connection failed before the server had the header.
    #[error("cannot send it the PROXY header: {0}; check the mail server's log")]
    Header(io::ErrorKind),
    /// The server accepted the connection and closed it before either side sent anything.
    #[error(
        "the mail server closes the connection before it sends anything; it may be starting, or it may not trust this edge's PROXY header: check its log"
    )]
    Wordless,
}

/// The kind of a failure, without its details: another kind is worth another log line.
pub(super) type FailureKind = (Discriminant<Failure>, Option<ConnectError>);

impl Failure {
    pub(super) fn kind(&self) -> FailureKind {
        let connect = match self {
            Failure::Connect(error) => Some(*error),
            Failure::Silent { .. } | Failure::Header(_) | Failure::Wordless => None,
        };
        (std::mem::discriminant(self), connect)
    }
}

/// Why a port does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The peer answers a ping, so something drops packets to the port.
    Port,
    /// The peer does not answer either.
    Peer {
        /// Whether the control server sees it.
        online: bool,
        /// If it does not: when it last did (RFC 3339); else empty.
        last_seen: String,
    },
    /// This edge reaches nobody, so the silence says nothing about the peer.
    OwnNetwork,
    /// The peer could not be pinged.
    Unknown(ConnectError),
}

impl Silence {
    /// What a ping has found out.
    pub fn of(report: &PingReport) -> Silence {
        match (report.answered, report.network) {
            (true, _) => Silence::Port,
            (false, true) => Silence::Peer { online: report.online, last_seen: report.last_seen.clone() },
            (false, false) => Silence::OwnNetwork,
        }
    }
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Silence::Port => f.write_str(
                "the peer itself answers a ping, so an access rule of the tailnet or a firewall on the peer drops this port; \
                 allow it in the policy's grants or in that firewall",
            ),
            Silence::Peer { online: true, .. } => {
                f.write_str("the peer does not answer a ping either, although the control server sees it; check the peer's network")
            }
            Silence::Peer { online: false, last_seen } if last_seen.is_empty() => {
                f.write_str("the peer is offline; start it, or start Tailscale on it")
            }
            Silence::Peer { online: false, last_seen } => {
                write!(f, "the peer is offline, last seen {last_seen}; start it, or start Tailscale on it")
            }
            Silence::OwnNetwork => {
                f.write_str("this edge cannot reach its control server either; check the network of this machine")
            }
            Silence::Unknown(reason) => write!(f, "and the peer cannot be pinged: {reason}"),
        }
    }
}

impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(_, only)] = &self.failures[..] {
            return only.fmt(f);
        }
        for (index, (server, failure)) in self.failures.iter().enumerate() {
            write!(f, "{}{server}: {failure}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl UpstreamError {
    /// Makes one from the servers that were tried, in that order.
    pub(super) fn new(failures: Vec<(String, Failure)>) -> UpstreamError {
        UpstreamError { failures }
    }

    /// Makes one from a single server, for tests.
    #[cfg(test)]
    pub fn of(server: &str, failure: Failure) -> UpstreamError {
        UpstreamError { failures: vec![(server.to_owned(), failure)] }
    }

    /// Each server's failure, in the order of the attempts.
    pub fn failures(&self) -> impl Iterator<Item = &Failure> {
        self.failures.iter().map(|(_, failure)| failure)
    }

    /// The kind of each failure.
    pub(super) fn kinds(&self) -> Vec<FailureKind> {
        self.failures().map(Failure::kind).collect()
    }

    /// What happened, without what to do about it.
    pub fn what(&self) -> String {
        let what = |failure: &Failure| failure.to_string().split(';').next().unwrap_or_default().to_owned();
        if let [(_, only)] = &self.failures[..] {
            return what(only);
        }
        let each: Vec<_> =
            self.failures.iter().map(|(server, failure)| format!("{server}: {}", what(failure))).collect();
        each.join(", ")
    }

    /// Whether the tailnet's policy denies every server's port.
    pub fn is_denied(&self) -> bool {
        self.failures().all(|failure| *failure == Failure::Connect(ConnectError::Denied))
    }

    /// Whether a server may be to blame: false if all that failed was this edge, with no tailnet or no network.
    pub fn blames_a_server(&self) -> bool {
        self.failures().any(|failure| {
            !matches!(
                failure,
                Failure::Connect(ConnectError::NotRunning)
                    | Failure::Silent {
                        silence: Silence::OwnNetwork | Silence::Unknown(ConnectError::NotRunning),
                        ..
                    }
            )
        })
    }

    /// Whether waiting may help. It does not if the name is this edge's own, which is a mistake in the
    /// configuration.
    pub fn may_pass(&self) -> bool {
        self.failures.iter().any(|(_, failure)| *failure != Failure::Connect(ConnectError::IsSelf))
    }
}
