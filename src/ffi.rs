//! The only `unsafe` code: what C and the kernel are told, behind calls that cannot be misused.
//!
//! Promises: each block has its reason; handles are closed by drop; the crate denies `unsafe` anywhere else.
//!
//! Deliberately not here: any decision.

pub mod libtailscale;
pub mod process;
