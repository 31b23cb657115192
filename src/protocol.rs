//! What is said on the wire: the PROXY header, and what a server answers that does not trust it.

pub mod header_watch;
pub mod proxy_header;
