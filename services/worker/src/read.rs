//! Bytes on their way out: chunks in order, each verified before its first byte is given out.
//!
//! A few chunks are fetched ahead, each paid for out of the memory budget until its last byte has left the process.
//! Where requests cost, several come with one (`ahead.rs`).
//!
//! They are fetched by a task, so that a slow reader does not make a fetch from another datacenter run out of time.
//! The task ends with the range, at the first error, when the stream is dropped or stalls, or with its datacenter.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::ids::{ClientFileId, FileId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_node::telemetry::carried;
use sluice_proto::calls::{ByteStream, ChunkSource};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::StoreError;
use tokio::sync::mpsc;

use crate::ahead::{Ahead, Away};
use crate::{WorkerParts, WorkerSettings, refusal, within};

/// Chunks that are located in one go: a power of two inside a unit, and small enough for a quick first byte.
const WINDOW: u64 = 256;

/// One stream's way to its chunks.
struct Reader {
    parts: WorkerParts,
    settings: WorkerSettings,
    context: SignedContext,
    id: ClientFileId,
    file: FileId,
    range: Range<u64>,
    ahead: Ahead,
}

/// The bytes `[range)` of a file. What can be refused at once is refused before there is a stream.
pub(crate) async fn stream(
    parts: WorkerParts,
    settings: WorkerSettings,
    context: SignedContext,
    id: ClientFileId,
    file: FileId,
    range: Range<u64>,
) -> Result<ByteStream, Refusal> {
    if range.is_empty() {
        return Ok(stream::empty().boxed());
    }
    let prefetch = settings.prefetch.max(1);
    let chunks = range.start / CHUNK_LEN..range.end.div_ceil(CHUNK_LEN);
    let ahead = Ahead::new(&parts, file, chunks.clone());
    let reader = Arc::new(Reader { parts, settings, context, id, file, range, ahead });

    // The first chunk is asked for here, so that its failure is an answer and not a stream that breaks off.
    let window = window(chunks.start, chunks.end);
    let mut sources = reader.clone().locate(window.clone()).await?.into_iter();
    let Some(source) = sources.next() else { return Err(unlocated()) };
    let first = reader.clone().piece(window.start, source).await?;

    let started = stream::iter(sources.zip(window.start + 1..).map(Ok));
    let locator = reader.clone();
    let rest = stream::try_unfold(window.end, move |at| {
        let (locator, end) = (locator.clone(), chunks.end);
        async move {
            if at >= end {
                return Ok(None);
            }
            let window = self::window(at, end);
            let sources = locator.locate(window.clone()).await?;
            let located = stream::iter(sources.into_iter().zip(window.clone()).map(Ok));
            Ok::<_, Refusal>(Some((located, window.end)))
        }
    });
    let len = reader.range.end - reader.range.start;
    let (tasks, stall) = (reader.parts.tasks.clone(), reader.settings.stall);
    let pieces = started
        .chain(rest.try_flatten())
        .map_ok(move |(source, index)| reader.clone().piece(index, source))
        .try_buffered(prefetch);
    // Room for one: the next piece is there when this one has gone, and what lies beyond is in `try_buffered`.
    let (sender, receiver) = mpsc::channel(1);
    tasks.spawn(carried(send(stream::once(async { Ok(first) }).chain(pieces), sender, stall)));
    Ok(receive(receiver, len))
}

async fn send(
    pieces: impl Stream<Item = Result<Bytes, Refusal>>,
    sender: mpsc::Sender<Result<Bytes, Refusal>>,
    stall: Duration,
) {
    let mut pieces = pin!(pieces);
    loop {
        let piece = tokio::select! {
            () = sender.closed() => return,
            piece = pieces.next() => piece,
        };
        let Some(piece) = piece else { return };
        let failed = piece.is_err();
        // A reader that stalls gives its memory back; it finds the stream broken off.
        let sent = tokio::time::timeout(stall, sender.send(piece)).await;
        if failed || !matches!(sent, Ok(Ok(()))) {
            return;
        }
    }
}

/// The pieces, `len` bytes in all. That the task is gone before that is an error, never the end.
fn receive(receiver: mpsc::Receiver<Result<Bytes, Refusal>>, len: u64) -> ByteStream {
    let pieces = stream::unfold((receiver, len), |(mut receiver, left)| async move {
        if left == 0 {
            return None;
        }
        match receiver.recv().await {
            Some(Ok(bytes)) => {
                let left = left.saturating_sub(bytes.len() as u64);
                Some((Ok(bytes), (receiver, left)))
            }
            Some(Err(refusal)) => Some((Err(refusal), (receiver, 0))),
            None => {
                let stopping = Refusal::new(
                    Problem::Stopping,
                    "the stream stalled, or the datacenter stopped, before its end",
                );
                Some((Err(stopping), (receiver, 0)))
            }
        }
    });
    pieces.boxed()
}

