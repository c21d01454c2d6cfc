//! The slots of a datacenter whose shares are in different hands, as one.
//!
//! What is about a file goes to whoever has its share. What is about all of them (lists, quotas, a tenant, a drain) is asked
//! of each, and put together here. What belongs to no file is the first share's.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::try_join_all;
use sluice_engine::context::{SessionContext, SignedContext};
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use sluice_engine::span::Place;
use sluice_node::access::ContextVerifier;
use sluice_proto::calls::{
    Admission, ChunkSource, DrainOrder, ListQuery, Opened, Slots, Tenants, Used, Wait,
};
use sluice_proto::http::{
    About, DrainStatus, FileEntry, FilePage, FileStatus, Revoke, RevokedTokens, TenantStatus, TreeNode,
};
use sluice_proto::problem::{Problem, Refusal};
use tokio::time::Instant;

/// How old what a tenant uses in other shares may be when it counts toward a quota.
const USED_AGE: Duration = Duration::from_secs(1);

/// Tenants of whom that is remembered.
const MAX_TENANTS: usize = 1_000;

/// Who answers for one share.
#[derive(Clone)]
pub struct SharePart {
    /// What workers ask.
    pub slots: Arc<dyn Slots>,
    /// What who runs the cluster asks.
    pub tenants: Arc<dyn Tenants>,
}

/// All shares of a datacenter.
pub struct Divided {
    shares: BTreeMap<Share, SharePart>,
    access: Arc<ContextVerifier>,
    /// What tenants with quotas use in each share.
    used: Mutex<HashMap<TenantId, Told>>,
}

/// What each share said that a tenant uses there, and when.
struct Told {
    at: Instant,
    used: BTreeMap<Share, Used>,
}

impl Told {
    fn is_new(&self) -> bool {
        self.at.elapsed() < USED_AGE
    }
}

impl fmt::Debug for Divided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Divided({} shares)", self.shares.len())
    }
}

impl Divided {
    /// What answers for all of `shares`, which are one number of them, in full: of one share itself. `access` verifies
    /// contexts.
    pub fn over(mut shares: BTreeMap<Share, SharePart>, access: Arc<ContextVerifier>) -> SharePart {
        if let Some(whole) = shares.remove(&Share::WHOLE) {
            return whole;
        }
        let this = Arc::new(Self { shares, access, used: Mutex::default() });
        SharePart { slots: this.clone(), tenants: this }
    }

    fn part(&self, file: FileId) -> Result<&SharePart, Refusal> {
        let part = self.shares.iter().find(|(share, _)| share.has(file));
        part.map(|(_, part)| part).ok_or_else(no_share)
    }

    fn first(&self) -> Result<&SharePart, Refusal> {
        self.part(FileId::NIL)
    }

    /// Who answers for a file that the client of a context names.
    fn of(&self, context: &SignedContext, id: ClientFileId) -> Result<&SharePart, Refusal> {
        let session = self.access.verify(context)?;
        self.part(FileId::derive(session.tenant, id))
    }

    /// What a tenant uses in other shares than that of a file, if its token has a quota.
    async fn beside(&self, context: &SignedContext, file: FileId) -> Result<Used, Refusal> {
        let session = self.access.verify(context)?;
        let SessionContext { quota, quota_files, tenant, .. } = *session;
        if (quota, quota_files) == (0, 0) || self.shares.len() == 1 {
            return Ok(Used::default());
        }
        let known = {
            let all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            all.get(&tenant).filter(|told| told.is_new()).map(|told| told.used.clone())
        };
        let used = match known {
            Some(used) => used,
            None => {
                let asked = self.shares.iter().map(async |(share, part)| {
                    Ok::<_, Refusal>((*share, part.slots.used(context, None).await?))
                });
                let used: BTreeMap<Share, Used> = try_join_all(asked).await?.into_iter().collect();
                let mut all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
                if all.len() >= MAX_TENANTS {
                    all.retain(|_, told| told.is_new());
                }
                if all.len() < MAX_TENANTS {
                    all.insert(tenant, Told { at: Instant::now(), used: used.clone() });
                }
                used
            }
        };
        let beside = used.iter().filter(|(share, _)| !share.has(file)).map(|(_, used)| *used);
        Ok(beside.fold(Used::default(), Used::and))
    }

