//! What a child process says, kept for assertions and for the panic message when something goes
//! wrong.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::wait::wait_for;

const TAIL_LINES: usize = 30;

/// The log of one server: a file which it writes, or what was read from its output so far. Cheap to
/// clone.
#[derive(Clone)]
pub struct Log {
    name: String,
    source: Source,
}

#[derive(Clone)]
enum Source {
    File(PathBuf),
    Memory(Arc<Mutex<Vec<u8>>>),
}

impl Log {
    /// A log which the server itself writes to a file; it need not exist yet.
    pub fn file(name: &str, path: &Path) -> Log {
        Log { name: name.to_owned(), source: Source::File(path.to_owned()) }
    }

    /// An empty log in memory, filled by [`Log::collect`].
    pub fn memory(name: &str) -> Log {
        Log { name: name.to_owned(), source: Source::Memory(Arc::default()) }
    }

    /// Reads to the end of a pipe on a thread of its own, so that the writer never blocks on a full
    /// pipe.
    pub fn collect(&self, mut pipe: impl Read + Send + 'static) -> JoinHandle<()> {
        let Source::Memory(buffer) = &self.source else { panic!("{}: the log is a file", self.name) };
        let buffer = Arc::clone(buffer);
        std::thread::spawn(move || {
            let mut chunk = [0; 8192];
            while let Ok(count @ 1..) = pipe.read(&mut chunk) {
                buffer.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&chunk[..count]);
            }
        })
    }

    /// The file of a log which the server itself writes.
    pub fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::File(path) => Some(path),
            Source::Memory(_) => None,
        }
    }

    /// Everything logged so far; what is not UTF-8 (a client's garbage, quoted) is replaced.
    pub fn text(&self) -> String {
        let bytes = match &self.source {
            Source::File(path) => std::fs::read(path).unwrap_or_default(),
            Source::Memory(buffer) => buffer.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The complete lines so far: the last piece of the text may be a line that is still being written.
    pub fn lines(&self) -> Vec<String> {
        let text = self.text();
        let complete = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        complete.lines().map(str::to_owned).collect()
    }

    /// The last lines, for panic messages.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        let start = lines.len().saturating_sub(TAIL_LINES);
        format!("--- last lines of the log of {} ---\n{}\n---", self.name, lines[start..].join("\n"))
    }

    /// How many lines hold `needle`.
    pub fn count(&self, needle: &str) -> usize {
        self.text().lines().filter(|line| line.contains(needle)).count()
    }

    /// The first line holding `needle`; panics with the log's tail when none came before the
    /// deadline.
    #[track_caller]
    pub fn wait(&self, needle: &str, deadline: Duration) -> String {
        self.wait_line(&format!("a line with {needle:?}"), deadline, |line| line.contains(needle))
    }

    /// The first complete line for which `wanted` holds; `what` names it in the panic message.
    #[track_caller]
    pub fn wait_line(&self, what: &str, deadline: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let found = wait_for(deadline, || self.lines().into_iter().find(|line| wanted(line)));
        match found {
            Some(line) => line,
            None => panic!("{} did not log {what} within {deadline:?}\n{}", self.name, self.tail()),
        }
    }
}
