//! Upload of a stream, whose length nobody knows before its end: a pipe, a socket.
//!
//! It is read once, in order, by the call's own task. What was read is hashed, cut into runs and sent by tasks of a
//! `JoinSet`, at most [`ClientConfig::jobs`](crate::ClientConfig::jobs) of 8 MiB at a time: when all are busy, nothing
//! is read. Stripes keep to one URL while it answers. At the end the size is settled, and then the last chunk, if it
//! is short, goes where that was said. Tasks end with the stream, and are aborted when one fails or the call is
//! dropped.
//!
//! A stream that fits one buffer has a length after all, and is uploaded like a file. What the cluster lost of a
//! longer one cannot be sent again: the caller must make the stream once more, and name the same id.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::{CHUNK_LEN, MAX_RUN, STRIPE_LEVEL};
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::SpanTree;
use sluice_proto::http::FileStatus;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet, spawn_blocking};
use tokio::time::Instant;
use uuid::Uuid;

use crate::Client;
use crate::chunk_set::ChunkSet;
use crate::creation::Creation;
use crate::door::Door;
use crate::doors::{First, Ticket, gave_up};
use crate::error::ClientError;
use crate::event::{Event, SharedObserver};
use crate::plan::runs;
use crate::settle;
use crate::source::Source;
use crate::upload::{Upload, UploadOptions, Uploaded, check_receipt, hash_chunks};

/// What is read at once: the longest run.
const BLOCK: usize = MAX_RUN as usize * CHUNK_LEN as usize;

/// Stripes that may be open at once: the window is far shorter.
const OPEN_STRIPES: u64 = 64;

impl Client {
    /// Uploads a stream, or what the cluster lacks of it: what it holds already is read and hashed, and not sent.
    ///
    /// Fails as [`upload`](Self::upload) does, and with [`Input`](ClientError::Input) when the stream itself fails.
    /// With the same id and the same bytes from the beginning the call can be made again.
    pub async fn upload_stream(
        &self,
        mut input: impl AsyncRead + Send + Unpin,
        options: &UploadOptions,
        observer: SharedObserver,
    ) -> Result<Uploaded, ClientError> {
        let id = options.id.unwrap_or_else(Uuid::now_v7);
        let known = self.what_is_known(id, options, &observer).await?;
        let is_open = known.known.iter().any(|(_, status)| status.size.is_none());
        let first = read_block(&mut input).await.map_err(|cause| ClientError::Input { id, at: 0, cause })?;
        if first.len() < BLOCK && !is_open {
            let options = UploadOptions { id: Some(id), ..options.clone() };
            return self.upload(&Source::memory(first), &options, observer).await;
        }
        let body = options.create_file(id, None);
        let (creation, known) = match known.known.first() {
            Some((url, _)) => {
                known.known.iter().try_for_each(|(_, status)| settle::check_alive(status))?;
                (Creation::at(self, id, body, *url, &observer), known.known)
            }
            None => {
                let (creation, status) =
                    Creation::begin(self, id, body, First::Configured, &observer).await?;
                let known = self.known_now(id, known, &creation, &status, &observer).await?;
                (creation, known)
            }
        };
        let first_url = First::Url(creation.url);
        let stream = Arc::new(Stream {
            client: self.clone(),
            id,
            creation: Arc::new(creation),
            held: settle::held(&known),
            observer: observer.clone(),
            state: Mutex::new(State {
                tree: SpanTree::new(Geometry::largest()),
                first: None,
                stripes: BTreeMap::new(),
                sent: 0,
                skipped: 0,
                useful_at: Instant::now(),
                last: None,
            }),
        });
        let (chunks, tail) = stream.clone().pass_on(first, &mut input).await?;
        let size = Geometry::new(chunks * CHUNK_LEN + tail.len() as u64)?;
        let status = stream.settle(size, tail.clone(), first_url).await?;
        stream.finish(size, tail, options, status).await
    }
}

/// Reads until the block is full or the stream ends.
async fn read_block(input: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let mut block = BytesMut::with_capacity(BLOCK);
    while block.len() < BLOCK {
        let room = BLOCK - block.len();
        if input.take(room as u64).read_buf(&mut block).await? == 0 {
            break;
        }
    }
    Ok(block.freeze())
}

/// A stream under way.
struct Stream {
    client: Client,
    id: Uuid,
    creation: Arc<Creation>,
    /// What the cluster held before.
    held: ChunkSet,
    observer: SharedObserver,
    state: Mutex<State>,
}

struct State {
    /// The values of whole chunks but the first: with it, a stream of 2, 4, 8, … chunks would merge to one value, from
    /// which there is no way to the root.
    tree: SpanTree,
    /// The value of the first chunk, and the root of a file that is nothing else.
    first: Option<(ChainingValue, Root)>,
    /// Which URL takes which stripe.
    stripes: BTreeMap<u64, usize>,
    sent: u64,
    skipped: u64,
    /// When a chunk was last acknowledged.
    useful_at: Instant,
    last: Option<ClientError>,
}

