//! Text fit to be printed: in a log line, on a terminal, in an answer.
//!
//! Invariant: whatever text comes in from elsewhere, what goes out of [`harmless`] is printable ASCII of bounded length on one line.
//!
//! Deliberately not here: hiding what is secret (see `secret.rs`), and text from the control server,
//! which passes `words.go` before it leaves the library.

use std::fmt;

/// The most characters that [`harmless`] leaves; the doctor's advice on trust has some 900.
const CHARS: usize = 1500;

/// Printable ASCII of bounded length; anything else becomes `?`, a line end a space.
pub fn harmless(text: &str) -> String {
    harmless_up_to(CHARS, text)
}

/// The same with another bound.
pub fn harmless_up_to(chars: usize, text: &str) -> String {
    let printable = |c: char| match c {
        ' '..='~' => c,
        '\n' | '\r' | '\t' => ' ',
        _ => '?',
    };
    let text = text.trim();
    let mut shown: String = text.chars().take(chars).map(printable).collect();
    if text.chars().nth(chars).is_some() {
        shown.push_str("...");
    }
    shown
}

/// Several values of one field, as people write them; none is no field.
pub fn list<T: fmt::Display>(items: &[T]) -> Option<String> {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    (!items.is_empty()).then(|| items.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_elsewhere_is_made_harmless() {
        assert_eq!(harmless("220 \x1b[2Jmail\u{202e}\r\nx\0"), "220 ?[2Jmail?  x?");
        assert_eq!(harmless(" \r\n"), "");
        assert_eq!(harmless(&"a".repeat(9000)).len(), CHARS + 3);
    }

    #[test]
    fn only_what_is_longer_is_cut() {
        assert_eq!(harmless_up_to(3, " abc\n"), "abc");
        assert_eq!(harmless_up_to(3, "abcd"), "abc...");
    }

    #[test]
    fn several_values_are_one_text_and_none_is_nothing() {
        assert_eq!(list(&["tag:a", "tag:b"]).as_deref(), Some("tag:a, tag:b"));
        assert_eq!(list::<String>(&[]), None);
    }
}
