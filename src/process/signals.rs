//! What the signals mean, and how a stop is reported.
//!
//! SIGTERM and SIGINT begin a drain: no new connections are accepted, and open
//! ones have a limited time. A second signal ends the drain at once. SIGHUP reloads
//! the configuration; several SIGHUPs during a reload cause one more reload. On a
//! terminal without a configuration file, SIGHUP is a stop: the terminal was closed,
//! and nobody can press Ctrl-C any more.
//!
//! Until the handlers are installed, SIGTERM and SIGINT end the process at once, and SIGHUP is remembered
//! ([`crate::ffi::process::expect_signals`], which `run` calls first).

use std::fmt;
use std::io::{self, IsTerminal as _};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

pub use crate::ffi::process::expect_signals;
use crate::ffi::process::{run_on_alternate_stack, signals_are_heard};

/// The signals of the process. Only one should exist at a time.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    hangup_stops: bool,
    /// Whether a SIGHUP came before the handlers were installed.
    early_hangup: bool,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To stop; the signal's name.
    Stop(&'static str),
    /// To read the configuration again.
    Reload,
}

impl Signals {
    /// Installs the handlers, safe beside the Go runtime. Must be called
    /// within a tokio runtime.
    pub fn install(has_file: bool) -> io::Result<Signals> {
        let mut signals = Signals {
            terminate: handler(SignalKind::terminate())?,
            interrupt: handler(SignalKind::interrupt())?,
            hangup: handler(SignalKind::hangup())?,
            hangup_stops: !has_file && io::stderr().is_terminal(),
            early_hangup: false,
        };
        signals.early_hangup = signals_are_heard();
        Ok(signals)
    }

    /// Waits for the next request. A stop comes before a reload.
    pub async fn next(&mut self) -> Request {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => Request::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Request::Stop("SIGINT"),
            () = hung_up(&mut self.hangup, &mut self.early_hangup) => {
                if self.hangup_stops { Request::Stop("SIGHUP") } else { Request::Reload }
            }
        }
    }

    /// Waits for the next request to stop, and returns the signal's name. A SIGHUP meanwhile is not lost.
    pub async fn stop(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Waits for a SIGHUP, or takes the early one.
async fn hung_up(hangup: &mut Signal, early: &mut bool) {
    if !std::mem::take(early) {
        hangup.recv().await;
    }
}

fn handler(kind: SignalKind) -> io::Result<Signal> {
    let installed = signal(kind)?;
    run_on_alternate_stack(kind.as_raw_value())?;
    Ok(installed)
}

/// How the connections ended that were open when a stop began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// How many there were.
    pub connections: usize,
    /// Connections that waited for their client or for the mailbox, and were closed.
    pub dismissed: usize,
    /// Connections that were still open after the drain time-out.
    pub cut: usize,
    /// From the signal until none was left.
    pub took: Duration,
}

impl fmt::Display for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Drained { connections, dismissed, cut, took } = self;
        let ended = connections.saturating_sub(dismissed + cut);
        write!(
            f,
            "connections ended by themselves: {ended}, closed while idle: {dismissed}, cut: {cut}, in {:.1} s",
            took.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_is_counted_once() {
        let took = Duration::from_millis(1234);
        let drained = Drained { connections: 10, dismissed: 3, cut: 2, took };
        let told = "connections ended by themselves: 5, closed while idle: 3, cut: 2, in 1.2 s";
        assert_eq!(drained.to_string(), told);
    }
}
