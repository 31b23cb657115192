//! Finds what is not TOML, and rescues the rest of the file from it.
//!
//! The parser goes on after most syntax errors but gives up at some, and what it makes of a broken
//! line is a guess. So broken lines are blanked out and the rest is parsed again: one run then tells
//! the syntax errors and what is wrong with the values on the sound lines.
//!
//! Invariant: the rescued text has the same lines at the same offsets.
//!
//! Deliberately not here: rescuing a file with a broken table head, since the lines below it would
//! land in the wrong table, or one with so many errors that it is no TOML at all.

use std::borrow::Cow;

use toml::de::{DeTable, Error};

use super::mistakes::{At, Mistakes, PRINTED, quoted};

/// How often broken lines are blanked out. Files need one round, two if an error hid another.
const ROUNDS: usize = 4;

/// Reports the syntax errors; returns the text without the lines they are on.
pub(super) fn rescue<'t>(text: &'t str, mistakes: &mut Mistakes) -> Cow<'t, str> {
    let mut sound = Cow::Borrowed(text);
    for _ in 0..ROUNDS {
        let (_, errors) = DeTable::parse_recoverable(&sound);
        let broken = report(&errors, text, mistakes);
        let head = |at: &At| is_head(&text[mistakes.range(*at)]);
        if broken.len() > PRINTED {
            return Cow::Borrowed("");
        }
        if broken.is_empty() || broken.iter().any(head) {
            break;
        }
        for at in broken {
            let range = mistakes.range(at);
            let blank = " ".repeat(range.len());
            sound.to_mut().replace_range(range, &blank);
        }
    }
    sound
}

/// Whether a broken line was probably meant as `[table]`.
fn is_head(line: &str) -> bool {
    line.trim_start().starts_with('[') || (line.contains(']') && !line.contains('='))
}

/// Returns the lines of the errors, without the repetitions that follow each other.
fn report(errors: &[Error], text: &str, mistakes: &mut Mistakes) -> Vec<At> {
    let mut lines = Vec::new();
    for error in errors {
        let span = error.span().unwrap_or_default();
        let at = mistakes.line(&span);
        // The first error on a line is told; the others mostly follow from it.
        if lines.last() == Some(&at) {
            continue;
        }
        lines.push(at);
        let mut problem = error.message().trim_end_matches(", expected nothing").to_owned();
        if problem == "duplicate key" {
            let key = text.get(span).unwrap_or_default();
            problem = format!("the key {} is there twice", quoted(key));
        }
        mistakes.syntax(at, &problem);
    }
    lines
}
