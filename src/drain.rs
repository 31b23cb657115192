//! Stopping: what the signals mean.
//!
//! SIGTERM and SIGINT begin a drain: no new connections, then the rest have a
//! limited time. A second one ends it at once. SIGHUP, which would kill a
//! process that ignores it, is noted and does nothing: there is no reload.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

use crate::tailnet::run_on_alternate_stack;

/// The signals of the process. Only one should exist at a time.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl StopSignals {
    /// Installs the handlers, safe beside the Go runtime. Must be called
    /// within a tokio runtime.
    pub fn install() -> io::Result<StopSignals> {
        Ok(StopSignals {
            terminate: handler(SignalKind::terminate())?,
            interrupt: handler(SignalKind::interrupt())?,
            hangup: handler(SignalKind::hangup())?,
        })
    }

    /// Waits for the next request to stop and names it.
    pub async fn stop(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => info!("SIGHUP ignored: a changed configuration needs a restart"),
            }
        }
    }
}

fn handler(kind: SignalKind) -> io::Result<Signal> {
    let installed = signal(kind)?;
    run_on_alternate_stack(kind.as_raw_value())?;
    Ok(installed)
}
