//! Mail while the mailbox restarts: senders that know nothing of it lose nothing, double nothing and
//! are never reset before they were greeted. Half of it is told by a real Postfix, the other by many
//! small sessions at a steady pace, each of which knows what became of its one message.
//!
//! `make soak` also runs the outages that are too long for every day.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder as Thread, JoinHandle};
use std::time::{Duration, Instant};

use crate::common::client::LineClient;
use crate::common::edge::{Builder, Listener};
use crate::common::mail::{DOMAIN, MailServer};
use crate::common::net::{CONNECT_LIMIT, connect, free_addr, reset};
use crate::common::postfix::Sender;
use crate::common::sink::{Taken, takes_mail, takes_mail_after};
use crate::common::stub::Stub;
use crate::common::wait::{eventually, pace};
use crate::setup::{AT_ONCE, LIMIT, MAILBOX, Setup, held, is_soak, no_crash, start_with};

/// Sessions a second.
const RATE: u32 = 50;

/// Before and after an outage.
const CALM: Duration = Duration::from_secs(1);

const REFUSAL: &str = "421 4.3.2 mx.example.org Service not available, please try again later\r\n";

fn edge(mailbox: SocketAddr, hold: Duration) -> Setup {
    start_with(&[(25, mailbox)], &[Listener::new("smtp", "smtp", 25)], |edge: Builder| {
        edge.set("", "hostname", r#""mx.example.org""#)
            .set("timeouts", "hold", &format!("\"{}ms\"", hold.as_millis()))
            .set("limits", "max_connections_per_client", "0")
            .set("probe", "interval", r#""1s""#)
    })
}

/// What became of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// Its message was acknowledged.
    Taken,
    /// It was told to come later, in order, and nothing else.
    Refused,
    /// It was greeted, and lost its server later.
    Cut,
    /// It was neither greeted nor refused.
    Lost(Option<io::ErrorKind>),
}

/// A sender's session with one message; its fate, and how long it waited for the first line.
fn session(edge: SocketAddr, id: &str, patience: Duration) -> (Fate, Duration) {
    let came = Instant::now();
    let connected = TcpStream::connect_timeout(&edge, CONNECT_LIMIT).and_then(|stream| {
        stream.set_read_timeout(Some(patience))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    });
    let mut server = match connected {
        Ok(stream) => BufReader::new(stream),
        Err(error) => return (Fate::Lost(Some(error.kind())), came.elapsed()),
    };
    let mut line = String::new();
    let first = server.read_line(&mut line);
    let waited = came.elapsed();
    let fate = match first {
        Ok(1..) if line.starts_with("220 ") => converse(&mut server, id).unwrap_or(Fate::Cut),
        // The whole of it, and an end in order.
        Ok(1..) if line == REFUSAL => match server.read_line(&mut line) {
            Ok(0) => Fate::Refused,
            Ok(_) => Fate::Lost(None),
            Err(error) => Fate::Lost(Some(error.kind())),
        },
        Ok(_) => Fate::Lost(None),
        Err(error) => Fate::Lost(Some(error.kind())),
    };
    (fate, waited)
}

/// From the greeting on; an error is a server that went away.
fn converse(server: &mut BufReader<TcpStream>, id: &str) -> io::Result<Fate> {
    let message = format!("Subject: {id}\r\n\r\nHello.\r\n.");
    let dialogue = [
        ("EHLO client.example.net", "250"),
        ("MAIL FROM:<sender@example.net>", "250"),
        ("RCPT TO:<alice@example.test>", "250"),
        ("DATA", "354"),
        (&message, "250"),
    ];
    for (words, answer) in dialogue {
        server.get_mut().write_all(format!("{words}\r\n").as_bytes())?;
        let mut line = String::new();
        server.read_line(&mut line)?;
        if !line.starts_with(answer) {
            return Ok(Fate::Cut);
        }
    }
    // It is acknowledged, whatever comes of the farewell.
    let _ = server.get_mut().write_all(b"QUIT\r\n");
    let _ = server.read_line(&mut String::new());
    Ok(Fate::Taken)
}

/// Sessions that come at [`RATE`], whatever becomes of those before them.
struct Load {
    edge: SocketAddr,
    patience: Duration,
    next: Instant,
    sessions: Vec<(String, JoinHandle<(Fate, Duration)>)>,
    most_held: usize,
}

/// What became of all sessions.
#[derive(Debug)]
struct Report {
    fates: BTreeMap<Fate, usize>,
    longest_wait: Duration,
    most_held: usize,
}

impl Load {
    /// Each session waits for an answer so long before it gives up.
    fn start(edge: SocketAddr, patience: Duration) -> Load {
        Load { edge, patience, next: Instant::now(), sessions: Vec::new(), most_held: 0 }
    }

    /// Goes on for so long.
    fn run(&mut self, setup: &Setup, duration: Duration) {
        static SESSIONS: AtomicUsize = AtomicUsize::new(0);
        // A session needs little, and there may be thousands.
        const STACK_BYTES: usize = 128 << 10;
        let end = self.next + duration;
        while self.next < end {
            pace(self.next);
            self.next += Duration::from_secs(1) / RATE;
            let id = format!("message-{}", SESSIONS.fetch_add(1, Ordering::Relaxed));
            let (edge, patience, own) = (self.edge, self.patience, id.clone());
            let session = Thread::new().stack_size(STACK_BYTES).spawn(move || session(edge, &own, patience));
            self.sessions.push((id, session.expect("a thread can be started")));
            if self.sessions.len().is_multiple_of(RATE as usize / 2) {
                self.most_held = self.most_held.max(held(&setup.edge));
            }
        }
    }

    /// How many sessions have not ended.
    fn unfinished(&self) -> usize {
        self.sessions.iter().filter(|(_, session)| !session.is_finished()).count()
    }

    /// Waits for all of them. What was acknowledged was taken exactly once, what was refused never,
    /// and what was cut at most once.
    #[track_caller]
    fn finish(self, taken: &Taken) -> Report {
        let mut fates: BTreeMap<Fate, usize> = BTreeMap::new();
        let mut longest_wait = Duration::ZERO;
        for (id, session) in self.sessions {
            let (fate, waited) = session.join().expect("a session does not panic");
            *fates.entry(fate).or_default() += 1;
            longest_wait = longest_wait.max(waited);
            let (times, lawful) = (
                taken.times(&id),
                match fate {
                    Fate::Taken => 1..=1,
                    Fate::Refused | Fate::Lost(_) => 0..=0,
                    Fate::Cut => 0..=1,
                },
            );
            assert!(lawful.contains(&times), "{id}, {fate:?}, was taken {times} times");
        }
        Report { fates, longest_wait, most_held: self.most_held }
    }
}

impl Report {
    fn count(&self, fate: Fate) -> usize {
        self.fates.get(&fate).copied().unwrap_or(0)
    }
}

/// The mailbox is away for so long under load, and clients are held for so long. It stops in order:
/// its port closes, and the sessions under way go on to their end.
#[track_caller]
fn outage(length: Duration, hold: Duration) -> Report {
    let taken = Taken::default();
    let to = free_addr();
    let mailbox = Stub::start_at(to, takes_mail("mail.example.test", &taken));
    let setup = edge(to, hold);
    let mut load = Load::start(setup.edge.addr("smtp"), hold + LIMIT);
    load.run(&setup, CALM);
    setup.tailnet.unforward(MAILBOX, 25);
    // Who is not held may be on the way to the mailbox, and dropping that would cut the session.
    let on_the_way = || load.unfinished().saturating_sub(held(&setup.edge));
    let idle = eventually(LIMIT, || on_the_way() == 0 && setup.tailnet.stats(MAILBOX).open == 0);
    assert!(idle, "a session goes on and on");
    drop(mailbox);
    load.run(&setup, length);
    let _mailbox = Stub::start_at(to, takes_mail("mail.example.test", &taken));
    setup.tailnet.forward(MAILBOX, 25, to);
    load.run(&setup, CALM);
    let sessions = load.sessions.len();
    let report = load.finish(&taken);
    eprintln!("outage of {length:?}, hold {hold:?}, {RATE} sessions/s: {sessions} sessions, {report:?}");
    assert_eq!(taken.count(), report.count(Fate::Taken), "somebody else's mail");
    assert!(eventually(LIMIT, || held(&setup.edge) == 0), "{} are held on", held(&setup.edge));
    no_crash(setup.edge.log());
    report
}

/// Within the time to hold nobody notices more than a delay.
#[track_caller]
fn outage_within_hold(length: Duration) {
    let report = outage(length, Duration::from_secs(45));
    assert_eq!(report.fates.keys().collect::<Vec<_>>(), [&Fate::Taken], "{report:?}");
    assert!(report.most_held > 0, "nobody was held: {report:?}");
    // Who came first waits longest; the mailbox is tried every two seconds. The rest is for a busy machine.
    assert!(report.longest_wait < length + Duration::from_secs(2) + AT_ONCE, "{report:?}");
}

/// Beyond it the ones that came too early are told to come later, and nothing else happens to them.
#[track_caller]
fn outage_beyond_hold(length: Duration, hold: Duration) {
    let report = outage(length, hold);
    let known = [&Fate::Taken, &Fate::Refused];
    assert_eq!(report.fates.keys().collect::<Vec<_>>(), known, "{report:?}");
    let expected = (length - hold).as_secs_f64() * f64::from(RATE);
    let refused = report.count(Fate::Refused) as f64;
    // The mailbox is tried every two seconds, in which it would have been too late for some.
    let slack = f64::from(RATE) * 3.0;
    assert!((expected - slack..expected + slack).contains(&refused), "{expected} expected: {report:?}");
    // Whether the time is kept is told by who was refused; this is only for those who are forgotten.
    assert!(report.longest_wait < hold + AT_ONCE, "{report:?}");
}

#[test]
fn an_outage_within_the_time_to_hold_costs_no_session() {
    outage_within_hold(Duration::from_secs(10));
    if is_soak() {
        outage_within_hold(Duration::from_secs(30));
    }
}

#[test]
fn an_outage_beyond_the_time_to_hold_is_told_to_those_who_came_too_early() {
    outage_beyond_hold(Duration::from_secs(6), Duration::from_secs(2));
    if is_soak() {
        outage_beyond_hold(Duration::from_secs(120), Duration::from_secs(45));
    }
}

/// A mailbox that needs this long to greet is up for a second, down for a second, so many times: it
/// crashes under those who wait for the greeting as under all others.
#[track_caller]
fn crashes(cycles: usize, delay: Duration) {
    let taken = Taken::default();
    let to = free_addr();
    let setup = edge(to, Duration::from_secs(45));
    let mut load = Load::start(setup.edge.addr("smtp"), LIMIT * 2);
    let start = || Stub::start_at(to, takes_mail_after(delay, "mail.example.test", &taken));
    for cycle in 0..cycles {
        // Dropping it cuts its connections, wherever they are.
        let mailbox = start();
        load.run(&setup, CALM);
        drop(mailbox);
        if cycle + 1 < cycles {
            load.run(&setup, CALM);
        }
    }
    let _mailbox = start();
    let sessions = load.sessions.len();
    let report = load.finish(&taken);
    eprintln!(
        "{cycles} crashes, greeting after {delay:?}, {RATE} sessions/s: {sessions} sessions, {report:?}"
    );
    let beside: Vec<_> =
        report.fates.keys().filter(|fate| !matches!(fate, Fate::Taken | Fate::Cut)).collect();
    assert!(beside.is_empty(), "{report:?}");
    // Those that come back together may be under way together at the next crash.
    assert!(report.count(Fate::Taken) > sessions / 4, "{report:?}");
    no_crash(setup.edge.log());
}

#[test]
fn a_mailbox_that_crashes_again_and_again_resets_nobody_before_the_greeting() {
    crashes(10, Duration::ZERO);
}

#[test]
fn a_mailbox_that_crashes_under_those_who_wait_for_its_greeting_resets_nobody() {
    crashes(2, Duration::from_millis(300));
}

/// How a client visits a mailbox that comes and goes.
const VISITS: [fn(TcpStream); 6] = [
    drop,
    reset,
    |mut client| {
        let _ = client.write_all(b"QUIT\r\n").and_then(|()| client.shutdown(Shutdown::Write));
        let _ = client.read_to_end(&mut Vec::new());
    },
    |mut client| {
        let _ = client.write_all(b"EHLO client.example.net\r\n");
        reset(client);
    },
    |client| {
        // Waits for a while, then goes.
        let _ = client.set_read_timeout(Some(Duration::from_millis(300)));
        let _ = (&client).read(&mut [0; 100]);
    },
    |client| {
        let _ = client.set_read_timeout(Some(LIMIT));
        let mut server = BufReader::new(client);
        let mut greeting = String::new();
        let first = server.read_line(&mut greeting).map_err(|error| error.kind());
        assert!(matches!(first, Ok(1..)), "{first:?}: neither greeted nor refused");
        assert_eq!(greeting, "220 mail.example.test\r\n");
    },
];

#[test]
fn clients_that_come_and_go_while_the_mailbox_does_leave_nothing_behind() {
    const CYCLES: usize = 8;
    const PHASE: Duration = Duration::from_millis(300);
    let to = free_addr();
    let setup = edge(to, Duration::from_secs(45));
    let before = setup.edge.fds();
    let address = setup.edge.addr("smtp");
    let mut next = Instant::now();
    let mut clients = Vec::new();
    let mut mailbox = None;
    for phase in 0..2 * CYCLES {
        // Every second phase it is away.
        mailbox =
            (phase % 2 == 0).then(|| Stub::start_at(to, takes_mail("mail.example.test", &Taken::default())));
        for (index, visit) in VISITS.into_iter().cycle().take(5 * VISITS.len()).enumerate() {
            if index % VISITS.len() == 0 {
                pace(next);
                next += PHASE / 5;
            }
            clients.push(std::thread::spawn(move || visit(connect(address))));
        }
    }
    drop(mailbox);
    let _mailbox = Stub::start_at(to, takes_mail("mail.example.test", &Taken::default()));
    for client in clients {
        client.join().expect("no client fails");
    }
    let freed = eventually(LIMIT, || {
        held(&setup.edge) == 0 && setup.edge.fds() <= before + 3 && setup.tailnet.stats(MAILBOX).open == 0
    });
    let (fds, open) = (setup.edge.fds(), setup.tailnet.stats(MAILBOX).open);
    assert!(freed, "{fds} descriptors, {before} before; the mailbox has {open} connections");
    no_crash(setup.edge.log());
}

#[test]
fn a_sending_postfix_keeps_what_it_could_not_deliver_and_delivers_it_later() {
    let mail = MailServer::start();
    let setup = edge(mail.postfix.smtp, Duration::from_secs(3));
    let sender = Sender::start(setup.edge.addr("smtp"));
    let submit = |subject: &str| {
        let message = format!("Subject: {subject}\n\nHello.\n");
        let mut client = LineClient::new(connect(sender.smtp()));
        client.send_mail("sender@example.net", &format!("alice@{DOMAIN}"), &message);
    };
    let waiting = || -> Vec<String> {
        let recipients = sender.queue().into_iter().map(|message| message["recipients"].to_string());
        recipients.collect()
    };

    // Away for less than senders are held: it knows of nothing.
    setup.tailnet.unforward(MAILBOX, 25);
    submit("within the hold");
    assert!(eventually(LIMIT, || held(&setup.edge) == 1), "{}", sender.log().tail());
    setup.tailnet.forward(MAILBOX, 25, mail.postfix.smtp);
    mail.home.wait_message("alice", "Subject: within the hold", LIMIT);
    assert_eq!(sender.log().count("status=deferred"), 0, "{}", sender.log().tail());
    assert!(eventually(LIMIT, || waiting().is_empty()), "{:?}", waiting());

    // For longer: the message waits in the sender's queue, with our words.
    setup.tailnet.unforward(MAILBOX, 25);
    submit("beyond the hold");
    sender.log().wait("status=deferred", LIMIT);
    let words =
        ["alice@example.test", "421 4.3.2 mx.example.org Service not available, please try again later"];
    // Its log says so before its queue does.
    let is_kept = || matches!(&waiting()[..], [reason] if words.iter().all(|words| reason.contains(words)));
    assert!(eventually(LIMIT, is_kept), "{:?}", waiting());
    assert_eq!(sender.log().count("status=bounced"), 0, "{}", sender.log().tail());
    setup.tailnet.forward(MAILBOX, 25, mail.postfix.smtp);
    sender.flush();
    mail.home.wait_message("alice", "Subject: beyond the hold", LIMIT);
    assert!(eventually(LIMIT, || waiting().is_empty()), "{:?}", waiting());
    assert_eq!(mail.home.messages("alice").len(), 2);
    no_crash(setup.edge.log());
}
