//! `libtailscale/tailscale.h` is kept towards C: programs in C and C++ compile against it without a
//! warning, link with the archive of this build, and find every call as the header has it. The
//! program is in `tests/c_contract/`; it says what it checks.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;

use common::stub::{self, Stub};
use common::tailnet::TestTailnet;
use common::tools::run;
use common::{repo_root, temp_dir};

/// What tsnet would take credentials or a control server from.
const CREDENTIALS: [&str; 7] = [
    "TS_AUTHKEY",
    "TS_AUTH_KEY",
    "TS_CLIENT_SECRET",
    "TS_CLIENT_ID",
    "TS_ID_TOKEN",
    "TS_AUDIENCE",
    "TS_CONTROL_URL",
];

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// For a compiler as for the program: most of it is room for a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// The compiler named by this variable, else the system's, set to this standard.
fn compiler(variable: &str, program: &str, standard: &str) -> Command {
    let mut command = Command::new(std::env::var_os(variable).unwrap_or(program.into()));
    command.arg(standard).args(WARNINGS).arg("-I").arg(repo_root().join("libtailscale"));
    command
}

/// Compiles, and links with the archive.
fn link(mut compiler: Command, source: &[u8], program: &Path) {
    let archive = Path::new(env!("LIBTAILSCALE_DIR")).join("libtailscale.a");
    // The archive comes after what calls it, and is no source of the language given before.
    compiler.args(["-x", "none"]).arg(archive).args(["-pthread", "-o"]).arg(program);
    run(&mut compiler, source, LIMIT).expect_success();
}

/// The program in `tests/c_contract/`, compiled once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| {
        let dir = temp_dir("c-contract");
        let sources = repo_root().join("tests/c_contract");
        let mut cc = compiler("CC", "cc", "-std=c11");
        cc.args(
            ["main.c", "arguments.c", "environment.c", "joining.c", "connection.c", "listening.c"]
                .map(|name| sources.join(name)),
        );
        let program = dir.path().join("main");
        link(cc, b"", &program);
        (dir, program)
    });
    program
}

/// Runs a part of the program; `set` are variables for it.
#[track_caller]
fn holds(arguments: &[&str], set: &[&str]) {
    let dir = temp_dir("c-contract-run");
    let mut command = Command::new(program());
    command.args(arguments).current_dir(dir.path());
    for name in CREDENTIALS {
        command.env_remove(name);
    }
    command.envs(set.iter().map(|name| (name, "http://not-to-be-used.invalid")));
    run(&mut command, b"", LIMIT).expect_success();
}

#[test]
fn cpp_links_with_the_archive() {
    let source = b"#include <tailscale.h>\nint main() { return tailscale_conn_count() != 0; }\n";
    let dir = temp_dir("c-contract-cpp");
    let program = dir.path().join("main");
    let mut cpp = compiler("CXX", "c++", "-std=c++11");
    cpp.args(["-x", "c++", "-"]);
    link(cpp, source, &program);
    run(&mut Command::new(program), b"", LIMIT).expect_success();
}

#[test]
fn what_cannot_work_has_its_code() {
    holds(&["arguments"], &CREDENTIALS);
}

#[test]
fn nothing_of_a_credential_is_left_in_the_environment() {
    holds(&["environment"], &[]);
}

#[test]
fn joining_fails_ends_and_writes_to_its_pipes_as_promised() {
    holds(&["joining"], &[]);
}

#[test]
fn listeners_do_as_promised() {
    let tailnet = TestTailnet::start();
    holds(&["listening", tailnet.control_url()], &[]);
}

#[test]
fn connections_do_as_promised() {
    const PORT: u16 = 2525;
    let stub = Stub::start(stub::echo);
    let tailnet = TestTailnet::start();
    tailnet.add_node("peer", &["tag:stalwart"], &[(PORT, stub.addr)]);
    holds(&["connection", tailnet.control_url(), "peer", &PORT.to_string()], &[]);
}
