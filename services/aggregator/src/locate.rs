//! Proven chunk values of complete files: what every read is checked against.
//!
//! A datacenter that has published the file takes them from its store, where they merged to the root. The home of a
//! complete file gathers them from the holders whose spans its root was made of. Everyone else asks one of those two,
//! and checks the way up to the root that it knows itself. Values of a unit are cached; they can never change.

use std::ops::Range;
use std::sync::Arc;

use quick_cache::sync::Cache;
use sluice_engine::context::{Scope, SignedContext};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, DcId, FileId};
use sluice_engine::ledger::{FileState, Page};
use sluice_engine::limits::{MAX_LEVEL, SEGMENT_CHUNKS, UNIT_CHUNKS, UNIT_LEVEL};
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{ProofStep, SpanTree, merge_chunks, proof_places, root_of_proof};
use sluice_proto::peer::LocateRequest;
use sluice_proto::problem::{Problem, Refusal};

use crate::AggregatorService;
use crate::bulk::{self, Values};
use crate::door::no_such_place;
use crate::links::LOCATE;
use crate::refusal::of_store;

/// Units whose values are kept: 128 KiB each at most.
const CACHED_UNITS: usize = 64;

/// Proven values, by file and first chunk of the unit.
pub(crate) struct Units(Cache<(FileId, u64), Arc<Vec<ChainingValue>>>);

impl Default for Units {
    fn default() -> Self {
        Self(Cache::new(CACHED_UNITS))
    }
}

/// What must be known of a complete file to find its chunks.
#[derive(Clone, Debug)]
struct Complete {
    shape: Geometry,
    root: Root,
    published: bool,
    is_home: bool,
    /// Whom to ask: who assembled it, then the home.
    askable: Vec<DcId>,
}

impl AggregatorService {
    /// The shape, root and whereabouts of a complete file; refused if it is not.
    async fn complete(&self, file: FileId) -> Result<Complete, Refusal> {
        let me = self.parts.dc;
        let asked = self.look(file, move |aggregator| {
            let file = aggregator.file(file)?;
            let ledger = file.ledger();
            let claim = ledger.claim();
            let mut askable: Vec<DcId> = ledger.best_copy().map(|copy| copy.home).into_iter().collect();
            askable.extend(claim.map(|claim| claim.home));
            askable.retain(|dc| *dc != me);
            askable.dedup();
            let complete = ledger.root().zip(ledger.file()).map(|(root, shape)| Complete {
                shape,
                root,
                published: file.is_published(),
                is_home: claim.is_some_and(|claim| claim.home == me),
                askable,
            });
            Some((file.state(), complete))
        });
        match asked.await? {
            None | Some((FileState::Unheard, _)) => Err(Refusal::not_found()),
            Some((FileState::Dropped, _)) => Err(crate::refusal::dropped()),
            Some((FileState::Conflict, _)) => Err(Refusal::new(
                Problem::Conflict,
                "contradicting facts exist about the file, so it is not served",
            )
            .hint("its owner can end it with DELETE")),
            Some((FileState::Complete | FileState::Assembled, Some(complete))) => Ok(complete),
            Some((FileState::Receiving | FileState::Complete | FileState::Assembled, _)) => {
                Err(Refusal::new(Problem::Incomplete, "chunks are missing, or have not been compared yet")
                    .hint("wait with GET /v1/files/{id}?wait=complete"))
            }
        }
    }

