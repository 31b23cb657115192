//! The metrics: that Prometheus reads them, that they are what has happened, and that the dashboard and
//! the alerts that come with the edge have something to show.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::common::client::LineClient;
use crate::common::edge::{Edge, Listener};
use crate::common::mail::{MailServer, PASSWORD};
use crate::common::net::{connect, echoes, hears_itself};
use crate::common::prometheus::{Prometheus, promtool};
use crate::common::stub::{self, Conn, MIB, Stub};
use crate::common::wait::eventually;
use crate::common::{http, private_dir, repo_root};
use crate::setup::{
    AT_ONCE, EDGE, LIMIT, Setup, edge_on, holds, metric, no_crash, start_with, tailnet_with, tcp,
    without_probe,
};

/// As a reader asks that likes OpenMetrics best, which is not served.
const OPEN_METRICS: &str = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";

/// The value of a metric that must be there.
#[track_caller]
fn value(edge: &Edge, name: &str) -> f64 {
    metric(edge, name).unwrap_or_else(|| panic!("there is no {name}"))
}

/// Waits until a metric has this value.
#[track_caller]
fn comes_to(edge: &Edge, name: &str, wanted: f64) {
    let reached = eventually(LIMIT, || metric(edge, name) == Some(wanted));
    assert!(reached, "{name} is {:?}, not {wanted}\n{}", metric(edge, name), edge.log().tail());
}

/// Each family and its kind.
fn families(edge: &Edge) -> BTreeMap<String, String> {
    let text = http::get(edge.addr("admin"), "/metrics").body;
    let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    kinds.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

/// The same as the book has them.
fn documented() -> BTreeMap<String, String> {
    let page = fs::read_to_string(repo_root().join("docs/src/reference/metrics.md")).expect("a page");
    let mut found = BTreeMap::new();
    for row in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        for name in cells[1].split('`').skip(1).step_by(2) {
            let name = name.split('{').next().unwrap_or_default();
            assert!(found.insert(name.to_owned(), cells[2].to_owned()).is_none(), "{name} appears twice");
        }
    }
    found
}

/// A real mailbox behind an edge that has something to say of everything.
struct Watched {
    mail: MailServer,
    setup: Setup,
    _idle: LineClient,
}

fn watched() -> Watched {
    let mail = MailServer::start();
    let listeners = [
        Listener::new("smtp", "smtp", 25),
        Listener::new("imap", "imap", 143),
        Listener::new("imaps", "imaps", 993),
        Listener::new("gone", "smtp", 26).set("hold", r#""1s""#),
    ];
    let ports = [(25, mail.postfix.smtp), (143, mail.dovecot.imap), (993, mail.dovecot.imaps)];
    let setup = start_with(&ports, &listeners, |edge| {
        edge.set("probe", "interval", r#""500ms""#).set("probe", "fall", "1")
    });
    setup.tailnet.set_key_expiry(EDGE, "720h");
    let mut idle = LineClient::new(connect(setup.edge.addr("imap")));
    idle.imap_login("alice", PASSWORD);
    send(&setup.edge);
    connect(setup.edge.addr("gone")).read_to_end(&mut Vec::new()).expect("an orderly end");
    for name in [
        r#"tailwart_edge_upstream_certificate_expiry_timestamp_seconds{listener="imaps",upstream="stalwart:993"}"#,
        "tailwart_edge_node_key_expiry_timestamp_seconds",
        r#"tailwart_edge_upstream_latency_seconds{upstream="stalwart"}"#,
    ] {
        assert!(eventually(LIMIT, || metric(&setup.edge, name).is_some()), "no {name}");
    }
    comes_to(&setup.edge, r#"tailwart_edge_upstream_up{listener="gone",upstream="stalwart:26"}"#, 0.0);
    Watched { mail, setup, _idle: idle }
}

fn send(edge: &Edge) {
    let mut client = LineClient::new(connect(edge.addr("smtp")));
    client.send_mail("sender@example.net", "alice@example.test", "Subject: counted\n\nhello\n");
}

#[test]
fn prometheus_takes_them_and_the_dashboard_and_alerts_find_what_they_ask_for() {
    let watched = watched();
    let edge = &watched.setup.edge;
    let text = http::get(edge.addr("admin"), "/metrics").body;
    let checked = promtool(&["check", "metrics"], text.as_bytes());
    assert!(checked.succeeded() && checked.stderr.is_empty(), "{checked:?}\n{text}");
    assert_eq!(families(edge), documented());
    let asked = http::get_with(edge.addr("admin"), "/metrics", OPEN_METRICS);
    let is_classic = asked.head.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n");
    assert!(is_classic && !asked.body.contains("# EOF"), "{asked:?}");

    let rules = repo_root().join("contrib/alerts.yml");
    let prometheus = Prometheus::start(edge.addr("admin"), &rules);
    prometheus.wait("up", LIMIT, |series| matches!(series, [(_, 1.0)]));
    assert!(prometheus.targets()[0]["lastError"] == "", "{}", prometheus.targets());
    is_as_shown(&prometheus, edge);
    let described = prometheus.metadata("tailwart_edge_connections_total");
    assert_eq!(described[0]["type"], "counter");
    assert_eq!(described[0]["help"], "Connections that have ended, by end state.");
    // Rates want something that goes on.
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                send(edge);
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            every_panel_has_data(&prometheus, &edge.addr("admin").to_string());
        }));
        is_over.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    alerts_are_evaluated(&prometheus);
    assert!(watched.mail.home.messages("alice").len() > 1);
    no_crash(edge.log());
}

