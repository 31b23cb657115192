//! A command whose reader has gone ends quietly, as in `tailwart-edge status | head -1`.

use std::io::{PipeWriter, Read, Write, pipe};
use std::net::TcpListener;
use std::process::{Command, Output};

const NOBODY: &str = "127.0.0.1:1";

/// What every edge says of itself.
const STATUS: &str = r#"{"version":"0.1.0","started":"2026-01-01T00:00:00Z","now":"2026-01-01T00:00:00Z"}"#;

fn edge(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tailwart-edge"));
    command.args(args).env_remove("TAILWART_CONFIG");
    command
}

fn nobody_reads() -> PipeWriter {
    pipe().expect("a pipe").1
}

fn without_stdout(args: &[&str]) -> Output {
    edge(args).stdout(nobody_reads()).output().expect("it runs")
}

#[test]
fn nobody_reads_standard_output() {
    let commands: [&[&str]; 5] = [
        &["version"],
        &["--help"],
        &["check", "--upstream", "mailbox"],
        &["completions", "bash"],
        &["completions", "zsh"],
    ];
    for args in commands {
        let Output { status, stderr, .. } = without_stdout(args);
        assert_eq!((status.code(), String::from_utf8_lossy(&stderr).as_ref()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn a_full_disk_is_an_error() {
    for args in [&["version"][..], &["check", "--upstream", "mailbox"], &["completions", "bash"]] {
        let full = std::fs::File::create("/dev/full").expect("it is always full");
        let Output { status, stderr, .. } = edge(args).stdout(full).output().expect("it runs");
        assert_eq!(status.code(), Some(1), "{args:?}");
        assert!(String::from_utf8_lossy(&stderr).contains("cannot write to standard output"), "{args:?}");
    }
}

#[test]
fn nobody_reads_the_status() {
    let admin = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = admin.local_addr().expect("its address").to_string();
    let answering = std::thread::spawn(move || {
        let (mut client, _) = admin.accept().expect("it asks");
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            client.read_exact(&mut byte).expect("a request");
            request.extend(byte);
        }
        let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length";
        write!(client, "{head}: {}\r\n\r\n{STATUS}", STATUS.len()).expect("it listens");
    });
    let Output { status, stderr, .. } = without_stdout(&["status", "--json", "--admin", &address]);
    answering.join().expect("it was asked");
    assert_eq!((status.code(), String::from_utf8_lossy(&stderr).as_ref()), (Some(0), ""));
}

#[test]
fn nobody_reads_standard_error() {
    for (args, code) in [
        (&["status", "--admin", NOBODY][..], 1),
        (&["healthcheck", "--admin", NOBODY], 1),
        (&["check", "--config", "/nowhere.toml"], 2),
    ] {
        let status = edge(args).stderr(nobody_reads()).stdout(nobody_reads()).status().expect("it runs");
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}
