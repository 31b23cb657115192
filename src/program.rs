//! The program: it runs the command of the command line, and gives its exit code.
//!
//! Deliberately not here: what the commands do.

use std::fmt::Display;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use crate::cli::{Cli, Command, ConfigArgs, DoctorArgs, EdgeArgs, HealthcheckArgs, StatusArgs};
use crate::cli::{healthcheck, status};
use crate::config::{self, Config, ConfigError, config_path};
use crate::doctor::{self, Patient};
use crate::edge::reload::Source;
use crate::edge::{self, Start};
use crate::process::log;
use crate::process::signals::expect_signals;
use crate::process::supervisor::{Supervisor, handed_over};
use crate::support::output;
use crate::tailnet;
use crate::tailnet::credential::Sources;
use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use tokio::runtime::Runtime;

/// Wrong usage or configuration.
const EXIT_CONFIG: u8 = 2;

/// The exit code of a command. `Err` is the code of a command that could not go on, and has said why.
type Exit = Result<ExitCode, ExitCode>;

/// Does what the command line asks for.
pub fn main() -> ExitCode {
    let (Ok(code) | Err(code)) = match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Check(args) => check(&args),
        Command::Doctor(args) => doctor(args),
        Command::Status(args) => show_status(&args),
        Command::Healthcheck(args) => check_health(&args),
        Command::Completions { shell } => completions(shell),
        Command::Version => {
            output::say(format!(
                "tailwart-edge {} (Tailscale {})",
                env!("CARGO_PKG_VERSION"),
                tailnet::linked_version()
            ));
            Ok(ExitCode::SUCCESS)
        }
    };
    if output::is_incomplete() { ExitCode::FAILURE } else { code }
}

/// The environment as the configuration sees it. A value that is not UTF-8
/// counts as not set.
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn load(args: &ConfigArgs) -> Result<Config, ConfigError> {
    match config_path(args.config.clone(), &environment) {
        Some(path) => Config::load(&path, args.upstream.as_deref(), &environment),
        None => Config::without_file(args.upstream.as_deref(), &environment),
    }
}

fn config_mistakes(mistakes: ConfigError) -> ExitCode {
    output::complain(mistakes);
    ExitCode::from(EXIT_CONFIG)
}

fn failure(problem: impl Display) -> ExitCode {
    output::complain(problem);
    ExitCode::FAILURE
}

fn start_runtime() -> Result<Runtime, ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| failure(format!("cannot start the runtime: {error}")))
}

fn check(args: &ConfigArgs) -> Exit {
    let config = load(args).map_err(config_mistakes)?;
    for warning in &config.warnings {
        output::complain(format!("warning: {warning}"));
    }
    for listener in &config.listeners {
        let addresses: Vec<String> = listener.listen.iter().map(ToString::to_string).collect();
        output::say(format!("{}: {} -> {}", listener.name, addresses.join(", "), listener.upstream));
    }
    output::say("the configuration is good");
    Ok(ExitCode::SUCCESS)
}

fn run(args: &ConfigArgs) -> Exit {
    let installed = expect_signals();
    installed.map_err(|error| failure(format!("cannot install signal handlers: {error}")))?;
    let config = load(args).map_err(config_mistakes)?;
    let credentials = Sources::capture(&environment, config.tailnet.auth_key_file.clone());
    let source = Source::capture(args.config.clone(), args.upstream.clone(), std::env::vars_os());
    // This must come before this process starts any thread of its own. The log starts one.
    tailnet::forget_environment();
    tailnet::set_log_upload(config.tailnet.log_upload);
    let started_with = |name: &str| source.variable(name);
    let logging = Arc::new(log::start(config.log, &started_with));
    let handed = handed_over(&started_with);
    let supervisor = Supervisor::find(&started_with);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    run_edge(Start { config, source, credentials, supervisor, handed, logging })
}

fn run_edge(start: Start) -> Exit {
    let runtime = start_runtime()?;
    // Kept to the end: when the last handle is dropped, the lines that still wait are written.
    let _logging = Arc::clone(&start.logging);
    let outcome = runtime.block_on(edge::run(start));
    // Connections that the drain time-out cut must not delay the exit.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS).map_err(|failure| {
        edge::report(&failure);
        ExitCode::from(failure.exit_code())
    })
}

/// A wrong configuration is a finding of the report here, not an error of the command.
fn doctor(args: DoctorArgs) -> Exit {
    let config = load(&args.config);
    let tailnet = config.as_ref().ok().map(|config| &config.tailnet);
    let sources = Sources::capture(&environment, tailnet.and_then(|tailnet| tailnet.auth_key_file.clone()));
    // As in `run`, before this process starts any thread. Nothing is logged.
    tailnet::forget_environment();
    tailnet::set_log_upload(tailnet.is_some_and(|tailnet| tailnet.log_upload));
    let DoctorArgs { domain, addresses, dns_server, smtp_check, json, .. } = args;
    let sources = Arc::new(sources);
    let patient = Patient { config, sources, domain, addresses, dns_server, smtp_check };
    let runtime = start_runtime()?;
    let report = runtime.block_on(doctor::run(patient));
    runtime.shutdown_background();
    let text = if json { report.to_json().to_string() } else { report.to_string() };
    output::say(text);
    Ok(ExitCode::from(report.exit_code()))
}

/// The admin address of a running edge: `--admin`, else the configuration's.
fn admin_address(args: &EdgeArgs) -> Result<SocketAddr, ExitCode> {
    if let Some(admin) = args.admin {
        return Ok(admin);
    }
    let path = config_path(args.config.clone(), &environment);
    let admin = config::admin(path.as_deref(), &environment).map_err(config_mistakes)?;
    admin.ok_or_else(|| failure("the edge cannot be asked: admin.listen is \"off\""))
}

fn check_health(args: &HealthcheckArgs) -> Exit {
    let admin = admin_address(&args.edge)?;
    let asked = start_runtime()?.block_on(healthcheck::ask(admin, args.live));
    asked.map(|()| ExitCode::SUCCESS).map_err(failure)
}

fn show_status(args: &StatusArgs) -> Exit {
    let admin = admin_address(&args.edge)?;
    let runtime = start_runtime()?;
    if args.watch {
        let mut screen = std::io::stdout();
        let clears = !args.json && screen.is_terminal();
        runtime.block_on(status::watch(admin, args.json, clears, &mut screen));
        return Ok(ExitCode::SUCCESS); // nobody reads the output any more
    }
    let status = runtime.block_on(status::ask(admin)).map_err(failure)?;
    output::write(status.shown(args.json));
    Ok(ExitCode::SUCCESS)
}

fn completions(shell: Shell) -> Exit {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), env!("CARGO_PKG_NAME"), &mut script);
    // Into a buffer first: `generate` panics when it writes to a closed pipe.
    output::write(String::from_utf8_lossy(&script));
    Ok(ExitCode::SUCCESS)
}
