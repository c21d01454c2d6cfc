//! The worker that keeps a bucket, for porters: workers beside it, through which bytes go to and from the same bucket, and
//! which keep nothing ([`PorterStore`](super::PorterStore)).
//!
//! Everything is decided here: what is where, and which run may be put. A porter claims a run whose bytes it has hashed, puts
//! the object under the key that it is told, and says what became of that. Until then the claim keeps others away, as one
//! of this process's own would.
//!
//! A porter may vanish at any moment. Whoever brings the very same run shares its claim at once: their objects are the
//! same, and the first that says that it is there settles it for both. Anybody else waits until the claim is too old, and
//! then its object is in doubt, as after any request whose answer did not come. If this process vanishes, a porter claims
//! again from the next one, in whose epoch it puts an object of its own; what it put before counts for nothing against what was let in
//! since (`keys.rs`).
//!
//! A porter is believed that it put an object, once it was seen that it has the same bucket: before its first run an object
//! with its number is looked for. So one that was given another loses nothing.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{FileId, TenantId};
use tokio::sync::Notify;

use super::bucket::{BucketError, S3Request};
use super::keys;
use super::recording::{Agreed, Recording};
use super::shared::Shared;
use super::writer::{Seat, check};
use super::{S3Store, lock};
use crate::StoreError;

/// Claims of porters at once, and porters that are known.
const MAX_CLAIMS: usize = 4096;

/// The most chunks of which it is asked at once where they are.
pub const MAX_PLACES: u64 = 64;

/// What the worker that keeps a bucket does for porters.
#[async_trait]
pub trait Keeper: Send + Sync + 'static {
    /// Claims a run whose bytes the porter has, and compares it. [`StoreError::Unreadable`] if the keeper has not seen that the
    /// porter has the same bucket, and does not see it now. Waits while another writer has a chunk of it with other
    /// bytes; the same run once more shares the claim. Fails as [`RunWriter::finish`](crate::RunWriter::finish) does.
    async fn claim(&self, carried: Carried) -> Result<Claimed, StoreError>;

    /// Ends a claim by what became of the object. [`StoreError::ClaimLost`] if there is no such claim any more: it must be
    /// claimed again.
    async fn settle(&self, claim: PorterClaim, landed: Landed) -> Result<(), StoreError>;

    /// Where chunks are: at most [`MAX_PLACES`]; `None` for what has no record.
    async fn places(&self, file: FileId, range: Range<u64>) -> Result<Vec<Option<ChunkPlace>>, StoreError>;
}

/// A run that a porter has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Which porter.
    pub porter: PorterId,
    /// The file.
    pub file: FileId,
    /// Whose it is.
    pub tenant: TenantId,
    /// Which chunks.
    pub run: Run,
    /// Its bytes.
    pub len: u64,
    /// The value of each chunk.
    pub values: Vec<ChainingValue>,
}

/// A porter, for as long as its process lives: a random number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PorterId(pub u64);

/// What a porter does with a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// Nothing: all of it is durable and recorded.
    Held,
    /// It puts it.
    Put {
        /// The claim, to be settled.
        claim: PorterClaim,
        /// The key of the object.
        key: String,
        /// How many of the chunks have no record.
        new_chunks: u64,
    },
}

/// A claim of a porter: a number that nobody can guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PorterClaim(pub u128);

/// Whether an object is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// It is, durably.
    Yes,
    /// It is not, and will not be.
    No,
    /// Nobody knows.
    Unknown,
}

/// Where the bytes of a chunk are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The object.
    pub key: String,
    /// Which of its bytes.
    pub bytes: Range<u64>,
    /// What they hash to.
    pub value: ChainingValue,
    /// Whether they are known not to.
    pub is_damaged: bool,
}

/// The runs that porters put at present.
#[derive(Debug, Default)]
pub(crate) struct Porters {
    claims: Mutex<HashMap<PorterClaim, Claim>>,
    /// Tells when there is a new one.
    claimed: Notify,
    /// Porters that have this bucket.
    proven: Mutex<BTreeSet<PorterId>>,
}

/// A claim of one porter.
#[derive(Clone, Debug)]
struct Claim {
    since: Instant,
    carriage: Arc<Carriage>,
}

