//! What does a setting mean, and which values are allowed? TOML text goes in, a checked [`Config`] comes out.
//!
//! It promises that one run names every mistake, each as `FILE:LINE: KEY: what was found; what is allowed`, that no
//! message shows the value of a `${VARIABLE}`, and that a `Config` is complete: defaults are filled in, and no
//! addresses clash.
//!
//! It deliberately does not look at the network, at `state_dir` or at `auth_key_file`: a file can be checked on
//! another machine than the one it is for. To add a setting, start in `keys`.

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

#[doc(hidden)] // for the book, and the tests of it
pub use keys::{DefaultValue, Description, KEYS};
pub use load::{DEFAULT_PATH, Env, PATH_VARIABLE, admin, config_path};
pub use mistakes::ConfigError;
pub use settings::{
    ADMIN, Config, Limits, Listener, Log, LogFormat, Probe, Tailnet, Timeouts, Upstream, default_admin,
};
#[doc(hidden)]
pub use values::Takes;

#[cfg(test)]
mod tests;
