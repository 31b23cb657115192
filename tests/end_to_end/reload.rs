//! SIGHUP: another configuration without a restart.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tailwart_edge::admin::status::{ListenerView, Status};
use tempfile::TempDir;

use crate::common::client::LineClient;
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::net::{backlog, client_from, connect, echoes, free_addr, hears_itself, try_client_from};
use crate::common::process::Daemon;
use crate::common::sink::{Taken, takes_mail};
use crate::common::stub::{self, Stub};
use crate::common::tailnet::TestTailnet;
use crate::common::wait::{eventually, wait_for};
use crate::common::{http, private_dir};
use crate::setup::{LIMIT, becomes, edge_on, enrol, hears_last, stops, tailnet_with, tells};

/// A running edge whose configuration a test changes.
struct Scene {
    // Dropped in this order: the edge first.
    edge: Edge,
    builder: Builder,
    tailnet: TestTailnet,
    _state: TempDir,
}

fn start(
    forwards: &[(u16, SocketAddr)],
    listeners: &[Listener],
    configure: impl FnOnce(Builder) -> Builder,
) -> Scene {
    let tailnet = tailnet_with(forwards);
    let state = private_dir("state");
    let builder = edge_on(&tailnet).state_dir(state.path());
    let builder = configure(listeners.iter().cloned().fold(builder, Builder::listener));
    let edge = builder.spawn();
    edge.wait_ready(LIMIT);
    Scene { edge, builder, tailnet, _state: state }
}

impl Scene {
    /// Reloads with these listeners in the place of those before.
    #[track_caller]
    fn listeners(&mut self, listeners: &[Listener]) -> String {
        let builder = self.builder.clone().without_listeners();
        self.builder = listeners.iter().cloned().fold(builder, Builder::listener);
        self.edge.reload(&self.builder, LIMIT)
    }

    /// Reloads with this setting.
    #[track_caller]
    fn set(&mut self, section: &str, key: &str, value: &str) -> String {
        self.builder = self.builder.clone().set(section, key, value);
        self.edge.reload(&self.builder, LIMIT)
    }

    /// The address of a listener whose sockets were opened more than once.
    #[track_caller]
    fn last_addr(&self, listener: &str) -> SocketAddr {
        let lines = self.edge.log().lines().into_iter().filter(|line| line.contains(" listening ")).rev();
        let mut ours = lines.filter(|line| line.contains(&format!("listener={listener:?}")));
        let address = ours.find_map(|line| line.split("address=").nth(1)?.split(' ').next()?.parse().ok());
        address.unwrap_or_else(|| panic!("{listener} does not listen\n{}", self.edge.log().tail()))
    }
}

fn tcp(name: &str, address: SocketAddr, port: u16) -> Listener {
    Listener::new(name, "tcp", port).set("listen", &format!("[\"{address}\"]"))
}

#[track_caller]
fn refuses(address: SocketAddr) {
    let refused =
        || TcpStream::connect(address).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
    assert!(eventually(LIMIT, refused), "{address} still accepts");
}

/// A mailbox that says which one it is, and then echoes.
fn named(name: &'static str) -> Stub {
    Stub::start(move |mut conn| {
        if conn.read_proxy_header().is_some() {
            conn.send(name.as_bytes());
            stub::echo(conn);
        }
    })
}

/// A client that has heard which mailbox it is on.
#[track_caller]
fn on(name: &str, address: SocketAddr) -> TcpStream {
    let mut client = connect(address);
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut bytes = vec![0; name.len()];
    client.read_exact(&mut bytes).expect("the mailbox speaks");
    assert_eq!(String::from_utf8_lossy(&bytes), name);
    client
}

/// The listeners that `/status` has; of one that was removed also how many are connected through it.
fn shown(scene: &Scene) -> Vec<String> {
    let body = http::get(scene.edge.addr("admin"), "/status").body;
    let status: Status = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"));
    let shown = |listener: ListenerView| match (listener.removed, listener.addresses.is_empty()) {
        (true, true) => format!("{} removed {}", listener.name, listener.open),
        (false, false) => listener.name,
        _ => panic!("{listener:?}"),
    };
    status.listeners.into_iter().map(shown).collect()
}

/// Waits until `/status` has these: who has just closed a connection may be counted for a moment more.
#[track_caller]
fn shows(scene: &Scene, listeners: &[&str]) {
    assert!(eventually(LIMIT, || shown(scene) == listeners), "{:?}, not {listeners:?}", shown(scene));
}

