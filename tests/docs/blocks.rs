//! Every block of code is what the program takes that it is for.
//!
//! | after the backticks | what it is | who checks it |
//! |---|---|---|
//! | `toml` | a configuration | `tailwart-edge check`, which must not warn |
//! | `toml,fragment` | a part of one | the same, with `--upstream` |
//! | `toml,stalwart` | settings of a Stalwart before 0.16 | the TOML parser |
//! | `json`, `hujson` | | the parsers |
//! | `sh` | commands | `bash -n`; calls of this program: `commands.rs` |
//! | `ini,main.cf`, `ini,master.cf` | Postfix | `postconf`, which must not warn |
//! | `ini,dovecot.conf` | Dovecot | `doveconf` |
//! | `nginx` | what is within a `server` | `nginx -t` |
//! | `yaml` | Prometheus | `promtool` |
//! | `ini,systemd` | a unit or a part of one | sections and assignments |
//! | `text` | what people or programs say | nobody |

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::common::tools::{Finished, run};
use crate::common::{hujson, temp_dir};
use crate::pages::{self, Block};

const LIMIT: Duration = Duration::from_secs(30);

/// The variables that the samples of configurations use.
const VARIABLES: [(&str, &str); 3] =
    [("STALWART_MAGIC_NAME", "stalwart"), ("TS_TAILNET", "tail1234.ts.net"), ("EDGE", "2")];

/// How many blocks of each kind there must be, or the test looks in the wrong place.
const AT_LEAST: [(&str, usize); 13] = [
    ("toml", 10),
    ("toml,fragment", 6),
    ("toml,stalwart", 1),
    ("json", 2),
    ("hujson", 1),
    ("sh", 20),
    ("ini,main.cf", 1),
    ("ini,master.cf", 2),
    ("ini,dovecot.conf", 1),
    ("nginx", 1),
    ("yaml", 1),
    ("ini,systemd", 1),
    ("text", 5),
];

#[test]
fn every_block_is_what_its_program_takes() {
    let (mut seen, mut wrong) = (BTreeMap::<String, usize>::new(), Vec::new());
    for block in pages::all().iter().flat_map(|page| page.blocks()) {
        if let Err(problem) = check(&block) {
            wrong.push(format!("{}: {problem}", block.place));
        }
        *seen.entry(block.kind).or_default() += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (kind, least) in AT_LEAST {
        assert!(seen.get(kind).is_some_and(|seen| *seen >= least), "too few blocks of {kind}: {seen:?}");
    }
}

fn check(block: &Block) -> Result<(), String> {
    match &*block.kind {
        "toml" => edge(&block.code, &[]),
        "toml,fragment" => edge(&block.code, &["--upstream", "stalwart"]),
        "toml,stalwart" => block.code.parse::<toml::Table>().map(drop).map_err(|error| error.to_string()),
        "json" => serde_json::from_str::<Value>(&block.code).map(drop).map_err(|error| error.to_string()),
        "hujson" => hujson::parse(&block.code).map(drop),
        "sh" => silent(run(Command::new("bash").arg("-n"), block.code.as_bytes(), LIMIT)),
        "ini,main.cf" => postfix(&block.code, ""),
        "ini,master.cf" => postfix("", &block.code),
        "ini,dovecot.conf" => dovecot(&block.code),
        "nginx" => nginx(&block.code),
        "yaml" => prometheus(&block.code),
        "ini,systemd" => unit(&block.code),
        "text" => Ok(()),
        "" => Err("a block that does not say what it is".to_owned()),
        kind => Err(format!("nobody checks a block of {kind}")),
    }
}

/// Good, and without a word of warning.
fn silent(finished: Finished) -> Result<(), String> {
    match finished.succeeded() && finished.stderr.trim().is_empty() {
        true => Ok(()),
        false => Err(format!("{}:\n{}{}", finished.command, finished.stdout(), finished.stderr)),
    }
}

fn edge(config: &str, flags: &[&str]) -> Result<(), String> {
    let dir = temp_dir("docs");
    let file = dir.path().join("config.toml");
    fs::write(&file, config).expect("the file can be written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tailwart-edge"));
    command.env_clear().envs(VARIABLES).args(["check", "-c"]).arg(&file).args(flags);
    silent(run(&mut command, b"", LIMIT))
}

