//! Real clients: commands with a deadline.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use super::process::Daemon;

/// What a command did. A command killed at its deadline has no status.
#[derive(Debug)]
pub struct Finished {
    pub command: String,
    pub status: Option<ExitStatus>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Finished {
    pub fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Panics with the command line and everything it printed, unless it succeeded.
    #[track_caller]
    pub fn expect_success(self) -> Finished {
        if !self.succeeded() {
            let outcome =
                self.status.map_or("killed at its deadline".to_owned(), |status| status.to_string());
            let (command, stdout, stderr) = (&self.command, self.stdout(), &self.stderr);
            panic!("{command}: {outcome}\n--- stdout\n{stdout}\n--- stderr\n{stderr}");
        }
        self
    }
}

/// Runs a command with some input; kills it, and whatever it started, at the deadline.
pub fn run(command: &mut Command, input: &[u8], deadline: Duration) -> Finished {
    let line = format!("{command:?}");
    let (mut process, mut stdin, mut stdout) = Daemon::spawn_piped(&line, command);
    let input = input.to_owned();
    // Each pipe has its thread: none of them can fill up while another one is waited for. A command
    // that ends without reading its input is no mistake of ours.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stdout.read_to_end(&mut bytes);
        bytes
    });
    let status = process.wait_exit(deadline);
    process.kill();
    writer.join().expect("the writer does not panic");
    let stdout = reader.join().expect("the reader does not panic");
    Finished { command: line, status, stdout, stderr: process.output().text() }
}

/// swaks against a server, from a chosen source address; `arguments` say the rest (`--to`, `--tls`,
/// `--body`, …).
pub fn swaks(source: &str, server: SocketAddr, arguments: &[&str], deadline: Duration) -> Finished {
    let mut command = Command::new("swaks");
    command
        .args(["--server", &server.ip().to_string(), "--port", &server.port().to_string()])
        .args(["--local-interface", source])
        .args(arguments);
    run(&mut command, b"", deadline)
}

/// curl, trusting `certificate` and without reading anybody's `.curlrc`.
pub fn curl(certificate: &Path, arguments: &[&str], input: &[u8], deadline: Duration) -> Finished {
    let mut command = Command::new("curl");
    // -q has to come first.
    command.args(["-q", "--silent", "--show-error", "--cacert"]).arg(certificate).args(arguments);
    run(&mut command, input, deadline)
}

/// `openssl s_client`, which fails unless the certificate verifies. The input is sent as it is, and
/// `-quiet` leaves the session open until the server closes it, so the input should end with a
/// farewell (`QUIT`, `LOGOUT`).
pub fn openssl_s_client(
    certificate: &Path,
    server: SocketAddr,
    arguments: &[&str],
    input: &[u8],
    deadline: Duration,
) -> Finished {
    let mut command = Command::new("openssl");
    command
        .args(["s_client", "-quiet", "-verify_return_error", "-connect", &server.to_string(), "-CAfile"])
        .arg(certificate)
        .args(arguments);
    run(&mut command, input, deadline)
}
