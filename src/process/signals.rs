//! What the signals mean, and how a stop went.
//!
//! SIGTERM and SIGINT begin a drain: no new connections, then the rest have a
//! limited time. A second one ends it at once. SIGHUP has the configuration read
//! again; however many come meanwhile, once more. Where there is no file to read and
//! a terminal, it is the terminal that goes away, and a stop: nobody is left who
//! would end the edge by Ctrl-C.
//!
//! Until the handlers are there a stop ends the process in order at once, and SIGHUP is put off until they
//! are ([`crate::ffi::process::expect_signals`], which `run` begins with).

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
    /// A SIGHUP that came before the handlers were there.
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

    /// Waits for the next request; a stop goes first.
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

    /// Waits for the next request to stop and names it. A SIGHUP waits too.
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

/// What became of the connections that were there when a stop began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// How many there were.
    pub connections: usize,
    /// Those that waited for their client, or for the mailbox, and were sent away.
    pub dismissed: usize,
    /// Those that were still there when the time was over.
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
            "connections ended by themselves: {ended}, closed while quiet: {dismissed}, cut: {cut}, in {:.1} s",
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
        let told = "connections ended by themselves: 5, closed while quiet: 3, cut: 2, in 1.2 s";
        assert_eq!(drained.to_string(), told);
    }
}
