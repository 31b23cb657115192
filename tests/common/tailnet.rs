//! The test tailnet: control server, DERP relay and nodes in one Go program, driven by JSON lines.
//!
//! The program is `libtailscale/testnet/cmd/testnet`; its protocol is one JSON object a line, a
//! command in and its answer out. It ends when its input closes, so it cannot outlive this process.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::log::Log;
use super::process::Daemon;
use super::tools::run;
use super::{repo_root, temp_dir};

/// The first build compiles all of Tailscale; with Go's cache it takes a second or two.
const BUILD_LIMIT: Duration = Duration::from_secs(1200);
/// Starting a node waits for it to have joined.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const END_LIMIT: Duration = Duration::from_secs(10);

/// How to start the program.
#[derive(Default)]
pub struct Options {
    /// The address for control, DERP and STUN; loopback when none. Another one is for network
    /// namespaces.
    pub host: Option<IpAddr>,
    /// Keys that may enrol a node; any key may when there are none.
    pub auth_keys: Vec<String>,
    /// Whether control behaves as a Headscale of 2026 towards the edge.
    pub headscale: bool,
    pub verbose: bool,
    /// What goes before the program: where else to run it.
    pub wrapper: Vec<String>,
}

/// A running tailnet, ended on drop.
pub struct TestTailnet {
    control_url: String,
    pipe: Mutex<Option<Pipe>>,
    daemon: Daemon,
    _dir: TempDir,
}

/// One command and its answer at a time.
struct Pipe {
    input: ChildStdin,
    answers: Receiver<String>,
}

/// A node as it has joined.
#[derive(Clone, Debug)]
pub struct Node {
    pub ips: Vec<IpAddr>,
    pub dns_name: String,
}

impl Node {
    #[track_caller]
    fn parse(answer: &Value) -> Node {
        let ips = answer["ips"].as_array().into_iter().flatten();
        let ips: Option<Vec<IpAddr>> = ips.map(|ip| ip.as_str()?.parse().ok()).collect();
        match (ips, answer["dns_name"].as_str()) {
            (Some(ips), Some(dns_name)) if !ips.is_empty() => Node { ips, dns_name: dns_name.to_owned() },
            _ => panic!("testnet: not a node: {answer}"),
        }
    }
}

/// A key that enrols nodes.
#[derive(Clone, Copy, Debug, Default)]
pub struct AuthKey<'a> {
    pub key: &'a str,
    /// The first node it admits spends it.
    pub single_use: bool,
    pub expired: bool,
    /// Its nodes are ephemeral, whether they ask for it or not.
    pub ephemeral: bool,
    /// Its nodes need no approval.
    pub preauthorized: bool,
    /// Those of its nodes, where control is a Headscale.
    pub tags: &'a [&'a str],
}

/// A client of control's HTTP API, which proves itself by its secret or, as a workload identity, by
/// the exact JWT. The other of the two is empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct OauthClient<'a> {
    pub id: &'a str,
    pub secret: &'a str,
    pub jwt: &'a str,
    /// Those it may give to the keys it makes.
    pub tags: &'a [&'a str],
}

/// How many connections a node has forwarded: those open now, and all since it was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    pub open: u64,
    pub total: u64,
}

impl TestTailnet {
    pub fn start() -> TestTailnet {
        TestTailnet::start_with(&Options::default())
    }

    pub fn start_with(options: &Options) -> TestTailnet {
        TestTailnet::start_program(&go_program("testnet"), options)
    }

    /// Runs an executable that speaks the protocol.
    pub fn start_program(program: &Path, options: &Options) -> TestTailnet {
        let dir = temp_dir("testnet");
        let mut words = options.wrapper.iter().map(OsStr::new).chain([program.as_os_str()]);
        let mut command = Command::new(words.next().expect("the program itself"));
        command.args(words).arg("--dir").arg(dir.path());
        if let Some(host) = options.host {
            command.args(["--host", &host.to_string()]);
        }
        for key in &options.auth_keys {
            command.args(["--auth-key", key]);
        }
        if options.headscale {
            command.arg("--headscale");
        }
        if options.verbose {
            command.arg("--verbose");
        }
        let (daemon, input, output) = Daemon::spawn_piped("testnet", &mut command);
        let answers = read_lines(output);
        let hello = next_answer(&daemon, &answers, "its first line");
        let url = hello["control_url"].as_str().filter(|_| hello["ready"] == true);
        let control_url = url.unwrap_or_else(|| panic!("testnet: not a first line: {hello}")).to_owned();
        TestTailnet { control_url, pipe: Mutex::new(Some(Pipe { input, answers })), daemon, _dir: dir }
    }

