//! What workers ask the owner of a file's slot for. Every request is verified against its session context here again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_engine::aggregator::{Brief, Event, File, NodeEvent, RecordSummary};
use sluice_engine::command::DropReason;
use sluice_engine::context::{Scope, SignedContext};
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, DcId, FileId, TenantId};
use sluice_engine::ledger::FileState;
use sluice_engine::limits::{UNIT_CHUNKS, UNIT_LEVEL};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::span::Place;
use sluice_engine::span_tree::{merge_chunks, proof_places};
use sluice_proto::calls::{Admission, ChunkSource, DrainOrder, ListQuery, Opened, Slots, Used, Wait};
use sluice_proto::http::{
    About, DcInfo, DrainStatus, FileEntry, FilePage, FileStatus, ProofNode, State, TreeNode,
};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::{Listed, RecordOutcome, StoreError};
use tokio::time::{Duration, Instant};

use crate::door::no_such_place;
use crate::ledgers::changed;
use crate::refusal::{dropped, of_store};
use crate::{AggregatorService, bulk, carry, load, scrub, status};

/// Files of all shares looked at for one page of a list; a filter that matches few ends the page early, with a cursor.
const MAX_LOOKED_AT: usize = 10_000;

/// How often a request looks at a file that goes to rest meanwhile.
pub(crate) const ATTEMPTS: usize = 4;

/// How long a request waits for a metadata record that is on its way.
const RECORD_PATIENCE: Duration = Duration::from_secs(5);

/// While waiting for a state, how often the home is asked even if nothing was heard.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