impl Stream {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change under the lock is whole; a panic elsewhere leaves it meaningful.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads to the end, and sends whole chunks: how many there were, and what was left.
    async fn pass_on(
        self: Arc<Self>,
        first: Bytes,
        input: &mut (impl AsyncRead + Unpin),
    ) -> Result<(u64, Bytes), ClientError> {
        let window = Arc::new(Semaphore::new(self.client.jobs()));
        let mut tasks: JoinSet<Result<(), ClientError>> = JoinSet::new();
        let (mut at, mut block) = (0, first);
        // Never closed.
        let mut place = window.clone().acquire_owned().await;
        let tail = loop {
            let count = block.len() as u64 / CHUNK_LEN;
            let whole = block.split_to((count * CHUNK_LEN) as usize);
            Geometry::new((at + count) * CHUNK_LEN + block.len() as u64)?;
            let stream = self.clone();
            tasks.spawn(async move {
                let sent = stream.take(at..at + count, whole).await;
                drop(place);
                sent
            });
            at += count;
            if !block.is_empty() || count < u64::from(MAX_RUN) {
                break block;
            }
            // First the room, then what fills it.
            let next = async {
                let place = window.clone().acquire_owned().await;
                (place, read_block(input).await)
            };
            let next = tokio::select! {
                next = next => next,
                // Not to be found out only when a slow stream has more to say.
                error = first_failure(&mut tasks) => return Err(error),
            };
            place = next.0;
            block = next.1.map_err(|cause| ClientError::Input { id: self.id, at: at * CHUNK_LEN, cause })?;
        };
        while let Some(ended) = tasks.join_next().await {
            joined(ended)?;
        }
        Ok((at, tail))
    }

    /// Hashes whole chunks, and sends those that are not held.
    async fn take(self: Arc<Self>, chunks: Range<u64>, bytes: Bytes) -> Result<(), ClientError> {
        let (hashed, range) = (bytes.clone(), chunks.clone());
        let values = spawn_blocking(move || hash_chunks(range, &hashed))
            .await
            .map_err(|error| ClientError::Task { cause: error.to_string() })??;
        {
            let mut state = self.state();
            for (chunk, value) in chunks.clone().zip(&values) {
                if chunk == 0 {
                    state.first = Some((*value, Root::of_bytes(&bytes[..CHUNK_LEN as usize])));
                    continue;
                }
                let place = Place::of_chunk(ChunkIndex::new(chunk)?);
                state.tree.insert(Span::new(place, *value)).map_err(|contradiction| ClientError::Task {
                    cause: format!("chunk {chunk} was read twice: {contradiction}"),
                })?;
            }
        }
        for (part, held) in self.held.cut(chunks.clone()) {
            if held {
                let (start, count) = (part.start, part.end - part.start);
                self.state().skipped += count;
                self.observer.observe(&Event::Skipped { start, count, bytes: count * CHUNK_LEN });
                continue;
            }
            for run in runs(part) {
                let slots = (run.start - chunks.start) as usize..(run.end - chunks.start) as usize;
                let len = CHUNK_LEN as usize;
                let part = bytes.slice(slots.start * len..slots.end * len);
                self.send(run.start, part, &values[slots]).await?;
            }
        }
        Ok(())
    }

