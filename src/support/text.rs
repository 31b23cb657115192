//! Text fit to be printed: in a log line, on a terminal, in an answer.
//!
//! Invariant: whatever the input, the output of [`harmless`] is printable ASCII of bounded length, on one line.
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

/// Several values as one text, separated by commas; `None` if there are no values.
pub fn list<T: fmt::Display>(items: &[T]) -> Option<String> {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    (!items.is_empty()).then(|| items.join(", "))
}

/// An empty line, a heading and rows in columns; nothing if there are no rows.
pub fn table(
    f: &mut fmt::Formatter<'_>,
    heads: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> fmt::Result {
    let heads = heads.iter().map(|&head| head.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(heads).chain(rows).collect();
    if rows.len() == 1 {
        return Ok(());
    }
    writeln!(f)?;
    columns(f, &rows, usize::MAX)
}

/// Rows with the same number of cells. Each column is as wide as its widest cell, but at most `at_most`, so that
/// one long cell does not push all others to the right.
pub fn columns(f: &mut fmt::Formatter<'_>, rows: &[Vec<String>], at_most: usize) -> fmt::Result {
    let count = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(|column| width(column).min(at_most)).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// A host and its port; an IPv6 address is in brackets.
pub fn host_port(host: &str, port: u16) -> String {
    match host.parse::<std::net::Ipv6Addr>() {
        Ok(v6) => format!("[{v6}]:{port}"),
        Err(_) => format!("{host}:{port}"),
    }
}

/// A number of bytes for people.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1e3;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while value >= 999.95 && units.len() > 0 {
        value /= 1e3;
        unit = units.next();
    }
    format!("{value:.1} {}", unit.unwrap_or(&"PB"))
}

/// A time span for people.
pub fn lasting(seconds: i64) -> String {
    match seconds {
        ..60 => format!("{} s", seconds.max(0)),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
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

    #[test]
    fn numbers_are_for_people() {
        let texts = [0, 999, 1000, 999_949, 999_950, 12_345_678_901, u64::MAX].map(bytes);
        assert_eq!(texts, ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "12.3 GB", "18446.7 PB"]);
        let texts = [-5, 59, 60, 3599, 3600, 86_399, 90_000].map(lasting);
        assert_eq!(texts, ["0 s", "59 s", "1 min", "59 min", "1 h 0 min", "23 h 59 min", "1 d 1 h"]);
    }
}
