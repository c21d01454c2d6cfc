//! A disk in memory that behaves as badly as a real one may.
//!
//! What was written and not synced is in the cache only: when the power goes, each page of it is lost, kept, or torn
//! between sectors, each on its own, and each name that its directory was not synced for is the old or the new one.
//! Syncs can fail (and then drop what they should have written, as Linux does), room can run out, writes can hang,
//! and syncs can lie, to prove that a test would notice.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use sluice_store::fs::{Disk, DiskFile, Open, VolumeLock};

const PAGE: usize = 4096;
const SECTOR: usize = 512;
const ROOT: u64 = 0;

thread_local! {
    /// Operations of this thread, on any disk.
    static OPERATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Operations of the calling thread so far: what threads of the store do beside it does not count.
pub(crate) fn operations_of_this_thread() -> u64 {
    OPERATIONS.get()
}

/// Random numbers from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }

    /// One time in `n`.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// After so many operations the power goes: every operation fails.
    pub(crate) power_off_after: Option<u64>,
    /// Syncs of files whose name starts so fail.
    pub(crate) failing_sync: Option<&'static str>,
    /// Writes to files whose name starts so hang until that changes.
    pub(crate) hanging_write: Option<&'static str>,
    /// Syncs of files whose name starts so do nothing, and say that all is well.
    pub(crate) lying_sync: Option<&'static str>,
    /// Syncs of directories do nothing, and say that all is well.
    pub(crate) lying_dirs: bool,
    /// Pages that fit the disk.
    pub(crate) capacity: Option<u64>,
}

#[derive(Debug, Clone)]
pub(crate) struct FaultDisk(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    disk: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone)]
struct State {
    faults: Faults,
    operations: u64,
    next: u64,
    dirs: HashMap<u64, Dir>,
    files: HashMap<u64, File>,
    locks: BTreeSet<PathBuf>,
    used: u64,
    hung: u64,
}

#[derive(Debug, Default, Clone)]
struct Dir {
    now: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
}

type Pages = HashMap<u64, Box<[u8; PAGE]>>;

#[derive(Debug, Default, Clone)]
struct File {
    name: String,
    now: Pages,
    durable: Pages,
    dirty: BTreeSet<u64>,
    len: u64,
    durable_len: u64,
    /// Pages that were reserved.
    reserved: u64,
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
    pub(crate) fn new() -> Self {
        let state = State { next: 1, dirs: [(ROOT, Dir::default())].into(), ..State::default() };
        Self::of(state)
    }

    fn of(state: State) -> Self {
        Self(Arc::new(Shared { disk: Mutex::new(state), changed: Condvar::new() }))
    }

    /// Changes what goes wrong.
    pub(crate) fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.0.disk.lock().unwrap().faults);
        self.0.changed.notify_all();
    }

    /// Operations so far.
    pub(crate) fn operations(&self) -> u64 {
        self.0.disk.lock().unwrap().operations
    }

    /// Pages in use.
    pub(crate) fn used(&self) -> u64 {
        self.0.disk.lock().unwrap().used
    }

    /// Writes that hang now.
    pub(crate) fn hung(&self) -> u64 {
        self.0.disk.lock().unwrap().hung
    }

    /// Flips a bit of a file, in cache and on the device.
    pub(crate) fn flip(&self, path: &str, at: u64) {
        let mut state = self.0.disk.lock().unwrap();
        let file = state.resolve(Path::new(path)).unwrap();
        let file = state.files.get_mut(&file).unwrap();
        for pages in [&mut file.now, &mut file.durable] {
            if let Some(page) = pages.get_mut(&(at / PAGE as u64)) {
                page[(at % PAGE as u64) as usize] ^= 1;
            }
        }
    }

    /// What is on the disk when the power comes back.
    pub(crate) fn after_power_cut(&self, dice: &mut Dice) -> Self {
        let old = self.0.disk.lock().unwrap().clone();
        let mut state = State { next: old.next, ..State::default() };
        let mut reach = vec![ROOT];
        while let Some(ino) = reach.pop() {
            if let Some(dir) = old.dirs.get(&ino) {
                let names: BTreeSet<&String> = dir.now.keys().chain(dir.durable.keys()).collect();
                let mut left = BTreeMap::new();
                for name in names {
                    let (now, durable) = (dir.now.get(name), dir.durable.get(name));
                    let chosen = if dice.one_in(2) { now } else { durable };
                    if let Some(ino) = chosen {
                        left.insert(name.clone(), *ino);
                        if !state.dirs.contains_key(ino) && !state.files.contains_key(ino) {
                            reach.push(*ino);
                        }
                    }
                }
                state.dirs.insert(ino, Dir { now: left.clone(), durable: left });
            } else if let Some(file) = old.files.get(&ino) {
                let file = file.after_power_cut(dice);
                state.used += file.pages();
                state.files.insert(ino, file);
            }
        }
        Self::of(state)
    }

    /// What is there when only the process died: all of it, but unsynced still.
    pub(crate) fn after_kill(&self) -> Self {
        let mut state = self.0.disk.lock().unwrap().clone();
        state.locks.clear();
        state.faults = Faults::default();
        Self::of(state)
    }

    fn operate<T>(&self, operation: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        OPERATIONS.set(OPERATIONS.get() + 1);
        let mut state = self.0.disk.lock().unwrap();
        state.operations += 1;
        if state.faults.power_off_after.is_some_and(|after| state.operations > after) {
            return Err(io::Error::other("the power is off"));
        }
        operation(&mut state)
    }
}

