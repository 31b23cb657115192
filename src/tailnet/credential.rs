//! The credential that the node may enrol with, and where it comes from.
//!
//! Invariants: secrets stay in `Secret`s; errors name the source of a credential (a variable, a file), never a
//! part of it. [`Sources`] only remembers where to look: a file is read only when its content is needed. So an
//! enrolled node starts without the file, and a node that has to enrol again reads the file's current content.
//! Only regular files are read, since a pipe or a terminal could make the edge wait for ever.
//!
//! Deliberately not here: deciding whether a credential is needed (see `membership.rs`), and
//! making an auth key from the other kinds (libtailscale's `credential.go`).

use std::fmt;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::mem::discriminant;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::config::Env;
use crate::support::secret::{Secret, looks_like_key};

/// How much of a file is read at most; a key has about 60 bytes, an identity token a few thousand.
const MAX_BYTES: u64 = 16 * 1024;

/// The variables that hold a credential or the path of one; the first that is set is used.
pub(crate) const VARIABLES: [&str; 6] =
    ["TS_AUTHKEY", "TS_AUTH_KEY", "TS_AUTHKEY_FILE", "TS_CLIENT_SECRET", "TS_CLIENT_ID", "TS_ID_TOKEN"];

/// The directory where systemd puts credentials of `LoadCredential=` (systemd.exec(5)), and the expected name.
const SYSTEMD_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";
const SYSTEMD_NAME: &str = "ts_authkey";

/// A credential to enrol with.
#[derive(Debug)]
pub struct Credential {
    /// Its kind, and the secret itself.
    pub kind: CredentialKind,
    /// The variable or setting that gave it or named its file.
    pub origin: &'static str,
}

/// The kinds of credential.
#[derive(Debug)]
pub enum CredentialKind {
    /// A key of Tailscale or Headscale that lets a node in.
    AuthKey(Secret),
    /// An OAuth client that may make such keys.
    OAuthClient {
        /// Its id, which Tailscale reads from the secret too.
        id: Option<String>,
        /// `TS_CLIENT_SECRET`.
        secret: Secret,
    },
    /// A workload identity that may make such keys.
    FederatedIdentity {
        /// Its id on the tailnet.
        client_id: String,
        /// The token of its identity provider.
        token: Secret,
    },
}

impl Credential {
    /// A hash, so that a caller can see whether the credential has changed; its source does not count. Do not
    /// store it, as it may differ between builds. Do not log or show it: it would confirm a guessed credential.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        discriminant(&self.kind).hash(&mut hasher);
        match &self.kind {
            CredentialKind::AuthKey(key) => key.expose().hash(&mut hasher),
            CredentialKind::OAuthClient { id, secret } => (id, secret.expose()).hash(&mut hasher),
            CredentialKind::FederatedIdentity { client_id, token } => {
                (client_id, token.expose()).hash(&mut hasher)
            }
        }
        hasher.finish()
    }
}

impl fmt::Display for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            CredentialKind::AuthKey(_) => "auth key",
            CredentialKind::OAuthClient { .. } => "OAuth client",
            CredentialKind::FederatedIdentity { .. } => "workload identity",
        };
        write!(f, "the {kind} from {}", self.origin)
    }
}

