//! A private Dovecot which wants a PROXY header on every port.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::cert::HOST_NAME;
use super::log::Log;
use super::mail::{Account, DOMAIN, MailHome, PASSWORD, USERS};
use super::net::{free_addr, is_listening};
use super::process::Daemon;
use super::{START_LIMIT, require_root, temp_dir};

/// Stopped on drop. Serves the [`MailHome`] to its users; names log in with or without the domain,
/// and also without TLS, so that tests can read what goes over the wire.
pub struct Dovecot {
    pub imap: SocketAddr,
    pub imaps: SocketAddr,
    pub pop3: SocketAddr,
    pub pop3s: SocketAddr,
    pub sieve: SocketAddr,
    daemon: Daemon,
    log: Log,
    _home: MailHome,
    dir: TempDir,
}

impl Dovecot {
    pub fn start(home: &MailHome) -> Dovecot {
        Dovecot::start_with(home, "")
    }

    /// Starts with more configuration; later settings win over ours.
    pub fn start_with(home: &MailHome, extra: &str) -> Dovecot {
        require_root("Dovecot");
        let dir = temp_dir("dovecot");
        let [imap, imaps, pop3, pop3s, sieve] = std::array::from_fn(|_| free_addr());
        let settings =
            settings(dir.path(), home) + &services([imap, imaps, pop3, pop3s, sieve]) + extra + "\n";
        std::fs::write(config_path(dir.path()), settings).expect("the configuration can be written");
        std::fs::write(dir.path().join("users"), users(home)).expect("the user list can be written");
        let daemon = launch(dir.path(), &[imap, imaps, pop3, pop3s, sieve]);
        let log = Log::file("dovecot", &log_path(dir.path()));
        Dovecot { imap, imaps, pop3, pop3s, sieve, daemon, log, _home: home.clone(), dir }
    }

    /// `imap-login: Info: Login: user=<alice>, …, rip=192.0.2.7, rport=34567, …` names the client
    /// which the PROXY header told.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// The first log line holding `needle`; panics with the log's tail at the deadline.
    #[track_caller]
    pub fn wait_log(&self, needle: &str, deadline: Duration) -> String {
        self.log.wait(needle, deadline)
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Ends it as a crash would: its clients' connections end, its ports refuse. Takes
    /// milliseconds; Dovecot itself would take two seconds.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// Starts again after [`Dovecot::kill`], on the same ports.
    pub fn restart(&mut self) {
        self.kill();
        self.daemon = launch(self.dir.path(), &[self.imap, self.imaps, self.pop3, self.pop3s, self.sieve]);
    }
}

/// Returns once every port listens.
fn launch(dir: &Path, addrs: &[SocketAddr]) -> Daemon {
    // -F: stay in the foreground, as a child of ours.
    let daemon = Daemon::spawn("dovecot", Command::new(program()).arg("-F").arg("-c").arg(config_path(dir)));
    let log = Log::file("dovecot", &log_path(dir));
    daemon.wait_ready(START_LIMIT, Some(&log), || addrs.iter().all(|addr| is_listening(*addr)));
    daemon
}

fn config_path(dir: &Path) -> PathBuf {
    dir.join("dovecot.conf")
}

fn log_path(dir: &Path) -> PathBuf {
    dir.join("dovecot.log")
}

/// Not every PATH has the sbin directories.
fn program() -> &'static str {
    ["/usr/sbin/dovecot", "/usr/local/sbin/dovecot"]
        .into_iter()
        .find(|path| Path::new(path).is_file())
        .unwrap_or("dovecot")
}

/// user:password:uid:gid:gecos:home
fn users(home: &MailHome) -> String {
    let Account { uid, gid } = home.owner();
    let path = home.path().display();
    USERS.iter().map(|user| format!("{user}:{{PLAIN}}{PASSWORD}:{uid}:{gid}::{path}/{user}\n")).collect()
}

fn settings(dir: &Path, home: &MailHome) -> String {
    let log = log_path(dir);
    let (log, dir, owner) = (log.display(), dir.display(), home.owner().uid);
    let (cert, key) = (home.certificate().cert.display(), home.certificate().key.display());
    format!(
        "protocols = imap pop3 sieve
base_dir = {dir}/run
state_dir = {dir}/state
log_path = {log}
listen = 127.0.0.1
# The ports too.
login_log_format_elements = user=<%u> method=%m rip=%r rport=%b lip=%l lport=%a mpid=%e %c session=<%{{session}}>
hostname = {HOST_NAME}
postmaster_address = postmaster@{DOMAIN}

ssl = yes
ssl_cert = <{cert}
ssl_key = <{key}
disable_plaintext_auth = no

# Without this Dovecot refuses a header, whoever sends it.
haproxy_trusted_networks = 127.0.0.0/8 ::1

auth_mechanisms = plain login
auth_username_format = %n
auth_failure_delay = 0
passdb {{
  driver = passwd-file
  args = {dir}/users
}}
userdb {{
  driver = passwd-file
  args = {dir}/users
}}
# The default minimum (500) suits nobody, whose id is at the other end, but may not suit another system's.
first_valid_uid = {owner}
first_valid_gid = 1
mail_location = maildir:~/Maildir
mail_fsync = never
# Postfix delivers beside Dovecot, so IDLE looks for itself; mostly inotify is faster still.
mailbox_idle_check_interval = 1s
# Ten connections per user and address by default; tests open thousands as one user.
mail_max_userip_connections = 0
plugin {{
  sieve = file:~/sieve;active=~/.dovecot.sieve
}}
# Failed logins are delayed more and more by default.
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service imap {{
  process_limit = 4096
}}
"
    )
}

/// The listeners, and login processes that serve many clients each: a process per login takes
/// milliseconds.
fn services([imap, imaps, pop3, pop3s, sieve]: [SocketAddr; 5]) -> String {
    let service = |name: &str, listeners: &[(&str, SocketAddr)]| {
        let listeners: String =
            listeners.iter().map(|(name, addr)| inet_listener(name, addr.port())).collect();
        format!("service {name} {{\n  service_count = 0\n  client_limit = 8192\n{listeners}}}\n")
    };
    service("imap-login", &[("imap", imap), ("imaps", imaps)])
        + &service("pop3-login", &[("pop3", pop3), ("pop3s", pop3s)])
        + &service("managesieve-login", &[("sieve", sieve)])
}

fn inet_listener(name: &str, port: u16) -> String {
    let ssl = if name.ends_with('s') { "yes" } else { "no" };
    format!("  inet_listener {name} {{\n    port = {port}\n    ssl = {ssl}\n    haproxy = yes\n  }}\n")
}
