//! The configuration while the edge runs: where a reload reads it, and what has changed.
//!
//! Invariants
//! - A reload uses what was given at the start: the file's path, `--upstream`, and the environment of that
//!   time, without the variables that hold credentials.
//! - Settings are compared, not text: a file that says the same in another way has not changed.
//!
//! Deliberately not here: putting a configuration in force (see `edge/serving.rs`).

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::{Config, ConfigError, Env, Listener, config_path};
use crate::listener::BindError;
use crate::support::text::list;
use crate::tailnet::credential::VARIABLES;

/// How long reading the file may take. Only a network file system is this slow.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// Where the configuration comes from.
#[derive(Clone, Debug)]
pub struct Source {
    path: Option<PathBuf>,
    upstream: Option<String>,
    environment: HashMap<String, String>,
    /// One permit: only one thread reads the file at a time.
    reading: Arc<Semaphore>,
}

/// Why a reload has changed nothing.
#[derive(Debug, Error)]
pub enum ReloadError {
    /// The edge has no configuration file.
    #[error(
        "the edge was started without a configuration file, so there is none to read; restart it to give it one"
    )]
    NoFile,
    /// A pipe was read to its end at the start; now it would look like an empty file.
    #[error(
        "{} is not a regular file, so it cannot be read again; restart the edge with a regular file",
        .0.display()
    )]
    NoRegularFile(PathBuf),
    /// It could not be read in time.
    #[error(
        "the configuration file could not be read within {READ_LIMIT:?}; check the file system that it is on"
    )]
    Slow,
    /// The read before this one has not ended: the file system hangs.
    #[error(
        "the configuration file is still being read for the reload before this one; check the file system that it is on"
    )]
    StillReading,
    /// It has mistakes: all of them, in one line.
    #[error("{}", .0.to_string().lines().collect::<Vec<_>>().join("; "))]
    Config(#[from] ConfigError),
    /// An address that is new cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
}

impl Source {
    /// Keeps what the command line and the environment say now. `variables` are the variables of the process.
    /// A variable that holds a credential, or is not UTF-8, is not kept.
    pub fn capture(
        config: Option<PathBuf>,
        upstream: Option<String>,
        variables: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    ) -> Source {
        let environment: HashMap<String, String> = variables
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| !VARIABLES.contains(&name.as_str()))
            .collect();
        let path = config_path(config, &|name| environment.get(name).cloned());
        Source { path, upstream, environment, reading: Arc::new(Semaphore::new(1)) }
    }

    /// A variable's value at the start. Variables that hold credentials are not known here.
    pub fn variable(&self, name: &str) -> Option<String> {
        self.environment.get(name).cloned()
    }

    /// Whether there is a file to read.
    pub fn has_file(&self) -> bool {
        self.path.is_some()
    }

    /// Reads the configuration. `env` may know more variables than [`Source::variable`] does.
    pub fn load(&self, env: Env) -> Result<Config, ConfigError> {
        match &self.path {
            Some(path) => Config::load(path, self.upstream.as_deref(), env),
            None => Config::without_file(self.upstream.as_deref(), env),
        }
    }

    /// Reads the file again. If the file system hangs, only one thread hangs with it, however often this is called.
    pub async fn load_again(&self) -> Result<Config, ReloadError> {
        let Some(path) = self.path.clone() else { return Err(ReloadError::NoFile) };
        let source = self.clone();
        self.read_with(move || {
            if path.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir()) {
                return Err(ReloadError::NoRegularFile(path));
            }
            Ok(source.load(&|name| source.variable(name))?)
        })
        .await
    }

    async fn read_with(
        &self,
        read: impl FnOnce() -> Result<Config, ReloadError> + Send + 'static,
    ) -> Result<Config, ReloadError> {
        let permit = Arc::clone(&self.reading).try_acquire_owned().map_err(|_| ReloadError::StillReading)?;
        // The thread gives the permit back when it ends, which may be long after the limit.
        let read = tokio::task::spawn_blocking(move || (read(), permit).0);
        match timeout(READ_LIMIT, read).await {
            Ok(Ok(config)) => config,
            _ => Err(ReloadError::Slow),
        }
    }
}

