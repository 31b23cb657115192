//! The programs in `examples/`: `make demo` shows what it says and leaves nothing behind, and `embed` greets.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::process::{Daemon, descendants};
use common::stub::{self, Stub};
use common::tailnet::TestTailnet;
use common::tools::run;
use common::wait::eventually;

/// Includes building it, when it has changed, and the test tailnet.
const BUILD_LIMIT: Duration = Duration::from_secs(1200);
const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn once_it_delivers_a_message_and_ends() {
    let temp = common::temp_dir("demo");
    let mut demo = demo(temp.path());
    demo.arg(env!("CARGO_BIN_EXE_tailwart-edge")).env("DEMO_ONCE", "1").env("DEMO_SECONDS", "7");
    let demo = run(&mut demo, b"", BUILD_LIMIT).expect_success();
    let output = demo.stdout();
    let facts = [
        "has joined with TS_AUTHKEY as tag:reverse-proxy",
        "What the mailbox saw of the client at 127.0.0.77:",
        "Postfix: connect from unknown[127.0.0.77]:",
        "Dovecot: user=<alice>, method=PLAIN, rip=127.0.0.77, rport=",
        "bytes in the mailbox, the 237 sent unchanged at its end",
        " ms after the client began to connect",
        "From `make demo` to here it took 0 min ",
    ];
    for fact in facts {
        assert!(output.contains(fact), "{fact:?} is missing in:\n{output}");
    }
    let path = output.lines().find_map(|line| line.trim().strip_prefix("path "));
    let path = path.unwrap_or_else(|| panic!("no path in:\n{output}")).trim();
    assert!(path.starts_with("direct ") || path.starts_with("relayed via "), "{path}");
    assert!(!output.contains("Ctrl-C"), "it should have ended:\n{output}");
    assert_nothing_left(temp.path(), &BTreeSet::new());
}

#[test]
fn it_serves_until_ctrl_c_and_cleans_up() {
    let temp = common::temp_dir("demo");
    let demo = Daemon::spawn("demo", &mut demo(temp.path()));
    demo.wait_ready(BUILD_LIMIT, None, || demo.output().text().contains("the edge's log follows"));
    let output = demo.output().text();
    let tried: Vec<&str> = output.lines().filter(|line| try_out(line)).collect();
    assert_eq!(tried.len(), 5, "not all of what it proposes was found in:\n{output}");
    demo.output().wait("listener=\"submissions\" client=127.0.0.1:", LIMIT);

    let started = descendants(demo.pid());
    // Postfix, Dovecot and some processes of theirs, the tailnet, the edge, the watchdog.
    assert!(started.len() > 6, "{started:?}");
    demo.signal("INT");
    assert!(eventually(LIMIT, || demo.has_exited()), "it does not end\n{}", demo.output().tail());
    assert_nothing_left(temp.path(), &started);
}

#[test]
fn the_embedded_node_prints_a_greeting() {
    let stub = Stub::start(stub::greet("220 mail.example.test ESMTP\r\n"));
    let tailnet = TestTailnet::start();
    tailnet.add_node("stalwart", &["tag:stalwart"], &[(25, stub.addr)]);
    let state = common::private_dir("embed");
    let mut embed = cargo_run("--example", "embed");
    embed.arg(state.path()).args(["stalwart", "25"]);
    embed.env("TS_AUTHKEY", "tskey-auth-test").env("TS_CONTROL_URL", tailnet.control_url());
    let said = run(&mut embed, b"", BUILD_LIMIT).expect_success().stdout();
    assert_eq!(said, "220 mail.example.test ESMTP\r\n");
}

/// Cargo becomes the program once it is built, so the process is the program's.
fn cargo_run(kind: &str, name: &str) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "--quiet", kind, name, "--"]);
    command
}

/// The demo with a directory of its own for temporary files. It finds the edge beside itself.
fn demo(temp: &Path) -> Command {
    let mut command = cargo_run("--package", "demo");
    command.env("TMPDIR", temp);
    command.env_remove("DEMO_ONCE").env_remove("DEMO_SECONDS");
    command
}

/// Runs a line of the output, if it is a command, as a reader would; it has to succeed.
fn try_out(line: &str) -> bool {
    if !["  swaks ", "  openssl ", "  curl "].iter().any(|start| line.starts_with(start)) {
        return false;
    }
    let input = b"a LOGIN alice secret\r\nb LOGOUT\r\n";
    let finished = run(Command::new("sh").args(["-c", line]), input, LIMIT).expect_success();
    let said = finished.stdout();
    let wanted = match line {
        _ if line.contains("swaks") => "250 2.0.0 Ok: queued",
        _ if line.contains("openssl") => "a OK",
        _ if line.contains("readyz") => r#""ready":true"#,
        _ => "Subject: through the edge",
    };
    assert!(said.contains(wanted), "{line}: no {wanted:?} in\n{said}");
    true
}

/// Waits for the directory to be empty and the processes to be gone.
fn assert_nothing_left(temp: &Path, processes: &BTreeSet<u32>) {
    let files = || fs::read_dir(temp).expect("the directory is ours").flatten().map(|it| it.path());
    let alive = || processes.iter().filter(|pid| parent(**pid).is_some());
    let clean = eventually(LIMIT, || files().count() + alive().count() == 0);
    assert!(clean, "left: {:?} {:?}", files().collect::<Vec<_>>(), alive().collect::<Vec<_>>());
}

/// The parent's id; none when there is no such process, or only its entry that nobody has asked for.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; then: state, parent.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?;
    (state != "Z").then_some(fields.next()?.parse().ok()?)
}
