//! What the store asks of a disk, and the real one.
//!
//! Every call blocks; callers are threads of the store or of the blocking pool. A test puts a simulated disk here
//! that loses, tears and refuses.

use std::fmt::Debug;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RawDir};
use rustix::io::Errno;

/// Whether a file that is opened must exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// It must: otherwise [`io::ErrorKind::NotFound`].
    Existing,
    /// It must, and is only read.
    ReadOnly,
    /// It is made, empty, if it does not exist. Its directory must.
    Create,
}

/// Keeps a volume to one process; dropping it gives the volume up.
pub trait VolumeLock: Send + Sync + Debug {}

/// The operations on names.
pub trait Disk: Send + Sync + Debug + 'static {
    /// Opens a file for reading and writing.
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn DiskFile>>;

    /// Makes a directory; one that exists is left as it is.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, in no order.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Gives a file or directory another name, atomically. A file in the way is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Bytes that can still be written to the filesystem of `path`.
    fn free(&self, path: &Path) -> io::Result<u64>;

    /// Takes the lock file at `path`, making it if need be. [`io::ErrorKind::WouldBlock`] if somebody has it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn VolumeLock>>;
}

/// The operations on one open file.
pub trait DiskFile: Send + Sync + Debug {
    /// Writes all of `bytes` at `offset`; the file grows as needed.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Reads up to `len` bytes from `offset`: fewer only at the file's end.
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>>;

    /// Makes what was written durable, with the length but without times.
    fn sync_data(&self) -> io::Result<()>;

    /// Length in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Reserves the first `len` bytes, so that writing there needs no room.
    fn allocate(&self, len: u64) -> io::Result<()>;

    /// Drops clean cached pages, so that the next read asks the device.
    fn forget_cache(&self) -> io::Result<()>;
}

/// The most that is written with one call. The kernel makes pages of its cache as large as the write that needs them, and
/// large ones are the ones that are cold: on a machine whose free memory goes back to a hypervisor, in large blocks, a
/// chunk in one write cost three times as much as one in pieces. Where all memory is warm it makes no difference.
const PIECE: usize = 64 << 10;

/// The disk of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

#[derive(Debug)]
struct RealFile(OwnedFd);

#[derive(Debug)]
struct RealLock {
    _fd: OwnedFd,
}

impl VolumeLock for RealLock {}

impl RealDisk {
    fn open_with(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o640))?)
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn DiskFile>> {
        let flags = match open {
            Open::Existing => OFlags::RDWR,
            Open::ReadOnly => OFlags::RDONLY,
            Open::Create => OFlags::RDWR | OFlags::CREATE,
        };
        Ok(Arc::new(RealFile(Self::open_with(path, flags)?)))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match rustix::fs::mkdir(path, Mode::from_raw_mode(0o750)) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let dir = Self::open_with(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        let mut buffer = Vec::with_capacity(32 << 10);
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::rename(from, to)?)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::unlink(path)?)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let dir = Self::open_with(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(rustix::fs::fsync(dir)?)
    }

    fn free(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn VolumeLock>> {
        let fd = Self::open_with(path, OFlags::RDWR | OFlags::CREATE)?;
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Box::new(RealLock { _fd: fd }))
    }
}

impl DiskFile for RealFile {
    fn write_at(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let piece = &bytes[..bytes.len().min(PIECE)];
            match rustix::io::pwrite(&self.0, piece, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    offset += n as u64;
                    bytes = &bytes[n..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            // Capacity may exceed what was asked for; what is read beyond is cut off below.
            match rustix::io::pread(&self.0, rustix::buffer::spare_capacity(&mut bytes), at) {
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.0)?)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.0)?.st_size).unwrap_or(0))
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.0, FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP) => self.write_at(0, &vec![0; len as usize]),
            Err(error) => Err(error.into()),
        }
    }

    fn forget_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.0, 0, None::<NonZeroU64>, Advice::DontNeed)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_disk_does_what_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let disk = RealDisk;
        assert_eq!(disk.open(&path, Open::Existing).unwrap_err().kind(), io::ErrorKind::NotFound);
        let file = disk.open(&path, Open::Create).unwrap();
        file.allocate(4096).unwrap();
        file.write_at(10, b"abc").unwrap();
        file.sync_data().unwrap();
        file.forget_cache().unwrap();
        assert_eq!(file.read_at(10, 3).unwrap(), b"abc");
        assert_eq!(file.read_at(4094, 10).unwrap().len(), 2);
        assert_eq!(file.length().unwrap(), 4096);
        let sub = dir.path().join("sub");
        disk.create_dir(&sub).unwrap();
        disk.create_dir(&sub).unwrap();
        disk.rename(&path, &sub.join("b")).unwrap();
        disk.sync_dir(&sub).unwrap();
        assert_eq!(disk.list(&sub).unwrap(), ["b"]);
        assert!(disk.remove_dir(&sub).is_err());
        disk.remove_file(&sub.join("b")).unwrap();
        disk.remove_dir(&sub).unwrap();
        assert!(disk.free(dir.path()).unwrap() > 0);
        let lock = disk.lock(&path).unwrap();
        assert_eq!(disk.lock(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(lock);
        disk.lock(&path).unwrap();
    }
}
