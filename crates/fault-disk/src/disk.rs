//! The disk as a chunk store in the same process uses it.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_store::fs::{Disk, DiskFile, Open, VolumeLock};

use crate::model::{FaultDisk, PAGE, State};

thread_local! {
    /// Operations of this thread, on any disk.
    static OPERATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Operations of the calling thread so far: what threads of the store do beside it does not count.
pub fn operations_of_this_thread() -> u64 {
    OPERATIONS.get()
}

#[derive(Debug)]
struct Handle {
    disk: FaultDisk,
    file: u64,
}

#[derive(Debug)]
struct Lock {
    disk: FaultDisk,
    path: PathBuf,
}

impl VolumeLock for Lock {}

impl Drop for Lock {
    fn drop(&mut self) {
        self.disk.0.disk.lock().unwrap().locks.remove(&self.path);
    }
}

impl FaultDisk {
    fn counted<T>(&self, operation: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        OPERATIONS.set(OPERATIONS.get() + 1);
        self.operate(operation)
    }
}

impl Disk for FaultDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.counted(|state| {
            let (dir, name) = state.place(path)?;
            match open {
                Open::Existing | Open::ReadOnly => {
                    Ok(*state.names(dir)?.get(&name).ok_or(io::ErrorKind::NotFound)?)
                }
                Open::Create => state.make_file(dir, &name),
            }
        })?;
        Ok(Arc::new(Handle { disk: self.clone(), file }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.counted(|state| {
            let (dir, name) = state.place(path)?;
            state.make_dir(dir, &name).map(|_| ())
        })
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.counted(|state| {
            let dir = state.resolve(path)?;
            Ok(state.names(dir)?.keys().cloned().collect())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.counted(|state| {
            let ((from_dir, from_name), (to_dir, to_name)) = (state.place(from)?, state.place(to)?);
            state.rename((from_dir, &from_name), (to_dir, &to_name))
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.counted(|state| {
            let (dir, name) = state.place(path)?;
            state.unlink(dir, &name)
        })
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.counted(|state| {
            let (dir, name) = state.place(path)?;
            state.unlink_dir(dir, &name)
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.counted(|state| {
            let dir = state.resolve(path)?;
            state.sync_names(dir)
        })
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        self.counted(|state| Ok(state.room().1 * PAGE as u64))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn VolumeLock>> {
        drop(self.open(path, Open::Create)?);
        self.counted(|state| {
            if !state.locks.insert(path.to_path_buf()) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        })?;
        Ok(Box::new(Lock { disk: self.clone(), path: path.to_path_buf() }))
    }
}

impl DiskFile for Handle {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.hang(self.file);
        self.disk.counted(|state| state.write(self.file, offset, bytes))
    }

    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.disk.counted(|state| state.read(self.file, offset, len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.counted(|state| state.sync(self.file))
    }

    fn length(&self) -> io::Result<u64> {
        self.disk.counted(|state| state.length(self.file))
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.disk.counted(|state| state.reserve(self.file, len))
    }

    fn forget_cache(&self) -> io::Result<()> {
        self.disk.counted(|state| state.forget_cache(self.file))
    }
}
