//! The process among others: the signals it gets, the supervisor that has started it, where its log goes, and how
//! much memory it may take.
//!
//! Promises: a signal that comes before anybody listens is remembered; a log that cannot be written holds nobody up.
//!
//! Deliberately not here: what is done on a signal, and in which order (see `edge.rs`).

pub mod log;
pub mod memory;
pub mod signals;
pub mod supervisor;
