//! Files that come whole, in one request.

use std::sync::Arc;

use bytes::Bytes;
use sluice_engine::aggregator::{Event, FileMemory, MeetsWhole, RecordSummary, StoredFile};
use sluice_engine::context::{SessionContext, SignedContext};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::Root;
use sluice_engine::ids::Generation;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::span::{Place, Span};
use sluice_proto::calls::Used;
use sluice_proto::http::{FileStatus, Holder, State};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::{StoreError, Whole, WholeOutcome};
use tokio::sync::oneshot;

use crate::refusal::{dropped, of_store, stopping};
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
        session: &SessionContext,
        record: MetadataRecord,
        bytes: Bytes,
        beside: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        let (file, id, digest) = (record.file_id(), record.client_id(), record.digest());
        let whole = hashed(bytes).await?;
        let root = whole.root();
        if let Some(expected) = record.expected_root().filter(|expected| *expected != root) {
            let detail = format!("the bytes hash to {root}, expected_root is {expected}");
            return Err(
                Refusal::new(Problem::ChunkValue, detail).hint("nothing was stored; send the file again")
            );
        }
        let generation = match self.look(file, move |engine| engine.meets_whole(file, digest, root)).await? {
            MeetsWhole::Nothing(generation) => generation,
            MeetsWhole::Itself => return Ok(Some((false, self.full_status(context, id).await?))),
            MeetsWhole::Parts => return Ok(None),
            MeetsWhole::Dropped => return Err(dropped()),
            MeetsWhole::Conflict(reason) => return Err(in_conflict(reason)),
            MeetsWhole::OtherMetadata => {
                return Err(Refusal::new(Problem::MetadataConflict, "the file has other metadata")
                    .hint("the first metadata stands; use another id for another file"));
            }
            MeetsWhole::OtherBytes(held) => return Err(other_bytes(held, root)),
        };
        // Other files may have come since it was let in, and one that was passed on has not been asked about here.
        let size = record.geometry().map_or(0, Geometry::size);
        self.within_quota(session, size, Some(file), true, beside).await?;
        // Whoever asked may go away: what is durable then is still told to the engine.
        let (answer, answered) = oneshot::channel();
        let service = self.clone();
        self.parts.tasks.spawn(async move {
            let _ = answer.send(service.keep_whole(record, whole, generation).await);
        });
        match answered.await.map_err(|_| stopping())?? {
            Kept::Stored(status) => Ok(Some((true, *status))),
            Kept::Known => Ok(Some((false, self.full_status(context, id).await?))),
            Kept::Begun => Ok(None),
        }
    }

    /// Stores a whole file, and has the engine know of it.
    async fn keep_whole(
        self: &Arc<Self>,
        record: MetadataRecord,
        whole: Whole,
        generation: Generation,
    ) -> Result<Kept, Refusal> {
        let (file, root, value) = (record.file_id(), whole.root(), whole.value());
        let Some(shape) = record.geometry() else { return Ok(Kept::Begun) };
        let progress = record.expiry_secs().map(|_| self.parts.clock.now());
        let memory = FileMemory::of_whole(self.parts.dc, root, shape, progress);
        let outcome = self.parts.store.put_whole(&record, &memory.to_bytes(), whole).await;
        let outcome = outcome.map_err(|error| match error {
            StoreError::WrongRoot { expected, .. } => other_bytes(expected, root),
            error => of_store(&error),
        });
        match outcome? {
            WholeOutcome::Stored => {}
            WholeOutcome::Known => {
                // The request that brought it may not have told the engine yet.
                load::reload(self, file).await?;
                return Ok(Kept::Known);
            }
            WholeOutcome::Begun => return Ok(Kept::Begun),
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
        // It may have gone to rest before anybody could look.
        self.usage.hold(record.tenant(), file, shape.size());
        Ok(Kept::Stored(Box::new(self.describe_whole(&record, root))))
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

/// What became of a file that was to be stored.
enum Kept {
    /// It is durable and known now.
    Stored(Box<FileStatus>),
    /// It was before.
    Known,
    /// Something of it was here before.
    Begun,
}

async fn hashed(bytes: Bytes) -> Result<Whole, Refusal> {
    if bytes.len() <= HASH_HERE {
        return Ok(Whole::of(bytes));
    }
    tokio::task::spawn_blocking(move || Whole::of(bytes)).await.map_err(|_| stopping())
}

fn other_bytes(held: Root, got: Root) -> Refusal {
    Refusal::new(
        Problem::ChunkConflict,
        format!("the file is stored with other bytes: root {held}, got {got}"),
    )
    .hint("the first bytes stand; use another id for another file")
}
