//! The admin listener, on this machine and on the tailnet: the tasks that serve it, and how a reload replaces them.

use std::sync::Arc;

use crate::admin;
use crate::admin::overview::Overview;
use crate::config::ADMIN;
use crate::doctor::Examiner;
use crate::listener::sockets::{Socket, announce};
use crate::support::vital::{Vital, Vitals};
use crate::tailnet::Node;

/// The admin listener. It serves before there is a node.
pub(super) struct Admin {
    pub(super) overview: Arc<Overview>,
    pub(super) examiner: Arc<Examiner>,
    vitals: Vitals,
    pub(super) running: Option<(Socket, Vital)>,
    on_tailnet: Option<(u16, Vital)>,
}

impl Admin {
    pub fn new(overview: Arc<Overview>, examiner: Arc<Examiner>, vitals: Vitals) -> Admin {
        Admin { overview, examiner, vitals, running: None, on_tailnet: None }
    }

    /// Serves at this socket only; the task of another socket ends.
    pub fn serve(&mut self, socket: Option<Socket>) {
        let Some(socket) = socket else {
            self.running = None;
            return;
        };
        if self.running.as_ref().is_some_and(|(running, _)| *running == socket) {
            return;
        }
        announce(ADMIN, &socket);
        let (overview, examiner) = (Arc::clone(&self.overview), Arc::clone(&self.examiner));
        let serving = admin::serve(Arc::clone(&socket.listener), overview, examiner);
        self.running = Some((socket, self.vitals.spawn("serve admin.listen", serving)));
    }

    /// Serves the tailnet at this port of the node only; the task of another port ends.
    pub fn serve_tailnet(&mut self, node: &Arc<Node>, port: Option<u16>) {
        if self.on_tailnet.as_ref().map(|(port, _)| *port) == port {
            return;
        }
        self.on_tailnet = port.map(|port| {
            let (node, overview) = (Arc::clone(node), Arc::clone(&self.overview));
            let serving = admin::serve_tailnet(node, port, overview);
            (port, self.vitals.spawn("serve admin.tailnet_port", serving))
        });
    }
}