#[test]
fn listeners_come_go_and_change_under_live_connections() {
    let (one, two) = (named("one"), named("two"));
    let [stays, goes, comes, moves, moved] = [(); 5].map(|()| free_addr());
    let before = [tcp("stays", stays, 1), tcp("goes", goes, 1), tcp("moves", moves, 1)];
    let mut scene = start(&[(1, one.addr), (2, two.addr)], &before, |edge| edge);
    let mut live = [stays, goes, moves].map(|address| on("one", address));

    let told = scene.listeners(&[tcp("stays", stays, 2), tcp("comes", comes, 2), tcp("moves", moved, 1)]);
    tells(&told, &["added=\"comes\"", "removed=\"goes\"", "changed=\"stays, moves\""]);
    live.iter_mut().for_each(hears_itself);
    drop([on("two", stays), on("two", comes), on("one", moved)]);
    // What is gone is shown as long as somebody is connected through it.
    shows(&scene, &["stays", "comes", "moves", "goes removed 1"]);
    [goes, moves].into_iter().for_each(refuses);
    live.iter_mut().for_each(hears_itself);

    // An address may change hands, and everything may come back.
    let told = scene.listeners(&[tcp("goes", stays, 1), tcp("stays", goes, 1)]);
    tells(&told, &["added=\"goes\"", "removed=\"comes, moves\"", "changed=\"stays\""]);
    drop([on("one", stays), on("one", goes)]);
    live.iter_mut().for_each(hears_itself);
    shows(&scene, &["goes", "stays", "moves removed 1"]);
    drop(live);
    shows(&scene, &["goes", "stays"]);
    scene.edge.signal("TERM");
    stops(&mut scene.edge, LIMIT);
}

#[test]
fn a_listener_that_means_the_same_keeps_its_sockets_and_those_who_are_held() {
    let greeting = "220 ready\r\n";
    let mailbox = free_addr();
    let [mail, other] = [free_addr(), free_addr()];
    let smtp = Listener::new("mail", "smtp", 25).set("listen", &format!("[\"{mail}\"]"));
    let mut scene = start(&[(25, mailbox)], &[smtp.clone(), tcp("other", other, 25)], |edge| {
        edge.set("", "hostname", "\"mx.example.org\"")
    });
    let mut held = connect(mail);
    crate::setup::holds(&scene.edge, 1);
    tells(&scene.listeners(&[smtp]), &["removed=\"other\""]);
    tells(&scene.set("limits", "max_connections_per_client", "7"), &["settings=\"limits\""]);
    crate::setup::holds(&scene.edge, 1);
    let _mailbox = Stub::start_at(mailbox, stub::greet(greeting));
    crate::setup::hears(&mut held, greeting.as_bytes());
    assert_eq!(scene.edge.log().count("turned away"), 0);
}

#[test]
fn what_is_wrong_changes_nothing_and_is_told_in_one_line() {
    let mailbox = named("one");
    let [mail, free] = [free_addr(), free_addr()];
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let taken = taken.local_addr().map(|address| (taken, address)).expect("it is bound");
    let mut scene = start(&[(1, mailbox.addr)], &[tcp("mail", mail, 1)], |edge| edge);
    let good = scene.builder.clone();
    let mut live = on("one", mail);

    scene.edge.replace_config("hostname = 1\n[limits]\nhold_max = \"many\"\n");
    scene.edge.signal("HUP");
    let line = scene.edge.wait_log("was not reloaded", LIMIT);
    tells(&line, &["ERROR", ":1: hostname: ", ":3: limits.hold_max: ", "the old one stays in force"]);

    let told = scene.listeners(&[tcp("new", free, 1), tcp("other", taken.1, 1)]);
    tells(&told, &["ERROR", &format!("listener other: cannot bind {}", taken.1), "another program"]);
    refuses(free);
    hears_itself(&mut live);
    drop(on("one", mail));

    let any: SocketAddr = (std::net::Ipv4Addr::UNSPECIFIED, mail.port()).into();
    let told = scene.listeners(&[tcp("mail", any, 1)]);
    tells(&told, &["ERROR", "this edge itself listens on", "restart the edge"]);
    drop(on("one", mail));

    scene.builder = good;
    let told = scene.set("timeouts", "drain", "\"5s\"");
    tells(&told, &["INFO", "settings=\"timeouts\""]);
    hears_itself(&mut live);
}

