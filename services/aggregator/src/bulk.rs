//! Bulk between datacenters: values and bytes of chunks, as one gives them and the other checks them.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{DcId, FileId};
use sluice_engine::limits::{CHUNK_LEN, UNIT_LEVEL};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{climb, merge_chunks, path_places};
use sluice_node::metrics::OutgoingCall;
use sluice_proto::peer::{ChunksRequest, RecordRequest, ValuesRequest};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::StoreError;

use crate::door::no_such_place;
use crate::links::{CHUNKS, GRPC, Peer, RECORD, VALUES, answered};
use crate::refusal::of_store;
use crate::{AggregatorService, load, scrub};

/// Values one after the other.
pub(crate) fn concat(values: &[ChainingValue]) -> Bytes {
    let mut out = BytesMut::with_capacity(32 * values.len());
    values.iter().for_each(|value| out.extend_from_slice(value.as_bytes()));
    out.freeze()
}

/// Values that stand one after the other; `None` if something is left over.
pub(crate) fn split(bytes: &[u8]) -> Option<Vec<ChainingValue>> {
    let (values, rest) = bytes.as_chunks::<32>();
    rest.is_empty().then(|| values.iter().map(|value| ChainingValue::from_bytes(*value)).collect())
}

/// The value of a place from the own store; `None` if not all of it is here.
pub(crate) async fn own_value(
    service: &AggregatorService,
    file: FileId,
    shape: Geometry,
    place: Place,
) -> Result<Option<ChainingValue>, StoreError> {
    let spans = load::spans(service.parts.store.as_ref(), file, shape, place.range(shape)).await?;
    let mut tree = sluice_engine::span_tree::SpanTree::new(shape);
    for span in spans {
        let _ = tree.insert(span);
    }
    Ok(tree.value(place))
}

/// For a peer: the chunk values under `place` in the own store, and those beside the way up to `under`.
pub(crate) async fn own_values(
    service: &AggregatorService,
    file: FileId,
    place: Place,
    under: Place,
) -> Result<(Vec<ChainingValue>, Vec<ChainingValue>), Refusal> {
    let shape =
        service.look(file, move |aggregator| aggregator.file(file).and_then(|file| file.ledger().file()));
    let shape = shape.await?.ok_or_else(Refusal::not_found)?;
    place.check(shape).map_err(no_such_place)?;
    under.check(shape).map_err(no_such_place)?;
    if place.level() > UNIT_LEVEL {
        return Err(no_such_place("at most 4,096 chunks are asked for at once"));
    }
    let missing = || Refusal::new(Problem::NotFound, "not all of these chunks are here");
    let values =
        service.parts.store.values(file, place.range(shape)).await.map_err(|error| of_store(&error))?;
    let values: Vec<ChainingValue> = values.into_iter().collect::<Option<_>>().ok_or_else(missing)?;
    let mut beside = Vec::new();
    for place in
        path_places(shape, place, under).ok_or_else(|| no_such_place("one place is not in the other"))?
    {
        let value = own_value(service, file, shape, place).await.map_err(|error| of_store(&error))?;
        beside.push(value.ok_or_else(missing)?);
    }
    Ok((values, beside))
}

/// What a peer's values turned out to be.
pub(crate) enum Values {
    /// They merge to the span that they lie in.
    Good(Vec<ChainingValue>),
    /// The peer does not have them (any more).
    Missing,
    /// They do not merge to what the peer said.
    Wrong,
}

/// Asks a holder for the chunk values under `place`, and checks them against the span that it says it has.
pub(crate) async fn values_from(
    service: &AggregatorService,
    peer: &Peer,
    file: FileId,
    shape: Geometry,
    place: Place,
    under: Span,
) -> Result<Values, Refusal> {
    let request = ValuesRequest {
        file: Bytes::copy_from_slice(file.as_bytes()),
        start: place.start(),
        level: u32::from(place.level()),
        under_start: under.place.start(),
        under_level: u32::from(under.place.level()),
    };
    let mut client = peer.client();
    let reply = match service.asked(peer, VALUES, client.values(request)).await {
        Ok(reply) => reply,
        Err(refusal) => {
            return match refusal.problem {
                Problem::NotFound | Problem::Dropped => Ok(Values::Missing),
                _ => Err(refusal),
            };
        }
    };
    let (Some(values), Some(beside)) = (split(&reply.values), split(&reply.beside)) else {
        return Ok(Values::Wrong);
    };
    let merged = merge_chunks(shape, place, &values)
        .and_then(|value| climb(shape, Span::new(place, value), under.place, &beside));
    Ok(if merged == Some(under.value) { Values::Good(values) } else { Values::Wrong })
}

/// Chunks on their way from a peer, one at a time and each of the length that it must have.
pub(crate) struct Incoming {
    stream: tonic::Streaming<sluice_proto::peer::ChunkPiece>,
    rest: Bytes,
    peer: Arc<Peer>,
    patience: std::time::Duration,
    /// Until all that is wanted has come.
    counted: OutgoingCall,
}

