//! Does the mailbox take our PROXY header for what it is?
//!
//! Purpose: a mailbox that does not expect a header, or not from this edge,
//! reads it as commands and complains of them. Nothing in what it says names
//! the PROXY protocol, so operators look everywhere else. [`HeaderWatch`]
//! recognises the complaint in what the server says before the client has
//! spoken, and [`advice`] names the settings to change.
//!
//! Invariants
//! - A server that speaks before it was spoken to greets, or refuses. An answer
//!   to a command, "syntax error" or "bye", is an answer to the header, as
//!   nothing else was sent.
//! - A refusal for another reason (load, policy, a ban list, an idle client)
//!   is never taken for a complaint: a false alarm would send the operator
//!   astray. In doubt there is none.
//! - A watch is a few bytes, and holds the beginning of one line at most.
//!
//! Deliberately not here: anything about protocols in which the client speaks
//! first (there the header's effect cannot be told from the client's), and
//! anything active, see [`crate::upstream::probe`].

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::protocol::Protocol;

/// How much of a line is looked at: enough for a status with its enhanced
/// status, and for Exim's "554 SMTP synchronization error".
const LINE_START: usize = 32;

/// After this many bytes without a complaint there will be none.
const WATCHED: usize = 8192;

/// A complaint about the header follows on the greeting's heels (10 ms with
/// Stalwart). What a server says by itself later is about something else:
/// Dovecot ends an idle POP3 client with `-ERR`.
const ON_THE_HEELS: Duration = Duration::from_secs(5);

/// What the server's first bytes say about our header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet.
    Undecided,
    /// It was taken for commands: the mailbox does not expect it from us.
    Taken,
    /// There is nothing to find out any more.
    Fine,
}

/// Watches what a server says before its client has spoken.
///
/// Ask no more once it has decided, or once the client has sent a byte.
#[derive(Debug)]
pub struct HeaderWatch {
    language: Language,
    /// The beginning of the line that has not ended yet.
    start: [u8; LINE_START],
    /// How many bytes of `start` are in use.
    used: u8,
    /// How many bytes were heard.
    heard: u16,
    /// When the greeting ended, if it has.
    greeted: Option<Instant>,
}

impl HeaderWatch {
    /// `None` for a protocol whose server does not speak first.
    pub fn new(protocol: Protocol) -> Option<HeaderWatch> {
        let language = Language::spoken_first(protocol)?;
        Some(HeaderWatch { language, start: [0; LINE_START], used: 0, heard: 0, greeted: None })
    }

    /// The server has said more, in whatever pieces.
    pub fn server_said(&mut self, bytes: &[u8]) -> Verdict {
        if self.greeted.is_some_and(|at| at.elapsed() > ON_THE_HEELS) {
            return Verdict::Fine;
        }
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.keep(piece);
            if piece.ends_with(b"\n") {
                match self.line() {
                    Verdict::Undecided => self.used = 0,
                    decided => return decided,
                }
            }
            if usize::from(self.heard) >= WATCHED {
                return Verdict::Fine;
            }
        }
        Verdict::Undecided
    }

    /// Keeps what fits of a piece of a line.
    fn keep(&mut self, piece: &[u8]) {
        let used = usize::from(self.used);
        let fits = piece.len().min(LINE_START - used);
        self.start[used..used + fits].copy_from_slice(&piece[..fits]);
        self.used += fits as u8; // at most LINE_START
        self.heard = self.heard.saturating_add(piece.len().try_into().unwrap_or(u16::MAX));
    }

    /// Judges the line that has ended.
    fn line(&mut self) -> Verdict {
        let line = self.start[..usize::from(self.used)].trim_ascii_end();
        match self.language.line(line, self.greeted.is_some()) {
            Line::More => Verdict::Undecided,
            Line::Greeting => {
                self.greeted = Some(Instant::now());
                Verdict::Undecided
            }
            Line::Complaint => Verdict::Taken,
            Line::Refusal | Line::Other => Verdict::Fine,
        }
    }
}

/// What a line means that a server says before it was spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// Part of a greeting that goes on, or an addition to one.
    More,
    /// The greeting, or the last line of it.
    Greeting,
    /// The server does not want this client, or not now.
    Refusal,
    /// An answer to a command that nobody sent: to the header.
    Complaint,
    /// Nothing that is said in this language.
    Other,
}

/// What is spoken on a mail port, with TLS around it or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Language {
    Smtp,
    Imap,
    Pop3,
    Sieve,
}

impl Language {
    /// `None` for what is not mail.
    pub(crate) fn of(protocol: Protocol) -> Option<Language> {
        match protocol {
            Protocol::Smtp | Protocol::Submission | Protocol::Submissions => Some(Language::Smtp),
            Protocol::Imap | Protocol::Imaps => Some(Language::Imap),
            Protocol::Pop3 | Protocol::Pop3s => Some(Language::Pop3),
            Protocol::Sieve => Some(Language::Sieve),
            Protocol::Http | Protocol::Tcp => None,
        }
    }

    /// The same, `None` also where TLS comes first.
    fn spoken_first(protocol: Protocol) -> Option<Language> {
        Language::of(protocol).filter(|_| !protocol.is_tls())
    }

