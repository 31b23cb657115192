//! A private Postfix which wants a PROXY header on every port.

use std::fs::Permissions;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

use super::cert::HOST_NAME;
use super::log::Log;
use super::mail::{Account, DOMAIN, MailHome, USERS, group_id};
use super::net::{free_addr, is_listening};
use super::process::Daemon;
use super::tools::{Finished, run};
use super::{START_LIMIT, require_root, temp_dir};

/// Stopped on drop. Mail to `USER@example.test` lands in the [`MailHome`]; mail to anybody else is
/// refused, whatever the client's address, so that no test passes only because a client looks
/// local.
pub struct Postfix {
    /// Port 25.
    pub smtp: SocketAddr,
    /// Port 587.
    pub submission: SocketAddr,
    /// Port 465: TLS from the first byte, after the PROXY header.
    pub submissions: SocketAddr,
    daemon: Daemon,
    log: Log,
    _home: MailHome,
    dir: TempDir,
}

impl Postfix {
    pub fn start(home: &MailHome) -> Postfix {
        Postfix::start_with(home, "")
    }

    /// Starts with more lines for `main.cf`; later ones win over ours.
    pub fn start_with(home: &MailHome, extra: &str) -> Postfix {
        require_root("Postfix");
        let dir = temp_dir("postfix");
        let [smtp, submission, submissions] = [free_addr(), free_addr(), free_addr()];
        make_directories(dir.path());
        write_aged(&dir.path().join("main.cf"), &settled(&(main_cf(dir.path(), home) + MAIN_CF + extra)));
        write_aged(&dir.path().join("master.cf"), &master_cf(smtp, submission, submissions));
        let addrs = [smtp, submission, submissions];
        let daemon = launch(dir.path(), &addrs);
        let log = Log::file("postfix", &log_path(dir.path()));
        Postfix { smtp, submission, submissions, daemon, log, _home: home.clone(), dir }
    }

    /// The mail log: `connect from unknown[192.0.2.7]:34567` names the client which the PROXY
    /// header told.
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
    /// milliseconds; Postfix itself would take two seconds.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// Starts again after [`Postfix::kill`], on the same ports and with the same queue.
    pub fn restart(&mut self) {
        self.kill();
        self.daemon = launch(self.dir.path(), &[self.smtp, self.submission, self.submissions]);
    }
}

/// A Postfix of somebody else's: it takes mail for anybody from this host, without a PROXY header,
/// and passes all of it on to one address, as it would to the MX of a domain.
pub struct Sender {
    postfix: Postfix,
}

impl Sender {
    pub fn start(to: SocketAddr) -> Sender {
        Sender::start_from(Ipv4Addr::LOCALHOST, &[to])
    }

    /// The same from an address of its own, to the first of these that takes it, as it would to the MX
    /// hosts of a domain.
    pub fn start_from(source: Ipv4Addr, to: &[SocketAddr]) -> Sender {
        let hosts: Vec<String> = to.iter().map(|to| format!("[{}]:{}", to.ip(), to.port())).collect();
        let settings = format!(
            "smtpd_upstream_proxy_protocol =
virtual_mailbox_domains =
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
default_transport = smtp
relay_transport = smtp
relayhost = {}
smtp_bind_address = {source}
smtp_tls_security_level = none
# It would want one more service.
smtp_connection_cache_on_demand = no
# What was deferred waits for `postqueue -f`.
queue_run_delay = 1h
minimal_backoff_time = 1h
maximal_backoff_time = 1h
",
            hosts.join(", ")
        );
        Sender { postfix: Postfix::start_with(&MailHome::create(), &settings) }
    }

    /// Where it takes mail.
    pub fn smtp(&self) -> SocketAddr {
        self.postfix.smtp
    }

    pub fn log(&self) -> &Log {
        self.postfix.log()
    }

    /// What waits in its queue: one object for each message.
    #[track_caller]
    pub fn queue(&self) -> Vec<Value> {
        let list = self.postqueue("-j").stdout();
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        list.lines().map(parse).collect()
    }

    /// Tries to deliver all of it now.
    #[track_caller]
    pub fn flush(&self) {
        self.postqueue("-f");
    }

    #[track_caller]
    fn postqueue(&self, argument: &str) -> Finished {
        let mut command = Command::new(postqueue_program());
        command.arg("-c").arg(self.postfix.dir.path()).arg(argument);
        run(&mut command, b"", START_LIMIT).expect_success()
    }
}

/// Not every PATH has the sbin directories.
fn postqueue_program() -> &'static str {
    let known = "/usr/sbin/postqueue";
    if Path::new(known).is_file() { known } else { "postqueue" }
}

/// Returns once every port listens.
fn launch(dir: &Path, addrs: &[SocketAddr]) -> Daemon {
    // `master` itself, not `postfix start`, whose checks of the whole installation take most of a
    // second. -d: it keeps the process group it was given (it would make a session, which the
    // leader of a group may not).
    let mut command = Command::new(master_program());
    let daemon = Daemon::spawn("postfix", command.arg("-d").arg("-c").arg(dir));
    let log = Log::file("postfix", &log_path(dir));
    daemon.wait_ready(START_LIMIT, Some(&log), || addrs.iter().all(|addr| is_listening(*addr)));
    daemon
}

fn log_path(dir: &Path) -> PathBuf {
    dir.join("mail.log")
}