#[test]
fn what_makes_the_node_waits_for_a_restart_and_says_so() {
    let mailbox = named("one");
    let mail = free_addr();
    let mut scene = start(&[(1, mailbox.addr)], &[tcp("mail", mail, 1)], |edge| edge);
    tells(&scene.edge.reload(&scene.builder, LIMIT), &["nothing has changed"]);
    scene.builder = scene.builder.clone().set("tailnet", "hostname", "\"other\"");
    tells(&scene.set("tailnet", "tags", "[\"tag:other\"]"), &["nothing else has changed"]);
    for key in ["hostname", "tags"] {
        let words = format!("tailnet.{key} has changed and takes effect with the next restart");
        tells(&scene.edge.wait_log(&words, LIMIT), &["WARN"]);
    }
    assert_eq!(scene.edge.log().count("takes effect with the next restart"), 2);
    becomes(&scene.edge, 200, "\"ready\":true");
    drop(on("one", mail));
}

#[test]
fn what_was_given_at_the_start_stays_in_force() {
    let (one, two) = (named("one"), named("two"));
    let mail = free_addr();
    let mut scene = start(&[(1, one.addr), (2, two.addr)], &[tcp("mail", mail, 1)], |edge| {
        let edge = edge.upstream("elsewhere").arg("--upstream").arg(crate::setup::MAILBOX);
        edge.env("MAIL_PORT", &mail.port().to_string()).env("TS_CLIENT_ID", "kept-out")
    });
    let through = |name: &str, upstream| {
        Listener::new(name, "tcp", upstream).set("listen", "[\"127.0.0.1:${MAIL_PORT}\"]")
    };
    tells(&scene.listeners(&[through("mail", 2)]), &["changed=\"mail\""]);
    drop(on("two", mail));
    tells(&scene.listeners(&[through("mail", 2).set("upstream", "\"nobody\"")]), &["changed=\"mail\""]);
    tells(&scene.edge.wait_log("upstream cannot be reached", LIMIT), &["upstream=\"nobody\""]);
    let told = scene.set("", "hostname", "\"${TS_CLIENT_ID}\"");
    tells(&told, &["was not reloaded", "TS_CLIENT_ID"]);
    assert!(!told.contains("kept-out"), "{told}");
}

#[test]
fn a_reload_does_not_wait_for_the_tailnet() {
    let mailbox = named("one");
    let [mail, more, later] = [free_addr(), free_addr(), free_addr()];
    let tailnet = tailnet_with(&[(1, mailbox.addr)]);
    let state = private_dir("state");
    let holding = |name, address| tcp(name, address, 1).set("hold", "\"1m\"");
    let builder = edge_on(&tailnet).state_dir(state.path()).listener(holding("mail", mail));
    enrol(&builder);
    tailnet.stop_control();
    let mut edge = builder.spawn();
    let mut client = connect(edge.addr("mail"));
    // A port that closes for a while is told again when it opens.
    let told = || edge.log().count("listening listener=\"later\"");
    let with = |listener| builder.clone().listener(listener);
    tells(&edge.reload(&with(holding("later", later)), LIMIT), &["added=\"later\""]);
    assert_eq!(told(), 1);
    tells(&edge.reload(&with(tcp("later", later, 1)), LIMIT), &["changed=\"later\""]);
    tells(&edge.reload(&with(holding("later", later)), LIMIT), &["changed=\"later\""]);
    assert_eq!(told(), 2, "{}", edge.log().tail());
    let builder = builder.listener(holding("more", more));
    tells(&edge.reload(&builder, LIMIT), &["added=\"more\"", "removed=\"later\""]);
    let mut other = connect(more);
    tailnet.start_control();
    for client in [&mut client, &mut other] {
        crate::setup::hears(client, b"one");
    }
    edge.wait_ready(LIMIT);
    edge.signal("TERM");
    stops(&mut edge, LIMIT);
}

