//! The house: a module uses only what is on the floors below its own.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::repo_root;

/// The folders of `src/`, from the top: those of one line do not use each other.
const FLOORS: [&[&str]; 10] = [
    &["edge", "cli"],
    &["admin"],
    &["doctor"],
    &["listener"],
    &["connection"],
    &["upstream"],
    &["tailnet", "process"],
    &["config"],
    &["protocol", "ffi"],
    &["support"],
];

fn floor(folder: &str) -> usize {
    FLOORS.iter().position(|folders| folders.contains(&folder)).unwrap_or_else(|| {
        panic!("src/{folder} is on no floor; put it into FLOORS, and into ARCHITECTURE.md")
    })
}

/// The files below a directory that are code and no tests.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("source can be read").flatten().map(|entry| entry.path());
    let below = |path: PathBuf| match path.is_dir() {
        true => sources(&path),
        false => vec![path],
    };
    let is_code =
        |path: &PathBuf| path.extension().is_some_and(|end| end == "rs") && !path.ends_with("tests.rs");
    entries.flat_map(below).filter(is_code).collect()
}

/// The folders of `src/` that a file names, without its tests and comments.
fn named(text: &str) -> Vec<&str> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default())
        .collect()
}

#[test]
fn a_module_uses_only_what_is_below_it() {
    let src = repo_root().join("src");
    let (mut seen, mut upward) = (0, Vec::new());
    for path in sources(&src) {
        let place = path.strip_prefix(&src).expect("it is below").with_extension("");
        let folder = place.iter().next().and_then(|name| name.to_str()).expect("file names are text");
        if ["main", "program", "lib", "test_support"].contains(&folder) {
            continue;
        }
        let text = fs::read_to_string(&path).expect("source can be read");
        for other in named(&text).into_iter().filter(|other| *other != folder) {
            assert!(!other.is_empty(), "{}: name one module a line", path.display());
            seen += 1;
            if floor(other) <= floor(folder) {
                upward.push(format!("{} uses {other}", path.display()));
            }
        }
    }
    assert!(upward.is_empty(), "not below it:\n{}", upward.join("\n"));
    assert!(seen > 100, "only {seen}");
}
