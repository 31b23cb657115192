//! `tailwart-edge` forwards public mail ports over a tailnet to a private
//! mailbox, byte for byte, with a PROXY protocol header that names the real
//! client. It joins the tailnet itself and decrypts nothing.
//!
//! The modules in reading order: [`edge`] joins the parts; [`listener`]
//! accepts; [`connection`] is one client's life: [`upstream`] dials,
//! [`proxy_header`] writes, [`relay`] moves the bytes, [`answer`] speaks when
//! there is no mailbox that could; [`ledger`] has who is connected, and how it ended
//! ([`end_state`]), and [`repeats`] how often that is told. [`trust`] recognises a mailbox that takes the
//! header for commands, [`probe`] looks whether one is well and [`health`] keeps
//! looking; [`peers`] notices one that is gone. [`tailnet`] is the node and the C
//! boundary, [`membership`] its life. The rest is what an operator touches: [`cli`],
//! [`config`], [`credential`], [`secret`], [`state_dir`], [`limits`], [`sockets`],
//! [`reload`], [`supervisor`], [`drain`], [`admin`], [`overview`], [`metrics`], [`log`],
//! [`status`], [`healthcheck`], [`doctor`], and what several of them need: [`wall_clock`],
//! [`printable`], [`http_client`], [`output`], [`vital`].
//!
//! `ARCHITECTURE.md` has the picture and the invariants.

#![deny(clippy::print_stdout, clippy::print_stderr)] // see `output`

pub mod edge;

pub mod cli;

pub mod admin;

pub mod doctor;

pub mod listener;

pub mod connection;

pub mod upstream;

pub mod tailnet;

pub mod process;

pub mod config;

pub mod protocol;

pub(crate) mod ffi;

pub mod support;

#[cfg(test)]
#[path = "../tests/common/net.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
mod test_net;
