//! The filesystem backend on the disk of this machine.

use std::sync::Arc;

use sluice_store::{ChunkStore, FsOptions, FsStore};
use tempfile::TempDir;

use crate::contract::{Backend, contract_tests};

/// Small enough that tests see checkpoints.
pub(crate) fn options() -> FsOptions {
    FsOptions {
        journal_len: 64 << 10,
        reserve: 1 << 20,
        log_segment_len: 64 << 10,
        log_index: 64,
        ..FsOptions::default()
    }
}

struct Directory(TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
}

impl Backend for Directory {
    async fn open(&self) -> Arc<dyn ChunkStore> {
        Arc::new(FsStore::open(self.0.path().join("volume"), options()).unwrap())
    }
}

contract_tests!(Directory::new());