    /// The proven values of the chunks of one unit of a complete file.
    pub(crate) async fn unit(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
        file: FileId,
        first: u64,
    ) -> Result<(Geometry, Root, Arc<Vec<ChainingValue>>), Refusal> {
        let complete = self.complete(file).await?;
        let (shape, root) = (complete.shape, complete.root);
        if let Some(values) = self.units.0.get(&(file, first)) {
            return Ok((shape, root, values));
        }
        let values = if shape.chunks() == 1 {
            vec![self.only_chunk(file, &complete).await?]
        } else if complete.published {
            let values = self
                .parts
                .store
                .values(file, unit_of(first, shape))
                .await
                .map_err(|error| of_store(&error))?;
            let missing = || Refusal::new(Problem::Unavailable, "the assembled file lacks chunk values");
            values.into_iter().collect::<Option<_>>().ok_or_else(missing)?
        } else if complete.is_home {
            self.gather(file, shape, unit_of(first, shape), false).await?
        } else {
            self.ask_for(context, id, &complete, unit_of(first, shape)).await?
        };
        let values = Arc::new(values);
        self.units.0.insert((file, first), values.clone());
        Ok((shape, root, values))
    }

    /// The proven values of some chunks of one unit of a complete file. What is here is not kept waiting for others: the
    /// rest of its unit may be with somebody who cannot be reached.
    pub(crate) async fn located(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
        file: FileId,
        range: Range<u64>,
    ) -> Result<Vec<ChainingValue>, Refusal> {
        let complete = self.complete(file).await?;
        let shape = complete.shape;
        if range.end > shape.chunks() {
            return Err(no_such_place("past the end of the file"));
        }
        let first = range.start / UNIT_CHUNKS * UNIT_CHUNKS;
        let is_cached = self.units.0.get(&(file, first)).is_some();
        let is_gathered = complete.is_home && !complete.published && shape.chunks() > 1;
        if is_gathered
            && !is_cached
            && let Ok(own) = self.gather(file, shape, range.clone(), true).await
        {
            return Ok(own);
        }
        let refusal = match self.unit(context, id, file, first).await {
            Ok((_, _, unit)) => {
                let part = (range.start - first) as usize..(range.end - first) as usize;
                return unit.get(part).map(<[_]>::to_vec).ok_or_else(unreachable);
            }
            Err(refusal) if complete.published || shape.chunks() == 1 => return Err(refusal),
            Err(refusal) => refusal,
        };
        // Not all of the unit can be had: perhaps what is wanted of it.
        let part = if is_gathered {
            self.gather(file, shape, range, false).await
        } else if refusal.problem.is_retryable() {
            self.ask_for(context, id, &complete, range).await
        } else {
            return Err(refusal);
        };
        part.map_err(|_| refusal)
    }

    /// The value of a file's only chunk: its root is in the bytes, so those are read.
    async fn only_chunk(
        self: &Arc<Self>,
        file: FileId,
        complete: &Complete,
    ) -> Result<ChainingValue, Refusal> {
        let first = ChunkIndex::new(0).map_err(no_such_place)?;
        let right = |bytes: &bytes::Bytes| Root::of_bytes(bytes) == complete.root;
        let own = self.parts.store.read_chunk(file, first).await.ok().filter(right);
        let bytes = match own {
            Some(bytes) => bytes,
            None => {
                let mut found = bulk::fetch_from_holders(self, file, first, None).await.ok().filter(right);
                for dc in &complete.askable {
                    if found.is_some() {
                        break;
                    }
                    if let Some(peer) = self.links.peer(*dc) {
                        let bytes =
                            bulk::whole_chunk(self, peer, file, first, complete.shape.size(), true).await;
                        found = bytes.ok().filter(right);
                    }
                }
                found.ok_or_else(unreachable)?
            }
        };
        ChainingValue::of_chunk(first, &bytes).ok_or_else(|| no_such_place("an empty chunk"))
    }

