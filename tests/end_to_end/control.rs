//! Control servers as they are: Headscale with its manners, one that was renamed, one behind a proxy,
//! and what each of them says in its own way.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use crate::common::edge::Builder;
use crate::common::net::{connect, free_addr, is_listening};
use crate::common::process::Daemon;
use crate::common::stub::{self, Stub};
use crate::common::tailnet::TestTailnet;
use crate::common::wait::eventually;
use crate::common::{START_LIMIT, http, nginx, private_dir, repo_root, temp_dir};
use crate::setup::{
    AT_ONCE, Control, EDGE, LIMIT, MAILBOX, becomes, closed_tailnet, enrol, fails, node, stops, tells,
};

fn json(admin: SocketAddr, path: &str) -> serde_json::Value {
    let answer = http::get(admin, path);
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

/// A Headscale with a mailbox that echoes, and an edge that has a key for it.
fn headscale_with_mailbox(stub: &Stub) -> (TestTailnet, Builder) {
    let (tailnet, edge) = Control::Headscale.closed_tailnet();
    tailnet.add_node(MAILBOX, &["tag:stalwart"], &[(2525, stub.addr)]);
    (tailnet, edge.auth_key(Control::Headscale.key()))
}

#[test]
fn a_node_that_headscale_has_deleted_is_told_so_though_its_long_poll_lives_on() {
    let stub = Stub::start(stub::echo_after_header);
    let (tailnet, edge) = headscale_with_mailbox(&stub);
    let edge = edge.spawn();
    edge.wait_ready(LIMIT);
    // No key is good any more, or it would come back by itself.
    tailnet.set_auth_key_table(&[]);
    tailnet.remove_node(EDGE);
    // Whoever comes meets silence, which is reason enough to ask.
    let _client = connect(edge.addr("mail"));
    becomes(&edge, 503, "the node was removed from the tailnet");
    let line = edge.wait_log("trouble on the tailnet: the node was removed", LIMIT);
    tells(&line, &["provide a key to enrol with"]);
    edge.wait_log("cannot join the tailnet again", LIMIT);
}

#[test]
fn a_node_that_headscale_has_deleted_comes_back_with_a_key_at_hand() {
    let stub = Stub::start(stub::echo_after_header);
    let (tailnet, edge) = headscale_with_mailbox(&stub);
    let edge = edge.spawn();
    edge.wait_ready(LIMIT);
    let before = node(&tailnet)["ips"].clone();
    tailnet.remove_node(EDGE);
    let _client = connect(edge.addr("mail"));
    edge.wait_log("enrolling it again", LIMIT);
    edge.wait_log("on the tailnet again", LIMIT);
    becomes(&edge, 200, r#""ready":true"#);
    assert_ne!(node(&tailnet)["ips"], before);
}

#[test]
fn every_way_to_say_that_a_key_never_expires_is_understood() {
    for control in Control::ALL {
        let (tailnet, edge) = control.closed_tailnet();
        let state = private_dir("state");
        let edge = edge.auth_key(control.key()).state_dir(state.path());
        enrol(&edge);
        for never in ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"] {
            tailnet.set_key_expiry_at(EDGE, never);
            let mut edge = edge.spawn();
            edge.wait_ready(LIMIT);
            let status = json(edge.addr("admin"), "/status");
            assert_eq!(status["node"]["key_expiry"], serde_json::Value::Null, "{never}");
            edge.signal("TERM");
            stops(&mut edge, LIMIT);
        }
    }
}

#[test]
fn a_control_server_that_was_renamed_is_the_same_and_another_one_is_not() {
    for control in Control::ALL {
        let (tailnet, edge) = control.closed_tailnet();
        let state = private_dir("state");
        let edge = edge.auth_key(control.key()).state_dir(state.path());
        let first = edge.spawn();
        first.wait_ready(LIMIT);
        knows_its_control_server(state.path());
        drop(first);
        let before = node(&tailnet)["ips"].clone();

        let alias = tailnet.alias_control();
        let mut renamed = edge.clone().control_url(&alias).spawn();
        let line = renamed.wait_log("this node keeps its identity", LIMIT);
        tells(&line, &[&alias, tailnet.control_url(), "the same key"]);
        renamed.wait_ready(LIMIT);
        assert_eq!(node(&tailnet)["ips"], before);
        renamed.signal("TERM");
        stops(&mut renamed, LIMIT);
        assert_eq!(renamed.log().count("enrolling"), 0);

        let (other, _) = control.closed_tailnet();
        let elsewhere = edge.control_url(other.control_url());
        let line = fails(elsewhere.clone().spawn(), 1, AT_ONCE);
        tells(&line, &["another key", &alias, other.control_url(), "another tailnet.state_dir"]);
        assert_eq!(other.nodes().len(), 0);
        // Whether it is the same cannot be asked.
        other.stop_control();
        let line = fails(elsewhere.spawn(), 3, AT_ONCE);
        tells(&line, &["cannot reach the control server", "refused", "ask whether this is the same server"]);
    }
}

/// The book's page on Headscale has it.
fn nginx_block() -> String {
    let page = std::fs::read_to_string(repo_root().join("docs/src/headscale.md")).expect("the page is there");
    let block = page.split("```nginx\n").nth(1).and_then(|rest| rest.split("```").next());
    block.expect("it has a block for nginx").to_owned()
}

/// An nginx in front of a control server, with these directives in its `server`.
fn nginx_with(location: &str, dir: &Path) -> (SocketAddr, Daemon) {
    let (addr, dir) = (free_addr(), dir.display());
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {dir}/{name};"))
        .join(" ");
    let settings = format!(
        "daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log; events {{ }}
         http {{ access_log off; {temporary} server {{ listen {addr}; {location} }} }}"
    );
    let path = format!("{dir}/nginx.conf");
    std::fs::write(&path, settings).expect("a temporary directory takes files");
    let mut command = Command::new(nginx::program());
    command.args(["-c", &path, "-p", &dir.to_string(), "-e", &format!("{dir}/error.log")]);
    let daemon = Daemon::spawn("nginx", &mut command);
    daemon.wait_ready(START_LIMIT, None, || is_listening(addr));
    (addr, daemon)
}

#[test]
fn a_proxy_before_the_control_server_that_passes_no_upgrade_on_is_named() {
    for control in Control::ALL {
        let (tailnet, edge) = control.closed_tailnet();
        let state = private_dir("state");
        let edge = edge.auth_key(control.key()).state_dir(state.path());
        let edge = edge.set("tailnet", "join_timeout", r#""3s""#);
        let dir = temp_dir("nginx");
        let without = format!("location / {{ proxy_pass {}; }}", tailnet.control_url());
        let (blocked, _nginx) = nginx_with(&without, dir.path());
        let blocked = edge.clone().control_url(&format!("http://{blocked}"));
        let words =
            ["/ts2021", "a proxy in front of it does not pass the upgrade on", "Upgrade and Connection"];
        let line = fails(blocked.clone().spawn(), 3, AT_ONCE);
        tells(&line, &["cannot talk to the control server http://"]);
        tells(&line, &words);

        let dir = temp_dir("nginx");
        let block = nginx_block().replace("http://127.0.0.1:8080", tailnet.control_url());
        let (open, _nginx) = nginx_with(&block, dir.path());
        let open = edge.control_url(&format!("http://{open}")).spawn();
        open.wait_ready(LIMIT);
        knows_its_control_server(state.path());
        drop(open);

        // Enrolled, it goes on trying, and says the same.
        let edge = blocked.spawn();
        tells(&edge.wait_log("not on the tailnet after", LIMIT), &words);
        becomes(&edge, 503, "make the proxy pass the headers Upgrade and Connection on");
    }
}

/// Waits until the control server's key is beside the identity.
#[track_caller]
fn knows_its_control_server(state_dir: &Path) {
    let file = state_dir.join("tailscaled.state");
    let is_stored = || std::fs::read_to_string(&file).is_ok_and(|text| text.contains("_control-server-key"));
    assert!(eventually(LIMIT, is_stored), "the key of the control server is not stored");
}

#[test]
fn what_tailscale_itself_finds_wrong_is_told_where_an_operator_looks() {
    const SAID: &str = "this node is half deleted";
    let (tailnet, edge) = closed_tailnet();
    let edge = edge.auth_key(Control::Tailscale.key()).spawn();
    edge.wait_ready(LIMIT);
    let admin = edge.addr("admin");
    assert_eq!(json(admin, "/readyz")["warnings"], serde_json::json!([]));
    tailnet.set_health(EDGE, &[SAID]);
    becomes(&edge, 200, SAID);
    let warning = &json(admin, "/status")["warnings"][0];
    assert!(warning.as_str().is_some_and(|text| text.contains(SAID)), "{warning}");
    let looked = http::get(admin, "/doctor");
    assert!(looked.body.contains(SAID), "{looked:?}");
    tailnet.set_health(EDGE, &[]);
    becomes(&edge, 200, r#""warnings":[]"#);
}
