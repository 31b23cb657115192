//! It answers: what is sent on the wire. The protocols, the PROXY header, the meaning of a server's first lines,
//! and what to set in a mail server that does not trust the header.
//!
//! Promise: no input or output; a function takes bytes and returns bytes or a verdict.
//!
//! Deliberately not here: parsing mail protocols beyond a server's first lines, and TLS.

mod advice;
pub(crate) mod greeting;
pub(crate) mod header_watch;
pub mod proxy_header;

use std::fmt;
use std::time::Duration;

pub(crate) use advice::advice;

/// The protocol of a listener: decides its default port, its idle timeout and how a client is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Mail from other servers, 25.
    Smtp,
    /// Mail from own users, STARTTLS, 587.
    Submission,
    /// Mail from own users, TLS from the first byte, 465.
    Submissions,
    /// Reading mail, STARTTLS, 143.
    Imap,
    /// Reading mail, TLS from the first byte, 993.
    Imaps,
    /// Fetching mail, STARTTLS, 110.
    Pop3,
    /// Fetching mail, TLS from the first byte, 995.
    Pop3s,
    /// Filter scripts (ManageSieve), 4190.
    Sieve,
    /// HTTP or HTTPS, no default port.
    Http,
    /// Anything else, no default port.
    Tcp,
}

/// The version of the PROXY header that tells the upstream who the client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyProtocol {
    /// The text header.
    V1,
    /// The binary header.
    V2,
    /// No header: the upstream takes this process for the client.
    Off,
}

impl Protocol {
    /// Every protocol, in the order the documentation lists them.
    pub const ALL: [Protocol; 10] = [
        Protocol::Smtp,
        Protocol::Submission,
        Protocol::Submissions,
        Protocol::Imap,
        Protocol::Imaps,
        Protocol::Pop3,
        Protocol::Pop3s,
        Protocol::Sieve,
        Protocol::Http,
        Protocol::Tcp,
    ];

    /// The protocols served when the file has no listener, by ascending port.
    pub const DEFAULT: [Protocol; 5] =
        [Protocol::Smtp, Protocol::Submissions, Protocol::Submission, Protocol::Imaps, Protocol::Sieve];

    /// The name used in the file and in the log.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Smtp => "smtp",
            Protocol::Submission => "submission",
            Protocol::Submissions => "submissions",
            Protocol::Imap => "imap",
            Protocol::Imaps => "imaps",
            Protocol::Pop3 => "pop3",
            Protocol::Pop3s => "pop3s",
            Protocol::Sieve => "sieve",
            Protocol::Http => "http",
            Protocol::Tcp => "tcp",
        }
    }

    /// The well-known port, for both sides; `None` for http and tcp, whose ports must be given.
    pub const fn default_port(self) -> Option<u16> {
        match self {
            Protocol::Smtp => Some(25),
            Protocol::Submission => Some(587),
            Protocol::Submissions => Some(465),
            Protocol::Imap => Some(143),
            Protocol::Imaps => Some(993),
            Protocol::Pop3 => Some(110),
            Protocol::Pop3s => Some(995),
            Protocol::Sieve => Some(4190),
            Protocol::Http | Protocol::Tcp => None,
        }
    }

    /// The idle timeout when the listener names none. For mail it is longer than the servers' own limits, so that
    /// the server closes first, with a goodbye: 10 minutes in SMTP (RFC 5321) and POP3 (RFC 1939), 30 in IMAP (RFC
    /// 9051) and ManageSieve (RFC 5804).
    pub const fn default_idle_timeout(self) -> Duration {
        match self {
            Protocol::Smtp | Protocol::Submission | Protocol::Submissions => Duration::from_secs(15 * 60),
            Protocol::Pop3 | Protocol::Pop3s => Duration::from_secs(15 * 60),
            Protocol::Imap | Protocol::Imaps | Protocol::Sieve => Duration::from_secs(35 * 60),
            Protocol::Http | Protocol::Tcp => Duration::from_secs(10 * 60),
        }
    }

    /// Whether the server speaks first.
    pub const fn greets(self) -> bool {
        matches!(
            self,
            Protocol::Smtp | Protocol::Submission | Protocol::Imap | Protocol::Pop3 | Protocol::Sieve
        )
    }

    /// Whether TLS is spoken from the first byte.
    pub const fn is_tls(self) -> bool {
        matches!(self, Protocol::Submissions | Protocol::Imaps | Protocol::Pop3s)
    }

    /// Whether an upstream that does not learn the client's address would misattribute mail or
    /// log-ins.
    pub const fn is_mail(self) -> bool {
        !matches!(self, Protocol::Http | Protocol::Tcp)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for ProxyProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ProxyProtocol::V1 => "v1",
            ProxyProtocol::V2 => "v2",
            ProxyProtocol::Off => "off",
        })
    }
}
