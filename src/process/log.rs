//! Which lines are logged, and where they go.
//!
//! They go to standard error: as text, in colour on a terminal, or as JSON. `RUST_LOG` decides which lines are
//! logged; if it is not set, the configuration decides.
//!
//! Invariants
//! - If the reader of the log hangs, mail goes on: a separate thread writes the lines. When too many wait, further
//!   lines are dropped and counted.
//! - Lines that are in the queue when the program ends are still written, within a second.
//! - A panic is logged like any other line. Rust's own handler writes to standard error itself, and would
//!   wait for a reader that hangs.
//!
//! Deliberately not here: how often a line may repeat itself (see `connection/ended.rs`).

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::IsTerminal;
use std::panic::PanicHookInfo;

use tracing::error;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config::{Log, LogFormat};
use crate::support::vital;

/// How many lines may wait. This is more than the usual limit on connections, since at a stop all quiet
/// connections end at once.
const QUEUE_LINES: usize = 32_768;

type Formatter = Box<dyn Layer<Registry> + Send + Sync>;
type Filtered = tracing_subscriber::layer::Layered<reload::Layer<Formatter, Registry>, Registry>;

/// The log of the process. Dropping it writes the lines that still wait.
pub struct Logging {
    formatter: reload::Handle<Formatter, Registry>,
    filter: reload::Handle<EnvFilter, Filtered>,
    writer: NonBlocking,
    /// Whether standard error is a terminal that wants colour.
    colour: bool,
    /// The content of `RUST_LOG`.
    directives: Option<String>,
    _worker: WorkerGuard,
}

/// Starts logging. May be called once in a process. `environment` is asked for `RUST_LOG` and `NO_COLOR`
/// (no-color.org).
pub fn start(settings: Log, environment: &dyn Fn(&str) -> Option<String>) -> Logging {
    let set = |name| environment(name).filter(|value| !value.is_empty());
    let (writer, worker) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUE_LINES)
        .thread_name("log")
        .finish(std::io::stderr());
    let colour = std::io::stderr().is_terminal() && set("NO_COLOR").is_none();
    let directives = set("RUST_LOG");
    let (format, formatter) = reload::Layer::new(format(settings, &writer, colour));
    let (choose, filter) = reload::Layer::new(choose(settings, directives.as_deref()));
    tracing_subscriber::registry().with(format).with(choose).init();
    std::panic::set_hook(Box::new(tell_panic));
    Logging { formatter, filter, writer, colour, directives, _worker: worker }
}

impl fmt::Debug for Logging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logging").field("directives", &self.directives).finish_non_exhaustive()
    }
}

impl Logging {
    /// Puts changed settings in force.
    pub fn change(&self, settings: Log) {
        // This fails only when the subscriber is gone; then there is no log any more.
        let _ = self.formatter.reload(format(settings, &self.writer, self.colour));
        let _ = self.filter.reload(choose(settings, self.directives.as_deref()));
    }

    /// How many lines were lost because nobody read them.
    pub fn lost(&self) -> ErrorCounter {
        self.writer.error_counter()
    }
}

fn tell_panic(panic: &PanicHookInfo<'_>) {
    let message = vital::message(panic.payload());
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => error!("panicked at {place}: {message}\n{backtrace}"),
        _ => error!("panicked at {place}: {message}; please report this"),
    }
}

fn format(settings: Log, writer: &NonBlocking, colour: bool) -> Formatter {
    let layer = tracing_subscriber::fmt::layer().with_target(false).with_writer(writer.clone());
    match settings.format {
        LogFormat::Text => layer.with_ansi(colour).boxed(),
        LogFormat::Json => {
            layer.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    }
}

/// What the directives do not speak of is logged as configured. `EnvFilter` alone would log nothing of it: a
/// mistyped level, which it takes for the name of a target, would silence the edge.
fn choose(settings: Log, directives: Option<&str>) -> EnvFilter {
    let directives = directives.unwrap_or_default();
    let is_level = |directive: &str| directive.trim().parse::<LevelFilter>().is_ok();
    let filter = EnvFilter::builder().with_default_directive(settings.level.into()).parse_lossy(directives);
    if directives.split(',').any(is_level) { filter } else { filter.add_directive(settings.level.into()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const JSON: Log = Log { level: tracing::Level::INFO, format: LogFormat::Json, repeats: 0 };

    #[test]
    #[ignore = "run in a process of its own by a_panic_is_a_line_of_the_log"]
    fn panics() {
        let _logging = start(JSON, &|_| None);
        assert!(std::thread::spawn(|| panic!("a bug\nin two lines")).join().is_err());
    }

    /// The log of a test that is ignored otherwise, since it starts the log of its process, and whether
    /// it succeeds.
    pub fn log_of(test: &str) -> (String, bool) {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--ignored", "--nocapture"]).env_remove("RUST_BACKTRACE");
        let output = command.env_remove("RUST_LOG").output().unwrap();
        (String::from_utf8(output.stderr).unwrap(), output.status.success())
    }

    #[test]
    fn a_panic_is_a_line_of_the_log() {
        let (log, succeeds) = log_of("process::log::tests::panics");
        assert!(succeeds, "{log}");
        let line: serde_json::Value = serde_json::from_str(log.trim()).expect(&log);
        let message = line["message"].as_str().unwrap_or_default();
        assert_eq!(line["level"], "ERROR");
        assert!(message.starts_with("panicked at src/process/log.rs:"), "{message}");
        assert!(message.ends_with(": a bug in two lines; please report this"), "{message}");
    }
}
