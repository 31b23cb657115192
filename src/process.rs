//! How does the process deal with the system around it? Signals, the supervisor that has started it, the log, and
//! the limit on memory.
//!
//! It promises that a signal is not lost if it comes before the handlers are installed, and that a log that nobody
//! reads delays no mail.
//!
//! It deliberately does not decide what is done on a signal, and in which order (see `edge.rs`).

pub mod log;
pub mod memory;
pub mod signals;
pub mod supervisor;