/// A run that porters put, one or several.
#[derive(Debug)]
struct Carriage {
    seat: Seat,
    recording: Recording,
    agreed: Agreed,
    /// Somebody does not know what became of the object.
    is_doubtful: AtomicBool,
}

impl Carriage {
    fn is(&self, file: FileId, recording: &Recording) -> bool {
        let Recording { run, tenant, len, values } = &self.recording;
        let same = (*run, *tenant, *len) == (recording.run, recording.tenant, recording.len);
        same && *values == recording.values && self.seat.entry().file == file
    }

    fn stands(&self) -> bool {
        self.seat.stands(&lock(&self.seat.entry().live))
    }
}

impl Porters {
    /// The claim of a carriage, for one more porter.
    fn add(&self, shared: &Shared, carriage: Arc<Carriage>) -> Result<Claimed, StoreError> {
        let (key, new_chunks) = (carriage.agreed.key.clone(), carriage.agreed.new_chunks);
        let mut claims = lock(&self.claims);
        // Once it is closing nobody clears them again.
        shared.open()?;
        if claims.len() >= MAX_CLAIMS {
            return Err(StoreError::Unreachable { reason: "too many runs are being put at once".into() });
        }
        let claim = PorterClaim(rand::random());
        claims.insert(claim, Claim { since: Instant::now(), carriage });
        drop(claims);
        self.claimed.notify_waiters();
        Ok(Claimed::Put { claim, key, new_chunks })
    }

    /// The same run, if another porter is about to put it.
    fn same(&self, file: FileId, recording: &Recording) -> Option<Arc<Carriage>> {
        let same = lock(&self.claims).values().find(|claim| claim.carriage.is(file, recording)).cloned();
        same.map(|claim| claim.carriage).filter(|carriage| carriage.stands())
    }

    fn remove(&self, claim: PorterClaim) -> Option<Claim> {
        lock(&self.claims).remove(&claim)
    }

    /// Takes out all claims of a carriage.
    fn remove_all(&self, carriage: &Arc<Carriage>) {
        let removed: Vec<_> = {
            let mut claims = lock(&self.claims);
            claims.extract_if(|_, claim| Arc::ptr_eq(&claim.carriage, carriage)).collect()
        };
        // What is dropped takes locks of its own.
        drop(removed);
    }

    /// Whether somebody else has a claim of it.
    fn is_shared(&self, carriage: &Arc<Carriage>) -> bool {
        lock(&self.claims).values().any(|claim| Arc::ptr_eq(&claim.carriage, carriage))
    }

    /// Takes those out that are as old as this.
    fn late(&self, age: Duration, now: Instant) -> Vec<Claim> {
        let is_late = |claim: &Claim| now.saturating_duration_since(claim.since) >= age;
        lock(&self.claims).extract_if(|_, claim| is_late(claim)).map(|(_, claim)| claim).collect()
    }

    /// Gives all of them up: nobody is told any more.
    pub(crate) fn clear(&self) {
        let all = std::mem::take(&mut *lock(&self.claims));
        // Each takes locks of its own when it goes.
        drop(all);
    }

    fn is_proven(&self, porter: PorterId) -> bool {
        lock(&self.proven).contains(&porter)
    }

    fn prove(&self, porter: PorterId) {
        let mut proven = lock(&self.proven);
        if proven.len() >= MAX_CLAIMS {
            proven.clear();
        }
        proven.insert(porter);
    }
}

impl Shared {
    /// Gives up what porters have not settled in time: it is in doubt.
    pub(crate) fn give_up_late_porters(&self, now: Instant) {
        for Claim { carriage, .. } in self.porters.late(self.options.porter_patience, now) {
            let file = carriage.seat.entry().file;
            tracing::warn!(%file, chunks = ?carriage.recording.run.range(), "a porter did not say what became of a run");
            carriage.agreed.doubt(carriage.seat.entry());
            carriage.is_doubtful.store(true, Ordering::Release);
        }
    }

