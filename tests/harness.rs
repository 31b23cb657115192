//! What the other tests rely on: whatever a test has started is gone with it, what it has asked for has
//! happened, and what it looks at is its own.

mod common;

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use command_fds::CommandFdExt;

use common::net::{backlog, connect, free_addr, is_listening};
use common::process::{Daemon, descendants};
use common::stub::{self, Stub};
use common::wait::eventually;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn killing_a_daemon_takes_those_along_who_have_left_its_group() {
    // `script` gives what it runs a session of its own; the end of the terminal is no end for an edge either.
    let run = "trap '' HUP; sleep 1000 & wait";
    let mut daemon = Daemon::spawn("script", Command::new("script").args(["-qec", run, "/dev/null"]));
    let sleeps = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.contains("sleep\x001000"))
    };
    assert!(eventually(LIMIT, || descendants(daemon.pid()).iter().any(sleeps)), "{}", daemon.output().tail());
    let strays: Vec<u32> = descendants(daemon.pid()).into_iter().collect();
    daemon.kill();
    assert!(eventually(LIMIT, || !strays.iter().any(sleeps)), "{strays:?} are left");
}

#[test]
fn a_process_that_is_paused_does_nothing_more() {
    let script = "i=0; while :; do echo $((i += 1)); done";
    for _ in 0..20 {
        let daemon = Daemon::spawn("counter", Command::new("sh").args(["-c", script]));
        daemon.output().wait("1000", LIMIT);
        daemon.pause();
        let before = std::fs::read_to_string(format!("/proc/{}/schedstat", daemon.pid())).expect("it lives");
        std::thread::sleep(Duration::from_millis(20)); // what would run, runs
        let after = std::fs::read_to_string(format!("/proc/{}/schedstat", daemon.pid())).expect("it lives");
        assert_eq!(before, after, "it has run");
        daemon.resume();
        let goes_on = || {
            let now = std::fs::read_to_string(format!("/proc/{}/schedstat", daemon.pid()));
            now.is_ok_and(|now| now != before)
        };
        assert!(eventually(LIMIT, goes_on), "it stands still");
    }
}

#[test]
fn a_listener_is_told_from_another_with_its_port() {
    let one = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let address = one.local_addr().expect("it is bound");
    let beside = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 99), address.port()));
    assert!(is_listening(address) && !is_listening(beside));
    let _other = TcpListener::bind(beside).expect("nobody else has that address");
    let _waiting = connect(beside);
    assert!(eventually(LIMIT, || (backlog(address), backlog(beside)) == (0, 1)));
}

#[test]
fn a_port_of_a_stub_is_nobody_elses_afterwards() {
    let stub = Stub::start(stub::silent);
    let address = stub.addr;
    drop(connect(address));
    drop(stub);
    // A program that another test starts at this moment has a copy of the listening socket until it is executed.
    assert!(eventually(LIMIT, || TcpStream::connect(address).is_err()), "somebody is there");
    // As the kernel does that looks for a free port, it does not share.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    assert!(socket.bind(&address.into()).is_err(), "somebody else may have it");
    // A server that comes back may.
    let _again = Stub::start_at(address, stub::silent);
    assert_ne!(free_addr(), address);
}

#[test]
fn a_stub_can_be_started_again_while_others_start_programs() {
    const PROGRAMS: usize = 200;
    let address = free_addr();
    let start = || {
        let mut program = Command::new("true");
        // As those for whom descriptors are put in order: the copy of this process lasts longer.
        program.fd_mappings(Vec::new()).expect("there are none");
        program.status().expect("it runs");
    };
    let others = [(); 4].map(|()| std::thread::spawn(move || (0..PROGRAMS).for_each(|_| start())));
    while !others.iter().all(JoinHandle::is_finished) {
        drop(Stub::start_at(address, stub::silent));
    }
}
