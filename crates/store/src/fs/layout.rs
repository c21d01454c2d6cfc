//! Where things lie in a volume.
//!
//! ```text
//! lock                          one process at a time
//! volume                        the header
//! checkpoint                    what belongs to no file, and which journals are done with
//! aside                         changes of files whose index cannot be read; missing if there are none
//! damage                        which chunks are known to be damaged; missing if none is
//! scrub  scrub-i-n              how far the scrub has come, of all files or of share i of n
//! journal-0  journal-1          the journal, by number modulo two
//! index/abc/<file>              a file's index; abc: its slot
//! chunks/abc/<file>/data-n      the bytes of segment n, in place, sparse
//! chunks/abc/<file>/values-n    the chunk values of segment n
//! chunks/abc/<file>/page-n      a page of the file's ledger
//! log/log-n                     a segment of the log: files that came whole
//! log/run-n  log/manifest       the log's index
//! trash/n                       directories of chunks on their way out
//! ```

use std::path::{Path, PathBuf};

use sluice_engine::ids::FileId;
use sluice_engine::share::Share;

use super::entry::Name;
use crate::scrub_mark;

/// Directories of a volume.
pub(crate) const DIRS: [&str; 4] = ["index", "chunks", "log", "trash"];

/// The paths of a volume.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(crate) fn volume(&self) -> PathBuf {
        self.root.join("volume")
    }

    pub(crate) fn checkpoint(&self) -> PathBuf {
        self.root.join("checkpoint")
    }

    pub(crate) fn aside(&self) -> PathBuf {
        self.root.join("aside")
    }

    pub(crate) fn damage(&self) -> PathBuf {
        self.root.join("damage")
    }

    pub(crate) fn scrub(&self, share: Share) -> PathBuf {
        self.root.join(scrub_mark::name(share))
    }

    pub(crate) fn journal(&self, number: u64) -> PathBuf {
        self.root.join(if number.is_multiple_of(2) { "journal-0" } else { "journal-1" })
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn index_shard(&self, file: FileId) -> PathBuf {
        self.dir("index").join(shard(file))
    }

    pub(crate) fn index(&self, file: FileId) -> PathBuf {
        self.index_shard(file).join(file.to_string())
    }

    pub(crate) fn chunks_shard(&self, file: FileId) -> PathBuf {
        self.dir("chunks").join(shard(file))
    }

    pub(crate) fn chunks(&self, file: FileId) -> PathBuf {
        self.chunks_shard(file).join(file.to_string())
    }

    pub(crate) fn segment(&self, file: FileId, name: Name) -> PathBuf {
        self.chunks(file).join(match name {
            Name::Data(segment) => format!("data-{segment}"),
            Name::Values(segment) => format!("values-{segment}"),
        })
    }

    pub(crate) fn page(&self, file: FileId, segment: u64) -> PathBuf {
        self.chunks(file).join(format!("page-{segment}"))
    }

    pub(crate) fn log(&self, segment: u64) -> PathBuf {
        self.dir("log").join(format!("log-{segment}"))
    }

    pub(crate) fn run(&self, number: u64) -> PathBuf {
        self.dir("log").join(format!("run-{number}"))
    }

    pub(crate) fn manifest(&self) -> PathBuf {
        self.dir("log").join("manifest")
    }

    pub(crate) fn trash(&self, number: u64) -> PathBuf {
        self.dir("trash").join(number.to_string())
    }
}

/// The name of the directory that a file's names are in: its slot.
pub(crate) fn shard(file: FileId) -> String {
    format!("{:03x}", file.slot().number())
}

/// Whether there are values of chunks among the names in a file's directory.
pub(crate) fn has_values(names: impl IntoIterator<Item = impl AsRef<str>>) -> bool {
    names.into_iter().any(|name| name.as_ref().starts_with("values-"))
}
