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

pub mod listener;

pub mod connection;

pub mod upstream;

pub mod proxy_header;

pub mod relay;

pub mod answer;

pub mod end_state;

pub mod ledger;

pub mod repeats;

pub mod trust;

pub mod probe;

pub mod health;

pub mod peers;

pub mod tailnet;

pub mod membership;
pub mod memory;

pub mod cli;

pub mod config;

pub mod credential;

pub mod secret;

pub mod state_dir;

pub mod limits;

pub mod sockets;

pub mod reload;

pub mod supervisor;

pub mod drain;

pub mod admin;

pub mod overview;

pub mod metrics;

pub mod log;

pub mod status;

pub mod healthcheck;

pub mod doctor;

pub mod wall_clock;

pub mod printable;

pub mod http_client;

pub mod output;

pub mod vital;

#[cfg(test)]
#[path = "../tests/common/net.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
mod test_net;
