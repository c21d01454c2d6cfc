//! Nodes, their pages, and what of both is durable.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use crate::Dice;

/// Bytes of a page: what a cache holds, and loses.
pub const PAGE: usize = 4096;

/// The node of the topmost directory.
pub const ROOT: u64 = 1;

/// Bytes that reach a device together.
const SECTOR: usize = 512;

/// What Linux says when a device fails.
const EIO: i32 = 5;

/// Pages of a disk of no given capacity.
const ANY_CAPACITY: u64 = 1 << 30;

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// After so many operations the power goes: every operation fails.
    pub power_off_after: Option<u64>,
    /// Syncs of files whose name starts so fail.
    pub failing_sync: Option<&'static str>,
    /// A sync that fails also drops what it should have written from the cache, as some filesystems do. Otherwise it
    /// stays there, looking clean, until the cache is dropped.
    pub failed_sync_reverts: bool,
    /// Reads of files whose name starts so fail.
    pub failing_read: Option<&'static str>,
    /// Writes to files whose name starts so hang until that changes.
    pub hanging_write: Option<&'static str>,
    /// Syncs of files whose name starts so do nothing, and say that all is well.
    pub lying_sync: Option<&'static str>,
    /// Syncs of directories do nothing, and say that all is well.
    pub lying_dirs: bool,
    /// Pages that fit the disk.
    pub capacity: Option<u64>,
}

/// A disk. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct FaultDisk(pub(crate) Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) disk: Mutex<State>,
    pub(crate) changed: Condvar,
}

