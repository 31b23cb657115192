//! Network namespaces: a host of its own for the edge, with all ports free and one cable to us.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::process::{Daemon, delete_namespace_at_end};
use super::require_root;
use super::tailnet::go_program;
use super::tools::run;

const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// Addresses from 10.198.0.0/16, in pairs. They are private ones because of the control server: when
/// a plain http URL names a public address, Tailscale insists on port 443 of it for two minutes after
/// a connection that was cut (tailscale.com/control/ts2021/client.go, isPrivateHost).
const FIRST_ADDRESS: u32 = 0x0AC6_0000;
const PAIRS: u32 = 1 << 14;

/// The name server in the namespace's resolv.conf. It does not exist (RFC 5737): a query goes out
/// on the cable and is never answered.
const BLACK_HOLE_DNS: &str = "198.51.100.53";

/// A network namespace with a loopback and a veth pair to ours, over which everything goes by
/// default. Deleted on drop.
pub struct Namespace {
    name: String,
    /// Our end of the cable.
    pub outside: Ipv4Addr,
    /// The namespace's end.
    pub inside: Ipv4Addr,
    etc: PathBuf,
    _wire: Option<Daemon>,
}

impl Namespace {
    pub fn create() -> Namespace {
        Namespace::with_cable(|name| {
            ip(&format!("link add {name} type veth peer name {INTERFACE} netns {name}"));
            None
        })
    }

    /// As [`Namespace::create`], but so far away that a packet takes `delay` in each direction.
    pub fn far(delay: Duration) -> Namespace {
        Namespace::with_cable(|name| {
            let theirs = format!("{name}f");
            let mut wire = Command::new(go_program("wire"));
            let wire = Daemon::spawn("wire", wire.args([name, &theirs, &format!("{}us", delay.as_micros())]));
            wire.wait_ready(COMMAND_LIMIT, None, || wire.output().text().contains("ready"));
            ip(&format!("link set {theirs} netns {name} name {INTERFACE}"));
            for end in [format!("link set {name}"), format!("-n {name} link set {INTERFACE}")] {
                ip(&format!("{end} txqueuelen 20000")); // nothing is lost
            }
            Some(wire)
        })
    }

    /// `lay_cable` puts one between an interface here and the namespace, both of that name.
    fn with_cable(lay_cable: impl FnOnce(&str) -> Option<Daemon>) -> Namespace {
        require_root("a network namespace");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        // Interface names have at most 15 characters. Other processes of the same test program have
        // other numbers.
        let name = format!("tw{pid}x{count}");
        let pair = (pid.wrapping_mul(16) + count) % PAIRS;
        let address = |offset| Ipv4Addr::from_bits(FIRST_ADDRESS + 4 * pair + offset);
        let etc = Path::new("/etc/netns").join(&name);
        delete_namespace_at_end(&name);
        ip(&format!("netns add {name}"));
        let wire = lay_cable(&name);
        let namespace = Namespace { outside: address(1), inside: address(2), etc, name, _wire: wire };
        namespace.build();
        namespace
    }

    fn build(&self) {
        let Namespace { name, outside, inside, etc, .. } = self;
        // `ip netns exec` mounts what is in here over /etc.
        std::fs::create_dir_all(etc).expect("root can write in /etc");
        self.write_etc(
            "resolv.conf",
            &format!("nameserver {BLACK_HOLE_DNS}\noptions attempts:1 timeout:1\n"),
        );
        let (ours, theirs) = (self.outer_interface(), INTERFACE);
        // IPv6 too, so that nothing stays inside merely for want of a route.
        for command in [
            format!("addr add {outside}/30 dev {ours}"),
            format!("-6 addr add fd00:198:18::1/64 dev {ours} nodad"),
            format!("link set {ours} up"),
            format!("-n {name} link set lo up"),
            format!("-n {name} addr add {inside}/30 dev {theirs}"),
            format!("-n {name} -6 addr add fd00:198:18::2/64 dev {theirs} nodad"),
            format!("-n {name} link set {theirs} up"),
            format!("-n {name} route add default via {outside}"),
            format!("-n {name} -6 route add default via fd00:198:18::1"),
        ] {
            ip(&command);
        }
    }

    /// The name of our end of the cable.
    fn outer_interface(&self) -> &str {
        &self.name
    }

    /// What goes before a program's own arguments to run it inside.
    pub fn wrapper(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.name]
    }

    /// A program to run inside.
    pub fn command(&self, program: &str) -> Command {
        let [ip, arguments @ ..] = self.wrapper();
        let mut command = Command::new(ip);
        command.args(arguments).arg(program);
        command
    }

    /// Replaces a file of /etc for what is started inside from now on.
    pub fn write_etc(&self, file: &str, content: &str) {
        std::fs::write(self.etc.join(file), content).expect("root can write in /etc");
    }

    /// Gives the namespace's end another address in the place of the present one; our end has both
    /// and stays reachable at the old one.
    pub fn change_address(&self) {
        const AWAY: u32 = 1 << 16;
        let Namespace { name, inside, .. } = self;
        let away = |address: Ipv4Addr| Ipv4Addr::from_bits(address.to_bits() + AWAY);
        for command in [
            format!("addr add {}/30 dev {}", away(self.outside), self.outer_interface()),
            format!("-n {name} addr add {}/30 dev {INTERFACE}", away(*inside)),
            format!("-n {name} addr del {inside}/30 dev {INTERFACE}"),
            format!("-n {name} route replace default via {}", away(self.outside)),
        ] {
            ip(&command);
        }
    }

    /// Whether a word that is sent to this port, from inside, is heard again.
    pub fn hears_itself(&self, address: &str, port: u16) -> bool {
        let script = format!("exec 3<>/dev/tcp/{address}/{port} && echo hello >&3 && head -n 1 <&3");
        let finished = run(self.command("bash").args(["-c", &script]), b"", COMMAND_LIMIT);
        finished.stdout() == "hello\n"
    }

    /// Sets a kernel parameter of the namespace, such as `net.ipv4.ip_unprivileged_port_start`.
    pub fn sysctl(&self, name: &str, value: &str) {
        run(self.command("sysctl").arg("-qw").arg(format!("{name}={value}")), b"", COMMAND_LIMIT)
            .expect_success();
    }

    /// Prints every packet on the cable that the filter lets through, one line each, until dropped.
    pub fn capture(&self, filter: &str) -> Daemon {
        let mut command = self.command("tcpdump");
        // Unbuffered in the kernel and in the program; no names looked up; no change of user.
        command.args(["-i", INTERFACE, "--immediate-mode", "-l", "-nn", "-tt", "-Z", "root", filter]);
        let capture = Daemon::spawn("tcpdump", &mut command);
        capture.wait_ready(COMMAND_LIMIT, None, || capture.output().text().contains("listening on"));
        capture
    }
}

/// The namespace's end of the cable.
const INTERFACE: &str = "cable";

#[track_caller]
fn ip(arguments: &str) {
    run(Command::new("ip").args(arguments.split(' ')), b"", COMMAND_LIMIT).expect_success();
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The interface by itself, since a namespace lives on while a process is in it.
        let _ = run(Command::new("ip").args(["link", "del", self.outer_interface()]), b"", COMMAND_LIMIT);
        let _ = run(Command::new("ip").args(["netns", "del", &self.name]), b"", COMMAND_LIMIT);
        let _ = std::fs::remove_dir_all(&self.etc);
    }
}
