//! The checks that need only this machine: the configuration, the ports, the state directory, the credential,
//! and the machine's own addresses.
//!
//! Invariants: nothing is changed. Only the lock file is created, and only in a directory that belongs to this
//! user, where `run` would create it too. So a doctor that runs as another user than the edge leaves no file
//! that the edge cannot open. A port is bound only for the moment of the check.
//!
//! Deliberately not here: using the identity. The check only finds out whether there is one.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use if_addrs::Interface;
use rustix::fs::Access;
use tokio::time::timeout;

use super::report::{Check, Grade};
use crate::config::{self, ADMIN, Config, ConfigError, default_admin};
use crate::listener;
use crate::tailnet::credential::{Credential, CredentialError, Sources};
use crate::tailnet::state_dir::{self, StateDir, StateDirError};

/// Where Tailscale keeps a node's identity in the state directory.
const IDENTITY: &str = "tailscaled.state";

/// How long reading a credential may take. Only a network file system is this slow.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// The configuration's warnings or mistakes.
pub fn config(config: &Result<Config, ConfigError>) -> Vec<Check> {
    const CORRECT: &str = "fix it; the other checks need a valid configuration";
    match config {
        Err(mistakes) => {
            // The text says how many mistakes there are beyond fifty; the list does not.
            mistakes.to_string().lines().map(|mistake| Check::fail("config", mistake, CORRECT)).collect()
        }
        Ok(config) if config.warnings.is_empty() => {
            vec![Check::pass("config", format!("no mistakes, listeners: {}", config.listeners.len()))]
        }
        Ok(config) => config.warnings.iter().map(|text| Check::told("config", Grade::Warn, text)).collect(),
    }
}

/// Who uses the state directory.
#[derive(Debug)]
pub enum StateDirUse {
    /// No edge runs on it. No edge can start while this lock is held.
    Free(StateDir),
    /// A running edge uses it.
    Taken,
    /// The directory does not exist yet, or none is needed, or this user may not look.
    Unknown,
}

/// Checks whether the state directory is usable, and whether a running edge uses it.
pub fn state_dir(settings: &config::Tailnet) -> (StateDirUse, Check) {
    const NAME: &str = "state";
    let dir = settings.state_dir.display();
    if settings.ephemeral {
        return (StateDirUse::Unknown, Check::pass(NAME, "not needed (tailnet.ephemeral = true)"));
    }
    if !is_there(&settings.state_dir) {
        return (StateDirUse::Unknown, missing(NAME, &settings.state_dir));
    }
    match state_dir::lock(&settings.state_dir) {
        Ok(held) => (StateDirUse::Free(held), Check::pass(NAME, format!("{dir} is private and writable"))),
        Err(StateDirError::InUse { .. }) => {
            (StateDirUse::Taken, Check::pass(NAME, format!("{dir} is in use by the running edge")))
        }
        Err(error) => {
            let mut check = Check::told(NAME, Grade::Fail, &error);
            check.remedy = check.remedy.map(|remedy| {
                format!("if another user runs the edge, run the doctor as that user; else: {remedy}")
            });
            (StateDirUse::Unknown, check)
        }
    }
}

/// Whether something is at that path. If this user cannot see it, it counts as there: opening it says why.
fn is_there(path: &Path) -> bool {
    !matches!(path.symlink_metadata(), Err(error) if error.kind() == ErrorKind::NotFound)
}

/// The check of a directory that does not exist: whether this user could create it.
fn missing(name: &str, dir: &Path) -> Check {
    let above = dir.ancestors().skip(1).find(|above| is_there(above)).unwrap_or(Path::new("/"));
    let finding = format!("{} does not exist yet", dir.display());
    match rustix::fs::access(above, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Check::pass(name, format!("{finding}; `run` creates it")),
        Err(error) => Check::fail(
            name,
            format!("{finding}, and this user cannot make it in {}: {error}", above.display()),
            "create it with mode 0700 for the user that runs the edge, or set tailnet.state_dir",
        ),
    }
}

/// Whether there is an identity in the state directory.
pub fn is_enrolled(settings: &config::Tailnet) -> bool {
    !settings.ephemeral
        && std::fs::read(settings.state_dir.join(IDENTITY)).is_ok_and(|file| has_profile(&file))
}

