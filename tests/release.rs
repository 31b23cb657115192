//! The release build is one static file that needs nothing else on the machine: shown by running it
//! where nothing else is, in what the Dockerfile's COPY lines make, as its user.
//!
//! Not part of `cargo test`, which does not build it: run `make check-release`, which also checks
//! its size.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::edge::{Edge, Listener};
use common::memory;
use common::net::{client_from, free_addr};
use common::process::Daemon;
use common::stub::{self, MIB, Stub};
use common::tailnet::TestTailnet;
use common::tools::run;

const LIMIT: Duration = Duration::from_secs(30);

/// How long streams go on whose memory is looked at.
const STREAMING: Duration = Duration::from_secs(5);
const STREAMS: usize = 16;

/// The file to test, by the name under which `make check-release` passes it.
fn release_binary() -> PathBuf {
    let path = std::env::var_os("TAILWART_RELEASE_BINARY").map(PathBuf::from);
    path.filter(|path| path.is_file())
        .expect("run `make check-release`: TAILWART_RELEASE_BINARY names no file")
}

fn output(command: &mut Command) -> String {
    run(command, b"", LIMIT).expect_success().stdout()
}

fn readelf(what: &str) -> String {
    output(Command::new("readelf").args(["--wide", what]).arg(release_binary()))
}

#[test]
fn it_is_a_static_pie() {
    let header = readelf("--file-header");
    assert!(header.contains("DYN (Position-Independent Executable file)"), "{header}");
    let segments = readelf("--program-headers");
    assert!(!segments.contains("INTERP"), "it asks for a dynamic linker:\n{segments}");
    let dynamic = readelf("--dynamic");
    assert!(dynamic.contains("PIE") && !dynamic.contains("(NEEDED)"), "it asks for libraries:\n{dynamic}");
}

#[test]
fn it_is_stripped() {
    let sections = readelf("--section-headers");
    assert!(sections.contains(".text"), "{sections}");
    for kind in ["SYMTAB", ".debug_"] {
        assert!(!sections.contains(kind), "it holds {kind}:\n{sections}");
    }
}

#[test]
fn the_notices_name_everything_linked_in() {
    let notices = include_str!("../THIRD-PARTY-NOTICES.md");
    let words: Vec<&str> = notices.split(|c: char| c.is_whitespace() || c == '`').collect();
    let modules = output(Command::new("go").args(["version", "-m"]).arg(release_binary()));
    let modules = modules.lines().filter_map(|line| line.trim().strip_prefix("dep\t")?.split('\t').next());
    let crates =
        output(Command::new(env!("CARGO")).args(["tree", "--edges=normal,no-proc-macro", "--prefix=none"]));
    let crates =
        crates.lines().filter_map(|line| line.split(' ').next()).filter(|name| *name != "tailwart-edge");
    let linked: Vec<&str> = modules.chain(crates).collect();
    assert!(linked.contains(&"tailscale.com") && linked.contains(&"tokio"), "{linked:?}");
    for name in linked {
        assert!(words.contains(&name), "{name} is not in THIRD-PARTY-NOTICES.md");
    }
}

#[test]
fn it_relays_where_there_is_nothing_but_itself() {
    common::require_root("changing the root directory");
    let stub = Stub::start(stub::echo_after_header);
    let tailnet = TestTailnet::start();
    tailnet.add_node("stalwart", &["tag:stalwart"], &[(25, stub.addr)]);
    let listen = free_addr();
    let root = empty_root(&config(&tailnet, listen));

    let mut edge = Daemon::spawn("edge", &mut chrooted(root.path()));
    edge.wait_ready(LIMIT, None, || edge.output().text().contains(" ready name="));
    assert_eq!(names_in(root.path()), ["config.toml", "proc", "tailwart-edge", "var"]);
    assert_eq!(names_in(&edge_root(&edge)), ["config.toml", "proc", "tailwart-edge", "var"]);
    assert_eq!(names_in(&root.path().join("proc")), [""; 0], "/proc is mounted for the edge alone");
    let sent = stub::pattern(MIB);
    assert!(echo(listen, &sent) == sent, "what came back is not what was sent");

    edge.signal("TERM");
    let status =
        edge.wait_exit(LIMIT).unwrap_or_else(|| panic!("it does not stop\n{}", edge.output().tail()));
    assert_eq!(status.code(), Some(0), "{}", edge.output().tail());
}