/// Why a configured source gave no credential.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file cannot be read.
    #[error(
        "cannot read the credential from {path} (named by {origin}): {error}; \
         check the path and who may read it"
    )]
    Read {
        /// What named the file.
        origin: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        error: std::io::Error,
    },
    /// As [`CredentialError::Read`], but the given path looks like a key, so it is not shown.
    #[error(
        "cannot read the credential from [not shown] (named by {origin}): {error}; \
         this looks like a key, but the path of a file that holds the key is expected"
    )]
    KeyAsPath {
        /// The variable or setting that should name a file.
        origin: &'static str,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The path leads to a directory, a pipe or a device.
    #[error(
        "the credential from {path} (named by {origin}) is not a regular file; \
         name a file that holds the key"
    )]
    NoRegularFile {
        /// What named it.
        origin: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The file is empty.
    #[error("the file {path} (named by {origin}) is empty; put the key into it")]
    Empty {
        /// What named the file.
        origin: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The content is no credential.
    #[error("the credential from {origin} {problem}")]
    Malformed {
        /// The variable or setting that gave the content or named its file.
        origin: &'static str,
        /// What is wrong with it, and what is expected.
        problem: &'static str,
    },
    /// Variables that do not fit together.
    #[error("{0}")]
    Incomplete(&'static str),
}

/// Where a credential may come from.
#[derive(Debug)]
pub struct Sources {
    variables: Vec<(&'static str, Secret)>,
    key_file: Option<PathBuf>,
    systemd: Option<PathBuf>,
}

impl Sources {
    /// Takes copies of the variables, which the caller then removes from the environment;
    /// `key_file` is the configuration's `tailnet.auth_key_file`. A variable that is empty counts as
    /// not set.
    pub fn capture(env: Env, key_file: Option<PathBuf>) -> Sources {
        let given = |name| env(name).map(Secret::new).filter(|value| !trim(value.expose()).is_empty());
        let variables = VARIABLES.into_iter().filter_map(|name| Some((name, given(name)?))).collect();
        let systemd = env(SYSTEMD_DIRECTORY).map(|dir| Path::new(&dir).join(SYSTEMD_NAME));
        Sources { variables, key_file, systemd }
    }

    /// The credential, from the first of these sources that is set:
    ///
    /// 1. an auth key in `TS_AUTHKEY` (or `TS_AUTH_KEY`): the key, or `file:` and the path of a file
    /// 2. in the file that `TS_AUTHKEY_FILE` names
    /// 3. in the file that the configuration names
    /// 4. in the systemd credential `ts_authkey`
    /// 5. an OAuth client in `TS_CLIENT_SECRET`, which may say `file:` too, and `TS_CLIENT_ID`
    /// 6. a workload identity in `TS_CLIENT_ID` and `TS_ID_TOKEN`, both may say `file:`
    ///
    /// An OAuth client's secret in place of an auth key counts as an OAuth client. If the first source is not
    /// usable, that is an error even if a later source is good: the operator meant the first.
    pub fn read(&self) -> Result<Option<Credential>, CredentialError> {
        for origin in ["TS_AUTHKEY", "TS_AUTH_KEY"] {
            if let Some(secret) = self.value_or_file(origin)? {
                return key(secret, origin).map(Some);
            }
        }
        let named = self.variable("TS_AUTHKEY_FILE").map(|path| ("TS_AUTHKEY_FILE", PathBuf::from(path)));
        let configured = self.key_file.clone().map(|path| ("tailnet.auth_key_file", path));
        // If access is denied, the file counts as there, and reading it gives the reason.
        let systemd = self.systemd.clone().filter(|path| path.try_exists().unwrap_or(true));
        let systemd = systemd.map(|path| ("the systemd credential ts_authkey", path));
        if let Some((origin, path)) = named.or(configured).or(systemd) {
            return key(from_file(&path, origin)?, origin).map(Some);
        }
        if let Some(secret) = self.value_or_file("TS_CLIENT_SECRET")? {
            return self.oauth_client(secret).map(Some);
        }
        self.federated_identity()
    }

    fn oauth_client(&self, secret: Secret) -> Result<Credential, CredentialError> {
        let origin = "TS_CLIENT_SECRET";
        let secret = checked(secret, origin, &KEY_PROBLEMS)?;
        refuse_other_purpose(&secret, origin)?;
        if ["tskey-auth-", "hskey-auth-"].iter().any(|prefix| secret.expose().starts_with(prefix)) {
            let problem = "is an auth key, not an OAuth client's secret; set it as TS_AUTHKEY";
            return Err(CredentialError::Malformed { origin, problem });
        }
        let id = self.client_id()?;
        Ok(Credential { kind: CredentialKind::OAuthClient { id, secret }, origin })
    }

    fn federated_identity(&self) -> Result<Option<Credential>, CredentialError> {
        let token = self.value_or_file("TS_ID_TOKEN")?;
        let (client_id, token) = match (self.client_id()?, token) {
            (None, None) => return Ok(None),
            (Some(id), Some(token)) => (id, checked(token, "TS_ID_TOKEN", &TOKEN_PROBLEMS)?),
            (Some(_), None) => {
                return Err(CredentialError::Incomplete(
                    "TS_CLIENT_ID is set alone; set TS_CLIENT_SECRET too for an OAuth client, or TS_ID_TOKEN for a workload identity (no token is fetched for TS_AUDIENCE)",
                ));
            }
            (None, Some(_)) => {
                return Err(CredentialError::Incomplete(
                    "TS_ID_TOKEN is set without TS_CLIENT_ID; set it to the id of the workload identity",
                ));
            }
        };
        Ok(Some(Credential {
            kind: CredentialKind::FederatedIdentity { client_id, token },
            origin: "TS_CLIENT_ID",
        }))
    }

    fn client_id(&self) -> Result<Option<String>, CredentialError> {
        let id = self.value_or_file("TS_CLIENT_ID")?;
        id.map(|id| Ok(checked(id, "TS_CLIENT_ID", &WORD_PROBLEMS)?.expose().to_owned())).transpose()
    }

    fn variable(&self, name: &str) -> Option<&str> {
        let (_, value) = self.variables.iter().find(|(variable, _)| *variable == name)?;
        Some(trim(value.expose()))
    }

    /// A variable's value, or the content of the file that it names with `file:`.
    fn value_or_file(&self, origin: &'static str) -> Result<Option<Secret>, CredentialError> {
        let Some(value) = self.variable(origin) else { return Ok(None) };
        let Some((_, path)) =
            value.split_at_checked(5).filter(|(word, _)| word.eq_ignore_ascii_case("file:"))
        else {
            return Ok(Some(Secret::new(value.to_owned())));
        };
        if trim(path).is_empty() {
            let problem = "has no path after file:; write the path of the file there";
            return Err(CredentialError::Malformed { origin, problem });
        }
        from_file(Path::new(trim(path)), origin).map(Some)
    }
}

/// Removes white space around the text, and invisible characters that editors and web pages leave there: a byte
/// order mark, a zero-width space.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '\u{feff}' | '\u{200b}'))
}

fn from_file(path: &Path, origin: &'static str) -> Result<Secret, CredentialError> {
    let file = open(path, origin)?;
    // Full size from the start: a buffer that grows leaves copies behind that are not cleared.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BYTES as usize + 1));
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| unreadable(path, origin, error))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(CredentialError::Malformed {
            origin,
            problem: "is larger than 16 KiB; a key is one line",
        });
    }
    let text = str::from_utf8(&bytes).map_err(|_| CredentialError::Malformed {
        origin,
        problem: "is not text; a key is one line of text",
    })?;
    if trim(text).is_empty() {
        return Err(CredentialError::Empty { origin, path: path.to_owned() });
    }
    Ok(Secret::new(trim(text).to_owned()))
}