    /// As the home: the values of chunks of one unit from the holders that the root was made of, or from the own store
    /// only.
    async fn gather(
        &self,
        file: FileId,
        shape: Geometry,
        wanted: Range<u64>,
        only_own: bool,
    ) -> Result<Vec<ChainingValue>, Refusal> {
        let me = self.parts.dc;
        let (first, end) = (wanted.start, wanted.end);
        let segment = first / SEGMENT_CHUNKS;
        let unit = Place::tile(wanted, MAX_LEVEL, shape);
        let asked = self.look(file, move |aggregator| {
            let ledger = aggregator.file(file)?.ledger();
            let pieces = ledger.holders().flat_map(|(dc, _, tree)| {
                unit.iter().flat_map(move |place| tree.overlapping(*place)).map(move |span| (dc, span))
            });
            Some((pieces.collect::<Vec<_>>(), ledger.is_paged(segment)))
        });
        let (mut pieces, is_paged) = asked.await?.ok_or_else(Refusal::not_found)?;
        if is_paged {
            let page = self.parts.store.page(file, segment).await.map_err(|error| of_store(&error))?;
            let page = page.and_then(|bytes| Page::from_bytes(&bytes).ok()).ok_or_else(unreachable)?;
            pieces.extend(page.entries.into_iter().map(|(dc, _, span)| (dc, span)));
        }
        if only_own {
            pieces.retain(|(dc, _)| *dc == me);
        }
        let mut values: Vec<Option<ChainingValue>> = vec![None; (end - first) as usize];
        // The own store first: it costs nothing.
        pieces.sort_by_key(|(dc, span)| (*dc != me, span.place));
        for (dc, span) in pieces {
            let range = span.place.range(shape);
            let (from, to) = (range.start.max(first), range.end.min(end));
            let slots = (from - first) as usize..(to.saturating_sub(first)) as usize;
            if from >= to || values.get(slots.clone()).is_none_or(|part| part.iter().all(Option::is_some)) {
                continue;
            }
            let found = if dc == me {
                let own = self.parts.store.values(file, from..to).await.map_err(|error| of_store(&error))?;
                own.into_iter().collect::<Option<Vec<_>>>()
            } else if span.place.level() == 0 {
                // It said so itself.
                Some(vec![span.value])
            } else {
                let Some(peer) = self.links.peer(dc) else { continue };
                let mut found = Some(Vec::new());
                for part in Place::tile(from..to, UNIT_LEVEL, shape) {
                    match bulk::values_from(self, peer, file, shape, part, span).await {
                        Ok(Values::Good(values)) => found.iter_mut().for_each(|found| found.extend(&values)),
                        Ok(Values::Missing | Values::Wrong) | Err(_) => found = None,
                    }
                    if found.is_none() {
                        break;
                    }
                }
                found
            };
            for (slot, value) in slots.zip(found.into_iter().flatten()) {
                if let Some(known) = values.get_mut(slot) {
                    *known = known.or(Some(value));
                }
            }
        }
        values.into_iter().collect::<Option<_>>().ok_or_else(unreachable)
    }

    /// As anyone else: from whoever can prove them.
    async fn ask_for(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        complete: &Complete,
        wanted: Range<u64>,
    ) -> Result<Vec<ChainingValue>, Refusal> {
        let shape = complete.shape;
        let mut last = unreachable();
        for peer in complete.askable.iter().filter_map(|dc| self.links.peer(*dc)) {
            // It can be several places, as at the right edge; each has its own way up.
            let mut values = Vec::new();
            for place in Place::tile(wanted.clone(), UNIT_LEVEL, shape) {
                let request = LocateRequest {
                    context: context.as_bytes().to_vec().into(),
                    id: id.uuid().as_bytes().to_vec().into(),
                    start: place.start(),
                    level: u32::from(place.level()),
                };
                let mut client = peer.client();
                let reply = match self.asked(peer, LOCATE, client.locate(request)).await {
                    Ok(reply) => reply,
                    Err(refusal) => {
                        last = refusal;
                        break;
                    }
                };
                match proven(shape, complete.root, place, &reply.values, &reply.proof) {
                    Some(part) => values.extend(part),
                    None => {
                        self.metrics.integrity_failures.inc();
                        tracing::warn!(%place, peer = %peer.name, "values do not lead to the root");
                        break;
                    }
                }
            }
            if values.len() as u64 == wanted.end - wanted.start {
                return Ok(values);
            }
        }
        // Whoever was asked may not know yet what is known here: that is no answer to the client.
        Err(if last.problem.is_retryable() { last } else { unreachable() })
    }

