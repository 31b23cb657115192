//! The plan of a reload: everything that it does to the ports is decided before the first step is taken.
//!
//! Invariants: a plan is made from values only, and making it changes nothing. A port whose definition stays
//! the same keeps its service. A port for which nothing changes at all does not stop accepting.
//!
//! Deliberately not here: binding the sockets, which comes first (see
//! [`Sockets`](crate::listener::sockets::Sockets)), and carrying the plan out (see `serving.rs`).

use super::port::Definition;
use crate::config::Config;

/// The configuration in force, and its ports. `S` is a socket; two sockets are equal only if they are the same one.
pub(super) struct InForce<'a, S> {
    pub config: &'a Config,
    /// The limit on all connections.
    pub connections: usize,
    pub ports: Vec<PortInForce<'a, S>>,
}

/// A port that is in force.
pub(super) struct PortInForce<'a, S> {
    pub definition: &'a Definition,
    pub sockets: &'a [S],
}

/// What to do. A number names a port by its index in [`InForce::ports`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan<S> {
    /// The ports of the new configuration, in its order.
    pub ports: Vec<PlannedPort<S>>,
    /// The ports that stop accepting while the change is made. Their clients wait in the backlog, and the
    /// permits of the accepting tasks are free again.
    pub paused: Vec<usize>,
    /// The sockets that close, each with its port. Clients that wait there already are still accepted.
    pub closing: Vec<(usize, S)>,
    /// Whether the limits on connections have changed, and so are logged.
    pub tells_limit: bool,
    /// Whether the probe settings have changed: then all servers are probed anew.
    pub probes_anew: bool,
}

/// A port of the new configuration.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlannedPort<S> {
    pub definition: Definition,
    pub sockets: Vec<S>,
    /// The port in force that has this name.
    pub before: Option<usize>,
    pub keeps: Keeps,
}

/// What a port of the new configuration keeps of those in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeps {
    /// The service of the port before, whose definition is the same.
    Service,
    /// The servers of the port before and their probes, with all that is known of them: nothing has changed that
    /// these depend on.
    Mailbox,
    /// What this port knows of the mailbox. It has the same servers, and if possible the same name.
    Knowledge(usize),
    Nothing,
}

impl<S: Clone + PartialEq> Plan<S> {
    /// The plan from what is in force to `new`: with `sockets` for each listener, and `connections` as the limit
    /// on all connections.
    pub fn between(
        old: &InForce<S>,
        new: &Config,
        sockets: Vec<(String, Vec<S>)>,
        connections: usize,
    ) -> Plan<S> {
        let is_total_same = old.connections == connections;
        let per_client = |config: &Config| config.limits.max_connections_per_client;
        let closing = closing(&old.ports, &sockets);
        let planned = new.listeners.iter().zip(sockets).map(|(listener, (_, sockets))| {
            PlannedPort::new(Definition::of(new, listener), sockets, &old.ports)
        });
        let ports: Vec<_> = planned.collect();
        let is_left_alone = |place: &usize| {
            let is_its_own =
                |port: &&PlannedPort<S>| port.keeps == Keeps::Service && port.before == Some(*place);
            let goes_on = ports.iter().find(is_its_own);
            is_total_same && goes_on.is_some_and(|port| port.sockets == old.ports[*place].sockets)
        };
        let paused = (0..old.ports.len()).filter(|place| !is_left_alone(place)).collect();
        Plan {
            paused,
            closing,
            tells_limit: !is_total_same || per_client(old.config) != per_client(new),
            probes_anew: old.config.probe != new.probe,
            ports,
        }
    }
}

impl<S> PlannedPort<S> {
    fn new(definition: Definition, sockets: Vec<S>, old: &[PortInForce<S>]) -> PlannedPort<S> {
        let before = old.iter().position(|old| old.definition.listener.name == definition.listener.name);
        let leads_there =
            |place: &usize| old[*place].definition.listener.upstream == definition.listener.upstream;
        let keeps = match before.map(|place| old[place].definition) {
            Some(same) if *same == definition => Keeps::Service,
            Some(like) if like.has_same_mailbox(&definition) => Keeps::Mailbox,
            _ => {
                let knows = before.into_iter().chain(0..old.len()).find(leads_there);
                knows.map_or(Keeps::Nothing, Keeps::Knowledge)
            }
        };
        PlannedPort { definition, sockets, before, keeps }
    }
}