/// What differs between two configurations.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Names of listeners that only the new one has.
    pub added: Vec<String>,
    /// Names of listeners that only the old one has.
    pub removed: Vec<String>,
    /// Names of listeners whose settings differ.
    pub changed: Vec<String>,
    /// Sections and keys that are not a listener's.
    pub settings: Vec<&'static str>,
    /// Keys that are read at the start only.
    pub restart: Vec<&'static str>,
}

impl Changes {
    /// What a reload from `old` to `new` changes.
    pub fn between(old: &Config, new: &Config) -> Changes {
        let names =
            |listeners: &[&Listener]| listeners.iter().map(|listener| listener.name.clone()).collect();
        let find = |config: &'_ Config, name: &str| config.listeners.iter().position(|l| l.name == name);
        let added: Vec<_> = new.listeners.iter().filter(|l| find(old, &l.name).is_none()).collect();
        let removed: Vec<_> = old.listeners.iter().filter(|l| find(new, &l.name).is_none()).collect();
        let is_changed = |l: &&Listener| find(old, &l.name).is_some_and(|at| old.listeners[at] != **l);
        let changed: Vec<_> = new.listeners.iter().filter(is_changed).collect();
        let settings = [
            ("hostname", old.hostname != new.hostname),
            ("timeouts", old.timeouts != new.timeouts),
            ("limits", old.limits != new.limits),
            ("probe", old.probe != new.probe),
            ("log", old.log != new.log),
            ("admin.listen", old.admin != new.admin),
            ("admin.tailnet_port", old.admin_tailnet_port != new.admin_tailnet_port),
        ];
        Changes {
            added: names(&added),
            removed: names(&removed),
            changed: names(&changed),
            settings: differing(&settings),
            restart: kept_until_restart(old, new),
        }
    }

    /// Whether there is nothing that can be put in force now.
    pub fn is_empty(&self) -> bool {
        let Changes { added, removed, changed, settings, restart: _ } = self;
        added.is_empty() && removed.is_empty() && changed.is_empty() && settings.is_empty()
    }

    /// Logs the changes, after they were put in force.
    pub fn tell(&self) {
        for key in &self.restart {
            warn!("{key} has changed and takes effect with the next restart");
        }
        let Changes { added, removed, changed, settings, .. } = self;
        match (self.is_empty(), self.restart.is_empty()) {
            (true, true) => info!("configuration reloaded: nothing has changed"),
            (true, false) => info!("configuration reloaded: nothing else has changed"),
            _ => info!(
                added = list(added),
                removed = list(removed),
                changed = list(changed),
                settings = list(settings),
                "configuration reloaded"
            ),
        }
    }
}

/// The keys of `[tailnet]` that differ. The node is started with them, so they wait for a restart.
fn kept_until_restart(old: &Config, new: &Config) -> Vec<&'static str> {
    let (old, new) = (&old.tailnet, &new.tailnet);
    differing(&[
        ("tailnet.hostname", old.hostname != new.hostname),
        ("tailnet.tags", old.tags != new.tags),
        ("tailnet.state_dir", old.state_dir != new.state_dir),
        ("tailnet.control_url", old.control_url != new.control_url),
        ("tailnet.auth_key_file", old.auth_key_file != new.auth_key_file),
        ("tailnet.join_timeout", old.join_timeout != new.join_timeout),
        ("tailnet.ephemeral", old.ephemeral != new.ephemeral),
        ("tailnet.preauthorized", old.preauthorized != new.preauthorized),
        ("tailnet.log_upload", old.log_upload != new.log_upload),
    ])
}

