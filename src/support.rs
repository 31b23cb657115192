//! Small tools that know nothing of the rest of the edge: text for printing, secrets, the wall clock, limits on
//! similar log lines, tasks that must not end, a small HTTP client.
//!
//! Promise: nothing here uses another folder of `src/`.
//!
//! Deliberately not here: a tool with a single user; it is kept beside that user.

pub(crate) mod http_client;
pub(crate) mod output;
pub(crate) mod repeats;
pub(crate) mod secret;
pub(crate) mod text;
pub(crate) mod vital;
pub mod wall_clock;