/// Prometheus has the values that `/metrics` shows.
#[track_caller]
fn is_as_shown(prometheus: &Prometheus, edge: &Edge) {
    for name in [
        r#"tailwart_edge_connections_total{end="sQ",listener="gone"}"#,
        r#"tailwart_edge_sent_bytes_total{listener="smtp"}"#,
        r#"tailwart_edge_received_bytes_total{listener="smtp"}"#,
        r#"tailwart_edge_dial_seconds_count{listener="imap"}"#,
        r#"tailwart_edge_upstream_certificate_expiry_timestamp_seconds{listener="imaps",upstream="stalwart:993"}"#,
        "tailwart_edge_node_key_expiry_timestamp_seconds",
        "tailwart_edge_ready",
    ] {
        let shown = value(edge, name);
        prometheus.wait(name, LIMIT, |series| matches!(series, [(_, value)] if *value == shown));
    }
    let info = prometheus.wait("tailwart_edge_build_info", LIMIT, |series| series.len() == 1);
    assert_eq!(info[0].0["version"], env!("CARGO_PKG_VERSION"));
}

/// Every query of every panel of the dashboard has a value; all of its panels are of kinds that Grafana
/// still has, and have the dashboard's variables.
#[track_caller]
fn every_panel_has_data(prometheus: &Prometheus, instance: &str) {
    const KINDS: [&str; 4] = ["row", "stat", "state-timeline", "timeseries"];
    let text = fs::read_to_string(repo_root().join("contrib/grafana.json")).expect("a dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let variables = dashboard["templating"]["list"].as_array().expect("a list");
    let names: Vec<&str> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
    assert_eq!(names, ["datasource", "instance"]);
    let panels = dashboard["panels"].as_array().expect("a list");
    let mut ids = BTreeSet::new();
    let mut queries = 0;
    for panel in panels {
        let kind = panel["type"].as_str().unwrap_or_default();
        assert!(KINDS.contains(&kind) && ids.insert(panel["id"].as_u64()), "{panel}");
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().expect("a query");
            assert!(target["datasource"]["uid"] == "${datasource}", "{target}");
            assert!(query.contains("$instance"), "{query}");
            let query = query.replace("$instance", instance).replace("$__rate_interval", "5s");
            prometheus.wait(&query, LIMIT, |series| series.iter().any(|(_, value)| value.is_finite()));
            queries += 1;
        }
    }
    assert!(queries >= 30, "only {queries}");
}

/// No alert is broken, and what is wrong shows: the port without a mailbox.
#[track_caller]
fn alerts_are_evaluated(prometheus: &Prometheus) {
    let rules = prometheus.rules();
    assert!(rules.len() >= 10, "{rules:?}");
    for rule in &rules {
        assert!(rule["health"] == "ok" && rule["lastError"].is_null(), "{rule}");
    }
    // Pending: none of them has waited long enough.
    let is_raised = |name: &str| {
        let rules = prometheus.rules();
        let rule = rules.iter().find(|rule| rule["name"] == name).expect("it is there");
        rule["alerts"].as_array().is_some_and(|alerts| !alerts.is_empty())
    };
    assert!(eventually(LIMIT, || is_raised("TailwartEdgeMailboxDown")));
    assert!(!is_raised("TailwartEdgeAway") && !is_raised("TailwartEdgeNotReady"));
}

#[test]
fn the_alerts_are_raised_when_they_should_be() {
    let path = |name: &str| repo_root().join("contrib").join(name).display().to_string();
    promtool(&["check", "rules", &path("alerts.yml")], b"").expect_success();
    promtool(&["test", "rules", &path("alerts_test.yml")], b"").expect_success();
    let [alerts, tests] =
        ["alerts.yml", "alerts_test.yml"].map(|name| fs::read_to_string(path(name)).expect("text"));
    let alerts: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 10, "{alerts:?}");
    for alert in alerts {
        let times = |expected: &str| {
            let test = format!("alertname: {alert}");
            tests.split("eval_time:").filter(|part| part.contains(&test) && part.contains(expected)).count()
        };
        assert!(times("exp_alerts: []") > 0, "{alert} is not tested to be silent");
        assert!(times("exp_labels:") > 0, "{alert} is not tested to be raised");
    }
}

