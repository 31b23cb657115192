//! The C boundary: `tailscale.h` as owned handles and typed failures. It decides nothing; `tailnet.rs` does.
//!
//! Invariants
//! - A [`Conn`] or [`Listener`] closes its handle before its wakers are freed, and
//!   closing returns only when no wake is in progress, so a wake never sees freed
//!   memory.
//! - Calls on one connection or listener never overlap: they all take `&mut self`.
//! - No lock is held across a call into Go: a wake may come during the call,
//!   on the calling thread.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::net::IpAddr;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Once};
use std::task::{Context, Poll};
use std::time::Duration;

use atomic_waker::AtomicWaker;
use zeroize::Zeroizing;

#[allow(missing_docs, dead_code, non_upper_case_globals, non_camel_case_types)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/tailscale.rs"));
}
use bindings::*;

/// Why a call into libtailscale failed; the meaning of each is in
/// `tailscale.h`.
#[allow(missing_docs)] // tailscale.h explains them
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    Error,
    WouldBlock,
    BadHandle,
    BadArgument,
    BadState,
    Panic,
    NotRunning,
    NoSuchPeer,
    IsSelf,
    Refused,
    TimedOut,
    Reset,
    Closed,
    NoPorts,
    Unreachable,
    Denied,
    ShieldsUp,
    NeedsLogin,
    AuthRefused,
    NeedsApproval,
    ControlUnreachable,
    UpTimedOut,
    Cancelled,
    TagsRefused,
    NeedsLogUpload,
    ClockWrong,
    BadStateFile,
    BadCredential,
    UpgradeBlocked,
    OtherControl,
    KeyExpired,
}

impl Code {
    /// `None` for zero and positive numbers, which are successes.
    fn of(number: i64) -> Option<Code> {
        if number >= 0 {
            return None;
        }
        Some(match i32::try_from(number).unwrap_or(TAILSCALE_ERROR) {
            TAILSCALE_WOULD_BLOCK => Code::WouldBlock,
            TAILSCALE_BAD_HANDLE => Code::BadHandle,
            TAILSCALE_BAD_ARGUMENT => Code::BadArgument,
            TAILSCALE_BAD_STATE => Code::BadState,
            TAILSCALE_PANIC => Code::Panic,
            TAILSCALE_NOT_RUNNING => Code::NotRunning,
            TAILSCALE_NO_SUCH_PEER => Code::NoSuchPeer,
            TAILSCALE_IS_SELF => Code::IsSelf,
            TAILSCALE_REFUSED => Code::Refused,
            TAILSCALE_TIMED_OUT => Code::TimedOut,
            TAILSCALE_RESET => Code::Reset,
            TAILSCALE_CLOSED => Code::Closed,
            TAILSCALE_NO_PORTS => Code::NoPorts,
            TAILSCALE_UNREACHABLE => Code::Unreachable,
            TAILSCALE_DENIED => Code::Denied,
            TAILSCALE_SHIELDS_UP => Code::ShieldsUp,
            TAILSCALE_NEEDS_LOGIN => Code::NeedsLogin,
            TAILSCALE_AUTH_REFUSED => Code::AuthRefused,
            TAILSCALE_NEEDS_APPROVAL => Code::NeedsApproval,
            TAILSCALE_CONTROL_UNREACHABLE => Code::ControlUnreachable,
            TAILSCALE_UP_TIMED_OUT => Code::UpTimedOut,
            TAILSCALE_CANCELLED => Code::Cancelled,
            TAILSCALE_TAGS_REFUSED => Code::TagsRefused,
            TAILSCALE_NEEDS_LOG_UPLOAD => Code::NeedsLogUpload,
            TAILSCALE_CLOCK_WRONG => Code::ClockWrong,
            TAILSCALE_BAD_STATE_FILE => Code::BadStateFile,
            TAILSCALE_BAD_CREDENTIAL => Code::BadCredential,
            TAILSCALE_UPGRADE_BLOCKED => Code::UpgradeBlocked,
            TAILSCALE_OTHER_CONTROL => Code::OtherControl,
            TAILSCALE_KEY_EXPIRED => Code::KeyExpired,
            _ => Code::Error,
        })
    }
}

impl From<Code> for io::Error {
    fn from(code: Code) -> io::Error {
        let kind = match code {
            Code::Reset => io::ErrorKind::ConnectionReset,
            Code::TimedOut => io::ErrorKind::TimedOut,
            Code::Closed => io::ErrorKind::BrokenPipe,
            Code::Refused => io::ErrorKind::ConnectionRefused,
            Code::NotRunning => io::ErrorKind::NetworkDown,
            Code::Unreachable => io::ErrorKind::HostUnreachable,
            _ => return io::Error::other(format!("tailnet connection failed ({code:?})")),
        };
        io::Error::from(kind)
    }
}

