//! `make demo`: a mailbox that only a tailnet can reach, the edge in front of it, and one message
//! through both, all on this machine and without an account.
//!
//! The tailnet is the one of the tests. The mailbox is a real Postfix and a real Dovecot, which accept
//! nothing without a PROXY header. The edge is the real program. The demo checks every fact that it prints,
//! and fails with a message at the first one that is wrong. With `DEMO_ONCE=1` it ends after the mail
//! message; otherwise it goes on serving.
//!
//! The edge's program is expected beside the demo's own, where cargo puts both, or as the argument. The demo
//! needs root, since Postfix and Dovecot start as root. Ctrl-C may end it at any moment:
//! `tests/common/process.rs` says who cleans up then.

/// Those servers and clients of the tests that it runs, and what they need.
#[path = "../../../tests/common"]
#[allow(dead_code)] // the tests use more of each
mod common {
    pub mod cert;
    pub mod client;
    pub mod dovecot;
    pub mod edge;
    pub mod host;
    pub mod log;
    pub mod mail;
    pub mod net;
    pub mod postfix;
    pub mod process;
    pub mod tailnet;
    pub mod tools;
    pub mod wait;

    pub use host::{START_LIMIT, repo_root, require_root, temp_dir};
}

use std::any::Any;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::client::LineClient;
use common::edge::{Edge, Listener};
use common::mail::{DOMAIN, MailServer, PASSWORD, USERS};
use common::net::client_from;
use common::tailnet::{Node, Options, TestTailnet};
use common::tools::curl;
use common::wait::eventually;

const MAILBOX: &str = "stalwart";
const AUTH_KEY: &str = "tskey-auth-demo";
/// Any address of 127.0.0.0/8 is this machine. Nothing else uses this one.
const CLIENT: &str = "127.0.0.77";
const SENDER: &str = "someone@example.net";
/// Bounds every wait. Seconds are enough; a busy machine gets the rest.
const LIMIT: Duration = Duration::from_secs(30);

fn main() {
    std::panic::set_hook(Box::new(|failure| eprintln!("\ndemo failed: {}", reason(failure.payload()))));
    println!(
        "A mailbox that only a tailnet can reach, and tailwart-edge in front of it; all on this machine.\n"
    );
    let demo = Demo::start();
    demo.deliver_message();
    if std::env::var_os("DEMO_ONCE").is_none_or(|value| value.is_empty()) {
        demo.tell_what_to_try();
        demo.follow_log();
    }
}

/// Everything that runs. Dropped in this order.
struct Demo {
    edge: Edge,
    _tailnet: TestTailnet,
    mail: MailServer,
    started: Instant,
}

impl Demo {
    fn start() -> Demo {
        common::require_root("the demo");
        let started = Instant::now();
        step(started, "the test tailnet is built, unless it is up to date");
        // Only this key lets the edge in.
        let keys = Options { auth_keys: vec![AUTH_KEY.to_owned()], ..Options::default() };
        let tailnet = TestTailnet::start_with(&keys);
        step(started, &format!("tailnet: its control server is {}", tailnet.control_url()));

        let mail = MailServer::start();
        let Node { ips, .. } = tailnet.add_node(MAILBOX, &["tag:stalwart"], &mail.forwards());
        step(started, &format!("mailbox: Postfix and Dovecot behind node {MAILBOX} ({})", ips[0]));

        let edge = Edge::builder(edge_program()).control_url(tailnet.control_url()).auth_key(AUTH_KEY);
        let edge = default_listeners().into_iter().fold(edge.upstream(MAILBOX), |edge, it| edge.listener(it));
        let edge = edge.spawn();
        edge.wait_ready(LIMIT);
        step(started, "edge: has joined with TS_AUTHKEY as tag:reverse-proxy, and listens");
        Demo { edge, _tailnet: tailnet, mail, started }
    }

    /// Sends one message, reads it back, and prints what the mailbox saw of it.
    fn deliver_message(&self) {
        let (client, banner) = self.send_by_smtp();
        self.mail.postfix.wait_log("status=sent", LIMIT);
        let message = self.read_by_imap();
        step(self.started, "message: sent by SMTP, and read back by IMAP over TLS, both through the edge");
        let connected =
            self.mail.postfix.wait_log(&format!("connect from unknown[{CLIENT}]:{}", client.port()), LIMIT);
        let logged_in = self.mail.dovecot.wait_log(&format!("rip={CLIENT}"), LIMIT);
        let received = format!("Received: from client.example.net (unknown [{CLIENT}])");
        assert!(message.contains(&received), "the message should say {received:?}:\n{message}");
        let sent = message_text();
        assert!(
            message.ends_with(&sent),
            "the message has changed on its way; sent was:\n{sent}\nread:\n{message}"
        );

        println!("\nWhat the mailbox saw of the client at {client}:");
        println!("  address  Postfix: {}", after(&connected, "]: "));
        println!("           Dovecot: {}", before(after(&logged_in, "Login: "), ", lip="));
        println!(
            "  message  {} bytes in the mailbox, the {} sent unchanged at its end",
            message.len(),
            sent.len()
        );
        println!("  banner   {:.1} ms after the client began to connect", banner.as_secs_f64() * 1e3);
        println!(
            "           {} ms of that to reach the mailbox through the tailnet",
            self.connect_ms(client)
        );
        println!("  path     {}\n", self.path());
        self.tell_whole_time();
    }

