//! Reads the file, or says in one sentence why not.
//!
//! Invariants
//! - However large the file is, at most 64 KiB of it are kept in memory.
//! - Reading a file that is not a regular file has a deadline. Pipes are allowed, since `--config <(...)` and
//!   `/dev/stdin` are pipes; the deadline is for a pipe that nobody writes to. (There is no deadline here for a
//!   file system that hangs; a reload has one, see `reload.rs`.)
//!
//! Deliberately not here: anything about the text.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::mistakes::At;

/// The largest file that is read. Five hundred listeners fit; a larger file is surely not a configuration.
const MAX_BYTES: u64 = 64 * 1024;

/// How long a file that is not a regular file may take to its end: a program that decrypts the configuration may
/// have to ask somebody for a passphrase.
const PIPE_LIMIT: Duration = Duration::from_secs(60);

/// The text of the file, or what is wrong with it and where.
pub(super) fn read(path: &Path) -> Result<String, (At, String)> {
    let bytes = read_bytes(path, PIPE_LIMIT).map_err(|problem| (At::File, problem))?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count();
        let byte = error.as_bytes()[offset];
        (At::Line(line), format!("not UTF-8: byte 0x{byte:02X} at offset {offset}; save the file as UTF-8"))
    })
}

fn read_bytes(path: &Path, limit: Duration) -> Result<Vec<u8>, String> {
    // O_NONBLOCK: otherwise, opening a pipe would wait for a writer. For a regular file the flag has no effect,
    // unless another program holds a lease on the file; then opening fails.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = opened.map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            "no such file; check --config or TAILWART_CONFIG, or leave both out".to_owned()
        }
        _ => format!("cannot open the file: {error}"),
    })?;
    let metadata = file.metadata().map_err(|error| format!("cannot examine the file: {error}"))?;
    if metadata.is_dir() {
        return Err("is a directory; expected a TOML file".to_owned());
    }
    if metadata.len() > MAX_BYTES {
        return Err(format!("has {} bytes; expected at most {MAX_BYTES} (64 KiB)", metadata.len()));
    }
    // The length of a pipe or a device is not known beforehand, so reading is bounded as well.
    let mut bytes = Vec::new();
    let patient = SlowFile { file: &file, until: Instant::now() + limit };
    patient.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| match error.kind() {
        ErrorKind::TimedOut => format!(
            "is not a regular file, and did not end within {limit:?}; \
             check what writes to it, or name a regular file"
        ),
        _ => format!("cannot read the file: {error}"),
    })?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("has more than {MAX_BYTES} bytes; expected at most 64 KiB"));
    }
    Ok(bytes)
}

/// A file that may be a pipe; reading waits for its data until `until`.
struct SlowFile<'a> {
    file: &'a File,
    until: Instant,
}

impl Read for SlowFile<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            // Without this wait, a pipe that has no writer yet would look like an empty file.
            let left = self.until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(self.file, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Err(ErrorKind::TimedOut.into()),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            match self.file.read(bytes) {
                // Another reader of the pipe was faster.
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.until > Instant::now() => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                read => return read,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    fn pipe() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        (dir, path)
    }

    #[test]
    fn a_pipe_is_read_to_its_end_whoever_comes_first() {
        let (_dir, path) = pipe();
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| read(&path).map_err(|(_, problem)| problem));
            // It opens once there is a reader.
            let mut writer = File::options().write(true).open(&path).unwrap();
            writer.write_all(b"[log]\n").unwrap();
            writer.write_all(b"level = 'info'\n").unwrap();
            drop(writer);
            assert_eq!(reading.join().unwrap().as_deref(), Ok("[log]\nlevel = 'info'\n"));
        });
    }

    #[test]
    fn a_pipe_that_nobody_writes_to_is_given_up() {
        let (_dir, path) = pipe();
        let began = Instant::now();
        let limit = Duration::from_millis(50);
        let problem = read_bytes(&path, limit).unwrap_err();
        assert!(problem.contains("is not a regular file") && problem.contains("within 50ms"), "{problem}");
        assert!(began.elapsed() >= limit && began.elapsed() < limit * 100, "{:?}", began.elapsed());
    }
}
