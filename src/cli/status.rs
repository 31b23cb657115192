//! `tailwart-edge status`: asks a running edge for its state and shows it.
//!
//! Invariants: it asks the edge and nobody else, changes nothing, and has a deadline.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::admin::status::{PATH, Status};
use crate::support::http_client::{ask_edge, cannot_ask};

/// How long the edge may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Between two questions of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Asks the edge at this admin address. The error says why that failed.
pub async fn ask(admin: SocketAddr) -> Result<Status, String> {
    let answer = ask_edge(admin, PATH, LIMIT).await?;
    serde_json::from_slice(answer.body()).map_err(|_| cannot_ask(admin, "the answer is not from an edge"))
}

/// Shows the edge's state again and again. With `clears` the screen is cleared before each time. If the edge
/// cannot be asked, this says so and asks again. Returns when `screen` cannot be written to.
pub async fn watch(admin: SocketAddr, json: bool, clears: bool, screen: &mut impl Write) {
    const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";
    let mut ticks = interval(WATCH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let text = match ask(admin).await {
            Ok(status) => status.shown(json),
            Err(problem) if json => serde_json::json!({ "error": problem }).to_string() + "\n",
            Err(problem) => problem + "\n",
        };
        let before = if clears { CLEAR } else { "" };
        if write!(screen, "{before}{text}").and_then(|()| screen.flush()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::STATUS;

    /// Takes so many bytes and no more.
    struct Screen(Vec<u8>, usize);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0.len() + bytes.len() > self.1 {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn who_watches_sees_it_again_and_again_until_he_leaves() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let edge = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = edge.local_addr().unwrap();
        let answers = tokio::spawn(async move {
            // Away at first, and back.
            drop(edge.accept().await.unwrap());
            let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length";
            loop {
                let (mut stream, _) = edge.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await;
                let answer = format!("{head}: {}\r\n\r\n{STATUS}", STATUS.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        tokio::time::pause();
        let mut screen = Screen(Vec::new(), 4000);
        watch(admin, false, true, &mut screen).await;
        answers.abort();
        let text = String::from_utf8(screen.0).unwrap();
        let screens: Vec<&str> = text.split("\x1b[H\x1b[2J\x1b[3J").collect();
        assert!(screens.len() >= 3 && screens[1].contains("cannot ask the edge"), "{text}");
        assert!(screens[2].starts_with("tailwart-edge 0.1.0 is ready"), "{text}");
    }

    #[tokio::test]
    async fn another_server_is_not_taken_for_an_edge() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = other.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = other.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await;
        });
        let error = ask(admin).await.unwrap_err();
        let expected = format!("cannot ask the edge at {admin}: the answer is not from an edge; check that");
        assert!(error.starts_with(&expected), "{error}");
    }
}
