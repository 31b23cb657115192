//! The one timer of a relay.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

pin_project_lite::pin_project! {
    /// Fires when there was no progress for the limit. The timer is moved only
    /// when it fires or the limit changes, not with every byte.
    pub(super) struct Timer {
        #[pin]
        sleep: Sleep,
        limit: Duration,
        last_progress: Instant,
    }
}

impl Timer {
    pub(super) fn start(limit: Duration) -> Timer {
        let now = Instant::now();
        Timer { sleep: tokio::time::sleep_until(now + limit), limit, last_progress: now }
    }

    pub(super) fn progressed(self: Pin<&mut Self>) {
        *self.project().last_progress = Instant::now();
    }

    pub(super) fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let mut timer = self.project();
        let deadline = *timer.last_progress + limit;
        if *timer.limit != limit {
            *timer.limit = limit;
            timer.sleep.as_mut().reset(deadline);
        }
        while timer.sleep.as_mut().poll(cx).is_ready() {
            if timer.sleep.deadline() >= deadline {
                return Poll::Ready(());
            }
            timer.sleep.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}
