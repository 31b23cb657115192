//! The clock of the machine is set, by years, while the edge serves: nobody who is connected, held or
//! counted may notice.
//!
//! libfaketime changes the wall clock of the Rust half, which alone decides such things; the Go runtime
//! reads the kernel's own page and keeps the true time, and monotonic clocks are left as they are.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::dovecot::Dovecot;
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::http;
use crate::common::mail::MailHome;
use crate::common::net::{connect, echoes, hears_itself};
use crate::common::stub::{self, Stub};
use crate::common::temp_dir;
use crate::common::wait::eventually;
use crate::setup::{
    AT_ONCE, LIMIT, MAILBOX, Setup, becomes, hears_last, holds, no_crash, start_with, stops, tells,
};

const TEN_YEARS: i64 = 3650;

/// The clock of an edge.
struct Clock {
    file: PathBuf,
    _dir: TempDir,
}

impl Clock {
    /// A right one.
    fn new() -> Clock {
        let dir = temp_dir("clock");
        let clock = Clock { file: dir.path().join("offset"), _dir: dir };
        clock.write(0);
        clock
    }

    /// Gives it to an edge.
    fn of(&self, edge: Builder) -> Builder {
        edge.env("LD_PRELOAD", &library().display().to_string())
            .env("FAKETIME_TIMESTAMP_FILE", &self.file.display().to_string())
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("NO_FAKE_STAT", "1")
    }

    fn write(&self, days: i64) {
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{days:+}d\n")).expect("a temporary directory takes files");
        std::fs::rename(&new, &self.file).expect("it can be put in its place");
    }

    /// Sets it so many days off, and waits until the edge goes by that.
    #[track_caller]
    fn jump(&self, edge: &Edge, days: i64) {
        self.write(days);
        let expected = today() + SignedDuration::from_hours(24 * days);
        let off = || date(&status(edge)["now"]).map(|now| now.duration_since(expected).abs());
        let jumped = eventually(LIMIT, || off().is_some_and(|off| off < SignedDuration::from_mins(10)));
        assert!(jumped, "its clock is off by {:?}\n{}", off(), edge.log().tail());
    }
}

fn library() -> PathBuf {
    let places = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let found = places
        .chain(["/usr/lib".into(), "/usr/lib64".into()])
        .map(|dir| dir.join("faketime/libfaketimeMT.so.1"))
        .find(|library| Path::is_file(library));
    found.expect("libfaketime is installed (scripts/install-deps)")
}

#[expect(clippy::disallowed_methods, reason = "what the edge's clock is compared with")]
fn today() -> Timestamp {
    Timestamp::now()
}

