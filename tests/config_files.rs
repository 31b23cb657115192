//! The configuration files in this repository do what they are here for: every sample in `examples/`
//! is accepted without a warning, and every file in `tests/config/invalid/` is refused with exactly
//! the messages in the `.stderr` file next to it. Adding a case is adding its two files.

use std::fs;
use std::path::{Path, PathBuf};

use tailwart_edge::config::{Config, Env, KEYS};

/// The environment the files are read in. `TOKEN` stands for a secret no message may show.
const VARIABLES: [(&str, &str); 4] = [
    ("STALWART_MAGIC_NAME", "stalwart"),
    ("TS_TAILNET", "tail1234.ts.net"),
    ("TOKEN", "s3cret value!"),
    ("EMPTY", ""),
];

fn variable(name: &str) -> Option<String> {
    let found = VARIABLES.iter().find(|(variable, _)| *variable == name);
    found.map(|(_, value)| (*value).to_owned())
}

const ENV: Env = &variable;

/// The `.toml` files in a directory of this repository, which must be at least so many: a loop over
/// no files would pass whatever the program does.
fn toml_files(directory: &str, at_least: usize) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let entries = fs::read_dir(&directory).expect("the directory is part of the repository");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable directory").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    files.sort();
    let (found, place) = (files.len(), directory.display());
    assert!(found >= at_least, "{found} files instead of at least {at_least} in {place}");
    files
}

#[test]
fn every_sample_is_accepted_without_a_warning() {
    for path in toml_files("examples", 5) {
        match Config::load(&path, None, ENV) {
            Ok(config) => assert_eq!(config.warnings, [""; 0], "{}", path.display()),
            Err(error) => panic!("{error}"),
        }
    }
}

/// The sample with every setting, and those that are commented out as well.
fn everything() -> String {
    let text = include_str!("../examples/stalwart.toml");
    let is_key = |line: &str| line.split_once(" = ").is_some_and(|(key, _)| !key.trim().contains(' '));
    let lines = text.lines().map(|line| match line.strip_prefix("# ").filter(|rest| is_key(rest)) {
        Some(setting) => format!("{setting}\n"),
        None => format!("{line}\n"),
    });
    lines.collect()
}

#[test]
fn one_sample_names_every_key_with_its_default() {
    let text = everything();
    Config::parse(&text, None, ENV).unwrap_or_else(|error| panic!("{error}"));
    let table: toml::Table = text.parse().expect("TOML");
    for key in KEYS {
        let (section, name) = key.path.split_once('.').unwrap_or(("", key.path));
        let section = match section {
            "" => Some(&table),
            "listener" => table["listener"][0].as_table(),
            other => table[other].as_table(),
        };
        let found = section.and_then(|section| section.get(name));
        let found = found.unwrap_or_else(|| panic!("examples/stalwart.toml does not name {}", key.path));
        if let Some(value) = key.default_in_toml() {
            let default: toml::Table = format!("it = {value}").parse().expect("TOML");
            assert_eq!(found, &default["it"], "{}", key.path);
        }
    }
}

#[test]
fn every_invalid_file_is_refused_with_its_messages() {
    let mut wrong = Vec::new();
    for path in toml_files("tests/config/invalid", 30) {
        let directory = format!("{}/", path.parent().expect("a file has a directory").display());
        let got = match Config::load(&path, None, ENV) {
            Ok(_) => "accepted".to_owned(),
            Err(error) => error.to_string().replace(&directory, ""),
        };
        let expected = fs::read_to_string(path.with_extension("stderr")).unwrap_or_default();
        if got != expected.trim_end() {
            wrong.push(format!("{}\nexpected:\n{expected}\ngot:\n{got}\n", path.display()));
        }
        assert!(!got.contains("s3cret"), "{} shows a variable's value:\n{got}", path.display());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_expected_message_is_left_without_its_file() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/invalid");
    for entry in fs::read_dir(directory).expect("the directory is part of the repository") {
        let path = entry.expect("a readable directory").path();
        assert!(path.with_extension("toml").exists(), "{} tests nothing", path.display());
    }
}
