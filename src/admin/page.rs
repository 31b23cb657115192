//! The state of the edge as one page for a browser, in the spirit of HAProxy's statistics.
//!
//! Invariants: the page loads no other file and has no script, and its headers forbid the browser both. All
//! text goes through maud, which escapes it. The page asks the browser to load it again every few seconds.
//!
//! Deliberately not here: finding the figures (see `admin/overview.rs`).

use std::fmt;

use http_body_util::Full;
use hyper::Response;
use hyper::body::Bytes;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use jiff::Timestamp;
use maud::{DOCTYPE, Markup, PreEscaped, Render, html};

use crate::admin::status::{Details, ProbeLine, Status};
use crate::support::text::{bytes, lasting};
use crate::upstream::health::{Seen, State};

/// The time between two loads.
const REFRESH_SECONDS: u32 = 5;

const STYLE: &str = include_str!("page.css");

/// Allows only the style above, by its SHA-256, and forbids other sites to show the page in a frame.
const POLICY: &str = "default-src 'none'; style-src 'sha256-KxmMhGWPvjl8sDU4IgwQ3AyHyIhtpWP4urSAjFcoX+E='; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page.
pub fn response(status: &Status) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(page(status).into_string()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn page(status: &Status) -> Markup {
    let verdict = if status.not_ready.is_empty() { "ready" } else { "not ready" };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="refresh" content=(REFRESH_SECONDS);
                title { (status.node.name) ": " (verdict) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                (header(status, verdict))
                main {
                    (listeners(status))
                    (upstreams(status))
                    (failures(status))
                    (clients(status))
                    (connections(status))
                }
                footer {
                    "tailwart-edge " (status.version) ", Tailscale " (status.tailscale) ". "
                    "Refreshes every " (REFRESH_SECONDS) " s. "
                    a href="/status" { "JSON" } " · " a href="/metrics" { "metrics" } " · "
                    a href="/readyz" { "readyz" }
                }
            }
        }
    }
}

fn header(status: &Status, verdict: &str) -> Markup {
    let class = if status.not_ready.is_empty() { "good" } else { "bad" };
    html! {
        header {
            h1 { (status.node.name) " " span.verdict.(class) id="verdict" { (verdict) } }
            @for reason in &status.not_ready { p.note.bad { (reason) } }
            @for warning in &status.warnings { p.note.warning { (warning) } }
            p.faint { (status.node) }
            dl {
                (figure("connections", status.open))
                (figure("held", status.held))
                (figure("up", lasting(status.now.duration_since(status.started).as_secs())))
                (figure("as of", time(status.now)))
            }
        }
    }
}

fn figure(name: &str, value: impl fmt::Display) -> Markup {
    html! { div { dt { (name) } dd { (value.to_string()) } } }
}

fn time(at: Timestamp) -> String {
    at.strftime("%F %T UTC").to_string()
}

/// How long ago something was; the tooltip shows the time itself.
fn age(now: Timestamp, at: Timestamp) -> Markup {
    html! { time title=(time(at)) { (lasting(now.duration_since(at).as_secs())) } }
}

/// The content of a table's cell, and its CSS class.
struct Cell {
    class: &'static str,
    content: Markup,
}

fn text(content: impl fmt::Display) -> Cell {
    marked_up(content.to_string().render())
}

fn marked_up(content: Markup) -> Cell {
    Cell { class: "", content }
}

/// Text that must not be wrapped, such as an address.
fn path(content: &str) -> Cell {
    Cell { class: "whole", ..text(content) }
}

fn number(content: impl fmt::Display) -> Cell {
    Cell { class: "number", content: content.to_string().render() }
}

/// A section with a table, or "None." if there are no rows. The first cell of a row is its heading. A column
/// whose head begins with `#` has numbers.
fn section<const N: usize>(
    id: &str,
    title: &str,
    heads: [&str; N],
    rows: impl Iterator<Item = [Cell; N]>,
) -> Markup {
    let mut rows = rows.peekable();
    let names = heads.map(|head| head.trim_start_matches('#'));
    html! {
        section id=(id) {
            h2 { (title) }
            @if rows.peek().is_none() {
                p.faint { "None." }
            } @else {
                div.scroll { table {
                    thead { tr { @for (head, name) in heads.iter().zip(names) {
                        th.number[head.starts_with('#')] scope="col" { (name) }
                    } } }
                    tbody { @for row in rows { tr { @for (index, (name, cell)) in names.iter().zip(row).enumerate() {
                        @if index == 0 {
                            th scope="row" { (cell.content) }
                        } @else {
                            td.(cell.class) data-name=(name) { span { (cell.content) } }
                        }
                    } } } }
                } }
            }
        }
    }
}

fn listeners(status: &Status) -> Markup {
    let heads = [
        "name",
        "protocol",
        "addresses",
        "upstream",
        "#open",
        "#ended",
        "#failed",
        "#from clients",
        "#to clients",
    ];
    let rows = status.listeners.iter().map(|listener| {
        let failed = if listener.failed > 0 { "number bad" } else { "number" };
        [
            text(&listener.name),
            text(&listener.protocol),
            marked_up(html! {
                @if listener.removed { "removed" }
                @for address in &listener.addresses { span.line { (address) } }
            }),
            text(&listener.upstream),
            number(listener.open),
            number(listener.ended),
            Cell { class: failed, ..number(listener.failed) },
            number(bytes(listener.sent)),
            number(bytes(listener.received)),
        ]
    });
    section("listeners", "Listeners", heads, rows)
}