/// Removes the variables from which tsnet would take credentials by itself,
/// from this process's environment, from the memory that `/proc/PID/environ`
/// shows, and from the copy that Go made at load.
///
/// Call it once at the start of `main`, after the variables were read and
/// before any thread of our own exists: it uses `unsetenv(3)`, which must not
/// run beside a reader of the environment.
pub fn forget_environment() {
    // SAFETY: no arguments; the caller keeps to the rule on threads above, and
    // Go's own threads read its copy of the environment only.
    unsafe { tailscale_forget_environment() }
}

/// Bounds what the library holds, in bytes: in flight on all connections, and Go's heap.
pub fn set_memory(in_flight: u64, heap: u64) {
    let bytes = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
    // SAFETY: no pointers.
    unsafe { tailscale_set_memory(bytes(in_flight), bytes(heap)) }
}

/// Whether the nodes of this process upload Tailscale's own logs to Tailscale; the default is not
/// to. To be called when [`forget_environment`] may be, and before the first node starts.
pub fn set_log_upload(on: bool) {
    // SAFETY: no pointers; the caller keeps to the rule on threads.
    unsafe { tailscale_set_log_upload(on.into()) }
}

/// The version of Tailscale that is linked in, such as `1.104.5`.
pub fn linked_version() -> &'static str {
    // SAFETY: the header promises a static NUL-terminated string.
    let version = unsafe { CStr::from_ptr(tailscale_version()) };
    version.to_str().unwrap_or("unknown")
}

/// Buffer size for a node's state: a few hundred bytes, and as much again for each tag and each health warning.
const STATUS_BYTES: usize = 64 * 1024;

/// A node; it has to be closed explicitly, because closing waits for the peers.
#[derive(Debug)]
pub struct NodeHandle(c_int);

/// A text setting. Parts of a credential may be set at any time, the others only before the start.
#[derive(Clone, Copy, Debug)]
pub enum Setting {
    /// The directory of the node's identity.
    Dir,
    /// The name asked for on the tailnet.
    Hostname,
    /// The control server's URL.
    ControlUrl,
    /// Comma-separated tags.
    Tags,
    /// Of a credential: the auth key, given to the control server when it demands a login.
    AuthKey,
    /// Of a credential: the id of an OAuth client or a federated identity.
    ClientId,
    /// Of a credential: the secret of an OAuth client.
    ClientSecret,
    /// Of a credential: the token of a federated identity.
    IdToken,
}

/// What a descriptor is for that the node writes lines to, from the start to the close.
#[derive(Clone, Copy, Debug)]
pub enum LineSink {
    /// Tailscale's own log; lines are dropped while the pipe is full.
    Log,
    /// The node's state as JSON; lines wait for room.
    Events,
}

impl NodeHandle {
    /// A node that is not started.
    pub fn new() -> NodeHandle {
        static WAKE: Once = Once::new();
        // SAFETY: `wake` keeps to the header's rules for the wake function and
        // lives as long as the process; it is set before any connection.
        WAKE.call_once(|| unsafe { tailscale_set_wake(Some(wake)) });
        // SAFETY: no arguments.
        NodeHandle(unsafe { tailscale_new() })
    }

    /// Changes a setting. A NUL inside the value is a bad argument.
    pub fn set(&self, setting: Setting, value: &str) -> Result<(), Code> {
        // It may be a secret, so our copy is cleared; the library keeps one until it is replaced.
        let value = Zeroizing::new(CString::new(value).map_err(|_| Code::BadArgument)?);
        let set = match setting {
            Setting::Dir => tailscale_set_dir,
            Setting::Hostname => tailscale_set_hostname,
            Setting::ControlUrl => tailscale_set_control_url,
            Setting::Tags => tailscale_set_tags,
            Setting::AuthKey => tailscale_set_authkey,
            Setting::ClientId => tailscale_set_client_id,
            Setting::ClientSecret => tailscale_set_client_secret,
            Setting::IdToken => tailscale_set_id_token,
        };
        // SAFETY: the string outlives the call, which copies it.
        check(unsafe { set(self.0, value.as_ptr()) })
    }

    /// Whether the identity is in memory only and ends with the node; only before the start.
    pub fn set_ephemeral(&self, on: bool) -> Result<(), Code> {
        // SAFETY: no pointers.
        check(unsafe { tailscale_set_ephemeral(self.0, on.into()) })
    }

    /// Whether nodes with keys made for an OAuth client need no device approval.
    pub fn set_preauthorized(&self, on: bool) -> Result<(), Code> {
        // SAFETY: no pointers.
        check(unsafe { tailscale_set_preauthorized(self.0, on.into()) })
    }