/// The chunks from `at` to the next multiple of [`WINDOW`], or to the end.
fn window(at: u64, end: u64) -> Range<u64> {
    at..((at / WINDOW + 1) * WINDOW).min(end)
}

fn unlocated() -> Refusal {
    Refusal::new(Problem::Internal, "a chunk of a complete file was not located")
}

impl Reader {
    async fn locate(self: Arc<Self>, window: Range<u64>) -> Result<Vec<ChunkSource>, Refusal> {
        let slots = &self.parts.slots;
        let answer = slots.locate(&self.context, self.id, window.clone());
        let sources = within(self.settings.patience, "the owner of the file's slot", answer).await?;
        if sources.len() as u64 == window.end - window.start { Ok(sources) } else { Err(unlocated()) }
    }

    /// The part of a chunk that lies in the range.
    async fn piece(self: Arc<Self>, number: u64, source: ChunkSource) -> Result<Bytes, Refusal> {
        let index = ChunkIndex::new(number).map_err(|error| refusal::of_geometry(&error))?;
        let bytes = match self.together(index, source).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => self.alone(index, source).await?,
            // Whoever else holds it may answer.
            Err(Away) => self.alone(index, ChunkSource { local: false, ..source }).await?,
        };
        let from = self.range.start.saturating_sub(index.offset());
        let to = (self.range.end - index.offset()).min(CHUNK_LEN);
        if from > to || to > bytes.len() as u64 {
            return Err(Refusal::new(
                Problem::Internal,
                format!("chunk {index} is shorter than the file says"),
            ));
        }
        // Both are at most 1 MiB.
        Ok(bytes.slice(from as usize..to as usize))
    }

    /// The chunk out of several that were read in one go, which are paid for.
    async fn together(&self, index: ChunkIndex, source: ChunkSource) -> Result<Option<Bytes>, Away> {
        if !source.local {
            return Ok(None);
        }
        let read = self.ahead.chunk(index).await?;
        Ok(read.and_then(|(bytes, value)| (value == source.value).then_some(bytes)))
    }

    /// The chunk by itself, paid for, wherever it is.
    async fn alone(&self, index: ChunkIndex, source: ChunkSource) -> Result<Bytes, Refusal> {
        let permit = self.parts.memory.take(CHUNK_LEN, self.settings.patience).await.inspect_err(|_| {
            self.parts.metrics.count_shed("memory");
        })?;
        let bytes = match self.local(index, source).await? {
            Some(bytes) => bytes,
            None => {
                let answer = self.parts.slots.fetch(&self.context, self.id, index, source.value);
                within(self.settings.patience, "the datacenter that holds the chunk", answer).await?
            }
        };
        Ok(permit.pay_for(bytes))
    }

    /// The chunk from the own store; `None` if it has to come from elsewhere.
    async fn local(&self, index: ChunkIndex, source: ChunkSource) -> Result<Option<Bytes>, Refusal> {
        if !source.local {
            return Ok(None);
        }
        let store = &self.parts.store;
        let number = index.number();
        // The store verifies the bytes against its record; the record must say what leads to the root.
        let read = match store.read_chunk(self.file, index).await {
            Ok(bytes) => store.values(self.file, number..number + 1).await.map(|values| (bytes, values)),
            Err(error) => Err(error),
        };
        match read {
            Ok((bytes, values)) => match values.first().copied().flatten() {
                Some(value) if value == source.value => Ok(Some(bytes)),
                Some(_) => self.report(index).await,
                // Freed since it was located.
                None => Ok(None),
            },
            Err(StoreError::Corrupt { .. }) => self.report(index).await,
            // Freed since, or the disk fails: whoever else holds it may answer.
            Err(
                StoreError::Missing { .. }
                | StoreError::NoFile(_)
                | StoreError::Io { .. }
                | StoreError::Unreachable { .. },
            ) => Ok(None),
            Err(error) => Err(refusal::of_store(&error)),
        }
    }

    /// Reports a damaged chunk, which has to come from elsewhere. Whoever is told counts and logs it.
    async fn report(&self, index: ChunkIndex) -> Result<Option<Bytes>, Refusal> {
        let slots = &self.parts.slots;
        let reported = async {
            slots.report_damage(self.file, index).await;
            Ok(())
        };
        within(self.settings.patience, "the owner of the file's slot", reported).await.map(|()| None)
    }
}