    /// Makes sure that a porter that is not known yet has this bucket.
    async fn prove(&self, porter: PorterId) -> Result<(), StoreError> {
        if self.porters.is_proven(porter) {
            return Ok(());
        }
        match self.bucket.head(&keys::porter(porter.0)).await {
            Ok(_) => {
                self.porters.prove(porter);
                Ok(())
            }
            Err(BucketError::NotFound) => Err(StoreError::Unreadable {
                path: self.options.place(),
                reason: "what a porter put is not there: give both the same store".into(),
            }),
            Err(error) => Err(error.in_store(S3Request::Head)),
        }
    }
}

#[async_trait]
impl Keeper for S3Store {
    async fn claim(&self, carried: Carried) -> Result<Claimed, StoreError> {
        let Carried { porter, file, tenant, run, len, values } = carried;
        let recording = Recording { run, tenant, len, values };
        let shared = &self.shared;
        shared.open()?;
        // Shape and values fit each other.
        recording.piece(shared.fence.epoch())?;
        shared.fence.is_sure(shared.options.look_every)?;
        shared.prove(porter).await?;
        let entry = shared.entry(file).await?;
        check(&lock(&entry.live), file, run, len)?;
        let seat = loop {
            let claimed = shared.porters.claimed.notified();
            tokio::pin!(claimed);
            claimed.as_mut().enable();
            if let Some(carriage) = shared.porters.same(file, &recording) {
                return shared.porters.add(shared, carriage);
            }
            tokio::select! {
                seat = Seat::take(shared, entry.clone(), run, len) => break seat?,
                // It may be the same run.
                () = claimed => {}
            }
        };
        seat.commit()?;
        let work = {
            let shared = shared.clone();
            async move {
                let Some(agreed) = recording.agree(&shared, &seat).await? else { return Ok(Claimed::Held) };
                let is_doubtful = AtomicBool::new(false);
                let carriage = Arc::new(Carriage { seat, recording, agreed, is_doubtful });
                shared.porters.add(&shared, carriage)
            }
        };
        shared.to_its_end(work).await
    }

    async fn settle(&self, claim: PorterClaim, landed: Landed) -> Result<(), StoreError> {
        let shared = self.shared.clone();
        if landed == Landed::Yes {
            shared.fence.is_sure(shared.options.look_every)?;
        }
        let Claim { carriage, .. } = shared.porters.remove(claim).ok_or(StoreError::ClaimLost)?;
        let work = {
            let shared = shared.clone();
            async move {
                let Carriage { seat, agreed, is_doubtful, .. } = &*carriage;
                if landed == Landed::Yes {
                    shared.porters.remove_all(&carriage);
                    return agreed.settle(&shared, seat, Landed::Yes).await;
                }
                if landed == Landed::Unknown {
                    is_doubtful.store(true, Ordering::Release);
                }
                // Whoever else puts it says what becomes of it.
                if shared.porters.is_shared(&carriage) {
                    return Ok(());
                }
                let is_doubtful = is_doubtful.load(Ordering::Acquire);
                let landed = if is_doubtful { Landed::Unknown } else { Landed::No };
                agreed.settle(&shared, seat, landed).await
            }
        };
        shared.to_its_end(work).await
    }

    async fn places(&self, file: FileId, range: Range<u64>) -> Result<Vec<Option<ChunkPlace>>, StoreError> {
        let shared = &self.shared;
        shared.open()?;
        let range = range.start..range.end.max(range.start);
        let count = range.end - range.start;
        crate::limit("chunks", count.try_into().unwrap_or(usize::MAX), MAX_PLACES as usize)?;
        let entry = shared.entry(file).await?;
        let values = shared.values(&entry, range.clone()).await?;
        let damage = shared.damage(file);
        let live = lock(&entry.live);
        range
            .zip(values)
            .map(|(chunk, value)| {
                let source = match live.source(file, ChunkIndex::new(chunk)?) {
                    Ok(source) => source,
                    Err(StoreError::Missing { .. }) => return Ok(None),
                    Err(error) => return Err(error),
                };
                let is_damaged = damage.covers(chunk..chunk + 1);
                // One that came since has a value that nobody looked up.
                let value = source.value.or(value);
                Ok(value.map(|value| ChunkPlace { key: source.key, bytes: source.bytes, value, is_damaged }))
            })
            .collect()
    }
}
