//! Does the mailbox understand our PROXY header?
//!
//! Purpose: a mailbox that does not expect a header, or not from this edge, reads it as commands and answers with
//! errors. The errors do not name the PROXY protocol, so operators look for the cause elsewhere. [`HeaderWatch`]
//! recognises the complaint in what the server says before the client has spoken; [`advice`](super::advice())
//! names the settings to change.
//!
//! Invariants
//! - Before the client has sent anything, a server greets or refuses. An answer to a command, such as "syntax
//!   error" or "bye", is an answer to the header, since nothing else was sent.
//! - A refusal for another reason (load, policy, a ban list, an idle client) is never taken for a complaint: a
//!   false alarm would mislead the operator. In doubt there is no alarm.
//! - A watch is a few bytes large: it keeps at most the beginning of one line.
//!
//! Deliberately not here: anything about protocols in which the client speaks first (there an answer to the header
//! looks like an answer to the client), and anything active, see [`crate::upstream::probe`].

use std::time::Duration;

use tokio::time::Instant;

use crate::protocol::Protocol;
use crate::protocol::greeting::{Language, Line};

/// How much of a line is looked at: enough for a status with its enhanced
/// status, and for Exim's "554 SMTP synchronization error".
const LINE_START: usize = 32;

/// After this many bytes without a complaint there will be none.
const WATCHED: usize = 8192;

/// A complaint about the header follows the greeting at once (10 ms with Stalwart). Later lines are about
/// something else: Dovecot sends `-ERR` to an idle POP3 client.
const ON_THE_HEELS: Duration = Duration::from_secs(5);

/// What the server's first bytes say about our header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not enough was heard.
    Undecided,
    /// The header was taken for commands: the mailbox does not expect it from this edge.
    Taken,
    /// There is no complaint, and none will come.
    Fine,
}

/// Watches what a server says before its client has spoken.
///
/// Do not use it any more once it has decided, or once the client has sent a byte.
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

#[cfg(test)]
mod tests;
