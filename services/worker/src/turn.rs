//! Turns: so many bodies flow into the store at once, and the next ones wait with their bytes still on the line.
//!
//! More at once would not be faster, only larger: each body that flows has buffers of its own. A turn is a courtesy
//! and no lock: who has waited long enough goes on without one, and who lets the worker wait for bytes gives it back,
//! so that slow clients cost honest ones a moment at most. Ends with the request that holds it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The longest that a request waits for its turn.
const PATIENCE: Duration = Duration::from_millis(500);

/// A client that pauses longer than this gives its turn back.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// The turns of one worker.
#[derive(Debug)]
pub(crate) struct Turns(Arc<Semaphore>);

/// Somebody's turn.
#[derive(Debug)]
pub(crate) struct Turn(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Turns {
    pub(crate) fn new(count: usize) -> Self {
        Self(Arc::new(Semaphore::new(count.max(1))))
    }

    /// Waits for a turn; `None` if it took too long.
    pub(crate) async fn take(&self) -> Option<Turn> {
        let turn = tokio::time::timeout(PATIENCE, self.0.clone().acquire_owned()).await;
        turn.ok().and_then(Result::ok).map(Turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_goes_on_without() {
        let turns = Turns::new(1);
        let first = turns.take().await;
        assert!(first.is_some());
        assert!(turns.take().await.is_none());
        drop(first);
        assert!(turns.take().await.is_some());
    }
}
