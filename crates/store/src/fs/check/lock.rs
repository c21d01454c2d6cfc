//! Who uses a volume.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::layout::Layout;
use super::unreadable;
use crate::StoreError;

/// Keeps other processes from opening the volume, for as long as it lives. A copy that was never opened has no lock
/// file, and gets none.
pub(super) fn keep(path: &Path) -> Result<Option<File>, StoreError> {
    let lock = Layout::new(path).lock();
    let file = match File::open(&lock) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(path, &error)),
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::in_use(path, &lock)),
        Err(std::fs::TryLockError::Error(error)) => Err(unreadable(path, &error)),
    }
}

/// Who has locked a file, in words: its number and name, as far as the system tells.
pub fn holder(lock: &Path) -> String {
    let found = || {
        let locked = std::fs::metadata(lock).ok()?;
        let (major, minor) = (rustix::fs::major(locked.dev()), rustix::fs::minor(locked.dev()));
        let device = format!("{major:02x}:{minor:02x}:{}", locked.ino());
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        // As in "1: FLOCK  ADVISORY  WRITE 4711 fd:01:1234 0 EOF".
        let mut lines = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line =
            lines.find(|words| words.get(5) == Some(&device.as_str()) && words.get(1) == Some(&"FLOCK"))?;
        let pid: u32 = line.get(4)?.parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        Some(match name {
            Some(name) => format!("process {pid} ({})", name.trim()),
            None => format!("process {pid}"),
        })
    };
    found().unwrap_or_else(|| "another process".into())
}