    /// Gives the node a descriptor to write lines to; the library closes it, also when it refuses it.
    pub fn set_sink(&self, sink: LineSink, fd: OwnedFd) -> Result<(), Code> {
        let fd = fd.into_raw_fd();
        // SAFETY: the descriptor is open and ownership passes to the library.
        check(unsafe {
            match sink {
                LineSink::Log => tailscale_set_logfd(self.0, fd),
                LineSink::Events => tailscale_set_eventfd(self.0, fd),
            }
        })
    }

    /// Starts the node without waiting for the tailnet. Blocks for tens of
    /// milliseconds.
    pub fn start(&self) -> Result<(), Code> {
        // SAFETY: no pointers.
        check(unsafe { tailscale_start(self.0) })
    }

    /// Joins the tailnet; blocks until it is done, refused, closed, or `limit`
    /// passed.
    pub fn up(&self, limit: Duration) -> Result<(), Code> {
        let limit = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX).max(1); // 0 is for ever
        // SAFETY: no pointers.
        check(unsafe { tailscale_set_up_timeout(self.0, limit) })?;
        // SAFETY: no pointers.
        check(unsafe { tailscale_up(self.0) })
    }

    /// Whether `up` waits for a person to log the node in.
    pub fn set_interactive(&self, on: bool) -> Result<(), Code> {
        // SAFETY: no pointers.
        check(unsafe { tailscale_set_interactive(self.0, on.into()) })
    }

    /// The state as it is now, in JSON.
    pub fn status(&self) -> Result<String, Code> {
        let mut buffer = vec![0 as c_char; STATUS_BYTES];
        // SAFETY: the buffer is writable for the length given.
        check(unsafe { tailscale_status(self.0, buffer.as_mut_ptr(), buffer.len()) })?;
        Ok(text_in(&buffer))
    }

    /// The text of the last failure.
    pub fn error_message(&self) -> String {
        let mut buffer = [0 as c_char; 4096];
        // SAFETY: the buffer is writable for the length given; the result is
        // NUL-terminated also when it was cut.
        unsafe { tailscale_errmsg(self.0, buffer.as_mut_ptr(), buffer.len()) };
        text_in(&buffer)
    }

    /// Pings a peer below TCP; blocks for up to `limit`. The report is JSON, and is given also when the peer did
    /// not answer (`Code::TimedOut`).
    pub fn ping(&self, host: &str, limit: Duration) -> Result<String, Code> {
        let host = CString::new(host).map_err(|_| Code::BadArgument)?;
        let limit = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let mut buffer = [0 as c_char; 1024];
        // SAFETY: the string outlives the call; the buffer is writable for the
        // length given.
        let outcome =
            unsafe { tailscale_ping(self.0, host.as_ptr(), limit, buffer.as_mut_ptr(), buffer.len()) };
        match Code::of(outcome.into()) {
            None | Some(Code::TimedOut) => Ok(text_in(&buffer)),
            Some(code) => Err(code),
        }
    }

    /// Resets every connection to a peer's address.
    pub fn abort_peer(&self, ip: IpAddr) -> Result<(), Code> {
        let ip = CString::new(ip.to_string()).map_err(|_| Code::BadArgument)?;
        // SAFETY: the string outlives the call.
        check(unsafe { tailscale_abort_peer(self.0, ip.as_ptr()) })
    }

    /// Begins to connect; see [`Conn::poll_connected`].
    pub fn open(&self, host: &str, port: u16) -> Result<Conn, Code> {
        let host = CString::new(host).map_err(|_| Code::BadArgument)?;
        let wakers = Arc::new(Wakers::default());
        let token = Arc::as_ptr(&wakers).expose_provenance();
        let mut handle = 0;
        // SAFETY: the string outlives the call and `handle` is writable. The
        // token stays valid until the handle is closed, because `Conn` keeps
        // the wakers and closes first; on failure no handle and no wake exist.
        check(unsafe { tailscale_conn_open(self.0, host.as_ptr(), port, token, &mut handle) })?;
        Ok(Conn { handle, wakers })
    }

    /// The resources that the library uses now, in JSON.
    pub fn figures(&self) -> Result<String, Code> {
        let mut buffer = [0 as c_char; 1024];
        // SAFETY: the buffer is writable for the length given.
        check(unsafe { tailscale_figures(self.0, buffer.as_mut_ptr(), buffer.len()) })?;
        Ok(text_in(&buffer))
    }

    /// Takes connections from peers to a port; see [`Listener::poll_accept`].
    pub fn listen(&self, port: u16, backlog: u16) -> Result<Listener, Code> {
        let wakers = Arc::new(Wakers::default());
        let token = Arc::as_ptr(&wakers).expose_provenance();
        let mut handle = 0;
        // SAFETY: `handle` is writable. The token stays valid until the handle is closed, as in
        // `open`.
        check(unsafe { tailscale_listen(self.0, port, backlog.into(), token, &mut handle) })?;
        Ok(Listener { handle, wakers })
    }

    /// Stops the node. Blocks for up to several seconds: it waits for the peers to acknowledge what was sent.
    /// Closing again does nothing. Fails if an ephemeral node is closed but could not be removed from the tailnet.
    pub fn close(&self) -> Result<(), Code> {
        // SAFETY: no pointers; a stale handle is answered with an error.
        check(unsafe { tailscale_close(self.0) }).or_else(|code| match code {
            Code::BadHandle => Ok(()), // closed already
            code => Err(code),
        })
    }
}

