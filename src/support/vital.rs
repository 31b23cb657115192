//! Tasks that must not end: without one of them the edge would look healthy but not do its work.
//!
//! Invariants
//! - If a task panics, or returns although it should run until it is dropped, an error with its name is logged at
//!   once, and `edge::run` stops the edge.
//! - A task that is ended by its [`Vital`] is not reported.
//!
//! Deliberately not here: tasks of one client or one request: their panic affects nobody else.

use std::any::Any;
use std::fmt;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

/// Starts vital tasks.
#[derive(Clone, Debug)]
pub struct Vitals(mpsc::UnboundedSender<UnexpectedEnd>);

/// Receives the vital tasks that have ended unexpectedly.
#[derive(Debug)]
pub struct UnexpectedEnds(mpsc::UnboundedReceiver<UnexpectedEnd>);

/// A vital task. Dropping it ends the task.
#[derive(Debug)]
#[must_use = "dropping it ends the task"]
pub struct Vital(AbortOnDropHandle<()>);

/// A vital task that ended without being told to.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("task {task:?} ended unexpectedly: {how}; the edge stops so that its supervisor starts it anew")]
pub struct UnexpectedEnd {
    task: String,
    how: How,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum How {
    Panicked(String),
    Returned,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            How::Panicked(message) => write!(f, "it panicked: {message}"),
            How::Returned => f.write_str("it returned"),
        }
    }
}

impl Vitals {
    /// For one edge: starts its tasks, and receives their unexpected ends.
    pub fn new() -> (Vitals, UnexpectedEnds) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Vitals(sender), UnexpectedEnds(receiver))
    }

    /// Starts a task that is to run until it is dropped.
    pub fn spawn(&self, name: impl Into<String>, task: impl Future<Output = ()> + Send + 'static) -> Vital {
        self.start(name.into(), task, Some(How::Returned))
    }

    /// Starts a task that may return when its work is done.
    pub fn spawn_finite(
        &self,
        name: impl Into<String>,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Vital {
        self.start(name.into(), task, None)
    }

    fn start(
        &self,
        name: String,
        task: impl Future<Output = ()> + Send + 'static,
        returned: Option<How>,
    ) -> Vital {
        let ends = self.0.clone();
        Vital(AbortOnDropHandle::new(tokio::spawn(async move {
            let panicked = outcome(task).await.err().map(How::Panicked);
            let Some(how) = panicked.or(returned) else { return };
            let end = UnexpectedEnd { task: name, how };
            error!("{end}");
            // It fails only when the edge has stopped.
            let _ = ends.send(end);
        })))
    }
}

/// Runs a task; a panic is an error, in words.
async fn outcome(task: impl Future<Output = ()>) -> Result<(), String> {
    let mut task = pin!(task);
    // After a panic it is not polled again, only dropped.
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(message(&*panic))),
    })
    .await
}

/// What a panic said.
pub fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").lines().collect::<Vec<_>>().join(" ")
}

impl UnexpectedEnds {
    /// The next one; waits for as long as all tasks live.
    pub async fn next(&mut self) -> UnexpectedEnd {
        match self.0.recv().await {
            Some(end) => end,
            None => std::future::pending().await,
        }
    }

    /// One that was not returned yet, without waiting.
    pub fn take(&mut self) -> Option<UnexpectedEnd> {
        self.0.try_recv().ok()
    }
}

impl Vital {
    /// Ends the task, and waits until its resources are freed.
    pub async fn stop(self) {
        self.0.abort();
        let _ = self.0.await;
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_panic_and_an_unexpected_return_are_reported_by_name() {
        let (vitals, mut ends) = Vitals::new();
        let _tasks = [
            vitals.spawn("accept smtp 0.0.0.0:25", async {
                tokio::task::yield_now().await;
                panic!("port {}\nlost", 25)
            }),
            vitals.spawn("keep", async {}),
            vitals.spawn_finite("watch", async { panic!("no formatting") }),
        ];
        let mut told = [ends.next().await, ends.next().await, ends.next().await].map(|end| end.to_string());
        told.sort();
        let expected = [
            ("accept smtp 0.0.0.0:25", "it panicked: port 25 lost"),
            ("keep", "it returned"),
            ("watch", "it panicked: no formatting"),
        ];
        let rest = "the edge stops so that its supervisor starts it anew";
        assert_eq!(
            told,
            expected.map(|(task, how)| format!("task {task:?} ended unexpectedly: {how}; {rest}"))
        );
    }

    #[tokio::test]
    async fn what_was_told_to_end_or_is_done_is_not_reported() {
        let (vitals, mut ends) = Vitals::new();
        let held = Arc::new(());
        let holds = |held: &Arc<()>| {
            let held = Arc::clone(held);
            async move {
                let _held = held;
                pending::<()>().await;
            }
        };
        vitals.spawn("stopped", holds(&held)).stop().await;
        assert_eq!(Arc::strong_count(&held), 1, "it has given back what it had");
        drop(vitals.spawn("dropped", holds(&held)));
        let done = vitals.spawn_finite("done", async {});
        while !done.is_finished() || Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(ends.take(), None);
    }
}
