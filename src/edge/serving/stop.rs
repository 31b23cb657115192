//! The end of serving: ports close, whoever came before is served, and the rest is cut when the time is over.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::{Opening, Serving};
use crate::listener;
use crate::listener::sockets::Socket;
use crate::process::signals::{Drained, Signals};

/// How long those who wait for a tailnet that refuses this edge may take to read the answer.
const TURN_AWAY_LIMIT: Duration = Duration::from_secs(3);

impl Serving {
    /// Closes the ports and waits for the connections within the drain time-out; another signal ends
    /// the wait. `signal` is the one that asked for it, if one did.
    pub async fn stop(&mut self, signal: Option<&str>, signals: &mut Signals) {
        if self.opening == Opening::None {
            return info!(signal, "stopping before anything was served");
        }
        let (began, limit) = (Instant::now(), self.config.timeouts.drain);
        let tasks = self.admission.tasks.clone();
        self.close_ports().await;
        let connections = tasks.len();
        info!(signal, connections, "stopping");
        // A task may be done with its connection, and wait for its client to have read the answer.
        let open = || self.parts.connections.open().len();
        self.drain.cancel();
        tokio::select! {
            () = tasks.wait() => {}
            () = tokio::time::sleep(limit) => if open() > 0 {
                warn!(connections = open(), "drain time-out of {limit:?} passed: connections were cut");
            },
            again = signals.stop() => warn!(signal = again, connections = open(), "stopping at once: connections were cut"),
        }
        let (cut, dismissed) = (self.parts.connections.cut(), self.parts.connections.dismissed());
        let drained = Drained { connections, dismissed, cut, took: began.elapsed() };
        info!("stopped: {drained}");
        let lost_lines = self.parts.logging.lost().dropped_lines();
        if lost_lines > 0 {
            warn!(lost_lines, "log lines were lost because nobody read them");
        }
    }

    /// Closes the ports and turns away those who wait, who are all there are without a tailnet.
    pub async fn turn_away(&mut self) {
        self.close_ports().await;
        self.drain.cancel();
        let _ = timeout(TURN_AWAY_LIMIT, self.admission.tasks.wait()).await;
    }

    /// Takes in those who have got through to a port already, and closes it. A socket that a supervisor
    /// has too stays open there, and queues clients for the next start.
    async fn close_ports(&mut self) {
        for mut port in std::mem::take(&mut self.ports) {
            port.stop_accepting().await;
            if self.opening.includes(&port.service) {
                let take_in = |socket: &Socket| {
                    listener::accept_backlog(&socket.listener, &port.service, &self.admission);
                };
                port.sockets.iter().for_each(take_in);
            }
        }
        self.admission.tasks.close();
    }
}
