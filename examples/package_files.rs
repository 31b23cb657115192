//! Writes the files of a package that follow from the command line's definition: a man page for the
//! program, one for each command, and the shells' completions. `make package-files` runs it. The files
//! are not kept in the repository, where they could fall behind.
//!
//!     cargo run --example package_files -- DIRECTORY DATE
//!
//! DATE is printed in the man pages. It is an argument, so that the same source gives the same files.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use tailwart_edge::cli::Cli;

const NAME: &str = env!("CARGO_PKG_NAME");

/// Each shell, and the file name under which it looks for a program's completions. `Cargo.toml` has the
/// directories for Debian.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "tailwart-edge.bash"),
    (Shell::Fish, "tailwart-edge.fish"),
    (Shell::Zsh, "_tailwart-edge"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, date] = &arguments[..] else {
        return Err("usage: package_files DIRECTORY DATE".into());
    };
    let directory = Path::new(directory);
    fs::create_dir_all(directory)?;
    let mut program = Cli::command();
    // Gives the commands their full names.
    program.build();
    man_page(&program, date, directory)?;
    for command in program.get_subcommands() {
        man_page(command, date, directory)?;
    }
    for (shell, name) in COMPLETIONS {
        let mut file = File::create(directory.join(name))?;
        clap_complete::generate(shell, &mut Cli::command(), NAME, &mut file);
    }
    Ok(())
}

/// As `Man::render`, except for the text after the help: that would lose its columns.
fn man_page(command: &Command, date: &str, directory: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(NAME);
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .date(date)
        .source(format!("{NAME} {}", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let after = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    sections(&after, &mut page)?;
    if name != NAME {
        writeln!(page, ".SH SEE ALSO\n.BR {NAME} (1)")?;
    }
    fs::write(directory.join(format!("{name}.1")), page)
}

/// Sections of a help text: `Title:` and lines below it whose columns stay as they are.
fn sections(text: &str, page: &mut Vec<u8>) -> io::Result<()> {
    for section in text.split("\n\n").filter(|section| !section.is_empty()) {
        let (title, body) = section.split_once(":\n").filter(|(title, _)| !title.starts_with(' ')).unzip();
        if let Some(title) = title {
            writeln!(page, ".SH {}", title.to_uppercase())?;
        } else {
            writeln!(page, ".PP")?;
        }
        let body = body.unwrap_or(section).replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
        let body: Vec<&str> = body.lines().map(|line| line.strip_prefix("  ").unwrap_or(line)).collect();
        // A dot at the beginning of a line would be a roff command.
        writeln!(page, ".nf\n\\&{}\n.fi", body.join("\n\\&"))?;
    }
    Ok(())
}
