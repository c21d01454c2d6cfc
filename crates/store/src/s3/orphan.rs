//! Forgetting a file whose metadata never came.

use std::sync::Arc;

use super::entry::Entry;
use super::shared::{Gone, Plan, Shared};
use super::{keys, lock};
use crate::StoreError;

impl Shared {
    /// Forgets a file without metadata record.
    pub(crate) async fn forget(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<bool, StoreError> {
        let file = entry.file;
        let forgotten = self.change_here(entry, |live, _| {
            let state = &live.state;
            if state.record.is_some() || state.dropped {
                return Ok(Plan::Known(None));
            }
            if !state.is_known() {
                return Ok(Plan::Known(Some(false)));
            }
            Ok(Plan::Write(Box::default(), Gone::All, Some(true)))
        });
        match forgotten.await? {
            None => return Ok(false),
            Some(false) => return Ok(true),
            Some(true) => {}
        }
        // What says nothing any more goes too, unless somebody begins the file anew right now.
        let Ok(_turn) = entry.turn.acquire().await else { return Err(StoreError::Closing) };
        let (mut chain, known) = {
            let live = lock(&entry.live);
            (live.chain, live.state.is_known())
        };
        if !known {
            chain.delete(&self.bucket, |link| keys::link(file, link)).await;
            lock(&entry.live).chain = chain;
        }
        self.clear_all_damage(file).await;
        Ok(true)
    }
}
