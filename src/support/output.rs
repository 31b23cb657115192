//! Output of a command: results on standard output, errors on standard error.
//!
//! Invariant: a closed pipe (`tailwart-edge status | head -1`) is no error and no panic; a full disk is an error
//! that scripts can see. So nothing else uses `println!` and `eprintln!`; clippy checks that.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

static IS_INCOMPLETE: AtomicBool = AtomicBool::new(false);

/// Whether a result could not be written, other than to a closed pipe.
pub fn is_incomplete() -> bool {
    IS_INCOMPLETE.load(Ordering::Relaxed)
}

/// Writes a line on standard output.
pub fn say(line: impl Display) {
    write(format_args!("{line}\n"));
}

/// Writes a text on standard output as it is.
pub fn write(text: impl Display) {
    match write_to(io::stdout().lock(), text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            IS_INCOMPLETE.store(true, Ordering::Relaxed);
            complain(format_args!("cannot write to standard output: {error}"));
        }
        _ => {}
    }
}

/// Writes a line on standard error.
pub fn complain(line: impl Display) {
    // If that fails, there is nowhere else to say so.
    let _ = write_to(io::stderr().lock(), format_args!("{line}\n"));
}

fn write_to(mut output: impl Write, text: impl Display) -> io::Result<()> {
    output.write_all(text.to_string().as_bytes())?;
    output.flush()
}
