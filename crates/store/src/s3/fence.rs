//! Who keeps the bucket: whoever said so last.
//!
//! Each that opens it puts an object of its own, `keepers/<epoch>-<nonce>`, in an epoch above all that are there, and removes
//! those. Nothing is ever put twice under such a key, so nothing that lands late hides who came later. One that was there before looks now
//! and then, and ends when it is not the last. In between it may let runs in: of what contradicts each other then the later
//! epoch counts. One that could not look for a while lets no porter's run in any more.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::bucket::{Bucket, PAGE, S3Request};
use super::keys::{self, Epoch};
use super::lock;
use crate::StoreError;

/// How many looks may fail, one after the other, before it is not sure any more.
const MISSED: u32 = 3;

/// That this process keeps the bucket, since when, and as of when.
#[derive(Debug)]
pub(crate) struct Fence {
    keeper: (Epoch, u64),
    looked: Mutex<Instant>,
}

/// Everyone who said that he keeps it.
async fn keepers(bucket: &Bucket) -> Result<Vec<(Epoch, u64)>, StoreError> {
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let listed = bucket.list(keys::KEEPERS, after.as_deref(), PAGE).await;
        let (page, more) = listed.map_err(|error| error.in_store(S3Request::List))?;
        found.extend(page.iter().filter_map(|object| keys::parse_keeper(&object.key)));
        after = page.last().map(|last| last.key.clone());
        if !more || after.is_none() {
            return Ok(found);
        }
    }
}

impl Fence {
    /// From now on this process keeps the bucket.
    pub(crate) async fn raise(bucket: &Bucket, place: &str) -> Result<Self, StoreError> {
        let before = keepers(bucket).await?;
        let highest = before.iter().map(|(epoch, _)| epoch.0).max().unwrap_or_default();
        let epoch = highest.checked_add(1).map(Epoch).ok_or_else(|| StoreError::Unreadable {
            path: place.to_owned(),
            reason: "it was opened too often".into(),
        })?;
        let keeper = (epoch, rand::random());
        let looked = Mutex::new(Instant::now());
        let put = bucket.put(&keys::keeper(keeper), Bytes::new()).await;
        let _ = put.map_err(|error| error.in_store(S3Request::Put))?;
        // What is left is removed by the next.
        let _ = bucket.delete(before.into_iter().map(keys::keeper).collect()).await;
        Ok(Self { keeper, looked })
    }

    /// Since when.
    pub(crate) fn epoch(&self) -> Epoch {
        self.keeper.0
    }

    /// Looks whether nobody has come since.
    pub(crate) async fn is_last(&self, bucket: &Bucket) -> Result<bool, StoreError> {
        let now = Instant::now();
        let is_last = keepers(bucket).await?.into_iter().all(|other| other <= self.keeper);
        if is_last {
            *lock(&self.looked) = now;
        }
        Ok(is_last)
    }

    /// Fails if that was too long ago.
    pub(crate) fn is_sure(&self, look_every: Duration) -> Result<(), StoreError> {
        if lock(&self.looked).elapsed() <= look_every * MISSED {
            return Ok(());
        }
        Err(StoreError::Unreachable {
            reason: "the bucket does not say whether another process keeps it".into(),
        })
    }
}
