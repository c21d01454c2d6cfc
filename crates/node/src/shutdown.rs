//! The end of a service: orderly under a deadline, or at once.
//!
//! One [`Shutdown`] belongs to one datacenter (or one process of it). Every task is spawned on it, so that none is
//! forgotten: [`stop`](Shutdown::stop) asks them to finish and waits, [`kill`](Shutdown::kill) drops them where they
//! stand, which is as near to a power cut as one process can come.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

/// How a stop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Every task finished by itself.
    Clean,
    /// The deadline passed, and this many tasks were ended.
    Killed {
        /// Number of tasks.
        tasks: usize,
    },
}

/// Owns the tasks of one datacenter. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    tasks: TaskTracker,
    draining: CancellationToken,
    killed: CancellationToken,
}

pin_project! {
    /// A task that a kill drops. By hand, because a block that awaits its task keeps it twice: where it was given, and
    /// where it is polled.
    struct UntilKilled<F> {
        #[pin]
        killed: WaitForCancellationFutureOwned,
        #[pin]
        task: F,
    }
}

impl<F: Future> Future for UntilKilled<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        match this.killed.poll(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => this.task.poll(cx).map(drop),
        }
    }
}

/// What HTTP spawns for its connections and streams is found by a kill, too.
impl<F> hyper::rt::Executor<F> for Shutdown
where
    F: Future + Send + 'static,
{
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}

impl Shutdown {
    /// No tasks yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns a task that [`stop`](Self::stop) waits for and [`kill`](Self::kill) drops.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<()>
    where
        F: Future + Send + 'static,
    {
        self.0.tasks.spawn(UntilKilled { killed: self.0.killed.clone().cancelled_owned(), task })
    }

    /// Asks every task to finish what it has begun and to take no more.
    pub fn drain(&self) {
        self.0.draining.cancel();
    }

    /// Whether tasks are to finish.
    pub fn is_draining(&self) -> bool {
        self.0.draining.is_cancelled()
    }

    /// Returns once tasks are to finish.
    pub async fn draining(&self) {
        self.0.draining.cancelled().await;
    }

    /// Number of tasks that have not ended.
    pub fn tasks(&self) -> usize {
        self.0.tasks.len()
    }

    /// Asks every task to finish, waits at most `deadline`, and ends those that have not.
    pub async fn stop(&self, deadline: Duration) -> Stopped {
        self.drain();
        self.0.tasks.close();
        if tokio::time::timeout(deadline, self.0.tasks.wait()).await.is_ok() {
            return Stopped::Clean;
        }
        let tasks = self.0.tasks.len();
        self.kill().await;
        Stopped::Killed { tasks }
    }

    /// Ends every task at once, and returns when all are gone. Sockets close, claims lapse, nothing is answered.
    pub async fn kill(&self) {
        self.0.killed.cancel();
        self.0.draining.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}

/// Returns when the process is asked to stop: SIGTERM, or Ctrl-C.
pub async fn signalled() -> std::io::Result<()> {
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = term.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tasks_that_finish_in_time_stop_cleanly() {
        let shutdown = Shutdown::new();
        let task = shutdown.clone();
        shutdown.spawn(async move { task.draining().await });
        assert_eq!(shutdown.stop(Duration::from_secs(5)).await, Stopped::Clean);
        assert_eq!(shutdown.tasks(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_do_not_are_ended() {
        let shutdown = Shutdown::new();
        shutdown.spawn(std::future::pending::<()>());
        assert_eq!(shutdown.stop(Duration::from_secs(5)).await, Stopped::Killed { tasks: 1 });
    }

    #[tokio::test]
    async fn a_kill_drops_what_tasks_hold() {
        let shutdown = Shutdown::new();
        let held = Arc::new(());
        let inside = held.clone();
        shutdown.spawn(async move {
            let _inside = inside;
            std::future::pending::<()>().await;
        });
        shutdown.kill().await;
        assert_eq!(Arc::strong_count(&held), 1);
        shutdown.spawn(std::future::pending::<()>()).await.unwrap();
    }
}