    async fn each<'a, T, F: Future<Output = Result<T, Refusal>>>(
        &'a self,
        ask: impl Fn(&'a SharePart) -> F,
    ) -> Result<Vec<T>, Refusal> {
        try_join_all(self.shares.values().map(ask)).await
    }
}

fn no_share() -> Refusal {
    Refusal::new(Problem::Internal, "nobody answers for a share of the slots")
}

/// Puts the pages together that each share gave of one query: those files of them that no share may have left out.
fn join(pages: Vec<FilePage>, limit: usize) -> FilePage {
    // What a page says is all there is up to where the next one begins.
    let bound = pages.iter().filter_map(|page| page.next).min();
    let mut files: Vec<FileEntry> = pages.into_iter().flat_map(|page| page.files).collect();
    files.retain(|file| bound.is_none_or(|bound| file.id <= bound));
    files.sort_by_key(|file| file.id);
    let is_cut = files.len() > limit;
    files.truncate(limit);
    let next = if is_cut { files.last().map(|last| last.id) } else { bound };
    FilePage { files, next }
}

#[async_trait]
impl Slots for Divided {
    async fn create(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        home: Option<String>,
        _: Used,
    ) -> Result<(bool, FileStatus), Refusal> {
        let file = record.file_id();
        let beside = self.beside(context, file).await?;
        self.part(file)?.slots.create(context, record, home, beside).await
    }

    async fn create_whole(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
        _: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        let file = record.file_id();
        let beside = self.beside(context, file).await?;
        self.part(file)?.slots.create_whole(context, record, bytes, beside).await
    }

    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        self.of(context, id)?.slots.settle(context, id, size).await
    }

    async fn admit_more(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        bytes: u64,
        _: Used,
    ) -> Result<(), Refusal> {
        let file = FileId::derive(self.access.verify(context)?.tenant, id);
        let beside = self.beside(context, file).await?;
        self.part(file)?.slots.admit_more(context, id, bytes, beside).await
    }

    async fn admit(&self, context: &SignedContext, file: FileId, _: Used) -> Result<Admission, Refusal> {
        let beside = self.beside(context, file).await?;
        self.part(file)?.slots.admit(context, file, beside).await
    }

    async fn used(&self, context: &SignedContext, file: Option<FileId>) -> Result<Used, Refusal> {
        let used = self.each(|part| part.slots.used(context, file)).await?;
        Ok(used.into_iter().fold(Used::default(), Used::and))
    }

    async fn register(
        &self,
        context: &SignedContext,
        file: FileId,
        run: Run,
        values: &[ChainingValue],
    ) -> Result<bool, Refusal> {
        self.part(file)?.slots.register(context, file, run, values).await
    }

    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        self.of(context, id)?.slots.status(context, id, wait).await
    }

    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        let pages = self.each(|part| part.slots.list(context, query)).await?;
        Ok(join(pages, query.limit))
    }

    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        self.of(context, id)?.slots.open(context, id).await
    }

    async fn locate(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<Vec<ChunkSource>, Refusal> {
        self.of(context, id)?.slots.locate(context, id, range).await
    }

    async fn fetch(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        index: ChunkIndex,
        value: ChainingValue,
    ) -> Result<Bytes, Refusal> {
        self.of(context, id)?.slots.fetch(context, id, index, value).await
    }

    async fn report_damage(&self, file: FileId, index: ChunkIndex) {
        if let Ok(part) = self.part(file) {
            part.slots.report_damage(file, index).await;
        }
    }

    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal> {
        self.of(context, id)?.slots.tree(context, id, place).await
    }

    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
        self.of(context, id)?.slots.remove(context, id).await
    }

    async fn about(&self, context: &SignedContext) -> Result<About, Refusal> {
        self.first()?.slots.about(context).await
    }

    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        // What the first share refuses is asked of no other.
        let first = self.first()?.slots.drain(context, order.clone()).await?;
        let is_other = |share: &Share| !share.is_first();
        let others = self.shares.iter().filter(|(share, _)| is_other(share));
        let others = others.map(|(_, part)| part.slots.drain(context, order.clone()));
        let files_left = try_join_all(others).await?.iter().map(|other| other.files_left).sum::<u64>();
        Ok(DrainStatus { files_left: first.files_left + files_left, ..first })
    }
}

