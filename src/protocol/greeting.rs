//! What a mail server's first lines mean, before a client has sent anything: a greeting, a refusal, or an answer
//! to a command that nobody sent.
//!
//! Deliberately not here: what follows from that (see `header_watch.rs` and `upstream/probe.rs`).

use crate::protocol::Protocol;

/// The meaning of a line that a server sends before a client has sent anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A part of a greeting that is not its last line, or an addition to it.
    More,
    /// The greeting, or the last line of it.
    Greeting,
    /// The server refuses this client, perhaps only for now.
    Refusal,
    /// An answer to a command, but nobody sent one: the server took the header for it.
    Complaint,
    /// Not a line of this protocol.
    Other,
}

/// The mail protocol on a port, inside TLS or not.
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
    pub(super) fn spoken_first(protocol: Protocol) -> Option<Language> {
        Language::of(protocol).filter(|_| !protocol.is_tls())
    }

    /// The meaning of a line; the beginning of the line is enough. `greeted`: whether the greeting is complete.
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
        // With a response code such as [SYS/TEMP] or [IN-USE] it is not about a command.
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
        // With a response code such as (TRYLATER) it is not about a command.
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