impl State {
    fn resolve(&self, path: &Path) -> io::Result<u64> {
        let mut ino = ROOT;
        for part in path.components() {
            if let Component::Normal(name) = part {
                let dir = self.dirs.get(&ino).ok_or(io::ErrorKind::NotADirectory)?;
                ino = *dir.now.get(&*name.to_string_lossy()).ok_or(io::ErrorKind::NotFound)?;
            }
        }
        Ok(ino)
    }

    /// The directory of a path, and the name in it.
    fn place(&self, path: &Path) -> io::Result<(u64, String)> {
        let parent = self.resolve(path.parent().unwrap())?;
        Ok((parent, path.file_name().unwrap().to_string_lossy().into_owned()))
    }

    fn names(&mut self, dir: u64) -> io::Result<&mut BTreeMap<String, u64>> {
        Ok(&mut self.dirs.get_mut(&dir).ok_or(io::ErrorKind::NotADirectory)?.now)
    }

    fn forget(&mut self, ino: Option<u64>) {
        if let Some(file) = ino.and_then(|ino| self.files.get(&ino)) {
            self.used -= file.pages().min(self.used);
        }
    }

    fn take_room(&mut self, pages: u64) -> io::Result<()> {
        if self.faults.capacity.is_some_and(|capacity| self.used + pages > capacity) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.used += pages;
        Ok(())
    }
}

impl File {
    fn pages(&self) -> u64 {
        self.reserved + self.now.keys().filter(|page| **page >= self.reserved).count() as u64
    }

    fn after_power_cut(&self, dice: &mut Dice) -> Self {
        let mut pages = self.durable.clone();
        let fate = dice.below(4);
        for page in &self.dirty {
            let Some(new) = self.now.get(page) else { continue };
            let old = pages.get(page).cloned().unwrap_or_else(|| Box::new([0; PAGE]));
            let kept = match fate {
                0 => continue,
                1 => new.clone(),
                _ if dice.one_in(3) => continue,
                _ if dice.one_in(2) => new.clone(),
                _ => {
                    let mut torn = old;
                    for sector in (0..PAGE).step_by(SECTOR) {
                        if dice.one_in(2) {
                            torn[sector..sector + SECTOR].copy_from_slice(&new[sector..sector + SECTOR]);
                        }
                    }
                    torn
                }
            };
            pages.insert(*page, kept);
        }
        let len = if dice.one_in(2) { self.len } else { self.durable_len };
        Self {
            name: self.name.clone(),
            now: pages.clone(),
            durable: pages,
            dirty: BTreeSet::new(),
            len,
            durable_len: len,
            reserved: self.reserved,
        }
    }
}

