//! Which commands and options are there, and what do `status` and `healthcheck` learn from a running edge?
//!
//! It promises that a wrong command line ends with exit code 2, as a wrong configuration does, that the help
//! is enough to run the program, and that the two commands only ask the edge and change nothing.
//!
//! It deliberately does not run the edge or the doctor (see `program.rs`), and does not read the environment
//! (see [`crate::config::config_path`]).

pub(crate) mod healthcheck;
pub(crate) mod status;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::doctor;

const ABOUT: &str = "Forwards public mail ports over a tailnet to a mailbox, with the PROXY protocol";

const LONG_ABOUT: &str = "\
Forwards public mail ports over a tailnet to a mailbox, with the PROXY protocol.

tailwart-edge joins your tailnet as a node of its own (no tailscaled, no TUN
device), listens on the public mail ports and passes every TCP connection, byte
for byte, to the mailbox on the tailnet, preceded by a PROXY header with the
client's address. TLS ends at the mailbox: nothing is decrypted here.

Quick start, with the five default ports 25, 465, 587, 993 and 4190:

  TS_AUTHKEY=tskey-auth-... tailwart-edge run --upstream stalwart";

const AFTER_HELP: &str = "Use --help for the environment variables, files and exit codes.";

const AFTER_LONG_HELP: &str = "\
Environment:
  TAILWART_CONFIG  The configuration file, unless --config is given
  TS_CONTROL_URL   The control server, unless tailnet.control_url names one
  Any variable can be used in the configuration's strings as ${NAME}.

  Credentials to join with, needed only the first time. The first that is set is
  used, in this order:
  TS_AUTHKEY        A key, or file:PATH of a file that holds it (or TS_AUTH_KEY)
  TS_AUTHKEY_FILE   The path of a file that holds a key
  (tailnet.auth_key_file, then the systemd credential ts_authkey)
  TS_CLIENT_SECRET  An OAuth client's secret; TS_CLIENT_ID may hold its id
  TS_ID_TOKEN       A workload identity's token; TS_CLIENT_ID holds its id
  (each of these three may be file:PATH instead)
  If none is set, an edge on a terminal shows an address for a browser login.

Files:
  /etc/tailwart-edge/config.toml  The configuration, if neither --config nor
                                  TAILWART_CONFIG names one
  /var/lib/tailwart-edge          The node's identity (tailnet.state_dir); keep
                                  it, so that the node stays the same

Exit codes:
  0  Stopped cleanly, or nothing found wrong
  1  Anything not listed here; doctor: a check failed; healthcheck: not ready
  2  Wrong command line or configuration
  3  Tailnet: not enrolled, wrong tag, or refused
  4  An address cannot be bound

Examples:
  TS_AUTHKEY=file:/run/secrets/ts_authkey tailwart-edge run --upstream stalwart
  tailwart-edge check --config ./config.toml
  tailwart-edge doctor --domain example.com
  tailwart-edge status --watch
  tailwart-edge run --config ./config.toml";

/// What the command line says.
#[derive(Debug, Parser)]
#[command(
    name = "tailwart-edge",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = AFTER_HELP,
    after_long_help = AFTER_LONG_HELP,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Join the tailnet and forward connections until told to stop
    Run(ConfigArgs),
    /// Report every mistake in the configuration that `run` would use, and change nothing
    Check(ConfigArgs),
    /// Check everything that mail depends on: configuration, ports, tailnet, DNS, clock; say what is
    /// wrong and how to fix it
    Doctor(DoctorArgs),
    /// Show the state of the running edge: its node, and whether the mailbox is up
    Status(StatusArgs),
    /// Ask the running edge whether it is ready, for container health checks: the answer is the exit
    /// code, 0 or 1
    Healthcheck(HealthcheckArgs),
    /// Print the completions for a shell, such as `source <(tailwart-edge completions bash)`
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the version
    Version,
}

/// Where the configuration comes from. Every command that needs all of it has these same options.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Read this file [default: $TAILWART_CONFIG, else /etc/tailwart-edge/config.toml if it exists,
    /// else none]
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The mailbox on the tailnet: short name, MagicDNS name or tailnet IP; overrides the
    /// file's upstream.host
    #[arg(long, value_name = "HOST")]
    pub upstream: Option<String>,
}

/// Which edge to ask. There is no `--upstream` here, since only `admin.listen` is read.
#[derive(Debug, Args)]
pub struct EdgeArgs {
    /// Read admin.listen from this file, even if it has other mistakes [default: $TAILWART_CONFIG,
    /// else /etc/tailwart-edge/config.toml if it exists, else none]
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Ask at this address, and read no file [default: admin.listen]
    #[arg(long, value_name = "IP:PORT", value_parser = admin_address)]
    pub admin: Option<SocketAddr>,
}

/// Which edge to ask, and how to show its answer.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The edge
    #[command(flatten)]
    pub edge: EdgeArgs,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
    /// Ask again every two seconds, until Ctrl-C
    #[arg(short, long)]
    pub watch: bool,
}

/// Which edge to ask, and for what.
#[derive(Debug, Args)]
pub struct HealthcheckArgs {
    /// The edge
    #[command(flatten)]
    pub edge: EdgeArgs,
    /// Ask only whether the process answers (/livez), not whether the edge is ready (/readyz)
    #[arg(long)]
    pub live: bool,
}

