//! Real servers, clients and a test tailnet for the end-to-end tests and the demo.
//!
//! Everything runs on loopback, on ports of its own and in a temporary directory of its own, so
//! that any number of instances run side by side. Whatever is started here is gone when its value
//! is dropped; what a crash or Ctrl-C leaves behind is killed by a watchdog (see [`process`]).
//! Nothing sleeps for a fixed time: every wait is for a condition, with a deadline, and a missed
//! deadline panics with the tail of the log that tells why.
//!
//! [`mail::MailServer`] is the mailbox host (Postfix and Dovecot on one Maildir), [`haproxy`] and
//! [`nginx`] are independent readers of PROXY headers, [`stub`] is a TCP server for exact bytes,
//! [`sink`] one that takes mail, [`memory`] measures, [`prometheus`] and [`chromium`] look at what is shown, [`systemd`] plays the supervisor, [`tailnet`] the control server and the nodes, [`edge`] the program under test; [`client`] and
//! [`tools`] are what talks to it.

// Each program that includes this tree uses a part of it.
#![allow(dead_code)]

pub mod cert;
pub mod chromium;
pub mod client;
pub mod dns;
pub mod dovecot;
pub mod edge;
pub mod haproxy;
pub mod http;
pub mod hujson;
pub mod log;
pub mod mail;
pub mod memory;
pub mod net;
pub mod netns;
pub mod nginx;
pub mod postfix;
pub mod process;
pub mod prometheus;
pub mod proxy_header;
pub mod sink;
pub mod stub;
pub mod systemd;
pub mod tailnet;
pub mod tools;
pub mod wait;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a server may take to start. They need well under two seconds; a busy machine gets the
/// rest.
pub const START_LIMIT: Duration = Duration::from_secs(20);

/// The checkout this was compiled from.
pub fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// A temporary directory which other users may enter: mail servers drop root before they open their
/// files.
pub fn temp_dir(purpose: &str) -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix(&format!("tailwart-{purpose}-"))
        .tempdir()
        .expect("a temporary directory can be made");
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("its mode can be set");
    process::remove_at_end(dir.path());
    dir
}

/// The same that nobody else can look into, as a state directory has to be.
pub fn private_dir(purpose: &str) -> tempfile::TempDir {
    let dir = temp_dir(purpose);
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).expect("its mode can be set");
    dir
}

/// Panics unless this process is root: mail servers switch users. Such a test must not pass by
/// being skipped.
pub fn require_root(what: &str) {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().nth(1));
    assert!(effective == Some("0"), "{what} needs root (it switches users): run the tests as root");
}
