//! What the edge's memory comes to, in the situations of `docs/src/performance.md`, with the budget for bytes
//! in flight and, beside it, as good as without.
//!
//!   cargo bench --bench memory                  all of them, about seven minutes
//!   cargo bench --bench memory -- stalled idle  some of them
//!
//! Mailbox, clients and test tailnet run on this machine too, so that speeds are ratios and no more.
//! Root, for the control group of `box`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use common::edge::{Builder, Edge};
use common::memory::{LIMIT, PORTS, Setup, greeted, serve};
use common::netns::Namespace;
use common::tailnet::{Options, TestTailnet};

const MIB: u64 = 1024 * 1024;
/// As good as none.
const WITHOUT_BUDGET_MIB: u32 = 64 * 1024;
const STREAMS: usize = 16;
const STREAMING: Duration = Duration::from_secs(6);
/// How long a packet is under way on a long path: 100 ms there and back.
const FAR: Duration = Duration::from_millis(50);
/// What streams on a long path take to be at full speed.
const FAR_WARM_UP: Duration = Duration::from_secs(5);
/// Stalled connections each way.
const STALLED: usize = 100;

/// Measures with this limit on memory, or the default, and tells in words.
type Situation = fn(Option<u32>) -> String;

fn main() {
    // Cargo passes --bench.
    let chosen: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    raise_descriptor_limit();
    if chosen.first().is_some_and(|arg| arg == MAILBOX_ARGUMENT) {
        serve().iter().for_each(|address| println!("{address}"));
        sleep(Duration::MAX); // until it is killed
    }
    let situations: [(&str, Situation); 7] = [
        ("rest", rest),
        ("upload", |mib| streams(mib, "swallows")),
        ("download", |mib| streams(mib, "pours")),
        ("far", far),
        ("stalled", stalled),
        ("idle", idle),
        ("box", small_box),
    ];
    for (name, measure) in situations {
        if chosen.is_empty() || chosen.iter().any(|chosen| chosen == name) {
            println!("{name:9} default         {}", measure(None));
            println!("{name:9} without budget  {}", measure(Some(WITHOUT_BUDGET_MIB)));
        }
    }
}

// The situations.

fn start(mib: Option<u32>, wrapper: &[&str]) -> (Setup, Mailbox) {
    let mailbox = Mailbox::start(&mut Command::new(this_program()));
    (Setup::start(TestTailnet::start(), &mailbox.addresses, edge(mib).wrapped(wrapper)), mailbox)
}

fn edge(mib: Option<u32>) -> Builder {
    let edge = Edge::builder(program());
    match mib {
        Some(mib) => edge.set("limits", "memory_mib", &mib.to_string()),
        None => edge,
    }
}

fn rest(mib: Option<u32>) -> String {
    let (setup, _mailbox) = start(mib, &[]);
    sleep(Duration::from_secs(5));
    format!("{} MB", setup.edge.rss_kb() / 1024)
}

fn streams(mib: Option<u32>, port: &str) -> String {
    let (setup, _mailbox) = start(mib, &[]);
    let (began, cpu) = (Instant::now(), setup.cpu_seconds());
    let moved_gb = setup.stream(port, STREAMS, Duration::ZERO, STREAMING) as f64 / 1e9;
    format!(
        "{} MB at most, {:.0} MB/s, {:.1} CPU s/GB",
        setup.edge.peak_rss_kb() / 1024,
        moved_gb * 1000.0 / began.elapsed().as_secs_f64(),
        (setup.cpu_seconds() - cpu) / moved_gb,
    )
}

/// With the mailbox, and all the rest of the tailnet, at the end of a long path.
fn far(mib: Option<u32>) -> String {
    let place = Namespace::far(FAR);
    let mailbox = Mailbox::start(&mut place.command(&this_program()));
    let wrapper = place.wrapper().map(str::to_owned).into();
    let options = Options { host: Some(place.inside.into()), wrapper, ..Options::default() };
    let setup = Setup::start(TestTailnet::start_with(&options), &mailbox.addresses, edge(mib));
    let megabits = |port, streams| {
        setup.stream(port, streams, FAR_WARM_UP, STREAMING) * 8 / 1_000_000 / STREAMING.as_secs()
    };
    let (up, ups) = (megabits("swallows", 1), megabits("swallows", STREAMS));
    let (down, downs) = (megabits("pours", 1), megabits("pours", STREAMS));
    let peak = setup.edge.peak_rss_kb() / 1024;
    format!("{peak} MB at most; one upload {up} Mb/s, 16 {ups}; one download {down} Mb/s, 16 {downs}")
}

fn stalled(mib: Option<u32>) -> String {
    let (setup, _mailbox) = start(mib, &[]);
    let _open = setup.stall(STALLED);
    let slowest = (0..10).map(|_| {
        let began = Instant::now();
        greeted(setup.connect("greets"));
        began.elapsed().as_millis()
    });
    let slowest = slowest.max().unwrap_or_default();
    let peak = setup.edge.peak_rss_kb() / 1024;
    format!("{peak} MB at most, an honest session is greeted within {slowest} ms")
}

