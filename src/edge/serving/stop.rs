//! The end of serving: ports close, clients that are connected are served to their end, and connections that are
//! left after the drain time-out are cut.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::{Opening, Serving};
use crate::listener;
use crate::listener::sockets::Socket;
use crate::process::signals::{Drained, Signals};

/// How long clients may take to read their answer when the tailnet has refused this edge.
const TURN_AWAY_LIMIT: Duration = Duration::from_secs(3);

impl Serving {
    /// Closes the ports, and waits for the connections until the drain time-out; another signal ends
    /// the wait. `signal` is the signal that asked for the stop, if one did.
    pub async fn stop(&mut self, signal: Option<&str>, signals: &mut Signals) {
        if self.opening == Opening::None {
            return info!(signal, "stopping before anything was served");
        }
        let (began, limit) = (Instant::now(), self.config.timeouts.drain);
        let tasks = self.admission.tasks.clone();
        self.close_ports().await;
        let connections = tasks.len();
        info!(signal, connections, "stopping");
        // Connections are counted, not tasks: a task may only wait until its client has read the answer.
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

    /// Closes the ports and turns away the clients that wait. Without a tailnet all clients wait.
    pub async fn turn_away(&mut self) {
        self.close_ports().await;
        self.drain.cancel();
        let _ = timeout(TURN_AWAY_LIMIT, self.admission.tasks.wait()).await;
    }

    /// Accepts the clients that already wait in a port's backlog, and closes the port. A socket that the
    /// supervisor has too stays open there, and queues clients for the next start.
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
