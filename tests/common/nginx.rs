//! nginx as an independent reader of PROXY headers.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::log::Log;
use super::net::{free_addr, is_listening};
use super::process::Daemon;
use super::proxy_header::Seen;
use super::{START_LIMIT, temp_dir};

/// Demands a PROXY header, answers with what it says, and closes. Stopped on drop.
pub struct Nginx {
    pub addr: SocketAddr,
    daemon: Daemon,
    errors: Log,
    access: Log,
    _dir: TempDir,
}

impl Nginx {
    pub fn start() -> Nginx {
        let dir = temp_dir("nginx");
        let addr = free_addr();
        let config = dir.path().join("nginx.conf");
        let (errors, access) = (dir.path().join("error.log"), dir.path().join("access.log"));
        std::fs::write(&config, settings(dir.path(), addr)).expect("the configuration can be written");
        // -e: or it complains about the system's log before it has read the configuration.
        let mut command = Command::new(program());
        command.arg("-c").arg(config).arg("-p").arg(dir.path()).arg("-e").arg(&errors);
        let daemon = Daemon::spawn("nginx", &mut command);
        let (errors, access) = (Log::file("nginx", &errors), Log::file("nginx's connections", &access));
        daemon.wait_ready(START_LIMIT, Some(&errors), || is_listening(addr));
        Nginx { addr, daemon, errors, access, _dir: dir }
    }

    /// Reads the answer on a connection (through the edge, say): what nginx saw. The client must
    /// not have sent anything: nginx closes at once, and unread bytes would make that a reset.
    #[track_caller]
    pub fn read_answer(mut stream: &TcpStream, deadline: Duration) -> Seen {
        stream.set_read_timeout(Some(deadline)).expect("the deadline is not zero");
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        read.unwrap_or_else(|error| panic!("nginx's answer: {error} after {answer:?}"));
        Seen::parse(&answer).unwrap_or_else(|| panic!("not an answer of nginx: {answer:?}"))
    }

    /// What the header of every finished connection said.
    pub fn seen(&self) -> Vec<Seen> {
        self.access.text().lines().filter_map(Seen::parse).collect()
    }

    /// nginx's own log; a broken header is an error there.
    pub fn log(&self) -> &Log {
        &self.errors
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }
}

pub fn program() -> &'static str {
    if Path::new("/usr/sbin/nginx").is_file() { "/usr/sbin/nginx" } else { "nginx" }
}

/// Distributions build the stream module as a loadable one; where it is built in there is no file,
/// and no need.
fn load_module() -> String {
    let places = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"];
    let modules = places.map(|dir| format!("{dir}/ngx_stream_module.so"));
    let found = modules.iter().find(|module| Path::new(module).is_file());
    found.map(|module| format!("load_module {module};")).unwrap_or_default()
}

fn settings(dir: &Path, addr: SocketAddr) -> String {
    let (dir, load_module) = (dir.display(), load_module());
    let answer =
        "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port";
    format!(
        "{load_module}
daemon off;
# One process: no user to switch to, and nobody else to stop.
master_process off;
pid {dir}/nginx.pid;
error_log {dir}/error.log info;
events {{ worker_connections 4096; }}
stream {{
    log_format seen '{answer}';
    access_log {dir}/access.log seen;
    server {{
        listen {addr} proxy_protocol;
        return '{answer}\\n';
    }}
}}
"
    )
}
