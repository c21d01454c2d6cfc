//! The catalogue: which files a tenant has here, by the ids its clients know. An index, rebuilt at start (G5).

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{PoisonError, RwLock};

use sluice_engine::ids::{ClientFileId, FileId, TenantId};

/// The files of each tenant.
#[derive(Debug, Default)]
pub(crate) struct Catalogue(RwLock<BTreeMap<TenantId, BTreeMap<ClientFileId, FileId>>>);

impl Catalogue {
    pub(crate) fn add(&self, tenant: TenantId, client: ClientFileId, file: FileId) {
        let mut tenants = self.0.write().unwrap_or_else(PoisonError::into_inner);
        tenants.entry(tenant).or_default().insert(client, file);
    }

    /// Up to `limit` files of a tenant with ids above `after`.
    pub(crate) fn page(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Vec<(ClientFileId, FileId)> {
        let tenants = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let files = tenants.get(&tenant).into_iter().flat_map(|files| files.range((from, Bound::Unbounded)));
        files.map(|(client, file)| (*client, *file)).take(limit).collect()
    }
}
