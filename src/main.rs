//! The program: arguments, log output, exit codes; nothing else.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use tailwart_edge::cli::{Cli, Command, ConfigArgs, DoctorArgs, EdgeArgs, HealthcheckArgs, StatusArgs};
use tailwart_edge::config::{self, Config, ConfigError, config_path};
use tailwart_edge::credential::Sources;
use tailwart_edge::doctor::{self, Patient};
use tailwart_edge::edge::{self, Start};
use tailwart_edge::reload::Source;
use tailwart_edge::supervisor::{Supervisor, handed_over};
use tailwart_edge::{healthcheck, log, status, tailnet};
use tokio::runtime::Runtime;

/// Wrong usage or configuration.
const EXIT_CONFIG: u8 = 2;

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Check(args) => check(&args),
        Command::Doctor(args) => doctor(args),
        Command::Status(args) => show_status(&args),
        Command::Healthcheck(args) => check_health(&args),
        Command::Completions { shell } => completions(shell),
        Command::Version => {
            println!("tailwart-edge {} (Tailscale {})", env!("CARGO_PKG_VERSION"), tailnet::linked_version());
            ExitCode::SUCCESS
        }
    }
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

fn check(args: &ConfigArgs) -> ExitCode {
    match load(args) {
        Ok(config) => {
            for warning in &config.warnings {
                eprintln!("warning: {warning}");
            }
            for listener in &config.listeners {
                let addresses: Vec<String> = listener.listen.iter().map(ToString::to_string).collect();
                println!("{}: {} -> {}", listener.name, addresses.join(", "), listener.upstream);
            }
            println!("the configuration is good");
            ExitCode::SUCCESS
        }
        Err(mistakes) => config_mistakes(&mistakes),
    }
}

fn config_mistakes(mistakes: &ConfigError) -> ExitCode {
    eprintln!("{mistakes}");
    ExitCode::from(EXIT_CONFIG)
}

fn run(args: &ConfigArgs) -> ExitCode {
    if let Err(error) = tailnet::expect_signals() {
        eprintln!("cannot install signal handlers: {error}");
        return ExitCode::FAILURE;
    }
    let config = match load(args) {
        Ok(config) => config,
        Err(mistakes) => return config_mistakes(&mistakes),
    };
    let credentials = Sources::capture(&environment, config.tailnet.auth_key_file.clone());
    let source = Source::capture(args.config.clone(), args.upstream.clone(), std::env::vars_os());
    // Before any thread of ours exists, and the log has one.
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

fn start_runtime() -> Result<Runtime, ExitCode> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|error| {
        eprintln!("cannot start the runtime: {error}");
        ExitCode::FAILURE
    })
}

/// A wrong configuration is a finding here, and no reason to say nothing else.
fn doctor(args: DoctorArgs) -> ExitCode {
    let config = load(&args.config);
    let tailnet = config.as_ref().ok().map(|config| &config.tailnet);
    let sources = Sources::capture(&environment, tailnet.and_then(|tailnet| tailnet.auth_key_file.clone()));
    // As in `run`, before any thread of ours exists; nothing is logged.
    tailnet::forget_environment();
    tailnet::set_log_upload(tailnet.is_some_and(|tailnet| tailnet.log_upload));
    let DoctorArgs { domain, addresses, dns_server, smtp_check, json, .. } = args;
    let sources = Arc::new(sources);
    let patient = Patient { config, sources, domain, addresses, dns_server, smtp_check };
    let runtime = match start_runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    let report = runtime.block_on(doctor::run(patient));
    runtime.shutdown_background();
    let text = if json { report.to_json().to_string() } else { report.to_string() };
    // Not println!, which panics when the reader has gone.
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::from(report.exit_code())
}

/// Where a running edge can be asked.
fn admin_address(args: &EdgeArgs) -> Result<SocketAddr, ExitCode> {
    if let Some(admin) = args.admin {
        return Ok(admin);
    }
    let path = config_path(args.config.clone(), &environment);
    let admin =
        config::admin(path.as_deref(), &environment).map_err(|mistakes| config_mistakes(&mistakes))?;
    admin.ok_or_else(|| {
        eprintln!("the edge has no admin address to ask at: admin.listen is \"off\"");
        ExitCode::FAILURE
    })
}

fn check_health(args: &HealthcheckArgs) -> ExitCode {
    let admin = match admin_address(&args.edge) {
        Ok(admin) => admin,
        Err(code) => return code,
    };
    let runtime = match start_runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    match runtime.block_on(healthcheck::ask(admin, args.live)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn completions(shell: Shell) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), env!("CARGO_PKG_NAME"), &mut script);
    // Not straight to the terminal: generate panics when the reader has gone.
    let _ = std::io::stdout().write_all(&script);
    ExitCode::SUCCESS
}

fn show_status(args: &StatusArgs) -> ExitCode {
    let admin = match admin_address(&args.edge) {
        Ok(admin) => admin,
        Err(code) => return code,
    };
    let runtime = match start_runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    if args.watch {
        let mut screen = std::io::stdout();
        let clears = !args.json && screen.is_terminal();
        runtime.block_on(status::watch(admin, args.json, clears, &mut screen));
        return ExitCode::SUCCESS; // nobody reads it any more
    }
    match runtime.block_on(status::ask(admin)) {
        Ok(status) => {
            let _ = write!(std::io::stdout(), "{}", status.shown(args.json));
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn run_edge(start: Start) -> ExitCode {
    let runtime = match start_runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    // To the end: what waits to be written is written when the last one drops it.
    let _logging = Arc::clone(&start.logging);
    let outcome = runtime.block_on(edge::run(start));
    // Connections that the drain time-out cut must not hold the exit up.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            edge::report(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}
