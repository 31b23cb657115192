//! What is wrong with my set-up? `tailwart-edge doctor` checks everything that mail depends on before it
//! reaches the mailbox, and says for each check what was found and what to do.
//!
//! It promises: nothing is changed, on this machine or elsewhere, and nothing enrols. Every part has a
//! deadline, and parts that do not need each other run at the same time. No secret is shown, and text from
//! the network is made harmless for the terminal. Names are looked up with the program's own resolver; the
//! mailbox's name is looked up only in the tailnet's list of nodes.
//!
//! It deliberately does not fix anything.

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

/// What to check.
#[derive(Debug)]
pub struct Patient {
    /// The configuration, or its mistakes.
    pub config: Result<Config, ConfigError>,
    /// Where a credential may come from.
    pub sources: Arc<Sources>,
    /// The mail domain; without one its DNS is not checked.
    pub domain: Option<String>,
    /// The public addresses of this machine, if its interfaces do not have them.
    pub addresses: Vec<IpAddr>,
    /// The DNS server to ask, else the system's.
    pub dns_server: Option<SocketAddr>,
    /// The mail server (`HOST[:PORT]`) with which outbound port 25 is tried.
    pub smtp_check: String,
}

/// Makes all checks. Must be called within a tokio runtime.
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
    // If this user may not read the directory, the running edge may.
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

/// Whether an edge runs. The lock on the state directory is certain. Where there is no lock to look at, the
/// admin address decides.
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
        return vec![Check::pass("dns", "not checked; pass --domain NAME to check the DNS of a mail domain")];
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
