//! The program under test: its configuration, its life as a child process, and what can be seen of
//! it from outside.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::log::Log;
use super::process::Daemon;
use super::temp_dir;
use super::wait::{eventually, wait_for};

const BOUND_LIMIT: Duration = Duration::from_secs(20);

/// What the edge prints when it serves, as text or as JSON. The two functions below are all that knows
/// the wording of its log.
fn is_ready(line: &str) -> bool {
    line.contains(" ready name=") || line.contains(r#""message":"ready","name":"#)
}

/// Reads the line about one bound listener: `… listening listener=smtp address=127.0.0.1:41234`,
/// any order of fields.
fn parse_listening(line: &str) -> Option<(String, SocketAddr)> {
    if let Ok(line) = serde_json::from_str::<serde_json::Value>(line) {
        let is_listening = line["message"] == "listening";
        let address = line["address"].as_str()?.parse().ok()?;
        return is_listening.then_some((line["listener"].as_str()?.to_owned(), address));
    }
    let mut words = line.split_whitespace();
    words.find(|word| *word == "listening")?;
    let field = |name: &str| {
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
        Some(value.trim_matches('"'))
    };
    Some((field("listener")?.to_owned(), field("address")?.parse().ok()?))
}

/// A `[[listener]]` with a name, a protocol and free ports of both loopback addresses.
#[derive(Clone)]
pub struct Listener(BTreeMap<String, String>);

impl Listener {
    /// `upstream_port` is the port of the mailbox node.
    pub fn new(name: &str, protocol: &str, upstream_port: u16) -> Listener {
        Listener(BTreeMap::new())
            .set("name", &format!("{name:?}"))
            .set("protocol", &format!("{protocol:?}"))
            .set("listen", r#"["127.0.0.1:0", "[::1]:0"]"#)
            .set("upstream_port", &upstream_port.to_string())
    }

    /// Sets any key to a value in TOML's notation (strings with their quotes).
    pub fn set(mut self, key: &str, value: &str) -> Listener {
        self.0.insert(key.to_owned(), value.to_owned());
        self
    }
}

/// Collects the configuration and the environment. A clone starts the same edge again.
#[derive(Clone)]
pub struct Builder {
    program: PathBuf,
    wrapper: Vec<String>,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
    sections: BTreeMap<String, BTreeMap<String, String>>,
    listeners: Vec<Listener>,
}

impl Builder {
    /// The URL of the test tailnet's control server.
    pub fn control_url(self, url: &str) -> Builder {
        self.set("tailnet", "control_url", &format!("{url:?}"))
    }

    /// Keeps the node's state in a directory of the test's own, which a second start finds again.
    pub fn state_dir(self, dir: &Path) -> Builder {
        self.set("tailnet", "state_dir", &format!("{:?}", dir.display().to_string()))
    }

    pub fn auth_key(self, key: &str) -> Builder {
        self.env("TS_AUTHKEY", key)
    }

    /// The mailbox node's name.
    pub fn upstream(self, host: &str) -> Builder {
        self.set("upstream", "host", &format!("{host:?}"))
    }

    pub fn listener(mut self, listener: Listener) -> Builder {
        self.listeners.push(listener);
        self
    }

    pub fn without_listeners(mut self) -> Builder {
        self.listeners.clear();
        self
    }

    /// Sets any key of any section to a value in TOML's notation (strings with their quotes).
    pub fn set(mut self, section: &str, key: &str, value: &str) -> Builder {
        self.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), value.to_owned());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Builder {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    pub fn without_auth_key(mut self) -> Builder {
        self.environment.remove("TS_AUTHKEY");
        self
    }

    /// Starts the program through others, each of which must become the next one (as `setpriv`,
    /// `prlimit` and `ip netns exec` do), so that the process id stays the program's own. A second
    /// wrapper runs inside the first.
    pub fn wrapped(mut self, wrapper: &[&str]) -> Builder {
        self.wrapper.extend(wrapper.iter().map(|word| (*word).to_owned()));
        self
    }

    /// One more argument after `run --config FILE`.
    pub fn arg(mut self, argument: &str) -> Builder {
        self.arguments.push(argument.to_owned());
        self
    }

    /// The configuration file's text.
    pub fn config(&self) -> String {
        let mut text = String::new();
        for (section, keys) in &self.sections {
            // The one without a name, for the keys above all sections, comes first.
            let title = if section.is_empty() { String::new() } else { format!("[{section}]") };
            push_section(&mut text, &title, keys);
        }
        for Listener(keys) in &self.listeners {
            push_section(&mut text, "[[listener]]", keys);
        }
        text
    }

    /// Starts the program, and returns at once.
    pub fn spawn(&self) -> Edge {
        self.spawn_prepared(|_| {})
    }

    /// The same, after a last word on how.
    pub fn spawn_prepared(&self, prepare: impl FnOnce(&mut Command)) -> Edge {
        let dir = temp_dir("edge");
        let mut builder = self.clone();
        if !self.sections.get("tailnet").is_some_and(|keys| keys.contains_key("state_dir")) {
            builder = builder.state_dir(&dir.path().join("state"));
        }
        let config = dir.path().join("config.toml");
        std::fs::write(&config, builder.config()).expect("the configuration can be written");
        let mut command = self.program_alone();
        command.arg("run").arg("--config").arg(&config).args(&self.arguments);
        prepare(&mut command);
        Edge { daemon: Daemon::spawn("edge", &mut command), config, _dir: dir }
    }

    /// Starts the program with these arguments and no configuration file.
    pub fn spawn_with(&self, arguments: &[&str]) -> Edge {
        let dir = temp_dir("edge");
        let daemon = Daemon::spawn("edge", self.program_alone().args(arguments));
        Edge { daemon, config: dir.path().join("none"), _dir: dir }
    }

    /// The program in its wrapper and environment, without arguments.
    pub fn program_alone(&self) -> Command {
        let program = self.program.as_os_str();
        let mut words = self.wrapper.iter().map(OsStr::new).chain([program]);
        let mut command = Command::new(words.next().unwrap_or(program));
        // Nothing of the tester's own environment: a TS_AUTHKEY or a proxy setting there would
        // change the test.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).envs(&self.environment);
        command.args(words);
        command
    }
}

fn push_section(text: &mut String, title: &str, keys: &BTreeMap<String, String>) {
    let written = writeln!(text, "{title}");
    let mut lines = keys.iter().map(|(key, value)| writeln!(text, "{key} = {value}"));
    written.and_then(|()| lines.try_for_each(|line| line)).expect("a string takes all");
}

/// A running edge, killed on drop.
pub struct Edge {
    daemon: Daemon,
    config: PathBuf,
    _dir: TempDir,
}

impl Edge {
    /// `program` is `env!("CARGO_BIN_EXE_tailwart-edge")` in tests.
    pub fn builder(program: impl AsRef<Path>) -> Builder {
        let builder = Builder {
            program: program.as_ref().to_owned(),
            wrapper: Vec::new(),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
            sections: BTreeMap::new(),
            listeners: Vec::new(),
        };
        // Probes would be counted among the connections of most tests.
        let builder = builder.set("admin", "listen", r#""127.0.0.1:0""#).set("probe", "interval", r#""0s""#);
        // Most tests look for the line of each connection.
        builder.set("log", "repeats", "0")
    }

    /// Waits until the edge says it serves; panics with its log when it ends or the deadline
    /// passes.
    #[track_caller]
    pub fn wait_ready(&self, deadline: Duration) {
        self.daemon.wait_ready(deadline, None, || self.log().lines().iter().any(|line| is_ready(line)));
    }

    /// The IPv4 address of a listener (`admin` is one too), as soon as it is bound.
    #[track_caller]
    pub fn addr(&self, listener: &str) -> SocketAddr {
        self.bound(listener, SocketAddr::is_ipv4)
    }

    /// The IPv6 address of a listener, as soon as it is bound.
    #[track_caller]
    pub fn addr_v6(&self, listener: &str) -> SocketAddr {
        self.bound(listener, SocketAddr::is_ipv6)
    }

    #[track_caller]
    fn bound(&self, listener: &str, family: fn(&SocketAddr) -> bool) -> SocketAddr {
        let wanted = |(name, addr): &(String, SocketAddr)| name == listener && family(addr);
        let probe = || self.log().lines().iter().filter_map(|line| parse_listening(line)).find(wanted);
        let found =
            wait_for(BOUND_LIMIT, || probe().map(Some).or_else(|| self.daemon.has_exited().then_some(None)));
        // The last lines may have come between the look at the log and the look at the process.
        self.daemon.settle();
        match found.flatten().or_else(probe) {
            Some((_, addr)) => addr,
            None => panic!("the edge has not bound {listener}\n{}", self.log().tail()),
        }
    }

    pub fn log(&self) -> &Log {
        self.daemon.output()
    }

    /// The first log line holding `needle`; panics with the log's tail at the deadline.
    #[track_caller]
    pub fn wait_log(&self, needle: &str, deadline: Duration) -> String {
        self.log().wait(needle, deadline)
    }

    /// Waits for the edge to end by itself; panics with its log at the deadline.
    #[track_caller]
    pub fn wait_exit(&mut self, deadline: Duration) -> ExitStatus {
        let status = self.daemon.wait_exit(deadline);
        status.unwrap_or_else(|| panic!("the edge still runs after {deadline:?}\n{}", self.log().tail()))
    }

    pub fn is_running(&self) -> bool {
        !self.daemon.has_exited()
    }

    /// `signal("TERM")`.
    pub fn signal(&self, name: &str) {
        self.daemon.signal(name);
    }

    /// Has it stand still, and waits until it does.
    #[track_caller]
    pub fn pause(&self) {
        self.daemon.pause();
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.daemon.resume();
    }

    /// Puts another configuration in the place of its own, at once: it may be read at any time.
    pub fn replace_config(&self, text: &str) {
        let new = self.config.with_extension("new");
        std::fs::write(&new, text).expect("the configuration can be written");
        std::fs::rename(&new, &self.config).expect("it can be put in its place");
    }

    /// Puts another configuration in the place of its own and has it read; the line that tells of it.
    /// The builder has to name its state directory, which must stay.
    #[track_caller]
    pub fn reload(&self, builder: &Builder, deadline: Duration) -> String {
        self.replace_config(&builder.config());
        let is_told =
            |line: &str| line.contains("configuration reloaded") || line.contains("was not reloaded");
        let told = || self.log().lines().into_iter().filter(|line| is_told(line));
        let before = told().count();
        self.signal("HUP");
        let line = wait_for(deadline, || told().nth(before));
        line.unwrap_or_else(|| panic!("nothing is told of a reload\n{}", self.log().tail()))
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Where the configuration was written: for `check` and `status`, or to change it.
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// Resident memory, in KiB.
    #[track_caller]
    pub fn rss_kb(&self) -> u64 {
        self.status_number("VmRSS")
    }

    /// Resident memory once it has stopped changing, in KiB: what is garbage of what was before goes first.
    #[track_caller]
    pub fn settled_rss_kb(&self, deadline: Duration) -> u64 {
        let mut last = (self.rss_kb(), Instant::now());
        let still = eventually(deadline, || {
            let now = self.rss_kb();
            if now != last.0 {
                last = (now, Instant::now());
            }
            last.1.elapsed() > Duration::from_millis(500)
        });
        assert!(still, "the memory of an idle edge keeps changing");
        last.0
    }

    /// The most resident memory so far, in KiB.
    #[track_caller]
    pub fn peak_rss_kb(&self) -> u64 {
        self.status_number("VmHWM")
    }

    #[track_caller]
    pub fn threads(&self) -> u64 {
        self.status_number("Threads")
    }

    /// Open descriptors.
    #[track_caller]
    pub fn fds(&self) -> usize {
        std::fs::read_dir(self.proc("fd"))
            .map_or_else(|error| panic!("the edge's descriptors: {error}"), Iterator::count)
    }

    #[track_caller]
    fn status_number(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(self.proc("status")).unwrap_or_default();
        let number = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.split_whitespace().next());
        let number = number.and_then(|number| number.parse().ok());
        number.unwrap_or_else(|| panic!("the edge has no {field}: it has ended\n{}", self.log().tail()))
    }

    fn proc(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.pid().to_string()).join(file)
    }
}
