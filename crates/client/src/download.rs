//! Download: verified, from any URL that answers, over several connections at once.
//!
//! For each unit of at most 4 GiB the chunk values and their proof are fetched and led to the file's root; then the
//! content comes in requests of up to 8 chunks, and no byte is given out before its chunk hashed to its value. A
//! datacenter whose bytes or values do not fit is set aside, and another is asked. Memory: one buffer of 8 MiB per
//! request in flight.

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::stream::{self, Stream, StreamExt};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::{CHUNK_LEN, UNIT_CHUNKS, UNIT_LEVEL};
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{ProofStep, merge_chunks, root_of_proof};
use sluice_proto::http::{FileStatus, State, TreeNode};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::Client;
use crate::door::Door;
use crate::doors::First;
use crate::error::ClientError;
use crate::event::{Event, SharedObserver};
use crate::part::{Part, PartOf};
use crate::plan::runs;
use crate::refused::Operation;
use crate::settle;

/// What part of a file is wanted, and how sure to be of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DownloadOptions {
    /// Only these bytes; the whole file if absent.
    pub range: Option<ByteRange>,
    /// The root that the file must have; that of the status if absent.
    pub expected_root: Option<Root>,
}

/// Bytes `first` to `last`, both included, as in HTTP; to the end of the file if `last` is absent or beyond it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// The first byte.
    pub first: u64,
    /// The last byte.
    pub last: Option<u64>,
}

/// Where a download goes.
pub enum Target {
    /// A file, by way of `PATH.part`; an interrupted download carries on there.
    File {
        /// The file.
        path: PathBuf,
        /// Whether an existing file may be replaced.
        replace: bool,
    },
    /// Anything that takes bytes in order.
    Writer(Box<dyn Write + Send>),
}

/// What a download did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Downloaded {
    /// The file.
    pub id: Uuid,
    /// Bytes written to the target, with those an earlier download had left there.
    pub bytes: u64,
    /// Size of the whole file in bytes.
    pub size: u64,
    /// Its root, to which every byte was led.
    pub root: Root,
    /// Chunks that were fetched.
    pub chunks_fetched: u64,
    /// Chunks that an interrupted download had left, verified.
    pub chunks_kept: u64,
}

impl Client {
    /// Downloads a complete file, or a range of it.
    pub async fn download(
        &self,
        id: Uuid,
        target: Target,
        options: &DownloadOptions,
        observer: SharedObserver,
    ) -> Result<Downloaded, ClientError> {
        let status = self.complete_status(id, &observer).await?;
        let Some(size) = status.size else { return Err(incomplete(&status)) };
        let file = Geometry::new(size)?;
        let root = root_of(&status)?;
        if let Some(expected) = options.expected_root.filter(|expected| *expected != root) {
            return Err(ClientError::RootMismatch { id, dc: status.dc, ours: expected, theirs: root });
        }
        let wanted = wanted_bytes(file, options.range)?;
        let chunks = wanted.start / CHUNK_LEN..wanted.end.div_ceil(CHUNK_LEN);
        let chunks = if wanted.is_empty() { 0..0 } else { chunks };
        observer.observe(&Event::Planned {
            chunks: chunks.end - chunks.start,
            bytes: wanted.end - wanted.start,
            held: 0,
        });
        let len = wanted.end - wanted.start;
        let sink = match target {
            Target::File { path, replace } => {
                let of = PartOf { id, root: root.to_string(), from: wanted.start, len };
                Sink::Part(Arc::new(blocking(move || Part::open(&path, replace, &of)).await?))
            }
            Target::Writer(writer) => Sink::Writer(writer),
        };
        let download = Arc::new(Download { client: self.clone(), id, file, root, wanted, observer });
        let (fetched, kept) = download.run(chunks, sink).await?;
        Ok(Downloaded { id, bytes: len, size: file.size(), root, chunks_fetched: fetched, chunks_kept: kept })
    }

    /// The status of a file that can be read, from whoever says that it can.
    async fn complete_status(&self, id: Uuid, observer: &SharedObserver) -> Result<FileStatus, ClientError> {
        let mut status = self.status(id).await?;
        if status.state < State::Complete {
            // Another datacenter may have heard of the rest already.
            let others = self.statuses(id, None, observer).await?.known;
            if let Some((_, best)) = others.into_iter().max_by_key(|(_, other)| other.state) {
                status = best;
            }
        }
        settle::check_alive(&status)?;
        match status.state {
            State::Complete | State::Assembled => Ok(status),
            State::Receiving | State::Conflict | State::Dropped => Err(incomplete(&status)),
        }
    }
}

fn incomplete(status: &FileStatus) -> ClientError {
    let FileStatus { id, state, missing_chunks, chunks, .. } = *status;
    ClientError::Incomplete { id, state, missing_chunks, chunks }
}

/// Where verified bytes go.
enum Sink {
    Part(Arc<Part>),
    Writer(Box<dyn Write + Send>),
}