fn idle(mib: Option<u32>) -> String {
    const FEW: usize = 1000;
    const MANY: usize = 5000;
    let (setup, _mailbox) = start(mib, &[]);
    let mut clients = setup.idle(FEW);
    let (few, few_go) = (setup.edge.settled_rss_kb(LIMIT), setup.go_heap_bytes());
    clients.extend(setup.idle(MANY - FEW));
    let (many, many_go) = (setup.edge.settled_rss_kb(LIMIT), setup.go_heap_bytes());
    let each = |bytes: u64| bytes / (MANY - FEW) as u64;
    format!("{} bytes each, {} of them in Go's heap", each((many - few) * 1024), each(many_go - few_go))
}

/// 512 MB for the edge and what the kernel keeps for it, 10,000 idle connections, 100 stalled ones and 50
/// messages at once.
fn small_box(mib: Option<u32>) -> String {
    const IDLE: usize = 9_800; // what the descriptors of one process allow
    const MESSAGES: usize = 50;
    const MESSAGE_BYTES: usize = 25 << 20;
    let group = Group::create(512 * MIB);
    let procs = group.0.join("cgroup.procs").display().to_string();
    let (setup, _mailbox) = start(mib, &["sh", "-c", &format!("echo $$ > {procs}; exec \"$@\""), "sh"]);
    let _idle = setup.idle(IDLE);
    let _stalled = setup.stall(STALLED / 2);
    let began = Instant::now();
    let messages: Vec<_> = (0..MESSAGES)
        .map(|seed| {
            let client = setup.connect("hashes");
            spawn(move || arrives(client, seed, MESSAGE_BYTES))
        })
        .collect();
    let arrived =
        messages.into_iter().filter_map(|message| message.join().ok()).filter(|arrived| *arrived).count();
    let took = began.elapsed().as_secs_f64();
    if !setup.edge.is_running() {
        return format!("killed: more than {} MB", group.peak_bytes() / MIB);
    }
    format!(
        "{} MB resident at most, {} MB in its group; {arrived} of {MESSAGES} messages arrived in {took:.0} s",
        setup.edge.peak_rss_kb() / 1024,
        group.peak_bytes() / MIB,
    )
}

// What they are made of.

/// The release as it is published, if `make release` has made it; else what cargo has built.
fn program() -> PathBuf {
    let release = common::repo_root().join("dist/tailwart-edge");
    if release.exists() { release } else { env!("CARGO_BIN_EXE_tailwart-edge").into() }
}

/// Sends a message of its own, and looks whether the mailbox has got the same.
fn arrives(mut client: TcpStream, seed: usize, size: usize) -> bool {
    let mut hash = Context::new(&SHA256);
    let mut part = vec![0_u8; 64 << 10];
    for number in 0..size / part.len() {
        part.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 31 + number * 7 + seed) as u8);
        hash.update(&part);
        if client.write_all(&part).is_err() {
            return false;
        }
    }
    let _ = client.shutdown(Shutdown::Write);
    let mut answer = [0; SHA256_OUTPUT_LEN];
    client.read_exact(&mut answer).is_ok() && answer == hash.finish().as_ref()
}

fn this_program() -> String {
    let path = std::env::current_exe().expect("/proc is mounted");
    path.into_os_string().into_string().expect("cargo's paths are text")
}

fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("anybody may");
}

/// Has this program be a mailbox.
const MAILBOX_ARGUMENT: &str = "mailbox";

/// A mailbox in a process of its own, for its descriptors.
struct Mailbox {
    process: Child,
    addresses: Vec<SocketAddr>,
}

impl Mailbox {
    /// By running this program.
    fn start(program: &mut Command) -> Mailbox {
        let mut process = program.arg(MAILBOX_ARGUMENT).stdout(Stdio::piped()).spawn().expect("it can run");
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let addresses = lines.take(PORTS.len()).map(|line| line.unwrap().parse().unwrap()).collect();
        Mailbox { process, addresses }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A control group with a limit on memory, of either version; removed on drop.
struct Group(PathBuf);

impl Group {
    fn create(bytes: u64) -> Group {
        let first = Path::new("/sys/fs/cgroup/memory");
        let (root, file) = if first.exists() {
            (first, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let group = Group(root.join(format!("tailwart-bench-{}", std::process::id())));
        fs::create_dir(&group.0).expect("root may make a control group");
        fs::write(group.0.join(file), bytes.to_string()).expect("and limit it");
        group
    }

    fn peak_bytes(&self) -> u64 {
        let read = |file| fs::read_to_string(self.0.join(file)).ok()?.trim().parse().ok();
        read("memory.max_usage_in_bytes").or_else(|| read("memory.peak")).unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
