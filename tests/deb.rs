//! The Debian package holds what an operator needs, where Debian has it, and starts from the
//! configuration that it installs.
//!
//! Not part of `cargo test`, which does not build it: run `make check-deb`.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::tools::{Finished, run};

const LIMIT: Duration = Duration::from_secs(120);

/// The file to test, by the name under which `make check-deb` passes it.
fn package() -> PathBuf {
    let path = std::env::var_os("TAILWART_DEB").map(PathBuf::from);
    path.filter(|path| path.is_file()).expect("run `make check-deb`: TAILWART_DEB names no file")
}

fn done(program: &str, arguments: &[&str]) -> Finished {
    run(Command::new(program).args(arguments), b"", LIMIT).expect_success()
}

/// The package's files below a new directory, and what its installation runs in `DEBIAN`.
fn unpacked() -> tempfile::TempDir {
    let dir = common::temp_dir("deb");
    let (package, root) = (package(), dir.path());
    run(Command::new("dpkg-deb").arg("-R").args([package.as_path(), root]), b"", LIMIT).expect_success();
    dir
}

fn mode(path: &Path) -> u32 {
    let metadata = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    metadata.permissions().mode() & 0o7777
}

#[test]
fn everything_is_where_debian_has_it() {
    let root = unpacked();
    for (file, wanted) in [
        ("usr/bin/tailwart-edge", 0o755),
        ("etc/tailwart-edge/config.toml", 0o644),
        ("usr/lib/systemd/system/tailwart-edge.service", 0o644),
        ("usr/lib/systemd/system/tailwart-edge-smtp.socket", 0o644),
        ("usr/share/man/man1/tailwart-edge.1.gz", 0o644),
        ("usr/share/man/man1/tailwart-edge-run.1.gz", 0o644),
        ("usr/share/bash-completion/completions/tailwart-edge", 0o644),
        ("usr/share/fish/vendor_completions.d/tailwart-edge.fish", 0o644),
        ("usr/share/zsh/vendor-completions/_tailwart-edge", 0o644),
        ("usr/share/doc/tailwart-edge/copyright", 0o644),
        ("usr/share/doc/tailwart-edge/THIRD-PARTY-NOTICES.md", 0o644),
        ("usr/share/doc/tailwart-edge/examples/stalwart.toml", 0o644),
    ] {
        assert_eq!(mode(&root.path().join(file)), wanted, "{file}");
    }
    let conffiles = fs::read_to_string(root.path().join("DEBIAN/conffiles")).unwrap_or_default();
    assert_eq!(conffiles.trim(), "/etc/tailwart-edge/config.toml");
}

#[test]
fn the_installed_configuration_is_good_without_any_variable() {
    let root = unpacked();
    let mut check = Command::new(root.path().join("usr/bin/tailwart-edge"));
    check.arg("check").arg("--config").arg(root.path().join("etc/tailwart-edge/config.toml")).env_clear();
    let finished = run(&mut check, b"", LIMIT).expect_success();
    assert!(finished.stdout().contains("smtp: 0.0.0.0:25, [::]:25 -> stalwart:25"), "{finished:?}");
    assert_eq!(finished.stderr, "");
}

/// Nobody's mail ports are taken by an installation, an upgrade keeps what runs up to date, and a
/// purge leaves no identity behind.
#[test]
fn the_scripts_start_nothing_and_leave_nothing() {
    let root = unpacked();
    let script = |name: &str| fs::read_to_string(root.path().join("DEBIAN").join(name)).unwrap_or_default();
    let postinst = script("postinst");
    assert!(postinst.contains("deb-systemd-invoke try-restart tailwart-edge.service"), "{postinst}");
    assert!(!postinst.contains("invoke start") && !postinst.contains("_dh_action=start"), "{postinst}");
    assert!(script("prerm").contains("deb-systemd-invoke stop tailwart-edge.service"), "{}", script("prerm"));
    assert!(script("postrm").contains("rm -rf /var/lib/tailwart-edge"), "{}", script("postrm"));
    for name in ["postinst", "prerm", "postrm"] {
        done("sh", &["-n", &root.path().join("DEBIAN").join(name).display().to_string()]);
    }
}

/// Installs, upgrades, removes and purges the package in a copy of this machine's files, where systemd
/// seems to run: what is asked of it is written down, a step a line.
const LIFE: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
mount -t tmpfs tmpfs root/run
mkdir -p root/run/systemd/system root/asked
cp "$2" root/package.deb
printf '#!/bin/sh\necho "$*" >>/asked/all\n' >root/asked/systemctl
chmod +x root/asked/systemctl
rm -f root/usr/sbin/policy-rc.d
chroot root sh -ec '
    left() { find /etc/systemd /var/lib/systemd -name "tailwart-edge*"; }
    PATH=/asked:$PATH
    dpkg --install /package.deb
    /bin/systemctl --root=/ enable tailwart-edge-smtp.socket
    echo upgrade >>/asked/all
    dpkg --install /package.deb
    echo remove >>/asked/all
    dpkg --remove tailwart-edge
    dpkg --purge tailwart-edge
    echo left: $(left) >>/asked/all
' >&2
cat root/asked/all
"#;

/// Sockets are open before, during and after an upgrade; after a removal none is, and no client starts
/// what is being removed.
#[test]
fn the_sockets_outlive_an_upgrade_and_go_with_the_package() {
    let dir = common::temp_dir("life");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", LIFE, "sh"]).arg(dir.path()).arg(package());
    let asked = run(&mut command, b"", LIMIT).expect_success().stdout();
    let (before, removal) = asked.split_once("\nremove\n").unwrap_or_else(|| panic!("{asked}"));
    let (_, upgrade) = before.split_once("upgrade\n").unwrap_or_else(|| panic!("{asked}"));
    assert!(upgrade.contains("restart tailwart-edge.service") && !upgrade.contains(".socket"), "{upgrade}");
    let stop =
        |unit: &str| removal.find(&format!("stop {unit}")).unwrap_or_else(|| panic!("{unit}: {removal}"));
    let service = stop("tailwart-edge.service");
    for name in ["smtp", "submission", "submissions", "imaps", "sieve"] {
        assert!(stop(&format!("tailwart-edge-{name}.socket\n")) < service, "{removal}");
    }
    assert!(removal.ends_with("\nleft:\n"), "{removal}");
}

#[test]
fn lintian_has_nothing_to_say() {
    let package = package().display().to_string();
    let finished = done("lintian", &["--allow-root", "--fail-on", "error,warning", &package]);
    assert_eq!(finished.stdout(), "");
}

#[test]
fn the_man_pages_can_be_shown() {
    let root = unpacked();
    let pages: Vec<_> =
        fs::read_dir(root.path().join("usr/share/man/man1")).expect("it is there").flatten().collect();
    assert!(pages.len() >= 8, "{pages:?}");
    for page in pages {
        let page = page.path().display().to_string();
        done("gunzip", &[&page]);
        // Mistakes only; what is questionable style comes from the generator.
        done("mandoc", &["-T", "lint", "-W", "error", page.trim_end_matches(".gz")]);
    }
    let page = root.path().join("usr/share/man/man1/tailwart-edge.1");
    let page = fs::read_to_string(page).expect("it was unpacked");
    for section in ["ENVIRONMENT", "FILES", "EXIT CODES", "EXAMPLES"] {
        assert!(page.contains(&format!("\n.SH {section}\n")), "{section}\n{page}");
    }
}
