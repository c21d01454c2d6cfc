//! What tenants with a quota have stored in this datacenter.
//!
//! Nothing is counted before a token with a quota comes; then the tenant's files are gone through once, and from then on
//! the ledger task notes each that changes. So the count is exact but for what is under way: requests that were let in
//! together may go past a quota by what they carry. An index, made anew after a start (G5); some 50 bytes a file.
//!
//! A file counts as one until it is dropped, once its metadata record is here or chunks of it that somebody described:
//! what lists tell. Of chunks whose metadata nobody knows the bytes count, and how many they may be is capped besides.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sluice_engine::aggregator::{Aggregator, Brief};
use sluice_engine::context::SessionContext;
use sluice_engine::geometry::Geometry;
use sluice_engine::ids::{ClientFileId, DcId, FileId, TenantId};
use sluice_engine::ledger::FileState;
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::calls::Used;
use sluice_proto::problem::{Problem, Refusal};
use tokio::sync::OnceCell;

use crate::AggregatorService;
use crate::refusal::of_store;

/// Files gone through at once.
const PAGE: usize = 1_000;

/// What is counted of each tenant.
#[derive(Default)]
pub(crate) struct Usage(Mutex<HashMap<TenantId, Counted>>);

#[derive(Default)]
struct Counted {
    files: HashMap<FileId, u64>,
    bytes: u64,
    /// Files that ended while all were gone through.
    ended: HashSet<FileId>,
    is_whole: bool,
    once: Arc<OnceCell<()>>,
}

impl Counted {
    fn set(&mut self, file: FileId, bytes: u64) {
        let before = self.files.insert(file, bytes).unwrap_or(0);
        self.bytes = self.bytes - before + bytes;
    }

    fn end(&mut self, file: FileId) {
        self.bytes -= self.files.remove(&file).unwrap_or(0);
        if !self.is_whole {
            self.ended.insert(file);
        }
    }

    /// What was found, unless more is known meanwhile.
    fn found(&mut self, file: FileId, bytes: u64) {
        if !self.files.contains_key(&file) && !self.ended.contains(&file) {
            self.set(file, bytes);
        }
    }
}

impl Usage {
    fn counted(&self) -> MutexGuard<'_, HashMap<TenantId, Counted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a file that came whole.
    pub(crate) fn hold(&self, tenant: TenantId, file: FileId, bytes: u64) {
        if let Some(counted) = self.counted().get_mut(&tenant) {
            counted.set(file, bytes);
        }
    }

    /// Takes note of a file whose record came, though nothing else of it is here.
    pub(crate) fn list(&self, aggregator: &Aggregator, tenant: TenantId, id: FileId) {
        if aggregator.state(id) != FileState::Dropped
            && let Some(counted) = self.counted().get_mut(&tenant)
        {
            counted.found(id, 0);
        }
    }

    /// Takes note of a file that changed.
    pub(crate) fn note(&self, aggregator: &Aggregator, id: FileId) {
        let mut tenants = self.counted();
        if tenants.is_empty() {
            return;
        }
        if aggregator.state(id) == FileState::Dropped {
            tenants.values_mut().for_each(|counted| counted.end(id));
            return;
        }
        // One that went to rest stays as it was.
        let Some((tenant, bytes)) = held(aggregator, id) else { return };
        if let Some(counted) = tenants.get_mut(&tenant) {
            counted.set(id, bytes);
        }
    }
}

/// Whose a file is, and how many bytes of it are here, as far as the engine knows now; `None` if nothing of it is, or it is
/// an orphan.
fn held(aggregator: &Aggregator, id: FileId) -> Option<(TenantId, u64)> {
    let file = aggregator.file(id)?;
    let tenant = file.ledger().tenant()?;
    let chunks = file.ledger().chunks_held_by(aggregator.config().me);
    let is_listed = file.record().is_some() || chunks > 0;
    is_listed.then(|| (tenant, bytes_of(chunks, file.ledger().file())))
}

fn bytes_of(chunks: u64, shape: Option<Geometry>) -> u64 {
    let bytes = chunks.saturating_mul(CHUNK_LEN);
    shape.map_or(bytes, |shape| bytes.min(shape.size()))
}