#[test]
fn only_what_is_new_is_announced() {
    let mailbox = named("one");
    let [mail, more] = [free_addr(), free_addr()];
    let mut scene = start(&[(1, mailbox.addr)], &[tcp("mail", mail, 1)], |edge| {
        edge.set("limits", "max_connections", "100")
    });
    let announced = |scene: &Scene| {
        let log = scene.edge.log();
        [" listening ", " max_connections=", "listener=\"more\""].map(|words| log.count(words))
    };
    assert_eq!(announced(&scene), [2, 1, 0], "the admin listener and the other\n{}", scene.edge.log().tail());
    tells(&scene.set("timeouts", "drain", "\"5s\""), &["settings=\"timeouts\""]);
    let told = scene.listeners(&[tcp("mail", mail, 1).set("idle_timeout", "\"7m\"")]);
    tells(&told, &["changed=\"mail\""]);
    assert_eq!(announced(&scene), [2, 1, 0], "{}", scene.edge.log().tail());
    tells(&scene.listeners(&[tcp("mail", mail, 1), tcp("more", more, 1)]), &["added=\"more\""]);
    assert_eq!(announced(&scene), [3, 1, 1], "{}", scene.edge.log().tail());
    tells(&scene.set("limits", "max_connections", "200"), &["settings=\"limits\""]);
    assert_eq!(announced(&scene), [3, 2, 1], "{}", scene.edge.log().tail());
    drop([on("one", mail), on("one", more)]);
}

#[test]
fn without_probes_a_reload_makes_nobody_ready() {
    let mailbox = named("one");
    let [mail, more] = [free_addr(), free_addr()];
    let mut scene = start(&[], &[tcp("mail", mail, 1)], |edge| edge);
    let ready = |scene: &Scene| http::get(scene.edge.addr("admin"), "/readyz");
    assert_eq!(ready(&scene).code, 200, "nothing speaks against it");
    hears_last(&mut connect(mail), b"");
    becomes(&scene.edge, 503, "listener mail: no upstream answers");
    let changed = tcp("mail", mail, 1).set("idle_timeout", "\"7m\"");
    let untried = tcp("more", more, 2);
    for listeners in [&[changed.clone()][..], &[changed, untried]] {
        tells(&scene.listeners(listeners), &["configuration reloaded"]);
        let told = ready(&scene);
        assert_eq!(told.code, 503, "{}", told.body);
        tells(&told.body, &["listener mail: no upstream answers"]);
    }
    scene.tailnet.forward(crate::setup::MAILBOX, 1, mailbox.addr);
    drop(on("one", mail));
    becomes(&scene.edge, 200, r#""ready":true"#);
}

#[test]
fn what_a_probe_has_found_outlives_a_reload_that_is_not_about_the_mailbox() {
    let mailbox = Stub::start(takes_mail("mailbox", &Taken::default()));
    let smtp = Listener::new("mail", "smtp", 25).set("listen", "[\"127.0.0.1:0\"]");
    // No further probe comes in time.
    let mut scene = start(&[(25, mailbox.addr)], &[smtp], |edge| edge.set("probe", "interval", "\"10m\""));
    becomes(&scene.edge, 200, r#""ready":true"#);
    let probe = |scene: &Scene| {
        let status: serde_json::Value =
            serde_json::from_str(&http::get(scene.edge.addr("admin"), "/status").body).expect("it is JSON");
        status["upstreams"][0]["probe"].clone()
    };
    let found = probe(&scene);
    assert_eq!(found["state"], "up", "{found}");
    for (table, key, value) in [
        ("timeouts", "drain", "\"7s\""),
        ("", "hostname", "\"mx.example.org\""),
        ("timeouts", "hold", "\"7s\""),
    ] {
        scene.set(table, key, value);
        let ready = http::get(scene.edge.addr("admin"), "/readyz");
        assert_eq!(ready.code, 200, "{key}: {}", ready.body);
        assert_eq!(probe(&scene), found, "{key}");
    }
    assert_eq!(mailbox.accepted(), 1, "it was not probed again");
    let greeting = LineClient::new(connect(scene.edge.addr("mail"))).line();
    assert!(greeting.as_deref().is_some_and(|line| line.starts_with("220 ")), "{greeting:?}");
}

#[test]
fn a_port_that_never_opened_takes_nobody_in_when_it_goes() {
    let mailbox = named("one");
    let [mail, goes] = [free_addr(), free_addr()];
    let tailnet = tailnet_with(&[(1, mailbox.addr)]);
    let state = private_dir("state");
    let builder = edge_on(&tailnet).state_dir(state.path()).set("tailnet", "join_timeout", "\"5m\"");
    let builder = builder.listener(tcp("mail", mail, 1));
    tailnet.stop_control();
    let edge = builder.clone().listener(tcp("goes", goes, 1)).spawn();
    edge.addr("admin");
    let mut waiting = [connect(mail), connect(goes)];
    tells(&edge.reload(&builder, LIMIT), &["removed=\"goes\""]);
    waiting[1].set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let end = waiting[1].read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset), "nobody was there");
    refuses(goes);
    tailnet.start_control();
    crate::setup::hears(&mut waiting[0], b"one");
    assert_eq!(edge.log().count("listener=\"goes\""), 0, "{}", edge.log().tail());
}

