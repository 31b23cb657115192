//! Stopping, and signals at any other time.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use tempfile::TempDir;

use crate::common::edge::{Builder, Edge, Listener};
use crate::common::net::{connect, echoes};
use crate::common::process::Daemon;
use crate::common::stub::{self, MIB, Stub, pattern};
use crate::common::wait::{eventually, wait_for};
use crate::common::{private_dir, proxy_header, temp_dir};
use crate::setup::{
    LIMIT, Setup, becomes, edge_on, no_crash, start_with, stops, tailnet_with, tells, warnings,
};

/// The answer that the mailbox gives at the end of an upload.
const ANSWER: usize = 1000;

/// Beyond a drain time-out: two seconds for the last bytes to be acknowledged,
/// and room for a busy machine.
const AFTER_DRAIN: Duration = Duration::from_secs(2 + 5);

/// An edge with this drain time-out in front of a mailbox that answers uploads.
fn edge(drain: &str) -> (Setup, Stub) {
    let stub = Stub::start(stub::answer_after_half_close(ANSWER));
    let drain = |edge: Builder| edge.set("timeouts", "drain", &format!("{drain:?}"));
    (start_with(&[(2525, stub.addr)], &[Listener::new("mail", "tcp", 2525)], drain), stub)
}

/// A client that sends a piece every few milliseconds until it is told to
/// finish.
struct Upload {
    finish: Arc<AtomicBool>,
    /// What was sent, and the mailbox's answer.
    client: JoinHandle<std::io::Result<(Vec<u8>, Vec<u8>)>>,
}

impl Upload {
    fn start(edge: SocketAddr) -> Upload {
        let finish = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&finish);
        Upload { finish, client: std::thread::spawn(move || upload(connect(edge), &told)) }
    }

    fn finish(self) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
        self.finish.store(true, Ordering::SeqCst);
        self.client.join().expect("the client does not panic")
    }
}

fn upload(mut client: TcpStream, finish: &AtomicBool) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    const NUMBERS: u32 = 1024;
    const PAUSE: Duration = Duration::from_millis(10);
    let mut sent = Vec::new();
    for piece in 0.. {
        if eventually(PAUSE, || finish.load(Ordering::SeqCst)) {
            break;
        }
        // Bytes in which a lost or doubled piece shows, as in `pattern`.
        let numbers = NUMBERS * piece..NUMBERS * (piece + 1);
        let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
        client.write_all(&bytes)?;
        sent.extend(bytes);
    }
    client.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer)?;
    Ok((sent, answer))
}

/// Waits until a good part of an upload has come; the number of its connection,
/// which is not the first if a dial had to be made again.
#[track_caller]
fn under_way(stub: &Stub) -> usize {
    let large = |index: &usize| stub.record(*index).is_some_and(|record| record.bytes.len() > 64 << 10);
    let found = wait_for(LIMIT, || (0..stub.accepted()).find(large));
    found.unwrap_or_else(|| panic!("no upload has come so far: {:?}", stub.record(0)))
}

#[track_caller]
fn refuses_connections(edge: SocketAddr) {
    let refused = eventually(
        LIMIT,
        || matches!(TcpStream::connect(edge), Err(error) if error.kind() == ErrorKind::ConnectionRefused),
    );
    assert!(refused, "{edge} still accepts");
}

#[test]
fn a_signal_closes_the_ports_and_idle_connections_and_lets_transfers_finish() {
    for (signal, name) in [("TERM", "SIGTERM"), ("INT", "SIGINT")] {
        let (mut setup, stub) = edge("10m");
        let addresses = [setup.edge.addr("mail"), setup.edge.addr_v6("mail")];
        let mut idle = connect(addresses[0]);
        stub.wait_record(0, LIMIT, |record| !record.bytes.is_empty());
        let upload = Upload::start(addresses[1]);
        let message = under_way(&stub);

        setup.edge.signal(signal);
        tells(&setup.edge.wait_log(" stopping ", LIMIT), &[name, "connections="]);
        addresses.into_iter().for_each(refuses_connections);
        becomes(&setup.edge, 503, "the edge is stopping");
        idle.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
        assert_eq!(idle.read(&mut [0]).expect("an orderly end"), 0);

        // The upload goes on after all that.
        let so_far = stub.record(message).map_or(0, |record| record.bytes.len());
        stub.wait_record(message, LIMIT, |record| record.bytes.len() > so_far + (64 << 10));
        let (sent, answer) = upload.finish().expect("the upload is left alone");
        assert_eq!(answer, pattern(ANSWER));
        let record = stub.wait_record(message, LIMIT, |record| record.finished);
        let mut received = record.bytes.as_slice();
        proxy_header::read(&mut received).expect("the header comes first");
        assert!(received == sent, "{} bytes sent, other {} received", sent.len(), received.len());
        stops(&mut setup.edge, AFTER_DRAIN);
        assert_eq!(setup.edge.log().count("why=\"closed because the edge is stopping\""), 1);
        assert_eq!(warnings(&setup.edge), 0, "{}", setup.edge.log().tail());
    }
}

