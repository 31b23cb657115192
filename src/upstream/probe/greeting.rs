//! What a probe reads and sends in plain text: the greeting, complaints about the header, and goodbye.
//!
//! Deliberately not here: what a line means, see [`Language`].

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::talk::{NoLine, Talk};
use super::{Clock, LOOK, ProbeError, harmless};
use crate::protocol::greeting::{Language, Line, word};

/// How long the mailbox has to answer goodbye and to close the stream.
const GOODBYE: Duration = Duration::from_secs(2);

/// The first line of the greeting, once the whole greeting was read.
pub(super) async fn hear<S: AsyncRead + AsyncWrite + Unpin>(
    talk: &mut Talk<S>,
    language: Language,
    header: bool,
    clock: Clock,
) -> Result<String, ProbeError> {
    let mut first = None;
    loop {
        let line = match talk.line(clock.deadline).await {
            Ok(line) => line,
            Err(stop) => return Err(no_greeting(&stop, talk, language, header, clock)),
        };
        match language.line(&line, false) {
            Line::More => drop(first.get_or_insert(line)),
            Line::Greeting => return Ok(harmless(&first.unwrap_or(line))),
            Line::Complaint if header => return Err(ProbeError::HeaderTaken { said: harmless(&line) }),
            Line::Complaint | Line::Refusal => return Err(ProbeError::Refused { greeting: harmless(&line) }),
            Line::Other => return Err(ProbeError::WrongProtocol { found: found(&line) }),
        }
    }
}

/// Why there was no greeting.
fn no_greeting<S: AsyncRead + AsyncWrite + Unpin>(
    stop: &NoLine,
    talk: &Talk<S>,
    language: Language,
    header: bool,
    clock: Clock,
) -> ProbeError {
    match stop {
        NoLine::Ended | NoLine::Failed(_) if !talk.heard_something() => ProbeError::ClosedSilently { header },
        NoLine::Late if !talk.heard_something() => ProbeError::Silent { limit: clock.limit },
        _ => {
            let open = talk.unfinished();
            if !open.is_empty() && language.line(open, false) == Line::Other {
                return ProbeError::WrongProtocol { found: found(open) };
            }
            ProbeError::Cut(match stop {
                NoLine::Ended => "closed the connection in the middle of its greeting".to_owned(),
                NoLine::Failed(error) => {
                    format!("the connection failed in the middle of its greeting: {error}")
                }
                NoLine::Late => format!("did not end its greeting within {:?}", clock.limit),
                NoLine::TooMuch => "did not end its greeting".to_owned(),
            })
        }
    }
}

/// What was found in place of a greeting.
fn found(line: &[u8]) -> String {
    match line {
        [0x15 | 0x16, 0x03, ..] => "(TLS)".to_owned(),
        text => harmless(text),
    }
}

/// Waits for complaints of a mailbox that took the header for commands. A healthy mailbox says nothing now.
pub(super) async fn look_for_complaints<S: AsyncRead + AsyncWrite + Unpin>(
    talk: &mut Talk<S>,
    language: Language,
    clock: Clock,
) -> Result<(), ProbeError> {
    let until = clock.deadline.min(Instant::now() + LOOK);
    loop {
        match talk.line(until).await {
            Ok(line) => match language.line(&line, true) {
                Line::Complaint => return Err(ProbeError::HeaderTaken { said: harmless(&line) }),
                Line::Refusal => return Err(ProbeError::Refused { greeting: harmless(&line) }),
                Line::More | Line::Greeting | Line::Other => {}
            },
            Err(NoLine::Late) => return Ok(()),
            Err(stop) => return Err(cut(&stop, "after its greeting")),
        }
    }
}

/// Says goodbye, so that the mailbox logs no warning.
pub(super) async fn say_goodbye<S: AsyncRead + AsyncWrite + Unpin>(
    talk: &mut Talk<S>,
    language: Language,
    header: bool,
    clock: Clock,
) -> Result<(), ProbeError> {
    let until = clock.deadline.min(Instant::now() + GOODBYE);
    let command = goodbye(language);
    let context = format!("in answer to {command}");
    talk.say(&format!("{command}\r\n"), until).await.map_err(|stop| cut(&stop, &context))?;
    loop {
        let line = talk.line(until).await.map_err(|stop| cut(&stop, &context))?;
        if answers(language, &line) {
            break;
        }
        match language.line(&line, true) {
            Line::Complaint if header => return Err(ProbeError::HeaderTaken { said: harmless(&line) }),
            // IMAP's BYE comes before the answer.
            Line::Refusal if language != Language::Imap => {
                return Err(ProbeError::Refused { greeting: harmless(&line) });
            }
            Line::Complaint => {
                return Err(ProbeError::Cut(format!("said \"{}\" {context}", harmless(&line))));
            }
            _ => {}
        }
    }
    talk.close(until).await;
    Ok(())
}

fn goodbye(language: Language) -> &'static str {
    match language {
        Language::Smtp | Language::Pop3 => "QUIT",
        Language::Imap => "a LOGOUT",
        Language::Sieve => "LOGOUT",
    }
}

/// Whether a line is the answer to our goodbye; it is the mailbox's last line.
fn answers(language: Language, line: &[u8]) -> bool {
    let first = word(line, 0);
    match language {
        Language::Smtp => first == b"221",
        Language::Imap => first == b"a" && word(line, 1).eq_ignore_ascii_case(b"OK"),
        Language::Pop3 => first == b"+OK",
        Language::Sieve => first.eq_ignore_ascii_case(b"OK") || first.eq_ignore_ascii_case(b"BYE"),
    }
}

fn cut(stop: &NoLine, when: &str) -> ProbeError {
    ProbeError::Cut(match stop {
        NoLine::Ended => format!("closed the connection {when}"),
        NoLine::Failed(error) => format!("the connection failed {when}: {error}"),
        NoLine::Late => format!("said nothing {when}"),
        NoLine::TooMuch => format!("sent far too much {when}"),
    })
}