    /// What goes into the edge's `control_url`.
    pub fn control_url(&self) -> &str {
        &self.control_url
    }

    /// Adds a node and waits until it has joined. It passes connections to each of its tailnet
    /// ports on to an address of this host.
    #[track_caller]
    pub fn add_node(&self, name: &str, tags: &[&str], forwards: &[(u16, SocketAddr)]) -> Node {
        let forward: serde_json::Map<String, Value> =
            forwards.iter().map(|(port, to)| (port.to_string(), json!(to.to_string()))).collect();
        let answer = self.command("add_node", json!({"name": name, "tags": tags, "forward": forward}));
        Node::parse(&answer)
    }

    /// Adds a forward, or points an existing one elsewhere.
    #[track_caller]
    pub fn forward(&self, node: &str, port: u16, to: SocketAddr) {
        self.command("forward", json!({"node": node, "port": port, "to": to.to_string()}));
    }

    /// The port refuses connections from now on.
    #[track_caller]
    pub fn unforward(&self, node: &str, port: u16) {
        self.command("unforward", json!({"node": node, "port": port}));
    }

    /// From now on connections through the node come from 127.x.y.z for a peer at 100.x.y.z, so that
    /// their target can tell peers apart; it has to be on 127.0.0.1.
    #[track_caller]
    pub fn show_peers(&self, node: &str) {
        self.command("show_peers", json!({"name": node}));
    }

    /// Turns a node off, as a process that ends: control tells its peers that it is offline.
    #[track_caller]
    pub fn stop_node(&self, name: &str) {
        self.command("stop_node", json!({"name": name}));
    }

    /// Turns a stopped node on again, with its old state, addresses and forwards; waits until it is
    /// reachable.
    #[track_caller]
    pub fn start_node(&self, name: &str) -> Node {
        Node::parse(&self.command("start_node", json!({"name": name})))
    }

    /// Deletes the node; it may join again, as a new node with another address.
    #[track_caller]
    pub fn remove_node(&self, name: &str) {
        self.command("remove_node", json!({"name": name}));
    }

    /// What control says about the node to the others, whatever is true; none ends that.
    #[track_caller]
    pub fn set_online(&self, name: &str, online: Option<bool>) {
        self.command("set_online", json!({"name": name, "online": online}));
    }

    /// Takes the node out of everybody else's netmap.
    #[track_caller]
    pub fn hide_node(&self, name: &str) {
        self.command("hide_node", json!({"name": name}));
    }

    #[track_caller]
    pub fn show_node(&self, name: &str) {
        self.command("show_node", json!({"name": name}));
    }

    /// The node stays online in the netmaps, but answers nobody: a host that has died silently.
    #[track_caller]
    pub fn isolate_node(&self, name: &str) {
        self.command("isolate_node", json!({"name": name}));
    }

    #[track_caller]
    pub fn rejoin_node(&self, name: &str) {
        self.command("rejoin_node", json!({"name": name}));
    }

    /// A firewall of the node's host drops what comes for this port: connecting gets no answer at all.
    #[track_caller]
    pub fn drop_port(&self, node: &str, port: u16) {
        self.command("drop_port", json!({"node": node, "port": port}));
    }

    #[track_caller]
    pub fn pass_port(&self, node: &str, port: u16) {
        self.command("pass_port", json!({"node": node, "port": port}));
    }

    /// The access rules no longer allow this port: the node drops what comes for it, and says so to the
    /// peer's Tailscale.
    #[track_caller]
    pub fn deny_port(&self, node: &str, port: u16) {
        self.command("deny_port", json!({"node": node, "port": port}));
    }

    #[track_caller]
    pub fn allow_port(&self, node: &str, port: u16) {
        self.command("allow_port", json!({"node": node, "port": port}));
    }

    /// All nodes as control sees them, the edge too.
    #[track_caller]
    pub fn nodes(&self) -> Vec<Value> {
        let answer = self.command("nodes", json!({}));
        answer["nodes"].as_array().unwrap_or_else(|| panic!("testnet: no list of nodes: {answer}")).clone()
    }

