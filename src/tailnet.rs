//! A tailnet node inside this process, and streams to its peers.
//!
//! It answers: how the edge gets onto the tailnet and stays there, what is known of the node, and how a peer is
//! reached. [`Node`] joins with no help from the host: no `tailscaled`, no TUN, no root. [`TailnetStream`] is a
//! TCP connection on the node's own stack as tokio's `AsyncRead + AsyncWrite`; while idle it costs no descriptor,
//! no thread and no buffer.
//!
//! Promise: nothing here falls back to the host's resolver or network; a name that is not in the tailnet's map is
//! an error.
//!
//! Deliberately not here: which peer is dialled and when (see `upstream.rs`), and calls into C (see `ffi.rs`).

pub mod credential;
mod error;
mod join;
mod lines;
pub(crate) mod membership;
mod node;
mod report;
pub(crate) mod state_dir;
mod status;
mod stream;

pub use crate::ffi::libtailscale::forget_environment;
pub(crate) use crate::ffi::libtailscale::{Code, linked_version, set_log_upload, set_memory};
pub use error::{ConnectError, JoinError};
pub use node::Node;
pub(crate) use report::Figures;
pub use report::{PingReport, Route};
pub use status::NodeStatus;
pub(crate) use status::Trouble;
pub(crate) use stream::TailnetListener;
pub use stream::TailnetStream;
