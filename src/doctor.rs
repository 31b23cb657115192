//! `tailwart-edge doctor`: looks at everything that mail on its way to the mailbox depends on, and
//! says of each what was found and what to do.
//!
//! Invariants: nothing is changed, on this machine or elsewhere, and nothing enrols; every part has a
//! deadline, and parts that do not need each other run at the same time; no secret is shown, and no
//! text from the network that a terminal would obey; names are looked up with a resolver of our own,
//! and the mailbox's only in the tailnet's map.
//!
//! Deliberately not here: mending anything.

mod clock;
mod dns;
mod local;
mod mailbox;
mod outbound;
mod report;
mod resolver;
mod tailnet;
#[cfg(test)]
#[path = "../tests/common/dns.rs"]
mod test_dns;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::config::{Config, ConfigError};
use crate::tailnet::credential::Sources;
use local::{Addresses, Running, StateDirUse};
use resolver::Resolver;

pub use outbound::DEFAULT_SERVER;
pub use report::{Check, Grade, Report};
pub use tailnet::{Examiner, NoLook, PATH};

/// What to look at.
#[derive(Debug)]
pub struct Patient {
    /// The configuration, or what is wrong with it.
    pub config: Result<Config, ConfigError>,
    /// Where a credential may come from.
    pub sources: Arc<Sources>,
    /// The mail domain; without it there are no questions to the DNS about it.
    pub domain: Option<String>,
    /// The public addresses of this machine, if they are not its own.
    pub addresses: Vec<IpAddr>,
    /// The DNS server to ask, else the system's.
    pub dns_server: Option<SocketAddr>,
    /// The mail server (`HOST[:PORT]`) by which outbound port 25 is tried.
    pub smtp_check: String,
}

/// Looks at everything. Must be called within a tokio runtime.
pub async fn run(patient: Patient) -> Report {
    let mut checks = local::config(&patient.config);
    if let Ok(config) = &patient.config {
        checks.extend(all(config, &patient).await);
    }
    Report { checks }
}

async fn all(config: &Config, patient: &Patient) -> Vec<Check> {
    let (place, state) = local::state_dir(&config.tailnet);
    let running = running(&place, config.admin).await;
    let mut checks = local::ports(config, running);
    // What this user may not look at, the running edge has looked at.
    checks.push(match (running, state.outcome) {
        (Running::Yes, Grade::Fail) => Check::pass(state.name, "in use by the running edge, as another user"),
        _ => state,
    });
    let (credential, can_enrol) = local::credential(&patient.sources, &config.tailnet, running).await;
    checks.push(credential);

    let resolver = Resolver::new(patient.dns_server);
    let (tailnet, dns, outbound, clock) = tokio::join!(
        tailnet::look(place, running, can_enrol, config),
        dns(patient, config, &resolver),
        outbound::check(&patient.smtp_check, &resolver),
        clock::check(config.tailnet.control_url.as_deref(), &resolver),
    );
    checks.extend(tailnet);
    checks.extend(dns);
    checks.extend([outbound, clock]);
    checks
}

/// Whether an edge runs. The lock on the state directory tells for sure; where there is no lock to
/// look at, the admin address tells.
async fn running(place: &StateDirUse, admin: Option<SocketAddr>) -> Running {
    let live = match (place, admin) {
        (StateDirUse::Free(_), _) => return Running::No,
        (_, Some(admin)) => Some(tailnet::is_live(admin).await),
        (_, None) => None,
    };
    match (place, live) {
        (_, Some(true)) | (StateDirUse::Taken, None) => Running::Yes,
        (StateDirUse::Taken, Some(false)) => Running::Unwell,
        _ => Running::No,
    }
}

async fn dns(patient: &Patient, config: &Config, resolver: &Result<Resolver, String>) -> Vec<Check> {
    let Some(domain) = &patient.domain else {
        return vec![Check::pass("dns", "left out; pass --domain NAME to check the DNS of a mail domain")];
    };
    match resolver {
        Ok(resolver) => dns::check(domain, &Addresses::find(&patient.addresses), config, resolver).await,
        Err(reason) => {
            vec![Check::fail(
                "dns-server",
                reason,
                "fix /etc/resolv.conf, or name a server with --dns-server",
            )]
        }
    }
}
