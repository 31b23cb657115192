//! Small things that know nothing of the rest: text, secrets, time, lines that repeat each other, tasks that must
//! live, asking over HTTP.
//!
//! Promise: nothing here names another folder of `src/`.
//!
//! Deliberately not here: what has a single user, which keeps it beside itself.

pub mod http_client;
pub mod output;
pub mod repeats;
pub mod secret;
pub mod text;
pub mod vital;
pub mod wall_clock;
