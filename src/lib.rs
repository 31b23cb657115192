//! `tailwart-edge` forwards public mail ports over a tailnet to a private
//! mailbox, byte for byte, with a PROXY protocol header that names the real
//! client. It joins the tailnet itself and decrypts nothing.
//!
//! The modules are listed in reading order. A module uses only modules further down, which a test checks.
//! `program` runs one command. `edge` starts, reloads and stops the rest. `cli` has the arguments and the commands
//! that ask a running edge. `admin` shows an operator the state, `doctor` finds what is wrong with a set-up. A
//! client's way is `listener`, `connection`, `upstream`, [`tailnet`]. `process` has signals, supervisor, log and
//! memory. [`config`] has checked settings, [`protocol`] what is sent on the wire. `ffi` has the only `unsafe`,
//! `support` small helpers that know nothing of the rest.
//!
//! `ARCHITECTURE.md` has the picture and the invariants.
//!
//! Another program can use [`tailnet`], [`config`] and [`protocol`]; `examples/embed.rs` shows how. The other
//! public modules are for this package's own program and tests.

#![deny(clippy::print_stdout, clippy::print_stderr)] // see `support::output`

#[doc(hidden)]
pub mod program;

pub(crate) mod edge;

#[doc(hidden)]
pub mod cli;

#[doc(hidden)]
pub mod admin;

pub(crate) mod doctor;

pub(crate) mod listener;

#[doc(hidden)]
pub mod connection;

#[doc(hidden)]
pub mod upstream;

pub mod tailnet;

pub(crate) mod process;

pub mod config;

pub mod protocol;

pub(crate) mod ffi;

#[doc(hidden)]
pub mod support;

#[cfg(test)]
mod test_support;