/// The sockets of `old` that are not among the new ones.
fn closing<S: Clone + PartialEq>(old: &[PortInForce<S>], new: &[(String, Vec<S>)]) -> Vec<(usize, S)> {
    let stays = |socket: &S| new.iter().any(|(_, sockets)| sockets.contains(socket));
    let all = old.iter().enumerate().flat_map(|(place, port)| port.sockets.iter().map(move |s| (place, s)));
    all.filter(|(_, socket)| !stays(socket)).map(|(place, socket)| (place, socket.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::Keeps::{Knowledge, Mailbox, Nothing, Service};
    use super::*;

    const BASE: &str = "[[listener]]\nprotocol = 'smtp'\n[[listener]]\nprotocol = 'imaps'\n";
    const CONNECTIONS: usize = 100;

    fn config(text: &str) -> Config {
        Config::parse(text, Some("stalwart"), &|_| None).expect("a good configuration")
    }

    /// The plan from [`BASE`], whose sockets are 1 and 2, to `text` with these sockets.
    fn plan(text: &str, sockets: &[&[u8]], connections: usize) -> Plan<u8> {
        plan_from(BASE, text, sockets, connections)
    }

    fn plan_from(base: &str, text: &str, sockets: &[&[u8]], connections: usize) -> Plan<u8> {
        let (old, new) = (config(base), config(text));
        let definitions: Vec<Definition> = old.listeners.iter().map(|l| Definition::of(&old, l)).collect();
        let ports = definitions.iter().zip([&[1], &[2]]);
        let ports = ports.map(|(definition, sockets)| PortInForce { definition, sockets }).collect();
        let in_force = InForce { config: &old, connections: CONNECTIONS, ports };
        let named = new.listeners.iter().zip(sockets);
        let sockets = named.map(|(listener, sockets)| (listener.name.clone(), sockets.to_vec())).collect();
        Plan::between(&in_force, &new, sockets, connections)
    }

    /// For each port: the port before, and what is kept.
    fn ports(plan: &Plan<u8>) -> Vec<(Option<usize>, Keeps)> {
        plan.ports.iter().map(|port| (port.before, port.keeps)).collect()
    }

    #[test]
    fn where_nothing_changes_nothing_is_done() {
        let plan = plan(BASE, &[&[1], &[2]], CONNECTIONS);
        assert_eq!(ports(&plan), [(Some(0), Service), (Some(1), Service)]);
        assert_eq!((&plan.paused[..], &plan.closing[..]), (&[][..], &[][..]));
        assert!(!plan.tells_limit && !plan.probes_anew);
    }

    #[test]
    fn another_order_is_no_change() {
        let text = "[[listener]]\nprotocol = 'imaps'\n[[listener]]\nprotocol = 'smtp'\n";
        let plan = plan(text, &[&[2], &[1]], CONNECTIONS);
        assert_eq!(ports(&plan), [(Some(1), Service), (Some(0), Service)]);
        assert!(plan.paused.is_empty() && plan.closing.is_empty());
    }

    #[test]
    fn a_port_at_another_address_keeps_its_service_and_closes_the_socket() {
        let text = BASE.replace("'smtp'\n", "'smtp'\nlisten = ['127.0.0.1:25']\n");
        let plan = plan(&text, &[&[3], &[2]], CONNECTIONS);
        assert_eq!(ports(&plan), [(Some(0), Service), (Some(1), Service)]);
        assert_eq!(plan.ports[0].sockets, [3]);
        assert_eq!((&plan.paused[..], &plan.closing[..]), (&[0][..], &[(0, 1)][..]));
    }

    #[test]
    fn a_port_that_means_something_else_knows_its_mailbox_still() {
        let text = BASE.replace("'smtp'\n", "'smtp'\nidle_timeout = '1m'\n");
        let plan = plan(&text, &[&[1], &[2]], CONNECTIONS);
        assert_eq!(ports(&plan), [(Some(0), Mailbox), (Some(1), Service)]);
        assert_eq!((&plan.paused[..], &plan.closing[..]), (&[0][..], &[][..]));
    }

    #[test]
    fn what_is_known_of_the_mailbox_outlives_what_it_does_not_depend_on() {
        let of = |text: &str| plan(text, &[&[1], &[2]], CONNECTIONS).ports[0].keeps;
        for setting in
            ["[timeouts]\ndrain = '7s'", "[timeouts]\nhalf_close = '7s'", "hostname = 'mx.example.org'"]
        {
            assert_eq!(of(&format!("{setting}\n{BASE}")), Mailbox, "{setting}");
        }
        assert_eq!(of(&BASE.replace("'smtp'\n", "'smtp'\nidle_timeout = '1m'\n")), Mailbox);
        // A probe may come to something else with these.
        assert_eq!(of(&format!("[timeouts]\nconnect = '7s'\n{BASE}")), Knowledge(0));
        assert_eq!(of(&BASE.replace("'smtp'\n", "'smtp'\nproxy_protocol = 'off'\n")), Knowledge(0));
        assert_eq!(of(BASE), Service);
    }

    #[test]
    fn a_port_that_leads_elsewhere_knows_nothing_of_the_mailbox() {
        let text = BASE.replace("'smtp'\n", "'smtp'\nupstream = 'other'\n");
        assert_eq!(ports(&plan(&text, &[&[1], &[2]], CONNECTIONS))[0], (Some(0), Nothing));
    }

    #[test]
    fn a_renamed_port_knows_the_mailbox_of_the_one_before() {
        let text = BASE.replace("'smtp'\n", "'smtp'\nname = 'mx'\n");
        let plan = plan(&text, &[&[1], &[2]], CONNECTIONS);
        assert_eq!(ports(&plan), [(None, Knowledge(0)), (Some(1), Service)]);
        assert_eq!((&plan.paused[..], &plan.closing[..]), (&[0][..], &[][..]));
    }

    #[test]
    fn a_port_that_goes_and_one_that_comes() {
        let text = BASE.replace("'imaps'", "'pop3s'");
        let plan = plan(&text, &[&[1], &[4]], CONNECTIONS);
        assert_eq!(ports(&plan), [(Some(0), Service), (None, Nothing)]);
        assert_eq!((&plan.paused[..], &plan.closing[..]), (&[1][..], &[(1, 2)][..]));
    }

    #[test]
    fn a_port_knows_the_mailbox_by_the_port_of_its_own_name_first() {
        const SAME: &str = "[[listener]]\nname = 'one'\nprotocol = 'smtp'\n[[listener]]\nname = 'two'\nprotocol = 'smtp'\n\
                            listen = ['127.0.0.1:26']\n";
        let changed =
            SAME.replace("listen = ['127.0.0.1:26']\n", "listen = ['127.0.0.1:26']\nproxy_protocol = 'v1'\n");
        let plan = plan_from(SAME, &changed, &[&[1], &[2]], CONNECTIONS);
        assert_eq!(ports(&plan), [(Some(0), Service), (Some(1), Knowledge(1))]);
    }

    #[test]
    fn a_socket_that_moves_to_another_port_does_not_close() {
        let plan = plan(BASE, &[&[2], &[1]], CONNECTIONS);
        assert_eq!((&plan.paused[..], &plan.closing[..]), (&[0, 1][..], &[][..]));
    }

    #[test]
    fn all_ports_pause_for_another_limit_on_all_connections() {
        let fewer = plan(BASE, &[&[1], &[2]], CONNECTIONS - 1);
        assert!(fewer.tells_limit && fewer.paused == [0, 1], "{fewer:?}");
        let text = format!("[limits]\nmax_connections_per_client = 7\n{BASE}");
        let per_client = plan(&text, &[&[1], &[2]], CONNECTIONS);
        assert!(per_client.tells_limit && per_client.paused.is_empty(), "{per_client:?}");
    }

    #[test]
    fn other_settings_of_the_probe_begin_it_anew() {
        let plan = plan(&format!("[probe]\nfall = 7\n{BASE}"), &[&[1], &[2]], CONNECTIONS);
        assert!(plan.probes_anew && plan.paused.is_empty(), "{plan:?}");
        assert_eq!(ports(&plan), [(Some(0), Service), (Some(1), Service)]);
    }
}