/// Opens a regular file, and never waits: opening a pipe for reading would wait for a writer.
fn open(path: &Path, origin: &'static str) -> Result<File, CredentialError> {
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = opened.map_err(|error| unreadable(path, origin, error))?;
    // Checked on the open file: the path may lead to another file by now.
    match file.metadata().map_err(|error| unreadable(path, origin, error))?.is_file() {
        true => Ok(file),
        false if looks_like_key(&path.to_string_lossy()) => {
            Err(unreadable(path, origin, std::io::Error::other("it is not a regular file")))
        }
        false => Err(CredentialError::NoRegularFile { origin, path: path.to_owned() }),
    }
}

fn unreadable(path: &Path, origin: &'static str, error: std::io::Error) -> CredentialError {
    if looks_like_key(&path.to_string_lossy()) {
        return CredentialError::KeyAsPath { origin, error };
    }
    CredentialError::Read { origin, path: path.to_owned(), error }
}

/// The kind of what was given as an auth key, by its prefix (tailscale.com/kb/1101 and 1215). Headscale's older
/// keys have no prefix.
fn key(secret: Secret, origin: &'static str) -> Result<Credential, CredentialError> {
    let secret = checked(secret, origin, &KEY_PROBLEMS)?;
    refuse_other_purpose(&secret, origin)?;
    let is_client =
        ["tskey-client-", "hskey-client-"].iter().any(|prefix| secret.expose().starts_with(prefix));
    let kind = match is_client {
        true => CredentialKind::OAuthClient { id: None, secret },
        false => CredentialKind::AuthKey(secret),
    };
    Ok(Credential { kind, origin })
}

