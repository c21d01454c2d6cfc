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
use futures_util::future::{join_all, try_join_all};
use sluice_engine::context::{SessionContext, SignedContext};
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use sluice_engine::limits::CHUNK_LEN;
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
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

/// How old what a tenant uses in other shares may be when it counts toward a quota. What came by this process since is added.
const USED_AGE: Duration = Duration::from_secs(1);

/// So many more than its part each share is asked for when files are listed, and so often at most for one page.
const SPREAD: usize = 8;
const ROUNDS: usize = 4;

/// What was asked so lately is not asked again because somebody is past his quota.
const USED_MOMENT: Duration = Duration::from_millis(200);

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
    /// Held by whoever asks for that.
    asking: AsyncMutex<()>,
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
        let this = Arc::new(Self { shares, access, used: Mutex::default(), asking: AsyncMutex::default() });
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

    /// Has the owner of a file decide on something that counts toward quotas, with what the tenant uses in other shares.
    async fn decide<T, F: Future<Output = Result<T, Refusal>>>(
        &self,
        context: &SignedContext,
        file: FileId,
        ask: impl Fn(Used) -> F,
    ) -> Result<T, Refusal> {
        let session = self.access.verify(context)?;
        let SessionContext { quota, quota_files, tenant, .. } = *session;
        if (quota, quota_files) == (0, 0) {
            return ask(Used::default()).await;
        }
        let (beside, is_new) = self.beside(context, tenant, file).await?;
        match ask(beside).await {
            // What is remembered is rather too much: nobody is refused for that.
            Err(refusal) if refusal.problem == Problem::Quota && !is_new => {
                self.forget_older(tenant, USED_MOMENT);
                ask(self.beside(context, tenant, file).await?.0).await
            }
            decided => decided,
        }
    }

    /// What a tenant uses in other shares than that of a file, and whether that was asked just now.
    async fn beside(
        &self,
        context: &SignedContext,
        tenant: TenantId,
        file: FileId,
    ) -> Result<(Used, bool), Refusal> {
        let known = || {
            let all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            all.get(&tenant).filter(|told| told.is_new()).map(|told| told.used.clone())
        };
        let (mut found, mut turn) = (known(), None);
        if found.is_none() {
            // Many come at once, and one of them asks.
            turn = Some(self.asking.lock().await);
            found = known();
        }
        let is_new = found.is_none();
        let used = match found {
            Some(used) => used,
            None => {
                let asked = self.shares.iter().map(async |(share, part)| {
                    Ok::<_, Refusal>((*share, part.slots.used(context, None).await?))
                });
                let at = Instant::now();
                let used: BTreeMap<Share, Used> = try_join_all(asked).await?.into_iter().collect();
                let mut all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
                if all.len() >= MAX_TENANTS {
                    all.retain(|_, told| told.is_new());
                }
                if all.len() < MAX_TENANTS {
                    all.insert(tenant, Told { at, used: used.clone() });
                }
                used
            }
        };
        drop(turn);
        let beside = used.iter().filter(|(share, _)| !share.has(file)).map(|(_, used)| *used);
        Ok((beside.fold(Used::default(), Used::and), is_new))
    }

    /// Takes note of what a tenant uses more, in the share of a file.
    fn note(&self, context: &SignedContext, file: FileId, more: Used) {
        let Ok(session) = self.access.verify(context) else { return };
        let mut all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(told) = all.get_mut(&session.tenant) else { return };
        if let Some((_, used)) = told.used.iter_mut().find(|(share, _)| share.has(file)) {
            *used = used.and(more);
        }
    }

    fn forget_older(&self, tenant: TenantId, age: Duration) {
        let mut all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(&tenant).is_some_and(|told| told.at.elapsed() >= age) {
            all.remove(&tenant);
        }
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
        let part = self.part(file)?;
        let ask = |beside| part.slots.create(context, record.clone(), home.clone(), beside);
        let (is_new, status) = self.decide(context, file, ask).await?;
        if is_new {
            self.note(context, file, Used { files: 1, ..Used::default() });
        }
        Ok((is_new, status))
    }

    async fn create_whole(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
        _: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        let (file, len) = (record.file_id(), bytes.len() as u64);
        let part = self.part(file)?;
        let ask = |beside| part.slots.create_whole(context, record.clone(), bytes.clone(), beside);
        let created = self.decide(context, file, ask).await?;
        if matches!(created, Some((true, _))) {
            self.note(context, file, Used { bytes: len, files: 1, has: false });
        }
        Ok(created)
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
        let part = self.part(file)?;
        self.decide(context, file, |beside| part.slots.admit_more(context, id, bytes, beside)).await
    }

    async fn admit(&self, context: &SignedContext, file: FileId, _: Used) -> Result<Admission, Refusal> {
        let part = self.part(file)?;
        self.decide(context, file, |beside| part.slots.admit(context, file, beside)).await
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
        let registered = self.part(file)?.slots.register(context, file, run, values).await?;
        // At most: a chunk may be short, or have been here.
        let bytes = (run.range().end - run.range().start).saturating_mul(CHUNK_LEN);
        self.note(context, file, Used { bytes, ..Used::default() });
        Ok(registered)
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
        // Files are spread evenly, so each has about its part of a page.
        let part_of = |limit: usize| limit.div_ceil(self.shares.len()) + SPREAD;
        let mut page = FilePage { files: Vec::new(), next: None };
        let mut after = query.after;
        for _ in 0..ROUNDS {
            let left = query.limit - page.files.len();
            let part = ListQuery { after, limit: part_of(left).min(left), ..query };
            let joined = join(self.each(|of| of.slots.list(context, part)).await?, left);
            page.files.extend(joined.files);
            page.next = joined.next;
            after = page.next.map(ClientFileId::new);
            if after.is_none() || page.files.len() >= query.limit {
                break;
            }
        }
        Ok(page)
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
        let removed = self.of(context, id)?.slots.remove(context, id).await;
        self.forget_older(self.access.verify(context)?.tenant, Duration::ZERO);
        removed
    }

    async fn about(&self, context: &SignedContext) -> Result<About, Refusal> {
        self.first()?.slots.about(context).await
    }

    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        if let DrainOrder::Begin { to, phase, evacuate, is_trial: false } = &order {
            // What one share would refuse begins in none.
            let trial =
                DrainOrder::Begin { to: to.clone(), phase: *phase, evacuate: *evacuate, is_trial: true };
            self.each(|part| part.slots.drain(context, trial.clone())).await?;
        }
        // All of them are asked, whatever becomes of some.
        let asked = self.shares.values().map(|part| part.slots.drain(context, order.clone()));
        let answers = join_all(asked).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        let [first, ..] = &answers[..] else { return Err(crate::refusal::stopping()) };
        let how = |status: &DrainStatus| (status.phase.clone(), status.to.clone(), status.evacuate);
        if answers.iter().any(|other| how(other) != how(first)) {
            let detail = "some shares of this datacenter drain otherwise than others";
            return Err(
                Refusal::new(Problem::Unavailable, detail).hint("begin the drain, or end it, once more")
            );
        }
        let files_left = answers.iter().map(|share| share.files_left).sum();
        Ok(DrainStatus { files_left, ..first.clone() })
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
        let shares = [0, 1, 2].map(|share| (1..40).filter(|id| id % 7 % 3 == share).collect::<Vec<u128>>());
        let expected: Vec<u128> = (1..40).collect();
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
