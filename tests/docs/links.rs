//! Every link leads to a file, and to a heading in it. Links to other places are only looked at.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use hyper::Uri;

use crate::common::repo_root;
use crate::pages::{self, BOOK, Page, resolve};

#[test]
fn every_link_leads_somewhere() {
    let pages = pages::all();
    let anchors: HashMap<&Path, Vec<String>> =
        pages.iter().map(|page| (&*page.path, page.anchors())).collect();
    let (mut within, mut outside, mut wrong) = (0, 0, Vec::new());
    for page in &pages {
        for link in page.links() {
            let problem = if link.contains(':') {
                outside += 1;
                is_web(&link).then_some(()).ok_or_else(|| "is no web address".to_owned())
            } else {
                within += 1;
                leads(page, &link, &anchors)
            };
            if let Err(problem) = problem {
                wrong.push(format!("{}: {link}: {problem}", page.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(within >= 60 && outside >= 3, "{within} links within, {outside} to other places");
}

fn leads(page: &Page, link: &str, anchors: &HashMap<&Path, Vec<String>>) -> Result<(), String> {
    let (path, anchor) = match link.split_once('#') {
        Some((path, anchor)) => (path, Some(anchor)),
        None => (link, None),
    };
    let target: PathBuf = if path.is_empty() { page.path.clone() } else { resolve(&page.path, path) };
    if !repo_root().join(&target).exists() {
        return Err(format!("there is no {}", target.display()));
    }
    // The book is read where nothing else of the repository is.
    if page.path.starts_with(BOOK) && !target.starts_with(BOOK) {
        return Err("leads out of the book".to_owned());
    }
    let Some(anchor) = anchor else { return Ok(()) };
    let there = anchors.get(&*target).ok_or("a heading in what is no Markdown")?;
    there
        .iter()
        .any(|it| it == anchor)
        .then_some(())
        .ok_or_else(|| format!("no such heading; there is {there:?}"))
}

fn is_web(link: &str) -> bool {
    let uri: Result<Uri, _> = link.parse();
    uri.is_ok_and(|uri| {
        uri.scheme_str() == Some("https") && uri.host().is_some_and(|host| host.contains('.'))
    })
}

#[test]
fn a_link_that_leads_nowhere_is_found() {
    let page = Page { path: "docs/src/SUMMARY.md".into(), text: "# One heading, `with` code\n".into() };
    let anchors = HashMap::from([(Path::new("docs/src/SUMMARY.md"), page.anchors())]);
    assert_eq!(leads(&page, "#one-heading-with-code", &anchors), Ok(()));
    for wrong in ["#another", "nothing.md", "../../README.md", "../../README.md#try-it"] {
        assert!(leads(&page, wrong, &anchors).is_err(), "{wrong}");
    }
    for wrong in ["http://example.com", "https://", "https://localhost", "mailto:me"] {
        assert!(!is_web(wrong), "{wrong}");
    }
}