impl Incoming {
    /// Asks a peer for consecutive chunks.
    pub(crate) async fn ask(
        service: &AggregatorService,
        peer: &Arc<Peer>,
        file: FileId,
        start: u64,
        count: u64,
        relay: bool,
    ) -> Result<Self, Refusal> {
        let file = Bytes::copy_from_slice(file.as_bytes());
        let request = ChunksRequest { file, start, count: count as u32, relay };
        let patience = service.parts.settings.call_timeout;
        let mut client = peer.client();
        let mut counted = service.metrics.calls.begin(GRPC, CHUNKS);
        let answer = tokio::time::timeout(patience, client.chunks(request)).await;
        let stream = answered(&mut counted, peer, answer)?.into_inner();
        Ok(Self { stream, rest: Bytes::new(), peer: peer.clone(), patience, counted })
    }

    /// The next piece of a chunk of which `left` bytes are still to come.
    pub(crate) async fn piece(&mut self, service: &AggregatorService, left: u64) -> Result<Bytes, Refusal> {
        while self.rest.is_empty() {
            let message = tokio::time::timeout(self.patience, self.stream.message()).await;
            let piece = answered(&mut self.counted, &self.peer, message)?;
            let ended = || Refusal::new(Problem::Unavailable, format!("{} broke off", self.peer.name));
            self.rest = piece.ok_or_else(ended)?.data;
            service.metrics.pulled_bytes.inc_by(self.rest.len() as u64);
        }
        let len = self.rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        Ok(self.rest.split_to(len))
    }
}

/// The bytes of one chunk: from the own store, or (for a peer that asks for it, and once only) from another holder.
pub(crate) async fn chunk(
    service: &Arc<AggregatorService>,
    file: FileId,
    index: ChunkIndex,
    relay: bool,
    asker: DcId,
) -> Result<Bytes, Refusal> {
    match service.parts.store.read_chunk(file, index).await {
        Ok(bytes) => Ok(bytes),
        Err(StoreError::Corrupt { .. }) => {
            scrub::reported(service, file, index).await;
            Err(Refusal::new(Problem::Unavailable, format!("chunk {index} is damaged here")))
        }
        Err(StoreError::Missing { .. } | StoreError::NoFile(_)) if relay => {
            fetch_from_holders(service, file, index, Some(asker)).await
        }
        Err(error @ (StoreError::Missing { .. } | StoreError::NoFile(_))) => {
            Err(Refusal::new(Problem::NotFound, error.to_string()))
        }
        Err(error) => Err(of_store(&error)),
    }
}

/// Fetches a chunk from whoever the ledger says has it, checked against the holder's own value; at last from the own
/// store.
pub(crate) async fn fetch_from_holders(
    service: &Arc<AggregatorService>,
    file: FileId,
    index: ChunkIndex,
    except: Option<DcId>,
) -> Result<Bytes, Refusal> {
    let me = service.parts.dc;
    let place = Place::of_chunk(index);
    let asked = service.look(file, move |aggregator| {
        let ledger = aggregator.file(file)?.ledger();
        let holders =
            ledger.holders().filter(|(_, _, tree)| tree.covering(place).is_some()).map(|(dc, ..)| dc);
        let all: Vec<DcId> = holders.chain(ledger.copies().map(|copy| copy.home)).collect();
        Some((ledger.file()?, all))
    });
    let (shape, mut holders) = asked.await?.ok_or_else(Refusal::not_found)?;
    holders.retain(|dc| *dc != me && Some(*dc) != except);
    let len = shape.chunk_len(index).map_err(no_such_place)?;
    let mut last = Refusal::new(Problem::Unavailable, format!("nobody who can be reached has chunk {index}"));
    for peer in holders.into_iter().filter_map(|dc| service.links.peer(dc)) {
        match whole_chunk(service, peer, file, index, len, false).await {
            Ok(bytes) => return Ok(bytes),
            Err(refusal) => last = Refusal::new(Problem::Unavailable, refusal.detail),
        }
    }
    // While it was looked for elsewhere it may have been pulled here, and freed there.
    service.parts.store.read_chunk(file, index).await.map_err(|_| last)
}

/// One whole chunk from a peer.
pub(crate) async fn whole_chunk(
    service: &AggregatorService,
    peer: &Arc<Peer>,
    file: FileId,
    index: ChunkIndex,
    len: u64,
    relay: bool,
) -> Result<Bytes, Refusal> {
    let mut incoming = Incoming::ask(service, peer, file, index.number(), 1, relay).await?;
    let mut bytes = BytesMut::with_capacity(len.min(CHUNK_LEN) as usize);
    while (bytes.len() as u64) < len {
        let left = len - bytes.len() as u64;
        bytes.extend_from_slice(&incoming.piece(service, left).await?);
    }
    Ok(bytes.freeze())
}

/// A peer's copy of the metadata record, if it is the one that is meant.
pub(crate) async fn record_from(
    service: &AggregatorService,
    peer: &Peer,
    file: FileId,
) -> Result<MetadataRecord, Refusal> {
    let request = RecordRequest { file: Bytes::copy_from_slice(file.as_bytes()) };
    let mut client = peer.client();
    let reply = service.asked(peer, RECORD, client.record(request)).await?;
    let garbled =
        |error| Refusal::new(Problem::Unavailable, format!("{} sent no record: {error}", peer.name));
    let record = MetadataRecord::from_bytes(&reply.record).map_err(garbled)?;
    if record.file_id() == file {
        Ok(record)
    } else {
        Err(Refusal::new(Problem::Unavailable, format!("{} sent the record of another file", peer.name)))
    }
}