#[test]
fn without_connections_a_signal_ends_it_promptly() {
    for signal in ["TERM", "INT"] {
        let (mut setup, _stub) = edge("10m");
        setup.edge.signal(signal);
        stops(&mut setup.edge, AFTER_DRAIN);
    }
}

#[test]
fn the_drain_time_out_cuts_what_goes_on_for_ever() {
    let (mut setup, stub) = edge("1s");
    let upload = Upload::start(setup.edge.addr("mail"));
    let message = under_way(&stub);
    setup.edge.signal("TERM");
    stops(&mut setup.edge, Duration::from_secs(1) + AFTER_DRAIN);
    let warning = setup.edge.wait_log("drain time-out", LIMIT);
    tells(&warning, &[" WARN ", "drain time-out of 1s passed", "connections were cut", "connections=1"]);
    assert_eq!(warnings(&setup.edge), 1, "{}", setup.edge.log().tail());
    // The client does not take it for a success.
    assert!(!matches!(upload.finish(), Ok((_, answer)) if answer == pattern(ANSWER)));
    let record = stub.wait_record(message, LIMIT, |record| record.finished);
    assert!(
        matches!(record.end, Some(Err(_))),
        "the mailbox took half a message for a whole one: {record:?}"
    );
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for second in ["TERM", "INT"] {
        let (mut setup, stub) = edge("10m");
        let upload = Upload::start(setup.edge.addr("mail"));
        under_way(&stub);
        setup.edge.signal("TERM");
        setup.edge.wait_log(" stopping ", LIMIT);
        setup.edge.signal(second);
        stops(&mut setup.edge, AFTER_DRAIN);
        tells(&setup.edge.wait_log("stopping at once", LIMIT), &[" WARN ", "connections were cut"]);
        let _ = upload.finish();
    }
}

/// Sends this through an echo and compares what comes back, until told to
/// finish; the number of rounds.
fn relayed_until(edge: SocketAddr, finish: &AtomicBool) -> usize {
    let bytes = pattern(MIB / 4);
    let mut client = connect(edge);
    client.set_read_timeout(Some(LIMIT)).expect("the deadline is not zero");
    for round in 0.. {
        if finish.load(Ordering::SeqCst) {
            return round;
        }
        let mut writer = client.try_clone().expect("a descriptor is free");
        let sent = bytes.clone();
        let writer = std::thread::spawn(move || writer.write_all(&sent));
        let mut received = vec![0; bytes.len()];
        client.read_exact(&mut received).expect("everything comes back");
        writer.join().expect("the writer does not panic").expect("the edge takes everything");
        assert!(received == bytes, "round {round} came back changed");
    }
    unreachable!("the rounds do not run out")
}

/// Starts an edge that is about to read its configuration, from a pipe that the configuration can be written
/// to.
fn starting(builder: &Builder) -> (Edge, File, TempDir) {
    let dir = temp_dir("starting");
    let path = dir.path().join("config.toml");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a directory of our own");
    let edge = builder.spawn_with(&["run", "--config", path.to_str().expect("UTF-8")]);
    // It can be opened once the edge has, and there it waits.
    let open = || {
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("a small number");
        File::options().write(true).custom_flags(flags).open(&path).ok()
    };
    let pipe = wait_for(LIMIT, open).unwrap_or_else(|| panic!("{}", edge.log().tail()));
    (edge, pipe, dir)
}