/// The rows of the table in `docs/src/performance.md`, with room for a busy machine; `benches/memory.rs`
/// has the figures themselves.
#[test]
fn its_memory_is_bounded() {
    let mailbox = memory::serve();
    let start = || memory::Setup::start(TestTailnet::start(), &mailbox, Edge::builder(release_binary()));
    let at_most = |edge: &Edge, mb: u64, when: &str| {
        let peak = edge.peak_rss_kb() / 1024;
        assert!(peak <= mb, "{peak} MB {when}, at most {mb} are right");
    };
    let uploads = start();
    at_most(&uploads.edge, 38, "at rest");
    uploads.stream("swallows", STREAMS, Duration::ZERO, STREAMING);
    at_most(&uploads.edge, 128, "with uploads");
    drop(uploads);

    let downloads = start();
    downloads.stream("pours", STREAMS, Duration::ZERO, STREAMING);
    at_most(&downloads.edge, 80, "with downloads");
    drop(downloads);

    let stalls = start();
    let _open = stalls.stall(100);
    stalls.edge.settled_rss_kb(LIMIT);
    memory::greeted(stalls.connect("greets"));
    at_most(&stalls.edge, 200, "with connections that do not move");
    stalls.bytes_in_flight_are_bounded();
}

fn config(tailnet: &TestTailnet, listen: SocketAddr) -> String {
    let smtp = Listener::new("smtp", "smtp", 25).set("listen", &format!("[\"{listen}\"]"));
    let edge = Edge::builder("").control_url(tailnet.control_url()).upstream("stalwart");
    edge.state_dir(Path::new("/var/lib/tailwart-edge")).listener(smtp).config()
}

/// The image's last stage, as the Dockerfile has it.
fn image_stage() -> &'static str {
    let (_, stage) = include_str!("../Dockerfile").split_once("\nFROM scratch\n").expect("the last stage");
    stage
}

/// The image's user and group.
fn image_user() -> (&'static str, &'static str) {
    let user = image_stage().lines().find_map(|line| line.strip_prefix("USER ")).expect("USER is there");
    user.split_once(':').expect("USER names a group too")
}

/// What the image's COPY lines put together from what `make image-root` left, with a configuration,
/// and an empty directory to mount /proc on, without which Tailscale does not start.
fn empty_root(config: &str) -> tempfile::TempDir {
    let root = common::temp_dir("root");
    let mut copied = 0;
    for line in image_stage().lines().filter(|line| line.starts_with("COPY ")) {
        let words: Vec<&str> = line.split(' ').collect();
        let [options @ .., from, to] = &words[1..] else { panic!("{line}") };
        let from = from.strip_prefix("/src/").expect("it comes from the build stage's checkout");
        let to = root.path().join(to.trim_start_matches('/'));
        fs::create_dir_all(&to).expect("directories can be made");
        // `FROM/.` is the content of FROM, as it is for COPY.
        output(Command::new("cp").args(["--recursive", "--preserve=mode"]).arg(format!("{from}.")).arg(&to));
        for owner in options.iter().filter_map(|option| option.strip_prefix("--chown=")) {
            let below = fs::read_dir(&to).expect("it was copied").flatten().map(|entry| entry.path());
            output(Command::new("chown").args(["--recursive", owner]).args(below));
        }
        copied += 1;
    }
    assert_eq!(copied, 2, "the program and the place of its state");
    fs::write(root.path().join("config.toml"), config).expect("the configuration can be written");
    fs::create_dir(root.path().join("proc")).expect("directories can be made");
    root
}

/// The program with `root` as its root directory and as the image's user, in a mount namespace of
/// its own that ends with it.
fn chrooted(root: &Path) -> Command {
    let (user, group) = image_user();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--mount-proc=/proc", "--setuid", user, "--setgid", group]);
    command.arg(format!("--root={}", root.display()));
    command.args(["/tailwart-edge", "run", "--config", "/config.toml"]);
    command.env_clear().env("TS_AUTHKEY", "tskey-auth-test");
    command
}

/// The root directory as the running program sees it.
fn edge_root(edge: &Daemon) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root", edge.pid()))
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut names: Vec<String> =
        entries.flatten().map(|it| it.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Sends everything while it reads, ends its direction, and returns what came.
fn echo(server: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let stream = client_from("127.0.0.77", server);
    stream.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut answer = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = &stream;
            stream
                .write_all(bytes)
                .and_then(|()| stream.shutdown(Shutdown::Write))
                .expect("the edge takes it");
        });
        (&stream).read_to_end(&mut answer).expect("the edge ends in order");
    });
    answer
}
