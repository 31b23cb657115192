//! The page of errors has each that the code has.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::repo_root;
use crate::pages::{BOOK, Page};

#[test]
fn every_error_is_on_its_page() {
    let page = Page::read(&Path::new(BOOK).join("reference/errors.md")).text;
    let page = words(&page.replace('`', ""));
    let mut files = Vec::new();
    collect(&repo_root().join("src"), &mut files);
    let (mut seen, mut missing) = (0, Vec::new());
    for file in files {
        let code = fs::read_to_string(&file).expect("source can be read");
        for message in messages(&code) {
            seen += 1;
            let known = part_that_stays(&message);
            if !page.contains(&words(known)) {
                missing.push(format!("{}: {known:?} of {message:?}", file.display()));
            }
        }
    }
    assert!(seen >= 40, "only {seen} messages");
    assert!(missing.is_empty(), "not in reference/errors.md:\n{}", missing.join("\n"));
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("source can be read") {
        let path = entry.expect("source can be read").path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// The texts of thiserror's attributes.
fn messages(code: &str) -> Vec<String> {
    let attributes = code.split("#[error(").skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"'));
    attributes.map(string).filter(|message| part_that_stays(message).len() > 5).collect()
}

/// A string literal without its first quote.
fn string(literal: &str) -> String {
    let mut text = String::new();
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => match chars.next() {
                // A line that goes on.
                Some('\n') => chars = chars.as_str().trim_start().chars(),
                Some(escaped) => text.push(escaped),
                None => break,
            },
            c => text.push(c),
        }
    }
    text
}

/// Of what a message says was found, before what to do: the longest part without a value in it.
fn part_that_stays(message: &str) -> &str {
    let found = message.split("; ").next().unwrap_or_default();
    let parts = found.split('{').map(|part| part.split_once('}').map_or(part, |(_, after)| after));
    parts.map(str::trim).max_by_key(|part| part.len()).unwrap_or_default()
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn messages_are_found_in_code() {
    let code = "#[error(\"cannot do {0}: it is \\\"no\\\"; \\\n     do it\")]\nA,\n#[error(transparent)]\n#[error(\n \"another thing is wrong\"\n)]";
    assert_eq!(messages(code), ["cannot do {0}: it is \"no\"; do it", "another thing is wrong"]);
    assert_eq!(part_that_stays("cannot do {0}: it is \"no\"; do it"), ": it is \"no\"");
}
