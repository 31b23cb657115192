//! `tailwart-edge` forwards public mail ports over a tailnet to a private
//! mailbox, byte for byte, with a PROXY protocol header that names the real
//! client. It joins the tailnet itself and decrypts nothing.
//!
//! The modules in reading order, each on a floor of its own or beside one that does not need it: a module uses
//! only those below. `program` runs one command. `edge` starts, reloads and stops the rest; `cli` has the arguments
//! and the commands that ask a running edge; `admin` is what an operator is shown, `doctor` what is wrong with a
//! set-up. A client's way is `listener`, `connection`, `upstream`, [`tailnet`]. `process` is the process among
//! others, [`config`] checked settings, [`protocol`] what is said on the wire, `ffi` the only `unsafe`, `support`
//! small things that know nothing of the rest.
//!
//! `ARCHITECTURE.md` has the picture and the invariants.
//!
//! What another program can use is [`tailnet`], [`config`] and [`protocol`]; `examples/embed.rs` shows it. The other
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
