//! Lists of files: all of which something is known, and those of a tenant.

use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use sluice_engine::aggregator::Brief;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};

use super::bucket::{PAGE, S3Request};
use super::keys::{self, Part};
use super::shared::Shared;
use super::{READERS, lock};
use crate::{Found, Listed, StoreError};

impl Shared {
    /// Files of which something is known, in order.
    pub(crate) async fn all_files(
        &self,
        after: Option<FileId>,
        limit: usize,
    ) -> Result<Vec<Found>, StoreError> {
        let mut found: Vec<Found> = Vec::new();
        let mut from = after.map(|after| Part::Files.past(after));
        while found.len() < limit {
            let listed = self.bucket.list(&Part::Files.prefix(), from.as_deref(), PAGE).await;
            let (page, more) = listed.map_err(|error| error.in_store(S3Request::List))?;
            for file in page.iter().filter_map(|object| Some(Part::Files.parse(&object.key)?.0)) {
                if found.last().is_none_or(|last| last.file != file) {
                    found.push(Found { file, brief: None, whole: false });
                }
            }
            from = found.last().map(|last| Part::Files.past(last.file));
            if !more || page.is_empty() {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Files of a tenant that are in lists, in the order of its ids.
    pub(crate) async fn files_of(
        self: &Arc<Self>,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let prefix = keys::names(tenant);
        let mut found: Vec<Listed> = Vec::new();
        let mut from = after.map(|after| keys::name(tenant, after));
        while found.len() < limit {
            let wanted = (limit - found.len()).min(PAGE);
            let listed = self.bucket.list(&prefix, from.as_deref(), wanted).await;
            let (page, more) = listed.map_err(|error| error.in_store(S3Request::List))?;
            from = page.last().map(|last| last.key.clone());
            let files = page.iter().filter_map(|object| Some(keys::parse_name(&object.key)?.1));
            let files: Vec<Option<Listed>> = stream::iter(files.collect::<Vec<_>>())
                .map(|client| self.listed(tenant, client))
                .buffered(READERS)
                .try_collect()
                .await?;
            found.extend(files.into_iter().flatten());
            if !more || from.is_none() {
                break;
            }
        }
        Ok(found)
    }

    /// What lists tell of a file that is in them.
    async fn listed(
        self: &Arc<Self>,
        tenant: TenantId,
        client: ClientFileId,
    ) -> Result<Option<Listed>, StoreError> {
        let entry = self.entry(FileId::derive(tenant, client)).await?;
        let live = lock(&entry.live);
        let state = &live.state;
        let Some(record) = state.record.as_ref().filter(|_| state.in_lists && !state.dropped) else {
            return Ok(None);
        };
        Ok(Some(Listed {
            client,
            size: state.geometry().map_or(0, |shape| shape.size()),
            name: record.name().to_owned(),
            brief: Brief::of_stored(Some(record), &state.facts),
        }))
    }
}
