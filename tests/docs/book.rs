//! The book's table of contents.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tailwart_edge::admin::status::Status;
use tailwart_edge::config::{Config, KEYS};
use tailwart_edge::connection::end_state::EndState;

use crate::common::repo_root;
use crate::pages::{self, BOOK, Page, resolve};

#[test]
fn the_summary_lists_every_page_once() {
    let summary = Page::read(&Path::new(BOOK).join("SUMMARY.md"));
    let links: Vec<PathBuf> = summary.links().iter().map(|link| resolve(&summary.path, link)).collect();
    let listed: BTreeSet<PathBuf> = links.iter().cloned().collect();
    assert_eq!(links.len(), listed.len(), "a page is listed twice: {links:?}");
    let pages = pages::all().into_iter().map(|page| page.path);
    let there: BTreeSet<PathBuf> =
        pages.filter(|path| path.starts_with(BOOK) && *path != summary.path).collect();
    assert_eq!(listed, there);
}

#[test]
fn every_page_begins_with_its_title() {
    for page in pages::all().iter().filter(|page| page.path.starts_with(BOOK)) {
        assert!(page.text.starts_with("# "), "{} has no title", page.name());
    }
}

/// The README is a front page; the book is where there is room.
#[test]
fn the_readme_is_short() {
    let lines = Page::read(Path::new("README.md")).text.lines().count();
    assert!(lines <= 160, "{lines} lines");
}

/// The JSON on a page.
fn json(page: &str) -> Value {
    let page = Page::read(&Path::new(BOOK).join(page));
    let block = page.blocks().into_iter().find(|block| block.kind == "json").expect("a block of JSON");
    serde_json::from_str(&block.code).expect("JSON")
}

#[test]
fn the_five_dial_lines_of_caddy_are_the_default() {
    let caddy = json("moving-from-caddy.md");
    let servers = caddy["apps"]["layer4"]["servers"].as_object().expect("servers");
    let dialled: BTreeSet<(String, String)> = servers
        .values()
        .map(|server| {
            let dial = &server["routes"][0]["handle"][0]["upstreams"][0]["dial"][0];
            (server["listen"][0].to_string(), dial.to_string())
        })
        .collect();
    let config = Config::without_file(Some("stalwart.tail1234.ts.net"), &|_| None).expect("a host");
    let ours = config.listeners.iter().map(|listener| {
        (format!("\":{}\"", listener.listen[0].port()), format!("\"{}\"", listener.upstream))
    });
    assert_eq!(dialled, ours.collect());
}

#[test]
fn the_state_is_shown_as_it_is() {
    let shown = json("reference/http.md");
    let status: Status = serde_json::from_value(shown.clone()).expect("an answer of /status");
    assert_eq!(serde_json::to_value(status).expect("JSON"), shown);
}

#[test]
fn every_end_state_is_on_its_page() {
    let page = Page::read(&Path::new(BOOK).join("reference/end-states.md")).text;
    let mut missing = Vec::new();
    for state in EndState::ALL {
        let failure = if state.is_failure() { "yes" } else { "" };
        let row = format!("| `{}` | {} | {failure} |", state.code(), state.meaning());
        if !page.contains(&row) {
            missing.push(row);
        }
    }
    assert!(missing.is_empty(), "not in reference/end-states.md:\n{}", missing.join("\n"));
}

/// The names of metrics in a file's code, without its tests.
fn metrics<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let code = code.split("#[cfg(test)]").next().unwrap_or_default();
    let literals = code.split('"').filter(|literal| literal.starts_with(prefix));
    literals.filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_')).collect()
}

#[test]
fn every_metric_is_on_its_page() {
    let page = Page::read(&Path::new(BOOK).join("reference/metrics.md")).text;
    for (file, prefix) in [
        ("src/connection/counters.rs", "tailwart_edge_"),
        ("src/admin/metrics.rs", "tailwart_edge_"),
        ("src/admin/metrics/process.rs", "process_"),
    ] {
        let code = fs::read_to_string(repo_root().join(file)).expect("source can be read");
        let names = metrics(&code, prefix);
        assert!(names.len() >= 5, "{file}: only {names:?}");
        for name in names {
            let is_there = ["`", "{"].iter().any(|end| page.contains(&format!("`{name}{end}")));
            assert!(is_there, "{file}: {name} is not in reference/metrics.md");
        }
    }
}

#[test]
fn every_key_that_is_named_exists() {
    let tables: BTreeSet<&str> = KEYS.iter().filter_map(|key| Some(key.path.split_once('.')?.0)).collect();
    let is_word = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let (mut seen, mut wrong) = (0, Vec::new());
    for page in pages::all() {
        for code in page.inline_code() {
            // `timeouts.hold`, also with what it is set to.
            let name = code.split(" = ").next().unwrap_or_default();
            let Some((table, key)) = name.split_once('.') else { continue };
            if !tables.contains(table) || !is_word(key) || ["rs", "go", "toml", "md"].contains(&key) {
                continue;
            }
            seen += 1;
            if !KEYS.iter().any(|key| key.path == name) {
                wrong.push(format!("{}: {name}", page.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "no such key:\n{}", wrong.join("\n"));
    assert!(seen >= 80, "only {seen}");
}