/// Whether the state file holds a profile. An enrolled node has one; a node that was only started has just a
/// machine key there. A file that cannot be parsed counts as a profile: starting the node says what is wrong.
fn has_profile(file: &[u8]) -> bool {
    // ipn.CurrentProfileStateKey: the name of the profile in use. The node key is stored under that name.
    const CURRENT: &str = "_current-profile";
    let Ok(entries) = serde_json::from_slice::<BTreeMap<String, String>>(file) else { return true };
    entries.get(CURRENT).is_some_and(|name| !name.is_empty())
}

/// Whether this user may not look into the state directory.
fn is_closed_to_us(dir: &Path) -> bool {
    let identity = std::fs::File::open(dir.join(IDENTITY));
    identity.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

/// What is known about a running edge on this configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// It runs and answers on its admin address, or runs without one.
    Yes,
    /// It uses its state directory, but does not answer on its admin address.
    Unwell,
    /// No edge runs.
    No,
}

/// Checks whether the node has an identity, or a credential to get one. The second value says whether there is
/// a credential. The credential itself is not shown.
pub async fn credential(
    sources: &Arc<Sources>,
    settings: &config::Tailnet,
    running: Running,
) -> (Check, bool) {
    let sources = Arc::clone(sources);
    let reading = tokio::task::spawn_blocking(move || sources.read());
    let Ok(Ok(read)) = timeout(READ_LIMIT, reading).await else {
        let finding = format!("could not be read within {READ_LIMIT:?}");
        return (Check::fail("credential", finding, "check the file system of the key file"), false);
    };
    let there = matches!(read, Ok(Some(_)));
    // The state directory of a running edge may belong to another user.
    let enrolled = is_enrolled(settings) || running != Running::No;
    if !enrolled && !settings.ephemeral && is_closed_to_us(&settings.state_dir) {
        let finding =
            format!("this user cannot see whether there is an identity in {}", settings.state_dir.display());
        return (Check::warn("credential", finding, "run the doctor as the user that runs the edge"), there);
    }
    (judge_credential(enrolled, read, &settings.tags.join(", ")), there)
}

fn judge_credential(enrolled: bool, read: Result<Option<Credential>, CredentialError>, tags: &str) -> Check {
    const NAME: &str = "credential";
    match (enrolled, read) {
        (true, Ok(None)) => Check::pass(NAME, "none, and none is needed: the node has its identity"),
        (true, Ok(Some(credential))) => {
            Check::pass(NAME, format!("{credential}, not needed: the node has its identity"))
        }
        (true, Err(error)) => Check::told(NAME, Grade::Warn, &error),
        (false, Ok(Some(credential))) => {
            Check::pass(NAME, format!("not enrolled yet, but {credential} is there to enrol with"))
        }
        (false, Ok(None)) => Check::fail(
            NAME,
            "this node is not enrolled on the tailnet and has no credential to enrol with",
            format!(
                "set TS_AUTHKEY, TS_AUTHKEY_FILE or tailnet.auth_key_file to a key that may use {tags}; if the edge gets its key elsewhere (systemd, a container), run the doctor there"
            ),
        ),
        (false, Err(error)) => Check::told(NAME, Grade::Fail, &error),
    }
}

/// Checks every listening address: the public ports and the admin port.
pub fn ports(config: &Config, running: Running) -> Vec<Check> {
    let public = config.listeners.iter().flat_map(|listener| {
        listener.listen.iter().map(|&address| (listener.name.as_str(), address, listener.configured))
    });
    let admin = config.admin.map(|address| (ADMIN, address, config.admin != default_admin()));
    public.chain(admin).map(|(name, address, configured)| port(name, address, configured, running)).collect()
}

fn port(listener: &str, address: SocketAddr, configured: bool, running: Running) -> Check {
    let name = format!("port {listener} {address}");
    let bound = listener::bind(listener, address);
    match bound {
        Ok(_) if running != Running::No && address.port() != 0 => Check::warn(
            name,
            "free, although the edge runs",
            "restart the edge, if the configuration was changed since it started; otherwise see its log",
        ),
        Ok(_) => Check::pass(name, "free"),
        Err(error)
            if listener == ADMIN && error.kind == ErrorKind::AddrInUse && running == Running::Unwell =>
        {
            let remedy =
                "stop what listens there (`ss -ltnp` names it), or set admin.listen, and reload the edge";
            Check::warn(name, "in use by another program, not by the edge", remedy)
        }
        // A user who may not open such a port does not need to: the edge runs.
        Err(error)
            if matches!(error.kind, ErrorKind::AddrInUse | ErrorKind::PermissionDenied)
                && running != Running::No =>
        {
            Check::pass(name, "in use by the running edge")
        }
        Err(error)
            if !configured
                && address.is_ipv6()
                && matches!(error.kind, ErrorKind::AddrNotAvailable | ErrorKind::Unsupported) =>
        {
            let remedy = "nothing to do if no AAAA record names this machine; otherwise enable IPv6";
            Check::warn(name, "this machine has no IPv6, so only IPv4 is served", remedy)
        }
        Err(error) if !configured && listener == ADMIN => Check::told(name, Grade::Warn, &error.reason),
        Err(error) => Check::told(name, Grade::Fail, &error.reason),
    }
}

