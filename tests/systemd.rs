//! The systemd units under systemd itself: its manager as process 1 of namespaces of its own, the
//! packaged units and configuration in a copy of this machine's files that is gone afterwards, and
//! the program in the whole sandbox, on the test tailnet.
//!
//! Needs root and a systemd that is installed, but not one that runs.

mod common;

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use common::net::hears_itself;
use common::netns::Namespace;
use common::process::Daemon;
use common::stub::{Conn, Stub};
use common::tailnet::{Options, TestTailnet};
use common::tools::{Finished, run};
use common::wait::eventually;

const LIMIT: Duration = Duration::from_secs(40);

const SERVICE: &str = "tailwart-edge.service";

/// What the unit lacks for the test: a log that can be read from outside. It does without the units
/// that set up a machine at its start.
const DROP_IN: &str = "[Unit]\nDefaultDependencies=no\n[Service]\nStandardError=append:/mnt/log\n";

/// Boots systemd in a copy of the root directory. The first argument is a directory that both sides
/// see, as /mnt inside; what is in its `root` is laid over the copy.
const BOOT: &str = r#"
set -e
share=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$share/base"
cd "$share/base"
mkdir upper work root
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
cd root
cp -r "$share/root/." .
chmod 755 usr/bin/tailwart-edge
rm -rf var/lib/tailwart-edge var/lib/private
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/pts dev/shm old
mount -t devpts devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs tmpfs dev/shm
mount --bind "$share" mnt
cp --remove-destination /etc/resolv.conf etc/resolv.conf
: > etc/machine-id
ln -sf /dev/null etc/systemd/system/network-online.target
pivot_root . old
umount -l old
mount --make-rshared /
exec env -i container=test /lib/systemd/systemd --unit=tailwart-edge.service --show-status=no --log-target=null
"#;

/// A machine whose process 1 is systemd. Killed on drop, with everything in it.
struct Machine {
    systemd: Daemon,
    share: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Machine {
    fn boot(host: &Namespace, files: &[(&str, &[u8])]) -> Machine {
        let share = common::temp_dir("systemd");
        fs::create_dir(share.path().join("base")).expect("a directory can be made");
        for (path, content) in files {
            let path = share.path().join("root").join(path);
            fs::create_dir_all(path.parent().expect("a file has a directory")).expect("it can be made");
            fs::write(&path, content).expect("a file can be written");
        }
        let cgroup = new_cgroup();
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.display());
        let mut command = Command::new("sh");
        // Before `ip netns exec`, which mounts a /sys without control groups.
        command.args(["-c", &enter, "sh"]).args(host.wrapper());
        command.args(["unshare", "--fork", "--kill-child"]);
        command.args(["--pid", "--mount", "--cgroup", "--ipc", "--uts", "sh", "-c", BOOT, "sh"]);
        let systemd = Daemon::spawn("systemd", command.arg(share.path()));
        Machine { systemd, share, cgroup }
    }

    /// The program in the machine's namespaces.
    fn run(&self, program: &[&str]) -> Finished {
        let pid = self.systemd.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let child = children.split_whitespace().next().expect("systemd runs");
        let mut command = Command::new("nsenter");
        run(command.args(["--all", "--target", child]).args(program), b"", LIMIT)
    }

    /// A property of the service, as `systemctl show` has it.
    fn property(&self, name: &str) -> String {
        let shown = self.run(&["systemctl", "show", "--value", "--property", name, SERVICE]);
        shown.stdout().trim().to_owned()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.share.path().join("log")).unwrap_or_default()
    }

    /// Waits until the edge has said once more that it is ready.
    #[track_caller]
    fn wait_ready(&self, times: usize) {
        let ready = || self.log().matches(" ready name=").count() >= times;
        let settled = eventually(LIMIT, || ready() || self.systemd.has_exited());
        if !(settled && ready()) {
            let status = self.run(&["systemctl", "status", "--no-pager", SERVICE]);
            panic!("not ready\n{}\n{}\n{}", self.log(), status.stdout(), self.systemd.output().tail());
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.systemd.kill();
        // Its processes are gone a moment after their process 1.
        let _ = eventually(LIMIT, || {
            let mut find = Command::new("find");
            find.arg(&self.cgroup).args(["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"]);
            run(&mut find, b"", LIMIT);
            !self.cgroup.exists()
        });
    }
}

/// A control group for the machine, where this one has its unified hierarchy.
fn new_cgroup() -> PathBuf {
    let places = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
    let place = places.into_iter().find(|place| place.join("cgroup.procs").exists());
    let cgroup = place.expect("cgroup2 is mounted").join(format!("tailwart-{}", std::process::id()));
    fs::create_dir(&cgroup).expect("root can make a control group");
    cgroup
}