#[async_trait]
impl Slots for AggregatorService {
    async fn create(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        home: Option<String>,
        beside: Used,
    ) -> Result<(bool, FileStatus), Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Write)?;
        if session.tenant != record.tenant() {
            return Err(Refusal::new(Problem::Forbidden, "the metadata names another tenant"));
        }
        let home = match &home {
            None => self.parts.dc,
            Some(name) => self.parts.material.dc_named(name).ok_or_else(|| {
                let known: Vec<&str> = self.parts.material.dcs().map(|(_, name)| name).collect();
                Refusal::new(Problem::InvalidParameter, format!("no datacenter is called {name:?}"))
                    .hint(format!("the cluster has {}", known.join(", ")))
            })?,
        };
        let (file, id) = (record.file_id(), record.client_id());
        let digest = record.digest();
        let asked = self.look(file, move |aggregator| {
            let file = aggregator.file(file)?;
            Some((file.state(), file.ledger().record_digest(), file.record().is_some()))
        });
        let known = asked.await?;
        match &known {
            Some((FileState::Dropped, ..)) => return Err(dropped()),
            // The first metadata stands, wherever it was sent.
            Some((_, Some(other), _)) if *other != digest => {
                return Err(Refusal::new(Problem::MetadataConflict, "the file has other metadata")
                    .hint("the first metadata stands; use another id for another file"));
            }
            Some((_, Some(_), true)) => {}
            // A file for which there is no room is not begun.
            Some(_) | None => {
                // One that others have told of is none that begins.
                let begins = known.is_none_or(|(_, digest, _)| digest.is_none());
                let bytes = record.geometry().map_or(0, Geometry::size);
                self.within_quota(&session, bytes, Some(file), begins, beside).await?
            }
        }
        let outcome = self.parts.store.put_record(&record).await.map_err(|error| of_store(&error))?;
        self.catalogue.add(record.tenant(), id, file);
        let is_new = outcome == RecordOutcome::Stored;
        if is_new {
            self.ledgers.settle(file, Event::Created { record: RecordSummary::of(&record), home }).await?;
            // Chunks that came before their metadata are part of the file now.
            load::reload(&this, file).await?;
        } else if !known.is_some_and(|(_, _, here)| here) {
            load::reload(&this, file).await?;
        }
        let status = this.own_status(context, id).await?.ok_or_else(Refusal::not_found)?;
        Ok((is_new, status))
    }

    async fn create_whole(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
        beside: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Write)?;
        if session.tenant != record.tenant() {
            return Err(Refusal::new(Problem::Forbidden, "the metadata names another tenant"));
        }
        this.whole(context, &session, record, bytes, beside).await
    }

    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Write)?;
        let file = FileId::derive(session.tenant, id);
        this.known(context, id, file).await?;
        this.fetched_record(file).await?;
        let asked = self.look(file, move |aggregator| {
            let file = aggregator.file(file)?;
            Some((file.state(), file.ledger().file(), file.ledger().conflict_reason()))
        });
        match asked.await?.ok_or_else(Refusal::not_found)? {
            (FileState::Dropped, ..) => return Err(dropped()),
            (FileState::Conflict, _, reason) => return Err(in_conflict(reason)),
            (_, Some(held), _) if held != size => {
                return Err(crate::refusal::size_conflict(held.size(), size.size()));
            }
            (_, Some(_), _) => {}
            (_, None, _) => {
                let summary = self.parts.store.summary(file).await.map_err(|error| of_store(&error))?;
                let last = summary.and_then(|summary| summary.held.last().map(|range| range.end - 1));
                if let Some(last) = last.filter(|last| *last >= size.chunks()) {
                    let detail = format!("chunk {last} is here, and past the end of {} bytes", size.size());
                    return Err(Refusal::new(Problem::SizeConflict, detail)
                        .hint("say how many bytes were sent, or end the file with DELETE"));
                }
                // The store decides which of two sizes is the first.
                self.parts.store.put_size(file, size).await.map_err(|error| of_store(&error))?;
                self.ledgers.settle(file, Event::Settled { size }).await?;
                // Chunks that came before have their places now.
                load::reload(&this, file).await?;
            }
        }
        this.own_status(context, id).await?.ok_or_else(Refusal::not_found)
    }

    async fn admit_more(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        bytes: u64,
        beside: Used,
    ) -> Result<(), Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        self.within_quota(&session, bytes, Some(FileId::derive(session.tenant, id)), true, beside).await
    }

    async fn used(&self, context: &SignedContext, file: Option<FileId>) -> Result<Used, Refusal> {
        let session = self.parts.access.verify(context)?;
        self.used_by(session.tenant, file).await
    }

    async fn admit(&self, context: &SignedContext, file: FileId, beside: Used) -> Result<Admission, Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        self.within_quota(&session, 0, None, false, beside).await?;
        let tenant = session.tenant;
        let asked = self.look(file, move |aggregator| {
            let known = aggregator.file(file);
            if is_of_another(known, tenant) {
                return None;
            }
            Some(match known {
                Some(known) if known.state() != FileState::Unheard => {
                    Ok((known.state(), known.ledger().file(), known.ledger().conflict_reason()))
                }
                Some(file) => Err((file.orphan_tenant().is_none(), aggregator.orphans(tenant))),
                None => Err((true, aggregator.orphans(tenant))),
            })
        });
        match asked.await?.ok_or_else(Refusal::not_found)? {
            Ok((FileState::Dropped, ..)) => Err(dropped()),
            Ok((FileState::Conflict, _, reason)) => Err(in_conflict(reason)),
            Ok((_, Some(shape), _)) => Ok(Admission::Known(shape)),
            Ok((_, None, _)) => Ok(Admission::Open),
            Err((is_new, (files, chunks))) => self.admit_orphan(is_new, files, chunks),
        }
    }

    async fn register(
        &self,
        context: &SignedContext,
        file: FileId,
        run: Run,
        values: &[ChainingValue],
    ) -> Result<bool, Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        let tenant = session.tenant;
        let asked = self.look(file, move |aggregator| {
            let known = aggregator.file(file);
            let state = known.map_or(FileState::Unheard, |file| file.state());
            (!is_of_another(known, tenant)).then(|| (state, aggregator.generation(file)))
        });
        match asked.await?.ok_or_else(Refusal::not_found)? {
            // The end came while the bytes did.
            (FileState::Dropped, _) => Err(dropped()),
            (
                FileState::Receiving | FileState::Complete | FileState::Assembled | FileState::Conflict,
                generation,
            ) => {
                self.traces.note(file, run.range());
                let spans = carry::chunk_spans(run, values);
                self.ledgers.settle(file, Event::Stored { generation, spans }).await?;
                Ok(false)
            }
            (FileState::Unheard, _) => {
                let chunks = run.range();
                self.ledgers.settle(file, Event::StoredOrphan { tenant, chunks }).await?;
                Ok(true)
            }
        }
    }

    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.verify(context)?;
        let file = FileId::derive(session.tenant, id);
        let until = wait.map(|wait| (wait.state, Instant::now() + wait.timeout));
        loop {
            // Asked for before looking, so that nothing between the two is missed.
            let watch = self.ledgers.watch(file).await?;
            let status = this.full_status(context, id).await?;
            let Some((state, deadline)) = until else { return Ok(status) };
            let left = deadline.saturating_duration_since(Instant::now());
            if status.state >= state || left.is_zero() {
                return Ok(status);
            }
            changed(watch, left.min(LOOK_AGAIN)).await;
        }
    }

    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        let session = self.parts.access.require(context, Scope::Read)?;
        self.loaded().await?;
        let mut page = FilePage { files: Vec::new(), next: None };
        let mut after = query.after;
        let mut looked_at = 0;
        loop {
            let batch = self.batch(session.tenant, after, query.limit.clamp(1, 1_000)).await?;
            let Some(last) = batch.last().map(|(client, ..)| *client) else { return Ok(page) };
            let files: Vec<FileId> = batch.iter().map(|(_, file, _)| *file).collect();
            let asked = self.ledgers.ask(move |aggregator| {
                files.iter().map(|file| aggregator.standing(*file)).collect::<Vec<_>>()
            });
            for ((client, file, listed), (state, home, root)) in batch.into_iter().zip(asked.await?) {
                looked_at += 1;
                let Some(home) = home.filter(|_| state != FileState::Unheard) else { continue };
                let state = status::state(state);
                let wanted = query.state.map_or(state != State::Dropped, |wanted| wanted == state);
                if !wanted {
                    continue;
                }
                if page.files.len() == query.limit {
                    page.next = page.files.last().map(|entry| entry.id);
                    return Ok(page);
                }
                page.files.push(self.entry(client, file, listed, state, self.dc_name(home), root).await?);
            }
            after = Some(last);
            if looked_at >= MAX_LOOKED_AT / self.parts.share.of().count() as usize {
                page.next = Some(last.uuid());
                return Ok(page);
            }
        }
    }

    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Read)?;
        let file = FileId::derive(session.tenant, id);
        this.known(context, id, file).await?;
        let asked = self.look(file, move |aggregator| {
            let file = aggregator.file(file)?;
            Some((file.state(), file.ledger().root(), file.ledger().file()))
        });
        match asked.await? {
            Some((FileState::Complete | FileState::Assembled, Some(root), Some(shape))) => {
                let record = this.fetched_record(file).await?;
                Ok(Opened { record, file: shape, root })
            }
            Some((FileState::Dropped, ..)) => Err(dropped()),
            Some((FileState::Conflict, ..)) => Err(Refusal::new(
                Problem::Conflict,
                "contradicting facts exist about the file, so it is not served",
            )
            .hint("its owner can end it with DELETE")),
            Some(_) => {
                Err(Refusal::new(Problem::Incomplete, "chunks are missing, or have not been compared yet")
                    .hint("wait with GET /v1/files/{id}?wait=complete"))
            }
            None => Err(Refusal::not_found()),
        }
    }

    async fn locate(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<Vec<ChunkSource>, Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Read)?;
        let file = FileId::derive(session.tenant, id);
        let first = range.start / UNIT_CHUNKS * UNIT_CHUNKS;
        if range.is_empty() || range.end > first + UNIT_CHUNKS {
            return Err(no_such_place("chunks of one unit are located at once"));
        }
        let values = this.located(context, id, file, range.clone()).await?;
        let held = match self.parts.store.values(file, range).await {
            Ok(held) => held,
            Err(StoreError::NoFile(_)) => vec![None; values.len()],
            Err(error) => return Err(of_store(&error)),
        };
        let source = |(value, held): (&ChainingValue, Option<ChainingValue>)| ChunkSource {
            value: *value,
            local: held == Some(*value),
        };
        Ok(values.iter().zip(held).map(source).collect())
    }

    async fn fetch(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        index: ChunkIndex,
        value: ChainingValue,
    ) -> Result<Bytes, Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Read)?;
        let file = FileId::derive(session.tenant, id);
        let good = |bytes: &Bytes| ChainingValue::of_chunk(index, bytes) == Some(value);
        if let Ok(bytes) = bulk::fetch_from_holders(&this, file, index, None).await
            && good(&bytes)
        {
            return Ok(bytes);
        }
        let me = self.parts.dc;
        let asked = self.look(file, move |aggregator| {
            let ledger = aggregator.file(file)?.ledger();
            Some((ledger.file()?, ledger.claim()?.home))
        });
        let (shape, home) = asked.await?.ok_or_else(Refusal::not_found)?;
        let len = shape.chunk_len(index).map_err(no_such_place)?;
        // The home knows who has it, and passes it on.
        if let Some(peer) = self.links.peer(home).filter(|_| home != me) {
            let bytes = bulk::whole_chunk(self, peer, file, index, len, true).await?;
            if good(&bytes) {
                return Ok(bytes);
            }
        }
        Err(Refusal::new(Problem::Unavailable, format!("nobody who can be reached has chunk {index}")))
    }

    async fn report_damage(&self, file: FileId, index: ChunkIndex) {
        if let Ok(this) = self.shared() {
            scrub::reported(&this, file, index).await;
        }
    }

    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Read)?;
        let file = FileId::derive(session.tenant, id);
        this.known(context, id, file).await?;
        let me = self.parts.dc;
        let asked = self.look(file, move |aggregator| {
            let file = aggregator.file(file)?;
            // While the size is open, any chunk may be asked for.
            let shape = file.ledger().file().unwrap_or(Geometry::largest());
            Some((file.standing(me), shape, file.ledger().root()))
        });
        let (state, shape, root) = asked.await?.ok_or_else(Refusal::not_found)?;
        place.check(shape).map_err(no_such_place)?;
        if place.level() > UNIT_LEVEL {
            return Err(no_such_place(format!("the level is at most {UNIT_LEVEL}, got {}", place.level())));
        }
        let node = |values: Vec<Option<ChainingValue>>, proof, root: Option<Root>| {
            let all: Option<Vec<ChainingValue>> = values.iter().copied().collect();
            TreeNode {
                start: place.start(),
                level: place.level(),
                value: all.and_then(|all| merge_chunks(shape, place, &all)).map(|value| value.to_string()),
                chunk_values: values.into_iter().map(|value| value.map(|value| value.to_string())).collect(),
                proof,
                root: root.map(|root| root.to_string()),
            }
        };
        match state {
            FileState::Complete | FileState::Assembled => {
                let (values, beside) = this.values_and_proof(context, id, file, place).await?;
                let proof = proof_places(shape, place).into_iter().zip(beside).map(|(place, value)| {
                    ProofNode { start: place.start(), level: place.level(), value: value.to_string() }
                });
                Ok(node(values.into_iter().map(Some).collect(), proof.collect(), root))
            }
            FileState::Receiving | FileState::Unheard => {
                let held = match self.parts.store.values(file, place.range(shape)).await {
                    Ok(held) => held,
                    Err(StoreError::NoFile(_)) => vec![None; place.chunks(shape) as usize],
                    Err(error) => return Err(of_store(&error)),
                };
                Ok(node(held, Vec::new(), None))
            }
            FileState::Dropped => Err(dropped()),
            FileState::Conflict => {
                Err(Refusal::new(Problem::Conflict, "contradicting facts exist about the file"))
            }
        }
    }

    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
        let this = self.shared()?;
        let session = self.parts.access.require(context, Scope::Delete)?;
        let file = FileId::derive(session.tenant, id);
        match this.known(context, id, file).await {
            Ok(()) => {}
            // Said again, it is made durable if it was not.
            Err(refusal) if refusal.problem == Problem::Dropped => {}
            Err(refusal) => return Err(refusal),
        }
        let tenant = session.tenant;
        for _ in 0..ATTEMPTS {
            let state =
                self.look(file, move |aggregator| aggregator.file(file).map(|file| file.state())).await?;
            let reason = match state {
                Some(
                    FileState::Complete | FileState::Assembled | FileState::Conflict | FileState::Dropped,
                ) => DropReason::Deleted,
                Some(FileState::Receiving | FileState::Unheard) | None => DropReason::Aborted,
            };
            self.ledgers.settle(file, Event::Remove { reason, tenant }).await?;
            // Had it gone to rest just then, it would have been woken first.
            if self.ledgers.ask(move |aggregator| aggregator.state(file)).await? == FileState::Dropped {
                return Ok(());
            }
        }
        Err(Refusal::new(Problem::Unavailable, "the file could not be looked at in time"))
    }

    async fn about(&self, context: &SignedContext) -> Result<About, Refusal> {
        self.parts.access.verify(context)?;
        let now = (self.now)();
        let standings = self.ledgers.ask(move |aggregator| aggregator.standings(now)).await?;
        let me = self.parts.dc;
        let drain = |dc: DcId| {
            let others = || standings.others.get(&dc)?.drain;
            let drain = if dc == me { standings.drain } else { others() };
            drain.map(|drain| format!("{} to {}", drain.phase, self.dc_name(drain.target)))
        };
        let dcs = self.parts.material.dcs().map(|(dc, name)| DcInfo {
            name: name.to_owned(),
            url: if dc == me {
                self.edge_url.clone()
            } else {
                self.links.peer(dc).and_then(|peer| peer.edge_url.clone())
            },
            reachable: dc == me || standings.others.get(&dc).is_some_and(|other| other.is_reachable),
            drain: drain(dc),
        });
        Ok(About {
            cluster: self.parts.material.name().to_owned(),
            dc: self.dc_name(me),
            dcs: dcs.collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        self.parts.access.require(context, Scope::Operate)?;
        self.ordered(order).await
    }
}

/// The answer to whoever wants to add to a file in conflict.
pub(crate) fn in_conflict(reason: Option<String>) -> Refusal {
    Refusal::new(Problem::Conflict, reason.unwrap_or_else(|| "contradicting facts".into()))
        .hint("the file is held as it is; end it with DELETE and begin anew under another id")
}

/// Whether a file is another tenant's than this: whoever says its name cannot have derived it.
fn is_of_another(file: Option<&File>, tenant: TenantId) -> bool {
    let of = file.and_then(|file| file.ledger().tenant().or(file.orphan_tenant()));
    of.is_some_and(|of| of != tenant)
}

impl AggregatorService {
    /// The service as its tasks share it.
    fn shared(&self) -> Result<Arc<Self>, Refusal> {
        self.this.upgrade().ok_or_else(crate::refusal::stopping)
    }

    /// Whether one more provisional chunk may come, of a file that `is_new` or not, of a tenant who has so many files
    /// and chunks without metadata here.
    fn admit_orphan(&self, is_new: bool, files: usize, chunks: u64) -> Result<Admission, Refusal> {
        let settings = &self.parts.settings;
        let full = |what: String| {
            Refusal::new(Problem::RateLimited, what)
                .hint("send the metadata first, or wait until it has travelled here")
                .retry_after(Duration::from_secs(2))
        };
        if is_new && files >= settings.provisional_files {
            return Err(full(format!("{files} files without metadata are here already")));
        }
        if chunks >= settings.provisional_chunks {
            return Err(full(format!("{chunks} chunks without metadata are here already")));
        }
        Ok(Admission::Provisional)
    }

    /// The next files of a tenant by the client's ids, and what the store lists of those that it keeps in one record.
    async fn batch(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<(ClientFileId, FileId, Option<Listed>)>, Refusal> {
        let mut all: BTreeMap<ClientFileId, (FileId, Option<Listed>)> = BTreeMap::new();
        let mut listed_to = after;
        while all.len() < limit {
            let listed = self.parts.store.listed(tenant, listed_to, limit).await;
            let listed = listed.map_err(|error| of_store(&error))?;
            let is_last = listed.len() < limit;
            listed_to = listed.last().map(|last| last.client).or(listed_to);
            // The store lists those of all shares.
            let files = listed.into_iter().map(|listed| (FileId::derive(tenant, listed.client), listed));
            let mine = files.filter(|(file, _)| self.parts.share.has(*file));
            all.extend(mine.map(|(file, listed)| (listed.client, (file, Some(listed)))));
            if is_last {
                break;
            }
        }
        for (client, file) in self.catalogue.page(tenant, after, limit) {
            all.insert(client, (file, None));
        }
        Ok(all.into_iter().take(limit).map(|(client, (file, listed))| (client, file, listed)).collect())
    }

    /// Makes sure that the file is known here: asks everyone if it is not, and refuses what nobody knows.
    async fn known(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
        file: FileId,
    ) -> Result<(), Refusal> {
        let known = move || async move {
            let state =
                self.look(file, move |aggregator| aggregator.file(file).map(|file| file.state())).await?;
            Ok::<_, Refusal>(state.filter(|state| *state != FileState::Unheard))
        };
        match known().await? {
            Some(FileState::Dropped) => return Err(dropped()),
            Some(_) => return Ok(()),
            None => {}
        }
        // Somebody knows it, or this refuses; the fact itself travels as a command.
        self.full_status(context, id).await?;
        let deadline = Instant::now() + RECORD_PATIENCE;
        while known().await?.is_none() {
            let watch = self.ledgers.watch(file).await?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Refusal::new(
                    Problem::Unavailable,
                    "the file is known elsewhere, and on its way here",
                ));
            }
            changed(watch, left.min(Duration::from_millis(200))).await;
        }
        Ok(())
    }

    /// The metadata record, fetched if it is not here.
    async fn fetched_record(self: &Arc<Self>, file: FileId) -> Result<MetadataRecord, Refusal> {
        let deadline = Instant::now() + RECORD_PATIENCE;
        loop {
            let watch = self.ledgers.watch(file).await?;
            let here =
                self.look(file, move |a| a.file(file).is_some_and(|file| file.record().is_some())).await?;
            if here {
                return self.record(file).await;
            }
            self.ledgers.tell(NodeEvent::File(file, Event::Wanted)).await;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(status::no_metadata());
            }
            changed(watch, left.min(Duration::from_millis(500))).await;
        }
    }

    async fn entry(
        &self,
        client: ClientFileId,
        file: FileId,
        listed: Option<Listed>,
        state: State,
        home: String,
        root: Option<Root>,
    ) -> Result<FileEntry, Refusal> {
        if let Some(listed) = listed {
            let root = root.or_else(|| Brief::from_bytes(&listed.brief)?.root());
            return Ok(FileEntry {
                id: client.uuid(),
                size: Some(listed.size),
                name: listed.name,
                state,
                home,
                root: root.map(|root| root.to_string()),
            });
        }
        let summary = self.parts.store.summary(file).await.map_err(|error| of_store(&error))?;
        let root = root.or(summary.as_ref().and_then(|summary| {
            let brief = Brief::of_stored(summary.record.as_ref(), &summary.facts);
            Brief::from_bytes(&brief)?.root()
        }));
        let (size, record) = summary.map_or((None, None), |summary| (summary.size, summary.record));
        Ok(FileEntry {
            id: client.uuid(),
            size: size.map(Geometry::size),
            name: record.as_ref().map_or_else(String::new, |record| record.name().to_owned()),
            state,
            home,
            root: root.map(|root| root.to_string()),
        })
    }
}
