//! The pages that are made from the code: `make reference` writes them, and these tests compare.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use clap::CommandFactory;
use tailwart_edge::cli::Cli;
use tailwart_edge::config::{Config, DefaultValue, Description, KEYS};
use tailwart_edge::protocol::Protocol;

use crate::common::repo_root;
use crate::pages::BOOK;

/// Set by `make reference`.
const WRITE: &str = "TAILWART_WRITE_REFERENCE";

/// What the tables of the file are for, in the order of the page.
const TABLES: &[(&str, &str)] = &[
    ("", "These stand before the first table."),
    ("tailnet", "The node that the edge becomes."),
    ("upstream", "The mailbox of every listener that does not name its own."),
    (
        "listener",
        "One `[[listener]]` for each port. Without any, five are served: smtp 25, submissions 465, submission 587, imaps 993 and sieve 4190. If the file has at least one, only those in the file are served.",
    ),
    ("timeouts", "How long things may take."),
    ("limits", "How many connections the edge accepts, and how much memory it uses."),
    ("probe", "How the mailbox is watched."),
    ("log", "What is logged, to standard error, and how."),
    ("admin", "Health, state and metrics over HTTP; see [HTTP endpoints](http.md)."),
];

const HEAD: &str = "\
The configuration is a TOML file: the one that `--config` names, else the one that `TAILWART_CONFIG` names,
else `/etc/tailwart-edge/config.toml` if it exists. Without any, `run --upstream HOST` works too.

- `tailwart-edge check` names every mistake at once, each with its line. If the file is not TOML, it names
  only the lines that are not TOML.
- An unknown key is a mistake.
- Strings may hold variables: `${NAME}` is replaced by the environment variable, `$$` stands for one
  `$`. A variable that is not set, or empty, is a mistake.
- Durations are strings with a unit: `\"500ms\"`, `\"30s\"`, `\"35m\"`, `\"1h\"`.
- The file may have at most 64 KiB.
";

fn configuration() -> String {
    let mut page = format!("# Configuration\n\n{}\n{HEAD}", made_by("src/config/keys.rs"));
    for (table, about) in TABLES {
        let title = match *table {
            "" => "Before the tables".to_owned(),
            "listener" => "`[[listener]]`".to_owned(),
            table => format!("`[{table}]`"),
        };
        let _ = write!(page, "\n## {title}\n\n{about}\n");
        KEYS.iter().filter(|key| table_of(key) == *table).for_each(|key| page.push_str(&entry(key)));
        if *table == "listener" {
            page.push_str(&protocols());
        }
    }
    let _ = write!(
        page,
        "\n## Everything in one file\n\nFor a Stalwart mailbox, with all defaults written out:\n\n```toml\n{{{{#include ../../../examples/stalwart.toml}}}}\n```\n"
    );
    page
}

fn table_of(key: &Description) -> &'static str {
    key.path.split_once('.').map_or("", |(table, _)| table)
}

fn entry(key: &Description) -> String {
    let name = key.path.rsplit('.').next().unwrap_or_default();
    let default = match key.default {
        DefaultValue::Required => "none, it is required".to_owned(),
        DefaultValue::Is(_) => format!("`{}`", key.default_in_toml().expect("it is a value")),
        DefaultValue::Words(words) => words.to_owned(),
    };
    let Description { path, takes, about, .. } = key;
    format!("\n### `{path}`\n\n{about}\n\n- `{name}` takes {takes}.\n- Default: {default}.\n")
}

/// What follows from a listener's protocol, as a file with nothing else would have it.
fn protocols() -> String {
    let mut table = "\n### What follows from the protocol\n\n\
        | protocol | port | speaks first | idle time-out | held |\n|---|--:|---|--:|--:|\n"
        .to_owned();
    for protocol in Protocol::ALL {
        let listener = format!(
            "[[listener]]\nprotocol = \"{protocol}\"\nlisten = [\"127.0.0.1:1\"]\nupstream_port = 1\n"
        );
        let config = Config::parse(&listener, Some("stalwart"), &|_| None).expect("a listener");
        let [listener] = &config.listeners[..] else { panic!("one listener") };
        let port = protocol.default_port().map_or("none".to_owned(), |port| port.to_string());
        let first = match (protocol.greets(), protocol.is_tls()) {
            (true, _) => "the mailbox",
            (_, true) => "the client, TLS",
            _ => "either",
        };
        let (idle, held) = (listener.idle_timeout.as_secs() / 60, listener.hold.as_secs());
        let _ = writeln!(table, "| {protocol} | {port} | {first} | {idle} min | {held} s |");
    }
    table
}

fn command_line() -> String {
    let mut command = Cli::command().term_width(90);
    command.build();
    let mut page = format!("# Command line\n\n{}", made_by("src/cli.rs"));
    let mut add = |title: &str, help: String| {
        let help: String = help.lines().map(|line| format!("{}\n", line.trim_end())).collect();
        let _ = write!(page, "\n## `{title}`\n\n```text\n{}\n```\n", help.trim_end());
    };
    add("tailwart-edge", command.render_long_help().to_string());
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    assert!(names.len() >= 5, "{names:?}");
    for name in names {
        let sub = command.find_subcommand_mut(&name).expect("it was listed");
        add(&format!("tailwart-edge {name}"), sub.render_long_help().to_string());
    }
    page
}

fn made_by(source: &str) -> String {
    format!("<!-- Made from {source} by `make reference`: change it there. -->\n")
}

/// Compares a page with what the code says, or writes it.
#[track_caller]
fn compare(name: &str, page: &str) {
    let path = Path::new(BOOK).join("reference").join(name);
    let file = repo_root().join(&path);
    if std::env::var_os(WRITE).is_some() {
        fs::write(&file, page).expect("the page can be written");
    }
    let written = fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page, "{} is not what the code says: run `make reference`", path.display());
}

#[test]
fn the_page_of_keys_is_what_the_code_says() {
    let tables: Vec<&str> = TABLES.iter().map(|(table, _)| *table).collect();
    for key in KEYS {
        assert!(tables.contains(&table_of(key)), "{} is of no table of the page", key.path);
    }
    compare("configuration.md", &configuration());
}

#[test]
fn the_page_of_commands_is_what_the_code_says() {
    compare("command-line.md", &command_line());
}
