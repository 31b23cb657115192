//! The Markdown files of this repository, and what is in them.

use std::fs;
use std::path::{Component, Path, PathBuf};

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

use crate::common::repo_root;

/// A Markdown file.
pub struct Page {
    /// From the repository's root.
    pub path: PathBuf,
    /// With what it includes.
    pub text: String,
}

/// A fenced block of code.
pub struct Block {
    /// Where it is, for messages.
    pub place: String,
    /// What follows the backticks.
    pub kind: String,
    pub code: String,
}

/// Where the book's pages are.
pub const BOOK: &str = "docs/src";

/// All of them.
pub fn all() -> Vec<Page> {
    let mut paths = Vec::new();
    collect(&repo_root(), &mut paths);
    paths.sort();
    let pages: Vec<Page> = paths.iter().map(|path| Page::read(path)).collect();
    let of_the_book = pages.iter().filter(|page| page.path.starts_with(BOOK)).count();
    assert!(pages.len() >= 25 && of_the_book >= 20, "{} files, {of_the_book} of the book", pages.len());
    pages
}

/// What is not built and not hidden.
fn collect(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("the repository can be read") {
        let entry = entry.expect("the repository can be read");
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let is_ours = !name.starts_with('.') && !["target", "dist", "node_modules"].contains(&&*name);
            if is_ours {
                collect(&path, into);
            }
        } else if name.ends_with(".md") {
            into.push(path.strip_prefix(repo_root()).expect("it is in the repository").to_owned());
        }
    }
}

impl Page {
    pub fn read(path: &Path) -> Page {
        let file = repo_root().join(path);
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let lines = text.lines().map(|line| match included(line) {
            Some(other) => read_from(path, other),
            None => format!("{line}\n"),
        });
        Page { path: path.to_owned(), text: lines.collect() }
    }

    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    pub fn events(&self) -> impl Iterator<Item = Event<'_>> {
        Parser::new_ext(&self.text, Options::ENABLE_TABLES)
    }

    /// Fenced blocks; an indented one says nothing of its kind, so there is none.
    pub fn blocks(&self) -> Vec<Block> {
        let (mut blocks, mut open) = (Vec::new(), None::<Block>);
        let parser = Parser::new_ext(&self.text, Options::ENABLE_TABLES).into_offset_iter();
        for (event, range) in parser {
            match event {
                Event::Start(Tag::CodeBlock(kind)) => {
                    let line = 1 + self.text[..range.start].matches('\n').count();
                    let place = format!("{}:{line}", self.path.display());
                    let CodeBlockKind::Fenced(kind) = kind else {
                        panic!("{place}: an indented block; fence it and say what it is")
                    };
                    open = Some(Block { place, kind: kind.to_string(), code: String::new() });
                }
                Event::Text(text) => {
                    if let Some(block) = &mut open {
                        block.code.push_str(&text);
                    }
                }
                Event::End(TagEnd::CodeBlock) => blocks.extend(open.take()),
                _ => {}
            }
        }
        blocks
    }

    /// Code within a sentence.
    pub fn inline_code(&self) -> Vec<String> {
        let code = self.events().filter_map(|event| match event {
            Event::Code(code) => Some(code.into_string()),
            _ => None,
        });
        code.collect()
    }

    /// Where its links and images lead.
    pub fn links(&self) -> Vec<String> {
        let targets = self.events().filter_map(|event| match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                Some(dest_url.into_string())
            }
            _ => None,
        });
        targets.collect()
    }

    /// The anchors of its headings, as mdBook and code hosts make them.
    pub fn anchors(&self) -> Vec<String> {
        let mut anchors: Vec<String> = Vec::new();
        let mut heading: Option<String> = None;
        for event in self.events() {
            match event {
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let anchor = anchor(&heading.take().unwrap_or_default());
                    let same = anchors.iter().filter(|other| **other == anchor).count();
                    assert_eq!(same, 0, "{} has two headings #{anchor}", self.path.display());
                    anchors.push(anchor);
                }
                Event::Text(text) | Event::Code(text) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&text);
                    }
                }
                _ => {}
            }
        }
        anchors
    }
}

/// The file that a line of the book includes.
fn included(line: &str) -> Option<&str> {
    line.trim().strip_prefix("{{#include ")?.strip_suffix("}}")
}

fn read_from(page: &Path, other: &str) -> String {
    let path = resolve(page, other);
    fs::read_to_string(repo_root().join(&path)).unwrap_or_else(|error| {
        panic!("{} includes {}, which cannot be read: {error}", page.display(), path.display())
    })
}

/// A path as a page writes it, from the repository's root.
pub fn resolve(page: &Path, written: &str) -> PathBuf {
    let mut path = page.parent().unwrap_or(Path::new("")).to_owned();
    for part in Path::new(written).components() {
        match part {
            Component::ParentDir => {
                assert!(path.pop(), "{}: {written} leaves the repository", page.display())
            }
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    path
}

fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
        _ => None,
    });
    kept.flat_map(char::to_lowercase).collect()
}
