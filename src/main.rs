//! The program `tailwart-edge`. All its code is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tailwart_edge::program::main()
}