    /// Replaces the keys that may enrol a node; none lets in any key, and nodes without one.
    #[track_caller]
    pub fn set_auth_keys(&self, keys: Option<&[&str]>) {
        self.command("auth_keys", json!({"keys": keys}));
    }

    /// As [`TestTailnet::set_auth_keys`], with keys that are more than reusable.
    #[track_caller]
    pub fn set_auth_key_table(&self, keys: &[AuthKey]) {
        let keys: Vec<Value> = keys
            .iter()
            .map(|key| {
                json!({
                    "key": key.key,
                    "single_use": key.single_use,
                    "expired": key.expired,
                    "ephemeral": key.ephemeral,
                    "preauthorized": key.preauthorized,
                    "tags": key.tags,
                })
            })
            .collect();
        self.command("auth_keys", json!({"keys": keys}));
    }

    /// How many nodes the key has let in.
    #[track_caller]
    pub fn key_uses(&self, key: &str) -> u64 {
        let answer = self.command("key_uses", json!({"key": key}));
        answer["uses"].as_u64().unwrap_or_else(|| panic!("testnet: no uses: {answer}"))
    }

    /// Replaces the clients of the HTTP API at [`TestTailnet::control_url`]. Keys that the API makes
    /// join those that may enrol a node.
    #[track_caller]
    pub fn set_oauth_clients(&self, clients: &[OauthClient]) {
        let clients: Vec<Value> = clients
            .iter()
            .map(|client| {
                json!({"id": client.id, "secret": client.secret, "jwt": client.jwt, "tags": client.tags})
            })
            .collect();
        self.command("oauth_clients", json!({"clients": clients}));
    }

    /// Whether the HTTP API works, or answers every request with 503.
    #[track_caller]
    pub fn set_api(&self, up: bool) {
        self.command("set_api", json!({"up": up}));
    }

    /// All requests to the HTTP API so far, those that failed included.
    #[track_caller]
    pub fn api_requests(&self) -> u64 {
        let answer = self.command("api_stats", json!({}));
        answer["requests"].as_u64().unwrap_or_else(|| panic!("testnet: no requests: {answer}"))
    }

    /// The only tags that nodes joining from now on may ask for; none permits all.
    #[track_caller]
    pub fn permit_tags(&self, tags: Option<&[&str]>) {
        self.command("permit_tags", json!({"tags": tags}));
    }

    /// Whether nodes that join from now on wait for [`TestTailnet::approve`].
    #[track_caller]
    pub fn require_approval(&self, required: bool) {
        self.command("require_approval", json!({"required": required}));
    }

    #[track_caller]
    pub fn approve(&self, name: &str) {
        self.command("approve", json!({"name": name}));
    }

    /// The node waits for [`TestTailnet::approve`] again.
    #[track_caller]
    pub fn revoke_approval(&self, name: &str) {
        self.command("revoke_approval", json!({"name": name}));
    }

    /// Whether the tailnet demands the upload of flow logs from nodes of other processes.
    #[track_caller]
    pub fn require_flow_logs(&self, required: bool) {
        self.command("require_flow_logs", json!({"required": required}));
    }

    /// Nodes that join from now on reach each other through the relay only.
    #[track_caller]
    pub fn derp_only(&self, enabled: bool) {
        self.command("derp_only", json!({"enabled": enabled}));
    }

    /// Gives the node another address, and the v6 address that goes with it.
    #[track_caller]
    pub fn set_ip(&self, name: &str, ip: Ipv4Addr) {
        self.command("set_ips", json!({"name": name, "ips": [ip]}));
    }

    /// Visits the login URL that was given to the node.
    #[track_caller]
    pub fn complete_login(&self, name: &str) {
        self.command("complete_login", json!({"name": name}));
    }

    /// Replaces the node's tags, whatever it asked for.
    #[track_caller]
    pub fn set_tags(&self, name: &str, tags: &[&str]) {
        self.command("set_tags", json!({"name": name, "tags": tags}));
    }

    /// When the node's key expires, as a Go duration from now: `-1m` is in the past, and empty is
    /// never.
    #[track_caller]
    pub fn set_key_expiry(&self, name: &str, from_now: &str) {
        self.command("set_key_expiry", json!({"name": name, "in": from_now}));
    }

    /// When the node's key expires, in the words of the control server.
    #[track_caller]
    pub fn set_key_expiry_at(&self, name: &str, at: &str) {
        self.command("set_key_expiry", json!({"name": name, "at": at}));
    }

