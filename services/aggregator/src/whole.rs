//! Files that come whole, in one request.

use std::sync::Arc;

use bytes::Bytes;
use sluice_engine::aggregator::{Event, FileMemory, RecordSummary, StoredFile};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ledger::FileState;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::span::{Place, Span};
use sluice_proto::http::{FileStatus, Holder, State};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::{StoreError, WholeOutcome};

use crate::refusal::{dropped, of_store};
use crate::slots::in_conflict;
use crate::{AggregatorService, load};

/// Bytes that are hashed where they are; more are hashed on the blocking pool.
const HASH_HERE: usize = 32 << 10;

impl AggregatorService {
    /// Takes a whole file: durable, published and assembled when this returns, in one record. Returns whether it was new
    /// here; `None` if it must come as a record and chunks, because it has begun to.
    ///
    /// No other datacenter is asked: two that are sent the same file each take it, and find out afterwards.
    pub(crate) async fn whole(
        self: &Arc<Self>,
        context: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        let (file, id, digest) = (record.file_id(), record.client_id(), record.digest());
        let (root, value) = hashes(bytes.clone()).await?;
        if let Some(expected) = record.expected_root().filter(|expected| *expected != root) {
            let detail = format!("the bytes hash to {root}, expected_root is {expected}");
            return Err(
                Refusal::new(Problem::ChunkValue, detail).hint("nothing was stored; send the file again")
            );
        }
        let asked = self.look(file, move |aggregator| {
            let known = aggregator.file(file).map(|file| {
                let ledger = file.ledger();
                (
                    file.state(),
                    ledger.record_digest(),
                    ledger.root(),
                    ledger.conflict_reason(),
                    file.is_orphan(),
                )
            });
            (known, aggregator.generation(file))
        });
        let (known, generation) = asked.await?;
        match known {
            Some((FileState::Dropped, ..)) => return Err(dropped()),
            Some((FileState::Conflict, _, _, reason, _)) => return Err(in_conflict(reason)),
            Some((_, Some(other), ..)) if other != digest => {
                return Err(Refusal::new(Problem::MetadataConflict, "the file has other metadata")
                    .hint("the first metadata stands; use another id for another file"));
            }
            Some((_, _, Some(held), ..)) if held != root => return Err(other_bytes(held, root)),
            Some((FileState::Assembled, ..)) => {
                return Ok(Some((false, self.full_status(context, id).await?)));
            }
            Some((FileState::Unheard, _, _, _, false)) | None => {}
            Some(_) => return Ok(None),
        }
        let Some(shape) = record.geometry() else { return Ok(None) };
        let progress = record.expiry_secs().map(|_| self.parts.clock.now());
        let memory = FileMemory::of_whole(self.parts.dc, root, shape, progress);
        let outcome = self.parts.store.put_whole(&record, &memory.to_bytes(), bytes).await;
        let outcome = outcome.map_err(|error| match error {
            StoreError::WrongRoot { expected, .. } => other_bytes(expected, root),
            error => of_store(&error),
        });
        match outcome? {
            WholeOutcome::Stored => {}
            WholeOutcome::Known => {
                // The request that brought it may not have told the engine yet, or have ended before it could.
                load::reload(self, file).await?;
                return Ok(Some((false, self.full_status(context, id).await?)));
            }
            WholeOutcome::Begun => return Ok(None),
        }
        let first = ChunkIndex::new(0).ok().zip(value);
        let spans =
            first.map(|(first, value)| Span::new(Place::of_chunk(first), value)).into_iter().collect();
        let stored = StoredFile {
            tenant: record.tenant(),
            record: Some(RecordSummary::of(&record)),
            size: Some(shape),
            memory,
            generation,
            spans,
            chunks: shape.chunks(),
            published: Some(root),
        };
        self.ledgers.settle(file, Event::Whole(stored)).await?;
        Ok(Some((true, self.describe_whole(&record, root))))
    }

    /// Where a file stands that was just taken whole.
    fn describe_whole(&self, record: &MetadataRecord, root: Root) -> FileStatus {
        let me = self.dc_name(self.parts.dc);
        let shape = record.geometry();
        let chunks = shape.map_or(0, |shape| shape.chunks());
        let ranges = std::iter::once([0, chunks]).filter(|_| chunks > 0).collect::<Vec<_>>();
        let holders = ranges.first().map(|_| Holder { dc: me.clone(), chunks, ranges: ranges.clone() });
        FileStatus {
            id: record.client_id().uuid(),
            size: shape.map(|shape| shape.size()),
            chunks,
            name: record.name().to_owned(),
            content_type: record.content_type().to_owned(),
            metadata: record.user().clone(),
            expires_in: record.expiry_secs(),
            expected_root: record.expected_root().map(|root| root.to_string()),
            state: State::Assembled,
            conflict: None,
            home: me.clone(),
            home_epoch: 0,
            root: Some(root.to_string()),
            dc: me,
            home_answered: true,
            missing_chunks: 0,
            damaged: Vec::new(),
            missing: Vec::new(),
            holders: holders.into_iter().collect(),
        }
    }
}

/// The root of a file of at most one chunk, and the value of its chunk if it has one.
async fn hashes(bytes: Bytes) -> Result<(Root, Option<ChainingValue>), Refusal> {
    let hash = |bytes: &[u8]| {
        let first = ChunkIndex::new(0).ok().filter(|_| !bytes.is_empty());
        (Root::of_bytes(bytes), first.and_then(|first| ChainingValue::of_chunk(first, bytes)))
    };
    if bytes.len() <= HASH_HERE {
        return Ok(hash(&bytes));
    }
    tokio::task::spawn_blocking(move || hash(&bytes)).await.map_err(|_| crate::refusal::stopping())
}

fn other_bytes(held: Root, got: Root) -> Refusal {
    Refusal::new(
        Problem::ChunkConflict,
        format!("the file is stored with other bytes: root {held}, got {got}"),
    )
    .hint("the first bytes stand; use another id for another file")
}
