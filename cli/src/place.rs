//! Where a datacenter keeps its files, and opening that.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_node::metrics::Metrics;
use sluice_store::s3::Keeper;
use sluice_store::{ChunkStore, FsOptions, FsStore, S3Options, S3Store};

use crate::datacenter::{StartError, open_store};
use crate::{bucket, volume};

/// Where a datacenter keeps its files.
#[derive(Clone, Debug)]
pub enum StorePlace {
    /// A volume in this directory, which is made if it is missing.
    Directory(PathBuf),
    /// A prefix of a bucket.
    Bucket(Box<S3Options>),
}

impl StorePlace {
    /// The directory, if it is one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(directory) => Some(directory),
            Self::Bucket(_) => None,
        }
    }

    /// Opens the store, and has `metrics` tell of it.
    pub(crate) async fn open(&self, options: FsOptions, metrics: &Metrics) -> Result<OpenStore, StartError> {
        match self {
            Self::Directory(directory) => {
                let store = Arc::new(open_store(directory.clone(), options).await?);
                volume::show(&store, metrics);
                Ok(OpenStore { any: store.clone(), kind: Kind::Volume(store) })
            }
            Self::Bucket(options) => {
                let opened = S3Store::open((**options).clone()).await;
                let store = Arc::new(opened.map_err(StartError::Bucket)?);
                let shown = Arc::downgrade(&store);
                bucket::show(metrics, move || Some(shown.upgrade()?.metrics()));
                Ok(OpenStore { any: store.clone(), kind: Kind::Bucket(store) })
            }
        }
    }
}

/// A store that is open.
#[derive(Clone)]
pub(crate) struct OpenStore {
    any: Arc<dyn ChunkStore>,
    kind: Kind,
}

/// The same, by what it is.
#[derive(Clone)]
enum Kind {
    Volume(Arc<FsStore>),
    Bucket(Arc<S3Store>),
}

impl OpenStore {
    /// The store, whatever it is.
    pub(crate) fn as_dyn(&self) -> &Arc<dyn ChunkStore> {
        &self.any
    }

    /// What it does for porters, if it is in a bucket.
    pub(crate) fn keeper(&self) -> Option<Arc<dyn Keeper>> {
        match &self.kind {
            Kind::Volume(_) => None,
            Kind::Bucket(store) => Some(store.clone()),
        }
    }

    /// Stops it at once, as a crash of the process would. Blocks for the disk operations under way.
    pub(crate) fn kill(&self) {
        match &self.kind {
            Kind::Volume(store) => store.kill(),
            Kind::Bucket(store) => store.kill(),
        }
    }
}
