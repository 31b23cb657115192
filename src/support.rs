//! Small things that know nothing of the rest.

pub mod http_client;
pub mod output;
pub mod repeats;
pub mod secret;
pub mod text;
pub mod vital;
pub mod wall_clock;
