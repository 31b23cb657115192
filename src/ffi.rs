//! The only `unsafe` code. It answers: how libtailscale and the kernel are called, behind functions that cannot be
//! misused.
//!
//! Promises: each `unsafe` block says why it is sound; dropping a handle closes it; the crate denies `unsafe`
//! anywhere else.
//!
//! Deliberately not here: any decision about the node (see `tailnet.rs`) or about signals (see `process/`).

pub mod libtailscale;
pub mod process;
