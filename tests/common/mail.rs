//! The mailbox host: users' mail on disk, and the servers that share it.

use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::cert::Certificate;
use super::dovecot::Dovecot;
use super::postfix::Postfix;
use super::{temp_dir, wait::wait_for};

pub const DOMAIN: &str = "example.test";
pub const PASSWORD: &str = "secret";
/// Every one of them has an address in [`DOMAIN`] and the same password.
pub const USERS: [&str; 3] = ["alice", "bob", "carol"];

/// Users' mail (a Maildir each) and the certificate of their servers. Clones share one directory,
/// removed with the last of them.
#[derive(Clone)]
pub struct MailHome(std::sync::Arc<Inner>);

struct Inner {
    dir: TempDir,
    certificate: Certificate,
    owner: Account,
}

impl MailHome {
    pub fn create() -> MailHome {
        let dir = temp_dir("mail");
        // Mail is owned by a user that nobody is, as both servers refuse to handle it as root.
        let owner = Account::named("nobody");
        for user in USERS {
            // The home is not the Maildir: Dovecot keeps Sieve scripts in the one, mail in the
            // other.
            let home = dir.path().join(user);
            std::fs::create_dir(&home).expect("a home can be made");
            std::fs::set_permissions(&home, Permissions::from_mode(0o700)).expect("its mode can be set");
            owner.own(&home);
        }
        let certificate = Certificate::create(dir.path());
        MailHome(std::sync::Arc::new(Inner { dir, certificate, owner }))
    }

    /// Holds one directory per user, named as the user.
    pub fn path(&self) -> &Path {
        self.0.dir.path()
    }

    pub fn certificate(&self) -> &Certificate {
        &self.0.certificate
    }

    pub fn owner(&self) -> Account {
        self.0.owner
    }

    /// The messages which a user has got, oldest first, read and unread.
    pub fn messages(&self, user: &str) -> Vec<String> {
        let maildir = self.path().join(user).join("Maildir");
        let mut files: Vec<PathBuf> = ["new", "cur"]
            .iter()
            .filter_map(|part| std::fs::read_dir(maildir.join(part)).ok())
            .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
            .collect();
        // Names begin with the time of delivery.
        files.sort_by_key(|file| file.file_name().map(ToOwned::to_owned));
        let bytes = files.iter().filter_map(|file| std::fs::read(file).ok());
        bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
    }

    /// The first message holding `needle`; panics when none came before the deadline.
    #[track_caller]
    pub fn wait_message(&self, user: &str, needle: &str, deadline: Duration) -> String {
        let found = wait_for(deadline, || self.messages(user).into_iter().find(|text| text.contains(needle)));
        found.unwrap_or_else(|| {
            let count = self.messages(user).len();
            panic!("{user} got no message with {needle:?} within {deadline:?}; there are {count} others")
        })
    }
}

/// Postfix and Dovecot on one [`MailHome`]: what stands in for Stalwart.
pub struct MailServer {
    pub home: MailHome,
    pub postfix: Postfix,
    pub dovecot: Dovecot,
}

impl MailServer {
    pub fn start() -> MailServer {
        let home = MailHome::create();
        let postfix = Postfix::start(&home);
        let dovecot = Dovecot::start(&home);
        MailServer { home, postfix, dovecot }
    }

    /// The well-known port of every service, and where it is really listening: what a mailbox node
    /// forwards.
    pub fn forwards(&self) -> Vec<(u16, SocketAddr)> {
        vec![
            (25, self.postfix.smtp),
            (465, self.postfix.submissions),
            (587, self.postfix.submission),
            (110, self.dovecot.pop3),
            (143, self.dovecot.imap),
            (993, self.dovecot.imaps),
            (995, self.dovecot.pop3s),
            (4190, self.dovecot.sieve),
        ]
    }
}

/// User and group ids out of `/etc/passwd`.
#[derive(Clone, Copy)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
}

impl Account {
    pub fn named(name: &str) -> Account {
        let ids = lookup("/etc/passwd", name);
        let (uid, gid) = ids.split_once(':').unwrap_or_else(|| panic!("/etc/passwd: bad entry for {name}"));
        Account { uid: parse_id(uid), gid: parse_id(gid.split(':').next().unwrap_or_default()) }
    }

    /// Gives a file to this account.
    pub fn own(self, path: &Path) {
        let changed = chown(path, Some(self.uid), Some(self.gid));
        changed.unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
    }
}

/// A group's id out of `/etc/group`.
pub fn group_id(name: &str) -> u32 {
    parse_id(lookup("/etc/group", name).split(':').next().unwrap_or_default())
}

/// What follows `name:password:` in an account file.
fn lookup(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"));
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.split_once(':'));
    let (_, rest) = found.unwrap_or_else(|| panic!("{file} has no {name}: run scripts/install-deps"));
    rest.to_owned()
}

fn parse_id(text: &str) -> u32 {
    text.parse().unwrap_or_else(|_| panic!("not an id: {text:?}"))
}