    /// What a line says; its beginning is enough. `greeted`: whether the
    /// greeting is complete.
    pub(crate) fn line(self, line: &[u8], greeted: bool) -> Line {
        match self {
            Language::Smtp => smtp(line, greeted),
            Language::Imap => imap(line, greeted),
            Language::Pop3 => pop3(line, greeted),
            Language::Sieve => sieve(line, greeted),
        }
    }
}

fn smtp(line: &[u8], greeted: bool) -> Line {
    let Some((code, rest)) = line.split_at_checked(3) else { return Line::Other };
    if !code.iter().all(u8::is_ascii_digit) || !matches!(rest.first(), None | Some(b' ' | b'-')) {
        return Line::Other;
    }
    match (code, rest.first()) {
        (b"220", Some(b'-')) => Line::More,
        (b"220", _) if greeted => Line::More,
        (b"220", _) => Line::Greeting,
        (b"221", _) if greeted => Line::Complaint, // the QUIT in the v2 signature
        ([b'5', ..], _) if is_protocol_error(code, rest) => Line::Complaint,
        (b"221", _) | ([b'4' | b'5', ..], _) => Line::Refusal,
        _ => Line::Other,
    }
}

/// Whether a 5xx reply is about how the client speaks, not about who it is.
/// postscreen refuses a client on a ban list with `521 5.7.1` and one that
/// speaks early with `521 5.5.1`, both after its first `220-`.
fn is_protocol_error(code: &[u8], rest: &[u8]) -> bool {
    let text = rest.get(1..).unwrap_or_default();
    match text {
        [b'5', b'.', b'5', b'.', ..] => true,
        [b'5', b'.', b'0'..=b'9', b'.', ..] => false,
        _ => matches!(code, [b'5', b'0', b'0'..=b'4']) || contains(text, b"synchroni"), // Exim, in place of its 220
    }
}

fn imap(line: &[u8], greeted: bool) -> Line {
    let (tag, word) = (word(line, 0), word(line, 1));
    let untagged = tag == b"*";
    match &word.to_ascii_uppercase()[..] {
        b"OK" | b"PREAUTH" if untagged && !greeted => Line::Greeting,
        b"BYE" if untagged => Line::Refusal,
        b"NO" if untagged && !greeted => Line::Refusal,
        // A warning that any server may give (RFC 9051 section 7.1.2).
        b"NO" if untagged => Line::More,
        b"BAD" | b"NO" => Line::Complaint,
        _ if untagged && greeted => Line::More,
        _ => Line::Other,
    }
}

fn pop3(line: &[u8], greeted: bool) -> Line {
    match word(line, 0) {
        b"+OK" if greeted => Line::Complaint, // the QUIT in the v2 signature
        b"+OK" => Line::Greeting,
        // With a response code it is about the mailbox: [SYS/TEMP], [IN-USE].
        b"-ERR" if greeted && !word(line, 1).starts_with(b"[") => Line::Complaint,
        b"-ERR" => Line::Refusal,
        _ => Line::Other,
    }
}

fn sieve(line: &[u8], greeted: bool) -> Line {
    match &word(line, 0).to_ascii_uppercase()[..] {
        b"OK" if greeted => Line::More,
        b"OK" => Line::Greeting,
        [b'"', ..] => Line::More, // a capability
        // With a response code it is about the mailbox: (TRYLATER).
        b"NO" if greeted && !word(line, 1).starts_with(b"(") => Line::Complaint,
        b"NO" | b"BYE" => Line::Refusal,
        _ => Line::Other,
    }
}

/// The n-th word of a line, counted from 0; empty if there is none.
pub(crate) fn word(line: &[u8], n: usize) -> &[u8] {
    line.split(|&byte| byte == b' ').nth(n).unwrap_or_default()
}

fn contains(text: &[u8], wanted: &[u8]) -> bool {
    text.windows(wanted.len()).any(|part| part.eq_ignore_ascii_case(wanted))
}

/// One line for the operator of a mailbox that takes the header for commands:
/// what to set there, so that it trusts this edge and nobody else.
pub fn advice(tailnet_addresses: &[IpAddr]) -> String {
    let mut networks: Vec<String> = tailnet_addresses.iter().map(network).collect();
    if networks.is_empty() {
        networks.push("EDGE_TAILNET_ADDRESS".to_owned()); // the line is of use all the same
    }
    format!(
        "let the mail server take the PROXY protocol from {listed}; \
         Stalwart 0.15: server.listener.<id>.proxy.override = true and \
         server.listener.<id>.proxy.trusted-networks = {networks:?}, or server.proxy.trusted-networks for every \
         listener; Stalwart 0.16: overrideProxyTrustedNetworks of the listener (Settings, Network, Listeners), \
         or proxyTrustedNetworks of the system settings for every listener; \
         Postfix: -o smtpd_upstream_proxy_protocol=haproxy for the port in master.cf, or \
         postscreen_upstream_proxy_protocol = haproxy in main.cf where postscreen has the port; \
         Dovecot: haproxy = yes in the inet_listener, and haproxy_trusted_networks = {spaced}",
        listed = networks.join(" and "),
        spaced = networks.join(" "),
    )
}

/// The network of one address alone.
fn network(address: &IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(v4) => format!("{v4}/32"),
        IpAddr::V6(v6) => format!("{v6}/128"),
    }
}

#[cfg(test)]
mod tests;