fn master_program() -> PathBuf {
    // Debian's place, and the one of most others.
    let known = ["/usr/lib/postfix/sbin", "/usr/libexec/postfix", "/usr/lib/postfix"];
    let found = known.iter().map(|dir| Path::new(dir).join("master")).find(|master| master.is_file());
    found.unwrap_or_else(|| panic!("Postfix's master is in none of {known:?}: run scripts/install-deps"))
}

/// What `postfix check` would make, with the modes it would give.
fn make_directories(dir: &Path) {
    let postfix = Account::named("postfix");
    let postdrop = group_id("postdrop");
    make_directory(&dir.join("queue"), 0o755);
    make_directory(&dir.join("queue/pid"), 0o755);
    for queue in
        ["active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "trace"]
    {
        let path = dir.join("queue").join(queue);
        make_directory(&path, 0o700);
        postfix.own(&path);
    }
    for (name, mode) in [("maildrop", 0o730), ("public", 0o710)] {
        let path = dir.join("queue").join(name);
        make_directory(&path, mode);
        chown(&path, Some(postfix.uid), Some(postdrop)).expect("root may change owners");
    }
    make_directory(&dir.join("data"), 0o700);
    postfix.own(&dir.join("data"));
}

fn make_directory(path: &Path, mode: u32) {
    std::fs::create_dir(path).expect("the directory is new");
    std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("its mode can be set");
}

/// Writes a file that looks a minute old: a file changed within the last two seconds might still be
/// written to, so every Postfix process would wait for it to age.
#[expect(clippy::disallowed_methods, reason = "a file's age is told by the time of day")]
fn write_aged(path: &Path, text: &str) {
    let written = std::fs::write(path, text).and_then(|()| {
        let file = std::fs::File::options().write(true).open(path)?;
        file.set_modified(SystemTime::now() - Duration::from_secs(60))
    });
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Leaves of each setting the last one. Postfix would too, but every process would warn of it at its
/// start, when nobody reads the log's socket yet, which takes ten lines and then blocks the writer.
fn settled(settings: &str) -> String {
    let key = |line: &str| line.split_once(" =").map(|(key, _)| key.to_owned());
    let lines: Vec<&str> =
        settings.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let is_last =
        |(index, line): &(usize, &&str)| !lines[index + 1..].iter().any(|later| key(later) == key(line));
    lines.iter().enumerate().filter(is_last).map(|(_, line)| format!("{line}\n")).collect()
}

/// What differs between instances.
fn main_cf(dir: &Path, home: &MailHome) -> String {
    let log = log_path(dir);
    let (dir, mail) = (dir.display(), home.path().display());
    let (cert, key) = (home.certificate().cert.display(), home.certificate().key.display());
    let Account { uid, gid } = home.owner();
    let maildirs: Vec<String> = USERS.iter().map(|user| format!("{user}@{DOMAIN}={user}/Maildir/")).collect();
    let maildirs = maildirs.join(", ");
    let log = log.display();
    format!(
        "myhostname = {HOST_NAME}
queue_directory = {dir}/queue
data_directory = {dir}/data
# postlogd refuses a path outside of these prefixes.
maillog_file = {log}
maillog_file_prefixes = {dir}
virtual_mailbox_domains = {DOMAIN}
virtual_mailbox_base = {mail}
virtual_mailbox_maps = inline:{{ {maildirs} }}
virtual_minimum_uid = 1
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
smtpd_tls_cert_file = {cert}
smtpd_tls_key_file = {key}
"
    )
}

/// What is the same for every instance.
const MAIN_CF: &str = "
compatibility_level = 3.6
inet_interfaces = loopback-only
inet_protocols = all

# No name service: lookups of the test addresses would wait for a resolver that may not answer.
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtp_host_lookup = native

# All mail is that of the virtual users; nothing is local, nothing leaves.
mydestination =
alias_maps =
alias_database =
local_recipient_maps =
local_transport = error:no local mail
default_transport = error:no mail leaves the test
relay_transport = error:no mail leaves the test
smtpd_relay_restrictions = reject_unauth_destination
mynetworks =

smtpd_tls_security_level = may
smtpd_tls_loglevel = 1

smtpd_upstream_proxy_protocol = haproxy
# The port too: unknown[192.0.2.7]:34567.
smtpd_client_port_logging = yes

# More than twice what the tests send.
message_size_limit = 134217728
mailbox_size_limit = 0
virtual_mailbox_limit = 0

# No limits per client and no delays: tests play many clients from few addresses, fast. Limits of
# zero also keep smtpd from asking anvil.
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
smtpd_error_sleep_time = 0
in_flow_delay = 0
default_process_limit = 500
";

/// Only the services that mail takes on its way in and out, none of them in a chroot (whose copies of
/// system files are absent).
fn master_cf(smtp: SocketAddr, submission: SocketAddr, submissions: SocketAddr) -> String {
    format!(
        "{smtp} inet n - n - - smtpd
{submission} inet n - n - - smtpd -o syslog_name=postfix/submission
{submissions} inet n - n - - smtpd -o syslog_name=postfix/submissions -o smtpd_tls_wrappermode=yes
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
smtp unix - - n - - smtp
showq unix n - n - - showq
pickup unix n - n 60 1 pickup
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"
    )
}
