//! The file that a download is written to: `NAME.part` until it is whole, then `NAME`.
//!
//! Beside it, `NAME.part.json` says what it is a part of. What is in the part is believed only chunk by chunk, after
//! hashing, so nothing else has to be recorded. A lock on the part keeps a second download of the same name away;
//! it ends with the process.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::ClientError;

/// What a part is a part of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PartOf {
    pub(crate) id: Uuid,
    pub(crate) root: String,
    /// The first byte of the file that is wanted.
    pub(crate) from: u64,
    /// Number of bytes that are wanted.
    pub(crate) len: u64,
}

/// A download's file while it is not whole.
#[derive(Debug)]
pub(crate) struct Part {
    file: File,
    target: PathBuf,
    path: PathBuf,
    label: PathBuf,
    replace: bool,
    resumed: bool,
}

impl Part {
    /// Opens or makes the part of `target`; blocks. What an earlier download of the same bytes left is kept.
    pub(crate) fn open(target: &Path, replace: bool, of: &PartOf) -> Result<Self, ClientError> {
        if target.metadata().is_ok_and(|found| !found.is_file()) {
            return Err(ClientError::NotAFile { path: target.to_owned() });
        }
        if !replace && target.symlink_metadata().is_ok() {
            return Err(ClientError::Exists { path: target.to_owned() });
        }
        let (path, label) = (beside(target, ".part"), beside(target, ".part.json"));
        let fail = |cause| ClientError::Target { path: path.clone(), cause };
        let file = lock(&path)?;
        let resumed = fs::read(&label)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<PartOf>(&bytes).ok())
            .is_some_and(|found| found == *of);
        if !resumed {
            file.set_len(0).map_err(fail)?;
            write_atomically(&label, &serde_json::to_vec(of).map_err(|error| fail(error.into()))?)
                .map_err(fail)?;
        }
        file.set_len(of.len).map_err(fail)?;
        Ok(Self { file, target: target.to_owned(), path, label, replace, resumed })
    }

    /// Whether there may be something in it.
    pub(crate) fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Reads `len` bytes at `at`; blocks.
    pub(crate) fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, ClientError> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).map_err(|cause| self.failed(cause))?;
        Ok(bytes)
    }

    /// Writes bytes at `at`; blocks.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> Result<(), ClientError> {
        self.file.write_all_at(bytes, at).map_err(|cause| self.failed(cause))
    }

    /// Makes the part the target, durably; blocks.
    pub(crate) fn publish(self) -> Result<(), ClientError> {
        self.file.sync_all().map_err(|cause| self.failed(cause))?;
        let renamed = if self.replace {
            fs::rename(&self.path, &self.target)
        } else {
            rename_new(&self.path, &self.target)
        };
        match renamed {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(ClientError::Exists { path: self.target });
            }
            Err(cause) => return Err(ClientError::Target { path: self.target, cause }),
        }
        // The label is of no more use; one that stays is ignored by the next download, or matches it.
        let _ = fs::remove_file(&self.label);
        sync_parent(&self.target).map_err(|cause| ClientError::Target { path: self.target.clone(), cause })
    }

    fn failed(&self, cause: io::Error) -> ClientError {
        ClientError::Target { path: self.path.clone(), cause }
    }
}

/// Writes a small file so that it is there whole or not at all.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = beside(path, &format!(".{}.new", std::process::id()));
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&new, path));
    if renamed.is_err() {
        // Nothing more can be done about it, and the first error says why.
        let _ = fs::remove_file(&new);
    }
    renamed?;
    sync_parent(path)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

/// Opens and locks the part; never one that another download has just published under its final name.
fn lock(path: &Path) -> Result<File, ClientError> {
    let fail = |cause| ClientError::Target { path: path.to_owned(), cause };
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ClientError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(cause)) => return Err(fail(cause)),
        }
        let ours = file.metadata().map_err(fail)?;
        match fs::metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => return Ok(file),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(cause) => return Err(fail(cause)),
        }
    }
}

/// Renames, but never onto something.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // File systems that cannot promise it: look first.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            if to.symlink_metadata().is_ok() {
                return Err(ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        Err(error) => Err(error.into()),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(len: u64) -> PartOf {
        PartOf { id: Uuid::nil(), root: "00".into(), from: 0, len }
    }

    #[test]
    fn a_part_is_kept_for_the_same_bytes_only() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let part = Part::open(&target, false, &of(4)).unwrap();
        assert!(!part.is_resumed());
        part.write(0, b"abcd").unwrap();
        assert!(matches!(Part::open(&target, false, &of(4)), Err(ClientError::Busy { .. })));
        drop(part);
        let part = Part::open(&target, false, &of(4)).unwrap();
        assert!(part.is_resumed());
        assert_eq!(part.read(1, 2).unwrap(), b"bc");
        drop(part);
        let part = Part::open(&target, false, &of(6)).unwrap();
        assert!(!part.is_resumed());
        assert_eq!(part.read(0, 6).unwrap(), [0; 6]);
        part.publish().unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["a"]);
    }

    #[test]
    fn nothing_is_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let part = Part::open(&target, false, &of(1)).unwrap();
        fs::write(&target, b"mine").unwrap();
        assert!(matches!(part.publish(), Err(ClientError::Exists { .. })));
        assert!(matches!(Part::open(&target, false, &of(1)), Err(ClientError::Exists { .. })));
        assert_eq!(fs::read(&target).unwrap(), b"mine");
        Part::open(&target, true, &of(1)).unwrap().publish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), [0]);
    }
}