/// What the doctor checks.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The configuration
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The mail domain (what follows the @) whose DNS is checked: MX, reverse DNS, MTA-STS,
    /// autoconfig
    #[arg(long, value_name = "NAME", value_parser = mail_domain)]
    pub domain: Option<String>,
    /// A public address of this machine, if it is behind NAT; may be repeated [default: the public
    /// addresses of its interfaces]
    #[arg(long = "address", value_name = "IP")]
    pub addresses: Vec<IpAddr>,
    /// Ask this DNS server [default: the servers of /etc/resolv.conf]
    #[arg(long, value_name = "IP[:PORT]", value_parser = dns_server)]
    pub dns_server: Option<SocketAddr>,
    /// Try outbound port 25 with this mail server
    #[arg(long, value_name = "HOST[:PORT]", default_value = doctor::DEFAULT_SERVER)]
    pub smtp_check: String,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

fn admin_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected an IP address and a port, such as 127.0.0.1:9464".to_owned())
}

/// An address; the port is 53 unless another is given.
fn dns_server(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse().or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53)));
    address.map_err(|_| "expected an IP address, with a port if it is not 53".to_owned())
}

/// A DNS name, with or without a dot at its end.
fn mail_domain(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    match name.len() <= 253 && name.split('.').all(is_label) {
        true => Ok(name.to_owned()),
        false => Err("expected a domain such as example.com (xn--... for other scripts)".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Command, clap::Error> {
        Cli::try_parse_from(std::iter::once("tailwart-edge").chain(arguments.iter().copied()))
            .map(|cli| cli.command)
    }

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_and_check_take_a_file_and_a_host() {
        for (name, short) in [("run", "-c"), ("run", "--config"), ("check", "-c"), ("check", "--config")] {
            let (Command::Run(args) | Command::Check(args)) =
                parse(&[name, short, "/tmp/edge.toml", "--upstream", "stalwart"]).expect("valid arguments")
            else {
                panic!("{name} was taken for version");
            };
            assert_eq!(args.config, Some(PathBuf::from("/tmp/edge.toml")));
            assert_eq!(args.upstream.as_deref(), Some("stalwart"));
        }
        assert!(matches!(parse(&["run"]), Ok(Command::Run(ConfigArgs { config: None, upstream: None }))));
        assert!(matches!(parse(&["version"]), Ok(Command::Version)));
    }

    #[test]
    fn the_doctor_takes_what_cannot_be_found_out() {
        let given = ["doctor", "-c", "/tmp/edge.toml", "--domain", "example.com", "--address", "192.0.2.1"];
        let more = ["--address", "2001:db8::1", "--dns-server", "127.0.0.1:53", "--json"];
        let Ok(Command::Doctor(args)) = parse(&[&given[..], &more].concat()) else { panic!("not taken") };
        assert_eq!((args.domain.as_deref(), args.addresses.len(), args.json), (Some("example.com"), 2, true));
        assert_eq!(args.smtp_check, doctor::DEFAULT_SERVER);
        assert_eq!(parse(&["doctor", "--address", "mx.example.com"]).expect_err("a name").exit_code(), 2);
    }

    #[test]
    fn the_doctor_takes_names_and_addresses_as_people_write_them() {
        assert_eq!(dns_server("127.0.0.1"), Ok(([127, 0, 0, 1], 53).into()));
        assert_eq!(dns_server("[::1]:5353"), Ok("[::1]:5353".parse().expect("an address")));
        assert!(dns_server("localhost").is_err());
        assert_eq!(mail_domain("example.com.").as_deref(), Ok("example.com"));
        for wrong in ["user@example.com", "..", "", "exa mple.com"] {
            assert!(mail_domain(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_health_check_asks_for_readiness_unless_told_otherwise() {
        let Ok(Command::Healthcheck(args)) = parse(&["healthcheck"]) else { panic!("not taken") };
        assert!(!args.live && args.edge.admin.is_none());
        let given = ["healthcheck", "--live", "--admin", "127.0.0.1:1"];
        let Ok(Command::Healthcheck(args)) = parse(&given) else { panic!("not taken") };
        assert!(args.live && args.edge.admin.is_some());
    }

    #[test]
    fn an_admin_address_that_is_none_is_answered_with_one() {
        for command in ["status", "healthcheck"] {
            let error = parse(&[command, "--admin", "localhost:9464"]).expect_err("a name");
            let told = error.to_string();
            assert!(told.contains("such as 127.0.0.1:9464") && error.exit_code() == 2, "{told}");
        }
    }

    #[test]
    fn wrong_usage_ends_with_code_2() {
        for arguments in
            [&[][..], &["serve"], &["run", "--port", "25"], &["run", "-c"], &["version", "--upstream", "x"]]
        {
            let error = parse(arguments).expect_err("wrong usage");
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }

    #[test]
    fn asking_for_help_or_version_is_no_error() {
        assert_eq!(parse(&["--help"]).expect_err("help").exit_code(), 0);
        assert_eq!(parse(&["--version"]).expect_err("version").kind(), ErrorKind::DisplayVersion);
    }

    #[test]
    fn long_help_teaches() {
        let help = Cli::command().render_long_help().to_string();
        let variables =
            crate::tailnet::credential::VARIABLES.into_iter().chain([crate::config::PATH_VARIABLE]);
        let files = [crate::config::DEFAULT_PATH, "/var/lib/tailwart-edge"];
        let codes = ["  0  ", "  1  ", "  2  ", "  3  ", "  4  "];
        let start = ["TS_AUTHKEY=tskey-auth-... tailwart-edge run --upstream stalwart"];
        for part in variables.chain(files).chain(codes).chain(start) {
            assert!(help.contains(part), "{part:?} is missing from:\n{help}");
        }
    }
}
