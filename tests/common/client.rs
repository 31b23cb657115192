//! A client of line protocols that is short enough to be read beside the test: SMTP and IMAP as far
//! as tests need it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// The edge may have to look for its upstream first.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Speaks in lines, with a deadline for each answer. Every mismatch panics with what came instead.
pub struct LineClient {
    reader: BufReader<TcpStream>,
}

impl LineClient {
    pub fn new(stream: TcpStream) -> LineClient {
        stream.set_read_timeout(Some(ANSWER_LIMIT)).expect("the deadline is not zero");
        stream.set_nodelay(true).expect("a TCP option");
        LineClient { reader: BufReader::new(stream) }
    }

    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    /// Sends bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream().write_all(bytes.as_ref()).expect("the server takes what is sent");
    }

    /// The next line, without its end; none at the end of the stream.
    #[track_caller]
    pub fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        let read = self.reader.read_until(b'\n', &mut line);
        read.unwrap_or_else(|error| {
            panic!("no whole line: {error} after {:?}", String::from_utf8_lossy(&line))
        });
        (!line.is_empty()).then(|| String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Reads one line, which must begin so.
    #[track_caller]
    pub fn expect(&mut self, start: &str) -> String {
        match self.line() {
            Some(line) if line.starts_with(start) => line,
            other => panic!("wanted a line with {start:?} at its beginning, got {other:?}"),
        }
    }

    /// Reads lines until one begins so; all of them, joined.
    #[track_caller]
    pub fn expect_until(&mut self, start: &str) -> String {
        let mut lines = Vec::new();
        loop {
            let Some(line) = self.line() else {
                panic!("the stream ended before a line with {start:?} at its beginning: {lines:?}")
            };
            let last = line.starts_with(start);
            lines.push(line);
            if last {
                return lines.join("\n");
            }
        }
    }

    /// A line out, and one back that must begin so.
    #[track_caller]
    pub fn ask(&mut self, line: &str, answer: &str) -> String {
        self.send(format!("{line}\r\n"));
        self.expect(answer)
    }

    /// Ends our direction, and reads whatever still comes.
    #[track_caller]
    pub fn finish(mut self) -> Vec<u8> {
        self.stream().shutdown(Shutdown::Write).expect("the connection is open");
        let mut rest = Vec::new();
        self.reader.read_to_end(&mut rest).expect("the server ends in order");
        rest
    }

    /// Reads to the end without ending our own direction first: what happens to a client that
    /// waits.
    pub fn read_to_end(&mut self) -> (Vec<u8>, io::Result<()>) {
        let mut rest = Vec::new();
        let result = self.reader.read_to_end(&mut rest).map(drop);
        (rest, result)
    }

    /// A whole SMTP session for one message, from the greeting on. `message` is headers, blank line
    /// and body.
    #[track_caller]
    pub fn send_mail(&mut self, from: &str, to: &str, message: &str) {
        self.expect("220 ");
        self.send("EHLO client.example.net\r\n");
        self.expect_until("250 ");
        self.ask(&format!("MAIL FROM:<{from}>"), "250 ");
        self.ask(&format!("RCPT TO:<{to}>"), "250 ");
        self.ask("DATA", "354 ");
        self.send(dot_stuffed(message));
        self.ask(".", "250 ");
        self.ask("QUIT", "221 ");
    }

    /// From the greeting on to a selected inbox.
    #[track_caller]
    pub fn imap_login(&mut self, user: &str, password: &str) {
        self.expect("* OK");
        self.imap(&format!("LOGIN {user} {password}"));
        self.imap("SELECT INBOX");
    }

    /// One IMAP command that must succeed; its whole answer.
    #[track_caller]
    pub fn imap(&mut self, command: &str) -> String {
        self.send(format!("a {command}\r\n"));
        let answer = self.expect_until("a ");
        let last = answer.lines().last().unwrap_or_default();
        assert!(last.starts_with("a OK"), "{command}: {last}");
        answer
    }

    /// Starts IDLE; then [`LineClient::expect_until`] `"* "` shows what the server pushes.
    #[track_caller]
    pub fn imap_idle(&mut self) {
        self.ask("a IDLE", "+ ");
    }

    #[track_caller]
    pub fn imap_done(&mut self) -> String {
        self.send("DONE\r\n");
        self.expect_until("a OK")
    }
}

/// Bare line ends become CRLF, and a leading dot is doubled.
fn dot_stuffed(message: &str) -> String {
    let mut wire = String::with_capacity(message.len() + message.len() / 16);
    for line in message.lines() {
        if line.starts_with('.') {
            wire.push('.');
        }
        wire.push_str(line);
        wire.push_str("\r\n");
    }
    wire
}