/// Refuses keys that neither let a node in nor can make keys that do.
fn refuse_other_purpose(secret: &Secret, origin: &'static str) -> Result<(), CredentialError> {
    let others = ["tskey-api-", "tskey-webhook-", "tskey-scim-", "hskey-api-"];
    if !others.iter().any(|prefix| secret.expose().starts_with(prefix)) {
        return Ok(());
    }
    let problem = "lets nobody join: it is a key for another purpose; create an auth key (tskey-auth-...)";
    Err(CredentialError::Malformed { origin, problem })
}

/// A mistake: the test for it, and the text for [`CredentialError::Malformed`]. The control server would only say
/// that the key is invalid.
type Problem = (fn(&str) -> bool, &'static str);

/// A header was pasted too.
const SPACED_WORD: Problem =
    (SPACED.0, "contains white space or control characters; write the value alone, on one line");

/// A header was pasted too, or there are two keys.
const SPACED: Problem = (
    |text| text.contains(|c: char| c.is_whitespace() || c.is_control()),
    "contains white space or control characters; write the key alone, on one line, such as tskey-auth-...",
);

/// `docker run --env-file` keeps quotes; a shell removes them.
const QUOTED: Problem =
    (|text| text.starts_with(['\'', '"']) || text.ends_with(['\'', '"']), "is in quotes; remove the quotes");

/// A credential is a single word; these are not.
const WORD_PROBLEMS: [Problem; 2] = [SPACED_WORD, QUOTED];

/// Mistakes in an identity token.
const TOKEN_PROBLEMS: [Problem; 3] = [
    SPACED_WORD,
    QUOTED,
    (|text| text.starts_with(['/', '.', '~']), "looks like a path; write file: in front of it"),
];

/// Mistakes in a key. Only the first that applies is reported, so the most precise come first.
const KEY_PROBLEMS: [Problem; 6] = [
    SPACED,
    // For example ?ephemeral=false&preauthorized=true, which tailscale accepts there.
    (
        |text| text.contains('?'),
        "contains a ?; remove the ? and everything after it, and set tailnet.ephemeral and tailnet.preauthorized in the configuration instead",
    ),
    QUOTED,
    (|text| text.contains('='), "contains an =; only what follows the = is the key"),
    (
        |text| unsigned(text).contains('/'),
        "looks like a path; write file: in front of it, or set TS_AUTHKEY_FILE; a file has to hold the key itself",
    ),
    (
        |text| {
            let of_key = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
            let of_signature = |c: char| of_key(c) || matches!(c, '+' | '/');
            !unsigned(text).chars().all(of_key) || !text.chars().all(of_signature)
        },
        "contains a character that no key contains; copy the key again",
    ),
];

/// A key without the part that `tailscale lock sign` appends for a tailnet with Tailnet Lock: `--TL`, a signature,
/// `-` and a private key, both in base64, which may contain `+` and `/`.
fn unsigned(text: &str) -> &str {
    text.split_once("--TL").map_or(text, |(key, _)| key)
}

fn checked(secret: Secret, origin: &'static str, problems: &[Problem]) -> Result<Secret, CredentialError> {
    match problems.iter().find(|(applies, _)| applies(secret.expose())) {
        Some(&(_, problem)) => Err(CredentialError::Malformed { origin, problem }),
        None => Ok(secret),
    }
}

#[cfg(test)]
mod tests;
