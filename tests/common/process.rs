//! Child processes that never outlive their test.
//!
//! Every daemon leads a process group of its own, so that stopping it takes its children along, and
//! so that nothing but what was started here is ever signalled: the leader stays unreaped until its
//! group has been killed, hence the group's id cannot have been given to anybody else in between.
//!
//! A group of its own also means that Ctrl-C does not reach the daemon, and a killed test runs no
//! destructor. So one watchdog shell holds a pipe from this process; when the pipe closes, for
//! whatever reason, it kills the groups and removes the temporary directories that are still there.
//! That also ends what lives in a `static`.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::log::Log;
use super::wait::eventually;

const STOP_LIMIT: Duration = Duration::from_secs(5);

/// A running server, killed with all its children on drop.
pub struct Daemon {
    name: String,
    child: Child,
    log: Log,
    readers: Vec<JoinHandle<()>>,
    stopped: Option<ExitStatus>,
}

impl Daemon {
    /// Starts a server without input; its output goes to the log in memory.
    pub fn spawn(name: &str, command: &mut Command) -> Daemon {
        let mut daemon = Daemon::launch(name, command.stdin(Stdio::null()));
        let output = daemon.child.stdout.take().expect("stdout is a pipe");
        daemon.readers.push(daemon.log.collect(output));
        daemon
    }

    /// Starts a program that is spoken to over its input and output; only its errors go to the log.
    pub fn spawn_piped(name: &str, command: &mut Command) -> (Daemon, ChildStdin, ChildStdout) {
        let mut daemon = Daemon::launch(name, command.stdin(Stdio::piped()));
        let input = daemon.child.stdin.take().expect("stdin is a pipe");
        let output = daemon.child.stdout.take().expect("stdout is a pipe");
        (daemon, input, output)
    }

    fn launch(name: &str, command: &mut Command) -> Daemon {
        let spawned = command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| {
            let program = command.get_program().display();
            panic!("{name}: cannot start {program}: {error}; is it installed (scripts/install-deps)?")
        });
        tell_watchdog(&format!("+ {}", child.id()));
        let log = Log::memory(name);
        let reader = log.collect(child.stderr.take().expect("stderr is a pipe"));
        Daemon { name: name.to_owned(), child, log, readers: vec![reader], stopped: None }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the process printed.
    pub fn output(&self) -> &Log {
        &self.log
    }

    /// Whether the process has ended by itself. It stays a zombie until stopped, so its id stays
    /// its own.
    pub fn has_exited(&self) -> bool {
        self.stopped.is_some() || matches!(stat(self.pid()), None | Some(Stat { state: 'Z', .. }))
    }

    /// Waits until `ready`; panics, with what was logged, when the process ends first or the
    /// deadline passes. `log` is a log which it writes beside its output.
    #[track_caller]
    pub fn wait_ready(&self, deadline: Duration, log: Option<&Log>, mut ready: impl FnMut() -> bool) {
        let _ = eventually(deadline, || ready() || self.has_exited());
        self.settle();
        if ready() {
            return;
        }
        let outcome = if self.has_exited() { "ended by itself" } else { "did not start" };
        let logged = log.map(Log::tail).unwrap_or_default();
        panic!("{} {outcome} within {deadline:?}\n{}\n{logged}", self.name, self.log.tail());
    }

    /// When the process has ended, waits for its last words to have been read.
    pub fn settle(&self) {
        if self.has_exited() {
            let _ = eventually(STOP_LIMIT, || self.readers.iter().all(JoinHandle::is_finished));
        }
    }

    pub fn signal(&self, name: &str) {
        if !self.has_exited() {
            send_signal(name, &self.pid().to_string());
        }
    }

    /// Has the process stand still, and waits until it does: a signal takes effect on a thread only when
    /// that comes to it.
    #[track_caller]
    pub fn pause(&self) {
        self.signal("STOP");
        let stands = eventually(STOP_LIMIT, || {
            let states = thread_states(self.pid());
            !states.is_empty() && states.iter().all(|state| *state == 'T')
        });
        assert!(stands, "{} goes on: its threads are in {:?}", self.name, thread_states(self.pid()));
    }

    /// Lets it go on after [`Daemon::pause`].
    pub fn resume(&self) {
        self.signal("CONT");
    }

    /// Waits for the process to end by itself, then kills what it left behind.
    pub fn wait_exit(&mut self, deadline: Duration) -> Option<ExitStatus> {
        if !eventually(deadline, || self.has_exited()) {
            return None;
        }
        Some(self.kill())
    }