fn repository(file: &str) -> Vec<u8> {
    fs::read(common::repo_root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

const GREETING: &[u8] = b"220 mail.example.test ready\r\n";

/// A mail server as far as a probe of port 25 goes, which says what it hears.
fn greet_and_echo(mut conn: Conn) {
    if conn.read_proxy_header().is_none() {
        return;
    }
    conn.send(GREETING);
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = conn.read(&mut chunk) {
        if &chunk[..count] == b"QUIT\r\n" {
            return conn.send(b"221 Bye\r\n");
        }
        conn.send(&chunk[..count]);
    }
}

/// A connection to a port of the machine that greets and says what it hears.
fn is_served(host: &Namespace, port: u16) {
    let addr = SocketAddr::new(host.inside.into(), port);
    let mut client = TcpStream::connect(addr).unwrap_or_else(|error| panic!("{addr}: {error}"));
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    let mut greeting = [0; GREETING.len()];
    client.read_exact(&mut greeting).unwrap_or_else(|error| panic!("{addr}: no greeting: {error}"));
    assert_eq!(greeting, GREETING, "{addr}");
    hears_itself(&mut client);
}

/// Its figures hold the time of its start, although the sandbox hides the machine's.
fn tells_its_start(machine: &Machine) {
    let pid = machine.property("MainPID");
    let hidden = [
        "nsenter",
        "--mount",
        "--target",
        &pid,
        "test",
        "-e",
        "/proc/self/stat",
        "-a",
        "!",
        "-e",
        "/proc/stat",
    ];
    machine.run(&hidden).expect_success();
    let metrics = machine.run(&["curl", "-qsf", "http://127.0.0.1:9464/metrics"]).expect_success().stdout();
    let value = metrics.lines().find_map(|line| line.strip_prefix("process_start_time_seconds "));
    let start: f64 = value.unwrap_or_else(|| panic!("{metrics}")).parse().expect("a number");
    let now = UNIX_EPOCH.elapsed().expect("it is later").as_secs_f64();
    // All of the test up to here, within its deadlines.
    assert!((now - 5.0 * LIMIT.as_secs_f64()..=now + 1.0).contains(&start), "{start}, and now it is {now}");
}

#[test]
fn the_packaged_service_serves_in_its_sandbox() {
    let stub = Stub::start(greet_and_echo);
    let host = Namespace::create();
    let tailnet = TestTailnet::start_with(&Options { host: Some(host.outside.into()), ..Options::default() });
    tailnet.add_node("stalwart", &["tag:stalwart"], &[25, 465, 587, 993, 4190].map(|port| (port, stub.addr)));

    let variables = format!("TS_CONTROL_URL={}\n", tailnet.control_url());
    let machine = Machine::boot(
        &host,
        &[
            ("usr/bin/tailwart-edge", &fs::read(env!("CARGO_BIN_EXE_tailwart-edge")).expect("it is built")),
            ("etc/tailwart-edge/config.toml", &repository("packaging/debian/config.toml")),
            ("etc/default/tailwart-edge", variables.as_bytes()),
            ("etc/credstore/ts_authkey", b"tskey-auth-test\n"),
            (
                "etc/systemd/system/tailwart-edge.service",
                &repository("packaging/systemd/tailwart-edge.service"),
            ),
            ("etc/systemd/system/tailwart-edge.service.d/test.conf", DROP_IN.as_bytes()),
        ],
    );
    machine.wait_ready(1);
    for port in [25, 465, 587, 993, 4190] {
        is_served(&host, port);
    }

    let is_well = || machine.run(&["tailwart-edge", "healthcheck"]).succeeded();
    assert!(eventually(LIMIT, is_well), "{:?}", machine.run(&["tailwart-edge", "healthcheck"]));
    tells_its_start(&machine);

    assert!(eventually(LIMIT, || machine.property("ActiveState") == "active"), "systemd was not told");
    let status = || machine.property("StatusText");
    assert!(eventually(LIMIT, || status().contains("listeners: 5")), "status: {:?}", status());

    // A reload is refused when the new configuration is wrong, and then changes nothing.
    let config = "/etc/tailwart-edge/config.toml";
    machine
        .run(&["sh", "-c", &format!("cp {config} /tmp/good && echo '[upstream' > {config}")])
        .expect_success();
    assert!(!machine.run(&["systemctl", "reload", SERVICE]).succeeded(), "a wrong configuration was taken");
    is_served(&host, 25);
    machine.run(&["cp", "/tmp/good", config]).expect_success();
    machine.run(&["systemctl", "reload", SERVICE]).expect_success();
    assert!(eventually(LIMIT, || machine.log().contains("reloaded")), "{}", machine.log());

    // Enrolled, it needs no key, and LoadCredential= does not insist on one.
    machine.run(&["rm", "/etc/credstore/ts_authkey"]).expect_success();
    machine.run(&["systemctl", "restart", "--no-block", SERVICE]).expect_success();
    machine.wait_ready(2);
    is_served(&host, 25);

    // A configuration that is wrong is not tried again and again.
    machine.run(&["sh", "-c", "echo '[upstream' > /etc/tailwart-edge/config.toml"]).expect_success();
    machine.run(&["systemctl", "restart", "--no-block", SERVICE]).expect_success();
    assert!(eventually(LIMIT, || machine.property("ActiveState") == "failed"), "{}", machine.log());
    let health = machine.run(&["tailwart-edge", "healthcheck", "--live", "--admin", "127.0.0.1:9464"]);
    assert_eq!(health.status.and_then(|status| status.code()), Some(1), "{health:?}");
    assert_eq!((machine.property("ExecMainStatus"), machine.property("NRestarts")), ("2".into(), "0".into()));
}