    /// `scripts/demo` says how many seconds it has taken before this program began.
    fn tell_whole_time(&self) {
        let before = std::env::var("DEMO_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
        if let Some(before) = before.map(Duration::from_secs) {
            let seconds = (before + self.started.elapsed()).as_secs();
            println!("From `make demo` to here it took {} min {} s.\n", seconds / 60, seconds % 60);
        }
    }

    /// The client's address, and how long it waited for the banner.
    fn send_by_smtp(&self) -> (SocketAddr, Duration) {
        let address = self.edge.addr("smtp");
        let begun = Instant::now();
        let stream = client_from(CLIENT, address);
        stream.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
        let seen = stream.peek(&mut [0]).unwrap_or_else(|error| panic!("no banner on {address}: {error}"));
        let banner = begun.elapsed();
        assert!(seen == 1, "{address} was closed without a banner");
        let client = stream.local_addr().expect("it is connected");
        LineClient::new(stream).send_mail(SENDER, &recipient(), &message_text());
        (client, banner)
    }

    fn read_by_imap(&self) -> String {
        let url = format!("imaps://{}/INBOX;MAILINDEX=1", self.edge.addr("imaps"));
        let login = format!("{}:{PASSWORD}", USERS[0]);
        let arguments = [&*url, "--user", &login, "--interface", CLIENT];
        curl(&self.mail.home.certificate().cert, &arguments, b"", LIMIT).expect_success().stdout()
    }

    /// How many milliseconds the edge needed to reach the mailbox for this client.
    fn connect_ms(&self, client: SocketAddr) -> String {
        let line = self.edge.wait_log(&format!("client={client} "), LIMIT);
        let milliseconds = before(after(&line, "connect_ms="), " ");
        assert!(milliseconds.parse::<f64>().is_ok(), "no time to connect is told: {line}");
        milliseconds.to_owned()
    }

    /// How packets reach the mailbox, in the words of the edge's log.
    fn path(&self) -> String {
        let line = self.edge.wait_log("upstream reached", LIMIT);
        let path = before(after(&line, "path=\""), "\"");
        assert!(path.starts_with("direct ") || path.starts_with("relayed "), "no path is told: {line}");
        path.to_owned()
    }

    fn tell_what_to_try(&self) {
        let [smtp, submissions, imaps] = ["smtp", "submissions", "imaps"].map(|name| self.edge.addr(name));
        let cert = self.mail.home.certificate().cert.display();
        let (to, user) = (recipient(), USERS[0]);
        println!("The edge goes on serving until Ctrl-C. From another terminal, try:");
        println!("  swaks --server {smtp} --to {to} --from {SENDER} --local-interface 127.0.0.42");
        println!("  swaks --server {submissions} --to {to} --from {SENDER} --tls-on-connect");
        println!("  openssl s_client -quiet -connect {imaps} -CAfile {cert}");
        println!("      a LOGIN {user} {PASSWORD}");
        println!("  curl --user {user}:{PASSWORD} --cacert {cert} 'imaps://{imaps}/INBOX;MAILINDEX=1'");
        println!("  curl http://{}/readyz", self.edge.addr("admin"));
        let mail_log = self.mail.postfix.log().path().expect("Postfix writes a file").display();
        println!("Postfix logs to {mail_log}; the edge's log follows.\n");
    }

    /// Prints the edge's log for as long as the edge runs.
    fn follow_log(&self) {
        const LOOK: Duration = Duration::from_secs(60);
        let mut shown = 0;
        while self.edge.is_running() {
            let log = self.edge.log().text();
            // The last piece is either empty or a line still being written.
            let end = log.rfind('\n').map_or(0, |end| end + 1);
            print!("{}", &log[shown..end]);
            shown = end;
            let _ = eventually(LOOK, || self.edge.log().text().len() > log.len() || !self.edge.is_running());
        }
        panic!("the edge has ended by itself\n{}", self.edge.log().tail());
    }
}

fn step(started: Instant, text: &str) {
    println!("{:5.1} s  {text}", started.elapsed().as_secs_f64());
}

/// The edge's five default listeners, on free ports instead of the well-known ones.
fn default_listeners() -> Vec<Listener> {
    let five = [("smtp", 25), ("submissions", 465), ("submission", 587), ("imaps", 993), ("sieve", 4190)];
    five.map(|(protocol, port)| Listener::new(protocol, protocol, port)).into()
}

/// The argument, or `target/debug/tailwart-edge` for `target/debug/demo`.
fn edge_program() -> PathBuf {
    let beside = || Some(std::env::current_exe().ok()?.with_file_name("tailwart-edge"));
    let program = std::env::args_os().nth(1).map(PathBuf::from).or_else(beside).unwrap_or_default();
    assert!(program.is_file(), "{}: there is no such program; run `make demo`", program.display());
    program
}

fn recipient() -> String {
    format!("{}@{DOMAIN}", USERS[0])
}

fn message_text() -> String {
    let to = recipient();
    let lines = [
        &format!("From: {SENDER}"),
        &format!("To: {to}"),
        "Subject: through the edge",
        "Message-ID: <demo@client.example.net>",
        "",
        "This message was sent to a public port, and the mailbox is on no public network.",
        ".",
        "The line above is a single dot.",
    ];
    lines.map(|line| format!("{line}\r\n")).concat()
}

/// What comes before `mark`; the whole text when it is not there.
fn before<'a>(text: &'a str, mark: &str) -> &'a str {
    text.split_once(mark).map_or(text, |(start, _)| start)
}

/// What follows `mark`; the whole text when it is not there.
fn after<'a>(text: &'a str, mark: &str) -> &'a str {
    text.split_once(mark).map_or(text, |(_, rest)| rest)
}

/// The text of a panic.
fn reason(payload: &dyn Any) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no reason was given")
}
