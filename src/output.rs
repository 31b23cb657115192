//! What a command writes for its user: on standard output what was asked for, on standard error what went
//! wrong.
//!
//! Invariant: a reader that has gone (`tailwart-edge status | head -1`) is no error, and no panic. For that
//! reason nobody else uses `println!` and `eprintln!`; clippy sees to it.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

/// Writes a line on standard output.
pub fn say(line: impl Display) {
    write(format_args!("{line}\n"));
}

/// Writes a text on standard output as it is.
pub fn write(text: impl Display) {
    match write_to(io::stdout().lock(), text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
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