fn upstreams(status: &Status) -> Markup {
    let rows = status.upstreams.iter().map(|upstream| {
        let class = match upstream.probe.state {
            State::Up => "good",
            State::Down => "bad",
            State::Unknown | State::Unprobed => "faint",
        };
        let latency = upstream.latency_ms.map(|ms| format!("{ms:.1} ms"));
        [
            text(&upstream.upstream),
            text(&upstream.listener),
            path(upstream.path.as_deref().unwrap_or("not known yet")),
            number(latency.as_deref().unwrap_or("-")),
            Cell { class, content: probe(status.now, &upstream.probe) },
        ]
    });
    section("upstreams", "Mailbox", ["upstream", "listener", "path", "#round trip", "probe"], rows)
}

/// As [`ProbeLine`], with a duration instead of the time since when.
fn probe(now: Timestamp, seen: &Seen) -> Markup {
    let word = match seen.state {
        State::Up => "up",
        State::Down => "DOWN",
        State::Unknown | State::Unprobed => return ProbeLine(seen).to_string().render(),
    };
    html! { (word) " for " (age(now, seen.since)) (Details(seen).to_string()) }
}

fn failures(status: &Status) -> Markup {
    let rows = status.failures.iter().map(|failure| {
        [
            marked_up(html! { (age(status.now, failure.last)) " ago" }),
            number(failure.count),
            text(&failure.listener),
            text(failure.client),
            marked_up(html! { code { (failure.end) } }),
            text(&failure.why),
        ]
    });
    let heads = ["last", "#times", "listener", "last client", "end", "why"];
    section("failures", "Recent failures", heads, rows)
}

fn clients(status: &Status) -> Markup {
    let rows = status.clients.iter().map(|share| {
        [
            text(share.client),
            number(share.connections),
            number(bytes(share.sent)),
            number(bytes(share.received)),
        ]
    });
    section("clients", "Top clients", ["client", "#open", "#from it", "#to it"], rows)
}

fn connections(status: &Status) -> Markup {
    let heads =
        ["client", "#id", "listener", "stage", "upstream", "path", "#from client", "#to client", "#age"];
    let rows = status.connections.iter().map(|connection| {
        [
            text(connection.client),
            number(connection.id),
            text(&connection.listener),
            Cell {
                class: if connection.stage == "held" { "warning" } else { "" },
                ..text(&connection.stage)
            },
            text(connection.upstream.as_deref().unwrap_or("-")),
            path(connection.path.as_deref().unwrap_or("-")),
            number(bytes(connection.sent)),
            number(bytes(connection.received)),
            number(lasting(i64::try_from(connection.seconds).unwrap_or(i64::MAX))),
        ]
    });
    let title = match status.open.checked_sub(status.connections.len()) {
        Some(more @ 1..) => format!("Connections (the oldest; {more} more)"),
        _ => "Connections".to_owned(),
    };
    section("connections", &title, heads, rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::STATUS;

    fn status() -> Status {
        serde_json::from_str(STATUS).unwrap()
    }

    #[test]
    fn all_that_is_known_is_on_it() {
        let text = page(&status()).into_string();
        for part in [
            "<title>edge.ts.net: ready</title>",
            "class=\"verdict good\" id=\"verdict\">ready<",
            "<td class=\"number bad\" data-name=\"failed\"><span>5</span></td>",
            "<td class=\"bad\" data-name=\"probe\"><span>DOWN for <time title=\"2026-01-02 03:04:05 UTC\">1 d 1 h</time>: cannot connect: refused</span></td>",
            "><time title=\"2026-01-03 04:00:00 UTC\">5 min</time> ago</th>",
            "<td class=\"\" data-name=\"addresses\"><span>removed</span></td>",
            "192.0.2.7:4711",
            "<code>sQ</code>",
            "relaying",
            "12.3 MB",
        ] {
            assert!(text.contains(part), "{part:?} is missing from:\n{text}");
        }
    }

    #[test]
    fn what_others_say_cannot_become_markup() {
        let mut status = status();
        status.failures[0].why = "<script>alert(1)</script>".into();
        status.upstreams[0].probe.problem = Some("\"><img src=x>".into());
        status.not_ready = vec!["<b>".into()];
        let text = page(&status).into_string();
        assert!(!text.contains("<script") && !text.contains("<img") && !text.contains("<b>"), "{text}");
        assert!(text.contains("&lt;script&gt;") && text.contains(">not ready<"), "{text}");
    }

    #[test]
    fn nothing_is_asked_of_elsewhere() {
        let text = page(&status()).into_string();
        for foreign in ["http://", "https://", "url(", "@import", "src=", "<script", "onload", "style="] {
            assert!(!text.contains(foreign), "{foreign:?} in:\n{text}");
        }
    }

    #[test]
    fn the_policy_knows_the_style() {
        use base64::Engine;
        let digest = ring::digest::digest(&ring::digest::SHA256, STYLE.as_bytes());
        let hash = base64::engine::general_purpose::STANDARD.encode(digest);
        assert!(POLICY.contains(&format!("style-src 'sha256-{hash}';")), "it is {hash} now");
        assert!(POLICY.starts_with("default-src 'none'") && !POLICY.contains("script"));
    }
}
