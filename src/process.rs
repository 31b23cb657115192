//! The process among others: its signals, the supervisor that started it, where its log goes, how much memory
//! it may take.

pub mod log;
pub mod memory;
pub mod signals;
pub mod supervisor;
