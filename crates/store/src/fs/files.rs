//! What concerns a file as a whole and needs no record of its own: listing, pages, preparing a publication.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;

use sluice_engine::hash::Root;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};

use super::entry::Entry;
use super::layout::shard;
use super::request::Request;
use super::shared::{Counters, Shared};
use super::{lock, log};
use crate::page;
use crate::{Found, Listed, StoreError};

impl Shared {
    /// Files with a summary after `after`, in order. Blocks.
    pub(crate) fn list(&self, after: Option<FileId>, limit: usize) -> Result<Vec<Found>, StoreError> {
        let error = |error: io::Error| self.error("listing files", &error);
        let index = self.layout.dir("index");
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let first = after.map(shard);
        let unflushed = self.table.unflushed((from, Bound::Unbounded));
        let mut shards: BTreeSet<String> = self.disk.list(&index).map_err(error)?.into_iter().collect();
        shards.extend(unflushed.iter().map(|file| shard(*file)));
        let mut files = Vec::new();
        for shard_name in shards.into_iter().filter(|name| first.as_ref().is_none_or(|first| name >= first)) {
            let names = match self.disk.list(&index.join(&shard_name)) {
                Ok(names) => names,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(other) => return Err(error(other)),
            };
            let mut ids: BTreeSet<FileId> = names.iter().filter_map(|name| name.parse().ok()).collect();
            ids.extend(unflushed.iter().filter(|file| shard(**file) == shard_name));
            for file in ids.into_iter().filter(|file| after.is_none_or(|after| *file > after)) {
                if files.len() >= limit {
                    return self.with_log(files, after, limit);
                }
                let known = match self.table.find(file) {
                    Some(entry) => lock(&entry.live).state.is_known(),
                    // What only the journal knows must be read; what has an index and no changes is known.
                    None if unflushed.contains(&file) => lock(&self.load(file)?.live).state.is_known(),
                    None => true,
                };
                if known {
                    files.push(file);
                }
            }
        }
        self.with_log(files, after, limit)
    }

    /// Adds the files of the log to a page of those that have an index.
    fn with_log(
        &self,
        files: Vec<FileId>,
        after: Option<FileId>,
        limit: usize,
    ) -> Result<Vec<Found>, StoreError> {
        let logged = self.log.index.files(after, limit).map_err(|error| self.log.broken(self, &error))?;
        let found = |(file, place): (FileId, log::index::Place)| {
            (file, Found { file, brief: Some(place.brief), whole: place.whole })
        };
        let mut all: BTreeMap<FileId, Found> = logged.into_iter().map(found).collect();
        // A file that has an index is not the log's any more.
        all.extend(files.into_iter().map(|file| (file, Found { file, brief: None, whole: false })));
        Ok(all.into_values().take(limit).collect())
    }

    /// Files of a tenant that the log keeps, by the client's ids. Blocks.
    pub(crate) fn listed(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let found = self.log.index.listed(tenant, after, limit);
        let found = found.map_err(|error| self.log.broken(self, &error))?;
        let listed = |entry: log::index::Entry| Listed {
            client: entry.client,
            size: entry.size,
            name: entry.name,
            brief: entry.brief,
        };
        Ok(found.into_iter().map(listed).collect())
    }

    /// Checks that a file is whole and has this root, and makes its values durable beside its bytes. `None` if it
    /// is published already. Blocks.
    pub(crate) fn prepare_publication(
        &self,
        entry: &Entry,
        root: Root,
    ) -> Result<Option<Request>, StoreError> {
        let losses = {
            let live = lock(&entry.live);
            if live.state.dropped {
                return Err(StoreError::Dropped(entry.file));
            }
            if !live.state.is_known() {
                return Err(StoreError::NoFile(entry.file));
            }
            match live.state.published {
                Some(published) if published.root == root => return Ok(None),
                Some(published) => {
                    return Err(StoreError::WrongRoot { expected: root, got: Some(published.root) });
                }
                None => live.losses,
            }
        };
        let published = self.whole(entry, root)?;
        self.flush_values(entry)?;
        Ok(Some(Request::Publish { published, losses }))
    }

    /// Keeps a page of a file that is known. Blocks.
    pub(crate) fn put_page(&self, entry: &Entry, segment: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let _names = lock(&entry.names);
        {
            let live = lock(&entry.live);
            if live.state.dropped || !live.state.is_known() || live.state.is_in_log() {
                return Ok(());
            }
        }
        let error = |error: io::Error| self.error("writing a page", &error);
        self.disk.create_dir(&self.layout.chunks_shard(entry.file)).map_err(error)?;
        self.disk.create_dir(&self.layout.chunks(entry.file)).map_err(error)?;
        self.disk.replace_unsynced(&self.layout.page(entry.file, segment), bytes).map_err(error)
    }

    /// A page, if there is one and it is intact. Blocks.
    pub(crate) fn page(&self, file: FileId, segment: u64) -> Result<Option<Vec<u8>>, StoreError> {
        match self.disk.read(&self.layout.page(file, segment)) {
            Ok(bytes) => Ok(page::decode(file, segment, &bytes)
                .inspect_err(|error| {
                    Counters::add(&self.counters.integrity_failures, 1);
                    tracing::warn!(%file, segment, %error, "a page is damaged");
                })
                .ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error("reading a page", &error)),
        }
    }
}