struct Download {
    client: Client,
    id: Uuid,
    file: Geometry,
    root: Root,
    /// The bytes of the file that are wanted.
    wanted: Range<u64>,
    observer: SharedObserver,
}

/// Up to 8 chunks to fetch, and the values they must have; none for a file of one chunk, whose root says it all.
struct Piece {
    chunks: Range<u64>,
    values: Vec<ChainingValue>,
}

/// A piece that is verified.
struct Verified {
    chunks: Range<u64>,
    /// From the first byte of the first chunk; empty if the part has them already.
    bytes: Vec<u8>,
    kept: bool,
}

impl Download {
    /// Numbers of chunks fetched and kept.
    async fn run(self: &Arc<Self>, chunks: Range<u64>, mut sink: Sink) -> Result<(u64, u64), ClientError> {
        let (mut fetched, mut kept) = (0, 0);
        let mut at = chunks.start;
        while at < chunks.end {
            let unit_end = (at / UNIT_CHUNKS + 1) * UNIT_CHUNKS;
            let end = chunks.end.min(unit_end);
            let pieces = self.pieces(at..end).await?;
            let part = match &sink {
                Sink::Part(part) => Some(part.clone()),
                Sink::Writer(_) => None,
            };
            let verified = pieces.into_iter().map(|piece| {
                let (download, part) = (self.clone(), part.clone());
                async move { download.obtain(piece, part).await }
            });
            let verified = stream::iter(verified);
            let jobs = self.client.jobs();
            // A file takes its pieces in any order; everything else needs them in theirs.
            let mut verified: std::pin::Pin<Box<dyn Stream<Item = _> + Send>> = match &sink {
                Sink::Part(_) => Box::pin(verified.buffer_unordered(jobs)),
                Sink::Writer(_) => Box::pin(verified.buffered(jobs)),
            };
            while let Some(piece) = verified.next().await {
                let piece = piece?;
                let count = piece.chunks.end - piece.chunks.start;
                if piece.kept {
                    kept += count;
                } else {
                    fetched += count;
                    sink = self.write(piece, sink).await?;
                }
            }
            at = end;
        }
        match sink {
            Sink::Part(part) => match Arc::into_inner(part) {
                Some(part) => blocking(move || part.publish()).await?,
                None => return Err(ClientError::Task { cause: "the part is still in use".into() }),
            },
            Sink::Writer(mut writer) => {
                blocking(move || {
                    writer.flush().map_err(|cause| ClientError::Target { path: "(stream)".into(), cause })
                })
                .await?;
            }
        }
        Ok((fetched, kept))
    }

    /// The pieces of `chunks`, which lie inside one unit, with their proven values.
    async fn pieces(&self, chunks: Range<u64>) -> Result<Vec<Piece>, ClientError> {
        if self.file.chunks() == 1 {
            return Ok(vec![Piece { chunks, values: Vec::new() }]);
        }
        let mut values = Vec::with_capacity((chunks.end - chunks.start) as usize);
        for place in Place::tile(chunks.clone(), UNIT_LEVEL, self.file) {
            let (id, file, root) = (self.id, self.file, self.root);
            let ask = |door: Arc<Door>| async move {
                let node = door.tree(id, place.start(), place.level()).await?;
                proven_values(file, place, root, &node, &door)
            };
            values.extend(self.client.doors().anywhere(First::Idlest, &self.observer, ask).await?.1);
        }
        let offset = chunks.start;
        Ok(runs(chunks)
            .map(|run| {
                let values = &values[(run.start - offset) as usize..(run.end - offset) as usize];
                Piece { chunks: run, values: values.to_vec() }
            })
            .collect())
    }

    /// Takes a piece from the part if it is there, or fetches it.
    async fn obtain(&self, piece: Piece, part: Option<Arc<Part>>) -> Result<Verified, ClientError> {
        let Piece { chunks, values } = piece;
        let values = Arc::new(values);
        let (start, count) = (chunks.start, chunks.end - chunks.start);
        let offset = start * CHUNK_LEN;
        let len = self.file.range_len(chunks.start, chunks.end) as usize;
        let check = Check { values: values.clone(), root: self.root, start };
        let inside = self.wanted.start <= offset && offset + len as u64 <= self.wanted.end;
        if let Some(part) = part.filter(|part| inside && part.is_resumed()) {
            let (at, check) = (offset - self.wanted.start, check.clone());
            if blocking(move || Ok(check.first_bad(&part.read(at, len)?).is_none())).await? {
                self.observer.observe(&Event::Skipped { start, count, bytes: len as u64 });
                return Ok(Verified { chunks, bytes: Vec::new(), kept: true });
            }
        }
        let id = self.id;
        let fetch = |door: Arc<Door>| {
            let check = check.clone();
            async move {
                let bytes = door.content(id, offset, len, Operation::Content { start, count }).await?;
                let (bytes, bad) = blocking(move || {
                    let bad = check.first_bad(&bytes);
                    Ok((bytes, bad))
                })
                .await?;
                match bad {
                    None => Ok(bytes),
                    Some(chunk) => Err(ClientError::Content { dc: door.name(), chunk }),
                }
            }
        };
        let doors = self.client.doors();
        let (url, bytes) = doors.anywhere_for(First::Idlest, len as u64, &self.observer, fetch).await?;
        self.observer.observe(&Event::Fetched { url, start, count, bytes: len as u64 });
        Ok(Verified { chunks, bytes, kept: false })
    }

