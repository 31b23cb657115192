//! The program `tailwart-edge`; all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tailwart_edge::program::main()
}
