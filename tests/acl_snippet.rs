//! `acl-snippet.hujson` gives the edge what its default configuration needs, and nothing else.

#[path = "common/hujson.rs"]
mod hujson;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tailwart_edge::config::Config;

const MAILBOX: &str = "tag:stalwart";

fn policy() -> Value {
    hujson::parse(include_str!("../acl-snippet.hujson")).expect("human JSON")
}

fn config() -> Config {
    Config::without_file(Some("stalwart"), &|_| None).expect("the defaults are good")
}

/// The edge's tag, of which the default configuration has one.
fn edge() -> String {
    let [tag] = config().tailnet.tags.try_into().expect("one tag");
    tag
}

/// The ports to which the default listeners forward.
fn ports() -> BTreeSet<u16> {
    config().listeners.iter().map(|listener| listener.upstream.port).collect()
}

fn strings(list: &Value) -> Vec<&str> {
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().map(|it| it.as_str().expect("a string")).collect()
}

/// Whether the policy's grants allow a connection; `to` is a tag, a colon and a port.
fn allows(policy: &Value, from: &str, to: &str) -> bool {
    let (tag, port) = to.rsplit_once(':').expect("a port");
    let port = format!("tcp:{port}");
    let grants = policy["grants"].as_array().expect("a list of grants");
    grants.iter().any(|grant| {
        strings(&grant["src"]).contains(&from)
            && strings(&grant["dst"]).contains(&tag)
            && strings(&grant["ip"]).contains(&port.as_str())
    })
}

#[test]
fn the_one_grant_is_from_the_edge_to_the_default_ports() {
    let ip: Vec<String> = ports().iter().map(|port| format!("tcp:{port}")).collect();
    assert_eq!(ip.len(), 5);
    assert_eq!(policy()["grants"], json!([{"src": [edge()], "dst": [MAILBOX], "ip": ip}]));
    assert_eq!(policy().get("acls"), None, "another way to give access");
}

#[test]
fn both_tags_have_an_owner() {
    let policy = policy();
    let owners = policy["tagOwners"].as_object().expect("an object");
    let tags: BTreeSet<&str> = owners.keys().map(String::as_str).collect();
    assert_eq!(tags, BTreeSet::from([edge().as_str(), MAILBOX]));
    assert!(owners.values().all(|owner| !strings(owner).is_empty()));
}

#[test]
fn its_tests_accept_the_default_ports_alone() {
    let accepted: BTreeSet<String> = ports().iter().map(|port| format!("{MAILBOX}:{port}")).collect();
    let policy = policy();
    let tests = policy["tests"].as_array().expect("a list of tests");
    let from_edge = tests.iter().find(|test| test["src"] == edge().as_str()).expect("a test of the edge");
    let listed: BTreeSet<String> = strings(&from_edge["accept"]).into_iter().map(str::to_owned).collect();
    assert_eq!(listed, accepted);
    let denied = strings(&from_edge["deny"]);
    assert!(denied.contains(&"tag:stalwart:22") && denied.contains(&"tag:stalwart:443"), "{denied:?}");
    let from_mailbox = tests.iter().find(|test| test["src"] == MAILBOX).expect("a test of the mailbox");
    assert_eq!(from_mailbox.get("accept"), None);
    assert!(!strings(&from_mailbox["deny"]).is_empty());
}

#[test]
fn its_tests_hold_for_its_grants() {
    let policy = policy();
    for test in policy["tests"].as_array().expect("a list of tests") {
        let from = test["src"].as_str().expect("a tag");
        assert_eq!(test["proto"], "tcp");
        for to in strings(&test["accept"]) {
            assert!(allows(&policy, from, to), "{from} may not reach {to}");
        }
        for to in strings(&test["deny"]) {
            assert!(!allows(&policy, from, to), "{from} may reach {to}");
        }
    }
}