    async fn write(&self, piece: Verified, sink: Sink) -> Result<Sink, ClientError> {
        let offset = piece.chunks.start * CHUNK_LEN;
        let from = self.wanted.start.max(offset);
        let to = self.wanted.end.min(offset + piece.bytes.len() as u64);
        let at = from - self.wanted.start;
        blocking(move || {
            let bytes = &piece.bytes[(from - offset) as usize..(to - offset) as usize];
            match sink {
                Sink::Part(part) => {
                    part.write(at, bytes)?;
                    Ok(Sink::Part(part))
                }
                Sink::Writer(mut writer) => match writer.write_all(bytes) {
                    Ok(()) => Ok(Sink::Writer(writer)),
                    Err(cause) => Err(ClientError::Target { path: "(stream)".into(), cause }),
                },
            }
        })
        .await
    }
}

/// What bytes must hash to.
#[derive(Clone)]
struct Check {
    /// By chunk; empty for a file of one chunk.
    values: Arc<Vec<ChainingValue>>,
    root: Root,
    start: u64,
}

impl Check {
    /// The first chunk of `bytes` that does not hash to its value.
    fn first_bad(&self, bytes: &[u8]) -> Option<u64> {
        if self.values.is_empty() {
            return (Root::of_bytes(bytes) != self.root).then_some(self.start);
        }
        let parts = bytes.chunks(CHUNK_LEN as usize);
        if parts.len() != self.values.len() {
            return Some(self.start);
        }
        (self.start..).zip(parts.zip(self.values.iter())).find_map(|(chunk, (part, value))| {
            let found = ChunkIndex::new(chunk).ok().and_then(|index| ChainingValue::of_chunk(index, part));
            (found != Some(*value)).then_some(chunk)
        })
    }
}

/// The chunk values of a node, once they and the proof lead to the root.
fn proven_values(
    file: Geometry,
    place: Place,
    root: Root,
    node: &TreeNode,
    door: &Door,
) -> Result<Vec<ChainingValue>, ClientError> {
    let operation = Operation::Tree { start: place.start(), level: place.level() };
    let mut values = Vec::with_capacity(node.chunk_values.len());
    for value in &node.chunk_values {
        match value {
            Some(value) => values.push(value.parse()?),
            None => {
                let cause = "it does not know all of them yet".into();
                return Err(ClientError::Unreachable { at: door.name(), operation, cause });
            }
        }
    }
    let mut proof = Vec::with_capacity(node.proof.len());
    for step in &node.proof {
        let sibling = Place::new(step.start, step.level).map_err(|error| ClientError::Malformed {
            at: door.name(),
            operation,
            cause: error.to_string(),
            trace: None,
        })?;
        proof.push(ProofStep { sibling, value: step.value.parse()? });
    }
    let led_to = merge_chunks(file, place, &values)
        .and_then(|value| root_of_proof(file, Span::new(place, value), &proof));
    if led_to == Some(root) {
        Ok(values)
    } else {
        Err(ClientError::Proof { dc: door.name(), start: place.start(), level: place.level(), root })
    }
}

fn root_of(status: &FileStatus) -> Result<Root, ClientError> {
    match &status.root {
        Some(root) => Ok(root.parse()?),
        None => Err(ClientError::Malformed {
            at: status.dc.clone(),
            operation: Operation::Status { id: status.id },
            cause: format!("the file is {} and has no root", status.state.name()),
            trace: None,
        }),
    }
}

/// The bytes `[from, to)` that a range means.
fn wanted_bytes(file: Geometry, range: Option<ByteRange>) -> Result<Range<u64>, ClientError> {
    let size = file.size();
    let Some(ByteRange { first, last }) = range else { return Ok(0..size) };
    let end = last.map_or(size, |last| last.saturating_add(1).min(size));
    if first < end {
        Ok(first..end)
    } else {
        Err(ClientError::Range { first, last: last.unwrap_or(size.saturating_sub(1)), size })
    }
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ClientError> {
    spawn_blocking(work).await.map_err(|error| ClientError::Task { cause: error.to_string() })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_http() {
        let file = Geometry::new(100).unwrap();
        let wanted = |first, last| wanted_bytes(file, Some(ByteRange { first, last })).ok();
        assert_eq!(wanted(0, Some(0)), Some(0..1));
        assert_eq!(wanted(10, None), Some(10..100));
        assert_eq!(wanted(10, Some(500)), Some(10..100));
        assert_eq!(wanted(100, None), None);
        assert_eq!(wanted(7, Some(3)), None);
        assert_eq!(wanted_bytes(file, None).ok(), Some(0..100));
    }
}
