//! The process among others: the signals it gets, the supervisor that has started it, where its log goes, and how
//! much memory it may take.
//!
//! Promises: no signal is lost from the first moment on; a log that cannot be written never holds anybody up.
//!
//! Deliberately not here: what is done on a signal, and in which order (see `edge.rs`).

pub mod log;
pub mod memory;
pub mod signals;
pub mod supervisor;