#[test]
fn lower_limits_cut_nobody_and_let_nobody_in() {
    let mailbox = Stub::start(stub::echo_after_header);
    let mail = free_addr();
    let mut scene = start(&[(1, mailbox.addr)], &[tcp("mail", mail, 1)], |edge| {
        edge.set("limits", "max_connections", "8")
    });
    let mut clients: Vec<TcpStream> = (0..5).map(|_| echoes(mail)).collect();
    tells(&scene.set("limits", "max_connections", "3"), &["settings=\"limits\""]);
    clients.iter_mut().for_each(hears_itself);
    let waiting: Vec<TcpStream> = (0..2).map(|_| connect(mail)).collect();
    assert!(eventually(LIMIT, || backlog(mail) == 2), "{} wait", backlog(mail));
    clients.truncate(3);
    let ended = || scene.edge.log().count("why=\"client closed\"") == 2;
    assert!(eventually(LIMIT, ended), "{}", scene.edge.log().tail());
    assert_eq!((backlog(mail), mailbox.accepted()), (2, 5), "three are there, and three there may be");
    clients.pop();
    assert!(eventually(LIMIT, || mailbox.accepted() == 6 && backlog(mail) == 1), "one has room now");
    // And up again.
    tells(&scene.set("limits", "max_connections", "20"), &["settings=\"limits\""]);
    assert!(eventually(LIMIT, || mailbox.accepted() == 7), "{}", scene.edge.log().tail());
    drop(waiting);
    clients.iter_mut().for_each(hears_itself);

    // The share of one client, of which connections of before count too.
    tells(&scene.set("limits", "max_connections_per_client", "2"), &["settings=\"limits\""]);
    let mut refused = connect(mail);
    hears_last(&mut refused, b"");
    drop(client_from("127.0.0.9", mail));
    clients.iter_mut().for_each(hears_itself);
}

#[test]
fn every_other_setting_takes_effect() {
    let mailbox = Stub::start(stub::greet("220 ready\r\n"));
    let mail = free_addr();
    let smtp = Listener::new("mail", "smtp", 25).set("listen", &format!("[\"{mail}\"]"));
    let web = tcp("web", free_addr(), 25);
    let mut scene = start(&[(25, mailbox.addr)], &[smtp, web], |edge| edge);
    let status = |scene: &Scene| http::get(scene.last_addr("admin"), "/status").body;
    assert!(!status(&scene).contains("\"state\":\"up\""), "nothing is probed yet");

    tells(&scene.set("probe", "interval", "\"1s\""), &["settings=\"probe\""]);
    assert!(eventually(LIMIT, || status(&scene).contains("\"state\":\"up\"")), "{}", status(&scene));
    tells(&scene.set("probe", "interval", "\"0s\""), &["settings=\"probe\""]);
    assert!(!status(&scene).contains("\"state\":\"up\""), "what is not looked at is not known");

    let (before, after) = (scene.last_addr("admin"), free_addr());
    tells(&scene.set("admin", "listen", &format!("\"{after}\"")), &["settings=\"admin.listen\""]);
    refuses(before);
    assert_eq!(http::get(after, "/readyz").code, 200);

    tells(&scene.set("", "hostname", "\"mx.example.org\""), &["settings=\"hostname\""]);
    tells(&scene.set("timeouts", "hold", "\"0s\""), &["changed=\"mail\" settings=\"timeouts\""]);
    scene.tailnet.unforward(crate::setup::MAILBOX, 25);
    let told = LineClient::new(connect(mail)).line();
    assert_eq!(
        told.as_deref().map(|line| line.starts_with("421 4.3.2 mx.example.org ")),
        Some(true),
        "{told:?}"
    );

    tells(&scene.set("timeouts", "hold", "\"1m\""), &["changed=\"mail\""]);
    tells(&scene.set("limits", "hold_max", "1"), &["settings=\"limits\""]);
    let _held = connect(mail);
    let is_held = |count: usize| {
        let words = format!("tailwart_edge_held_connections {count}\n");
        eventually(LIMIT, || http::get(after, "/metrics").body.contains(&words))
    };
    assert!(is_held(1), "{}", scene.edge.log().tail());
    let told = LineClient::new(connect(mail)).line();
    assert!(told.is_some_and(|line| line.starts_with("421 ")), "the second finds no place");
    tells(&scene.set("limits", "hold_max", "5"), &["settings=\"limits\""]);
    let _another = connect(mail);
    assert!(is_held(2), "{}", scene.edge.log().tail());
}