    /// Kills the process and its children, and reaps it. Nothing is left to save in a test's
    /// servers, and some of them take seconds to end in order.
    ///
    /// The group is killed first, and only then its leader is reaped: see the module's second
    /// paragraph.
    pub fn kill(&mut self) -> ExitStatus {
        if let Some(status) = self.stopped {
            return status;
        }
        let group = self.pid();
        // Whoever has left the group, as what `script` runs on a terminal of its own, is found only as long
        // as its parents live.
        let strays: Vec<u32> = descendants(group)
            .into_iter()
            .filter(|pid| stat(*pid).is_some_and(|it| it.group != group))
            .collect();
        send_signal("KILL", &format!("-{group}"));
        strays.iter().for_each(|pid| send_signal("KILL", &pid.to_string()));
        tell_watchdog(&format!("- {group}"));
        let status = self.child.wait().expect("the child was not reaped before");
        self.stopped = Some(status);
        // The children end in a moment, and the log is complete once both pipes have been read to
        // their end.
        let _ = eventually(STOP_LIMIT, || {
            group_members(group).is_empty() && self.readers.iter().all(JoinHandle::is_finished)
        });
        status
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The ids of all processes of a group, without those that are dead and only wait for init to
/// notice.
pub fn group_members(group: u32) -> Vec<u32> {
    let is_member = |stat: Stat| stat.group == group && stat.state != 'Z';
    numbers_in(Path::new("/proc")).into_iter().filter(|&pid| stat(pid).is_some_and(is_member)).collect()
}

/// The ids of all that a process has started and that live, directly or not.
pub fn descendants(ancestor: u32) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        // Each thread has children of its own.
        let threads = Path::new("/proc").join(parent.to_string()).join("task");
        for thread in numbers_in(&threads) {
            let children = std::fs::read_to_string(threads.join(thread.to_string()).join("children"));
            let children = children.unwrap_or_default();
            let alive = children.split_whitespace().filter_map(|pid| pid.parse().ok());
            parents.extend(
                alive.filter(|&pid| stat(pid).is_some_and(|it| it.state != 'Z') && found.insert(pid)),
            );
        }
    }
    found
}

/// The entries of a directory that are numbers; none if it is not there.
fn numbers_in(dir: &Path) -> Vec<u32> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// What each thread of a process does, in the kernel's letters.
fn thread_states(pid: u32) -> Vec<char> {
    let threads = Path::new("/proc").join(pid.to_string()).join("task");
    let stat = |thread: u32| stat_in(&threads.join(thread.to_string()));
    numbers_in(&threads).into_iter().filter_map(stat).map(|stat| stat.state).collect()
}

struct Stat {
    state: char,
    group: u32,
}

/// State and process group of a process; none when there is no such process.
fn stat(pid: u32) -> Option<Stat> {
    stat_in(&Path::new("/proc").join(pid.to_string()))
}

/// The same of whatever has this directory under `/proc`.
fn stat_in(dir: &Path) -> Option<Stat> {
    let text = std::fs::read_to_string(dir.join("stat")).ok()?;
    // The name, in parentheses, may hold anything; then: state, parent, process group.
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some(Stat { state, group: fields.nth(1)?.parse().ok()? })
}

/// The shell's own `kill`: std sends no signal but SIGKILL, and this crate has no unsafe code.
fn send_signal(name: &str, target: &str) {
    // A target that has just ended is no mistake.
    let _ = Command::new("sh")
        .args(["-c", "kill -s \"$0\" -- \"$1\" 2>/dev/null", name, target])
        .status()
        .expect("there is a shell");
}

/// Removes a directory when this process has ended, should it still be there.
pub fn remove_at_end(dir: &Path) {
    tell_watchdog(&format!("dir {}", dir.display()));
}

/// Deletes a network namespace, and the interface of the same name, when this process has ended.
pub fn delete_namespace_at_end(name: &str) {
    tell_watchdog(&format!("netns {name}"));
}

const WATCHDOG: &str = r#"
groups=' '
namespaces=
while read -r change value; do
    case $change in
    +) groups="$groups$value " ;;
    -) groups="${groups%% $value *} ${groups#* $value }" ;;
    dir) set -- "$@" "$value" ;;
    netns) namespaces="$namespaces $value" ;;
    esac
done
for group in $groups; do kill -s KILL -- "-$group"; done
for name in $namespaces; do
    [ -e "/run/netns/$name" ] || continue
    ip link del "$name"
    ip netns del "$name"
    rm -rf -- "/etc/netns/$name"
done
[ $# = 0 ] || rm -rf -- "$@"
"#;

fn tell_watchdog(line: &str) {
    static PIPE: OnceLock<Mutex<ChildStdin>> = OnceLock::new();
    let pipe = PIPE.get_or_init(|| {
        // No output is inherited: it would keep the pipe of `cargo test | tee` open.
        let child = Command::new("sh")
            .args(["-c", WATCHDOG])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Mutex::new(child.expect("there is a shell").stdin.expect("stdin is a pipe"))
    });
    let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
    writeln!(pipe, "{line}").expect("the watchdog lives as long as this process");
}
