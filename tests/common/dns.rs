//! A DNS server on loopback that answers from a table.
//!
//! The program's unit tests include this file too, so it uses nothing else of `tests/common`.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use hickory_resolver::proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::{CNAME, MX, PTR, TXT};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

const TTL_SECONDS: u32 = 60;

/// What the server knows: any other name does not exist.
#[derive(Default)]
pub struct Zone {
    records: Vec<Record>,
    /// Names for which the server fails.
    failing: Vec<Name>,
    /// Names for which it never answers.
    silent: Vec<Name>,
}

impl Zone {
    /// Records as `(name, type, value)`; the value as a zone file has it. The types `SERVFAIL` and
    /// `SILENT` make the server fail or be silent for that name.
    pub fn new(table: &[(&str, &str, &str)]) -> Zone {
        let mut zone = Zone::default();
        for &(name, kind, value) in table {
            let name = fully(name);
            let data = match kind {
                "SERVFAIL" => {
                    zone.failing.push(name);
                    continue;
                }
                "SILENT" => {
                    zone.silent.push(name);
                    continue;
                }
                "A" => RData::A(value.parse().expect("an IPv4 address")),
                "AAAA" => RData::AAAA(value.parse().expect("an IPv6 address")),
                "CNAME" => RData::CNAME(CNAME(fully(value))),
                "PTR" => RData::PTR(PTR(fully(value))),
                "TXT" => RData::TXT(TXT::new(vec![value.to_owned()])),
                "MX" => {
                    let (preference, host) = value.split_once(' ').expect("a preference and a host");
                    RData::MX(MX::new(preference.parse().expect("a number"), fully(host)))
                }
                other => panic!("records of type {other} are not served"),
            };
            zone.records.push(Record::from_rdata(name, TTL_SECONDS, data));
        }
        zone
    }

    /// Serves it on a port of 127.0.0.1 until dropped.
    pub fn serve(self) -> Server {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
        let address = socket.local_addr().expect("it is bound");
        let shared = Arc::new(Shared::default());
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || answer_all(&self, &socket, &shared)
        });
        Server { address, shared, thread: Some(thread) }
    }

    /// The answer to a question, none if the server is to be silent.
    fn answer(&self, question: &Message) -> Option<Message> {
        let query = question.queries.first()?.clone();
        let (name, kind) = (query.name().clone(), query.query_type());
        if self.silent.contains(&name) {
            return None;
        }
        let mut answer = Message::new(question.metadata.id, MessageType::Response, OpCode::Query);
        answer.metadata.recursion_desired = true;
        answer.metadata.recursion_available = true;
        answer.add_query(query);
        if self.failing.contains(&name) {
            answer.metadata.response_code = ResponseCode::ServFail;
        } else if !self.records.iter().any(|record| record.name == name) {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        self.collect(&name, kind, &mut answer);
        Some(answer)
    }

    /// Adds the records of a name, through its alias if it is one.
    fn collect(&self, name: &Name, kind: RecordType, answer: &mut Message) {
        for record in self.records.iter().filter(|record| record.name == *name) {
            if record.record_type() == kind {
                answer.add_answer(record.clone());
            } else if let RData::CNAME(alias) = &record.data {
                answer.add_answer(record.clone());
                self.collect(&alias.0, kind, answer);
            }
        }
    }
}

fn fully(name: &str) -> Name {
    let mut name = Name::from_utf8(name).expect("a DNS name");
    name.set_fqdn(true);
    name
}

#[derive(Default)]
struct Shared {
    stopping: AtomicBool,
    questions: AtomicUsize,
}

/// A running DNS server.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many questions came, repetitions included.
    pub fn questions(&self) -> usize {
        self.shared.questions.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Anything wakes it up.
        let woken = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|s| s.send_to(&[], self.address));
        if woken.is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

fn answer_all(zone: &Zone, socket: &UdpSocket, shared: &Shared) {
    let mut datagram = [0; 4096];
    while let Ok((length, client)) = socket.recv_from(&mut datagram) {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let Ok(question) = Message::from_vec(&datagram[..length]) else { continue };
        shared.questions.fetch_add(1, Ordering::SeqCst);
        if let Some(answer) = zone.answer(&question) {
            let bytes = answer.to_vec().expect("it can be written");
            let _ = socket.send_to(&bytes, client);
        }
    }
}