fn differing(keys: &[(&'static str, bool)]) -> Vec<&'static str> {
    keys.iter().filter(|(_, differs)| *differs).map(|(key, _)| *key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text, Some("stalwart"), &|_| None).unwrap()
    }

    const BASE: &str = "[[listener]]\nprotocol = 'smtp'\n[[listener]]\nprotocol = 'imaps'\n";

    #[test]
    fn what_differs_is_named_and_nothing_else() {
        let (old, none) = (config(BASE), Changes::default());
        assert_eq!(Changes::between(&old, &config(&format!("# the same\n{BASE}"))), none);
        let new = config(
            "hostname = 'mx.example.org'\n[limits]\nhold_max = 7\n[[listener]]\nprotocol = 'smtp'\n\
             idle_timeout = '1m'\n[[listener]]\nprotocol = 'pop3s'\n",
        );
        let expected = Changes {
            added: vec!["pop3s".into()],
            removed: vec!["imaps".into()],
            changed: vec!["smtp".into()],
            settings: vec!["hostname", "limits"],
            restart: vec![],
        };
        assert_eq!(Changes::between(&old, &new), expected);
    }

    #[test]
    fn every_key_of_the_node_waits_for_a_restart() {
        let tailnet = "hostname = 'other'\ntags = ['tag:other']\nstate_dir = '/other'\ncontrol_url = 'https://example.org'\n\
             auth_key_file = '/key'\njoin_timeout = '1m'\npreauthorized = true\nlog_upload = true\n";
        let new = config(&format!("[tailnet]\n{tailnet}ephemeral = true\n{BASE}"));
        let changes = Changes::between(&config(BASE), &new);
        assert!(changes.is_empty(), "{changes:?}");
        let keys = tailnet.lines().filter_map(|line| line.split(' ').next()).chain(["ephemeral"]);
        let mut keys: Vec<String> = keys.map(|key| format!("tailnet.{key}")).collect();
        keys.sort();
        let mut told = changes.restart.clone();
        told.sort_unstable();
        assert_eq!(told, keys);
    }

    #[test]
    fn the_environment_of_the_start_is_kept_without_credentials() {
        let variables =
            [("NAME", "smtp.example.org"), ("TS_AUTHKEY", "tskey-auth-1"), ("TS_CLIENT_SECRET", "s")];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        let source = Source::capture(Some("/nowhere.toml".into()), None, variables.into_iter());
        assert_eq!(source.environment.keys().collect::<Vec<_>>(), ["NAME"]);
        assert!(!format!("{source:?}").contains("tskey"));
    }

    #[tokio::test]
    async fn a_pipe_is_not_read_a_second_time() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let source = Source::capture(Some(path), Some("mailbox".into()), [].into_iter());
        let problem = source.load_again().await.unwrap_err();
        assert!(matches!(problem, ReloadError::NoRegularFile(_)), "{problem}");
    }

    #[tokio::test]
    async fn a_file_system_that_hangs_costs_one_thread() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "").unwrap();
        let source = Source::capture(Some(path.clone()), Some("mailbox".into()), [].into_iter());
        let (release, hangs) = std::sync::mpsc::channel::<()>();
        let hanging = source.read_with(move || {
            let _ = hangs.recv();
            Err(ReloadError::NoFile)
        });
        timeout(Duration::from_millis(10), hanging).await.unwrap_err();
        for _ in 0..3 {
            let problem = source.load_again().await.unwrap_err();
            assert!(matches!(problem, ReloadError::StillReading), "{problem}");
        }
        drop(release);
        while let Err(ReloadError::StillReading) = source.load_again().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        source.load_again().await.unwrap();
    }

    #[tokio::test]
    async fn the_file_is_read_with_what_was_given_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "hostname = '${NAME}'\n").unwrap();
        let variables = [("NAME".into(), "mx.example.org".into())].into_iter();
        let source = Source::capture(Some(path.clone()), Some("mailbox".into()), variables);
        let config = source.load_again().await.unwrap();
        assert_eq!(config.hostname.as_deref(), Some("mx.example.org"));
        assert_eq!(config.listeners[0].upstream.hosts, ["mailbox"]);
        std::fs::write(&path, "hostname = 1\nhostnam = 2\n").unwrap();
        let problem = source.load_again().await.unwrap_err().to_string();
        assert!(problem.contains(":1: hostname: ") && problem.contains(":2: hostnam: "), "{problem}");
        assert!(!problem.contains('\n'), "one line: {problem}");
    }
}
