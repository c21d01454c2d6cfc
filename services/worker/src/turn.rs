//! Turns: so many bodies flow into the store at full speed at once, each through a buffer of its own that is large
//! enough to make hashing and writing worth a hop to another thread.
//!
//! More at once would not be faster, only larger. A turn is a courtesy and no lock: who has waited long enough goes
//! on without one, through a buffer that is small, and takes one when there is one again. Who lets the worker wait for
//! bytes gives it back for good, so that slow clients cost honest ones a moment at most. Ends with the request.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sluice_proto::problem::Refusal;
use sluice_store::{AlignedBuffer, RunWriter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::refusal;

/// The longest that a request waits for its turn.
const PATIENCE: Duration = Duration::from_millis(500);

/// A client that pauses longer than this gives its turn back.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// A client that takes longer than this for one buffer gives its turn back, too.
const FILL: Duration = Duration::from_secs(1);

/// Bytes that are gathered in a turn: about one hop for each chunk. With half of it an upload costs 3 % more processor
/// time, with a quarter 15 %; with twice as much no less.
const LARGE: usize = 1 << 20;

/// Bytes that are gathered without one.
const SMALL: usize = 16 << 10;

/// Pieces of this length are written as they come: a door that makes such pieces grants its client no more before they
/// are written.
const DIRECT: usize = 64 << 10;

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

    /// Waits for a turn, `None` if it took too long; and whether there was a wait.
    pub(crate) async fn take(&self) -> (Option<Turn>, bool) {
        if let Some(turn) = self.try_take() {
            return (Some(turn), false);
        }
        let turn = tokio::time::timeout(PATIENCE, self.0.clone().acquire_owned()).await;
        (turn.ok().and_then(Result::ok).map(Turn), true)
    }

    fn try_take(&self) -> Option<Turn> {
        self.0.clone().try_acquire_owned().ok().map(Turn)
    }
}

/// What gathers the pieces of one body.
pub(crate) struct Gather<'a> {
    turns: &'a Turns,
    turn: Option<Turn>,
    buffer: AlignedBuffer,
    /// When the buffer began to be filled.
    since: Instant,
    /// Bytes of the body that are still to come: no more room is taken than they need.
    left: u64,
    /// Whether it gave a turn back: then it gets no other.
    slow: bool,
}

impl<'a> Gather<'a> {
    pub(crate) fn new(turns: &'a Turns, turn: Option<Turn>, len: u64) -> Self {
        Self { turns, turn, buffer: AlignedBuffer::new(), since: Instant::now(), left: len, slow: false }
    }

    /// Whether there is a turn to give back.
    pub(crate) fn has_turn(&self) -> bool {
        self.turn.is_some()
    }

    /// Gives the turn back, and the large buffer with it.
    pub(crate) async fn yield_turn(&mut self, writer: &mut dyn RunWriter) -> Result<(), Refusal> {
        self.turn = None;
        self.slow = true;
        self.flush(writer).await?;
        self.buffer = AlignedBuffer::new();
        Ok(())
    }

    /// Takes a piece, and writes what has become enough. `left` was told to be at least as long.
    pub(crate) async fn take(&mut self, mut piece: Bytes, writer: &mut dyn RunWriter) -> Result<(), Refusal> {
        if piece.len() >= DIRECT {
            self.flush(writer).await?;
            self.left = self.left.saturating_sub(piece.len() as u64);
            return writer.write(piece).await.map_err(|error| refusal::of_store(&error));
        }
        while !piece.is_empty() {
            if self.buffer.is_empty() {
                self.begin();
                self.buffer.reserve(self.len());
            }
            let room = self.len() - self.buffer.len();
            let part = piece.split_to(room.min(piece.len()));
            self.buffer.extend(&part);
            self.left = self.left.saturating_sub(part.len() as u64);
            if self.left == 0 || part.len() == room {
                self.flush(writer).await?;
            } else if self.turn.is_some() && self.since.elapsed() > FILL {
                self.yield_turn(writer).await?;
            }
        }
        Ok(())
    }