fn date(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

#[track_caller]
fn status(edge: &Edge) -> Value {
    let answer = http::get(edge.addr("admin"), "/status");
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

/// An edge with a clock, and a listener `mail` for a mailbox.
fn edge_with(
    clock: &Clock,
    mailbox: &Stub,
    protocol: &str,
    configure: impl FnOnce(Builder) -> Builder,
) -> Setup {
    let mail = Listener::new("mail", protocol, 2525);
    start_with(&[(2525, mailbox.addr)], &[mail], |edge| configure(clock.of(edge)))
}

#[test]
fn live_connections_readiness_and_ages_outlast_every_jump() {
    let clock = Clock::new();
    let mailbox = Stub::start(stub::echo_after_header);
    // The shortest that may be set: a jump makes all of them overdue.
    let short = |edge: Builder| edge.set("timeouts", "dead_peer", r#""15s""#);
    let setup = edge_with(&clock, &mailbox, "tcp", short);
    let edge = &setup.edge;
    let mut client = echoes(edge.addr("mail"));
    for days in [TEN_YEARS, 0, -TEN_YEARS, TEN_YEARS] {
        clock.jump(edge, days);
        hears_itself(&mut client);
        drop(echoes(edge.addr("mail")));
        becomes(edge, 200, r#""ready":true"#);
        let status = status(edge);
        let since = |name: &str| date(&status[name]).expect("a date");
        let age = since("now").duration_since(since("started"));
        assert!((0..300).contains(&age.as_secs()), "started {age} ago");
        let seconds = status["connections"][0]["seconds"].as_u64();
        assert!(seconds.is_some_and(|seconds| seconds < 300), "{status}");
    }
    assert_eq!(status(edge)["open"], 1);
    assert_eq!(edge.log().count("trouble"), 0, "{}", edge.log().tail());
    hears_itself(&mut client);
    no_crash(edge.log());
}

#[test]
fn clients_are_held_for_as_long_as_is_configured() {
    // The clock has to jump meanwhile, on a busy machine too.
    const HOLD: Duration = Duration::from_secs(8);
    let clock = Clock::new();
    let mailbox = Stub::start(stub::echo_after_header);
    let hold = format!("\"{}s\"", HOLD.as_secs());
    let named =
        |edge: Builder| edge.set("", "hostname", r#""mx.example.org""#).set("timeouts", "hold", &hold);
    let setup = edge_with(&clock, &mailbox, "smtp", named);
    setup.tailnet.unforward(MAILBOX, 2525);
    for days in [TEN_YEARS, -TEN_YEARS] {
        clock.jump(&setup.edge, 0);
        let came = Instant::now();
        let mut client = connect(setup.edge.addr("mail"));
        holds(&setup.edge, 1);
        clock.jump(&setup.edge, days);
        assert!(came.elapsed() < HOLD, "the jump came too late");
        holds(&setup.edge, 1);
        hears_last(
            &mut client,
            b"421 4.3.2 mx.example.org Service not available, please try again later\r\n",
        );
        let held = came.elapsed();
        assert!(held >= HOLD && held < HOLD + AT_ONCE, "held for {held:?}");
    }
    no_crash(setup.edge.log());
}

#[test]
fn a_drain_lasts_as_long_as_is_configured() {
    const DRAIN: Duration = Duration::from_secs(4);
    for days in [TEN_YEARS, -TEN_YEARS] {
        let clock = Clock::new();
        let mailbox = Stub::start(stub::echo_after_header);
        let drain = format!("\"{}s\"", DRAIN.as_secs());
        let mut setup = edge_with(&clock, &mailbox, "tcp", |edge| edge.set("timeouts", "drain", &drain));
        let mut client = echoes(setup.edge.addr("mail"));
        let began = Instant::now();
        setup.edge.signal("TERM");
        setup.edge.wait_log(" stopping ", LIMIT);
        clock.write(days);
        // Whoever moves is waited for.
        let moving = || {
            use std::io::{Read, Write};
            let mut answer = [0; 1];
            client.write_all(b"x").is_ok() && matches!(client.read(&mut answer), Ok(1))
        };
        std::iter::repeat_with(moving).take_while(|moves| *moves).count();
        let lasted = began.elapsed();
        assert!(lasted >= DRAIN && lasted < DRAIN + AT_ONCE, "lasted {lasted:?}");
        stops(&mut setup.edge, LIMIT);
        tells(&setup.edge.wait_log(" stopped: ", LIMIT), &["cut: 1,"]);
    }
}

#[test]
fn the_end_of_a_certificate_is_told_once_for_each_time_that_it_comes() {
    let clock = Clock::new();
    let dovecot = Dovecot::start(&MailHome::create());
    let listener = Listener::new("imaps", "imaps", 993);
    let probing = |edge: Builder| clock.of(edge).set("probe", "interval", r#""100ms""#);
    let setup = start_with(&[(993, dovecot.imaps)], &[listener], probing);
    let edge = &setup.edge;
    becomes(edge, 200, r#""ready":true"#);
    let probed = || date(&status(edge)["upstreams"][0]["probe"]["probed"]);
    let told = || (edge.log().count("has expired"), edge.log().count("expires within two weeks"));
    for (days, expected) in [
        (TEN_YEARS, (1, 0)),
        (0, (1, 0)),
        (TEN_YEARS, (2, 0)),
        // The certificate is good for thirty days.
        (20, (2, 0)),
        (0, (2, 0)),
        (20, (2, 1)),
        (-TEN_YEARS, (2, 1)),
    ] {
        clock.jump(edge, days);
        for _ in 0..5 {
            let last = probed();
            assert!(eventually(LIMIT, || probed() != last), "it is not probed\n{}", edge.log().tail());
        }
        assert_eq!(told(), expected, "{days} days off\n{}", edge.log().tail());
        becomes(edge, 200, r#""ready":true"#);
    }
    no_crash(edge.log());
}
