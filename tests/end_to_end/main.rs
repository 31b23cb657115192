//! The built binary on a real tailnet, with real mail servers and clients.
//!
//! One program, so that the Go archive is linked once. Each module is about
//! one promise; what they share is in `tests/common`.

#[path = "../common/mod.rs"]
mod common;

mod admin;
mod clock;
mod control;
mod doctor;
mod drain;
mod end_states;
mod enrolment;
mod failover;
mod faults;
mod half_close;
mod hold;
mod isolation;
mod life;
mod load;
mod log;
mod mail;
mod metrics;
mod oracles;
mod outage;
mod page;
mod probe;
mod reload;
mod restart;
mod setup;
mod several_edges;
mod signals;
mod start;
mod status;
