//! Reports the lines that are not TOML.
//!
//! The parser goes on after most errors, so that one run reports the errors of several lines. What it makes of a
//! broken line is a guess, so no other mistakes of such a file are reported.

use std::collections::BTreeSet;

use toml::de::Error;

use super::mistakes::{Mistakes, quoted};

/// Reports the errors of the parser: on each line the first, since the others mostly follow from it.
pub(super) fn report(errors: &[Error], mistakes: &mut Mistakes) {
    let mut lines = BTreeSet::new();
    for error in errors {
        let span = error.span().unwrap_or_default();
        let at = mistakes.line(&span);
        if !lines.insert(at) {
            continue;
        }
        let mut problem = error.message().trim_end_matches(", expected nothing").to_owned();
        if problem == "duplicate key" {
            let key = mistakes.text.get(span).unwrap_or_default();
            problem = format!("the key {} appears twice", quoted(key));
        }
        mistakes.syntax(at, &problem);
    }
}