    /// Sends a run until some URL takes it.
    async fn send(&self, start: u64, bytes: Bytes, values: &[ChainingValue]) -> Result<(), ClientError> {
        let stripe = start >> STRIPE_LEVEL;
        loop {
            let Some(ticket) = self.enter(stripe) else {
                let deadline = self.deadline()?;
                self.client.doors().wait(deadline, &[]).await;
                continue;
            };
            match ticket.door().put_chunks(self.id, start, values, bytes.clone()).await {
                Ok(receipt) => {
                    ticket.carried(bytes.len() as u64, receipt.busy, &self.observer);
                    check_receipt(start, values, &receipt)?;
                    let count = values.len() as u64;
                    {
                        let mut state = self.state();
                        state.sent += count;
                        (state.useful_at, state.last) = (Instant::now(), None);
                    }
                    self.observer.observe(&Event::Acknowledged {
                        url: ticket.url,
                        dc: &receipt.dc,
                        start,
                        count,
                        bytes: bytes.len() as u64,
                        provisional: receipt.provisional,
                    });
                    if receipt.provisional {
                        self.creation.unheard_of(&ticket.door()).await?;
                    }
                    return Ok(());
                }
                Err(error) if error.is_transient() => {
                    self.creation.refused_by(&ticket.door(), &error).await?;
                    ticket.failed(&error, &self.observer);
                    let mut state = self.state();
                    state.stripes.remove(&stripe);
                    state.last = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A place at the URL of a stripe; the least busy takes it when none has, or the one that had it cannot.
    fn enter(&self, stripe: u64) -> Option<Ticket<'_>> {
        let doors = self.client.doors();
        let mut state = self.state();
        let usable = doors.usable();
        let kept = state.stripes.get(&stripe).copied();
        let url = match kept.filter(|kept| usable.iter().any(|(url, _)| url == kept)) {
            Some(url) => url,
            None => {
                // Of equals the one that has the fewest open stripes.
                let taken = |url| state.stripes.values().filter(|other| **other == url).count();
                let (url, _) = *usable.iter().min_by_key(|(url, in_flight)| (*in_flight, taken(*url)))?;
                url
            }
        };
        state.stripes.retain(|open, _| open + OPEN_STRIPES > stripe);
        state.stripes.insert(stripe, url);
        Some(doors.enter(url))
    }

    /// Until when to go on; an error if that has passed.
    fn deadline(&self) -> Result<Instant, ClientError> {
        let mut state = self.state();
        let deadline = state.useful_at + self.client.doors().policy().retry_for;
        match state.last.take_if(|_| Instant::now() >= deadline) {
            Some(last) => Err(gave_up(state.useful_at.elapsed(), Some(last))),
            // Others are in flight, and watched by their own timeouts.
            None => Ok(deadline.max(Instant::now() + self.client.doors().policy().longest_pause)),
        }
    }

    /// Says how long the stream was, and sends what is left of it where that was said.
    async fn settle(&self, size: Geometry, tail: Bytes, first: First) -> Result<FileStatus, ClientError> {
        let (id, last) = (self.id, size.size() / CHUNK_LEN);
        let held = self.held.cut(last..last + 1).iter().any(|(_, held)| *held);
        let values = if tail.is_empty() { Vec::new() } else { hash_chunks(last..last + 1, &tail)? };
        let settle = |door: Arc<Door>| {
            let (tail, values) = (tail.clone(), values.clone());
            async move {
                let settle = |door: Arc<Door>| async move { door.settle(id, size.size()).await };
                let status = self.creation.with(door.clone(), settle).await?;
                let receipt = match tail.is_empty() || held {
                    true => None,
                    false => Some(door.put_chunks(id, last, &values, tail).await?),
                };
                Ok((status, receipt))
            }
        };
        let (url, (status, receipt)) = self.client.doors().anywhere(first, &self.observer, settle).await?;
        settle::check_alive(&status)?;
        let held = self.held.len();
        self.observer.observe(&Event::Planned { chunks: size.chunks(), bytes: size.size(), held });
        let bytes = tail.len() as u64;
        match receipt {
            Some(receipt) => {
                check_receipt(last, &values, &receipt)?;
                self.state().sent += 1;
                let provisional = receipt.provisional;
                let (dc, start, count) = (receipt.dc.as_str(), last, 1);
                self.observer.observe(&Event::Acknowledged { url, dc, start, count, bytes, provisional });
            }
            None if bytes > 0 => {
                self.state().skipped += 1;
                self.observer.observe(&Event::Skipped { start: last, count: 1, bytes });
            }
            None => {}
        }
        Ok(status)
    }

    /// From here on the file is like any other, but that nothing of it can be read again.
    async fn finish(
        &self,
        size: Geometry,
        tail: Bytes,
        options: &UploadOptions,
        status: FileStatus,
    ) -> Result<Uploaded, ClientError> {
        let mut tree = SpanTree::new(size);
        let (first, sent, skipped) = {
            let state = self.state();
            let first = state.first.map(|(value, _)| (0, value));
            let last = size.size() / CHUNK_LEN;
            let short = if tail.is_empty() { Vec::new() } else { hash_chunks(last..last + 1, &tail)? };
            let mut spans: Vec<Span> = state.tree.iter().collect();
            for (chunk, value) in first.into_iter().chain(short.into_iter().map(|value| (last, value))) {
                spans.push(Span::new(Place::of_chunk(ChunkIndex::new(chunk)?), value));
            }
            for span in spans {
                tree.insert(span).map_err(|error| ClientError::Task { cause: error.to_string() })?;
            }
            (state.first, state.sent, state.skipped)
        };
        let only_root = match first {
            _ if size.chunks() != 1 => None,
            Some((_, root)) => Some(root),
            None => Some(Root::of_bytes(&tail)),
        };
        let upload =
            Upload::of_stream(&self.creation, &self.observer, size, tree, only_root, (sent, skipped));
        Arc::new(upload).finish(options, status).await
    }
}

fn joined(ended: Result<Result<(), ClientError>, JoinError>) -> Result<(), ClientError> {
    ended.unwrap_or_else(|error| Err(ClientError::Task { cause: error.to_string() }))
}

/// Waits for a task that fails; for ever if none does.
async fn first_failure(tasks: &mut JoinSet<Result<(), ClientError>>) -> ClientError {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = joined(ended) {
            return error;
        }
    }
    std::future::pending().await
}
