//! The gate between one opened store and its disk.
//!
//! Every operation passes while the gate is open, and holds the volume's lock as long as it is inside. Shutting the gate
//! lets no other in and waits for those inside; afterwards no thread, task or late write of this store can reach the
//! disk any more. That is what makes stopping hard inside one process the same as losing the process. An operation that
//! hangs is not waited for beyond a limit: the volume stays locked until it has returned, and is given up then.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use bytes::Bytes;

use super::disk::{Disk, DiskFile, Open, VolumeLock};
use super::lock;

/// What an operation gets once the gate is shut.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the store was stopped")]
pub(crate) struct Shut;

/// A disk behind a gate.
#[derive(Debug, Clone)]
pub(crate) struct GatedDisk {
    gate: Arc<Gate>,
    disk: Arc<dyn Disk>,
}

#[derive(Debug)]
struct GatedFile {
    gate: Arc<Gate>,
    file: Arc<dyn DiskFile>,
}

#[derive(Debug)]
struct Gate {
    /// `None` once it is shut.
    volume: RwLock<Option<Arc<Volume>>>,
    /// Hangs up when the volume is given up.
    given_up: Mutex<Receiver<Infallible>>,
}

/// Given up by whoever is the last to have it: the gate, or an operation inside. In the order of the fields.
#[derive(Debug)]
struct Volume {
    _lock: Box<dyn VolumeLock>,
    _held: SyncSender<Infallible>,
}

impl GatedDisk {
    /// Takes the volume's lock.
    pub(crate) fn lock(disk: Arc<dyn Disk>, path: &Path) -> io::Result<Self> {
        let (held, given_up) = sync_channel(0);
        let volume = Volume { _lock: disk.lock(path)?, _held: held };
        let gate = Gate { volume: RwLock::new(Some(Arc::new(volume))), given_up: Mutex::new(given_up) };
        Ok(Self { gate: Arc::new(gate), disk })
    }

    /// Lets no other operation in, and waits up to `patience` for those inside; whether the volume is given up.
    pub(crate) fn shut(&self, patience: Duration) -> bool {
        let volume = self.gate.volume.write().unwrap_or_else(PoisonError::into_inner).take();
        // A second time there is nothing to wait for that was not waited for.
        let patience = if volume.is_some() { patience } else { Duration::ZERO };
        // On a disk that hangs even this may: giving up a lock means closing a file. Without a thread it is done here.
        let _ = thread::Builder::new().name("sluice-gate".into()).spawn(move || drop(volume));
        lock(&self.gate.given_up).recv_timeout(patience) == Err(RecvTimeoutError::Disconnected)
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.gate.volume.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    pub(crate) fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.gate.pass(|| self.disk.open(path, open))?;
        Ok(Arc::new(GatedFile { gate: self.gate.clone(), file }))
    }

    pub(crate) fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.gate.pass(|| self.disk.create_dir(path))
    }

    pub(crate) fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.gate.pass(|| self.disk.list(path))
    }

    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.gate.pass(|| self.disk.rename(from, to))
    }

    pub(crate) fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.gate.pass(|| self.disk.remove_file(path))
    }

    pub(crate) fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.gate.pass(|| self.disk.remove_dir(path))
    }

    pub(crate) fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.gate.pass(|| self.disk.sync_dir(path))
    }

    pub(crate) fn free(&self, path: &Path) -> io::Result<u64> {
        self.gate.pass(|| self.disk.free(path))
    }

    /// The whole content of a file.
    pub(crate) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path, Open::Existing)?;
        let len =
            usize::try_from(file.length()?).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        file.read_at(0, len)
    }

    /// Writes a file under a temporary name beside `path`, syncs it, and gives it its name. The directory's sync is
    /// the caller's.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), ReplaceError> {
        let file = self.write_beside(path, bytes).map_err(ReplaceError::Write)?;
        file.sync_data().map_err(ReplaceError::Sync)?;
        self.rename(&path.with_extension("tmp"), path).map_err(ReplaceError::Write)
    }

    /// The same without the sync: the file may be torn after a crash.
    pub(crate) fn replace_unsynced(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write_beside(path, bytes)?;
        self.rename(&path.with_extension("tmp"), path)
    }

    fn write_beside(&self, path: &Path, bytes: &[u8]) -> io::Result<Arc<dyn DiskFile>> {
        let temporary = path.with_extension("tmp");
        match self.remove_file(&temporary) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let file = self.open(&temporary, Open::Create)?;
        file.write_at(0, bytes)?;
        Ok(file)
    }
}

/// Why a file was not replaced.
#[derive(Debug)]
pub(crate) enum ReplaceError {
    /// It could not be written: the old one stands.
    Write(io::Error),
    /// It could not be synced: the device is not to be trusted.
    Sync(io::Error),
}

/// Whether an error came from a gate that is shut.
pub(crate) fn is_shut(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Shut>())
}

impl Gate {
    fn pass<T>(&self, operation: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let volume = self.volume.read().unwrap_or_else(PoisonError::into_inner).clone();
        let _inside = volume.ok_or_else(|| io::Error::other(Shut))?;
        operation()
    }
}

impl DiskFile for GatedFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.gate.pass(|| self.file.write_at(offset, bytes))
    }

    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.gate.pass(|| self.file.read_at(offset, len))
    }

    fn read_uncached(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        self.gate.pass(|| self.file.read_uncached(offset, len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.gate.pass(|| self.file.sync_data())
    }

    fn length(&self) -> io::Result<u64> {
        self.gate.pass(|| self.file.length())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.gate.pass(|| self.file.allocate(len))
    }

    fn forget_cache(&self) -> io::Result<()> {
        self.gate.pass(|| self.file.forget_cache())
    }
}