    /// A buffer begins to be filled: in a turn, if there is one.
    fn begin(&mut self) {
        self.since = Instant::now();
        if self.turn.is_none() && !self.slow {
            self.turn = self.turns.try_take();
        }
    }

    /// Bytes to gather.
    fn len(&self) -> usize {
        let most = if self.turn.is_some() { LARGE } else { SMALL };
        let coming = usize::try_from(self.left).unwrap_or(usize::MAX).saturating_add(self.buffer.len());
        most.min(coming).max(1)
    }

    /// Writes what was gathered. The writer is done with the bytes when it returns, so their room is used again.
    async fn flush(&mut self, writer: &mut dyn RunWriter) -> Result<(), Refusal> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        writer.write(self.buffer.take()).await.map_err(|error| refusal::of_store(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use sluice_engine::hash::ChainingValue;
    use sluice_store::{RunReceipt, StoreError};

    /// Notes how much was written at once.
    #[derive(Default)]
    struct Writes(Vec<usize>);

    #[async_trait]
    impl RunWriter for Writes {
        async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
            self.0.push(bytes.len());
            Ok(())
        }

        async fn finish(self: Box<Self>, _: Option<&[ChainingValue]>) -> Result<RunReceipt, StoreError> {
            Err(StoreError::Closing)
        }
    }

    /// Gives `len` bytes in pieces of 10,000, a pause after each.
    async fn given(turns: &Turns, turn: Option<Turn>, len: usize, pause: Duration) -> Vec<usize> {
        let mut writer = Writes::default();
        let mut gather = Gather::new(turns, turn, len as u64);
        let mut left = len;
        while left > 0 {
            let piece = left.min(10_000);
            gather.take(Bytes::from(vec![0; piece]), &mut writer).await.unwrap();
            left -= piece;
            tokio::time::sleep(pause).await;
        }
        assert_eq!(writer.0.iter().sum::<usize>(), len, "everything is written, and nothing twice");
        writer.0
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_writes_in_large_pieces_and_the_others_in_small_ones() {
        let turns = Turns::new(1);
        let (turn, waited) = turns.take().await;
        assert!(!waited);
        let len = 2 * LARGE + 7;
        assert_eq!(given(&turns, None, 2 * SMALL + 7, Duration::ZERO).await, [SMALL, SMALL, 7]);
        assert_eq!(given(&turns, turn, len, Duration::ZERO).await, [LARGE, LARGE, 7]);
        assert_eq!(given(&turns, None, len, Duration::ZERO).await, [LARGE, LARGE, 7], "a turn was free");
        assert_eq!(given(&turns, None, 3, Duration::ZERO).await, [3]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_fills_a_buffer_slowly_gives_the_turn_back_for_good() {
        let turns = Turns::new(1);
        let (turn, waited) = turns.take().await;
        assert!(!waited);
        let writes = given(&turns, turn, LARGE, Duration::from_millis(90)).await;
        assert!(writes[0] < LARGE, "{writes:?}");
        assert!(writes[1..].iter().all(|len| *len <= SMALL), "{writes:?}");
        assert!(turns.try_take().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_in_large_pieces_is_not_copied() {
        let turns = Turns::new(1);
        let mut writer = Writes::default();
        let mut gather = Gather::new(&turns, None, 3 * LARGE as u64);
        gather.take(Bytes::from(vec![0; 7]), &mut writer).await.unwrap();
        gather.take(Bytes::from(vec![0; DIRECT]), &mut writer).await.unwrap();
        assert_eq!(writer.0, [7, DIRECT], "in order, and at once");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_goes_on_without() {
        let turns = Turns::new(1);
        let first = turns.take().await;
        assert!(matches!(first, (Some(_), false)));
        assert!(matches!(turns.take().await, (None, true)));
        drop(first);
        assert!(matches!(turns.take().await, (Some(_), false)));
    }
}