/// The addresses under which this machine is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Sorted and without duplicates, or as given with `--address`.
    pub public: Vec<IpAddr>,
    /// Whether they were given. Then the interfaces were not looked at.
    pub given: bool,
}

impl Addresses {
    /// The given addresses, else the public addresses of this machine's interfaces.
    pub fn find(given: &[IpAddr]) -> Addresses {
        if !given.is_empty() {
            return Addresses { public: given.to_vec(), given: true };
        }
        let mut public: Vec<IpAddr> = own_addresses().into_iter().filter(is_public).collect();
        public.sort();
        public.dedup();
        Addresses { public, given: false }
    }
}

/// The addresses of this machine's interfaces; empty if the kernel does not list them.
fn own_addresses() -> Vec<IpAddr> {
    if_addrs::get_if_addrs().unwrap_or_default().iter().map(Interface::ip).collect()
}

/// Whether the internet can reach the address: it is not private (RFC 1918, RFC 4193), not of a tailnet or a
/// carrier's NAT (100.64.0.0/10), not loopback and not link-local.
fn is_public(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let shared = a == 100 && (64..128).contains(&b);
            !(v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || shared)
        }
        IpAddr::V6(v6) => {
            !(v6.is_unique_local() || v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn parsed(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Some("stalwart"), &|_| None)
    }

    fn listening(address: &str) -> Config {
        parsed(&format!(
            "[admin]\nlisten = \"off\"\n[[listener]]\nprotocol = \"smtp\"\nlisten = [{address:?}]"
        ))
        .unwrap()
    }

    fn private_dir() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    fn settings(dir: &Path) -> config::Tailnet {
        config::Tailnet { state_dir: dir.to_owned(), ..parsed("").unwrap().tailnet }
    }

    fn sources(key: Option<&'static str>) -> Arc<Sources> {
        Arc::new(Sources::capture(&move |name| key.filter(|_| name == "TS_AUTHKEY").map(str::to_owned), None))
    }

    #[test]
    fn every_mistake_of_the_configuration_is_a_failure() {
        let checks = config(&parsed("[tailnet]\nhostnam = 'x'\n[limits]\nmax_connections = 'many'"));
        assert_eq!(checks.len(), 2, "{checks:?}");
        assert!(checks.iter().all(|check| check.outcome == Grade::Fail));
        assert!(checks[0].finding.contains("hostnam") && checks[1].finding.contains("max_connections"));
        assert_eq!(config(&parsed(""))[0].outcome, Grade::Pass);
        let doubtful = "[[listener]]\nprotocol = 'smtp'\nproxy_protocol = 'off'";
        assert_eq!(config(&parsed(doubtful))[0].outcome, Grade::Warn);
    }

    #[tokio::test]
    async fn a_port_is_free_ours_or_taken() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();
        let look = |running| ports(&listening(&address.to_string()), running).remove(0);
        for running in [Running::Yes, Running::Unwell] {
            let ours = look(running);
            assert_eq!((ours.outcome, &*ours.finding), (Grade::Pass, "in use by the running edge"));
        }
        let taken = look(Running::No);
        assert_eq!(taken.outcome, Grade::Fail);
        let said = format!("{} {:?}", taken.finding, taken.remedy);
        assert!(said.contains("another program listens there (`ss -ltnp"), "{said}");
        drop(other);
        assert_eq!((look(Running::No).outcome, &*look(Running::No).finding), (Grade::Pass, "free"));
        assert_eq!(look(Running::Yes).outcome, Grade::Warn, "the edge runs and does not listen there");
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_a_failure() {
        let check = ports(&listening("192.0.2.77:0"), Running::No).remove(0);
        assert_eq!(check.outcome, Grade::Fail);
        assert!(check.remedy.unwrap().contains("ip address"));
        // Only a default may be missing.
        let default = port("smtp", "[2001:db8::77]:0".parse().unwrap(), false, Running::No);
        assert_eq!(default.outcome, Grade::Warn, "{default:?}");
        let configured = port("smtp", "[2001:db8::77]:0".parse().unwrap(), true, Running::No);
        assert_eq!(configured.outcome, Grade::Fail);
    }

    #[test]
    fn the_state_directory_is_looked_at_and_not_made() {
        let dir = private_dir();
        let missing = settings(&dir.path().join("a/b"));
        let (place, check) = state_dir(&missing);
        assert!(matches!(place, StateDirUse::Unknown) && check.outcome == Grade::Pass, "{check:?}");
        assert!(!dir.path().join("a").exists());
        let (place, check) = state_dir(&settings(dir.path()));
        assert!(matches!(place, StateDirUse::Free(_)) && check.outcome == Grade::Pass, "{check:?}");
        // While the lock is held, it looks as if an edge ran.
        let (taken, check) = state_dir(&settings(dir.path()));
        assert!(matches!(taken, StateDirUse::Taken) && check.outcome == Grade::Pass, "{check:?}");
        drop(place);
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let (place, check) = state_dir(&settings(dir.path()));
        assert!(matches!(place, StateDirUse::Unknown) && check.outcome == Grade::Fail, "{check:?}");
        let below_a_file = dir.path().join("file");
        std::fs::write(&below_a_file, "").unwrap();
        let (_, check) = state_dir(&settings(&below_a_file.join("dir")));
        assert_eq!(check.outcome, Grade::Fail, "{check:?}");
    }

    #[tokio::test]
    async fn a_credential_is_needed_only_without_an_identity_and_never_shown() {
        let dir = private_dir();
        let settings = settings(dir.path());
        let none = credential(&sources(None), &settings, Running::No).await.0;
        assert_eq!(none.outcome, Grade::Fail, "{none:?}");
        let key = credential(&sources(Some("tskey-auth-s3cret")), &settings, Running::No).await.0;
        assert_eq!(key.outcome, Grade::Pass, "{key:?}");
        assert!(!format!("{key:?}").contains("s3cret"));
        let bad = credential(&sources(Some("tskey-auth-s3cret and more")), &settings, Running::No).await.0;
        assert!(bad.outcome == Grade::Fail && !format!("{bad:?}").contains("s3cret"), "{bad:?}");
        let identity = |text| std::fs::write(dir.path().join(IDENTITY), text).unwrap();
        for never_enrolled in [
            "{}",
            r#"{"_machinekey": "cHJpdmtleTow"}"#,
            r#"{"_machinekey": "cHJpdmtleTow", "_current-profile": ""}"#,
        ] {
            identity(never_enrolled);
            let check = credential(&sources(None), &settings, Running::No).await.0;
            assert_eq!(check.outcome, Grade::Fail, "{never_enrolled}: {check:?}");
        }
        identity(r#"{"_current-profile": "cHJvZmlsZS0xMjM0", "profile-1234": "e30="}"#);
        assert_eq!(credential(&sources(None), &settings, Running::No).await.0.outcome, Grade::Pass);
        let bad = credential(&sources(Some("tskey-auth-s3cret and more")), &settings, Running::No).await.0;
        assert_eq!(bad.outcome, Grade::Warn);
    }

    #[test]
    fn own_addresses_are_those_of_the_interfaces() {
        let own = own_addresses();
        assert!(own.contains(&"127.0.0.1".parse().unwrap()), "{own:?}");
        let mut v4 = own.iter().filter(|ip| ip.is_ipv4());
        assert!(v4.all(|ip| std::net::TcpListener::bind((*ip, 0)).is_ok()), "{own:?}");
    }

    #[test]
    fn private_and_tailnet_addresses_are_not_public() {
        for address in [
            "10.1.2.3",
            "192.168.1.1",
            "127.0.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "fd7a:115c:a1e0::1",
            "fe80::1",
            "::1",
        ] {
            assert!(!is_public(&address.parse().unwrap()), "{address}");
        }
        for address in ["203.0.113.7", "100.63.0.1", "100.128.0.1", "2001:db8::1"] {
            assert!(is_public(&address.parse().unwrap()), "{address}");
        }
        let given = Addresses::find(&["10.0.0.1".parse().unwrap()]);
        assert!(given.given && given.public.len() == 1);
    }
}
