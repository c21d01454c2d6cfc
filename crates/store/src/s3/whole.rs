//! Files that come whole in one request, or are whole elsewhere.

use std::sync::Arc;

use bytes::Bytes;
use sluice_engine::geometry::Geometry;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::ranges::Ranges;

use super::bucket::S3Request;
use super::entry::{Entry, Live};
use super::file::Assembled;
use super::keys::{self, Life};
use super::shared::{Gone, Plan, Shared};
use super::{held_record, lock};
use crate::{StoreError, Whole, WholeOutcome};

impl Shared {
    /// Makes a whole file durable: its bytes as the object that they stay, its name, and then, in one write, all that is
    /// known of it.
    pub(crate) async fn take_whole(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        record: MetadataRecord,
        facts: Vec<u8>,
        whole: Whole,
    ) -> Result<WholeOutcome, StoreError> {
        let Ok(_assembling) = entry.assembling.acquire().await else { return Err(StoreError::Closing) };
        let root = whole.root();
        let is_there = |live: &Live| -> Result<Option<WholeOutcome>, StoreError> {
            if live.state.dropped {
                return Err(StoreError::Dropped(entry.file));
            }
            held_record(live, &record)?;
            match live.state.published() {
                Some(held) if held.root == root => return Ok(Some(WholeOutcome::Known)),
                Some(held) => return Err(StoreError::WrongRoot { expected: held.root, got: Some(root) }),
                None => {}
            }
            // Held already, or being held: whoever compares chunks finds out whether it is the same.
            let begun = live.state.is_known() || !live.claims.is_empty();
            Ok(begun.then_some(WholeOutcome::Begun))
        };
        let there = is_there(&lock(&entry.live))?;
        if let Some(outcome) = there {
            return Ok(outcome);
        }
        let (life, segment_chunks) = (Life::begin(), self.options.segment_chunks);
        let geometry = Geometry::new(whole.bytes().len() as u64)?;
        let key = keys::assembled(entry.file, life, root, 0);
        let name = keys::name(record.tenant(), record.client_id());
        let puts =
            tokio::join!(self.bucket.put(&key, whole.bytes().clone()), self.bucket.put(&name, Bytes::new()));
        for put in [puts.0, puts.1] {
            let _ = put.map_err(|error| error.in_store(S3Request::Put))?;
        }
        let outcome = self.change_here(entry, |live, _| {
            if let Some(outcome) = is_there(live)? {
                return Ok(Plan::Known(outcome));
            }
            let mut state = live.state.clone();
            (state.tenant, state.life) = (Some(record.tenant()), life);
            (state.record, state.facts, state.in_lists) = (Some(record.clone()), facts, true);
            let only = whole.value();
            state.assembled = Some(Assembled { geometry, root, segment_chunks, only, lost: Ranges::new() });
            Ok(Plan::Write(Box::new(state), Gone::Nothing, WholeOutcome::Stored))
        });
        let outcome = outcome.await;
        if !matches!(outcome, Ok(WholeOutcome::Stored)) {
            // Its life never began. If that is not known, the sweep finds out.
            if !matches!(outcome, Err(StoreError::Io { .. })) {
                self.discard(vec![key]);
            }
        }
        outcome
    }

    /// Remembers a file that is whole elsewhere.
    pub(crate) async fn take_known(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        record: MetadataRecord,
        facts: Vec<u8>,
    ) -> Result<WholeOutcome, StoreError> {
        let is_there = |live: &Live| -> Result<Option<WholeOutcome>, StoreError> {
            if live.state.dropped {
                return Err(StoreError::Dropped(entry.file));
            }
            if held_record(live, &record)? {
                return Ok(Some(WholeOutcome::Known));
            }
            Ok((live.state.is_known() || !live.claims.is_empty()).then_some(WholeOutcome::Begun))
        };
        let there = is_there(&lock(&entry.live))?;
        if let Some(outcome) = there {
            return Ok(outcome);
        }
        let name = keys::name(record.tenant(), record.client_id());
        let _ = self.bucket.put(&name, Bytes::new()).await.map_err(|error| error.in_store(S3Request::Put))?;
        self.change_here(entry, |live, _| {
            if let Some(outcome) = is_there(live)? {
                return Ok(Plan::Known(outcome));
            }
            let mut state = live.state.clone();
            (state.tenant, state.life) = (Some(record.tenant()), Life::begin());
            (state.record, state.facts, state.in_lists) = (Some(record.clone()), facts, true);
            Ok(Plan::Write(Box::new(state), Gone::Nothing, WholeOutcome::Stored))
        })
        .await
    }
}