impl AggregatorService {
    /// Refuses what would go past the quotas of a session's token: so many more bytes, or any at all; of a `file`, which may
    /// begin with them (`begins`). What the tenant has `beside`, in other shares, counts as well.
    pub(crate) async fn within_quota(
        &self,
        session: &SessionContext,
        bytes: u64,
        file: Option<FileId>,
        begins: bool,
        beside: Used,
    ) -> Result<(), Refusal> {
        let (bytes_bound, files_bound) = (session.quota, if begins { session.quota_files } else { 0 });
        if bytes_bound == 0 && files_bound == 0 {
            return Ok(());
        }
        let used = self.used_by(session.tenant, file).await?.and(beside);
        if files_bound > 0 && !used.has && used.files >= files_bound {
            let detail = format!("{} of {files_bound} files are in this datacenter", used.files);
            return Err(Refusal::new(Problem::Quota, detail).hint(
                "delete files, send to another datacenter, or ask for a token with a larger quota of files",
            ));
        }
        let used = used.bytes;
        if bytes_bound == 0 || used.saturating_add(bytes) <= bytes_bound && used < bytes_bound {
            return Ok(());
        }
        let detail =
            format!("{used} of {bytes_bound} bytes are used in this datacenter, {bytes} more were to come");
        Err(Refusal::new(Problem::Quota, detail)
            .hint("delete files, send to another datacenter, or ask for a token with a larger quota"))
    }

    /// What a tenant has here, and whether this file is among it; counts if nobody did since the start. Chunks of the file
    /// that came before its metadata are left out: they are part of what it is going to be.
    pub(crate) async fn used_by(&self, tenant: TenantId, file: Option<FileId>) -> Result<Used, Refusal> {
        let once = self.usage.counted().entry(tenant).or_default().once.clone();
        once.get_or_try_init(|| self.count(tenant)).await?;
        let orphans = self.ledgers.ask(move |aggregator| {
            let own = file.map_or(0, |file| aggregator.orphan_chunks(tenant, file));
            aggregator.orphans(tenant).1.saturating_sub(own)
        });
        let orphans = orphans.await?;
        let tenants = self.usage.counted();
        Ok(tenants.get(&tenant).map_or(Used::default(), |counted| Used {
            bytes: counted.bytes.saturating_add(orphans.saturating_mul(CHUNK_LEN)),
            files: counted.files.len() as u64,
            has: file.is_some_and(|file| counted.files.contains_key(&file)),
        }))
    }

    async fn count(&self, tenant: TenantId) -> Result<(), Refusal> {
        self.loaded().await?;
        let me = self.parts.dc;
        let mut after = None;
        loop {
            let listed =
                self.parts.store.listed(tenant, after, PAGE).await.map_err(|error| of_store(&error))?;
            let more = listed.len() == PAGE;
            after = listed.last().map(|last| last.client);
            let mut tenants = self.usage.counted();
            let counted = tenants.entry(tenant).or_default();
            for found in listed {
                let file = FileId::derive(tenant, found.client);
                let bytes = if is_here(&found.brief, me) { found.size } else { 0 };
                if self.parts.share.has(file) {
                    counted.found(file, bytes);
                }
            }
            if !more {
                break;
            }
        }
        let mut after: Option<ClientFileId> = None;
        loop {
            let page = self.catalogue.page(tenant, after, PAGE);
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            let files: Vec<FileId> = page.into_iter().map(|(_, file)| file).collect();
            let asked = self.ledgers.ask(move |aggregator| {
                let held = |file| held(aggregator, file).map(|(_, bytes)| bytes);
                let known = files.into_iter().filter(|file| aggregator.state(*file) != FileState::Dropped);
                known.map(|file| (file, held(file))).collect::<Vec<_>>()
            });
            for (file, bytes) in asked.await? {
                let bytes = match bytes {
                    Some(bytes) => bytes,
                    // It is at rest.
                    None => self.stored_bytes(file).await?,
                };
                self.usage.counted().entry(tenant).or_default().found(file, bytes);
            }
        }
        let mut tenants = self.usage.counted();
        let counted = tenants.entry(tenant).or_default();
        (counted.is_whole, counted.ended) = (true, HashSet::new());
        Ok(())
    }

    async fn stored_bytes(&self, file: FileId) -> Result<u64, Refusal> {
        let summary = self.parts.store.summary(file).await.map_err(|error| of_store(&error))?;
        Ok(summary.map_or(0, |summary| {
            let chunks = summary.held.iter().map(|range| range.end - range.start).sum();
            bytes_of(chunks, summary.size)
        }))
    }
}

/// Whether the bytes of a file that is kept in one record are here, and not elsewhere.
fn is_here(brief: &[u8; Brief::LEN], me: DcId) -> bool {
    Brief::from_bytes(brief).and_then(|brief| brief.home()).is_none_or(|home| home == me)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_beats_what_is_found() {
        let (one, two, three) =
            (FileId::from_bytes([1; 16]), FileId::from_bytes([2; 16]), FileId::from_bytes([3; 16]));
        let mut counted = Counted::default();
        counted.set(one, 5);
        counted.end(two);
        [(one, 3), (two, 7), (three, 11)].into_iter().for_each(|(file, bytes)| counted.found(file, bytes));
        assert_eq!(counted.bytes, 16);
        counted.set(one, 2);
        counted.end(three);
        assert_eq!((counted.bytes, counted.files.len()), (2, 1));
    }
}