#[test]
fn the_counts_are_what_has_happened() {
    let echo = Stub::start(stub::echo_after_header);
    // They are looked at while they are held.
    let listeners = [tcp("mail"), Listener::new("gone", "smtp", 26).set("hold", r#""8s""#)];
    let Setup { edge, tailnet: _tailnet } = start_with(&[(2525, echo.addr)], &listeners, without_probe);
    let edge = &edge;
    for _ in 0..3 {
        drop(echoes(edge.addr("mail")));
    }
    let mut held: Vec<TcpStream> = (0..2).map(|_| connect(edge.addr("gone"))).collect();
    holds(edge, 2);
    assert_eq!(value(edge, r#"tailwart_edge_open_connections{listener="gone",stage="held"}"#), 2.0);
    for client in &mut held {
        client.read_to_end(&mut Vec::new()).expect("an orderly end");
    }
    let mut open = echoes(edge.addr("mail"));
    comes_to(edge, r#"tailwart_edge_connections_total{end="C-",listener="mail"}"#, 3.0);
    comes_to(edge, r#"tailwart_edge_refused_connections_total{listener="gone",reason="hold_ended"}"#, 2.0);
    for (name, expected) in [
        (r#"tailwart_edge_connections_total{end="sQ",listener="gone"}"#, 2.0),
        (r#"tailwart_edge_connections_total{end="S-",listener="mail"}"#, 0.0),
        (r#"tailwart_edge_refused_connections_total{listener="mail",reason="client_limit"}"#, 0.0),
        (r#"tailwart_edge_sent_bytes_total{listener="mail"}"#, 20.0),
        (r#"tailwart_edge_received_bytes_total{listener="mail"}"#, 20.0),
        (r#"tailwart_edge_sent_bytes_total{listener="gone"}"#, 0.0),
        (r#"tailwart_edge_dial_seconds_count{listener="mail"}"#, 4.0),
        (r#"tailwart_edge_dial_seconds_bucket{listener="mail",le="+Inf"}"#, 4.0),
        (r#"tailwart_edge_dial_seconds_count{listener="gone"}"#, 0.0),
        // That of the one that is open is observed at its end.
        (r#"tailwart_edge_first_byte_seconds_count{listener="mail"}"#, 3.0),
        (r#"tailwart_edge_open_connections{listener="mail",stage="relaying"}"#, 1.0),
        (r#"tailwart_edge_upstream_connections{upstream="stalwart"}"#, 1.0),
        ("tailwart_edge_held_connections", 0.0),
        // The one listener for mail has no mailbox.
        ("tailwart_edge_ready", 0.0),
        ("tailwart_edge_node_running", 1.0),
        ("tailwart_edge_node_in_map_poll", 1.0),
        ("tailwart_edge_stack_handles", 1.0),
        ("tailwart_edge_log_lines_lost_total", 0.0),
    ] {
        comes_to(edge, name, expected);
    }
    let dialled = value(edge, r#"tailwart_edge_dial_seconds_sum{listener="mail"}"#);
    assert!(dialled > 0.0 && dialled < 4.0 * LIMIT.as_secs_f64(), "{dialled}");
    of_the_process(edge);
    hears_itself(&mut open);
    comes_to(edge, r#"tailwart_edge_sent_bytes_total{listener="mail"}"#, 25.0);
    drop(open);
    comes_to(edge, "tailwart_edge_stack_handles", 0.0);
    comes_to(edge, r#"tailwart_edge_upstream_connections{upstream="stalwart"}"#, 0.0);
}

/// What the process takes, and where its node is at home.
#[track_caller]
fn of_the_process(edge: &Edge) {
    let near = |name: &str, expected: f64, by: f64| {
        let value = value(edge, name);
        assert!((value - expected).abs() <= by, "{name} is {value}, not {expected}");
    };
    near("process_open_fds", edge.fds() as f64, 4.0);
    near("process_threads", edge.threads() as f64, 4.0);
    let resident = edge.rss_kb() as f64 * 1024.0;
    near("process_resident_memory_bytes", resident, resident / 5.0);
    let now = tailwart_edge::support::wall_clock::now().as_second() as f64;
    near("process_start_time_seconds", now - 60.0, 60.0 + 2.0);
    assert!(value(edge, "process_cpu_seconds_total") > 0.0);
    assert!(value(edge, "tailwart_edge_go_goroutines") > 5.0);
    assert!(value(edge, r#"tailwart_edge_go_heap_bytes{state="in_use"}"#) > 1e5);
    let text = http::get(edge.addr("admin"), "/metrics").body;
    let homes = text.lines().filter(|line| line.starts_with("tailwart_edge_node_home_relay{region=\""));
    assert!(homes.count() == 1, "{text}");
    let direct = |line: &&str| line.starts_with(r#"tailwart_edge_upstream_path{upstream="stalwart",path="#);
    let found = eventually(LIMIT, || {
        http::get(edge.addr("admin"), "/metrics").body.lines().any(|line| direct(&line))
    });
    assert!(found, "{text}");
}

/// Sends a piece each time it is told to.
fn sends_pieces(mut conn: Conn) {
    conn.read_proxy_header();
    while let Ok(1..) = conn.read(&mut [0]) {
        conn.send(&vec![b'x'; MIB]);
    }
}

#[test]
fn bytes_are_counted_as_they_move() {
    let mailbox = Stub::start(sends_pieces);
    let Setup { edge, tailnet: _tailnet } =
        start_with(&[(2525, mailbox.addr)], &[tcp("mail")], without_probe);
    let mut client = connect(edge.addr("mail"));
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut piece = vec![0; MIB];
    for count in 1..=3 {
        client.write_all(b"!").expect("it is connected");
        client.read_exact(&mut piece).expect("a piece comes");
        comes_to(&edge, r#"tailwart_edge_received_bytes_total{listener="mail"}"#, (count * MIB) as f64);
        comes_to(&edge, r#"tailwart_edge_sent_bytes_total{listener="mail"}"#, f64::from(count as u32));
    }
    assert_eq!(value(&edge, r#"tailwart_edge_connections_total{end="C-",listener="mail"}"#), 0.0);
}

#[test]
fn a_hundred_scrapes_at_once_are_answered_under_load() {
    const SCRAPES: usize = 100;
    let echo = Stub::start(stub::echo_after_header);
    let Setup { edge, tailnet: _tailnet } = start_with(&[(2525, echo.addr)], &[tcp("mail")], |edge| {
        without_probe(edge).set("limits", "max_connections_per_client", "0")
    });
    let (mail, admin) = (edge.addr("mail"), edge.addr("admin"));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    drop(echoes(mail));
                }
            });
        }
        let began = std::time::Instant::now();
        let scrapes: Vec<_> =
            (0..SCRAPES).map(|_| scope.spawn(move || http::get(admin, "/metrics"))).collect();
        let answers: Vec<_> = scrapes.into_iter().map(|scrape| scrape.join()).collect();
        let took: Duration = began.elapsed();
        is_over.store(true, Ordering::Relaxed);
        for answer in answers {
            let answer = answer.expect("it is answered");
            assert!(answer.code == 200 && answer.body.contains("tailwart_edge_ready 1\n"), "{answer:?}");
            // To the last family.
            assert!(answer.body.contains("\nprocess_max_fds "), "{answer:?}");
        }
        assert!(took < AT_ONCE, "{took:?}");
        eprintln!("{SCRAPES} scrapes at once took {took:?}");
    });
    no_crash(edge.log());
}

#[test]
fn what_a_listener_has_counted_stays_when_a_reload_takes_it_away() {
    let echo = Stub::start(stub::echo_after_header);
    let tailnet = tailnet_with(&[(2525, echo.addr)]);
    let state = private_dir("metrics-state");
    let builder = without_probe(edge_on(&tailnet)).state_dir(state.path()).listener(tcp("stays"));
    let edge = builder.clone().listener(tcp("goes")).spawn();
    edge.wait_ready(LIMIT);
    let left = echoes(edge.addr("goes"));
    drop(echoes(edge.addr("goes")));
    let [ended, sent] = [
        r#"tailwart_edge_connections_total{end="C-",listener="goes"}"#,
        r#"tailwart_edge_sent_bytes_total{listener="goes"}"#,
    ];
    comes_to(&edge, ended, 1.0);
    let told = edge.reload(&builder, LIMIT);
    assert!(told.contains("configuration reloaded"), "{told}");
    assert_eq!((value(&edge, ended), value(&edge, sent)), (1.0, 10.0));
    // And what is still going on there is counted, too.
    drop(left);
    comes_to(&edge, ended, 2.0);
    let again: SocketAddr = edge.addr("stays");
    drop(echoes(again));
    comes_to(&edge, r#"tailwart_edge_connections_total{end="C-",listener="stays"}"#, 1.0);
}
