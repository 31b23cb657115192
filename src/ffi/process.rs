//! Parts of the process without a safe interface: signal handlers beside the Go runtime, and inherited
//! descriptors.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes over the sockets among the `count` descriptors from 3 on, which a supervisor hands over
/// (sd_listen_fds(3)). A descriptor that is no socket, or was opened by this process, is left alone. A second call
/// gets nothing.
pub fn take_inherited_sockets(count: usize) -> Vec<Option<OwnedFd>> {
    const FIRST: RawFd = 3;
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let count = if TAKEN.swap(true, Ordering::SeqCst) { 0 } else { count };
    let numbers = (FIRST..).take(count);
    let take = |number| {
        let mut kind: c_int = 0;
        let mut size = size_of::<c_int>() as libc::socklen_t;
        // SAFETY: the pointers are to variables of the right size. For a descriptor that is not open or no socket,
        // the call only fails.
        let failed = unsafe {
            libc::getsockopt(number, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut size)
        };
        // SAFETY: no pointers; as above.
        let flags = if failed == 0 { unsafe { libc::fcntl(number, libc::F_GETFD) } } else { -1 };
        // Rust's and Go's libraries set the flag on every descriptor that they open.
        if flags == -1 || flags & libc::FD_CLOEXEC != 0 {
            return None;
        }
        // SAFETY: it is open, and nobody owns it: it was there before this program began, or the
        // flag would be set, and it is taken once.
        Some(unsafe { OwnedFd::from_raw_fd(number) })
    };
    numbers.map(take).collect()
}

/// Whether the edge listens to signals.
static IS_HEARD: AtomicBool = AtomicBool::new(false);

/// Whether a SIGHUP has come before the edge listens.
static HUNG_UP: AtomicBool = AtomicBool::new(false);

/// Handles signals until the edge listens to them; the kernel's default would kill the process. SIGTERM and SIGINT
/// exit with 0, since nothing has begun; SIGHUP is remembered. Call it first; `signals_are_heard` ends it.
pub fn expect_signals() -> io::Result<()> {
    extern "C" fn remember(_: c_int) {
        HUNG_UP.store(true, Ordering::SeqCst);
    }
    extern "C" fn stop(_: c_int) {
        if !IS_HEARD.load(Ordering::SeqCst) {
            // SAFETY: it may be called in a signal handler, and does not return.
            unsafe { libc::_exit(0) }
        }
    }
    let (stop, remember): (extern "C" fn(c_int), extern "C" fn(c_int)) = (stop, remember);
    for (signal, handler) in [(libc::SIGTERM, stop), (libc::SIGINT, stop), (libc::SIGHUP, remember)] {
        // SAFETY: `action` is a plain C struct for which zero is a valid value: no flags, an empty mask.
        // The handlers do nothing but what a handler may, and the alternate stack is Go's where there is
        // one.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
            if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// From now on only the handlers that were installed later act. They also call the handlers of `expect_signals`,
/// which now do nothing. Returns whether a SIGHUP came before.
pub fn signals_are_heard() -> bool {
    IS_HEARD.store(true, Ordering::SeqCst);
    HUNG_UP.load(Ordering::SeqCst)
}

/// Makes the installed handler of a signal run on the alternate stack.
///
/// In a process with a Go runtime a signal may arrive on a Go thread, whose
/// goroutine stack is far too small for a handler (package os/signal, "Go
/// programs that use cgo"); tokio installs its handlers without SA_ONSTACK.
/// Call it after installing the handler.
pub fn run_on_alternate_stack(signal: c_int) -> io::Result<()> {
    // SAFETY: `action` is a plain C struct for which zero is a valid value, and
    // is fully written by the first call before the second reads it. The
    // handler itself does not change.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &mut action) != 0 {
            return Err(io::Error::last_os_error());
        }
        action.sa_flags |= libc::SA_ONSTACK;
        if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