    /// For a peer: the values under a place of a complete file, and those beside the way up to its root.
    pub(crate) async fn own_unit(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<(Vec<ChainingValue>, Vec<ChainingValue>), Refusal> {
        let session = self.parts.access.require(context, Scope::Read)?;
        let file = FileId::derive(session.tenant, id);
        let complete = self.complete(file).await?;
        if !complete.published && !complete.is_home {
            return Err(Refusal::new(Problem::Unavailable, "this datacenter is not the file's home"));
        }
        place.check(complete.shape).map_err(no_such_place)?;
        if place.level() > UNIT_LEVEL {
            return Err(no_such_place("at most 4,096 chunks are asked for at once"));
        }
        self.values_and_proof(context, id, file, place).await
    }

    /// The values under a place of a complete file, and the values beside its way up.
    pub(crate) async fn values_and_proof(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
        file: FileId,
        place: Place,
    ) -> Result<(Vec<ChainingValue>, Vec<ChainingValue>), Refusal> {
        let Complete { shape, is_home, .. } = self.complete(file).await?;
        let values = self.located(context, id, file, place.range(shape)).await?;
        let slice = |range: Range<u64>, base: u64, values: &[ChainingValue]| {
            values.get((range.start - base) as usize..(range.end - base) as usize).map(<[_]>::to_vec)
        };
        let places = proof_places(shape, place);
        // The home's root was made of what holders said: their spans' values lead to it, without their chunks'.
        let asked = places.clone();
        let said = self.look(file, move |aggregator| {
            let union = aggregator.file(file).filter(|_| is_home).map(|file| file.ledger().union());
            asked.into_iter().map(|place| union.and_then(|union| union.value(place))).collect::<Vec<_>>()
        });
        let mut proof = Vec::new();
        for (beside, said) in places.into_iter().zip(said.await?) {
            if let Some(said) = said {
                proof.push(said);
                continue;
            }
            // A sibling may be most of a very large file: its units are merged as they come.
            let mut tree = SpanTree::new(shape);
            let range = beside.range(shape);
            let mut at = range.start;
            while at < range.end {
                let base = at / UNIT_CHUNKS * UNIT_CHUNKS;
                let end = (base + UNIT_CHUNKS).min(range.end);
                let (_, _, unit) = self.unit(context, id, file, base).await?;
                for part in Place::tile(at..end, UNIT_LEVEL, shape) {
                    let values = slice(part.range(shape), base, &unit).ok_or_else(unreachable)?;
                    let value = merge_chunks(shape, part, &values).ok_or_else(unreachable)?;
                    tree.insert(Span::new(part, value)).map_err(|_| unreachable())?;
                }
                at = end;
            }
            proof.push(tree.value(beside).ok_or_else(unreachable)?);
        }
        Ok((values, proof))
    }
}

/// The chunks of the unit that begins with `first`.
fn unit_of(first: u64, shape: Geometry) -> Range<u64> {
    first..(first + UNIT_CHUNKS).min(shape.chunks())
}

/// The values under a place, if they lead to the root.
fn proven(
    shape: Geometry,
    root: Root,
    place: Place,
    values: &[u8],
    proof: &[u8],
) -> Option<Vec<ChainingValue>> {
    let (values, proof) = (bulk::split(values)?, bulk::split(proof)?);
    let merged = merge_chunks(shape, place, &values)?;
    let places = proof_places(shape, place);
    if places.len() != proof.len() {
        return None;
    }
    let steps: Vec<ProofStep> =
        places.into_iter().zip(proof).map(|(sibling, value)| ProofStep { sibling, value }).collect();
    (root_of_proof(shape, Span::new(place, merged), &steps)? == root).then_some(values)
}

fn unreachable() -> Refusal {
    Refusal::new(Problem::Unavailable, "who holds the file's chunks cannot be reached now")
}
