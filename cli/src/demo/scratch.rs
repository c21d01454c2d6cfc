//! Where the demo works: a temporary directory, or one to keep.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use sluice::datacenter::StartError;
use tempfile::TempDir;

use crate::failure::Failure;
use crate::size;

/// Kept free on top of what files take: volumes keep some back, and journals grow.
const MARGIN: u64 = 512 << 20;

/// The directory; a temporary one is removed when this is dropped.
#[derive(Debug)]
pub(super) enum Scratch {
    Temporary(TempDir),
    Kept(PathBuf),
}

impl Scratch {
    /// A new temporary directory, or the one to keep, which must be new or empty.
    pub(super) fn open(keep: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = keep else {
            let parent = std::env::temp_dir();
            let made = tempfile::Builder::new().prefix("sluice-demo-").tempdir_in(&parent);
            return Ok(Self::Temporary(made.map_err(|error| StartError::of_directory(&parent, error))?));
        };
        let failed = |error| StartError::of_directory(path, error);
        fs::create_dir_all(path).map_err(failed)?;
        if fs::read_dir(path).map_err(failed)?.next().is_some() {
            let message = format!("{} is not empty", path.display());
            return Err(Failure::usage("not-empty", message, "give a new directory").into());
        }
        Ok(Self::Kept(path.canonicalize().map_err(failed)?))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Temporary(dir) => dir.path(),
            Self::Kept(path) => path,
        }
    }

    /// What will be left.
    pub(super) fn kept(&self) -> Option<String> {
        match self {
            Self::Temporary(_) => None,
            Self::Kept(path) => Some(path.display().to_string()),
        }
    }

    /// Fails if `bytes` will not fit, before any of them is written.
    pub(super) fn check_room(&self, bytes: u64) -> anyhow::Result<()> {
        let path = self.path();
        let volume =
            rustix::fs::statvfs(path).with_context(|| format!("cannot look at {}", path.display()))?;
        let free = volume.f_bavail.saturating_mul(volume.f_frsize);
        let needed = bytes.saturating_add(MARGIN);
        if free >= needed {
            return Ok(());
        }
        let message = format!(
            "{} has {} free, the demo needs {}",
            path.display(),
            size::words(free),
            size::words(needed)
        );
        Err(Failure::usage("no-room", message, "set TMPDIR or --keep to a larger disk, or send less").into())
    }

    /// Removes a temporary directory.
    pub(super) fn close(self) -> anyhow::Result<()> {
        match self {
            Self::Temporary(dir) => {
                let path = dir.path().to_owned();
                dir.close().with_context(|| format!("cannot remove {}", path.display()))
            }
            Self::Kept(_) => Ok(()),
        }
    }
}
