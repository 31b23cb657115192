//! HAProxy as an independent reader of PROXY headers.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::log::Log;
use super::net::{free_addr, is_listening};
use super::process::Daemon;
use super::proxy_header::Seen;
use super::{START_LIMIT, temp_dir};

/// Marks our log lines among HAProxy's own.
const MARK: &str = "seen ";

/// Demands a PROXY header, logs what it says, and passes what follows to a backend. Stopped on
/// drop.
pub struct Haproxy {
    pub addr: SocketAddr,
    daemon: Daemon,
    _dir: TempDir,
}

impl Haproxy {
    /// `backend` gets the bytes after the header, for example a [`super::stub::Stub`] that echoes
    /// them.
    pub fn start(backend: SocketAddr) -> Haproxy {
        let dir = temp_dir("haproxy");
        let addr = free_addr();
        let config = dir.path().join("haproxy.cfg");
        std::fs::write(&config, settings(addr, backend)).expect("the configuration can be written");
        // -db: one process, in the foreground.
        let daemon = Daemon::spawn("haproxy", Command::new(program()).arg("-db").arg("-f").arg(config));
        daemon.wait_ready(START_LIMIT, None, || is_listening(addr));
        Haproxy { addr, daemon, _dir: dir }
    }

    /// What the header of every connection said, in the order in which HAProxy reached the backend
    /// for them.
    pub fn seen(&self) -> Vec<Seen> {
        let log = self.log().text();
        log.lines().filter_map(|line| Seen::parse(line.strip_prefix(MARK)?)).collect()
    }

    /// Waits until a connection from `source` was seen; panics with the log's tail at the deadline.
    #[track_caller]
    pub fn wait_seen(&self, source: SocketAddr, deadline: Duration) -> Seen {
        let from_source = |line: &str| {
            let seen = line.strip_prefix(MARK).and_then(Seen::parse);
            seen.filter(|seen| seen.source == source)
        };
        let what = format!("a connection from {source}");
        let line = self.log().wait_line(&what, deadline, |line| from_source(line).is_some());
        from_source(&line).expect("the line was chosen for it")
    }

    pub fn log(&self) -> &Log {
        self.daemon.output()
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }
}

fn program() -> &'static str {
    if std::path::Path::new("/usr/sbin/haproxy").is_file() { "/usr/sbin/haproxy" } else { "haproxy" }
}

fn settings(addr: SocketAddr, backend: SocketAddr) -> String {
    format!(
        "global
    log stdout format raw local0
    nbthread 1
    maxconn 4000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend proxied
    bind {addr} accept-proxy
    log global
    # As soon as the backend is connected, rather than at the end of the connection.
    option logasap
    log-format \"{MARK}%ci %cp %fi %fp\"
    default_backend plain
backend plain
    server plain {backend}
"
    )
}
