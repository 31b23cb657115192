//! One listener in service: its sockets, the tasks that accept on them, and the probes of its servers.

use std::sync::Arc;
use std::time::Duration;

use crate::admin::board::Listening;
use crate::config::{self, Config};
use crate::connection::Service;
use crate::listener::sockets::{Socket, announce};
use crate::listener::{self, Admission};
use crate::protocol::ProxyProtocol;
use crate::support::vital::{Vital, Vitals};
use crate::tailnet::Node;
use crate::upstream::Server;
use crate::upstream::health::{self, Monitor};
use crate::upstream::probe::Target;

/// How much longer an attempt to connect may take once the edge is stopping: enough for WireGuard to
/// repeat a handshake, after 5 to 5.4 seconds. It is at most half of the drain time-out, so that a client
/// that is turned away then can still get the answer.
const LAST_DIAL: Duration = Duration::from_secs(6);

/// A listener's sockets, and its service for the clients that connect there.
pub(super) struct Port {
    pub(super) definition: Definition,
    pub(super) service: Arc<Service<Node>>,
    pub(super) sockets: Vec<Socket>,
    /// The sockets for which "listening" was logged under this listener's name.
    pub(super) announced: Vec<Socket>,
    /// A task for each socket; empty while the port does not accept. A reload that changes nothing here keeps them.
    pub(super) accepting: Vec<Vital>,
    pub(super) monitors: Vec<Arc<Monitor>>,
    /// A task for each monitor; empty without probes.
    pub(super) probing: Vec<Vital>,
}

/// The settings that a service depends on. While they stay the same, a reload keeps the service.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Definition {
    /// With `listen` empty, since another address does not need another service.
    pub(super) listener: config::Listener,
    pub(super) connect: Duration,
    pub(super) half_close: Duration,
    pub(super) hostname: Option<String>,
    pub(super) last_dial: Duration,
    /// Whether clients may be held at all: `limits.hold_max` is not 0.
    pub(super) holds: bool,
}

impl Definition {
    pub(super) fn of(config: &Config, listener: &config::Listener) -> Definition {
        let config::Timeouts { connect, half_close, drain, .. } = config.timeouts;
        Definition {
            listener: config::Listener { listen: Vec::new(), configured: false, ..listener.clone() },
            connect,
            half_close,
            hostname: config.hostname.clone(),
            last_dial: LAST_DIAL.min(drain / 2),
            holds: config.limits.hold_max > 0,
        }
    }
}

impl Definition {
    /// Whether both lead to the same servers and a probe of these would find the same.
    pub(super) fn has_same_mailbox(&self, other: &Definition) -> bool {
        let of = |definition: &Definition| {
            let config::Listener { protocol, proxy_protocol, .. } = definition.listener;
            (protocol, proxy_protocol, definition.connect)
        };
        of(self) == of(other) && self.listener.upstream == other.listener.upstream
    }
}

impl Port {
    pub(super) fn listening(&self) -> Listening {
        Listening {
            name: self.service.name.clone(),
            protocol: self.service.protocol,
            addresses: self.sockets.iter().filter_map(Socket::local).collect(),
            upstream: self.service.upstream.to_string(),
            removed: false,
        }
    }

    /// Accepts on every socket, and logs the sockets that are new to this listener.
    pub(super) fn accept(&mut self, admission: &Admission, vitals: &Vitals) {
        for socket in &self.sockets {
            if !self.announced.contains(socket) {
                announce(&self.service.name, socket);
            }
            let (listener, service) = (Arc::clone(&socket.listener), Arc::clone(&self.service));
            let address = socket.local().map(|address| address.to_string()).unwrap_or_default();
            let name = format!("accept {} {address}", self.service.name);
            let accepting = listener::accept(listener, service, admission.clone());
            self.accepting.push(vitals.spawn(name, accepting));
        }
        self.announced.clone_from(&self.sockets);
    }

    pub(super) async fn stop_accepting(&mut self) {
        for task in self.accepting.drain(..) {
            task.stop().await;
        }
    }

    /// Probes every server from now on. With an interval of 0 it probes none, and forgets what probes have found.
    pub(super) fn probe(&mut self, node: &Arc<Node>, vitals: &Vitals, settings: config::Probe) {
        self.probing.clear();
        for (monitor, server) in self.monitors.iter_mut().zip(self.service.upstream.servers()) {
            if settings.interval.is_zero() {
                *monitor = Arc::new(self::monitor(&self.service, server));
                self.service.upstream.unprobed(server);
                continue;
            }
            let (server, node) = (Arc::clone(server), Arc::clone(node));
            let (monitor, upstream) = (Arc::clone(monitor), Arc::clone(&self.service.upstream));
            monitor.begin();
            let name = format!("probe {server} for {}", self.service.name);
            let probing = health::keep_probing(monitor, upstream, server, node, settings);
            self.probing.push(vitals.spawn(name, probing));
        }
    }
}

/// The monitor for one server of a listener's service.
pub(super) fn monitor(service: &Service<Node>, server: &Server) -> Monitor {
    let target = Target {
        host: server.host().to_owned(),
        port: server.port,
        protocol: service.protocol,
        header: service.proxy_protocol != ProxyProtocol::Off,
    };
    Monitor::new(&service.name, target, server)
}
