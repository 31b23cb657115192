//! Reads and writes lines, with a deadline and a size limit.
//!
//! Deliberately not here: what the lines mean.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::harmless_error;

/// How many bytes of one conversation are read.
const HEARD: usize = 8192;

/// A connection to a server that is expected to speak in lines.
pub(super) struct Talk<S> {
    stream: S,
    /// What the server has said, at most `HEARD` bytes and a chunk.
    heard: Vec<u8>,
    /// How much of it was handed out as lines.
    taken: usize,
}

/// Why there is no further line.
#[derive(Debug)]
pub(super) enum NoLine {
    /// The server has ended the stream.
    Ended,
    /// The connection failed.
    Failed(String),
    /// The deadline has passed.
    Late,
    /// The server sent too much.
    TooMuch,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Talk<S> {
    pub(super) fn new(stream: S) -> Talk<S> {
        Talk { stream, heard: Vec::new(), taken: 0 }
    }

    /// The next line, without its end.
    pub(super) async fn line(&mut self, deadline: Instant) -> Result<Vec<u8>, NoLine> {
        loop {
            let open = &self.heard[self.taken..];
            if let Some(end) = open.iter().position(|&byte| byte == b'\n') {
                let line = open[..end].trim_ascii_end().to_vec();
                self.taken += end + 1;
                return Ok(line);
            }
            if self.heard.len() >= HEARD {
                return Err(NoLine::TooMuch);
            }
            self.more(deadline).await?;
        }
    }

    /// The line that has not ended; empty if none has begun.
    pub(super) fn unfinished(&self) -> &[u8] {
        &self.heard[self.taken..]
    }

    /// Whether the server has said anything at all.
    pub(super) fn heard_something(&self) -> bool {
        !self.heard.is_empty()
    }

    async fn more(&mut self, deadline: Instant) -> Result<(), NoLine> {
        let mut chunk = [0; 1024];
        match timeout_at(deadline, self.stream.read(&mut chunk)).await {
            Err(_) => Err(NoLine::Late),
            Ok(Ok(0)) => Err(NoLine::Ended),
            // TLS without close_notify: many servers just close.
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Err(NoLine::Ended),
            Ok(Err(error)) => Err(NoLine::Failed(harmless_error(&error))),
            Ok(Ok(count)) => {
                self.heard.extend_from_slice(&chunk[..count]);
                Ok(())
            }
        }
    }

    /// Sends `text` as it is, with the line end that is in it.
    pub(super) async fn say(&mut self, text: &str, deadline: Instant) -> Result<(), NoLine> {
        let said = async {
            self.stream.write_all(text.as_bytes()).await?;
            self.stream.flush().await
        };
        match timeout_at(deadline, said).await {
            Err(_) => Err(NoLine::Late),
            Ok(said) => said.map_err(|error| NoLine::Failed(harmless_error(&error))),
        }
    }

    /// Closes our side and waits for the other side to close, so that the server logs no warning. Errors no longer
    /// matter.
    pub(super) async fn close(&mut self, deadline: Instant) {
        let closed = async {
            let _ = self.stream.shutdown().await;
            let mut rest = [0; 1024];
            while let Ok(1..) = self.stream.read(&mut rest).await {}
        };
        let _ = timeout_at(deadline, closed).await;
    }
}
