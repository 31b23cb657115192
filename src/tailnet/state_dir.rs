//! The state directory: private, writable and locked. Whoever can read it can act as this node, and two instances
//! with one identity push each other off the tailnet.
//!
//! Deliberately not here: Tailscale's files in that directory.

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why the state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// It does not exist, and cannot be created.
    #[error("cannot create the state directory {}: {error}; create it for the user that runs the edge, or set state_dir", .path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// The lock file could not be opened for writing.
    #[error("cannot write to the state directory {}: {error}; give it to the user that runs the edge, or set state_dir", .path.display())]
    Write {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// Users other than the one that runs the edge can read it.
    #[error("the state directory {} {problem}, and whoever can read it can take this node's place on the tailnet; run chmod 700 and chown on it, or set state_dir to a new directory, which the edge makes private", .path.display())]
    Exposed {
        /// The directory.
        path: PathBuf,
        /// Whose it is, or its mode.
        problem: String,
    },
    /// Another process holds the lock.
    #[error("the state directory {} is in use by another tailwart-edge; stop it, or give this one a state_dir of its own", .path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
}

/// The directory, locked for this process until dropped.
#[derive(Debug)]
pub struct StateDir {
    _lock: File,
}

/// Makes the directory (mode 0700) if need be and locks it. An existing directory that is not private is refused
/// and not made private: others may have read it already.
pub fn lock(path: &Path) -> Result<StateDir, StateDirError> {
    let named = || path.to_owned();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| StateDirError::Create { path: named(), error: in_the_way(error) })?;
    refuse_exposed(path)?;
    let file = open_lock(path).map_err(|error| StateDirError::Write { path: named(), error })?;
    match file.try_lock() {
        Ok(()) => Ok(StateDir { _lock: file }),
        Err(TryLockError::WouldBlock) => Err(StateDirError::InUse { path: named() }),
        Err(TryLockError::Error(error)) => Err(StateDirError::Write { path: named(), error }),
    }
}

/// The system's error when a directory cannot be made, with its meaning where the error is too short.
fn in_the_way(error: io::Error) -> io::Error {
    let meaning = match error.kind() {
        io::ErrorKind::AlreadyExists => "a file is in its place, or a symlink that leads nowhere",
        io::ErrorKind::NotADirectory => "a file is in the place of a directory above it",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{meaning} ({error})"))
}

/// Opens the lock file, and only if it is a regular file: through a symlink another file would be created or
/// locked, and opening a pipe would wait for a reader.
fn open_lock(dir: &Path) -> io::Result<File> {
    let path = dir.join("edge.lock");
    let irregular = || io::Error::other("edge.lock is not a regular file (remove it)");
    let opened = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600) // or any user could hold the lock
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&path);
    let file = opened.map_err(|error| match path.symlink_metadata() {
        // The system's errors do not help here: "Too many levels", "No such device or address".
        Ok(metadata) if !metadata.is_file() => irregular(),
        _ => error,
    })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(irregular()) }
}

fn refuse_exposed(path: &Path) -> Result<(), StateDirError> {
    let named = || path.to_owned();
    let metadata = path.metadata().map_err(|error| StateDirError::Write { path: named(), error })?;
    let (owner, we) = (metadata.uid(), rustix::process::geteuid().as_raw());
    let mode = metadata.mode() & 0o777;
    let problem = if mode & 0o077 != 0 {
        format!("is open to other users (mode {mode:04o})")
    } else if owner != we {
        format!("belongs to the user {owner}, and the edge runs as {we}")
    } else {
        return Ok(());
    };
    Err(StateDirError::Exposed { path: named(), problem })
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    fn private_dir() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    #[test]
    fn it_is_made_private() {
        let dir = private_dir();
        let path = dir.path().join("a/b");
        let _locked = lock(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_second_lock_is_refused_until_the_first_is_dropped() {
        let dir = private_dir();
        let first = lock(dir.path()).unwrap();
        let error = lock(dir.path()).unwrap_err().to_string();
        assert!(error.contains("in use by another tailwart-edge"), "{error}");
        drop(first);
        lock(dir.path()).unwrap();
    }

    #[test]
    fn one_that_others_can_read_is_refused() {
        let dir = private_dir();
        for mode in [0o755, 0o750, 0o701, 0o1777] {
            std::fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            let error = lock(dir.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("(mode {:04o})", mode & 0o777)), "{error}");
        }
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        lock(dir.path()).unwrap();
    }

    #[test]
    fn what_is_in_its_place_is_named() {
        let dir = private_dir();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "").unwrap();
        symlink(dir.path().join("nowhere"), &link).unwrap();
        for (path, meaning) in [
            (file.clone(), "a file is in its place, or a symlink that leads nowhere (File exists"),
            (link, "a file is in its place, or a symlink that leads nowhere (File exists"),
            (file.join("below"), "a file is in the place of a directory above it (Not a directory"),
        ] {
            let error = lock(&path).unwrap_err().to_string();
            let expected = format!("cannot create the state directory {}: {meaning}", path.display());
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    #[test]
    fn only_a_regular_file_is_locked() {
        let dir = private_dir();
        let (path, target) = (dir.path().join("edge.lock"), dir.path().join("target"));
        let refused = || {
            let (dir, (tell, told)) = (dir.path().to_owned(), mpsc::channel());
            std::thread::spawn(move || tell.send(lock(&dir).unwrap_err().to_string()));
            let error = told.recv_timeout(Duration::from_secs(10)).expect("no waiting");
            assert!(error.contains(": edge.lock is not a regular file (remove it); "), "{error}");
            assert!(error.starts_with("cannot write to the state directory "), "{error}");
        };
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        refused();
        // With a reader, opening it for writing succeeds.
        let reader = File::options().read(true).write(true).open(&path).unwrap();
        refused();
        drop(reader);
        std::fs::remove_file(&path).unwrap();
        symlink(&target, &path).unwrap();
        refused();
        assert!(!target.exists(), "the symlink was followed");
        std::fs::write(&target, "").unwrap();
        refused();
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        refused();
        std::fs::remove_dir(&path).unwrap();
        lock(dir.path()).unwrap();
    }
}
