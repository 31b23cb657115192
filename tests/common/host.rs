//! What all servers of the tests need from the machine: the checkout, directories, root.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::remove_at_end;

/// How long a server may take to start. They need well under two seconds; a busy machine gets the
/// rest.
pub const START_LIMIT: Duration = Duration::from_secs(20);

/// The checkout this was compiled from, also for the demo, whose package is further down in it.
pub fn repo_root() -> PathBuf {
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    above.find(|dir| dir.join("Cargo.lock").exists()).expect("the lock file is at its root").to_path_buf()
}

/// A temporary directory which other users may enter: mail servers drop root before they open their
/// files.
pub fn temp_dir(purpose: &str) -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix(&format!("tailwart-{purpose}-"))
        .tempdir()
        .expect("a temporary directory can be made");
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("its mode can be set");
    remove_at_end(dir.path());
    dir
}

/// The same that nobody else can look into, as a state directory has to be.
pub fn private_dir(purpose: &str) -> tempfile::TempDir {
    let dir = temp_dir(purpose);
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).expect("its mode can be set");
    dir
}

/// Panics unless this process is root: mail servers switch users. Such a test must not pass by
/// being skipped.
pub fn require_root(what: &str) {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().nth(1));
    assert!(effective == Some("0"), "{what} needs root (it switches users): run it as root");
}
