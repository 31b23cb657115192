//! Real servers, clients and a test tailnet for the end-to-end tests. The demo (`examples/demo`)
//! takes some of these files, and so do a few unit tests.
//!
//! Everything runs on loopback, on ports of its own and in a temporary directory of its own, so
//! that any number of instances run side by side. Whatever is started here is gone when its value
//! is dropped; what a crash or Ctrl-C leaves behind is killed by a watchdog (see [`process`]).
//! Nothing sleeps for a fixed time: every wait is for a condition, with a deadline, and a missed
//! deadline panics with the tail of the log that tells why.
//!
//! [`mail::MailServer`] is the mailbox host (Postfix and Dovecot on one Maildir), [`haproxy`] and
//! [`nginx`] are independent readers of PROXY headers, [`stub`] is a TCP server for exact bytes,
//! [`sink`] one that takes mail, [`memory`] measures, [`prometheus`] and [`chromium`] look at what is shown, [`systemd`] plays the supervisor, [`tailnet`] the control server and the nodes, [`edge`] the program under test; [`client`] and
//! [`tools`] are what talks to it.

// Each program that includes this tree uses a part of it.
#![allow(dead_code)]

pub mod cert;
pub mod chromium;
pub mod client;
pub mod dns;
pub mod dovecot;
pub mod edge;
pub mod haproxy;
pub mod host;
pub mod http;
pub mod hujson;
pub mod log;
pub mod mail;
pub mod memory;
pub mod net;
pub mod netns;
pub mod nginx;
pub mod postfix;
pub mod process;
pub mod prometheus;
pub mod proxy_header;
pub mod sink;
pub mod stub;
pub mod systemd;
pub mod tailnet;
pub mod tools;
pub mod wait;

pub use host::*;
