//! Reads the lines that the library writes by itself: its log and the node's state.

use std::io;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::NodeStatus;
use crate::ffi::libtailscale::{LineSink, NodeHandle};
use crate::support::text::harmless;
use crate::support::vital::{Vital, Vitals};

/// Reads the node's log and state lines as long as the node lives.
pub(super) fn follow(
    handle: &NodeHandle,
    status: watch::Sender<NodeStatus>,
    vitals: &Vitals,
) -> Result<[Vital; 2], String> {
    let log = sink(handle, LineSink::Log).map_err(|e| format!("cannot make a pipe for the log: {e}"))?;
    let events = sink(handle, LineSink::Events).map_err(|e| format!("cannot make a pipe for events: {e}"))?;
    let tell = |line: &str| tracing::debug!(target: "tailscale", "{}", harmless(line));
    let log = read_lines(log, tell);
    let events = read_lines(events, move |line: &str| take_in(line, &status));
    Ok([vitals.spawn("read the node's log", log), vitals.spawn("read the node's state", events)])
}

/// Reads lines; at the end of the pipe, which comes with the end of the node, waits for ever. A line need not be
/// UTF-8: it may be cut in the middle of a character. Returns only if the pipe fails.
async fn read_lines(pipe: pipe::Receiver, mut take: impl FnMut(&str)) {
    let mut lines = BufReader::new(pipe).split(b'\n');
    loop {
        match lines.next_segment().await {
            Ok(Some(line)) => take(&String::from_utf8_lossy(&line)),
            Ok(None) => std::future::pending().await,
            Err(error) => return tracing::error!("cannot read from the tailnet library: {error}"),
        }
    }
}

/// Makes a line of the library the node's state. A line that cannot be read is only logged as an error.
pub(super) fn take_in(line: &str, status: &watch::Sender<NodeStatus>) {
    match serde_json::from_str(line) {
        Ok(current) => drop(status.send_replace(current)),
        Err(error) => tracing::error!("cannot read the node's state {line:?}: {error}; please report this"),
    }
}

fn sink(handle: &NodeHandle, sink: LineSink) -> io::Result<pipe::Receiver> {
    let (reader, writer) = io::pipe()?;
    let reader = pipe::Receiver::from_owned_fd(reader.into())?;
    handle.set_sink(sink, writer.into())?;
    Ok(reader)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_state_that_cannot_be_read_leaves_the_one_before() {
        let (sender, status) = watch::channel(NodeStatus::default());
        take_in(r#"{"state":"Running","tags":["tag:a"]}"#, &sender);
        let before = status.borrow().clone();
        assert!(before.is_running());
        for line in ["", "{", "12", r#"{"state":1}"#, r#"{"ips":["nowhere"]}"#] {
            take_in(line, &sender);
            assert_eq!(*status.borrow(), before, "{line}");
        }
    }

    #[tokio::test]
    async fn a_line_that_is_not_text_is_a_line_too() {
        let (reader, writer) = io::pipe().unwrap();
        let reader = pipe::Receiver::from_owned_fd(reader.into()).unwrap();
        io::Write::write_all(&mut { writer }, b"one\n\xff\xfe\ntwo\n").unwrap(); // and then it is closed
        let mut lines = Vec::new();
        let reading = read_lines(reader, |line: &str| lines.push(line.to_owned()));
        let goes_on = tokio::time::timeout(Duration::from_millis(200), reading).await.is_err();
        assert!(goes_on, "the end of the pipe is no end of the task");
        assert_eq!(lines, ["one", "\u{fffd}\u{fffd}", "two"]);
    }
}
