//! Writes what a package holds and the command line's definition says: a man page for the program
//! and one for each command, and the shells' completions. `make package-files` runs it, so that
//! none of them is kept in the repository, where it could fall behind.
//!
//!     cargo run --example package_files -- DIRECTORY

use std::error::Error;
use std::fs::{self, File};
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use tailwart_edge::cli::Cli;

/// Each shell with the name under which it looks for the completions of a program (Debian's paths
/// are in `Cargo.toml`).
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "tailwart-edge.bash"),
    (Shell::Fish, "tailwart-edge.fish"),
    (Shell::Zsh, "_tailwart-edge"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory] = &arguments[..] else {
        return Err("usage: package_files DIRECTORY".into());
    };
    let directory = Path::new(directory);
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    for (shell, name) in COMPLETIONS {
        let mut file = File::create(directory.join(name))?;
        clap_complete::generate(shell, &mut Cli::command(), "tailwart-edge", &mut file);
    }
    Ok(())
}