#[async_trait]
impl Tenants for Divided {
    async fn revoke(&self, context: &SignedContext, revoke: Revoke) -> Result<RevokedTokens, Refusal> {
        self.first()?.tenants.revoke(context, revoke).await
    }

    async fn tenant(&self, context: &SignedContext, tenant: TenantId) -> Result<TenantStatus, Refusal> {
        let first = self.first()?.tenants.tenant(context, tenant).await?;
        let all = self.each(|part| part.tenants.tenant(context, tenant)).await?;
        let sum = |of: fn(&TenantStatus) -> u64| all.iter().map(of).sum();
        Ok(TenantStatus { stored_bytes: sum(|one| one.stored_bytes), files: sum(|one| one.files), ..first })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_proto::http::State;
    use uuid::Uuid;

    fn entry(id: u128) -> FileEntry {
        FileEntry {
            id: Uuid::from_u128(id),
            size: None,
            name: String::new(),
            state: State::Receiving,
            home: String::new(),
            root: None,
        }
    }

    fn page(ids: &[u128], next: Option<u128>) -> FilePage {
        FilePage { files: ids.iter().map(|id| entry(*id)).collect(), next: next.map(Uuid::from_u128) }
    }

    fn ids(page: &FilePage) -> (Vec<u128>, Option<u128>) {
        (page.files.iter().map(|file| file.id.as_u128()).collect(), page.next.map(|next| next.as_u128()))
    }

    #[test]
    fn pages_are_joined_up_to_where_each_is_known() {
        let joined = |pages, limit| ids(&join(pages, limit));
        assert_eq!(joined(vec![page(&[1, 4], None), page(&[2], None)], 9), (vec![1, 2, 4], None));
        assert_eq!(joined(vec![page(&[1, 4], Some(4)), page(&[2, 7], None)], 9), (vec![1, 2, 4], Some(4)));
        assert_eq!(joined(vec![page(&[1, 4], Some(4)), page(&[2, 3], Some(3))], 2), (vec![1, 2], Some(2)));
        // One that looked at many and found few says how far it came.
        assert_eq!(joined(vec![page(&[], Some(5)), page(&[2, 9], None)], 9), (vec![2], Some(5)));
        assert_eq!(joined(vec![page(&[], None), page(&[], None)], 9), (vec![], None));
    }

    #[test]
    fn following_the_pages_finds_every_file_once() {
        let shares: [Vec<u128>; 3] =
            [(1..40).step_by(3).collect(), (2..40).step_by(6).collect(), (6..40).step_by(7).collect()];
        let mut expected: Vec<u128> = shares.iter().flatten().copied().collect();
        expected.sort_unstable();
        for limit in 1..9 {
            let (mut found, mut after) = (Vec::new(), 0);
            loop {
                let pages = shares.iter().map(|share| {
                    let rest: Vec<u128> = share.iter().copied().filter(|id| *id > after).collect();
                    let shown = &rest[..rest.len().min(limit)];
                    page(shown, shown.last().copied().filter(|_| rest.len() > limit))
                });
                let (shown, next) = ids(&join(pages.collect(), limit));
                assert!(shown.len() <= limit);
                found.extend(shown);
                match next {
                    Some(next) => after = next,
                    None => break,
                }
            }
            assert_eq!(found, expected, "{limit}");
        }
    }
}