impl Disk for FaultDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.operate(|state| {
            let (dir, name) = state.place(path)?;
            if let Some(ino) = state.names(dir)?.get(&name) {
                return Ok(*ino);
            }
            match open {
                Open::Existing => Err(io::ErrorKind::NotFound.into()),
                Open::Create => {
                    let ino = state.next;
                    state.next += 1;
                    state.names(dir)?.insert(name.clone(), ino);
                    state.files.insert(ino, File { name, ..File::default() });
                    Ok(ino)
                }
            }
        })?;
        Ok(Arc::new(Handle { disk: self.clone(), file }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.operate(|state| {
            let (dir, name) = state.place(path)?;
            let ino = state.next;
            if state.names(dir)?.contains_key(&name) {
                return Ok(());
            }
            state.names(dir)?.insert(name, ino);
            state.next += 1;
            state.dirs.insert(ino, Dir::default());
            Ok(())
        })
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.operate(|state| {
            let dir = state.resolve(path)?;
            Ok(state.names(dir)?.keys().cloned().collect())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operate(|state| {
            let (from_dir, from_name) = state.place(from)?;
            let (to_dir, to_name) = state.place(to)?;
            let ino = state.names(from_dir)?.remove(&from_name).ok_or(io::ErrorKind::NotFound)?;
            let replaced = state.names(to_dir)?.insert(to_name.clone(), ino);
            state.forget(replaced);
            if let Some(file) = state.files.get_mut(&ino) {
                file.name = to_name;
            }
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.operate(|state| {
            let (dir, name) = state.place(path)?;
            let ino = *state.names(dir)?.get(&name).ok_or(io::ErrorKind::NotFound)?;
            if state.dirs.contains_key(&ino) {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            state.names(dir)?.remove(&name);
            state.forget(Some(ino));
            Ok(())
        })
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.operate(|state| {
            let (dir, name) = state.place(path)?;
            let ino = *state.names(dir)?.get(&name).ok_or(io::ErrorKind::NotFound)?;
            if !state.names(ino)?.is_empty() {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            state.names(dir)?.remove(&name);
            Ok(())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.operate(|state| {
            let dir = state.resolve(path)?;
            let lying = state.faults.lying_dirs;
            let dir = state.dirs.get_mut(&dir).ok_or(io::ErrorKind::NotADirectory)?;
            if !lying {
                dir.durable = dir.now.clone();
            }
            Ok(())
        })
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        self.operate(|state| {
            let capacity = state.faults.capacity.unwrap_or(1 << 30);
            Ok(capacity.saturating_sub(state.used) * PAGE as u64)
        })
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn VolumeLock>> {
        drop(self.open(path, Open::Create)?);
        self.operate(|state| {
            if !state.locks.insert(path.to_path_buf()) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        })?;
        Ok(Box::new(Lock { disk: self.clone(), path: path.to_path_buf() }))
    }
}

impl Handle {
    fn operate<T>(&self, operation: impl FnOnce(&mut State, &mut File) -> io::Result<T>) -> io::Result<T> {
        self.disk.operate(|state| {
            let mut file = state.files.remove(&self.file).ok_or(io::ErrorKind::NotFound)?;
            let result = operation(state, &mut file);
            state.files.insert(self.file, file);
            result
        })
    }

    fn hang(&self) {
        let mut state = self.disk.0.disk.lock().unwrap();
        let hangs = |state: &State| {
            let name = state.files.get(&self.file).map(|file| file.name.clone()).unwrap_or_default();
            state.faults.hanging_write.is_some_and(|prefix| name.starts_with(prefix))
        };
        if hangs(&state) {
            state.hung += 1;
            while hangs(&state) {
                state = self.disk.0.changed.wait(state).unwrap();
            }
            state.hung -= 1;
        }
    }
}

impl DiskFile for Handle {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.hang();
        self.operate(|state, file| {
            let mut at = offset;
            let mut rest = bytes;
            while !rest.is_empty() {
                let (page, within) = (at / PAGE as u64, (at % PAGE as u64) as usize);
                let len = rest.len().min(PAGE - within);
                if !file.now.contains_key(&page) {
                    if page >= file.reserved {
                        state.take_room(1)?;
                    }
                    file.now.insert(page, Box::new([0; PAGE]));
                }
                file.now.get_mut(&page).unwrap()[within..within + len].copy_from_slice(&rest[..len]);
                file.dirty.insert(page);
                at += len as u64;
                rest = &rest[len..];
                file.len = file.len.max(at);
            }
            Ok(())
        })
    }

    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.operate(|_, file| {
            let len = (len as u64).min(file.len.saturating_sub(offset)) as usize;
            let mut bytes = vec![0; len];
            let mut done = 0;
            while done < len {
                let at = offset + done as u64;
                let within = (at % PAGE as u64) as usize;
                let part = (len - done).min(PAGE - within);
                if let Some(page) = file.now.get(&(at / PAGE as u64)) {
                    bytes[done..done + part].copy_from_slice(&page[within..within + part]);
                }
                done += part;
            }
            Ok(bytes)
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.operate(|state, file| {
            let named = |prefix: Option<&str>| prefix.is_some_and(|prefix| file.name.starts_with(prefix));
            if named(state.faults.lying_sync) {
                return Ok(());
            }
            if named(state.faults.failing_sync) {
                // Linux marks the pages clean although they were not written.
                file.dirty.clear();
                return Err(io::Error::other("Input/output error"));
            }
            for page in std::mem::take(&mut file.dirty) {
                file.durable.insert(page, file.now[&page].clone());
            }
            file.durable_len = file.len;
            Ok(())
        })
    }

    fn length(&self) -> io::Result<u64> {
        self.operate(|_, file| Ok(file.len))
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.operate(|state, file| {
            let pages = len.div_ceil(PAGE as u64);
            if pages > file.reserved {
                state.take_room(pages - file.pages().min(pages))?;
                file.reserved = pages;
                file.len = file.len.max(len);
            }
            Ok(())
        })
    }

    fn forget_cache(&self) -> io::Result<()> {
        self.operate(|_, file| {
            let dirty: Pages = file.dirty.iter().map(|page| (*page, file.now[page].clone())).collect();
            file.now = file.durable.clone();
            file.now.extend(dirty);
            Ok(())
        })
    }
}