/// What is known of a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number, for as long as the disk lives.
    pub id: u64,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Length in bytes.
    pub len: u64,
    /// Pages that it takes.
    pub pages: u64,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct State {
    pub(crate) faults: Faults,
    operations: u64,
    next: u64,
    dirs: HashMap<u64, Dir>,
    files: HashMap<u64, File>,
    pub(crate) locks: BTreeSet<PathBuf>,
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

impl Default for FaultDisk {
    fn default() -> Self {
        Self::new()
    }
}

/// The disk as whoever holds it sees it.
impl FaultDisk {
    /// An empty disk without faults.
    pub fn new() -> Self {
        let state = State { next: ROOT + 1, dirs: [(ROOT, Dir::default())].into(), ..State::default() };
        Self::of(state)
    }

    fn of(state: State) -> Self {
        Self(Arc::new(Shared { disk: Mutex::new(state), changed: Condvar::new() }))
    }

    /// Changes what goes wrong.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.0.disk.lock().unwrap().faults);
        self.0.changed.notify_all();
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.0.disk.lock().unwrap().operations
    }

    /// Pages in use.
    pub fn used(&self) -> u64 {
        self.0.disk.lock().unwrap().used
    }

    /// Writes that hang now.
    pub fn hung(&self) -> u64 {
        self.0.disk.lock().unwrap().hung
    }

    /// Whether there is a file or directory of this name.
    pub fn holds(&self, path: &str) -> bool {
        self.0.disk.lock().unwrap().resolve(Path::new(path)).is_ok()
    }

    /// Flips a bit of a file, in cache and on the device.
    pub fn flip(&self, path: &str, at: u64) {
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
    pub fn after_power_cut(&self, dice: &mut Dice) -> Self {
        let old = self.0.disk.lock().unwrap().clone();
        let mut state = State { next: old.next, ..State::default() };
        let mut reach = vec![ROOT];
        while let Some(id) = reach.pop() {
            if let Some(dir) = old.dirs.get(&id) {
                let names: BTreeSet<&String> = dir.now.keys().chain(dir.durable.keys()).collect();
                let mut left = BTreeMap::new();
                for name in names {
                    let (now, durable) = (dir.now.get(name), dir.durable.get(name));
                    let chosen = if dice.one_in(2) { now } else { durable };
                    if let Some(id) = chosen {
                        left.insert(name.clone(), *id);
                        if !state.dirs.contains_key(id) && !state.files.contains_key(id) {
                            reach.push(*id);
                        }
                    }
                }
                state.dirs.insert(id, Dir { now: left.clone(), durable: left });
            } else if let Some(file) = old.files.get(&id) {
                let file = file.after_power_cut(dice);
                state.used += file.pages();
                state.files.insert(id, file);
            }
        }
        Self::of(state)
    }

    /// What is there when only the process died: all of it, but unsynced still.
    pub fn after_kill(&self) -> Self {
        let mut state = self.0.disk.lock().unwrap().clone();
        state.locks.clear();
        state.faults = Faults::default();
        Self::of(state)
    }

    pub(crate) fn operate<T>(&self, operation: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.0.disk.lock().unwrap();
        state.operations += 1;
        if state.faults.power_off_after.is_some_and(|after| state.operations > after) {
            return Err(io::Error::other("the power is off"));
        }
        operation(&mut state)
    }

    /// Waits while writes to this file hang.
    pub(crate) fn hang(&self, file: u64) {
        let mut state = self.0.disk.lock().unwrap();
        let hangs = |state: &State| state.is_named(file, state.faults.hanging_write);
        if hangs(&state) {
            state.hung += 1;
            while hangs(&state) {
                state = self.0.changed.wait(state).unwrap();
            }
            state.hung -= 1;
        }
    }
}

/// The disk as a tree of nodes: what a mount needs.
impl FaultDisk {
    /// What is known of a node.
    pub fn node(&self, id: u64) -> io::Result<Node> {
        self.operate(|state| state.node(id))
    }

    /// What a directory calls so.
    pub fn child(&self, dir: u64, name: &str) -> io::Result<Node> {
        self.operate(|state| state.child(dir, name).and_then(|id| state.node(id)))
    }

    /// What is in a directory.
    pub fn children(&self, dir: u64) -> io::Result<Vec<(String, Node)>> {
        self.operate(|state| {
            let names = state.names(dir)?.clone();
            names.into_iter().map(|(name, id)| Ok((name, state.node(id)?))).collect()
        })
    }

    /// Makes an empty file, unless there is one.
    pub fn make_file(&self, dir: u64, name: &str) -> io::Result<Node> {
        self.operate(|state| state.make_file(dir, name).and_then(|id| state.node(id)))
    }

    /// Makes a directory, unless there is one.
    pub fn make_dir(&self, dir: u64, name: &str) -> io::Result<Node> {
        self.operate(|state| state.make_dir(dir, name).and_then(|id| state.node(id)))
    }

    /// Gives a node another name; a file in the way is replaced.
    pub fn rename_child(&self, from: (u64, &str), to: (u64, &str)) -> io::Result<()> {
        self.operate(|state| state.rename(from, to))
    }

    /// Takes the name of a file away.
    pub fn unlink(&self, dir: u64, name: &str) -> io::Result<()> {
        self.operate(|state| state.unlink(dir, name))
    }

    /// Takes an empty directory away.
    pub fn unlink_dir(&self, dir: u64, name: &str) -> io::Result<()> {
        self.operate(|state| state.unlink_dir(dir, name))
    }

    /// Up to `len` bytes of a file; fewer only at its end.
    pub fn read(&self, file: u64, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.operate(|state| state.read(file, offset, len))
    }

    /// Writes to a file, which grows as needed.
    pub fn write(&self, file: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.hang(file);
        self.operate(|state| state.write(file, offset, bytes))
    }

    /// Makes a file's bytes and length durable.
    pub fn sync(&self, file: u64) -> io::Result<()> {
        self.operate(|state| state.sync(file))
    }

    /// Makes the names in a directory durable.
    pub fn sync_names(&self, dir: u64) -> io::Result<()> {
        self.operate(|state| state.sync_names(dir))
    }

    /// Reserves the first `len` bytes of a file.
    pub fn reserve(&self, file: u64, len: u64) -> io::Result<()> {
        self.operate(|state| state.reserve(file, len))
    }

    /// Cuts or lengthens a file.
    pub fn set_len(&self, file: u64, len: u64) -> io::Result<()> {
        self.operate(|state| state.set_len(file, len))
    }

    /// Pages in all, and those that are free.
    pub fn room(&self) -> io::Result<(u64, u64)> {
        self.operate(|state| Ok(state.room()))
    }
}

impl State {
    pub(crate) fn resolve(&self, path: &Path) -> io::Result<u64> {
        let mut id = ROOT;
        for part in path.components() {
            if let Component::Normal(name) = part {
                id = self.child(id, &name.to_string_lossy())?;
            }
        }
        Ok(id)
    }

    /// The directory of a path, and the name in it.
    pub(crate) fn place(&self, path: &Path) -> io::Result<(u64, String)> {
        let parent = self.resolve(path.parent().unwrap())?;
        Ok((parent, path.file_name().unwrap().to_string_lossy().into_owned()))
    }

    fn node(&self, id: u64) -> io::Result<Node> {
        if self.dirs.contains_key(&id) {
            return Ok(Node { id, is_dir: true, len: 0, pages: 0 });
        }
        let file = self.files.get(&id).ok_or(io::ErrorKind::NotFound)?;
        Ok(Node { id, is_dir: false, len: file.len, pages: file.pages() })
    }

    fn child(&self, dir: u64, name: &str) -> io::Result<u64> {
        let dir = self.dirs.get(&dir).ok_or(io::ErrorKind::NotADirectory)?;
        Ok(*dir.now.get(name).ok_or(io::ErrorKind::NotFound)?)
    }

    pub(crate) fn names(&mut self, dir: u64) -> io::Result<&mut BTreeMap<String, u64>> {
        Ok(&mut self.dirs.get_mut(&dir).ok_or(io::ErrorKind::NotADirectory)?.now)
    }

    fn file(&mut self, id: u64) -> io::Result<&mut File> {
        Ok(self.files.get_mut(&id).ok_or(io::ErrorKind::NotFound)?)
    }

    fn is_named(&self, id: u64, prefix: Option<&str>) -> bool {
        let name = self.files.get(&id).map_or("", |file| &file.name);
        prefix.is_some_and(|prefix| name.starts_with(prefix))
    }

    fn forget(&mut self, id: Option<u64>) {
        if let Some(file) = id.and_then(|id| self.files.get(&id)) {
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

    pub(crate) fn room(&self) -> (u64, u64) {
        let capacity = self.faults.capacity.unwrap_or(ANY_CAPACITY);
        (capacity, capacity.saturating_sub(self.used))
    }

    pub(crate) fn make_file(&mut self, dir: u64, name: &str) -> io::Result<u64> {
        if let Some(id) = self.names(dir)?.get(name) {
            return Ok(*id);
        }
        let id = self.next;
        self.next += 1;
        self.names(dir)?.insert(name.to_owned(), id);
        self.files.insert(id, File { name: name.to_owned(), ..File::default() });
        Ok(id)
    }

    pub(crate) fn make_dir(&mut self, dir: u64, name: &str) -> io::Result<u64> {
        if let Some(id) = self.names(dir)?.get(name) {
            return Ok(*id);
        }
        let id = self.next;
        self.names(dir)?.insert(name.to_owned(), id);
        self.next += 1;
        self.dirs.insert(id, Dir::default());
        Ok(id)
    }

    pub(crate) fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> io::Result<()> {
        let id = self.names(from.0)?.remove(from.1).ok_or(io::ErrorKind::NotFound)?;
        let replaced = self.names(to.0)?.insert(to.1.to_owned(), id);
        self.forget(replaced);
        if let Some(file) = self.files.get_mut(&id) {
            file.name = to.1.to_owned();
        }
        Ok(())
    }

    pub(crate) fn unlink(&mut self, dir: u64, name: &str) -> io::Result<()> {
        let id = self.child(dir, name)?;
        if self.dirs.contains_key(&id) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        self.names(dir)?.remove(name);
        self.forget(Some(id));
        Ok(())
    }

    pub(crate) fn unlink_dir(&mut self, dir: u64, name: &str) -> io::Result<()> {
        let id = self.child(dir, name)?;
        if !self.names(id)?.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        self.names(dir)?.remove(name);
        Ok(())
    }

    pub(crate) fn sync_names(&mut self, dir: u64) -> io::Result<()> {
        let lying = self.faults.lying_dirs;
        let dir = self.dirs.get_mut(&dir).ok_or(io::ErrorKind::NotADirectory)?;
        if !lying {
            dir.durable = dir.now.clone();
        }
        Ok(())
    }

    pub(crate) fn read(&mut self, id: u64, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        if self.is_named(id, self.faults.failing_read) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let file = self.file(id)?;
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
    }

    pub(crate) fn write(&mut self, id: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.files.remove(&id).ok_or(io::ErrorKind::NotFound)?;
        let result = file.write(self, offset, bytes);
        self.files.insert(id, file);
        result
    }

    pub(crate) fn sync(&mut self, id: u64) -> io::Result<()> {
        if self.is_named(id, self.faults.lying_sync) {
            return Ok(());
        }
        let fails = self.is_named(id, self.faults.failing_sync);
        let reverts = self.faults.failed_sync_reverts;
        let file = self.file(id)?;
        if fails {
            // Linux marks the pages clean although they were not written.
            file.dirty.clear();
            if reverts {
                file.now = file.durable.clone();
            }
            return Err(io::Error::from_raw_os_error(EIO));
        }
        for page in std::mem::take(&mut file.dirty) {
            match file.now.get(&page) {
                Some(bytes) => file.durable.insert(page, bytes.clone()),
                None => file.durable.remove(&page),
            };
        }
        file.durable_len = file.len;
        Ok(())
    }

    pub(crate) fn length(&mut self, id: u64) -> io::Result<u64> {
        Ok(self.file(id)?.len)
    }

    pub(crate) fn reserve(&mut self, id: u64, len: u64) -> io::Result<()> {
        let pages = len.div_ceil(PAGE as u64);
        let (taken, reserved) = {
            let file = self.file(id)?;
            (file.pages(), file.reserved)
        };
        if pages > reserved {
            self.take_room(pages.saturating_sub(taken))?;
            let file = self.file(id)?;
            file.reserved = pages;
            file.len = file.len.max(len);
        }
        Ok(())
    }

    fn set_len(&mut self, id: u64, len: u64) -> io::Result<()> {
        let file = self.file(id)?;
        let before = file.pages();
        let end = len.div_ceil(PAGE as u64);
        let gone: Vec<u64> = file.now.keys().copied().filter(|page| *page >= end).collect();
        for page in gone {
            file.now.remove(&page);
            file.dirty.insert(page);
        }
        let within = (len % PAGE as u64) as usize;
        if within > 0
            && let Some(page) = file.now.get_mut(&(end - 1))
        {
            page[within..].fill(0);
            file.dirty.insert(end - 1);
        }
        file.reserved = file.reserved.min(end);
        file.len = len;
        let freed = before - file.pages();
        self.used -= freed.min(self.used);
        Ok(())
    }

    pub(crate) fn forget_cache(&mut self, id: u64) -> io::Result<()> {
        let file = self.file(id)?;
        let mut now = file.durable.clone();
        for page in &file.dirty {
            match file.now.get(page) {
                Some(bytes) => now.insert(*page, bytes.clone()),
                None => now.remove(page),
            };
        }
        file.now = now;
        Ok(())
    }
}

impl File {
    fn pages(&self) -> u64 {
        self.reserved + self.now.keys().filter(|page| **page >= self.reserved).count() as u64
    }

    fn write(&mut self, state: &mut State, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (page, within) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let len = rest.len().min(PAGE - within);
            if !self.now.contains_key(&page) {
                if page >= self.reserved {
                    state.take_room(1)?;
                }
                self.now.insert(page, Box::new([0; PAGE]));
            }
            self.now.get_mut(&page).unwrap()[within..within + len].copy_from_slice(&rest[..len]);
            self.dirty.insert(page);
            at += len as u64;
            rest = &rest[len..];
            self.len = self.len.max(at);
        }
        Ok(())
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
