//! The book's table of contents.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

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
        let titles = page.text.lines().filter(|line| line.starts_with("# ")).count();
        assert!(titles >= 1, "{}", page.name());
    }
}

/// The README is a front page; the book is where there is room.
#[test]
fn the_readme_is_short() {
    let lines = Page::read(Path::new("README.md")).text.lines().count();
    assert!(lines <= 160, "{lines} lines");
}