/// Connects again and again from changing addresses, and has each connection echo, until told to stop.
fn visits(address: SocketAddr, seed: u8, stop: &AtomicBool) -> usize {
    let mut visits = 0;
    while !stop.load(Ordering::SeqCst) {
        let source = std::net::IpAddr::from([127, 9, seed, u8::try_from(visits % 250).expect("it fits") + 1]);
        let mut client = try_client_from(source, address)
            .unwrap_or_else(|error| panic!("connection {visits} from {source}: {error}"));
        hears_itself(&mut client);
        visits += 1;
    }
    visits
}

#[test]
fn a_storm_of_reloads_refuses_and_cuts_nobody() {
    const SIGNALS: u32 = 10_000;
    const CHANGES: usize = 20;
    let mailbox = Stub::start(stub::echo_after_header);
    let [mail, more] = [free_addr(), free_addr()];
    let mut scene = start(&[(1, mailbox.addr)], &[tcp("mail", mail, 1)], |edge| edge);
    let mut live = echoes(mail);
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<JoinHandle<usize>> = (0..2)
        .map(|seed| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || visits(mail, seed, &stop))
        })
        .collect();
    let script =
        format!("for ((i = 0; i < {SIGNALS}; i++)); do kill -HUP {} || exit; done", scene.edge.pid());
    let mut storm = Daemon::spawn("the storm", Command::new("bash").args(["-c", &script]));
    for change in 0..CHANGES {
        let other = format!("\"{}s\"", 100 + change);
        let listeners = [tcp("mail", mail, 1).set("idle_timeout", &other), tcp("more", more, 1)];
        let builder = scene.builder.clone().without_listeners();
        let used = if change % 2 == 0 { &listeners[..1] } else { &listeners[..] };
        scene.builder = used.iter().cloned().fold(builder, Builder::listener);
        let count = || scene.edge.log().count("changed=\"mail\"");
        let before = count();
        scene.edge.replace_config(&scene.builder.config());
        scene.edge.signal("HUP");
        assert!(
            wait_for(LIMIT, || (count() > before).then_some(())).is_some(),
            "{}",
            scene.edge.log().tail()
        );
    }
    let status = storm.wait_exit(LIMIT).expect("the storm ends");
    stop.store(true, Ordering::SeqCst);
    let visits: Vec<usize> =
        clients.into_iter().map(|client| client.join().expect("each is served")).collect();
    assert!(status.success(), "the edge died\n{}", scene.edge.log().tail());
    hears_itself(&mut live);
    assert!(visits.iter().all(|&visits| visits > CHANGES), "{visits:?}");
    let text = scene.edge.log().text();
    let refused: Vec<&str> = text.lines().filter(|line| line.contains("was not reloaded")).collect();
    assert!(refused.is_empty(), "{refused:?}");
    eprintln!("{SIGNALS} SIGHUPs, {CHANGES} changes, {visits:?} connections");
    drop(live);
    // A stop in the middle of a reload.
    scene.edge.signal("HUP");
    scene.edge.signal("TERM");
    scene.edge.signal("HUP");
    stops(&mut scene.edge, Duration::from_secs(10));
}

#[test]
fn the_default_admin_address_is_taken_as_soon_as_it_is_free() {
    let mailbox = Stub::start(stub::echo_after_header);
    let admin = tailwart_edge::config::default_admin().expect("it has a default");
    let other = std::net::TcpListener::bind(admin).expect("nobody else has it");
    let listen = |builder: Builder| builder.set("admin", "listen", &format!("\"{admin}\""));
    let mail = Listener::new("mail", "tcp", 2525);
    let scene = start(&[(2525, mailbox.addr)], &[mail], listen);
    let line = scene.edge.wait_log("health, status and metrics are not", LIMIT);
    tells(&line, &[" WARN ", &admin.to_string(), "another program listens there"]);
    drop(echoes(scene.edge.addr("mail")));
    drop(other);
    tells(&scene.edge.reload(&scene.builder, LIMIT), &["nothing has changed"]);
    assert_eq!(scene.edge.addr("admin"), admin);
    assert_eq!(http::get(admin, "/readyz").code, 200);
}
