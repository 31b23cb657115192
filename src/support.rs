//! Small things that know nothing of the rest: text, secrets, time, lines that repeat each other, tasks that must
//! live, asking over HTTP.
//!
//! Promise: nothing here names another folder of `src/`.
//!
//! Deliberately not here: what has a single user, which keeps it beside itself.

pub(crate) mod http_client;
pub(crate) mod output;
pub(crate) mod repeats;
pub(crate) mod secret;
pub(crate) mod text;
pub(crate) mod vital;
pub mod wall_clock;
