//! The only `unsafe` code: what C and the kernel are told, behind calls that cannot be misused.

pub mod libtailscale;
pub mod process;
