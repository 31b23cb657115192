//! What does a setting mean, and which values are allowed: TOML text in, a checked [`Config`] out.
//!
//! It promises that one run names every mistake, each as `FILE:LINE: KEY: what was found; what is allowed`, that no
//! message shows what a `${VARIABLE}` holds, and that a `Config` is complete: defaults are in, no addresses clash.
//! It deliberately does not look at the network, at `state_dir` or at `auth_key_file`: a file can be checked on
//! another machine than the one it is for. A new setting starts in `keys`.

mod clashes;
mod file;
mod keys;
mod listeners;
mod load;
mod mistakes;
mod reader;
mod sections;
mod settings;
mod syntax;
mod values;

pub use keys::{DefaultValue, Description, KEYS};
pub use load::{DEFAULT_PATH, Env, PATH_VARIABLE, admin, config_path};
pub use mistakes::ConfigError;
pub use settings::{
    ADMIN, Config, Limits, Listener, Log, LogFormat, Probe, Tailnet, Timeouts, Upstream, default_admin,
};
pub use values::Takes;

#[cfg(test)]
mod tests;
