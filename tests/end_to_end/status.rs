//! `tailwart-edge status` against a running edge.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;
use tailwart_edge::admin::status::Status;

use crate::common::edge::{Edge, Listener};
use crate::common::net::{client_from, connect, free_addr, hears_itself};
use crate::common::stub::{self, Stub};
use crate::common::tools::{Finished, run};
use crate::common::wait::eventually;
use crate::common::{http, private_dir};
use crate::setup::{LIMIT, edge_on, hears, holds, tailnet_with, tells};

/// What a terminal shows at once.
const SCREEN_LINES: usize = 40;

fn status(edge: &Edge, admin: SocketAddr, arguments: &[&str]) -> Finished {
    let dir = private_dir("status");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tailwart-edge"));
    command.env_clear().current_dir(dir.path()).args(["status", "--config"]).arg(edge.config_path());
    command.args(["--admin", &admin.to_string()]).args(arguments);
    run(&mut command, b"", LIMIT).expect_success()
}

/// The words of the row that begins so.
fn row<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    let line = text.lines().find(|line| line.starts_with(start));
    line.unwrap_or_else(|| panic!("no row {start:?} in:\n{text}")).split_whitespace().collect()
}

#[test]
fn one_screen_has_the_right_figures_and_json_has_them_all() {
    let echo = Stub::start(stub::echo_after_header);
    let greets = Stub::start(stub::greet("220 mail.example.test ready\r\n"));
    let tailnet = tailnet_with(&[(2525, echo.addr), (25, greets.addr), (993, free_addr())]);
    let edge = edge_on(&tailnet)
        .listener(Listener::new("web", "tcp", 2525))
        .listener(Listener::new("smtp", "smtp", 25))
        .listener(Listener::new("imaps", "imaps", 993))
        .listener(Listener::new("pop3s", "pop3s", 994).set("hold", r#""1s""#))
        .spawn();
    edge.wait_ready(LIMIT);
    let admin = edge.addr("admin");
    let mut clients: Vec<TcpStream> = (0..3).map(|_| client_from("127.0.0.7", edge.addr("web"))).collect();
    clients.iter_mut().for_each(hears_itself);
    drop(clients.pop());
    hears(&mut connect(edge.addr("smtp")), b"220 mail.example.test ready\r\n");
    connect(edge.addr("pop3s")).read_to_end(&mut Vec::new()).expect("an orderly end");
    let _held = client_from("127.0.0.8", edge.addr("imaps"));
    holds(&edge, 1);
    edge.wait_log("end=sQ", LIMIT);
    // One of those on `web`, and the one that was greeted.
    assert!(eventually(LIMIT, || edge.log().count("end=C-") == 2), "{}", edge.log().tail());

    let text = status(&edge, admin, &[]).stdout();
    assert!(text.lines().count() <= SCREEN_LINES, "{text}");
    assert!(!text.contains('\x1b'), "{text}");
    tells(&text, &["\nconnections: 3; 1 WAIT for the mailbox\n", "tailwart-edge.tail-test.ts.net (Running)"]);
    let addresses = |name: &str| [edge.addr(name).to_string(), edge.addr_v6(name).to_string()];
    let [v4, v6] = addresses("web");
    assert_eq!(row(&text, "web "), ["web", &v4, &v6, "2", "1", "0", "15", "B", "15", "B"]);
    let [v4, v6] = addresses("pop3s");
    assert_eq!(row(&text, "pop3s "), ["pop3s", &v4, &v6, "0", "1", "1", "0", "B", "0", "B"]);
    assert_eq!(row(&text, "127.0.0.7 "), ["127.0.0.7", "2", "10", "B", "10", "B"]);
    let failure = row(&text, "20");
    assert_eq!(&failure[1..5], ["1", "pop3s", "127.0.0.1", "sQ"], "{text}");

    let but_for_time = |mut value: Value| {
        value["now"] = Value::Null;
        value["started"] = Value::Null; // reckoned back from now
        for connection in value["connections"].as_array_mut().expect("a list") {
            connection["seconds"] = Value::Null;
        }
        value
    };
    let told = || -> Value {
        let json = status(&edge, admin, &["--json"]).stdout();
        serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"))
    };
    let asked = || -> Value { serde_json::from_str(&http::get(admin, "/status").body).expect("JSON") };
    // The path to a node and its latency may be another between the two.
    let agree = || but_for_time(told()) == but_for_time(asked());
    assert!(eventually(LIMIT, agree), "{}\n{}", told(), asked());
    let told = told();
    let status: Status = serde_json::from_value(told.clone()).expect("as it is described");
    assert_eq!(serde_json::to_value(&status).expect("JSON"), told);
    assert_eq!((status.open, status.held, status.failures.len()), (3, 1, 1));
}