    /// What control tells the node to be wrong with it.
    #[track_caller]
    pub fn set_health(&self, name: &str, texts: &[&str]) {
        self.command("set_health", json!({"name": name, "texts": texts}));
    }

    /// Another URL of the same control server.
    #[track_caller]
    pub fn alias_control(&self) -> String {
        let answer = self.command("alias_control", json!({}));
        answer["url"].as_str().unwrap_or_else(|| panic!("testnet: no URL: {answer}")).to_owned()
    }

    /// The control server stops answering; the nodes keep the netmap they have.
    #[track_caller]
    pub fn stop_control(&self) {
        self.command("stop_control", json!({}));
    }

    #[track_caller]
    pub fn start_control(&self) {
        self.command("start_control", json!({}));
    }

    /// The relay cuts its connections and stops answering; STUN and direct paths go on.
    #[track_caller]
    pub fn stop_derp(&self) {
        self.command("stop_derp", json!({}));
    }

    /// Nodes come back to the relay by themselves, within a few seconds.
    #[track_caller]
    pub fn start_derp(&self) {
        self.command("start_derp", json!({}));
    }

    /// The connections which the node has forwarded.
    #[track_caller]
    pub fn stats(&self, node: &str) -> Stats {
        let answer = self.command("stats", json!({"node": node}));
        let count =
            |field: &str| answer[field].as_u64().unwrap_or_else(|| panic!("testnet: no {field}: {answer}"));
        Stats { open: count("open"), total: count("total") }
    }

    /// An address of this host from which connections leave through a node, to a port of a tailnet
    /// address: a client on that node.
    #[track_caller]
    pub fn reach(&self, node: &str, target: SocketAddr) -> SocketAddr {
        let answer = self.command("reach", json!({"node": node, "target": target}));
        let addr = answer["addr"].as_str().and_then(|addr| addr.parse().ok());
        addr.unwrap_or_else(|| panic!("testnet: no address: {answer}"))
    }

    /// Sends any command, and returns its answer; panics when the program refuses it.
    #[track_caller]
    pub fn command(&self, name: &str, fields: Value) -> Value {
        self.try_command(name, fields)
            .unwrap_or_else(|error| panic!("testnet: {name}: {error}\n{}", self.log().tail()))
    }

    /// As [`TestTailnet::command`], but a refusal is an answer too.
    pub fn try_command(&self, name: &str, mut fields: Value) -> Result<Value, String> {
        fields["cmd"] = json!(name);
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        let pipe = pipe.as_mut().expect("the program runs until this is dropped");
        writeln!(pipe.input, "{fields}").map_err(|error| format!("testnet has ended: {error}"))?;
        let answer = next_answer(&self.daemon, &pipe.answers, name);
        if answer["ok"] == true {
            Ok(answer)
        } else {
            Err(answer["error"].as_str().unwrap_or("no reason").to_owned())
        }
    }

    /// What the program prints about itself.
    pub fn log(&self) -> &Log {
        self.daemon.output()
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }
}

impl Drop for TestTailnet {
    fn drop(&mut self) {
        // Closing its input ends the program in order; the daemon's own drop kills it if that takes
        // too long.
        self.pipe.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.daemon.wait_exit(END_LIMIT);
    }
}

fn read_lines(output: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

#[track_caller]
fn next_answer(daemon: &Daemon, answers: &Receiver<String>, to: &str) -> Value {
    let line = match answers.recv_timeout(ANSWER_LIMIT) {
        Ok(line) => line,
        Err(RecvTimeoutError::Timeout) => {
            panic!("testnet did not answer {to} within {ANSWER_LIMIT:?}\n{}", daemon.output().tail())
        }
        Err(RecvTimeoutError::Disconnected) => {
            panic!("testnet has ended, before {to}\n{}", daemon.output().tail())
        }
    };
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("testnet: not JSON ({error}): {line}"))
}

/// Where a program of `libtailscale/testnet/cmd` is. They are built once per process.
pub fn go_program(name: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        let here = std::env::current_exe().expect("/proc is mounted");
        let beside = here.parent().expect("it is in a directory");
        // Cargo puts programs into target/debug, and those of tests one further down.
        let directory = if beside.ends_with("deps") { beside.parent().expect("it is below") } else { beside };
        let mut build = Command::new(repo_root().join("scripts/build-testnet"));
        run(build.arg(directory), b"", BUILD_LIMIT).expect_success();
        directory.to_owned()
    });
    directory.join(name)
}
