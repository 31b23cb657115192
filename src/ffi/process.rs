//! What of the process has no safe interface: signal handlers beside the Go runtime, and descriptors that it is
//! started with.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes over those of the descriptors from 3 on, so many of them, that are sockets: what a
/// supervisor hands over (sd_listen_fds(3)). What is none, or was opened by this process, is left
/// alone. The second call gets nothing.
pub fn take_inherited_sockets(count: usize) -> Vec<Option<OwnedFd>> {
    const FIRST: RawFd = 3;
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let count = if TAKEN.swap(true, Ordering::SeqCst) { 0 } else { count };
    let numbers = (FIRST..).take(count);
    let take = |number| {
        let mut kind: c_int = 0;
        let mut size = size_of::<c_int>() as libc::socklen_t;
        // SAFETY: the pointers are to variables of the right size. A number that is not open, or is
        // no socket's, is an error of the call.
        let failed = unsafe {
            libc::getsockopt(number, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut size)
        };
        // SAFETY: no pointers; as above.
        let flags = if failed == 0 { unsafe { libc::fcntl(number, libc::F_GETFD) } } else { -1 };
        // Rust's library and Go's set the flag on all that they open.
        if flags == -1 || flags & libc::FD_CLOEXEC != 0 {
            return None;
        }
        // SAFETY: it is open, and nobody owns it: it was there before this program began, or the
        // flag would be set, and it is taken once.
        Some(unsafe { OwnedFd::from_raw_fd(number) })
    };
    numbers.map(take).collect()
}

/// Whether somebody listens to signals.
static IS_HEARD: AtomicBool = AtomicBool::new(false);

/// Whether a SIGHUP has come, which matters until somebody listens.
static HUNG_UP: AtomicBool = AtomicBool::new(false);

/// What a signal means before anybody listens to it, instead of the kernel's default, which is to kill the
/// process: SIGTERM and SIGINT end it in order, since nothing has begun; SIGHUP is remembered. To be called
/// first; `signals_are_heard` ends it.
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

/// From now on the handlers that were installed since decide. They call those before them, too, which do
/// nothing any more. Returns whether a SIGHUP came before.
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