fn check(outcome: c_int) -> Result<(), Code> {
    Code::of(outcome.into()).map_or(Ok(()), Err)
}

/// The text up to the first NUL.
fn text_in(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The tasks that wait for a connection or listener to become ready.
#[derive(Debug, Default)]
struct Wakers {
    read: AtomicWaker,
    write: AtomicWaker,
}

/// Called by the network stack, under its locks and from any thread. It may only wake tasks.
extern "C" fn wake(token: usize, ready: u32) {
    // SAFETY: the token is the address of the `Wakers` that the handle's
    // `Conn` or `Listener` owns and frees only after closing the handle, which waits
    // for this call to return.
    let wakers = unsafe { &*std::ptr::with_exposed_provenance::<Wakers>(token) };
    if ready & TAILSCALE_READABLE != 0 {
        wakers.read.wake();
    }
    if ready & TAILSCALE_WRITABLE != 0 {
        wakers.write.wake();
    }
}

/// A port that takes connections. Dropping it closes the port and resets the connections that were not accepted.
#[derive(Debug)]
pub struct Listener {
    handle: tailscale_listener,
    wakers: Arc<Wakers>,
}

impl Listener {
    /// Ready with the next connection, or with an error once the node is closed.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Result<Conn, Code>> {
        self.wakers.read.register(cx.waker()); // before asking, as in `Conn`
        let wakers = Arc::new(Wakers::default());
        let token = Arc::as_ptr(&wakers).expose_provenance();
        let mut handle = 0;
        // SAFETY: `handle` is writable; the token as in `NodeHandle::open`.
        ready(unsafe { tailscale_accept(self.handle, token, &mut handle) }.into())
            .map_ok(|_| Conn { handle, wakers })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: no pointers; when it returns no wake uses the token any more, as for `Conn`.
        unsafe { tailscale_listener_close(self.handle) };
    }
}

/// One connection. Dropping it closes it: what was written is still delivered
/// and followed by a FIN, unless received bytes were left unread.
#[derive(Debug)]
pub struct Conn {
    handle: tailscale_conn,
    wakers: Arc<Wakers>,
}

impl Conn {
    /// Ready once the connection is made or has failed.
    pub fn poll_connected(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Code>> {
        // Registered before asking, so that no wake falls in between; the same
        // in `poll_read` and `poll_write`.
        self.wakers.write.register(cx.waker());
        // SAFETY: no pointers.
        ready(unsafe { tailscale_conn_state(self.handle) }.into()).map_ok(|_| ())
    }

    /// Reads into `buffer`; zero is the peer's end of stream.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Result<usize, Code>> {
        self.wakers.read.register(cx.waker());
        // SAFETY: the buffer is writable for the length given and not kept.
        ready(unsafe { tailscale_conn_read(self.handle, buffer.as_mut_ptr().cast(), buffer.len()) } as i64)
    }

    /// Writes some of `bytes`.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Code>> {
        self.wakers.write.register(cx.waker());
        // SAFETY: the bytes are readable for the length given and not kept.
        ready(unsafe { tailscale_conn_write(self.handle, bytes.as_ptr().cast(), bytes.len()) } as i64)
    }

    /// Ends the writing side.
    pub fn shutdown(&mut self) -> Result<(), Code> {
        // SAFETY: no pointers.
        check(unsafe { tailscale_conn_shutdown(self.handle) })
    }

    /// Resets the connection.
    pub fn abort(&mut self) {
        // SAFETY: no pointers.
        unsafe { tailscale_conn_abort(self.handle) };
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        // SAFETY: no pointers; when it returns no wake uses the token any more,
        // so the wakers, dropped after this, may go.
        unsafe { tailscale_conn_close(self.handle) };
    }
}

/// The number of connections whose handle is not closed; for leak checks.
pub fn open_connections() -> usize {
    // SAFETY: no arguments.
    usize::try_from(unsafe { tailscale_conn_count() }).unwrap_or(0)
}

fn ready(outcome: i64) -> Poll<Result<usize, Code>> {
    match Code::of(outcome) {
        // Not negative, since `Code::of` said so.
        None => Poll::Ready(Ok(outcome as usize)),
        Some(Code::WouldBlock) => Poll::Pending,
        Some(code) => Poll::Ready(Err(code)),
    }
}
