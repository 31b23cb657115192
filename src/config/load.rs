//! Where the configuration comes from: a file, its text, or only `--upstream`.
//!
//! Deliberately not here: what the text means (see `sections`).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::mistakes::{ConfigError, Mistakes};
use super::settings::Config;
use super::{file, sections};

/// How settings are looked up in the environment; tests pass a map instead of the process
/// environment.
///
/// A variable whose content is not UTF-8 counts as not set.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The file read when neither `--config` nor `TAILWART_CONFIG` names one.
pub const DEFAULT_PATH: &str = "/etc/tailwart-edge/config.toml";

/// The environment variable that names the configuration file.
pub const PATH_VARIABLE: &str = "TAILWART_CONFIG";

impl Config {
    /// Reads and checks the file at `path`. `upstream` is the value of `--upstream`: it overrides
    /// the file's `upstream.host`, which is then not read.
    pub fn load(path: &Path, upstream: Option<&str>, env: Env) -> Result<Config, ConfigError> {
        read(Some(path), env, |mistakes| sections::config(mistakes, upstream))
    }

    /// Checks the text of a file, as [`Config::load`] does. Its messages have no file name.
    pub fn parse(text: &str, upstream: Option<&str>, env: Env) -> Result<Config, ConfigError> {
        sections::config(Mistakes::new(None, text, env), upstream)
    }

    /// The configuration without a file: everything at its default, and `upstream`, the value of
    /// `--upstream`.
    pub fn without_file(upstream: Option<&str>, env: Env) -> Result<Config, ConfigError> {
        Config::parse("", upstream, env)
    }
}

/// Only `admin.listen`, for the commands that ask a running edge. They need no mailbox, and other mistakes in the
/// file do not matter to them.
pub fn admin(path: Option<&Path>, env: Env) -> Result<Option<SocketAddr>, ConfigError> {
    read(path, env, sections::admin_alone)
}

/// What `understand` makes of the file's text, which is empty without a file.
fn read<T>(
    path: Option<&Path>,
    env: Env,
    understand: impl FnOnce(Mistakes) -> Result<T, ConfigError>,
) -> Result<T, ConfigError> {
    let Some(path) = path else { return understand(Mistakes::new(None, "", env)) };
    let name = path.display().to_string();
    let text = file::read(path).map_err(|problem| ConfigError::unreadable(&name, problem))?;
    understand(Mistakes::new(Some(name), &text, env))
}

/// Which file to read: the one given by `--config`, else `TAILWART_CONFIG`, else [`DEFAULT_PATH`]
/// if something is there. `None` means to run without a file.
pub fn config_path(given: Option<PathBuf>, env: Env) -> Option<PathBuf> {
    config_path_or(given, env, Path::new(DEFAULT_PATH))
}

pub(super) fn config_path_or(given: Option<PathBuf>, env: Env, default: &Path) -> Option<PathBuf> {
    given
        .or_else(|| env(PATH_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from))
        // Only NotFound means that there is no file. A file that cannot be reached must fail in `load`, not be
        // ignored.
        .or_else(|| match default.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            _ => Some(default.to_path_buf()),
        })
}
