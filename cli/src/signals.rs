//! Ctrl-C and SIGTERM, for commands that have something to end in order.

use std::io;
use std::time::Duration;

use anyhow::Context as _;
use sluice_node::shutdown::Stopped;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::context::Context;
use crate::failure::{Failure, INTERRUPTED};

/// How long requests in flight may take to finish, unless somebody says otherwise.
pub(crate) const STOP_WITHIN: Duration = Duration::from_secs(10);

/// Listens from when it is made, so that no signal falls between two waits. The signals no longer end the process.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Begins to listen.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// The next one.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Starts what is to serve. Signals are listened for before anyone is told where to send them, and one that comes
    /// meanwhile ends the start.
    pub(crate) async fn start<T, E>(start: impl Future<Output = Result<T, E>>) -> anyhow::Result<(Self, T)>
    where
        E: Into<anyhow::Error>,
    {
        let mut signals = Self::listen().context("cannot listen for signals")?;
        tokio::select! {
            started = start => Ok((signals, started.map_err(Into::into)?)),
            () = signals.next() => Err(Failure::Interrupted.into()),
        }
    }

    /// Serves until a signal comes, then stops in order: `stop` is given how long that may take. A second signal ends the
    /// process at once.
    pub(crate) async fn serve_until<F>(
        mut self,
        context: &Context,
        within: Duration,
        stop: impl FnOnce(Duration) -> F,
    ) where
        F: Future<Output = Stopped>,
    {
        context.remark("serving; Ctrl-C stops");
        self.next().await;
        context.remark("stopping; once more to quit at once");
        tokio::select! {
            stopped = stop(within) => if let Stopped::Killed { tasks } = stopped {
                context.remark(&format!("{tasks} tasks did not finish in time; nothing acknowledged is lost"));
            },
            () = self.next() => std::process::exit(INTERRUPTED.into()),
        }
    }
}