/// It stops in order, and its only errors are those of reading a pipe again.
#[track_caller]
fn ends_well(edge: &mut Edge) {
    assert_eq!(edge.wait_exit(LIMIT).code(), Some(0), "{}", edge.log().tail());
    no_crash(edge.log());
    let (errors, expected) = (edge.log().count(" ERROR "), edge.log().count("was not reloaded"));
    assert_eq!(errors, expected, "{}", edge.log().tail());
}

#[test]
fn a_signal_during_the_start_is_as_good_as_a_later_one() {
    let stub = Stub::start(stub::echo_after_header);
    let (tailnet, state) = (tailnet_with(&[(2525, stub.addr)]), private_dir("state"));
    let builder = edge_on(&tailnet).state_dir(state.path()).listener(Listener::new("mail", "tcp", 2525));
    for signal in ["TERM", "INT"] {
        let (mut edge, _pipe, _dir) = starting(&builder);
        edge.signal(signal);
        stops(&mut edge, LIMIT);
    }
    // One that came too early to be worked on is worked on later: by then the pipe has nothing more to say.
    let (mut edge, mut pipe, _dir) = starting(&builder);
    edge.signal("HUP");
    pipe.write_all(builder.config().as_bytes()).expect("the edge reads it");
    drop(pipe);
    edge.wait_log("was not reloaded", LIMIT);
    edge.wait_ready(LIMIT);
    edge.signal("TERM");
    ends_well(&mut edge);
    for _ in 0..3 {
        let (mut edge, mut pipe, _dir) = starting(&builder);
        edge.signal("HUP");
        pipe.write_all(builder.config().as_bytes()).expect("the edge reads it");
        drop(pipe);
        // From here on to readiness, wherever the start is just then.
        let is_ready = || edge.log().count(" ready ") > 0;
        let ready = eventually(LIMIT, || {
            edge.signal("HUP");
            is_ready() || !edge.is_running()
        });
        assert!(ready && is_ready() && edge.is_running(), "{}", edge.log().tail());
        drop(echoes(edge.addr("mail")));
        // A pipe has nothing more to say: that is no empty configuration.
        let before = edge.log().count("was not reloaded");
        edge.signal("HUP");
        assert!(eventually(LIMIT, || edge.log().count("was not reloaded") > before), "{}", edge.log().tail());
        tells(&edge.wait_log("was not reloaded", LIMIT), &["is not a regular file"]);
        edge.signal("TERM");
        ends_well(&mut edge);
    }
}

#[test]
fn tens_of_thousands_of_signals_lose_no_byte() {
    const SIGNALS: u32 = 30_000;
    let stub = Stub::start(stub::echo_after_header);
    let mut setup = start_with(&[(2525, stub.addr)], &[Listener::new("mail", "tcp", 2525)], |edge| edge);
    let (mail, finish) = (setup.edge.addr("mail"), Arc::new(AtomicBool::new(false)));
    let clients: Vec<JoinHandle<usize>> = (0..4)
        .map(|_| {
            let finish = Arc::clone(&finish);
            std::thread::spawn(move || relayed_until(mail, &finish))
        })
        .collect();
    // The shell's own kill: no process of its own for each. It fails once there is nobody to signal.
    let script =
        format!("for ((i = 0; i < {SIGNALS}; i++)); do kill -HUP {} || exit; done", setup.edge.pid());
    let mut storm = Daemon::spawn("the storm", Command::new("bash").args(["-c", &script]));
    let status = storm.wait_exit(LIMIT).expect("the storm ends");
    finish.store(true, Ordering::SeqCst);
    let rounds: Vec<usize> =
        clients.into_iter().map(|client| client.join().expect("a good client")).collect();
    assert!(status.success(), "the edge died\n{}", setup.edge.log().tail());
    assert!(rounds.iter().all(|&rounds| rounds > 0), "no traffic in the storm: {rounds:?}");
    let reloads = setup.edge.log().count("configuration reloaded: nothing has changed");
    assert!(reloads > 0, "no signal arrived\n{}", setup.edge.log().tail());
    assert!(reloads < SIGNALS as usize / 10, "{reloads} reloads: signals that come meanwhile are one");
    eprintln!("{SIGNALS} SIGHUPs, {reloads} reloads, during {rounds:?} rounds of 256 KiB");
    setup.edge.signal("TERM");
    stops(&mut setup.edge, AFTER_DRAIN);
}