fn prometheus(config: &str) -> Result<(), String> {
    let dir = temp_dir("docs-prometheus");
    let file = dir.path().join("prometheus.yml");
    fs::write(&file, config).expect("the file can be written");
    silent(run(Command::new("promtool").args(["check", "config"]).arg(&file), b"", LIMIT))
}

/// `postconf` names each parameter that Postfix does not know, in either file.
fn postfix(main: &str, master: &str) -> Result<(), String> {
    let dir = temp_dir("docs-postfix");
    let main = format!("compatibility_level = 3.6\n{main}");
    fs::write(dir.path().join("main.cf"), main).expect("the file can be written");
    fs::write(dir.path().join("master.cf"), master).expect("the file can be written");
    let postconf =
        |what| run(Command::new(program("postconf")).arg("-c").arg(dir.path()).arg(what), b"", LIMIT);
    silent(postconf("-n"))?;
    silent(postconf("-M"))?;
    let services =
        master.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_alphanumeric())).count();
    let understood = postconf("-M").stdout().lines().filter(|line| !line.starts_with(' ')).count();
    (services == understood).then_some(()).ok_or_else(|| format!("{understood} of {services} services"))
}

fn dovecot(config: &str) -> Result<(), String> {
    let dir = temp_dir("docs-dovecot");
    let file = dir.path().join("dovecot.conf");
    fs::write(&file, format!("protocols = imap pop3 sieve\n{config}")).expect("the file can be written");
    silent(run(Command::new("doveconf").arg("-n").arg("-c").arg(&file), b"", LIMIT))
}

/// Not every PATH has the sbin directories.
fn program(name: &str) -> String {
    let known = format!("/usr/sbin/{name}");
    if Path::new(&known).is_file() { known } else { name.to_owned() }
}

fn nginx(config: &str) -> Result<(), String> {
    let dir = temp_dir("docs-nginx");
    let file = dir.path().join("nginx.conf");
    let path = dir.path().display();
    let whole = format!(
        "pid {path}/pid;\nevents {{}}\nhttp {{\naccess_log off;\nserver {{\nlisten 127.0.0.1:80;\n{config}}}\n}}\n"
    );
    fs::write(&file, whole).expect("the file can be written");
    let tested = run(
        Command::new(program("nginx")).arg("-t").arg("-e").arg("stderr").arg("-c").arg(&file),
        b"",
        LIMIT,
    );
    match tested.succeeded() && !tested.stderr.contains("[warn]") {
        true => Ok(()),
        false => Err(tested.stderr),
    }
}

fn unit(text: &str) -> Result<(), String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let is_section = |line: &str| line.starts_with('[') && line.ends_with(']');
    if !lines.first().is_some_and(|line| is_section(line)) {
        return Err("does not begin with a section".to_owned());
    }
    let is_assignment = |line: &str| {
        line.split_once('=').is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_alphanumeric()))
    };
    let wrong = lines.iter().find(|line| !is_section(line) && !is_assignment(line));
    wrong.map_or(Ok(()), |line| Err(format!("neither a section nor an assignment: {line}")))
}

#[test]
fn what_a_program_does_not_take_is_found() {
    let block = |kind: &str, code: &str| {
        check(&Block { place: String::new(), kind: kind.to_owned(), code: code.to_owned() })
    };
    let wrong = [
        ("toml", "[upstream]\n"),
        ("toml,fragment", "[timeouts]\nidle = \"1s\"\n"),
        ("toml,fragment", "[upstream]\nproxy_protocol = \"off\"\n"),
        ("toml,stalwart", "a b\n"),
        ("json", "{a: 1}"),
        ("hujson", "{a: 1}"),
        ("sh", "if true\n"),
        ("ini,main.cf", "smtpd_upstream_proxy = haproxy\n"),
        ("ini,master.cf", "smtp inet n - y - - smtpd\n  -o smtpd_upstream_proxy=haproxy\n"),
        ("ini,master.cf", "smtp inet n\n"),
        ("ini,dovecot.conf", "haproxy_trusted = 100.64.0.7/32\n"),
        ("nginx", "location / { proxy_pas http://127.0.0.1:8080; }\n"),
        ("ini,systemd", "LimitNOFILE=1\n"),
        ("yaml", "a: b\n"),
        ("", "a\n"),
    ];
    for (kind, code) in wrong {
        assert!(block(kind, code).is_err(), "{kind}: {code}");
    }
}
