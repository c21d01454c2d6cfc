//! What is uploaded: a file, read at any offset, or bytes in memory.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::ClientError;

/// The bytes of a file to be.
#[derive(Clone, Debug)]
pub struct Source(Kind);

#[derive(Clone, Debug)]
enum Kind {
    File {
        file: Arc<File>,
        path: PathBuf,
        stamp: FileStamp,
    },
    Memory(Bytes),
    /// A stream that has passed.
    Gone(u64),
}

/// By what a file is known to have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change, in nanoseconds after 1970.
    pub modified_ns: u64,
}

impl FileStamp {
    fn of(metadata: &Metadata) -> io::Result<Self> {
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let modified = metadata.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let modified_ns = u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX);
        Ok(Self { size: metadata.len(), modified_ns })
    }
}

impl Source {
    /// Opens a regular file. Its size and time of change are taken now, and compared at the end of an upload.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref().to_owned();
        // Asked before it is opened: opening a pipe would wait for its writer.
        let opened = fs::metadata(&path)
            .and_then(|metadata| FileStamp::of(&metadata))
            .and_then(|_| File::open(&path))
            .and_then(|file| Ok((FileStamp::of(&file.metadata()?)?, file)));
        match opened {
            Ok((stamp, file)) => Ok(Self(Kind::File { file: Arc::new(file), path, stamp })),
            Err(cause) => Err(ClientError::Source { path, cause }),
        }
    }

    /// Bytes in memory.
    pub fn memory(bytes: impl Into<Bytes>) -> Self {
        Self(Kind::Memory(bytes.into()))
    }

    /// What is left of a stream: its size.
    pub(crate) fn gone(size: u64) -> Self {
        Self(Kind::Gone(size))
    }

    /// Whether nothing can be read (again).
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.0, Kind::Gone(_))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        match &self.0 {
            Kind::Gone(size) => *size,
            Kind::File { stamp, .. } => stamp.size,
            Kind::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Size and time of change of a file; `None` for memory.
    pub fn stamp(&self) -> Option<FileStamp> {
        match &self.0 {
            Kind::File { stamp, .. } => Some(*stamp),
            Kind::Memory(_) | Kind::Gone(_) => None,
        }
    }

    /// The path, or a stand-in for memory.
    pub(crate) fn path(&self) -> PathBuf {
        match &self.0 {
            Kind::File { path, .. } => path.clone(),
            Kind::Memory(_) => PathBuf::from("(memory)"),
            Kind::Gone(_) => PathBuf::from("(stream)"),
        }
    }

    /// Reads `len` bytes from `offset`; blocks. Buffers come from `pool` and go back to it by themselves.
    pub(crate) fn read(&self, offset: u64, len: usize, pool: &Arc<BufferPool>) -> Result<Bytes, ClientError> {
        match &self.0 {
            Kind::File { file, path, .. } => {
                let mut buffer = pool.take(len);
                match file.read_exact_at(&mut buffer.bytes[..len], offset) {
                    Ok(()) => Ok(Bytes::from_owner(buffer)),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        Err(self.changed(format!("expected {} bytes, it is shorter now", self.size())))
                    }
                    Err(cause) => Err(ClientError::Source { path: path.clone(), cause }),
                }
            }
            Kind::Memory(bytes) => {
                let start = offset as usize;
                Ok(bytes.slice(start..start + len))
            }
            Kind::Gone(_) => {
                let cause = io::Error::new(io::ErrorKind::Unsupported, "a stream is read once");
                Err(ClientError::Source { path: self.path(), cause })
            }
        }
    }

    /// Checks that the file is still what it was when it was opened; blocks.
    pub(crate) fn check_unchanged(&self) -> Result<(), ClientError> {
        match &self.0 {
            Kind::File { file, path, stamp } => {
                let now = file.metadata().and_then(|metadata| FileStamp::of(&metadata));
                let now = now.map_err(|cause| ClientError::Source { path: path.clone(), cause })?;
                if now == *stamp {
                    Ok(())
                } else if now.size != stamp.size {
                    Err(self.changed(format!("expected {} bytes, it has {} now", stamp.size, now.size)))
                } else {
                    Err(self.changed("its time of change is another".into()))
                }
            }
            Kind::Memory(_) | Kind::Gone(_) => Ok(()),
        }
    }

    pub(crate) fn changed(&self, detail: String) -> ClientError {
        ClientError::SourceChanged { path: self.path(), detail }
    }
}

/// Read buffers that are used again: fresh ones of 8 MiB cost as much in page faults as their hashing.
#[derive(Debug, Default)]
pub(crate) struct BufferPool {
    free: Mutex<Vec<Vec<u8>>>,
}

impl BufferPool {
    fn take(self: &Arc<Self>, len: usize) -> Pooled {
        let mut bytes = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        Pooled { bytes, len, pool: self.clone() }
    }
}

struct Pooled {
    bytes: Vec<u8>,
    len: usize,
    pool: Arc<BufferPool>,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_that_shrinks_is_noticed_and_buffers_return() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"0123456789").unwrap();
        let source = Source::open(file.path()).unwrap();
        let pool = Arc::new(BufferPool::default());
        assert_eq!(&source.read(3, 4, &pool).unwrap()[..], b"3456");
        assert_eq!(pool.free.lock().unwrap().len(), 1);
        source.check_unchanged().unwrap();
        file.as_file().set_len(5).unwrap();
        assert!(matches!(source.read(3, 4, &pool), Err(ClientError::SourceChanged { .. })));
        assert!(matches!(source.check_unchanged(), Err(ClientError::SourceChanged { .. })));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let missing = Source::open("/nowhere/at/all").unwrap_err();
        assert_eq!(missing.exit_class(), crate::ExitClass::Usage);
        assert!(Source::open("/").is_err());
    }
}
